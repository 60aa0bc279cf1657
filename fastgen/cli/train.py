"""``fastgen train``: a new run, or the rest of an interrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgen.cli import options, show

if TYPE_CHECKING:
    from fastgen.data import Source
    from fastgen.nn.model import Model
    from fastgen.training import FitResult

__all__ = ["train"]

_STEPS = 2000
_OF_A_RESUME = {"resume", "steps", "device"}


def _check_resume_alone(context: typer.Context) -> None:
    """A resumed run has its arguments in its directory: others on the command line would be ignored, so refuse them."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _OF_A_RESUME and source is not None and source.name == "COMMANDLINE":
            option = {"model": "MODEL", "settings": "--set"}.get(name, "--" + name.replace("_", "-"))
            raise ValueError(f"--resume takes the run's own arguments; {option} cannot come with it, only --steps, --device")


def _new(name: str, source: Source, settings: list[str], seed: int) -> Model:
    """The model for a data set; what the data tell (shape, number of classes) need not be set."""
    import torch

    from fastgen import registry

    kinds = options.config_types(registry.describe(name).config)
    values = options.parse_settings(settings, kinds, name)
    if "num_classes" in kinds and source.num_classes is not None:
        values.setdefault("num_classes", source.num_classes)
    torch.manual_seed(seed)  # the weights to start from
    return registry.create(name, event_shape=source.event_shape, **values)


def _report(result: FitResult) -> None:
    """Say what came out; leaves with exit code 130 where the run was interrupted."""
    for note in result.notes:
        show.line(f"note: {note}")
    losses = ", ".join(f"{name} {show.amount(value)}" for name, value in result.metrics.items() if "/" in name)
    if losses:
        show.line(f"step {result.steps:,}: {losses}")
    if result.interrupted:
        show.line(f"interrupted at step {result.steps:,} and saved; go on with: fastgen train --resume {result.out}")
        raise typer.Exit(130)
    show.line(f"{result.steps:,} steps in {show.duration(result.seconds)} -> {result.out}")


def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="See `fastgen list models`.", show_default=False)] = None,
    data: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="See `fastgen list data`; default is the set that suits the model.")
    ] = "default",
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps in all.", show_default=str(_STEPS))] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of weights, data order and noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Samples per step.")] = 64,
    checkpoint_every: Annotated[int, typer.Option(min=1, metavar="K", help="Save every K steps.")] = 500,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory.", show_default="runs/MODEL-DATA")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the model's config; repeatable.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="Resize and crop images to it.")] = None,
    channels: Annotated[int | None, typer.Option(metavar="C", help="Convert images to 1 (grey) or 3 (RGB) channels.")] = None,
    ema: Annotated[float | None, typer.Option(metavar="DECAY", help="Average the weights, e.g. 0.999.")] = None,
    precision: Annotated[str, typer.Option(metavar="DTYPE", help="float32 or bfloat16 (autocast).")] = "float32",
    device: options.Device = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the loss under torch.compile.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with a run; --steps may extend it.")] = None,
) -> None:
    """Train a model, or resume a run.

    Checkpoints, metrics, samples and the loss curve go to the run directory.
    """
    from fastgen import registry, training
    from fastgen.data import load

    if resume is not None:
        _check_resume_alone(context)
        options.check_device(device)
        result = training.resume(resume, steps=steps, device=device)
    else:
        if model is None:
            raise ValueError("name a MODEL (see `fastgen list models`), or a run to go on with: --resume DIR")
        entry = registry.describe(model)
        options.check_device(device)
        source = load(entry.data if data == "default" else data, image_size=image_size, channels=channels)
        target = out or Path("runs") / f"{model}-{Path(source.name).stem}"
        result = training.fit(
            _new(model, source, settings or [], seed),
            source,
            steps=steps or _STEPS,
            batch_size=batch_size,
            seed=seed,
            out=target,
            checkpoint_every=checkpoint_every,
            ema=ema,
            precision=precision,
            device=device,
            compile=compile,
            tensorboard=tensorboard,
        )
    _report(result)
