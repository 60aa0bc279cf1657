"""Group normalisation, alone and with what follows it in a residual block: a scale, a shift and SiLU in one pass."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastgen import ops

__all__ = ["GroupNorm", "GroupNormSiLU"]


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` for any number of channels: where ``groups`` does not divide it, their greatest common divisor does."""

    activation: str | None = None

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__(math.gcd(groups, channels), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, activation=None)

    def coefficients(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, skip: Tensor | None = None
    ) -> Tensor:
        """What the normalisation of x, joined by the channels of skip, is of each channel: see
        :func:`fastgen.ops.group_norm_coefficients`. ``activation`` follows.
        """
        return ops.group_norm_coefficients(
            x, self.num_groups, self.weight, self.bias, skip=skip, scale=scale, shift=shift, eps=self.eps
        )


class GroupNormSiLU(GroupNorm):
    """silu(norm(x) * (1 + scale) + shift).

    Shape: x [N, C, ...], scale and shift [N, C] or [1, C] or None -> as x.
    """

    activation = "silu"

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, scale=scale, shift=shift, eps=self.eps)
