"""Peers of the sampler step and of noising: diffusers' schedulers, as its pipelines and training scripts call them.

Coefficients of a workload are arbitrary numbers, those of a scheduler are its own: the checks compare both on the scheduler's
coefficients, with the noise that it draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity import ParityError
from benchmarks.peer import Peer
from benchmarks.workload import bind
from fastgen.ops.denoise import denoise_reference
from fastgen.ops.diffuse import diffuse_reference

__all__ = ["PEERS"]

_STEP = 500
"""Where in its chain a scheduler is timed: away from the special cases of both ends."""
_INFERENCE_STEPS = 50


def _same(got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, mine, theirs in zip(names, got, expected, strict=True):
        if mine.shape != theirs.shape or not torch.allclose(mine.double(), theirs.double(), rtol=1e-4, atol=1e-4):
            raise ParityError(f"{name} differs from the reference on the same coefficients and noise")


def _times(x0: Tensor) -> Tensor:
    return torch.randint(0, 1000, (len(x0),), generator=torch.Generator().manual_seed(3)).to(x0.device)


def _chain_rows(t: Tensor, scheduler: Any) -> Tensor:
    """Rows (a, b, c, d) of noising to the times ``t`` and predicting the noise."""
    kept = scheduler.alphas_cumprod.to(t.device)[t]
    return torch.stack([kept.sqrt(), (1 - kept).sqrt(), torch.zeros_like(kept), torch.ones_like(kept)], 1)


def _add_noise(inputs: dict[str, Any], noise: Tensor | None = None) -> Callable[[], tuple[Tensor, Tensor]]:
    from diffusers import DDPMScheduler

    scheduler, x0 = DDPMScheduler(), inputs["x0"]
    t = _times(x0)

    def call() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0) if noise is None else noise
        return scheduler.add_noise(x0, eps, t), eps

    return call


def _check_add_noise(inputs: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    x0 = inputs["x0"]
    noise = torch.randn_like(x0)
    expected = diffuse_reference(x0.double(), _chain_rows(_times(x0), DDPMScheduler()), noise=noise.double())
    assert expected.target is not None
    _same(_add_noise(inputs, noise)(), (expected.x_t, expected.target), ("x_t", "target"))


def _objective(inputs: dict[str, Any], mode: str, noise: Tensor | None = None) -> Callable[[], Any]:
    """The lines of diffusers' training scripts between the data and the gradient of the network's output."""
    from diffusers import DDPMScheduler

    scheduler, t = DDPMScheduler(), _times(inputs["x0"])

    def objective(x0: Tensor, model_out: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0) if noise is None else noise
        return scheduler.add_noise(x0, eps, t), F.mse_loss(model_out, eps)

    return bind(objective, {name: inputs[name] for name in ("x0", "model_out")}, mode, ("model_out",))


def _check_objective(inputs: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    from benchmarks.composites import diffusion_objective_reference

    x0 = inputs["x0"]
    noise, rows = torch.randn_like(x0), _chain_rows(_times(x0), DDPMScheduler())
    ours = {"x0": x0.double(), "model_out": inputs["model_out"].double(), "coefficients": rows, "noise": noise.double()}
    with torch.enable_grad():
        expected = bind(diffusion_objective_reference, ours, "fwdbwd", ("model_out",))()
        _same(_objective(inputs, "fwdbwd", noise)(), expected, ("x_t", "loss", "gradient of model_out"))


def _ddpm_step(inputs: dict[str, Any], mode: str, seed: int | None = None) -> Callable[[], Any]:
    from diffusers import DDPMScheduler

    scheduler, x, m = DDPMScheduler(), inputs["x"], inputs["model_out"]
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)

    def call() -> tuple[Tensor, Tensor]:
        out = scheduler.step(m, _STEP, x, generator=generator)
        return out.prev_sample, out.pred_original_sample

    return call


def _posterior(kept: Tensor, before: Tensor) -> Tensor:
    """(p, q, A, B, S) of the posterior of Ho et al., the noise being predicted, from cumulative products at t and t - 1."""
    alpha = kept / before
    p, q = 1 / kept.sqrt(), -((1 - kept) / kept).sqrt()
    A, B = alpha.sqrt() * (1 - before) / (1 - kept), before.sqrt() * (1 - alpha) / (1 - kept)
    return torch.stack([p, q, A, B, ((1 - alpha) * (1 - before) / (1 - kept)).sqrt()])


def _check_ddpm(inputs: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    x, kept = inputs["x"], DDPMScheduler().alphas_cumprod.double()
    noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(3), device=x.device, dtype=x.dtype)
    row = _posterior(kept[_STEP], kept[_STEP - 1]).to(x.device)
    expected = denoise_reference(x, inputs["model_out"], row, noise=noise, clamp=1.0)
    assert expected.x0 is not None
    _same(_ddpm_step(inputs, "fwd", seed=3)(), (expected.x_next, expected.x0), ("x_next", "x0"))


def _eager_step(x: Tensor, m: Tensor, row: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A DDPM step as it is written by hand."""
    p, q, A, B, S = row.unbind()
    x0 = (p * x + q * m).clamp(-1, 1)
    z = torch.randn_like(x) if noise is None else noise
    return A * x + B * x0 + S * z, x0


@functools.cache
def _compiled_step() -> Callable[..., Any]:
    return torch.compile(_eager_step, dynamic=False)


