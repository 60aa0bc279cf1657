"""Networks that compute the parameters of a transform from the part of its input that stays, and from a context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LIMIT", "MLPConditioner"]

LIMIT = 1e9
"""Inputs of conditioners saturate here: beyond, sums overflow float32 and no finite output is left."""


class MLPConditioner(nn.Module):
    """Fully connected network with one linear layer per output, each contiguous as the kernels read it.

    The context enters the first layer, which is what concatenating it to the input would do, without the copy.

    Args:
        inputs: features of x.
        hidden: widths of the hidden layers, at least one.
        outputs: size of each output.
        context: features of the context; 0 for none.

    Shape: [N, inputs], [N, context] or None -> a tuple of [N, outputs[i]].
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: Sequence[int], context: int = 0) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must be the widths of at least one layer, got {tuple(hidden)}")
        self.first = nn.Linear(inputs, hidden[0])
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        self.rest = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(hidden))
        self.heads = nn.ModuleList(nn.Linear(hidden[-1], size) for size in outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(x.clamp(-LIMIT, LIMIT))
        if self.context is not None:
            h = h + self.context(context)
        # in place: a linear layer's gradient does not need its output
        h = torch.relu_(h)
        for layer in self.rest:
            h = torch.relu_(layer(h))
        return tuple(head(h) for head in self.heads)
