"""``fastgen demo``: train, sample, score and draw, on real digits, in about two minutes on two CPU cores."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastgen.cli import show
from fastgen.cli.evaluate import show_scores

if TYPE_CHECKING:
    from torch import Tensor

    from fastgen.data import Source
    from fastgen.nn.model import Model

__all__ = ["demo"]

_PICTURES = 10  # rows and columns of the sample and reconstruction grids


def _load_data() -> tuple[Source, Source]:
    from fastgen import data

    try:
        return data.load("mnist5k", split="train"), data.load("mnist5k", split="test")
    except ModuleNotFoundError as error:
        show.line(f"note: {error}; taking rendered glyphs instead")
        return data.load("glyphs", split="train"), data.load("glyphs", split="test")


def _train(title: str, source: Source, out: Path, *, steps: int, **config: Any) -> Model:
    import torch

    import fastgen

    show.heading(title)
    torch.manual_seed(0)  # the weights to start from
    model = fastgen.create("vae", event_shape=source.event_shape, **config)
    if (out / "config.json").is_file():  # an earlier demo's run
        shutil.rmtree(out)
    result = fastgen.fit(model, source, steps=steps, batch_size=64, seed=0, out=out, ema=0.998)
    show.line(f"{result.steps:,} steps in {show.duration(result.seconds)}")
    return fastgen.load(out)


def _reconstructions(model: Any, source: Source) -> Tensor:
    """Rows of test images, each above its reconstruction from the mean of q(z|x)."""
    import torch

    rows = []
    chosen = torch.linspace(0, len(source) - 1, _PICTURES // 2 * _PICTURES).long()  # sorted by class: take all of them
    for indices in chosen.split(_PICTURES):
        x = source.batch(indices)[0].to(model.device)
        with torch.no_grad():
            rows += [x, model.decode(model.encode(x)[0])]
    return torch.cat(rows).cpu()


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures and the two runs go.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: seconds, and blurry pictures.")] = False,
) -> None:
    """Train, sample, score and draw real digits.

    About two minutes on two CPU cores; says where the pictures are.
    """
    import fastgen
    from fastgen.sampling import images
    from fastgen.sampling.latent import manifold

    begin = time.perf_counter()
    train, test = _load_data()
    model = _train(
        f"Training vae on {train.name}: {len(train):,} images",
        train,
        out / "vae",
        steps=60 if fast else 2500,
        latent=8,
    )
    flat = _train("Training vae with a 2-D latent space", train, out / "vae-2d", steps=60 if fast else 1800, latent=2)

    count = 1_000 if fast else 10_000
    started = time.perf_counter()
    samples = fastgen.sample(model, count, batch_size=500, progress=sys.stderr.isatty())
    rate = count / (time.perf_counter() - started)
    show.line()
    show.line(f"Drew {count:,} images: {rate:,.0f} images/s")
    scores = fastgen.evaluate(model, test, importance_samples=64, batch_size=100, progress=sys.stderr.isatty())
    show_scores(scores)

    pictures = {
        "samples.png": (samples[: _PICTURES**2], "samples from the prior"),
        "reconstructions.png": (_reconstructions(model, test), "test images, each above its reconstruction"),
        "manifold.png": (manifold(flat, 20).cpu(), "the 2-D latent space, decoded on a grid"),
    }
    for name, (grid, _) in pictures.items():
        images.save_png(grid, out / name, columns=round(len(grid) ** 0.5))
    shutil.copyfile(out / "vae" / "loss.png", out / "loss.png")
    show.line()
    show.pairs({str(out / name): what for name, (_, what) in pictures.items()} | {str(out / "loss.png"): "the loss curve"})
    show.line(f"Done in {show.duration(time.perf_counter() - begin)}. `fastgen sample {out / 'vae'} -n 64` draws more.")
