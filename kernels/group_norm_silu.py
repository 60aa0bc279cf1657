"""group_norm_silu in Triton: moments of each channel over a part of its pixels, their merging to coefficients, one pass over x.

Both layouts take the same kernels: a tile is [channels, pixels] of one image, and LAST says which of the two lies together.
Channels first, all samples are one image of samples * channels channels.
"""

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import INTERPRET, narrow
from fastgen.kernels._static import TYPES, StaticCase

ELEMENTS = 65536 if INTERPRET else 2048
"""Elements of a tile."""
TRIPS = 4
"""Tiles that one program of a reduction goes through."""
OPTIONS = {"enable_fp_fusion": True, "num_warps": 4}


@triton.jit
def tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST: tl.constexpr):
    """Where the elements of a tile lie; i_channel is [CHANNELS, 1], i_pixel [1, PIXELS]."""
    if LAST:
        o = i_image * channels * pixels + i_pixel.to(tl.int64) * channels + i_channel
    else:
        o = i_channel.to(tl.int64) * pixels + i_pixel
    return o


@triton.jit
def sigmoid(x):
    """Without overflow."""
    b_e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def moments_kernel(
    p_x, p_moments, channels, pixels, part, parts,
    LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A pivot near the mean, the sums of x - pivot and its square, per channel over `part` pixels: [3, images, parts, C]."""
    i_image, i_part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    i_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    m_channel = i_channel < channels
    begin, end = i_part * part, min(pixels, (i_part + 1) * part)
    i_pixel = begin + tl.arange(0, PIXELS)[None, :]
    o, m = tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST), m_channel & (i_pixel < end)
    b_first = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_pivot = tl.sum(b_first, axis=1, keep_dims=True) / min(PIXELS, end - begin)
    b_sum = tl.zeros((CHANNELS, PIXELS), tl.float32)
    b_square = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for i_first in range(begin, end, PIXELS):
        i_pixel = i_first + tl.arange(0, PIXELS)[None, :]
        o, m = tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST), m_channel & (i_pixel < end)
        b_off = tl.where(m, tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) - b_pivot, 0.0)
        b_sum += b_off
        b_square += b_off * b_off
    size = (tl.num_programs(0) * channels).to(tl.int64)
    o = (i_image * parts + i_part) * channels + i_channel
    tl.store(p_moments + o, b_pivot, mask=m_channel)
    tl.store(p_moments + size + o, tl.sum(b_sum, axis=1, keep_dims=True), mask=m_channel)
    tl.store(p_moments + 2 * size + o, tl.sum(b_square, axis=1, keep_dims=True), mask=m_channel)


@triton.jit
def modulation(p_weight, p_bias, p_scale, p_shift, i_channel, o_sample, m):
    """weight, bias, 1 + scale and shift of some channels of some samples; a missing one changes nothing."""
    b_zero = (o_sample + i_channel).to(tl.float32) * 0.0
    b_weight, b_bias, b_factor, b_shift = b_zero + 1.0, b_zero, b_zero + 1.0, b_zero
    if p_weight is not None:
        b_weight = tl.load(p_weight + i_channel, mask=m, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_channel, mask=m, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_factor += tl.load(p_scale + o_sample + i_channel, mask=m, other=0.0).to(tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + o_sample + i_channel, mask=m, other=0.0).to(tl.float32)
    return b_weight, b_bias, b_factor, b_shift


@triton.jit
def coefficients_kernel(
    p_moments, p_stats, p_weight, p_bias, p_scale, p_shift, p_coefficients, samples, channels, pixels, groups,
    part, parts, by_sample, by_part, eps,
    HAS_MOMENTS: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Statistics of some groups, made of moments or read, and their channels' center, slope and level: [3, N, C]."""
    i_group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]  # counted through all samples
    m_group = i_group < samples * groups
    per = channels // groups
    i_own = tl.arange(0, PER)[None, :]
    m = m_group & (i_own < per)
    i_sample, i_channel = i_group // groups, i_group % groups * per + i_own
    p_own = p_stats + 3 * i_group
    if HAS_MOMENTS:
        size = samples.to(tl.int64) * parts * channels
        b_mean = tl.zeros((GROUPS, PER), tl.float64)
        for i_part in range(parts):
            o = i_sample * by_sample + i_part * by_part + i_channel
            count = min(part, pixels - i_part * part)
            b_mean += tl.load(p_moments + o, mask=m, other=0.0).to(tl.float64) * count
            b_mean += tl.load(p_moments + size + o, mask=m, other=0.0).to(tl.float64)
        b_mean = tl.sum(b_mean, axis=1, keep_dims=True) / (per * pixels)
        b_spread = tl.zeros((GROUPS, PER), tl.float64)
        for i_part in range(parts):
            o = i_sample * by_sample + i_part * by_part + i_channel
            count = min(part, pixels - i_part * part)
            b_off = tl.load(p_moments + o, mask=m, other=0.0).to(tl.float64) - b_mean
            b_sum = tl.load(p_moments + size + o, mask=m, other=0.0).to(tl.float64)
            b_square = tl.load(p_moments + 2 * size + o, mask=m, other=0.0).to(tl.float64)
            b_spread += tl.where(m, b_square + b_off * (2.0 * b_sum + b_off * count), 0.0)
        b_variance = tl.sum(b_spread, axis=1, keep_dims=True) / (per * pixels)
        b_center = b_mean.to(tl.float32)
        b_remainder = (b_mean - b_center.to(tl.float64)).to(tl.float32)
        b_rstd = (1.0 / tl.sqrt(tl.where(b_variance < 0.0, 0.0, b_variance) + eps)).to(tl.float32)
        tl.store(p_own, b_center, mask=m_group)
        tl.store(p_own + 1, b_remainder, mask=m_group)
        tl.store(p_own + 2, b_rstd, mask=m_group)
    else:
        b_center = tl.load(p_own, mask=m_group, other=0.0)
        b_remainder = tl.load(p_own + 1, mask=m_group, other=0.0)
        b_rstd = tl.load(p_own + 2, mask=m_group, other=0.0)
    b_weight, b_bias, b_factor, b_shift = modulation(p_weight, p_bias, p_scale, p_shift, i_channel, i_sample * channels, m)
    b_slope = b_rstd * b_weight
    o = p_coefficients + i_sample * channels + i_channel
    step = samples.to(tl.int64) * channels
    tl.store(o, tl.zeros((GROUPS, PER), tl.float32) + b_center, mask=m)
    tl.store(o + step, b_slope * b_factor, mask=m)
    tl.store(o + 2 * step, (b_bias - b_remainder * b_slope) * b_factor + b_shift, mask=m)


