"""Denoising diffusion probabilistic model.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),    loss = E_t,eps w_t |f(x_t, t) - target|^2

The network f predicts the noise, the data or the velocity v; t is uniform over the chain. With ``num_classes`` it is told the
class, and now and then that there is none, for classifier-free guidance.

Sources: Ho et al. (2020), "Denoising diffusion probabilistic models"; Ho and Salimans (2022), "Classifier-free diffusion
guidance"; :mod:`fastgen.diffusion.schedules` for schedules, targets and weights.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.model import DiffusionConfig, DiffusionLoss, DiffusionModel, build_network
from fastgen.diffusion.schedules import Betas, Discrete, Weight, betas, loss_weights
from fastgen.nn.model import Batch, split_batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["DDPM", "DDPMConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPMConfig(DiffusionConfig):
    """Options of :class:`DDPM`."""

    timesteps: int = 1000
    """T, the length of the chain."""
    schedule: Betas = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_snr: bool = False
    """Rescale the schedule so that nothing of the data is left at its end; the target must not be the noise then."""
    target: Literal["epsilon", "x0", "v"] = "epsilon"
    """What the network predicts."""
    weight: Weight = "simple"
    """Of the squared error; see :func:`fastgen.diffusion.schedules.loss_weights`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in ("epsilon", "x0", "v"):
            raise ValueError(f"target must be 'epsilon', 'x0' or 'v', got {self.target!r}")
        if self.weight not in get_args(Weight):
            raise ValueError(f"weight must be one of {', '.join(get_args(Weight))}, got {self.weight!r}")
        if self.zero_snr and self.target == "epsilon":
            raise ValueError("zero_snr=True leaves no signal at the end, where the noise says nothing: take target='v'")


@register("ddpm", config=DDPMConfig, paper="Ho et al. (2020), arXiv:2006.11239", data="mnist5k")
class DDPM(DiffusionModel):
    """Denoising diffusion: a chain of small denoising steps, trained by regression on the noise, the data or v.

    Shapes: x [N, *event_shape], images in [0, 1].

    >>> model = DDPM(DDPMConfig(event_shape=(1, 28, 28), widths=(16, 32), num_classes=10))
    >>> model.sample(5, steps=4, guidance=2.0, labels=3).shape
    torch.Size([5, 1, 28, 28])
    """

    config: DDPMConfig

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__(config)
        chain = betas(config.schedule, config.timesteps, start=config.beta_start, end=config.beta_end, zero_snr=config.zero_snr)
        self.schedule = Discrete(chain)
        self.target = config.target
        self.network = build_network(config)
        rows = self.rows(*self.schedule.at(torch.arange(config.timesteps)))
        self.row_table: Tensor
        self.weight_table: Tensor
        self.register_buffer("row_table", rows.float(), persistent=False)
        self.register_buffer("weight_table", loss_weights(config.weight, rows).float(), persistent=False)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> DiffusionLoss:
        """Weighted error at one time and one draw of the noise per sample."""
        x, y = split_batch(batch)
        key = random.fresh_key(x.device) if key is None else key
        u = ops.uniform((len(x), 2), random.at(key, stream=Stream.TIMESTEP))
        t = (u[:, 0] * self.config.timesteps).long()
        weight = None if self.config.weight == "simple" else self.weight_table[t]
        labels = self.training_labels(y, u[:, 1])
        losses = self.denoising_loss(self.encode_range(x), t.float(), self.row_table[t], key, weight=weight, labels=labels)
        return DiffusionLoss(losses.mean())
