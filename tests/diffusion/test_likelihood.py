"""The likelihood by the probability flow, where the density is known: Gaussian data and its optimal network."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import fastgen
from fastgen import random
from fastgen.diffusion.likelihood import probability_flow_log_prob
from fastgen.diffusion.schedules import estimate_rows
from fastgen.nn.divergence import divergence, rademacher
from tests.diffusion.gaussian import COVARIANCE, MEAN

pytest.importorskip("torchdiffeq")

MODELS = {
    "vp": ("score_sde", {}),
    "subvp": ("score_sde", {"sde": "subvp"}),
    "ve": ("score_sde", {"sde": "ve"}),
    "edm": ("edm", {}),
    "chain": ("ddpm", {"target": "v"}),
}


def with_optimal_network(kind):
    """A model whose network is E[target | x] for N(MEAN, COVARIANCE)."""
    name, options = MODELS[kind]
    model = fastgen.create(name, event_shape=(2,), width=8, layers=1, **options).double()

    def network(x, time, labels=None):
        alpha, sigma = model.schedule.at(time[:1].double().cpu() / model.time_scale)
        covariance = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
        x0 = MEAN + (x - alpha * MEAN) @ (alpha * COVARIANCE @ torch.linalg.inv(covariance)).T
        p, q = estimate_rows(model.rows(alpha, sigma)[0])
        return (x0 - p * x) / q

    model.network.forward = network
    return model


def marginal(model, end):
    """The data at the noisiest (end 0) or the cleanest time of the schedule."""
    alpha, sigma = (v[end] for v in model.schedule.at(model.schedule.times(2, "linspace")))
    return MultivariateNormal(alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))


def exact_log_prob(model, x):
    """The flow of a Gaussian is linear, from marginal to marginal; at its end stands the prior instead of the marginal."""
    low, high = marginal(model, -1), marginal(model, 0)
    axes = torch.linalg.eigh(COVARIANCE).eigenvectors
    stretch = [axes.T @ m.covariance_matrix @ axes for m in (low, high)]
    end = high.mean + ((x - low.mean) @ axes * (stretch[1].diagonal() / stretch[0].diagonal()).sqrt()) @ axes.T
    scale = model.schedule.prior_std(*(v[:1] for v in model.schedule.at(model.schedule.times(2, "linspace"))))
    prior = MultivariateNormal(torch.zeros(2, dtype=torch.float64), scale**2 * torch.eye(2, dtype=torch.float64))
    return low.log_prob(x) + prior.log_prob(end) - high.log_prob(end)


@pytest.mark.parametrize("kind", MODELS)
def test_log_prob_of_gaussian_data(kind):
    model = with_optimal_network(kind)
    x = MEAN + torch.randn(16, 2, dtype=torch.float64)
    found = probability_flow_log_prob(model, x, trace="exact", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, exact_log_prob(model, x), rtol=1e-4, atol=1e-4)


def test_hutchinson_is_unbiased():
    model = with_optimal_network("vp")
    x = (MEAN + torch.tensor([0.4, -0.3], dtype=torch.float64)).expand(4096, 2)
    found = probability_flow_log_prob(model, x, key=random.key(3))
    exact = exact_log_prob(model, x[:1])
    assert abs(found.mean() - exact) < 5 * found.std() / 64
    assert found.std() > 0


def test_divergence_of_a_linear_field():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(divergence(x @ matrix.T, x), matrix.trace().expand(3))
    signs = rademacher((3, 5), random.key(0)).double()
    expected = torch.einsum("ni,ij,nj->n", signs, matrix, signs)
    torch.testing.assert_close(divergence(x @ matrix.T, x, signs), expected)


def test_probes_are_signs_of_the_sample():
    signs = rademacher((1000, 64), random.key(5))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / 253
    assert torch.equal(signs[7:9], rademacher((2, 64), random.key(5, sample=7)))


def test_images_are_dequantised():
    """A chain that knows nothing has a normal density in [-1, 1]: log 2 per pixel comes from the range."""
    model = fastgen.create("score_sde", event_shape=(1, 2, 2), widths=(8,), attention_levels=(), layers=1)
    found = model.log_prob(torch.full((2, 1, 2, 2), 0.5), key=random.key(0))
    assert found.shape == (2,)
    assert found.isfinite().all()
    assert torch.equal(found, model.log_prob(torch.full((2, 1, 2, 2), 0.5), key=random.key(0)))


@pytest.mark.parametrize("name", ["score_sde", "edm"])
def test_evaluate_draws_by_its_seed(name):
    """The same score twice: dequantisation and probes come from the seed."""
    model = fastgen.create(name, event_shape=(2,), width=8, layers=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    scores = [
        fastgen.evaluate(model, torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), batch_size=6) for _ in "ab"
    ]
    assert scores[0] == scores[1]


def test_errors():
    model = fastgen.create("score_sde", event_shape=(2,), width=8)
    with pytest.raises(ValueError, match="trace must be 'hutchinson' or 'exact', got 'none'"):
        model.log_prob(torch.zeros(1, 2), trace="none")
    with pytest.raises(ValueError, match=r"x must be \[N, 2\], got \[1, 3\]"):
        model.log_prob(torch.zeros(1, 3))
    flow = fastgen.create("flow_matching", event_shape=(2,), width=8)
    with pytest.raises(ValueError, match="ends without signal"):
        probability_flow_log_prob(flow, torch.zeros(1, 2))
