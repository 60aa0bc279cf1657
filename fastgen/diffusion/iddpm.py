"""Improved denoising diffusion: the variance of each step is learned, and the variational bound is a likelihood.

    L = L_simple + w L_vlb,    L_vlb = KL(q(x_T | x_0) || N(0, I)) + sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + L_0

The network gives a second output v in about [-1, 1] beside the noise: log variance = log beta~ + (v + 1) / 2 (log beta - log
beta~). L_vlb reaches v alone: the mean in it counts as a constant. L_0 is -log p(x_0 | x_1): of images the probability of
their grey levels, of vectors a normal density.

Source: Nichol and Dhariwal (2021), "Improved denoising diffusion probabilistic models".
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.ddpm import DDPM, DDPMConfig
from fastgen.diffusion.model import build_network
from fastgen.diffusion.samplers import make_sampler
from fastgen.diffusion.schedules import Betas, estimate_rows
from fastgen.nn.model import Batch, split_batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["IDDPM", "Bound", "IDDPMConfig", "IDDPMLoss"]

_LEVELS = 255  # steps between the 256 grey levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class IDDPMConfig(DDPMConfig):
    """Options of :class:`IDDPM`."""

    schedule: Betas = "cosine"
    bound_weight: float = 1e-3
    """w: weight of the variational bound, in nats per element, in the loss."""
    sampler: str = "ddpm"
    sampling_steps: int = 100


class IDDPMLoss(NamedTuple):
    """Parts of the hybrid loss, averaged over the batch and the elements of a sample."""

    loss: Tensor
    """simple + bound_weight * bound."""
    simple: Tensor
    """Squared error of the prediction."""
    bound: Tensor
    """The variational bound in nats per element, without the term of x_T: T times one of its terms."""


class Bound(NamedTuple):
    """The variational bound on -log p(x) in nats per sample, [N], and its parts."""

    total: Tensor
    prior: Tensor
    """KL(q(x_T | x_0) || N(0, I))."""
    terms: Tensor
    """[N, T]: the terms of t = 1 .. T, the first is L_0."""


def _normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) per element, nats."""
    gap = log_var1 - log_var2
    return 0.5 * (torch.expm1(gap) - gap + (mean1 - mean2).square() * torch.exp(-log_var2))


