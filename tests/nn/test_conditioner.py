"""Conditioners: shapes, contexts as concatenation would have them, saturation, the identity at the start."""

import pytest
import torch

from fastgen.nn.conditioner import LIMIT, ConvConditioner, MLPConditioner, ResNetConditioner


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