@triton.jit
def group_norm_silu_fwd_kernel(
    p_x, p_coefficients, p_y, images, channels, pixels, blocks,
    LAST: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    i_image, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    i_pixel = i_block * PIXELS + tl.arange(0, PIXELS)[None, :]
    m_channel = i_channel < channels
    o, m = tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST), m_channel & (i_pixel < pixels)
    step = images.to(tl.int64) * channels
    p_own = p_coefficients + i_image * channels + i_channel
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b_z = b_x - tl.load(p_own, mask=m_channel, other=0.0)
    b_z = b_z * tl.load(p_own + step, mask=m_channel, other=0.0) + tl.load(p_own + 2 * step, mask=m_channel, other=0.0)
    if SILU:
        b_z = b_z * sigmoid(b_z)
    tl.store(p_y + o, narrow(b_z, p_y), mask=m)


@triton.jit
def gradient_of_z(p_x, p_grad_y, o, m, b_center, b_slope, b_level, SILU: tl.constexpr):
    """dz and x - center; 0 outside of the mask."""
    b_off = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) - b_center
    b_grad = tl.load(p_grad_y + o, mask=m, other=0.0).to(tl.float32)
    if SILU:
        b_z = b_off * b_slope + b_level
        b_sigma = sigmoid(b_z)
        b_grad = tl.where(m, b_grad * b_sigma * (1.0 + b_z * sigmoid(-b_z)), 0.0)
    return b_grad, b_off


