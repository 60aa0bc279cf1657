"""affine_coupling in Triton: one program takes a group of rows from end to end, so that their sums have a fixed order."""

import triton
import triton.language as tl
from fastgen.kernels._launch import narrow, options, tile
from fastgen.kernels._static import TYPES, StaticCase

UNBOUNDED, TANH, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def log1p_small(x):
    """log(1 + x) for x in [0, 1]; where 1 + x rounds, the quotient makes up for it."""
    sum_ = 1.0 + x
    return tl.where(sum_ == 1.0, x, tl.log(sum_) * (x / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))


@triton.jit
def coupling_scale(b_raw, BOUND: tl.constexpr, INVERSE: tl.constexpr):
    """Log-scale, factor (the scale, or its reciprocal for the inverse) and derivative of the log-scale by the raw value."""
    if BOUND == UNBOUNDED:
        b_log = b_raw
        b_slope = tl.zeros_like(b_raw) + 1.0
    elif BOUND == TANH:
        b_square = b_raw * b_raw
        b_e = tl.exp(-2.0 * tl.abs(b_raw))
        b_large = (1.0 - b_e) / (1.0 + b_e)
        b_small = -17.0 / 315.0 + b_square * (62.0 / 2835.0)
        b_small = b_raw + b_raw * b_square * (-1.0 / 3.0 + b_square * (2.0 / 15.0 + b_square * b_small))
        b_log = tl.where(b_square < 0.0625, b_small, tl.where(b_raw < 0.0, -b_large, b_large))
        b_slope = 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    else:
        b_t = b_raw + 2.0
        # e^-|t|, where the rounding of t does not enter
        b_e = tl.where(b_t < 0.0, tl.exp(tl.minimum(b_raw, 0.0)) * 7.38905609893065, tl.exp(-b_raw) * 0.1353352832366127)
        b_log = tl.minimum(b_t, 0.0) - log1p_small(b_e)
        b_slope = tl.where(b_t < 0.0, 1.0, b_e) / (1.0 + b_e)
    if BOUND == SIGMOID:
        b_share = tl.where(b_t < 0.0, b_e, 1.0)
        b_factor = (1.0 + b_e) / b_share if INVERSE else b_share / (1.0 + b_e)
    else:
        b_factor = tl.exp(-b_log if INVERSE else b_log)
    return b_log, b_factor, b_slope


@triton.jit
def affine_coupling_fwd_kernel(
    p_x, p_shift, p_log_scale, p_y, p_log_det, rows, event,
    BOUND: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    b_total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_block in range(tl.cdiv(event, BLOCK)):
        o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
        o, m = i_sample * event + o_event, m_sample & (o_event < event)
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + o, mask=m, other=0.0).to(tl.float32)
        b_raw = tl.load(p_log_scale + o, mask=m, other=0.0).to(tl.float32)
        b_log, b_factor, _ = coupling_scale(b_raw, BOUND, INVERSE)
        b_y = (b_x - b_shift) * b_factor if INVERSE else b_x * b_factor + b_shift
        tl.store(p_y + o, narrow(b_y, p_y), mask=m)
        b_total += tl.where(m, b_log, 0.0)
    b_log_det = tl.sum(b_total, axis=1, keep_dims=True)
    tl.store(p_log_det + i_sample, -b_log_det if INVERSE else b_log_det, mask=m_sample)


@triton.jit
def affine_coupling_bwd_kernel(
    p_x, p_shift, p_log_scale, p_grad_y, p_grad_log_det, p_grad_x, p_grad_shift, p_grad_log_scale, rows, event,
    BOUND: tl.constexpr, INVERSE: tl.constexpr, HAS_Y: tl.constexpr, HAS_LOG_DET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    b_raw = tl.load(p_log_scale + o, mask=m, other=0.0).to(tl.float32)
    _, b_factor, b_slope = coupling_scale(b_raw, BOUND, INVERSE)
    b_by_x = tl.zeros((ROWS, BLOCK), tl.float32)
    b_by_log = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_LOG_DET:
        b_by_log += tl.load(p_grad_log_det + i_sample, mask=m_sample, other=0.0)
    if HAS_Y:
        b_by_x += tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32) * b_factor
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        if INVERSE:
            b_x -= tl.load(p_shift + o, mask=m, other=0.0).to(tl.float32)
        b_by_log += b_by_x * b_x
    if INVERSE:
        b_by_log = -b_by_log
        tl.store(p_grad_shift + o, narrow(-b_by_x, p_grad_shift), mask=m)
    tl.store(p_grad_x + o, narrow(b_by_x, p_grad_x), mask=m)
    tl.store(p_grad_log_scale + o, narrow(b_by_log * b_slope, p_grad_log_scale), mask=m)


def affine_coupling_fwd(rows, event, x, shift, log_scale, y, log_det, bound, inverse):
    if not rows:
        return
    ROWS, BLOCK = tile(rows, event)
    affine_coupling_fwd_kernel[(triton.cdiv(rows, ROWS),)](
        x, shift, log_scale, y, log_det, rows, event, BOUND=bound, INVERSE=inverse, ROWS=ROWS, BLOCK=BLOCK, **options(True)
    )


def affine_coupling_bwd(rows, event, x, shift, log_scale, grad_y, grad_log_det, grad_x, grad_shift, grad_log_scale, bound):
    if not x.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)
    affine_coupling_bwd_kernel[grid](
        x, shift, log_scale, grad_y, grad_log_det, grad_x, grad_shift, grad_log_scale, rows, event,
        BOUND=bound, INVERSE=grad_shift is not None, HAS_Y=grad_y is not None, HAS_LOG_DET=grad_log_det is not None,
        ROWS=ROWS, BLOCK=BLOCK, **options(True),
    )  # fmt: skip


def static_cases():
    cases = []
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for rows, event in ((4096, 4096), (8192, 256)):
            ROWS, BLOCK = tile(rows, event)
            trips = triton.cdiv(event, BLOCK)
            sizes = {"rows": "i32", "event": "i32"}
            for bound, inverse in ((0, False), (1, False), (2, False), (2, True)):
                what = f"{dtype} {event} a row, bound {bound}{', inverse' if inverse else ''}"
                common = {"BOUND": bound, "INVERSE": inverse, "ROWS": ROWS, "BLOCK": BLOCK}
                forward = {"p_x": data, "p_shift": data, "p_log_scale": data, "p_y": data, "p_log_det": "*fp32", **sizes}
                only_inverse = data if inverse else None
                backward = {"p_x": data, "p_shift": only_inverse, "p_log_scale": data, "p_grad_y": data}
                backward |= {"p_grad_log_det": "*fp32", "p_grad_x": data, "p_grad_shift": only_inverse}
                backward |= {"p_grad_log_scale": data, **sizes}
                cases += [
                    StaticCase(
                        affine_coupling_fwd_kernel, what, forward, common, options(True), elements=ROWS * BLOCK * trips,
                        trips=trips, bytes_per_element=4 * size + 4 / event, wide=dtype == "float32",
                    ),
                    StaticCase(
                        affine_coupling_bwd_kernel, what, backward, {"HAS_Y": True, "HAS_LOG_DET": True, **common},
                        options(True), elements=ROWS * BLOCK, bytes_per_element=(7 if inverse else 5) * size + 4 / event,
                        wide=dtype == "float32",
                    ),
                ]  # fmt: skip
    return cases
