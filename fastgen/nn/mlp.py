"""Fully connected networks between events of any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with an activation between them; the event is flattened on the way in and shaped on the way out.

    Args:
        inputs: event shape of the input, or its size.
        hidden: widths of the hidden layers.
        outputs: event shape of the output, or its size.
        activation: makes the module between two layers.

    Shape: [N, *inputs] -> [N, *outputs].
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        hidden: Sequence[int],
        outputs: int | Sequence[int],
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        sizes = [inputs if isinstance(inputs, int) else math.prod(inputs), *hidden, math.prod(self.outputs)]
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            layers += [nn.Linear(n, m), activation()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1)).unflatten(1, self.outputs)
