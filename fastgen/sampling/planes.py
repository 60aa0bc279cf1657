"""Pictures of the plane: points, samples beside data, densities; PNG files by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen._extras import require
from fastgen.data import Source
from fastgen.nn.model import Model, split_batch
from fastgen.training.checkpoint import write_atomic

__all__ = ["Density", "check_density", "first_of", "save_density", "save_panels", "save_scatter"]

_SIZE = 5.0  # inches of a panel's side
_PIXELS = 200  # points along each side of a density panel
_POINTS = 5000


Density = Callable[[Tensor], Tensor]
"""What a density panel shows: log p in nats of points [N, 2]."""


def save_scatter(points: Tensor, path: str | Path) -> Path:
    """Write a scatter plot of points [N, 2] as a PNG, both axes to one scale.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the points are not [N, 2].
    """
    return save_panels({"": points}, path)


def save_panels(panels: Mapping[str, Tensor | Density], path: str | Path) -> Path:
    """Write panels side by side as a PNG, all with the same axes.

    Args:
        panels: title -> points [N, 2], drawn as dots; or a function of points [N, 2] that gives log p in nats [N], drawn as
            colours on one scale for all. The axes hold the points of the first panel of points.
        path: the file; its folder is made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: points that are not [N, 2], or none at all.
    """
    path = Path(path)
    points = {title: panel.detach().float().cpu() for title, panel in panels.items() if isinstance(panel, Tensor)}
    for x in points.values():
        if x.dim() != 2 or x.shape[1] != 2:
            raise ValueError(f"points must be [N, 2], got {list(x.shape)}")
    if not any(map(len, points.values())):
        raise ValueError("a picture of the plane needs at least one point")
    low, high = _limits(next(x for x in points.values() if len(x)))
    densities = {title: _on_grid(panel, low, high) for title, panel in panels.items() if not isinstance(panel, Tensor)}
    brightest = max((float(p.max()) for p in densities.values()), default=1.0)

    module = require("matplotlib.figure", package="matplotlib", extra="cli", purpose="a picture of the plane")
    size = _SIZE * len(panels) + bool(densities), _SIZE + (0.3 if any(panels) else 0.0)
    figure = module.Figure(figsize=size, dpi=120, layout="constrained")
    shown: list[Any] = []
    image: Any = None
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if title in points:
            x, y = points[title].numpy().T
            axes.scatter(x, y, s=4, alpha=0.5, linewidths=0)
            axes.grid(alpha=0.3)
        else:
            extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
            image = axes.imshow(densities[title].numpy(), origin="lower", extent=extent, vmin=0, vmax=brightest)
            shown.append(axes)
        axes.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])), title=title)
        axes.set_aspect("equal")
    if shown:
        figure.colorbar(image, ax=shown, shrink=0.8, label="density")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, file.getvalue())
    return path


def _limits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of a square that holds the points, but for some that lie far out, and a margin."""
    x = x[x.isfinite().all(1)] if x.isfinite().all(1).any() else torch.zeros(1, 2)
    edges = torch.quantile(x[:_POINTS], torch.tensor([0.002, 0.998]), dim=0)
    centre, half = edges.mean(0), max(float((edges[1] - edges[0]).max()) / 2, 1e-3) * 1.15
    return centre - half, centre + half


@torch.no_grad()
def _on_grid(density: Density, low: Tensor, high: Tensor) -> Tensor:
    """The density at the centres of a grid's cells, row 0 at the bottom; zero where it is not finite."""
    steps = (torch.arange(_PIXELS) + 0.5) / _PIXELS
    x, y = (low[i] + (high[i] - low[i]) * steps for i in (0, 1))
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([columns, rows], -1).reshape(-1, 2)
    log_prob = torch.cat([density(part).float().cpu() for part in points.split(4096)])
    return log_prob.exp().nan_to_num(0.0, 0.0, 0.0).reshape(_PIXELS, _PIXELS)


def first_of(source: Source, n: int) -> Tensor:
    """The first ``n`` samples of a source."""
    return split_batch(source.batch(torch.arange(min(n, len(source)))))[0]


def check_density(model: Model) -> None:
    """``ValueError`` unless :func:`save_density` can draw the model."""
    if model.event_shape != (2,):
        raise ValueError(f"a density plot needs a model of the plane, this one's samples have shape {model.event_shape}")
    if not callable(getattr(model, "log_prob", None)):
        raise ValueError(f"{type(model).__name__} has no log_prob: there is no density to plot")


def save_density(model: Any, source: Source, path: str | Path, *, n: int = _POINTS, seed: int = 0) -> Path:
    """Write data, samples and the model's density side by side; and the true density where the data have a known one.

    Args:
        model: a model of the plane with ``log_prob``.
        source: its data.
        path: the PNG.
        n: points of each kind.
        seed: of the samples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a model of anything else.
    """
    from fastgen.sampling.loop import sample

    check_density(model)
    drawn = sample(model, n, seed=seed, batch_size=1000)
    assert isinstance(drawn, Tensor)
    panels: dict[str, Tensor | Density] = {
        f"data: {source.name}": first_of(source, n),
        "samples": drawn,
        "density of the model": lambda x: model.log_prob(x.to(model.device)),
    }
    truth = getattr(source, "density", None)
    if truth is not None:
        panels["true density"] = truth.log_prob
    return save_panels(panels, path)
