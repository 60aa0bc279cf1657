"""The schedulers of k-diffusion: the methods of Euler and Heun, the midpoint method and linear multistep, on x / alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import DPM2, LMS, Euler, EulerAncestral, Heun, Plan, Sampler
from fastgen.diffusion.schedules import Grid, noise_levels
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Betas, ChainScheduler, Device, Generators, Scheduler

__all__ = [
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "InLevels",
    "InPairs",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "churned",
]


class InLevels(ChainScheduler):
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


def churned(here: Tensor, there: Tensor, options: tuple[float, ...], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Churn as diffusers has it: the levels that it lifts ``here`` to, the noise that does, and the way to ``there``."""
    churn, low, high, scale = options
    within = (here >= low) & (here <= high)
    more = torch.where(within, min(max(churn, 0.0) / steps, math.sqrt(2) - 1), 0.0)
    hat = here * (1 + more)
    return hat, scale * (hat.square() - here.square()).sqrt(), there - hat


class EulerDiscreteScheduler(InLevels):
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
        trained_betas: Betas = None,
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
        hat, z, way = churned(here, there, options, len(self.sigmas) - 1)
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

    def _set_log_linear(self, device: Device) -> None:
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
        device: Device = None,
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

    def _set_levels(self, ratio: Tensor, device: Device) -> None:
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


class EulerAncestralDiscreteScheduler(InLevels):
    """Ancestral Euler."""

    narrow = True

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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


class InPairs(Scheduler):
    """Methods of two evaluations a step, but one for the last."""

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


class HeunDiscreteScheduler(InPairs, InLevels):
    """Heun's method of second order: each time but the first comes twice in ``timesteps``."""

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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
        device: Device = None,
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


class _Midpoint(InPairs, InLevels):
    """The midpoint method: between each two times stands that of the middle in log(sigma / alpha), as a float32.

    As upstream ``sigmas``, and what ``add_noise`` adds at the time of a middle, are those of the step's end.
    """

    _eta: ClassVar[float] = 0.0

    def _sampler(self) -> Sampler:
        return DPM2(self._eta)

    def _times(self) -> Tensor:
        time = self._middles.time
        if self._arguments["use_karras_sigmas"]:
            time[::2] = time[::2].round()
        return time

    def _visit(self, grid: Grid) -> None:
        super()._visit(grid)
        self._middles = self._plan(grid)

    def _level(self) -> None:
        super()._level()
        self.sigmas = torch.cat([self.sigmas, self.sigmas[-1:], self.sigmas[-1:]])
        self._scales = self._middles.alpha.tolist()

    def set_timesteps(self, num_inference_steps: int, device: Device = None, num_train_timesteps: int | None = None) -> None:
        """Lay out this many steps. ``num_train_timesteps`` can only be the scheduler's own."""
        if num_train_timesteps not in (None, self._arguments["num_train_timesteps"]):
            raise ValueError(f"num_train_timesteps={num_train_timesteps} is not supported in set_timesteps")
        self._set_timesteps(num_inference_steps, device)


class KDPM2DiscreteScheduler(_Midpoint):
    """The midpoint method of second order: DPM-Solver-2, on even steps Karras et al. (2022)'s with alpha = 1 / 2."""

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._build()

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next evaluation's step: ``prev_sample`` and ``pred_original_sample``."""
        return self._step(model_output, timestep, sample, return_dict=return_dict)


class KDPM2AncestralDiscreteScheduler(_Midpoint):
    """The midpoint method down to less noise than wanted, and noise up again."""

    _eta = 1.0

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._build()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next evaluation's step: ``prev_sample`` and ``pred_original_sample``."""
        return self._step(model_output, timestep, sample, generator=generator, return_dict=return_dict)


class LMSDiscreteScheduler(InLevels):
    """Linear multistep method on the slopes."""

    _order = 4

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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
