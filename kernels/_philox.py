"""Philox words and exact normals inside Triton kernels; fastgen/ops/_philox.py is the definition they reproduce bit by bit.

A tile [ROWS, BLOCK] is made in registers: ``BLOCK // 4`` quartets a row, joined so that element 4 j + k stands at its place and
loads and stores stay 16 bytes wide.
"""

import triton
import triton.language as tl
from fastgen.kernels import _coefficients as c
from fastgen.kernels._launch import INTERPRET

LOG0, LOG1, LOG2, LOG3, LOG4, LOG5, LOG6, LOG7, LOG8 = (tl.constexpr(v) for v in c.LOG)
SIN0, SIN1, SIN2, SIN3 = (tl.constexpr(v) for v in c.SIN)
COS0, COS1, COS2, COS3, COS4 = (tl.constexpr(v) for v in c.COS)
MINUS_2_LN_2 = tl.constexpr(c.MINUS_2_LN_2)
SQRT_HALF_BITS = tl.constexpr(c.SQRT_HALF_BITS)
ONE_MINUS_SQRT_HALF_BITS = tl.constexpr(0x3F800000 - c.SQRT_HALF_BITS)
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10. One 64-bit product gives both of its halves in one instruction; tl.philox takes two."""
    for _ in tl.static_range(10):
        low = c0.to(tl.uint64) * 0xD2511F53
        high = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (high >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = high.to(tl.uint32)
        c2 = (low >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = low.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_words(p_key, KEY_STRIDE: tl.constexpr, i_sample, m_sample, i_quartet):
    """The four words of quartets i_quartet [1, Q] of samples i_sample [R, 1] (int64, those under the mask m_sample)."""
    if KEY_STRIDE == 0:
        seed, stream, step = tl.load(p_key), tl.load(p_key + 1), tl.load(p_key + 2)
        sample = tl.load(p_key + 3) + i_sample
    else:
        p_row = p_key + i_sample * KEY_STRIDE
        seed = tl.load(p_row, mask=m_sample, other=0)
        stream = tl.load(p_row + 1, mask=m_sample, other=0)
        step = tl.load(p_row + 2, mask=m_sample, other=0)
        sample = tl.load(p_row + 3, mask=m_sample, other=0)
    zero = i_quartet.to(tl.uint32) * 0
    c0 = i_quartet.to(tl.uint32) + (i_sample * 0).to(tl.uint32)
    c1 = zero + sample.to(tl.uint32)
    c2 = zero + step.to(tl.uint32)
    c3 = zero + (stream | ((sample >> 32) << 8)).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    return philox(c0, c1, c2, c3, k0, k1)


@triton.jit
def exact_sqrt(x):
    """Correctly rounded square root of 0 or a number in [1e-30, 1e30].

    The instructions that NVIDIA's own sqrt.rn takes for such a number, without its branch to a routine for the others.
    """
    if _INTERPRET:
        root = tl.sqrt_rn(x)
    else:
        inverse = tl.rsqrt(tl.maximum(x, 1e-30))
        guess = x * inverse
        root = tl.fma(tl.fma(-guess, guess, x), 0.5 * inverse, guess)
    return root


@triton.jit
def box_muller(a, b, FAST: tl.constexpr):
    """Two normals from two words. FAST takes the approximate square root; fusing is the compiler's option."""
    shifted = a.to(tl.float32) + 0.5
    word = shifted.to(tl.uint32, bitcast=True) + ONE_MINUS_SQRT_HALF_BITS
    exponent = ((word >> 23).to(tl.int32) - 159).to(tl.float32)
    f = ((word & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = f * LOG8 + LOG7
    p = p * f + LOG6
    p = p * f + LOG5
    p = p * f + LOG4
    p = p * f + LOG3
    p = p * f + LOG2
    p = p * f + LOG1
    p = p * f + LOG0
    minus_2_log = f * p + exponent * MINUS_2_LN_2
    radius = tl.sqrt(minus_2_log) if FAST else exact_sqrt(minus_2_log)

    t = ((b << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    square = t * t
    sine = square * SIN3 + SIN2
    sine = sine * square + SIN1
    sine = sine * square + SIN0
    sine = sine * t
    cosine = square * COS4 + COS3
    cosine = cosine * square + COS2
    cosine = cosine * square + COS1
    cosine = cosine * square + COS0

    turned = b + 0x20000000
    swap = (turned & 0x40000000) != 0
    x_sign = (turned + 0x40000000) & 0x80000000
    y_sign = turned & 0x80000000
    x = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ x_sign
    y = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ y_sign
    return radius * x.to(tl.float32, bitcast=True), radius * y.to(tl.float32, bitcast=True)


@triton.jit
def interleave(a, b, c, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements a0 b0 c0 d0 a1 b1 ... along the rows of four blocks [ROWS, BLOCK // 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK))


@triton.jit
def normal_tile(
    p_key,
    KEY_STRIDE: tl.constexpr,
    i_sample,
    m_sample,
    i_block,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """Normals [ROWS, BLOCK] of elements [i_block * BLOCK, (i_block + 1) * BLOCK) of samples i_sample [ROWS, 1]."""
    i_quartet = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    a, b, c, d = philox_words(p_key, KEY_STRIDE, i_sample, m_sample, i_quartet)
    z0, z1 = box_muller(a, b, FAST)
    z2, z3 = box_muller(c, d, FAST)
    return interleave(z0, z1, z2, z3, ROWS, BLOCK)


@triton.jit
def uniform_word(w):
    return ((w >> 9).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def uniform_tile(p_key, KEY_STRIDE: tl.constexpr, i_sample, m_sample, i_block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Uniforms [ROWS, BLOCK]; arguments as for normal_tile."""
    i_quartet = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    a, b, c, d = philox_words(p_key, KEY_STRIDE, i_sample, m_sample, i_quartet)
    return interleave(uniform_word(a), uniform_word(b), uniform_word(c), uniform_word(d), ROWS, BLOCK)
