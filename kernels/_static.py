"""What `python -m benchmarks.static` compiles ahead of time: each kernel file lists its launches in ``static_cases()``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["LAUNCHES", "TYPES", "StaticCase"]

TYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""Storage types of the cases: torch's name -> Triton's name."""
LAUNCHES = (
    ("float32", 1024, 4096, False),
    ("float32", 1024, 4096, True),
    ("float32", 65536, 64, False),
    ("bfloat16", 1024, 4096, False),
    ("bfloat16", 1024, 4096, True),
)
"""(storage type, rows, event, fast) that most ops list: long rows and short rows, exact and fast normals."""


@dataclasses.dataclass(frozen=True)
class StaticCase:
    """One launch of one kernel, described without tensors.

    Attributes:
        kernel: the jitted function.
        name: what is particular about this launch: "float32 long rows, exact".
        arguments: run-time arguments and their types: ``{"p_out": "*fp32", "p_key": "*i64", "rows": "i32"}``; None for a
            pointer that the launch leaves out.
        constants: compile-time arguments.
        options: compiler options of the launch.
        elements: elements that one program covers.
        bytes_per_element: bytes that a perfect kernel moves for an element.
        trips: how often a program goes round its loop to cover ``elements``; 1 without a loop.
        unaligned: arguments not divisible by 16. All others are, as PyTorch's allocations and common event sizes are.
        wide: whether accesses must be 16 bytes wide (contiguous float32).
    """

    kernel: Any
    name: str
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    elements: int
    bytes_per_element: float
    trips: int = 1
    unaligned: frozenset[str] = frozenset()
    wide: bool = False
