"""bias_act in Triton: one program takes a tile of [rows, event], with one bias a row or one bias a column.

Images in logical order are rows of pixels that share a bias; with the channels last a row is a pixel and the biases run along
it. Where biases get gradients each program leaves one sum per row, or one per column of its band of rows; they are added up
in order afterwards.
"""

import math

import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET, narrow, options, tile
from fastgen.kernels._static import TYPES, StaticCase

LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH = (tl.constexpr(i) for i in range(9))
BAND = 1 if INTERPRET else 16
"""Tiles down the rows that one program takes where it sums columns."""


@triton.jit
def expm1_below(x):
    """exp(x) - 1 for x <= 0 without cancellation: a series near 0."""
    b_series = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0)))))
    return tl.where(x > -0.25, x * b_series, tl.exp(x) - 1.0)


@triton.jit
def log1p_small(x):
    """log(1 + x) for x in [0, 1]; where 1 + x rounds, the quotient makes up for it."""
    sum_ = 1.0 + x
    return tl.where(sum_ == 1.0, x, tl.log(sum_) * (x / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))


@triton.jit
def activate(b_v, alpha, ACT: tl.constexpr):
    """The activation, and its first and second derivative."""
    b_zero = tl.zeros_like(b_v)
    b_slope = b_zero + 1.0
    b_curve = b_zero
    b_value = b_v
    if ACT == RELU:
        b_value = tl.where(b_v < 0.0, 0.0, b_v)
        b_slope = tl.where(b_v > 0.0, 1.0, b_zero)
    elif ACT == LRELU:
        b_value = tl.where(b_v > 0.0, b_v, b_v * alpha)
        b_slope = tl.where(b_v > 0.0, 1.0, b_zero + alpha)
    elif (ACT == ELU) | (ACT == SELU):
        SCALE: tl.constexpr = 1.0507009873554805 if ACT == SELU else 1.0
        LOW: tl.constexpr = 1.7580993408473766 if ACT == SELU else 1.0
        b_below = tl.where(b_v > 0.0, 0.0, b_v)
        b_e = tl.exp(b_below) * LOW
        b_value = tl.where(b_v > 0.0, b_v * SCALE, expm1_below(b_below) * LOW)
        b_slope = tl.where(b_v > 0.0, SCALE, b_e)
        b_curve = tl.where(b_v >= 0.0, 0.0, b_e)  # as PyTorch at 0
    elif ACT == TANH:
        b_square = b_v * b_v
        b_e = tl.exp(-2.0 * tl.abs(b_v))
        b_large = (1.0 - b_e) / (1.0 + b_e)
        b_small = -17.0 / 315.0 + b_square * (62.0 / 2835.0)
        b_small = b_v + b_v * b_square * (-1.0 / 3.0 + b_square * (2.0 / 15.0 + b_square * b_small))
        b_value = tl.where(b_square < 0.0625, b_small, tl.where(b_v < 0.0, -b_large, b_large))
        b_slope = 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
        b_curve = -2.0 * b_value * b_slope
    elif ACT != LINEAR:
        # sigmoid and its complement without a subtraction
        b_e = tl.exp(-tl.abs(b_v))
        b_large = 1.0 / (1.0 + b_e)
        b_small = b_e * b_large
        b_s = tl.where(b_v < 0.0, b_small, b_large)
        b_rest = tl.where(b_v < 0.0, b_large, b_small)
        b_product = b_small * b_large
        if ACT == SIGMOID:
            b_value = b_s
            b_slope = b_product
            b_curve = b_product * (b_rest - b_s)
        elif ACT == SOFTPLUS:
            b_value = tl.where(b_v < 0.0, 0.0, b_v) + log1p_small(b_e)
            b_slope = b_s
            b_curve = b_product
        else:
            b_value = b_v * b_s
            b_slope = b_s + b_v * b_product
            b_curve = b_product * (2.0 + b_v * (b_rest - b_s))
    return b_value, b_slope, b_curve


@triton.jit
def biased_jet(b_v, alpha, gain, clamp, ACT: tl.constexpr, CLAMPED: tl.constexpr):
    """With gain and clamp: where the value is cut off it has no derivatives."""
    b_value, b_slope, b_curve = activate(b_v, alpha, ACT)
    b_value, b_slope, b_curve = b_value * gain, b_slope * gain, b_curve * gain
    if CLAMPED:
        b_inside = tl.abs(b_value) <= clamp
        b_slope = tl.where(b_inside, b_slope, 0.0)
        b_curve = tl.where(b_inside, b_curve, 0.0)
        b_value = tl.where(b_value > clamp, clamp, tl.where(b_value < -clamp, -clamp, b_value))
    return b_value, b_slope, b_curve


