"""Convolutional pyramids: an image of any size down to a vector by strided convolutions, and back up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["ConvDecoder", "ConvEncoder", "pyramid_sizes"]


def pyramid_sizes(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Height and width at each level, finest first: each the half of the one before, rounded up.

    >>> pyramid_sizes((28, 25), 2)
    [(28, 25), (14, 13), (7, 7)]
    """
    sizes = [size]
    for _ in range(levels):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


class ConvEncoder(nn.Module):
    """Stride-2 convolutions, one per width, then a linear layer: [N, C, H, W] -> [N, outputs]."""

    def __init__(self, event_shape: Sequence[int], widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        channels, height, width = event_shape
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise([channels, *widths]):
            layers += [nn.Conv2d(n, m, 3, stride=2, padding=1), nn.ReLU()]
        self.down = nn.Sequential(*layers)
        coarsest = pyramid_sizes((height, width), len(widths))[-1]
        self.head = nn.Linear(widths[-1] * math.prod(coarsest), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(x).flatten(1))


class ConvDecoder(nn.Module):
    """A linear layer, then stride-2 transposed convolutions, one per width, coarsest last in ``widths`` as in the encoder:
    [N, inputs] -> [N, C, H, W].
    """

    def __init__(self, inputs: int, event_shape: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = event_shape
        sizes = pyramid_sizes((height, width), len(widths))
        self.coarsest = (widths[-1], *sizes[-1])
        self.head = nn.Linear(inputs, math.prod(self.coarsest))
        layers: list[nn.Module] = []
        for level, (n, m) in enumerate(itertools.pairwise([*reversed(widths), channels])):
            small, large = sizes[-1 - level], sizes[-2 - level]
            # a transposed convolution of kernel 3 gives 2 s - 1; the even sizes need one more row or column
            extra = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
            layers += [nn.ReLU(), nn.ConvTranspose2d(n, m, 3, stride=2, padding=1, output_padding=extra)]
        self.up = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.head(z).unflatten(1, self.coarsest))
