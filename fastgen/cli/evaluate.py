"""``fastgen evaluate``: score a trained model on held-out data."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli import options, show

__all__ = ["evaluate", "show_scores"]


def show_scores(scores: dict[str, float]) -> None:
    """The table of :func:`fastgen.evaluate`'s numbers, one row each, with the unit apart."""
    from fastgen.metrics import UNITS

    rows = []
    for name, value in scores.items():
        if name.endswith("_stderr"):
            continue
        error = scores.get(f"{name}_stderr", math.nan)  # of a single sample there is none
        label, unit = UNITS[name]
        rows.append(
            (label.format(**scores), show.amount(value), f"± {show.amount(error)}" if math.isfinite(error) else "", unit)
        )
    show.table(rows, ("score", "value", "", "unit"), right=("value",))


def evaluate(
    run: options.RunDirectory,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Data to score on.", show_default="the run's own")
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Which part of the data: train or test.")] = "test",
    number: Annotated[
        int | None, typer.Option("-n", "--number", min=1, metavar="N", help="The first N only.", show_default="all")
    ] = None,
    importance_samples: Annotated[
        int, typer.Option(min=1, metavar="K", help="Draws of z per x in the importance-weighted bound.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of those draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Samples scored at a time.")] = 64,
    device: options.Device = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw data, samples and density of a model of the plane."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too.")] = None,
) -> None:
    """Score a run on held-out data.

    Prints the log-likelihood, or bounds on it, in nats per sample and in bits per dimension.
    """
    import fastgen
    from fastgen.metrics import open_scored
    from fastgen.sampling import planes

    options.check_device(device)
    model, source = open_scored(run, data, split, device)
    if plot is not None:
        planes.check_density(model)
    scores = fastgen.evaluate(
        model,
        source,
        n=number,
        importance_samples=importance_samples,
        seed=seed,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    show_scores(scores)
    if plot is not None:
        show.line(f"-> {planes.save_density(model, source, plot, seed=seed)}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(scores, indent=2) + "\n")
        show.line(f"-> {json_file}")