def _grey_level_nats(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of the probability that N(mean, exp log_var) gives the bin of x, 256 bins on [-1, 1]; the outer ones are open."""
    scale = torch.exp(-0.5 * log_var)
    above, below = (x + 1 / _LEVELS - mean) * scale, (x - 1 / _LEVELS - mean) * scale
    open_above = torch.where(x > 1 - 1e-3, torch.inf, above)
    open_below = torch.where(x < -1 + 1e-3, -torch.inf, below)
    # log of a difference of distribution functions, in the tail where it does not cancel
    flip = open_below > 0
    high, low = torch.where(flip, -open_below, open_above), torch.where(flip, -open_above, open_below)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return -(log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-12))))


@register("iddpm", config=IDDPMConfig, paper="Nichol & Dhariwal (2021), arXiv:2102.09672", data="mnist5k")
class IDDPM(DDPM):
    """Denoising diffusion with a learned variance, the hybrid loss, and a likelihood bound in bits per dimension.

    Shapes: x [N, *event_shape], images in [0, 1].

    >>> model = IDDPM(IDDPMConfig(event_shape=(2,), timesteps=50))
    >>> model.bound(torch.zeros(3, 2)).total.shape
    torch.Size([3])
    """

    config: IDDPMConfig
    learned_variance = True

    def __init__(self, config: IDDPMConfig) -> None:
        super().__init__(config)
        self.network = build_network(config, outputs=2)
        chain = torch.arange(config.timesteps, dtype=torch.float64)
        grid = self.schedule.grid(chain.flip(0).tolist())
        plan = make_sampler("ddpm", variance="learned").plan(grid)
        assert plan.bounds is not None
        # per t: the posterior's mean is A x_t + B x_0; ends of the log variance; x_0 = p x_t + q m
        table = torch.cat([plan.rows[:, :2], plan.bounds, estimate_rows(self.rows(grid.alpha, grid.sigma))], 1)
        self.step_table: Tensor
        self.register_buffer("step_table", table.flip(0).float(), persistent=False)

    def _term(self, x: Tensor, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The term of the bound of x_t -> x_{t-1} in nats per element, [N]; its gradient reaches the variance alone."""
        columns = self.step_table[t].view(len(x), -1, *[1] * (x.dim() - 1)).unbind(1)
        keep, signal, lowest, highest, p, q = columns
        prediction, spread = out.float().chunk(2, 1)
        log_var = lowest + 0.5 * (spread + 1) * (highest - lowest)
        mean = keep * x_t + signal * (p * x_t + q * prediction.detach())
        divergence = _normal_kl(keep * x_t + signal * x, lowest, mean, log_var)
        if self.is_image:
            last = _grey_level_nats(x, mean, log_var)
        else:
            last = 0.5 * ((x - mean).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi))
        first = (t == 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(first, last, divergence).flatten(1).mean(1)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> IDDPMLoss:  # type: ignore[override]
        """The hybrid loss at one time and one draw of the noise per sample."""
        x, y = split_batch(batch)
        key = random.fresh_key(x.device) if key is None else key
        u = ops.uniform((len(x), 2), random.at(key, stream=Stream.TIMESTEP))
        t = (u[:, 0] * self.config.timesteps).long()
        x, rows, place = self.encode_range(x), self.row_table[t], random.at(key, stream=Stream.DIFFUSE)
        x_t, _ = ops.diffuse(x, rows, place, target=False)
        out = self.network(x_t, t.float(), labels=self.training_labels(y, u[:, 1]))
        weight = None if self.config.weight == "simple" else self.weight_table[t]
        simple = ops.diffusion_loss(out.chunk(2, 1)[0].contiguous(), x, rows, place, weight=weight).mean()
        bound = self.config.timesteps * self._term(x, x_t, t, out).mean()
        return IDDPMLoss(simple + self.config.bound_weight * bound, simple, bound)

    @torch.no_grad()
    def bound(self, x: Tensor, *, labels: Tensor | None = None, key: Tensor | None = None, every: int = 1) -> Bound:
        """The variational bound on -log p(x), of images as a probability of 256 grey levels.

        Args:
            x: [N, *event_shape], images in [0, 1].
            labels: classes [N], for a model that has them; None is no class.
            key: of the noise, a draw per term.
            every: evaluate every n-th term, from a random one on, and scale up: unbiased, and n times as fast.
        """
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x must be [N, {', '.join(map(str, self.event_shape))}], got {list(x.shape)}")
        steps = self.config.timesteps
        if not 1 <= every <= steps:
            raise ValueError(f"every must be in 1 .. {steps}, got {every}")
        key = random.fresh_key(x.device) if key is None else key
        x, size = self.encode_range(x), math.prod(self.event_shape)
        first = (ops.uniform((len(x), 1), random.at(key, stream=Stream.TIMESTEP))[:, 0] * every).long()
        terms = x.new_zeros(len(x), steps)
        for begin in range(0, steps, every):
            t = begin + first
            inside = t < steps
            t = t.clamp(max=steps - 1)
            place = random.at(key, stream=Stream.DIFFUSE, step=begin)
            x_t, _ = ops.diffuse(x, self.row_table[t], place, target=False)
            term = size * every * self._term(x, x_t, t, self.network(x_t, t.float(), labels=labels))
            terms.scatter_(1, t[:, None], torch.where(inside, term, terms.gather(1, t[:, None])[:, 0])[:, None])
        alpha, sigma = (v.to(x).item() for v in self.schedule.at(torch.tensor(float(steps - 1))))
        prior = _normal_kl(alpha * x, torch.full_like(x, 2 * math.log(sigma)), torch.zeros_like(x), torch.zeros_like(x))
        prior = prior.flatten(1).sum(1)
        return Bound(prior + terms.sum(1), prior, terms)
