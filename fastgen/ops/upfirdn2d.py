"""upfirdn2d: upsample, pad, filter and downsample images, without ever making the zeros between the pixels.

    u[r, s] = x[(r - p_y) / up_y, (s - p_x) / up_x] where both are whole and inside the image, else 0
    y[i, j] = gain * sum_kl  f[Ky - 1 - k, Kx - 1 - l] * u[i * down_y + k, j * down_x + l]

for each channel, with as many rows and columns as the filter fits into: (H * up + p0 + p1 - K) // down + 1. So ``f`` is a
convolution kernel; ``flip_filter`` makes it a correlation. The padding counts pixels after upsampling; what is negative
crops. A filter [K] stands for its outer product with itself and costs K and not K^2 multiplications.

Gradients flow to ``x`` and are another upfirdn2d, with ``up`` and ``down`` exchanged and the filter turned around, so that
they exist to any order. The filter is a constant.

Source: Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN" (arXiv:1912.04958), appendix B;
Karras et al. (2021), "Alias-free generative adversarial networks" (arXiv:2106.12423); polyphase form: Vaidyanathan (1993),
"Multirate systems and filter banks", figure 4.3-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upfirdn2d_reference", "upsample2d"]


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """A factor as (x, y)."""
    x, y = (value, value) if isinstance(value, int) else tuple(value) if len(value) == 2 else (0, 0)
    if not (isinstance(x, int) and isinstance(y, int) and x >= 1 and y >= 1):
        raise ValueError(f"{name} must be a positive integer or a pair of them, got {value!r}")
    return x, y


def _padding(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding as (x before, x after, y before, y after)."""
    sides = (value,) * 4 if isinstance(value, int) else tuple(value)
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"padding must be an integer, (x, y) or (x before, x after, y before, y after), got {value!r}")
    return sides


