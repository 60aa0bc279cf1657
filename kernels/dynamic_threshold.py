"""dynamic_threshold in Triton: one program a row, radix select on the bits of the magnitudes.

A row is read again from the cache in each pass: three passes of 11, 11 and 9 bits find the element of the first rank, one
more its successor.
"""

import triton
import triton.language as tl
from fastgen.kernels._launch import narrow, options, tile
from fastgen.kernels._static import TYPES, StaticCase

BINS = tl.constexpr(2048)


@triton.jit
def magnitude_bits(p, o, m):
    """Bits of |x|, which sort as the numbers do; NaN is the largest."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def refine(p_row, event, prefix, below, first, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """WIDTH more bits of the element of rank ``first``; ``below`` elements are smaller than any with this prefix."""
    counts = tl.zeros((BINS,), tl.int32)
    for i_block in range(tl.cdiv(event, BLOCK)):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        bits = magnitude_bits(p_row, o, o < event)
        same = (bits >> (SHIFT + WIDTH)) == (prefix >> (SHIFT + WIDTH))
        counts += tl.histogram((bits >> SHIFT) & ((1 << WIDTH) - 1), BINS, mask=same & (o < event))
    before = below + tl.cumsum(counts, 0) <= first  # bins that end before the rank
    digit = tl.sum(before.to(tl.int32), 0)
    return prefix | (digit << SHIFT), below + tl.sum(tl.where(before, counts, 0), 0)


@triton.jit
def dynamic_threshold_fwd_kernel(p_x0, p_y, p_threshold, event, quantile, maximum, BLOCK: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * event
    rank = quantile * (event - 1).to(tl.float32)
    first = tl.minimum(rank.to(tl.int32), event - 1)
    second = tl.minimum(tl.ceil(rank).to(tl.int32), event - 1)

    prefix, below = refine(p_x0 + o_row, event, 0, 0, first, 20, 11, BLOCK)
    prefix, below = refine(p_x0 + o_row, event, prefix, below, first, 9, 11, BLOCK)
    prefix, below = refine(p_x0 + o_row, event, prefix, below, first, 0, 9, BLOCK)

    not_more = 0
    largest = 0
    above = 0x7FFFFFFF
    for i_block in range(tl.cdiv(event, BLOCK)):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        bits = magnitude_bits(p_x0 + o_row, o, o < event)
        not_more += tl.sum(((bits <= prefix) & (o < event)).to(tl.int32), 0)
        largest = tl.maximum(largest, tl.max(bits, 0))
        above = tl.minimum(above, tl.min(tl.where((bits > prefix) & (o < event), bits, 0x7FFFFFFF), 0))
    a = prefix.to(tl.float32, bitcast=True)
    b = tl.where(second < not_more, prefix, above).to(tl.float32, bitcast=True)
    weight = rank - first.to(tl.float32)
    s = tl.where(weight < 0.5, tl.fma(weight, b - a, a), tl.fma(weight - 1.0, b - a, b))
    s = tl.minimum(tl.maximum(s, 1.0), maximum)
    s = tl.where(b == float("inf"), maximum, s)  # not the NaN of an infinity interpolated
    s = tl.where(largest > 0x7F800000, float("nan"), s)
    tl.store(p_threshold + tl.program_id(0), s)
    for i_block in range(tl.cdiv(event, BLOCK)):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p_x0 + o_row + o, mask=o < event, other=0.0).to(tl.float32)
        y = tl.div_rn(tl.minimum(tl.maximum(x, -s, tl.PropagateNan.ALL), s, tl.PropagateNan.ALL), s)
        tl.store(p_y + o_row + o, narrow(y, p_y), mask=o < event)


@triton.jit
def dynamic_threshold_bwd_kernel(p_x0, p_threshold, p_grad_y, p_grad_x0, rows, event, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    s = tl.load(p_threshold + i_sample, mask=m_sample, other=1.0)
    inside = tl.abs(tl.load(p_x0 + o, mask=m, other=0.0).to(tl.float32)) <= s
    grad = tl.div_rn(tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32), s + tl.zeros((ROWS, BLOCK), tl.float32))
    tl.store(p_grad_x0 + o, narrow(tl.where(inside, grad, 0.0), p_grad_x0), mask=m)


OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}


def _part(event):
    """Elements of a row that a program takes at a time."""
    return max(16, min(4096, triton.next_power_of_2(event)))


def dynamic_threshold_fwd(rows, event, x0, quantile, maximum, y, threshold):
    if not x0.numel():
        return
    dynamic_threshold_fwd_kernel[(rows,)](x0, y, threshold, event, quantile, maximum, BLOCK=_part(event), **OPTIONS)


def dynamic_threshold_bwd(rows, event, x0, threshold, grad_y, grad_x0):
    if not x0.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)
    dynamic_threshold_bwd_kernel[grid](x0, threshold, grad_y, grad_x0, rows, event, ROWS=ROWS, BLOCK=BLOCK, **options(False))


def static_cases():
    cases = []
    for dtype in TYPES:
        data, size, rows, event = f"*{TYPES[dtype]}", 4 if dtype == "float32" else 2, 64, 12288
        what, part = f"{dtype} {rows}x{event}", _part(event)
        ROWS, BLOCK = tile(rows, event)
        cases += [
            StaticCase(
                dynamic_threshold_fwd_kernel, what,
                {"p_x0": data, "p_y": data, "p_threshold": "*fp32", "event": "i32", "quantile": "fp32", "maximum": "fp32"},
                # five reads of a row, all but the first from the cache, and a write
                {"BLOCK": part}, OPTIONS, elements=event, trips=triton.cdiv(event, part),
                bytes_per_element=6 * size + 4 / event, wide=dtype == "float32",
            ),
            StaticCase(
                dynamic_threshold_bwd_kernel, what,
                {"p_x0": data, "p_threshold": "*fp32", "p_grad_y": data, "p_grad_x0": data, "rows": "i32", "event": "i32"},
                {"ROWS": ROWS, "BLOCK": BLOCK}, options(False), elements=ROWS * BLOCK,
                bytes_per_element=3 * size + 4 / event, wide=dtype == "float32",
            ),
        ]  # fmt: skip
    return cases
