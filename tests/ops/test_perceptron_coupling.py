"""perceptron_coupling: against the ops that it is made of, its inverse, what is kept, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen import ops

SIZES = [((4, 4), False), ((3, 18), False), ((3, 18), True)]


def network(sizes, flip, hidden=(33, 8), seed=0):
    """Weights and biases of a conditioner."""
    torch.manual_seed(seed)
    stays, moves = sizes[::-1] if flip else sizes
    widths = (stays, *hidden)
    layers = [*(nn.Linear(n, m) for n, m in zip(widths, hidden, strict=False)), *(nn.Linear(hidden[-1], moves) for _ in "st")]
    return [(layer.weight, layer.bias) for layer in layers]


def leaves(x, parameters):
    return [x, *(p for pair in parameters for p in pair)]


def in_steps(x, parameters, hidden, sizes, flip, bound, inverse):
    parts = x.split(sizes, 1)
    stays, moves = parts[::-1] if flip else parts
    theta = ops.perceptron(stays, parameters, hidden=hidden, outputs=(moves.shape[1],) * 2)
    moved, log_det = ops.affine_coupling(moves, *theta, bound=bound, inverse=inverse)
    return torch.cat((moved, stays) if flip else (stays, moved), 1), log_det


@pytest.mark.parametrize(("sizes", "flip"), SIZES)
@pytest.mark.parametrize("bound", [None, "tanh", "sigmoid"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_is_split_network_coupling_and_join(sizes, flip, bound, inverse, keep):
    parameters = network(sizes, flip)
    x = torch.randn(300, sum(sizes), requires_grad=True)
    options = {"hidden": (33, 8), "sizes": sizes, "flip": flip, "bound": bound, "inverse": inverse}
    found = ops.perceptron_coupling(x, parameters, keep=keep, **options)
    expected = in_steps(x, parameters, **options)
    weights = [torch.randn_like(v) for v in expected]
    grads = [torch.autograd.grad(ys, leaves(x, parameters), weights) for ys in (found, expected)]
    for got, wanted in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sizes", "flip"), SIZES)
def test_the_inverse_undoes_it(sizes, flip):
    parameters, x = network(sizes, flip), torch.randn(200, sum(sizes))
    options = {"hidden": (33, 8), "sizes": sizes, "flip": flip, "bound": "tanh"}
    with torch.no_grad():
        y, log_det = ops.perceptron_coupling(x, parameters, **options)
        back, log_det_back = ops.perceptron_coupling(y, parameters, inverse=True, **options)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_gradients_twice(output):
    parameters, x = network((4, 4), False), torch.randn(9, 8, requires_grad=True)
    options = {"hidden": (33, 8), "sizes": (4, 4)}
    grads = []
    for backend in (None, "reference"):
        chosen = ops.perceptron_coupling(x, parameters, backend=backend, **options)[output]
        first = torch.autograd.grad(chosen.sum(), leaves(x, parameters), create_graph=True, materialize_grads=True)
        (second,) = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        grads.append((*first, second))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads():
    parameters, x = network((32, 32), False, (64, 64)), torch.randn(1500, 64, requires_grad=True)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y, log_det = ops.perceptron_coupling(x, parameters, hidden=(64, 64), sizes=(32, 32))
            runs.append((y, log_det, *torch.autograd.grad(y.square().sum() + log_det.sum(), leaves(x, parameters))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_errors():
    parameters, x = network((4, 4), False), torch.randn(5, 8)
    options = {"hidden": (33, 8), "sizes": (4, 4)}
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        ops.perceptron_coupling(x.long(), parameters, **options)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 8\] as sizes say, got \[5, 7\]"):
        ops.perceptron_coupling(x[:, 1:], parameters, **options)
    with pytest.raises(ValueError, match=r"sizes must be the columns of two parts, got \(8, 0\)"):
        ops.perceptron_coupling(x, parameters, hidden=(33, 8), sizes=(8, 0))
    with pytest.raises(ValueError, match="bound must be None, 'tanh' or 'sigmoid', got 'softplus'"):
        ops.perceptron_coupling(x, parameters, bound="softplus", **options)
