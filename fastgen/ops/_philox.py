"""Philox4x32-10 and the exact normals made from its bits, in plain PyTorch: the truth for every backend.

Layout. With a key (seed, stream, step, sample), element e of sample i is word ``e % 4`` of the block

    philox4x32_10(key = (seed mod 2^32, seed >> 32),
                  counter = (e // 4, lo, step mod 2^32, stream | hi << 8)),   lo + hi * 2^32 = sample + i

where e runs over the sample's elements in logical (C, H, W) order, whatever the memory format. With stream = step = sample
= 0 the words are those of Triton's ``tl.randint4x(seed, e // 4)``.

Normals are Box-Muller on the words (0, 1) and (2, 3), all 32 bits of each:

    u = (a + 1/2) / 2^32,   theta = 2 pi (b + 1/2) / 2^32,   (z0, z1) = sqrt(-2 ln u) (cos theta, sin theta)

in float32, by the polynomials of ``kernels/_coefficients.py``: multiplies and adds rounded one by one, no fused
multiply-add, and a correctly rounded square root. So the bits agree in every backend. |z| reaches 6.76.

Source: Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.kernels import _coefficients as coefficients

__all__ = ["normals", "philox", "uniforms", "words"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, by halves: in one piece it would pass the range of int64, and
    compiled code (``torch.compile`` on a CPU) is not bound to wrap."""
    low, high = (word & 0xFFFF) * multiplier, (word >> 16) * multiplier
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words; returns the four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def words(key: Tensor, samples: int, elements: int) -> list[Tensor]:
    """The four words of every quartet: int64 tensors [samples, ceil(elements / 4)] of values below 2**32."""
    rows = key if key.dim() == 2 else key.expand(samples, 4)
    seed, stream, step, sample = rows.unsqueeze(-1).unbind(1)
    if key.dim() == 1:
        sample = sample + torch.arange(samples, device=key.device).unsqueeze(1)
    quartet = torch.arange((elements + 3) // 4, device=key.device)
    counter = torch.broadcast_tensors(quartet, sample & _MASK, step & _MASK, stream | (sample >> 32) << 8)
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


def _horner(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + term
    return total


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two exact float32 normals from two tensors of 32-bit words."""
    shifted = a.float() + 0.5
    bits = shifted.view(torch.int32).long() + (0x3F800000 - coefficients.SQRT_HALF_BITS)
    exponent = ((bits >> 23) - (127 + 32)).float()
    mantissa = ((bits & 0x7FFFFF) + coefficients.SQRT_HALF_BITS).int().view(torch.float32)
    f = mantissa - 1.0
    minus_2_log = f * _horner(f, coefficients.LOG) + exponent * coefficients.MINUS_2_LN_2
    # float32 sqrt of the vector math library behind torch is not correctly rounded; through float64 it is
    radius = minus_2_log.double().sqrt().float()

    # t in [-1, 1): the angle's distance from the nearest multiple of pi/2, in units of pi/4
    low = ((b << 2) & _MASK) | 2
    t = (low - ((low >> 31) << 32)).float() * 2.0**-31
    square = t * t
    sine, cosine = t * _horner(square, coefficients.SIN), _horner(square, coefficients.COS)
    quadrant = ((b + 0x20000000) & _MASK) >> 30
    swap = (quadrant & 1).bool()
    x, y = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    x = torch.where(((quadrant + 1) & 2).bool(), -x, x)
    y = torch.where((quadrant & 2).bool(), -y, y)
    return radius * x, radius * y


def _shaped(quartets: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    samples, elements = shape[0], math.prod(shape[1:])
    return torch.stack(quartets, -1).reshape(samples, 4 * quartets[0].shape[1])[:, :elements].reshape(shape)


def normals(shape: tuple[int, ...], key: Tensor) -> Tensor:
    """Exact float32 standard normals of ``shape`` (samples first) for a key; see the module for the definition."""
    a, b, c, d = words(key, shape[0], math.prod(shape[1:]))
    return _shaped([*box_muller(a, b), *box_muller(c, d)], shape)


def uniforms(shape: tuple[int, ...], key: Tensor) -> Tensor:
    """Exact float32 uniforms (floor(w / 2**9) + 1/2) / 2**23: strictly inside (0, 1), 2**23 values, mean exactly 1/2."""
    quartets = words(key, shape[0], math.prod(shape[1:]))
    return _shaped([((w >> 9).float() + 0.5) * 2.0**-23 for w in quartets], shape)
