"""moments in Triton: column means in float64, then one program for each tile of the lower triangle of the co-moment.

A program centres its two strips of features on the way in, multiplies panels of rows in float32 and adds each to float64 sums;
the merge with the state happens before the tile is stored, twice: as it is and transposed.
"""

import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET
from fastgen.kernels._static import TYPES, StaticCase

SIDE = 64
"""Side of a tile. Its float64 sums and float32 products fill half of the registers of eight warps."""
PANEL = 8
"""Products of ROWS rows that are summed in float32."""
ROWS = 256 if INTERPRET else 32
OPTIONS = {"num_warps": 8, "num_stages": 1}
"""Buffers of several stages leave too few registers: Triton 3.9 then spills on sm_80 and sm_100."""
SPLITS = 64
"""Parts that the rows are cut into for the means: enough programs for a GPU where D is small."""


@triton.jit
def moments_sum_kernel(p_x, p_partial, rows, width, part, SIDE: tl.constexpr, ROWS: tl.constexpr):
    o_column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[None, :]
    first = tl.program_id(1) * part
    b_sum = tl.zeros((1, SIDE), tl.float64)
    for i_row in range(first, min(first + part, rows), ROWS):
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (o_row < min(first + part, rows)) & (o_column < width)
        b_sum += tl.sum(tl.load(p_x + o_row * width + o_column, mask=m, other=0.0).to(tl.float64), axis=0, keep_dims=True)
    tl.store(p_partial + tl.program_id(1).to(tl.int64) * width + o_column, b_sum, mask=o_column < width)


