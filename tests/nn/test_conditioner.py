"""Conditioners: shapes, contexts as concatenation would have them, saturation, the identity at the start."""

import copy

import pytest
import torch

import fastgen
from fastgen.nn.conditioner import LIMIT, ConvConditioner, MLPConditioner, ResNetConditioner, keep_activations


def test_context_enters_as_concatenation_would():
    net = MLPConditioner(3, (8, 8), (4, 2), context=5)
    x, context = torch.randn(6, 3), torch.randn(6, 5)
    weight = torch.cat([net.first.weight, net.context.weight], 1)
    h = torch.relu(torch.nn.functional.linear(torch.cat([x, context], 1), weight, net.first.bias))
    h = torch.relu(net.rest[0](h))
    for got, head in zip(net(x, context), net.heads, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, head(h))


@pytest.mark.parametrize("network", [ConvConditioner, ResNetConditioner])
def test_networks_of_images(network):
    net = network(3, 8, (2, 4), context=5)
    x, context = torch.randn(6, 3, 4, 6), torch.randn(6, 5)
    outputs = net(x, context)
    assert [tuple(o.shape) for o in outputs] == [(6, 2, 4, 6), (6, 4, 4, 6)]
    assert all((o == 0).all() for o in outputs)
    torch.nn.init.normal_(net.head.weight)
    first = net(x, context)[0]
    assert (first != net(x, context + 1)[0]).any()
    torch.testing.assert_close(net(x[:2], context[:2])[0], first[:2], rtol=1e-4, atol=1e-4)


def test_inputs_saturate():
    net = MLPConditioner(2, (4,), (3,))
    largest = torch.finfo(torch.float32).max
    far = net(torch.tensor([[largest, -largest]]))[0]
    assert far.isfinite().all()
    assert torch.equal(far, net(torch.tensor([[LIMIT, -LIMIT]]))[0])


def test_errors():
    with pytest.raises(ValueError, match=r"hidden must be the widths of at least one layer, got \(\)"):
        MLPConditioner(2, (), (3,))


def _plainly(net, x, context=None):
    """The network by its modules."""
    with fastgen.ops.use_backend("reference"):
        return net(x, context)


def test_one_call_is_the_network_of_modules():
    net = MLPConditioner(3, (40, 8), (4, 2), context=5)
    x, context = torch.randn(60, 3, requires_grad=True), torch.randn(60, 5, requires_grad=True)
    wanted = [x, context, *net.parameters()]
    results = [call(x, context) for call in (net, lambda *args: _plainly(net, *args))]
    for (fused, *_), (plain, *_) in [results]:
        assert fused.grad_fn.name() != plain.grad_fn.name() or fastgen.ops.info()["cpp"] != "loaded"
    grads = [torch.autograd.grad([y.square().sum() for y in ys], wanted) for ys in results]
    for got, expected in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_and_other_layers_are_called():
    x, seen = torch.randn(6, 3), []
    net = MLPConditioner(3, (8,), (4,))
    before = net(x)[0]
    net.rest = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    assert (net(x)[0] != before).any()
    net.first.register_forward_hook(lambda module, inputs, output: seen.append(module))
    net(x)
    assert seen == [net.first]
    net = MLPConditioner(3, (8,), (4,))
    before = net(x)[0]
    torch.nn.utils.parametrizations.spectral_norm(net.first)
    assert (net(x)[0] != before).any()


def test_second_derivatives_and_transforms():
    net = MLPConditioner(3, (8,), (1,)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    single, v = copy.deepcopy(net).float(), x.float()
    exact = torch.func.jacrev(lambda v: net(v)[0].sum(0))(x)
    torch.testing.assert_close(torch.func.jacrev(lambda v: single(v)[0].sum(0))(v).double(), exact, rtol=1e-5, atol=1e-6)

    def penalty(module, x):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), module.first.weight)[0].double()

    torch.testing.assert_close(penalty(single, v), penalty(net, x), rtol=1e-4, atol=1e-6)


def test_compiles_whole():
    net = MLPConditioner(3, (8,), (4,))
    x = torch.randn(6, 3)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(x)[0], net(x)[0])


def test_activations_are_kept_where_that_is_asked_for():
    net = MLPConditioner(3, (64, 64), (4,))
    x = torch.randn(10_000, 3)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(x)
        return max(sizes)

    with keep_activations():
        assert kept() >= 64 * len(x)
    assert kept() < 64 * len(x) or fastgen.ops.info()["cpp"] != "loaded"
