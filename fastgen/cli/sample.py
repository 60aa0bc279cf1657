"""``fastgen sample``: draw from a trained model."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import options, show

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sample"]

_POINTS = 2000


def _parse_ids(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"--ids takes A:B with 0 <= A < B (B is left out), got {text!r}")
    return range(int(first), int(last))


def _beside_data(points: Tensor, run: Path, target: Path) -> Path:
    """Draw points of the plane beside as many of the data that the run was trained on, where these are still to be had."""
    from fastgen.sampling import planes
    from fastgen.training import RunDir
    from fastgen.training.batches import open_source

    panels: dict[str, Tensor | planes.Density] = {"samples": points}
    spec = RunDir(run).read_config()["data"]["spec"]
    if spec is not None:
        with contextlib.suppress(FileNotFoundError):
            source = open_source(spec, (2,))
            panels = {f"data: {source.name}": planes.first_of(source, len(points)), **panels}
    return planes.save_panels(panels, target)


def _report_inference(model: Any, values: dict[str, Any]) -> None:
    """Say how far the copy of a diffusion network that draws is from the network, where one was asked for."""
    chosen = values.get("inference", "plain")
    error = getattr(model, "inference_error", None)
    if chosen != "plain" and error is not None:
        show.line(f"{chosen} network: relative error {100 * error(chosen):.2g} % of its output")


def sample(
    run: options.RunDirectory,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--number", min=1, metavar="N", help="How many samples.", show_default="64, or 2000 points of a plane"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="FILE.png (a grid; points of a plane beside the data), .npz, .safetensors, or a folder.",
            show_default="DIR/samples.png",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Sample i is a function of seed and i alone.")] = 0,
    ids: Annotated[str | None, typer.Option(metavar="A:B", help="Redraw samples A .. B-1 of a run.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="B", help="Samples drawn at a time.")] = 64,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="The network sees exactly this many: the same bits in any run.")
    ] = None,
    device: options.Device = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model's sample().")
    ] = None,
) -> None:
    """Draw samples from a run to a file or folder."""
    import fastgen

    if n is not None and ids is not None:
        raise ValueError("-n and --ids exclude each other")
    chosen = None if ids is None else _parse_ids(ids)
    options.check_device(device)
    model = fastgen.load(run, device=device)
    values = options.parse_settings(settings or [], options.sample_types(model), f"sample() of {type(model).__name__}")
    _report_inference(model, values)
    target = out or run / "samples.png"
    points = model.event_shape == (2,) and target.suffix.lower() == ".png" and not target.is_dir()
    count = len(chosen) if chosen is not None else (n or (_POINTS if points else 64))
    begin = time.perf_counter()
    where = fastgen.sample(
        model,
        None if chosen is not None else count,
        ids=chosen,
        seed=seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        out=None if points else target,
        device=device,
        progress=sys.stderr.isatty(),
        **values,
    )
    seconds = time.perf_counter() - begin
    if not isinstance(where, Path):
        where = _beside_data(where, run, target)
    show.line(f"{count:,} samples in {show.duration(seconds)} ({show.amount(count / seconds)}/s) -> {where}")
