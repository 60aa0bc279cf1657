"""RealNVP: affine coupling layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fastgen.flows.coupling import AffineCoupling, halves
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.stack import Stack
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import MLPConditioner
from fastgen.registry import register

__all__ = ["RealNVP", "RealNVPConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealNVPConfig(FlowConfig):
    """Options of :class:`RealNVP`."""

    layers: int = 8
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the conditioners' hidden layers."""
    bound: Literal["tanh", "sigmoid"] | None = "tanh"
    """How log-scales are bounded; see :func:`fastgen.ops.affine_coupling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.bound not in (None, "tanh", "sigmoid"):
            raise ValueError(f"bound must be None, 'tanh' or 'sigmoid', got {self.bound!r}")


def _layer(config: RealNVPConfig, features: int, index: int) -> Bijection:
    sizes, stays, moves = halves(features, index)
    conditioner = MLPConditioner(stays, config.hidden, (moves, moves), config.context)
    return AffineCoupling(conditioner, sizes, flip=index % 2 == 1, bound=config.bound)


@register("realnvp", config=RealNVPConfig, paper="Dinh et al. (2017), arXiv:1605.08803", data="moons")
class RealNVP(Flow):
    """RealNVP: affine couplings between halves of the features.

    >>> flow = RealNVP(RealNVPConfig(event_shape=(6,), layers=2))
    >>> flow().log_prob(flow.sample(4)).shape
    torch.Size([4])
    """

    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig) -> None:
        features = math.prod(config.event_shape)
        super().__init__(config, Stack((_layer(config, features, i) for i in range(config.layers)), memory=config.memory))