@triton.jit
def sums_kernel(
    p_x, p_grad_y, p_coefficients, p_sums, images, channels, pixels, part, parts,
    LAST: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * (x - center) per channel over `part` pixels: [2, images, parts, C]."""
    i_image, i_part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    i_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    m_channel = i_channel < channels
    step = images.to(tl.int64) * channels
    p_own = p_coefficients + i_image * channels + i_channel
    b_center = tl.load(p_own, mask=m_channel, other=0.0)
    b_slope = tl.load(p_own + step, mask=m_channel, other=0.0)
    b_level = tl.load(p_own + 2 * step, mask=m_channel, other=0.0)
    b_sum = tl.zeros((CHANNELS, PIXELS), tl.float32)
    b_product = tl.zeros((CHANNELS, PIXELS), tl.float32)
    end = min(pixels, (i_part + 1) * part)
    for i_first in range(i_part * part, end, PIXELS):
        i_pixel = i_first + tl.arange(0, PIXELS)[None, :]
        o, m = tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST), m_channel & (i_pixel < end)
        b_grad, b_off = gradient_of_z(p_x, p_grad_y, o, m, b_center, b_slope, b_level, SILU)
        b_sum += b_grad
        b_product += b_grad * b_off
    o = (i_image * parts + i_part) * channels + i_channel
    tl.store(p_sums + o, tl.sum(b_sum, axis=1, keep_dims=True), mask=m_channel)
    tl.store(p_sums + step * parts + o, tl.sum(b_product, axis=1, keep_dims=True), mask=m_channel)


@triton.jit
def pulls_kernel(
    p_sums, p_stats, p_weight, p_bias, p_scale, p_totals, p_pulls, p_grad_scale, p_grad_shift,
    samples, channels, pixels, groups, parts, by_sample, by_part,
    GROUPS: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Some groups: pull and push of dx [N, groups, 2], dscale, dshift, and what dbias and dweight sum [2, N, C]."""
    i_group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]  # counted through all samples
    m_group = i_group < samples * groups
    per = channels // groups
    i_own = tl.arange(0, PER)[None, :]
    m = m_group & (i_own < per)
    i_sample, i_channel = i_group // groups, i_group % groups * per + i_own
    step = samples.to(tl.int64) * channels
    b_total = tl.zeros((GROUPS, PER), tl.float64)
    b_product = tl.zeros((GROUPS, PER), tl.float64)
    for i_part in range(parts):
        o = i_sample * by_sample + i_part * by_part + i_channel
        b_total += tl.load(p_sums + o, mask=m, other=0.0).to(tl.float64)
        b_product += tl.load(p_sums + step * parts + o, mask=m, other=0.0).to(tl.float64)
    b_remainder = tl.load(p_stats + 3 * i_group + 1, mask=m_group, other=0.0).to(tl.float64)
    b_rstd = tl.load(p_stats + 3 * i_group + 2, mask=m_group, other=0.0).to(tl.float64)
    b_product = b_rstd * (b_product - b_remainder * b_total)
    b_weight, b_bias, b_factor, _ = modulation(p_weight, p_bias, p_scale, None, i_channel, i_sample * channels, m)
    b_by = tl.where(m, b_weight.to(tl.float64) * b_factor, 0.0)
    b_pull = -b_rstd * b_rstd * tl.sum(b_by * b_product, axis=1, keep_dims=True) / (per * pixels)
    b_push = -b_rstd * tl.sum(b_by * b_total, axis=1, keep_dims=True) / (per * pixels) - b_pull * b_remainder
    tl.store(p_pulls + 2 * i_group, b_pull.to(tl.float32), mask=m_group)
    tl.store(p_pulls + 2 * i_group + 1, b_push.to(tl.float32), mask=m_group)
    o = i_sample * channels + i_channel
    if p_totals is not None:
        tl.store(p_totals + o, (b_total * b_factor).to(tl.float32), mask=m)
        tl.store(p_totals + step + o, (b_product * b_factor).to(tl.float32), mask=m)
    if p_grad_scale is not None:
        tl.store(p_grad_scale + o, narrow((b_weight * b_product + b_bias * b_total).to(tl.float32), p_grad_scale), mask=m)
    if p_grad_shift is not None:
        tl.store(p_grad_shift + o, narrow(b_total.to(tl.float32), p_grad_shift), mask=m)


