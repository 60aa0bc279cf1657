"""Our schedulers beside diffusers' own: trajectories from the same generators, pipelines, configs, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import math

import numpy as np
import pytest
import torch

from fastgen.diffusion.schedules import betas
from fastgen.interop import diffusers as ours
from fastgen.interop.diffusers import parity
from fastgen.interop.diffusers.parity import load_schedulers

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning"),
]

STEPS = 50
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
CLEAN = {"final_sigmas_type": "sigma_min"}
NOISE = {"algorithm_type": "dpmsolver", **CLEAN}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SVD = {"sigma_min": 0.002, "sigma_max": 700.0}
NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]
INTERNALS = {
    *("alpha_t", "sigma_t", "lambda_t", "is_scale_input_called", "use_karras_sigmas", "use_exponential_sigmas"),
    *("use_beta_sigmas", "one", "custom_timesteps", "variance_type", "predict_x0", "solver_p", "disable_corrector"),
    *("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order", "derivatives", "prev_derivative"),
    *("dt", "sample", "order_list", "prk_timesteps", "plms_timesteps", "pndm_order", "cur_model_output", "cur_sample"),
    *("counter", "ets", "sigma_data", "log_sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "noisiest_timestep"),
    *("last_noise", "this_predictor_order", "this_corrector_order"),
}
"""What diffusers' schedulers keep for themselves in attributes without an underscore; no general pipeline reads it."""
CASES = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {**V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False}),
    ("DDPMScheduler", {**X0, "variance_type": "fixed_large", "beta_schedule": "sigmoid", "timestep_spacing": "linspace"}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5}),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5, "steps_offset": 1}),
    ("DDPMScheduler", {"beta_schedule": "laplace", "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {**V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample_range": 0.3}),
    ("DDIMScheduler", {**X0, "timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.3}),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ("DDIMScheduler", {"trained_betas": [float(b) for b in betas("linear", 200, end=0.05)], "num_train_timesteps": 200}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {**SD, **V, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {**SD, **X0, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {**SD, "use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
    ("EulerDiscreteScheduler", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, "interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {**SD, "interpolation_type": "log_linear", "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {**SD, **V, "timestep_type": "continuous", "use_karras_sigmas": True, **SVD}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {**SD, **V, "timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {**X0, "clip_sample": True, "clip_sample_range": 0.3, "timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {**SD, "use_beta_sigmas": True}),
    ("LMSDiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {**X0, "timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {**SD, **V, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 1, "timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {**X0, "solver_type": "heun", "final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "thresholding": True}),
    ("DPMSolverMultistepScheduler", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {**X0, "solver_order": 3, "algorithm_type": "sde-dpmsolver++", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {**SD, "use_lu_lambdas": True, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {**SD, "use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {**NOISE, **SD}),
    ("DPMSolverMultistepScheduler", {**NOISE, **V, "solver_type": "heun", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {**NOISE, **X0, "solver_order": 3, "thresholding": True, "sample_max_value": 2.0}),
    ("DPMSolverMultistepScheduler", {**NOISE, **SD, "algorithm_type": "sde-dpmsolver"}),
    ("DPMSolverMultistepScheduler", {**NOISE, **V, "algorithm_type": "sde-dpmsolver", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {**NOISE, **X0, "algorithm_type": "sde-dpmsolver", "solver_order": 1}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {**SD, **V, "solver_order": 1}),
    ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {**X0, **CLEAN, "solver_type": "heun", "thresholding": True, "sample_max_value": 1.5}),
    ("DPMSolverSinglestepScheduler", {**V, "solver_order": 3, "solver_type": "heun", "lower_order_final": True, **CLEAN}),
    ("DPMSolverSinglestepScheduler", {**NOISE, **SD}),
    ("DPMSolverSinglestepScheduler", {**NOISE, **V, "solver_order": 3, "use_exponential_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {**NOISE, **X0, "solver_order": 3, "solver_type": "heun"}),
    ("DPMSolverSinglestepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", **CLEAN}),
    ("DPMSolverSinglestepScheduler", {**SDE, **V, "solver_order": 3, "use_beta_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {**SDE, **X0, "solver_order": 3, "solver_type": "heun", **CLEAN}),
    ("DPMSolverSinglestepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverSinglestepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {**SD, **V, "solver_order": 3}),
    ("DEISMultistepScheduler", {**X0, "solver_order": 3, "timestep_spacing": "trailing", "thresholding": True}),
    ("DEISMultistepScheduler", {**SD, "use_karras_sigmas": True, "solver_order": 3}),
    ("DEISMultistepScheduler", {**SD, "use_beta_sigmas": True, "solver_order": 1}),
    ("DEISMultistepScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("DEISMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {**V, "predict_x0": False, "solver_order": 3, "timestep_spacing": "leading", **CLEAN}),
    ("UniPCMultistepScheduler", {**X0, "predict_x0": False, "solver_type": "bh1", "disable_corrector": [0, 3], **CLEAN}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {**SD, "disable_corrector": [0, 1, 7]}),
    ("UniPCMultistepScheduler", {**SD, "lower_order_final": False, "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {**SD, "use_beta_sigmas": True}),
    ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0}),
    ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 0.1, "solver_order": 3}),
    ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {**SD, **V, "solver_order": 3, "solver_type": "bh1", "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {**X0, "thresholding": True, "timestep_spacing": "trailing"}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 2.0}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "shift": 2.0}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "stochastic_sampling": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 500}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {**SD, **V, "timestep_spacing": "trailing", "set_alpha_to_one": True}),
    ("PNDMScheduler", {**V, "skip_prk_steps": True, "timestep_spacing": "linspace", "set_alpha_to_one": True}),
    ("DDIMInverseScheduler", {}),
    ("DDIMInverseScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMInverseScheduler", {**V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample_range": 0.3}),
    ("DDIMInverseScheduler", {**X0, "set_alpha_to_one": False, "beta_schedule": "squaredcos_cap_v2"}),
    ("DDIMParallelScheduler", {**SD, "clip_sample": False, "steps_offset": 1}),
    ("DDPMParallelScheduler", {**V, "timestep_spacing": "trailing"}),
    ("FlowMatchLCMScheduler", {}),
    ("FlowMatchLCMScheduler", {"shift": 3.0, "shift_terminal": 0.1, "use_beta_sigmas": True}),
    ("FlowMatchLCMScheduler", {"invert_sigmas": True}),
    ("DPMSolverMultistepInverseScheduler", {}),
    ("DPMSolverMultistepInverseScheduler", {**SD, **V, "solver_order": 3, "timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepInverseScheduler", {**SD, "use_karras_sigmas": True}),
    ("DPMSolverMultistepInverseScheduler", {**X0, "use_beta_sigmas": True, "solver_type": "heun", "solver_order": 1}),
    ("DPMSolverMultistepInverseScheduler", {**SD, "use_exponential_sigmas": True, "thresholding": True}),
    ("DPMSolverMultistepInverseScheduler", {**V, "algorithm_type": "dpmsolver", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepInverseScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverMultistepInverseScheduler", {**FLOW, "flow_shift": 3.0}),
    ("SASolverScheduler", {}),
    ("SASolverScheduler", {**SD, **V, "predictor_order": 3, "corrector_order": 4, "use_karras_sigmas": True}),
    ("SASolverScheduler", {**X0, "predictor_order": 1, "corrector_order": 3, "lower_order_final": False}),
    ("SASolverScheduler", {**SD, "algorithm_type": "noise_prediction", "timestep_spacing": "leading", "steps_offset": 1}),
    ("SASolverScheduler", {**V, "algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 1}),
    (
        "SASolverScheduler",
        {**V, "thresholding": True, "timestep_spacing": "trailing", "tau_func": lambda t: 0.5 + int(t) / 2000},
    ),
    ("SASolverScheduler", {**FLOW, "flow_shift": 3.0}),
    ("IPNDMScheduler", {}),
    ("IPNDMScheduler", {"trained_betas": [1.0, 0.97, 0.8, 0.5, 0.3, 0.1, 0.0]}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("KDPM2DiscreteScheduler", {**SD, **V, "use_beta_sigmas": True, "timestep_spacing": "trailing"}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {**SD, **V, "use_exponential_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", {**SD, "timestep_spacing": "trailing"}),
    ("KDPM2AncestralDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2", **V, "use_karras_sigmas": True}),
    ("LCMScheduler", {}),
    ("LCMScheduler", {**V, "rescale_betas_zero_snr": True, "clip_sample": True, "original_inference_steps": 100}),
    ("LCMScheduler", {**X0, "thresholding": True, "sample_max_value": 1.5, "timestep_scaling": 1e-3, "clip_sample": True}),
    ("TCDScheduler", {}),
    ("TCDScheduler", {**V, "rescale_betas_zero_snr": True, "set_alpha_to_one": False, "clip_sample": True}),
    ("TCDScheduler", {**X0, "beta_schedule": "linear", "original_inference_steps": 100, "thresholding": True}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {**V, **CLEAN, "sigma_data": 1.0, "rho": 5.0, "sigma_max": 20.0}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {**V, **CLEAN, "sigma_data": 1.0, "solver_order": 3, "euler_at_final": True}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {**SDE, "solver_type": "heun", "sigma_max": 20.0}),
    ("EDMDPMSolverMultistepScheduler", {**SDE, **V, "solver_order": 1}),
    ("EDMDPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5, "lower_order_final": False}),
]


def both(name, **config):
    return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


def start(seed=0):
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def widened(theirs, mine):
    """Upstream's tables are float32; where they may be given in float64, its trajectories are exact."""
    theirs.alphas_cumprod = mine._schedule.alphas_cumprod
    if theirs.config.get("set_alpha_to_one") is False:
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]


def rounds_badly(name, config):
    """Where upstream's weights are differences of differences, in float32: good to 3e-4 (DEIS, SA-Solver) and 6e-2 (the SDE),
    or, from levels in float64, to 1e-11."""
    third = max(config.get(kind, 1) for kind in ("solver_order", "predictor_order", "corrector_order")) >= 3
    sde = config.get("algorithm_type") == "sde-dpmsolver++" and config.get("solver_type") == "heun"
    return third and (name.startswith(("DEIS", "SASolver")) or (sde and "Singlestep" in name))


def network(scheduler):
    """Depends on all it is given; where it predicts the noise, its estimate of the data stays small."""
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(3)) * 0.2
    bars = getattr(scheduler, "alphas_cumprod", None)

    def evaluate(x, t):
        out = torch.tanh(x.flatten(1) @ weight.to(x.dtype) + torch.sin(torch.as_tensor(float(t)) / 200)).reshape(x.shape)
        if bars is None or scheduler.config.get("prediction_type") != "epsilon":
            return out
        bar = bars[round(float(t))].double()
        return ((x.double() - bar.sqrt() * out.double()) / (1 - bar).sqrt()).to(x.dtype)

    return evaluate


def trajectory(scheduler, steps=STEPS, evaluate=None, x=None, times=None, generator=0, **options):
    """States and estimates of a loop as pipelines write it."""
    if "generator" in inspect.signature(scheduler.step).parameters and generator is not None:
        options["generator"] = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    if steps is not None:
        scheduler.set_timesteps(steps)
    evaluate = evaluate or network(scheduler)
    x = start() if x is None else x
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    if times is None and (scheduler.timesteps == scheduler.timesteps[0]).sum() > 1:
        # upstream takes the second of a time that comes twice, and then runs out of steps; pipelines start it so
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        else:
            scheduler._step_index = 0
    seen = []
    for t in scheduler.timesteps if times is None else times:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        step = scheduler.step(evaluate(shown, t), t, x, **options)
        x = step.prev_sample
        seen += [shown, x]
        for beside in ("pred_original_sample", "denoised", "pred_noised_sample"):
            if getattr(step, beside, None) is not None:
                # as it counts in the state: at high noise the estimate itself is a difference of large numbers, good to 6e-5
                bars = getattr(scheduler, "alphas_cumprod", None)
                share = 1.0 if bars is None else bars[max(0, round(float(t)))].float().sqrt()
                seen.append(getattr(step, beside) * share)
    return seen


def assert_alike(mine, other):
    """To 1e-8 in float64, to 2e-5 in float32, in the scale of each tensor.

    Measured over the cases: 1.1e-5 for DDIM at its worst (a cosine chain, clipped), 8e-6 with beta levels and UniPC of order 3
    to its end, 7e-6 for LMS, which adds up differences of slopes, 5e-6 for DDPM, 2e-6 for the rest.
    """
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert a.dtype is b.dtype
        tolerance = 1e-8 if b.dtype is torch.float64 else 2e-5
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: value[:4] if isinstance(value, str) else "-".join(value))
def test_trajectory(name, config):
    theirs, mine = both(name, **config)
    for attribute in ("betas", "alphas", "alphas_cumprod"):
        if hasattr(theirs, attribute):
            assert torch.equal(getattr(mine, attribute), getattr(theirs, attribute))
    x, evaluate, steps = None, network(theirs), STEPS
    if rounds_badly(name, config):
        steps, x = None, start().double()
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(STEPS)
        theirs.sigmas = torch.tensor(mine._levels, dtype=torch.float64)
    expected, got = (trajectory(scheduler, steps, evaluate, x) for scheduler in (theirs, mine))
    same = theirs.timesteps.to(mine.timesteps.dtype)  # of the midpoint method some are float64 upstream
    torch.testing.assert_close(mine.timesteps, same, rtol=0, atol=1e-4)
    if hasattr(theirs, "sigmas"):
        torch.testing.assert_close(mine.sigmas, theirs.sigmas.float(), rtol=4e-7, atol=0)
    if config.get("solver_type") == "bh1" and config.get("final_sigmas_type") != "sigma_min":
        # upstream's last step with it, to sigma 0, gives NaN
        assert expected.pop().isnan().all()
        assert got.pop().isfinite().all()
    assert_alike(got, expected)
    if name in ("DDPMScheduler", "DDIMScheduler"):
        # upstream's tables may be given in float64 there: the same to the last bits
        widened(theirs, mine)
        x = start().double()
        expected = trajectory(theirs, x=x)
        assert_alike(trajectory(mine, x=x, evaluate=network(theirs)), expected)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_euler_with_churn(target):
    theirs, mine = both("EulerDiscreteScheduler", **SD, prediction_type=target)
    evaluate, churn = network(theirs), {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
    expected, got = (trajectory(s, evaluate=evaluate, **churn) for s in (theirs, mine))
    # the estimate has the step's noise in it upstream
    assert_alike([x for i, x in enumerate(got) if i % 3 < 2], [x for i, x in enumerate(expected) if i % 3 < 2])
    plain = trajectory(mine, evaluate=evaluate)
    assert (plain[-2] - got[-2]).abs().max() > 0.01


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_edm_euler_with_churn(target):
    theirs, mine = both("EDMEulerScheduler", prediction_type=target)
    evaluate, churn = network(theirs), {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    expected, got = (trajectory(s, evaluate=evaluate, **churn) for s in (theirs, mine))
    # the estimate has the step's noise in it upstream
    assert_alike([x for i, x in enumerate(got) if i % 3 < 2], [x for i, x in enumerate(expected) if i % 3 < 2])
    assert (trajectory(mine, evaluate=evaluate)[-2] - got[-2]).abs().max() > 0.01
    # an estimate that is given, and steps at places of their own
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(sigmas=torch.tensor([0.0, 0.3, 0.8, 1.0]))
    assert torch.equal(mine.timesteps, theirs.timesteps)
    given = {"pred_original_sample": start(7).clamp(-1, 1), **churn}
    expected, got = (trajectory(s, None, evaluate, **given) for s in (theirs, mine))
    assert_alike(got, expected)


def test_preconditioning_of_edm():
    theirs, mine = both("EDMEulerScheduler", sigma_data=0.7)
    x, out, sigma = start(), start(1), torch.tensor(3.0)
    assert torch.equal(mine.precondition_noise(0.3), theirs.precondition_noise(0.3))
    assert_alike([mine.precondition_inputs(x, sigma)], [theirs.precondition_inputs(x, sigma)])
    assert_alike([mine.precondition_outputs(x, out, sigma)], [theirs.precondition_outputs(x, out, sigma)])


def test_heun_of_a_flow_with_churn():
    theirs, mine = both("FlowMatchHeunDiscreteScheduler", shift=2.0)
    evaluate, churn = network(theirs), {"s_churn": 30.0, "s_tmin": 0.2, "s_tmax": 0.9, "s_noise": 1.01}
    got = trajectory(mine, 20, evaluate, **churn)
    assert_alike(got, trajectory(theirs, 20, evaluate, **churn))
    assert (trajectory(mine, 20, evaluate)[-1] - got[-1]).abs().max() > 0.01
    assert mine.state_in_first_order is theirs.state_in_first_order is False


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sizes_that_grow_along_a_flow(kind):
    theirs, mine = both("FlowMatchLCMScheduler", shift=2.0, scale_factors=[1.0, 1.5, 2.0])
    pair = []
    for scheduler in (mine, theirs):
        for mode in ("bicubic", "nearest"):
            scheduler.set_scale_factors([1.0, 1.5, 2.0], mode)
            scheduler.set_timesteps(4)
            x, generator, seen = start().to(kind), torch.Generator().manual_seed(1), []
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(x + t / 1000), t, x, generator=generator).prev_sample
                seen.append(x)
            pair.append(seen)
    assert [tuple(x.shape[2:]) for x in pair[0]] == [(4, 4), (6, 6), (8, 8), (8, 8)]
    for got, expected in ((pair[0], pair[2]), (pair[1], pair[3])):
        if kind is torch.float32:
            assert_alike(got, expected)
        else:
            for a, b in zip(got, expected, strict=True):
                assert a.dtype is b.dtype is kind
                torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
    mine.set_timesteps(3)
    with pytest.raises(ValueError, match="3 steps need one factor less in scale_factors, got 3"):
        mine.step(x, mine.timesteps[0], x)


def test_shifts_of_flows():
    config = {**FLOW, "use_dynamic_shifting": True}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        theirs, mine = both(name, **config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(8, mu=0.8)
        assert_alike(trajectory(mine, None), trajectory(theirs, None))
    # the shift itself, where upstream knows its logarithm alone
    linear = ours.DPMSolverMultistepScheduler(**config, time_shift_type="linear")
    by_log = ours.DPMSolverMultistepScheduler(**config)
    linear.set_timesteps(8, mu=math.exp(0.8))
    by_log.set_timesteps(8, mu=0.8)
    assert torch.equal(linear.sigmas, by_log.sigmas)
    for kind in ("linear", "exponential"):
        theirs, mine = both("UniPCMultistepScheduler", **config, time_shift_type=kind)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(sigmas=np.array([1.0, 0.6, 0.2]), mu=0.8)
        assert_alike(trajectory(mine, None), trajectory(theirs, None))
    x, noise = start(1), start(2)
    times = mine.timesteps[[0, 1, 1, 2]]
    torch.testing.assert_close(mine.add_noise(x, noise, times), theirs.add_noise(x, noise, times), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", SDE),
        ("DPMSolverMultistepInverseScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DPMSolverSinglestepScheduler", CLEAN),
        ("DPMSolverSinglestepScheduler", SDE),
        ("DEISMultistepScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
    ],
)
def test_short_runs_of_the_solvers(name, config, order):
    """Below 15 steps the order falls at the end; a single-step solver's where its blocks do not fill the steps."""
    for steps in (1, 2, 3, 7, 8, 9):
        # upstream's keeps what a run did to its config
        theirs, mine = both(name, **({} if name.startswith("EDM") else SD), **config, solver_order=order)
        evaluate = network(theirs)
        assert_alike(trajectory(mine, steps, evaluate), trajectory(theirs, steps, evaluate))


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_short_runs_of_pndm(target):
    for skips, counts in ((True, (1, 2, 3, 4, 5)), (False, (4, 5, 6))):
        for steps in counts:
            theirs, mine = both("PNDMScheduler", **SD, skip_prk_steps=skips, prediction_type=target)
            evaluate = network(theirs)
            assert_alike(trajectory(mine, steps, evaluate), trajectory(theirs, steps, evaluate))
    with pytest.raises(ValueError, match="at least 4 unless skip_prk_steps=True, got 3"):
        mine.set_timesteps(3)
    mine.set_timesteps(8)
    mine.set_begin_index(5)
    with pytest.raises(ValueError, match="cannot start in the middle"):
        mine.step(start(), mine.timesteps[5], start())


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta(eta, clipped):
    theirs, mine = both("DDIMScheduler", clip_sample_range=0.4)
    widened(theirs, mine)
    options = {"eta": eta, "use_clipped_model_output": clipped, "x": start().double()}
    expected, evaluate = trajectory(theirs, **options), network(theirs)
    assert_alike(trajectory(mine, evaluate=evaluate, **options), expected)


def test_generators_of_samples_and_injected_noise():
    theirs, mine = both("DDPMScheduler")
    widened(theirs, mine)
    x = start().double()
    many = [[torch.Generator().manual_seed(i) for i in range(4)] for _ in range(2)]
    evaluate = network(theirs)
    expected = trajectory(theirs, 5, evaluate, x, generator=many[0])
    assert_alike(trajectory(mine, 5, evaluate, x, generator=many[1]), expected)
    theirs, mine = both("DDIMScheduler")
    widened(theirs, mine)
    noise = start(9).double()
    expected = trajectory(theirs, 5, evaluate, x, generator=None, eta=0.6, variance_noise=noise)
    assert_alike(trajectory(mine, 5, evaluate, x, generator=None, eta=0.6, variance_noise=noise), expected)


@pytest.mark.parametrize(("kind", "spread"), [("learned_range", torch.tanh), ("learned", lambda x: 1e-3 * torch.sigmoid(x))])
def test_learned_variance(kind, spread):
    theirs, mine = both("DDPMScheduler", variance_type=kind, timestep_spacing="trailing", steps_offset=0)
    widened(theirs, mine)
    base = network(theirs)

    def evaluate(x, t):
        return torch.cat([base(x, t), spread(x)], 1)

    x = start().double()
    assert_alike(trajectory(mine, x=x, evaluate=evaluate), trajectory(theirs, x=x, evaluate=evaluate))
    with pytest.raises(ValueError, match="needs an output of 6 channels"):
        mine.step(x, mine.timesteps[0], x)


def test_large_variance_by_its_logarithm():
    """Upstream takes the root of the logarithm, which is NaN."""
    large, by_log = (ours.DDPMScheduler(variance_type=f"fixed_large{kind}") for kind in ("", "_log"))
    evaluate = network(large)
    for a, b in zip(trajectory(by_log, 5, evaluate), trajectory(large, 5, evaluate), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", [{}, {"solver_order": 3, "disable_corrector": [1, 4]}, {"predict_x0": False, **CLEAN}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler_as_predictor(name, config):
    """``solver_p``: UniPC corrects what another scheduler predicts, be it ours or diffusers'."""
    spacing = {"timestep_spacing": "trailing"}
    options = {"clip_sample": False} if name.startswith("DDIM") else {}

    def made(library, predictor):
        return library.UniPCMultistepScheduler(**SD, **spacing, **config, solver_p=predictor(**SD, **spacing, **options))

    theirs = made(diffusers, getattr(diffusers, name))
    evaluate = network(theirs)
    expected = trajectory(theirs, 12, evaluate)
    for predictor in (getattr(ours, name), getattr(diffusers, name)):
        mine = made(ours, predictor)
        assert_alike(trajectory(mine, 12, evaluate), expected)
        assert_alike(trajectory(mine, 12, evaluate), expected)
    corrected = trajectory(ours.UniPCMultistepScheduler(**SD, **spacing, **config), 12, evaluate)
    assert (corrected[-3] - expected[-3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize(
    "layout",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": 7, "original_inference_steps": 40},
        {"num_inference_steps": 3, "strength": 0.37},
        {"timesteps": [999, 759, 499, 259]},
        {"timesteps": [999, 759, 499, 259, 19], "strength": 0.6, "original_inference_steps": 100},
    ],
    ids="-".join,
)
def test_steps_of_a_distilled_network(name, layout):
    """As ever fewer as there are; a run that is cut short ends at the noise of its last step, as upstream."""
    theirs, mine = both(name)
    evaluate, x = network(theirs), start()
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(**layout)
    assert torch.equal(mine.timesteps, theirs.timesteps)
    assert mine.num_inference_steps == theirs.num_inference_steps
    for options in ({}, {"return_dict": False}) if name.startswith("LCM") else ({"eta": 0.0}, {"eta": 0.7}, {"eta": 1.0}):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        pair = []
        for scheduler, generator in zip((mine, theirs), generators, strict=True):
            scheduler.set_timesteps(**layout)
            state, seen = x, []
            for t in scheduler.timesteps:
                state, beside = scheduler.step(evaluate(state, t), t, state, generator=generator, **options)[:2]
                seen += [state, beside]
            pair.append(seen)
        assert_alike(*pair)
        assert torch.equal(torch.randn(3, generator=generators[0]), torch.randn(3, generator=generators[1]))


def test_errors_of_distilled_steps():
    lcm = ours.LCMScheduler()
    for wrong, message in (
        (
            {"num_inference_steps": 51},
            r"num_inference_steps must be in 1 \.\. 50 with original_inference_steps=50 and strength=1",
        ),
        (
            {"num_inference_steps": 20, "strength": 0.3},
            r"must be in 1 \.\. 15 with original_inference_steps=50 and strength=0.3",
        ),
        ({"num_inference_steps": 4, "original_inference_steps": 2000}, r"original_inference_steps must be in 1 \.\. 1000"),
        ({"timesteps": [500, 900]}, "falling"),
        ({"num_inference_steps": 2, "timesteps": [900, 500]}, "give one of"),
    ):
        with pytest.raises(ValueError, match=message):
            lcm.set_timesteps(**wrong)
    tcd = ours.TCDScheduler()
    tcd.set_timesteps(4)
    with pytest.raises(ValueError, match=r"eta must be in 0 \.\. 1, got 1.5"):
        tcd.step(start(), 999, start(), eta=1.5)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("DDIMParallelScheduler", {"clip_sample_range": 0.3}, {}),
        ("DDIMParallelScheduler", {"clip_sample_range": 0.3}, {"use_clipped_model_output": True}),
        ("DDIMParallelScheduler", {**SD, **V, "clip_sample": False, "set_alpha_to_one": False}, {}),
        ("DDIMParallelScheduler", {**X0, "thresholding": True, "sample_max_value": 1.5}, {}),
        ("DDPMParallelScheduler", {"clip_sample_range": 0.3}, {}),
        ("DDPMParallelScheduler", {**V, "variance_type": "learned_range", "thresholding": True}, {}),
        ("DDPMParallelScheduler", {**X0, "variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}),
    ],
)
def test_steps_in_parallel(name, config, options):
    theirs, mine = both(name, **config)
    widened(theirs, mine)
    x, out, times = start().double(), start(1).double(), torch.tensor([999, 600, 20, 5])
    if config.get("variance_type") == "learned_range":
        out = torch.cat([out, out.sin()], 1)
    for steps in (50, 7):
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(steps)
        got, expected = (s.batch_step_no_noise(out, times, x, **options) for s in (mine, theirs))
        assert_alike([got], [expected])
        if config.get("variance_type") != "learned_range":
            for t in mine.timesteps:
                got, expected = mine._get_variance(t), theirs._get_variance(t)
                torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-6)
        if name == "DDIMParallelScheduler":
            alone = [mine.step(out[i : i + 1], t, x[i : i + 1], **options)[0] for i, t in enumerate(mine.timesteps[:4])]
            assert_alike([mine.batch_step_no_noise(out, mine.timesteps[:4], x, **options)], [torch.cat(alone)])
            with pytest.raises(ValueError, match=r"eta must be 0 in steps without noise, got 0\.5"):
                mine.batch_step_no_noise(out, times, x, eta=0.5)
    assert mine._is_ode_scheduler is theirs._is_ode_scheduler


@pytest.mark.parametrize("stochastic", [False, True])
def test_times_of_tokens(stochastic):
    theirs, mine = both("FlowMatchEulerDiscreteScheduler", stochastic_sampling=stochastic, shift=2.0)
    tokens, out = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    seen = []
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(6)
        x = tokens
        for t in scheduler.timesteps:
            times = torch.where(torch.arange(5) < 2, t * 0.3, t).expand(4, 5)
            noise = {"generator": torch.Generator().manual_seed(1)}
            x = scheduler.step(torch.tanh(out + x), t, x, per_token_timesteps=times, **noise).prev_sample
            seen.append(x)
        assert scheduler.step_index == 6
    assert_alike(seen[:6], seen[6:])
    with pytest.raises(ValueError, match=r"per_token_timesteps must be \[N, L\]"):
        mine.step(out, mine.timesteps[0], tokens, per_token_timesteps=torch.ones(4, 3))


@pytest.mark.parametrize("name", NAMES)
def test_starting_in_the_middle(name):
    """Image to image: the steps from the 20th on, the first with no past."""
    theirs, mine = both(name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    x = 0.3 * start()
    evaluate = network(theirs)
    pair = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(30)
        times = scheduler.timesteps[20 * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(20 * scheduler.order)
        pair.append(trajectory(scheduler, None, evaluate, x / getattr(scheduler, "init_noise_sigma", 1.0), times))
    if name == "LMSDiscreteScheduler":
        # upstream weighs slopes that it does not have: its first step is not Euler's
        euler = ours.EulerDiscreteScheduler()
        euler.set_timesteps(30)
        euler.set_begin_index(20)
        pair[0] = trajectory(euler, None, evaluate, x / euler.init_noise_sigma, times[:1])
        pair[1] = pair[1][:3]
    assert_alike(*pair)


@pytest.mark.parametrize("name", [name for name in NAMES if {"add_noise", "scale_noise"} & set(dir(getattr(diffusers, name)))])
def test_noise_of_the_schedulers_times(name):
    theirs, mine = both(name)
    x, noise = start(1), start(2)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(10)
    verb = "scale_noise" if name.startswith("Flow") else "add_noise"
    times = mine.timesteps[[0, 3, 3, 7]]
    got = getattr(mine, verb)(x, times, noise) if verb == "scale_noise" else mine.add_noise(x, noise, times)
    same = theirs.timesteps[[0, 3, 3, 7]]
    if name == "FlowMatchHeunDiscreteScheduler":
        # upstream takes one time, and keeps its place
        expected = torch.cat([copy.copy(theirs).scale_noise(x[i : i + 1], t, noise[i : i + 1]) for i, t in enumerate(same)])
    else:
        expected = theirs.scale_noise(x, same, noise) if verb == "scale_noise" else theirs.add_noise(x, noise, same)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"])
def test_training_verbs(name):
    theirs, mine = both(name, **SD)
    x, noise, times = start(1), start(2), torch.tensor([0, 17, 500, 999])
    torch.testing.assert_close(mine.add_noise(x, noise, times), theirs.add_noise(x, noise, times), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.get_velocity(x, noise, times), theirs.get_velocity(x, noise, times), rtol=1e-5, atol=1e-5)
    for attribute in ("betas", "alphas", "alphas_cumprod"):
        assert torch.equal(getattr(mine, attribute), getattr(theirs, attribute))
    assert len(mine) == len(theirs) == 1000


def test_custom_times_and_levels():
    theirs, mine = both("DDPMScheduler")
    widened(theirs, mine)
    evaluate, x = network(theirs), start().double()
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(timesteps=[900, 500, 20, 3])
    assert_alike(trajectory(mine, None, evaluate, x), trajectory(theirs, None, evaluate, x))
    theirs, mine = both("EulerDiscreteScheduler")
    for option in ({"timesteps": [900, 500, 20.5]}, {"sigmas": [9.0, 2.0, 0.5, 0.0]}):
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(**option)
        torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)
        assert_alike(trajectory(mine, None, evaluate), trajectory(theirs, None, evaluate))
    theirs, mine = both("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=0.8)
    assert_alike(trajectory(mine, None), trajectory(theirs, None))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMInverseScheduler", {"clip_sample": False, "timestep_spacing": "trailing", "num_train_timesteps": 900}),
        ("DPMSolverMultistepInverseScheduler", {"solver_order": 3}),
    ],
)
def test_inverse_steps_lead_along_the_noise(name, config):
    """With a network that knows the noise, from the data to the last of the times."""
    data, noise = start(5), start(6)
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(30)
    bar = getattr(scheduler, "initial_alpha_cumprod", scheduler.alphas_cumprod[0]).double()
    x = (bar.sqrt() * data + (1 - bar).sqrt() * noise).float()
    for t in scheduler.timesteps:
        x = scheduler.step(noise, t, x).prev_sample
    bar = scheduler.alphas_cumprod[-1].double()
    torch.testing.assert_close(x, (bar.sqrt() * data + (1 - bar).sqrt() * noise).float(), rtol=1e-5, atol=1e-5)


def test_exact_steps_go_to_the_next_time():
    """diffusers' DDIM steps past the next of its own times; a network that knows the noise shows whose states are right."""
    data, evaluations = start(5), {}
    for exact in (False, True):
        scheduler = ours.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, exact_steps=exact)
        scheduler.set_timesteps(30)
        bars = scheduler.alphas_cumprod.double()
        noise = start(6)
        x = (bars[999].sqrt() * data + (1 - bars[999]).sqrt() * noise).float()
        errors = []
        for t in scheduler.timesteps:
            truth = (bars[t].sqrt() * data + (1 - bars[t]).sqrt() * noise).float()
            errors.append((x - truth).abs().max().item())
            x = scheduler.step(noise, t, x).prev_sample
        evaluations[exact] = max(errors)
        assert ((x - data).abs().max() < 1e-3) == exact
    assert evaluations[True] < 1e-4 < 1e-3 < evaluations[False]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_pipeline(name):
    pipe = getattr(diffusers, f"{name}Pipeline")(unet(), getattr(diffusers, f"{name}Scheduler")())
    pipe.set_progress_bar_config(disable=True)

    def run():
        options = {"eta": 0.5} if name == "DDIM" else {}
        generator = torch.Generator().manual_seed(3)
        return torch.as_tensor(
            pipe(batch_size=2, generator=generator, num_inference_steps=10, output_type="np", **options).images
        )

    theirs = run()
    pipe.scheduler = getattr(ours, f"{name}Scheduler").from_config(pipe.scheduler.config)
    torch.testing.assert_close(run(), theirs, rtol=1e-5, atol=1e-5)
    # and a pipeline that is made with ours
    assert type(diffusers.DDPMPipeline(unet(), pipe.scheduler).scheduler) is type(pipe.scheduler)


class FlowPipeline(diffusers.DiffusionPipeline):
    """A pipeline as users write it: any network, any scheduler, and only what both libraries' schedulers have."""

    def __init__(self, scheduler, network):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.network = network

    @torch.no_grad()
    def __call__(self, x, steps, generator):
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=x.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        with self.progress_bar(total=len(scheduler.timesteps) // scheduler.order) as bar:
            for i, t in enumerate(scheduler.timesteps):
                shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                options = {"generator": generator} if takes_generator else {}
                x = scheduler.step(self.network(shown, t), t, x, **options, return_dict=False)[0]
                if not (i + 1) % scheduler.order:
                    bar.update()
        return x


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_of_a_user(name, tmp_path):
    pipe = FlowPipeline(getattr(diffusers, name)(), None)
    pipe.set_progress_bar_config(disable=True)
    pipe.network = network(pipe.scheduler)
    config = dict(pipe.scheduler.config)  # a run of upstream's may change it
    expected = pipe(start(), 10, torch.Generator().manual_seed(0))
    theirs, pipe.scheduler = pipe.scheduler, getattr(ours, name).from_config(pipe.scheduler.config)
    assert_alike([pipe(start(), 10, torch.Generator().manual_seed(0))], [expected])
    assert not {key for key in vars(theirs) if not key.startswith("_")} - {*dir(pipe.scheduler), *INTERNALS}
    assert len(pipe.scheduler) == len(theirs)
    # and back again, to be saved
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = getattr(ours, name).from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config.items() >= {k: v for k, v in config.items() if not k.startswith("_") and v}.items()


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_previous_times(name):
    theirs, mine = both(name)
    for steps in (None, 7):
        if steps:
            theirs.set_timesteps(steps)
            mine.set_timesteps(steps)
        for t in mine.timesteps:
            assert mine.previous_timestep(t) == int(theirs.previous_timestep(t))


def test_configs_that_pipelines_amend():
    scheduler = ours.DDIMScheduler(steps_offset=0, clip_sample=True)
    scheduler._internal_dict = {**scheduler.config, "steps_offset": 1, "clip_sample": False}  # as StableDiffusionPipeline does
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.clip_sample is False
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]
    scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="timestep_spacing must be one of"):
        scheduler.register_to_config(timestep_spacing="random")
    assert scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_diffusers(name):
    theirs, mine = getattr(diffusers, name), getattr(ours, name)
    extra = set(inspect.signature(mine).parameters) - set(inspect.signature(theirs).parameters)
    assert extra == set(mine.extras)
    for key, parameter in inspect.signature(theirs).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue  # of arguments that are deprecated
        other = inspect.signature(mine).parameters[key].default
        assert (tuple(other) == tuple(parameter.default)) if key == "disable_corrector" else other == parameter.default
    for verb in ("set_timesteps", "step"):
        assert list(inspect.signature(getattr(mine, verb)).parameters) == list(
            inspect.signature(getattr(theirs, verb)).parameters
        )


@pytest.mark.parametrize("name", NAMES)
def test_configs_go_both_ways(name, tmp_path):
    theirs, mine = getattr(diffusers, name), getattr(ours, name)
    given = {"num_train_timesteps": 500, **({} if name.startswith(("Flow", "EDM", "IPNDM")) else SD)}
    there = theirs(**given)
    here = mine.from_config(there.config)
    back = theirs.from_config(here.config)
    for key, value in there.config.items():
        if not key.startswith("_"):
            assert here.config[key] == getattr(here.config, key) == here.config.get(key)
            assert back.config[key] == value or not value
            assert here.config[key] == value or not value
    here.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name
    assert dict(theirs.from_pretrained(tmp_path).config)["num_train_timesteps"] == 500
    there.save_pretrained(tmp_path / "scheduler")
    loaded = mine.from_pretrained(tmp_path, subfolder="scheduler")
    assert loaded.config.num_train_timesteps == 500
    assert torch.equal(loaded.timesteps, here.timesteps)
    twin = copy.deepcopy(loaded)
    assert twin.config == loaded.config
    assert twin.index_for_timestep(twin.timesteps[3]) == 3


def test_configs_between_classes():
    """As upstream: defaults are not carried over, what a class does not take waits for one that does."""
    ddpm = diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large", num_train_timesteps=400)
    euler = ours.EulerDiscreteScheduler.from_config(ddpm.config)
    assert euler.config.variance_type == "fixed_large"
    heun = ours.HeunDiscreteScheduler.from_config(euler.config, use_karras_sigmas=True)
    assert heun.config.beta_start == 0.00085  # its own default, not DDPM's
    assert ours.DDPMScheduler.from_config(heun.config).config.variance_type == "fixed_large"
    for name in NAMES:
        there, here = both(name)
        assert {cls.__name__ for cls in here.compatibles} == {cls.__name__ for cls in there.compatibles} & set(NAMES)
    made, unused = ours.DDIMScheduler.from_config({"beta_end": 0.03, "novel": 1}, return_unused_kwargs=True)
    assert made.config.beta_end == 0.03
    assert unused == {"novel": 1}


def test_output_and_fresh_tensors():
    scheduler = ours.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    x, kept = start(), []
    for t in scheduler.timesteps:
        before = x.clone()
        (after,) = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)
        assert torch.equal(x, before)
        kept.append((after, after.clone()))
        x = after
    assert all(torch.equal(a, b) for a, b in kept)
    assert scheduler.step_index == 4
    ddim = ours.DDIMScheduler()
    ddim.set_timesteps(4)
    out = ddim.step(torch.zeros_like(x), ddim.timesteps[0], x)
    assert out["prev_sample"] is out[0] is out.prev_sample
    assert out["pred_original_sample"] is out[1]


def test_estimates_are_made_when_asked_for():
    scheduler = ours.DDIMScheduler(clip_sample_range=0.5)
    scheduler.set_timesteps(4)
    x, t, out = start(), scheduler.timesteps[1], start(2)
    eager = scheduler.step(out, t, x, return_dict=False)[1]
    later = [scheduler.step(out, t, x) for _ in range(2)]
    torch.testing.assert_close(later[0].pred_original_sample, eager, rtol=0, atol=0)
    x.add_(1)
    assert torch.equal(later[0].pred_original_sample, eager)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = later[1].pred_original_sample
    with torch.inference_mode():
        x = start()
        kept = scheduler.step(out, t, x)
        x.add_(1)
    assert torch.equal(kept.pred_original_sample, eager)


def test_noise_without_a_generator_follows_the_global_seed():
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(3)
    x = start()

    def noised():
        return scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x).prev_sample

    torch.manual_seed(0)
    first, second = noised(), noised()
    torch.manual_seed(0)
    assert torch.equal(noised(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler"])
def test_half_precision(name):
    theirs, mine = both(name)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
    x = start()
    for kind in (torch.bfloat16, torch.float16):
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(5)
        t, out = mine.timesteps[0], start(3).to(kind)
        generator = {"generator": torch.Generator().manual_seed(0)} if name.startswith("DDPM") else {}
        got = mine.step(out, t, x.to(kind), **generator).prev_sample
        generator = {"generator": torch.Generator().manual_seed(0)} if generator else {}
        expected = theirs.step(out, t, x.to(kind), **generator).prev_sample
        assert got.dtype is expected.dtype is kind
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "use_karras_sigmas": True}, "only one of use_karras_sigmas and"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type must be 'linear' or 'log_linear'"),
        ("EulerDiscreteScheduler", {"timestep_type": "whole"}, "timestep_type must be 'discrete' or 'continuous'"),
        ("DDIMInverseScheduler", X0, "prediction_type='sample' needs set_alpha_to_one=False"),
        ("DDIMInverseScheduler", {"timestep_spacing": "linspace"}, "timestep_spacing must be one of leading, trailing, got"),
        ("DDPMScheduler", {"variance_type": "half"}, "variance_type must be one of"),
        ("DDPMScheduler", {"beta_schedule": "quadratic"}, "beta_schedule must be one of"),
        ("DDIMScheduler", {"prediction_type": "noise"}, "prediction_type must be one of"),
        ("DDIMScheduler", {"timestep_spacing": "random"}, "timestep_spacing must be one of"),
        ("DPMSolverMultistepInverseScheduler", SDE, "has no way from the data to the noise"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order must be 1, 2 or 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "euler"}, "algorithm_type must be one of dpmsolver"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver"}, r"one of dpmsolver, .*, sde-dpmsolver\+\+, got"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver"}, "needs final_sigmas_type='sigma_min', got 'zero'"),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type must be 'deis'"),
        ("DEISMultistepScheduler", {"solver_type": "log"}, "solver_type must be 'logrho'"),
        ("SASolverScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type must be 'data_prediction' or 'noise_pred"),
        ("SASolverScheduler", {"predictor_order": 5}, r"order must be in 1 \.\. 4, got 5"),
        ("SASolverScheduler", {"corrector_order": 0}, r"corrector_order must be in 1 \.\. 4, got 0"),
        ("DEISMultistepScheduler", {"solver_order": 4}, "solver_order must be 1, 2 or 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "needs final_sigmas_type='sigma_min', got 'zero'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "solver_order": 3}, "1 or 2 for algorithm_type"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type must be one of epsilon"),
        ("DPMSolverMultistepScheduler", {"time_shift_type": "cubic"}, "time_shift_type must be 'exponential' or 'linear'"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}, "with an empty step"),
        ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True, "use_karras_sigmas": True}, "only one of"),
        (
            "EDMEulerScheduler",
            {"prediction_type": "sample"},
            "prediction_type must be one of epsilon, v_prediction, got 'sample'",
        ),
        ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "beta"}, "sigma_schedule must be one of karras, exponential"),
        ("EDMDPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, r"solver_order must be in 1 \.\. 2 for"),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type must be 'dpmsolver"),
    ],
)
def test_wrong_arguments_are_named(name, config, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(**config)


def test_a_scheduler_that_is_missing_is_named(tmp_path):
    with pytest.raises(ImportError, match=r"fastgen has no KarrasVeScheduler; its schedulers .* are DDIMInverseScheduler, "):
        from fastgen.interop.diffusers import KarrasVeScheduler  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'load_vae'"):
        ours.load_vae  # noqa: B018
    diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "scheduler")
    missing = "no sampler was compared: CMStochasticIterativeScheduler has no counterpart here"
    assert load_schedulers(tmp_path) == missing


def test_errors(tmp_path):
    x = start()
    ddim = ours.DDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        ddim.step(x, 999, x)
    with pytest.raises(ValueError, match=r"1 \.\. 1000, got 1001"):
        ddim.set_timesteps(1001)
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 5 is not one"):
        ddim.step(x, 5, x)
    with pytest.raises(ValueError, match="predict v or x0"):
        ours.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing").set_timesteps(10)
    euler = ours.EulerDiscreteScheduler()
    euler.set_timesteps(2)
    with pytest.raises(ValueError, match="may be an index"):
        euler.step(x, 0, x)
    for name, wrong in (("DPMSolverMultistepScheduler", {"mu": 0.5}), ("UniPCMultistepScheduler", {"sigmas": [1.0, 0.5]})):
        with pytest.raises(ValueError, match=r"mu needs use_dynamic_shifting=True|sigmas need use_flow_sigmas=True"):
            getattr(ours, name)().set_timesteps(2, **wrong)
    with pytest.raises(ValueError, match="use_dynamic_shifting=True needs mu"):
        ours.UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True).set_timesteps(2)
    for t in euler.timesteps:
        euler.step(x, t, x)
    with pytest.raises(ValueError, match="all 2 steps have been taken"):
        euler.step(x, euler.timesteps[0], x)
    with pytest.raises(ValueError, match="timesteps must be among"):
        euler.set_timesteps(2) or euler.add_noise(x, x, torch.tensor([5.0] * 4))
    with pytest.raises(TypeError, match="does not change"):
        ddim.config["beta_end"] = 1.0
    with pytest.raises(FileNotFoundError, match="only local folders"):
        ours.DDIMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_parity_finds_them(name, tmp_path):
    """``fastgen parity diffusers`` compares these classes, flows included."""
    getattr(diffusers, name)().save_pretrained(tmp_path / "scheduler")
    theirs, mine = load_schedulers(tmp_path)
    assert type(mine) is getattr(ours, name)
    expected, got = (parity.trajectory(s, lambda x, t: 0.1 * torch.tanh(x), start(), 6, 0) for s in (theirs, mine))
    assert_alike(got, expected)
