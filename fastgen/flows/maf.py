"""Masked autoregressive flow: affine maps of each feature given those before it. Density in one pass; sampling finds the
features one by one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fastgen.flows.autoregressive import Autoregressive, Inversion, check_inversion
from fastgen.flows.elementwise import Affine
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.nn.masked import MADE
from fastgen.registry import register

__all__ = ["MAF", "MAFConfig", "affine_layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAFConfig(FlowConfig):
    """Options of :class:`MAF` and of :class:`fastgen.flows.iaf.IAF`."""

    layers: int = 5
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the masked networks' hidden layers."""
    bound: Literal["tanh", "sigmoid"] | None = "tanh"
    """How log-scales are bounded; see :func:`fastgen.ops.affine_coupling`."""
    inversion: Inversion = "incremental"
    """How the slow direction is found; see :mod:`fastgen.flows.autoregressive`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.bound not in (None, "tanh", "sigmoid"):
            raise ValueError(f"bound must be None, 'tanh' or 'sigmoid', got {self.bound!r}")
        check_inversion(self.inversion)


def affine_layer(config: MAFConfig, index: int) -> Autoregressive:
    """Layer ``index``: the order of the features turns around from each to the next."""
    elementwise = Affine(config.bound)
    network = MADE(math.prod(config.event_shape), config.hidden, elementwise.sizes, config.context)
    return Autoregressive(network, elementwise, reverse=index % 2 == 1, inversion=config.inversion)


@register("maf", config=MAFConfig, paper="Papamakarios et al. (2017), arXiv:1705.07057", data="moons")
class MAF(Flow):
    """Masked autoregressive flow: affine maps of each feature given those before it; densities are fast.

    >>> flow = MAF(MAFConfig(event_shape=(6,), layers=2))
    >>> flow().log_prob(flow.sample(4)).shape
    torch.Size([4])
    """

    config: MAFConfig

    def __init__(self, config: MAFConfig) -> None:
        super().__init__(config, config.stack(affine_layer(config, i) for i in range(config.layers)))
