"""Changes of coordinates of vectors: permutations and invertible affine maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.flows.transform import Bijection

__all__ = ["Dense", "Permutation"]


class Permutation(Bijection):
    """y_i = x_order[i] for x [N, D]."""

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        order = torch.as_tensor(order, dtype=torch.int64)
        if sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"order must hold each of 0 .. {len(order) - 1} once, got {order.tolist()}")
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(len(x))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y[:, self.inverse_order], y.new_zeros(len(y))


class Dense(Bijection):
    """y = W x + bias for x [N, D], W any invertible matrix, both learned."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros_like(weight[0]) if bias is None else bias.detach().clone())

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, self.weight, self.bias), torch.linalg.slogdet(self.weight).logabsdet.expand(len(x))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.linalg.solve(self.weight, (y - self.bias).t()).t()
        return x, -torch.linalg.slogdet(self.weight).logabsdet.expand(len(y))
