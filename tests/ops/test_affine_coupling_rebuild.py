"""affine_coupling_rebuild: what the two passes that it fuses give, bit for bit where nothing is rounded in another way."""

import pytest
import torch

from fastgen import ops

BOUNDS = [None, "tanh", "sigmoid"]


def draw(rows=700, event=(37,), dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(rows, *event, dtype=dtype) for _ in range(4)] + [torch.randn(rows, dtype=dtype)]


def in_three_passes(y, shift, log_scale, grad_y, grad_log_det, bound):
    x = ops.affine_coupling(y, shift, log_scale, bound=bound, inverse=True).y
    leaves = [v.clone().requires_grad_() for v in (x, log_scale)]
    out = ops.affine_coupling(leaves[0], shift, leaves[1], bound=bound)
    return x, *torch.autograd.grad(out, leaves, (grad_y, grad_log_det))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("event", [(3,), (37,), (3, 5, 7)])
def test_is_inverse_forward_and_backward(bound, event):
    inputs = draw(event=event)
    found, expected = ops.affine_coupling_rebuild(*inputs, bound=bound), in_three_passes(*inputs, bound)
    assert torch.equal(found.x, expected[0])
    assert torch.equal(found.grad_x, expected[1])
    torch.testing.assert_close(found.grad_log_scale, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", [-20.0, 20.0])
def test_extreme_log_scales(bound, value):
    """dx * x overflows or loses its digits on the way where dy * (y - shift) does not."""
    y, shift, _, grad_y, grad_log_det = draw(4, (19,))
    log_scale = torch.full_like(y, value)
    found = ops.affine_coupling_rebuild(y, shift, log_scale, grad_y, grad_log_det, bound=bound)
    wide = [v.double() for v in (y, shift, log_scale, grad_y, grad_log_det)]
    for got, expected in zip(found, in_three_passes(*wide, bound), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-7)


def test_large_outputs_are_complete():
    """8 MiB and more go around the caches."""
    inputs = draw(4100, (512,))
    for got, expected in zip(ops.affine_coupling_rebuild(*inputs), in_three_passes(*inputs, None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_results_are_constants():
    y, *rest = draw(3)
    for backend in (None, "reference"):
        found = ops.affine_coupling_rebuild(y.requires_grad_(), *rest, backend=backend)
        assert not any(v.requires_grad for v in found)


def test_errors():
    y, shift, log_scale, grad_y, grad_log_det = draw(3)
    with pytest.raises(ValueError, match=r"grad_log_det must have shape \[3\] on cpu, got \[2\]"):
        ops.affine_coupling_rebuild(y, shift, log_scale, grad_y, grad_log_det[:2])
    with pytest.raises(TypeError, match="grad_log_det must be a floating-point tensor, got NoneType"):
        ops.affine_coupling_rebuild(y, shift, log_scale, grad_y, None)
    with pytest.raises(ValueError, match="bound must be None, 'tanh' or 'sigmoid', got 'softplus'"):
        ops.affine_coupling_rebuild(y, shift, log_scale, grad_y, grad_log_det, bound="softplus")
