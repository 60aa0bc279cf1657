"""Maps of single elements with parameters of their own: what couplings and autoregressive layers share."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from fastgen import ops

__all__ = ["Affine", "Elementwise", "Spline"]


class Elementwise(Protocol):
    """A monotonic map of each element of x [N, ...]."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many parameters of each kind an element has."""

    def __call__(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        """The map or its inverse, and the log-determinant [N] of what was applied.

        ``parameters[i]`` is read as [N, ..., sizes[i]].
        """


@dataclasses.dataclass(frozen=True)
class Affine:
    """y = x * exp(s) + shift, with s bounded as :func:`fastgen.ops.affine_coupling` has it; parameters (shift, log_scale)."""

    bound: str | None = "tanh"
    sizes = (1, 1)

    def __call__(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(x, *parameters, bound=self.bound, inverse=inverse)

    def rebuild(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One step of backpropagation from the output alone: x, the gradient of the loss in it, and those in ``parameters``."""
        shift, log_scale = parameters
        x, grad_x, grad_log_scale = ops.affine_coupling_rebuild(y, shift, log_scale, grad_y, grad_ladj, bound=self.bound)
        return x, grad_x, (grad_y, grad_log_scale)


@dataclasses.dataclass(frozen=True)
class Spline:
    """A rational-quadratic spline on [-bound, bound], the identity outside; see :func:`fastgen.ops.rq_spline`.

    Parameters: (widths, heights, derivatives) of ``bins``, ``bins`` and ``bins - 1`` numbers.
    """

    bins: int = 8
    bound: float = 5.0
    convention: str = "zuko"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths, heights, derivatives."""
        return self.bins, self.bins, self.bins - 1

    def __call__(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        knots = self._shaped(x, parameters)
        return ops.rq_spline(x, *knots, bound=self.bound, inverse=inverse, convention=self.convention)

    def rebuild(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As that of :class:`Affine`."""
        knots = self._shaped(y, parameters)
        x, grad_x, *grads = ops.rq_spline_rebuild(y, *knots, grad_y, grad_ladj, bound=self.bound, convention=self.convention)
        return x, grad_x, tuple(g.reshape(p.shape) for g, p in zip(grads, parameters, strict=True))

    def _shaped(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters of each element along a dimension of their own."""
        shape = tuple(x.shape[1:])
        widths, heights, derivatives = (p.unflatten(1, (*shape, k)) for p, k in zip(parameters, self.sizes, strict=True))
        return widths, heights, derivatives
