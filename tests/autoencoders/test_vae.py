"""vae, beta_vae: the bound against torch.distributions, images of any size, gradients, overfitting, saving, sampling."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import fastgen
from fastgen import random

SHAPES = [("mlp", (7,)), ("mlp", (1, 8, 8)), ("conv", (1, 28, 28)), ("conv", (3, 25, 18)), ("conv", (2, 1, 5))]


def make(network, event_shape, **options):
    torch.manual_seed(0)
    return fastgen.create("vae", event_shape=event_shape, network=network, latent=3, hidden=(16,), widths=(4, 6), **options)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(("network", "shape"), SHAPES)
def test_loss_is_the_bound_of_torch_distributions(network, shape, likelihood):
    model, x, key = make(network, shape, likelihood=likelihood, beta=2.5), torch.rand(6, *shape), random.key(4)
    if likelihood == "gaussian":
        model.log_scale.data.fill_(-0.7)
    mean, log_var = model.encode(x)
    z = mean + (0.5 * log_var).exp() * fastgen.ops.normal((6, 3), key)
    decoded = model.decode(z)
    p = Bernoulli(probs=decoded, validate_args=False) if likelihood == "bernoulli" else Normal(decoded, math.exp(-0.7))
    reconstruction = -Independent(p, len(shape)).log_prob(x).mean()
    kl = kl_divergence(
        Independent(Normal(mean, (0.5 * log_var).exp()), 1), Independent(Normal(torch.zeros(6, 3), 1.0), 1)
    ).mean()
    parts = model.loss(x, key=key)
    torch.testing.assert_close(parts.reconstruction, reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.loss, reconstruction + 2.5 * kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(("network", "shape"), SHAPES)
def test_gradients_reach_every_parameter(network, shape, likelihood):
    model = make(network, shape, likelihood=likelihood)
    model.loss((torch.rand(8, *shape), torch.zeros(8, dtype=torch.int64))).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("network", "shape"), SHAPES)
def test_shapes(network, shape):
    model = make(network, shape)
    assert model.sample(5).shape == (5, *shape)
    assert model.decode(torch.zeros(2, 3)).shape == (2, *shape)
    assert model.encode(torch.rand(4, *shape)).mean.shape == (4, 3)
    assert model.log_likelihood(torch.rand(4, *shape), torch.zeros(4, 3)).shape == (4,)


def test_sample_depends_on_its_own_noise_alone():
    model = make("conv", (1, 12, 12)).eval()
    whole = model.sample(6, key=random.key(3))
    torch.testing.assert_close(whole[2:5], model.sample(3, key=random.key(3, sample=2)), rtol=0, atol=1e-6)
    cold = model.sample(4, key=random.key(3), temperature=0.0)
    torch.testing.assert_close(cold[3], model.decode(torch.zeros(1, 3))[0], rtol=0, atol=1e-6)


def test_beta_vae_is_a_vae_with_a_heavier_divergence():
    assert fastgen.create("beta_vae", event_shape=(4,)).config.beta == 4
    assert fastgen.create("vae", event_shape=(4,)).config.beta == 1


def test_overfits_two_images(tmp_path):
    images = torch.zeros(2, 1, 8, 8)
    images[0, :, 2:6, 2:6] = 1
    images[1, :, :, 3] = 1
    torch.manual_seed(0)
    model = fastgen.create("vae", event_shape=(1, 8, 8), latent=2, hidden=(64,), learning_rate=5e-3)
    fastgen.fit(model, images, steps=400, batch_size=16, out=tmp_path / "run", sample_every=0, progress=False)
    with torch.no_grad():
        assert (model.decode(model.encode(images).mean) - images).abs().max() < 0.1
        # two equally likely images cost ln 2 nats: the bound comes near
        assert model.loss(images.repeat(100, 1, 1, 1), key=random.key(0)).loss < 3.5

    loaded = fastgen.load(tmp_path / "run")
    assert torch.equal(loaded.sample(3, key=random.key(1)), model.sample(3, key=random.key(1)))
    assert fastgen.sample(tmp_path / "run", 5, seed=1).shape == (5, 1, 8, 8)


def test_compiles_whole():
    model, x = make("conv", (1, 12, 12)), torch.rand(4, 1, 12, 12)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, key: model.loss(x, key=key), fullgraph=True)
    for got, expected in zip(compiled(x, random.key(2)), model.loss(x, key=random.key(2)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "rnn"}, "network must be 'mlp' or 'conv', got 'rnn'"),
        ({"likelihood": "poisson"}, "likelihood must be 'bernoulli' or 'gaussian', got 'poisson'"),
        ({"network": "conv", "event_shape": (5,)}, r"needs images \(C, H, W\), got event_shape \(5,\)"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"latents": 3}, "vae has no option 'latents'; did you mean 'latent'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fastgen.create("vae", **{"event_shape": (1, 8, 8), **options})


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'vea'; did you mean vae"):
        fastgen.create("vea", event_shape=(3,))
    with pytest.raises(ValueError, match="vae needs event_shape"):
        fastgen.create("vae")
