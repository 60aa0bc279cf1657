"""Convolutional encoder and decoder between an image and a small image of latents (Esser et al. 2021, Rombach et al. 2022).

Residual blocks as in the U-Net, without time and without skips; attention at the coarsest level.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from fastgen.nn.attention import ImageAttention
from fastgen.nn.blocks import Block, Down
from fastgen.nn.conv import Conv2d, channels_last
from fastgen.nn.norm import GroupNormSiLU
from fastgen.nn.resnet import Downsample, ResBlock, Upsample

__all__ = ["ImageDecoder", "ImageEncoder"]


def _block(n: int, m: int, attends: bool, groups: int) -> Block:
    return Block(ResBlock(n, m, groups=groups), ImageAttention(m, groups=groups) if attends else None)


def _inside(module: nn.Module, x: Tensor) -> Tensor:
    """x as the layers want it: the dtype of the weights, on a CPU channels-last."""
    h = x.to(next(module.parameters()).dtype)
    return channels_last(h) if x.device.type == "cpu" else h


class ImageEncoder(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H / 2^L, W / 2^L], where L + 1 widths are given; odd sizes are rounded down.

    Args:
        in_channels, out_channels: of the image and of the result.
        widths: channels of each level, finest first; each level but the last halves the image.
        layers: residual blocks of a level.
        attention_levels: levels whose blocks are followed by attention.
        middle_attention: attention between the two residual blocks after the coarsest level.
        groups: of the group normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (128, 256, 512, 512),
        layers: int = 2,
        attention_levels: Collection[int] = (),
        middle_attention: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (n, m) in enumerate(itertools.pairwise([widths[0], *widths])):
            blocks = [_block(n if j == 0 else m, m, i in attention_levels, groups) for j in range(layers)]
            self.down.append(Down(blocks, Downsample(m, padding=0) if i < len(widths) - 1 else None))
        deep = widths[-1]
        self.middle = nn.ModuleList([_block(deep, deep, middle_attention, groups), _block(deep, deep, False, groups)])
        self.norm_out = GroupNormSiLU(deep, groups)
        self.conv_out = Conv2d(deep, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(_inside(self, x))
        for level in self.down:
            h = level(h)[-1]
        for block in self.middle:
            h = block(h)
        return self.conv_out(self.norm_out(h)).to(x.dtype)


class ImageDecoder(nn.Module):
    """[N, in_channels, h, w] -> [N, out_channels, h 2^L, w 2^L], the mirror of :class:`ImageEncoder` with one more residual
    block on each level. Arguments as there; ``widths`` and levels are counted finest first here too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (128, 256, 512, 512),
        layers: int = 2,
        attention_levels: Collection[int] = (),
        middle_attention: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        n = widths[-1]
        self.conv_in = Conv2d(in_channels, n, 3, padding=1)
        self.middle = nn.ModuleList([_block(n, n, middle_attention, groups), _block(n, n, False, groups)])
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(widths))):
            level: list[nn.Module] = [_block(n if j == 0 else m, m, i in attention_levels, groups) for j in range(layers + 1)]
            self.up.append(nn.Sequential(*level, *([Upsample(m)] if i > 0 else [])))
            n = m
        self.norm_out = GroupNormSiLU(n, groups)
        self.conv_out = Conv2d(n, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(_inside(self, z))
        for block in self.middle:
            h = block(h)
        for level in self.up:
            h = level(h)
        return self.conv_out(self.norm_out(h)).to(z.dtype)
