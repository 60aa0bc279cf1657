"""One comparison of models: its sides made and checked, timed side by side, profiled, and their memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, LoadWatch
from benchmarks.measure import quantiles, time_rounds
from benchmarks.models.case import Case, Goal, Side
from benchmarks.parity import ParityError
from benchmarks.table import aligned, markdown
from fastgen.ops import _native

__all__ = [
    "KERNELS",
    "OPERATORS",
    "WRONG",
    "ModelRow",
    "figure_table",
    "peak_of_side",
    "product_share",
    "row_table",
    "run_case",
]

WRONG = "parity failed, not timed"
OPERATORS = (
    "mm", "addmm", "bmm", "baddbmm", "addmv", "dot", "mkldnn_linear", "_addmm_activation", "mkldnn_convolution", "slow_conv2d",
    "thnn_conv2d", "_slow_conv2d_forward", "_slow_conv2d_backward", "convolution_backward", "mkldnn_convolution_backward",
    "_convolution_pointwise", "_linear_pointwise", "conv_transpose2d", "slow_conv_transpose2d",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip
"""Operators, without their namespace, that are a library's matrix product, convolution or attention."""
KERNELS = (
    "winograd_conv2d",
    "winograd_conv2d_weight",
    "winograd_conv2d_weight_gradient",
    "perceptron_fwd",
    "perceptron_bwd",
    "perceptron_coupling_fwd",
    "perceptron_coupling_bwd",
    "perceptron_coupling_rebuild",
    "lu_linear_fwd",
    "lu_linear_bwd",
    "lu_linear_rebuild",
    "nearest_code_fwd",
    "attention_fwd",
    "attention_bwd",
)
"""Our own kernels that are one."""
_AGAIN = "again"


@dataclasses.dataclass
class ModelRow:
    """One side of one comparison; what ``--json`` writes. Times in milliseconds of one call."""

    case: str
    work: str
    timed: str
    side: str
    status: str = "ok"
    """"ok", or why there is no time: a missing package, a failed parity check."""
    error: float | None = None
    """Relative difference from the other sides, as checked."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds_ms: list[float] = dataclasses.field(default_factory=list)
    """Of every round: ratios of two sides are those of the same round."""
    product_share: float | None = None
    """Share of the time that is spent in matrix products, convolutions and attention, the libraries' or our own."""
    peak_bytes: int | None = None
    """Memory that a call takes on top of what is held between calls, in a process of its own."""
    control: float | None = None
    """A/A: the first side against itself, which should be 1."""
    contended: bool | None = None
    foreign_cores: float | None = None
    threads: int | None = None


def product_share(call: Callable[[], Any], calls: int = 3) -> float | None:
    """Share of the time of a call, which has run before, in :data:`OPERATORS` and :data:`KERNELS`: the middle one of several
    calls'. None without any.

    Profiling makes everything else look a little longer than it is.
    """
    shares = [share for share in (_product_share(call) for _ in range(calls)) if share]
    return statistics.median(shares) if shares else None


def _product_share(call: Callable[[], Any]) -> float:
    from torch.profiler import ProfilerActivity, profile

    with _native.watched() as seconds, profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    own = sum(seconds.get(name, 0.0) for name in KERNELS)
    others = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key.rpartition("::")[2] in OPERATORS)
    inside = own + others / 1e6
    return min(1.0, inside / wall)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def peak_of_side(case: Case, name: str, tiny: bool = False) -> int:
    """Bytes of memory that a call needs, at its peak, on top of what this process holds between calls.

    The process runs two calls first, so that whatever is made once is held already. Linux alone: it needs /proc.
    """
    side = case.sides(tiny)[name]()
    side.call()
    side.call()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    side.call()
    return max(0, _status_bytes("VmHWM") - before)


def _peak_in_child(case: Case, name: str, tiny: bool) -> int | None:
    """:func:`peak_of_side` in a process of its own; None where the system does not say."""
    # large blocks go back to the system when they are freed, so that the resident set is what is alive
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.models", "--peak", case.name, name, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command + ["--tiny"] * tiny, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"]) if done.returncode == 0 else None


