"""Group normalisation followed by SiLU, with an optional scale and shift between them: the seam of every residual block."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GroupNorm", "GroupNormSiLU"]


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` for any number of channels: where ``groups`` does not divide it, their greatest common divisor does."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__(math.gcd(groups, channels), channels, eps)


class GroupNormSiLU(GroupNorm):
    """silu(norm(x) * (1 + scale) + shift).

    Shape: x [N, C, ...], scale and shift [N, C] or [1, C] or None -> as x.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        ones = (1,) * (x.ndim - 2)
        if scale is not None:
            h = h * (1 + scale.unflatten(1, (-1, *ones)))
        if shift is not None:
            h = h + shift.unflatten(1, (-1, *ones))
        return F.silu(h)
