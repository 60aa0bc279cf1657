"""Bounds on the log-likelihood of latent-variable models, in nats per sample.

For a decoder p(x|z), a prior p(z) = N(0, I) and an encoder q(z|x) = N(mean, exp(log_var)):

    elbo(x)       = E_q[log p(x|z)] - KL(q(z|x) || p(z))                       <= log p(x)
    iw_bound_K(x) = E[log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x)],  z_k ~ q      <= log p(x)

A model whose posterior is a flow has ``transform_posterior(x, z)`` as well, which gives draws of q and log-determinants from
those of the normal distribution.

The second never decreases with K and tends to log p(x) (Burda, Grosse, Salakhutdinov 2016, "Importance weighted
autoencoders", https://arxiv.org/abs/1509.00519, theorem 1).
"""

from __future__ import annotations

import math
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from fastgen import ops

__all__ = ["LatentModel", "bits_per_dim", "elbo", "has_elbo", "iw_bound"]


class LatentModel(Protocol):
    """What the bounds need of a model; the prior of its latents is N(0, I)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each [N, D], for ``x`` [N, *event_shape]."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over the event: [N]."""


def has_elbo(model: object) -> TypeGuard[LatentModel]:
    """Whether the model provides what :func:`elbo` and :func:`iw_bound` need."""
    return callable(getattr(model, "encode", None)) and callable(getattr(model, "log_likelihood", None))


def _require_elbo(model: object) -> None:
    if not has_elbo(model):
        raise TypeError(f"{type(model).__name__} has no ELBO: it lacks encode(x) or log_likelihood(x, z)")


def _transformed(model: LatentModel, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the flow of the posterior, if there is one, makes of z, and what it adds to log p(z) - log q(z|x): [N]."""
    transform = getattr(model, "transform_posterior", None)
    if transform is None:
        return z, z.new_zeros(len(z))
    moved, log_det = transform(x, z)
    return moved, log_det + (z.square() - moved.square()).sum(1) / 2


@torch.no_grad()
def elbo(model: LatentModel, x: Tensor, *, key: Tensor | None = None) -> Tensor:
    """One-sample estimate of the evidence lower bound, the KL term in closed form.

    Args:
        x: [N, *event_shape], images in [0, 1].
        key: :mod:`fastgen.random` key; None draws from PyTorch's generator.

    Returns:
        nats per sample, float32 [N].
    """
    _require_elbo(model)
    mean, log_var = model.encode(x)
    start, kl = ops.reparameterize(mean, log_var, key=key)
    z, gain = _transformed(model, x, start)
    return model.log_likelihood(x, z).float() - kl.float() + gain.float()


@torch.no_grad()
def iw_bound(model: LatentModel, x: Tensor, samples: int = 64, *, key: Tensor | None = None, chunk: int = 4096) -> Tensor:
    """Importance-weighted bound on log p(x) with ``samples`` draws of z per x.

    The draws are a function of the key and of each sample's index, and the first K of 2K draws are the K draws: neither
    the batch size nor ``chunk`` changes them. Weights are combined by log-sum-exp in float64.

    Args:
        x: [N, *event_shape], images in [0, 1].
        samples: K >= 1.
        key: :mod:`fastgen.random` key; None draws from PyTorch's generator.
        chunk: how many (x, z) pairs the decoder sees at a time; bounds the memory.

    Returns:
        nats per sample, float64 [N].
    """
    _require_elbo(model)
    for name, value in (("samples", samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    mean, log_var = (t.float() for t in model.encode(x))
    n = len(x)
    noise = ops.normal((n, samples, *mean.shape[1:]), key=key, device=x.device)
    mean, log_var = mean.unsqueeze(1), log_var.unsqueeze(1)
    z = (mean + torch.exp(log_var / 2) * noise).flatten(0, 1)
    # log p(z) - log q(z|x): the normalising constants of the two normals cancel.
    ratio = (noise.double().square() + log_var.double() - z.double().square().view(noise.shape)).flatten(2).sum(2) / 2
    rows = torch.arange(n, device=x.device).repeat_interleave(samples)
    parts = []
    for r, start in zip(rows.split(chunk), z.split(chunk), strict=True):
        end, gain = _transformed(model, x[r], start)
        parts.append(model.log_likelihood(x[r], end).double() + gain.double())
    log_weight = torch.cat(parts).view(n, samples) + ratio
    return torch.logsumexp(log_weight, dim=1) - math.log(samples)


def bits_per_dim(nats: float, event_shape: tuple[int, ...], *, levels: int = 1) -> float:
    """Code length per dimension, in bits, of a log-likelihood in nats.

    Args:
        nats: log p(x) of one sample, or a mean of them.
        event_shape: shape of one sample; its elements are counted.
        levels: grey levels of the data before they were scaled to [0, 1]. A density on [0, 1] of 8-bit images needs 256,
            which adds log2(256) bits; a probability mass (Bernoulli) needs 1.
    """
    return -nats / (math.prod(event_shape) * math.log(2)) + math.log2(levels)
