"""fastgen.evaluate: which numbers, in which units, over which samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import data
from fastgen.metrics import UNITS
from fastgen.nn.model import Config, Model


class Noise(Model):
    """x ~ N(0, I): a model with an exact density."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(Config(event_shape=event_shape))
        self.unused = nn.Parameter(torch.zeros(()))

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)


class Blind(Noise):
    """A model without any likelihood, as GANs are."""

    log_prob = None  # type: ignore[assignment]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(10, 1, 3, 3)


def test_an_exact_density(images: Tensor) -> None:
    scores = fastgen.evaluate(Noise((1, 3, 3)), images, batch_size=4)
    exact = Noise((1, 3, 3)).log_prob(images)
    assert scores["samples"] == 10
    assert scores["log_prob_nats"] == pytest.approx(exact.mean().item(), rel=1e-5)
    assert scores["log_prob_nats_stderr"] == pytest.approx(exact.std().item() / math.sqrt(10), rel=1e-4)
    assert scores["bits_per_dim"] == pytest.approx(8 - exact.mean().item() / (9 * math.log(2)), rel=1e-5)
    assert set(scores) - {"log_prob_nats_stderr"} <= set(UNITS)


def test_a_vae_scores_the_same_in_any_batches(images: Tensor) -> None:
    model = fastgen.create("vae", event_shape=(1, 3, 3), latent=2, hidden=(8,)).train()
    scores = fastgen.evaluate(model, images, importance_samples=8)
    assert model.training  # left as it was
    both = {f"{name}{part}" for name in ("elbo_nats", "iw_bound_nats") for part in ("", "_stderr")}
    assert set(scores) == {"samples", "importance_samples", "bits_per_dim"} | both
    assert scores["iw_bound_nats"] > scores["elbo_nats"]
    assert scores["bits_per_dim"] == pytest.approx(-scores["iw_bound_nats"] / (9 * math.log(2)))
    assert fastgen.evaluate(model, images, importance_samples=8, batch_size=3) == pytest.approx(scores, rel=1e-5)
    assert fastgen.evaluate(model, images, importance_samples=8, seed=1) != pytest.approx(scores, rel=1e-5)
    first = fastgen.evaluate(model, images, importance_samples=8, n=4)
    assert first["samples"] == 4
    assert first["elbo_nats"] == pytest.approx(fastgen.evaluate(model, images[:4], importance_samples=8)["elbo_nats"], rel=1e-5)


def test_the_better_of_two_densities_scores_higher() -> None:
    """On a toy density the score of the true model is minus the entropy."""
    source = data.load("gaussians8", split="test")
    scores = fastgen.evaluate(Noise((2,)), source, n=512)
    assert scores["log_prob_nats"] < -data.toy("gaussians8").entropy
    assert "bits_per_dim" not in scores


def test_errors_name_the_culprit(images: Tensor) -> None:
    with pytest.raises(ValueError, match="Blind has neither log_prob nor an ELBO"):
        fastgen.evaluate(Blind((1, 3, 3)), images)
    with pytest.raises(ValueError, match="evaluate needs data"):
        fastgen.evaluate(Noise((1, 3, 3)))
    with pytest.raises(ValueError, match=r"\(1, 3, 3\).*\(1, 4, 4\)"):
        fastgen.evaluate(Noise((1, 4, 4)), images)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        fastgen.evaluate(Noise((1, 3, 3)), images, n=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fastgen.evaluate(Noise((1, 3, 3)), images, batch_size=0)
