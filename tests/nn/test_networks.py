"""What every denoising network keeps: shapes, conditions, gradients, compilation."""

from __future__ import annotations

import copy

import pytest
import torch

from fastgen.nn.dit import DiT
from fastgen.nn.mlp import TimeMLP
from fastgen.nn.unet import UNet
from fastgen.ops import _native
from tests.nn.networks import FULL, KINDS, SMALL_DIT, SMALL_UNET, build, inputs

every = pytest.mark.parametrize("kind", KINDS)
images = pytest.mark.parametrize("kind", [k for k in KINDS if k != "mlp"])


@every
def test_starts_as_zero(kind):
    cls, small = KINDS[kind]
    x, t, _ = inputs(kind)
    assert not cls(2, **small)(x, t).any()


@images
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (9, 4), (3, 2), (2, 31)])
def test_any_resolution_and_output_channels(kind, size):
    net = build(kind, out_channels=5)
    x, t, _ = inputs(kind, size=size)
    assert net(x, t).shape == (3, 5, *size)


@pytest.mark.parametrize(("channels", "widths"), [(1, (8, 8)), (7, (5, 9, 13))])
def test_any_channel_count(channels, widths):
    net = UNet(channels, widths=widths, attention_levels=(0, 1), layers=1, embedding=16, head_channels=3)
    assert net(torch.randn(2, channels, 8, 8), torch.ones(2)).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("event", [3, (3,), (2, 3, 4)])
def test_mlp_takes_any_event(event):
    shape = (event,) if isinstance(event, int) else event
    net = TimeMLP(event, width=8)
    assert net(torch.randn(5, *shape), torch.ones(5)).shape == (5, *shape)
    assert TimeMLP(event, 7, width=8)(torch.randn(5, *shape), torch.ones(5)).shape == (5, 7)


@every
@torch.no_grad()
def test_samples_are_independent(kind):
    net = build(kind, **FULL)
    x, t, named = inputs(kind, labels=True, context=True)
    alone = [net(x[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in named.items()}) for i in range(3)]
    torch.testing.assert_close(net(x, t, **named), torch.cat(alone), rtol=1e-4, atol=1e-5)


@every
@torch.no_grad()
def test_one_time_serves_the_batch(kind):
    net = build(kind)
    x, _, _ = inputs(kind)
    torch.testing.assert_close(net(x, torch.tensor([7.0])), net(x, torch.full((3,), 7.0)), rtol=1e-4, atol=1e-5)
    assert torch.equal(net(x, torch.tensor(7.0)), net(x, torch.tensor([7.0])))


@every
@torch.no_grad()
def test_time_label_and_context_matter(kind):
    net = build(kind, **FULL)
    x, t, named = inputs(kind, labels=True, context=True)
    base = net(x, t, **named)
    changes = [
        net(x, t + 5, **named),
        net(x, t, labels=(named["labels"] + 1) % 4, context=named["context"]),
        net(x, t, labels=named["labels"], context=named["context"] + 1),
    ]
    for changed in changes:
        assert ((changed - base).flatten(1).abs().amax(1) > 1e-4).all()


@every
@torch.no_grad()
def test_null_class(kind):
    net = build(kind, num_classes=3)
    x, t, _ = inputs(kind)
    null = net(x, t, labels=torch.full((3,), 3))
    torch.testing.assert_close(net(x, t), null, rtol=1e-5, atol=1e-6)
    assert (net(x, t, labels=torch.zeros(3, dtype=torch.long)) - null).abs().max() > 1e-4


@every
def test_what_was_not_asked_for_is_refused(kind):
    net = build(kind)
    x, t, named = inputs(kind, labels=True, context=True)
    with pytest.raises(ValueError, match="num_classes"):
        net(x, t, labels=named["labels"])
    with pytest.raises(ValueError, match="context_channels"):
        net(x, t, context=named["context"])
    with pytest.raises(ValueError, match="x must be"):
        net(x[:, :1], t)


