"""Proof that a network of diffusers and ours with its weights are the same function, layer by layer, and that a scheduler and
ours take it along the same trajectory, step by step.

Hooks record what every residual block, attention, resampling layer and outer convolution gives, in both networks in one call
each; layers meet by name, as their weights do. Trajectories start from the same noise and draw from generators of one seed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen import _extras
from fastgen.autoencoders.autoencoder_kl import AutoencoderKL
from fastgen.interop.diffusers.weights import autoencoder_kl_from_diffusers, our_names, read, unet_from_diffusers
from fastgen.nn.attention import ImageAttention
from fastgen.nn.conv import Conv2d
from fastgen.nn.inference import fast_dtype, optimize
from fastgen.nn.resnet import Downsample, ResBlock, Upsample
from fastgen.nn.time import TwoLayers
from fastgen.nn.unet import UNet

__all__ = [
    "Difference",
    "Pair",
    "Timing",
    "Trajectories",
    "layer_differences",
    "load_pair",
    "load_schedulers",
    "step_differences",
    "timings",
]

_LAYERS = (ResBlock, ImageAttention, Downsample, Upsample, TwoLayers)


class Difference(NamedTuple):
    """How far ours is from theirs in one place."""

    name: str
    """In diffusers."""
    shape: tuple[int, ...]
    absolute: float
    """Largest absolute difference."""
    relative: float
    """``absolute`` over the largest value of theirs."""


class Timing(NamedTuple):
    """What one evaluation costs."""

    name: str
    seconds: float
    """Median of the rounds."""
    ratio: float
    """Median over the rounds of theirs over this one's, timed one after the other."""
    relative_error: float
    """Euclidean, of the result, against theirs."""


class Trajectories(NamedTuple):
    """Two samplers side by side."""

    differences: list[Difference]
    """Of the start and of the state after every step."""
    seconds_theirs: float
    seconds: float
    """Of one run each, networks included."""


class Pair(NamedTuple):
    """A network of diffusers and ours with its weights, and a call of each on the same random input."""

    theirs: Any
    ours: UNet | AutoencoderKL
    call_theirs: Callable[[], Tensor]
    call: Callable[[nn.Module], Tensor]
    """Calls ours, or an optimised copy of it."""


def difference(name: str, theirs: Tensor, ours: Tensor) -> Difference:
    """The difference of two tensors of one shape."""
    absolute = (theirs.double() - ours.double()).abs().max().item()
    return Difference(name, tuple(theirs.shape), absolute, absolute / max(theirs.abs().max().item(), 1e-30))


def load_pair(path: str | Path, *, batch_size: int = 8, size: int | None = None, seed: int = 0) -> Pair:
    """The network of a folder of ``save_pretrained`` in diffusers and here.

    Args:
        path: folder of a ``UNet2DModel``, an ``AutoencoderKL`` or a pipeline with one.
        batch_size: samples of the input.
        size: its height and width; None: what the network was made for.
        seed: of the input.
    """
    diffusers = _extras.require("diffusers", package="diffusers", extra="bench", purpose="parity with diffusers")
    kind, config, weights = read(path)
    theirs = getattr(diffusers, kind).from_config(config)
    theirs.load_state_dict(theirs._fix_state_dict_keys_on_load(dict(weights)))
    theirs.eval()
    if size is None:
        made_for = config.get("sample_size") or 32
        height, width = (made_for, made_for) if isinstance(made_for, int) else made_for
    else:
        height = width = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, theirs.config.in_channels, height, width, generator=generator)
    if kind == "AutoencoderKL":
        x = 2 * torch.sigmoid(x) - 1
        return Pair(
            theirs,
            autoencoder_kl_from_diffusers(config, weights),
            lambda: theirs.decode(theirs.encode(x).latent_dist.mode()).sample,
            lambda net: 2 * net.decode(net.encode((x + 1) / 2).mean) - 1,  # type: ignore[operator]
        )
    ours = unet_from_diffusers(config, weights)
    t = torch.tensor([500.0 if theirs.config.time_embedding_type == "positional" else 5.0])
    t = t.long() if theirs.config.time_embedding_type == "learned" else t
    labels = _labels(theirs.config, batch_size, ours, generator)
    return Pair(theirs, ours, lambda: theirs(x, t, labels).sample, lambda net: net(x, t, labels=labels))


