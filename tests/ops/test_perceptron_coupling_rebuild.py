"""perceptron_coupling_rebuild: what backpropagation through the coupling gives where its input is known, and that input."""

from __future__ import annotations

import pytest
import torch

from fastgen import ops
from tests.ops.test_perceptron_coupling import SIZES, leaves, network


@pytest.mark.parametrize(("sizes", "flip"), SIZES)
@pytest.mark.parametrize("bound", [None, "tanh", "sigmoid"])
def test_gives_the_input_and_its_gradients(sizes, flip, bound):
    parameters = network(sizes, flip)
    x = torch.randn(300, sum(sizes), requires_grad=True)
    added = torch.randn(300, 33, requires_grad=True)
    options = {"hidden": (33, 8), "sizes": sizes, "flip": flip, "bound": bound, "added": added}
    outputs = ops.perceptron_coupling(x, parameters, **options)
    grads = [torch.randn_like(v) for v in outputs]
    grad_x, *rest = torch.autograd.grad(outputs, [*leaves(x, parameters), added], grads)
    found = ops.perceptron_coupling_rebuild(outputs.y, parameters, *grads, **options)
    assert not any(v.requires_grad for v in found)
    expected = (x.detach(), grad_x, torch.cat([g.flatten() for g in rest[:-1]]), rest[-1])
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_errors():
    parameters, y = network((4, 4), False), torch.randn(5, 8)
    options = {"hidden": (33, 8), "sizes": (4, 4)}
    with pytest.raises(ValueError, match=r"grad_log_det must have shape \[5\] on cpu, got \[2\]"):
        ops.perceptron_coupling_rebuild(y, parameters, y, torch.zeros(2), **options)
    with pytest.raises(ValueError, match=r"y must have shape \[N, 8\] as sizes say, got \[5, 7\]"):
        ops.perceptron_coupling_rebuild(y[:, 1:], parameters, y, torch.zeros(5), **options)
