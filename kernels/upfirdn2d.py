"""upfirdn2d in Triton: every output sums the few weights of the filter that meet a pixel; no zero is read or multiplied.

One program takes a tile: [rows of all planes, columns] of images in logical order, [pixels, channels] with the channels last.
Its neighbours' reads of the same pixels are served by the first-level cache. Long filters given as [K] run in two launches,
down and then across.
"""

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import narrow, options, tile
from fastgen.kernels._static import TYPES, StaticCase

TOGETHER = 16
"""Taps above which two passes of a [K] filter beat one of its outer product."""


@triton.jit
def first_tap(i_out, pad, UP: tl.constexpr, DOWN: tl.constexpr):
    """The first input that an output meets, and the place in the filter where it does."""
    lift = tl.maximum(pad, 0)  # keeps the dividend from being negative, where division would round the other way
    i_start = i_out * DOWN - pad
    i_first = (i_start + UP * lift + UP - 1) // UP - lift
    return i_first, i_first * UP - i_start


@triton.jit
def upfirdn2d_kernel(
    p_x, p_f, p_y, rows, lanes, height, width, out_height, out_width, f_height, f_width, pad_x, pad_y, gain,
    UP_X: tl.constexpr, UP_Y: tl.constexpr, DOWN_X: tl.constexpr, DOWN_Y: tl.constexpr, TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRODUCT: tl.constexpr, FLIPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows` counts output rows of all planes, each `lanes` = out_width long; or output pixels of `lanes` channels."""
    blocks = tl.cdiv(lanes, BLOCK)
    i_lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_row = i_row < rows
    m = m_row & (i_lane < lanes)
    if CHANNELS_LAST:
        i_x, i_line, stride = i_row % out_width, i_row // out_width, lanes
    else:
        i_x, i_line, stride = i_lane, i_row, 1
    i_plane, i_y = i_line // out_height, i_line % out_height
    i_first_x, k_x = first_tap(i_x, pad_x, UP_X, DOWN_X)
    i_first_y, k_y = first_tap(i_y, pad_y, UP_Y, DOWN_Y)
    b_y = tl.zeros((ROWS, BLOCK), tl.float32)
    for t_y in tl.static_range(TAPS_Y):
        i_in_y, j_y = i_first_y + t_y, k_y + t_y * UP_Y
        m_y = (i_in_y >= 0) & (i_in_y < height) & (j_y < f_height)
        o_y = (i_plane * height + i_in_y) * width
        if not FLIPPED:
            j_y = f_height - 1 - j_y
        if PRODUCT:
            b_f_y = tl.load(p_f + j_y, mask=m_y & m_row, other=0.0)
        for t_x in tl.static_range(TAPS_X):
            i_in_x, j_x = i_first_x + t_x, k_x + t_x * UP_X
            m_x = (i_in_x >= 0) & (i_in_x < width) & (j_x < f_width)
            if not FLIPPED:
                j_x = f_width - 1 - j_x
            o = (o_y + i_in_x) * stride
            if CHANNELS_LAST:
                o += i_lane
            b_x = tl.load(p_x + o, mask=m & m_y & m_x, other=0.0).to(tl.float32)
            if PRODUCT:
                b_f = b_f_y * tl.load(p_f + j_x, mask=m_x, other=0.0)
            else:
                b_f = tl.load(p_f + j_y * f_width + j_x, mask=m_y & m_x & m_row, other=0.0)
            b_y += b_f * b_x
    tl.store(p_y + i_row * lanes + i_lane, narrow(b_y * gain, p_y), mask=m)


def _launch(samples, channels, sizes, last, x, f, filter_sizes, up, down, pad, flipped, gain, out_sizes, y):
    """One pass. Pairs are (x, y); ``f`` is [Ky, Kx], or [K] with the sizes at which it acts."""
    taps = [triton.cdiv(k, u) for k, u in zip(filter_sizes, up, strict=True)]
    planes = samples if last else samples * channels
    rows, lanes = (planes * out_sizes[1] * out_sizes[0], channels) if last else (planes * out_sizes[1], out_sizes[0])
    ROWS, BLOCK = tile(rows, lanes)
    upfirdn2d_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(lanes, BLOCK),)](
        x, f, y, rows, lanes, sizes[1], sizes[0], out_sizes[1], out_sizes[0], filter_sizes[1], filter_sizes[0], pad[0], pad[1],
        gain, UP_X=up[0], UP_Y=up[1], DOWN_X=down[0], DOWN_Y=down[1], TAPS_X=taps[0], TAPS_Y=taps[1], CHANNELS_LAST=last,
        PRODUCT=f.dim() == 1, FLIPPED=flipped, ROWS=ROWS, BLOCK=BLOCK, **options(True),
    )  # fmt: skip


def upfirdn2d(
    samples, channels, height, width, last, x, f, f_height, f_width, up_x, up_y, down_x, down_y, pad_x, pad_y, flipped, gain,
    out_height, out_width, y,
):  # fmt: skip
    if not y.numel():
        return
    if not x.numel():
        y.zero_()
        return
    if f is None:
        f, f_width = torch.ones(1, device=x.device), 1
    f_height = f_height or f_width
    if f.dim() == 1 and triton.cdiv(f_height, up_y) * triton.cdiv(f_width, up_x) > TOGETHER:
        layout = torch.channels_last if last else torch.contiguous_format
        between = torch.empty(samples, channels, out_height, width, device=x.device, memory_format=layout)
        _launch(
            samples, channels, (width, height), last, x, f[:, None], (1, f_height), (1, up_y), (1, down_y), (0, pad_y),
            flipped, 1.0, (width, out_height), between,
        )  # fmt: skip
        _launch(
            samples, channels, (width, out_height), last, between, f[None, :], (f_width, 1), (up_x, 1), (down_x, 1), (pad_x, 0),
            flipped, gain, (out_width, out_height), y,
        )  # fmt: skip
        return
    _launch(
        samples, channels, (width, height), last, x, f, (f_width, f_height), (up_x, up_y), (down_x, down_y), (pad_x, pad_y),
        flipped, gain, (out_width, out_height), y,
    )  # fmt: skip


def static_cases():
    cases = []
    integers = ("rows", "lanes", "height", "width", "out_height", "out_width", "f_height", "f_width", "pad_x", "pad_y")
    unaligned = frozenset({"f_height", "f_width", "pad_x", "pad_y", "gain"})
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for last in (False, True):
            for up, down, what in ((2, 1, "up 2"), (1, 2, "down 2")):
                ROWS, BLOCK = tile(65536, 64 if last else 128)
                taps = -(-4 // up)
                # as requested: the first-level cache serves all but one reading of a pixel, and the weights
                reads = taps * taps * size
                weights = 4 * taps / BLOCK + 4 * taps * taps / (BLOCK if last else ROWS)
                cases.append(
                    StaticCase(
                        upfirdn2d_kernel, f"{dtype} {what}{', channels last' if last else ''}",
                        {"p_x": data, "p_f": "*fp32", "p_y": data, **dict.fromkeys(integers, "i32"), "gain": "fp32"},
                        {
                            "UP_X": up, "UP_Y": up, "DOWN_X": down, "DOWN_Y": down, "TAPS_X": taps, "TAPS_Y": taps,
                            "CHANNELS_LAST": last, "PRODUCT": True, "FLIPPED": False, "ROWS": ROWS, "BLOCK": BLOCK,
                        },
                        options(True), elements=ROWS * BLOCK, bytes_per_element=reads + size + weights, unaligned=unaligned,
                        wide=last and dtype == "float32",
                    )
                )  # fmt: skip
    return cases
