"""winograd_residual: the chain of launches and its steps one by one give the same bits, and the block is right."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import NormedConvolution, _native, group_norm_coefficients, winograd_conv2d, winograd_residual, winograd_weight
from fastgen.ops.group_norm_silu import parts_of
from fastgen.ops.winograd_conv2d import in_parts

own = sys.modules["fastgen.ops.winograd_residual"]
pytestmark = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape, seed=0):
    return draw(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def part(outputs, inputs, groups, dtype, seed):
    plain = draw(outputs, inputs, 3, 3, seed=seed) / (9 * inputs) ** 0.5
    norm = draw(inputs, seed=seed + 1), draw(inputs, seed=seed + 2)
    return plain, NormedConvolution(winograd_weight(plain, dtype=dtype), draw(outputs, seed=seed + 3), groups, *norm, 1e-5)


def block(x, skip, first, second, carry, bias, scale, shift, double):
    """In float64, by PyTorch's functions."""

    def wide(v):
        return None if v is None else v.double()

    def normed(x, part):
        return F.group_norm(x, part.groups, part.norm_weight.double(), part.norm_bias.double(), part.eps)

    x = torch.cat([v.double() for v in (x, skip) if v is not None], 1)
    h = F.silu(normed(x, first[1]))
    if double:
        h, x = (F.interpolate(v, scale_factor=2.0, mode="nearest") for v in (h, x))
    h = F.conv2d(h, wide(first[0]), padding=1) + wide(first[1].bias if bias is None else bias).reshape(-1, 40, 1, 1)
    h = normed(h, second[1])
    if scale is not None:
        h = h * (1 + wide(scale)[:, :, None, None]) + wide(shift)[:, :, None, None]
    h = F.conv2d(F.silu(h), wide(second[0]), wide(second[1].bias), padding=1)
    return h + (x if carry is None else F.conv2d(x, wide(carry[0]), wide(carry[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("told", ["nothing", "bias", "rows of a larger one", "modulation"])
def test_chain_and_steps_are_the_block(dtype, joined, double, told, monkeypatch):
    x, skip = image(3, 24 if joined else 40, 9, 8), image(3, 16, 9, 8, seed=1) if joined else None
    first, second = part(40, 40, 4, dtype, 10), part(40, 40, 8, dtype, 20)
    carry = (draw(40, 40, 1, 1, seed=4) / 6, draw(40, seed=5)) if joined else None
    packed = (winograd_weight(carry[0], dtype=dtype), carry[1]) if joined else None
    bias = {"bias": draw(1, 40), "rows of a larger one": draw(3, 100)[:, 20:60]}.get(told)
    scale, shift = (draw(3, 40, seed=6), draw(3, 40, seed=7)) if told == "modulation" else (None, None)
    named = {"skip": skip, "bias": bias, "scale": scale, "shift": shift, "double": double}
    exact = block(x, skip, first, second, carry, bias, scale, shift, double)

    def run(x):
        y = winograd_residual(x, first[1], second[1], packed, **named)
        assert (y - exact).norm() < (2e-6 if dtype is torch.float32 else 3e-3) * exact.norm()
        return y

    in_parts = run(x)
    chained = not double or joined
    assert chained == (parts_of(in_parts) is not None)
    assert not chained or parts_of(in_parts).shape == (3, 5 if double else 3, 3, 40)
    monkeypatch.setattr(own, "in_parts", lambda *_: False)
    y = run(x)
    assert parts_of(y) is None
    if dtype is torch.float32:  # integers may be rounded another way
        torch.testing.assert_close(in_parts, y, rtol=0, atol=2e-6 * exact.abs().max().item())
    for chain in own._chains.values():
        monkeypatch.setattr(chain, "attempt", lambda *args: None)
    assert torch.equal(y, run(x))
    assert torch.equal(y, run(x.contiguous()))


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(
    "shape",
    [(2, 40, 64, 61), (3, 40, 13, 10), (1, 40, 1, 1), (9, 20, 5, 112), (3, 70, 30, 56)],  # strips; a task; a tile; many 1x1
)
@pytest.mark.parametrize("double", [False, True])
def test_parts_are_mean_and_squares_of_rows_of_tiles(isa, shape, double):
    """Whatever the tile and the products; far from zero too; the same for any number of threads."""
    launch, x = own.CONVOLUTION_IN_PARTS, image(*shape)
    before = torch.get_num_threads()
    for tile in (1, 2, 4):
        if not in_parts(tile, (2 if double else 1) * shape[3]):
            continue
        for dtype in (torch.float32, torch.int16):
            side = 1 if tile == 1 else 3
            weight = winograd_weight(draw(37, shape[1], side, side, seed=1) / 20, max(tile, 2), dtype=dtype)
            residual = image(shape[0], 37, *((2 if double else 1) * size for size in shape[2:])) + 100
            with _native.use_isa(isa):
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    given = None, None, False, tile, 37, double, weight.packed, weight.scale, draw(37), residual
                    found.append(launch.attempt(x, *given))
                torch.set_num_threads(before)
            y, parts = found[0]
            assert all(torch.equal(parts, others) for _, others in found)
            rows = y.double().split(tile, 2)
            assert parts.shape == (shape[0], len(rows), 3, 37)
            for part, pixels in zip(parts.double().unbind(1), rows, strict=True):
                spread, mean = torch.var_mean(pixels, (2, 3), correction=0)
                count = pixels.shape[2] * pixels.shape[3]
                assert (part[:, 2] == count).all()
                torch.testing.assert_close(part[:, 0], mean, rtol=1e-6, atol=0)
                torch.testing.assert_close(part[:, 1], spread * count, rtol=1e-4, atol=1e-5 * count)


@torch.no_grad()
def test_a_convolution_tells_the_normalisation():
    x, weight = image(2, 40, 9, 8), winograd_weight(draw(37, 40, 1, 1, seed=1))
    y, plain = winograd_conv2d(x, weight, aside=True), winograd_conv2d(x, weight)
    assert torch.equal(y, plain)
    assert parts_of(y).shape == (2, 9, 3, 37)
    assert parts_of(plain) is None
    assert parts_of(winograd_conv2d(image(1, 40, 2, 57), weight, aside=True)) is None  # wider than a task
    told, read = group_norm_coefficients(y, 1), group_norm_coefficients(plain, 1)
    torch.testing.assert_close(told, read, rtol=1e-6, atol=1e-7)
    y._parts = 2 * y._parts[0], y._version  # that it is used
    assert not torch.allclose(group_norm_coefficients(y, 1), read)


def test_what_was_written_to_since_is_read_again():
    x, (_, first), (_, second) = image(2, 40, 9, 8), part(40, 40, 4, torch.float32, 10), part(40, 40, 8, torch.float32, 20)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = winograd_residual(x, first, second)
            z = winograd_residual(y, first, second)
            again = winograd_residual(y.clone(), first, second)
            torch.testing.assert_close(z, again, rtol=0, atol=1e-5 * z.abs().max().item())
            assert (parts_of(y) is None) == y.is_inference()
    y = winograd_residual(x, first, second)
    y[:, :20] *= 3
    assert parts_of(y) is None
    assert torch.equal(winograd_residual(y, first, second), winograd_residual(y.clone(), first, second))


def test_the_chain_serves_plain_tensors(monkeypatch):
    """No step is made by itself where all is as it should be."""
    monkeypatch.setattr(own, "winograd_conv2d", None)
    x, (_, first), (_, second) = image(2, 40, 9, 8), part(40, 40, 4, torch.float32, 10), part(40, 40, 8, torch.float32, 20)
    assert winograd_residual(x, first, second).shape == x.shape
    with pytest.raises(TypeError, match="not callable"):
        winograd_residual(x.contiguous(), first, second)  # laid otherwise
    with pytest.raises(TypeError, match="not callable"):
        winograd_residual(x.requires_grad_(), first, second)
    with torch.no_grad():
        assert winograd_residual(x, first, second).shape == x.shape


def test_bad_arguments_are_named():
    one = winograd_weight(draw(40, 40, 1, 1))
    (_, first), (_, second) = part(40, 40, 4, torch.float32, 10), part(40, 40, 8, torch.float32, 20)
    with pytest.raises(ValueError, match="what is carried needs a 1x1 convolution where there is a skip"):
        winograd_residual(image(2, 24, 4, 4), first, second, skip=image(2, 16, 4, 4))
    for wrong in (
        (first._replace(weight=one), second),
        (first, second._replace(weight=one)),
        (first, second, (first.weight, None)),
    ):
        with pytest.raises(ValueError, match="first and second must be of 3x3 filters, what carries of 1x1"):
            winograd_residual(image(2, 40, 4, 4), *wrong)
    with pytest.raises(ValueError, match=r"groups must divide the channels of x, got 4 for 39 channels"):
        winograd_residual(image(2, 39, 4, 4), first, second)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 40, H, W\] like the weight, .*, got \[2, 44, 4, 4\]"):
        winograd_residual(image(2, 44, 4, 4), first._replace(norm_weight=None, norm_bias=None), second)
    with pytest.raises(ValueError, match=r"bias must have shape \[40\] or .*, got \[2, 39\]"):
        winograd_residual(image(2, 40, 4, 4), first, second, bias=draw(2, 39))
    with pytest.raises(ValueError, match="serves no gradients"):
        winograd_residual(image(2, 40, 4, 4).requires_grad_(), first, second)
