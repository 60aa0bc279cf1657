"""Timing of providers side by side: interleaved rounds in random order, on rotating inputs, in one process."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Quantiles", "Timing", "peak_bytes", "quantiles", "time_rounds"]

Call = Callable[[], Any]

_SHORT = 50e-6
_LOOP = 1e-3
_LONG_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """The median with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, p20 and p80 by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return Quantiles(statistics.median(ordered), at(0.2), at(0.8))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round, and how many calls a round made."""

    seconds: list[float]
    inner: int

    def over(self, other: Timing) -> Quantiles:
        """How many times longer than ``other`` this took, round by round, over the rounds that both were in."""
        return quantiles([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=False)])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _run(calls: Sequence[Call], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for call in calls:
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / len(calls)


def time_rounds(
    providers: Mapping[str, Sequence[Call]],
    *,
    seconds: float,
    min_rounds: int = 7,
    device: str = "cpu",
    seed: int = 0,
    known: Mapping[str, float] | None = None,
    patience: float = 2.0,
) -> dict[str, Timing]:
    """Time every provider once a round, in an order drawn anew each round, until ``seconds`` have passed.

    ``providers`` maps a name to one call for each input set. A round of a provider that needs less than 50 us (or that runs on
    a GPU) is a loop of at least 1 ms over its input sets; otherwise it is one call, on the next input set. Every provider sees
    the same input set in the same round. Garbage collection waits meanwhile.

    A call of more than ``patience`` seconds takes part in the first two rounds alone. ``known`` holds the seconds of calls that
    have run before, which saves running them once more to find out.
    """
    rng = random.Random(seed)
    inner, allowed = {}, {}
    for name, calls in providers.items():
        once = (known or {}).get(name) or _run(calls[:1], device)  # lazy initialisation
        if once < 0.1:  # a slow provider is not run again for an estimate
            once = min(_run(calls, device) for _ in range(2))
        inner[name] = max(1, math.ceil(_LOOP / max(once, 1e-7))) if once < _SHORT or device == "cuda" else 1
        allowed[name] = _LONG_ROUNDS if once > patience else math.inf
    loops = {name: itertools.cycle(calls) for name, calls in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.monotonic() + seconds
        done = 0
        while done < min_rounds or time.monotonic() < deadline:
            rng.shuffle(order)
            for name in [name for name in order if done < allowed[name]]:
                calls = list(itertools.islice(loops[name], inner[name]))
                times[name].append(_run(calls, device))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(times[name], inner[name]) for name in providers}


def peak_bytes(call: Call, device: str) -> int | None:
    """The most memory that one call, which has run before, has allocated at once through PyTorch's allocators.

    Its results count.

    On the CPU from the events of ``torch.profiler``; scratch that a library takes from malloc directly does not show there.
    None if the profiler reports nothing.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    kineto = profiler.profiler.kineto_results if profiler.profiler else None
    events = [e for e in kineto.events() if e.name() == "[memory]"] if kineto else []
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak if events else None