def _filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of the filter as it acts."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _prepared(
    x: Tensor, f: Tensor | None, up: int | Sequence[int], down: int | Sequence[int], padding: int | Sequence[int]
) -> tuple[Tensor | None, list[int]]:
    """The filter as a dense constant; up and down (x, y), padding (x, x, y, y), height and width of the output."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 4:
        raise ValueError(f"x must have shape [N, C, H, W], got {list(x.shape)}")
    if f is not None:
        if not isinstance(f, Tensor) or not f.is_floating_point():
            raise TypeError(f"f must be None or a floating-point tensor, got {getattr(f, 'dtype', type(f).__name__)}")
        if f.dim() not in (1, 2) or not f.numel():
            raise ValueError(f"f must have shape [K] or [Ky, Kx], got {list(f.shape)}")
        if f.device != x.device:
            raise ValueError(f"f is on {f.device}, expected {x.device} like x")
        f = _checks.constant(f, x).contiguous()
    (up_x, up_y), (down_x, down_y), sides = _pair(up, "up"), _pair(down, "down"), _padding(padding)
    filter_width, filter_height = _filter_size(f)
    width = x.shape[3] * up_x + sides[0] + sides[1]
    height = x.shape[2] * up_y + sides[2] + sides[3]
    if width < filter_width or height < filter_height:
        raise ValueError(f"the filter, {filter_height} x {filter_width}, is larger than the padded image, {height} x {width}")
    size = [(height - filter_height) // down_y + 1, (width - filter_width) // down_x + 1]
    return f, [up_x, up_y, down_x, down_y, *sides, *size]


def upfirdn2d_reference(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """:func:`upfirdn2d` in plain PyTorch."""
    f, (up_x, up_y, down_x, down_y, *sides, out_height, out_width) = _prepared(x, f, up, down, padding)
    samples, channels, height, width = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if up_x > 1 or up_y > 1:
        spread = wide.reshape(samples, channels, height, 1, width, 1)
        spread = functional.pad(spread, [0, up_x - 1, 0, 0, 0, up_y - 1])
        wide = spread.reshape(samples, channels, height * up_y, width * up_x)
    wide = functional.pad(wide, sides)
    if not wide.numel():  # conv2d has no groups of nothing
        return wide[:, :, :out_height, :out_width].to(x.dtype)
    if f is None:
        return (gain * wide[:, :, ::down_y, ::down_x]).to(x.dtype)
    if not flip_filter:
        f = f.flip(list(range(f.dim())))
    f = f.to(wide)
    if f.dim() == 2:
        y = functional.conv2d(wide, (gain * f).expand(channels, 1, *f.shape), stride=(down_y, down_x), groups=channels)
    else:
        y = functional.conv2d(wide, f[:, None].expand(channels, 1, -1, 1), stride=(down_y, 1), groups=channels)
        y = functional.conv2d(y, (gain * f).expand(channels, 1, 1, -1), stride=(1, down_x), groups=channels)
    return y.to(x.dtype)


def _empty_output(x: Tensor, geometry: Sequence[int]) -> Tensor:
    layout = torch.channels_last if _checks.is_channels_last(x) else torch.contiguous_format
    return torch.empty((*x.shape[:2], *geometry[8:]), dtype=x.dtype, device=x.device, memory_format=layout)


def _forward(x: Tensor, f: Tensor | None, geometry: Sequence[int], flip_filter: bool, gain: float, backend: str) -> Tensor:
    y = _empty_output(x, geometry)
    samples, channels, height, width = x.shape
    up_x, up_y, down_x, down_y, pad_x, _, pad_y, _, out_height, out_width = geometry
    filter_height, filter_width = (0, 0) if f is None else (0, f.shape[0]) if f.dim() == 1 else f.shape
    last = _checks.is_channels_last(x)
    if backend == "cpp":
        _native.kernel("upfirdn2d")(
            _native.DTYPES[x.dtype], samples, channels, height, width, last, x, f, filter_height, filter_width, up_x, up_y,
            down_x, down_y, pad_x, pad_y, flip_filter, gain, out_height, out_width, y, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("upfirdn2d").upfirdn2d(
            samples, channels, height, width, last, x, f, filter_height, filter_width, up_x, up_y,
            down_x, down_y, pad_x, pad_y, flip_filter, gain, out_height, out_width, y,
        )  # fmt: skip
    return y


_resample = _dispatch.raw_op(
    "upfirdn2d",
    "(Tensor x, Tensor? f, int[] geometry, bool flip_filter, float gain, str backend) -> Tensor",
    _forward,
    lambda x, f, geometry, *_: _empty_output(x, geometry),
)


class _Upfirdn2d(torch.autograd.Function):
    """Saves the filter alone: the map is linear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, f: Tensor | None, geometry: list[int], flip_filter: bool, gain: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(f)
        ctx.geometry, ctx.flip_filter, ctx.gain, ctx.backend = geometry, flip_filter, gain, backend
        ctx.size, ctx.channels_last = x.shape[2:], _checks.is_channels_last(x)
        return _resample(x, f, geometry, flip_filter, gain, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (f,) = ctx.saved_tensors
        up_x, up_y, down_x, down_y, x0, _, y0, _, out_height, out_width = ctx.geometry
        (height, width), (filter_width, filter_height) = ctx.size, _filter_size(f)
        # what remains after the last pixel: enough for `height` and `width` outputs
        before_x, before_y = filter_width - 1 - x0, filter_height - 1 - y0
        after_x = (width - 1) * up_x + filter_width - out_width * down_x - before_x
        after_y = (height - 1) * up_y + filter_height - out_height * down_y - before_y
        geometry = [down_x, down_y, up_x, up_y, before_x, after_x, before_y, after_y, height, width]
        # torch.compile has no second derivatives, and need not trace this function within itself
        again = torch.is_grad_enabled() and grad_y.requires_grad and not torch.compiler.is_compiling()
        run = _Upfirdn2d.apply if again else _resample
        grad_y = _checks.dense(grad_y, ctx.channels_last)
        return run(grad_y, f, geometry, not ctx.flip_filter, ctx.gain, ctx.backend), None, None, None, None, None


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    backend: str | None = None,
) -> Tensor:
    """Upsample by inserting zeros, pad, filter, keep every ``down``-th pixel: StyleGAN's resampling, in one pass.

    Args:
        x: images [N, C, H, W], floating point, contiguous or channels last. float64 is served by the reference.
        f: filter [K], applied along both axes, or [Ky, Kx]; None is the identity. Floating point, on the device of ``x``; a
            constant for autograd. See :func:`setup_filter`.
        up: factor, or (x, y): each pixel is followed by ``up`` - 1 zeros.
        down: factor, or (x, y).
        padding: pixels of zeros around the upsampled image: one number, (x, y), or (x before, x after, y before, y after).
            Negative numbers crop.
        flip_filter: False convolves with ``f``, True correlates.
        gain: factor of the result.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        [N, C, (H * up + padding - Ky) // down + 1, (W * up + padding - Kx) // down + 1], dtype and memory format of ``x``.
        Differentiable to any order.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device, or a filter larger than the padded image.

    >>> upfirdn2d(torch.zeros(8, 3, 16, 16), setup_filter([1, 3, 3, 1]), up=2, padding=(2, 1, 2, 1), gain=4).shape
    torch.Size([8, 3, 32, 32])
    """
    kernel, geometry = _prepared(x, f, up, down, padding)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return upfirdn2d_reference(x, f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain)
    x, gain = _checks.dense(x, _checks.is_channels_last(x)), float(gain)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Upfirdn2d.apply(x, kernel, geometry, flip_filter, gain, chosen)
    return _resample(x, kernel, geometry, flip_filter, gain, chosen)


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    *,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """A filter for :func:`upfirdn2d` from its taps.

    Args:
        f: taps [K] of both axes, or [Ky, Kx]; a number, or None for 1.
        device: where the filter goes.
        normalize: divide by the sum, so that constant images stay.
        flip_filter: turn the filter around.
        gain: factor of the whole, two-dimensional filter.
        separable: False makes the outer product of taps [K] with themselves; None and True leave them [K].

    Returns:
        float32, [K] or [Ky, Kx].
    """
    taps = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32, device=device)
    taps = taps[None] if taps.dim() == 0 else taps
    if taps.dim() not in (1, 2) or not taps.numel():
        raise ValueError(f"f must be a number or have shape [K] or [Ky, Kx], got {list(taps.shape)}")
    if separable and taps.dim() == 2:
        raise ValueError(f"separable filters have shape [K], got {list(taps.shape)}")
    if separable is False and taps.dim() == 1:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.dim())))
    return taps * gain ** (taps.dim() / 2)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    backend: str | None = None,
) -> Tensor:
    """:func:`upfirdn2d` to exactly ``up`` times the size, plus ``padding``; constant images keep their value."""
    (up_x, up_y), (x0, x1, y0, y1), (width, height) = _pair(up, "up"), _padding(padding), _filter_size(f)
    sides = (x0 + (width + up_x - 1) // 2, x1 + (width - up_x) // 2, y0 + (height + up_y - 1) // 2, y1 + (height - up_y) // 2)
    return upfirdn2d(x, f, up=up, padding=sides, flip_filter=flip_filter, gain=gain * up_x * up_y, backend=backend)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    *,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    backend: str | None = None,
) -> Tensor:
    """:func:`upfirdn2d` to a ``down``-th of the size, where that is whole and ``padding`` is 0."""
    (down_x, down_y), (x0, x1, y0, y1), (width, height) = _pair(down, "down"), _padding(padding), _filter_size(f)
    before_x, before_y = x0 + (width - down_x + 1) // 2, y0 + (height - down_y + 1) // 2
    sides = (before_x, x1 + (width - down_x) // 2, before_y, y1 + (height - down_y) // 2)
    return upfirdn2d(x, f, down=down, padding=sides, flip_filter=flip_filter, gain=gain, backend=backend)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    *,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    backend: str | None = None,
) -> Tensor:
    """:func:`upfirdn2d` at the size of the image, plus ``padding``."""
    (x0, x1, y0, y1), (width, height) = _padding(padding), _filter_size(f)
    sides = (x0 + width // 2, x1 + (width - 1) // 2, y0 + height // 2, y1 + (height - 1) // 2)
    return upfirdn2d(x, f, padding=sides, flip_filter=flip_filter, gain=gain, backend=backend)


_RESAMPLINGS: dict[str, dict[str, Any]] = {
    "up 2": {"up": 2, "padding": (2, 1, 2, 1), "gain": 4},
    "down 2": {"down": 2, "padding": 1},
    "filter": {"padding": (2, 1)},
    "uneven": {"up": (3, 2), "down": (2, 3), "padding": (4, 3, 5, 2), "flip_filter": True, "gain": -0.5},
    "crop": {"up": 4, "padding": (4, -3, -1, 5)},
}
"""Named for the example inputs."""


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    resampling: str = "up 2",
    taps: tuple[int, ...] = (4,),
    channels_last: bool = False,
) -> dict[str, Any]:
    # an event of one dimension is a row of pixels
    x = torch.randn(rows, *((1, 1, *event) if len(event) == 1 else event), generator=generator).to(device, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    # (4,) is the usual binomial filter, (4, 4) its outer product, other filters are no products
    f = None
    if taps in ((4,), (4, 4)):
        f = setup_filter([1, 3, 3, 1], device=device, separable=len(taps) == 1)
    elif taps:
        f = (torch.randn(taps, generator=generator) / max(taps)).to(device)
    options = dict(_RESAMPLINGS[resampling])
    # images smaller than the filter are padded until it fits
    (up_x, up_y), (x0, x1, y0, y1) = _pair(options.get("up", 1), "up"), _padding(options["padding"])
    width, height = _filter_size(f)
    x1 = max(x1, width - x0 - x.shape[3] * up_x)
    y1 = max(y1, height - y0 - x.shape[2] * up_y)
    return {"x": x, "f": f, **options, "padding": (x0, x1, y0, y1)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x -> y; backward: dy -> dx
    _, geometry = _prepared(inputs["x"], inputs["f"], inputs.get("up", 1), inputs.get("down", 1), inputs["padding"])
    x = inputs["x"]
    outputs = x.shape[0] * x.shape[1] * geometry[8] * geometry[9] * x.element_size()
    return (x.nbytes + outputs) * (1 if mode == "fwd" else 2)


SPEC = OpSpec(
    name="upfirdn2d",
    function=upfirdn2d,
    reference=upfirdn2d_reference,
    outputs={"y": "reduction"},
    gradients=("x",),
    example_inputs=_example_inputs,
    flags={
        "resampling": tuple(_RESAMPLINGS),
        "taps": ((4,), (4, 4), (5,), (5, 3), (3, 6), (12,)),
        "channels_last": (False, True),
    },
    event_ranks=(1, 3),
    sizes=(1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300, 2047),
    shapes=((4, (64, 8, 8)), (4, (64, 64, 64)), (4, (32, 256, 256))),
    bytes_moved=_bytes_moved,
    gradient_precision="reduction",
    double_backward=True,
)
