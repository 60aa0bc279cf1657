"""Schedulers with diffusers' names, arguments and verbs, on our samplers: one line switches a pipeline.

    pipe.scheduler = fastgen.interop.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)

diffusers saves pipelines with schedulers of its own: go back by ``diffusers.DDIMScheduler.from_config(pipe.scheduler.config)``
before ``pipe.save_pretrained``.

Arguments, defaults, layouts of the steps and, with ``generator=``, the noise are those of diffusers 0.42.1, its errors and the
rounding of its tables included where results depend on them (:mod:`fastgen.diffusion.upstream`). States of 50 steps in float32
agree to 2e-6 of their scale with most, to 1.1e-5 with the worst configuration that is tested; what is left is the order of the
last operations. Weights of the third order that upstream's own float32 loses are right here: DEIS, good to 3e-4 there, and the
single-step SDE with "heun". An estimate of the data at high noise is a difference of large numbers on both sides, and agrees
to 6e-5.

A value that upstream cannot use either raises a ValueError that names its argument. ``DDIMScheduler(exact_steps=True)`` steps
to the next of its own times, where diffusers' DDIM steps back by a fixed stride and, with linspace and trailing spacing,
misses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.samplers import (
    DDIM,
    DDPM,
    LMS,
    Consistency,
    DPMSolver,
    DPMSolverSinglestep,
    Estimate,
    Euler,
    EulerAncestral,
    Heun,
    Layout,
    Plan,
    Sampler,
    UniPC,
    mirrored,
    on_noise,
)
from fastgen.diffusion.schedules import Flow, Grid, Karras, estimate_rows, noise_levels, target_rows
from fastgen.diffusion.upstream import upstream_block_order, upstream_third_order
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import ChainScheduler, Generators, Scheduler, SchedulerOutput, drawn

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]

_Betas = Sequence[float] | Tensor | None
_Device = torch.device | str | None


class _Stateless(ChainScheduler):
    """DDPM and DDIM: a step depends on its time alone, and noise may be added at any time of the chain."""

    by_counter: ClassVar[bool] = False
    whole_times: ClassVar[bool] = True
    finite_levels: ClassVar[bool] = False

    def _clamp(self) -> float | None:
        return self._arguments["clip_sample_range"] if self._arguments["clip_sample"] else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at ``timesteps`` [N], any of the chain's."""
        return self._diffused(original_samples, noise, self._chain_rows(original_samples, timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0 at ``timesteps`` [N], any of the chain's: the target of ``v_prediction``."""
        return self._diffused(sample, noise, self._chain_rows(sample, timesteps, velocity=True))


class DDPMScheduler(_Stateless):
    """Ancestral sampling (Ho et al., 2020). ``variance_type`` "fixed_large_log" is "fixed_large": upstream takes the root of
    its logarithm, which is NaN."""

    layout = "index"

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if variance_type not in self._variances:
            raise ValueError(f"variance_type must be one of {', '.join(self._variances)}, got {variance_type!r}")
        self._build()

    _variances: ClassVar[dict[str, str]] = {
        "fixed_small": "small",
        "fixed_small_log": "small",
        "fixed_large": "large",
        "fixed_large_log": "large",
        "learned": "learned",
        "learned_range": "learned",
    }

    def _sampler(self) -> Sampler:
        return DDPM(self._variances[self._arguments["variance_type"]])  # type: ignore[arg-type]

    def _plan(self, grid: Grid) -> Plan:
        plan = super()._plan(grid)
        return plan._replace(bounds=None) if self._arguments["variance_type"] == "learned" else plan

    def _draws(self, index: int) -> bool:
        return self._list[index] > 0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: _Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Lay out the steps: how many, or their times, falling."""
        self._set_timesteps(num_inference_steps, device, timesteps)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The time that a step from ``timestep`` goes to; -1 is the data."""
        later = [*self._list, -1][self.index_for_timestep(timestep) + 1]
        return int(later)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From ``timestep`` to the one before: ``prev_sample`` and ``pred_original_sample``."""
        spread, kind = None, self._arguments["variance_type"]
        if kind.startswith("learned"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(
                    f"variance_type={kind!r} needs an output of {2 * sample.shape[1]} channels, twice those of the sample, got "
                    f"{model_output.shape[1]}"
                )
            model_output, spread = model_output.chunk(2, 1)
            if kind == "learned":
                spread = spread.log()
        return self._step(
            model_output,
            timestep,
            sample,
            generator=generator,
            clamp=self._clamp(),
            log_variance=spread,
            return_dict=return_dict,
        )


class DDIMScheduler(_Stateless):
    """Implicit sampling (Song et al., 2021).

    Args:
        exact_steps: not in diffusers: step to the next of ``timesteps`` rather than back by ``num_train_timesteps //
            num_inference_steps``, which misses it for linspace and trailing spacing. The rest is as in diffusers.
    """

    layout: Layout = "stride"
    extras = ("exact_steps",)

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        exact_steps: bool = False,
    ) -> None:
        if exact_steps:
            self.layout = "index"
        self._build()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def _end(self) -> tuple[float, float]:
        bar = 1.0 if self._arguments["set_alpha_to_one"] else float(self._schedule.alphas_cumprod[0])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _sampler(self, eta: float, unclipped: bool) -> Sampler:
        return DDIM(eta)

    def _default_options(self) -> tuple[Any, ...]:
        return 0.0, False

    def _draws(self, index: int) -> bool:
        return True

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        if not options[1]:
            return rows
        # the direction is that of the noise as predicted, whatever clipping did to the estimate: the prediction stands in
        # for a history of one
        alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
        a, b, c, d = self._target(alpha, sigma).unbind(1)
        p, q, keep, signal, noise = rows.unbind(1)
        amount = keep * sigma / (a * d - b * c)
        return torch.stack([p, q, -c * amount, signal + keep * alpha, noise, a * amount], 1)

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From ``timestep`` to the one before: ``prev_sample`` and ``pred_original_sample``.

        Args:
            eta: 0 deterministic, 1 as much noise as DDPM.
            use_clipped_model_output: whether clipping the estimate changes the direction of the step as well.
            variance_noise: to use instead of a generator.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("give generator or variance_noise, not both")
        clamp = self._clamp()
        limited = clamp is not None or self._arguments["thresholding"]
        unclipped = limited and not use_clipped_model_output
        return self._step(
            model_output,
            timestep,
            sample,
            options=(eta, unclipped),
            generator=generator if eta > 0 else None,
            noise=variance_noise if eta > 0 else None,
            clamp=clamp,
            beside=model_output if unclipped else None,
            return_dict=return_dict,
        )


class _Levels(ChainScheduler):
    """Schedulers of k-diffusion: samples are x / alpha = x0 + (sigma / alpha) eps."""

    in_levels: ClassVar[bool] = True

    @property
    def init_noise_sigma(self) -> Tensor:
        """Scale of the noise that sampling starts from."""
        largest = self.sigmas.max()
        return largest if self._arguments["timestep_spacing"] in ("linspace", "trailing") else (largest**2 + 1).sqrt()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """alpha times the sample: what the network knows."""
        assert timestep is not None or self._step_index is not None, "the first call needs the timestep"
        return sample * self._scales[self._position(timestep)]  # type: ignore[arg-type]


def _churned(here: Tensor, there: Tensor, options: tuple[float, ...], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Churn as diffusers has it: the levels that it lifts ``here`` to, the noise that does, and the way to ``there``."""
    churn, low, high, scale = options
    within = (here >= low) & (here <= high)
    more = torch.where(within, min(max(churn, 0.0) / steps, math.sqrt(2) - 1), 0.0)
    hat = here * (1 + more)
    return hat, scale * (hat.square() - here.square()).sqrt(), there - hat


class EulerDiscreteScheduler(_Levels):
    """Euler's method on the probability flow.

    Churn is as diffusers has it, which adds its noise after the evaluation that should see it; in
    :class:`fastgen.diffusion.samplers.Euler` it comes before.
    """

    narrow = True

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        if interpolation_type not in ("linear", "log_linear"):
            raise ValueError(f"interpolation_type must be 'linear' or 'log_linear', got {interpolation_type!r}")
        if timestep_type not in ("discrete", "continuous"):
            raise ValueError(f"timestep_type must be 'discrete' or 'continuous', got {timestep_type!r}")
        self._build()

    def _sampler(self, *churn: float) -> Sampler:
        return Euler()

    def _default_options(self) -> tuple[Any, ...]:
        return 0.0, 0.0, math.inf, 1.0

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        ratio = plan.sigma / plan.alpha
        here, there = ratio[:-1], ratio[1:]
        hat, z, way = _churned(here, there, options, len(self.sigmas) - 1)
        if not bool((hat > here).any()):
            return rows
        # in units of alpha: noise z on top of x, and a step of (there - hat) along (x + z - x0) / hat. The estimate takes
        # the noise for signal and, of the noise, the output for that at the level ``hat``.
        step = way / hat
        seen = plan.alpha[:-1] * rows[:, 0]  # how the estimate moves with x
        p, q, keep, signal = rows[:, 0], rows[:, 1], 1 + step, -step
        if self._arguments["prediction_type"] == "epsilon":
            q = q * (hat / here)
        noise = z * (keep + signal * seen)
        back = 1 / plan.alpha[:-1]
        scaled = torch.stack([p, q, keep * back, signal, noise], 1)
        return scaled * torch.stack([torch.ones_like(back)] * 2 + [plan.alpha[1:]] * 3, 1)

    def _times(self) -> Tensor:
        continuous = self._arguments["timestep_type"] == "continuous" and self._arguments["prediction_type"] == "v_prediction"
        return 0.25 * (self._grid.sigma / self._grid.alpha).log() if continuous else self._grid.time

    def _set_log_linear(self, device: _Device) -> None:
        """Levels even in their logarithm at the times as they are, one more than these: the last does not reach the data."""
        chain = self._schedule.alphas_cumprod
        high, low = (float(((1 - chain[i]) / chain[i]).sqrt()) for i in (-1, 0))
        ratio = noise_levels("exponential", len(self._grid.time) + 1, low, high)
        time = torch.cat([self._grid.time, self._grid.next_time[-1:]])
        self._visit(Grid.through(self._schedule, time, *self._schedule.of_ratio(ratio)))
        self._publish(self._times(), device)
        self._level()
        _, end = self._end()
        self.sigmas = torch.cat([self.sigmas, self.sigmas.new_tensor([end / math.sqrt(1 - end**2)])])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, or their levels sigma / alpha and the last one's end; all falling."""
        if sigmas is None:
            if timesteps is not None and self._arguments["timestep_type"] == "continuous":
                raise ValueError("timesteps cannot be given with timestep_type='continuous'")
            self._set_timesteps(num_inference_steps, device, timesteps)
            if self._arguments["interpolation_type"] == "log_linear" and self._levels_kind() is None:
                self._set_log_linear(device)
        elif num_inference_steps is not None or timesteps is not None:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        else:
            self._set_levels(torch.as_tensor(sigmas, dtype=torch.float64), device)

    def _set_levels(self, ratio: Tensor, device: _Device) -> None:
        if ratio.dim() != 1 or len(ratio) < 2 or not bool((ratio.diff() < 0).all()) or float(ratio[-1]) < 0:
            raise ValueError(f"sigmas must be at least two levels, falling, none negative, got {ratio.tolist()}")
        time = self._schedule.time(ratio.clamp(min=1e-10))
        self._visit(Grid.through(self._schedule, time, *self._schedule.of_ratio(ratio)))
        self._publish(self._times(), device)
        self._level()
        self.num_inference_steps = len(ratio) - 1

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample`` and ``pred_original_sample``, which with churn is without its noise."""
        churn = (float(s_churn), float(s_tmin), float(s_tmax), float(s_noise))
        return self._step(model_output, timestep, sample, options=churn, generator=generator, return_dict=return_dict)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0 at ``timesteps`` [N] of the scheduler's (diffusers 0.42.1 takes other times of the chain)."""
        alpha, sigma = self._points()
        none = torch.zeros_like(alpha)
        table = torch.stack([-sigma, alpha, none, none], 1).to(sample.device, torch.float32)
        return self._diffused(sample, noise, table[self._indices(timesteps.to(sample.device))])


class EulerAncestralDiscreteScheduler(_Levels):
    """Ancestral Euler."""

    narrow = True

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._build()

    def _sampler(self) -> Sampler:
        return EulerAncestral()

    def _draws(self, index: int) -> bool:
        return True

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample`` and ``pred_original_sample``."""
        return self._step(model_output, timestep, sample, generator=generator, return_dict=return_dict)


class _InPairs(Scheduler):
    """Heun's method of second order: each time but the first comes twice in ``timesteps``."""

    order = 2

    @staticmethod
    def _twice(values: Tensor) -> Tensor:
        return torch.cat([values[:1], values[1:].repeat_interleave(2)])

    def _points(self) -> tuple[Tensor, Tensor]:
        grid = self._grid
        alpha, sigma = self._twice(grid.alpha), self._twice(grid.sigma)
        return torch.cat([alpha, grid.next_alpha[-1:]]), torch.cat([sigma, grid.next_sigma[-1:]])

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next evaluation starts a step."""
        return self._step_index is None or not (self._step_index - self._start) % 2


class HeunDiscreteScheduler(_InPairs, _Levels):
    """Heun's method of second order: each time but the first comes twice in ``timesteps``."""

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._build()

    def _sampler(self) -> Sampler:
        return Heun()

    def _times(self) -> Tensor:
        return self._twice(self._grid.time)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, falling. ``num_train_timesteps`` can only be the scheduler's own."""
        if num_train_timesteps not in (None, self._arguments["num_train_timesteps"]):
            raise ValueError(f"num_train_timesteps={num_train_timesteps} is not supported in set_timesteps")
        self._set_timesteps(num_inference_steps, device, timesteps)

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next evaluation's step or correction: ``prev_sample`` and ``pred_original_sample``."""
        given = self._arguments
        clamp = given["clip_sample_range"] if given["clip_sample"] else None
        return self._step(model_output, timestep, sample, clamp=clamp, return_dict=return_dict)


class LMSDiscreteScheduler(_Levels):
    """Linear multistep method on the slopes."""

    _order = 4

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._build()

    def _sampler(self, order: int) -> Sampler:
        return LMS(order)

    def _default_options(self) -> tuple[Any, ...]:
        return (4,)

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(num_inference_steps, device)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Any:
        """The next step with up to ``order`` slopes, the same in all of a trajectory: ``prev_sample`` and
        ``pred_original_sample``."""
        begun = self._step_index is not None and self._step_index != self._start
        if begun and order != self._order:
            raise ValueError(f"order cannot change from {self._order} to {order} within a trajectory")
        self._order = order
        return self._step(model_output, timestep, sample, options=(order,), return_dict=return_dict)


class PNDMScheduler(ChainScheduler):
    """Pseudo linear multistep of order 4 on the outputs (Liu et al., 2022, "Pseudo numerical methods for diffusion models on
    manifolds"), after three Runge-Kutta steps of four evaluations each, or with ``skip_prk_steps``, as Stable Diffusion has it,
    after one of Heun's: ``timesteps`` are the evaluations'. A run with Runge-Kutta steps starts at the first.
    """

    layout = "stride"
    whole_times: ClassVar[bool] = True
    gives_estimate: ClassVar[bool] = False

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be one of epsilon, v_prediction, got {prediction_type!r}")
        self._build()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def _lay_out(self, *args: Any, **kwargs: Any) -> None:
        super()._lay_out(*args, **kwargs)
        time, own = self._grid.time, self.timesteps
        self._stride = self._schedule.steps // len(time)
        if not self._arguments["skip_prk_steps"]:
            if len(time) < 4:
                raise ValueError(f"num_inference_steps must be at least 4 unless skip_prk_steps=True, got {len(time)}")
            middle = time[1:4] + self._stride // 2
            time = torch.cat([torch.stack([time[:3], middle, middle, time[1:4]], 1).flatten(), time[3:]])
        elif len(time) > 1:
            time = torch.cat([time[:2], time[1:]])
        alpha, sigma = self._schedule.at(time)
        end = [torch.tensor([value], dtype=torch.float64) for value in (self._schedule.clean, *self._level_at(-1))]
        self._visit(Grid.through(self._schedule, *(torch.cat(pair) for pair in zip((time, alpha, sigma), end, strict=True))))
        self._publish(time, own.device)
        self._level()

    def _level_at(self, time: int) -> tuple[float, float]:
        """(alpha, sigma) of the chain; before its start, of what the last step goes to."""
        chain = self._schedule.alphas_cumprod
        bar = 1.0 if time < 0 and self._arguments["set_alpha_to_one"] else float(chain[max(time, 0)])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _moves(self, time: list[int]) -> list[tuple[int, int, bool, dict[int, float]]]:
        """Of each evaluation from when to when it steps, whether from the present state or from that of the step before, and
        the weights of the evaluations."""
        moves: list[tuple[int, int, bool, dict[int, float]]] = []
        kept: list[int] = []
        if not self._arguments["skip_prk_steps"]:
            for i in range(12):
                first = i - i % 4
                weights = {i: 1.0} if i - first < 3 else {first: 1 / 6, first + 1: 1 / 3, first + 2: 1 / 3, i: 1 / 6}
                moves.append((time[first], time[i] - (0 if i % 2 else self._stride // 2), i == first, weights))
            kept = [8, 4, 0]
        for i in range(len(moves), len(time)):
            if kept == [0] and i == 1:
                # the first step again, with the mean of the slopes at its ends; what was just evaluated is not kept
                moves.append((time[1] + self._stride, time[1], False, {0: 0.5, 1: 0.5}))
                continue
            kept = [i, *kept][:4]
            moves.append((time[i], time[i] - self._stride, True, dict(zip(kept, _ADAMS_BASHFORTH[len(kept)], strict=True))))
        return moves

    def _plan(self, grid: Grid) -> Plan:
        skips = self._arguments["skip_prk_steps"]
        if not skips and len(grid.time) < len(self._grid.time):
            raise ValueError("Runge-Kutta steps cannot start in the middle: use skip_prk_steps=True")
        time, slots = [int(t) for t in grid.time], 4 if skips else 12
        rows = torch.zeros(len(time), 3 + slots, dtype=torch.float64)
        share, known = 1.0, torch.zeros(len(time), dtype=torch.float64)
        for i, (here, there, present, weights) in enumerate(self._moves(time)):
            if present:
                share, known = 1.0, torch.zeros_like(known)
            # the present state is share times the one that is stepped from, and known outputs
            (alpha, sigma), (next_alpha, next_sigma) = self._level_at(here), self._level_at(there)
            keep = next_alpha / alpha
            gain = next_sigma - keep * sigma
            if self._arguments["prediction_type"] == "v_prediction":
                keep, gain = keep + gain * sigma, gain * alpha
            mixed = torch.zeros_like(known)
            mixed[list(weights)] = gain * torch.tensor(list(weights.values()), dtype=torch.float64)
            combined = mixed - keep / share * known
            rows[i, 0], rows[i, 1] = keep / share, combined[i]
            past = combined[max(0, i - slots) : i].flip(0)
            rows[i, 3 : 3 + len(past)] = past
            share, known = keep, mixed
        alphas, sigmas = (values[-len(time) - 1 :] for values in self._points())
        return Plan(grid.time, alphas, sigmas, rows, of="noise")

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        # what is combined are the outputs as they are
        return torch.cat([rows.new_tensor([[0.0, 1.0]]).expand(len(rows), 2), rows[:, 2:]], 1)

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(num_inference_steps, device)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next evaluation's step: ``prev_sample``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return self._step(model_output, timestep, sample, return_dict=return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at ``timesteps`` [N], any of the chain's."""
        return self._diffused(original_samples, noise, self._chain_rows(original_samples, timesteps))


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the last slopes, newest first, in even steps."""


class _Solver(ChainScheduler):
    """The multistep solvers on x0: whole times, and ``prev_sample`` alone; over the chain, or with flow sigmas along a flow."""

    layout = "solver"
    whole_times: ClassVar[bool] = True
    gives_estimate: ClassVar[bool] = False

    def _times(self) -> Tensor:
        return self._grid.time.round() if self._rounds() else self._grid.time

    def _rounds(self) -> bool:
        """Whether times that belong to levels are rounded; else their fraction is cut off."""
        return bool(self._arguments["use_karras_sigmas"])

    def _follow(self, sigma: Tensor, last: float, device: _Device) -> None:
        """Make these levels of a flow the steps, the last to ``last``."""
        flow, levels = Flow(), torch.cat([sigma, sigma.new_tensor([last])]).float().double()
        self._visit(Grid.through(flow, levels, *flow.at(levels)))
        self._publish(sigma * self._arguments["num_train_timesteps"], device)
        self.sigmas = levels.float()
        self._levels = levels.tolist()
        self.num_inference_steps = len(sigma)
        self._rows(torch.empty(0, device=device), self._default_options())


class _Multistep(Scheduler):
    """Solvers whose order falls at the ends of a run."""

    def _multistep_orders(self, grid: Grid) -> list[int]:
        """Of the last steps, when these are all: lower at first, and in short runs at the end."""
        given, count = self._arguments, len(grid.time)
        orders = [min(given["solver_order"], step + 1) for step in range(count)]
        short = given["lower_order_final"] and len(self._grid.time) < 15
        if short or given.get("euler_at_final"):
            orders[-1] = 1
        if short and count > 1:
            orders[-2] = min(orders[-2], 2)
        return orders

    def _multistep_plan(self, sampler: DPMSolver, grid: Grid) -> Plan:
        """Of DPM-Solver, with upstream's third order."""
        orders = self._multistep_orders(grid)
        plan = sampler.plan_of_orders(grid, orders)
        if sampler.order == 3:
            third = [step for step, order in enumerate(orders) if order == 3]
            plan = plan._replace(rows=plan.rows + upstream_third_order(grid, third, sampler))
        return plan


class _DPMSolver(_Multistep, _Solver):
    """DPM-Solver and DPM-Solver++ and what comes near them, along a chain or a flow."""

    _algorithms: ClassVar[tuple[str, ...]] = ()
    _shift: float

    def _check(self) -> None:
        given = self._arguments
        kind, order, solver = given["algorithm_type"], given["solver_order"], given["solver_type"]
        # the names of other solvers mean the default, as upstream
        self._algorithm = "dpmsolver++" if kind == "deis" else kind
        self._solver_type = "heun" if solver == "heun" else "midpoint"
        if self._algorithm not in self._algorithms:
            raise ValueError(f"algorithm_type must be one of {', '.join(self._algorithms)}, got {kind!r}")
        if order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
        if solver not in ("midpoint", "heun", "logrho", "bh1", "bh2"):
            raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver!r}")
        if not self._algorithm.endswith("++") and given["final_sigmas_type"] == "zero":
            raise ValueError(f"algorithm_type={kind!r} needs final_sigmas_type='sigma_min', got 'zero'")

    @property
    def _stochastic(self) -> bool:
        return self._algorithm.startswith("sde-")

    @property
    def _on(self) -> Estimate:
        return "data" if self._algorithm.endswith("++") else "noise"

    def _build(self) -> None:
        self._shift = float(self._arguments["flow_shift"])
        super()._build()

    def _draws(self, index: int) -> bool:
        return self._stochastic

    def _last_of_flow(self, sigma: Tensor) -> float:
        alpha, rest = self._end()
        return rest / alpha

    def _lay(
        self, num_inference_steps: int | None, device: _Device, mu: float | None, timesteps: Sequence[int] | None = None
    ) -> None:
        given = self._arguments
        if mu is not None:
            if not given["use_dynamic_shifting"]:
                raise ValueError("mu needs use_dynamic_shifting=True")
            self._shift = math.exp(mu)
        if given["use_flow_sigmas"] and self._levels_kind() is None:
            if num_inference_steps is None:
                raise ValueError("give num_inference_steps: timesteps are not for use_flow_sigmas=True")
            sigma = torch.linspace(0, 1 - 1 / given["num_train_timesteps"], num_inference_steps + 1, dtype=torch.float64)
            sigma = shifted(sigma, self._shift).flip(0)[:-1]
            self._follow(sigma, self._last_of_flow(sigma), device)
            return
        bar = self._schedule.alphas_cumprod
        level = 0.5 * (bar.log() - (1 - bar).log())
        longest = int((level >= given.get("lambda_min_clipped", -math.inf)).sum())
        self._set_timesteps(num_inference_steps, device, timesteps, longest=longest)

    def _mean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The output without a learned variance, which samplers that have their own leave alone."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self._arguments.get("variance_type") in ("learned", "learned_range"):
            return model_output[:, : sample.shape[1]]
        return model_output


class DPMSolverMultistepScheduler(_DPMSolver):
    """DPM-Solver++, DPM-Solver on the noise ("dpmsolver") and their stochastic forms, of order 1 to 3; the third as upstream
    has it, which is not quite of that order (:class:`fastgen.diffusion.samplers.DPMSolver` is)."""

    narrow = True
    noise_dtype = torch.float32
    unsupported = ("time_shift_type",)
    _algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        if algorithm_type == "sde-dpmsolver" and solver_order == 3:
            raise ValueError("solver_order must be 1 or 2 for algorithm_type='sde-dpmsolver', got 3")
        self._check()
        self._build()

    def _sampler(self) -> DPMSolver:
        return DPMSolver(self._arguments["solver_order"], self._stochastic, self._solver_type, self._on)  # type: ignore[arg-type]

    def _plan(self, grid: Grid) -> Plan:
        return self._multistep_plan(self._sampler(), grid)

    def _rounds(self) -> bool:
        given = self._arguments
        return (super()._rounds() or given["use_lu_lambdas"]) and given["beta_schedule"] != "squaredcos_cap_v2"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, falling.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on.
        """
        self._lay(num_inference_steps, device, mu, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``."""
        model_output = self._mean(model_output, sample)
        noise = variance_noise if self._stochastic else None
        return self._step(model_output, timestep, sample, generator=generator, noise=noise, return_dict=return_dict)


class DPMSolverSinglestepScheduler(_DPMSolver):
    """DPM-Solver++, DPM-Solver on the noise and the former's stochastic form, single-step, of order 1 to 3.

    As upstream the last steps are of lower order where the number of steps is not a multiple of ``solver_order`` or the end is
    the data itself, whatever ``lower_order_final`` says (upstream then keeps it so for later runs), and "sde-dpmsolver++" of
    order 3 with "heun" weighs a curvature with the wrong sign.
    """

    unsupported = ("time_shift_type",)
    _algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")
    _block: Tensor | None = None

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._check()
        self._build()

    def _sampler(self) -> DPMSolverSinglestep:
        return DPMSolverSinglestep(self._arguments["solver_order"], self._solver_type, self._on)  # type: ignore[arg-type]

    def _orders(self, steps: int) -> list[int]:
        """The orders of the last so many steps, when these are all: at first there are no estimates for a higher one."""
        to_data = self._arguments["final_sigmas_type"] == "zero"
        orders = self._sampler().orders(len(self._grid.time), lower_final=to_data or self._arguments["lower_order_final"])
        if to_data:
            orders[-1] = 1
        return [min(order, i + 1) for i, order in enumerate(orders[len(orders) - steps :])]

    def _plan(self, grid: Grid) -> Plan:
        sampler, orders = self._sampler(), self._orders(len(grid.time))
        if not self._stochastic:
            return sampler.plan_of_orders(grid, orders)
        plan = sampler.from_starts(grid, orders, stochastic=True)
        return plan._replace(rows=plan.rows + upstream_block_order(grid, orders, sampler))

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        if not self._stochastic:
            return rows
        # within a block the state at its start stands behind the ring of estimates, in place of the present one
        inside = torch.tensor(self._orders(len(rows)))[:, None] > 1
        keep = rows[:, 2:3]
        return torch.cat([rows[:, :2], keep * ~inside, rows[:, 3:], keep * inside], 1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, falling.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on.
        """
        self._lay(num_inference_steps, device, mu, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``."""
        model_output, block = self._mean(model_output, sample), None
        if self._stochastic:
            index = self._position(timestep) - self._start
            orders = self._orders(len(self.timesteps) - self._start)
            if index >= len(orders) or orders[index] == 1:
                self._block = sample
            block = self._block
        return self._step(model_output, timestep, sample, generator=generator, beside=block, return_dict=return_dict)


class DEISMultistepScheduler(_DPMSolver):
    """Exponential integrator of Zhang and Chen (2023), polynomials of the noise in log(sigma / alpha): DPM-Solver on the noise
    with these integrated exactly."""

    unsupported = ("time_shift_type",)

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        # the names of other solvers mean the default, as upstream
        if algorithm_type not in ("deis", "dpmsolver", "dpmsolver++"):
            raise ValueError(f"algorithm_type must be 'deis', got {algorithm_type!r}")
        if solver_type not in ("logrho", "midpoint", "heun", "bh1", "bh2"):
            raise ValueError(f"solver_type must be 'logrho', got {solver_type!r}")
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {solver_order}")
        self._algorithm = "deis"
        self._build()

    def _sampler(self) -> DPMSolver:
        return DPMSolver(self._arguments["solver_order"], solver="heun", on="noise")

    def _plan(self, grid: Grid) -> Plan:
        return self._sampler().plan_of_orders(grid, self._multistep_orders(grid))

    def _end(self) -> tuple[float, float]:
        bar = float(self._schedule.alphas_cumprod[0])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _last_of_flow(self, sigma: Tensor) -> float:
        return float(sigma[-1])

    def set_timesteps(self, num_inference_steps: int, device: _Device = None, mu: float | None = None) -> None:
        """Lay out this many steps.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on.
        """
        self._lay(num_inference_steps, device, mu)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next step: ``prev_sample``."""
        return self._step(self._mean(model_output, sample), timestep, sample, return_dict=return_dict)


class UniPCMultistepScheduler(_Solver):
    """Unified predictor-corrector, of order 1 to 3.

    With ``solver_p`` this scheduler predicts and UniPC corrects; it may be one of ours or of diffusers', draws what noise it
    draws without a generator, and is told by :meth:`set_timesteps` how many steps there are.
    """

    _corrected: Tensor | None = None

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: _Betas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        # the names of other solvers' types mean the default, as upstream
        self._solver_type = "bh1" if solver_type == "bh1" else "bh2"
        if solver_type not in ("bh1", "bh2", "midpoint", "heun", "logrho"):
            raise ValueError(f"solver_type must be 'bh1' or 'bh2', got {solver_type!r}")
        if final_sigmas_type != "zero" and (use_karras_sigmas or use_exponential_sigmas or use_beta_sigmas or use_flow_sigmas):
            raise ValueError(f"final_sigmas_type={final_sigmas_type!r} ends levels that are spaced with an empty step")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', got {time_shift_type!r}")
        self._sampler()
        self._build()

    def _sampler(self) -> Sampler:
        given = self._arguments
        uncorrected = tuple(sorted(step - getattr(self, "_start", 0) for step in given["disable_corrector"]))
        on: Estimate = "data" if given["predict_x0"] else "noise"
        return UniPC(given["solver_order"], self._solver_type, bool(given["lower_order_final"]), uncorrected, on)  # type: ignore[arg-type]

    def _plan(self, grid: Grid) -> Plan:
        sampler = self._sampler()
        assert isinstance(sampler, UniPC)
        if self._arguments["solver_p"] is None:
            return sampler.plan(grid)
        plan = sampler.corrections(grid)
        return plan._replace(rows=plan.rows[:, :-1])

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        if self._arguments["solver_p"] is None:
            return rows
        # what is kept of the corrected state a step before, behind the ring of estimates
        sampler, steps = self._sampler(), len(plan.time)
        assert isinstance(sampler, UniPC)
        return torch.cat([rows, sampler.corrections(self._grid.tail(steps)).rows[:, -1:]], 1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out this many steps.

        Args:
            sigmas: with ``use_flow_sigmas`` their levels before the shift, falling.
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow; the shift itself if ``time_shift_type`` is
                "linear".
        """
        self._lay(num_inference_steps, device, sigmas, mu)
        if self._arguments["solver_p"] is not None:
            self._arguments["solver_p"].set_timesteps(self.num_inference_steps, device=device)

    def _lay(self, num_inference_steps: int | None, device: _Device, sigmas: Sequence[float] | None, mu: float | None) -> None:
        given = self._arguments
        if given["use_dynamic_shifting"] and mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu")
        if sigmas is not None and not given["use_flow_sigmas"]:
            raise ValueError("sigmas need use_flow_sigmas=True")
        kind, total = self._levels_kind(), given["num_train_timesteps"]
        if not given["use_flow_sigmas"] or kind in ("exponential", "beta"):
            self._set_timesteps(num_inference_steps, device)
            return
        if num_inference_steps is None and sigmas is None:
            raise ValueError("give num_inference_steps or sigmas")
        if kind == "karras":
            bar = self._schedule.alphas_cumprod
            low, high = ((1 - bar) / bar).sqrt()[[0, -1]].tolist()
            low = low if given["sigma_min"] is None else given["sigma_min"]
            high = high if given["sigma_max"] is None else given["sigma_max"]
            ratio = noise_levels("karras", int(num_inference_steps or 0), low, high)
            sigma = ratio / (ratio + 1)
        else:
            if sigmas is not None:
                sigma = torch.as_tensor(sigmas, dtype=torch.float64)
            else:
                sigma = torch.linspace(1, 1 / total, int(num_inference_steps or 0) + 1, dtype=torch.float64)[:-1]
            shift = given["flow_shift"]
            if mu is not None and given["use_dynamic_shifting"]:
                shift = math.exp(mu) if given["time_shift_type"] == "exponential" else mu
            sigma = shifted(sigma, shift)
            if given["shift_terminal"]:
                sigma = ending_at(sigma, given["shift_terminal"])
            # without any data there is no log(alpha)
            sigma = torch.where(sigma > 1 - 1e-6, 1 - 1e-6, sigma)
        self._follow(sigma, 0.0, device)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next step: ``prev_sample``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        predictor = self._arguments["solver_p"]
        if predictor is None:
            return self._step(model_output, timestep, sample, return_dict=return_dict)
        before = sample if self._position(timestep) == self._start or self._corrected is None else self._corrected
        self._corrected = self._step(model_output, timestep, sample, beside=before, return_dict=True).prev_sample
        out = predictor.step(model_output, timestep, self._corrected).prev_sample
        return SchedulerOutput(out) if return_dict else (out,)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Levels of a flow moved towards the noise, or from it where ``shift`` is below 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def ending_at(sigma: Tensor, last: float) -> Tensor:
    """Levels of a flow stretched so that the last is ``last``."""
    return 1 - (1 - sigma) * (1 - last) / (1 - sigma[-1])


class _FlowMatch(Scheduler):
    """Schedulers along a flow x = (1 - sigma) x0 + sigma eps, whose network predicts eps - x0."""

    narrow = True
    gives_estimate = False
    init_noise_sigma = 1.0

    def _start_from(self, sigma: Tensor) -> None:
        """Make these levels, falling, the steps until told otherwise."""
        self._schedule = Flow()
        self._take(sigma, None, None)
        self.sigmas = self.sigmas[:-1]
        self.sigma_min, self.sigma_max = float(self.sigmas[-1]), float(self.sigmas[0])

    def _target(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return target_rows("velocity", alpha, sigma)

    def _take(self, sigma: Tensor, time: Tensor | None, device: _Device, inverted: bool = False) -> None:
        if sigma.dim() != 1 or not bool((sigma.diff() < 0).all()) or not 0 < float(sigma[-1]) <= float(sigma[0]) <= 1:
            raise ValueError(f"sigmas must fall within (0, 1], got {sigma.tolist()}")
        last = 0.0
        if inverted:
            sigma, time, last = (1 - sigma.float()).double(), None, 1.0  # as upstream rounds
        levels = torch.cat([sigma, sigma.new_tensor([last])])
        self._visit(Grid.through(self._schedule, levels, *self._schedule.at(levels)))
        self._publish(sigma * self._arguments["num_train_timesteps"] if time is None else time, device)
        self.sigmas = levels.to(device, torch.float32)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at ``timestep`` [N] among the scheduler's."""
        return self._noised(sample, timestep, noise)


class FlowMatchEulerDiscreteScheduler(_FlowMatch):
    """Euler's method along a flow x = (1 - sigma) x0 + sigma eps, whose network predicts eps - x0.

    With ``invert_sigmas`` it goes the other way, from sigma 0 to 1: its network tells time from the data on.

    Attributes:
        sigmas: with the 0 (inverted the 1) at the end, on the device of ``timesteps`` = ``num_train_timesteps`` sigma.
    """

    noise_dtype = torch.float32

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        chosen = {"karras": use_karras_sigmas, "exponential": use_exponential_sigmas, "beta": use_beta_sigmas}
        kinds = [kind for kind, on in chosen.items() if on]
        if len(kinds) > 1:
            raise ValueError(f"only one of {' and '.join(f'use_{kind}_sigmas' for kind in kinds)} can be used")
        self._kind: Any = kinds[0] if kinds else None
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', got {time_shift_type!r}")
        self._shift = float(shift)
        sigma = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
        self._start_from(sigma if use_dynamic_shifting else shifted(sigma, self._shift))

    @property
    def shift(self) -> float:
        """s: sampling visits s sigma / (1 + (s - 1) sigma)."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Another shift, for the next :meth:`set_timesteps`."""
        self._shift = float(shift)

    def _sampler(self) -> Sampler:
        return Consistency() if self._arguments["stochastic_sampling"] else Euler()

    def _plan(self, grid: Grid) -> Plan:
        sampler = self._sampler()
        if self._arguments["invert_sigmas"] and isinstance(sampler, Euler):
            return on_noise(sampler.plan(mirrored(grid)))  # from sigma = 0 there is no slope towards the noise
        return sampler.plan(grid)

    def _draws(self, index: int) -> bool:
        return bool(self._arguments["stochastic_sampling"])  # in the last step too, which uses none

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: _Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their sigmas before the shift, falling; ``timesteps`` are what the network is told.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift; the shift itself if ``time_shift_type`` is "linear".
        """
        given = self._arguments
        if given["use_dynamic_shifting"] and mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu")
        lengths = {len(values) for values in (sigmas, timesteps) if values is not None}
        lengths |= set() if num_inference_steps is None else {num_inference_steps}
        if len(lengths) != 1:
            raise ValueError("give num_inference_steps, or sigmas or timesteps of one length")
        count, total = lengths.pop(), given["num_train_timesteps"]
        told = None if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64)
        if sigmas is not None:
            sigma = torch.as_tensor(sigmas, dtype=torch.float64)
        elif told is not None:
            sigma = told / total
        else:
            sigma = torch.linspace(self.sigma_max, self.sigma_min, count, dtype=torch.float64)
        shift = self._shift
        if given["use_dynamic_shifting"]:
            assert mu is not None
            shift = math.exp(mu) if given["time_shift_type"] == "exponential" else mu
        sigma = shifted(sigma, shift)
        if given["shift_terminal"]:
            sigma = ending_at(sigma, given["shift_terminal"])
        if self._kind is not None:
            sigma = noise_levels(self._kind, count, float(sigma[-1]), float(sigma[0]))
        self._take(sigma.clamp(max=1.0), told, device, given["invert_sigmas"])
        self.num_inference_steps = count

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``. As upstream, ``s_churn`` and its limits change nothing.

        Args:
            per_token_timesteps: [N, L] of samples [N, L, C]: each token steps from its own time to the next lower one of the
                scheduler's, or to the data; as upstream along +``model_output``, so its callers pass the negative velocity.
        """
        if per_token_timesteps is None:
            return self._step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        out = self._token_step(model_output, sample, per_token_timesteps, generator)
        self._step_index = self._position(timestep) + 1
        return SchedulerOutput(out) if return_dict else (out,)

    def _token_step(
        self, model_output: Tensor, sample: Tensor, per_token_timesteps: Tensor, generator: Generators | None
    ) -> Tensor:
        if per_token_timesteps.shape != sample.shape[:2] or sample.dim() != 3:
            raise ValueError(
                f"per_token_timesteps must be [N, L] for a sample [N, L, C], got {list(per_token_timesteps.shape)} for "
                f"{list(sample.shape)}"
            )
        if sample.dtype not in (torch.float32, torch.float64):
            sample = sample.float()
        here = (per_token_timesteps / self._arguments["num_train_timesteps"]).flatten()
        lower = self.sigmas.to(here.device)[:, None].expand(-1, len(here))
        there = torch.where(lower < here - 1e-6, lower, 0.0).amax(0)
        zero, one = torch.zeros_like(here), torch.ones_like(here)
        noise = key = None
        if self._arguments["stochastic_sampling"]:
            rows = torch.stack([one, -here, zero, 1 - there, there], 1)
            noise = None if generator is None else drawn(sample, generator, torch.float32).flatten(0, 1)
            key = random.fresh_key(sample.device) if noise is None else None
        else:
            rows, key = torch.stack([zero, one, one, here - there, zero], 1), random.key(0, device=sample.device)
        tokens, outputs = sample.flatten(0, 1), model_output.flatten(0, 1)
        wide = torch.promote_types(sample.dtype, torch.float32)
        stepped = ops.denoise(tokens, outputs, rows.to(wide), key, noise=noise, return_x0=False).x_next
        return stepped.view_as(sample)


class FlowMatchHeunDiscreteScheduler(_InPairs, _FlowMatch):
    """Heun's method of second order along a flow: each time but the first comes twice in ``timesteps``.

    Churn is as diffusers has it: its noise comes after the evaluation that should see it.

    Attributes:
        sigmas: as often as their times, and the 0 at the end.
    """

    _churns = False

    @recorded
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        sigma = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
        self._start_from(shifted(sigma, float(shift)))

    def _default_options(self) -> tuple[Any, ...]:
        return 0.0, 0.0, math.inf, 1.0

    def _plan(self, grid: Grid, *churn: float) -> Plan:
        here, there, zero = grid.sigma, grid.next_sigma, torch.zeros_like(grid.sigma)
        hat, noise, way = _churned(here, there, churn, 2 * len(self._grid.time) - 1)
        # upstream takes the output for the slope at the level before churn, and shares it out over the one after
        slope, one = way * here / hat, torch.ones_like(here)
        euler = torch.stack([one, slope, noise, zero], 1)
        correction = torch.stack([one, 0.5 * way, zero, -0.5 * slope], 1)
        rows = torch.stack([euler, correction], 1).flatten(0, 1)[:-1]
        alpha, sigma = (torch.cat([self._twice(v), end[-1:]]) for v, end in ((grid.alpha, grid.next_alpha), (here, there)))
        return Plan(self._twice(grid.time), alpha, sigma, rows, of="slope")

    def _draws(self, index: int) -> bool:
        # a correction draws noise as its step does, and uses none
        return self._churns and bool((index - self._start) % 2)

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        sigma = torch.linspace(self.sigma_max, self.sigma_min, num_inference_steps, dtype=torch.float64)
        self._take(shifted(sigma, float(self._arguments["shift"])), None, device)
        self._publish(self._twice(self.timesteps), device)
        self.sigmas = torch.cat([self._twice(self.sigmas[:-1]), self.sigmas[-1:]])
        self._levels = self.sigmas.tolist()
        self.num_inference_steps = num_inference_steps

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next evaluation's step or correction: ``prev_sample``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        index = self._position(timestep)
        self._churns = s_churn > 0 and s_tmin <= self._levels[index - index % 2] <= s_tmax
        churn = (float(s_churn), float(s_tmin), float(s_tmax), float(s_noise))
        return self._step(model_output, timestep, sample, options=churn, generator=generator, return_dict=return_dict)


class _EDM(Scheduler):
    """Schedulers of the networks of Karras et al. (2022): x = x0 + sigma eps, and the estimate of the data is
    c_skip x + c_out F with the network's output F for c_in x and c_noise = log(sigma) / 4."""

    _data: float

    def _build(self, ramp: Tensor) -> None:
        given = self._arguments
        for name, known in (
            ("sigma_schedule", ("karras", "exponential")),
            ("prediction_type", ("epsilon", "v_prediction")),
            ("final_sigmas_type", ("zero", "sigma_min")),
        ):
            if given[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given[name]!r}")
        self._data = float(given["sigma_data"])
        self._schedule = Karras(given["sigma_min"], given["sigma_max"], given["rho"])
        self._lay(ramp, None)

    @property
    def init_noise_sigma(self) -> float:
        """Scale of the noise that sampling starts from."""
        return math.sqrt(self._arguments["sigma_max"] ** 2 + 1)

    def _last(self, levels: Tensor) -> float:
        """The level that the last step goes to, where it is not 0."""
        return self._arguments["sigma_min"]

    def _lay(self, ramp: Tensor, device: _Device) -> None:
        """Make the levels at these places between the largest and the smallest, 0 to 1, the steps; with upstream's bits."""
        given = self._arguments
        low, high = given["sigma_min"], given["sigma_max"]
        if given["sigma_schedule"] == "karras":
            ends = [level ** (1 / given["rho"]) for level in (high, low)]
            levels = ((ends[0] + ramp * (ends[1] - ends[0])) ** given["rho"]).float()
        else:
            levels = torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)
        last = 0.0 if given["final_sigmas_type"] == "zero" else self._last(levels)
        self.sigmas = torch.cat([levels, levels.new_tensor([last])])
        points = self.sigmas.double()
        self._visit(Grid.through(self._schedule, points, *self._schedule.at(points)))
        self._publish(self.precondition_noise(levels), device)

    def _set_timesteps(self, ramp: Tensor, device: _Device) -> None:
        self._lay(ramp, device)
        self.num_inference_steps = len(ramp)
        self._rows(torch.empty(0, device=device), self._default_options())

    def _default_options(self) -> tuple[Any, ...]:
        return ()

    def _scales(self, sigma: Any) -> tuple[Any, Any]:
        """(c_skip, c_out)."""
        total = sigma**2 + self._data**2
        out = sigma * self._data / total**0.5
        return self._data**2 / total, out if self._arguments["prediction_type"] == "epsilon" else -out

    def _target(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        # F = (x0 - c_skip x) / c_out
        skip, out = self._scales(sigma)
        return torch.stack([alpha, sigma, (1 - skip) / out, -skip * sigma / out], -1)

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """c_in times the sample at this level: what the network is shown."""
        return sample * (1 / (sigma**2 + self._data**2) ** 0.5)

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """c_noise of this level: what the network is told."""
        return 0.25 * torch.log(sigma if isinstance(sigma, Tensor) else torch.tensor([sigma]))

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """The estimate of the data at this level."""
        skip, out = self._scales(sigma)
        return skip * sample + out * model_output

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """c_in times the sample: what the network is shown."""
        assert timestep is not None or self._step_index is not None, "the first call needs the timestep"
        return self.precondition_inputs(sample, float(self.sigmas[self._position(timestep)]))  # type: ignore[arg-type]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The samples with the noise of ``timesteps`` [N], of the scheduler's."""
        return self._noised(original_samples, timesteps, noise)


class EDMEulerScheduler(_EDM):
    """Euler's method on the probability flow, for EDM's networks.

    Churn is as diffusers has it, which adds its noise after the evaluation that should see it.
    """

    narrow = True

    @recorded
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._build(torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps)

    def _last(self, levels: Tensor) -> float:
        return float(levels[-1])

    def _default_options(self) -> tuple[Any, ...]:
        return 0.0, 0.0, math.inf, 1.0, False

    def _plan(self, grid: Grid, *options: Any) -> Plan:
        return Euler().plan(grid)

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        *churn, given = options
        hat, noise, way = _churned(plan.sigma[:-1], plan.sigma[1:], tuple(churn), len(self.sigmas) - 1)
        p, q = estimate_rows(self._target(torch.ones_like(hat), hat)).unbind(1)
        if given:
            p, q = torch.zeros_like(p), torch.ones_like(q)
        # a step along (x + z - x0) / hat, where p z of x0 is the noise's
        step = way / hat
        return torch.stack([p, q, 1 + step, -step, noise * (1 + step - step * p)], 1)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: _Device = None, sigmas: Tensor | Sequence[float] | None = None
    ) -> None:
        """Lay out the steps: how many, or where.

        Args:
            sigmas: as upstream not levels, but their places between ``sigma_max`` (0) and ``sigma_min`` (1), rising.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("give one of num_inference_steps and sigmas")
        if sigmas is None:
            ramp = torch.linspace(0, 1, int(num_inference_steps or 0), dtype=torch.float64)
        else:
            ramp = torch.as_tensor(sigmas, dtype=torch.float64)
            if ramp.dim() != 1 or not bool((ramp.diff() > 0).all()) or not 0 <= float(ramp[0]) <= float(ramp[-1]) <= 1:
                raise ValueError(f"sigmas must rise within 0 .. 1, got {ramp.tolist()}")
        self._set_timesteps(ramp, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators | None = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """The next step: ``prev_sample`` and ``pred_original_sample``, which with churn is without its noise.

        Args:
            pred_original_sample: the estimate of the data, where it is known, in place of ``model_output``'s.
        """
        given = pred_original_sample is not None
        options = (float(s_churn), float(s_tmin), float(s_tmax), float(s_noise), given)
        output = model_output if pred_original_sample is None else pred_original_sample
        return self._step(output, timestep, sample, options=options, generator=generator, return_dict=return_dict)


class EDMDPMSolverMultistepScheduler(_Multistep, _EDM):
    """DPM-Solver++ of order 1 to 3 and its stochastic form, of order 1 and 2, for EDM's networks; the third order as upstream
    has it, which is not quite of that order."""

    gives_estimate = False

    @recorded
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        solver_order: int = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        # the names of other solvers mean the default, as upstream
        if algorithm_type not in ("dpmsolver++", "sde-dpmsolver++", "deis"):
            raise ValueError(f"algorithm_type must be 'dpmsolver++' or 'sde-dpmsolver++', got {algorithm_type!r}")
        if solver_type not in ("midpoint", "heun", "logrho", "bh1", "bh2"):
            raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
        self._stochastic = algorithm_type == "sde-dpmsolver++"
        highest = 2 if self._stochastic else 3
        if not 1 <= solver_order <= highest:
            raise ValueError(
                f"solver_order must be in 1 .. {highest} for algorithm_type={algorithm_type!r}, got {solver_order}"
            )
        self._build(torch.linspace(0, 1, num_train_timesteps))

    def _plan(self, grid: Grid) -> Plan:
        given = self._arguments
        solver: Any = "heun" if given["solver_type"] == "heun" else "midpoint"
        return self._multistep_plan(DPMSolver(given["solver_order"], self._stochastic, solver), grid)

    def _draws(self, index: int) -> bool:
        return self._stochastic

    def set_timesteps(self, num_inference_steps: int, device: _Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(torch.linspace(0, 1, num_inference_steps), device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return self._step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