def run_case(case: Case, *, seconds: float = 0.0, tiny: bool = False, started: bool = True) -> list[ModelRow]:
    """Make, check, time and profile the sides of a comparison: a row each."""

    def row(name: str, status: str = "ok", **values: Any) -> ModelRow:
        threads = torch.get_num_threads()
        return ModelRow(case.name, case.work, case.timed, name, status, threads=threads, **values)

    sides: dict[str, Side] = {}
    errors: dict[str, float] = {}
    refused: list[ModelRow] = []
    for name, make in case.sides(tiny).items():
        try:
            side = make()
            if side.check is not None:
                errors[name] = side.check()
        except ImportError as error:
            refused.append(row(name, f"not installed: {error.name or error} (pip install 'fastgen-torch[bench]')"))
            continue
        except ParityError as error:
            refused.append(row(name, f"{WRONG}: {error}"))
            continue
        sides[name] = side
    if not sides:
        return refused
    calls = {name: [side.call] for name, side in sides.items()}
    calls[_AGAIN] = calls[next(iter(sides))]
    before = LoadWatch.busy_before(torch.get_num_threads(), started)
    watch = LoadWatch()
    times = time_rounds(calls, seconds=seconds, min_rounds=1 if tiny else case.rounds, patience=math.inf)
    foreign, busy = watch.foreign(), watch.contended() or before is not None
    control = times[_AGAIN].over(times[next(iter(sides))]).median
    rows = []
    for name, side in sides.items():
        took = quantiles(times[name].seconds)
        rows.append(
            row(
                name, error=errors.get(name), median_ms=took.median * 1e3, p20_ms=took.p20 * 1e3, p80_ms=took.p80 * 1e3,
                rounds_ms=[1e3 * s for s in times[name].seconds], product_share=product_share(side.call),
                peak_bytes=_peak_in_child(case, name, tiny) if case.memory else None, control=control,
                contended=busy or not 0.97 <= control <= 1.03, foreign_cores=foreign,
            )
        )  # fmt: skip
    return rows + refused


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row_table(rows: Sequence[ModelRow]) -> str:
    """Aligned text: one line a side, then those that were not timed."""
    heads = ("case", "side", "ms", "p20", "p80", "in products", "peak MiB", "error")
    lines = [
        (
            row.case, row.side, *(_text(v, ".2f") for v in (row.median_ms, row.p20_ms, row.p80_ms)),
            _text(row.product_share, ".0%"), _text(row.peak_bytes and row.peak_bytes / 2**20, ".1f"), _text(row.error, ".1e"),
        )
        for row in rows if row.status == "ok"
    ]  # fmt: skip
    refused = [f"{row.case}  {row.side}: {row.status}" for row in rows if row.status != "ok"]
    return "\n".join([aligned(lines, heads, left=(0, 1)) if lines else "", *refused]).strip()


def _measure(goal: Goal, ours: ModelRow, theirs: Sequence[ModelRow]) -> tuple[ModelRow, float, str] | None:
    """The rival that counts, how many times more it takes, and how that reads."""
    if goal.of == "memory":
        known = [row for row in theirs if row.peak_bytes is not None]
        if not known or not ours.peak_bytes:
            return None
        least = min(known, key=lambda row: row.peak_bytes or 0)
        ratio = (least.peak_bytes or 1) / ours.peak_bytes
        ratio = 1 / ratio if goal.growth else ratio
        return least, ratio, f"{ratio:.2f}x ({ours.peak_bytes / 2**20:.0f} MiB against {(least.peak_bytes or 0) / 2**20:.0f})"
    timed = [row for row in theirs if row.rounds_ms]
    if not timed or not ours.rounds_ms:
        return None
    fastest = min(timed, key=lambda row: row.median_ms or math.inf)
    ratios = quantiles([(a / b if goal.growth else b / a) for a, b in zip(ours.rounds_ms, fastest.rounds_ms, strict=True)])
    return fastest, ratios.median, f"{ratios.median:.2f}x ({ratios.p20:.2f} to {ratios.p80:.2f})"


def figure_table(cases: Sequence[Case], rows: Sequence[ModelRow]) -> str:
    """Markdown: the work, what was timed, against what, the target and what was measured."""
    lines = []
    for case in cases:
        own = {row.side: row for row in rows if row.case == case.name}
        for goal in case.goals:
            ours = own.get(goal.ours)
            found = None
            if ours is not None and ours.status == "ok":
                found = _measure(goal, ours, [own[name] for name in goal.against if name in own and own[name].status == "ok"])
            if found is None:
                measured = next((row.status for row in own.values() if row.status != "ok"), "not measured")
                against = " or ".join(goal.against)
            else:
                rival, ratio, measured = found
                against = rival.side
                measured += "" if (ratio <= goal.target if goal.growth else ratio >= goal.target) else ", not reached"
                measured += ", machine not idle" if ours is not None and ours.contended else ""
            share = _text(ours.product_share if ours else None, ".0%")
            error = _text(own[against].error if against in own else None, ".1e")
            target = f"{'at most' if goal.growth else 'at least'} {goal.target:g}x"
            what = "peak memory" if goal.of == "memory" else case.timed
            lines.append((case.work, what, goal.ours, against, target, measured, share, error))
    heads = ("work", "measured is", "side", "against", "target", "measured (p20 to p80)", "in products", "difference")
    return markdown(lines, heads)