@triton.jit
def per_channel(p, i_row, m_row, i_column, m_column, channels, BY_ROW: tl.constexpr):
    """One number per channel as a column [ROWS, 1] or a row [1, BLOCK]."""
    i, m = (i_row % channels, m_row) if BY_ROW else (i_column, m_column)
    return tl.load(p + i, mask=m, other=0.0)


@triton.jit
def bias_act_fwd_kernel(
    p_x, p_b, p_y, rows, event, channels, alpha, gain, clamp,
    HAS_B: tl.constexpr, BY_ROW: tl.constexpr, ACT: tl.constexpr, CLAMPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_row, m_column = i_row < rows, i_column < event
    o, m = i_row * event + i_column, m_row & m_column
    b_v = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if HAS_B:
        b_v += per_channel(p_b, i_row, m_row, i_column, m_column, channels, BY_ROW)
    b_value, _, _ = biased_jet(b_v, alpha, gain, clamp, ACT, CLAMPED)
    tl.store(p_y + o, narrow(b_value, p_y), mask=m)


@triton.jit
def bias_act_bwd_kernel(
    p_x, p_b, p_grad_y, p_along_x, p_along_b, p_out_grad_y, p_out_x, p_sums, rows, event, channels, alpha, gain, clamp,
    AGAIN: tl.constexpr, HAS_B: tl.constexpr, HAS_ALONG_X: tl.constexpr, HAS_ALONG_B: tl.constexpr, SUMMED: tl.constexpr,
    BY_ROW: tl.constexpr, ACT: tl.constexpr, CLAMPED: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient, or where AGAIN the gradient of that, of TILES tiles: to the right by row, else one below the other."""
    bands = tl.cdiv(event, TILES * BLOCK if BY_ROW else BLOCK)
    i_band = tl.program_id(0) % bands
    i_group = tl.program_id(0) // bands
    b_total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_tile in range(TILES):
        if BY_ROW:
            i_column = (i_band * TILES + i_tile) * BLOCK + tl.arange(0, BLOCK)[None, :]
            i_row = i_group.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        else:
            i_column = i_band * BLOCK + tl.arange(0, BLOCK)[None, :]
            i_row = (i_group.to(tl.int64) * TILES + i_tile) * ROWS + tl.arange(0, ROWS)[:, None]
        m_row, m_column = i_row < rows, i_column < event
        o, m = i_row * event + i_column, m_row & m_column
        b_v = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        if HAS_B:
            b_v += per_channel(p_b, i_row, m_row, i_column, m_column, channels, BY_ROW)
        _, b_slope, b_curve = biased_jet(b_v, alpha, gain, clamp, ACT, CLAMPED)
        b_grad_y = tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32)
        if AGAIN:
            b_along = tl.zeros((ROWS, BLOCK), tl.float32)
            if HAS_ALONG_X:
                b_along += tl.load(p_along_x + o, mask=m, other=0.0).to(tl.float32)
            if HAS_ALONG_B:
                b_along += per_channel(p_along_b, i_row, m_row, i_column, m_column, channels, BY_ROW)
            tl.store(p_out_grad_y + o, narrow(b_along * b_slope, p_out_grad_y), mask=m)
            b_out = b_along * b_grad_y * b_curve
        else:
            b_out = b_grad_y * b_slope
        tl.store(p_out_x + o, narrow(b_out, p_out_x), mask=m)
        if SUMMED:
            b_total += tl.where(m, b_out, 0.0)
    if SUMMED:
        if BY_ROW:
            i_row = i_group.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
            tl.store(p_sums + i_row * bands + i_band, tl.sum(b_total, axis=1, keep_dims=True), mask=i_row < rows)
        else:
            i_column = i_band * BLOCK + tl.arange(0, BLOCK)[None, :]
            o_sum = i_group.to(tl.int64) * event + i_column
            tl.store(p_sums + o_sum, tl.sum(b_total, axis=0, keep_dims=True), mask=i_column < event)


def _matrix(outer, channels, inner):
    """(rows, event, whether the bias goes by rows)."""
    if inner == 1 and outer * channels > 1:
        return outer, channels, False
    return outer * channels, inner, True


def bias_act_fwd(outer, channels, inner, x, b, y, act, alpha, gain, clamp):
    if not x.numel():
        return
    rows, event, by_row = _matrix(outer, channels, inner)
    ROWS, BLOCK = tile(rows, event)
    bias_act_fwd_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)](
        x, b, y, rows, event, channels, alpha, gain, clamp,
        HAS_B=b is not None, BY_ROW=by_row, ACT=act, CLAMPED=clamp < math.inf, ROWS=ROWS, BLOCK=BLOCK, **options(True),
    )  # fmt: skip


def _differentiate(outer, channels, inner, x, b, grad_y, along_x, along_b, out_grad_y, out_x, sums, act, alpha, gain, clamp):
    if not x.numel():
        if sums is not None:
            sums.zero_()
        return
    rows, event, by_row = _matrix(outer, channels, inner)
    ROWS, BLOCK = tile(rows, event)
    TILES = 1 if sums is None else min(triton.cdiv(event, BLOCK) if by_row else triton.cdiv(rows, ROWS), BAND)
    bands = triton.cdiv(event, BLOCK * TILES if by_row else BLOCK)
    groups = triton.cdiv(rows, ROWS if by_row else ROWS * TILES)
    partial = None
    if sums is not None:
        partial = sums.new_empty((rows, bands) if by_row else (groups, event))
    bias_act_bwd_kernel[(groups * bands,)](
        x, b, grad_y, along_x, along_b, out_grad_y, out_x, partial, rows, event, channels, alpha, gain, clamp,
        AGAIN=out_grad_y is not None, HAS_B=b is not None, HAS_ALONG_X=along_x is not None,
        HAS_ALONG_B=along_b is not None, SUMMED=sums is not None, BY_ROW=by_row, ACT=act, CLAMPED=clamp < math.inf,
        TILES=TILES, ROWS=ROWS, BLOCK=BLOCK, **options(True),
    )  # fmt: skip
    if partial is not None:
        shape, summed = ((outer, channels, bands), (0, 2)) if by_row else ((groups, channels), (0,))
        sums.copy_(partial.reshape(shape).double().sum(summed))


def bias_act_bwd(outer, channels, inner, x, b, grad_y, grad_x, sums, act, alpha, gain, clamp):
    _differentiate(outer, channels, inner, x, b, grad_y, None, None, None, grad_x, sums, act, alpha, gain, clamp)


def bias_act_bwd_bwd(outer, channels, inner, x, b, grad_y, along_x, along_b, out_grad_y, out_x, sums, act, alpha, gain, clamp):
    _differentiate(outer, channels, inner, x, b, grad_y, along_x, along_b, out_grad_y, out_x, sums, act, alpha, gain, clamp)


def static_cases():
    cases = []
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for rows, event, by_row, act in ((4 * 64, 4096, True, 2), (16384, 64, False, 2), (4 * 64, 4096, True, 8)):
            ROWS, BLOCK = tile(rows, event)
            what = f"{dtype} {rows}x{event}, bias by {'row' if by_row else 'column'}, act {act}"
            numbers = {"rows": "i32", "event": "i32", "channels": "i32", "alpha": "fp32", "gain": "fp32", "clamp": "fp32"}
            common = {"HAS_B": True, "BY_ROW": by_row, "ACT": act, "CLAMPED": True, "ROWS": ROWS, "BLOCK": BLOCK}
            scalars = frozenset({"alpha", "gain", "clamp"})
            bias_bytes = 4 / BLOCK if by_row else 4 / ROWS
            cases.append(
                StaticCase(
                    bias_act_fwd_kernel, what, {"p_x": data, "p_b": "*fp32", "p_y": data, **numbers}, common, options(True),
                    elements=ROWS * BLOCK, bytes_per_element=2 * size + bias_bytes, unaligned=scalars, wide=dtype == "float32",
                )
            )  # fmt: skip
            TILES = min(triton.cdiv(event, BLOCK) if by_row else triton.cdiv(rows, ROWS), BAND)
            for again in (False, True):
                arguments = {"p_x": data, "p_b": "*fp32", "p_grad_y": data, "p_along_x": data if again else None}
                arguments |= {"p_along_b": None, "p_out_grad_y": data if again else None, "p_out_x": data}
                arguments |= {"p_sums": "*fp32", **numbers}
                flags = {"AGAIN": again, "HAS_ALONG_X": again, "HAS_ALONG_B": False, "SUMMED": True, "TILES": TILES}
                cases.append(
                    StaticCase(
                        bias_act_bwd_kernel, f"{what}{', again' if again else ''}", arguments, {**flags, **common},
                        options(True), elements=ROWS * BLOCK * TILES, trips=TILES, unaligned=scalars,
                        bytes_per_element=(5 if again else 3) * size + bias_bytes * (1 + 1 / TILES), wide=dtype == "float32",
                    )
                )  # fmt: skip
    return cases
