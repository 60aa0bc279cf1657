"""The Fréchet distance between two normal distributions: FID on Inception features, or on any other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops import CovarianceFactor, trace_sqrt_product

__all__ = ["frechet_distance"]


def frechet_distance(
    mu1: Tensor,
    sigma1: Tensor | CovarianceFactor,
    mu2: Tensor,
    sigma2: Tensor | CovarianceFactor,
    *,
    method: str = "eigen",
) -> Tensor:
    """The squared Fréchet (2-Wasserstein) distance between N(mu1, sigma1) and N(mu2, sigma2):

        |mu1 - mu2|^2 + Tr sigma1 + Tr sigma2 - 2 Tr (sigma1 sigma2)^(1/2)

    Args:
        mu1: mean [..., d], floating point.
        sigma1: covariance [..., d, d], symmetric, of any rank; or a :func:`fastgen.ops.covariance_factor` of one, for a
            reference that many distributions are compared with.
        mu2: the same of the other distribution.
        sigma2: the same of the other distribution.
        method: "eigen" or "newton_schulz", see :func:`fastgen.ops.trace_sqrt_product`.

    Returns:
        [...], float64, in squared units of the features; differentiable. It is a difference of traces, right to about 1e-14 of
        their sum for float64 covariances (1e-8 for those of :func:`fastgen.ops.moments` from float32 features): what rounding
        leaves below zero is returned as zero, so that the distance is never negative; where clamped its gradient is zero.
        Nothing complex arises. NaN only where an input holds a NaN or an infinity.

    Raises:
        TypeError, ValueError: for tensors of the wrong type, shape or device.

    Source: Heusel et al. (2017), "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation
    6; Dowson and Landau (1982).
    """
    for name, mu, sigma in (("mu1", mu1, sigma1), ("mu2", mu2, sigma2)):
        if not isinstance(mu, Tensor) or not mu.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(mu, 'dtype', type(mu).__name__)}")
        rows = sigma.matrix if isinstance(sigma, CovarianceFactor) else sigma
        if isinstance(rows, Tensor) and mu.shape != rows.shape[:-1]:
            raise ValueError(f"{name} must have shape {list(rows.shape[:-1])} like its covariance, got {list(mu.shape)}")
    cross = trace_sqrt_product(sigma1, sigma2, method=method)
    apart = (mu1.to(torch.float64) - mu2.to(torch.float64)).square().sum(-1)
    return (apart + _trace(sigma1) + _trace(sigma2) - 2 * cross).clamp_min(0)


def _trace(sigma: Tensor | CovarianceFactor) -> Tensor:
    if isinstance(sigma, CovarianceFactor):
        return sigma.matrix.square().sum()
    return sigma.diagonal(dim1=-2, dim2=-1).to(torch.float64).sum(-1)
