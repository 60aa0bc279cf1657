"""winograd_conv2d: against convolutions in float64, at every edge, within its stated error."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import (
    _native,
    group_norm_coefficients,
    group_norm_silu,
    use_backend,
    winograd_conv2d,
    winograd_tile,
    winograd_weight,
)
from fastgen.ops.winograd_conv2d import winograd_conv2d_reference
from tests import emulation

native = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")
every_tile = pytest.mark.parametrize("tile", [2, 4])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filters(outputs, inputs, seed=1):
    return draw(outputs, inputs, 3, 3, seed=seed) / (9 * inputs) ** 0.5


@every_tile
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (4, 4), (5, 8), (9, 6), (13, 3)])
@pytest.mark.parametrize("double", [False, True])
def test_is_the_convolution_at_every_edge(tile, size, double):
    x, weight = draw(2, 3, *size), filters(4, 3)
    wide = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3) if double else x.double()
    expected = F.conv2d(wide, weight.double(), padding=1)
    found = winograd_conv2d(x, weight, tile=tile, double=double)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-6)


@every_tile
def test_picks_out_single_products(tile):
    """Of an image with one pixel the result is the filter, turned around, wherever in a tile the pixel lies."""
    weight = filters(1, 1)
    for row in range(6):
        for column in range(6):
            x = torch.zeros(1, 1, 8, 8)
            x[0, 0, row + 1, column + 1] = 1
            y = winograd_conv2d(x, weight, tile=tile)
            torch.testing.assert_close(y[0, 0, row : row + 3, column : column + 3], weight[0, 0].flip(0, 1), rtol=0, atol=1e-6)
            outside = y.clone()
            outside[0, 0, row : row + 3, column : column + 3] = 0
            assert outside.abs().max() < 1e-6


@native
@pytest.mark.parametrize("channels", [1, 64, 512])
def test_error_is_as_stated(channels):
    x, weight = draw(2, channels, 17, 16), filters(24, channels)
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(y):
        return ((y - exact).abs().max() / exact.abs().max()).item()

    four, two = (error(winograd_conv2d(x, weight, tile=tile, backend="cpp")) for tile in (4, 2))
    assert four < 1e-6 + 2e-7 * channels**0.5
    assert two < 5e-7 + 5e-8 * channels**0.5
    assert two < four or channels == 1


@native
@every_tile
@pytest.mark.parametrize("shape", [(8, 20, 33, 30), (1, 200, 20, 20)])  # many tiles; few, whose patches threads share
def test_transformed_weight_gives_the_same_bits(tile, shape):
    x, weight, residual = draw(*shape), filters(70, shape[1]), draw(shape[0], 70, *shape[2:], seed=3)
    bias = draw(shape[0], 70, seed=2)
    once = winograd_weight(weight, tile)
    found = winograd_conv2d(x, once, bias, residual)
    assert torch.equal(found, winograd_conv2d(x, weight, bias, residual, tile=tile, backend="cpp"))
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = winograd_conv2d_reference(x.double(), weight.double(), bias.double(), residual.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@contextlib.contextmanager
def kernels_of(isa, tmp_path_factory):
    """The kernels of an instruction set: compiled in, emulated, or without the fused products that this CPU may have."""
    if isa in _native.available_isas():
        with _native.use_isa(isa):
            yield
        return
    folder = tmp_path_factory.getbasetemp()
    if isa == "neon":
        emulation.require_neon()
        remote = emulation.compiled(isa, folder, "winograd_conv2d")
    elif "avx512" in _native.available_isas():
        remote = unfused(folder)
    else:
        pytest.skip("needs AVX-512")
    with _native.extra_table(isa, remote.table()), _native.use_isa(isa):
        yield


@functools.cache
def unfused(folder):
    flags = ["-O1", "-DFASTGEN_FUSED_PAIRS=0"]
    return emulation.Remote([str(emulation.build("avx512", "g++", flags, folder, ["winograd_conv2d"]))])


every_isa = pytest.mark.parametrize("isa", sorted({*_native.available_isas(), "neon", "unfused"}))
shapes = pytest.mark.parametrize("shape", [(8, 20, 33, 30), (1, 201, 20, 20), (2, 1, 5, 6)])  # many tiles; few; one channel
every_filter = pytest.mark.parametrize(("side", "tile"), [(3, 2), (3, 4), (1, 4)])


def square(outputs, inputs, side):
    return draw(outputs, inputs, side, side, seed=1) / (side * inputs**0.5)


@native
@every_isa
@every_filter
@shapes
def test_integers_err_by_their_rounding(isa, side, tile, shape, tmp_path_factory):
    x, weight, bias, residual = draw(*shape), square(70, shape[1], side), draw(shape[0], 70), draw(shape[0], 70, *shape[2:])
    exact = F.conv2d(x.double(), weight.double(), padding=side // 2)
    with kernels_of(isa, tmp_path_factory):
        own, whole = winograd_weight(weight, tile, dtype=torch.int16), winograd_weight(weight, tile)
        y, full = winograd_conv2d(x, own), winograd_conv2d(x, own, bias, residual)
    assert own.packed.dtype is torch.int16
    assert own.packed.nbytes <= whole.packed.nbytes / 2 * (1 + 1 / shape[1])
    stated = {(3, 4): 1.5e-4, (3, 2): 4e-5, (1, 4): 3e-5}[side, tile] * (1 + shape[1] ** 0.5)
    assert stated / 100 < (y - exact).norm() / exact.norm() < stated
    torch.testing.assert_close(full, y + bias[:, :, None, None] + residual, rtol=0, atol=1e-5)


@native
@every_filter
def test_integers_do_not_overflow(side, tile):
    """All equal, aligned with the weight, concentrated in one channel or pixel, and of any size: sums reach their bound."""
    for channels in (1, 2, 33, 512):
        alike, weight = torch.ones(1, channels, 9, 9), torch.ones(3, channels, side, side)
        one_channel, one_pixel = torch.zeros_like(alike), torch.zeros_like(alike)
        one_channel[:, -1], one_pixel[:, :, 4, 4] = -1, 1
        own = winograd_weight(weight, tile, dtype=torch.int16)
        for x in (alike, one_channel, one_pixel, alike + one_channel):
            exact = F.conv2d(x, weight, padding=side // 2)
            for size in (1e-15, 1.0, 1e15, 1e30):
                error = (winograd_conv2d(x * size, own) / size - exact).abs().max()
                assert error <= 3e-3 * exact.abs().max(), (channels, size)


@native
@every_filter
def test_integers_of_nothing_and_of_what_is_not_finite(side, tile):
    own, bias = winograd_weight(square(40, 20, side), tile, dtype=torch.int16), draw(3, 40)
    x = torch.zeros(3, 20, 12, 12)
    expected = bias[:, :, None, None].expand(3, 40, 12, 12)
    assert torch.equal(winograd_conv2d(x, own, bias), expected)
    assert torch.equal(winograd_conv2d(x + 1e-42, own, bias), expected)  # subnormal
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 7, 5, 5] = bad
        y = winograd_conv2d(x, own, bias)
        assert not y[1, :, 5, 5].isfinite().any()
        assert torch.equal(y[::2], expected[::2])
    nothing = winograd_weight(torch.zeros(40, 20, side, side), tile, dtype=torch.int16)
    assert torch.equal(winograd_conv2d(draw(3, 20, 12, 12), nothing, bias), expected)


@native
@every_filter
@shapes
def test_integers_do_not_depend_on_the_threads(side, tile, shape):
    x, own = draw(*shape), winograd_weight(square(70, shape[1], side), tile, dtype=torch.int16)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(winograd_conv2d(x, own))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@native
def test_one_by_one_is_a_product_of_matrices():
    x, weight, bias = draw(3, 20, 5, 4), square(7, 20, 1), draw(3, 7)
    own = winograd_weight(weight)
    for double in (False, True):
        wide = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if double else x
        expected = F.conv2d(wide, weight) + bias[:, :, None, None]
        torch.testing.assert_close(winograd_conv2d(x, own, bias, double=double), expected, rtol=0, atol=2e-6)


@native
def test_a_sample_does_not_depend_on_its_batch():
    x, weight = draw(11, 40, 12, 12), filters(20, 40)
    whole = winograd_conv2d(x, weight)
    assert torch.equal(winograd_conv2d(x[7:8], weight), whole[7:8])


@native
@every_tile
@pytest.mark.parametrize("double", [False, True])
def test_gradients_are_those_of_the_convolution(tile, double):
    leaves = [draw(3, 5, 6, 7), filters(4, 5), draw(3, 4, seed=2)]
    found, exact = [v.clone().requires_grad_() for v in leaves], [v.double().requires_grad_() for v in leaves]
    y = winograd_conv2d(*found, tile=tile, double=double, backend="cpp")
    towards = draw(*y.shape, seed=3)
    got = torch.autograd.grad(y, found, towards)
    expected = torch.autograd.grad(winograd_conv2d_reference(*exact, double=double), exact, towards.double())
    for value, truth in zip(got, expected, strict=True):
        assert (value - truth).abs().max() < 5e-6 * truth.abs().max()


@native
@every_tile
@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("shape", [(16, 33, 37, 30), (1, 600, 6, 5)])  # groups of tiles; turns of output channels
def test_gradient_of_the_weight_sums_all_tiles(tile, isa, shape):
    if isa == "neon":
        return  # emulated, this would take long; the contract holds it to small sums
    x, towards = draw(*shape), draw(shape[0], 130, *shape[2:], seed=2)
    weight = filters(130, shape[1]).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    with _native.use_isa(isa):
        (found,) = torch.autograd.grad(winograd_conv2d(x, weight, tile=tile, backend="cpp"), weight, towards)
    (truth,) = torch.autograd.grad(F.conv2d(x.double(), exact, padding=1), exact, towards.double())
    assert (found - truth).abs().max() < 5e-6 * truth.abs().max()


made_shapes = pytest.mark.parametrize("shape", [(8, 20, 33, 30), (1, 201, 20, 20), (3, 40, 1, 260), (2, 16, 5, 6)])


@native
@every_filter
@made_shapes  # many tiles; few; rows of more tiles than a task has; hardly any
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_what_is_made_on_the_way_has_the_same_bits(side, tile, shape, double, dtype):
    n, channels, *size = shape
    x, others, residual = draw(*shape), draw(n, 13, *size), None
    own = winograd_weight(square(37, channels + 13, side), tile, dtype=dtype)
    norm = group_norm_coefficients(x, 1, skip=others)
    both = torch.cat([x, others], 1).contiguous(memory_format=torch.channels_last)
    center, slope, level = norm[..., None, None].unbind(1)
    normed = ((both - center).double() * slope + level).float()  # rounded once, as the kernels do
    for given, made in (
        ({"skip": others}, both),
        ({"skip": others, "norm": norm}, normed),
        ({"skip": others, "norm": norm, "activation": "silu"}, group_norm_silu(both, 1)),
    ):
        bias = draw(n, 37)
        found = winograd_conv2d(x, own, bias, residual, double=double, **given)
        expected = winograd_conv2d(made, own, bias, residual, double=double)
        if _native.current_isa() != "scalar":
            assert torch.equal(found, expected), given.keys()
        else:  # rounds twice
            assert (found - expected).norm() < 1e-5 * expected.norm()


@native
def test_what_is_made_on_the_way_does_not_depend_on_the_threads():
    x, others = draw(6, 20, 31, 30), draw(6, 13, 31, 30)
    own, norm = winograd_weight(square(37, 33, 3), dtype=torch.int16), group_norm_coefficients(x, 3, skip=others)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(winograd_conv2d(x, own, skip=others, norm=norm, activation="silu"))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][2:3], winograd_conv2d(x[2:3], own, skip=others[2:3], norm=norm[2:3], activation="silu"))


def test_double_precision_is_the_references():
    x, weight = draw(1, 2, 5, 5).double(), filters(3, 2).double()
    assert torch.equal(winograd_conv2d(x, weight), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(4, 3, 5, 5)}, r"weight must have shape \[O, C, 3, 3\], got \[4, 3, 5, 5\]"),
        ({"x": torch.zeros(2, 5, 6, 6)}, r"x must have shape \[N, 3, H, W\] .*, got \[2, 5, 6, 6\]"),
        ({"x": torch.zeros(2, 3, 0, 6)}, "pixels"),
        ({"bias": torch.zeros(3, 4)}, r"bias must have shape \[4\] or \[1, 4\] or \[2, 4\], got \[3, 4\]"),
        ({"residual": torch.zeros(2, 4, 6, 5)}, r"residual must have shape \[2, 4, 6, 6\], got \[2, 4, 6, 5\]"),
        ({"bias": torch.zeros(4).double()}, "bias must be torch.float32 .* got torch.float64"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, "weight must be torch.float32 .* got torch.float16"),
        ({"x": torch.zeros(2, 3, 6, 6, dtype=torch.int64)}, "x must be a floating-point tensor, got torch.int64"),
        ({"tile": 3}, "tile must be 2 or 4, got 3"),
        (
            {"skip": torch.zeros(2, 1, 6, 6)},
            r"x must have shape \[N, 2, H, W\] beside the 1 channels of skip .*, got \[2, 3, 6, 6\]",
        ),
        (
            {"x": torch.zeros(2, 2, 6, 6), "skip": torch.zeros(2, 1, 6, 5)},
            r"skip must have shape \[2, 1, 6, 6\], got \[2, 1, 6, 5\]",
        ),
        ({"norm": torch.zeros(2, 2, 3)}, r"norm must have shape \[2, 3, 3\], got \[2, 2, 3\]"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {"x": torch.zeros(2, 3, 6, 6), "weight": torch.zeros(4, 3, 3, 3), **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        winograd_conv2d(**arguments)


@native
def test_transformed_weight_refuses_gradients():
    once = winograd_weight(filters(4, 3))
    with pytest.raises(ValueError, match="serves no gradients"):
        winograd_conv2d(draw(1, 3, 4, 4).requires_grad_(), once)
    with pytest.raises(ValueError, match=r"cannot serve: .*float64"):
        winograd_weight(filters(4, 3).double())
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.int16, got torch.bfloat16"):
        winograd_weight(filters(4, 3), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight must be finite for torch.int16"):
        winograd_weight(torch.full((4, 3, 3, 3), float("inf")), dtype=torch.int16)
    with pytest.raises(ValueError, match=r"weight must have shape \[O, C, 3, 3\] or \[O, C, 1, 1\], got \[4, 3, 5, 5\]"):
        winograd_weight(torch.zeros(4, 3, 5, 5))


@native
def test_tile_goes_by_what_there_is_to_win():
    assert winograd_tile(torch.empty(8, 128, 32, 32), 128) == 4
    assert winograd_tile(torch.empty(8, 256, 4, 4), 256) in (2, 4)
    assert winograd_tile(torch.empty(8, 256, 4, 4), 256, double=True) == winograd_tile(torch.empty(8, 256, 8, 8), 256) == 4
    assert winograd_tile(torch.empty(1, 256, 4, 4), 256) is None  # bound by its weights
    assert winograd_tile(torch.empty(8, 3, 32, 32), 128) is None  # by its transformations
    assert winograd_tile(torch.empty(8, 128, 32, 32), 3) is None
    assert winograd_tile(torch.empty(8, 128, 32, 32).bfloat16(), 128) is None
    with use_backend("reference"):
        assert winograd_tile(torch.empty(8, 128, 32, 32), 128) is None
