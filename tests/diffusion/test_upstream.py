"""diffusers' own trajectories, step by step and with the same noise, for every sampler that both have.

States are compared where the network sees them, to 1e-5 of their scale: the tables have upstream's rounding.
"""

import importlib
import math

import diffusers
import pytest
import torch

from fastgen import random
from fastgen.diffusion.loop import run, tabulate
from fastgen.diffusion.samplers import DDIM, DDPM, LMS, DPMSolver, Euler, EulerAncestral, Heun, UniPC
from fastgen.diffusion.schedules import Discrete, Flow, betas, target_rows
from fastgen.diffusion.upstream import upstream_chain, upstream_grid, upstream_plan

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

STEPS = 50
CHAIN = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = {
    "ddpm-small": (diffusers.DDPMScheduler, {"clip_sample": False}, DDPM()),
    "ddpm-large": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_large"}, DDPM("large")),
    "ddpm-clipped": (diffusers.DDPMScheduler, {"clip_sample": True}, DDPM()),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, DDIM()),
    "ddim-eta": (diffusers.DDIMScheduler, {"clip_sample": False}, DDIM(0.7)),
    "ddim-clipped": (diffusers.DDIMScheduler, {"clip_sample": True}, DDIM()),
    "euler": (diffusers.EulerDiscreteScheduler, {}, Euler()),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, EulerAncestral()),
    "heun": (diffusers.HeunDiscreteScheduler, {}, Heun()),
    "lms": (diffusers.LMSDiscreteScheduler, {}, LMS()),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}, DPMSolver()),
    "dpmpp-2m-heun": (diffusers.DPMSolverMultistepScheduler, {"solver_type": "heun"}, DPMSolver(solver="heun")),
    "dpmpp-2m-sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        DPMSolver(stochastic=True),
    ),
    "dpmpp-3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, DPMSolver(3)),
    "dpmpp-3m-sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        DPMSolver(3, stochastic=True),
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, UniPC()),
    "unipc-3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, UniPC(3)),
}
TARGETS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def network(target, schedule=None):
    """A network that depends on all it is given; of the noise, one whose estimate of the data stays small."""
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(3)) * 0.3

    def evaluate(x, time):
        out = torch.tanh(x.flatten(1) @ weight + torch.sin(time / 200)[:, None]).reshape(x.shape)
        if target == "epsilon":
            # the noise that belongs to an estimate of the data made as above
            alpha, sigma = (value.float()[:, None, None, None] for value in schedule.at(time.double()))
            return (x - alpha * 0.5 * out) / sigma
        return out

    return evaluate


def their_trajectory(monkeypatch, scheduler, evaluate, start, noise, **options):
    """What the network sees at each evaluation, and the end."""
    draws = iter(noise)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(draws), raising=False)
    x, seen = start * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        seen.append(shown.clone())
        x = scheduler.step(evaluate(shown, torch.full((len(x),), float(t))), t, x, **options).prev_sample
    return [*seen, x]


def our_trajectory(schedule, sampler, target, spacing, evaluate, start, noise, clamp=None, time_scale=1.0):
    plan = upstream_plan(sampler, upstream_grid(schedule, STEPS, sampler.layout, spacing))
    table = tabulate(plan, lambda a, s: target_rows(target, a, s), schedule, time_scale=time_scale)
    seen = []

    def watched(x, time):
        seen.append(x.clone())
        return evaluate(x, time)

    end = run(watched, start, table, random.key(0), noise=noise.__getitem__, clamp=clamp)
    return [*seen, end], table.time


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_trajectory(case, target, spacing, monkeypatch):
    kind, options, sampler = CASES[case]
    if case == "euler-ancestral" and target == "x0":
        pytest.skip("upstream does not have it")
    scheduler = kind(prediction_type=TARGETS[target], timestep_spacing=spacing, **CHAIN, **options)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, 2, 2, generator=generator)
    noise = torch.randn(2 * STEPS, 4, 3, 2, 2, generator=generator)
    chain = upstream_chain(betas("scaled_linear", start=0.00085, end=0.012, dtype=torch.float32))
    assert torch.equal(chain.alphas_cumprod.float(), scheduler.alphas_cumprod)
    evaluate = network(target, chain)
    extra = {"eta": sampler.eta, "use_clipped_model_output": True} if isinstance(sampler, DDIM) and "ddim" in case else {}
    theirs = their_trajectory(monkeypatch, scheduler, evaluate, start, noise, **extra)
    clamp = 1.0 if case.endswith("clipped") else None
    ours, times = our_trajectory(chain, sampler, target, spacing, evaluate, theirs[0], noise, clamp)
    torch.testing.assert_close(times, scheduler.timesteps.float(), rtol=1e-6, atol=1e-4)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_trajectory(shift, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    evaluate = network("velocity")
    theirs = their_trajectory(monkeypatch, scheduler, evaluate, start, [])
    none = torch.zeros(STEPS, *start.shape)
    ours, times = our_trajectory(Flow(shift), Euler(), "velocity", None, evaluate, start, none, time_scale=1000.0)
    torch.testing.assert_close(times, scheduler.timesteps.float(), rtol=1e-5, atol=1e-3)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_karras_spacing_is_that_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="linspace", **CHAIN)
    scheduler.set_timesteps(20)
    grid = Discrete(betas("scaled_linear", start=0.00085, end=0.012)).grid(20, "karras")
    torch.testing.assert_close((grid.sigma / grid.alpha).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid.time.float(), scheduler.timesteps, rtol=1e-4, atol=2e-2)


def test_ddim_steps_back_to_the_next_time_unless_told_otherwise():
    """30 trailing steps: upstream goes back by 33 each, past the next time of its own table."""
    chain = Discrete(betas("linear"))
    right, upstream = chain.grid(30, "trailing"), upstream_grid(chain, 30, "stride", "trailing")
    assert torch.equal(right.time, upstream.time)
    assert torch.equal(right.next_time[:-1], right.time[1:])
    wrong = int((upstream.next_time[:-1] != upstream.time[1:]).sum()) + int(upstream.next_time[-1] >= 0)
    assert wrong == 10


def test_large_variance_of_the_last_step():
    """Upstream adds noise to the result where the last step starts above t = 0; ours does only when asked to follow."""
    chain = Discrete(betas("linear"))
    grid = upstream_grid(chain, 10, "index", "trailing")
    assert DDPM("large").plan(grid).rows[-1, 2] == 0
    assert upstream_plan(DDPM("large"), grid).rows[-1, 2] == pytest.approx(math.sqrt(float(1 - chain.alphas_cumprod[99])))


def test_errors():
    from fastgen.diffusion.schedules import VP

    with pytest.raises(ValueError, match="chains and flows, not for VP"):
        upstream_grid(VP(), 10, "sigma")
