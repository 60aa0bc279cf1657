"""Diffusion over an autoencoder: both train, or one that is trained stays; statistics of the latents."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.diffusion.latent_diffusion import LatentDiffusion

OPTIONS = {
    "event_shape": (1, 8, 8),
    "autoencoder_options": (("latent", 4), ("hidden", (16,)), ("likelihood", "gaussian")),
    "width": 32,
    "timesteps": 50,
    "sampling_steps": 5,
}


def striped(n):
    return torch.rand(n, 1, 1, 8).expand(n, 1, 8, 8).contiguous()


def test_both_parts_train(tmp_path):
    model = fastgen.create("latent_diffusion", **OPTIONS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fastgen.fit(model, striped(64), steps=30, out=tmp_path, device="cpu", progress=False)
    assert {"autoencoder_train/loss", "diffusion/loss"} <= result.metrics.keys()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = fastgen.load(tmp_path, device="cpu")
    key = random.key(1)
    assert torch.equal(again.sample(4, key=key), model.sample(4, key=key))
    assert again.sample(4, key=key).shape == (4, 1, 8, 8)


def test_latents_come_to_unit_variance():
    model = fastgen.create("latent_diffusion", **{**OPTIONS, "train_autoencoder": False})
    x = striped(256)
    for i in range(20):
        model.loss(x, key=random.key(i))
    codes = model.autoencoder.encode(x)
    z = (codes.mean + torch.exp(codes.log_var / 2) * torch.randn_like(codes.mean) - model.latent_mean) / model.latent_std
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.2)
    torch.testing.assert_close(z.std(0), torch.ones(4), rtol=0.15, atol=0)
    torch.testing.assert_close(model.decode(model.encode(x)), model.autoencoder.decode(codes.mean), rtol=1e-4, atol=1e-4)


def test_over_a_trained_autoencoder(tmp_path):
    vae = fastgen.create("vae", event_shape=(1, 8, 8), latent=4, hidden=(16,))
    fastgen.fit(vae, striped(64), steps=5, out=tmp_path / "vae", device="cpu", progress=False)
    trained = fastgen.load(tmp_path / "vae", device="cpu")
    weights = [p.clone() for p in trained.parameters()]
    model = LatentDiffusion.over(trained, "vae", width=16, timesteps=20, sampling_steps=5)
    assert [p.name for p in model.phases()] == ["diffusion"]
    fastgen.fit(model, striped(64), steps=5, out=tmp_path / "ldm", device="cpu", progress=False)
    again = fastgen.load(tmp_path / "ldm", device="cpu")
    for a, b in zip(weights, again.autoencoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="must have encode and decode; 'ddpm' lacks them"):
        fastgen.create("latent_diffusion", event_shape=(1, 8, 8), autoencoder="ddpm")
