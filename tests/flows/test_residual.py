"""Residual flows: contractions, unbiased log-determinants and their gradients, the fixed point."""

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.flows.residual import Contraction, InvertibleResidual, LipSwish
from tests.flows.zoo import draw, make


def settled(features=3, **options):
    torch.manual_seed(0)
    model = fastgen.create("residual_flow", features=features, layers=1, hidden=(12,), **options).double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    return model.settle().eval()


def test_maps_contract():
    """Whatever the weights, no two points move apart, and near points come as near as the bound allows."""
    model = settled(lipschitz=0.9)
    g = model.transform[0].contraction
    x = torch.randn(200, 3).double()
    for step in (1e-4, 1.0, 100.0):
        other = x + step * torch.randn_like(x)
        ratio = (g(other) - g(x)).norm(dim=1) / (other - x).norm(dim=1)
        assert ratio.max() < 0.9
        assert ratio.max() > 1e-4
    grid = torch.linspace(-50, 50, 2001).double().requires_grad_()
    (slope,) = torch.autograd.grad(LipSwish().double()(grid).sum(), grid)
    assert slope.abs().max() <= 1


def test_settling_finds_the_spectral_norms():
    g = Contraction(4, (8,), 0.9)
    for layer in g.layers:
        layer.parametrizations.weight.original.data = torch.randn_like(layer.parametrizations.weight.original)
    model = settled()
    for layer in model.transform[0].contraction.layers:
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.ones(()).double(), rtol=1e-3, atol=0)
    before = model.log_prob(torch.zeros(1, 3).double())
    assert torch.equal(model.log_prob(torch.zeros(1, 3).double()), before)
    assert not model.training


def test_roulette_is_unbiased_in_value_and_gradient():
    exact, estimate = settled(log_det="exact"), settled(log_det="roulette")
    x = draw(exact, 1)[0].double()
    key = random.key(0)
    values, grads = [], []
    n = 40
    for seed in range(n):
        many = x.expand(200, 3)
        estimate.zero_grad()
        log_prob = estimate.log_prob(many, key=random.key(seed)).mean()
        log_prob.backward()
        values.append(log_prob.detach())
        grads.append(estimate.transform[0].contraction.scale.grad.clone())
    exact.log_prob(x).mean().backward()
    for found, expected in ((values, exact.log_prob(x).mean()), (grads, exact.transform[0].contraction.scale.grad)):
        found = torch.stack(found)
        assert (found.mean() - expected).abs() < 4 * found.std() / n**0.5 + 1e-9
    assert torch.equal(estimate.log_prob(x, key=key), estimate.log_prob(x, key=key))
    assert (estimate.log_prob(x, key=key) != estimate.log_prob(x, key=random.key(1))).all()
    with torch.no_grad():
        assert not estimate.log_prob(x).requires_grad


def test_auto_is_exact_for_few_features():
    for features, exact in ((8, True), (9, False)):
        model = fastgen.create("residual_flow", features=features, layers=1)
        assert model.transform[0].exact == exact


@pytest.mark.parametrize("context", [0, 2])
def test_gradients_through_the_fixed_point(context):
    model = settled(context=context)
    layer = model.transform[0]
    y = torch.randn(3, 3).double().requires_grad_()
    c = torch.randn(3, context).double().requires_grad_() if context else None
    inputs = (y,) if c is None else (y, c)
    assert torch.autograd.gradcheck(layer.inv_and_ladj, inputs, atol=1e-6)
    x, ladj = layer.inv_and_ladj(y, c)
    x.square().sum().add(ladj.sum()).backward()
    scale, step = layer.contraction.scale, 1e-6
    sides = []
    for sign in (1, -1):
        scale.data += sign * step
        with torch.no_grad():
            x, ladj = layer.inv_and_ladj(y, c)
        sides.append(x.square().sum() + ladj.sum())
        scale.data -= sign * step
    torch.testing.assert_close(scale.grad, (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_trains_with_both_estimates():
    for log_det in ("exact", "roulette"):
        torch.manual_seed(0)
        model = fastgen.create("residual_flow", features=2, layers=3, hidden=(16,), log_det=log_det, learning_rate=0.01)
        x = torch.randn(256, 2) * torch.tensor([0.3, 1.5]) + 1
        before = model.loss(x, key=random.key(0)).loss.item()
        fastgen.fit(model, x, steps=40, batch_size=64, progress=False)
        assert model.loss(x, key=random.key(0)).loss.item() < before - 0.1


def test_config_errors():
    with pytest.raises(ValueError, match=r"lipschitz must be in \(0, 1\), got 1"):
        fastgen.create("residual_flow", features=2, lipschitz=1)
    with pytest.raises(ValueError, match="log_det must be 'auto', 'exact' or 'roulette', got 'none'"):
        fastgen.create("residual_flow", features=2, log_det="none")
    with pytest.raises(ValueError, match="memory must be 'standard' in a residual flow, got 'invertible'"):
        fastgen.create("residual_flow", features=2, memory="invertible")


def test_inverse_converges_in_the_zoo():
    model = make("residual", torch.float64)
    assert isinstance(model.transform[0], InvertibleResidual)
    z = torch.randn(20, 3).double()
    torch.testing.assert_close(model.encode(model.decode(z)), z, rtol=1e-10, atol=1e-10)
