"""bias_act: published gains, derivatives in closed form, kinks and clamp, extreme inputs, penalties on gradients, layouts."""

import math

import pytest
import torch

from fastgen import ops
from fastgen.ops.bias_act import ACTIVATIONS, bias_act_reference
from tests.ops.test_contract import BACKENDS, folder, running  # noqa: F401 - folder is a fixture


@pytest.mark.parametrize("act", ["relu", "lrelu", "swish", "linear"])
def test_default_gains_keep_the_second_moment(act):
    """He et al.: of a standard normal; exactly for relu and linear, to a few percent for the others."""
    y = ops.bias_act(torch.randn(1, 400_000), act=act)
    slack = {"relu": 0.01, "linear": 0.01, "lrelu": 0.05, "swish": 0.3}[act]
    assert y.square().mean().item() == pytest.approx(1.0, abs=slack)


def test_values_of_every_activation():
    v = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0]])
    e = v.double().exp()
    expected = {
        "linear": v,
        "relu": math.sqrt(2) * v.clamp_min(0),
        "lrelu": math.sqrt(2) * torch.where(v > 0, v, 0.2 * v),
        "tanh": (e - 1 / e) / (e + 1 / e),
        "sigmoid": e / (1 + e),
        "elu": torch.where(v > 0, v.double(), e - 1),
        "selu": 1.0507009873554805 * torch.where(v > 0, v.double(), 1.6732632423543772 * (e - 1)),
        "softplus": (1 + e).log(),
        "swish": math.sqrt(2) * v * e / (1 + e),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for act, value in expected.items():
        torch.testing.assert_close(ops.bias_act(v, act=act).double(), value.double(), rtol=1e-6, atol=1e-7, msg=act)


def test_bias_gain_alpha_and_clamp_in_their_order():
    x, b = torch.tensor([[-4.0, 1.0], [3.0, 0.5]]), torch.tensor([1.0, -2.0])
    y = ops.bias_act(x, b, act="lrelu", alpha=0.5, gain=2.0, clamp=2.5)
    torch.testing.assert_close(y, torch.tensor([[-2.5, -1.0], [2.5, -1.5]]))
    y = ops.bias_act(x, b, dim=0, gain=3.0)
    torch.testing.assert_close(y, torch.tensor([[-9.0, 6.0], [3.0, -4.5]]))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_at_zero_are_those_of_pytorch(act, backend, folder):  # noqa: F811
    """Kinks of the first and of the second derivative, on either of which rounded inputs do fall."""
    slopes = []
    for f, dtype in ((bias_act_reference, torch.float64), (ops.bias_act, torch.float32)):
        x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
        with running(backend, folder):
            (slope,) = torch.autograd.grad(f(x, act=act).sum(), x, create_graph=True)
            (curve,) = torch.autograd.grad(slope.sum() + 0 * x.sum(), x)
        slopes.append([slope.item(), curve.item()])
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_against_differences(act):
    """First and second, from central differences of the reference in float64."""
    v = torch.linspace(-3.05, 2.95, 61, dtype=torch.float64)[None]
    step = 1e-4
    f = [bias_act_reference(v + i * step, act=act) for i in (-1, 0, 1)]
    x = v.float().requires_grad_()
    (slope,) = torch.autograd.grad(ops.bias_act(x, act=act).sum(), x, create_graph=True)
    torch.testing.assert_close(slope.double(), (f[2] - f[0]) / (2 * step), rtol=1e-5, atol=1e-6)
    (curve,) = torch.autograd.grad(slope.sum() + 0 * x.sum(), x)
    torch.testing.assert_close(curve.double(), (f[2] - 2 * f[1] + f[0]) / step**2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_extreme_inputs(act):
    """Values and gradients where exponentials over- and underflow, as in float64."""
    grid = [-1e30, -200.0, -88.0, -20.0, -1e-3, -1e-20, 1e-20, 1e-3, 20.0, 88.0, 200.0, 1e30]
    results = []
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([grid], dtype=torch.float32).to(dtype).requires_grad_()
        y = ops.bias_act(x, act=act)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum() + 0 * x.sum(), x)
        results.append((y, slope, curve))
    for got, expected in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-7)


