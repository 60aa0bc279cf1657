"""Models of normflows as flows of fastgen, with their weights.

normflows' layers run from noise to data, fastgen's from data to noise: each is converted to its inverse, the last one first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgen.flows.flow import Flow
from fastgen.flows.permutation import Dense, Permutation
from fastgen.flows.transform import Bijection, Compose
from fastgen.interop import _layers
from fastgen.interop._layers import ScaledAffine, refuse
from fastgen.interop.nflows import autoregressive, spline_coupling, spline_of
from fastgen.nn.conditioner import MLPConditioner

__all__ = ["from_normflows"]


def from_normflows(model: Any) -> Flow:
    """A ``normflows.NormalizingFlow`` as a fastgen flow of the same density.

    CoupledRationalQuadraticSpline, AutoregressiveRationalQuadraticSpline, MaskedAffineAutoregressive, MaskedAffineFlow and
    AffineCouplingBlock with networks of ReLU, Permute and LULinearPermute are known, the base must be DiagGaussian.

    Returns:
        a :class:`fastgen.flows.flow.Flow` with a copy of the weights; the base's location and scale are its last layer.

    Raises:
        ValueError: for parts that have no counterpart.
    """
    base = model.q0
    if type(base).__name__ != "DiagGaussian" or len(base.shape) != 1:
        raise refuse(f"the base distribution {type(base).__name__}: DiagGaussian of vectors is expected")
    features = base.shape[0]
    layers = [_layer(layer, features) for layer in reversed(model.flows)]
    scale = torch.exp(-base.log_scale.data[0])
    layers.append(Dense(torch.diag(scale), -base.loc.data[0] * scale))
    return _layers.as_flow(layers, features, 0, model)


def _mlp(net: Any, rows: list[torch.Tensor]) -> MLPConditioner:
    if type(net).__name__ != "MLP":
        raise refuse(f"a {type(net).__name__} as a network: an MLP is expected")
    return _layers.mlp_conditioner(list(net.net), rows, 0)


class _Two(nn.Module):
    """The outputs of two networks of the same input, one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([first, second])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(value for part in self.parts for value in part(x, context))


def _layer(layer: Any, features: int) -> Bijection:
    """Data to noise: what the layer's ``inverse`` does."""
    kind = type(layer).__name__
    if kind == "CoupledRationalQuadraticSpline":
        return spline_coupling(layer.prqct)
    if kind == "AutoregressiveRationalQuadraticSpline":
        return autoregressive(layer.mprqat.autoregressive_net, spline_of(layer.mprqat), theirs=True)
    if kind == "MaskedAffineAutoregressive":
        return autoregressive(layer.autoregressive_net, ScaledAffine("sigmoid"), swapped=True, theirs=True).inv
    if kind == "MaskedAffineFlow":
        mask = layer.b.flatten() > 0
        stays, moves = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        if not all(isinstance(net, nn.Module) for net in (layer.s, layer.t)):
            raise refuse("a MaskedAffineFlow without both networks")
        conditioner = _Two(_masked_mlp(layer.t, stays, moves), _masked_mlp(layer.s, stays, moves))
        return _layers.coupling_in_order(conditioner, stays, moves, ScaledAffine("exp")).inv
    if kind == "AffineCouplingBlock":
        return _block(layer, features)
    if kind == "Permute":
        half = features // 2
        forward = layer.perm if layer.mode == "shuffle" else torch.cat((torch.arange(half, features), torch.arange(half)))
        return Permutation(forward).inv
    if kind == "LULinearPermute":
        return Compose([Permutation(layer.permutation._permutation), Dense(layer.linear.weight(), layer.linear.bias)])
    raise refuse(f"the layer {kind}")


def _masked_mlp(net: Any, stays: torch.Tensor, moves: torch.Tensor) -> nn.Module:
    """A network of the whole vector with the moved part at zero, as one of the part that stays."""
    made = _mlp(net, [moves])
    first = made.first
    made.first = nn.Linear(len(stays), first.out_features)
    made.first.weight.data.copy_(first.weight.data[:, stays])
    made.first.bias.data.copy_(first.bias.data)
    return made


def _block(block: Any, features: int) -> Bijection:
    split, affine, _ = block.flows
    if not affine.scale or split.mode not in ("channel", "channel_inv"):
        raise refuse(f"an AffineCouplingBlock with scale={affine.scale} and split_mode={split.mode!r}")
    first, second = torch.arange(features).chunk(2)
    stays, moves = (first, second) if split.mode == "channel" else (second, first)
    rows = [torch.arange(0, 2 * len(moves), 2), torch.arange(1, 2 * len(moves), 2)]
    scale = {"exp": "exp", "sigmoid": "sigmoid_divides", "sigmoid_inv": "sigmoid_multiplies"}[affine.scale_map]
    return _layers.coupling_in_order(_mlp(affine.param_map, rows), stays, moves, ScaledAffine(scale)).inv
