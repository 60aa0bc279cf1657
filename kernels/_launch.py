"""How kernels are cut into programs, which compiler options they take and how they store: the same rules for every op."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _probe():
    pass


INTERPRET = isinstance(_probe, InterpretedFunction)
"""Kernels run in Python on the CPU: TRITON_INTERPRET was set when they were imported."""
_INTERPRET = tl.constexpr(INTERPRET)

ELEMENTS = 65536 if INTERPRET else 1024
"""Elements of a tile. The interpreter pays by the program, not by the element."""
GENERATED = 65536 if INTERPRET else 2048
"""The same where a kernel reads no tiles: registers are free, and 16 elements a thread share the round keys."""


def tile(rows, event, elements=ELEMENTS):
    """(ROWS, BLOCK) of a tile over [rows, event], powers of two: whole short rows, or a part of a long one.

    BLOCK is at least 16, so that four quartets a row keep accesses 16 bytes wide.
    """
    block = max(16, min(elements, triton.next_power_of_2(max(event, 1))))
    return max(1, min(elements // block, triton.next_power_of_2(max(rows, 1)))), block


def options(fast):
    """Compiler options: exact normals forbid fused multiply-adds."""
    return {"enable_fp_fusion": bool(fast), "num_warps": 4}


def key_stride(key):
    """0 if one key serves all samples, 4 if each sample has its own row."""
    return 0 if key is None or key.dim() == 1 else 4


@triton.jit
def narrow(x, p_out):
    """``x`` in the storage type behind a pointer, rounded to nearest even (Triton 3.9's interpreter truncates to bfloat16)."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    if _INTERPRET and dtype == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (word + 0x7FFF + ((word >> 16) & 1)) >> 16, (word >> 16) | 0x40)
        out = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(dtype)
    return out
