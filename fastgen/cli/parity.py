"""``fastgen parity``: another library's network and ours with its weights, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgen.cli import show

if TYPE_CHECKING:
    from fastgen.interop.diffusers.parity import Difference

__all__ = ["parity"]

parity = typer.Typer(
    help="Another library's network and ours with its weights, side by side.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)

LAYERS = 1e-5
"""How far a layer may be, as a share of its largest value."""
STEPS = 1e-4
"""How far a state of the sampler may be: every step feeds the network what the last one left."""


@parity.callback()
def _root(context: typer.Context) -> None:
    """Keeps the library's name a word of the command line."""
    if context.invoked_subcommand is None:
        raise ValueError("parity with which library? fastgen parity diffusers PATH")


def _report(differences: Sequence[Difference], what: str, tolerance: float) -> bool:
    show.table(
        [(d.name, " x ".join(map(str, d.shape)), f"{d.absolute:.2e}", f"{d.relative:.2e}") for d in differences],
        (what, "result", "absolute", "relative"),
        right=("absolute", "relative"),
    )
    worst = max(differences, key=lambda d: d.relative)
    equal = worst.relative <= tolerance
    verdict = "equal" if equal else "NOT equal"
    show.line(f"{verdict} to {tolerance:g}: at most {worst.relative:.2e} of the largest value ({worst.name})")
    return equal


@parity.command()
def diffusers(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of save_pretrained: a network or a pipeline.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of the random input.")] = 8,
    size: Annotated[int | None, typer.Option(min=1, help="Its height and width.", show_default="the network's")] = None,
    seed: Annotated[int, typer.Option(help="Of the input.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Timed evaluations of each side; 0: none.")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="Steps of a pipeline's sampler; 0: none.")] = 10,
) -> None:
    """Differences after every layer and every step of the sampler, and what both sides cost.

    Exit code 1 where a layer differs by more than 1e-5 of its largest value, or a state by more than 1e-4.
    """
    from fastgen.interop.diffusers.parity import layer_differences, load_pair, load_schedulers, step_differences, timings

    pair = load_pair(path, batch_size=batch_size, size=size, seed=seed)
    show.heading(
        f"{type(pair.theirs).__name__} of diffusers and {type(pair.ours).__name__} of fastgen, the same weights and input"
    )
    equal = _report(layer_differences(pair), "layer", LAYERS)
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
    if steps and (path / "model_index.json").is_file():
        show.line()
        schedulers = load_schedulers(path)
        if isinstance(schedulers, str):
            show.line(schedulers)
        else:
            show.heading(f"{type(schedulers[0]).__name__}, {steps} steps, each side with its own network and scheduler")
            run = step_differences(pair, *schedulers, steps=steps, batch_size=batch_size, size=size, seed=seed)
            equal &= _report(run.differences, "state", STEPS)
            show.line(f"one run each: {run.seconds_theirs:.2f} s in diffusers, {run.seconds:.2f} s in fastgen")
    if not equal:
        raise typer.Exit(1)
