"""Flows of zuko as flows of fastgen, with their weights.

>>> flow = from_zuko(zuko.flows.NSF(features=3, context=2, transforms=4))  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastgen.flows.autoregressive import Autoregressive
from fastgen.flows.elementwise import Elementwise, Spline
from fastgen.flows.flow import Flow
from fastgen.flows.permutation import Permutation
from fastgen.flows.transform import Bijection, Compose
from fastgen.interop._layers import (
    ScaledAffine,
    as_flow,
    check_relu,
    coupling_in_order,
    fill_made,
    head_rows,
    is_linear,
    mlp_conditioner,
    refuse,
)
from fastgen.nn.masked import MADE

__all__ = ["from_zuko"]


def from_zuko(flow: Any) -> Flow:
    """A ``zuko.flows`` NSF, MAF, NICE or RealNVP as a fastgen flow of the same density.

    Args:
        flow: fully autoregressive or coupling, with ReLU and a standard normal base.

    Returns:
        a :class:`fastgen.flows.flow.Flow` with a copy of the weights: ``flow(context).log_prob(x)`` as before.

    Raises:
        ValueError: for parts that have no counterpart.
    """
    base = flow.base(None)
    base = getattr(base, "base_dist", base)
    if type(base).__name__ != "Normal" or bool((base.loc != 0).any() | (base.scale != 1).any()):
        raise refuse("a base distribution other than the standard normal")
    transforms = list(flow.transform.transforms) if hasattr(flow.transform, "transforms") else [flow.transform]
    layers = [_layer(t) for t in transforms]
    first = transforms[0]
    features = len(first.mask) if hasattr(first, "mask") else len(first.order)
    return as_flow(layers, features, _context(first), flow)


def _context(transform: Any) -> int:
    linear = next(m for m in transform.hyper if is_linear(m))
    inputs = int(transform.mask.sum()) if hasattr(transform, "mask") else len(transform.order)
    return linear.in_features - inputs


def _elementwise(transform: Any) -> Elementwise:
    shapes = [tuple(shape) for shape in transform.shapes]
    phi = [torch.zeros(shape) for shape in shapes]
    made = transform.univariate(*phi)
    name = type(made).__name__
    if name == "MonotonicAffineTransform":
        slope = torch.exp(transform.univariate(torch.zeros(()), torch.tensor(1e9)).log_scale).item()
        if abs(slope - 1e3) > 1:
            raise refuse(f"an affine transform of slope other than 1e-3, here {1 / slope:.3g}")
        return ScaledAffine("softclip")
    if name == "MonotonicRQSTransform":
        steep = transform.univariate(phi[0], phi[1], torch.full_like(phi[2], 1e9)).derivatives
        if len(phi[2]) and abs(steep[1].item() - 1e3) > 1:
            raise refuse(f"a spline of slope other than 1e-3, here {1 / steep[1].item():.3g}")
        return Spline(made.bins, float(made.horizontal[-1]), "zuko")
    raise refuse(f"the univariate transform {name}")


def _layer(transform: Any) -> Bijection:
    kind = type(transform).__name__
    if kind == "GeneralCouplingTransform":
        elementwise = _elementwise(transform)
        stays, moves = transform.mask.nonzero()[:, 0], (~transform.mask).nonzero()[:, 0]
        rows = head_rows(torch.arange(len(moves)), elementwise.sizes)
        return coupling_in_order(mlp_conditioner(list(transform.hyper), rows, _context(transform)), stays, moves, elementwise)
    if kind == "MaskedAutoregressiveTransform":
        return _autoregressive(transform)
    raise refuse(f"the transform {kind}")


def _autoregressive(transform: Any) -> Bijection:
    features = len(transform.order) if transform.order is not None else 0
    if not features or sorted(transform.order.tolist()) != list(range(features)):
        raise refuse("a masked transform that is not fully autoregressive: 'passes' or 'adjacency' is set")
    elementwise = _elementwise(transform)
    context = _context(transform)
    order = transform.order.argsort()
    masked: list[Any] = [m for m in transform.hyper if isinstance(m, nn.Linear)]
    for module in transform.hyper:
        if not isinstance(module, nn.Linear):
            check_relu(module)
    # the degree of a unit is how many dimensions it sees, directly or through the layer below
    degrees: list[torch.Tensor] = [masked[0].mask[:, :features].sum(1)]
    for layer in masked[1:-1]:
        degrees.append(torch.where(layer.mask.bool(), degrees[-1], 0).amax(1))
    orders = [d.argsort(stable=True) for d in degrees]
    sorted_degrees = [d[o].tolist() for d, o in zip(degrees, orders, strict=True)]
    made = MADE(features, [len(d) for d in degrees], elementwise.sizes, context, degrees=sorted_degrees)
    layers = [(m.weight.data, m.bias.data, m.mask) for m in masked]
    weight, bias, mask = layers[0]
    layers[0] = weight[:, :features], bias, mask[:, :features]
    fill_made(made, layers[:-1], layers[-1], order, elementwise.sizes, orders)
    if made.contexts:
        cast(Any, made.contexts[0]).weight.data.copy_(weight[orders[0], features:])
    if torch.equal(order, torch.arange(features)):
        return Autoregressive(made, elementwise)
    if torch.equal(order, torch.arange(features).flip(0)):
        return Autoregressive(made, elementwise, reverse=True)
    permutation = Permutation(order)
    return Compose([permutation, Autoregressive(made, elementwise), permutation.inv])
