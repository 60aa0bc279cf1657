"""RealNVP: affine coupling layers; of images at several scales, with checkerboard and channel masks.

Each level of the multi-scale architecture packs 2 x 2 pixels into channels. Its first couplings join the colours of a
checkerboard, whose pixels are then the halves of the channels: the network sees them packed, at half the resolution, and spends
no work on masked pixels. The next couplings join other halves of the channels, and half of the channels leave as noise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

from torch import Tensor, nn

from fastgen.flows.coupling import AffineCoupling, halves
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.images import Squeeze
from fastgen.flows.multiscale import MultiScale, halvings
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import MLPConditioner, ResNetConditioner
from fastgen.registry import register

__all__ = ["RealNVP", "RealNVPConfig", "Regroup"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealNVPConfig(FlowConfig):
    """Options of :class:`RealNVP`."""

    layers: int = 8
    """Couplings of a flow of vectors."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of its conditioners' hidden layers."""
    levels: int | None = None
    """Scales of a flow of images; None: as many as the sides can be halved, at most 3."""
    channels: int = 32
    """Channels of its conditioners' residual networks."""
    blocks: int = 2
    """Residual blocks of each."""
    bound: Literal["tanh", "sigmoid"] | None = "tanh"
    """How log-scales are bounded; see :func:`fastgen.ops.affine_coupling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.blocks < 0:
            raise ValueError(f"blocks must be at least 0, got {self.blocks}")
        if self.bound not in (None, "tanh", "sigmoid"):
            raise ValueError(f"bound must be None, 'tanh' or 'sigmoid', got {self.bound!r}")


class Regroup(Bijection):
    """Exchange the second and the third quarter of the channels, so that the halves are joined in another way."""

    event_dims = (3, 3)

    def _exchange(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, channels, height, width = x.shape
        quarters = x.reshape(n, 2, 2, channels // 4, height, width)
        return quarters.transpose(1, 2).reshape(x.shape), x.new_zeros(n)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._exchange(x)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._exchange(y)


def _coupling(config: RealNVPConfig, features: int, index: int) -> Bijection:
    """Coupling ``index`` between halves of ``features``: of a vector's elements, or of an image's channels."""
    sizes, stays, moves = halves(features, index)
    conditioner: nn.Module
    if config.is_image:
        conditioner = ResNetConditioner(stays, config.channels, (moves, moves), config.context, blocks=config.blocks)
    else:
        conditioner = MLPConditioner(stays, config.hidden, (moves, moves), config.context, identity=True)
    return AffineCoupling(conditioner, sizes, flip=index % 2 == 1, bound=config.bound)


def _level(config: RealNVPConfig, index: int, *, last: bool) -> Bijection:
    """Three couplings of each kind, four checkerboards at the last level, as in the paper."""
    channels = config.event_shape[0] * 2 ** (index + 2)
    layers: list[Bijection] = [Squeeze(), *(_coupling(config, channels, i) for i in range(4 if last else 3))]
    if not last:
        layers += [Regroup(), *(_coupling(config, channels, i) for i in range(3))]
    return config.stack(layers)


@register("realnvp", config=RealNVPConfig, paper="Dinh et al. (2017), arXiv:1605.08803", data="moons")
class RealNVP(Flow):
    """RealNVP: affine couplings between halves of the features, or of an image's pixels and channels at several scales.

    >>> flow = RealNVP(RealNVPConfig(event_shape=(6,), layers=2))
    >>> flow().log_prob(flow.sample(4)).shape
    torch.Size([4])
    """

    config: RealNVPConfig

    def __init__(self, config: RealNVPConfig) -> None:
        if config.is_image:
            levels = halvings(config.event_shape, config.levels)
            shape = cast("tuple[int, int, int]", config.event_shape)
            super().__init__(config, MultiScale((_level(config, i, last=i == levels - 1) for i in range(levels)), shape))
        else:
            features = math.prod(config.event_shape)
            couplings = (_coupling(config, features, i) for i in range(config.layers))
            super().__init__(config, config.stack(couplings))
