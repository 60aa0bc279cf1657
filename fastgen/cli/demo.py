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
    from collections.abc import Callable

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


def _train(title: str, make: Callable[[], Model], source: Source, out: Path, *, steps: int) -> Model:
    import torch

    import fastgen

    show.heading(title)
    torch.manual_seed(0)  # the weights to start from
    if (out / "config.json").is_file():  # an earlier demo's run
        shutil.rmtree(out)
    result = fastgen.fit(make(), source, steps=steps, batch_size=64, seed=0, out=out, ema=0.998, sample_every=0)
    for note in result.notes:
        show.line(f"note: {note}")
    if result.interrupted:
        show.line(f"interrupted at step {result.steps:,}")
        raise typer.Exit(130)
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
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures and the runs go.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: seconds, and blurry pictures.")] = False,
) -> None:
    """Train, sample, score and draw real digits.

    About two minutes on two CPU cores; says where the pictures are.
    """
    import fastgen
    from fastgen.diffusion.latent_diffusion import LatentDiffusion
    from fastgen.sampling import images
    from fastgen.sampling.latent import manifold

    begin = time.perf_counter()
    train, test = _load_data()
    shape, classes = train.event_shape, train.num_classes or 1

    def vae(latent: int) -> Callable[[], Model]:
        return lambda: fastgen.create("vae", event_shape=shape, latent=latent)

    title = f"Training vae on {train.name}: {len(train):,} images"
    model = _train(title, vae(16), train, out / "vae", steps=60 if fast else 1800)
    flat = _train("Training vae with a 2-D latent space", vae(2), train, out / "vae-2d", steps=60 if fast else 1200)
    diffusion = _train(
        "Training a diffusion of the first vae's latents, told the classes",
        lambda: LatentDiffusion.over(model, "vae", num_classes=classes, learning_rate=1e-3, layers=3),
        train,
        out / "latent_diffusion",
        steps=60 if fast else 2500,
    )

    count = 1_000 if fast else 10_000
    started = time.perf_counter()
    samples = fastgen.sample(model, count, batch_size=500, progress=sys.stderr.isatty())
    rate = count / (time.perf_counter() - started)
    show.line()
    show.line(f"Drew {count:,} images: {rate:,.0f} images/s")
    options: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 30, "guidance": 2.0, "labels": tuple(range(classes))}
    started = time.perf_counter()
    guided = fastgen.sample(diffusion, 100 * classes, batch_size=500, progress=sys.stderr.isatty(), **options)
    rate = len(guided) / (time.perf_counter() - started)
    show.line(f"Drew {len(guided):,} images of given classes by diffusion, 30 steps: {rate:,.0f} images/s")
    scores = fastgen.evaluate(model, test, importance_samples=64, batch_size=100, progress=sys.stderr.isatty())
    show_scores(scores)

    pictures = {
        "samples.png": (samples[: _PICTURES**2], "samples of the VAE from its prior"),
        "classes.png": (guided[: _PICTURES * classes], "samples of the diffusion, a column for each class"),
        "reconstructions.png": (_reconstructions(model, test), "test images, each above its reconstruction"),
        "manifold.png": (manifold(flat, 20).cpu(), "the 2-D latent space, decoded on a grid"),
    }
    for name, (grid, _) in pictures.items():
        images.save_png(grid, out / name, columns=classes if name == "classes.png" else round(len(grid) ** 0.5))
    written = {str(out / name): what for name, (_, what) in pictures.items()}
    if (out / "vae" / "loss.png").is_file():
        shutil.copyfile(out / "vae" / "loss.png", out / "loss.png")
        written[str(out / "loss.png")] = "the loss curve"
    show.line()
    show.pairs(written)
    show.line(f"Done in {show.duration(time.perf_counter() - begin)}. `fastgen sample {out / 'vae'} -n 64` draws more.")
