"""perceptron: against nn.Sequential, its parameters in either form, saturation, what is kept, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fastgen.ops import _native, perceptron, perceptron_serves, use_backend

native = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def network(inputs, hidden, outputs, seed=0):
    """The layers of a network as PyTorch makes them: hidden ones, then outputs."""
    torch.manual_seed(seed)
    widths = (inputs, *hidden)
    return [*(nn.Linear(n, m) for n, m in zip(widths, hidden, strict=False)), *(nn.Linear(hidden[-1], m) for m in outputs)]


def pairs(layers):
    return [(layer.weight, layer.bias) for layer in layers]


@pytest.mark.parametrize(("rows", "inputs", "hidden", "outputs"), [(300, 7, (40, 33), (5, 64, 3)), (1, 1, (1,), (1,))])
@pytest.mark.parametrize("keep", [False, True])
def test_is_the_network_of_linear_layers(rows, inputs, hidden, outputs, keep):
    layers = network(inputs, hidden, outputs)
    body = nn.Sequential(*(part for layer in layers[: len(hidden)] for part in (layer, nn.ReLU())))
    x = torch.randn(rows, inputs, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    found = perceptron(x, pairs(layers), hidden=hidden, outputs=outputs, keep=keep)
    expected = [head(body(x)) for head in layers[len(hidden) :]]
    weights = [torch.randn_like(y) for y in expected]
    grads, right = (torch.autograd.grad(ys, [x, *parameters], weights) for ys in (found, expected))
    for got, wanted in zip((*found, *grads), (*expected, *right), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_one_vector_holds_weights_and_biases_in_turn():
    layers = network(3, (4,), (2, 5))
    flat = torch.cat([t.flatten() for layer in layers for t in (layer.weight, layer.bias)])
    x = torch.randn(6, 3)
    for one, many in zip(*(perceptron(x, p, hidden=(4,), outputs=(2, 5)) for p in (flat, pairs(layers))), strict=True):
        assert torch.equal(one, many)


@native
def test_what_is_kept_is_computed_again_to_the_bit():
    layers = network(5, (40, 8), (3,))
    x = torch.randn(700, 5, requires_grad=True)
    runs = []
    for keep in (True, False):
        (y,) = perceptron(x, pairs(layers), hidden=(40, 8), outputs=(3,), keep=keep)
        runs.append(torch.autograd.grad(y.square().sum(), [x, *(p for pair in pairs(layers) for p in pair)]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@native
def test_nothing_of_a_large_batch_is_kept_but_the_inputs():
    layers = network(4, (64, 64), (4,))
    own = {p.data_ptr() for pair in pairs(layers) for p in pair}

    def kept(rows, **options):
        sizes = []
        x = torch.randn(rows, 4)
        with saved_tensors_hooks(lambda t: sizes.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t):
            perceptron(x, pairs(layers), hidden=(64, 64), outputs=(4,), **options)
        return sum(sizes) / rows

    assert kept(8192) == kept(16384) - 4 + 4 + 128  # up to a million numbers
    assert kept(16384) == kept(8192, keep=False) == 4
    assert kept(16384, keep=True) == 4 + 128


def test_some_outputs_and_some_parameters_alone_have_gradients():
    layers = network(3, (8,), (2, 5))
    x = torch.randn(6, 3)
    layers[0].requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    _, second = perceptron(x, pairs(layers), hidden=(8,), outputs=(2, 5))
    second.sum().backward()
    assert layers[0].weight.grad is layers[0].bias.grad is layers[1].bias.grad is None
    assert (layers[1].weight.grad == 0).all()
    torch.testing.assert_close(layers[2].bias.grad, torch.full((5,), 6.0))
    with torch.no_grad():
        assert not perceptron(x, pairs(layers), hidden=(8,), outputs=(2, 5))[0].requires_grad


def test_saturated_inputs_have_no_gradient():
    layers = network(2, (8,), (1,))
    x = torch.tensor([[0.5, 2.0], [-3.0, 1.0]], requires_grad=True)
    (y,) = perceptron(x, pairs(layers), hidden=(8,), outputs=(1,), limit=1.0)
    torch.testing.assert_close(y, perceptron(x.clamp(-1, 1), pairs(layers), hidden=(8,), outputs=(1,))[0])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, torch.tensor([[False, True], [True, False]]))


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    layers = network(2, (8,), (1,))
    (y,) = perceptron(torch.randn(4, 2), pairs(layers), hidden=(8,), outputs=(1,))
    with torch.no_grad():
        layers[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@native
def test_when_the_kernels_are_best():
    x = torch.randn(8, 4)
    assert perceptron_serves(x, (64,), (4, 4))
    assert not perceptron_serves(x, (2048,), (4,))
    assert not perceptron_serves(x, (8,), (1,) * 5)
    assert not perceptron_serves(x.double(), (64,), (4,))
    with torch.autocast("cpu", torch.bfloat16):
        assert not perceptron_serves(x, (64,), (4,))
    with use_backend("reference"):
        assert not perceptron_serves(x, (64,), (4,))
    served = []
    torch.func.vmap(lambda v: served.append(perceptron_serves(v, (64,), (4,))) or v)(x[None])
    assert served == [False]


def test_errors():
    layers = network(3, (4,), (2,))
    x, sizes = torch.randn(5, 3), {"hidden": (4,), "outputs": (2,)}
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        perceptron(x.long(), pairs(layers), **sizes)
    with pytest.raises(ValueError, match=r"x must have shape \[N, D\] with D at least 1, got \[5\]"):
        perceptron(x[:, 0], pairs(layers), **sizes)
    with pytest.raises(ValueError, match=r"outputs must be the widths of at least one layer, got \(\)"):
        perceptron(x, pairs(layers), hidden=(4,), outputs=())
    with pytest.raises(ValueError, match="parameters must have weight and bias of 2 layers, got 1"):
        perceptron(x, pairs(layers[:1]), **sizes)
    with pytest.raises(ValueError, match=r"weight 0 of parameters must have shape \[4, 3\], got \[2, 4\]"):
        perceptron(x, pairs(layers[::-1]), **sizes)
    with pytest.raises(ValueError, match=r"parameters must have shape \[26\], got \[25\]"):
        perceptron(x, torch.zeros(25), **sizes)
    with pytest.raises(TypeError, match=r"parameters must be .* of torch\.float32 on cpu like x, got torch\.float64 on cpu"):
        perceptron(x, torch.zeros(26, dtype=torch.float64), **sizes)
    with pytest.raises(ValueError, match=r"added must have shape \[5, 4\], got \[5, 3\]"):
        perceptron(x, pairs(layers), added=x, **sizes)
    with pytest.raises(ValueError, match="limit must be positive or None, got nan"):
        perceptron(x, pairs(layers), limit=math.nan, **sizes)


@native
def test_too_many_outputs_for_the_kernels():
    layers = network(3, (4,), (1,) * 5)
    assert len(perceptron(torch.randn(2, 3), pairs(layers), hidden=(4,), outputs=(1,) * 5)) == 5
    with pytest.raises(ValueError, match="cannot serve: its kernels take at most 7 hidden layers and 4 outputs"):
        perceptron(torch.randn(2, 3), pairs(layers), hidden=(4,), outputs=(1,) * 5, backend="cpp")
