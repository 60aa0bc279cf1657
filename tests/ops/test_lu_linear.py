"""lu_linear: against the matrix that scipy's factors make, its determinant and inverse, conv2d, all channel counts, NaN."""

import math

import pytest
import scipy.linalg
import torch

from fastgen import ops


def factors_of(matrix):
    """scipy's P L U of a matrix as the arguments of lu_linear."""
    p, lower, upper = (torch.from_numpy(v) for v in scipy.linalg.lu(matrix.numpy()))
    diagonal = upper.diagonal()
    return lower, upper, diagonal.abs().log(), diagonal.sign(), p.argmax(1)


def single(arguments):
    return [v.float() if v.is_floating_point() else v for v in arguments]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12, 16, 33, 48, 96])
def test_product_determinant_and_inverse(channels):
    matrix = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0] * 1.1
    factors = factors_of(matrix)
    x = torch.randn(3, channels, 5, 7)
    y, log_det = ops.lu_linear(x, *single(factors))
    expected = torch.nn.functional.conv2d(x.double(), matrix[:, :, None, None])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    expected = (35 * torch.linalg.slogdet(matrix).logabsdet).expand(3)
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-5, atol=1e-4)
    back, back_log_det = ops.lu_linear(y, *single(factors), inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=2e-5)
    assert torch.equal(back_log_det, -log_det)


def test_vectors_are_images_of_one_pixel():
    factors = single(factors_of(torch.randn(21, 21, dtype=torch.float64)))
    x = torch.randn(40, 21)
    for inverse in (False, True):
        flat = ops.lu_linear(x, *factors, inverse=inverse)
        image = ops.lu_linear(x[:, :, None, None], *factors, inverse=inverse)
        assert torch.equal(flat.y, image.y[:, :, 0, 0])
        assert torch.equal(flat.log_det, image.log_det)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("channels", [24, 48, 96])
def test_gradients_with_many_channels(channels, inverse):
    scale = 0.5 / math.sqrt(channels)
    lower, upper = scale * torch.randn(2, channels, channels)
    x, log_diagonal, sign = torch.randn(4, channels, 10, 13), 0.2 * torch.randn(channels), torch.randn(channels).sign()
    permutation, weight = torch.randperm(channels), torch.randn(4, channels, 10, 13)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [v.to(dtype).requires_grad_() for v in (x, lower, upper, log_diagonal)]
        y, log_det = ops.lu_linear(*leaves, sign.to(dtype), permutation, inverse=inverse)
        grads.append(torch.autograd.grad((y * weight.to(dtype)).sum() + log_det.square().sum(), leaves))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_only_the_triangles_are_read():
    lower, upper = torch.full((2, 3, 3), math.nan)
    lower = torch.where(torch.ones(3, 3).tril(-1) > 0, 0.5, lower)
    upper = torch.where(torch.ones(3, 3).triu(1) > 0, 0.5, upper)
    y, _ = ops.lu_linear(torch.ones(1, 3), lower, upper, torch.zeros(3), torch.ones(3), torch.tensor([2, 0, 1]))
    # U 1 = (2, 1.5, 1), L U 1 = (2, 2.5, 2.75)
    torch.testing.assert_close(y, torch.tensor([[2.75, 2.0, 2.5]]))


def test_nan_stays_in_its_pixel():
    factors = single(factors_of(torch.randn(5, 5, dtype=torch.float64)))
    x = torch.randn(3, 5, 4, 6)
    x[1, 2, 3, 4] = math.nan
    for inverse in (False, True):
        odd = ops.lu_linear(x, *factors, inverse=inverse).y.isnan().any(1)
        assert odd[1, 3, 4]
        assert odd.sum() == 1


def test_bfloat16_activations_with_float32_factors():
    factors = single(factors_of(torch.eye(6, dtype=torch.float64)[torch.randperm(6)]))
    x = torch.randn(4, 6, 3, 3).bfloat16().requires_grad_()
    lower = factors[0].requires_grad_()
    y, log_det = ops.lu_linear(x, lower, *factors[1:])
    y.float().sum().backward()
    assert (y.dtype, log_det.dtype, x.grad.dtype, lower.grad.dtype) == (
        torch.bfloat16, torch.float32, torch.bfloat16, torch.float32,
    )  # fmt: skip


def test_errors():
    square, line, order = torch.zeros(3, 3), torch.zeros(3), torch.arange(3)
    x = torch.zeros(2, 3)
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=r"permutation must hold each of 0 ... 2 once, got \[0, 0, 2\]"):
            ops.lu_linear(x, square, square, line, line, torch.tensor([0, 0, 2]), backend=backend)
    with pytest.raises(ValueError, match=r"lower must have shape \[3, 3\] on cpu, got \[3, 4\]"):
        ops.lu_linear(x, torch.zeros(3, 4), square, line, line, order)
    with pytest.raises(ValueError, match=r"sign must have shape \[3\] on cpu, got \[4\]"):
        ops.lu_linear(x, square, square, line, torch.zeros(4), order)
    with pytest.raises(TypeError, match=r"permutation must be an int64 tensor, got torch\.float32"):
        ops.lu_linear(x, square, square, line, line, line)
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, ...\], got \[3\]"):
        ops.lu_linear(line, square, square, line, line, order)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        ops.lu_linear(order[None], square, square, line, line, order)
