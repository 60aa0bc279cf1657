"""U-Net of diffusion models: residual blocks and attention on the way down and up, joined level by level.

Ho et al. (2020), arXiv:2006.11239; adaptive group norm, resampling blocks and heads of Dhariwal & Nichol (2021),
arXiv:2105.05233; cross-attention of Rombach et al. (2022), arXiv:2112.10752. General enough to be any ``UNet2DModel`` of
diffusers without FIR filters: :mod:`fastgen.interop.diffusers` loads its weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.attention import ImageAttention, heads_of
from fastgen.nn.blocks import Block, Down
from fastgen.nn.conv import Conv2d, channels_last, zero
from fastgen.nn.network import recompute
from fastgen.nn.norm import GroupNormSiLU
from fastgen.nn.resnet import Downsample, ResBlock, Upsample
from fastgen.nn.time import Conditioning, Fourier, Learned, Sinusoidal

__all__ = ["UNet"]

Resampling = Literal["conv", "residual"]


class Up(nn.Module):
    """The blocks of one resolution on the way up, each fed the last of the skips, then the layer that doubles it to the size of
    the next skip; None at the finest.
    """

    def __init__(self, blocks: Sequence[Block], resample: Upsample | ResBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, x: Tensor, skips: list[Tensor], told: Tensor, context: Tensor | None, checkpointing: bool) -> Tensor:
        for block in self.blocks:
            x = recompute(block, x, told, context, skips.pop(), enabled=checkpointing)
        if self.resample is None:
            return x
        return recompute(self.resample, x, told, tuple(skips[-1].shape[-2:]), enabled=checkpointing)


class UNet(nn.Module):
    """U-Net over images of any size.

    Args:
        in_channels: of x.
        out_channels: of the result; None: as x. Twice that for a learned variance.
        widths: channels of each level, finest first; each level but the last halves the image.
        layers: residual blocks of a level on the way down; one more on the way up.
        attention_levels: levels with self-attention, 0 the finest.
        attention_levels_up: the same for the way up; None: as on the way down.
        middle: what is between the ways: "attention" (between two residual blocks), "residual" (the two alone) or "none".
        head_channels: channels of an attention head, about (see :func:`fastgen.nn.attention.heads_of`); None: one head.
        num_classes: class labels; None: none.
        context_channels: channels of the context's tokens, attended to wherever there is self-attention; None: no context.
        groups, eps: of the group normalisation; channels that ``groups`` does not divide take their common divisor.
        middle_groups: groups before the attention of the middle; None: ``groups``; 0: not normalised.
        modulation: how the time enters a residual block: "add", or "scale_shift" (adaptive group norm).
        dropout: in the residual blocks.
        downsample, upsample: "conv", or "residual" (a residual block that resamples); one for all levels, or one for each
            level that resamples, in the order in which x meets them.
        downsample_padding: of the convolution: see :class:`fastgen.nn.resnet.Downsample`.
        middle_divisor: sums of the middle are divided by it.
        time: "sinusoidal", "fourier" (of log time: a noise level) or "learned" (a vector for each of ``time_steps``).
        time_scale: the time is multiplied by it before its sinusoids; 1000 suits times in [0, 1].
        flip_sin_to_cos, freq_shift: order of the features of the time, and DDPM's last frequency: see :mod:`fastgen.nn.time`.
        time_steps: of the learned embedding.
        embedding: size of the conditioning vector; None: four times the first width.
        labels: what a label is: "index" (of a class), "number" or "vector": see :class:`fastgen.nn.time.Conditioning`.
        center_input: feed 2 x - 1.
        divide_by_time: divide the result by the time, as score networks of the variance-exploding SDE do.
        checkpointing: recompute the activations of blocks in the backward pass instead of keeping them.

    Shape: see :class:`fastgen.nn.network.Network`. The last convolution, and the last layer of every residual and attention
    branch, are zero at first. On a CPU images run channels-last inside.

    >>> net = UNet(3, widths=(16, 32), layers=1, attention_levels=(1,), num_classes=10)
    >>> net(torch.randn(2, 3, 9, 7), torch.tensor([3.0, 500.0]), labels=torch.tensor([1, 10])).shape
    torch.Size([2, 3, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        widths: Sequence[int] = (128, 256, 256, 256),
        layers: int = 2,
        attention_levels: Collection[int] = (1,),
        attention_levels_up: Collection[int] | None = None,
        middle: Literal["attention", "residual", "none"] = "attention",
        head_channels: int | None = 64,
        num_classes: int | None = None,
        context_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        middle_groups: int | None = None,
        modulation: Literal["add", "scale_shift"] = "add",
        dropout: float = 0.0,
        downsample: Resampling | Sequence[Resampling] = "conv",
        upsample: Resampling | Sequence[Resampling] = "conv",
        downsample_padding: int = 1,
        middle_divisor: float = 1.0,
        time: Literal["sinusoidal", "fourier", "learned"] = "sinusoidal",
        time_scale: float = 1.0,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 0.0,
        time_steps: int | None = None,
        embedding: int | None = None,
        labels: Literal["index", "number", "vector"] = "index",
        center_input: bool = False,
        divide_by_time: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        out_channels = in_channels if out_channels is None else out_channels
        attention_levels_up = attention_levels if attention_levels_up is None else attention_levels_up
        _check(widths, layers, {*attention_levels, *attention_levels_up}, middle)
        embedding = 4 * widths[0] if embedding is None else embedding
        self.num_classes, self.context_channels = num_classes, context_channels
        self.center_input, self.divide_by_time, self.checkpointing = center_input, divide_by_time, checkpointing

        features = _time_features(time, widths[0], time_scale, flip_sin_to_cos, freq_shift, time_steps)
        self.conditioning = Conditioning(features, embedding, num_classes=num_classes, labels=labels)
        self.null_context = None
        if context_channels is not None:
            self.null_context = nn.Parameter(torch.randn(1, 1, context_channels) * 0.02)

        def residual(n: int, m: int, resample: Literal["down", "up"] | None = None, divisor: float = 1.0) -> ResBlock:
            return ResBlock(
                n, m, embedding=embedding, modulation=modulation, groups=groups, eps=eps, dropout=dropout,
                resample=resample, divisor=divisor,
            )  # fmt: skip

        def block(n: int, m: int, attends: bool, groups: int = groups, divisor: float = 1.0) -> Block:
            def attention(context: int | None) -> ImageAttention:
                return ImageAttention(m, heads_of(m, head_channels), context, groups=groups, eps=eps, divisor=divisor)

            cross = attention(context_channels) if attends and context_channels is not None else None
            return Block(residual(n, m, divisor=divisor), attention(None) if attends else None, cross)

        self.conv_in = Conv2d(in_channels, widths[0], 3, padding=1)
        last = len(widths) - 1
        downs, ups = _per_level(downsample, last, "downsample"), _per_level(upsample, last, "upsample")
        skips = [widths[0]]
        self.down = nn.ModuleList()
        for i, (n, m) in enumerate(itertools.pairwise([widths[0], *widths])):
            blocks = [block(n if j == 0 else m, m, i in attention_levels) for j in range(layers)]
            halve: Downsample | ResBlock | None = None
            if i < last:
                halve = Downsample(m, downsample_padding) if downs[i] == "conv" else residual(m, m, "down")
            self.down.append(Down(blocks, halve))
            skips += [m] * (layers + (i < last))

        deep = widths[-1]
        self.middle = nn.ModuleList()
        if middle != "none":
            inner = groups if middle_groups is None else middle_groups
            self.middle.append(block(deep, deep, middle == "attention", inner, middle_divisor))
            self.middle.append(block(deep, deep, False, divisor=middle_divisor))

        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(block(deep + skips.pop(), m, i in attention_levels_up))
                deep = m
            double: Upsample | ResBlock | None = None
            if i > 0:
                double = Upsample(m) if ups[last - i] == "conv" else residual(m, m, "up")
            self.up.append(Up(blocks, double))
        self.norm_out = GroupNormSiLU(widths[0], groups, eps)
        self.conv_out = zero(Conv2d(widths[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, *, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.conv_in.in_channels:
            raise ValueError(f"x must be [N, {self.conv_in.in_channels}, H, W], got {list(x.shape)}")
        if context is not None and self.null_context is None:
            raise ValueError("a context was given to a network without one: make it with context_channels")
        context = self.null_context if context is None else context
        told = F.silu(self.conditioning(time, labels)).to(self.conv_in.weight.dtype)
        keep = self.checkpointing

        h = x.to(self.conv_in.weight.dtype)
        h = 2 * h - 1 if self.center_input else h
        skips = [self.conv_in(channels_last(h) if x.is_cpu else h)]
        for level in self.down:
            skips += level(skips[-1], told, context, keep)
        h = skips[-1]
        for block in self.middle:
            h = recompute(block, h, told, context, enabled=keep)
        for level in self.up:
            h = level(h, skips, told, context, keep)
        h = self.conv_out(self.norm_out(h)).to(x.dtype)
        return h / time.to(x.dtype).reshape(-1, 1, 1, 1) if self.divide_by_time else h


def _check(widths: Sequence[int], layers: int, attention: Collection[int], middle: str) -> None:
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be positive channel counts, finest level first, got {widths}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if not all(0 <= level < len(widths) for level in attention):
        raise ValueError(f"attention levels must be in 0..{len(widths) - 1}, got {sorted(attention)}")
    if middle not in ("attention", "residual", "none"):
        raise ValueError(f"middle must be 'attention', 'residual' or 'none', got {middle!r}")


def _time_features(
    kind: str, width: int, scale: float, flip_sin_to_cos: bool, freq_shift: float, steps: int | None
) -> Sinusoidal | Fourier | Learned:
    if kind == "sinusoidal":
        return Sinusoidal(width, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift, scale=scale)
    if kind == "fourier":
        return Fourier(width, flip_sin_to_cos=flip_sin_to_cos)
    if kind == "learned" and steps is not None:
        return Learned(steps, width)
    raise ValueError(f"time must be 'sinusoidal', 'fourier' or, with time_steps, 'learned'; got {kind!r}")


def _per_level(kinds: str | Sequence[str], count: int, name: str) -> Sequence[str]:
    kinds = (kinds,) * count if isinstance(kinds, str) else tuple(kinds)
    if len(kinds) != count or not {"conv", "residual"}.issuperset(kinds):
        raise ValueError(f"{name} must be 'conv' or 'residual', or {count} of them, got {kinds}")
    return kinds
