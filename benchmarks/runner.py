"""One workload: its providers, the parity gate, the timing, and the rows that come of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import LoadWatch, level_of
from benchmarks.measure import Timing, peak_bytes, quantiles, time_rounds
from benchmarks.parity import ParityError, check_baseline, check_fused, truth
from benchmarks.peers import PEERS
from benchmarks.workload import Workload, bind
from fastgen.ops import use_backend

__all__ = ["ALL", "BACKENDS", "COPY", "FUSED", "OWN", "WRONG", "Row", "run_workload"]

FUSED = ("triton", "cpp")
"""Fused backends, fastest first: the first that serves is what the others are compared with."""
OWN = "fastgen"
"""Provider in place of those, for an op that has no kernels of its own because libraries do all the work."""
BACKENDS = ("reference", "compile", *reversed(FUSED), "peers")
ALL, COPY, GEMM = "all", "copy", "gemm"
WRONG = "parity failed, not timed"
"""How the status of a row begins whose provider, or whose fused backend (provider "all"), computes something else."""
_AGAIN = "again"
_GEMM_SIZE = 1024

Calls = list[Callable[[], Any]]


@dataclasses.dataclass
class Row:
    """One provider on one workload; what ``--json`` writes. Times in microseconds of one call."""

    op: str
    shape: str
    size: str
    cache: str
    """The cache that holds what one call must move."""
    mode: str
    dtype: str
    flags: dict[str, Any]
    provider: str
    status: str = "ok"
    """"ok", or why there is no time: a missing package, a backend that cannot serve, a failed parity check."""
    fused: bool = False
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int | None = None
    inner: int | None = None
    """Calls in one round."""
    ratio: float | None = None
    """How many times longer than the fused op: the median of the ratios of the rounds."""
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    bytes_moved: int | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    """Of a copy that moves as many bytes, timed in the same rounds."""
    copy_share: float | None = None
    operations: int | None = None
    """Additions and multiplications, of an op that is limited by them."""
    gflop_per_s: float | None = None
    gemm_gflop_per_s: float | None = None
    """Of a product of square matrices of the same storage type, timed in the same rounds."""
    gemm_share: float | None = None
    peak_bytes: int | None = None
    control: float | None = None
    """A/A: the fused op against itself, which should be 1."""
    control_p20: float | None = None
    control_p80: float | None = None
    contended: bool | None = None
    """The machine had other work, or the control lies outside 0.97 .. 1.03."""
    foreign_cores: float | None = None
    isa: str | None = None
    threads: int | None = None


@dataclasses.dataclass
class _Provider:
    name: str
    calls: Calls
    fused: bool = False
    slow: bool = False
    took: float | None = None
    """Seconds of the first call, of a slow one."""


def _with_backend(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return functools.partial(function, backend=backend)


def _copies(count: int, size: int, device: str) -> Calls:
    """Copies that read size / 2 bytes and write as many."""
    half = max(1, size // 8)
    pairs = [(torch.zeros(half, device=device), torch.zeros(half, device=device)) for _ in range(count)]

    def copy(pair: tuple[Tensor, Tensor]) -> Callable[[], Any]:
        return lambda: pair[0].copy_(pair[1])

    return [copy(pair) for pair in pairs]


def _product(dtype: str, device: str) -> Calls:
    """The product of two matrices, with the libraries that PyTorch has."""
    a, b = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE, device=device).to(getattr(torch, dtype))
    return [lambda: a @ b]


class _Workbench:
    """Builds and checks the providers of one workload."""

    def __init__(
        self, workload: Workload, inputs: list[dict[str, Any]], backends: Sequence[str], peers: Collection[str] | None
    ) -> None:
        self.workload, self.inputs, self.backends, self.peers = workload, inputs, backends, peers
        self.ready: list[_Provider] = []
        self.refused: list[tuple[str, str]] = []

    def _bound(self, function: Callable[..., Any], inputs: list[dict[str, Any]]) -> Calls:
        return [bind(function, one, self.workload.mode, self.workload.spec.gradients) for one in inputs]

    def _candidates(self) -> list[tuple[str, Callable[[], Calls], bool]]:
        spec = self.workload.spec
        plain = [self.workload.for_reference(one) for one in self.inputs]
        compiled = torch.compile(spec.reference, dynamic=False)
        made: dict[str, tuple[Callable[[], Calls], bool]] = {
            "triton": (lambda: self._bound(_with_backend(spec.function, "triton"), self.inputs), True),
            "cpp": (lambda: self._bound(_with_backend(spec.function, "cpp"), self.inputs), True),
            "reference": (lambda: self._bound(spec.reference, plain), False),
            "compile": (lambda: self._bound(compiled, plain), False),
        }
        found = [(name, *made[name]) for name in made if name in self.backends]
        if spec.backends:
            return found
        served = [(OWN, lambda: self._bound(spec.function, self.inputs), True)] if set(FUSED) & set(self.backends) else []
        return [*served, *(candidate for candidate in found if candidate[0] not in FUSED)]

    def prepare(self) -> None:
        """Build what can be built; a backend or a package that is missing becomes a line of its own."""
        torch._dynamo.reset()
        for name, build, fused in self._candidates():
            try:
                with use_backend(None):
                    calls = build()
                    calls[0]()
            except ValueError as error:  # a backend that cannot serve says why
                if not fused:
                    raise
                self.refused.append((name, str(error)))
                continue
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                self.refused.append((name, f"torch.compile failed: {str(error).splitlines()[0]}"))
                continue
            self.ready.append(_Provider(name, calls, fused))
        if "peers" in self.backends:
            self._prepare_peers()

    def _prepare_peers(self) -> None:
        workload = self.workload
        for peer in PEERS.get(workload.op, ()):
            if workload.mode not in peer.modes or not peer.when(dict(workload.flags)):
                continue
            if self.peers is not None and peer.name not in self.peers:
                continue
            try:
                calls = [peer.build(one, workload.mode) for one in self.inputs]
                if peer.check is not None:
                    peer.check(self.inputs[0])
            except ImportError as error:
                self.refused.append((peer.name, f"not installed: {error.name or error} (pip install 'fastgen-torch[bench]')"))
                continue
            except ParityError as error:
                self.refused.append((peer.name, f"{WRONG}: {error}"))
                continue
            self.ready.append(_Provider(peer.name, calls, slow=peer.slow))

    def check(self) -> None:
        """Fused backends and compiled code on every input set, what is plain PyTorch on the first.

        A baseline or peer that is wrong is refused by itself; a fused backend that is wrong raises ParityError.
        """
        own_check = {peer.name for peer in PEERS.get(self.workload.op, ()) if peer.check is not None}
        for i, one in enumerate(self.inputs):
            expected = truth(self.workload, one)
            for provider in list(self.ready):
                if provider.name in own_check or (i and not provider.fused and provider.name != "compile"):
                    continue
                verify = check_fused if provider.fused else check_baseline
                start = time.perf_counter()
                result = provider.calls[i]()
                provider.took = time.perf_counter() - start if provider.slow else None
                try:
                    verify(self.workload, one, result, expected)
                except ParityError as error:
                    if provider.fused:
                        raise ParityError(f"{error} ({provider.name}, input set {i})") from error
                    self.ready.remove(provider)
                    self.refused.append((provider.name, f"{WRONG}: {error}"))


def run_workload(
    workload: Workload,
    *,
    backends: Sequence[str] = BACKENDS,
    device: str = "cpu",
    seconds: float = 3.0,
    min_rounds: int = 7,
    sets: int | None = None,
    started: bool = True,
    isa: str | None = None,
    peers: Collection[str] | None = None,
) -> list[Row]:
    """Check and time one workload; of its peers, those named in ``peers``, or all.

    Returns:
        A row for each provider. Where a fused backend fails parity, one row says so and nothing is timed.
    """
    with torch.no_grad() if workload.mode == "fwd" else contextlib.nullcontext():
        return _run(workload, backends, device, seconds, min_rounds, sets, started, isa, peers)


def _run(
    workload: Workload,
    backends: Sequence[str],
    device: str,
    seconds: float,
    min_rounds: int,
    sets: int | None,
    started: bool,
    isa: str | None,
    peers: Collection[str] | None,
) -> list[Row]:
    inputs = workload.inputs(device, sets)
    moved, operations = workload.bytes_moved(inputs[0]), workload.operations(inputs[0])

    def row(provider: str, status: str = "ok", **values: Any) -> Row:
        return Row(
            op=workload.op, shape=workload.shape, size=workload.size, cache=level_of(moved), mode=workload.mode,
            dtype=workload.dtype, flags=dict(workload.flags), provider=provider, status=status, bytes_moved=moved,
            operations=operations or None, isa=isa, threads=torch.get_num_threads(), **values,
        )  # fmt: skip

    bench = _Workbench(workload, inputs, backends, peers)
    try:
        bench.prepare()
        bench.check()
    except ParityError as error:
        return [row(ALL, f"{WRONG}: {error}")]

    fused = next((p for p in bench.ready if p.fused), None)
    entries = {provider.name: provider.calls for provider in bench.ready}
    if fused is not None:
        entries[_AGAIN] = fused.calls
    entries[COPY] = _copies(len(inputs), moved, device)
    if operations:
        entries[GEMM] = _product(workload.dtype, device)
    known = {provider.name: provider.took for provider in bench.ready if provider.took is not None}
    before = LoadWatch.busy_before(torch.get_num_threads(), started)
    watch = LoadWatch()
    times = time_rounds(entries, seconds=seconds, min_rounds=min_rounds, device=device, known=known)
    foreign, busy = watch.foreign(), watch.contended() or before is not None
    peaks = {provider.name: peak_bytes(provider.calls[0], device) for provider in bench.ready if not provider.slow}

    control = times[_AGAIN].over(times[fused.name]) if fused is not None else None
    noisy = control is not None and not 0.97 <= control.median <= 1.03
    copied = quantiles(times[COPY].seconds)
    copy_speed = 8 * max(1, moved // 8) / copied.median / 1e9
    product_speed = 2 * _GEMM_SIZE**3 / quantiles(times[GEMM].seconds).median / 1e9 if operations else None

    def timed(provider: _Provider) -> Row:
        timing: Timing = times[provider.name]
        took = quantiles(timing.seconds)
        ratio = timing.over(times[fused.name]) if fused is not None else None
        speed, rate = moved / took.median / 1e9, operations / took.median / 1e9 if operations else None
        return row(
            provider.name, fused=provider.fused, median_us=took.median * 1e6, p20_us=took.p20 * 1e6, p80_us=took.p80 * 1e6,
            rounds=len(timing.seconds), inner=timing.inner, ratio=ratio.median if ratio else None,
            ratio_p20=ratio.p20 if ratio else None, ratio_p80=ratio.p80 if ratio else None, gb_per_s=speed,
            copy_gb_per_s=copy_speed, copy_share=speed / copy_speed, gflop_per_s=rate, gemm_gflop_per_s=product_speed,
            gemm_share=rate / product_speed if rate and product_speed else None, peak_bytes=peaks.get(provider.name),
            control=control.median if control else None, control_p20=control.p20 if control else None,
            control_p80=control.p80 if control else None, contended=busy or noisy, foreign_cores=foreign,
        )  # fmt: skip

    return [*map(timed, bench.ready), *(row(name, why) for name, why in bench.refused)]
