"""Glow: activation normalisation, an invertible 1x1 convolution and an affine coupling, repeated at several scales.

The half of the channels that leaves a level as noise has a learned normal prior given the half that stays: an affine coupling
between the two.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from fastgen.flows.coupling import AffineCoupling
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.images import Squeeze
from fastgen.flows.linear import ActNorm, LULinear
from fastgen.flows.multiscale import MultiScale, halvings
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import ConvConditioner
from fastgen.registry import register

__all__ = ["Glow", "GlowConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlowConfig(FlowConfig):
    """Options of :class:`Glow`. The paper's own are far larger: 32 steps, 512 channels."""

    levels: int | None = None
    """Scales; None: as many as the sides can be halved, at most 3."""
    steps: int = 8
    """Steps of flow at each scale."""
    channels: int = 128
    """Channels of the conditioners."""
    bound: Literal["tanh", "sigmoid"] | None = "tanh"
    """How log-scales are bounded; "sigmoid" is the paper's, but its inverse can be very large."""
    learned_prior: bool = True
    """Whether the noise that leaves a level has a prior given what stays."""
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.bound not in (None, "tanh", "sigmoid"):
            raise ValueError(f"bound must be None, 'tanh' or 'sigmoid', got {self.bound!r}")


def _coupling(config: GlowConfig, channels: int) -> Bijection:
    half = channels // 2
    conditioner = ConvConditioner(half, config.channels, (half, half), config.context)
    return AffineCoupling(conditioner, (half, half), bound=config.bound)


def _level(config: GlowConfig, index: int, *, last: bool) -> Bijection:
    channels = config.event_shape[0] * 2 ** (index + 2)
    layers: list[Bijection] = [Squeeze()]
    for _ in range(config.steps):
        layers += [ActNorm(channels, 3), LULinear(channels, 3), _coupling(config, channels)]
    if config.learned_prior and not last:
        layers.append(_coupling(config, channels))
    return config.stack(layers)


@register("glow", config=GlowConfig, paper="Kingma & Dhariwal (2018), arXiv:1807.03039", data="mnist5k")
class Glow(Flow):
    """Glow: actnorm, invertible 1x1 convolutions and affine couplings at several scales; images with even sides.

    >>> flow = Glow(GlowConfig(event_shape=(1, 8, 8), steps=1, channels=4))
    >>> flow.sample(4).shape
    torch.Size([4, 1, 8, 8])
    """

    config: GlowConfig

    def __init__(self, config: GlowConfig) -> None:
        levels = halvings(config.event_shape, config.levels)
        shape = cast("tuple[int, int, int]", config.event_shape)
        super().__init__(config, MultiScale((_level(config, i, last=i == levels - 1) for i in range(levels)), shape))
