"""Diffusion transformer: patches of an image as tokens, every block scaled, shifted and gated by time and label (adaLN-zero).

    h = h + gate_1 * attention((1 + scale_1) * norm(h) + shift_1)
    h = h + gate_2 * mlp((1 + scale_2) * norm(h) + shift_2)          all six a linear map of silu(embedding), zero at first

Peebles & Xie (2023), arXiv:2212.09748; cross-attention to a context between the two as in Chen et al. (2024), arXiv:2310.00426.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.attention import Attention, heads_of
from fastgen.nn.conv import zero
from fastgen.nn.network import recompute
from fastgen.nn.time import Conditioning, Sinusoidal

__all__ = ["DiT", "position_embedding"]


def position_embedding(height: int, width: int, features: int, device: torch.device | None = None) -> Tensor:
    """Fixed sines and cosines of the column and the row of each cell of a grid: [height * width, features], float32.

    The first half of the features tells the column, the second the row; each has its sines before its cosines, at frequencies
    10000^(-k / (features / 4)). ``features`` must be divisible by 4.
    """
    if features % 4:
        raise ValueError(f"features of a two-dimensional position must be divisible by 4, got {features}")
    of = Sinusoidal(features // 2)
    column = of(torch.arange(width, device=device))[None].expand(height, -1, -1)
    row = of(torch.arange(height, device=device))[:, None].expand(-1, width, -1)
    return torch.cat([column, row], 2).flatten(0, 1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) * norm(x) + shift, over the last axis of [N, T, C] with [N or 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class TransformerBlock(nn.Module):
    """Attention, cross-attention where there is a context, and a two-layer perceptron: [N, T, C] -> [N, T, C]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, context: int | None) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, heads, zero_out=False)
        self.cross = None if context is None else Attention(width, heads, context)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor, context: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(told).chunk(6, 1)
        x = x + gate1[:, None] * self.attention(modulate(x, scale1, shift1))
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + gate2[:, None] * self.mlp(modulate(x, scale2, shift2))


class DiT(nn.Module):
    """Transformer over the patches of an image of any size.

    Args:
        in_channels: of x.
        out_channels: of the result; None: as x. Twice that for a learned variance.
        patch: side of a patch; sizes that it does not divide are padded with zeros on the right and below, and cut again.
        width: channels of a token, divisible by 4.
        depth: blocks.
        head_channels: channels of an attention head, about; None: one head.
        mlp_ratio: hidden width of a block's perceptron over ``width``.
        num_classes: class labels; None: none.
        context_channels: channels of the context's tokens; None: no context.
        time_scale: the time is multiplied by it before its sinusoids; 1000 suits times in [0, 1].
        checkpointing: recompute the activations of blocks in the backward pass instead of keeping them.

    Shape: see :class:`fastgen.nn.network.Network`. Every block is the identity at first, and the result zero.

    >>> net = DiT(3, width=32, depth=2, head_channels=16, num_classes=10)
    >>> net(torch.randn(2, 3, 9, 7), torch.tensor([3.0, 500.0]), labels=torch.tensor([1, 10])).shape
    torch.Size([2, 3, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        head_channels: int | None = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        context_channels: int | None = None,
        time_scale: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"patch must be at least 1, got {patch}")
        if width % 4:
            raise ValueError(f"width must be divisible by 4, for positions in two dimensions, got {width}")
        self.in_channels, self.out_channels = in_channels, in_channels if out_channels is None else out_channels
        self.patch, self.width, self.checkpointing = patch, width, checkpointing
        self.num_classes, self.context_channels = num_classes, context_channels
        self.embed = nn.Linear(in_channels * patch * patch, width)
        features = Sinusoidal(256, flip_sin_to_cos=True, scale=time_scale)
        self.conditioning = Conditioning(features, width, num_classes=num_classes)
        self.null_context = None
        if context_channels is not None:
            self.null_context = nn.Parameter(torch.randn(1, 1, context_channels) * 0.02)
        heads = heads_of(width, head_channels)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp_ratio, context_channels) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, self.out_channels * patch * patch)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.weight.any():  # those made zero stay so
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.conditioning.time.first, self.conditioning.time.second):
            nn.init.normal_(linear.weight, std=0.02)
        zero(self.modulation)
        zero(self.out)

    def forward(self, x: Tensor, time: Tensor, *, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, {self.in_channels}, H, W], got {list(x.shape)}")
        if context is not None and self.null_context is None:
            raise ValueError("a context was given to a network without one: make it with context_channels")
        context = self.null_context if context is None else context
        told = F.silu(self.conditioning(time, labels)).to(self.embed.weight.dtype)

        p, (n, _, height, width) = self.patch, x.shape
        rows, columns = -(-height // p), -(-width // p)
        padded = F.pad(x.to(self.embed.weight.dtype), (0, columns * p - width, 0, rows * p - height))
        h = self.embed(_patches(padded, p))
        h = h + position_embedding(rows, columns, self.width, x.device).to(h.dtype)
        for block in self.blocks:
            h = recompute(block, h, told, context, enabled=self.checkpointing)
        shift, scale = self.modulation(told).chunk(2, 1)
        h = self.out(modulate(h, scale, shift))
        image = h.view(n, rows, columns, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(n, self.out_channels, rows * p, columns * p)[:, :, :height, :width].to(x.dtype).contiguous()


def _patches(x: Tensor, p: int) -> Tensor:
    """[N, C, H, W] -> [N, (H / p) (W / p), C p p], tokens in reading order."""
    n, channels, height, width = x.shape
    cut = x.view(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n, -1, channels * p * p)
