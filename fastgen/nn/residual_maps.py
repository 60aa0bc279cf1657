"""Planar and radial maps: residual maps with closed-form log-determinants, for layers of flows and for posteriors.

    planar    f(z) = z + u' tanh(w.z + b)         log det = log(1 + u'.w (1 - tanh^2))
    radial    f(z) = z + beta' h (z - z0)         log det = (D - 1) log(1 + beta' h) + log(1 + alpha' beta' h^2)

with h = 1 / (alpha' + |z - z0|). They are invertible where u'.w > -1 and beta' > -alpha'; with m(x) = softplus(x + log(e - 1)),
the free parameters are mapped there, and zeros to the identity:

    u' = u + (m(w.u) - 1 - w.u) w / |w|^2,    alpha' = m(alpha),    beta' = alpha' (m(beta) - 1)

The planar inverse is a root in one dimension, that of a monotonic function, found by safeguarded Newton steps; the radial one
the root of a quadratic.

Source: Rezende and Mohamed (2015), "Variational inference with normalizing flows", section 4.1 and appendix A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastgen.nn.conditioner import LIMIT

__all__ = ["planar", "planar_inverse", "planar_size", "radial", "radial_inverse", "radial_size"]

_UNIT = math.log(math.e - 1)
"""softplus of this is 1."""
_MOST_STEPS = 120
"""Of the search for a root; it takes about ten."""


def _positive(x: Tensor) -> Tensor:
    """softplus, with 0 going to 1."""
    return softplus(x + _UNIT)


def planar_size(features: int) -> int:
    """Parameters of a planar map: u, w and b."""
    return 2 * features + 1


def radial_size(features: int) -> int:
    """Parameters of a radial map: z0, alpha and beta."""
    return features + 2


def _planar_parameters(parameters: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u', w [N or 1, D], b and u'.w [N or 1]."""
    u, w, b = parameters.split((features, features, 1), 1)
    raw = (u * w).sum(1, keepdim=True)
    square = w.square().sum(1, keepdim=True) + torch.finfo(w.dtype).tiny
    u = u + (_positive(raw) - 1 - raw) * w / square
    return u, w, b[:, 0], (u * w).sum(1)


def planar(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The planar map.

    Args:
        z: [N, D].
        parameters: [N, 2 D + 1] or [1, 2 D + 1]: u, w, b. With u = 0 the map is the identity.

    Returns:
        f(z) [N, D] and log |det df/dz| in nats [N].
    """
    u, w, b, slope = _planar_parameters(parameters, z.shape[1])
    t = torch.tanh((z.clamp(-LIMIT, LIMIT) * w).sum(1) + b)
    return z + u * t[:, None], torch.log1p(slope * (1 - t.square()))


def planar_inverse(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """What undoes :func:`planar`, and its log-determinant; gradients flow to everything."""
    u, w, b, slope = _planar_parameters(parameters, y.shape[1])
    target = (y.clamp(-LIMIT, LIMIT) * w).sum(1) + b
    slope = slope.expand_as(target)
    q = _planar_root(target.detach(), slope.detach())
    # one Newton step with gradients: they are those of the implicit function
    t = torch.tanh(q)
    q = q - (q + slope * t - target) / (1 + slope * (1 - t.square())).detach()
    t = torch.tanh(q)
    return y - u * t[:, None], -torch.log1p(slope * (1 - t.square()))


def _planar_root(target: Tensor, slope: Tensor) -> Tensor:
    """q with q + slope tanh(q) = target, slope > -1: Newton's steps where they stay in a shrinking bracket and halve the step
    before, else bisection.
    """
    low, high = target - slope.abs(), target + slope.abs()
    q, move = target, high - low
    settled = torch.zeros_like(q, dtype=torch.bool)
    for _ in range(_MOST_STEPS):
        t = torch.tanh(q)
        error = q + slope * t - target
        low, high = torch.where(error < 0, q, low), torch.where(error > 0, q, high)
        newton = q - error / (1 + slope * (1 - t.square()))
        good = (newton >= low) & (newton <= high) & ((newton - q).abs() <= move / 2)
        new = torch.where(good, newton, (low + high) / 2)
        move = (new - q).abs()
        q = torch.where(settled, q, new)
        settled |= (move <= 2 * torch.finfo(q.dtype).eps * (1 + q.abs())) | (error == 0)
        if bool(settled.all()):
            break
    return q


def _radial_parameters(parameters: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """z0 [N or 1, D], alpha' and beta' [N or 1]."""
    centre, alpha, beta = parameters.split((features, 1, 1), 1)
    alpha = _positive(alpha)
    return centre, alpha[:, 0], (alpha * (_positive(beta) - 1))[:, 0]


def _log_det(features: int, alpha: Tensor, beta: Tensor, h: Tensor) -> Tensor:
    return (features - 1) * torch.log1p(beta * h) + torch.log1p(alpha * beta * h.square())


def radial(z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The radial map.

    Args:
        z: [N, D].
        parameters: [N, D + 2] or [1, D + 2]: z0, alpha, beta. With beta = 0 the map is the identity.

    Returns:
        f(z) [N, D] and log |det df/dz| in nats [N].
    """
    centre, alpha, beta = _radial_parameters(parameters, z.shape[1])
    away = z - centre
    h = 1 / (alpha + away.norm(dim=1).clamp(max=LIMIT))
    return centre + (1 + beta * h)[:, None] * away, _log_det(z.shape[1], alpha, beta, h)


def radial_inverse(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """What undoes :func:`radial`, and its log-determinant; gradients flow to everything."""
    centre, alpha, beta = _radial_parameters(parameters, y.shape[1])
    away = y - centre
    length = away.norm(dim=1).clamp(max=LIMIT)
    # r^2 + (alpha + beta - length) r - alpha length = 0, without cancellation
    p = length - alpha - beta
    product = alpha * length
    root = p.abs() + torch.sqrt(p.square() + 4 * product)
    r = torch.where(p > 0, root / 2, 2 * product / root)
    h = 1 / (alpha + r)
    return centre + away / (1 + beta * h)[:, None], -_log_det(y.shape[1], alpha, beta, h)
