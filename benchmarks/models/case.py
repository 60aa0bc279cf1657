"""What a comparison of whole models is: sides that do the same work, and how far ahead fastgen means to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["Case", "Goal", "Side"]


@dataclasses.dataclass
class Side:
    """One way to do the work, ready to run.

    Attributes:
        call: does it once.
        check: how far its results are from those of the others, on the same weights, inputs and noise: a relative error; raises
            ParityError where that is too much. None where there is nothing to compare with.
    """

    call: Callable[[], Any]
    check: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """One row of the table of figures.

    Attributes:
        ours: the side that is measured.
        against: sides that it is compared with; of several the fastest, or the one that needs the least memory, counts.
        target: how many times longer they are to take, or how much more memory.
        of: "time", or "memory".
        growth: the other way round: ``target`` is the most that ``ours`` may take, as a multiple of the others.
    """

    ours: str
    against: tuple[str, ...]
    target: float
    of: Literal["time", "memory"] = "time"
    growth: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        name: for the command line.
        work: what is done, in words, with its sizes.
        timed: what one call does.
        sides: ``(tiny)`` -> name of each side and how to make it. Packages are imported when a side is made, so that a missing
            one costs a line and nothing else. ``tiny`` is for tests: the same with small sizes. Whatever sides share, such as
            weights, depends on a fixed seed.
        goals: the figures.
        memory: measure the peak of every side, in a process of its own.
        rounds: how often each side is timed.
    """

    name: str
    work: str
    timed: str
    sides: Callable[[bool], Mapping[str, Callable[[], Side]]]
    goals: tuple[Goal, ...]
    memory: bool = False
    rounds: int = 5