def _hand_written(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any], str], Callable[[], Any]]:
    def build(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
        step, arguments = function(), (inputs["x"], inputs["model_out"], inputs["coefficients"])
        return lambda: step(*arguments)

    return build


def _check_hand_written(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any]], None]:
    def check(inputs: dict[str, Any]) -> None:
        x, m, row = inputs["x"], inputs["model_out"], inputs["coefficients"]
        noise = torch.randn_like(x)
        expected = denoise_reference(x, m, row, noise=noise, clamp=1.0)
        assert expected.x0 is not None
        _same(function()(x, m, row, noise), (expected.x_next, expected.x0), ("x_next", "x0"))

    return check


def _ddim_step(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    from diffusers import DDIMScheduler

    scheduler, x, m = DDIMScheduler(clip_sample=False), inputs["x"], inputs["model_out"]
    scheduler.set_timesteps(_INFERENCE_STEPS)

    def call() -> tuple[Tensor, Tensor]:
        out = scheduler.step(m, _STEP, x)
        return out.prev_sample, out.pred_original_sample

    return call


def _check_ddim(inputs: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    kept = DDIMScheduler().alphas_cumprod.double()
    kept, before = kept[_STEP], kept[_STEP - 1000 // _INFERENCE_STEPS]
    p, q = 1 / kept.sqrt(), -((1 - kept) / kept).sqrt()
    A = ((1 - before) / (1 - kept)).sqrt()
    row = torch.stack([p, q, A, before.sqrt() - kept.sqrt() * A, torch.zeros_like(p)]).to(inputs["x"].device)
    expected = denoise_reference(inputs["x"], inputs["model_out"], row)
    assert expected.x0 is not None
    _same(_ddim_step(inputs, "fwd")(), (expected.x_next, expected.x0), ("x_next", "x0"))


_MULTISTEP_INDEX = 25


def _multistep(inputs: dict[str, Any]) -> tuple[Any, Callable[[], Tensor]]:
    """DPM-Solver++ (2M) in the middle of its trajectory, where it combines two estimates, and a call that takes that step."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler, x, m = DPMSolverMultistepScheduler(), inputs["x"], inputs["model_out"]
    scheduler.set_timesteps(_INFERENCE_STEPS)
    for t in scheduler.timesteps[:2]:
        scheduler.step(m, t, x)
    # the estimate of the step before
    scheduler.model_outputs[-1] = inputs["history"][0]
    now = scheduler.timesteps[_MULTISTEP_INDEX]

    def call() -> Tensor:
        scheduler._step_index = _MULTISTEP_INDEX  # a step moves on by itself
        return scheduler.step(m, now, x).prev_sample

    return scheduler, call


def _check_multistep(inputs: dict[str, Any]) -> None:
    scheduler, call = _multistep(inputs)
    sigmas = scheduler.sigmas.double()[_MULTISTEP_INDEX - 1 : _MULTISTEP_INDEX + 2]
    alpha = 1 / (1 + sigmas.square()).sqrt()
    sigma, lam = sigmas * alpha, -sigmas.log()
    h, share = lam[2] - lam[1], (lam[2] - lam[1]) / (lam[1] - lam[0]) / 2
    pull = alpha[2] * torch.expm1(-h)
    columns = [1 / alpha[1], -sigma[1] / alpha[1], sigma[2] / sigma[1], -pull * (1 + share), 0 * pull, pull * share]
    row = torch.stack(columns).to(inputs["x"].device)
    expected = denoise_reference(inputs["x"], inputs["model_out"], row, history=inputs["history"])
    estimate = expected.x0
    assert estimate is not None
    _same((call(), scheduler.model_outputs[-1]), (expected.x_next, estimate), ("x_next", "x0"))


_DDPM_FLAGS = {"history": 0, "clamp": 1.0}
_DDIM_FLAGS = {"history": 0, "deterministic": True}
_MULTISTEP_FLAGS = {"deterministic": True}

PEERS: dict[str, list[Peer]] = {
    "diffuse": [
        Peer(
            "diffusers add_noise + randn_like",
            lambda inputs, mode: _add_noise(inputs),
            _check_add_noise,
            when=lambda flags: not flags.get("given"),
            modes=("fwd",),
        )
    ],
    "diffusion_objective": [
        Peer("diffusers add_noise + F.mse_loss", _objective, _check_objective),
    ],
    "denoise": [
        Peer("diffusers DDPMScheduler.step", _ddpm_step, _check_ddpm, lambda flags: flags == _DDPM_FLAGS, ("fwd",)),
        Peer(
            "eager PyTorch",
            _hand_written(lambda: _eager_step),
            _check_hand_written(lambda: _eager_step),
            lambda flags: flags == _DDPM_FLAGS,
            ("fwd",),
        ),
        Peer(
            "torch.compile of it",
            _hand_written(_compiled_step),
            _check_hand_written(_compiled_step),
            lambda flags: flags == _DDPM_FLAGS,
            ("fwd",),
        ),
        Peer("diffusers DDIMScheduler.step", _ddim_step, _check_ddim, lambda flags: flags == _DDIM_FLAGS, ("fwd",)),
        Peer(
            "diffusers DPMSolverMultistepScheduler.step",
            lambda inputs, mode: _multistep(inputs)[1],
            _check_multistep,
            lambda flags: flags == _MULTISTEP_FLAGS,
            ("fwd",),
        ),
    ],
}