def test_what_is_cut_off_has_no_gradient():
    x = torch.tensor([[-3.0, -1.0, 0.5, 1.0, 3.0]], requires_grad=True)
    for backend in (None, "reference"):
        y = ops.bias_act(x, gain=2.0, clamp=2.0, backend=backend)
        assert torch.equal(y, torch.tensor([[-2.0, -2.0, 1.0, 2.0, 2.0]]))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.tensor([[0.0, 2.0, 2.0, 2.0, 0.0]]))


def test_kinks_have_the_slope_below():
    for act, slope in (("relu", 0.0), ("lrelu", 0.2 * math.sqrt(2)), ("elu", 1.0)):
        for backend in (None, "reference"):
            x = torch.zeros(1, 20, requires_grad=True)
            (grad,) = torch.autograd.grad(ops.bias_act(x, act=act, backend=backend).sum(), x)
            torch.testing.assert_close(grad, torch.full((1, 20), slope))


def test_nan_stays():
    for act in ACTIVATIONS:
        y = ops.bias_act(torch.tensor([[1.0, math.nan, 2.0]]), act=act, clamp=1.0)
        assert y.isnan().tolist() == [[False, True, False]], act


@pytest.mark.parametrize("shape", [(3, 5), (70, 3), (4, 6, 3), (2, 3, 5, 5), (2, 70, 9, 9), (1, 2500), (5, 1, 1, 1), (600, 7)])
def test_gradient_of_the_bias_is_a_sum(shape):
    """Runs shorter and longer than those taken together, and parts of rows."""
    x, b = torch.randn(shape), torch.randn(shape[1], requires_grad=True)
    w = torch.randn(shape)
    (grad,) = torch.autograd.grad(ops.bias_act(x, b, act="swish"), b, w)
    wide = b.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(bias_act_reference(x.double(), wide, act="swish"), wide, w.double())
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-4)


def test_gradient_penalty_of_a_small_critic():
    """R1: the gradient of |d critic / dx|^2 by every parameter, fused and in float64."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(8, 2, 3, 3, generator=generator) / 4, torch.randn(1, 8, 3, 3, generator=generator) / 8]
    biases = [torch.randn(8, generator=generator), torch.randn(1, generator=generator)]
    images = torch.randn(2, 2, 8, 8, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        x = images.to(dtype, copy=True).requires_grad_()
        leaves = [v.to(dtype, copy=True).requires_grad_() for v in (*weights, *biases)]
        h = x
        for weight, bias, act in zip(leaves[:2], leaves[2:], ("swish", "softplus"), strict=True):
            h = torch.nn.functional.conv2d(ops.upsample2d(h, ops.setup_filter([1, 3, 3, 1])), weight, stride=2, padding=1)
            h = ops.bias_act(h, bias, act=act, clamp=20)
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), leaves, materialize_grads=True))
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_channels_last_stays():
    x = torch.randn(2, 20, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.bias_act(x, torch.randn(20), act="lrelu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_bias_of_another_type():
    x, b = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(6, requires_grad=True)
    y = ops.bias_act(x, b)
    assert y.dtype is torch.bfloat16
    (grad,) = torch.autograd.grad(y.sum(), b)
    assert grad.dtype is torch.float32
    torch.testing.assert_close(grad, torch.full((6,), 4.0))


def test_no_third_derivative():
    x = torch.randn(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(ops.bias_act(x, act="tanh").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a fused op can be differentiated once"):
        torch.autograd.grad(second.sum(), x)


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"act must be one of linear, relu, .*, got 'gelu'"):
        ops.bias_act(x, act="gelu")
    with pytest.raises(ValueError, match="alpha is the slope of lrelu below 0, act is 'relu'"):
        ops.bias_act(x, act="relu", alpha=0.1)
    with pytest.raises(ValueError, match="clamp must be None or at least 0, got -1"):
        ops.bias_act(x, clamp=-1)
    with pytest.raises(ValueError, match=r"b must have shape \[4\] on cpu, got \[3\] on cpu"):
        ops.bias_act(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"dim must be a dimension of x \(3, 4\), got 2"):
        ops.bias_act(x, torch.zeros(3), dim=2)
    with pytest.raises(TypeError, match="b must be None or a floating-point tensor, got float"):
        ops.bias_act(x, 1.0)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        ops.bias_act(x.long())
