"""The likelihood of a diffusion model by its probability flow, for any schedule and any target.

In y = x / alpha and the noise ratio r = sigma / alpha the flow is dy/dr = eps(x, t), whatever the schedule. So along it

    log p(x_low) = log N(x_high; 0, s^2 I) + integral of r tr(d eps / d y) d log r - D log(alpha_low / alpha_high)

from the smallest noise ratio of the schedule, where x_low is taken for the data, to the largest. The integral is left to an
adaptive solver (torchdiffeq).

Source: Song et al. (2021), "Score-based generative modeling through stochastic differential equations", section 4.3 and
appendix D.2.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import random
from fastgen._extras import require
from fastgen.diffusion.model import DiffusionModel
from fastgen.diffusion.schedules import estimate_rows
from fastgen.nn.divergence import divergence, rademacher
from fastgen.nn.pixels import dequantize
from fastgen.random import Stream

__all__ = ["probability_flow_log_prob"]


@torch.no_grad()
def probability_flow_log_prob(
    model: DiffusionModel,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    trace: Literal["hutchinson", "exact"] = "hutchinson",
    rtol: float = 1e-4,
    atol: float = 1e-4,
    method: str = "dopri5",
) -> Tensor:
    """log p(x) in nats by the probability flow of ``model``: [N] float32.

    Args:
        model: any diffusion model whose schedule leaves some signal at its end.
        x: [N, *event_shape]; images, of 256 grey levels in [0, 1], are dequantised by uniform noise, and the density is that of
            the dequantised pixels on [0, 1].
        labels: classes [N], for a model that has them; None is no class.
        key: of the dequantisation and of the probe; None draws from PyTorch's generator.
        trace: "exact" takes a backward pass per element of a sample and evaluation; "hutchinson" one, with a Rademacher probe
            per sample, and is unbiased.
        rtol, atol, method: of ``torchdiffeq.odeint``; samples of a batch share the steps of the solver.
    """
    purpose = "the likelihood of a diffusion model"
    solve: Any = require("torchdiffeq", package="torchdiffeq", extra="ode", purpose=purpose).odeint
    if trace not in ("hutchinson", "exact"):
        raise ValueError(f"trace must be 'hutchinson' or 'exact', got {trace!r}")
    if tuple(x.shape[1:]) != model.event_shape:
        raise ValueError(f"x must be [N, {', '.join(map(str, model.event_shape))}], got {list(x.shape)}")
    schedule, size = model.schedule, math.prod(model.event_shape)
    ends = schedule.at(schedule.times(2, "linspace"))
    if float(ends[0][0]) == 0:
        raise ValueError(f"{type(schedule).__name__} ends without signal: the probability flow has no finite start there")
    (alpha_high, alpha_low), (sigma_high, sigma_low) = (end.tolist() for end in ends)
    key = random.fresh_key(x.device) if key is None else key
    inside = 0.0  # log |d inside / d outside| of the range
    if model.is_image:
        x = model.encode_range(dequantize(x, 256, random.at(key, stream=Stream.DATA)))
        inside = size * math.log(2)
    probe = rademacher(tuple(x.shape), random.at(key, stream=Stream.PROBE)) if trace == "hutchinson" else None

    def slope(log_ratio: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = log_ratio.double().exp().cpu()
        alpha, sigma = schedule.of_ratio(ratio)
        p, q = estimate_rows(model.rows(alpha, sigma)).tolist()
        time = (schedule.time(ratio) * model.time_scale).to(x).expand(len(x))
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            scaled = float(alpha) * y
            out = model.network(scaled, time, labels=labels)[:, : x.shape[1]]
            noise = (scaled - float(alpha) * (p * scaled + q * out)) * (float(ratio) / float(sigma))
            change = divergence(noise, y, probe)
        return noise.detach(), change

    spans = torch.tensor([math.log(sigma_low / alpha_low), math.log(sigma_high / alpha_high)], device=x.device)
    start = (x / alpha_low, x.new_zeros(len(x)))
    y, change = (values[-1] for values in solve(slope, start, spans, rtol=rtol, atol=atol, method=method))
    scale = float(schedule.prior_std(*(torch.tensor(v, dtype=torch.float64) for v in (alpha_high, sigma_high))))
    end = (alpha_high / scale) * y
    prior = -0.5 * end.square().flatten(1).sum(1) - size * (0.5 * math.log(2 * math.pi) + math.log(scale))
    return prior + change + size * math.log(alpha_high / alpha_low) + inside
