"""nearest_code: the nearest entry of a codebook for each vector, without the matrix of all distances.

    index = argmin_k |z - c_k|^2,    distance = |z - c_index|^2   over the last dimension

and, for codebooks that learn by moving averages, the number of vectors that chose each code and their sums, in the same call.
Gradients flow through ``distance`` to ``z`` and ``codebook``, the choice itself being constant:

    dz = 2 ddistance (z - c_index),    dc_k = sum of 2 ddistance (c_k - z) over the vectors that chose code k

The index is exact: that of the smallest distance in float64, the lowest where several are equal, whatever the backend or
instruction set. Scores z.c - |c|^2 / 2 in float32, both centred at the mean code so that a common offset cancels nothing, say
which codes can be nearest at all, by a bound on their rounding; where that leaves more than one, those are measured in float64.
CPUs with AVX-512 VNNI take scores of 8 bits first, under the same kind of bound: fewer codes are ruled out, four times as fast.
``distance`` is the float64 value, rounded once. Sums over vectors are taken in float64 and in order: nothing depends on the
number of threads.

A vector that holds a NaN or an infinity has the index 0 and a distance that is not finite; it counts in no statistics. A code
that does is not chosen, unless there is no other.

Source: van den Oord, Vinyals and Kavukcuoglu (2017), "Neural discrete representation learning", eq. 1, 2 and appendix A.1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["CodeStatistics", "NearestCode", "nearest_code", "nearest_code_reference"]

_LARGEST = 1 << 24
"""Distances that the reference holds at a time."""


class NearestCode(NamedTuple):
    """Which code is nearest, and how far it is."""

    index: Tensor  # type: ignore[assignment]  # tuple.index gives way, as in any named tuple with such a field
    """Row of the codebook for each vector, int64, the shape of ``z`` without its last dimension."""
    distance: Tensor
    """Squared Euclidean distance to it, same shape; float32 or wider."""


class CodeStatistics(NamedTuple):
    """:class:`NearestCode`, and what a codebook learns from."""

    index: Tensor  # type: ignore[assignment]
    distance: Tensor
    counts: Tensor
    """Vectors that chose each code: int64 [K]."""
    sums: Tensor
    """Their sums: [K, D], float32 or wider. The mean of a code's vectors is ``sums / counts``."""


