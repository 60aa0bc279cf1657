"""Rows as text, JSON, and the table of figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.runner import WRONG, Row
from benchmarks.table import aligned, markdown
from benchmarks.workload import Workload

__all__ = ["SCHEMA", "figure_table", "headline", "read", "row_table", "warnings", "write"]

SCHEMA = 1


def write(path: Path, machine: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    """``{"schema": 1, "machine": {}, "rows": [...]}`` and ``more``; a row has the fields of :class:`benchmarks.runner.Row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "machine": machine, "rows": [dataclasses.asdict(row) for row in rows], **more}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What :func:`write` wrote.

    Raises:
        ValueError: for a file of another kind or schema.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a benchmark result of schema {SCHEMA}")
    return document["machine"], [Row(**row) for row in document["rows"]]


def headline(machine: dict[str, Any]) -> str:
    """The machine, the versions and the commit in two lines."""
    where = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']} on {machine['cpu']}"
    return (
        f"{where}, {machine['cores']} cores, {machine['threads']} threads, ISA {machine['isa']}\n"
        f"torch {machine['torch']}, commit {machine['commit'][:10]}{' (changed)' if machine['dirty'] else ''}, "
        f"{machine['date']}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.2f}" if value >= 1 << 14 else f"{value / 2**20:.4f}"


def _share(row: Row) -> str:
    """What was reached of the limit that the op has: the speed of a product of matrices, or of a copy."""
    if row.gemm_share is not None:
        return f"{row.gemm_share:.0%} of GEMM"
    return "-" if row.copy_share is None else f"{row.copy_share:.0%} of copy"


def row_table(rows: Sequence[Row]) -> str:
    """Aligned text: one line a provider."""
    heads = (
        "op",
        "shape",
        "flags",
        "mode",
        "cache",
        "provider",
        "us",
        "p20",
        "p80",
        "x fused",
        "p20",
        "p80",
        "GB/s",
        "of the limit",
        "MiB",
    )
    lines = []
    for row in rows:
        what = (row.op, row.shape, " ".join(f"{k}={v}" for k, v in row.flags.items()), row.mode, row.cache, row.provider)
        if row.status != "ok":
            lines.append((*what, row.status, *[""] * 8))
            continue
        lines.append(
            (
                *what,
                _number(row.median_us, ".2f"), _number(row.p20_us, ".2f"), _number(row.p80_us, ".2f"),
                _number(row.ratio, ".2f"), _number(row.ratio_p20, ".2f"), _number(row.ratio_p80, ".2f"),
                _number(row.gb_per_s, ".2f"), _share(row), _mebibytes(row.peak_bytes),
            )
        )  # fmt: skip
    timed = [line for line in lines if line[-1]]
    text = aligned(timed, heads, left=tuple(range(6))) if timed else ""
    refused = [f"{' '.join(filter(None, line[:4]))}  {line[5]}: {line[6]}" for line in lines if not line[-1]]
    return "\n".join(filter(None, [text, *refused]))


def warnings(rows: Iterable[Row]) -> list[str]:
    """Sentences about what spoils the figures: other work on the machine, a control that is not 1, a failed check."""
    found = []
    for row in rows:
        name = f"{row.op} {row.shape} {row.mode}"
        if row.status.startswith(WRONG):
            found.append(f"{name} ({row.provider}): {row.status}")
        elif row.fused and row.control is not None and not 0.97 <= row.control <= 1.03:
            found.append(f"{name}: the fused op against itself reads {row.control:.3f}, outside 0.97 .. 1.03")
        elif row.fused and row.contended:
            found.append(f"{name}: the machine was not idle (other work took {row.foreign_cores:.2f} cores)")
    return list(dict.fromkeys(found))


def _rows_of(workload: Workload, rows: Sequence[Row]) -> list[Row]:
    wanted = (workload.op, workload.shape, workload.mode, workload.dtype, dict(workload.flags))
    return [row for row in rows if (row.op, row.shape, row.mode, row.dtype, row.flags) == wanted]


def figure_table(figures: Sequence[Figure], rows: Sequence[Row]) -> str:
    """Markdown: work, against what, the target, what was measured, and the share of the machine's limit reached."""
    lines = []
    for figure in figures:
        own = _rows_of(figure.workload, rows)
        fused = next((row for row in own if row.fused and row.median_us is not None), None)
        peers = [row for row in own if row.provider in figure.against and row.ratio is not None]
        fastest = min(peers, key=lambda row: row.ratio or 0.0, default=None)
        floor = figure.floor if figure.floor is not None else figure.target or 0.0
        if not figure.against:
            target = f"<= {figure.target:g} us"
            measured = f"{fused.median_us:.2f} us ({fused.p20_us:.2f} to {fused.p80_us:.2f})" if fused else ""
            reached = fused is not None and (fused.median_us or 0) <= floor
        else:
            target = "-" if figure.target is None else f"{figure.target:g}x"
            target += f", at least {floor:g}x" if figure.floor is not None else ""
            measured = f"{fastest.ratio:.2f}x ({fastest.ratio_p20:.2f} to {fastest.ratio_p80:.2f})" if fastest else ""
            reached = fastest is not None and (fastest.ratio or 0) >= floor
        if not measured:
            measured = next((row.status for row in own if row.status != "ok"), "not measured")
        elif not reached:
            measured += ", not reached"
        if fused is not None and fused.contended:
            measured += ", machine not idle"
        against = fastest.provider if fastest else " or ".join(figure.against) or "a limit"
        share = _share(fused) if fused is not None else "-"
        memory = _mebibytes(fused.peak_bytes if fused else None) + " / " + _mebibytes(fastest.peak_bytes if fastest else None)
        lines.append((figure.work, against, target, measured, share, memory))
    return markdown(lines, ("work", "against", "target", "measured (p20 to p80)", "of the limit", "peak MiB, ours / theirs"))
