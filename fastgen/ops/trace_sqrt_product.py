"""trace_sqrt_product: Tr (S1 S2)^(1/2) of two covariances, the term of a Fréchet distance that costs time and digits.

With S1 = F1 F1^T and S2 = F2 F2^T it is the sum of the singular values of N = F1^T F2, or of the roots of the eigenvalues of
the symmetric M = F1^T S2 F1: real and never negative, whatever the rank. All arithmetic is float64.

* F1 is the Cholesky factor; both products M = F1^T (S2 F1) skip what the triangle makes zero and the half of M that symmetry
  gives (4/3 n^3 operations, not 4 n^3).
* The sum needs no eigenvalues. On CPUs M is taken to a band of 48 diagonals on either side by blocks of reflections, and the
  sum is an integral of log-determinants of the shifted band, see ``csrc/ops/trace_sqrt_product.h``. The tridiagonal form that
  eigenvalues need is half matrix-vector products, at the speed of the memory. Small matrices, other devices and builds without
  kernels take LAPACK's or cuSOLVER's eigenvalues, without vectors.
* Where M is so badly conditioned that it looks singular, the singular values of N = F1^T F2 are taken instead: nothing
  is squared.
* Where a covariance is singular to working precision, its factor is V sqrt(lambda), [n, rank], from an eigendecomposition, so
  that the null space contributes zeros and not the square roots of rounding errors.
* Features [n1, d], [n2, d] with n1 or n2 < d never form a d x d matrix: the centred features are the factors.
* ``method="newton_schulz"`` takes products alone, for GPUs: X <- X (15 I - 10 A + 3 A^2) / 8, A = X^T X, converges to the polar
  factor U of N = U H, and at every step

      tr(X^T N)  <=  Tr (S1 S2)^(1/2)  <=  1/2 (tr H + tr(N^T N H^-1)),    H = sym(X^T N)

  so that the error is known. The upper end, which is right to second order, is returned.

Gradients flow to both covariances (or both features); with the polar factor U,

    dS2 = 1/2 F1 U F2^-1 = 1/2 F1 M^(-1/2) F1^T,    dS1 = 1/2 F2 U^T F1^-1 = 1/2 F1^-T M^(1/2) F1^-1,    dN = U

symmetric for covariances. Where one is singular the trace has no derivative across its null space; inverses are then
pseudo-inverses and the gradient is finite. The backward pass costs one multiplication: where gradients are wanted, the forward
pass finds them.

Cholesky, eigenvalues and the GEMMs are those of LAPACK, BLAS and cuSOLVER as PyTorch calls them; ours is what to ask of them. A
sample that holds a NaN or an infinity gives NaN, alone in its batch.

Source: Dowson and Landau (1982), "The Fréchet distance between multivariate normal distributions"; Higham (2008), "Functions
of matrices", chapter 8, for the polar decomposition and its iteration; Bischof, Lang and Sun (2000), "A framework for symmetric
band reduction"; Hale, Higham and Trefethen (2008), "Computing A^alpha, log(A), and related matrix functions by contour
integrals", for roots by the trapezoidal rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec
from fastgen.ops.moments import moments
from fastgen.ops.sqrtm import checked_matrix, random_covariance

__all__ = [
    "CovarianceFactor",
    "Polar",
    "covariance_factor",
    "polar",
    "trace_sqrt_product",
    "trace_sqrt_product_features",
    "trace_sqrt_product_reference",
]

METHODS = ("eigen", "newton_schulz")
BLOCK = 256
"""Columns of a block of the triangle-aware products: wide enough for a GEMM to run at full speed."""
BANDED = 192
"""From this size on the kernel finds the sum faster than eigenvalues do."""
_EPS = torch.finfo(torch.float64).eps


class CovarianceFactor(NamedTuple):
    """S = matrix @ matrix.T, found once for a reference that many distributions are compared with."""

    matrix: Tensor
    """float64 [n, n] lower triangular, or [n, rank]."""
    triangular: bool


class Polar(NamedTuple):
    """N = factor @ H, and the bracket of the sum of the singular values of N."""

    factor: Tensor
    """U [r1, r2], float64: its singular values are 1, up to the accuracy of the bracket."""
    lower: Tensor
    """tr(U^T N), []; at most the sum."""
    upper: Tensor
    """1/2 (tr H + tr(N^T N H^-1)), []; at least the sum; infinite before H is positive definite."""


def trace_sqrt_product_reference(cov1: Tensor, cov2: Tensor) -> Tensor:
    """:func:`trace_sqrt_product` in plain PyTorch: the eigenvalues of R S2 R with R = S1^(1/2)."""
    cov1, cov2 = (0.5 * (c + c.mT) for c in (cov1.to(torch.float64), cov2.to(torch.float64)))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
    return torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum(-1)


def _eigen_factor(cov: Tensor) -> Tensor:
    """[n, rank] with cov = F F^T, of what stands above rounding."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > len(cov) * _EPS * values[-1:].abs()
    return vectors[:, kept] * values[kept].sqrt()


