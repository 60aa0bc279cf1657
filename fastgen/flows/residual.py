"""Residual flow: layers y = x + g(x) with g a contraction, free in form and invertible.

    log |det (I + J)| = sum_k (-1)^{k+1} tr J^k / k,    J = dg/dx

exactly from the D x D Jacobian where D is small; else without bias, from Hutchinson's traces of the first terms and a Russian
roulette on the others: the series goes on with probability 1/2 at each term, and each is weighted by the inverse of its chance.
The inverse is the fixed point of x <- y - g(x), which converges as Lip(g)^n.

g(x) = scale * network(x): linear layers of spectral norm 1 by power iteration, LipSwish between them, and a learned scale below
``lipschitz``. Power iteration goes on in training mode alone; :meth:`ResidualFlow.settle` brings it to its end.

Sources: Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen (2019), "Invertible residual networks"; Chen, Behrmann, Duvenaud and
Jacobsen (2019), "Residual flows for invertible generative modeling".
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

from fastgen.flows.flow import Context, Flow, FlowConfig
from fastgen.flows.implicit import SearchedInverse
from fastgen.flows.probes import jacobian, of_layer
from fastgen.flows.stack import Stack
from fastgen.nn.conditioner import LIMIT
from fastgen.nn.divergence import rademacher
from fastgen.ops import uniform
from fastgen.registry import register

__all__ = ["Contraction", "InvertibleResidual", "LipSwish", "ResidualFlow", "ResidualFlowConfig"]

_EXACT = 8  # features up to which "auto" takes the Jacobian
_TERMS = 4  # of the series, that are always there


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualFlowConfig(FlowConfig):
    """Options of :class:`ResidualFlow`."""

    layers: int = 8
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of each residual map."""
    lipschitz: float = 0.9
    """Bound on the Lipschitz constant of each residual map, below 1."""
    log_det: Literal["auto", "exact", "roulette"] = "auto"
    """"exact" takes the Jacobian, "roulette" the unbiased series; "auto" is exact up to 8 features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be the widths of at least one layer, got {self.hidden}")
        if not 0 < self.lipschitz < 1:
            raise ValueError(f"lipschitz must be in (0, 1), got {self.lipschitz}")
        if self.log_det not in ("auto", "exact", "roulette"):
            raise ValueError(f"log_det must be 'auto', 'exact' or 'roulette', got {self.log_det!r}")
        if self.memory != "standard":
            raise ValueError(
                f"memory must be 'standard' in a residual flow, got {self.memory!r}: its layers are not deterministic"
            )


class LipSwish(nn.Module):
    """x * sigmoid(beta x) / 1.1, whose slope is at most 1; beta > 0 is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(softplus(self.beta) * x) / 1.1


class Contraction(nn.Module):
    """A network [N, D], context [N, C] or None -> [N, D] with Lipschitz constant in x below ``lipschitz``."""

    def __init__(self, features: int, hidden: tuple[int, ...], lipschitz: float, context: int = 0) -> None:
        super().__init__()
        sizes = itertools.pairwise((features, *hidden, features))
        self.layers = nn.ModuleList(spectral_norm(nn.Linear(n, m), n_power_iterations=2) for n, m in sizes)
        self.activations = nn.ModuleList(LipSwish() for _ in hidden)
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        self.scale = nn.Parameter(torch.zeros(()))
        self.lipschitz = lipschitz

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *rest = self.layers
        h = first(x.clamp(-LIMIT, LIMIT))
        if self.context is not None:
            h = h + self.context(context)
        for activation, layer in zip(self.activations, rest, strict=True):
            h = layer(activation(h))
        return self.lipschitz * torch.sigmoid(self.scale) * h


class InvertibleResidual(SearchedInverse):
    """y = x + g(x, context) for x [N, D].

    Args:
        contraction: g.
        exact: take the log-determinant from the Jacobian; else estimate it.
        index: of the layer in its flow: each has probes of its own.

    Attributes:
        key: of the estimate; None draws from PyTorch's generator, anew in every pass.
    """

    solver_steps = 500

    def __init__(self, contraction: nn.Module, *, exact: bool, index: int = 0) -> None:
        super().__init__()
        self.contraction = contraction
        self.exact = exact
        self.index = index
        self.key: Tensor | None = None

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._exact(x, context) if self.exact else self._estimate(x, context)

    def _exact(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        g, matrix = jacobian(lambda v: self.contraction(v, context), x)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return x + g, torch.linalg.slogdet(eye + matrix).logabsdet

    def _estimate(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        key = of_layer(self.key, self.index, x.device)
        v = rademacher(tuple(x.shape), key, x.dtype)
        chance = float(uniform((1, 2), key.reshape(-1, 4)[0])[0, 1])
        more = int(math.log(chance) / math.log(0.5))  # P(more >= n) = 2^-n
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            g = self.contraction(point, context)
            total, w = x.new_zeros(len(x)), v
            for k in range(1, _TERMS + more + 1):
                (w,) = torch.autograd.grad(g, point, w, create_graph=wanted, retain_graph=True)
                weight = 2.0 ** max(k - _TERMS, 0) / k
                total = total + (weight if k % 2 else -weight) * (w * v).sum(1)
        if not wanted:
            g, total = g.detach(), total.detach()
        return x + g, total

    @torch.no_grad()
    def search(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = y
        for _ in range(self.solver_steps):
            new = y - self.contraction(x, context)
            done = bool(((new - x).abs() <= 2 * torch.finfo(x.dtype).eps * (1 + x.abs())).all())
            x = new
            if done:
                break
        return x, -self.call_and_ladj(x, context)[1]

    def extra_repr(self) -> str:
        return f"exact={self.exact}"


@register("residual_flow", config=ResidualFlowConfig, paper="Chen et al. (2019), arXiv:1906.02735", data="moons")
class ResidualFlow(Flow):
    """Residual flow: contractive residual blocks with exact or unbiased log-determinants.

    >>> flow = ResidualFlow(ResidualFlowConfig(event_shape=(2,), layers=2)).eval()
    >>> flow().log_prob(flow.sample(3)).shape
    torch.Size([3])
    """

    config: ResidualFlowConfig

    def __init__(self, config: ResidualFlowConfig) -> None:
        features = math.prod(config.event_shape)
        exact = config.log_det == "exact" or (config.log_det == "auto" and features <= _EXACT)
        layers = [
            InvertibleResidual(Contraction(features, config.hidden, config.lipschitz, config.context), exact=exact, index=i)
            for i in range(config.layers)
        ]
        super().__init__(config, Stack(layers))

    def log_prob(self, x: Tensor, context: Context | None = None, *, key: Tensor | None = None) -> Tensor:
        """As of every flow; ``key`` sets the estimates of the log-determinants as well."""
        layers = [m for m in self.modules() if isinstance(m, InvertibleResidual)]
        for layer in layers:
            layer.key = key
        try:
            return super().log_prob(x, context, key=key)
        finally:
            for layer in layers:
                layer.key = None

    @torch.no_grad()
    def settle(self, iterations: int = 50) -> ResidualFlow:
        """Power iterations until the spectral norms are what they claim, for weights that were changed by hand."""
        training = self.training
        self.train()
        for layer in (m for m in self.modules() if isinstance(m, Contraction)):
            for linear in layer.layers:
                for _ in range(iterations):
                    _ = linear.weight  # computing it is one more iteration
        return self.train(training)
