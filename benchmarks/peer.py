"""``Peer``: one way to do the work of an op, or of a composite, elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Peer"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """What a user would call without fastgen.

    Attributes:
        name: as in the table.
        build: ``(inputs, mode)`` -> call without arguments. Packages are imported in there, so that a missing one costs a line
            in the table and nothing else.
        check: ``(inputs)``: whether the peer does the same work, by statistics, with injected noise, or on coefficients of its
            own; raises ParityError. None: results are compared with the reference.
        when: whether the peer does what the op does under these flags (those that differ from the default).
        modes: modes that it has.
        slow: a call may take many seconds; what the parity check needed says how often it is timed.
    """

    name: str
    build: Callable[[dict[str, Any], str], Callable[[], Any]]
    check: Callable[[dict[str, Any]], None] | None = None
    when: Callable[[Mapping[str, Any]], bool] = lambda flags: True
    modes: tuple[str, ...] = ("fwd", "fwdbwd")
    slow: bool = False
