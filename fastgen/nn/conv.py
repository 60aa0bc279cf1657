"""Convolution of images with what follows it in a residual block: a shift per channel and the residual sum."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conv2d", "zero"]


M = TypeVar("M", bound=nn.Module)


def zero(module: M) -> M:
    """The module with all its parameters zero: a branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Conv2d(nn.Conv2d):
    """conv(x) + shift + residual.

    Shape: x [N, C, H, W]; shift [N, O], or [1, O] for the whole batch (then it joins the bias and costs nothing); residual
    as the result.
    """

    bias: Tensor

    def forward(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        shared = shift is not None and shift.shape[0] == 1
        bias = self.bias + shift[0] if shared else self.bias  # type: ignore[index]
        h = F.conv2d(x, self.weight, bias, self.stride, self.padding)
        if shift is not None and not shared:
            h = h + shift[:, :, None, None]
        return h if residual is None else h + residual
