"""upfirdn2d: scipy's upfirdn, plain loops, the adjoint, any order of derivative, sizes of the helpers, layouts."""

import pytest
import torch

from fastgen import ops


def by_loops(x, f, up, down, padding, flip_filter, gain):
    """The formula of the docstring, one output at a time. Factors (x, y), padding (x, x, y, y), f [Ky, Kx]."""
    height, width = x.shape
    (x0, x1, y0, y1), (filter_height, filter_width) = padding, f.shape
    f = f if flip_filter else f.flip(0, 1)
    out = torch.zeros(
        (height * up[1] + y0 + y1 - filter_height) // down[1] + 1, (width * up[0] + x0 + x1 - filter_width) // down[0] + 1
    ).double()
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(filter_height):
                for m in range(filter_width):
                    row, row_rest = divmod(i * down[1] + k - y0, up[1])
                    column, column_rest = divmod(j * down[0] + m - x0, up[0])
                    if not row_rest and not column_rest and 0 <= row < height and 0 <= column < width:
                        out[i, j] += gain * f[k, m] * x[row, column]
    return out


@pytest.mark.parametrize("up", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("down", [(1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (3, 1, 2, 4), (-2, 5, 4, -1)])
@pytest.mark.parametrize("taps", [(4, 3), (2, 6)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula(up, down, padding, taps, backend):
    x, f = torch.randn(6, 7), torch.randn(taps)
    for flip_filter in (False, True):
        expected = by_loops(x.double(), f.double(), up, down, padding, flip_filter, 1.5)
        y = ops.upfirdn2d(
            x[None, None], f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=1.5, backend=backend
        )
        torch.testing.assert_close(y[0, 0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (4, 6), (5, 3)])
def test_against_scipy(up, down):
    signal = pytest.importorskip("scipy.signal")
    x, f = torch.randn(1, 1, 1, 50), torch.randn(9)
    # scipy pads just enough for the whole response, and inserts no zeros after the last sample
    y = ops.upfirdn2d(x, f[None], up=(up, 1), down=(down, 1), padding=(8, 8 - (up - 1), 0, 0))
    expected = signal.upfirdn(f.double().numpy(), x.double().flatten().numpy(), up, down)
    torch.testing.assert_close(y.flatten().double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_filter_and_its_outer_product_are_the_same():
    x, f = torch.randn(2, 3, 9, 11), torch.rand(6)
    options = {"up": 2, "down": 3, "padding": 4, "gain": 3.0}
    torch.testing.assert_close(ops.upfirdn2d(x, f, **options), ops.upfirdn2d(x, torch.outer(f, f), **options))


def test_no_filter_is_the_identity():
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(ops.upfirdn2d(x, None), x)
    y = ops.upfirdn2d(x, None, up=(3, 2), gain=2.0)
    assert torch.equal(y[:, :, ::2, ::3], 2 * x)
    assert y.count_nonzero() == x.count_nonzero()
    assert torch.equal(ops.upfirdn2d(y, None, down=(3, 2), gain=0.5), x)


def test_negative_padding_crops():
    x, f = torch.randn(1, 2, 9, 9), torch.randn(3, 3)
    whole = ops.upfirdn2d(x, f, padding=2)
    torch.testing.assert_close(ops.upfirdn2d(x, f, padding=(-1, 0, 1, -2)), whole[:, :, 1:-4, 3:-2])


@pytest.mark.parametrize("taps", [(4,), (4, 4), (3, 5)])
@pytest.mark.parametrize("options", [{"up": 2, "padding": (2, 1)}, {"down": 2, "padding": 1}, {"up": (3, 2), "down": (2, 5)}])
def test_gradient_is_the_adjoint(taps, options):
    x, f = torch.randn(2, 2, 8, 9, requires_grad=True), torch.randn(taps)
    y = ops.upfirdn2d(x, f, **options)
    w = torch.randn(y.shape)
    (grad,) = torch.autograd.grad(y, x, w)
    v = torch.randn(x.shape)
    torch.testing.assert_close((grad * v).sum(), (ops.upfirdn2d(v, f, **options) * w).sum(), rtol=1e-4, atol=1e-4)


def test_derivatives_of_any_order():
    """Four times through a cube: the last is a constant, 6 M^T (M v)^3 for the map M."""
    f = ops.setup_filter([1, 3, 3, 1])
    x = torch.randn(1, 1, 5, 5, requires_grad=True)
    v = torch.randn(1, 1, 5, 5)
    term = ops.upsample2d(x, f).pow(3).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(term, x, create_graph=True)
        term = (grad * v).sum()
    expected = 6 * ops.upsample2d(v, f).pow(3).sum()
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [[1.0, 3.0, 3.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0], torch.rand(3, 4)])
@pytest.mark.parametrize("size", [(1, 4), (7, 6), (16, 33)])
def test_helpers_give_exact_sizes_and_keep_constants(taps, size):
    f, x = ops.setup_filter(taps), torch.ones(1, 2, *size)
    height, width = size
    up = ops.upsample2d(x, f, up=(3, 2))
    assert up.shape[2:] == (2 * height, 3 * width)
    same = ops.filter2d(x, f)
    assert same.shape == x.shape
    if height % 2 == 0 and width % 2 == 0:
        assert ops.downsample2d(x, f).shape[2:] == (height // 2, width // 2)
    assert ops.filter2d(x, f, padding=(2, 1, 0, 3)).shape[2:] == (height + 3, width + 3)
    inner = same[:, :, 3:-3, 3:-3]
    torch.testing.assert_close(inner, torch.ones_like(inner))
    if len(f) == 4 and f.dim() == 1:
        inner = ops.upsample2d(x, f)[:, :, 3:-3, 3:-3]
        torch.testing.assert_close(inner, torch.ones_like(inner))


def test_upsampling_is_linear_interpolation():
    """[1, 3, 3, 1] at a factor of 2: the new pixels lie a quarter between the old ones."""
    x = torch.arange(10.0).expand(1, 1, 10, 10)
    y = ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1]))
    torch.testing.assert_close(y[0, 0, 5, 3:17], torch.arange(1.25, 8.0, 0.5))


def test_setup_filter():
    f = ops.setup_filter([1, 3, 3, 1])
    torch.testing.assert_close(f, torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)
    torch.testing.assert_close(ops.setup_filter([1, 3, 3, 1], separable=False), torch.outer(f, f))
    torch.testing.assert_close(ops.setup_filter([1, 2], flip_filter=True), torch.tensor([2.0, 1.0]) / 3)
    assert ops.setup_filter([1, 3, 3, 1], gain=4.0).sum().item() == pytest.approx(2.0)
    assert ops.setup_filter([[1.0, 2.0]], gain=4.0).sum().item() == pytest.approx(4.0)
    assert torch.equal(ops.setup_filter(None), torch.ones(1))
    assert torch.equal(ops.setup_filter([1, 2], normalize=False), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"separable filters have shape \[K\], got \[2, 2\]"):
        ops.setup_filter(torch.ones(2, 2), separable=True)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 130])
