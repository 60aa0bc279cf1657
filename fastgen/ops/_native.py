"""The compiled CPU kernels: loaded on first use, one table of functions per instruction set.

A kernel takes its arguments flat, in the order of the C++ function: tensors (their memory; None is a null pointer), ints,
bools and floats. It checks nothing: the op does. ``FASTGEN_ISA`` = scalar | avx2 | avx512 | neon forces one set.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["DTYPES", "available_isas", "current_isa", "kernel", "missing", "ready", "use_isa"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage types of the kernels and their codes in ``csrc/simd.h``."""

_tables: dict[str, dict[str, Callable[..., None]]] | None = None
_table: dict[str, Callable[..., None]] = {}
_isa: str | None = None
_missing: str | None = None


def _load() -> None:
    global _tables, _missing
    _tables = {}
    try:
        extension = importlib.import_module("fastgen._C")
    except ImportError as error:
        _missing = f"fastgen._C cannot be imported ({error}); install with a C++ compiler to have the CPU kernels"
        return
    _tables = extension.tables()  # fastest first
    wanted = os.environ.get("FASTGEN_ISA")
    if wanted and wanted not in _tables:
        _missing = f"FASTGEN_ISA={wanted} is not available here; available: {', '.join(_tables)}"
        return
    _select(wanted or next(iter(_tables)))


def _select(isa: str | None) -> None:
    global _isa, _table
    _isa = isa
    _table = _tables[isa] if _tables and isa else {}


def missing() -> str | None:
    """None if the CPU kernels are loaded, else the reason why not."""
    if _tables is None:
        _load()
    return _missing


def ready() -> bool:
    """Whether there are CPU kernels to call; the cheap form of ``missing() is None``."""
    return bool(_table) or missing() is None


# What torch.compile takes as it stands instead of tracing it: nothing can be imported there. `assume_constant_result` sets this
# too, but importing it imports the compiler.
for _answer in (missing, ready):
    _answer.__dict__["_dynamo_marked_constant"] = True


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and that this CPU has, fastest first."""
    missing()
    return list(_tables or {})


def current_isa() -> str | None:
    """The instruction set in use; None without the extension."""
    missing()
    return _isa


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Force an instruction set within the block, for tests and benchmarks. Affects all threads."""
    if isa not in available_isas():
        raise ValueError(f"instruction set {isa!r} is not available here; available: {', '.join(available_isas())}")
    before = _isa
    _select(isa)
    try:
        yield
    finally:
        _select(before)


def add_table(isa: str, table: dict[str, Callable[..., None]]) -> None:
    """Offer kernels that run elsewhere, an emulator for one, under the name of an instruction set."""
    missing()
    if _tables is not None:
        _tables[isa] = table


def kernel(name: str) -> Callable[..., Any]:
    """The CPU kernel of a name, for the instruction set in use."""
    ready()
    return _table[name]
