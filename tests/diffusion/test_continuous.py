"""EDM and score-based SDEs: what their networks are given and asked, and the predictor-corrector sampler."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.diffusion.samplers import DDIM, PredictorCorrector
from fastgen.diffusion.schedules import VE, VP, estimate_rows
from tests.diffusion.gaussian import COVARIANCE, moments


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_network_sees_and_gives_unit_variance(sigma):
    model = fastgen.create("edm", event_shape=(2,), sigma_data=0.7, width=8)
    a, b, c, d = model.rows(torch.ones(1, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))[0]
    assert float(c**2 * 0.7**2 + d**2) == pytest.approx(1, abs=1e-9)
    p, q = estimate_rows(torch.stack([a, b, c, d]))
    total = sigma**2 + 0.7**2
    assert float(p) == pytest.approx(0.7**2 / total, rel=1e-9)  # c_skip
    assert float(q) == pytest.approx(sigma * 0.7 / total**0.5, rel=1e-9)  # c_out
    seen = {}
    model.network.network.forward = lambda x, time, labels=None: seen.update(x=x, time=time) or x
    model.network(torch.full((3, 2), 2.0), torch.full((3,), sigma))
    torch.testing.assert_close(seen["x"], torch.full((3, 2), 2.0 / total**0.5))
    torch.testing.assert_close(seen["time"], torch.full((3,), sigma).log() / 4)


@pytest.mark.parametrize("sde", ["ve", "subvp"])
def test_score_network_sees_unit_variance(sde):
    model = fastgen.create("score_sde", event_shape=(2,), sde=sde, width=8)
    seen = []
    model.network.network.forward = lambda x, time, labels=None: seen.append(x) or x
    time = torch.tensor([0.1, 0.5, 1.0])
    alpha, sigma = model.schedule.at(time)
    model.network((alpha.square() + sigma.square()).sqrt().float()[:, None].expand(3, 2), 1000 * time)
    torch.testing.assert_close(seen[0], torch.ones(3, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("edm", {}), ("score_sde", {}), ("score_sde", {"sde": "ve"})])
def test_learns_two_points(name, options):
    """Trained on two points, samples lie at them."""
    torch.manual_seed(0)
    model = fastgen.create(name, event_shape=(2,), width=64, learning_rate=3e-3, **options)
    points = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])
    fastgen.fit(model, points.repeat(128, 1), steps=400, batch_size=128, device="cpu", ema=0.98, progress=False)
    x = model.sample(200, key=random.key(0))
    distance, nearest = torch.cdist(x, points).min(1)
    assert distance.median() < 0.2
    assert 40 < int(nearest.sum()) < 160


@pytest.mark.parametrize("schedule", [VP(), VE(0.01, 20.0)])
def test_corrector_improves_coarse_steps(schedule):
    """On Gaussian data the covariance of predictor and corrector is nearer to the truth than that of the predictor alone."""
    grid = schedule.grid(20, "karras")
    scale = schedule.prior_std(grid.alpha[0], grid.sigma[0])
    start = torch.zeros(2, dtype=torch.float64), scale**2 * torch.eye(2, dtype=torch.float64)
    errors = []
    for sampler in (DDIM(eta=1.0), PredictorCorrector(snr=0.3, corrections=4)):
        _, covariance = moments(schedule, sampler.plan(grid), "epsilon", *start)
        errors.append(float((covariance - COVARIANCE).abs().max()))
    assert errors[1] < 0.8 * errors[0]


def test_no_correction_is_the_predictor():
    grid = VP().grid(7)
    assert torch.equal(PredictorCorrector(corrections=0).plan(grid).rows, DDIM(eta=1.0).plan(grid).rows)


def test_langevin_leaves_the_level():
    """Where the estimate is the data itself, alpha x0 + sigma z stays so distributed."""
    grid = VP().grid(3)
    keep, signal, noise = PredictorCorrector(snr=0.4).plan(grid).rows[0].tolist()
    alpha, sigma = float(grid.alpha[0]), float(grid.sigma[0])
    assert keep * alpha + signal == pytest.approx(alpha)
    assert keep**2 * sigma**2 + noise**2 == pytest.approx(sigma**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PredictorCorrector(snr=1.5), "snr must be in"),
        (lambda: PredictorCorrector(corrections=-1), "corrections must not be negative"),
        (lambda: fastgen.create("edm", event_shape=(2,), sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: fastgen.create("edm", event_shape=(2,), sigma_data=0.0), "sigma_data must be positive"),
        (lambda: fastgen.create("score_sde", event_shape=(2,), sde="vq"), "sde must be 'vp', 've' or 'subvp', got 'vq'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
