"""moments: torch.cov, far from zero, in batches and over ranks, the trace, gradients through a state, error messages."""

import math

import pytest
import torch

from fastgen import ops
from fastgen.ops.moments import moments_reference

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def features(rows, width, *, far=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, width)
    return (torch.randn(rows, width, generator=generator) * scale + far * torch.randn(width, generator=generator)).to(dtype)


def in_batches(x, sizes):
    state = None
    for part in x.split(sizes):
        state = ops.moments(part, state)
    return state


@dtypes
def test_mean_and_covariance(dtype):
    x = features(700, 130, dtype=dtype)
    state = ops.moments(x)
    assert state.count.item() == 700
    torch.testing.assert_close(state.mean, x.double().mean(0), rtol=1e-13, atol=1e-13)
    expected = torch.cov(x.double().T)
    torch.testing.assert_close(state.covariance(), expected, rtol=0, atol=3e-7 * expected.max().item())
    assert torch.equal(state.comoment, state.comoment.T)


@pytest.mark.parametrize("far", [0.0, 3.0, 1e4])
def test_trace_is_that_of_float64(far):
    """1e4 standard deviations from zero, raw float32 sums of squares would have no digit left."""
    x = features(4000, 70, far=far)
    exact = torch.cov(x.double().T)
    covariance = ops.moments(x).covariance()
    assert covariance.trace().item() == pytest.approx(exact.trace().item(), rel=1e-12)
    scale = exact.diagonal().sqrt()
    assert ((covariance - exact).abs() / torch.outer(scale, scale)).max() < 1e-6


@dtypes
@pytest.mark.parametrize("sizes", [[500], [1, 499], [250, 250], [3, 0, 497], [100] * 5])
def test_batches_add_up(dtype, sizes):
    x = features(500, 40, dtype=dtype)
    whole, parts = moments_reference(x.double()), in_batches(x, sizes)
    assert parts.count.item() == 500
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=1e-13)
    scale = whole.comoment.max().item()
    torch.testing.assert_close(parts.comoment, whole.comoment, rtol=0, atol=1e-7 * scale)
    assert parts.comoment.trace().item() == pytest.approx(whole.comoment.trace().item(), rel=1e-13)


def test_ranks_merge_in_any_order():
    x = features(300, 20)
    parts = [ops.moments(part) for part in x.split([10, 200, 90])]
    whole = ops.moments(x)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        first, second, third = (parts[i] for i in order)
        merged = ops.merge_moments(first, ops.merge_moments(second, third))
        for got, expected in zip(merged, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)
    empty = ops.moments(x[:0])
    for got, expected in zip(ops.merge_moments(empty, whole), whole, strict=True):
        assert torch.equal(got, expected)


def test_few_samples():
    x = features(1, 9)
    one = ops.moments(x)
    assert torch.equal(one.mean, x[0].double())
    assert torch.equal(one.comoment, torch.zeros(9, 9, dtype=torch.float64))
    assert one.covariance().isnan().all()
    none = ops.moments(x[:0])
    assert none.count.item() == 0
    assert torch.equal(none.mean, torch.zeros(9, dtype=torch.float64))
    again = ops.moments(x[:0], one)
    for got, expected in zip(again, one, strict=True):
        assert torch.equal(got, expected)


def test_constant_features_have_no_variance():
    x = torch.full((300, 50), math.pi)
    assert ops.moments(x).comoment.abs().max().item() < 1e-12


def test_state_is_not_changed():
    state = ops.moments(features(50, 8))
    copies = [t.clone() for t in state]
    ops.moments(features(20, 8, seed=1), state)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


def test_gradient_through_a_state():
    first, second = features(12, 6).requires_grad_(), features(9, 6, seed=1).requires_grad_()
    weights = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def gradients(function):
        state = function(second, function(first))
        loss = (state.covariance() * weights[0]).sum() + (state.mean * weights[1]).sum()
        return torch.autograd.grad(loss, (first, second))

    for got, expected in zip(gradients(ops.moments), gradients(moments_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_messages():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"features must have shape \[N, D\], got \[4\]"):
        ops.moments(x[:, 0])
    with pytest.raises(TypeError, match=r"features must be a floating-point tensor, got torch\.int64"):
        ops.moments(x.long())
    with pytest.raises(ValueError, match=r"state.mean must have shape \[3\] on cpu like the features, got \[2\] on cpu"):
        ops.moments(x, ops.moments(torch.zeros(4, 2)))
    with pytest.raises(TypeError, match=r"state\.count must be a float64 tensor, got int"):
        ops.moments(x, ops.moments(x)._replace(count=4))
