"""rq_spline in Triton: one program takes a group of rows from end to end, so that the log-determinant has a fixed order.

Elements stand along the first axis of a tile and their bins along the second, so that parameters load contiguously.
"""

import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET, narrow
from fastgen.kernels._static import TYPES, StaticCase

LEAST = tl.constexpr(1e-3)
UNIT_SLOPE = tl.constexpr(0.5397424172369522)
SOFT_CLIP = tl.constexpr(0.14476482730108395)

VALUES = 65536 if INTERPRET else 512
"""Parameters of one kind in a tile: 4 a thread, so that nothing spills. The interpreter pays by the program."""


@triton.jit
def _shares(p, o, m, bins: tl.constexpr, o_bin, ZUKO: tl.constexpr):
    """Shares of the bins by softmax, and the factors of zuko's soft clip."""
    b_raw = tl.load(p + o[:, None] * bins + o_bin[None, :], mask=m[:, None] & (o_bin < bins)[None, :], other=0.0).to(tl.float32)
    b_clip = 1.0 / (1.0 + 2.0 * SOFT_CLIP * tl.abs(b_raw)) if ZUKO else b_raw
    b_value = b_raw * b_clip if ZUKO else b_raw
    b_value = tl.where((o_bin < bins)[None, :], b_value, -float("inf"))
    b_exp = tl.exp(b_value - tl.max(b_value, axis=1, keep_dims=True))
    return b_exp / tl.sum(b_exp, axis=1, keep_dims=True), b_clip


@triton.jit
def _lengths(b_shares, bins: tl.constexpr, o_bin, bound, ZUKO: tl.constexpr):
    """Lengths of the bins, and the lower knot of each; nothing beyond the last bin."""
    b_length = 2.0 * bound * (b_shares if ZUKO else LEAST + (1.0 - LEAST * bins) * b_shares)
    b_length = tl.where((o_bin < bins)[None, :], b_length, 0.0)
    return b_length, tl.cumsum(b_length, axis=1) - b_length - bound


@triton.jit
def _pick(b, m_here):
    return tl.sum(tl.where(m_here, b, 0.0), axis=1)


@triton.jit
def _derivative(p, o, m, bins: tl.constexpr, i_knot, ZUKO: tl.constexpr):
    """The derivative at a knot, and its own derivative in the parameter."""
    m_inner = m & (i_knot >= 0) & (i_knot < bins - 1)
    b_raw = tl.load(p + o * (bins - 1) + i_knot, mask=m_inner, other=0.0).to(tl.float32)
    if ZUKO:
        b_factor = 1.0 / (1.0 + SOFT_CLIP * tl.abs(b_raw))
        b_derivative = tl.exp(b_raw * b_factor)
        b_slope = b_derivative * b_factor * b_factor
    else:
        b_raw = tl.where(m & (m_inner == 0), UNIT_SLOPE, b_raw)
        b_exp = tl.exp(-tl.abs(b_raw))
        b_rounded = 1.0 + b_exp
        b_log1p = tl.where(
            b_rounded == 1.0, b_exp, tl.log(b_rounded) * b_exp / tl.where(b_rounded == 1.0, 1.0, b_rounded - 1.0)
        )
        b_derivative = LEAST + tl.where(b_raw > 0.0, b_raw, 0.0) + b_log1p
        b_slope = tl.where(b_raw >= 0.0, 1.0, b_exp) / b_rounded
    return b_derivative, b_slope


