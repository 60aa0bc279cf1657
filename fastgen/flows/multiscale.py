"""Multi-scale architecture: at every level half of the channels become noise, the rest go on at half the resolution."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from fastgen.flows.transform import Bijection, Compose

__all__ = ["MultiScale", "halvings"]


def halvings(event_shape: tuple[int, ...], levels: int | None, most: int = 3) -> int:
    """How many levels an image has: ``levels`` if its sides can be halved that often; None for as many as they can, up to
    ``most``.

    >>> halvings((1, 28, 28), None)
    2

    Raises:
        ValueError: sides that cannot be halved so often, an event that is no image.
    """
    if len(event_shape) != 3:
        raise ValueError(f"a multi-scale flow needs images (C, H, W), got event_shape {event_shape}")
    _, height, width = event_shape
    possible = 0
    while height % 2 ** (possible + 1) == 0 and width % 2 ** (possible + 1) == 0:
        possible += 1
    if possible == 0 or (levels is not None and not 1 <= levels <= possible):
        wanted = "at least one level" if levels is None else f"{levels} levels"
        raise ValueError(
            f"{wanted} cannot be had of {height} x {width} pixels: every level halves both sides, which goes {possible} times"
        )
    return min(possible, most) if levels is None else levels


class MultiScale(Compose):
    """Levels one after the other; each but the last leaves the second half of its channels behind as noise.

    Args:
        levels: bijections of images, the finest first. Each halves height and width and has four times the channels.
        event_shape: (C, H, W) of the image.

    Shape: [N, C, H, W] -> [N, C * H * W], the finest level's noise first.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP", section 3.6.
    """

    def __init__(self, levels: Iterable[Bijection], event_shape: tuple[int, int, int]) -> None:
        super().__init__(levels)
        self.event_dims = (3, 1)
        channels, height, width = event_shape
        self.shapes = [(channels * 2 ** (i + 2), height >> (i + 1), width >> (i + 1)) for i in range(len(self))]

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts: list[Tensor] = []
        total = x.new_zeros(len(x))
        for i, level in enumerate(self):
            x, ladj = level.call_and_ladj(x, context)
            total = total + ladj
            if i + 1 < len(self):
                x, noise = x.chunk(2, 1)
                parts.append(noise.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        last = len(self) - 1
        sizes = [math.prod(shape) // (1 if i == last else 2) for i, shape in enumerate(self.shapes)]
        parts, total = y.split(sizes, 1), y.new_zeros(len(y))
        x = y
        for i in reversed(range(len(self))):
            channels, height, width = self.shapes[i]
            if i == last:
                x = parts[i].reshape(-1, channels, height, width)
            else:
                x = torch.cat((x, parts[i].reshape(-1, channels // 2, height, width)), 1)
            x, ladj = self[i].inv_and_ladj(x, context)
            total = total + ladj
        return x, total

    @property
    def codomain(self) -> Constraint:
        """Vectors."""
        return constraints.real_vector
