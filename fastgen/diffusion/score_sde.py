"""Score-based generative modelling through stochastic differential equations: VP, VE and sub-VP.

    dx = f(t) x dt + g(t) dw,    x_t = alpha(t) x_0 + sigma(t) eps,    score(x, t) = -eps(x, t) / sigma(t)

The network predicts eps at continuous times t in (0, 1]. Sampling is by predictor and corrector (``sampler="pc"``), or by any
other sampler; the likelihood is that of the probability flow.

Source: Song et al. (2021), "Score-based generative modeling through stochastic differential equations".
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen import ops, random
from fastgen.diffusion.likelihood import probability_flow_log_prob
from fastgen.diffusion.model import DiffusionConfig, DiffusionLoss, DiffusionModel, build_network
from fastgen.diffusion.schedules import VE, VP, SubVP
from fastgen.nn.model import Batch, split_batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["ScoreSDE", "ScoreSDEConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSDEConfig(DiffusionConfig):
    """Options of :class:`ScoreSDE`."""

    sde: Literal["vp", "ve", "subvp"] = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0
    """VP and sub-VP: beta(0) and beta(1)."""
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    """VE: the noise at t = 0 and t = 1."""
    sampler: str = "pc"
    sampling_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sde not in ("vp", "ve", "subvp"):
            raise ValueError(f"sde must be 'vp', 've' or 'subvp', got {self.sde!r}")


class _UnitInput(nn.Module):
    """Scales a network's input to unit variance, as for data of unit variance."""

    def __init__(self, network: nn.Module, schedule: VP | VE, time_scale: float) -> None:
        super().__init__()
        self.network, self.schedule, self.time_scale = network, schedule, time_scale

    def forward(self, x: Tensor, time: Tensor, **conditions: Any) -> Tensor:
        alpha, sigma = self.schedule.at(time / self.time_scale)
        scale = torch.rsqrt(alpha.square() + sigma.square()).to(x.dtype)
        return self.network(x * scale.view(-1, *[1] * (x.dim() - 1)), time, **conditions)


@register("score_sde", config=ScoreSDEConfig, paper="Song et al. (2021), arXiv:2011.13456", data="mnist5k")
class ScoreSDE(DiffusionModel):
    """Score-based model of a diffusion in continuous time, with predictor-corrector sampling and a likelihood.

    Shapes: x [N, *event_shape], images in [0, 1].

    >>> model = ScoreSDE(ScoreSDEConfig(event_shape=(2,), sde="ve"))
    >>> model.sample(5, steps=4).shape
    torch.Size([5, 2])
    """

    config: ScoreSDEConfig
    target = "epsilon"
    time_scale = 1000.0

    def __init__(self, config: ScoreSDEConfig) -> None:
        super().__init__(config)
        self.schedule: VP | VE
        if config.sde == "ve":
            self.schedule = VE(config.sigma_min, config.sigma_max)
        else:
            self.schedule = (VP if config.sde == "vp" else SubVP)(config.beta_min, config.beta_max)
        network = build_network(config)
        # VP has unit variance at all times
        self.network = network if config.sde == "vp" else _UnitInput(network, self.schedule, self.time_scale)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> DiffusionLoss:
        """Squared error of the noise, which is the score's weighted by sigma^2, at one time and one draw per sample."""
        x, y = split_batch(batch)
        key = random.fresh_key(x.device) if key is None else key
        t, u = ops.uniform((len(x), 2), random.at(key, stream=Stream.TIMESTEP)).unbind(1)
        first = self.schedule.first
        t = first + (1 - first) * t
        rows = self.rows(*self.schedule.at(t))
        labels = self.training_labels(y, u)
        return DiffusionLoss(self.denoising_loss(self.encode_range(x), self.time_scale * t, rows, key, labels=labels).mean())

    def log_prob(self, x: Tensor, *, key: Tensor | None = None, **options: Any) -> Tensor:
        """log p(x) in nats, [N]: :func:`fastgen.diffusion.likelihood.probability_flow_log_prob` with its options."""
        return probability_flow_log_prob(self, x, key=key, **options)
