"""nearest_code in Triton: scores as a tiled product with a running maximum, then float64 for the rows that it leaves open.

Sums over the vectors of a code follow an order that a stable sort of the indices gives: no atomic additions.
"""

import math

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET, narrow
from fastgen.kernels._static import TYPES, StaticCase

ROWS, CODES, DEPTH = (256, 128, 64) if INTERPRET else (64, 64, 32)
"""A tile of scores, and how much of the vectors it multiplies at a time."""
OPTIONS = {"enable_fp_fusion": True, "num_warps": 4}
EXACT_OPTIONS = {"enable_fp_fusion": False, "num_warps": 2}


@triton.jit
def nearest_code_fwd_kernel(
    p_z, p_codebook, p_centre, p_half_square, p_radius, p_index, p_open, rows, codes, width,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The code of the largest score z.c - |c|^2 / 2, and whether another comes within rounding of it."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    b_square = tl.zeros((ROWS,), tl.float32)
    for i_depth in range(0, width, DEPTH):
        o_depth = i_depth + tl.arange(0, DEPTH)
        m_depth = o_depth < width
        b_centre = tl.load(p_centre + o_depth, mask=m_depth, other=0.0)
        b_z = tl.load(p_z + i_row[:, None] * width + o_depth[None, :], mask=m_row[:, None] & m_depth[None, :], other=0.0)
        b_z = tl.where(m_depth[None, :], b_z.to(tl.float32) - b_centre[None, :], 0.0)
        b_square += tl.sum(b_z * b_z, axis=1)
    b_best = tl.full((ROWS,), float("-inf"), tl.float32)
    b_second = tl.full((ROWS,), float("-inf"), tl.float32)
    b_index = tl.zeros((ROWS,), tl.int32)
    for i_code in range(0, codes, CODES):
        o_code = i_code + tl.arange(0, CODES)
        m_code = o_code < codes
        b_score = tl.zeros((ROWS, CODES), tl.float32)
        for i_depth in range(0, width, DEPTH):
            o_depth = i_depth + tl.arange(0, DEPTH)
            m_depth = o_depth < width
            b_centre = tl.load(p_centre + o_depth, mask=m_depth, other=0.0)
            b_z = tl.load(p_z + i_row[:, None] * width + o_depth[None, :], mask=m_row[:, None] & m_depth[None, :], other=0.0)
            b_code = tl.load(
                p_codebook + o_code.to(tl.int64)[:, None] * width + o_depth[None, :],
                mask=m_code[:, None] & m_depth[None, :],
                other=0.0,
            )
            b_z = tl.where(m_depth[None, :], b_z.to(tl.float32) - b_centre[None, :], 0.0)
            b_code = tl.where(m_depth[None, :], b_code.to(tl.float32) - b_centre[None, :], 0.0)
            b_score = tl.dot(b_z, tl.trans(b_code), b_score, input_precision="ieee")
        b_score -= tl.load(p_half_square + o_code, mask=m_code, other=float("inf"))[None, :]
        b_score = tl.where(b_score == b_score, b_score, float("-inf"))
        b_top = tl.max(b_score, axis=1)
        b_first = tl.min(tl.where(b_score == b_top[:, None], o_code[None, :], 2147483647), axis=1)
        b_next = tl.max(tl.where(o_code[None, :] == b_first[:, None], float("-inf"), b_score), axis=1)
        m_better = b_top > b_best
        b_second = tl.where(m_better, tl.maximum(b_best, b_next), tl.maximum(b_second, b_top))
        b_index = tl.where(m_better, b_first, b_index)
        b_best = tl.where(m_better, b_top, b_best)
    # what two scores may be off together: csrc/ops/nearest_code.h has the same bound
    b_radius = tl.load(p_radius)
    b_scale = (tl.sqrt(b_square) + b_radius) * b_radius
    b_slack = (4 * width + 24) * 5.9604644775390625e-08 * b_scale + 1e-37
    m_open = (b_scale < 1e37) & (b_best > float("-inf")) & (b_best - b_slack > b_second)
    tl.store(p_index + i_row, b_index.to(tl.int64), mask=m_row)
    tl.store(p_open + i_row, tl.where(m_open, 0, 1).to(tl.int32), mask=m_row)


@triton.jit
def nearest_code_exact_kernel(
    p_z, p_codebook, p_open, p_index, p_distance, codes, width, CODES: tl.constexpr, DEPTH: tl.constexpr
):
    """One row: in float64, the nearest of all codes where the scores left that open, and the distance."""
    i_row = tl.program_id(0).to(tl.int64)
    b_index = tl.load(p_index + i_row)
    if tl.load(p_open + i_row) != 0:
        b_index = b_index * 0
        b_least = tl.full((), float("inf"), tl.float64)
        for i_code in range(0, codes, CODES):
            o_code = i_code + tl.arange(0, CODES).to(tl.int64)
            m_code = o_code < codes
            b_sum = tl.zeros((CODES,), tl.float64)
            for i_depth in range(0, width, DEPTH):
                o_depth = i_depth + tl.arange(0, DEPTH)
                m_depth = o_depth < width
                b_z = tl.load(p_z + i_row * width + o_depth, mask=m_depth, other=0.0).to(tl.float64)
                m = m_code[:, None] & m_depth[None, :]
                b_code = tl.load(p_codebook + o_code[:, None] * width + o_depth[None, :], mask=m, other=0.0).to(tl.float64)
                b_difference = b_z[None, :] - b_code
                b_sum += tl.sum(b_difference * b_difference, axis=1)
            b_sum = tl.where(m_code & (b_sum == b_sum), b_sum, float("inf"))
            b_top = tl.min(b_sum, axis=0)
            b_first = tl.min(tl.where(b_sum == b_top, o_code, codes), axis=0)
            b_index = tl.where(b_top < b_least, b_first, b_index)
            b_least = tl.where(b_top < b_least, b_top, b_least)
        tl.store(p_index + i_row, b_index)
    b_distance = tl.full((), 0.0, tl.float64)
    for i_depth in range(0, width, DEPTH):
        o_depth = i_depth + tl.arange(0, DEPTH)
        m_depth = o_depth < width
        b_z = tl.load(p_z + i_row * width + o_depth, mask=m_depth, other=0.0).to(tl.float64)
        b_code = tl.load(p_codebook + b_index * width + o_depth, mask=m_depth, other=0.0).to(tl.float64)
        b_distance += tl.sum((b_z - b_code) * (b_z - b_code), axis=0)
    tl.store(p_distance + i_row, b_distance.to(tl.float32))


@triton.jit
def nearest_code_sum_kernel(
    p_z, p_codebook, p_grad_distance, p_row, p_begin, p_out, width,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One code: the sum of its rows, or of their gradients, in float64 and in order."""
    i_code = tl.program_id(0).to(tl.int64)
    o_depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    m_depth = o_depth < width
    begin, end = tl.load(p_begin + i_code), tl.load(p_begin + i_code + 1)
    b_sum = tl.zeros((DEPTH,), tl.float64)
    if GRADIENT:
        b_code = tl.load(p_codebook + i_code * width + o_depth, mask=m_depth, other=0.0).to(tl.float64)
    for i_member in range(begin, end, ROWS):
        o_member = i_member + tl.arange(0, ROWS)
        m_member = o_member < end
        i_row = tl.load(p_row + o_member, mask=m_member, other=0)
        m = m_member[:, None] & m_depth[None, :]
        b_term = tl.load(p_z + i_row[:, None] * width + o_depth[None, :], mask=m, other=0.0).to(tl.float64)
        if GRADIENT:
            b_grad = tl.load(p_grad_distance + i_row, mask=m_member, other=0.0).to(tl.float64)
            b_term = tl.where(m, 2.0 * b_grad[:, None] * (b_code[None, :] - b_term), 0.0)
        b_sum += tl.sum(b_term, axis=0)
    tl.store(p_out + i_code * width + o_depth, narrow(b_sum.to(tl.float32), p_out), mask=m_depth)


@triton.jit
def nearest_code_bwd_kernel(
    p_z, p_codebook, p_index, p_grad_distance, p_grad_z, rows, width, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """The gradient of z."""
    blocks = tl.cdiv(width, DEPTH)
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_depth = tl.program_id(0) % blocks * DEPTH + tl.arange(0, DEPTH)[None, :]
    m_row = i_row < rows
    m = m_row & (o_depth < width)
    i_code = tl.load(p_index + i_row, mask=m_row, other=0)
    b_grad = 2.0 * tl.load(p_grad_distance + i_row, mask=m_row, other=0.0)
    b_z = tl.load(p_z + i_row * width + o_depth, mask=m, other=0.0).to(tl.float32)
    b_code = tl.load(p_codebook + i_code * width + o_depth, mask=m, other=0.0).to(tl.float32)
    tl.store(p_grad_z + i_row * width + o_depth, narrow(b_grad * (b_z - b_code), p_grad_z), mask=m)


def _centred(codebook):
    """The mean code, half the squares of the codes less that, and the largest of their lengths; codes that are not finite
    count as infinitely far."""
    centre = codebook.double().mean(0).float()
    centre = torch.where(centre.isfinite(), centre, 0.0)
    square = (codebook.float() - centre).double().square().sum(1)
    finite = codebook.isfinite().all(1)
    radius = torch.where(finite, square, 0.0).amax().sqrt().float()
    return centre, torch.where(finite, 0.5 * square, math.inf).float(), radius


def _sum_by_code(codes, width, key, z, out, codebook=None, grad_distance=None):
    """Into ``out`` the sums over the rows of each code; rows whose key is ``codes`` are nobody's."""
    if not out.numel():
        return
    keys, order = torch.sort(key, stable=True)
    begin = torch.searchsorted(keys, torch.arange(codes + 1, device=key.device))
    nearest_code_sum_kernel[(codes, triton.cdiv(width, DEPTH))](
        z, codebook, grad_distance, order, begin, out, width,
        GRADIENT=codebook is not None, ROWS=CODES, DEPTH=DEPTH, **OPTIONS,
    )  # fmt: skip


def nearest_code_fwd(rows, codes, width, z, codebook, index, distance, counts, sums):
    if rows:
        still_open = torch.empty(rows, dtype=torch.int32, device=z.device)
        nearest_code_fwd_kernel[(triton.cdiv(rows, ROWS),)](
            z, codebook, *_centred(codebook), index, still_open, rows, codes, width,
            ROWS=ROWS, CODES=CODES, DEPTH=DEPTH, **OPTIONS,
        )  # fmt: skip
        nearest_code_exact_kernel[(rows,)](
            z, codebook, still_open, index, distance, codes, width, CODES=CODES, DEPTH=DEPTH, **EXACT_OPTIONS
        )
    if counts is not None:
        key = torch.where(distance.isfinite(), index, codes).flatten()
        counts.copy_(torch.bincount(key, minlength=codes + 1)[:codes])
        _sum_by_code(codes, width, key, z, sums)


def nearest_code_bwd(rows, codes, width, z, codebook, index, grad_distance, grad_z, grad_codebook):
    if grad_z is not None and z.numel():
        grid = (triton.cdiv(rows, ROWS) * triton.cdiv(width, DEPTH),)
        nearest_code_bwd_kernel[grid](z, codebook, index, grad_distance, grad_z, rows, width, ROWS=ROWS, DEPTH=DEPTH, **OPTIONS)
    if grad_codebook is not None:
        _sum_by_code(codes, width, index.flatten(), z, grad_codebook, codebook, grad_distance)


def static_cases():
    cases, width, codes, members = [], 64, 1024, 128
    lines, blocks = width // DEPTH, codes // CODES
    for dtype, type_ in TYPES.items():
        data, size, wide = f"*{type_}", 4 if dtype == "float32" else 2, dtype == "float32"
        inputs, what = {"p_z": data, "p_codebook": data}, f"{dtype} {width} wide"
        sizes, depth = {"codes": "i32", "width": "i32"}, {"DEPTH": DEPTH}
        both = (ROWS + CODES) * DEPTH * size
        cases += [
            StaticCase(
                nearest_code_fwd_kernel, what,
                {**inputs, "p_centre": "*fp32", "p_half_square": "*fp32", "p_radius": "*fp32", "p_index": "*i64",
                 "p_open": "*i32", "rows": "i32", **sizes},
                {"ROWS": ROWS, "CODES": CODES, **depth}, OPTIONS, elements=ROWS * CODES * blocks, trips=blocks * lines,
                # the operands of each product, the rows once more for their lengths; the report does not see what is copied
                # asynchronously
                bytes_per_element=(
                    blocks * lines * (both + 4 * DEPTH) + 4 * codes + lines * DEPTH * (ROWS * size + 4) + 12 * ROWS + 4
                )
                / (ROWS * CODES * blocks),
                wide=wide,
            ),
            StaticCase(
                nearest_code_exact_kernel, what,
                {**inputs, "p_open": "*i32", "p_index": "*i64", "p_distance": "*fp32", **sizes},
                {"CODES": CODES, **depth}, EXACT_OPTIONS, elements=CODES * DEPTH * blocks * lines, trips=blocks * lines,
                bytes_per_element=(blocks * lines * (CODES + 3) * DEPTH * size + 24) / (CODES * DEPTH * blocks * lines),
                wide=wide,
            ),
            StaticCase(
                nearest_code_sum_kernel, what,
                {**inputs, "p_grad_distance": "*fp32", "p_row": "*i64", "p_begin": "*i64", "p_out": data, "width": "i32"},
                {"GRADIENT": True, "ROWS": CODES, **depth}, OPTIONS, elements=members * DEPTH, trips=members // CODES,
                bytes_per_element=(members * (DEPTH * size + 12) + 2 * DEPTH * size + 16) / (members * DEPTH), wide=wide,
            ),
            StaticCase(
                nearest_code_bwd_kernel, what,
                {**inputs, "p_index": "*i64", "p_grad_distance": "*fp32", "p_grad_z": data, "rows": "i32", "width": "i32"},
                {"ROWS": ROWS, **depth}, OPTIONS, elements=ROWS * DEPTH, bytes_per_element=3 * size + 12 / DEPTH, wide=wide,
            ),
        ]  # fmt: skip
    return cases
