"""``fastgen parity``: another library's network and ours with its weights, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgen.cli import show

__all__ = ["parity"]

parity = typer.Typer(
    help="Another library's network and ours with its weights, side by side.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TOLERANCE = 1e-5
"""Of the largest value of a layer."""


@parity.callback()
def _root() -> None:
    """Keeps the library's name a word of the command line."""


@parity.command()
def diffusers(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of save_pretrained: a network or a pipeline.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of the random input.")] = 8,
    size: Annotated[int | None, typer.Option(min=1, help="Its height and width.", show_default="the network's")] = None,
    seed: Annotated[int, typer.Option(help="Of the input.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Timed evaluations of each side; 0: none.")] = 5,
) -> None:
    """Differences after every layer, and what an evaluation costs on both sides.

    Exit code 1 where a layer differs by more than 1e-5 of its largest value.
    """
    from fastgen.interop.diffusers.parity import layer_differences, load_pair, timings

    pair = load_pair(path, batch_size=batch_size, size=size, seed=seed)
    layers = layer_differences(pair)
    show.heading(
        f"{type(pair.theirs).__name__} of diffusers and {type(pair.ours).__name__} of fastgen, the same weights and input"
    )
    show.table(
        [(d.name, " x ".join(map(str, d.shape)), f"{d.absolute:.2e}", f"{d.relative:.2e}") for d in layers],
        ("layer", "result", "absolute", "relative"),
        right=("absolute", "relative"),
    )
    worst = max(layers, key=lambda d: d.relative)
    equal = worst.relative <= TOLERANCE
    verdict = "equal" if equal else "NOT equal"
    show.line(f"{verdict} to {TOLERANCE:g}: at most {worst.relative:.2e} of the largest value ({worst.name})")
    if rounds:
        show.line()
        show.table(
            [
                (t.name, f"{1e3 * t.seconds:.1f}", f"{t.ratio:.2f}", f"{t.relative_error:.2e}")
                for t in timings(pair, rounds=rounds)
            ],
            ("evaluation", "ms", "times diffusers", "relative error"),
            right=("ms", "times diffusers", "relative error"),
        )
    if not equal:
        raise typer.Exit(1)
