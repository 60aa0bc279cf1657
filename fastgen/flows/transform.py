"""Bijections with their log-determinants: the interface of all transforms, and how they are chained.

A :class:`Bijection` is an ``nn.Module`` that maps samples x to y = t(x), both ways and with log |det dy/dx| in the same pass.
It has the names of ``torch.distributions.Transform`` (``t(x)``, ``t.inv``, ``log_abs_det_jacobian``, ``domain``, ``codomain``)
and takes a context, on which it may depend, beside x; ``t.given(context)`` is a true ``torch.distributions.Transform``.

In a flow, x is data and y noise: sampling inverts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint

__all__ = ["Bijection", "Compose", "GivenContext", "Inverse", "gradients"]


class Bijection(nn.Module):
    """Base of all transforms.

    Subclasses implement ``call_and_ladj`` and ``inv_and_ladj``. Both take a batch [N, *event] and a context [N, C] or None, and
    give the transformed batch and the log-determinant of the map that was applied, in nats per sample: [N]. No sample's result
    may depend on another's.
    """

    bijective: ClassVar[bool] = True
    event_dims: tuple[int, int] = (1, 1)
    """Dimensions of an event of x and of y."""

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = t(x) and log |det dy/dx|."""
        raise NotImplementedError(f"{type(self).__name__} cannot be applied")

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = t.inv(y) and log |det dx/dy|."""
        raise NotImplementedError(f"{type(self).__name__} cannot be inverted")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """y = t(x)."""
        return self.call_and_ladj(x, context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """log |det dy/dx| at x, in nats: [N]. ``y`` is not read: both come from one pass of :meth:`call_and_ladj`."""
        return self.call_and_ladj(x, context)[1]

    @property
    def inv(self) -> Bijection:
        """The inverse transform, with the same parameters."""
        return Inverse(self)

    @property
    def domain(self) -> Constraint:
        """Where x lives."""
        return constraints.independent(constraints.real, self.event_dims[0])

    @property
    def codomain(self) -> Constraint:
        """Where y lives."""
        return constraints.independent(constraints.real, self.event_dims[1])

    def given(self, context: Tensor | None = None) -> GivenContext:
        """The transform at one context, as ``torch.distributions`` knows transforms."""
        return GivenContext(self, context)

    def rebuild(
        self,
        y: Tensor,
        context: Tensor | None,
        grad_y: Tensor,
        grad_ladj: Tensor,
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """One step of backpropagation from the output alone.

        Args:
            y, context: the output of :meth:`call_and_ladj`, and the context that went in; ``context`` asks for its gradient
                by ``requires_grad``.
            grad_y, grad_ladj: gradients of the loss in both outputs.
            parameters: what else to differentiate by.

        Returns:
            x, the gradient of the loss in x, and those in ``[*parameters, context]``, None where there is none.
        """
        with torch.no_grad():
            x = self.inv_and_ladj(y, context)[0].detach()
        return x, *self.differentiate(x, context, grad_y, grad_ladj, parameters)

    def differentiate(
        self,
        x: Tensor,
        context: Tensor | None,
        grad_y: Tensor,
        grad_ladj: Tensor,
        parameters: list[nn.Parameter],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of :meth:`rebuild` where x is known."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            outputs = self.call_and_ladj(x, context)
            (grad_x,), rest = gradients(outputs, [x], context, (grad_y, grad_ladj), parameters)
        return grad_x, rest


def gradients(
    outputs: tuple[Tensor, ...],
    inputs: list[Tensor],
    context: Tensor | None,
    grads: tuple[Tensor, ...],
    parameters: list[nn.Parameter],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """From the gradients of the loss in ``outputs``, those in ``inputs`` and in ``[*parameters, context]``."""
    wanted = [*inputs, *parameters]
    if context is not None and context.requires_grad:
        wanted.append(context)
    # a constant log-determinant has no gradient, and autograd refuses it
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = list(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    first = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=False)]
    rest: list[Tensor | None] = [*found[len(inputs) :]]
    return first, rest if len(wanted) > len(inputs) + len(parameters) else [*rest, None]


class Inverse(Bijection):
    """A bijection run backwards."""

    def __init__(self, transform: Bijection) -> None:
        super().__init__()
        self.transform = transform

    @property
    def inv(self) -> Bijection:
        """The transform itself."""
        return self.transform

    @property
    def domain(self) -> Constraint:
        """The codomain of the transform."""
        return self.transform.codomain

    @property
    def codomain(self) -> Constraint:
        """The domain of the transform."""
        return self.transform.domain

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inv_and_ladj(x, context)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(y, context)


class Compose(Bijection):
    """Transforms one after the other, the first one first. Parts are reached by index."""

    def __init__(self, transforms: Iterable[Bijection]) -> None:
        super().__init__()
        for i, transform in enumerate(transforms):
            self.add_module(str(i), transform)
        if len(self):
            self.event_dims = (self[0].event_dims[0], self[-1].event_dims[1])

    def __iter__(self) -> Iterator[Bijection]:
        return iter(cast(Iterable[Bijection], self.children()))

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Bijection:
        return list(self)[index]

    @property
    def domain(self) -> Constraint:
        """That of the first transform."""
        return self[0].domain

    @property
    def codomain(self) -> Constraint:
        """That of the last transform."""
        return self[-1].codomain

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = None
        for transform in self:
            x, ladj = transform.call_and_ladj(x, context)
            total = ladj if total is None else total + ladj
        return x, x.new_zeros(len(x)) if total is None else total

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = None
        for transform in reversed(list(self)):
            y, ladj = transform.inv_and_ladj(y, context)
            total = ladj if total is None else total + ladj
        return y, y.new_zeros(len(y)) if total is None else total


class GivenContext(Transform):
    """A bijection at one context, as a ``torch.distributions.Transform``, for batches of any shape.

    Args:
        transform: the bijection.
        context: [*batch, C], broadcast against the batch shape of x; or None.
    """

    bijective = True

    def __init__(self, transform: Bijection, context: Tensor | None = None) -> None:
        super().__init__()
        self.transform = transform
        self.context = context

    @property
    def domain(self) -> Constraint:  # type: ignore[override]
        """Where x lives."""
        return self.transform.domain

    @property
    def codomain(self) -> Constraint:  # type: ignore[override]
        """Where y lives."""
        return self.transform.codomain

    def _run(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        dims = (self.codomain if inverse else self.domain).event_dim
        if x.dim() < dims:
            raise ValueError(f"{type(self.transform).__name__} takes events of {dims} dimensions, got shape {list(x.shape)}")
        batch, event = x.shape[: x.dim() - dims], x.shape[x.dim() - dims :]
        context = self.context
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        x = x.expand(*batch, *event).reshape(math.prod(batch), *event)
        y, ladj = self.transform.inv_and_ladj(x, context) if inverse else self.transform.call_and_ladj(x, context)
        return y.reshape(*batch, *y.shape[1:]), ladj.reshape(batch)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [*batch, *event] and log |det dy/dx| [*batch]."""
        return self._run(x, inverse=False)

    def inv_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [*batch, *event] and log |det dx/dy| [*batch]."""
        return self._run(y, inverse=True)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy/dx| at x; ``y`` is not read."""
        return self.call_and_ladj(x)[1]
