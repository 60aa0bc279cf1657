"""Conditional flow matching on straight lines: rectified flow.

    x_t = (1 - t) x_0 + t eps,    loss = E_t,eps |f(x_t, t) - (eps - x_0)|^2,    t from 0 (data) to 1 (noise)

The network f predicts the velocity dx/dt, and sampling integrates it from 1 to 0; in torchcfm and in Lipman et al. time runs
the other way. Two things straighten the paths, so that fewer steps do: pairing the data of a batch with its noise by optimal
transport, and training again on pairs of noise and what a trained model makes of it (:meth:`FlowMatching.pairs`).

Sources: Lipman et al. (2023), "Flow matching for generative modeling"; Liu et al. (2023), "Flow straight and fast: learning to
generate and transfer data with rectified flow"; Tong et al. (2024), "Improving and generalizing flow-based generative models
with minibatch optimal transport"; Esser et al. (2024), "Scaling rectified flow transformers for high-resolution image
synthesis" (logit-normal times, shifted steps).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen._extras import require
from fastgen.diffusion.model import DiffusionConfig, DiffusionLoss, DiffusionModel, build_network
from fastgen.diffusion.schedules import Flow
from fastgen.nn.model import Batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["FlowMatching", "FlowMatchingConfig", "transport_order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(DiffusionConfig):
    """Options of :class:`FlowMatching`."""

    coupling: Literal["independent", "transport"] = "independent"
    """"transport" pairs noise and data of each batch, class by class, so that the squared distances are least (needs scipy)."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """How training times are drawn; "logit_normal" favours the middle."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """Sampling spends more of its steps near the noise where this is above 1, as large images need."""
    sampler: str = "euler"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in ("independent", "transport"):
            raise ValueError(f"coupling must be 'independent' or 'transport', got {self.coupling!r}")
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"times must be 'uniform' or 'logit_normal', got {self.times!r}")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std must be positive, got {self.logit_std}")


def transport_order(x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """The order of ``noise`` whose sum of squared distances to ``x`` is least: int64 [N].

    Args:
        x, noise: [N, ...].
        labels: [N]; noise then stays with the class that it came with, or else the noise of a class would no longer be
            N(0, I).

    It is found on the CPU, by :func:`scipy.optimize.linear_sum_assignment`.
    """
    optimize: Any = require("scipy.optimize", package="scipy", extra="demo", purpose="coupling='transport'")
    cost = torch.cdist(x.flatten(1).float(), noise.flatten(1).float()).square()
    if labels is not None:
        cost = cost + (labels[:, None] != labels[None]) * (len(x) * cost.max() + 1)
    _, order = optimize.linear_sum_assignment(cost.double().cpu().numpy())
    return torch.from_numpy(order).to(x.device)


@register("flow_matching", config=FlowMatchingConfig, paper="Lipman et al. (2023), arXiv:2210.02747", data="mnist5k")
@register(
    "ot_flow_matching",
    config=FlowMatchingConfig,
    paper="Tong et al. (2024), arXiv:2302.00482",
    data="mnist5k",
    coupling="transport",
)
class FlowMatching(DiffusionModel):
    """Flow matching: a velocity field whose straight paths carry noise to data; optionally with optimal-transport pairs.

    Shapes: x [N, *event_shape], images in [0, 1]. Batches are x, (x, labels), or with noise that belongs to the data,
    (x, noise) and (x, labels, noise).

    >>> model = FlowMatching(FlowMatchingConfig(event_shape=(2,)))
    >>> model.sample(5, steps=4, sampler="heun").shape
    torch.Size([5, 2])
    """

    config: FlowMatchingConfig
    target = "velocity"
    time_scale = 1000.0

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__(config)
        self.schedule = Flow(config.shift)
        self.network = build_network(config)

    def _training_times(self, n: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Times [N] and uniforms [N] for the labels."""
        place = random.at(key, stream=Stream.TIMESTEP)
        if self.config.times == "uniform":
            return tuple(ops.uniform((n, 2), place).unbind(1))  # type: ignore[return-value]
        z, u = ops.normal((n, 2), place).unbind(1)
        return torch.sigmoid(self.config.logit_mean + self.config.logit_std * z), torch.special.ndtr(u)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> DiffusionLoss:
        """Squared error of the velocity at one time and one draw of the noise per sample."""
        x, *rest = (batch,) if isinstance(batch, Tensor) else batch
        y = rest[0] if rest and not rest[0].is_floating_point() else None
        noise = rest[-1] if rest and rest[-1].is_floating_point() else None
        key = random.fresh_key(x.device) if key is None else key
        x = self.encode_range(x)
        if noise is None and self.config.coupling == "transport":
            noise = ops.normal(tuple(x.shape), random.at(key, stream=Stream.DIFFUSE))
            noise = noise[transport_order(x, noise, y if self.config.num_classes is not None else None)]
        t, u = self._training_times(len(x), key)
        rows = torch.stack([1 - t, t, -torch.ones_like(t), torch.ones_like(t)], 1)
        losses = self.denoising_loss(x, self.time_scale * t, rows, key, labels=self.training_labels(y, u), noise=noise)
        return DiffusionLoss(losses.mean())

    @torch.no_grad()
    def pairs(self, n: int, *, key: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Samples and the noise that they came from, to train a straighter flow on: batches (x, noise) for :meth:`loss`.

        Args:
            n: how many.
            key: as for :meth:`sample`; pairs of a model with classes go through the classes by index.
            **options: of :meth:`sample`.

        Returns:
            (x, noise), both [n, *event_shape].
        """
        key = random.fresh_key(self.device) if key is None else key
        noise = ops.normal((n, *self.event_shape), random.at(key, stream=Stream.LATENT))
        return self.sample(n, key=key, **options), noise
