"""The copy made for evaluation against the network it was made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastgen import ops
from fastgen.nn import inference
from fastgen.nn.attention import ImageAttention, Projection
from fastgen.nn.autoencoder import ImageDecoder, ImageEncoder
from fastgen.nn.inference import (
    PackedConv2d,
    PackedImageAttention,
    PackedLinear,
    PackedResBlock,
    PackedUpsample,
    SharedProjection,
    fast_dtype,
    optimize,
    relative_error,
)
from fastgen.nn.resnet import ResBlock, Upsample
from fastgen.ops.group_norm_silu import parts_of
from tests.nn.networks import FULL, KINDS, build, inputs, randomise

every = pytest.mark.parametrize("kind", KINDS)


@every
@torch.no_grad()
def test_float32_copy_gives_the_same(kind):
    net = build(kind, **FULL)
    before = copy.deepcopy(net.state_dict())
    fast = optimize(net, dtype=torch.float32)
    for size in [(32, 16), (8, 6), (7, 5)]:  # laid out for the first, right for the others
        x, t, named = inputs(kind, size=size, labels=True, context=True)
        assert relative_error(fast, net, x, t, **named) < 1e-5
        assert relative_error(fast, net, x, t[:1]) < 1e-5
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())
    assert net.training
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())


@every
@torch.no_grad()
def test_bfloat16_copy_is_near(kind, monkeypatch):
    monkeypatch.setattr(inference, "fast_dtype", lambda device: torch.bfloat16)  # as on a machine that multiplies it
    net = build(kind, **FULL)
    fast = optimize(net, dtype=torch.bfloat16)
    x, t, named = inputs(kind, size=(16, 16), labels=True, context=True)
    assert fast(x, t, **named).dtype == torch.float32
    assert 1e-5 < relative_error(fast, net, x, t, **named) < 0.02  # 8 channels average little


@pytest.mark.skipif(not ops.winograd_pairs(), reason="no fast products of integers")
@every
@torch.no_grad()
def test_bfloat16_is_not_emulated(kind, monkeypatch):
    """Without its arithmetic: float32, and products of integers."""
    monkeypatch.setattr(inference, "fast_dtype", lambda device: torch.float32)
    net = build(kind, **({"widths": (32, 64)} if kind == "unet" else {}))
    x, t, named = inputs(kind, size=(16, 16))
    narrow, full = (optimize(net, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    assert relative_error(full, net, x, t, **named) < 1e-5
    assert relative_error(narrow, net, x, t, **named) < 5e-3
    used = [m.filters for m in narrow.modules() if isinstance(m, PackedConv2d | PackedLinear) and m.filters]
    some = [own for own in used if own.weight.shape[-1] == 3 or min(own.weight.shape[:2]) >= 64]  # else they do not pay
    kept = [weight.packed.dtype for own in some for weight in own.transformed.values()]
    if kind == "unet":
        assert len(kept) > 4
        assert relative_error(narrow, net, x, t, **named) > 1e-5
    assert set(kept) <= {torch.int16}


@torch.no_grad()
def test_bfloat16_is_float32_where_integers_are_not_faster(monkeypatch):
    monkeypatch.setattr(inference, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(ops, "winograd_pairs", lambda: False)
    net = build("unet", widths=(32, 64))
    x, t, named = inputs("unet", size=(16, 16))
    assert relative_error(optimize(net, dtype=torch.bfloat16), net, x, t, **named) < 1e-5


@pytest.mark.skipif(not ops.winograd_pairs(), reason="no fast products of integers")
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_maps_of_many_rows(bias):
    plain = nn.Linear(66, 131, bias=bias)
    packed = PackedLinear(plain, torch.int16)
    for shape in [(2, 40, 66), (70, 66), (3, 66), (66,)]:
        x = torch.randn(shape)
        y, expected = packed(x), plain(x)
        assert y.shape == expected.shape
        assert (y - expected).norm() < 1e-3 * expected.norm()
        rounded = (y - expected).norm() > 1e-5 * expected.norm()
        assert rounded == (x.numel() >= 64 * 66)  # few rows are multiplied as floats
    with torch.no_grad():
        plain.weight[0, 0] = float("inf")
    assert PackedLinear(plain, torch.int16).filters.products is torch.float32


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@torch.no_grad()
def test_projections_are_one_product(modulation):
    net = build("unet", modulation=modulation)
    fast = optimize(net, dtype=torch.float32)
    own = [m for m in fast.modules() if isinstance(m, SharedProjection)]
    assert len(own) == sum(isinstance(m, ResBlock) for m in net.modules()) > 4
    assert len({id(m.shared) for m in own}) == 1
    x, t, named = inputs("unet", size=(8, 8))
    for time in (t, t[:1], 2 * t, t):  # none is served what was computed for another
        assert relative_error(fast, net, x, time, **named) < 1e-5
    with torch.inference_mode():
        assert relative_error(fast, net, x, t, **named) < 1e-5
    plain = next(m for m in net.modules() if isinstance(m, ResBlock))
    more = plain.conv1.bias if modulation == "add" else 0  # to which it is added
    vector = torch.randn(2, plain.project.in_features)
    for _ in range(2):
        torch.testing.assert_close(own[0](vector), plain.project(vector) + more)
        vector.add_(1)


def test_convolutions_and_attention_are_packed():
    net = build("unet")
    fast = optimize(net, dtype=torch.float32)
    projections = sum(isinstance(m, Projection) for m in net.modules())
    assert projections >= 2
    assert sum(isinstance(m, PackedLinear) for m in fast.modules()) == projections
    assert sum(isinstance(m, PackedConv2d) for m in fast.modules()) > 10
    assert sum(isinstance(m, PackedUpsample) for m in fast.modules()) == 1


@pytest.mark.parametrize("size", [(16, 16), (13, 10), (1, 200), (4, 4)])
@torch.no_grad()
def test_doubling_is_one_transposed_convolution(size):
    torch.manual_seed(0)
    plain = randomise(Upsample(6))
    packed = PackedUpsample(plain)
    x = torch.randn(2, 6, *size)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-5)
    odd = (2 * size[0] - 1, 2 * size[1])
    torch.testing.assert_close(packed(x, size=odd), plain(x, size=odd), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("size", [(16, 16), (5, 3)])  # by minimal filtering and without
@torch.no_grad()
def test_residual_blocks_of_two_images(modulation, resample, size):
    torch.manual_seed(0)
    for channels in (40, 24):  # without and with a convolution of what is carried
        plain = randomise(ResBlock(40, channels, embedding=8, modulation=modulation, resample=resample))
        packed = optimize(nn.Sequential(plain), dtype=torch.float32)[0]
        assert isinstance(packed, PackedResBlock)
        x, skip, told = torch.randn(2, 30, *size), torch.randn(2, 10, *size), torch.randn(2, 8)
        both = torch.cat([x, skip], 1)
        for wanted in (None, (2 * size[0] - 1, 2 * size[1])) if resample == "up" else (None,):
            expected = plain(both, told, wanted)
            torch.testing.assert_close(plain(x, told, wanted, skip), expected)
            torch.testing.assert_close(packed(x, told, wanted, skip), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(packed(both, told, wanted), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ops.winograd_pairs(), reason="no fast products of integers")
@pytest.mark.parametrize("options", [{}, {"heads": 8}, {"context": 5}, {"groups": 0}, {"divisor": 2.0}], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (5, 3), (2, 60), (1, 1)])  # rows that are summed up, and longer ones; few pixels
@torch.no_grad()
def test_attention_over_images(options, size):
    block = randomise(ImageAttention(64, **options)).eval()
    fast = optimize(block, dtype=torch.bfloat16)
    assert isinstance(optimize(nn.Sequential(block), dtype=torch.bfloat16)[0], PackedImageAttention)
    packed = PackedImageAttention(optimize(block, dtype=torch.bfloat16))
    x = torch.randn(3, 64, *size).contiguous(memory_format=torch.channels_last)
    context = torch.randn(3, 4, 5) if "context" in options else None
    expected = block(x, context)
    for given in (x, x.contiguous()):
        for network in (fast, packed):
            y = network(given, context)
            assert (y - expected).norm() < 2e-3 * expected.norm()
    served = 3 * size[0] * size[1] >= 64
    assert (parts_of(packed(x, context)) is not None) == (served and size[1] <= 56 and "divisor" not in options)


@torch.no_grad()
def test_autoencoders_too():
    torch.manual_seed(0)
    for net, shape in (
        (ImageEncoder(3, 4, widths=(8, 12), groups=4), (3, 32, 24)),
        (ImageDecoder(4, 3, widths=(8, 12)), (4, 16, 16)),
    ):
        net, x = randomise(net), torch.randn(2, *shape)
        torch.testing.assert_close(optimize(net, dtype=torch.float32)(x), net(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_relative_error_is_of_the_whole_batch():
    x = torch.randn(4, 3)
    assert relative_error(lambda x, t: 1.5 * x, lambda x, t: x, x, x) == pytest.approx(0.5)


def test_default_dtype_is_the_machines_own():
    net = build("unet")
    assert next(p for n, p in optimize(net).named_parameters() if "norm" in n).dtype == fast_dtype()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_copy_gives_the_same():
    net = build("unet", **FULL)
    x, t, named = inputs("unet", labels=True, context=True)
    assert relative_error(optimize(net, dtype=torch.float32, compile=True), net, x, t, **named) < 1e-4
