"""uniform: uniforms strictly inside (0, 1) as a pure function of a key.

    u = (floor(w / 2^9) + 1/2) / 2^23    for each 32-bit Philox word w

Exact in float32 and symmetric about 1/2; never 0 and never 1, so that logarithms and inverse distribution functions are
finite. Rounding to bfloat16 or float16 can reach 1. :mod:`fastgen.ops._philox` has the layout of the counter.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import uniforms
from fastgen.ops._spec import OpSpec
from fastgen.ops.normal import SPEC as NORMAL

__all__ = ["uniform", "uniform_reference"]


def uniform_reference(shape: Sequence[int], key: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`uniform` in plain PyTorch."""
    size = _checks.sample_shape(shape)
    return uniforms(size, _checks.prepare_key(key, size[0], None)).to(dtype or torch.get_default_dtype())


def _run(shape: Sequence[int], key: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=key.device)
    rows, event = _checks.as_rows(out)
    if backend == "cpp":
        _native.kernel("uniform")(_native.DTYPES[dtype], out, rows, event, key, key.numel() // 4, torch.get_num_threads())
    else:
        _dispatch.triton_module("uniform").uniform(out, rows, event, key)
    return out


def _fake(shape: Sequence[int], key: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return key.new_empty(shape, dtype=dtype)


_uniform = _dispatch.raw_op("uniform", "(SymInt[] shape, Tensor key, ScalarType dtype, str backend) -> Tensor", _run, _fake)


def uniform(
    shape: Sequence[int],
    key: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> Tensor:
    """Uniforms strictly inside (0, 1), a pure function of ``key``.

    Args, result and errors are those of :func:`fastgen.ops.normal`, without the math modes: every backend gives the same bits.

    >>> bool((uniform((4, 8), fastgen.random.key(0)) < 1).all())
    True
    """
    size = _checks.sample_shape(shape)
    dtype = _checks.floating(dtype)
    key = _checks.prepare_key(key, size[0], _checks.device_of(key, device))
    chosen = _dispatch.choose(SPEC, backend, key, dtype)
    out = uniforms(size, key).to(dtype) if chosen == "reference" else _uniform(size, key, dtype, chosen)
    return out if memory_format is torch.contiguous_format else out.contiguous(memory_format=memory_format)


def _example_inputs(rows: int, event: tuple[int, ...], **options: Any) -> dict[str, Any]:
    inputs = NORMAL.example_inputs(rows, event, **options)
    del inputs["math"]
    return inputs


SPEC = OpSpec(
    name="uniform",
    function=uniform,
    reference=uniform_reference,
    outputs={"u": "exact"},
    gradients=(),
    example_inputs=_example_inputs,
    flags={"per_sample": (False, True)},
    shapes=NORMAL.shapes,
    bytes_moved=NORMAL.bytes_moved,
)
