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

    from fastgen.nn.model import Model

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


_STRENGTH = 0.6


def _from_images(
    model: Model, start: Path | None, strength: float | None, inpaint: Path | None, mask: Path | None
) -> dict[str, Any]:
    """The options of image-to-image and inpainting; ``ValueError`` where the model has none or some are missing."""
    given = {"init": start, "inpaint": inpaint, "mask": mask, "strength": strength}
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return {}
    known, flags = options.sample_types(model), {"init": "--from"}
    for name in chosen:
        if name not in known:
            raise ValueError(f"{flags.get(name, f'--{name}')} is for diffusion models, {type(model).__name__} cannot use it")
    if (inpaint is None) != (mask is None):
        raise ValueError("inpainting takes --inpaint IMAGE, what is known, and --mask IMAGE, white where to paint")
    if strength is not None and start is None and inpaint is None:
        raise ValueError("--strength needs --from IMAGE or --inpaint IMAGE")
    if start is not None and strength is None:
        chosen["strength"] = _STRENGTH
    return chosen


def _count_images(*paths: Path | None) -> int | None:
    """How many images a folder among ``paths`` has; None without one."""
    from fastgen.data import ImageFiles

    folders = [path for path in paths if path is not None and path.is_dir()]
    return max((len(ImageFiles(path, (1, 1, 1))) for path in folders), default=None)


def sample(
    run: options.RunDirectory,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--number",
            min=1,
            metavar="N",
            help="How many samples.",
            show_default="64, or 2000 points of a plane; the images of a folder that is given",
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
    format: Annotated[
        str | None,
        typer.Option(
            metavar="png|npz|safetensors",
            help="Of the files in a folder: a PNG each, or shards.",
            show_default="png for images",
        ),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples in a shard.", show_default="64 MB")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out the files of a folder that are there already.")] = False,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="IMAGE|FOLDER", help="Start from images, noised by --strength.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="How far to get from --from or --inpaint.", show_default="0.6 with --from, else 1"),
    ] = None,
    inpaint: Annotated[
        Path | None, typer.Option(metavar="IMAGE|FOLDER", help="Keep these images but where --mask is white.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(metavar="IMAGE|FOLDER", help="What of --inpaint to paint anew: white.")] = None,
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
    values |= _from_images(model, start, strength, inpaint, mask)
    _report_inference(model, values)
    target = out or run / "samples.png"
    points = model.event_shape == (2,) and target.suffix.lower() == ".png" and not target.is_dir()
    count = len(chosen) if chosen is not None else (n or _count_images(start, inpaint) or (_POINTS if points else 64))
    begin = time.perf_counter()
    where = fastgen.sample(
        model,
        None if chosen is not None else count,
        ids=chosen,
        seed=seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        out=None if points else target,
        format=format,
        shard_size=shard_size,
        resume=resume,
        device=device,
        progress=sys.stderr.isatty(),
        **values,
    )
    seconds = time.perf_counter() - begin
    if not isinstance(where, Path):
        where = _beside_data(where, run, target)
    show.line(f"{count:,} samples in {show.duration(seconds)} ({show.amount(count / seconds)}/s) -> {where}")
