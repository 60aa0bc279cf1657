"""Grey levels as real numbers: dequantised by uniform noise for a density, and back.

Source: Uria, Murray and Larochelle (2013), "RNADE: the real-valued neural autoregressive density-estimator", section 6.
"""

from __future__ import annotations

from torch import Tensor

from fastgen import ops

__all__ = ["dequantize", "quantize"]


def dequantize(x: Tensor, levels: int, key: Tensor | None = None) -> Tensor:
    """Grey levels x in [0, 1] to v in (0, 1): each spread evenly over its share of 1 / levels.

    Args:
        x: [N, ...].
        levels: how many grey levels there are; 256 for 8 bits.
        key: of the noise, see :mod:`fastgen.random`; None draws from PyTorch's generator.
    """
    u = ops.uniform(tuple(x.shape), key, dtype=x.dtype, device=x.device if key is None else None)
    return (x * (levels - 1) + u) / levels


def quantize(v: Tensor, levels: int) -> Tensor:
    """The grey level in [0, 1] that v lies in; values outside (0, 1) go to the nearest."""
    return (v * levels).floor().clamp(0, levels - 1) / (levels - 1)
