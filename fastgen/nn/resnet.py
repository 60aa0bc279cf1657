"""Residual blocks of image networks, and the layers that halve and double an image (Ho et al. 2020, Dhariwal & Nichol 2021)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.conv import Conv2d, zero
from fastgen.nn.norm import GroupNormSiLU

__all__ = ["Downsample", "ResBlock", "Upsample", "halve", "upsample"]

Size = tuple[int, int]


def halve(x: Tensor) -> Tensor:
    """Mean of each 2x2 square; an odd last row or column is averaged by itself: [N, C, H, W] -> [N, C, H/2, W/2]."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def upsample(x: Tensor, size: Size | None = None) -> Tensor:
    """Nearest neighbour, to twice the size or to ``size``."""
    return F.interpolate(x, size=size, mode="nearest") if size else F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) with the embedding))), the second convolution zero at first.

    Args:
        inputs, outputs: channels; a 1x1 convolution carries x where they differ.
        embedding: size of the conditioning vector; None: the block takes none.
        modulation: "add" adds a projection of the vector after the first convolution; "scale_shift" scales and shifts the
            second normalisation with it (adaptive group norm).
        groups, eps: of the normalisations.
        dropout: before the second convolution.
        resample: "down" halves the image, "up" doubles it, between the first normalisation and convolution and on the
            carried x.
        divisor: the sum is divided by it.

    Shape: x [N, inputs, H, W], embedding [N or 1, embedding] -> [N, outputs, H', W']. Some of the channels, the last, may come
    in a tensor of their own, skip.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding: int | None = None,
        modulation: Literal["add", "scale_shift"] = "add",
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        resample: Literal["down", "up"] | None = None,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        if modulation not in ("add", "scale_shift"):
            raise ValueError(f"modulation must be 'add' or 'scale_shift', got {modulation!r}")
        self.modulation, self.resample, self.divisor = modulation, resample, divisor
        self.norm1 = GroupNormSiLU(inputs, groups, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.project: nn.Module | None = None
        if embedding is not None:
            self.project = nn.Linear(embedding, outputs if modulation == "add" else 2 * outputs)
        self.norm2 = GroupNormSiLU(outputs, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(Conv2d(outputs, outputs, 3, padding=1))
        self.carry = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, size: Size | None = None, skip: Tensor | None = None
    ) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], 1)
        h = self.norm1(x)
        if self.resample == "down":
            h, x = halve(h), halve(x)
        elif self.resample == "up":
            h, x = upsample(h, size), upsample(x, size)
        added, scale, shift = self.told(embedding)
        h = self.norm2(self.conv1(h, added), scale, shift)
        h = self.conv2(self.dropout(h), residual=x if self.carry is None else self.carry(x))
        return h if self.divisor == 1 else h / self.divisor

    def told(self, embedding: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the embedding adds to the first convolution; what it scales and shifts the second normalisation with."""
        if self.project is None:
            return None, None, None
        told = self.project(embedding)
        return (told, None, None) if self.modulation == "add" else (None, *(half.contiguous() for half in told.chunk(2, 1)))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: [N, C, H, W] -> [N, C, H/2, W/2].

    Args:
        channels: of both.
        padding: 1 pads all sides and rounds an odd size up; 0 pads the right and the bottom alone, as the first DDPM code did,
            and rounds down.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"padding of a downsampling convolution must be 0 or 1, got {padding}")
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, or to ``size``, then a 3x3 convolution: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(upsample(x, size))
