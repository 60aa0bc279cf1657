"""Planar and radial flows: many simple residual maps, each bending space along a plane or around a point.

The maps are those of :mod:`fastgen.nn.residual_maps`, with parameters that are learned, or moved by a context. As posteriors
of an autoencoder they are in :mod:`fastgen.autoencoders.flow_vae`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.stack import Stack
from fastgen.flows.transform import Bijection
from fastgen.nn import residual_maps as maps
from fastgen.registry import register

__all__ = ["Planar", "PlanarConfig", "Radial", "ResidualMap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanarConfig(FlowConfig):
    """Options of :class:`Planar` and :class:`Radial`."""

    layers: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")


class _Map(NamedTuple):
    size: Callable[[int], int]
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    inverse: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


_MAPS = {
    "planar": _Map(maps.planar_size, maps.planar, maps.planar_inverse),
    "radial": _Map(maps.radial_size, maps.radial, maps.radial_inverse),
}


class ResidualMap(Bijection):
    """One planar or radial map of [N, D]; a context moves its parameters linearly."""

    def __init__(self, kind: Literal["planar", "radial"], features: int, context: int = 0) -> None:
        super().__init__()
        self.kind = kind
        size = _MAPS[kind].size(features)
        self.parameters_at_rest = nn.Parameter(torch.randn(1, size) / math.sqrt(features))
        self.context = nn.Linear(context, size, bias=False) if context else None

    def _parameters_at(self, context: Tensor | None) -> Tensor:
        if self.context is None:
            return self.parameters_at_rest
        return self.parameters_at_rest + self.context(context)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _MAPS[self.kind].forward(x, self._parameters_at(context))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _MAPS[self.kind].inverse(y, self._parameters_at(context))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def _stack(kind: Literal["planar", "radial"], config: PlanarConfig) -> Stack:
    features = math.prod(config.event_shape)
    return config.stack(ResidualMap(kind, features, config.context) for _ in range(config.layers))


@register("planar", config=PlanarConfig, paper="Rezende & Mohamed (2015), arXiv:1505.05770", data="moons")
class Planar(Flow):
    """Planar flow: each layer bends space along one plane.

    >>> flow = Planar(PlanarConfig(event_shape=(2,), layers=4))
    >>> flow().log_prob(flow.sample(3)).shape
    torch.Size([3])
    """

    config: PlanarConfig

    def __init__(self, config: PlanarConfig) -> None:
        super().__init__(config, _stack("planar", config))


@register("radial", config=PlanarConfig, paper="Rezende & Mohamed (2015), arXiv:1505.05770", data="moons")
class Radial(Flow):
    """Radial flow: each layer draws space towards one point, or away from it.

    >>> flow = Radial(PlanarConfig(event_shape=(2,), layers=4))
    >>> flow().log_prob(flow.sample(3)).shape
    torch.Size([3])
    """

    config: PlanarConfig

    def __init__(self, config: PlanarConfig) -> None:
        super().__init__(config, _stack("radial", config))
