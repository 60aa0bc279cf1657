"""The divergence of a vector field, tr(df/dx), per sample: exact, or by Hutchinson's estimator with counter-based probes.

Source: Grathwohl et al. (2019), "FFJORD: free-form continuous dynamics for scalable reversible generative models", section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops

__all__ = ["divergence", "rademacher"]


def rademacher(shape: tuple[int, ...], key: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 or 1 with equal probability: [N, ...], row i a function of the noise at index ``key.sample + i`` alone."""
    return torch.where(ops.uniform(shape, key) < 0.5, -1.0, 1.0).to(dtype)


def divergence(value: Tensor, x: Tensor, probe: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """tr(d value_n / d x_n) for every sample n: [N].

    Args:
        value: [N, ...], computed from ``x`` sample by sample; its graph is kept.
        x: of the same shape, requiring gradients.
        probe: [N, ...] of mean 0 and covariance I: one backward pass, an unbiased estimate. None: exact, a backward pass for
            each element of a sample.
        create_graph: whether the result is to be differentiated.
    """
    if probe is not None:
        (product,) = torch.autograd.grad(value, x, probe, retain_graph=True, create_graph=create_graph)
        return (product * probe).flatten(1).sum(1)
    rows, total = value.flatten(1), x.new_zeros(len(x))
    for i in range(rows.shape[1]):
        (row,) = torch.autograd.grad(rows[:, i].sum(), x, retain_graph=True, create_graph=create_graph, allow_unused=True)
        if row is not None:
            total = total + row.flatten(1)[:, i]
    return total
