"""reparameterize: the divergence against torch.distributions, the law of z, limits of log_var, the noise it uses."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from fastgen import ops, random


def test_divergence_is_torch_distributions():
    mean, log_var = torch.randn(40, 3, 5), torch.randn(40, 3, 5) * 3
    _, kl = ops.reparameterize(mean, log_var)
    q = Independent(Normal(mean.double(), (0.5 * log_var.double()).exp()), 2)
    p = Independent(Normal(torch.zeros_like(mean).double(), 1), 2)
    torch.testing.assert_close(kl.double(), kl_divergence(q, p), rtol=1e-6, atol=1e-6)


def test_noise_is_that_of_normal():
    key = random.key(8, step=3)
    z, _ = ops.reparameterize(torch.zeros(7, 33), torch.zeros(7, 33), key)
    assert torch.equal(z, ops.normal((7, 33), key))


def test_given_noise():
    mean, log_var, noise = torch.randn(3, 6, 5).unbind()
    z, _ = ops.reparameterize(mean, log_var, noise=noise)
    torch.testing.assert_close(z, mean + (0.5 * log_var).exp() * noise)
    with pytest.raises(ValueError, match="give key or noise, not both"):
        ops.reparameterize(mean, log_var, random.key(0), noise=noise)


def test_law_of_z():
    mean, log_var = torch.full((1 << 18, 4), 2.0), torch.full((1 << 18, 4), math.log(9.0))
    z, _ = ops.reparameterize(mean, log_var, random.key(1))
    assert z.mean().item() == pytest.approx(2, abs=4 * 3 / 1024)
    assert z.std().item() == pytest.approx(3, rel=4 / math.sqrt(2 * z.numel()))


@pytest.mark.parametrize("value", [-1e4, -120.0, -30.0, 0.0, 20.0, 80.0])
def test_extreme_log_variances_stay_finite(value):
    mean = torch.ones(2, 17, requires_grad=True)
    log_var = torch.full((2, 17), value, requires_grad=True)
    z, kl = ops.reparameterize(mean, log_var, random.key(0))
    (z.sum() + kl.sum()).backward()
    assert z.isfinite().all()
    assert kl.isfinite().all()
    assert mean.grad.isfinite().all()
    assert log_var.grad.isfinite().all()


def test_standard_posterior_costs_exactly_nothing():
    assert torch.equal(ops.reparameterize(torch.zeros(5, 40), torch.zeros(5, 40)).kl, torch.zeros(5))


def test_divergence_of_a_long_row_is_accurate():
    """A million terms of 1e-3: the parts of a row are added in float64."""
    mean = torch.full((1, 1 << 20), math.sqrt(2e-3))
    kl = ops.reparameterize(mean, torch.zeros_like(mean)).kl
    assert kl.item() == pytest.approx((1 << 20) * 1e-3, rel=1e-6)


def test_saving_or_redrawing_the_noise_gives_the_same_gradients():
    mean, log_var = torch.randn(2, 9, 70).unbind()
    grads = []
    for save in (True, False):
        m, v = mean.clone().requires_grad_(), log_var.clone().requires_grad_()
        z, kl = ops.reparameterize(m, v, random.key(4), save_noise=save)
        (z.square().sum() + kl.sum()).backward()
        grads.append((m.grad, v.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_one_output_alone():
    for output in (0, 1):
        mean, log_var = torch.randn(2, 9, 70).unbind()
        pairs = []
        for backend in (None, "reference"):
            m, v = mean.clone().requires_grad_(), log_var.clone().requires_grad_()
            ops.reparameterize(m, v, random.key(4), backend=backend)[output].sum().backward()
            pairs.append((m.grad, v.grad))
        torch.testing.assert_close(pairs[0][1], pairs[1][1])
        torch.testing.assert_close(pairs[0][0], pairs[1][0] if pairs[1][0] is not None else torch.zeros_like(mean))


def test_broadcast_and_mixed_types():
    mean, log_var = torch.randn(6, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    z, kl = ops.reparameterize(mean, log_var)
    (z.sum() + kl.sum()).backward()
    assert log_var.grad.shape == (4,)
    assert ops.reparameterize(mean.detach().bfloat16(), log_var.detach()).z.dtype is torch.float32


def test_second_derivative_is_refused():
    mean = torch.randn(3, 4, requires_grad=True)
    z, _ = ops.reparameterize(mean, torch.zeros(3, 4))
    (gradient,) = torch.autograd.grad(z.square().sum(), mean, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(3, dtype=torch.int64), torch.zeros(3)),
            TypeError,
            "mean must be a floating-point tensor, got torch.int64",
        ),
        (([1.0], torch.zeros(3)), TypeError, "mean must be a tensor, got list"),
        ((torch.zeros(3, 4), torch.zeros(3, 5)), ValueError, r"mean \(3, 4\), log_var \(3, 5\)"),
        ((torch.zeros(()), torch.zeros(())), ValueError, "must have a sample dimension"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), ValueError, "log_var is on meta, expected cpu like mean"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.reparameterize(*arguments)
