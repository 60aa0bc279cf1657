"""What every model is: an ``nn.Module`` with a frozen config beside it, phases to train and a way to sample.

The trainer, the sampler and the command line know models only through this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen._arguments import check_types

__all__ = ["Batch", "Config", "Model", "Phase", "split_batch"]

Batch = Tensor | tuple[Tensor, ...] | list[Tensor]
"""A batch as any PyTorch data loader gives it: ``x``, or ``(x, y)`` with integer labels or paired targets ``y``."""


def split_batch(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``y`` of a batch; ``y`` is None where there are no labels."""
    if isinstance(batch, Tensor):
        return batch, None
    return batch[0], (batch[1] if len(batch) > 1 else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields shared by every model's config. Configs hold JSON values only: numbers, strings, bools, None and tuples."""

    event_shape: tuple[int, ...]
    """Shape of one sample: (C, H, W) for images, (D,) for vectors."""

    def __new__(cls, **values: Any) -> Config:
        # before the checks that subclasses make of their values, which compare and count
        check_types(cls, values)
        shape = values.get("event_shape", (1,))
        if not shape or min(shape) < 1:
            raise ValueError(f"event_shape must be positive sizes, got {tuple(shape)}")
        if not values.get("learning_rate", 1.0) > 0:
            raise ValueError(f"learning_rate must be positive, got {values['learning_rate']}")
        return super().__new__(cls)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One thing the trainer does in turn: minimise ``loss`` over ``parameters``.

    Attributes:
        name: shown in logs; unique within a model.
        parameters: what this phase's optimiser updates.
        loss: ``loss(batch, key=key)`` -> named tuple of scalar tensors. The first field is minimised, all are logged.
        optimizer: makes the optimiser from the parameters; the source paper's choice.
        every: the phase runs on the steps that ``every`` divides.
        repeat: how often it runs on such a step, each time on a new batch (n_critic of a Wasserstein GAN).
        after: called after each update (weight clipping, codebook EMA, ...).
    """

    name: str
    parameters: Iterable[nn.Parameter]
    loss: Callable[..., tuple[Tensor, ...]]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    every: int = 1
    repeat: int = 1
    after: Callable[[], None] | None = None


class Model(nn.Module):
    """Base of all models.

    Subclasses implement ``loss(batch, *, key=None)`` (or ``phases()``) and ``sample(n, *, key=None, **options)``; where they
    exist, ``log_prob(x)``, ``encode(x)`` and ``decode(z)``. ``loss`` returns a named tuple of scalar tensors whose first field
    is minimised; the tuple class states the units. ``key`` is a :mod:`fastgen.random` key; None draws from PyTorch's
    generator. Sample i of ``sample(n, key=key)`` depends on the noise at index ``key.sample + i`` alone.
    """

    config: Config
    learning_rate: ClassVar[float] = 1e-3

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.config.event_shape

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check_samples(self, x: Tensor) -> None:
        """TypeError unless ``x`` is a tensor of floats, ValueError unless its shape is [N, *event_shape]."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x must be [N, {', '.join(map(str, self.event_shape))}], got {list(x.shape)}")

    def phases(self) -> list[Phase]:
        """What the trainer alternates. By default one phase: Adam on ``loss`` over all parameters."""
        rate = getattr(self.config, "learning_rate", self.learning_rate)
        return [Phase("train", list(self.parameters()), self.loss, lambda p: torch.optim.Adam(p, lr=rate))]

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own: train it through phases()")

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} cannot be sampled")
