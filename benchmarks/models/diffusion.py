"""Diffusion against diffusers: the same U-Net on the same weights, sampling, the loop without a network, and training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.case import Case, Goal, Side
from benchmarks.models.common import difference, training_step
from fastgen import ops, random
from fastgen.diffusion.ddpm import DDPM, DDPMConfig
from fastgen.diffusion.loop import run
from fastgen.diffusion.samplers import make_sampler
from fastgen.diffusion.upstream import upstream_plan
from fastgen.nn.inference import optimize

__all__ = ["CASES"]

_FLOAT32, _BFLOAT16, _DIFFUSERS = "fastgen float32", "fastgen bfloat16", "diffusers"

CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
"""google/ddpm-cifar10-32: 35.7 million parameters."""
SMALL = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 16,
}
"""About a million parameters, for digits."""
TINY = {**SMALL, "sample_size": 8, "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def _theirs(config: Mapping[str, Any]) -> Any:
    """A ``UNet2DModel`` with random weights, always the same."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**config).eval()


def _ours(config: Mapping[str, Any]) -> nn.Module:
    """Our U-Net with the weights of :func:`_theirs`."""
    from fastgen.interop.diffusers.weights import unet_from_diffusers

    return unet_from_diffusers(config, _theirs(config).state_dict())


def _event(config: Mapping[str, Any]) -> tuple[int, int, int]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def _start(n: int, config: Mapping[str, Any]) -> Tensor:
    return torch.randn(n, *_event(config), generator=torch.Generator().manual_seed(1))


_SAME = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}
"""How far a network in a storage type may be from diffusers in float32."""


