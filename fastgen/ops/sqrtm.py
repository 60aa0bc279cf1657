"""sqrtm: the symmetric positive semi-definite square root of a symmetric positive semi-definite matrix.

    R = V diag(s) V^T,    s_i = sqrt(max(lambda_i, 0)),    for A = V diag(lambda) V^T

in float64 whatever the storage. Eigenvalues that are negative, as rounding makes those of a singular matrix, count as zero.
Gradients flow to ``a``; R dR + dR R = dA has in the eigenbasis, for G the symmetrised gradient of R,

    dA = V ((V^T G V)_ij / (s_i + s_j)) V^T

where entries with s_i + s_j = 0 are left out: there the root has no derivative, and the result is that of the smallest norm.
Unlike the gradient of an eigendecomposition this is finite for eigenvalues that coincide.

A matrix that holds a NaN or an infinity gives NaN, alone in its batch. Eigendecomposition and products are those of LAPACK,
BLAS and cuSOLVER as PyTorch calls them: no kernel here would be faster.

Source: Higham (2008), "Functions of matrices", chapter 6; the derivative is a Sylvester equation, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _dispatch
from fastgen.ops._spec import OpSpec

__all__ = ["checked_matrix", "random_covariance", "sqrtm", "sqrtm_reference"]


def sqrtm_reference(a: Tensor) -> Tensor:
    """:func:`sqrtm` in plain PyTorch; its own gradient is finite only where no eigenvalues coincide."""
    wide = a.to(torch.float64)
    values, vectors = torch.linalg.eigh(0.5 * (wide + wide.mT))
    return ((vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT).to(a.dtype)


def _forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = a.to(torch.float64)
    finite = wide.isfinite().flatten(-2).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, 0.5 * (wide + wide.mT), 0.0))
    roots = values.clamp_min(0).sqrt()
    # two factors of half the exponent: the product is symmetric to the last bit
    half = vectors * roots.sqrt().unsqueeze(-2)
    root = torch.where(finite, half @ half.mT, torch.nan)
    return root.to(a.dtype), torch.where(finite, vectors, torch.nan).contiguous(), roots


def _backward(vectors: Tensor, roots: Tensor, grad: Tensor) -> Tensor:
    wide = grad.to(torch.float64)
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    inner = vectors.mT @ (0.5 * (wide + wide.mT)) @ vectors
    return (vectors @ torch.where(sums > 0, inner / sums, 0.0) @ vectors.mT).to(grad.dtype)


_root = _dispatch.raw_op(
    "sqrtm_fwd",
    "(Tensor a) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda a: (
        a.new_empty(a.shape),
        a.new_empty(a.shape, dtype=torch.float64),
        a.new_empty(a.shape[:-1], dtype=torch.float64),
    ),
)
_differentiate = _dispatch.raw_op(
    "sqrtm_bwd",
    "(Tensor vectors, Tensor roots, Tensor grad) -> Tensor",
    _backward,
    lambda vectors, roots, grad: grad.new_empty(grad.shape),
)


class _Sqrtm(torch.autograd.Function):
    """Saves the eigendecomposition of the root."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        root, vectors, roots = _root(a)
        ctx.save_for_backward(vectors, roots)
        return root

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _differentiate(*ctx.saved_tensors, grad)


def checked_matrix(name: str, a: Tensor) -> Tensor:
    """``a``, checked to be a floating-point [..., n, n]."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(a, 'dtype', type(a).__name__)}")
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"{name} must be square, [..., n, n], got {list(a.shape)}")
    return a


def sqrtm(a: Tensor, *, backend: str | None = None) -> Tensor:
    """The symmetric positive semi-definite R with R R = a.

    Args:
        a: [..., n, n], floating point, symmetric positive semi-definite (the symmetric part is taken; singular is fine).
        backend: None or "reference": LAPACK serves every device, see the module.

    Returns:
        R in the shape and dtype of ``a``, computed in float64.

    Raises:
        TypeError, ValueError: if ``a`` is not a floating-point tensor of square matrices.

    >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0]))).diagonal()
    tensor([2., 3.])
    """
    _dispatch.choose(SPEC, backend, checked_matrix("a", a))
    if torch.is_grad_enabled() and a.requires_grad:
        return _Sqrtm.apply(a)
    return _root(a)[0]


def random_covariance(rows: int, n: int, generator: torch.Generator | None) -> Tensor:
    """[rows, n, n] float64: a random covariance with eigenvalues of at least 0.1."""
    x = torch.randn(rows, n, n + 2, generator=generator, dtype=torch.float64)
    return x @ x.mT / (n + 2) + 0.1 * torch.eye(n, dtype=torch.float64)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    return {"a": random_covariance(rows, event[0], generator).to(device, dtype)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    return inputs["a"].nbytes * (2 if mode == "fwd" else 4)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # a symmetric eigendecomposition and a product; gradients: four products more
    n = inputs["a"].shape[-1]
    return inputs["a"].numel() * n * (22 if mode == "fwd" else 30)


SPEC = OpSpec(
    name="sqrtm",
    function=sqrtm,
    reference=sqrtm_reference,
    outputs={"root": "iterative"},
    gradients=("a",),
    example_inputs=_example_inputs,
    event_ranks=(1,),
    sizes=(0, 1, 2, 3, 5, 16, 33),
    backends=(),
    shapes=((64, (16,)), (8, (128,)), (1, (1024,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float64, torch.float32),
    gradient_precision="iterative",
)
