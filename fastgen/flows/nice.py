"""NICE: additive coupling layers, which keep volume, and one diagonal scaling at the end, which does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.flows.coupling import AdditiveCoupling, halves
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import MLPConditioner
from fastgen.registry import register

__all__ = ["NICE", "DiagonalScale", "NICEConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICEConfig(FlowConfig):
    """Options of :class:`NICE`."""

    layers: int = 4
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the conditioners' hidden layers."""
    base: Literal["normal", "logistic"] = "logistic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")


class DiagonalScale(Bijection):
    """y = x * exp(log_scale), element by element of [N, D]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(y))


@register("nice", config=NICEConfig, paper="Dinh et al. (2015), arXiv:1410.8516", data="mnist5k")
class NICE(Flow):
    """NICE: additive couplings between halves of the features, a diagonal scaling, a logistic base.

    >>> flow = NICE(NICEConfig(event_shape=(6,), layers=2))
    >>> flow().log_prob(flow.sample(4)).shape
    torch.Size([4])
    """

    config: NICEConfig

    def __init__(self, config: NICEConfig) -> None:
        features = math.prod(config.event_shape)
        layers: list[Bijection] = []
        for i in range(config.layers):
            sizes, stays, moves = halves(features, i)
            conditioner = MLPConditioner(stays, config.hidden, (moves,), config.context)
            layers.append(AdditiveCoupling(conditioner, sizes, flip=i % 2 == 1))
        super().__init__(config, config.stack([*layers, DiagonalScale(features)]))
