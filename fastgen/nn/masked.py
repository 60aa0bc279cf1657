"""MADE: a masked network whose outputs for dimension d depend on the dimensions before d alone.

Every unit has a degree, and sees the units of the layer below whose degree is not above its own. Input i has degree i + 1, the
outputs of dimension d have degree d, hidden units have degrees between. Units are sorted by degree, so that what a unit sees is
a prefix of the layer below: :meth:`MADE.walk` computes each unit once, from slices, while the input is being found.

Source: Germain, Gregor, Murray and Larochelle (2015), "MADE: masked autoencoder for distribution estimation"; residual blocks
as in Durkan and Nash (2019), "Autoregressive energy machines".
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.nn.conditioner import LIMIT

__all__ = ["MADE", "MaskedLinear"]


class MaskedLinear(nn.Linear):
    """Linear layer in which a unit sees the inputs whose degree is not above its own.

    Args:
        in_degrees, out_degrees: degrees of inputs and units, neither descending.
        steps: degrees run from 0 to ``steps`` - 1 where the layer is walked through.
    """

    mask: Tensor

    def __init__(self, in_degrees: Sequence[int], out_degrees: Sequence[int], steps: int) -> None:
        super().__init__(len(in_degrees), len(out_degrees))
        for degrees in (in_degrees, out_degrees):
            if any(a > b for a, b in itertools.pairwise(degrees)):
                raise ValueError(f"degrees must not descend, got {list(degrees)}")
        mask = torch.as_tensor(out_degrees)[:, None] >= torch.as_tensor(in_degrees)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        self.columns = [bisect.bisect_right(in_degrees, d) for d in range(steps)]
        self.rows = [slice(bisect.bisect_left(out_degrees, d), bisect.bisect_right(out_degrees, d)) for d in range(steps)]
        """Of each degree: how many inputs its units see, and where they are."""

    def forward(self, x: Tensor) -> Tensor:
        """All units: [N, inputs] -> [N, units]."""
        return functional.linear(x, self.weight * self.mask, self.bias)

    def at(self, degree: int, x: Tensor) -> Tensor:
        """The units of one degree, whose inputs must be there: the others are not read."""
        rows, columns = self.rows[degree], self.columns[degree]
        return torch.addmm(self.bias[rows], x[:, :columns], self.weight[rows, :columns].t())


class MADE(nn.Module):
    """Masked network with ReLU.

    Args:
        features: dimensions D of x.
        hidden: widths of the hidden layers, at least one.
        outputs: outputs per dimension, one number for each head.
        context: features of the context, which every dimension sees; 0 for none.
        residual: the hidden layers after the first come in pairs, each pair a residual block with ReLU before its layers;
            all are of one width.
        degrees: of the hidden units, layer by layer, each ascending; None spreads them evenly.

    Shape: [N, D], [N, context] or None -> a tuple of [N, D * outputs[i]], to be read as [N, D, outputs[i]].
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        outputs: Sequence[int],
        context: int = 0,
        *,
        residual: bool = False,
        degrees: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must be the widths of at least one layer, got {tuple(hidden)}")
        if residual and (len(hidden) % 2 == 0 or len(set(hidden)) > 1):
            raise ValueError(f"hidden must be an odd number of equal widths in a residual network, got {tuple(hidden)}")
        self.features = features
        self.residual = residual
        # units of degree 0 see the context alone
        least = 0 if context or features == 1 else 1
        spread = [[least + i * (features - least) // width for i in range(width)] for width in hidden]
        degrees = spread if degrees is None else degrees
        sees = [list(range(1, features + 1)), *degrees]
        self.layers = nn.ModuleList(MaskedLinear(a, b, features) for a, b in itertools.pairwise(sees))
        heads = ([d for d in range(features) for _ in range(size)] for size in outputs)
        self.heads = nn.ModuleList(MaskedLinear(degrees[-1], head, features) for head in heads)
        # in a residual network the first layer of every block sees the context too
        widths = [width for i, width in enumerate(hidden) if i == 0 or (residual and i % 2)] if context else []
        self.contexts = nn.ModuleList(nn.Linear(context, width, bias=residual) for width in widths)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        first, *layers = self.layers
        h, added = first(x.clamp(-LIMIT, LIMIT)), self._added(context)
        if added:
            h = h + added[0]
        if self.residual:
            for i in range(0, len(layers), 2):
                inner = layers[i](torch.relu(h))
                if added:
                    inner = inner + added[1 + i // 2]
                h = h + layers[i + 1](torch.relu_(inner))
        else:
            h = torch.relu_(h)
            for layer in layers:
                h = torch.relu_(layer(h))
        return tuple(head(h) for head in self.heads)

    def _added(self, context: Tensor | None) -> list[Tensor]:
        """What the context adds to the first layer and to each residual block: nothing without a context."""
        if context is None:
            return []
        added = [layer(context) for layer in self.contexts]
        return [torch.relu(added[0]), *added[1:]] if self.residual else added

    @torch.no_grad()
    def walk(self, x: Tensor, context: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The outputs of dimension 0, 1, ..., each a tuple of [N, outputs[i]].

        Those of dimension d are computed once ``x[:, :d]`` has been filled in by the caller; all of them together take the
        work of one pass.
        """
        added = self._added(context)
        seen = torch.empty_like(x)
        layers, heads = cast("list[MaskedLinear]", list(self.layers)), cast("list[MaskedLinear]", list(self.heads))
        units = [x.new_empty(len(x), layer.out_features) for layer in layers]
        advance = self._advance_blocks if self.residual else self._advance
        for d in range(self.features):
            if d:
                torch.clamp(x[:, d - 1], -LIMIT, LIMIT, out=seen[:, d - 1])
            advance(d, layers, seen, added, units)
            yield tuple(head.at(d, units[-1]) for head in heads)

    def _advance(self, d: int, layers: list[MaskedLinear], x: Tensor, added: list[Tensor], units: list[Tensor]) -> None:
        """Compute the hidden units of degree d."""
        for i, layer in enumerate(layers):
            rows = layer.rows[d]
            if rows.start < rows.stop:
                h = layer.at(d, units[i - 1] if i else x)
                if added and not i:
                    h += added[0][:, rows]
                units[i][:, rows] = h.relu_()

    def _advance_blocks(self, d: int, layers: list[MaskedLinear], x: Tensor, added: list[Tensor], units: list[Tensor]) -> None:
        """The same of a residual network, whose hidden layers have the same degrees; ``units`` are inputs of layers."""
        first, *layers = layers
        rows = first.rows[d]
        if rows.start == rows.stop:
            return
        h = first.at(d, x)
        if added:
            h += added[0][:, rows]
        for i in range(0, len(layers), 2):
            units[i][:, rows] = torch.relu(h)
            inner = layers[i].at(d, units[i])
            if added:
                inner += added[1 + i // 2][:, rows]
            units[i + 1][:, rows] = inner.relu_()
            h += layers[i + 1].at(d, units[i + 1])
        units[-1][:, rows] = h
