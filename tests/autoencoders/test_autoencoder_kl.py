"""The autoencoder of latent diffusion as a model: its loss, its latents, its gradients."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from tests.nn.networks import randomise

SMALL = {"event_shape": (2, 8, 12), "widths": (8, 12), "layers": 1, "groups": 4, "latent_channels": 3}


def small(**options):
    torch.manual_seed(0)
    return randomise(fastgen.create("autoencoder_kl", **{**SMALL, **options}))


@pytest.mark.parametrize("options", [{}, {"attention_levels": (1,)}, {"quantisation": False, "middle_attention": False}])
def test_shapes_and_gradients(options):
    model = small(**options)
    x = torch.rand(3, 2, 8, 12)
    assert model.latent_shape == (3, 4, 6)
    assert model.encode(x).mean.shape == model.encode(x).log_var.shape == (3, 3, 4, 6)
    assert model.decode(torch.randn(5, 3, 4, 6)).shape == (5, 2, 8, 12)
    assert model.encode(torch.rand(1, 2, 16, 4)).mean.shape == (1, 3, 8, 2)
    model.loss(x).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_loss_is_its_formula():
    model = small(kl_weight=0.25)
    model.log_scale.fill_(0.3)
    x, key = torch.rand(2, 2, 8, 12), fastgen.random.key(5)
    loss = model.loss(x, key=key)
    mean, log_var = model.encode(x)
    noise = fastgen.ops.normal((2, 72), key).view_as(mean)
    p = torch.distributions.Normal(model.decode(mean + (log_var / 2).exp() * noise), math.exp(0.3))
    reconstruction = -p.log_prob(x).flatten(1).sum(1).mean()
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).flatten(1).sum(1).mean()
    torch.testing.assert_close(loss.reconstruction, reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.kl, kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.loss, reconstruction + 0.25 * kl, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_are_scaled_and_back():
    model = small(scaling_factor=0.36, shift_factor=0.1)
    z = torch.randn(4, 3, 4, 6)
    torch.testing.assert_close(model.scale_latent(z), (z - 0.1) * 0.36)
    torch.testing.assert_close(model.unscale_latent(model.scale_latent(z)), z)


def test_samples_depend_on_their_index_alone():
    model = small()
    key = fastgen.random.key(3)
    together = model.sample(4, key=key)
    assert together.shape == (4, 2, 8, 12)
    assert together.min() >= 0
    assert together.max() <= 1
    torch.testing.assert_close(model.sample(1, key=fastgen.random.key(3, sample=2)), together[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 8), (2, 8, 7)])
def test_sizes_that_cannot_be_halved_are_refused(shape):
    with pytest.raises(ValueError, match="divisible by 2"):
        small(event_shape=shape)
