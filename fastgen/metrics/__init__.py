"""Scores of trained models."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import random
from fastgen._arguments import check_device, check_path, check_whole
from fastgen.data import Source
from fastgen.metrics.frechet import frechet_distance
from fastgen.metrics.likelihood import LatentModel, bits_per_dim, elbo, has_elbo, iw_bound
from fastgen.nn.model import Model, split_batch

__all__ = [
    "UNITS",
    "LatentModel",
    "bits_per_dim",
    "elbo",
    "evaluate",
    "frechet_distance",
    "has_elbo",
    "iw_bound",
    "open_scored",
]

UNITS = {
    "samples": ("held-out samples", ""),
    "importance_samples": ("draws of z per sample", ""),
    "elbo_nats": ("ELBO", "nats/sample"),
    "iw_bound_nats": ("importance-weighted bound", "nats/sample"),
    "log_prob_nats": ("log-likelihood", "nats/sample"),
    "bits_per_dim": ("negative log-likelihood", "bits/dim"),
}
"""Label and unit of each number that :func:`evaluate` gives; ``NAME_stderr`` has the unit of NAME."""


def open_scored(
    model_or_dir: Model | str | Path, data: Any = None, split: str = "test", device: torch.device | str | None = None
) -> tuple[Model, Source]:
    """The model, and the data to score it on in the shape that it takes; arguments and errors are those of :func:`evaluate`."""
    from fastgen.training.batches import open_source
    from fastgen.training.run import RunDir, load

    check_device(device)
    if not isinstance(model_or_dir, Model):
        check_path("model_or_dir, unless it is a model,", model_or_dir)
    if isinstance(model_or_dir, Model):
        model = model_or_dir if device is None else model_or_dir.to(device)
        if data is None:
            raise ValueError("evaluate needs data: a model, unlike a run directory, knows none")
    else:
        model = load(model_or_dir, device=device)
        if data is None:
            data = RunDir(Path(model_or_dir)).read_config()["data"]["spec"]
            if data is None:
                raise ValueError(f"the data of {model_or_dir} came from Python: name some to evaluate on")
    return model, open_source(data, model.event_shape, split)


def _mean(name: str, values: list[Tensor]) -> dict[str, float]:
    """Mean over the samples and its standard error."""
    x = torch.cat(values).double()
    return {name: x.mean().item(), f"{name}_stderr": x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan}


def _levels(model: Model) -> int:
    """Grey levels that a density on [0, 1] has to be scaled by; 1 where the decoder gives a probability mass."""
    return 1 if getattr(model.config, "likelihood", None) == "bernoulli" else getattr(model.config, "grey_levels", 0) or 256


@torch.no_grad()
def evaluate(
    model_or_dir: Model | str | Path,
    data: Any = None,
    *,
    split: Literal["train", "test"] = "test",
    n: int | None = None,
    importance_samples: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Score a model on held-out data by its likelihood, exact or bounded.

    Args:
        model_or_dir: a model, or a run directory of :func:`fastgen.fit`.
        data: anything :func:`fastgen.data.as_source` takes; None takes the run's own data.
        split: which part of named data to take: "train" or "test".
        n: score the first n samples only.
        importance_samples: draws of z per sample in the importance-weighted bound.
        seed: of those draws, and of the noise that dequantises images; sample i is scored with the same draws for any batch
            size.

    Returns:
        ``samples`` (their count) and, for a model with an ELBO, ``elbo_nats``, ``iw_bound_nats`` and
        ``importance_samples``; for a model with ``log_prob``, ``log_prob_nats``; for one with a variational ``bound``,
        ``elbo_nats``. Means over the samples, each with its standard error as ``NAME_stderr``. For images also
        ``bits_per_dim`` of the tightest of them: of 8-bit values for a density on [0, 1] or a probability of grey levels, of
        the pixels as probabilities for a Bernoulli decoder.

    Raises:
        ValueError: no data, data of another shape, a model that has no likelihood.
    """
    model, source = open_scored(model_or_dir, data, split, device)
    log_prob = getattr(model, "log_prob", None)
    draws = log_prob is not None and "key" in inspect.signature(log_prob).parameters  # dequantisation noise
    bounded = model if has_elbo(model) else None
    bound = getattr(model, "bound", None)
    if log_prob is None and bounded is None and bound is None:
        raise ValueError(f"{type(model).__name__} has neither log_prob nor an ELBO: there is no likelihood to evaluate")
    check_whole("batch_size", batch_size, 1)
    check_whole("importance_samples", importance_samples, 1)
    check_whole("seed", seed)
    if n is not None:
        check_whole("n", n, 1)
    count = len(source) if n is None else min(n, len(source))
    columns: dict[str, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        for first in _progress(range(0, count, batch_size), "scoring", progress):
            x = split_batch(source.batch(torch.arange(first, min(first + batch_size, count))))[0].to(model.device)
            key = random.key(seed, stream=random.Stream.EVALUATE, sample=first, device=model.device)
            if log_prob is not None:
                columns.setdefault("log_prob_nats", []).append(log_prob(x, key=key) if draws else log_prob(x))
            if bound is not None:
                columns.setdefault("elbo_nats", []).append(-bound(x, key=key).total)
            if bounded is not None:
                columns.setdefault("elbo_nats", []).append(elbo(bounded, x, key=key))
                weighted = iw_bound(bounded, x, importance_samples, key=random.at(key, step=1))
                columns.setdefault("iw_bound_nats", []).append(weighted)
    finally:
        model.train(was_training)
    scores: dict[str, float] = {"samples": count}
    for name, values in columns.items():
        scores |= _mean(name, values)
    if bounded is not None:
        scores["importance_samples"] = importance_samples
    if source.kind == "image":
        tightest = next(scores[name] for name in ("log_prob_nats", "iw_bound_nats", "elbo_nats") if name in scores)
        # a bound is on the probability of grey levels, not on a density
        levels = 1 if log_prob is None and bound is not None else _levels(model)
        scores["bits_per_dim"] = bits_per_dim(tightest, model.event_shape, levels=levels)
    return scores


def _progress(steps: range, text: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc=text, disable=not shown, leave=False)
