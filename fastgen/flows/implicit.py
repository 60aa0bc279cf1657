"""Gradients through inverses that are found by search: by the implicit function theorem.

With y = t(x; theta) of Jacobian J and l = -log |det J| the log-determinant of the inverse, a loss with gradients g in x and h
in l has

    u = g - h d log|det J| / dx,    v = J^-T u,    dL/dy = v,    dL/dtheta = -v^T dt/dtheta - h d log|det J| / dtheta

so that nothing of the search is kept. The system J^T v = u is solved by Jacobi's iteration with products v^T J alone,
v <- v + (u - J^T v) / diag: of a triangular J with that diagonal it is exact after D steps and usually done in a few, and of
J = I + contraction, with diag 1, it converges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgen.flows.transform import Bijection, gradients

__all__ = ["SearchedInverse"]


class SearchedInverse(Bijection):
    """Base of bijections whose inverse is found by search. Subclasses implement ``call_and_ladj`` and :meth:`search`."""

    solver_steps: int = 100
    """Most steps of the solver of the backward pass."""

    def search(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x = t.inv(y) and log |det dx/dy|, without gradients."""
        raise NotImplementedError

    def diagonal(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The diagonal of the Jacobian, or what comes near it: [N, D]."""
        return torch.ones_like(x)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        inputs = [v for v in (y, context) if v is not None and v.requires_grad]
        if torch.is_grad_enabled() and (parameters or inputs):
            x, ladj = _Search.apply(self, y, context, *parameters)
            return x, ladj
        with torch.no_grad():
            return self.search(y, context)


class _Search(torch.autograd.Function):
    """Saves x and the context alone."""

    @staticmethod
    def forward(
        ctx: Any, transform: SearchedInverse, y: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, ladj = transform.search(y, context)
        ctx.set_materialize_grads(False)
        ctx.transform = transform
        ctx.save_for_backward(x, context, *parameters)
        return x, ladj

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_ladj: Tensor | None) -> tuple[Tensor | None, ...]:
        x, context, *parameters = ctx.saved_tensors
        transform: SearchedInverse = ctx.transform
        grad_ladj = x.new_zeros(len(x)) if grad_ladj is None else grad_ladj
        if context is not None:
            context = context.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y, ladj = transform.call_and_ladj(x, context)
        u = x.new_zeros(x.shape) if grad_x is None else grad_x
        if ladj.requires_grad:
            (of_ladj,) = torch.autograd.grad(ladj, x, grad_ladj, retain_graph=True, allow_unused=True)
            u = u if of_ladj is None else u - of_ladj
        v = _solve(x, y, u, transform.diagonal(x.detach(), context), transform.solver_steps)
        _, rest = gradients((y, ladj), [x], context, (-v, -grad_ladj), parameters)
        *of_parameters, of_context = rest
        return None, v, of_context, *of_parameters


def _solve(x: Tensor, y: Tensor, u: Tensor, diagonal: Tensor, steps: int) -> Tensor:
    """v with J^T v = u for the Jacobian J of y in x, to rounding."""
    v = u / diagonal
    for _ in range(steps):
        (product,) = torch.autograd.grad(y, x, v, retain_graph=True)
        change = (u - product) / diagonal
        v = v + change
        if bool((change.abs() <= 4 * torch.finfo(v.dtype).eps * v.abs().amax(1, keepdim=True)).all()):
            break
    return v
