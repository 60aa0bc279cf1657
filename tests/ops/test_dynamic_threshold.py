"""dynamic_threshold: bits of torch.quantile, diffusers' thresholding, odd rows, the gradient."""

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import ops
from tests.ops.test_contract import BACKENDS, examples_for, folder, running  # noqa: F401 - folder is a fixture


def threshold(x, quantile, maximum):
    s = torch.quantile(x.flatten(1).abs(), quantile, dim=1).clamp(1, maximum)
    return s.reshape(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_those_of_torch_quantile(backend, folder):  # noqa: F811
    """Any quantile, not only those whose rank is exact; few distinct values, equal values, large and small ones."""

    @settings(max_examples=examples_for(backend))
    @given(
        st.integers(0, 2**31),
        st.integers(1, 5),
        st.sampled_from([1, 2, 3, 16, 31, 100, 1000, 4097]),
        st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.995, 0.99, 0.9, 1 / 3])),
        st.sampled_from([0.4, 3.0, 1e5]),
        st.sampled_from([0.0, 0.25, 4.0]),
    )
    def check(seed, rows, event, quantile, scale, grid):
        x = torch.randn(rows, event, generator=torch.Generator().manual_seed(seed)) * scale
        if grid:
            x = (x / grid).round() * grid
        s = threshold(x, quantile, 1e4)
        with running(backend, folder):
            assert torch.equal(ops.dynamic_threshold(x, quantile, 1e4), x.clamp(-s, s) / s)

    with running(backend, folder):  # skips before hypothesis starts
        pass
    check()


def test_is_diffusers_thresholding():
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=2.5)
    x = torch.randn(16, 3, 32, 32) * torch.linspace(0.2, 2, 16).reshape(-1, 1, 1, 1)
    assert torch.equal(ops.dynamic_threshold(x, 0.995, 2.5), scheduler._threshold_sample(x))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_odd_rows(backend, folder):  # noqa: F811
    x = torch.randn(6, 200) * 3
    x[0, 3] = math.nan
    x[1] = 0
    x[2] = 5
    x[3, :20] = math.inf
    x[4, 7] = -math.inf
    with running(backend, folder):
        y = ops.dynamic_threshold(x, 0.96875, 8.0)
        plain = ops.dynamic_threshold(x[5:], 0.96875, 8.0)
    assert y[0].isnan().all()
    assert (y[1] == 0).all()
    assert (y[2] == 1).all()
    assert torch.equal(y[3], x[3].clamp(-8, 8) / 8)
    assert y[4, 7] == -1
    assert y[4].isfinite().all()
    assert torch.equal(y[5:], plain)


@pytest.mark.parametrize("pattern", ["ascending", "descending", "organ pipe", "two values", "doubling"])
def test_orders_that_are_hard_for_a_quickselect(pattern):
    n = 20_000
    ramp = torch.linspace(1, 50, n)
    row = {
        "ascending": ramp,
        "descending": ramp.flip(0),
        "organ pipe": torch.cat([ramp[::2], ramp[1::2].flip(0)]),
        "two values": torch.where(torch.arange(n) % 3 == 0, 2.0, 7.0),
        "doubling": 2.0 ** (torch.arange(n) % 120).float(),
    }[pattern]
    for quantile in (0.0, 0.3, 0.5, 0.995, 1.0):
        s = threshold(row[None], quantile, 1e30)
        assert torch.equal(ops.dynamic_threshold(row[None], quantile, 1e30), row.clamp(-s, s) / s), quantile


def test_estimates_within_the_limits_stay_as_they_are():
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    assert torch.equal(ops.dynamic_threshold(x, 0.995, 10.0), x)


def test_maximum_limits_the_threshold():
    x = torch.randn(5, 1000) * 100
    assert torch.equal(ops.dynamic_threshold(x, 0.995, 1.0), x.clamp(-1, 1))
    assert torch.equal(ops.dynamic_threshold(x, 0.995, 2.0), x.clamp(-2, 2) / 2)


def test_gradient_holds_the_threshold_constant():
    x = (torch.randn(4, 300) * 3).requires_grad_()
    y = ops.dynamic_threshold(x, 0.9, 100.0)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, weights)
    s = threshold(x.detach(), 0.9, 100.0)
    torch.testing.assert_close(gradient, torch.where(x.abs() <= s, weights / s, 0.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), 1.5, 2.0), ValueError, r"quantile must be in \[0, 1\], got 1.5"),
        ((torch.zeros(3, 4), math.nan, 2.0), ValueError, "quantile must be in"),
        ((torch.zeros(3, 4), 0.5, 0.5), ValueError, "maximum must be at least 1, got 0.5"),
        ((torch.zeros(3, 4, dtype=torch.int64), 0.5, 2.0), TypeError, "x0 must be a floating-point tensor"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.dynamic_threshold(*arguments)
