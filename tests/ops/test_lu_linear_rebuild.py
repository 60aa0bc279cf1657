"""lu_linear_rebuild: what the passes that it fuses give, for vectors and images, and that a wrong permutation is refused."""

import pytest
import torch

from fastgen import ops


def draw(shape, dtype=torch.float32):
    torch.manual_seed(0)
    channels = shape[1]
    scale = 0.5 / channels**0.5
    lower, upper = (scale * torch.randn(channels, channels, dtype=dtype) for _ in range(2))
    sign = torch.where(torch.randn(channels) < 0, -1.0, 1.0).to(dtype)
    factors = [lower, upper, 0.3 * torch.randn(channels, dtype=dtype), sign, torch.randperm(channels)]
    return [torch.randn(shape, dtype=dtype), *factors, torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)]


@pytest.mark.parametrize("shape", [(7, 5), (3, 12, 16, 16), (2, 48, 3, 5), (300, 1, 2)])
def test_is_inverse_forward_and_backward(shape):
    inputs = draw(shape)
    y, lower, upper, log_diagonal, sign, permutation, grad_y, grad_log_det = (
        v.double() if v.is_floating_point() else v for v in inputs
    )
    x = ops.lu_linear(y, lower, upper, log_diagonal, sign, permutation, inverse=True).y
    leaves = [v.clone().requires_grad_() for v in (x, lower, upper, log_diagonal)]
    expected = torch.autograd.grad(ops.lu_linear(*leaves, sign, permutation), leaves, (grad_y, grad_log_det))
    for got, exact in zip(ops.lu_linear_rebuild(*inputs), (x, *expected), strict=True):
        assert (got - exact).abs().max() <= 3e-6 * max(1.0, exact.abs().max())


def test_results_are_constants():
    inputs = [v.requires_grad_() if v.is_floating_point() else v for v in draw((3, 4, 5))]
    for backend in (None, "reference"):
        assert not any(v.requires_grad for v in ops.lu_linear_rebuild(*inputs, backend=backend))


def test_errors():
    inputs = draw((3, 4, 5))
    with pytest.raises(ValueError, match=r"permutation must hold each of 0 \.\.\. 3 once"):
        ops.lu_linear_rebuild(*inputs[:5], torch.tensor([0, 0, 1, 2]), *inputs[6:])
    with pytest.raises(ValueError, match=r"grad_log_det must have shape \[3\]"):
        ops.lu_linear_rebuild(*inputs[:7], torch.zeros(4))
