"""Autoregressive layers: order, the three inverses, gradients through them."""

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.flows.autoregressive import Autoregressive
from fastgen.flows.elementwise import Affine, Spline
from fastgen.nn.masked import MADE

METHODS = ("incremental", "jacobi", "sequential")


def layer(elementwise, features=6, context=0, reverse=False, inversion="incremental", dtype=torch.float64):
    torch.manual_seed(0)
    network = MADE(features, (10, 12), elementwise.sizes, context)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return Autoregressive(network, elementwise, reverse=reverse, inversion=inversion).to(dtype)


@pytest.mark.parametrize("elementwise", [Affine(), Spline(5)], ids=["affine", "spline"])
@pytest.mark.parametrize("reverse", [False, True])
def test_jacobian_is_triangular(elementwise, reverse):
    transform = layer(elementwise, reverse=reverse)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0], torch.randn(6).double())
    other = jacobian.tril(-1) if reverse else jacobian.triu(1)
    assert torch.equal(other, torch.zeros_like(other))
    torch.testing.assert_close(transform.diagonal(torch.zeros(1, 6).double(), None)[0].shape, jacobian.diagonal().shape)
    assert (jacobian.diagonal() > 0).all()


@pytest.mark.parametrize("elementwise", [Affine(), Affine(None), Spline(5), Spline(4, convention="nflows")], ids=str)
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverses_agree(elementwise, context, dtype):
    y = 2 * torch.randn(30, 6, dtype=dtype)
    c = torch.randn(30, context, dtype=dtype) if context else None
    found = {}
    for inversion in METHODS:
        transform = layer(elementwise, context=context, reverse=context > 0, inversion=inversion, dtype=dtype)
        with torch.no_grad():
            found[inversion] = transform.inv_and_ladj(y, c)
    with torch.no_grad():
        back, ladj = transform.call_and_ladj(found["incremental"][0], c)
    scale = 1e-3 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(back, y, rtol=scale, atol=scale)
    torch.testing.assert_close(found["incremental"][1], -ladj, rtol=scale, atol=scale)
    assert torch.equal(found["jacobi"][0], found["sequential"][0])
    assert torch.equal(found["jacobi"][1], found["sequential"][1])
    for a, b in zip(found["incremental"], found["sequential"], strict=True):
        torch.testing.assert_close(a, b, rtol=scale, atol=scale)


def test_jacobi_stops_when_nothing_changes(monkeypatch):
    transform = layer(Affine(), inversion="jacobi")
    for parameter in transform.parameters():
        parameter.data.zero_()
    passes = []
    monkeypatch.setattr(transform.network, "forward", lambda *args: passes.append(0) or MADE.forward(transform.network, *args))
    with torch.no_grad():
        transform.inv_and_ladj(torch.randn(3, 6).double())
    assert len(passes) == 1  # the identity: x = y is the answer
    transform.inversion = "sequential"
    with torch.no_grad():
        transform.inv_and_ladj(torch.randn(3, 6).double())
    assert len(passes) == 7


@pytest.mark.parametrize("inversion", METHODS)
@pytest.mark.parametrize("elementwise", [Affine(), Spline(4)], ids=["affine", "spline"])
def test_gradients_through_the_inverse(inversion, elementwise):
    """Against autograd through the loop of full passes, and against numerical differences."""
    transform = layer(elementwise, features=4, context=2, reverse=True, inversion=inversion)
    y = torch.randn(5, 4).double().requires_grad_()
    c = torch.randn(5, 2).double().requires_grad_()
    wanted = [y, c, *transform.parameters()]
    weights, more = torch.randn(5, 4).double(), torch.randn(5).double()

    x, ladj = transform.inv_and_ladj(y, c)
    got = torch.autograd.grad((x * weights).sum() + (ladj * more).sum(), wanted)

    x = torch.zeros_like(y)
    for _ in range(4):
        x, ladj = elementwise(y.flip(1), transform.network(x, c), inverse=True)
    expected = torch.autograd.grad((x.flip(1) * weights).sum() + (ladj * more).sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(transform.inv_and_ladj, (y, c), atol=1e-5)


def test_no_gradients_where_none_are_wanted():
    transform = layer(Affine()).requires_grad_(False)
    x, _ = transform.inv_and_ladj(torch.randn(3, 6).double())
    assert not x.requires_grad


def test_huge_and_infinite_inputs_stay_theirs():
    transform = layer(Spline(4), dtype=torch.float32)
    y = torch.randn(4, 6)
    with torch.no_grad():
        expected = transform.inv_and_ladj(y)[0]
        y[0], y[1], y[2, 3] = 1e30, -torch.inf, torch.nan
        found, ladj = transform.inv_and_ladj(y)
    torch.testing.assert_close(found[3], expected[3])
    assert found[0].isfinite().all()
    assert ladj[:2].isfinite().all()
    assert found[2, 3:].isnan().all()


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf"])
def test_unknown_inversion(name):
    with pytest.raises(ValueError, match="inversion must be one of incremental, jacobi, sequential, got 'newton'"):
        fastgen.create(name, features=3, inversion="newton")


@pytest.mark.parametrize("name", ["maf", "nsf"])
def test_one_feature(name):
    options = {"kind": "autoregressive"} if name == "nsf" else {}
    model = fastgen.create(name, features=1, **options)
    x = model.sample(8, key=random.key(0))
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=1e-4, atol=1e-4)


def test_maf_and_iaf_are_each_others_inverse():
    maf = fastgen.create("maf", features=4, layers=1).double()
    iaf = fastgen.create("iaf", features=4, layers=1).double()
    iaf.transform[0].transform.load_state_dict(maf.transform[0].state_dict())
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(iaf.decode(x), maf.encode(x))
    torch.testing.assert_close(iaf.encode(x), maf.decode(x))
