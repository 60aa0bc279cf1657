"""Continuous normalizing flow: data flow to noise along dx/dt = f(x, t), t from 0 to 1.

    d log|det| / dt = tr df/dx

The trace is exact, by D forward derivatives in one batch, or Hutchinson's estimate v^T (df/dx) v with signs v that stay the
same during a solve and are a function of a key. Gradients go through the solver's steps, or solve the adjoint equation, whose
memory does not grow with them.

Sources: Chen, Rubanova, Bettencourt and Duvenaud (2018), "Neural ordinary differential equations"; Grathwohl, Chen,
Bettencourt, Sutskever and Duvenaud (2019), "FFJORD: free-form continuous dynamics for scalable reversible generative models".
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen._extras import require
from fastgen.flows.flow import Context, Flow, FlowConfig
from fastgen.flows.probes import jacobian, of_layer, push
from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import LIMIT
from fastgen.nn.divergence import rademacher
from fastgen.registry import register

__all__ = ["CNF", "CNFConfig", "ContinuousFlow", "VelocityField"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNFConfig(FlowConfig):
    """Options of :class:`CNF`."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the velocity field's hidden layers."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """"exact" costs D derivatives per evaluation, "hutchinson" one, and is unbiased."""
    solver: str = "dopri5"
    """Any method of torchdiffeq.odeint."""
    tolerance: float = 1e-5
    """Relative and absolute error per step; at least ten units of rounding are allowed."""
    adjoint: bool = False
    """Gradients by the adjoint equation: constant memory, gradients up to the tolerance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be the widths of at least one layer, got {self.hidden}")
        if self.trace not in ("exact", "hutchinson"):
            raise ValueError(f"trace must be 'exact' or 'hutchinson', got {self.trace!r}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        if self.memory != "standard":
            raise ValueError(f"memory must be 'standard', got {self.memory!r}: adjoint=True is what saves memory in a cnf")


class VelocityField(nn.Module):
    """f(x, t, context): a fully connected network with tanh that sees the time in every layer.

    Shape: t [], x [N, D], context [N, C] or None -> [N, D].
    """

    def __init__(self, features: int, hidden: tuple[int, ...], context: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n + 1, m) for n, m in itertools.pairwise((features, *hidden, features)))
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        time = t.to(x.dtype).expand(len(x), 1)
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat((torch.tanh(x) if i else x.clamp(-LIMIT, LIMIT), time), 1))
            if self.context is not None and i == 0:
                x = x + self.context(context)
        return x


class _Dynamics(nn.Module):
    """The right-hand side of one solve. The state is (x, log-det), and the context, which stays, so that the adjoint equation
    gives its gradient.
    """

    def __init__(self, field: nn.Module, probe: Tensor | None, *, trace: bool) -> None:
        super().__init__()
        self.field = field
        self.probe = probe
        self.trace = trace

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, total, *context = state
        c = context[0] if context else None
        still = tuple(torch.zeros_like(v) for v in context)
        if not self.trace:
            return self.field(t, x, c), torch.zeros_like(total), *still

        def velocity(x: Tensor) -> Tensor:
            return self.field(t, x, c)

        if self.probe is not None:
            f, pushed = push(velocity, x, self.probe)
            return f, (self.probe * pushed).sum(1), *still
        f, matrix = jacobian(velocity, x)
        return f, matrix.diagonal(dim1=1, dim2=2).sum(1), *still


class ContinuousFlow(Bijection):
    """y = x(1) for x(0) = x and dx/dt = field(t, x, context), x [N, D].

    Args:
        field: the velocity.
        trace, solver, tolerance, adjoint: see :class:`CNFConfig`.

    Attributes:
        key: of the probes of Hutchinson's estimate; None draws them from PyTorch's generator, anew in every solve.
        with_log_det: False leaves the log-determinant out: it comes as zeros.
    """

    def __init__(
        self,
        field: nn.Module,
        *,
        trace: Literal["exact", "hutchinson"] = "exact",
        solver: str = "dopri5",
        tolerance: float = 1e-5,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        self.field = field
        self.trace = trace
        self.solver = solver
        self.tolerance = tolerance
        self.adjoint = adjoint
        self.key: Tensor | None = None
        self.with_log_det = True

    def _solve(self, x: Tensor, context: Tensor | None, times: tuple[float, float]) -> tuple[Tensor, Tensor]:
        solvers = require("torchdiffeq", package="torchdiffeq", extra="ode", purpose="a continuous flow")
        probe = None
        if self.with_log_det and self.trace == "hutchinson":
            probe = rademacher(tuple(x.shape), of_layer(self.key, 0, x.device), x.dtype)
        dynamics = _Dynamics(self.field, probe, trace=self.with_log_det)
        # far out the velocity is below rounding, and the solver's polynomials would overflow
        near = x.clamp(-LIMIT, LIMIT)
        state = (near, x.new_zeros(len(x)), *(() if context is None else (context,)))
        tolerance = max(self.tolerance, 10 * torch.finfo(x.dtype).eps)
        solve = solvers.odeint_adjoint if self.adjoint and torch.is_grad_enabled() else solvers.odeint
        path = solve(dynamics, state, x.new_tensor(times), rtol=tolerance, atol=tolerance, method=self.solver)
        return path[0][-1] + (x - near), path[1][-1]

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, (0.0, 1.0))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(y, context, (1.0, 0.0))

    def extra_repr(self) -> str:
        return f"trace={self.trace!r}, solver={self.solver!r}, tolerance={self.tolerance}, adjoint={self.adjoint}"


@register("cnf", config=CNFConfig, paper="Grathwohl et al. (2019), arXiv:1810.01367", data="moons")
class CNF(Flow):
    """Continuous normalizing flow: samples move to noise along a learned velocity field.

    >>> flow = CNF(CNFConfig(event_shape=(2,), hidden=(16,)))
    >>> flow().log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    config: CNFConfig

    def __init__(self, config: CNFConfig) -> None:
        features = math.prod(config.event_shape)
        field = VelocityField(features, config.hidden, config.context)
        ode = ContinuousFlow(
            field, trace=config.trace, solver=config.solver, tolerance=config.tolerance, adjoint=config.adjoint
        )
        super().__init__(config, ode)

    @property
    def ode(self) -> ContinuousFlow:
        """The layer that solves the equation."""
        return next(m for m in self.transform.modules() if isinstance(m, ContinuousFlow))

    def log_prob(self, x: Tensor, context: Context | None = None, *, key: Tensor | None = None) -> Tensor:
        """As of every flow; ``key`` sets the probes of Hutchinson's estimate as well."""
        self.ode.key = key
        try:
            return super().log_prob(x, context, key=key)
        finally:
            self.ode.key = None

    def invert(self, z: Tensor, context: Tensor | None) -> Tensor:
        """t.inv(z), without the trace."""
        self.ode.with_log_det = False
        try:
            return super().invert(z, context)
        finally:
            self.ode.with_log_det = True
