"""A stack of bijections that can backpropagate without its activations.

Autograd keeps every layer's activations for the backward pass, so memory grows with depth. With ``memory="invertible"`` a
:class:`Stack` keeps its input and its output alone; the backward pass rebuilds each layer's input from its output, layer by
layer, and differentiates the layer there. That costs one more pass of the conditioners, and leaves rounding errors, which are
measured: of every activation the forward pass keeps one number per sample, its product with a fixed vector of signs. A layer
whose rebuilt input misses it by more than ``tolerance`` is too close to singular: its true input is computed again from the
stack's own, in the same backward pass, and is kept from then on. Between the two modes, ``stored`` leaves a share of the layers
to autograd: memory for time.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastgen import random
from fastgen.flows.transform import Bijection, Compose
from fastgen.nn.divergence import rademacher

__all__ = ["Stack"]


class Stack(Compose):
    """Transforms one after the other.

    Args:
        transforms: the layers, the first one first. With ``memory="invertible"`` they must be deterministic.
        memory: "standard" lets autograd keep the activations, "invertible" rebuilds them in the backward pass.
        stored: with ``memory="invertible"``, the share of the layers, the last ones, whose activations autograd keeps all the
            same.
        tolerance: error of a rebuilt activation in any sample, relative to the batch's root mean square, from which its
            layer's input is kept; None for 1000 units of rounding of the dtype.

    Attributes:
        kept: indices of the layers whose inputs are kept, since rebuilding them failed. Clear it to have them tried again.
        reconstruction_errors: the relative error of each rebuilt layer input in the last backward pass, by layer index;
            measured before a layer falls back.
    """

    def __init__(
        self,
        transforms: Iterable[Bijection],
        *,
        memory: Literal["standard", "invertible"] = "standard",
        stored: float = 0.0,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(transforms)
        if memory not in ("standard", "invertible"):
            raise ValueError(f"memory must be 'standard' or 'invertible', got {memory!r}")
        if not 0 <= stored <= 1:
            raise ValueError(f"stored must be in 0 .. 1, got {stored!r}")
        self.memory = memory
        self.stored = stored
        self.tolerance = tolerance
        self.kept: set[int] = set()
        self.reconstruction_errors: dict[int, float] = {}

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = list(self)
        rebuilt = len(layers) - round(self.stored * len(layers)) if self.memory == "invertible" else 0
        parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in layers[:rebuilt]]
        flat = [p for group in parameters for p in group]
        wanted = x.requires_grad or flat or (context is not None and context.requires_grad)
        if not (rebuilt and wanted and torch.is_grad_enabled()):
            return super().call_and_ladj(x, context)
        y, total = _Rebuild.apply(self, parameters, x, context, *flat)
        for layer in layers[rebuilt:]:
            y, ladj = layer.call_and_ladj(y, context)
            total = total + ladj
        return y, total

    def extra_repr(self) -> str:
        return f"memory={self.memory!r}, stored={self.stored:g}"


def _signs(x: Tensor) -> Tensor:
    """A fixed vector of -1 and 1 as long as a sample of x."""
    return rademacher((1, x[0].numel()), random.key(0, stream=random.Stream.PROBE, device=x.device), x.dtype)[0]


class _Rebuild(torch.autograd.Function):
    """The first layers of a stack, one for each group of ``parameters``. Saves input, output, context, one number per sample
    and layer, and the inputs of the layers in ``stack.kept``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        parameters: list[list[nn.Parameter]],
        x: Tensor,
        context: Tensor | None,
        *flat: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.stack, ctx.parameters = stack, parameters
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        signs = _signs(x)
        y, total, kept = x, None, {}
        probes = x.new_empty(len(parameters), len(x))
        for i, layer in enumerate(itertools.islice(stack, len(parameters))):
            probes[i] = _probe(y, signs)
            if i in stack.kept:
                kept[i] = y
            y, ladj = layer.call_and_ladj(y, context)
            total = ladj if total is None else total + ladj
        ctx.kept = list(kept)
        ctx.save_for_backward(x, y, context, signs, probes, *kept.values())
        assert total is not None
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_ladj: Tensor | None) -> tuple[Tensor | None, ...]:
        x0, y, context, signs, probes, *saved = ctx.saved_tensors
        kept = dict(zip(ctx.kept, saved, strict=True))
        stack: Stack = ctx.stack
        tolerance = 1000 * torch.finfo(y.dtype).eps if stack.tolerance is None else stack.tolerance
        grad = torch.zeros_like(y) if grad_y is None else grad_y
        grad_ladj = y.new_zeros(len(y)) if grad_ladj is None else grad_ladj
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[3])
        grad_context: Tensor | None = None
        # What stays is allocated first: between the large temporaries of the layers it would keep the heap from shrinking.
        spaces = [[torch.empty_like(p) for p in group] for group in ctx.parameters]
        grads: list[list[Tensor | None]] = [[] for _ in spaces]
        enabled, dtype = ctx.autocast
        stack.reconstruction_errors = {}
        with torch.autocast(y.device.type, dtype=dtype, enabled=enabled):
            for i, layer in reversed(list(enumerate(itertools.islice(stack, len(spaces))))):
                parameters = ctx.parameters[i]
                if i in kept:
                    x = kept[i]
                    grad_x, rest = layer.differentiate(x, context, grad, grad_ladj, parameters)
                else:
                    x, grad_x, rest = layer.rebuild(y, context, grad, grad_ladj, parameters)
                    error = _relative_error(x, probes[i], signs)
                    stack.reconstruction_errors[i] = error
                    if not error <= tolerance:
                        x = _replay(stack, i, kept, x0, context)
                        grad_x, rest = layer.differentiate(x, context, grad, grad_ladj, parameters)
                        stack.kept.add(i)
                *of_layer, of_context = rest
                grads[i] = [None if g is None else space.copy_(g) for space, g in zip(spaces[i], of_layer, strict=True)]
                if of_context is not None:
                    grad_context = of_context if grad_context is None else grad_context + of_context
                y, grad = x, grad_x
        return None, None, grad if ctx.needs_input_grad[2] else None, grad_context, *itertools.chain(*grads)


def _probe(x: Tensor, signs: Tensor) -> Tensor:
    """What is remembered of an activation: one number per sample, in full precision. An error of x shows in it by its 2-norm,
    on average over the signs.
    """
    with torch.autocast(x.device.type, enabled=False):
        return x.flatten(1) @ signs


def _relative_error(x: Tensor, probe: Tensor, signs: Tensor) -> float:
    """The largest error of a sample, over the root mean square of the samples' norms."""
    error = (_probe(x, signs) - probe).abs().amax()
    return float(error / (x.norm() + torch.finfo(x.dtype).tiny)) * math.sqrt(len(x))


@torch.no_grad()
def _replay(stack: Stack, index: int, kept: dict[int, Tensor], x0: Tensor, context: Tensor | None) -> Tensor:
    """The input of layer ``index``, computed forward from the nearest one that was kept."""
    start = max((i for i in kept if i < index), default=0)
    x = kept.get(start, x0)
    for i in range(start, index):
        x = stack[i](x, context)
    return x
