"""What U-Nets and image autoencoders are built of: a block, and the blocks of one resolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastgen.nn.attention import ImageAttention
from fastgen.nn.network import recompute
from fastgen.nn.resnet import Downsample, ResBlock

__all__ = ["Block", "Down"]


class Block(nn.Module):
    """A residual block, then self-attention, then cross-attention, where there are any. Channels of skip follow those of x."""

    def __init__(
        self, residual: ResBlock, attention: ImageAttention | None = None, cross: ImageAttention | None = None
    ) -> None:
        super().__init__()
        self.residual, self.attention, self.cross = residual, attention, cross

    def forward(
        self, x: Tensor, told: Tensor | None = None, context: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        x = self.residual(x, told, skip=skip)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.cross is None else self.cross(x, context)


class Down(nn.Module):
    """The blocks of one resolution on the way down, then the layer that halves it; None at the coarsest.

    Gives what each of them made, in order.
    """

    def __init__(self, blocks: Sequence[Block], resample: Downsample | ResBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(
        self, x: Tensor, told: Tensor | None = None, context: Tensor | None = None, checkpointing: bool = False
    ) -> list[Tensor]:
        made = []
        for block in self.blocks:
            x = recompute(block, x, told, context, enabled=checkpointing)
            made.append(x)
        if self.resample is not None:
            made.append(recompute(self.resample, x, told, enabled=checkpointing))
        return made
