"""diffusion_loss in Triton: one program sums one tile; long rows leave partial sums, which are added in a fixed order."""

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import key_stride, narrow, options, tile
from fastgen.kernels._philox import normal_tile
from fastgen.kernels._static import TYPES, StaticCase
from fastgen.kernels.diffuse import coefficient, in_memory, layout, row_stride


@triton.jit
def row_weight(p_weight, WEIGHTED: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, i_sample, m_sample, scale):
    """scale [ROWS, 1], times the weight of each sample where there are any."""
    b_weight = tl.zeros(i_sample.shape, tl.float32) + scale
    if WEIGHTED:
        b_weight *= tl.load(p_weight + i_sample * WEIGHT_STRIDE, mask=m_sample, other=0.0)
    return b_weight


@triton.jit
def diffusion_loss_fwd_kernel(
    p_model_out, p_x0, p_coefficients, p_key, p_given, p_weight, p_loss, p_slope, rows, event, channels, pixels, scale, delta,
    GIVEN: tl.constexpr, KEEP: tl.constexpr, HUBER: tl.constexpr, WEIGHTED: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + in_memory(o_event, channels, pixels, CHANNELS_LAST), m_sample & (o_event < event)
    b_model_out = tl.load(p_model_out + o, mask=m, other=0.0).to(tl.float32)
    b_x0 = tl.load(p_x0 + o, mask=m, other=0.0).to(tl.float32)
    if GIVEN:
        b_noise = tl.load(p_given + o, mask=m, other=0.0)
    else:
        b_noise = normal_tile(p_key, KEY_STRIDE, i_sample, m_sample, i_block, ROWS, BLOCK, FAST)
    b_c = coefficient(p_coefficients, 2, STRIDE, i_sample, m_sample)
    b_d = coefficient(p_coefficients, 3, STRIDE, i_sample, m_sample)
    b_error = b_model_out - b_d * b_noise - b_c * b_x0
    if HUBER:
        # by comparisons, which leave a NaN as it is
        b_slope = tl.where(b_error > delta, delta, tl.where(b_error < -delta, -delta, b_error))
        b_each = b_slope * (b_error - 0.5 * b_slope)
    else:
        b_slope = b_error
        b_each = b_error * b_error
    if KEEP:
        tl.store(p_slope + o, b_slope, mask=m)
    b_weight = row_weight(p_weight, WEIGHTED, WEIGHT_STRIDE, i_sample, m_sample, scale)
    b_loss = b_weight * tl.sum(tl.where(m, b_each, 0.0), axis=1, keep_dims=True)
    tl.store(p_loss + i_sample * blocks + i_block, b_loss, mask=m_sample)


@triton.jit
def diffusion_loss_bwd_kernel(
    p_slope, p_coefficients, p_weight, p_grad_loss, p_grad_model_out, p_grad_x0, rows, event, scale,
    WITH_X0: tl.constexpr, WEIGHTED: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    b_weight = row_weight(p_weight, WEIGHTED, WEIGHT_STRIDE, i_sample, m_sample, scale)
    b_factor = b_weight * tl.load(p_grad_loss + i_sample, mask=m_sample, other=0.0)
    b_slope = tl.load(p_slope + o, mask=m, other=0.0)
    tl.store(p_grad_model_out + o, narrow(b_factor * b_slope, p_grad_model_out), mask=m)
    if WITH_X0:
        b_c = coefficient(p_coefficients, 2, STRIDE, i_sample, m_sample)
        tl.store(p_grad_x0 + o, narrow(-b_c * b_factor * b_slope, p_grad_x0), mask=m)


def weight_constants(weight):
    return {"WEIGHTED": weight is not None, "WEIGHT_STRIDE": 0 if weight is None else weight.dim()}


def diffusion_loss_fwd(
    rows, event, channels, model_out, x0, coefficients, key, given, weight, scale, huber, delta, loss, slope, fast
):
    if not model_out.numel():
        loss.fill_(float("nan"))
        return
    ROWS, BLOCK = tile(rows, event)
    blocks = triton.cdiv(event, BLOCK)
    sums = loss if blocks == 1 else loss.new_empty(rows, blocks)
    channels, pixels, CHANNELS_LAST = layout(event, channels, given)
    diffusion_loss_fwd_kernel[(triton.cdiv(rows, ROWS) * blocks,)](
        model_out, x0, coefficients, key, given, weight, sums, slope, rows, event, channels, pixels, scale, delta,
        GIVEN=given is not None, KEEP=slope is not None, HUBER=huber, **weight_constants(weight), CHANNELS_LAST=CHANNELS_LAST,
        STRIDE=row_stride(coefficients), KEY_STRIDE=key_stride(key), ROWS=ROWS, BLOCK=BLOCK, FAST=fast, **options(fast),
    )  # fmt: skip
    if blocks > 1:
        torch.sum(sums, 1, out=loss)


def diffusion_loss_bwd(rows, event, slope, coefficients, weight, scale, grad_loss, grad_model_out, grad_x0):
    if not slope.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    diffusion_loss_bwd_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)](
        slope, coefficients, weight, grad_loss, grad_model_out, grad_x0, rows, event, scale,
        WITH_X0=grad_x0 is not None, **weight_constants(weight), STRIDE=row_stride(coefficients), ROWS=ROWS, BLOCK=BLOCK,
        **options(fast=True),
    )  # fmt: skip


def static_cases():
    cases = []
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for rows, event in ((4096, 4096), (8192, 256)):
            ROWS, BLOCK = tile(rows, event)
            per_row = 1 / min(event, BLOCK)
            forward = {"p_model_out": data, "p_x0": data, "p_coefficients": "*fp32", "p_key": "*i64", "p_given": None}
            forward |= {"p_weight": "*fp32", "p_loss": "*fp32", "p_slope": "*fp32", "rows": "i32", "event": "i32"}
            forward |= {"channels": "i32", "pixels": "i32", "scale": "fp32", "delta": "fp32"}
            weights = {"WEIGHTED": True, "WEIGHT_STRIDE": 1, "STRIDE": 4, "ROWS": ROWS, "BLOCK": BLOCK}
            numbers = frozenset({"scale", "delta"})
            for fast in (False, True):
                what = f"{dtype} {event} a row, {'fast' if fast else 'exact'}"
                constants = {
                    "GIVEN": False,
                    "KEEP": True,
                    "HUBER": False,
                    "CHANNELS_LAST": False,
                    "KEY_STRIDE": 0,
                    "FAST": fast,
                }
                cases.append(
                    StaticCase(
                        diffusion_loss_fwd_kernel, what, forward, {**constants, **weights}, options(fast),
                        elements=ROWS * BLOCK, bytes_per_element=2 * size + 4 + 48 * per_row, unaligned=numbers,
                        wide=dtype == "float32",
                    )
                )  # fmt: skip
            backward = {"p_slope": "*fp32", "p_coefficients": "*fp32", "p_weight": "*fp32", "p_grad_loss": "*fp32"}
            backward |= {"p_grad_model_out": data, "p_grad_x0": None, "rows": "i32", "event": "i32", "scale": "fp32"}
            cases.append(
                StaticCase(
                    diffusion_loss_bwd_kernel, f"{dtype} {event} a row", backward, {"WITH_X0": False, **weights},
                    options(True), elements=ROWS * BLOCK, bytes_per_element=size + 4 + 8 * per_row, unaligned=numbers,
                    wide=dtype == "float32",
                )
            )  # fmt: skip
    return cases
