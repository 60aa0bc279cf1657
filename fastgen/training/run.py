"""The run directory: what a training run leaves on disk, and how a model comes back from it.

==================  ==================================================================
config.json         model name and config, data, arguments of ``fit``, version
model.safetensors   the weights to use: the moving average's where one was kept
state.safetensors   everything that a resume needs, in one file
metrics.jsonl       a JSON object a line: step, losses, seconds, samples_per_second
samples/*.png       samples drawn during training
loss.png            the losses over the steps
tensorboard/        the metrics again, where asked for
==================  ==================================================================
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from fastgen import registry
from fastgen._arguments import check_device, check_path
from fastgen.nn.model import Model
from fastgen.training import checkpoint

__all__ = ["RunDir", "load"]


def _as_json(value: Any) -> Any:
    """``value`` as it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def _registered_name(model: Model) -> str | None:
    """The name that makes this model: the one whose preset agrees with its config, where a class has several."""
    found = None
    for name in registry.names():
        entry = registry.describe(name)
        if entry.model is type(model) and entry.config is type(model.config):
            agrees = all(getattr(model.config, field) == value for field, value in entry.preset.items())
            if agrees and (found is None or len(entry.preset) > len(registry.describe(found).preset)):
                found = name
    return found


def describe_model(model: Model) -> dict[str, Any]:
    """The entries of ``config.json`` that make the model again; the name is None where no registered name makes it."""
    kind = type(model)
    return {
        "model": _registered_name(model),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config": _as_json(dataclasses.asdict(model.config)),
    }


class RunDir:
    """The files of a run directory, as paths: ``config``, ``model``, ``state``, ``metrics``, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.model = path / "model.safetensors"
        self.state = path / "state.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.loss_curve = path / "loss.png"
        self.tensorboard = path / "tensorboard"

    def read_config(self) -> dict[str, Any]:
        """The contents of ``config.json``.

        Raises:
            FileNotFoundError, ValueError: no run is here; the file is not what a run writes.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no run directory {self.path}")
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} is no run directory: config.json is missing")
        try:
            config = json.loads(self.config.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config} is corrupt: {error}") from None
        if not isinstance(config, dict) or not {"model", "config", "data", "fit"} <= config.keys():
            raise ValueError(f"{self.config} was not written by fastgen: it lacks model, config, data or fit")
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``, atomically."""
        checkpoint.write_atomic(self.config, (json.dumps(config, indent=2) + "\n").encode())

    def create_model(self) -> Model:
        """The model of ``config.json``, with fresh weights."""
        config = self.read_config()
        if config["model"] is None:
            raise ValueError(
                f"{self.path} holds a {config['class']}, which has no registered name: make the model yourself, "
                "or register it with fastgen.registry.register before training"
            )
        try:
            return registry.create(config["model"], **config["config"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.config}: {error}") from None


def load(dir: str | Path, *, device: torch.device | str | None = None) -> Model:
    """The trained model of a run directory, in evaluation mode.

    It has the weights to use: the moving average's where training kept one.

    Args:
        dir: what was ``out`` in :func:`fastgen.fit`.
        device: None for CUDA where there is one, else the CPU.

    Raises:
        FileNotFoundError: no run is there, or a file of it is missing; names the file.
        ValueError: a file is corrupt, or does not fit the model; names what.
    """
    check_path("dir", dir)
    check_device(device)
    run = RunDir(Path(dir))
    model = run.create_model()
    tensors, _ = checkpoint.read(run.model)
    checkpoint.load_weights(model, tensors, run.model)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()
