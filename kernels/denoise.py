"""denoise in Triton: one program takes one tile. Tiles whose rows all have S = 0 draw nothing."""

import triton
import triton.language as tl
from fastgen.kernels._launch import key_stride, narrow, options, tile
from fastgen.kernels._philox import normal_tile
from fastgen.kernels._static import LAUNCHES, TYPES, StaticCase


@triton.jit
def denoise_estimate(
    p_x, p_model, p_guidance, p_row, rows, o, o_model, i_sample, m_sample, m, scale, conditional,
    GUIDED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """x, p x + q m before the clamp, and the guidance weight of each row."""
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_model = tl.load(p_model + o_model, mask=m, other=0.0).to(tl.float32)
    b_scale = scale
    if GUIDED:
        if SCALED:
            b_scale = tl.load(p_guidance + i_sample, mask=m_sample, other=0.0)
        b_model += b_scale * (tl.load(p_model + conditional + o_model, mask=m, other=0.0).to(tl.float32) - b_model)
    b_p = tl.load(p_row, mask=m_sample, other=0.0)
    b_q = tl.load(p_row + 1, mask=m_sample, other=0.0)
    return b_x, b_p * b_x + b_q * b_model, b_scale


@triton.jit
def denoise_sigma(p_variance, p_bounds, o, i_sample, m_sample, m, RANGE: tl.constexpr, BOUNDS_STRIDE: tl.constexpr):
    """exp(log_variance / 2)."""
    b_log = tl.load(p_variance + o, mask=m, other=0.0).to(tl.float32)
    if RANGE:
        b_low = tl.load(p_bounds + i_sample * BOUNDS_STRIDE, mask=m_sample, other=0.0)
        b_high = tl.load(p_bounds + i_sample * BOUNDS_STRIDE + 1, mask=m_sample, other=0.0)
        b_log = b_log * (0.5 * (b_high - b_low)) + 0.5 * (b_low + b_high)
    return tl.exp(0.5 * b_log)


@triton.jit
def denoise_noise(
    p_key, p_given, b_S, i_sample, m_sample, i_block, o, m, GIVEN: tl.constexpr, KEY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    b_noise = tl.zeros((ROWS, BLOCK), tl.float32)
    if tl.max((b_S != 0.0).to(tl.int32)) != 0:
        if GIVEN:
            b_noise = tl.load(p_given + o, mask=m & (b_S != 0.0), other=0.0)
        else:
            b_noise = normal_tile(p_key, KEY_STRIDE, i_sample, m_sample, i_block, ROWS, BLOCK, FAST)
            b_noise = tl.where(b_S != 0.0, b_noise, 0.0)
    return b_noise


@triton.jit
def denoise_fwd_kernel(
    p_x, p_model, p_coefficients, p_key, p_given, p_history, p_guidance, p_variance, p_bounds, p_next, p_x0,
    rows, event, model_stride, variance_stride, scale, low, high,
    GUIDED: tl.constexpr, SCALED: tl.constexpr, CLAMPED: tl.constexpr, PAST: tl.constexpr, ROW_STRIDE: tl.constexpr,
    VARIANCE: tl.constexpr, RANGE: tl.constexpr, BOUNDS_STRIDE: tl.constexpr, ESTIMATE: tl.constexpr, GIVEN: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    size = rows.to(tl.int64)
    p_row = p_coefficients + i_sample * ROW_STRIDE
    b_x, b_clean, _ = denoise_estimate(
        p_x, p_model, p_guidance, p_row, rows, o, i_sample * model_stride + o_event, i_sample, m_sample, m, scale,
        size * model_stride, GUIDED, SCALED,
    )  # fmt: skip
    if CLAMPED:
        b_clean = tl.where(b_clean < low, low, b_clean)
        b_clean = tl.where(b_clean > high, high, b_clean)
    b_A = tl.load(p_row + 2, mask=m_sample, other=0.0)
    b_B = tl.load(p_row + 3, mask=m_sample, other=0.0)
    b_S = tl.load(p_row + 4, mask=m_sample, other=0.0)
    b_next = b_A * b_x + b_B * b_clean
    for h in tl.static_range(PAST):
        b_C = tl.load(p_row + 5 + h, mask=m_sample, other=0.0)
        b_next += b_C * tl.load(p_history + h * size * event + o, mask=m, other=0.0).to(tl.float32)
    b_noise = b_S * denoise_noise(p_key, p_given, b_S, i_sample, m_sample, i_block, o, m, GIVEN, KEY_STRIDE, ROWS, BLOCK, FAST)
    if VARIANCE:
        b_sigma = denoise_sigma(
            p_variance, p_bounds, i_sample * variance_stride + o_event, i_sample, m_sample, m, RANGE, BOUNDS_STRIDE
        )
        b_noise = tl.where(b_S != 0.0, b_noise * b_sigma, 0.0)
    tl.store(p_next + o, narrow(b_next + b_noise, p_next), mask=m)
    if ESTIMATE:
        tl.store(p_x0 + o, narrow(b_clean, p_x0), mask=m)


@triton.jit
def denoise_bwd_kernel(
    p_x, p_model, p_coefficients, p_key, p_given, p_guidance, p_variance, p_bounds, p_grad_next, p_grad_x0,
    p_grad_x, p_grad_model, p_grad_history, p_grad_variance, rows, event, model_stride, variance_stride, scale, low, high,
    GUIDED: tl.constexpr, SCALED: tl.constexpr, CLAMPED: tl.constexpr, PAST: tl.constexpr, ROW_STRIDE: tl.constexpr,
    RANGE: tl.constexpr, BOUNDS_STRIDE: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_X0: tl.constexpr, BY_X: tl.constexpr,
    BY_MODEL: tl.constexpr, BY_HISTORY: tl.constexpr, BY_VARIANCE: tl.constexpr, GIVEN: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    size = rows.to(tl.int64)
    p_row = p_coefficients + i_sample * ROW_STRIDE
    _, b_clean, b_scale = denoise_estimate(
        p_x, p_model, p_guidance, p_row, rows, o, i_sample * model_stride + o_event, i_sample, m_sample, m, scale,
        size * model_stride, GUIDED, SCALED,
    )  # fmt: skip
    b_by_next = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_NEXT:
        b_by_next = tl.load(p_grad_next + o, mask=m, other=0.0).to(tl.float32)
    b_by_clean = tl.load(p_row + 3, mask=m_sample, other=0.0) * b_by_next
    if HAS_X0:
        b_by_clean += tl.load(p_grad_x0 + o, mask=m, other=0.0).to(tl.float32)
    if CLAMPED:
        b_by_clean = tl.where((b_clean >= low) & (b_clean <= high), b_by_clean, 0.0)
    if BY_X:
        b_p = tl.load(p_row, mask=m_sample, other=0.0)
        b_A = tl.load(p_row + 2, mask=m_sample, other=0.0)
        tl.store(p_grad_x + o, narrow(b_p * b_by_clean + b_A * b_by_next, p_grad_x), mask=m)
    if BY_MODEL:
        b_by_model = tl.load(p_row + 1, mask=m_sample, other=0.0) * b_by_clean
        if GUIDED:
            tl.store(p_grad_model + o, narrow((1.0 - b_scale) * b_by_model, p_grad_model), mask=m)
            tl.store(p_grad_model + size * event + o, narrow(b_scale * b_by_model, p_grad_model), mask=m)
        else:
            tl.store(p_grad_model + o, narrow(b_by_model, p_grad_model), mask=m)
    if BY_HISTORY:
        for h in tl.static_range(PAST):
            b_C = tl.load(p_row + 5 + h, mask=m_sample, other=0.0)
            tl.store(p_grad_history + h * size * event + o, narrow(b_C * b_by_next, p_grad_history), mask=m)
    if BY_VARIANCE:
        b_S = tl.load(p_row + 4, mask=m_sample, other=0.0)
        b_out = denoise_noise(p_key, p_given, b_S, i_sample, m_sample, i_block, o, m, GIVEN, KEY_STRIDE, ROWS, BLOCK, FAST)
        b_out *= 0.5 * b_S * b_by_next * denoise_sigma(
            p_variance, p_bounds, i_sample * variance_stride + o_event, i_sample, m_sample, m, RANGE, BOUNDS_STRIDE
        )  # fmt: skip
        if RANGE:
            b_low = tl.load(p_bounds + i_sample * BOUNDS_STRIDE, mask=m_sample, other=0.0)
            b_high = tl.load(p_bounds + i_sample * BOUNDS_STRIDE + 1, mask=m_sample, other=0.0)
            b_out *= 0.5 * (b_high - b_low)
        tl.store(p_grad_variance + o, narrow(tl.where(b_S != 0.0, b_out, 0.0), p_grad_variance), mask=m)


def _common(rows, event, coefficients, key, noise, past, guided, guidance, low, high, bounds, fast):
    ROWS, BLOCK = tile(rows, event)
    return {
        "GUIDED": bool(guided),
        "SCALED": guidance is not None,
        "CLAMPED": low > -float("inf") or high < float("inf"),
        "PAST": past,
        "ROW_STRIDE": 0 if coefficients.dim() == 1 else 5 + past,
        "RANGE": bounds is not None,
        "BOUNDS_STRIDE": 0 if bounds is None or bounds.dim() == 1 else 2,
        "GIVEN": noise is not None,
        "KEY_STRIDE": key_stride(key),
        "ROWS": ROWS,
        "BLOCK": BLOCK,
        "FAST": fast,
        **options(fast),
    }


def denoise_fwd(
    rows, event, x, model_out, model_stride, coefficients, key, noise, history, past, guided, guidance, scale, low, high,
    log_variance, variance_stride, bounds, x_next, x0, fast,
):  # fmt: skip
    if not x.numel():
        return
    common = _common(rows, event, coefficients, key, noise, past, guided, guidance, low, high, bounds, fast)
    grid = (triton.cdiv(rows, common["ROWS"]) * triton.cdiv(event, common["BLOCK"]),)
    denoise_fwd_kernel[grid](
        x, model_out, coefficients, key, noise, history, guidance, log_variance, bounds, x_next, x0, rows, event,
        model_stride, variance_stride, scale, low, high, VARIANCE=log_variance is not None, ESTIMATE=x0 is not None, **common,
    )  # fmt: skip


def denoise_bwd(
    rows, event, x, model_out, model_stride, coefficients, key, noise, past, guided, guidance, scale, low, high, log_variance,
    variance_stride, bounds, grad_next, grad_x0, grad_x, grad_model, grad_history, grad_variance, fast,
):  # fmt: skip
    if not x.numel():
        return
    common = _common(rows, event, coefficients, key, noise, past, guided, guidance, low, high, bounds, fast)
    grid = (triton.cdiv(rows, common["ROWS"]) * triton.cdiv(event, common["BLOCK"]),)
    denoise_bwd_kernel[grid](
        x, model_out, coefficients, key, noise, guidance, log_variance, bounds, grad_next, grad_x0, grad_x, grad_model,
        grad_history, grad_variance, rows, event, model_stride, variance_stride, scale, low, high,
        HAS_NEXT=grad_next is not None, HAS_X0=grad_x0 is not None, BY_X=grad_x is not None, BY_MODEL=grad_model is not None,
        BY_HISTORY=grad_history is not None, BY_VARIANCE=grad_variance is not None, **common,
    )  # fmt: skip


def static_cases():
    cases = []
    for dtype, rows, event, fast in LAUNCHES:
        data, size = f"*{TYPES[dtype]}", 4 if dtype == "float32" else 2
        ROWS, BLOCK = tile(rows, event)
        numbers = {"rows": "i32", "event": "i32", "model_stride": "i32", "variance_stride": "i32"}
        numbers |= {"scale": "fp32", "low": "fp32", "high": "fp32"}
        given = {"p_x": data, "p_model": data, "p_coefficients": "*fp32", "p_key": "*i64", "p_given": None}
        absent = {"p_guidance": None, "p_variance": None, "p_bounds": None}
        common = {
            "GUIDED": False, "SCALED": False, "CLAMPED": True, "PAST": 0, "ROW_STRIDE": 5, "RANGE": False, "BOUNDS_STRIDE": 0,
            "GIVEN": False, "KEY_STRIDE": 0, "ROWS": ROWS, "BLOCK": BLOCK, "FAST": fast,
        }  # fmt: skip
        what = f"{dtype} {rows}x{event} {'fast' if fast else 'exact'}"
        backward = {"p_grad_next": data, "p_grad_x0": None, "p_grad_x": data, "p_grad_model": data}
        wanted = {"HAS_NEXT": True, "HAS_X0": False, "BY_X": True, "BY_MODEL": True, "BY_HISTORY": False, "BY_VARIANCE": False}
        # one row of coefficients a sample, and what its noise is drawn from
        cases += [
            StaticCase(
                denoise_fwd_kernel, what, {**given, "p_history": None, **absent, "p_next": data, "p_x0": data, **numbers},
                {"VARIANCE": False, "ESTIMATE": True, **common}, options(fast), elements=ROWS * BLOCK,
                bytes_per_element=4 * size + 32 / event, wide=dtype == "float32",
            ),
            StaticCase(
                denoise_bwd_kernel, what,
                {**given, **absent, **backward, "p_grad_history": None, "p_grad_variance": None, **numbers},
                {**wanted, **common}, options(fast), elements=ROWS * BLOCK, bytes_per_element=5 * size + 20 / event,
                wide=dtype == "float32",
            ),
        ]  # fmt: skip
    return cases
