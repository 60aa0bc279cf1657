"""What a training run tells: metrics.jsonl, TensorBoard, pictures of samples, the loss curve."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch

from fastgen._extras import require
from fastgen.nn.model import Model
from fastgen.training import checkpoint
from fastgen.training.run import RunDir

__all__ = ["Pictures", "TensorBoard", "draw_losses", "read_metrics", "truncate_metrics"]

_PICTURE_IMAGES = 64
_PICTURE_POINTS = 2_000


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise ValueError(f"{path}, line {number} is corrupt") from None
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``: what a checkpoint of that step does not know."""
    kept = [line for line in read_metrics(path) if line["step"] <= step] if path.is_file() else []
    checkpoint.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def draw_losses(metrics: Path, out: Path, title: str = "") -> None:
    """Draw the first loss of each phase of a ``metrics.jsonl`` over the steps, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in read_metrics(metrics):
        phases = set()
        for name, value in line.items():
            phase, slash, _ = name.rpartition("/")
            if slash and phase not in phases:
                phases.add(phase)
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, label=name, marker="o" if len(steps) == 1 else None)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    checkpoint.write_atomic(out, picture.getvalue())


class TensorBoard:
    """The metrics as TensorBoard scalars.

    Args:
        folder: where the event files go.
        step: step of the first entry; those that an earlier, killed run wrote from there on are hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        module = require("torch.utils.tensorboard", package="tensorboard", extra="tensorboard", purpose="tensorboard=True")
        self._writer = module.SummaryWriter(str(folder), purge_step=step)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of ``metrics.jsonl``."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Pictures:
    """Sample grids and the loss curve of a run, as far as the model and the installed packages allow.

    ``notes`` says what could not be drawn.
    """

    def __init__(self, run_dir: RunDir, model: Model, seed: int) -> None:
        self._run_dir = run_dir
        self._seed = seed
        self.notes: list[str] = []
        shape = model.event_shape
        is_image = len(shape) == 3 and shape[0] in (1, 3)
        self._count = _PICTURE_IMAGES if is_image else _PICTURE_POINTS
        self._can_plot = self._has("matplotlib", "loss.png was")
        self._can_sample = type(model).sample is not Model.sample and (
            self._has("PIL", "samples were") if is_image else shape == (2,) and self._can_plot
        )
        context: Any = getattr(model.config, "context", 0)
        if self._can_sample and context:
            self.notes.append("samples were not drawn: they need a context")
            self._can_sample = False

    def _has(self, package: str, what: str) -> bool:
        if importlib.util.find_spec(package) is not None:
            return True
        name = {"PIL": "pillow"}.get(package, package)
        self.notes.append(f"{what} not drawn: {name} is missing (pip install 'fastgen-torch[cli]')")
        return False

    def samples(self, model: Model, step: int) -> None:
        """Draw samples: a grid of images, or a scatter of points. Training goes on as if nothing had been drawn."""
        if not self._can_sample:
            return
        from fastgen.sampling import sample

        self._run_dir.samples.mkdir(exist_ok=True)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            sample(model, self._count, seed=self._seed, out=self._run_dir.samples / f"step-{step:06d}.png")

    def losses(self) -> None:
        """Draw the loss curve."""
        if self._can_plot:
            config = self._run_dir.read_config()
            title = f"{config['model'] or config['class']} on {config['data']['name']}"
            draw_losses(self._run_dir.metrics, self._run_dir.loss_curve, title)
