"""normal: standard normals as a pure function of a key.

    z = sqrt(-2 ln u) (cos theta, sin theta),   u = (a + 1/2) / 2^32,   theta = 2 pi (b + 1/2) / 2^32

on pairs (a, b) of Philox4x32-10 words; :mod:`fastgen.ops._philox` has the layout of the counter. Sample i has the same values
for any number of samples beside it, any cut into batches, any memory format, thread count, backend and device: in exact mode
to the bit, in fast mode (fused multiply-adds, approximate square root) to a few ulp.

Sources: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller (1958).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import normals
from fastgen.ops._spec import OpSpec
from fastgen.random import key as make_key

__all__ = ["normal", "normal_reference"]


def normal_reference(shape: Sequence[int], key: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`normal` in plain PyTorch."""
    size = _checks.sample_shape(shape)
    return normals(size, _checks.prepare_key(key, size[0], None)).to(dtype or torch.get_default_dtype())


def _run(shape: Sequence[int], key: Tensor, dtype: torch.dtype, fast: bool, backend: str) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=key.device)
    rows, event = _checks.as_rows(out)
    if backend == "cpp":
        _native.kernel("normal")(_native.DTYPES[dtype], out, rows, event, key, key.numel() // 4, fast, torch.get_num_threads())
    else:
        _dispatch.triton_module("normal").normal(out, rows, event, key, fast)
    return out


def _fake(shape: Sequence[int], key: Tensor, dtype: torch.dtype, fast: bool, backend: str) -> Tensor:
    return key.new_empty(shape, dtype=dtype)


_normal = _dispatch.raw_op(
    "normal", "(SymInt[] shape, Tensor key, ScalarType dtype, bool fast, str backend) -> Tensor", _run, _fake
)


def normal(
    shape: Sequence[int],
    key: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    math: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normals, a pure function of ``key``.

    Args:
        shape: samples first: (N, ...). Element e of a sample is counted in logical order.
        key: :func:`fastgen.random.key`, [4] or [N, 4]; None takes a fresh seed from PyTorch's default generator.
        dtype: default: PyTorch's default dtype. Values are drawn in float32 and rounded; float64 holds float32 values.
        device: only without a key; a key decides its own.
        memory_format: layout of the result; the values do not depend on it.
        math: "exact" (default: the same bits in every backend) or "fast" (equal to a few ulp); None: see
            :func:`fastgen.use_math`.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        Tensor of ``shape``.

    Raises:
        TypeError: if the key is not an int64 tensor or dtype is not floating.
        ValueError: for a shape without a sample dimension, a key of the wrong shape, a backend that cannot serve.

    >>> normal((2, 3), fastgen.random.key(0)).shape
    torch.Size([2, 3])
    """
    size = _checks.sample_shape(shape)
    dtype = _checks.floating(dtype)
    key = _checks.prepare_key(key, size[0], _checks.device_of(key, device))
    chosen = _dispatch.choose(SPEC, backend, key, dtype)
    fast = _dispatch.is_fast(math)
    out = normals(size, key).to(dtype) if chosen == "reference" else _normal(size, key, dtype, fast, chosen)
    return out if memory_format is torch.contiguous_format else out.contiguous(memory_format=memory_format)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    per_sample: bool = False,
    math: str = "exact",
) -> dict[str, Any]:
    seeds = torch.randint(2**62, (rows if per_sample else 1,), generator=generator).tolist()
    key = make_key(seeds if per_sample else seeds[0], stream=3, step=5, sample=2**33 + 7, device=device)
    return {"shape": (rows, *event), "key": key, "dtype": dtype, "math": math}


SPEC = OpSpec(
    name="normal",
    function=normal,
    reference=normal_reference,
    outputs={"z": "exact"},
    gradients=(),
    example_inputs=_example_inputs,
    flags={"per_sample": (False, True), "math": ("exact", "fast")},
    shapes=((64, (16,)), (64, (3, 32, 32)), (1024, (4096,))),
    bytes_moved=lambda inputs, mode: torch.Size(inputs["shape"]).numel() * inputs["dtype"].itemsize,
)