def _labels(config: Mapping[str, Any], n: int, ours: Any, generator: torch.Generator) -> Tensor | None:
    if config["class_embed_type"] == "identity":
        return torch.randn(n, ours.conditioning.outputs, generator=generator)
    if config["class_embed_type"] == "timestep":
        return 10 * torch.rand(n, generator=generator)
    if config["num_class_embeds"] is None:
        return None
    return torch.randint(config["num_class_embeds"], (n,), generator=generator)


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    results: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                results[name] = result.detach().clone()

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield results
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_differences(pair: Pair) -> list[Difference]:
    """The difference after every layer, in the order in which diffusers runs them, and of the result ("output")."""
    ours = {
        name: module
        for name, module in pair.ours.named_modules()
        if isinstance(module, _LAYERS)
        or (isinstance(module, Conv2d) and name.endswith(("conv_in", "conv_out", "after_encoder", "before_decoder")))
    }
    theirs = {name: module for name, module in pair.theirs.named_modules() if name and pair_name(name, pair.ours) in ours}
    met = {pair_name(name, pair.ours) for name in theirs}
    if met != set(ours):
        raise ValueError(f"layers without a counterpart in diffusers: {', '.join(sorted(set(ours) - met))}")
    with _recorded(theirs) as expected, _recorded(ours) as got:
        result = pair.call_theirs()
        own = pair.call(pair.ours)
    rows = [difference(name, value, got[pair_name(name, pair.ours)]) for name, value in expected.items()]
    return [*rows, difference("output", result, own)]


def load_schedulers(path: str | Path) -> tuple[Any, Any] | str:
    """The scheduler of a pipeline's folder, in diffusers and here; where there is none, or none here, a line that says so."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return f"no sampler was compared: {file.parent} holds no scheduler"
    diffusers = _extras.require("diffusers", package="diffusers", extra="bench", purpose="parity with diffusers")
    config = json.loads(file.read_text())
    name = config["_class_name"]
    library = importlib.import_module("fastgen.interop.diffusers")
    if name not in library.__all__:
        return f"no sampler was compared: {name} has no counterpart here"
    return getattr(diffusers, name).from_config(config), getattr(library, name).from_config(config)


def trajectory(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, seed: int) -> list[Tensor]:
    """The states of a scheduler's loop, with diffusers' verbs: the first is ``x`` in its scale, then one for each step."""
    generator = torch.Generator().manual_seed(seed)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    named = {"generator": generator} if takes_generator else {}
    scheduler.set_timesteps(steps)
    # the schedulers of flows in diffusers have neither
    scale: Callable[[Tensor, Tensor], Tensor] = getattr(scheduler, "scale_model_input", lambda x, t: x)
    states = [x * getattr(scheduler, "init_noise_sigma", 1.0)]
    for t in scheduler.timesteps:
        out = network(scale(states[-1], t), t)
        states.append(scheduler.step(out, t, states[-1], **named).prev_sample)
    return states


@torch.no_grad()
def step_differences(
    pair: Pair, theirs: Any, ours: Any, *, steps: int = 10, batch_size: int = 2, size: int | None = None, seed: int = 0
) -> Trajectories:
    """The difference of the states after every step, each side with its own network and its own scheduler.

    Args:
        pair: a U-Net of diffusers and ours.
        theirs, ours: schedulers with diffusers' verbs.
        steps: of both.
        batch_size, size, seed: of the noise that both start from.
    """
    side = size or pair.theirs.config.sample_size or 32
    height, width = (side, side) if isinstance(side, int) else side
    channels = pair.theirs.config.in_channels
    x = torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(seed))
    labels = _labels(pair.theirs.config, batch_size, pair.ours, torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    expected = trajectory(theirs, lambda x, t: pair.theirs(x, t, labels).sample, x, steps, seed)
    middle = time.perf_counter()
    got = trajectory(ours, lambda x, t: pair.ours(x, t.reshape(1), labels=labels), x, steps, seed)
    end = time.perf_counter()
    times = [float(t) for t in theirs.timesteps]
    if [float(t) for t in ours.timesteps] != times:
        raise ValueError(f"the schedulers disagree on the times: {times} there, {[float(t) for t in ours.timesteps]} here")
    names = ["start", *(f"step {i} from t = {t:g}" for i, t in enumerate(times))]
    differences = [difference(name, a, b) for name, a, b in zip(names, expected, got, strict=True)]
    return Trajectories(differences, middle - start, end - middle)


def pair_name(theirs: str, ours: nn.Module) -> str:
    """Name in our network of a module of diffusers."""
    return our_names(theirs, ours if isinstance(ours, AutoencoderKL) else None)


@torch.no_grad()
def timings(pair: Pair, *, rounds: int = 5) -> list[Timing]:
    """What an evaluation costs in diffusers, here, and with :func:`fastgen.nn.inference.optimize`.

    The contestants take turns, after one warm-up each, so that whatever else the machine does hits all of them.
    """
    nets: dict[str, nn.Module] = {"fastgen": pair.ours}
    for dtype in dict.fromkeys([torch.float32, fast_dtype()]):
        nets[f"fastgen, optimised, {str(dtype).removeprefix('torch.')}"] = optimize(pair.ours, dtype=dtype)
    calls: dict[str, Callable[[], Tensor]] = {"diffusers": pair.call_theirs}
    calls |= {name: functools.partial(pair.call, net) for name, net in nets.items()}
    results = {name: call() for name, call in calls.items()}
    expected = results["diffusers"].double()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return [
        Timing(
            name,
            statistics.median(taken),
            statistics.median(a / b for a, b in zip(seconds["diffusers"], taken, strict=True)),
            ((results[name].double() - expected).norm() / expected.norm()).item(),
        )
        for name, taken in seconds.items()
    ]
