"""Fully connected networks between events of any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.conv import zero
from fastgen.nn.time import Conditioning, Sinusoidal

__all__ = ["MLP", "TimeMLP"]


class MLP(nn.Module):
    """Linear layers with an activation between them; the event is flattened on the way in and shaped on the way out.

    Args:
        inputs: event shape of the input, or its size.
        hidden: widths of the hidden layers.
        outputs: event shape of the output, or its size.
        activation: makes the module between two layers.

    Shape: [N, *inputs] -> [N, *outputs].
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        hidden: Sequence[int],
        outputs: int | Sequence[int],
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.outputs = _shape(outputs)
        sizes = [math.prod(_shape(inputs)), *hidden, math.prod(self.outputs)]
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1)).unflatten(1, self.outputs)


class TimeMLP(nn.Module):
    """Residual network for vectors, or any event taken as one, told the time in every block (adaptive layer norm).

    Args:
        event_shape: of x, or its size.
        outputs: shape of the result, or its size; None: as x.
        width: of the hidden layers.
        layers: residual blocks.
        num_classes: class labels; None: none.
        context_channels: channels of the context's tokens, whose mean joins the conditioning; None: no context.
        time_scale: the time is multiplied by it before its sinusoids; 1000 suits times in [0, 1].
        dropout: in the residual blocks.

    Shape: see :class:`fastgen.nn.network.Network`. The last layer, and that of every block, are zero at first.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        outputs: int | Sequence[int] | None = None,
        *,
        width: int = 256,
        layers: int = 3,
        num_classes: int | None = None,
        context_channels: int | None = None,
        time_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.event_shape = _shape(event_shape)
        self.outputs = self.event_shape if outputs is None else _shape(outputs)
        self.num_classes, self.context_channels = num_classes, context_channels
        self.conditioning = Conditioning(Sinusoidal(width, scale=time_scale), width, num_classes=num_classes)
        self.context = None if context_channels is None else nn.Linear(context_channels, width)
        self.first = nn.Linear(math.prod(self.event_shape), width)
        self.blocks = nn.ModuleList(TimeBlock(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.last = zero(nn.Linear(width, math.prod(self.outputs)))

    def forward(self, x: Tensor, time: Tensor, *, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.event_shape:
            raise ValueError(f"x must be [N, {', '.join(map(str, self.event_shape))}], got {list(x.shape)}")
        told = self.conditioning(time, labels)
        if context is not None:
            if self.context is None:
                raise ValueError("a context was given to a network without one: make it with context_channels")
            told = told + self.context(context.to(self.context.weight.dtype).mean(1))
        told = F.silu(told).to(self.first.weight.dtype)
        h = self.first(x.flatten(1).to(self.first.weight.dtype))
        for block in self.blocks:
            h = block(h, told)
        return self.last(F.silu(self.norm(h))).to(x.dtype).unflatten(1, self.outputs)


class TimeBlock(nn.Module):
    """x + linear(silu(linear(norm(x) scaled and shifted by the embedding)))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), zero(nn.Linear(2 * width, width))
        )

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.modulation(told).chunk(2, -1)
        return x + self.layers(self.norm(x) * (1 + scale) + shift)


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)
