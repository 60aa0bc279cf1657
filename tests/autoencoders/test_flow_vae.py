"""flow_vae: the bound by hand, the limit of no flow, gradients, bounds of the metrics, training."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

import fastgen
from fastgen import random
from fastgen.metrics.likelihood import elbo, iw_bound

KINDS = ["planar", "radial", "iaf"]


def make(kind, **options):
    torch.manual_seed(0)
    small = {"event_shape": (1, 4, 4), "latent": 3, "hidden": (16,), "flow_layers": 3}
    model = fastgen.create("flow_vae", posterior_flow=kind, **{**small, "flow_hidden": (8,), "flow_context": 5, **options})
    for parameter in model.maps.networks.parameters() if kind == "iaf" else ():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_loss_is_the_bound_by_hand(kind, beta):
    """log q(z_K|x) by the determinant of the autograd Jacobian of the whole flow."""
    model, x, key = make(kind, beta=beta).double(), torch.rand(5, 1, 4, 4).double(), random.key(3)
    mean, log_var = model.encode(x)
    start = mean + (log_var / 2).exp() * fastgen.ops.normal((5, 3), key, dtype=torch.float64)
    kl = []
    for i in range(5):
        flow = lambda z, i=i: model.transform_posterior(x[i : i + 1], z[None])[0][0]  # noqa: E731
        log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, start[i])).logabsdet
        assert log_det.abs() > 1e-3
        # the first part of the divergence is in closed form: what it expects stands for its draw
        z = flow(start[i])
        log_q0 = -0.5 * (log_var[i] + mean[i] * 0 + 1 + math.log(2 * math.pi)).sum()
        log_p0 = -0.5 * (mean[i].square() + log_var[i].exp() + math.log(2 * math.pi)).sum()
        kl.append(log_q0 - log_det - log_p0 + 0.5 * (z.square() - start[i].square()).sum())
    parts = model.loss(x, key=key)
    ends, _ = model.transform_posterior(x, start)
    reconstruction = -Independent(Bernoulli(probs=model.decode(ends), validate_args=False), 3).log_prob(x).mean()
    torch.testing.assert_close(parts.reconstruction, reconstruction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.kl, torch.stack(kl).mean())
    torch.testing.assert_close(parts.loss, parts.reconstruction + beta * parts.kl)


@pytest.mark.parametrize("kind", ["planar", "radial"])
def test_maps_at_rest_leave_the_vae(kind):
    model = make(kind)
    last = model.encoder.layers[-1]
    last.weight.data[6:] = 0
    last.bias.data[6:] = 0
    if kind == "planar":
        last.bias.data[6:] = 0.3 * torch.tensor([0.0] * 3 + [1.0] * 4).repeat(3)  # u = 0; w and b do not matter
    plain = fastgen.create("vae", event_shape=(1, 4, 4), latent=3, hidden=(16,))
    state = model.state_dict()
    name = "encoder.layers.2"
    plain.load_state_dict({k: v[:6] if k.startswith(name) else v for k, v in state.items()})
    x, key = torch.rand(5, 1, 4, 4), random.key(1)
    torch.testing.assert_close(model.loss(x, key=key), plain.loss(x, key=key))
    torch.testing.assert_close(elbo(model, x, key=key), elbo(plain, x, key=key))
    torch.testing.assert_close(iw_bound(model, x, 8, key=key), iw_bound(plain, x, 8, key=key))


def test_autoregressive_maps_are_autoregressive():
    """Each sees the draw's elements before its own alone, and so the Jacobian of one map is triangular; the context enters."""
    model, z = make("iaf", flow_layers=1), torch.randn(3)
    context = torch.randn(2, 1, 5)
    jacobian = torch.autograd.functional.jacobian(lambda v: model.maps(v[None], context[0])[0][0].flip(0), z)
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.tril(-1) != 0).any()
    assert not torch.equal(*(model.maps(z[None], c)[0] for c in context))


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_know_the_flow(kind):
    model, x, key = make(kind), torch.rand(6, 1, 4, 4), random.key(2)
    torch.testing.assert_close(elbo(model, x, key=key).mean(), -model.loss(x, key=key).loss)
    many = x[:1].expand(2000, *x.shape[1:])
    one, more = (iw_bound(model, many, k, key=key).mean() for k in (1, 20))
    # with one draw the bound is the ELBO in expectation; with more it is higher
    assert abs(elbo(model, many, key=key).mean() - one) < 0.1
    assert one < more


@pytest.mark.parametrize("kind", KINDS)
def test_importance_sampling_finds_the_evidence(kind):
    """log p(x) by quadrature over a latent of one dimension: a wrong log-determinant would miss it."""
    model = make(kind, latent=1, flow_layers=2, event_shape=(4,)).double()
    for parameter in model.encoder.parameters():
        parameter.data *= 2
    x = torch.rand(1, 4).double()
    z = torch.linspace(-8, 8, 4001).double()[:, None]
    log_joint = model.log_likelihood(x.expand(4001, 4), z).double() + Normal(0.0, 1.0).log_prob(z[:, 0])
    evidence = torch.logsumexp(log_joint, 0) + math.log(16 / 4000)
    torch.testing.assert_close(iw_bound(model, x, 20000, key=random.key(0))[0], evidence, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_gradients_reach_every_parameter(kind, network):
    model = make(kind, network=network, widths=(4,))
    model.loss(torch.rand(8, 1, 4, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_samples(kind, tmp_path):
    model, x = make(kind, learning_rate=0.01), torch.eye(2).repeat(16, 8).view(32, 1, 4, 4)
    key = random.key(0)
    before = model.loss(x, key=key).loss.item()
    fastgen.fit(model, x, steps=60, batch_size=32, out=tmp_path / "run", sample_every=0, progress=False)
    assert model.loss(x, key=key).loss.item() < before - 0.5
    loaded = fastgen.load(tmp_path / "run")
    assert torch.equal(loaded.loss(x, key=key).loss, model.loss(x, key=key).loss)
    assert fastgen.sample(loaded, 3, seed=0).shape == (3, 1, 4, 4)
    scores = fastgen.evaluate(loaded, x, importance_samples=4)
    assert scores["iw_bound_nats"] > scores["elbo_nats"] - 1


def test_errors():
    with pytest.raises(ValueError, match="posterior_flow must be one of planar, radial, iaf, got 'maf'"):
        make("maf")
    with pytest.raises(ValueError, match="flow_layers must be at least 1, got 0"):
        make("planar", flow_layers=0)
