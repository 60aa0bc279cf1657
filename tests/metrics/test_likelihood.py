"""The bounds against a linear-Gaussian model, whose evidence and posterior are exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastgen.random as random
from fastgen.metrics import bits_per_dim, elbo, iw_bound

D, K = 5, 2  # data and latent dimensions


class FactorAnalysis:
    """x = W z + mu + noise, with a Gaussian q(z|x) that may be off the posterior."""

    def __init__(self, shift: float = 0.0, widen: float = 0.0) -> None:
        g = torch.Generator().manual_seed(0)
        self.w = torch.linalg.qr(torch.randn(D, K, generator=g, dtype=torch.float64))[0] * torch.tensor([1.3, 0.7])
        self.mu = torch.randn(D, generator=g, dtype=torch.float64)
        self.var = 0.4
        self.shift, self.widen = shift, widen
        self.rows_seen: list[int] = []

    def log_evidence(self, x: Tensor) -> Tensor:
        cov = self.w @ self.w.T + self.var * torch.eye(D, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.mu, cov).log_prob(x.double())

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact mean [N, K] and variances [N, K]: W has orthogonal columns, so the posterior is diagonal."""
        precision = 1 + (self.w * self.w).sum(0) / self.var
        return (x.double() - self.mu) @ self.w / self.var / precision, (1 / precision).expand(len(x), K)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.posterior(x)
        return (mean + self.shift).float(), (var.log() + self.widen).float()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        self.rows_seen.append(len(x))
        return torch.distributions.Normal(z.double() @ self.w.T + self.mu, self.var**0.5).log_prob(x.double()).sum(1)

    def expected_elbo(self, x: Tensor) -> Tensor:
        """E_q[log p(x|z)] - KL(q || N(0, I)) in closed form."""
        mean, log_var = (t.double() for t in self.encode(x))
        at_mean = torch.distributions.Normal(mean @ self.w.T + self.mu, self.var**0.5).log_prob(x.double()).sum(1)
        spread = (log_var.exp() * (self.w * self.w).sum(0)).sum(1) / (2 * self.var)
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1) / 2
        return at_mean - spread - kl


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, D, generator=torch.Generator().manual_seed(1)) * 1.2


def test_with_the_exact_posterior_every_draw_gives_the_evidence(x: Tensor) -> None:
    model = FactorAnalysis()
    for samples in (1, 7):
        got = iw_bound(model, x, samples, key=random.key(0))
        torch.testing.assert_close(got, model.log_evidence(x), atol=2e-5, rtol=0)


def test_elbo_equals_closed_form(x: Tensor) -> None:
    model = FactorAnalysis(shift=0.3, widen=0.2)
    n = 20_000
    many = x.repeat_interleave(n, 0)
    draws = elbo(model, many, key=random.key(3)).double().view(len(x), n)
    expected = model.expected_elbo(x)
    assert (draws.mean(1) - expected).abs().max() < 5 * draws.std(1).max() / math.sqrt(n)
    assert (expected < model.log_evidence(x)).all()


def test_iw_bound_of_one_sample_has_the_elbo_as_mean(x: Tensor) -> None:
    model = FactorAnalysis(shift=0.3, widen=0.2)
    n = 20_000
    draws = iw_bound(model, x.repeat_interleave(n, 0), 1, key=random.key(4)).view(len(x), n)
    assert (draws.mean(1) - model.expected_elbo(x)).abs().max() < 5 * draws.std(1).max() / math.sqrt(n)


def test_iw_bound_rises_with_samples_to_the_evidence(x: Tensor) -> None:
    model = FactorAnalysis(shift=0.6, widen=0.5)
    many = x.repeat(400, 1)
    exact = model.log_evidence(x).mean()
    means = [iw_bound(model, many, k, key=random.key(5)).mean() for k in (1, 4, 16, 64)]
    assert means == sorted(means)
    assert means[-1] < exact + 1e-3
    torch.testing.assert_close(iw_bound(model, x, 20_000, key=random.key(6)).mean(), exact, atol=0.01, rtol=0)


def test_chunks_and_batches_change_nothing(x: Tensor) -> None:
    model = FactorAnalysis(shift=0.3)
    whole = iw_bound(model, x, 9, key=random.key(7))
    model.rows_seen.clear()
    torch.testing.assert_close(iw_bound(model, x, 9, key=random.key(7), chunk=4), whole, atol=1e-9, rtol=0)
    assert max(model.rows_seen) == 4
    tail = iw_bound(model, x[2:], 9, key=random.key(7, sample=2))
    torch.testing.assert_close(tail, whole[2:], atol=1e-9, rtol=0)


def test_very_small_weights_do_not_underflow(x: Tensor) -> None:
    far = x + 1e4
    got = iw_bound(FactorAnalysis(), far, 8, key=random.key(0))
    torch.testing.assert_close(got, FactorAnalysis().log_evidence(far), rtol=1e-5, atol=0)


def test_errors_name_the_culprit(x: Tensor) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        iw_bound(FactorAnalysis(), x, 0)
    with pytest.raises(TypeError, match="Linear has no ELBO"):
        elbo(torch.nn.Linear(2, 2), x)


def test_bits_per_dim() -> None:
    assert bits_per_dim(-784 * math.log(2), (1, 28, 28)) == pytest.approx(1.0)
    uniform_density_on_unit_interval = 0.0  # 8-bit images under it cost 8 bits a value
    assert bits_per_dim(uniform_density_on_unit_interval, (3, 4, 4), levels=256) == pytest.approx(8.0)
