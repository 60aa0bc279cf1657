"""Pictures of a latent space: grids, paths and single-axis walks, decoded.

Every function takes a model with ``decode(z)`` (latents [N, D] whose prior is N(0, I) -> samples [N, *event_shape]) and
returns a tensor of samples on the model's device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgen.nn.model import Model

__all__ = ["interpolate", "manifold", "traverse"]


def _decode(model: Model, z: Tensor, batch_size: int) -> Tensor:
    decode = getattr(model, "decode", None)
    if not callable(decode):
        raise TypeError(f"{type(model).__name__} has no decode(z)")
    with torch.no_grad():
        return torch.cat([decode(part) for part in z.to(model.device).split(batch_size)])


def manifold(model: Model, n: int = 20, *, edge: float = 0.025, batch_size: int = 256) -> Tensor:
    """An n x n grid over a 2-D latent space, spaced evenly in probability (Kingma & Welling 2014, figure 4).

    Row 0 is the top: the second latent falls from its ``1 - edge`` quantile to its ``edge`` quantile; the first rises
    from left to right.

    Args:
        n: points along each axis, at least 2.
        edge: probability mass left out at each end, in (0, 0.5).

    Returns:
        [n * n, *event_shape], row by row.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if not 0 < edge < 0.5:
        raise ValueError(f"edge must be in (0, 0.5), got {edge}")
    latent = getattr(model.config, "latent", 2)
    if latent != 2:
        raise ValueError(f"manifold needs a 2-D latent space, the model's has {latent} dimensions")
    axis = torch.special.ndtri(torch.linspace(edge, 1 - edge, n, dtype=torch.float64)).float()
    rows, columns = torch.meshgrid(axis.flip(0), axis, indexing="ij")
    return _decode(model, torch.stack([columns, rows], dim=-1).view(n * n, 2), batch_size)


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)[..., None]
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-6  # parallel (or opposite) vectors: the arc is the segment
    safe = torch.where(straight, 1.0, sine)
    curved = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / safe
    return torch.where(straight, torch.lerp(a, b, t), curved)


def interpolate(
    model: Model,
    a: Tensor,
    b: Tensor,
    steps: int = 10,
    *,
    kind: Literal["linear", "spherical"] = "spherical",
    batch_size: int = 256,
) -> Tensor:
    """Decoded points on paths between latents, both ends included.

    Args:
        a, b: latents [N, D] (or [D]), the ends of N paths.
        steps: points on a path, at least 2.
        kind: ``"linear"``, or ``"spherical"`` (White 2016, "Sampling generative networks"), which keeps the norm that
            points of a high-dimensional normal prior have.

    Returns:
        [N, steps, *event_shape].
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if kind not in ("linear", "spherical"):
        raise ValueError(f"kind must be 'linear' or 'spherical', got {kind!r}")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = torch.atleast_2d(a)[:, None], torch.atleast_2d(b)[:, None]
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[None, :, None]
    z = torch.lerp(a, b, t) if kind == "linear" else _slerp(a, b, t)
    out = _decode(model, z.flatten(0, 1), batch_size)
    return out.view(z.shape[0], steps, *out.shape[1:])


def traverse(
    model: Model, z: Tensor, *, span: float = 3.0, steps: int = 11, dims: list[int] | None = None, batch_size: int = 256
) -> Tensor:
    """One latent axis at a time set to values from ``-span`` to ``span``, the others held at ``z``.

    Args:
        z: the latent [D] to start from.
        span: in standard deviations of the prior.
        steps: values along each axis, at least 2.
        dims: which axes; all of them by default.

    Returns:
        [len(dims), steps, *event_shape].
    """
    if z.ndim != 1:
        raise ValueError(f"z must be one latent [D], got shape {tuple(z.shape)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    dims = list(range(len(z))) if dims is None else dims
    for d in dims:
        if not 0 <= d < len(z):
            raise ValueError(f"dims must lie in 0 .. {len(z) - 1}, got {d}")
    grid = z.expand(len(dims), steps, -1).clone()
    values = torch.linspace(-span, span, steps, dtype=z.dtype, device=z.device)
    for row, d in enumerate(dims):
        grid[row, :, d] = values
    out = _decode(model, grid.flatten(0, 1), batch_size)
    return out.view(len(dims), steps, *out.shape[1:])
