"""reparameterize in Triton: one program takes a group of rows from end to end, so that the KL sum has a fixed order."""

import triton
import triton.language as tl
from fastgen.kernels._launch import key_stride, narrow, options, tile
from fastgen.kernels._philox import normal_tile
from fastgen.kernels._static import LAUNCHES, TYPES, StaticCase


@triton.jit
def reparameterize_fwd_kernel(
    p_mean, p_log_var, p_key, p_given, p_z, p_kl, p_kept, rows, event,
    GIVEN: tl.constexpr, KEEP: tl.constexpr, KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    b_kl = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_block in range(tl.cdiv(event, BLOCK)):
        o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
        o, m = i_sample * event + o_event, m_sample & (o_event < event)
        b_mean = tl.load(p_mean + o, mask=m, other=0.0).to(tl.float32)
        b_log_var = tl.load(p_log_var + o, mask=m, other=0.0).to(tl.float32)
        if GIVEN:
            b_noise = tl.load(p_given + o, mask=m, other=0.0)
        else:
            b_noise = normal_tile(p_key, KEY_STRIDE, i_sample, m_sample, i_block, ROWS, BLOCK, FAST)
        b_sigma = tl.exp(0.5 * b_log_var)
        tl.store(p_z + o, narrow(b_mean + b_sigma * b_noise, p_z), mask=m)
        if KEEP:
            tl.store(p_kept + o, b_noise, mask=m)
        b_kl += b_mean * b_mean + (b_sigma * b_sigma - 1.0 - b_log_var)
    tl.store(p_kl + i_sample, 0.5 * tl.sum(b_kl, axis=1, keep_dims=True), mask=m_sample)


@triton.jit
def reparameterize_bwd_kernel(
    p_mean, p_log_var, p_key, p_kept, p_grad_z, p_grad_kl, p_grad_mean, p_grad_log_var, rows, event,
    KEPT: tl.constexpr, HAS_Z: tl.constexpr, HAS_KL: tl.constexpr, KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    b_sigma = tl.exp(0.5 * tl.load(p_log_var + o, mask=m, other=0.0).to(tl.float32))
    b_by_mean = tl.zeros((ROWS, BLOCK), tl.float32)
    b_by_log_var = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_KL:
        b_grad_kl = tl.load(p_grad_kl + i_sample, mask=m_sample, other=0.0)
        b_by_mean += b_grad_kl * tl.load(p_mean + o, mask=m, other=0.0).to(tl.float32)
        b_by_log_var += b_grad_kl * (b_sigma * b_sigma - 1.0)
    if HAS_Z:
        b_grad_z = tl.load(p_grad_z + o, mask=m, other=0.0).to(tl.float32)
        if KEPT:
            b_noise = tl.load(p_kept + o, mask=m, other=0.0)
        else:
            b_noise = normal_tile(p_key, KEY_STRIDE, i_sample, m_sample, i_block, ROWS, BLOCK, FAST)
        b_by_mean += b_grad_z
        b_by_log_var += b_grad_z * b_noise * b_sigma
    tl.store(p_grad_mean + o, narrow(b_by_mean, p_grad_mean), mask=m)
    tl.store(p_grad_log_var + o, narrow(0.5 * b_by_log_var, p_grad_log_var), mask=m)


def reparameterize_fwd(rows, event, mean, log_var, key, given, z, kl, kept, fast):
    if not rows:
        return
    ROWS, BLOCK = tile(rows, event)
    reparameterize_fwd_kernel[(triton.cdiv(rows, ROWS),)](
        mean, log_var, key, given, z, kl, kept, rows, event,
        GIVEN=given is not None, KEEP=kept is not None, KEY_STRIDE=key_stride(key), ROWS=ROWS, BLOCK=BLOCK, FAST=fast,
        **options(fast),
    )  # fmt: skip


def reparameterize_bwd(rows, event, mean, log_var, key, kept, grad_z, grad_kl, grad_mean, grad_log_var, fast):
    if not mean.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)
    reparameterize_bwd_kernel[grid](
        mean, log_var, key, kept, grad_z, grad_kl, grad_mean, grad_log_var, rows, event,
        KEPT=kept is not None, HAS_Z=grad_z is not None, HAS_KL=grad_kl is not None, KEY_STRIDE=key_stride(key), ROWS=ROWS,
        BLOCK=BLOCK, FAST=fast, **options(fast),
    )  # fmt: skip


def static_cases():
    cases = []
    for dtype, rows, event, fast in LAUNCHES:
        data, size = f"*{TYPES[dtype]}", 4 if dtype == "float32" else 2
        ROWS, BLOCK = tile(rows, event)
        trips = triton.cdiv(event, BLOCK)
        what = f"{dtype} {rows}x{event} {'fast' if fast else 'exact'}"
        common = {"KEY_STRIDE": 0, "ROWS": ROWS, "BLOCK": BLOCK, "FAST": fast}
        sizes = {"rows": "i32", "event": "i32"}
        inputs = {"p_mean": data, "p_log_var": data, "p_key": "*i64"}
        forward = {**inputs, "p_given": None, "p_z": data, "p_kl": "*fp32", "p_kept": None, **sizes}
        gradients = {"p_grad_z": data, "p_grad_kl": "*fp32", "p_grad_mean": data, "p_grad_log_var": data}
        cases += [
            StaticCase(
                reparameterize_fwd_kernel, what, forward, {"GIVEN": False, "KEEP": False, **common}, options(fast),
                elements=ROWS * BLOCK * trips, trips=trips, bytes_per_element=3 * size + 4 / event, wide=dtype == "float32",
            ),
            StaticCase(
                reparameterize_bwd_kernel, what, {**inputs, "p_kept": None, **gradients, **sizes},
                {"KEPT": False, "HAS_Z": True, "HAS_KL": True, **common}, options(fast),
                elements=ROWS * BLOCK, bytes_per_element=5 * size + 4 / event, wide=dtype == "float32",
            ),
        ]  # fmt: skip
    return cases
