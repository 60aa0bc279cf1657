"""nflows' names on fastgen's kernels: its spline functions, its flow, and its flows with their weights.

The functions have nflows' arguments and give ``(outputs, logabsdet)``, the second element by element.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from fastgen import ops
from fastgen.flows import flow as flows
from fastgen.flows.autoregressive import Autoregressive
from fastgen.flows.elementwise import Elementwise, Spline
from fastgen.flows.permutation import Dense, Permutation
from fastgen.flows.transform import Bijection, Compose
from fastgen.interop import _layers
from fastgen.interop._layers import ScaledAffine, refuse
from fastgen.nn.masked import MADE
from fastgen.ops.rq_spline import LEAST, rational_quadratic

__all__ = [
    "Flow",
    "InputOutsideDomain",
    "StandardNormal",
    "from_nflows",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]


class InputOutsideDomain(ValueError):  # noqa: N818 - nflows' name
    """An input is outside the interval of the spline."""


def _knots(free: Tensor, low: float, high: float, least: float, name: str) -> tuple[Tensor, Tensor]:
    """Knots [..., K + 1] from ``low`` to ``high`` and the lengths of the bins [..., K], none shorter than its share."""
    bins = free.shape[-1]
    if least * bins > 1:
        raise ValueError(f"min_bin_{name} must be at most 1 / {bins} for {bins} bins, got {least}")
    shares = least + (1 - least * bins) * torch.softmax(free, -1)
    inner = low + (high - low) * shares.cumsum(-1)[..., :-1]
    return pad(pad(inner, (1, 0), value=low), (0, 1), value=high), (high - low) * shares


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic spline from [left, right] to [bottom, top].

    Args:
        inputs: [...], all inside the interval.
        unnormalized_widths, unnormalized_heights: [..., K].
        unnormalized_derivatives: [..., K + 1], at all knots.
        inverse: apply the inverse map.
        left, right, bottom, top: the box.
        min_bin_width, min_bin_height: least share of a bin; at most 1 / K.
        min_derivative: least derivative at a knot.

    Returns:
        ``(outputs, logabsdet)``, both [...].

    Raises:
        InputOutsideDomain: for inputs outside the interval.
    """
    low, high = (bottom, top) if inverse else (left, right)
    if inputs.numel() and (inputs.min() < low or inputs.max() > high):
        raise InputOutsideDomain(f"inputs must be in [{low}, {high}], got {inputs.min():.6g} .. {inputs.max():.6g}")
    knots_x, widths = _knots(unnormalized_widths, left, right, min_bin_width, "width")
    knots_y, heights = _knots(unnormalized_heights, bottom, top, min_bin_height, "height")
    slopes = min_derivative + softplus(unnormalized_derivatives)
    searched = (knots_y if inverse else knots_x)[..., 1:-1]
    k = (searched <= inputs[..., None]).sum(-1, keepdim=True)
    return rational_quadratic(inputs, k, knots_x, widths, knots_y, heights, slopes, inverse=inverse)


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic spline on [-tail_bound, tail_bound], the identity outside.

    Args:
        inputs: [...].
        unnormalized_widths, unnormalized_heights: [..., K].
        unnormalized_derivatives: [..., K - 1], at the inner knots.
        inverse: apply the inverse map.
        tails: "linear".
        tail_bound: half the side of the box.
        min_bin_width, min_bin_height, min_derivative: nflows' 1e-3, which the fused kernel has, or any other.

    Returns:
        ``(outputs, logabsdet)``, both [...].
    """
    if tails != "linear":
        raise RuntimeError(f"{tails} tails are not implemented.")
    parameters = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    if min_bin_width == min_bin_height == min_derivative == LEAST:
        # every element is a sample of its own: the kernel sums log-determinants over samples
        rows = (p.expand(*inputs.shape, p.shape[-1]).reshape(-1, p.shape[-1]) for p in parameters)
        out, ladj = ops.rq_spline(inputs.reshape(-1), *rows, bound=tail_bound, inverse=inverse, convention="nflows")
        return out.view(inputs.shape), ladj.view(inputs.shape)
    inside = (inputs >= -tail_bound) & (inputs <= tail_bound)
    derivatives = pad(unnormalized_derivatives, (1, 1), value=math.log(math.expm1(1 - min_derivative)))
    out, ladj = rational_quadratic_spline(
        torch.where(inside, inputs, 0.0), unnormalized_widths, unnormalized_heights, derivatives, inverse,
        -tail_bound, tail_bound, -tail_bound, tail_bound, min_bin_width, min_bin_height, min_derivative,
    )  # fmt: skip
    return torch.where(inside, out, inputs), torch.where(inside, ladj, 0.0)


class StandardNormal(nn.Module):
    """N(0, I) of events of ``shape``, with nflows' ``log_prob`` and ``sample``."""

    zero: Tensor

    def __init__(self, shape: list[int] | tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p in nats, [N]; the context is not read."""
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(f"inputs must be [N, {', '.join(map(str, self.shape))}], got {list(inputs.shape)}")
        return -0.5 * inputs.square().flatten(1).sum(1) - 0.5 * math.prod(self.shape) * math.log(2 * math.pi)

    def sample(self, num_samples: int, context: Tensor | None = None, *, key: Tensor | None = None) -> Tensor:
        """[num_samples, *shape], or [contexts, num_samples, *shape]."""
        rows = num_samples * (1 if context is None else len(context))
        z = ops.normal((rows, *self.shape), key, dtype=self.zero.dtype, device=None if key is not None else self.zero.device)
        return z if context is None else z.view(len(context), num_samples, *self.shape)


class Flow(nn.Module):
    """A transform and a base distribution, with the methods of ``nflows.flows.Flow``.

    Args:
        transform: from data to noise: any bijection of fastgen, such as ``model.transform``.
        distribution: of the noise; :class:`StandardNormal` or anything with its methods.
        embedding_net: what the context goes through first.
    """

    def __init__(self, transform: Bijection, distribution: Any, embedding_net: nn.Module | None = None) -> None:
        super().__init__()
        self._transform = transform
        self._distribution = distribution
        self._embedding_net = nn.Identity() if embedding_net is None else embedding_net

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(inputs | context) in nats: [N], for one context per input."""
        if context is not None and len(context) != len(inputs):
            raise ValueError(f"context must have one row per input: {len(inputs)}, got {len(context)}")
        context = self._embedding_net(context)
        noise, ladj = self._transform.call_and_ladj(inputs, context)
        return self._distribution.log_prob(noise, context) + ladj

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """[num_samples, *event], or [contexts, num_samples, *event]; ``batch_size`` samples per context at a time."""
        sizes = [num_samples] if batch_size is None else [len(p) for p in torch.arange(num_samples).split(batch_size)]
        parts = [self._draw(size, self._embedding_net(context))[0] for size in sizes]
        return torch.cat(parts, 0 if context is None else 1)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`sample` gives them, and their log-probabilities, from one pass."""
        context = self._embedding_net(context)
        samples, noise, ladj = self._draw(num_samples, context)
        log_prob = self._distribution.log_prob(noise) - ladj
        return samples, log_prob if context is None else log_prob.view(len(context), num_samples)

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise that inputs come from: [N, *event]."""
        return self._transform(inputs, self._embedding_net(context))

    def _draw(self, n: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Samples in their final shape, and noise and log-determinants of one row each."""
        noise = self._distribution.sample(n, context)
        if context is None:
            x, ladj = self._transform.inv_and_ladj(noise)
            return x, noise, ladj
        noise = noise.flatten(0, 1)
        x, ladj = self._transform.inv_and_ladj(noise, context.repeat_interleave(n, 0))
        return x.view(len(context), n, *x.shape[1:]), noise, ladj


def from_nflows(flow: Any) -> flows.Flow:
    """An ``nflows.flows.Flow`` of affine or rational-quadratic transforms as a fastgen flow of the same density.

    Couplings and masked autoregressive transforms with residual networks (or, without context, feed-forward masked ones),
    permutations, LU and naive linear layers, and their compositions and inverses are known; the base must be StandardNormal.

    Returns:
        a :class:`fastgen.flows.flow.Flow` with a copy of the weights.

    Raises:
        ValueError: for parts that have no counterpart.
    """
    base = flow._distribution
    if type(base).__name__ != "StandardNormal":
        raise refuse(f"the base distribution {type(base).__name__}: StandardNormal is expected")
    if type(flow._embedding_net).__name__ != "Identity":
        raise refuse("an embedding network: apply it to the context")
    transform = convert(flow._transform)
    layers = list(transform) if isinstance(transform, Compose) else [transform]
    return _layers.as_flow(layers, math.prod(base._shape), _context_of(flow), flow)


def _context_of(flow: Any) -> int:
    """Features of the context: what the first network with one expects."""
    for module in flow.modules():
        if type(module).__name__ == "ResidualNet" and module.context_features:
            return module.context_features
        if type(module).__name__ == "MADE" and hasattr(module, "context_layer"):
            return module.context_layer.in_features
    return 0


_COUPLINGS = {"AffineCouplingTransform": "sigmoid", "AdditiveCouplingTransform": "none"}


def convert(transform: Any) -> Bijection:
    """One transform of nflows, or composed ones."""
    kind = type(transform).__name__
    if kind == "CompositeTransform":
        return Compose(convert(t) for t in transform._transforms)
    if kind == "InverseTransform":
        return convert(transform._transform).inv
    if kind in ("Permutation", "RandomPermutation", "ReversePermutation"):
        return Permutation(transform._permutation)
    if kind in ("LULinear", "NaiveLinear"):
        return Dense(transform.weight(), transform.bias)
    if kind in _COUPLINGS:
        stays, moves = transform.identity_features, transform.transform_features
        affine = ScaledAffine(_COUPLINGS[kind])
        blocks = list(torch.arange(len(affine.sizes) * len(moves)).split(len(moves)))
        conditioner = _layers.residual_conditioner(transform.transform_net, blocks, [1.0] * len(blocks))
        return _layers.coupling_in_order(conditioner, stays, moves, affine)
    if kind in ("PiecewiseRationalQuadraticCouplingTransform", "PiecewiseRationalQuadraticCoupling"):
        return spline_coupling(transform)
    if kind == "MaskedAffineAutoregressiveTransform":
        # the scale comes first
        return autoregressive(transform.autoregressive_net, ScaledAffine("softplus"), swapped=True)
    if kind in (
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
        "MaskedPiecewiseRationalQuadraticAutoregressive",
    ):
        return autoregressive(transform.autoregressive_net, spline_of(transform))
    raise refuse(f"the transform {kind}")


def spline_of(transform: Any, bins: int | None = None) -> Spline:
    """The spline of a piecewise rational-quadratic transform."""
    least = {transform.min_bin_width, transform.min_bin_height, transform.min_derivative}
    if transform.tails != "linear" or least != {LEAST}:
        raise refuse(f"a spline with tails={transform.tails!r} and minima {sorted(least)}: linear tails and 1e-3 are expected")
    return Spline(bins or transform.num_bins, float(transform.tail_bound), "nflows")


def spline_coupling(transform: Any) -> Bijection:
    """A rational-quadratic coupling, with or without a transform of the part that stays."""
    spline = spline_of(transform)
    stays, moves = transform.identity_features, transform.transform_features
    root = math.sqrt(transform.transform_net.hidden_features)
    rows = _layers.head_rows(torch.arange(len(moves)), spline.sizes)
    conditioner = _layers.residual_conditioner(transform.transform_net, rows, (root, root, 1.0))
    coupling = _layers.coupling_in_order(conditioner, stays, moves, spline)
    fixed = transform.unconditional_transform
    if fixed is None:
        return coupling
    values = fixed.unnormalized_widths, fixed.unnormalized_heights, fixed.unnormalized_derivatives
    to_front, joined, back = coupling
    return Compose([to_front, joined, _layers.FixedElementwise(spline_of(fixed, values[0].shape[-1]), values), back])


def autoregressive(net: Any, elementwise: Elementwise, *, swapped: bool = False, theirs: bool = False) -> Bijection:
    """A masked autoregressive transform from its MADE; ``swapped``: the kinds of parameters come in the reverse
    order; ``theirs``: it is of normflows.
    """
    context = net.context_layer.in_features if hasattr(net, "context_layer") else 0
    first, blocks, last = net.initial_layer, list(net.blocks), net.final_layer
    residual = type(blocks[0]).__name__ == "MaskedResidualBlock" if blocks else True
    if context and (theirs or not residual):
        raise refuse("a masked network whose context enters in another way than into nflows' residual one")
    if theirs and not residual:
        raise refuse("a masked network without residual blocks, whose first layer is linear in normflows")
    for block in blocks:
        _layers.check_block(block)
    masked = [first]
    for block in blocks:
        masked += list(block.linear_layers) if residual else [block.linear]
    features = first.in_features
    sizes = tuple(reversed(elementwise.sizes)) if swapped else elementwise.sizes
    order = last.degrees.view(features, -1)[:, 0].argsort()
    orders = [layer.degrees.argsort(stable=True) for layer in masked]
    degrees = [layer.degrees[o].tolist() for layer, o in zip(masked, orders, strict=True)]
    made = MADE(features, [len(d) for d in degrees], sizes, context, residual=residual, degrees=degrees)
    layers = [(m.weight.data, m.bias.data, m.mask) for m in masked]
    _layers.fill_made(made, layers, (last.weight.data, last.bias.data, last.mask), order, sizes, orders)
    if swapped:
        made.heads = nn.ModuleList(reversed(list(made.heads)))
    if context:
        sources = [net.context_layer, *(block.context_layer for block in blocks)]
        for target, source, units in zip(cast(Any, made.contexts), sources, [orders[0], *orders[1::2]], strict=True):
            target.weight.data.copy_(source.weight.data[units])
            target.bias.data.copy_(source.bias.data[units])
    if torch.equal(order, torch.arange(features)):
        return Autoregressive(made, elementwise)
    permutation = Permutation(order)
    return Compose([permutation, Autoregressive(made, elementwise), permutation.inv])
