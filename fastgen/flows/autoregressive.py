"""Autoregressive layers: each element is mapped with parameters that a masked network sets from those before it.

One pass of the network maps a batch. The inverse is found by one of three methods with the same result:

    incremental   each step computes the hidden units that its element newly makes known, and no other: in all, one pass
    jacobi        x <- f^-1(y; network(x)), all elements at once, until nothing changes: at most D passes, fewer where
                  elements depend on each other weakly
    sequential    the same D times without a look: what other libraries do

The incremental one does the least work, and is the default; Jacobi's has fewer, larger steps.

Sources: Papamakarios, Pavlakou and Murray (2017), "Masked autoregressive flow for density estimation"; Song, Meng, Liao and
Ermon (2021), "Accelerating feedforward computation via parallel nonlinear equation solving".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastgen.flows.elementwise import Elementwise
from fastgen.flows.implicit import SearchedInverse
from fastgen.nn.masked import MADE

__all__ = ["Autoregressive", "Inversion", "check_inversion"]

Inversion = Literal["incremental", "jacobi", "sequential"]


def check_inversion(inversion: str) -> None:
    """``ValueError`` where there is no such method."""
    if inversion not in get_args(Inversion):
        raise ValueError(f"inversion must be one of {', '.join(get_args(Inversion))}, got {inversion!r}")


class Autoregressive(SearchedInverse):
    """y_d = f(x_d; network(x_1 .. x_{d-1}, context)) for x [N, D].

    Args:
        network: gives the parameters of all elements, ``elementwise.sizes`` of each.
        elementwise: the map f.
        reverse: the order of the elements is from the last to the first.
        inversion: how the inverse is found.
    """

    def __init__(
        self, network: MADE, elementwise: Elementwise, *, reverse: bool = False, inversion: Inversion = "incremental"
    ) -> None:
        super().__init__()
        check_inversion(inversion)
        self.network = network
        self.elementwise = elementwise
        self.reverse = reverse
        self.inversion = inversion
        self.solver_steps = network.features

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.reverse else x

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._ordered(x)
        y, ladj = self.elementwise(x, self.network(x, context), inverse=False)
        return self._ordered(y), ladj

    def search(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self._ordered(y)
        x, ladj = self._walk(y, context) if self.inversion == "incremental" else self._iterate(y, context)
        return self._ordered(x), ladj

    def _walk(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, total = torch.empty_like(y), y.new_zeros(len(y))
        for d, parameters in enumerate(self.network.walk(x, context)):
            element, ladj = self.elementwise(y[:, d : d + 1], parameters, inverse=True)
            x[:, d : d + 1] = element
            total = total + ladj
        return x, total

    def _iterate(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = y, y.new_zeros(len(y))
        for _ in range(y.shape[1]):
            found, ladj = self.elementwise(y, self.network(x, context), inverse=True)
            unchanged = self.inversion == "jacobi" and torch.equal(found, x)
            x = found
            if unchanged:
                break
        return x, ladj

    def diagonal(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = self._ordered(x)
        with torch.no_grad():
            parameters = self.network(x, context)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            y, _ = self.elementwise(point, parameters, inverse=False)
            (slope,) = torch.autograd.grad(y.sum(), point)
        return self._ordered(slope)

    def extra_repr(self) -> str:
        return f"elementwise={self.elementwise}, reverse={self.reverse}, inversion={self.inversion!r}"