@triton.jit
def _locate(
    p_widths, p_heights, p_derivatives, b_given, o, m, bins: tl.constexpr, bound,
    INVERSE: tl.constexpr, ZUKO: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The result, dy/dx, the bin of each element and the element within it: fastgen/ops/rq_spline.py has the formulas."""
    o_bin = tl.arange(0, BINS)
    b_shares_x, b_clip_x = _shares(p_widths, o, m, bins, o_bin, ZUKO)
    b_shares_y, b_clip_y = _shares(p_heights, o, m, bins, o_bin, ZUKO)
    b_width, b_left = _lengths(b_shares_x, bins, o_bin, bound, ZUKO)
    b_height, b_low = _lengths(b_shares_y, bins, o_bin, bound, ZUKO)
    b_knot = b_low if INVERSE else b_left
    m_reached = b_knot < b_given[:, None] if ZUKO else b_knot <= b_given[:, None]
    m_reached = m_reached & (o_bin > 0)[None, :] & (o_bin < bins)[None, :]
    i_bin = tl.sum(m_reached.to(tl.int32), axis=1)
    m_here = o_bin[None, :] == i_bin[:, None]
    x0, w, y0, h = _pick(b_left, m_here), _pick(b_width, m_here), _pick(b_low, m_here), _pick(b_height, m_here)
    d0, u0 = _derivative(p_derivatives, o, m, bins, i_bin - 1, ZUKO)
    d1, u1 = _derivative(p_derivatives, o, m, bins, i_bin, ZUKO)

    # the last bin is measured from its end, which is at the bound exactly
    m_last = i_bin == bins - 1
    b_from, b_length = (y0, h) if INVERSE else (x0, w)
    b_part = tl.where(m_last, bound - b_given, b_given - b_from) / b_length
    b_near = tl.where(b_part < 0.0, 0.0, tl.where(b_part > 1.0, 1.0, b_part))
    theta = tl.where(m_last, 1.0 - b_near, b_near)
    phi = tl.where(m_last, b_near, 1.0 - b_near)
    s = h / w
    if INVERSE:
        b_difference = d0 * phi - d1 * theta
        b_root = tl.sqrt(b_difference * b_difference + 4.0 * s * s * theta * phi) + tl.abs(b_difference)
        m_rising = b_difference < 0.0
        b_small = 2.0 * s * tl.where(m_rising, phi, theta)
        b_major, b_minor = b_root / (b_root + b_small), b_small / (b_root + b_small)
        theta = tl.where(m_rising, b_major, b_minor)
        phi = tl.where(m_rising, b_minor, b_major)
    b_numerator = theta * (s * theta + d0 * phi)
    b_rest = phi * (s * phi + d1 * theta)
    b_per = 1.0 / (b_numerator + b_rest)
    b_curve = d1 * theta * theta + 2.0 * s * theta * phi + d0 * phi * phi
    b_slope = b_curve * (s * b_per) * (s * b_per)
    if INVERSE:
        b_out = tl.where(m_last, bound - w * phi, x0 + w * theta)
    else:
        b_out = tl.where(m_last, bound - h * b_rest * b_per, y0 + h * b_numerator * b_per)
    normalised = (b_shares_x, b_clip_x, b_shares_y, b_clip_y)
    return b_out, b_slope, normalised, i_bin, w, h, s, d0, d1, u0, u1, theta, phi, b_numerator, b_rest, b_per, b_curve


@triton.jit
def _outside(b_given, bound, ZUKO: tl.constexpr):
    below = b_given <= -bound if ZUKO else b_given < -bound
    return below | (b_given > bound)


@triton.jit
def rq_spline_fwd_kernel(
    p_x, p_widths, p_heights, p_derivatives, p_y, p_log_det, rows, event, bound,
    INVERSE: tl.constexpr, ZUKO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, bins: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    i_element = tl.arange(0, ROWS * BLOCK)
    i_sample = tl.program_id(0).to(tl.int64) * ROWS + i_element // BLOCK
    b_log_det = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_block in range(tl.cdiv(event, BLOCK)):
        o_event = i_block * BLOCK + i_element % BLOCK
        o, m = i_sample * event + o_event, (i_sample < rows) & (o_event < event)
        b_given = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
        m_tail = _outside(b_given, bound, ZUKO)
        element = _locate(p_widths, p_heights, p_derivatives, b_given, o, m, bins, bound, INVERSE, ZUKO, BINS)
        b_out, b_slope = element[0], element[1]
        tl.store(p_y + o, narrow(tl.where(m_tail, b_given, b_out), p_y), mask=m)
        b_log = tl.where(m & (m_tail == 0), tl.log(b_slope), 0.0)
        b_log_det += tl.reshape(-b_log if INVERSE else b_log, (ROWS, BLOCK))
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(p_log_det + i_row, tl.sum(b_log_det, axis=1), mask=i_row < rows)


@triton.jit
def _through_softmax(
    p_grad, o, m, bins: tl.constexpr, o_bin, i_bin, b_shares, b_clip, b_from, b_length, bound, ZUKO: tl.constexpr
):  # fmt: skip
    """Stores gradients of the parameters: a bin below moves the lower knot, the bin itself its own length."""
    i = i_bin[:, None]
    b_by = tl.where(o_bin[None, :] < i, b_from[:, None], tl.where(o_bin[None, :] == i, b_length[:, None], 0.0))
    b_by *= 2.0 * bound if ZUKO else 2.0 * bound * (1.0 - LEAST * bins)
    b_by = b_shares * (b_by - tl.sum(b_shares * b_by, axis=1, keep_dims=True))
    if ZUKO:
        b_by *= b_clip * b_clip
    m_all = m[:, None] & (o_bin < bins)[None, :]
    tl.store(p_grad + o[:, None] * bins + o_bin[None, :], narrow(b_by, p_grad), mask=m_all)


@triton.jit
def rq_spline_bwd_kernel(
    p_x, p_widths, p_heights, p_derivatives, p_grad_y, p_grad_log_det, p_rebuilt, p_grad_x, p_grad_widths, p_grad_heights,
    p_grad_derivatives, elements, event, bound,
    HAS_Y: tl.constexpr, HAS_LOG_DET: tl.constexpr, INVERSE: tl.constexpr, REBUILD: tl.constexpr, ZUKO: tl.constexpr,
    BLOCK: tl.constexpr, bins: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """REBUILD, with INVERSE: x is the output of the spline; its input and the gradients of the spline there are stored."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_given = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    m_tail = _outside(b_given, bound, ZUKO)
    b_outer = b_given
    b_given = tl.where(m_tail, 0.0, b_given)
    b_by_out = tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32) if HAS_Y else tl.zeros((BLOCK,), tl.float32)
    b_by_log = tl.load(p_grad_log_det + o // event, mask=m, other=0.0) if HAS_LOG_DET else tl.zeros((BLOCK,), tl.float32)
    b_out, b_slope, normalised, i_bin, w, h, s, d0, d1, u0, u1, theta, phi, b_numerator, b_rest, b_per, b_curve = _locate(
        p_widths, p_heights, p_derivatives, b_given, o, m, bins, bound, INVERSE, ZUKO, BINS
    )
    a, b = tl.where(m_tail, 0.0, b_by_out), tl.where(m_tail, 0.0, b_by_log)

    q, skew = theta * phi, phi - theta
    b_log_theta = 2.0 * ((d1 * theta - d0 * phi + s * skew) / b_curve - (d0 + d1 - 2.0 * s) * skew * b_per)
    b_log_s = 2.0 * q * ((d0 + d1) * b_per / s + 1.0 / b_curve)
    b_log_d0 = phi * phi / b_curve - 2.0 * q * b_per
    b_log_d1 = theta * theta / b_curve - 2.0 * q * b_per
    b_rise = b_slope * w
    if REBUILD:
        tl.store(p_rebuilt + o, narrow(tl.where(m_tail, b_outer, b_out), p_rebuilt), mask=m)
    if INVERSE and not REBUILD:  # the implicit function theorem
        b_by_theta = -a * w
        b = -b
        b_by_x = (b * b_log_theta - b_by_theta) / b_rise
        a = -b_by_x
    else:
        b_by_theta = a * b_rise + b * b_log_theta
        b_by_x = b_by_theta / w
    tl.store(p_grad_x + o, narrow(tl.where(m_tail, b_by_out, b_by_x), p_grad_x), mask=m)
    b_scaled = a * h * q * b_per * b_per
    b_by_s = b_scaled * (d1 * theta * theta - d0 * phi * phi) + b * b_log_s
    b_by_u0 = u0 * (b_scaled * b_rest + b * b_log_d0)
    b_by_u1 = u1 * (b * b_log_d1 - b_scaled * b_numerator)
    b_by_height = a * b_numerator * b_per + b_by_s / w
    b_by_width = -(b_by_s * s + b_by_theta * theta) / w

    o_bin = tl.arange(0, BINS)
    b_shares_x, b_clip_x, b_shares_y, b_clip_y = normalised
    _through_softmax(p_grad_widths, o, m, bins, o_bin, i_bin, b_shares_x, b_clip_x, -b_by_theta / w, b_by_width, bound, ZUKO)
    _through_softmax(p_grad_heights, o, m, bins, o_bin, i_bin, b_shares_y, b_clip_y, a, b_by_height, bound, ZUKO)
    i_knot = o_bin[None, :] + 1  # parameter j belongs to knot j + 1
    b_by_u = tl.where(i_knot == i_bin[:, None], b_by_u0[:, None], tl.where(i_knot == i_bin[:, None] + 1, b_by_u1[:, None], 0.0))
    p = p_grad_derivatives + o[:, None] * (bins - 1) + o_bin[None, :]
    tl.store(p, narrow(b_by_u, p_grad_derivatives), mask=m[:, None] & (o_bin < bins - 1)[None, :])


def tile(rows, event, bins):
    """(ROWS, BLOCK, BINS) of a tile over [rows, event, bins], powers of two."""
    columns = triton.next_power_of_2(bins)
    elements = max(32, VALUES // columns)
    block = min(elements, triton.next_power_of_2(max(event, 1)))
    return min(elements // block, triton.next_power_of_2(max(rows, 1))), block, columns


def rq_spline_fwd(rows, event, bins, x, widths, heights, derivatives, y, log_det, bound, inverse, zuko):
    if not rows:
        return
    ROWS, BLOCK, BINS = tile(rows, event, bins)
    rq_spline_fwd_kernel[(triton.cdiv(rows, ROWS),)](
        x, widths, heights, derivatives, y, log_det, rows, event, bound,
        INVERSE=inverse, ZUKO=zuko, ROWS=ROWS, BLOCK=BLOCK, bins=bins, BINS=BINS, num_warps=4,
    )  # fmt: skip


def rq_spline_bwd(
    rows, event, bins, x, widths, heights, derivatives, grad_y, grad_log_det, grad_x, grad_widths, grad_heights,
    grad_derivatives, bound, inverse, zuko, rebuilt=None,
):  # fmt: skip
    if not x.numel():
        return
    _, BLOCK, BINS = tile(1, rows * event, bins)
    rq_spline_bwd_kernel[(triton.cdiv(rows * event, BLOCK),)](
        x, widths, heights, derivatives, grad_y, grad_log_det, rebuilt, grad_x, grad_widths, grad_heights, grad_derivatives,
        rows * event, event, bound,
        HAS_Y=grad_y is not None, HAS_LOG_DET=grad_log_det is not None, INVERSE=inverse, REBUILD=rebuilt is not None,
        ZUKO=zuko, BLOCK=BLOCK, bins=bins, BINS=BINS, num_warps=4,
    )  # fmt: skip


def backward_case(dtype, inverse, rebuild=False):
    """What the static report compiles of the backward kernel."""
    data, size, rows, event, bins = f"*{TYPES[dtype]}", 4 if dtype == "float32" else 2, 4096, 32, 8
    _, BLOCK, BINS = tile(1, rows * event, bins)
    names = ("p_x", "p_widths", "p_heights", "p_derivatives")
    arguments = {**dict.fromkeys(names, data), "p_grad_y": data, "p_grad_log_det": "*fp32"}
    arguments["p_rebuilt"] = data if rebuild else None
    arguments |= {f"p_grad_{name[2:]}": data for name in names}
    flags = {"HAS_Y": True, "HAS_LOG_DET": True, "INVERSE": inverse, "REBUILD": rebuild, "ZUKO": False}
    return StaticCase(
        rq_spline_bwd_kernel,
        f"{dtype} {rows}x{event}, {bins} bins{', rebuilding' if rebuild else ', inverse' if inverse else ''}",
        {**arguments, "elements": "i32", "event": "i32", "bound": "fp32"},
        {**flags, "BLOCK": BLOCK, "bins": bins, "BINS": BINS},
        {"num_warps": 4},
        elements=BLOCK,
        bytes_per_element=2 * (3 * bins - 1) * size + (4 if rebuild else 3) * size + 4 / event,
    )


def static_cases():
    cases = []
    for dtype in TYPES:
        for inverse in (False, True):
            data, size, rows, event, bins = f"*{TYPES[dtype]}", 4 if dtype == "float32" else 2, 4096, 32, 8
            ROWS, BLOCK, BINS = tile(rows, event, bins)
            what = f"{dtype} {rows}x{event}, {bins} bins{', inverse' if inverse else ''}"
            inputs = dict.fromkeys(("p_x", "p_widths", "p_heights", "p_derivatives"), data)
            common = {"INVERSE": inverse, "ZUKO": False, "bins": bins, "BINS": BINS}
            parameters = (3 * bins - 1) * size
            cases.append(
                StaticCase(
                    rq_spline_fwd_kernel,
                    what,
                    {**inputs, "p_y": data, "p_log_det": "*fp32", "rows": "i32", "event": "i32", "bound": "fp32"},
                    {**common, "ROWS": ROWS, "BLOCK": BLOCK},
                    {"num_warps": 4},
                    elements=ROWS * BLOCK * triton.cdiv(event, BLOCK),
                    trips=triton.cdiv(event, BLOCK),
                    bytes_per_element=parameters + 2 * size + 4 / event,
                )
            )
            cases.append(backward_case(dtype, inverse))
    return cases
