"""trace_sqrt_product: closed forms, scipy, mpmath, ranks far below the size, factors, features, the certified bracket."""

import sys

import mpmath
import pytest
import scipy.linalg
import torch

from fastgen import ops
from fastgen.ops import _native

MODULE = sys.modules["fastgen.ops.trace_sqrt_product"]
needs_kernels = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def covariance(n, rank=None, seed=0, decay=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * n if rank is None else rank, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -decay, n, dtype=torch.float64)[:, None]
    return x @ x.mT / x.shape[1]


def nuclear(x1, x2):
    """Tr (S1 S2)^(1/2) for S = x^T x, by singular values: nothing is squared."""
    return torch.linalg.svdvals(x1 @ x2.mT).sum()


both_methods = pytest.mark.parametrize("method", ["eigen", "newton_schulz"])


@both_methods
def test_commuting_covariances(method):
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    a, b = torch.rand(2, 30, dtype=torch.float64) + 0.01
    s1, s2 = (q * a) @ q.mT, (q * b) @ q.mT
    torch.testing.assert_close(ops.trace_sqrt_product(s1, s2, method=method), (a * b).sqrt().sum(), rtol=1e-12, atol=0)


@both_methods
@pytest.mark.parametrize("n", [1, 2, 40, 300, 700])
def test_equal_covariances_give_the_trace(method, n):
    s = covariance(n)
    torch.testing.assert_close(ops.trace_sqrt_product(s, s, method=method), s.trace(), rtol=1e-12, atol=0)


def test_scipy():
    s1, s2 = covariance(120), covariance(120, seed=1, decay=2)
    expected = scipy.linalg.sqrtm((s1 @ s2).numpy()).trace().real
    assert ops.trace_sqrt_product(s1, s2).item() == pytest.approx(expected, rel=1e-9)


def test_mpmath():
    """A condition of 1e8 each, against 60 digits."""
    s1, s2 = covariance(12, decay=4), covariance(12, seed=1, decay=4)
    with mpmath.workdps(60):
        product = mpmath.matrix(s1.tolist()) * mpmath.matrix(s2.tolist())
        expected = float(sum(mpmath.sqrt(mpmath.re(v)) for v in mpmath.eig(product, left=False, right=False)))
    assert ops.trace_sqrt_product(s1, s2).item() == pytest.approx(expected, rel=1e-12)


def test_order_and_rotation_do_not_matter():
    s1, s2 = covariance(50, decay=1), covariance(50, seed=1)
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q
    expected = ops.trace_sqrt_product(s1, s2)
    torch.testing.assert_close(ops.trace_sqrt_product(s2, s1), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ops.trace_sqrt_product(q @ s1 @ q.mT, q @ s2 @ q.mT), expected, rtol=1e-12, atol=0)


@both_methods
@pytest.mark.parametrize("ranks", [(5, 90), (90, 5), (5, 7), (1, 1), (59, 60)])
def test_rank_far_below_size(method, ranks):
    x1, x2 = (torch.randn(r, 60, dtype=torch.float64) for r in ranks)
    s1, s2 = (x.mT @ x for x in (x1, x2))
    value = ops.trace_sqrt_product(s1, s2, method=method)
    torch.testing.assert_close(value, nuclear(x1, x2), rtol=1e-9, atol=0)
    torch.testing.assert_close(ops.trace_sqrt_product(s1, s1, method=method), s1.trace(), rtol=1e-9, atol=0)
    s1.requires_grad_(), s2.requires_grad_()
    for grad in torch.autograd.grad(ops.trace_sqrt_product(s1, s2, method=method), (s1, s2)):
        assert grad.isfinite().all()


def test_orthogonal_ranges_give_zero():
    s1, s2 = torch.diag(torch.tensor([1.0, 2, 0, 0])), torch.diag(torch.tensor([0.0, 0, 3, 4]))
    assert ops.trace_sqrt_product(s1, s2).item() == 0
    assert ops.trace_sqrt_product(s1, torch.zeros(4, 4)).item() == 0


