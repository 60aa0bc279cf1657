"""Base distributions of flows: what the data are mapped to. Independent, the same in every dimension, without parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributions
from torch.nn.functional import softplus

from fastgen import ops

__all__ = ["BASES", "Base", "StandardLogistic", "StandardNormal"]


class Base:
    """A fixed distribution of vectors z [N, D]."""

    def draw(self, shape: tuple[int, int], key: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        """z of ``shape`` [N, D]; z i is a function of the noise at index ``key.sample + i`` alone."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, [N]."""
        raise NotImplementedError

    def distribution(self, z: Tensor) -> distributions.Distribution:
        """The same as ``torch.distributions`` has it, of events of the size, dtype and device of ``z`` [D]."""
        raise NotImplementedError


class StandardNormal(Base):
    """N(0, I)."""

    def draw(self, shape: tuple[int, int], key: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return ops.normal(shape, key, dtype=dtype, device=device if key is None else None)

    def log_prob(self, z: Tensor) -> Tensor:
        return z.square().sum(1).mul(-0.5) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def distribution(self, z: Tensor) -> distributions.Distribution:
        return distributions.Independent(distributions.Normal(torch.zeros_like(z), torch.ones_like(z)), 1)


class StandardLogistic(Base):
    """Logistic with location 0 and scale 1: p(z) = sigmoid(z) sigmoid(-z)."""

    def draw(self, shape: tuple[int, int], key: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        u = ops.uniform(shape, key, dtype=dtype, device=device if key is None else None)
        return torch.log(u) - torch.log1p(-u)

    def log_prob(self, z: Tensor) -> Tensor:
        return -(softplus(z) + softplus(-z)).sum(1)

    def distribution(self, z: Tensor) -> distributions.Distribution:
        uniform = distributions.Uniform(torch.zeros_like(z), torch.ones_like(z))
        logistic = distributions.TransformedDistribution(uniform, [distributions.SigmoidTransform().inv])
        return distributions.Independent(logistic, 1)


BASES: dict[str, Base] = {"normal": StandardNormal(), "logistic": StandardLogistic()}
"""The base distributions by name."""