def test_widths_around_those_of_vectors(size):
    x, f = torch.randn(1, 1, 3, size), torch.randn(4)
    for up, down in ((2, 1), (1, 2), (1, 1), (3, 1), (1, 3)):
        options = {"up": up, "down": down, "padding": 4}
        y, expected = ops.upfirdn2d(x, f, **options), ops.upfirdn2d(x.double(), f, **options)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_outputs_are_complete():
    """8 MiB and more go around the caches."""
    x, f = torch.randn(3, 16, 128, 128), ops.setup_filter([1, 3, 3, 1])
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        y = ops.upsample2d(image, f)
        assert y.nbytes >= 8 << 20
        torch.testing.assert_close(y, ops.upsample2d(x, f, backend="reference"))


def test_channels_last_stays():
    x = torch.randn(2, 20, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_a_zero_filter_gives_zeros():
    assert not ops.upfirdn2d(torch.randn(1, 2, 6, 6), torch.zeros(3, 3)).any()


def test_errors():
    x, f = torch.zeros(1, 2, 4, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\], got \[2, 4, 4\]"):
        ops.upfirdn2d(x[0], f)
    with pytest.raises(TypeError, match="f must be None or a floating-point tensor, got list"):
        ops.upfirdn2d(x, [1, 2])
    with pytest.raises(ValueError, match=r"f must have shape \[K\] or \[Ky, Kx\], got \[1, 2, 2\]"):
        ops.upfirdn2d(x, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="up must be a positive integer or a pair of them, got 0"):
        ops.upfirdn2d(x, f, up=0)
    with pytest.raises(ValueError, match=r"down must be a positive integer or a pair of them, got \(1, 2, 3\)"):
        ops.upfirdn2d(x, f, down=(1, 2, 3))
    with pytest.raises(ValueError, match=r"padding must be an integer, .*, got \(1, 2, 3\)"):
        ops.upfirdn2d(x, f, padding=(1, 2, 3))
    with pytest.raises(ValueError, match="the filter, 4 x 4, is larger than the padded image, 2 x 4"):
        ops.upfirdn2d(x, f, padding=(0, 0, -1, -1))
