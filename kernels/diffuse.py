"""diffuse in Triton: one program noises one tile; the backward pass is a tile of two multiply-adds."""

import triton
import triton.language as tl
from fastgen.kernels._launch import key_stride, narrow, options, tile
from fastgen.kernels._philox import normal_tile


@triton.jit
def in_memory(o_event, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Where elements counted in logical order lie within their sample."""
    if CHANNELS_LAST:
        o_event = o_event % pixels * channels + o_event // pixels
    return o_event


@triton.jit
def coefficient(p_coefficients, COLUMN: tl.constexpr, STRIDE: tl.constexpr, i_sample, m_sample):
    """One column [ROWS, 1] of the rows of samples i_sample [ROWS, 1]."""
    return tl.load(p_coefficients + i_sample * STRIDE + COLUMN, mask=m_sample, other=0.0)


@triton.jit
def diffuse_fwd_kernel(
    p_x0, p_coefficients, p_key, p_given, p_x_t, p_target, rows, event, channels, pixels,
    GIVEN: tl.constexpr, TARGET: tl.constexpr, CHANNELS_LAST: tl.constexpr, STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + in_memory(o_event, channels, pixels, CHANNELS_LAST), m_sample & (o_event < event)
    b_x0 = tl.load(p_x0 + o, mask=m, other=0.0).to(tl.float32)
    if GIVEN:
        b_noise = tl.load(p_given + o, mask=m, other=0.0)
    else:
        b_noise = normal_tile(p_key, KEY_STRIDE, i_sample, m_sample, i_block, ROWS, BLOCK, FAST)
    b_a = coefficient(p_coefficients, 0, STRIDE, i_sample, m_sample)
    b_b = coefficient(p_coefficients, 1, STRIDE, i_sample, m_sample)
    tl.store(p_x_t + o, narrow(b_a * b_x0 + b_b * b_noise, p_x_t), mask=m)
    if TARGET:
        b_c = coefficient(p_coefficients, 2, STRIDE, i_sample, m_sample)
        b_d = coefficient(p_coefficients, 3, STRIDE, i_sample, m_sample)
        tl.store(p_target + o, narrow(b_c * b_x0 + b_d * b_noise, p_target), mask=m)


@triton.jit
def diffuse_bwd_kernel(
    p_coefficients, p_grad_x_t, p_grad_target, p_grad_x0, rows, event,
    HAS_X_T: tl.constexpr, HAS_TARGET: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    b_grad = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_X_T:
        b_a = coefficient(p_coefficients, 0, STRIDE, i_sample, m_sample)
        b_grad += b_a * tl.load(p_grad_x_t + o, mask=m, other=0.0).to(tl.float32)
    if HAS_TARGET:
        b_c = coefficient(p_coefficients, 2, STRIDE, i_sample, m_sample)
        b_grad += b_c * tl.load(p_grad_target + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_grad_x0 + o, narrow(b_grad, p_grad_x0), mask=m)


def row_stride(coefficients):
    """0 if one row serves all samples, else the length of a row."""
    return 0 if coefficients.dim() == 1 else coefficients.shape[1]


def layout(event, channels, given):
    """(channels, pixels, CHANNELS_LAST); given noise lies as the samples do, so that their order does not matter."""
    return (channels, event // channels, True) if channels and given is None else (1, event, False)


def diffuse_fwd(rows, event, channels, x0, coefficients, key, given, x_t, target, fast):
    if not x0.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    channels, pixels, CHANNELS_LAST = layout(event, channels, given)
    diffuse_fwd_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)](
        x0, coefficients, key, given, x_t, target, rows, event, channels, pixels,
        GIVEN=given is not None, TARGET=target is not None, CHANNELS_LAST=CHANNELS_LAST, STRIDE=row_stride(coefficients),
        KEY_STRIDE=key_stride(key), ROWS=ROWS, BLOCK=BLOCK, FAST=fast, **options(fast),
    )  # fmt: skip


def diffuse_bwd(rows, event, coefficients, grad_x_t, grad_target, grad_x0):
    if not grad_x0.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    diffuse_bwd_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)](
        coefficients, grad_x_t, grad_target, grad_x0, rows, event,
        HAS_X_T=grad_x_t is not None, HAS_TARGET=grad_target is not None, STRIDE=row_stride(coefficients), ROWS=ROWS,
        BLOCK=BLOCK, **options(fast=True),
    )  # fmt: skip