def _factor(cov: Tensor) -> tuple[Tensor, bool]:
    """The Cholesky factor, True; or, where the covariance is singular to working precision, a thin factor, False."""
    lower, info = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal()
    if len(cov) and (info != 0 or not pivots.min() ** 2 > len(cov) * _EPS * pivots.max() ** 2):
        return _eigen_factor(cov), False
    return lower, True


def _congruence(lower: Tensor, cov: Tensor) -> Tensor:
    """The lower half of L^T S L. Column block J of S L needs the rows and columns from J on, and so does that of the result."""
    n = len(cov)
    out = torch.empty_like(cov)
    for j in range(0, n, BLOCK):
        right = cov[j:, j:] @ lower[j:, j : j + BLOCK]
        for i in range(j, n, 2 * BLOCK):
            out[i : i + 2 * BLOCK, j : j + BLOCK] = lower[i:, i : i + 2 * BLOCK].mT @ right[i - j :]
    return out


def _gram(factor1: Tensor, triangular1: bool, cov2: Tensor) -> Tensor:
    """M = F1^T S2 F1, at least its lower half."""
    return _congruence(factor1, cov2) if triangular1 else factor1.mT @ cov2 @ factor1


def _trace_sqrt(m: Tensor) -> Tensor | None:
    """Sum of the roots of the eigenvalues of a matrix of which the lower half is there, without the eigenvalues.

    None where the kernel cannot serve, or cannot tell that M is positive definite beyond rounding.
    """
    if m.device.type != "cpu" or len(m) < BANDED or not _native.ready():
        return None
    m, out = m.contiguous(), m.new_empty(())
    _native.kernel("trace_sqrt_fwd")(len(m), m, out, torch.get_num_threads())
    return None if out.isnan() else out


