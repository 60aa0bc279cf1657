"""sqrtm: the root squared, scipy's, matrices without full rank, gradients where eigenvalues coincide, error messages."""

import pytest
import scipy.linalg
import torch

from fastgen import ops


def covariance(n, rank=None, seed=0):
    x = torch.randn(n, n + 5 if rank is None else rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT / x.shape[1]


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (60, 60), (2, 3, 5, 5)])
def test_square_of_the_root(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    a = x @ x.mT
    root = ops.sqrtm(a)
    torch.testing.assert_close(root @ root, a, rtol=1e-12, atol=1e-12)
    assert torch.equal(root, root.mT)
    assert (torch.linalg.eigvalsh(root) >= -1e-14).all()


def test_scipy():
    a = covariance(50)
    torch.testing.assert_close(ops.sqrtm(a), torch.from_numpy(scipy.linalg.sqrtm(a.numpy())).real, rtol=1e-10, atol=1e-10)


def test_diagonal_matrices_are_exact():
    values = torch.tensor([4.0, 9.0, 0.0, 2.25])
    assert torch.equal(ops.sqrtm(torch.diag(values)), torch.diag(values.sqrt()))


def test_rank_far_below_size():
    x = torch.randn(40, 3, dtype=torch.float64)
    a = (x @ x.mT).requires_grad_()
    root = ops.sqrtm(a)
    # A A^T with orthonormal columns q: the root is q diag(s) q^T
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(root, (u * s) @ u.mT, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(root.trace(), a)
    assert grad.isfinite().all()


def test_gradient_of_equal_eigenvalues():
    """The root of I + t B is I + t B / 2: the gradient of sum(R * W) is sym(W) / 2, where eigh's own is NaN."""
    a, w = torch.eye(6, dtype=torch.float64).requires_grad_(), torch.randn(6, 6, dtype=torch.float64)
    (grad,) = torch.autograd.grad(ops.sqrtm(a), a, w)
    torch.testing.assert_close(grad, (w + w.mT) / 4)


def test_gradcheck():
    a = covariance(6).requires_grad_()
    assert torch.autograd.gradcheck(ops.sqrtm, a)


def test_zero_has_a_finite_gradient():
    a = torch.zeros(3, 3, requires_grad=True)
    root = ops.sqrtm(a)
    root.sum().backward()
    assert torch.equal(root, torch.zeros(3, 3))
    assert torch.equal(a.grad, torch.zeros(3, 3))


def test_float32_is_computed_in_float64():
    a = covariance(30).float()
    assert torch.equal(ops.sqrtm(a), ops.sqrtm(a.double()).float())


def test_messages():
    with pytest.raises(ValueError, match=r"a must be square, \[..., n, n\], got \[2, 3\]"):
        ops.sqrtm(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"a must be a floating-point tensor, got torch.int64"):
        ops.sqrtm(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="backend 'cpp' was asked for but cannot serve: sqrtm has no cpp kernel"):
        ops.sqrtm(torch.eye(2), backend="cpp")