@triton.jit
def moments_mean_kernel(
    p_partial, p_count, p_mean, p_own, p_moved, p_new_count, p_new_mean, rows, width, splits, STATE: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    m = o < width
    b_sum = tl.zeros((SIDE,), tl.float64)
    for i_split in range(splits):
        b_sum += tl.load(p_partial + i_split * width + o, mask=m, other=0.0)
    n_rows = tl.cast(rows, tl.float64)
    b_own = b_sum / tl.maximum(n_rows, 1.0)
    n_before, b_old = n_rows * 0.0, b_sum * 0.0
    if STATE:
        n_before = tl.load(p_count)
        b_old = tl.load(p_mean + o, mask=m, other=0.0)
    n_after = n_before + n_rows
    b_moved = tl.where(rows > 0, b_own - b_old, 0.0)
    tl.store(p_own + o, b_own, mask=m)
    tl.store(p_moved + o, b_moved, mask=m)
    tl.store(p_new_mean + o, b_old + b_moved * (n_rows / tl.maximum(n_after, 1.0)), mask=m)
    tl.store(p_new_count, n_after, mask=tl.program_id(0) == 0)


@triton.jit
def moments_fwd_kernel(
    p_x, p_own, p_moved, p_count, p_comoment, p_new_comoment, rows, width, STATE: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_tile = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_tile = tl.where(i_tile * (i_tile + 1) // 2 > pid, i_tile - 1, i_tile)
    i_tile = tl.where((i_tile + 1) * (i_tile + 2) // 2 <= pid, i_tile + 1, i_tile)
    j_tile = pid - i_tile * (i_tile + 1) // 2
    o_i, o_j = i_tile * SIDE + tl.arange(0, SIDE), j_tile * SIDE + tl.arange(0, SIDE)
    m_i, m_j = o_i < width, o_j < width
    b_own_i, b_own_j = tl.load(p_own + o_i, mask=m_i, other=0.0), tl.load(p_own + o_j, mask=m_j, other=0.0)
    b_shift_i, b_shift_j = b_own_i.to(tl.float32), b_own_j.to(tl.float32)
    b_sums = tl.zeros((SIDE, SIDE), tl.float64)
    b_squares = tl.zeros((SIDE,), tl.float64)
    for i_panel in range(0, rows, ROWS * PANEL):
        b_product = tl.zeros((SIDE, SIDE), tl.float32)
        for i_row in range(i_panel, min(i_panel + ROWS * PANEL, rows), ROWS):
            o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            m_row = o_row < rows
            b_i = tl.load(p_x + o_row * width + o_i[None, :], mask=m_row & m_i[None, :], other=0.0).to(tl.float32)
            b_j = tl.load(p_x + o_row * width + o_j[None, :], mask=m_row & m_j[None, :], other=0.0).to(tl.float32)
            if i_tile == j_tile:
                b_wide = tl.where(m_row, b_i.to(tl.float64) - b_own_i[None, :], 0.0)
                b_squares += tl.sum(b_wide * b_wide, axis=0)
            b_i = tl.where(m_row, b_i - b_shift_i[None, :], 0.0)
            b_j = tl.where(m_row, b_j - b_shift_j[None, :], 0.0)
            b_product = tl.dot(tl.trans(b_i), b_j, b_product, input_precision="ieee")
        b_sums += b_product.to(tl.float64)
    # what the products lack of the mean, rounded to float32 as it was taken off
    b_lack_i, b_lack_j = b_own_i - b_shift_i.to(tl.float64), b_own_j - b_shift_j.to(tl.float64)
    n_rows = tl.cast(rows, tl.float64)
    b_sums -= (n_rows * b_lack_i)[:, None] * b_lack_j[None, :]
    m_diagonal = o_i[:, None] == o_j[None, :]
    b_sums = tl.where(m_diagonal, b_squares[:, None], b_sums)
    o = o_i.to(tl.int64)[:, None] * width + o_j[None, :]
    m = m_i[:, None] & m_j[None, :] & (o_i[:, None] >= o_j[None, :])
    if STATE:
        n_before = tl.load(p_count)
        b_moved_i, b_moved_j = tl.load(p_moved + o_i, mask=m_i, other=0.0), tl.load(p_moved + o_j, mask=m_j, other=0.0)
        weight = n_before * n_rows / tl.maximum(n_before + n_rows, 1.0)
        b_sums += (weight * b_moved_i)[:, None] * b_moved_j[None, :]
        b_sums += tl.load(p_comoment + o, mask=m, other=0.0)
    tl.store(p_new_comoment + o, b_sums, mask=m)
    o_mirrored = o_j.to(tl.int64)[:, None] * width + o_i[None, :]
    tl.store(p_new_comoment + o_mirrored, tl.trans(b_sums), mask=tl.trans(m & (o_i[:, None] > o_j[None, :])))


def moments_fwd(rows, width, features, count, mean, comoment, new_count, new_mean, new_comoment):
    part = triton.cdiv(max(rows, 1), SPLITS * ROWS) * ROWS
    splits, columns = triton.cdiv(max(rows, 1), part), max(triton.cdiv(width, SIDE), 1)
    partial, own, moved = (new_mean.new_empty(n, width) for n in (splits, 1, 1))
    state = count is not None
    moments_sum_kernel[(columns, splits)](features, partial, rows, width, part, SIDE=SIDE, ROWS=ROWS, num_warps=4)
    moments_mean_kernel[(columns,)](
        partial, count, mean, own, moved, new_count, new_mean, rows, width, splits, STATE=state, SIDE=SIDE, num_warps=2
    )
    moments_fwd_kernel[(columns * (columns + 1) // 2,)](
        features, own, moved, count, comoment, new_comoment, rows, width,
        STATE=state, SIDE=SIDE, ROWS=ROWS, PANEL=PANEL, **OPTIONS,
    )  # fmt: skip


def static_cases():
    cases, rows, width = [], 8192, 2048
    part = triton.cdiv(rows, SPLITS * ROWS) * ROWS
    for dtype, type_ in TYPES.items():
        size, features = (4 if dtype == "float32" else 2), {"p_x": f"*{type_}"}
        sizes, sides = {"rows": "i32", "width": "i32"}, {"SIDE": SIDE, "ROWS": ROWS}
        square = SIDE * SIDE
        cases += [
            StaticCase(
                moments_sum_kernel, f"{dtype} {rows}x{width}",
                {**features, "p_partial": "*fp64", **sizes, "part": "i32"}, sides,
                {"num_warps": 4}, elements=part * SIDE, trips=part // ROWS, bytes_per_element=size + 8 / part,
                wide=dtype == "float32",
            ),
            StaticCase(
                moments_fwd_kernel, f"{dtype} {rows}x{width}",
                {**features, **dict.fromkeys(["p_own", "p_moved", "p_count", "p_comoment", "p_new_comoment"], "*fp64"),
                 **sizes},
                {"STATE": True, **sides, "PANEL": PANEL}, OPTIONS, elements=square, trips=rows // ROWS,
                # two strips of all rows; the old co-moment once, the new one twice; means, moves and the count
                bytes_per_element=(2 * rows * SIDE * size + 3 * 8 * square + 4 * 8 * SIDE + 8) / square,
            ),
        ]  # fmt: skip
    return cases