def _prepared(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, checked."""
    for name, value in (("z", z), ("codebook", codebook)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if z.dim() == 0:
        raise ValueError("z must have shape [..., D], got a scalar")
    if codebook.dim() != 2 or not codebook.shape[0]:
        raise ValueError(f"codebook must have shape [K, D] with K at least 1, got {list(codebook.shape)}")
    if z.shape[-1] != codebook.shape[1]:
        raise ValueError(f"z has vectors of {z.shape[-1]} elements, the codebook of {codebook.shape[1]}")
    if z.device != codebook.device:
        raise ValueError(f"codebook is on {codebook.device}, expected {z.device} like z")
    if z.dtype is not codebook.dtype:
        dtype = torch.promote_types(z.dtype, codebook.dtype)
        z, codebook = z.to(dtype), codebook.to(dtype)
    return z, codebook


def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code by differences in float64, a part of the rows at a time."""
    found = []
    for part in rows.split(max(1, _LARGEST // len(codes))):
        distances = torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.nan_to_num(math.inf, math.inf).argmin(1))
    return torch.cat(found)


def nearest_code_reference(z: Tensor, codebook: Tensor, *, statistics: bool = False) -> NearestCode | CodeStatistics:
    """:func:`nearest_code` in plain PyTorch."""
    z, codebook = _prepared(z, codebook)
    wide, shape = torch.promote_types(z.dtype, torch.float32), z.shape[:-1]
    rows, codes = z.reshape(math.prod(shape), z.shape[-1]).double(), codebook.double()
    index = _nearest(rows.detach(), codes.detach())
    distance = (rows - codes[index]).square().sum(1).to(wide)
    nearest = NearestCode(index.reshape(shape), distance.reshape(shape))
    if not statistics:
        return nearest
    counted = distance.detach().isfinite()
    members, chosen = rows.detach()[counted], index[counted]
    counts = torch.zeros(len(codes), dtype=torch.int64, device=z.device).index_add_(0, chosen, torch.ones_like(chosen))
    return CodeStatistics(*nearest, counts, torch.zeros_like(codes).index_add_(0, chosen, members).to(wide))


def _forward(z: Tensor, codebook: Tensor, statistics: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, width = codebook.shape
    index, distance = z.new_empty(z.shape[:-1], dtype=torch.int64), z.new_empty(z.shape[:-1], dtype=torch.float32)
    counts = z.new_empty(codes if statistics else 0, dtype=torch.int64)
    sums = z.new_empty(codes if statistics else 0, width, dtype=torch.float32)
    wanted = (counts, sums) if statistics else (None, None)
    if backend == "cpp":
        _native.kernel("nearest_code_fwd")(
            _native.DTYPES[z.dtype], index.numel(), codes, width, z, codebook, index, distance, *wanted, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("nearest_code").nearest_code_fwd(
            index.numel(), codes, width, z, codebook, index, distance, *wanted
        )
    return index, distance, counts, sums


def _backward(
    z: Tensor, codebook: Tensor, index: Tensor, grad_distance: Tensor, by_z: bool, by_codebook: bool, backend: str
) -> tuple[Tensor, Tensor]:
    codes, width = codebook.shape
    grad_z = torch.empty_like(z) if by_z else z.new_empty(0)
    grad_codebook = torch.empty_like(codebook) if by_codebook else z.new_empty(0)
    wanted = grad_z if by_z else None, grad_codebook if by_codebook else None
    if backend == "cpp":
        _native.kernel("nearest_code_bwd")(
            _native.DTYPES[z.dtype], index.numel(), codes, width, z, codebook, index, grad_distance, *wanted,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("nearest_code").nearest_code_bwd(
            index.numel(), codes, width, z, codebook, index, grad_distance, *wanted
        )
    return grad_z, grad_codebook


_find = _dispatch.raw_op(
    "nearest_code",
    "(Tensor z, Tensor codebook, bool statistics, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    lambda z, codebook, statistics, _: (
        z.new_empty(z.shape[:-1], dtype=torch.int64),
        z.new_empty(z.shape[:-1], dtype=torch.float32),
        z.new_empty(codebook.shape[0] if statistics else 0, dtype=torch.int64),
        z.new_empty(codebook.shape[0] if statistics else 0, codebook.shape[1], dtype=torch.float32),
    ),
)
_differentiate = _dispatch.raw_op(
    "nearest_code_bwd",
    "(Tensor z, Tensor codebook, Tensor index, Tensor grad_distance, bool by_z, bool by_codebook, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda z, codebook, index, grad_distance, by_z, by_codebook, _: (
        torch.empty_like(z) if by_z else z.new_empty(0),
        torch.empty_like(codebook) if by_codebook else z.new_empty(0),
    ),
)


class _NearestCode(torch.autograd.Function):
    """Saves the inputs and the choice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, statistics: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index, distance, counts, sums = _find(z, codebook, statistics, backend)
        ctx.mark_non_differentiable(index, counts, sums)
        ctx.set_materialize_grads(False)  # of those there are none
        ctx.save_for_backward(z, codebook, index)
        ctx.backend = backend
        return index, distance, counts, sums

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, _: Any, grad_distance: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
        by_z, by_codebook = ctx.needs_input_grad[:2]
        grad_z, grad_codebook = _differentiate(*ctx.saved_tensors, grad_distance.contiguous(), by_z, by_codebook, ctx.backend)
        return grad_z if by_z else None, grad_codebook if by_codebook else None, None, None


@overload
def nearest_code(
    z: Tensor, codebook: Tensor, *, statistics: Literal[False] = False, backend: str | None = None
) -> NearestCode: ...
@overload
def nearest_code(z: Tensor, codebook: Tensor, *, statistics: Literal[True], backend: str | None = None) -> CodeStatistics: ...
def nearest_code(
    z: Tensor, codebook: Tensor, *, statistics: bool = False, backend: str | None = None
) -> NearestCode | CodeStatistics:
    """Find the nearest code for each vector: the row of the codebook at the smallest squared Euclidean distance.

    Args:
        z: [..., D], floating point, vectors in the last dimension: [N, D], [N, T, D], or images as [N, H, W, C]. bfloat16
            beside a float32 codebook is widened. float64 is served by the reference.
        codebook: [K, D], one code a row, K at least 1.
        statistics: also count and sum the vectors of each code; constants for autograd.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(index, distance)``, both [...]: int64, and float32 (float64 for float64). With ``statistics`` also
        ``(counts, sums)``: int64 [K] and float32 [K, D]. Memory beside the results is a few codebooks, never [..., K].

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device.

    >>> index, distance = nearest_code(torch.tensor([[0.9, 0.0], [0.0, 4.0]]), torch.eye(2))
    >>> index, distance
    (tensor([0, 1]), tensor([0.0100, 9.0000]))
    """
    z, codebook = _prepared(z, codebook)
    chosen = _dispatch.choose(SPEC, backend, z)
    if chosen == "reference":
        return nearest_code_reference(z, codebook, statistics=statistics)
    z, codebook = z.contiguous(), codebook.contiguous()
    if torch.is_grad_enabled() and (z.requires_grad or codebook.requires_grad):
        results = _NearestCode.apply(z, codebook, statistics, chosen)
    else:
        results = _find(z, codebook, statistics, chosen)
    return CodeStatistics(*results) if statistics else NearestCode(results[0], results[1])


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    codes: int | None = None,
    many: bool = False,
    offset: float = 0.0,
    statistics: bool = False,
) -> dict[str, Any]:
    if codes is None:  # 16 vectors a code, or with `many` as many codes as vectors
        codes = max(1, rows) if many else max(24, rows // 16)

    def draw(count: int) -> Tensor:
        return (torch.randn(count, *event, generator=generator) + offset).to(device, dtype)

    return {"z": draw(rows), "codebook": draw(codes), "statistics": statistics}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: z, codebook -> index, distance; backward: z, codebook, index, ddistance -> two gradients
    z, codebook = inputs["z"], inputs["codebook"]
    rows, moved = z.numel() // max(1, z.shape[-1]), z.nbytes + codebook.nbytes
    return moved + 12 * rows + (0 if mode == "fwd" else 2 * moved + 12 * rows)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # the scores of all codes; gradients are a few per element
    return 2 * inputs["z"].numel() * len(inputs["codebook"])


SPEC = OpSpec(
    name="nearest_code",
    function=nearest_code,
    reference=nearest_code_reference,
    outputs={"index": "exact", "distance": "elementwise"},
    extra_outputs={"counts": "exact", "sums": "reduction"},
    gradients=("z", "codebook"),
    example_inputs=_example_inputs,
    flags={"codes": (None, 1, 9, 100), "many": (False, True), "offset": (0.0, 100.0), "statistics": (False, True)},
    event_ranks=(1,),
    sizes=(0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, 127, 300),
    shapes=((256, (16,)), (2048, (32,)), (16384, (64,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    gradient_precision="reduction",
)
