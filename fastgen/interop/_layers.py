"""Layers that other packages' flows have and fastgen's do not, and how their networks are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen import ops
from fastgen.flows.coupling import Coupling
from fastgen.flows.elementwise import Elementwise
from fastgen.flows.flow import Flow, FlowConfig
from fastgen.flows.permutation import Permutation
from fastgen.flows.stack import Stack
from fastgen.flows.transform import Bijection, Compose
from fastgen.nn.conditioner import MLPConditioner

__all__ = [
    "ElementwiseCoupling",
    "FixedElementwise",
    "ResidualConditioner",
    "ScaledAffine",
    "as_flow",
    "check_block",
    "check_relu",
    "coupling_in_order",
    "fill_made",
    "head_rows",
    "is_linear",
    "mlp_conditioner",
    "refuse",
    "residual_conditioner",
]

_LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "softclip": lambda a: a / (1 + (a / math.log(1e-3)).abs()),
    "softplus": lambda a: torch.log(functional.softplus(a) + 1e-3),
    "sigmoid": lambda a: torch.log(torch.sigmoid(a + 2) + 1e-3),
    "exp": lambda a: a,
    "sigmoid_multiplies": lambda a: functional.logsigmoid(a + 2),
    "sigmoid_divides": lambda a: -functional.logsigmoid(a + 2),
    "none": torch.zeros_like,
}


@dataclasses.dataclass(frozen=True)
class ScaledAffine:
    """y = x * exp(s(log_scale)) + shift; parameters (shift, log_scale), or (shift,) where ``scale`` is "none".

    ``scale`` is the map s: "softclip" (zuko), "softplus" and "sigmoid" (nflows), "exp" and
    "sigmoid_multiplies" and "sigmoid_divides" (normflows), "none".
    """

    scale: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shift and, but for "none", scale."""
        return (1,) if self.scale == "none" else (1, 1)

    def __call__(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(x, parameters[0], _LOG_SCALES[self.scale](parameters[-1]), inverse=inverse)


class ElementwiseCoupling(Coupling):
    """A coupling by any elementwise map; the first part stays."""

    def __init__(self, conditioner: nn.Module, sizes: tuple[int, int], elementwise: Elementwise) -> None:
        super().__init__(conditioner, sizes)
        self.elementwise = elementwise

    def couple(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.elementwise(x, parameters, inverse=inverse)


class FixedElementwise(Bijection):
    """The first elements of x [N, D] by an elementwise map with parameters of its own; the others stay."""

    def __init__(self, elementwise: Elementwise, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.elementwise = elementwise
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone().flatten()[None]) for p in parameters)

    def _apply_map(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        moved = self.values[0].numel() // self.elementwise.sizes[0]
        first, rest = x.split((moved, x.shape[1] - moved), 1)
        parameters = tuple(value.expand(len(x), -1) for value in self.values)
        y, ladj = self.elementwise(first, parameters, inverse=inverse)
        return torch.cat((y, rest), 1), ladj

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_map(x, inverse=False)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_map(y, inverse=True)


class ResidualConditioner(nn.Module):
    """nflows' ResidualNet: pre-activation residual blocks with ReLU that the context gates.

    Shape: [N, inputs], [N, context] or None -> a tuple of [N, outputs[i]].
    """

    def __init__(self, inputs: int, width: int, outputs: Sequence[int], blocks: int, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(inputs + context, width)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(blocks))
        self.gates = nn.ModuleList(nn.Linear(context, width) for _ in range(blocks if context else 0))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(x if context is None else torch.cat((x, context), 1))
        for i, (first, second) in enumerate(cast(Any, self.blocks)):
            change = second(torch.relu(first(torch.relu(h))))
            if context is not None:
                change = change * torch.sigmoid(self.gates[i](context))
            h = h + change
        return tuple(head(h) for head in self.heads)


def refuse(what: str) -> ValueError:
    """The error for what cannot be converted."""
    return ValueError(f"cannot convert {what}")


def _copy_linear(target: Any, source: Any) -> None:
    """Weights and bias."""
    target.weight.data.copy_(source.weight.data)
    if target.bias is not None:
        target.bias.data.copy_(source.bias.data)


def _fill_heads(heads: Any, weight: Tensor, bias: Tensor, rows: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Rows of one output layer as several heads, each divided by its scale."""
    for head, chosen, scale in zip(heads, rows, scales, strict=True):
        head.weight.data.copy_(weight[chosen] / scale)
        head.bias.data.copy_(bias[chosen] / scale)


def head_rows(dimensions: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Where the outputs of each kind are in a layer that has them side by side, dimension by dimension."""
    total, start, rows = sum(sizes), 0, []
    for size in sizes:
        rows.append((dimensions[:, None] * total + torch.arange(start, start + size)).flatten())
        start += size
    return rows


def residual_conditioner(net: Any, rows: Sequence[Tensor], scales: Sequence[float]) -> ResidualConditioner:
    """From a ResidualNet of nflows or normflows; ``rows`` are the outputs that make each head, divided by ``scales``."""
    if type(net).__name__ != "ResidualNet":
        raise refuse(f"a {type(net).__name__} as the network of a coupling: a ResidualNet is expected")
    if getattr(net, "preprocessing", None) is not None:
        raise refuse("a network with preprocessing")
    context = net.context_features or 0
    width = net.hidden_features
    inputs = net.initial_layer.in_features - context
    made = ResidualConditioner(inputs, width, [len(r) for r in rows], len(net.blocks), context)
    _copy_linear(made.first, net.initial_layer)
    for i, block in enumerate(net.blocks):
        check_block(block)
        for target, source in zip(cast(Any, made.blocks[i]), block.linear_layers, strict=True):
            _copy_linear(target, source)
        if context:
            _copy_linear(made.gates[i], block.context_layer)
    _fill_heads(made.heads, net.final_layer.weight.data, net.final_layer.bias.data, rows, scales)
    return made


def check_block(block: Any) -> None:
    """A block must have ReLU and neither batch normalisation nor dropout."""
    if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
        raise refuse("batch normalisation: it makes a sample's density depend on its batch")
    if block.dropout.p:
        raise refuse(f"dropout, here {block.dropout.p}")
    check_relu(block.activation)


def check_relu(activation: Any) -> None:
    """The activation must be ReLU."""
    if not (activation in (torch.relu, functional.relu) or isinstance(activation, nn.ReLU)):
        raise refuse(f"the activation {activation}: ReLU is expected")


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer, torch's or zuko's own."""
    return isinstance(layer, nn.Linear) or (type(layer).__name__ == "Linear" and cast(Tensor, layer.weight).dim() == 2)


def mlp_conditioner(layers: Sequence[nn.Module], rows: Sequence[Tensor], context: int) -> MLPConditioner:
    """From linear layers with ReLU between them, the context concatenated to the input; ``rows`` as above."""
    linear: list[Any] = [layer for layer in layers if is_linear(layer)]
    for layer in layers:
        if not is_linear(layer):
            if isinstance(layer, nn.LeakyReLU) and layer.negative_slope == 0:
                continue
            check_relu(layer)
    if len(linear) < 2:
        raise refuse("a network without hidden layers")
    first, *hidden, last = linear
    inputs = first.in_features - context
    made = MLPConditioner(inputs, [n.out_features for n in (first, *hidden)], [len(r) for r in rows], context)
    made.first.weight.data.copy_(first.weight.data[:, :inputs])
    made.first.bias.data.copy_(first.bias.data)
    if made.context is not None:
        made.context.weight.data.copy_(first.weight.data[:, inputs:])
    for target, source in zip(made.rest, hidden, strict=True):
        _copy_linear(target, source)
    _fill_heads(made.heads, last.weight.data, last.bias.data, rows, [1.0] * len(rows))
    return made


def coupling_in_order(conditioner: nn.Module, stays: Tensor, moves: Tensor, elementwise: Elementwise) -> Compose:
    """A coupling whose parts are the elements at the indices ``stays`` and ``moves``."""
    to_front = Permutation(torch.cat((stays, moves)))
    return Compose([to_front, ElementwiseCoupling(conditioner, (len(stays), len(moves)), elementwise), to_front.inv])


def fill_made(
    made: Any,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    final: tuple[Tensor, Tensor, Tensor],
    order: Tensor,
    sizes: Sequence[int],
    orders: Sequence[Tensor],
) -> None:
    """Copy masked layers into a network whose units are sorted by degree.

    Args:
        made: a :class:`fastgen.nn.masked.MADE` of as many units, with the sorted degrees.
        layers: (weight, bias, mask) of each hidden layer, without context.
        final: the same of the output layer.
        order: the dimensions in the order in which they come.
        sizes: outputs of each kind per dimension.
        orders: for each hidden layer, its units in ascending order of degree.
    """
    before = order
    for target, (weight, bias, mask), units in zip(made.layers, layers, orders, strict=True):
        _check_mask(target.mask, mask[units][:, before])
        target.weight.data.copy_(weight[units][:, before])
        target.bias.data.copy_(bias[units])
        before = units
    weight, bias, mask = final
    for head, rows in zip(made.heads, head_rows(order, sizes), strict=True):
        _check_mask(head.mask, mask[rows][:, before])
        head.weight.data.copy_(weight[rows][:, before])
        head.bias.data.copy_(bias[rows])


def _check_mask(ours: Tensor, theirs: Tensor) -> None:
    if not torch.equal(ours.bool(), theirs.bool()):
        raise refuse("a masked network that is not fully autoregressive, or has random masks")


def as_flow(layers: Sequence[Bijection], features: int, context: int, like: nn.Module) -> Flow:
    """The flow of these layers, data to noise, in the dtype and on the device of ``like``."""
    flow = Flow(FlowConfig(event_shape=(features,), context=context), Stack(layers))
    return flow.to(next(like.parameters()))
