"""frechet_distance: closed forms, scipy's formula, equal distributions of every rank, gradients, error messages."""

import pytest
import scipy.linalg
import torch

from fastgen import ops
from fastgen.metrics.frechet import frechet_distance


def statistics(n, d, seed=0, scale=1.0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.mean(0), torch.cov(x.T).reshape(d, d)


def test_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    values = (torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([3.0]), torch.tensor([[25.0]]))
    assert frechet_distance(*values).item() == pytest.approx(4 + 9, rel=1e-14)


def test_scipy():
    mu1, s1 = statistics(300, 40)
    mu2, s2 = statistics(200, 40, seed=1, scale=2.0)
    root = scipy.linalg.sqrtm((s1 @ s2).numpy()).real
    expected = (mu1 - mu2).square().sum() + (s1 + s2 - 2 * torch.from_numpy(root)).trace()
    for method in ("eigen", "newton_schulz"):
        assert frechet_distance(mu1, s1, mu2, s2, method=method).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("method", ["eigen", "newton_schulz"])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 60), (5, 200), (60, 61), (200, 60), (500, 300)])
def test_equal_distributions(n, d, method):
    mu, sigma = statistics(n, d)
    distance = frechet_distance(mu, sigma, mu, sigma, method=method)
    assert distance.dtype is torch.float64
    assert 0 <= distance.item() <= 1e-11 * sigma.trace().item()


@pytest.mark.parametrize(("n", "d"), [(5, 200), (60, 61), (500, 300)])
def test_equal_distributions_of_float32_features(n, d):
    """Their covariance is indefinite in its last float32 digits."""
    x = torch.randn(n, d) + 5
    state = ops.moments(x)
    distance = frechet_distance(state.mean, state.covariance(), state.mean, state.covariance())
    assert 0 <= distance.item() <= 1e-7 * state.covariance().trace().item()


@pytest.mark.parametrize("seed", range(20))
def test_never_negative(seed):
    """Distributions that hardly differ, of any rank, from float32 and bfloat16 features."""
    generator = torch.Generator().manual_seed(seed)
    n, d = (int(torch.randint(2, 80, (), generator=generator)) for _ in range(2))
    x = torch.randn(n, d, generator=generator)
    near = x * (1 + 1e-7 * torch.randn(d, generator=generator))
    a, b = ops.moments(x.bfloat16() if seed % 2 else x), ops.moments(near.bfloat16() if seed % 2 else near)
    distance = frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())
    assert 0 <= distance.item() < 1e-6 * d


def test_nothing_varies():
    mu, zero = torch.ones(4), torch.zeros(4, 4)
    assert frechet_distance(mu, zero, mu, zero).item() == 0
    assert frechet_distance(mu, zero, mu + 2, torch.eye(4)).item() == 16 + 4


def test_factor_and_gradient():
    mu1, s1 = statistics(100, 12)
    mu2, s2 = (t.requires_grad_() for t in statistics(100, 12, seed=1))
    factor = ops.covariance_factor(s1)
    direct = torch.autograd.grad(frechet_distance(mu1, s1, mu2, s2), (mu2, s2))
    cached = torch.autograd.grad(frechet_distance(mu1, factor, mu2, s2), (mu2, s2))
    for a, b in zip(direct, cached, strict=True):
        torch.testing.assert_close(a, b)
    # at the minimum, equal distributions, the gradient vanishes
    mu, sigma = mu1.clone().requires_grad_(), s1.clone().requires_grad_()
    grads = torch.autograd.grad(frechet_distance(mu1 + 1e-9, factor, mu, sigma), (mu, sigma))
    assert all(g.abs().max() < 1e-7 for g in grads)


def test_messages():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match=r"mu2 must have shape \[3\] like its covariance, got \[4\]"):
        frechet_distance(torch.zeros(3), eye, torch.zeros(4), eye)
    with pytest.raises(TypeError, match="mu1 must be a floating-point tensor, got list"):
        frechet_distance([0.0], eye, torch.zeros(3), eye)
