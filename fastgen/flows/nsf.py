"""Neural spline flow: every layer maps elements by monotonic rational-quadratic splines with parameters from a network.

Coupling layers alternate halves of the features: one half sets the splines of the other (RQ-NSF (C) in the paper).
Autoregressive layers alternate the order of the features: those before a feature set its spline (RQ-NSF (AR)).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fastgen.flows.autoregressive import Autoregressive, Inversion, check_inversion
from fastgen.flows.coupling import SplineCoupling, halves
from fastgen.flows.elementwise import Spline
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import MLPConditioner
from fastgen.nn.masked import MADE
from fastgen.registry import register

__all__ = ["NSF", "NSFConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSFConfig(FlowConfig):
    """Options of :class:`NSF`."""

    kind: Literal["coupling", "autoregressive"] = "coupling"
    """How layers condition: "coupling" is fast both ways, "autoregressive" fits more closely and samples step by step."""
    layers: int = 5
    bins: int = 8
    """Bins of each spline."""
    bound: float = 5.0
    """The splines act on [-bound, bound]; outside every layer is the identity."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the conditioners' hidden layers."""
    convention: Literal["nflows", "zuko"] = "zuko"
    """Parametrisation of the splines; see :func:`fastgen.ops.rq_spline`."""
    inversion: Inversion = "incremental"
    """How autoregressive layers are inverted; see :mod:`fastgen.flows.autoregressive`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _LAYERS:
            raise ValueError(f"kind must be one of {', '.join(_LAYERS)}, got {self.kind!r}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}: one alone is the identity")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {self.bound}")
        check_inversion(self.inversion)


def _coupling(config: NSFConfig, features: int, index: int) -> Bijection:
    sizes, stays, moves = halves(features, index)
    outputs = (moves * config.bins, moves * config.bins, moves * (config.bins - 1))
    conditioner = MLPConditioner(stays, config.hidden, outputs, config.context)
    return SplineCoupling(
        conditioner,
        sizes,
        flip=index % 2 == 1,
        bins=config.bins,
        bound=config.bound,
        convention=config.convention,
    )


def _autoregressive(config: NSFConfig, features: int, index: int) -> Bijection:
    spline = Spline(config.bins, config.bound, config.convention)
    network = MADE(features, config.hidden, spline.sizes, config.context)
    return Autoregressive(network, spline, reverse=index % 2 == 1, inversion=config.inversion)


_LAYERS = {"coupling": _coupling, "autoregressive": _autoregressive}
"""Layer ``index`` of a flow of each kind."""


@register("nsf", config=NSFConfig, paper="Durkan et al. (2019), arXiv:1906.04032", data="two_spirals")
class NSF(Flow):
    """Neural spline flow: rational-quadratic splines between coupled halves of the features, or autoregressive.

    >>> flow = NSF(NSFConfig(event_shape=(16,), layers=2))
    >>> flow().log_prob(flow.sample(4)).shape
    torch.Size([4])
    """

    config: NSFConfig

    def __init__(self, config: NSFConfig) -> None:
        layer, features = _LAYERS[config.kind], math.prod(config.event_shape)
        super().__init__(config, config.stack(layer(config, features, i) for i in range(config.layers)))
