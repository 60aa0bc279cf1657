"""Continuous flows: Hutchinson's trace, the adjoint equation, extremes, errors."""

import sys

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.flows.probes import jacobian, of_layer
from fastgen.nn.divergence import rademacher
from tests.flows.test_density import SPECIAL
from tests.flows.zoo import draw, make


def test_rademacher_signs():
    v = rademacher((1000, 8), random.key(3), torch.float64)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert v.mean().abs() < 0.05
    assert torch.equal(rademacher((10, 8), random.key(3, sample=20), torch.float64), v[20:30])
    assert (of_layer(random.key(3), 1, v.device) != of_layer(random.key(3), 0, v.device)).any()


def test_jacobian_is_that_of_autograd():
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x = torch.randn(4, 3).double()
    y, matrix = jacobian(net, x)
    torch.testing.assert_close(y, net(x))
    for i in range(4):
        torch.testing.assert_close(matrix[i], torch.autograd.functional.jacobian(net, x[i]))


def test_hutchinson_is_unbiased_and_a_function_of_the_key():
    exact, estimate = (make("cnf", torch.float64, trace=trace, tolerance=1e-6) for trace in ("exact", "hutchinson"))
    x = draw(exact, 1)[0].double().expand(4000, 3)
    key = random.key(1)
    with torch.no_grad():
        found, again = estimate.log_prob(x, key=key), estimate.log_prob(x, key=key)
        other = estimate.log_prob(x, key=random.key(2))
        expected = exact.log_prob(x[:1])
        part = estimate.log_prob(x[:5], key=random.key(1, sample=7))
    assert torch.equal(found, again)
    assert (found != other).any()
    torch.testing.assert_close(part, found[7:12], rtol=1e-4, atol=1e-4)
    spread = found.std() / 4000**0.5
    assert spread > 0
    assert (found.mean() - expected).abs() < 4 * spread


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_adjoint_gives_the_gradients_of_the_steps(trace):
    grads = []
    for adjoint in (False, True):
        model = make("cnf", torch.float64, trace=trace, tolerance=1e-9, adjoint=adjoint, context=2)
        x = draw(model, 4)[0].double().requires_grad_()
        context = torch.ones(4, 2).double().requires_grad_()
        model.log_prob(x, context, key=random.key(0)).sum().backward()
        grads.append([x.grad, context.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sampling_leaves_the_trace_out(monkeypatch):
    model = make("cnf")
    monkeypatch.setattr("fastgen.flows.cnf.jacobian", lambda *_: pytest.fail("the trace was computed"))
    assert model.sample(3).shape == (3, 3)


def test_no_finite_input_gives_nan():
    model = make("cnf", event_shape=(2,)).eval()
    values = torch.tensor([*SPECIAL, *(-v for v in SPECIAL)])
    x = torch.cartesian_prod(values, values)
    with torch.no_grad():
        assert not model().log_prob(x).isnan().any()
        z, ladj = model.transform.inv_and_ladj(x.clamp(-1e3, 1e3))
    assert z.isfinite().all()
    assert ladj.isfinite().all()


def test_config_errors():
    with pytest.raises(ValueError, match="trace must be 'exact' or 'hutchinson', got 'none'"):
        fastgen.create("cnf", features=2, trace="none")
    with pytest.raises(ValueError, match="memory must be 'standard', got 'invertible': adjoint=True"):
        fastgen.create("cnf", features=2, memory="invertible")
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        fastgen.create("cnf", features=2, tolerance=0)


def test_without_torchdiffeq_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ModuleNotFoundError, match=r"a continuous flow needs torchdiffeq: pip install 'fastgen-torch\[ode\]'"):
        make("cnf").log_prob(torch.zeros(1, 3))
