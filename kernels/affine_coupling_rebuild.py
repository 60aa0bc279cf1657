"""affine_coupling_rebuild in Triton: elementwise, one program a tile."""

import triton
import triton.language as tl
from fastgen.kernels._launch import narrow, options, tile
from fastgen.kernels._static import TYPES, StaticCase
from fastgen.kernels.affine_coupling import coupling_scale


@triton.jit
def affine_coupling_rebuild_kernel(
    p_y, p_shift, p_log_scale, p_grad_y, p_grad_log_det, p_x, p_grad_x, p_grad_log_scale, rows, event,
    BOUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(event, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_sample = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    m_sample = i_sample < rows
    o_event = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    o, m = i_sample * event + o_event, m_sample & (o_event < event)
    b_raw = tl.load(p_log_scale + o, mask=m, other=0.0).to(tl.float32)
    _, b_factor, b_slope = coupling_scale(b_raw, BOUND, False)
    _, b_back, _ = coupling_scale(b_raw, BOUND, True)
    b_moved = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32) - tl.load(p_shift + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_x + o, narrow(b_moved * b_back, p_x), mask=m)
    b_by_y = tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_grad_x + o, narrow(b_by_y * b_factor, p_grad_x), mask=m)
    b_by_log = b_by_y * b_moved + tl.load(p_grad_log_det + i_sample, mask=m_sample, other=0.0)
    if BOUND == 0:
        b_by_log += 0.0 * b_raw  # nothing else would show a NaN there
    tl.store(p_grad_log_scale + o, narrow(b_by_log * b_slope, p_grad_log_scale), mask=m)


def affine_coupling_rebuild(rows, event, y, shift, log_scale, grad_y, grad_log_det, x, grad_x, grad_log_scale, bound):
    if not y.numel():
        return
    ROWS, BLOCK = tile(rows, event)
    affine_coupling_rebuild_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(event, BLOCK),)](
        y, shift, log_scale, grad_y, grad_log_det, x, grad_x, grad_log_scale, rows, event,
        BOUND=bound, ROWS=ROWS, BLOCK=BLOCK, **options(True),
    )  # fmt: skip


def static_cases():
    cases = []
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for rows, event in ((4096, 4096), (8192, 256)):
            ROWS, BLOCK = tile(rows, event)
            inputs = dict.fromkeys(("p_y", "p_shift", "p_log_scale", "p_grad_y"), data)
            outputs = dict.fromkeys(("p_x", "p_grad_x", "p_grad_log_scale"), data)
            sizes = {"rows": "i32", "event": "i32"}
            cases += [
                StaticCase(
                    affine_coupling_rebuild_kernel, f"{dtype} {event} a row, bound {bound}",
                    {**inputs, "p_grad_log_det": "*fp32", **outputs, **sizes}, {"BOUND": bound, "ROWS": ROWS, "BLOCK": BLOCK},
                    options(True), elements=ROWS * BLOCK, bytes_per_element=7 * size + 4 / event, wide=dtype == "float32",
                )
                for bound in (0, 1, 2)
            ]  # fmt: skip
    return cases