def _nuclear(n: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the singular values of N and, where wanted, its polar factor (zero on the null space)."""
    wide = n if n.shape[0] <= n.shape[1] else n.mT
    gram = wide @ wide.mT
    if not wanted:
        return _roots(torch.linalg.eigvalsh(gram)).sum(), None
    values, vectors = torch.linalg.eigh(gram)
    roots = _roots(values)
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    factor = (vectors * inverse) @ (vectors.mT @ wide)
    return roots.sum(), factor if wide is n else factor.mT


def _roots(values: Tensor) -> Tensor:
    """Square roots of the eigenvalues of a Gram matrix; what rounding may have left of a zero is zero."""
    largest = values[-1:].clamp_min(0)
    return torch.where(values > len(values) * _EPS * largest, values, 0.0).clamp_min(0).sqrt()


def polar(n: Tensor, *, tolerance: float = 1e-10, iterations: int = 60) -> Polar:
    """The polar factor of a matrix by Newton-Schulz iteration, products alone, until the bracket is narrow.

    Args:
        n: [r1, r2] with r1 >= r2, of full column rank; taken to float64.
        tolerance: relative width of the bracket to stop at. The upper end is right to about its square.
        iterations: most steps. A singular value of t times the largest takes about log(1 / t) / log(15 / 8) of them.

    Raises:
        ValueError: if n has more columns than rows.
    """
    if n.dim() != 2 or n.shape[0] < n.shape[1]:
        raise ValueError(f"n must be [r1, r2] with r1 >= r2, got {list(n.shape)}")
    n = n.to(torch.float64)
    lower = upper = n.new_zeros(())
    if not n.numel():
        return Polar(n, lower, upper)
    # at least the largest singular value, and often far less than the Frobenius norm
    absolute = n.abs()
    bound = torch.minimum(torch.linalg.matrix_norm(n), (absolute.sum(0).max() * absolute.sum(1).max()).sqrt())
    x = n / bound
    gram = n.mT @ n
    for step in range(iterations + 1):
        if step % 4 == 0 or step == iterations:  # each look waits for the device
            product = x.mT @ n
            lower, h = product.trace(), 0.5 * (product + product.mT)
            factor, info = torch.linalg.cholesky_ex(h)
            upper = (
                0.5 * (h.trace() + torch.cholesky_solve(gram, factor).trace())
                if info == 0
                else torch.full_like(lower, math.inf)
            )
            if upper - lower <= tolerance * lower or step == iterations:
                break
        a = x.mT @ x
        x = x @ torch.addmm(a.mul(-10 / 8).diagonal_scatter(a.diagonal() * (-10 / 8) + 15 / 8), a, a, alpha=3 / 8)
    return Polar(x, lower, upper)


def _halved(grad: Tensor | None) -> Tensor | None:
    """Half of a gradient that is symmetric but for rounding, made so."""
    return None if grad is None else 0.25 * (grad + grad.mT)


def _from_polar(
    value: Tensor, u: Tensor, factor1: Tensor, factor2: Tensor, wants1: bool, wants2: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and gradients from the polar factor of N, for two triangular factors."""
    solve = torch.linalg.solve_triangular
    grad1 = solve(factor1.mT, u @ factor2.mT, upper=True) if wants1 else None
    grad2 = solve(factor2.mT, u.mT @ factor1.mT, upper=True) if wants2 else None
    return value, _halved(grad1), _halved(grad2)


def _by_eigen(
    cov1: Tensor, cov2: Tensor, factor1: Tensor, triangular1: bool, wants1: bool, wants2: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and gradients from M = F1^T S2 F1."""
    m = _gram(factor1, triangular1, cov2)
    if not wants1 and not wants2:
        value = _trace_sqrt(m) if triangular1 else None
        if value is not None:
            return value, None, None
        values, vectors = torch.linalg.eigvalsh(m), None
    else:
        values, vectors = torch.linalg.eigh(m)
    if len(values) and triangular1 and values[0] <= 8 * _EPS * values[-1]:
        factor2, triangular2 = _factor(cov2)
        if not triangular2:  # from the singular side the null space is gone before anything is squared
            value, grad2, grad1 = _by_eigen(cov2, cov1, factor2, False, wants2, wants1)
            return value, grad1, grad2
        n = factor1.mT @ factor2
        if vectors is None:
            return torch.linalg.svdvals(n).sum(), None, None
        left, singular, right = torch.linalg.svd(n)
        return _from_polar(singular.sum(), left @ right, factor1, factor2, wants1, wants2)
    roots = _roots(values)
    if vectors is None:
        return roots.sum(), None, None
    grad1 = grad2 = None
    if wants2:
        half = factor1 @ (vectors * torch.where(roots > 0, 1 / roots, 0.0).sqrt())
        grad2 = 0.5 * (half @ half.mT)
    if wants1:
        half = vectors * roots.sqrt()
        if triangular1:
            half = torch.linalg.solve_triangular(factor1.mT, half, upper=True)
        else:  # the columns of a thin factor are orthogonal: its pseudo-inverse scales them
            half = (factor1 / factor1.square().sum(0)) @ half
        grad1 = 0.5 * (half @ half.mT)
    return roots.sum(), grad1, grad2


def _one(
    cov1: Tensor | None, cov2: Tensor | None, known1: Tensor | None, known2: Tensor | None, triangular1: bool,
    triangular2: bool, method: str, wants1: bool, wants2: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Value and gradients of one pair; of each side either the covariance or its factor is known."""
    if known1 is None and known2 is not None:  # the side with the factor first
        value, grad2, grad1 = _one(cov2, cov1, known2, known1, triangular2, triangular1, method, wants2, wants1)
        return value, grad1, grad2
    if known1 is None:
        assert cov1 is not None
        known1, triangular1 = _factor(cov1)
    if method == "newton_schulz" and triangular1:
        if known2 is None:
            assert cov2 is not None
            known2, triangular2 = _factor(cov2)
        if triangular2:
            u, lower, value = polar(known1.mT @ known2)
            if value - lower <= 1e-6 * lower:  # else the bracket did not close
                return _from_polar(value, u, known1, known2, wants1, wants2)
    if cov2 is None:
        assert known2 is not None
        if not wants1 and not (triangular1 and triangular2):
            return _nuclear(known1.mT @ known2, False)[0], None, None
        cov2 = known2 @ known2.mT
    return _by_eigen(known1 if cov1 is None else cov1, cov2, known1, triangular1, wants1, wants2)


def _finite(a: Tensor) -> bool:
    # the sum takes a tenth of the time; where it overflows, look again
    return bool(a.sum().isfinite()) or bool(a.isfinite().all())


def _forward(
    cov1: Tensor | None, cov2: Tensor | None, factor1: Tensor | None, factor2: Tensor | None, triangular1: bool,
    triangular2: bool, method: str, wants1: bool, wants2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    likes = (cov1, cov2) if cov1 is not None or cov2 is not None else (factor1, factor2)
    like = likes[0] if likes[0] is not None else likes[1]
    assert like is not None
    batch = like.shape[:-2] if factor1 is None and factor2 is None else ()
    count = math.prod(batch)
    value = like.new_empty(count, dtype=torch.float64)
    grads = [
        c.new_empty(count, *c.shape[-2:]) if w and c is not None else like.new_empty(0)
        for c, w in ((cov1, wants1), (cov2, wants2))
    ]
    flat = [c.reshape(count, *c.shape[-2:]) if c is not None else None for c in (cov1, cov2)]
    for i in range(count):
        pair = [c[i].to(torch.float64) if c is not None else None for c in flat]
        if all(c is None or _finite(c) for c in pair):
            found = _one(pair[0], pair[1], factor1, factor2, triangular1, triangular2, method, wants1, wants2)
        else:
            nan = value.new_full((), torch.nan)
            found = nan, nan if wants1 else None, nan if wants2 else None
        value[i] = found[0]
        for grad, one in zip(grads, found[1:], strict=True):
            if one is not None:
                grad[i] = one
    shaped = [
        g.reshape(c.shape) if w and c is not None else g for g, c, w in zip(grads, (cov1, cov2), (wants1, wants2), strict=True)
    ]
    return value.reshape(batch), shaped[0], shaped[1]


def _fake(
    cov1: Tensor | None, cov2: Tensor | None, factor1: Tensor | None, factor2: Tensor | None, triangular1: bool,
    triangular2: bool, method: str, wants1: bool, wants2: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like = next(t for t in (cov1, cov2, factor1, factor2) if t is not None)
    batch = like.shape[:-2] if factor1 is None and factor2 is None else ()
    grads = [c.new_empty(c.shape) if w and c is not None else like.new_empty(0) for c, w in ((cov1, wants1), (cov2, wants2))]
    return like.new_empty(batch, dtype=torch.float64), grads[0], grads[1]


_evaluate = _dispatch.raw_op(
    "trace_sqrt_product",
    "(Tensor? cov1, Tensor? cov2, Tensor? factor1, Tensor? factor2, bool triangular1, bool triangular2, str method, "
    "bool wants1, bool wants2) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def _nuclear_forward(n: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    if not bool(n.isfinite().all()):
        return n.new_full((), torch.nan), torch.full_like(n, torch.nan) if wanted else n.new_empty(0)
    value, factor = _nuclear(n, wanted)
    return value, n.new_empty(0) if factor is None else factor.contiguous()


_nuclear_norm = _dispatch.raw_op(
    "nuclear_norm",
    "(Tensor n, bool wanted) -> (Tensor, Tensor)",
    _nuclear_forward,
    lambda n, wanted: (n.new_empty(()), n.new_empty(n.shape if wanted else (0,))),
)


class _TraceSqrtProduct(torch.autograd.Function):
    """Saves the gradients themselves, found with the value."""

    @staticmethod
    def forward(
        ctx: Any, cov1: Tensor | None, cov2: Tensor | None, factor1: Tensor | None, factor2: Tensor | None, triangular1: bool,
        triangular2: bool, method: str,
    ) -> Tensor:  # fmt: skip
        wants = ctx.needs_input_grad
        value, grad1, grad2 = _evaluate(cov1, cov2, factor1, factor2, triangular1, triangular2, method, wants[0], wants[1])
        ctx.save_for_backward(grad1 if wants[0] else None, grad2 if wants[1] else None)
        return value

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by = grad[..., None, None]
        grads = [(by * g).to(g.dtype) if g is not None else None for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


class _NuclearNorm(torch.autograd.Function):
    """Saves the polar factor, which is the gradient."""

    @staticmethod
    def forward(ctx: Any, n: Tensor) -> Tensor:
        value, factor = _nuclear_norm(n, True)
        ctx.save_for_backward(factor)
        return value

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def covariance_factor(cov: Tensor) -> CovarianceFactor:
    """A factor of one covariance [n, n], to be given in its place: the reference side of a comparison then costs nothing.

    Raises:
        TypeError, ValueError: if ``cov`` is not a floating-point [n, n] of finite numbers.
    """
    if checked_matrix("cov", cov).dim() != 2:
        raise ValueError(f"cov must be one matrix [n, n], got {list(cov.shape)}")
    if not bool(cov.isfinite().all()):
        raise ValueError("cov must be finite, got a NaN or an infinity")
    return CovarianceFactor(*_factor(cov.detach().to(torch.float64)))


def trace_sqrt_product(
    cov1: Tensor | CovarianceFactor,
    cov2: Tensor | CovarianceFactor,
    *,
    method: str = "eigen",
    backend: str | None = None,
) -> Tensor:
    """Tr (cov1 cov2)^(1/2) of symmetric positive semi-definite matrices, of any rank.

    Args:
        cov1: [..., n, n], floating point and symmetric; or one :func:`covariance_factor`, which takes no gradient.
        cov2: the same, with the same shape.
        method: "eigen", or "newton_schulz" for products alone, on GPUs; where that does not converge (a singular covariance)
            the eigenvalues serve.
        backend: None or "reference": LAPACK and BLAS serve every device, see the module.

    Returns:
        [...], float64, never negative.

    Raises:
        TypeError, ValueError: for anything but square floating-point matrices of one shape and device, or another method.

    >>> trace_sqrt_product(torch.eye(3), 4 * torch.eye(3))
    tensor(6., dtype=torch.float64)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    known = [c if isinstance(c, CovarianceFactor) else None for c in (cov1, cov2)]
    covs = [None if isinstance(c, CovarianceFactor) else checked_matrix(f"cov{i}", c) for i, c in ((1, cov1), (2, cov2))]
    sides = [k.matrix if k is not None else c for k, c in zip(known, covs, strict=True)]
    first, second = sides
    assert first is not None
    assert second is not None
    if (
        first.shape[-2] != second.shape[-2]
        or (known == [None, None] and first.shape != second.shape)
        or first.device != second.device
    ):
        raise ValueError(
            f"cov1 and cov2 must have one shape and device, got {list(first.shape)} on {first.device} and {list(second.shape)} "
            f"on {second.device}"
        )
    if known != [None, None] and (first.dim() != 2 or second.dim() != 2):
        raise ValueError(f"a covariance factor stands beside one matrix, got {list(first.shape)} and {list(second.shape)}")
    _dispatch.choose(SPEC, backend, first)
    parts = (
        *(k.matrix if k is not None else None for k in known),
        *(k is not None and k.triangular for k in known),
        method,
    )
    if torch.is_grad_enabled() and any(c is not None and c.requires_grad for c in covs):
        return _TraceSqrtProduct.apply(*covs, *parts)
    return _evaluate(*covs, *parts, False, False)[0]


def trace_sqrt_product_features(features1: Tensor, features2: Tensor) -> Tensor:
    """Tr (S1 S2)^(1/2) of the unbiased covariances of two sets of features; no d x d matrix where a set is smaller than d.

    Args:
        features1: [n1, d], floating point, at least two samples. They are centred here.
        features2: [n2, d].

    Returns:
        [], float64. Gradients flow to both. Where a set has fewer than d samples, both are taken in float64; else their
        covariances come from :func:`fastgen.ops.moments`.

    Raises:
        TypeError, ValueError: for features that are not a floating-point [n, d], differ in width, or are fewer than two.

    >>> trace_sqrt_product_features(torch.randn(16, 2048), torch.randn(32, 2048)).shape
    torch.Size([])
    """
    for name, x in (("features1", features1), ("features2", features2)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 2 or len(x) < 2:
            raise ValueError(f"{name} must have shape [n, d] with n >= 2, got {list(x.shape)}")
    width = features1.shape[1]
    if features2.shape[1] != width or features1.device != features2.device:
        raise ValueError(
            f"features1 and features2 must share width and device, got {list(features1.shape)} on {features1.device} and "
            f"{list(features2.shape)} on {features2.device}"
        )
    if min(len(features1), len(features2)) >= width:
        return trace_sqrt_product(moments(features1).covariance(), moments(features2).covariance())
    factor1, factor2 = (_feature_factor(x) for x in (features1, features2))
    n = factor1 @ factor2.mT
    if torch.is_grad_enabled() and n.requires_grad:
        return _NuclearNorm.apply(n)
    return _nuclear_norm(n, False)[0]


def _feature_factor(features: Tensor) -> Tensor:
    """Centred features over sqrt(n - 1), float64 [n, d]: its Gram matrix on the right is the covariance."""
    x = features.to(torch.float64)
    return (x - x.mean(0)) / math.sqrt(len(x) - 1)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    method: str = "eigen",
) -> dict[str, Any]:
    covs = (random_covariance(rows, event[0], generator).to(device, dtype) for _ in range(2))
    return {**dict(zip(("cov1", "cov2"), covs, strict=True)), "method": method}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    return inputs["cov1"].nbytes * 2 * (1 if mode == "fwd" else 2)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # a Cholesky factor, two products with it, tridiagonal form; gradients: eigenvectors and two products more
    n = inputs["cov1"].shape[-1]
    return inputs["cov1"].numel() * n * (3 if mode == "fwd" else 12)


SPEC = OpSpec(
    name="trace_sqrt_product",
    function=trace_sqrt_product,
    reference=trace_sqrt_product_reference,
    outputs={"trace": "iterative"},
    gradients=("cov1", "cov2"),
    example_inputs=_example_inputs,
    flags={"method": METHODS},
    event_ranks=(1,),
    sizes=(0, 1, 2, 3, 5, 16, 33),
    backends=(),
    shapes=((64, (16,)), (8, (128,)), (1, (2048,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float64, torch.float32),
    gradient_precision="iterative",
)
