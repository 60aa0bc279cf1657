"""Invertible backpropagation: gradients of plain autograd, memory that does not grow, layers too close to singular."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fastgen
from fastgen import random
from fastgen.flows.coupling import AffineCoupling
from fastgen.flows.stack import Stack
from fastgen.flows.transform import Compose
from fastgen.nn.conditioner import MLPConditioner
from tests.flows.zoo import FLOWS, draw, make

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-4}


def stacks(model):
    return [m for m in model.modules() if isinstance(m, Stack)]


def gradients(model, x, context):
    model.zero_grad()
    context = None if context is None else context.clone().requires_grad_()
    loss = model.loss((x, context) if context is not None else x, key=random.key(0)).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), grads if context is None else {**grads, "context": context.grad}


def assert_close(got, expected, precision):
    assert got.keys() == expected.keys()
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm()
        assert error < precision, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("case", [case for case in FLOWS if FLOWS[case][0] not in ("cnf", "residual_flow")])  # these refuse it
def test_gradients_are_those_of_plain_autograd(case, dtype):
    plain, rebuilt = make(case, dtype), make(case, dtype, memory="invertible")
    x, context = draw(plain, 20)
    loss, expected = gradients(plain, x, context)
    loss_rebuilt, got = gradients(rebuilt, x, context)
    torch.testing.assert_close(loss_rebuilt, loss)
    assert_close(got, expected, PRECISION[dtype])
    for stack in stacks(rebuilt):
        assert stack.memory == "invertible"
        assert len(stack.reconstruction_errors) == len(stack)
        assert max(stack.reconstruction_errors.values()) < 1000 * torch.finfo(dtype).eps
        assert not stack.kept


def test_gradients_reach_the_input():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    plain, rebuilt = make("nsf-context", torch.float64), make("nsf-context", torch.float64, memory="invertible")
    context = torch.randn(6, 3, dtype=torch.float64)
    # the log-determinant alone, the output alone, both
    for weights in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        grads = []
        for model in (plain, rebuilt):
            z, ladj = model.transform.call_and_ladj(x, context)
            outputs = [(weights[0] * z.square().sum()) if weights[0] else None, ladj.sum() if weights[1] else None]
            grads.append(torch.autograd.grad(sum(o for o in outputs if o is not None), x)[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def saved_bytes(model, x):
    """Bytes that the forward pass keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            held[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model.loss(x)
    return sum(size for _, size in held.values())


def test_what_is_kept_does_not_grow_with_depth():
    x = torch.randn(64, 5)
    kept = {
        memory: [saved_bytes(make("nsf", layers=layers, memory=memory, hidden=(32, 32)), x) for layers in (4, 32)]
        for memory in ("standard", "invertible")
    }
    assert kept["standard"][1] > 7 * kept["standard"][0]
    # one number per sample and layer
    assert kept["invertible"][1] - kept["invertible"][0] <= 28 * len(x) * 4
    assert kept["invertible"][1] < kept["standard"][0] / 8


@pytest.mark.parametrize("stored", [0.0, 0.4, 1.0])
def test_a_share_of_the_layers_may_be_stored(stored):
    # in double precision: in float32, rounding of what is rebuilt moves gradients of ten layers by 1e-5 to 1e-3 of their norm
    x = torch.randn(64, 5, dtype=torch.float64)
    plain = make("nsf", torch.float64, layers=10, hidden=(32, 32))
    model = make("nsf", torch.float64, layers=10, hidden=(32, 32), memory="invertible", stored=stored)
    (loss, expected), (loss_rebuilt, got) = gradients(plain, x, None), gradients(model, x, None)
    torch.testing.assert_close(loss_rebuilt, loss)
    assert_close(got, expected, PRECISION[torch.float64])
    assert set(model.transform.reconstruction_errors) == set(range(10 - round(10 * stored)))
    share = saved_bytes(model.float(), x.float()) / saved_bytes(plain.float(), x.float())
    assert share == pytest.approx(stored, abs=0.08)


def test_a_share_is_between_none_and_all():
    with pytest.raises(ValueError, match=r"stored must be in 0 \.\. 1, got 1\.5"):
        make("nsf", stored=1.5)
    with pytest.raises(ValueError, match=r"stored must be in 0 \.\. 1, got -1"):
        Stack([], stored=-1)


def test_a_deep_flow_of_the_default_start_keeps_no_inputs():
    """Layers start near the identity, so that 64 of them can be rebuilt."""
    torch.manual_seed(0)
    model = fastgen.create("realnvp", features=8, layers=64, hidden=(16,), memory="invertible")
    for name, parameter in model.named_parameters():
        if "heads" in name:
            parameter.data.normal_(std=0.02)
    model.loss(torch.randn(32, 8)).loss.backward()
    assert not model.transform.kept
    assert len(model.transform.reconstruction_errors) == 64


def chain(kind, singular, **options):
    """Six affine couplings, of which some scale by about exp(-12)."""
    torch.manual_seed(2)
    layers = []
    for i in range(6):
        conditioner = MLPConditioner(3, (8,), (3, 3))
        if i in singular:
            nn.init.constant_(conditioner.heads[1].bias, -12.0)
        layers.append(AffineCoupling(conditioner, (3, 3), flip=i % 2 == 1, bound=None))
    return kind(layers, **options)


def test_a_layer_too_close_to_singular_falls_back_by_itself():
    x = torch.randn(20, 6)

    def run(stack):
        stack.zero_grad()
        y, ladj = stack.call_and_ladj(x)
        (y.square().sum() + (ladj * torch.arange(20)).sum()).backward()
        return {name: p.grad for name, p in stack.named_parameters()}

    expected = run(chain(Compose, {1, 4}))
    stack = chain(Stack, {1, 4}, memory="invertible")
    assert_close(run(stack), expected, 1e-4)
    assert stack.kept == {1, 4}
    assert stack.reconstruction_errors[4] > 1e-3
    assert set(stack.reconstruction_errors) == set(range(6))
    # from now on the two inputs are kept, and not rebuilt
    assert_close(run(stack), expected, 1e-4)
    assert set(stack.reconstruction_errors) == {0, 2, 3, 5}
    # without the fallback the gradients are wrong: the test can fail
    trusting = chain(Stack, {1, 4}, memory="invertible", tolerance=float("inf"))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(run(trusting), expected, 1e-4)


def test_autocast_is_that_of_the_forward_pass():
    plain, rebuilt = make("realnvp"), make("realnvp", memory="invertible")
    x = torch.randn(20, 5)
    grads = []
    for model in (plain, rebuilt):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x).loss
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(grads[1], grads[0], 1e-2)
    assert not rebuilt.transform.kept


def test_without_gradients_nothing_is_rebuilt():
    model = make("nsf", memory="invertible")
    x = torch.randn(8, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x), make("nsf").log_prob(x))
    assert model.transform.reconstruction_errors == {}


def test_two_passes_before_one_backward():
    plain, rebuilt = make("nsf", torch.float64), make("nsf", torch.float64, memory="invertible")
    a, b = torch.randn(2, 8, 5, dtype=torch.float64)
    grads = []
    for model in (plain, rebuilt):
        (model.loss(a).loss + 2 * model.loss(b).loss).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(grads[1], grads[0], 1e-10)
