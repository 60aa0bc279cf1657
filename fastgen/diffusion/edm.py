"""Diffusion by noise levels, with preconditioning: EDM.

    x_t = x_0 + sigma eps,    D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4),    loss = E |F - target|^2
    c_skip = s^2 / (sigma^2 + s^2),    c_out = sigma s / sqrt(sigma^2 + s^2),    c_in = 1 / sqrt(sigma^2 + s^2)

for data of standard deviation s; D estimates x_0, so F's target is (x_0 - c_skip x_t) / c_out. All inputs and targets of the
network F have unit variance. Training draws ln(sigma) from a normal distribution; sampling takes Heun steps through levels that
are even in their seventh root, with churn if asked (``sampler="edm"``).

Source: Karras et al. (2022), "Elucidating the design space of diffusion-based generative models", table 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops, random
from fastgen.diffusion.likelihood import probability_flow_log_prob
from fastgen.diffusion.model import DiffusionConfig, DiffusionLoss, DiffusionModel, build_network
from fastgen.diffusion.schedules import Karras
from fastgen.nn.model import Batch, split_batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["EDM", "EDMConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMConfig(DiffusionConfig):
    """Options of :class:`EDM`."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """Levels that sampling starts from and comes down to."""
    rho: float = 7.0
    """Steps are even in the rho-th root of sigma."""
    sigma_data: float = 0.5
    """Standard deviation of the data inside: of images in [-1, 1], of vectors as they are."""
    log_mean: float = -1.2
    log_std: float = 1.2
    """Of ln(sigma) in training."""
    sampler: str = "heun"
    sampling_steps: int = 18

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        for name in ("sigma_data", "log_std", "rho"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class _Preconditioned(nn.Module):
    """F(c_in x; ln(sigma) / 4): scales what a network is given."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Tensor, time: Tensor, **conditions: Any) -> Tensor:
        scale = torch.rsqrt(time.square() + self.sigma_data**2)
        return self.network(x * scale.view(-1, *[1] * (x.dim() - 1)), time.log() / 4, **conditions)


@register("edm", config=EDMConfig, paper="Karras et al. (2022), arXiv:2206.00364", data="mnist5k")
class EDM(DiffusionModel):
    """Diffusion by noise levels with a preconditioned network; Heun steps, stochastic or not; likelihood by its flow.

    Shapes: x [N, *event_shape], images in [0, 1].

    >>> model = EDM(EDMConfig(event_shape=(1, 28, 28), widths=(16, 32)))
    >>> model.sample(5, steps=4).shape
    torch.Size([5, 1, 28, 28])
    """

    config: EDMConfig

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config)
        self.schedule = Karras(config.sigma_min, config.sigma_max, config.rho)
        # ln(sigma) / 4 lies in about -1.5 .. 1.1
        self.network = _Preconditioned(build_network(config, time_scale=250.0), config.sigma_data)

    def rows(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = self.config.sigma_data
        total = (sigma.square() + spread**2).sqrt()
        return torch.stack([alpha, sigma, sigma / (spread * total), -spread / total], -1)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> DiffusionLoss:
        """Squared error of the network's target at one level and one draw of the noise per sample."""
        x, y = split_batch(batch)
        key = random.fresh_key(x.device) if key is None else key
        z, u = ops.normal((len(x), 2), random.at(key, stream=Stream.TIMESTEP)).unbind(1)
        sigma = torch.exp(self.config.log_mean + self.config.log_std * z)
        labels = self.training_labels(y, torch.special.ndtr(u))
        rows = self.rows(torch.ones_like(sigma), sigma)
        return DiffusionLoss(self.denoising_loss(self.encode_range(x), sigma, rows, key, labels=labels).mean())

    def log_prob(self, x: Tensor, *, key: Tensor | None = None, **options: Any) -> Tensor:
        """log p(x) in nats, [N]: :func:`fastgen.diffusion.likelihood.probability_flow_log_prob` with its options."""
        return probability_flow_log_prob(self, x, key=key, **options)
