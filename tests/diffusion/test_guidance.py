"""Classifier guidance and inpainting, on Gaussian data where the answer is known."""

from __future__ import annotations

import torch

import fastgen
from fastgen import random
from fastgen.diffusion.guidance import classifier_guidance, keep_known
from tests.diffusion.test_iddpm import optimal


def gaussian_model():
    model = fastgen.create("ddpm", event_shape=(2,), timesteps=200, beta_end=0.06, width=8)
    both = optimal(model, 0.0)
    model.network.forward = lambda x, time, labels=None: both(x, time)[:, :2]
    return model


def test_classifier_guidance_samples_the_posterior():
    """Of x ~ N(mean, C) and an observation y ~ N(x_1, 0.2^2); p(y | x_t) is Gaussian too."""
    from tests.diffusion.gaussian import COVARIANCE, MEAN

    model, mean, covariance = gaussian_model(), MEAN.float(), COVARIANCE.float()
    y, noise = 1.3, 0.2

    def log_prob(x, time, labels):
        alpha, sigma = (v.float()[:, None] for v in model.schedule.at(time.double()))
        marginal = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(2)
        gain = torch.linalg.solve(marginal, (alpha * covariance[0])[..., None])[..., 0]
        expected = mean[0] + ((x - alpha * mean) * gain).sum(1)
        spread = covariance[0, 0] - (gain * (alpha * covariance[0])).sum(1) + noise**2
        return -0.5 * (y - expected).square() / spread

    n = 4096
    labels = torch.zeros(n, dtype=torch.int64)
    x = model.sample(n, key=random.key(0), steps=100, sampler="ddpm", adjust=classifier_guidance(log_prob, labels))
    share = covariance[:, 0] / (covariance[0, 0] + noise**2)
    posterior_mean, posterior = mean + share * (y - mean[0]), covariance - torch.outer(share, covariance[0])
    torch.testing.assert_close(x.mean(0), posterior_mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), posterior, rtol=0.1, atol=0.01)
    plain = model.sample(n, key=random.key(0), steps=100, sampler="ddpm")
    assert abs(plain.mean(0)[0] - posterior_mean[0]) > 0.2


def test_what_is_known_stays():
    model = gaussian_model()
    known, mask = torch.tensor([0.5, 0.0]).expand(64, 2), torch.tensor([True, False])
    key = random.key(3)
    x = model.sample(64, key=key, steps=50, sampler="ddpm", callback=keep_known(known, mask, key))
    assert torch.equal(x[:, 0], known[:, 0])
    assert x[:, 1].std() > 0.05
    # the known part pulls the unknown one, which correlates with it
    high = model.sample(64, key=key, steps=50, sampler="ddpm", callback=keep_known(known + 1, mask, key))
    assert high[:, 1].mean() > x[:, 1].mean()
