"""The learned variance and the variational bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import fastgen
from fastgen import random
from fastgen.diffusion.iddpm import _grey_level_nats, _normal_kl
from tests.diffusion.gaussian import COVARIANCE, MEAN


def test_normal_kl():
    m1, v1, m2, v2 = torch.randn(4, 100, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(Normal(m1, torch.exp(v1 / 2)), Normal(m2, torch.exp(v2 / 2)))
    torch.testing.assert_close(_normal_kl(m1, v1, m2, v2), expected)


@pytest.mark.parametrize(("mean", "log_var"), [(0.1, -2.0), (-0.97, -9.0), (0.3, -14.0), (3.0, -4.0)])
def test_grey_levels_have_probabilities(mean, log_var):
    """They sum to one, and far from the mean they stay finite and fall; the outermost bins are open."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nats = _grey_level_nats(levels, torch.tensor(mean).double(), torch.tensor(log_var).double())
    assert nats.isfinite().all()
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-9)
    nearest = int((levels - mean).abs().argmin())
    assert int(nats.argmin()) == nearest
    assert (nats[1 : nearest + 1].diff() <= 0).all()


def optimal(model, spread):
    """E[eps | x_t] for N(MEAN, COVARIANCE), and a constant for the variance."""

    def network(x, time, labels=None):
        alpha, sigma = (v.float()[:, None, None] for v in model.schedule.at(time.double()))
        covariance, eye = COVARIANCE.float(), torch.eye(2)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        centred = x - alpha[:, 0] * MEAN.float()
        x0 = MEAN.float() + (gain @ centred[..., None])[..., 0]
        return torch.cat([(x - alpha[:, 0] * x0) / sigma[:, 0], torch.full_like(x, spread)], 1)

    return network


def test_bound_of_gaussian_data_is_tight():
    """With the optimal mean, and the variance of the forward step, the bound of a long chain comes near the entropy."""
    model = fastgen.create("iddpm", event_shape=(2,), timesteps=400, schedule="linear", beta_end=0.05, width=8)
    data = MultivariateNormal(MEAN.float(), COVARIANCE.float())
    x = data.sample((2048,))
    model.network.forward = optimal(model, 1.0)
    found = model.bound(x, key=random.key(1)).total
    entropy = -data.log_prob(x).mean()
    error = 4 * (found + data.log_prob(x)).std() / math.sqrt(len(x))
    assert entropy - error < found.mean() < entropy + 0.1 + error
    model.network.forward = optimal(model, -1.0)
    assert model.bound(x, key=random.key(1)).total.mean() > found.mean()


def test_part_of_the_terms_is_unbiased():
    model = fastgen.create("iddpm", event_shape=(2,), timesteps=60, width=8)
    model.network.forward = optimal(model, 0.3)
    x = (MEAN.float() + 0.2).expand(4096, 2)
    whole = model.bound(x, key=random.key(0)).total
    part = model.bound(x, key=random.key(2), every=7)
    assert (part.terms != 0).sum(1).max() <= math.ceil(60 / 7)
    assert abs(part.total.mean() - whole.mean()) < 5 * (part.total.std() + whole.std()) / 64


def test_loss_is_hybrid_and_the_bound_reaches_the_variance_alone():
    model = fastgen.create("iddpm", event_shape=(1, 8, 8), widths=(8,), attention_levels=(), layers=1, bound_weight=0.5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    parts = model.loss(torch.rand(4, 1, 8, 8), key=random.key(0))
    torch.testing.assert_close(parts.loss, parts.simple + 0.5 * parts.bound)
    last = [p for p in model.network.parameters() if p.shape[0] == 2][-1]
    (of_bound,) = torch.autograd.grad(parts.bound, last, retain_graph=True)
    (of_simple,) = torch.autograd.grad(parts.simple, last)
    assert of_bound[0] == 0
    assert of_bound[1] != 0
    assert of_simple[0] != 0
    assert of_simple[1] == 0


def test_bits_per_dim_of_images(tmp_path):
    """A tiny model learns to code a constant image in few bits; the untrained one does not."""
    x = torch.full((64, 1, 4, 4), 128 / 255)
    options = {"event_shape": (1, 4, 4), "timesteps": 50, "network": "mlp", "width": 32, "learning_rate": 3e-3}
    torch.manual_seed(0)
    model = fastgen.create("iddpm", **options)
    before = model.bound(x[:8], key=random.key(0)).total.mean() / (16 * math.log(2))
    fastgen.fit(model, x, steps=400, device="cpu", progress=False)
    after = model.bound(x[:8], key=random.key(0)).total.mean() / (16 * math.log(2))
    assert after < min(8.0, float(before) / 2)


def test_errors():
    model = fastgen.create("iddpm", event_shape=(2,), timesteps=5, width=8)
    with pytest.raises(ValueError, match=r"x must be \[N, 2\]"):
        model.bound(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"every must be in 1 .. 5, got 6"):
        model.bound(torch.zeros(3, 2), every=6)
