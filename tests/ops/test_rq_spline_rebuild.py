"""rq_spline_rebuild: what the passes that it fuses give; tails, ends and knots."""

import math

import pytest
import torch

from fastgen import ops

CONVENTIONS = ["nflows", "zuko"]


def draw(rows, event, bins, dtype=torch.float32):
    torch.manual_seed(0)
    y, *parameters = (torch.randn(rows, event, *more, dtype=dtype) for more in ((), (bins,), (bins,), (bins - 1,)))
    return [2 * y, *parameters, torch.randn(rows, event, dtype=dtype), torch.randn(rows, dtype=dtype)]


def in_three_passes(y, widths, heights, derivatives, grad_y, grad_log_det, **options):
    x = ops.rq_spline(y, widths, heights, derivatives, inverse=True, **options).y
    leaves = [v.clone().requires_grad_() for v in (x, widths, heights, derivatives)]
    return x, *torch.autograd.grad(ops.rq_spline(*leaves, **options), leaves, (grad_y, grad_log_det))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("bins", [1, 3, 8, 10])
def test_is_inverse_forward_and_backward(convention, bins):
    options = {"bound": 3.0, "convention": convention}
    inputs = draw(60, 9, bins)
    found = ops.rq_spline_rebuild(*inputs, **options)
    exact = in_three_passes(*(v.double() for v in inputs), **options)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=5e-4, atol=5e-4)
    assert torch.equal(found.x, ops.rq_spline(*inputs[:4], inverse=True, **options).y)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_outside_everything_passes_through(convention):
    y, *parameters, grad_y, grad_log_det = draw(5, 4, 8)
    y = torch.tensor([3.5, -7.0, math.inf, -math.inf]).expand(5, 4)
    found = ops.rq_spline_rebuild(y, *parameters, grad_y, grad_log_det, bound=3.0, convention=convention)
    assert torch.equal(found.x, y)
    assert torch.equal(found.grad_x, grad_y)
    assert all((g == 0).all() for g in found[2:])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_ends_are_finite(convention):
    y, *parameters, grad_y, grad_log_det = draw(5, 4, 8)
    y = torch.tensor([3.0, -3.0, math.nextafter(3.0, 0), math.nextafter(-3.0, 0)]).expand(5, 4)
    found = ops.rq_spline_rebuild(y, *parameters, grad_y, grad_log_det, bound=3.0, convention=convention)
    torch.testing.assert_close(found.x, y, rtol=1e-6, atol=1e-6)
    assert all(v.isfinite().all() for v in found)


def test_results_are_constants():
    inputs = [v.requires_grad_() for v in draw(3, 2, 4)]
    for backend in (None, "reference"):
        assert not any(v.requires_grad for v in ops.rq_spline_rebuild(*inputs, bound=3.0, backend=backend))
