"""normal in Triton: one program draws one tile."""

import triton
import triton.language as tl
from fastgen.kernels._launch import GENERATED, key_stride, narrow, options, tile
from fastgen.kernels._philox import normal_tile
from fastgen.kernels._static import LAUNCHES, TYPES, StaticCase


@triton.jit
def normal_kernel(
    p_out, p_key, rows, event, KEY_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr
):
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = normal_tile(p_key, KEY_STRIDE, i_sample, i_sample < rows, i_block, ROWS, BLOCK, FAST)
    tl.store(p_out + i_sample * event + o_event, narrow(z, p_out), mask=(i_sample < rows) & (o_event < event))


def normal(out, rows, event, key, fast):
    if not out.numel():
        return
    ROWS, BLOCK = tile(rows, event, GENERATED)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)
    normal_kernel[grid](out, key, rows, event, KEY_STRIDE=key_stride(key), ROWS=ROWS, BLOCK=BLOCK, FAST=fast, **options(fast))


def static_cases():
    cases = []
    for dtype, rows, event, fast in LAUNCHES:
        ROWS, BLOCK = tile(rows, event, GENERATED)
        cases.append(
            StaticCase(
                normal_kernel,
                f"{dtype} {rows}x{event} {'fast' if fast else 'exact'}",
                {"p_out": f"*{TYPES[dtype]}", "p_key": "*i64", "rows": "i32", "event": "i32"},
                {"KEY_STRIDE": 0, "ROWS": ROWS, "BLOCK": BLOCK, "FAST": fast},
                options(fast),
                elements=ROWS * BLOCK,
                bytes_per_element=4 if dtype == "float32" else 2,
                wide=dtype == "float32",
            )
        )
    return cases
