"""Attention over tokens and over the pixels of an image: by :func:`fastgen.ops.attention` where that has kernels, narrow
heads on CPUs, else by ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn.conv import zero
from fastgen.nn.norm import GroupNorm

__all__ = ["Attention", "ImageAttention", "Projection", "heads_of"]


def heads_of(channels: int, head_channels: int | None) -> int:
    """Number of heads of about ``head_channels`` channels each: ``channels // head_channels`` where that divides, else the next
    lower count that does. None: one head.

    >>> heads_of(256, 64), heads_of(100, 30), heads_of(8, 64), heads_of(8, None)
    (4, 2, 1, 1)
    """
    if head_channels is None:
        return 1
    return next(h for h in range(max(channels // head_channels, 1), 0, -1) if channels % h == 0)


class Projection(nn.Linear):
    """``nn.Linear`` with what follows it in a residual branch: linear(x) + residual, of the shape of the result or None."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        return h if residual is None else h + residual


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to the tokens of a context.

    Args:
        channels: of the tokens.
        heads: divides ``channels``.
        context: channels of the context's tokens; None: self-attention.
        zero_out: the last layer is zero at first.

    Shape: x [N, T, channels], context [N or 1, S, context] -> [N, T, channels]; residual, as x, is added.
    """

    def __init__(self, channels: int, heads: int = 1, context: int | None = None, *, zero_out: bool = True) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide channels: {channels} channels, {heads} heads")
        self.heads = heads
        self.context = context
        # one product makes query, key and value; a context has its own
        self.to_query = None if context is None else Projection(channels, channels)
        self.to_rest = Projection(channels, 3 * channels) if context is None else Projection(context, 2 * channels)
        self.out = Projection(channels, channels)
        if zero_out:
            zero(self.out)

    def forward(self, x: Tensor, context: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.out(self.attend(self.first(x), context), residual)

    @property
    def first(self) -> Projection:
        """The projection of x."""
        return self.to_rest if self.to_query is None else self.to_query

    def attend(self, projected: Tensor, context: Tensor | None = None) -> Tensor:
        """Attention of ``first`` of the tokens: [N, T, channels or 3 channels] -> [N, T, channels]."""
        n, tokens, _ = projected.shape
        if self.to_query is None:
            joint = projected.view(n, tokens, 3, self.heads, -1)
            parts, given = joint.unbind(2), (joint,)
        else:
            if context is None:
                raise ValueError("cross-attention needs a context")
            query = projected.view(n, tokens, self.heads, -1)
            both = self.to_rest(context.to(projected.dtype)).view(*context.shape[:2], 2, self.heads, -1)
            parts = given = query, *both.expand(n, -1, -1, -1, -1).unbind(2)
        if ops.attention_serves(parts[0]):
            h = ops.attention(*given)
        else:
            query, key, value = (part.transpose(1, 2) for part in parts)
            h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return h.reshape(n, tokens, -1)


class ImageAttention(nn.Module):
    """x + attention(norm(x)) over the pixels.

    Args:
        channels, heads, context: as in :class:`Attention`.
        groups, eps: of the normalisation; ``groups=0``: none.
        divisor: the sum is divided by it.

    Shape: x [N, C, H, W] -> the same.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        context: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups, eps) if groups else None
        self.attention = Attention(channels, heads, context)
        self.divisor = divisor

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        n, channels, height, width = x.shape
        h = x if self.norm is None else self.norm(x)

        def tokens(image: Tensor) -> Tensor:  # free of copies on channels-last images, as is the way back
            return image.permute(0, 2, 3, 1).reshape(n, height * width, channels)

        last = x.is_contiguous(memory_format=torch.channels_last)
        h = self.attention(tokens(h), context, tokens(x) if last else None)
        h = h.view(n, height, width, channels).permute(0, 3, 1, 2)
        x = h if last else x + h
        return x if self.divisor == 1 else x / self.divisor
