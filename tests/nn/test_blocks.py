"""The parts of networks against their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastgen.nn.attention import Attention, ImageAttention, heads_of
from fastgen.nn.conv import Conv2d
from fastgen.nn.norm import GroupNorm, GroupNormSiLU
from fastgen.nn.resnet import Downsample, ResBlock, Upsample, halve
from fastgen.nn.time import Conditioning, Fourier, Learned, Sinusoidal
from tests.nn.networks import randomise


@pytest.mark.parametrize(("features", "shift"), [(8, 0), (8, 1), (7, 0), (2, 0)])
def test_sinusoidal_is_its_formula(features, shift):
    times = [0.0, 1.0, 3.5, 999.0]
    half = features // 2
    rows = []
    for t in times:
        phases = [t * 10_000 ** (-k / (half - shift)) for k in range(half)]
        rows.append([math.sin(p) for p in phases] + [math.cos(p) for p in phases] + [0.0] * (features % 2))
    expected = torch.tensor(rows)
    time = torch.tensor(times)
    torch.testing.assert_close(Sinusoidal(features, freq_shift=shift)(time), expected, rtol=0, atol=2e-4)
    flipped = Sinusoidal(features, freq_shift=shift, flip_sin_to_cos=True)(time)
    torch.testing.assert_close(flipped[:, :half], expected[:, half : 2 * half], rtol=0, atol=2e-4)
    torch.testing.assert_close(Sinusoidal(features, freq_shift=shift, scale=1000.0)(time / 1000), expected, rtol=0, atol=4e-4)


def test_fourier_keeps_its_frequencies():
    torch.manual_seed(0)
    features = Fourier(5, scale=2.0)
    time = torch.tensor([0.5, 3.0])
    phase = 2 * math.pi * time.log()[:, None] * features.frequency
    torch.testing.assert_close(features(time), torch.cat([phase.sin(), phase.cos()], 1))
    low = copy.deepcopy(features).bfloat16()
    assert torch.equal(low(time), features(time))
    assert list(features.state_dict()) == ["frequency"]
    assert not list(features.parameters())


def test_conditioning_adds_time_and_label():
    torch.manual_seed(0)
    told = Conditioning(Learned(10, 6), 4, num_classes=3)
    alone = Conditioning(told.features, 4)
    alone.time = told.time
    time, labels = torch.tensor([2.0, 7.0]), torch.tensor([1, 3])
    torch.testing.assert_close(told(time, labels), alone(time) + told.label.table.weight[labels])
    assert told(time[:1]).shape == told(time[:1].expand(5)).shape == (1, 4)
    assert told(time[:1].expand(2), labels).shape == (2, 4)
    with pytest.raises(ValueError, match="num_classes"):
        alone(time, labels)


@pytest.mark.parametrize("channels", [4, 6, 7, 64])
def test_group_norm_takes_any_channels(channels):
    norm, x = randomise(GroupNorm(channels, 4)), torch.randn(2, channels, 3, 5)
    groups = {4: 4, 6: 2, 7: 1, 64: 4}[channels]
    torch.testing.assert_close(norm(x), F.group_norm(x, groups, norm.weight, norm.bias, 1e-6))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_with_scale_and_shift(rows, channels_last):
    torch.manual_seed(0)
    norm, x = randomise(GroupNormSiLU(8, 4, 1e-5)), torch.randn(3, 8, 5, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(rows, 8), torch.randn(rows, 8)
    z = F.group_norm(x, 4, norm.weight, norm.bias, 1e-5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, scale, shift), z * z.sigmoid())
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4, norm.weight, norm.bias, 1e-5)))


@pytest.mark.parametrize("rows", [1, 3])
def test_convolution_adds_shift_and_residual(rows):
    torch.manual_seed(0)
    conv, x, shift = Conv2d(4, 6, 3, padding=1), torch.randn(3, 4, 5, 7), torch.randn(rows, 6)
    residual = torch.randn(3, 6, 5, 7)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1) + shift[:, :, None, None] + residual
    torch.testing.assert_close(conv(x, shift, residual), expected)


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_residual_block_starts_as_its_carried_input(resample, modulation):
    block = ResBlock(8, 8, embedding=5, modulation=modulation, groups=4, resample=resample)
    x = torch.randn(2, 8, 6, 4)
    expected = {None: x, "down": halve(x), "up": F.interpolate(x, scale_factor=2.0)}[resample]
    torch.testing.assert_close(block(x, torch.randn(2, 5)), expected)


def test_halving_and_doubling_of_odd_sizes():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    torch.testing.assert_close(halve(x)[0, 0], torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]))
    assert Downsample(1)(x).shape == (1, 1, 2, 3)
    assert Downsample(1, padding=0)(x).shape == (1, 1, 1, 2)
    assert Upsample(1)(x, size=(5, 9)).shape == (1, 1, 5, 9)


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_is_its_formula(shared):
    torch.manual_seed(0)
    attention = randomise(Attention(8, heads=2, context=5))
    x, context = torch.randn(3, 4, 8), torch.randn(1 if shared else 3, 6, 5)
    q, (k, v) = attention.to_query(x), attention.to_rest(context).chunk(2, 2)
    parts = [slice(0, 4), slice(4, 8)]
    mixed = torch.cat([(q[..., p] @ k[..., p].mT / 2).softmax(2) @ v[..., p] for p in parts], 2)
    torch.testing.assert_close(attention(x, context), attention.out(mixed), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a context"):
        attention(x)


def test_image_attention_does_not_know_places():
    torch.manual_seed(0)
    attention = randomise(ImageAttention(8, heads=2, groups=4))
    x = torch.randn(2, 8, 3, 5)
    order = torch.randperm(15)
    permuted = attention(x.flatten(2)[:, :, order].view_as(x)).flatten(2)
    torch.testing.assert_close(permuted, attention(x).flatten(2)[:, :, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "head", "heads"), [(256, 64, 4), (100, 30, 2), (8, 64, 1), (8, None, 1), (7, 2, 1)])
def test_heads_divide_the_channels(channels, head, heads):
    assert heads_of(channels, head) == heads
