"""Conv2d: trained by minimal filtering it has the gradients of a plain convolution, and steps back where it may not serve."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.nn.conv import Conv2d
from fastgen.ops import _native

native = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs=32, outputs=64, size=3, **options):
    torch.manual_seed(0)
    return Conv2d(inputs, outputs, size, padding=size // 2, **options)


def plainly(conv, x, shift=None, residual=None):
    h = F.conv2d(x, conv.weight, conv.bias, padding=1)
    h = h if shift is None else h + shift[:, :, None, None]
    return h if residual is None else h + residual


def far(found, exact):
    return ((found - exact).abs().max() / exact.abs().max()).item()


@native
@pytest.mark.parametrize("rows", [None, 1, 6], ids=["none", "shared", "each"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_are_those_of_the_plain_sum(rows, residual):
    conv = layer()
    leaves = [draw(6, 32, 16, 13)]
    leaves += [] if rows is None else [draw(rows, 64, seed=1)]
    leaves += [draw(6, 64, 16, 13, seed=2)] if residual else []
    names = ["x", *([] if rows is None else ["shift"]), *(["residual"] if residual else [])]
    assert conv._tile(leaves[0]) is not None
    wide = copy.deepcopy(conv).double()
    results = []
    for module, call, values in ((conv, conv, leaves), (wide, lambda **kw: plainly(wide, **kw), [v.double() for v in leaves])):
        own = [v.clone().requires_grad_() for v in values]
        y = call(**dict(zip(names, own, strict=True)))
        towards = draw(*y.shape, seed=3).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [*own, module.weight, module.bias], towards)])
    for found, exact in zip(*results, strict=True):
        assert far(found, exact) < 5e-6


@native
def test_gradient_penalty_is_right():
    """The gradient of a norm of the gradient, as Wasserstein discriminators are trained with."""

    def penalty(convs, x, call):
        x = x.requires_grad_()
        h = call(convs[1], torch.tanh(call(convs[0], x)))
        (slope,) = torch.autograd.grad(h.square().sum((1, 2, 3)).sum(), x, create_graph=True)
        loss = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, [conv.weight for conv in convs])

    convs = [layer(32, 64), layer(64, 32)]
    x = draw(6, 32, 12, 12)
    assert all(conv._tile(x.new_empty(6, conv.in_channels, 12, 12)) is not None for conv in convs)
    found = penalty(convs, x.clone(), lambda conv, x: conv(x))
    exact = penalty([copy.deepcopy(conv).double() for conv in convs], x.double(), plainly)
    for a, b in zip(found, exact, strict=True):
        assert far(a, b) < 1e-5


@native
def test_plain_where_nothing_is_to_win():
    x = draw(6, 32, 12, 12)
    assert layer()._tile(x) is not None
    assert layer(size=1)._tile(x) is None
    assert layer(stride=2)._tile(x) is None
    assert layer(outputs=3)._tile(x) is None
    assert layer()._tile(x[:1, :, :2, :2]) is None
    assert layer()._tile(x.double()) is None
    assert layer().double()._tile(x.double()) is None
    frozen = layer().requires_grad_(False)
    assert frozen._tile(x) is None
    assert frozen._tile(x.clone().requires_grad_()) is not None
    with torch.no_grad():
        assert layer()._tile(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer()(x).dtype is torch.bfloat16


def test_transforms_of_functions_see_a_plain_convolution():
    conv, x, v = layer(), draw(6, 32, 12, 12), draw(6, 32, 12, 12, seed=1)
    _, pushed = torch.func.jvp(conv, (x,), (v,))
    torch.testing.assert_close(pushed, F.conv2d(v, conv.weight, padding=1), rtol=1e-5, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        pushed = torch.autograd.forward_ad.unpack_dual(conv(dual)).tangent
    torch.testing.assert_close(pushed, F.conv2d(v, conv.weight, padding=1), rtol=1e-5, atol=1e-5)


def test_compiles_whole_with_gradients():
    conv, x = layer(), draw(6, 32, 12, 12)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(conv.parameters()))
    for a, b in zip(found, torch.autograd.grad(conv(x).square().sum(), list(conv.parameters())), strict=True):
        assert far(a, b) < 1e-5


@native
def test_a_step_does_not_depend_on_the_threads():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        net = nn.Sequential(layer(), nn.SiLU(), layer(64, 70))
        net(draw(9, 32, 14, 14)).square().mean().backward()
        results.append([p.grad for p in (net[0].weight, net[2].weight)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