def _network(config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """Ours as it is (None), or as it is used for sampling in a storage type."""
    return _ours(config) if dtype is None else optimize(_ours(config), dtype=dtype)


def _evaluation(tiny: bool) -> dict[str, Callable[[], Side]]:
    config, n = (TINY, 2) if tiny else (CIFAR10, 8)
    x, t = _start(n, config), torch.full((n,), 500.0)

    def ours(dtype: torch.dtype) -> Side:
        network = _network(config, dtype)

        @torch.no_grad()
        def call() -> Tensor:
            return network(x, t)

        return Side(call, lambda: difference(call(), theirs().call(), _SAME[dtype]))

    def theirs() -> Side:
        network = _theirs(config)

        @torch.no_grad()
        def call() -> Tensor:
            return network(x, t).sample

        return Side(call)

    return _named(ours, theirs)


def _named(ours: Callable[[torch.dtype], Side], theirs: Callable[[], Side]) -> dict[str, Callable[[], Side]]:
    return {
        _FLOAT32: functools.partial(ours, torch.float32),
        _BFLOAT16: functools.partial(ours, torch.bfloat16),
        _DIFFUSERS: theirs,
    }


def _model(config: Mapping[str, Any], network: nn.Module) -> DDPM:
    model = DDPM(DDPMConfig(event_shape=_event(config), widths=(8,), attention_levels=()))
    model.network = network
    return model.eval()


def _sampling(kind: str, config: Mapping[str, Any], n: int, steps: int, tiny: bool) -> dict[str, Callable[[], Side]]:
    """A pipeline of diffusers against ``sample`` of our model, both in ``steps`` steps.

    The DDIM pipeline does not clip: clipped, diffusers combines an estimate with a prediction that contradicts it.
    """
    config, n, steps = (TINY, 2, 2) if tiny else (config, n, steps)

    def pipeline() -> Any:
        import diffusers

        pipe = (
            diffusers.DDIMPipeline(_theirs(config), diffusers.DDIMScheduler(clip_sample=False))
            if kind == "ddim"
            else diffusers.DDPMPipeline(_theirs(config), diffusers.DDPMScheduler())
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def images(pipe: Any, seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found = pipe(batch_size=n, generator=generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def ours(dtype: torch.dtype) -> Side:
        model = _model(config, _network(config, dtype))
        options: dict[str, Any] = {"sampler": kind, "steps": steps, "clamp": kind == "ddpm", "compat": "diffusers"}

        def check() -> float:
            """From the start and the noise that the pipeline draws."""
            generator = torch.Generator().manual_seed(5)
            x = torch.randn(n, *_event(config), generator=generator)
            sampler = make_sampler(kind)
            table = model.table(upstream_plan(sampler, model.grid(sampler, steps, compat="diffusers")))
            clamp = 1.0 if kind == "ddpm" else None

            def noise(step: int) -> Tensor:
                last = step == steps - 1 or kind == "ddim"
                return torch.zeros_like(x) if last else torch.randn(x.shape, generator=generator)

            x = run(model.network, x, table, random.key(0), clamp=clamp, noise=noise)
            return difference(model.decode_range(x), images(pipeline(), 5), 10 * _SAME[dtype])

        return Side(lambda: model.sample(n, key=random.key(7), **options), check)

    def theirs() -> Side:
        pipe = pipeline()
        return Side(lambda: images(pipe))

    return _named(ours, theirs)


def _ddim(tiny: bool) -> dict[str, Callable[[], Side]]:
    return _sampling("ddim", CIFAR10, 8, 5, tiny)


def _ddpm(tiny: bool) -> dict[str, Callable[[], Side]]:
    return _sampling("ddpm", SMALL, 64, 10, tiny)


def _loop(shape: tuple[int, ...], tiny: bool) -> dict[str, Callable[[], Side]]:
    """Ancestral sampling where the network is a tensor that lies ready."""
    shape, steps = ((2, *shape[1:]) if tiny else shape), 50
    out = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    event = shape[1:]

    def ours() -> Side:
        model = DDPM(DDPMConfig(event_shape=event, network="mlp", width=8, layers=1))
        sampler = make_sampler("ddpm")
        plan = upstream_plan(sampler, model.grid(sampler, steps, compat="diffusers"))

        def sample(x: Tensor, table: Any, noise: Callable[[int], Tensor] | None = None) -> Tensor:
            return model.decode_range(run(lambda x, t: out, x, table, random.key(7), clamp=1.0, noise=noise))

        def call() -> Tensor:
            return sample(ops.normal(shape, random.key(3)), model.table(plan))

        def check() -> float:
            generator = torch.Generator().manual_seed(5)
            x = torch.randn(shape, generator=generator)

            def noise(step: int) -> Tensor:
                return torch.zeros_like(x) if step == steps - 1 else torch.randn(shape, generator=generator)

            return difference(sample(x, model.table(plan), noise), upstream(5), _SAME[torch.float32])

        return Side(call, check)

    def upstream(seed: int | None = None) -> Tensor:
        """The loop of diffusers' ``DDPMPipeline``."""
        from diffusers import DDPMScheduler
        from diffusers.utils.torch_utils import randn_tensor

        generator = None if seed is None else torch.Generator().manual_seed(seed)
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(steps)
        x = randn_tensor(shape, generator=generator)
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        return (x / 2 + 0.5).clamp(0, 1) if len(event) == 3 else x

    def theirs() -> Side:
        upstream()
        return Side(upstream)

    return {_FLOAT32: ours, _DIFFUSERS: theirs}


def _training(tiny: bool) -> dict[str, Callable[[], Side]]:
    """Noising, network, loss, gradients and a step of Adam."""
    config, n = (TINY, 2) if tiny else (SMALL, 64)
    x = _start(n, config)
    t = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def prepared(parameters: list[nn.Parameter], loss: Callable[[Tensor | None], Tensor]) -> tuple[Any, Any]:
        """A training step; and the loss with the norm of its gradient on given noise."""

        def signature() -> Tensor:
            value = loss(noise)
            grads = torch.autograd.grad(value, parameters)
            return torch.stack([value.detach(), torch.cat([g.flatten() for g in grads]).norm()])

        return training_step(parameters, lambda: loss(None)), signature

    def make_ours() -> tuple[Any, Any]:
        model = _model(config, _ours(config).train())
        rows = model.row_table[t]

        def loss(noise: Tensor | None) -> Tensor:
            key = random.fresh_key(x.device)
            return model.denoising_loss(x, t.float(), rows, key, noise=noise).mean()

        return prepared(list(model.network.parameters()), loss)

    def make_theirs() -> tuple[Any, Any]:
        from diffusers import DDPMScheduler

        network, scheduler = _theirs(config).train(), DDPMScheduler()

        def loss(noise: Tensor | None) -> Tensor:
            eps = torch.randn_like(x) if noise is None else noise
            return F.mse_loss(network(scheduler.add_noise(x, eps, t), t).sample, eps)

        return prepared(list(network.parameters()), loss)

    def ours() -> Side:
        return Side(make_ours()[0], lambda: difference(make_ours()[1](), make_theirs()[1](), 1e-3))

    return {_FLOAT32: ours, _DIFFUSERS: lambda: Side(make_theirs()[0])}


CASES = (
    Case(
        "unet",
        "U-Net of ddpm-cifar10 (35.7 M), batch 8",
        "one evaluation",
        _evaluation,
        (Goal(_BFLOAT16, (_DIFFUSERS,), 3), Goal(_FLOAT32, (_DIFFUSERS,), 1.2)),
    ),
    Case(
        "ddim",
        "DDIM sampling, that network, batch 8, against DDIMPipeline",
        "5 steps, all alike",
        _ddim,
        (Goal(_BFLOAT16, (_DIFFUSERS,), 3), Goal(_FLOAT32, (_DIFFUSERS,), 3)),
        rounds=3,
    ),
    Case(
        "ddpm",
        "DDPM sampling, U-Net of ~1 M, 64x1x28x28, against DDPMPipeline",
        "10 steps, all alike but the last",
        _ddpm,
        (Goal(_BFLOAT16, (_DIFFUSERS,), 2), Goal(_FLOAT32, (_DIFFUSERS,), 1.15)),
        rounds=3,
    ),
    Case(
        "loop-images",
        "sampling loop without its network, 64x1x28x28",
        "50 DDPM steps",
        functools.partial(_loop, (64, 1, 28, 28)),
        (Goal(_FLOAT32, (_DIFFUSERS,), 8),),
        rounds=15,
    ),
    Case(
        "loop-points",
        "sampling loop without its network, 100,000 points in 2-D",
        "50 DDPM steps",
        functools.partial(_loop, (100_000, 2)),
        (Goal(_FLOAT32, (_DIFFUSERS,), 8),),
        rounds=15,
    ),
    Case(
        "diffusion-training",
        "training step, U-Net of ~1 M, 64x1x28x28, Adam, against add_noise + F.mse_loss",
        "one step",
        _training,
        (Goal(_FLOAT32, (_DIFFUSERS,), 1.05), Goal(_FLOAT32, (_DIFFUSERS,), 1.25, of="memory")),
        memory=True,
    ),
)
