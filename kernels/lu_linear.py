"""lu_linear in Triton: a small dense matrix times the channels of a tile of pixels, and the sum of outer products behind it.

The C x C matrix, its inverse and the way back to the factors are a few library calls of negligible size.
"""

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET, narrow
from fastgen.kernels._static import TYPES, StaticCase

PIXELS = 1024 if INTERPRET else 64
"""Pixels of a tile."""
SPLITS = 4 if INTERPRET else 64
"""Partial sums of the outer products, added up in order."""


@triton.jit
def pixel_offsets(i_pixel, channels, pixels, ALIGNED: tl.constexpr):
    """Where the first channel of a pixel lies. ALIGNED: samples hold a multiple of four pixels, so that fours stay together."""
    o_pixel = (i_pixel // pixels) * channels * pixels + i_pixel % pixels
    return tl.max_contiguous(tl.multiple_of(o_pixel, 4), 4) if ALIGNED else o_pixel


@triton.jit
def lu_linear_kernel(
    p_x, p_matrix, p_y, all_pixels, channels, pixels,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PIXELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y = matrix x: one program takes ROWS output channels of PIXELS pixels, counted through all samples."""
    i_pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    m_pixel = i_pixel < all_pixels
    o_pixel = pixel_offsets(i_pixel, channels, pixels, ALIGNED)
    i_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_y = tl.zeros((ROWS, PIXELS), tl.float32)
    for i_depth in range(tl.cdiv(channels, DEPTH)):
        i_column = i_depth * DEPTH + tl.arange(0, DEPTH)
        b_matrix = tl.load(
            p_matrix + i_row[:, None] * channels + i_column[None, :],
            mask=(i_row < channels)[:, None] & (i_column < channels)[None, :],
            other=0.0,
        )
        b_x = tl.load(
            p_x + o_pixel[None, :] + i_column[:, None] * pixels,
            mask=m_pixel[None, :] & (i_column < channels)[:, None],
            other=0.0,
        )
        b_y = tl.dot(b_matrix, b_x.to(tl.float32), b_y, input_precision="ieee")
    o, m = o_pixel[None, :] + i_row[:, None] * pixels, m_pixel[None, :] & (i_row < channels)[:, None]
    tl.store(p_y + o, narrow(b_y, p_y), mask=m)


@triton.jit
def outer_kernel(
    p_left, p_right, p_sums, all_pixels, channels, pixels,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Partial sums over pixels of left right^T: [SPLITS, channels, channels]."""
    i_split = tl.program_id(0)
    i_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i_column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i_tile in range(i_split, tl.cdiv(all_pixels, PIXELS), SPLITS):
        i_pixel = tl.full((PIXELS,), PIXELS, tl.int64) * i_tile + tl.arange(0, PIXELS)
        m_pixel = i_pixel < all_pixels
        o_pixel = pixel_offsets(i_pixel, channels, pixels, ALIGNED)
        b_left = tl.load(
            p_left + o_pixel[None, :] + i_row[:, None] * pixels,
            mask=m_pixel[None, :] & (i_row < channels)[:, None],
            other=0.0,
        )
        b_right = tl.load(
            p_right + o_pixel[None, :] + i_column[:, None] * pixels,
            mask=m_pixel[None, :] & (i_column < channels)[:, None],
            other=0.0,
        )
        b_sum = tl.dot(b_left.to(tl.float32), tl.trans(b_right.to(tl.float32)), b_sum, input_precision="ieee")
    o = (i_split.to(tl.int64) * channels + i_row[:, None]) * channels + i_column[None, :]
    tl.store(p_sums + o, b_sum, mask=(i_row < channels)[:, None] & (i_column < channels)[None, :])


def _block(channels):
    """Channels of a block: tl.dot wants 16 at least."""
    return max(16, min(32, triton.next_power_of_2(channels)))


def _factors(lower, upper, log_diagonal, sign):
    """L and U with their diagonals, in float64."""
    left = torch.tril(lower.double(), -1)
    left.diagonal().fill_(1.0)
    right = torch.triu(upper.double(), 1)
    right.diagonal().copy_(sign.double() * log_diagonal.double().exp())
    return left, right


def _matrix(left, right, permutation, inverse):
    """P L U in float64, or its inverse by substitution."""
    if not inverse:
        return (left @ right)[permutation]
    columns = torch.eye(len(left), dtype=left.dtype, device=left.device)[permutation].T
    return torch.linalg.solve_triangular(
        right, torch.linalg.solve_triangular(left, columns, upper=False, unitriangular=True), upper=True
    )


def _multiply(samples, channels, pixels, x, matrix, y):
    if not x.numel():
        return
    block = _block(channels)
    grid = (triton.cdiv(samples * pixels, PIXELS), triton.cdiv(channels, block))
    lu_linear_kernel[grid](
        x, matrix.float().contiguous(), y, samples * pixels, channels, pixels,
        ROWS=block, DEPTH=block, PIXELS=PIXELS, ALIGNED=pixels % 4 == 0, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip


def multiply_by(samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, y, inverse):
    """y = W x, or W^-1 x."""
    matrix = _matrix(*_factors(lower, upper, log_diagonal, sign), permutation, inverse)
    _multiply(samples, channels, pixels, x, matrix, y)


def lu_linear_fwd(samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, y, log_det, inverse):
    multiply_by(samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, y, inverse)
    total = pixels * log_diagonal.double().sum()
    log_det.copy_(-total if inverse else total)


def lu_linear_bwd(
    samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, grad_y, grad_log_det,
    grad_x, grad_lower, grad_upper, grad_log_diagonal, inverse,
):  # fmt: skip
    left, right = _factors(lower, upper, log_diagonal, sign)
    matrix = _matrix(left, right, permutation, inverse)
    _multiply(samples, channels, pixels, grad_y, matrix.T, grad_x)
    sums = torch.zeros(SPLITS, channels, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        block = _block(channels)
        blocks = triton.cdiv(channels, block)
        outer_kernel[(SPLITS, blocks, blocks)](
            grad_y, x, sums, samples * pixels, channels, pixels,
            SPLITS=SPLITS, ROWS=block, COLUMNS=block, PIXELS=PIXELS, ALIGNED=pixels % 4 == 0,
            enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip
    grad = sums.double().sum(0)
    if inverse:
        grad = -(matrix.T @ grad @ matrix.T)
    grad = grad[torch.argsort(permutation)]
    by_right = left.T @ grad
    grad_lower.copy_(torch.tril(grad @ right.T, -1))
    grad_upper.copy_(torch.triu(by_right, 1))
    by_log = by_right.diagonal() * right.diagonal()
    if grad_log_det is not None:
        total = pixels * grad_log_det.double().sum()
        by_log = by_log - total if inverse else by_log + total
    grad_log_diagonal.copy_(by_log)


def static_cases():
    cases = []
    options = {"enable_fp_fusion": True, "num_warps": 4}
    block, trips = 32, 16
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        sizes = {"all_pixels": "i32", "channels": "i32", "pixels": "i32"}
        common = {"ROWS": block, "PIXELS": PIXELS, "ALIGNED": True}
        what = f"{dtype} {block} channels"
        cases += [
            StaticCase(
                lu_linear_kernel, what, {"p_x": data, "p_matrix": "*fp32", "p_y": data, **sizes},
                {"DEPTH": block, **common}, options, elements=block * PIXELS,
                bytes_per_element=2 * size + 4 * block / PIXELS, wide=dtype == "float32",
            ),
            StaticCase(
                outer_kernel, what, {"p_left": data, "p_right": data, "p_sums": "*fp32", **sizes},
                {"SPLITS": SPLITS, "COLUMNS": block, **common}, options, elements=block * PIXELS * trips,
                trips=trips, bytes_per_element=2 * size + 4 * block / (PIXELS * trips), wide=dtype == "float32",
            ),
        ]  # fmt: skip
    return cases
