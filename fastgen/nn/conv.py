"""Convolution of images with what follows it in a residual block: a shift per channel and the residual sum."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops

__all__ = ["Conv2d", "channels_last", "zero"]


M = TypeVar("M", bound=nn.Module)


def zero(module: M) -> M:
    """The module with all its parameters zero: a branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def channels_last(x: Tensor) -> Tensor:
    """The image [N, C, H, W] with its channels last in memory, where convolutions and group norm are fastest on a CPU.

    A single channel lies either way. PyTorch goes by the strides then, and lays the result of a convolution likewise: these
    are made to say channels last.
    """
    if x.shape[1] == 1:
        return x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


class Conv2d(nn.Conv2d):
    """conv(x) + shift + residual.

    3x3 convolutions of stride 1 are trained by minimal filtering (:func:`fastgen.ops.winograd_conv2d`) on CPUs where that is
    faster, with the sums inside.

    Shape: x [N, C, H, W]; shift [N, O], or [1, O] for the whole batch (then it joins the bias and costs nothing); residual
    as the result.
    """

    bias: Tensor

    def forward(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        tile = self._tile(x)
        if tile is not None:
            bias = self.bias if shift is None else self.bias + shift
            return ops.winograd_conv2d(x, self.weight, bias, residual, tile=tile)
        shared = shift is not None and shift.shape[0] == 1
        bias = self.bias + shift[0] if shared else self.bias  # type: ignore[index]
        h = F.conv2d(x, self.weight, bias, self.stride, self.padding)
        if shift is not None and not shared:
            h = h + shift[:, :, None, None]
        return h if residual is None else h + residual

    def _tile(self, x: Tensor) -> Literal[2, 4] | None:
        """The tile of minimal filtering; None where a plain convolution is to serve: where it is faster, where no gradients are
        wanted (:func:`fastgen.nn.inference.optimize` is for that), and where something wants to see or to change it.
        """
        if not torch.is_grad_enabled() or not (self.weight.requires_grad or x.requires_grad):
            return None
        if (self.kernel_size, self.stride, self.padding, self.dilation) != ((3, 3), (1, 1), (1, 1), (1, 1)):
            return None
        if x.dtype is not self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if torch.compiler.is_compiling() or torch._C._is_tracing() or _pushes_forward():
            return None
        return ops.winograd_tile(x, self.out_channels, training=True)


def _pushes_forward() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active: kernels have no rules for them."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