@triton.jit
def group_norm_silu_bwd_kernel(
    p_x, p_grad_y, p_coefficients, p_pulls, p_grad_x, images, channels, pixels, per, blocks,
    LAST: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    i_image, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    i_pixel = i_block * PIXELS + tl.arange(0, PIXELS)[None, :]
    m_channel = i_channel < channels
    o, m = tile_offsets(i_image, i_channel, i_pixel, channels, pixels, LAST), m_channel & (i_pixel < pixels)
    step = images.to(tl.int64) * channels
    p_own = p_coefficients + i_image * channels + i_channel
    b_center = tl.load(p_own, mask=m_channel, other=0.0)
    b_slope = tl.load(p_own + step, mask=m_channel, other=0.0)
    b_level = tl.load(p_own + 2 * step, mask=m_channel, other=0.0)
    p_pull = p_pulls + 2 * (i_image * (channels // per) + i_channel // per)
    b_pull = tl.load(p_pull, mask=m_channel, other=0.0)
    b_push = tl.load(p_pull + 1, mask=m_channel, other=0.0)
    b_grad, b_off = gradient_of_z(p_x, p_grad_y, o, m, b_center, b_slope, b_level, SILU)
    b_grad_x = b_grad * b_slope + (b_off * b_pull + b_push)
    if pixels * per == 1:  # a constant
        b_grad_x = b_grad_x * 0.0
    tl.store(p_grad_x + o, narrow(b_grad_x, p_grad_x), mask=m)


def _tile(channels, pixels, last):
    """(CHANNELS, PIXELS) of a tile, powers of two: as much as there is of what lies together, up to a limit."""
    near, far = (channels, pixels) if last else (pixels, channels)
    inner = min(1024 if INTERPRET or not last else 64, triton.next_power_of_2(near))
    outer = min(ELEMENTS // inner, triton.next_power_of_2(far))
    return (inner, outer) if last else (outer, inner)


class _Cut:
    """How one call is cut: tiles of images, parts of reductions, groups of a program."""

    def __init__(self, samples, channels, groups, pixels, last):
        self.images, wide = (samples, channels) if last else (1, samples * channels)
        self.CHANNELS, self.PIXELS = _tile(wide, pixels, last)
        self.part = self.PIXELS * TRIPS
        self.parts, self.blocks = triton.cdiv(pixels, self.part), triton.cdiv(pixels, self.PIXELS)
        across = triton.cdiv(wide, self.CHANNELS)
        self.reduction, self.elementwise = (self.images * self.parts, across), (self.images * self.blocks, across)
        self.image = (wide, pixels)
        # where the sums of a sample and of a part lie
        self.strides = (self.parts * channels, channels) if last else (channels, samples * channels)
        self.PER = triton.next_power_of_2(channels // groups)
        self.GROUPS = max(1, min(ELEMENTS // 4 // self.PER, triton.next_power_of_2(samples * groups)))
        self.grouped = (triton.cdiv(samples * groups, self.GROUPS),)
        self.tile = {"LAST": last, "CHANNELS": self.CHANNELS, "PIXELS": self.PIXELS, **OPTIONS}
        self.own = {"GROUPS": self.GROUPS, "PER": self.PER, **OPTIONS}


def _coefficients(cut, samples, channels, groups, pixels, moments, stats, weight, bias, scale, shift, eps):
    coefficients = torch.empty(3, samples, channels, dtype=torch.float32, device=stats.device)
    coefficients_kernel[cut.grouped](
        moments, stats, weight, bias, scale, shift, coefficients, samples, channels, pixels, groups,
        cut.part, cut.parts, *cut.strides, eps, HAS_MOMENTS=moments is not None, **cut.own,
    )  # fmt: skip
    return coefficients


def group_norm_silu_fwd(samples, channels, groups, pixels, last, x, weight, bias, scale, shift, eps, silu, y, stats):
    if not x.numel():
        return
    cut = _Cut(samples, channels, groups, pixels, last)
    moments = torch.empty(3, cut.parts, samples, channels, dtype=torch.float32, device=x.device)
    moments_kernel[cut.reduction](x, moments, *cut.image, cut.part, cut.parts, **cut.tile)
    if stats is None:
        stats = torch.empty(samples, groups, 3, dtype=torch.float32, device=x.device)
    coefficients = _coefficients(cut, samples, channels, groups, pixels, moments, stats, weight, bias, scale, shift, eps)
    group_norm_silu_fwd_kernel[cut.elementwise](x, coefficients, y, cut.images, *cut.image, cut.blocks, SILU=silu, **cut.tile)


def group_norm_silu_bwd(
    samples, channels, groups, pixels, last, x, weight, bias, scale, shift, silu, stats, grad_y,
    grad_x, grad_weight, grad_bias, grad_scale, grad_shift,
):  # fmt: skip
    if not x.numel():
        for grad in (grad_weight, grad_bias, grad_scale, grad_shift):
            if grad is not None:
                grad.zero_()
        return
    cut = _Cut(samples, channels, groups, pixels, last)
    coefficients = _coefficients(cut, samples, channels, groups, pixels, None, stats, weight, bias, scale, shift, 0.0)
    sums = torch.empty(2, cut.parts, samples, channels, dtype=torch.float32, device=x.device)
    sums_kernel[cut.reduction](
        x, grad_y, coefficients, sums, cut.images, *cut.image, cut.part, cut.parts, SILU=silu, **cut.tile
    )
    wanted = grad_weight is not None or grad_bias is not None
    totals = torch.empty(2, samples, channels, dtype=torch.float32, device=x.device) if wanted else None
    pulls = torch.empty(samples, groups, 2, dtype=torch.float32, device=x.device)
    pulls_kernel[cut.grouped](
        sums, stats, weight, bias, scale, totals, pulls, grad_scale, grad_shift, samples, channels, pixels, groups,
        cut.parts, *cut.strides, **cut.own,
    )  # fmt: skip
    group_norm_silu_bwd_kernel[cut.elementwise](
        x, grad_y, coefficients, pulls, grad_x, cut.images, *cut.image, channels // groups, cut.blocks,
        SILU=silu, **cut.tile,
    )  # fmt: skip
    if grad_bias is not None:
        grad_bias.copy_(totals[0].double().sum(0))
    if grad_weight is not None:
        grad_weight.copy_(totals[1].double().sum(0))


def static_cases():
    cases = []
    channels, pixels = 256, 1024
    for dtype, short in TYPES.items():
        data, size = f"*{short}", 4 if dtype == "float32" else 2
        for last in (False, True):
            CHANNELS, PIXELS = _tile(channels, pixels, last)
            what = f"{dtype} {channels}x{pixels}{' channels last' if last else ''}"
            tile = {"LAST": last, "CHANNELS": CHANNELS, "PIXELS": PIXELS}
            extents = {"channels": "i32", "pixels": "i32"}
            elements, own = CHANNELS * PIXELS, 4 / PIXELS
            reduction = {"elements": elements * TRIPS, "trips": TRIPS, "wide": dtype == "float32"}
            wide = {"elements": elements, "wide": dtype == "float32"}
            cases += [
                StaticCase(
                    moments_kernel, what, {"p_x": data, "p_moments": "*fp32", **extents, "part": "i32", "parts": "i32"}, tile,
                    OPTIONS, bytes_per_element=(size * (TRIPS + 1) + 3 * own) / TRIPS, **reduction,
                ),
                StaticCase(
                    group_norm_silu_fwd_kernel, what,
                    {"p_x": data, "p_coefficients": "*fp32", "p_y": data, "images": "i32", **extents, "blocks": "i32"},
                    {"SILU": True, **tile}, OPTIONS, bytes_per_element=2 * size + 3 * own, **wide,
                ),
                StaticCase(
                    sums_kernel, what,
                    {"p_x": data, "p_grad_y": data, "p_coefficients": "*fp32", "p_sums": "*fp32", "images": "i32", **extents,
                     "part": "i32", "parts": "i32"},
                    {"SILU": True, **tile}, OPTIONS, bytes_per_element=2 * size + 5 * own / TRIPS, **reduction,
                ),
                StaticCase(
                    group_norm_silu_bwd_kernel, what,
                    {"p_x": data, "p_grad_y": data, "p_coefficients": "*fp32", "p_pulls": "*fp32", "p_grad_x": data,
                     "images": "i32", **extents, "per": "i32", "blocks": "i32"},
                    {"SILU": True, **tile}, OPTIONS, bytes_per_element=3 * size + 5 * own, **wide,
                ),
            ]  # fmt: skip
    return cases