@every
@pytest.mark.parametrize("given", [True, False])
def test_gradients_reach_every_parameter(kind, given):
    net = build(kind, **FULL)
    x, t, named = inputs(kind, n=4, labels=given, context=given)
    x.requires_grad_()
    net(x, t, **named).square().sum().backward()
    assert x.grad.abs().min() > 0
    used = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    names = {n for n, _ in net.named_parameters()}
    # the null context stands in for a context, and the MLP's own has no null; it is one token, which has all the weight
    # whatever a query says
    unasked = {n for n in names if "cross" in n and ("to_query" in n or "norm" in n)}
    allowed = {"null_context"} if given else {"context.weight", "context.bias"} if kind == "mlp" else unasked
    assert names - used <= allowed


@images
def test_checkpointing_changes_no_gradient(kind):
    plain, thrifty = build(kind, **FULL), build(kind, **FULL, checkpointing=True)
    x, t, named = inputs(kind, labels=True, context=True)
    results = []
    for net in (plain, thrifty):
        own = x.clone().requires_grad_()
        y = net(own, t, **named)
        y.square().sum().backward()
        results.append([y, own.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@images
def test_checkpointing_keeps_fewer_activations(kind):
    kept = []
    for checkpointing in (False, True):
        net, total = build(kind, checkpointing=checkpointing), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        x, t, _ = inputs(kind, n=8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x, t).sum()
        kept.append(total)
    assert kept[1] < 0.7 * kept[0]


@every
def test_compiles_without_graph_breaks(kind):
    torch._dynamo.reset()
    net = build(kind, **FULL)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, t, named = inputs(kind, labels=True, context=True)
    torch.testing.assert_close(compiled(x, t, **named), net(x, t, **named), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(x, t[:1]), net(x, t[:1]), rtol=1e-4, atol=1e-5)


def test_compiles_before_any_kernel_was_loaded(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(_native, "_tables", None)
    monkeypatch.setattr(_native, "_table", {})
    net, (x, t, _) = build("unet"), inputs("unet")
    compiled = torch.compile(net, fullgraph=True, backend="eager")(x, t)
    torch.testing.assert_close(compiled, net(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_checkpointing_compiles_without_graph_breaks(kind):
    torch._dynamo.reset()
    net = build(kind, checkpointing=True)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, t, _ = inputs(kind)
    gradients = []
    for f in (net, compiled):
        own = x.clone().requires_grad_()
        f(own, t).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
def test_inductor_gives_the_same_gradients(kind):
    torch._dynamo.reset()
    net = build(kind, num_classes=3)
    x, t, named = inputs(kind, labels=True)
    results = []
    for f in (net, torch.compile(net, fullgraph=True)):
        own = x.clone().requires_grad_()
        y = f(own, t, **named)
        y.square().sum().backward()
        results.append((y.detach(), own.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@every
@torch.no_grad()
def test_low_precision_weights_take_and_give_float32(kind):
    net = build(kind, **FULL)
    x, t, named = inputs(kind, labels=True, context=True)
    expected = net(x, t, **named)
    low = copy.deepcopy(net).bfloat16()(x, t, **named)
    assert low.dtype == torch.float32
    assert (low - expected).norm() / expected.norm() < 0.05
    double = copy.deepcopy(net).double()(x.double(), t, **named)
    torch.testing.assert_close(double.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(3, widths=()), "widths"),
        (lambda: UNet(3, **SMALL_UNET | {"attention_levels": (2,)}), "attention levels"),
        (lambda: UNet(3, **SMALL_UNET, middle="centre"), "middle"),
        (lambda: UNet(3, **SMALL_UNET, modulation="film"), "modulation"),
        (lambda: UNet(3, **SMALL_UNET, time="learned"), "time_steps"),
        (lambda: UNet(3, **SMALL_UNET, downsample=("conv", "conv")), "downsample"),
        (lambda: UNet(3, **SMALL_UNET, downsample_padding=2), "padding"),
        (lambda: UNet(3, **SMALL_UNET, num_classes=0), "num_classes"),
        (lambda: DiT(3, **SMALL_DIT | {"width": 18}), "divisible by 4"),
        (lambda: DiT(3, **SMALL_DIT, patch=0), "patch"),
    ],
)
def test_impossible_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