def test_dead_features():
    """Features that never vary: rows and columns of zeros, as ReLU networks give."""
    s1, s2 = covariance(40), covariance(40, seed=1)
    s1[7], s1[:, 7], s2[11], s2[:, 11] = 0, 0, 0, 0
    keep = [i for i in range(40) if i not in (7, 11)]
    inner1, inner2 = (s[keep][:, keep] for s in (s1, s2))
    # in the range of both sides the other's dead feature still counts: compare with a small variance in its place
    value = ops.trace_sqrt_product(s1, s2)
    s1[7, 7], s2[11, 11] = 1e-18, 1e-18
    torch.testing.assert_close(value, ops.trace_sqrt_product(s1, s2), rtol=1e-7, atol=0)
    assert value >= ops.trace_sqrt_product(inner1, inner2) - 1e-9


@both_methods
def test_gradcheck(method):
    s1, s2 = covariance(6).requires_grad_(), covariance(6, seed=1).requires_grad_()

    def function(a, b):
        return ops.trace_sqrt_product(0.5 * (a + a.mT), 0.5 * (b + b.mT), method=method)

    assert torch.autograd.gradcheck(function, (s1, s2))


def test_gradient_of_equal_covariances():
    """Of Tr (S S)^(1/2) = Tr S the two sides share: each gets I / 2, where eigh's own gradient has poles."""
    s1, s2 = (torch.eye(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    for grad in torch.autograd.grad(ops.trace_sqrt_product(s1, s2), (s1, s2)):
        torch.testing.assert_close(grad, 0.5 * torch.eye(5, dtype=torch.float64))


def test_gradient_beside_a_singular_reference():
    """S1 of rank 4: the trace is smooth in S2 all the same."""
    x, s2 = torch.randn(4, 9, dtype=torch.float64), covariance(9).requires_grad_()
    s1 = x.mT @ x

    def function(b):
        return ops.trace_sqrt_product(s1, 0.5 * (b + b.mT))

    assert torch.autograd.gradcheck(function, s2)


@both_methods
@pytest.mark.parametrize("rank", [None, 6])
def test_factor_in_place_of_a_covariance(method, rank):
    s1, s2 = covariance(20, rank), covariance(20, seed=1).requires_grad_()
    factor = ops.covariance_factor(s1)
    assert factor.triangular == (rank is None)
    torch.testing.assert_close(factor.matrix @ factor.matrix.mT, s1)
    expected = ops.trace_sqrt_product(s1, s2, method=method)
    (expected_grad,) = torch.autograd.grad(expected, s2)
    for value in (
        ops.trace_sqrt_product(factor, s2, method=method),
        ops.trace_sqrt_product(s2, factor, method=method),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, s2)[0], expected_grad, rtol=1e-8, atol=1e-8)
    other = ops.covariance_factor(s2)
    torch.testing.assert_close(ops.trace_sqrt_product(factor, other), expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("counts", [(6, 9), (9, 6), (6, 80), (80, 6), (80, 90)])
def test_features(counts):
    x1, x2 = (torch.randn(n, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 3 for n in counts)
    s1, s2 = (torch.cov(x.mT) for x in (x1, x2))
    value = ops.trace_sqrt_product_features(x1, x2)
    torch.testing.assert_close(value, ops.trace_sqrt_product(s1, s2), rtol=1e-10, atol=0)
    leaves = (x1.requires_grad_(), x2.requires_grad_())
    (grad,) = torch.autograd.grad(ops.trace_sqrt_product_features(*leaves), x1)
    step = torch.randn_like(x1) * 1e-6
    with torch.no_grad():
        change = ops.trace_sqrt_product_features(x1 + step, x2) - ops.trace_sqrt_product_features(x1 - step, x2)
    assert (grad * step).sum().item() * 2 == pytest.approx(change.item(), rel=1e-4)


def test_bracket_holds_and_closes():
    n = torch.linalg.cholesky(covariance(40, decay=1.5)).mT @ torch.linalg.cholesky(covariance(40, seed=1, decay=1.5))
    true = torch.linalg.svdvals(n).sum()
    widths = []
    for steps in (4, 8, 12, 16, 24):
        _, lower, upper = ops.polar(n, tolerance=0, iterations=steps)
        assert lower <= true * (1 + 1e-13)
        assert upper >= true * (1 - 1e-13)
        widths.append((upper - lower).item())
    assert widths == sorted(widths, reverse=True)
    factor, lower, upper = ops.polar(n)
    torch.testing.assert_close(upper, true, rtol=1e-13, atol=0)
    u, _, vh = torch.linalg.svd(n)
    torch.testing.assert_close(factor, u @ vh, rtol=1e-8, atol=1e-8)


def band_sum(m, threads=2):
    """What the kernel gives for a matrix, of which it may read the lower half alone."""
    m, out = m.tril() + torch.full_like(m, torch.nan).triu(1), m.new_zeros(())
    _native.kernel("trace_sqrt_fwd")(len(m), m, out, threads)
    return out


@needs_kernels
@pytest.mark.parametrize("n", [1, 2, 3, 47, 48, 49, 95, 96, 97, 200])
def test_band_sum_is_that_of_the_eigenvalues(n):
    m = covariance(n, decay=1)
    torch.testing.assert_close(band_sum(m), torch.linalg.eigvalsh(m).sqrt().sum(), rtol=1e-13, atol=0)
    assert torch.equal(band_sum(m, threads=1), band_sum(m, threads=2))


@needs_kernels
@pytest.mark.parametrize("spectrum", ["flat", "wide", "two clusters", "one large"])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_band_sum_for_any_spectrum(spectrum, scale):
    n = 100
    values = {
        "flat": torch.ones(n, dtype=torch.float64),
        "wide": torch.logspace(0, -12, n, dtype=torch.float64),
        "two clusters": torch.cat([torch.ones(3, dtype=torch.float64), torch.full((n - 3,), 1e-11, dtype=torch.float64)]),
        "one large": torch.cat([torch.ones(1, dtype=torch.float64), torch.full((n - 1,), 1e-3, dtype=torch.float64)]),
    }[spectrum]
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    m = (q * values) @ q.mT
    found = band_sum(scale * 0.5 * (m + m.mT))
    # an eigenvalue is known to a few roundings of the largest
    rounding = (1e-15 / values.sqrt()).sum() / values.sqrt().sum()
    torch.testing.assert_close(found, scale**0.5 * values.sqrt().sum(), rtol=1e-13 + rounding.item(), atol=0)


@needs_kernels
def test_band_sum_is_refused_near_singular():
    m = covariance(60, 59)
    for bad in (m, -m, torch.zeros(5, 5).double(), m * torch.nan, torch.eye(3).double() * torch.inf):
        assert band_sum(bad).isnan()
    assert band_sum(torch.zeros(0, 0).double()) == 0


@pytest.mark.parametrize("rank", [None, 150])
def test_kernel_or_not_makes_no_difference(rank, monkeypatch):
    s1, s2 = covariance(MODULE.BANDED, rank), covariance(MODULE.BANDED, seed=1)
    value = ops.trace_sqrt_product(s1, s2)
    monkeypatch.setattr(MODULE, "BANDED", 10**9)
    torch.testing.assert_close(value, ops.trace_sqrt_product(s1, s2), rtol=1e-12, atol=0)


def test_a_sum_that_overflows_is_no_infinity():
    eye = torch.eye(3, dtype=torch.float64)
    assert ops.trace_sqrt_product(1e308 * eye, eye).item() == pytest.approx(3e154)


def test_a_batch_is_its_samples():
    s1, s2 = (torch.stack([covariance(9, seed=s + k) for s in range(6)]).reshape(2, 3, 9, 9) for k in (0, 10))
    s2[0, 1, 3, 3] = torch.nan
    value = ops.trace_sqrt_product(s1, s2)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = ops.trace_sqrt_product(s1[i, j], s2[i, j])
            assert one.isnan() if (i, j) == (0, 1) else torch.equal(one, value[i, j])


def test_messages():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="method must be one of eigen, newton_schulz, got 'schur'"):
        ops.trace_sqrt_product(eye, eye, method="schur")
    with pytest.raises(ValueError, match=r"cov2 must be square"):
        ops.trace_sqrt_product(eye, eye[:2])
    with pytest.raises(ValueError, match=r"one shape and device, got \[3, 3\] on cpu and \[4, 4\] on cpu"):
        ops.trace_sqrt_product(eye, torch.eye(4))
    with pytest.raises(ValueError, match="a covariance factor stands beside one matrix"):
        ops.trace_sqrt_product(ops.covariance_factor(eye), eye[None])
    with pytest.raises(ValueError, match="cov must be finite"):
        ops.covariance_factor(eye * torch.nan)
    with pytest.raises(ValueError, match=r"features2 must have shape \[n, d\] with n >= 2, got \[1, 3\]"):
        ops.trace_sqrt_product_features(eye, eye[:1])
