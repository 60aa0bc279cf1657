"""DDPM and DDIM, whose steps depend on their times alone, and DDIM from the data to the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import DDIM, DDPM, Consistency, Layout, Plan, Sampler
from fastgen.diffusion.schedules import Grid
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Betas, ChainScheduler, Device, Generators

__all__ = ["DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "InOrder", "WholeChain"]


class WholeChain(ChainScheduler):
    """Schedulers that add noise at any time of the chain, and have its end as it is."""

    whole_times: ClassVar[bool] = True
    finite_levels: ClassVar[bool] = False

    def _end(self) -> tuple[float, float]:
        bar = 1.0 if self._arguments.get("set_alpha_to_one", True) else float(self._schedule.alphas_cumprod[0])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _clamp(self) -> float | None:
        return self._arguments["clip_sample_range"] if self._arguments["clip_sample"] else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at ``timesteps`` [N], any of the chain's."""
        return self._diffused(original_samples, noise, self._chain_rows(original_samples, timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0 at ``timesteps`` [N], any of the chain's: the target of ``v_prediction``."""
        return self._diffused(sample, noise, self._chain_rows(sample, timesteps, velocity=True))


class InOrder(WholeChain):
    """Schedulers that step to the next of ``timesteps``."""

    layout = "index"

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The time that a step from ``timestep`` goes to; -1 is the data."""
        later = [*self._list, -1][self.index_for_timestep(timestep) + 1]
        return int(later)


class DDPMScheduler(InOrder):
    """Ancestral sampling (Ho et al., 2020). ``variance_type`` "fixed_large_log" is "fixed_large": upstream takes the root of
    its logarithm, which is NaN."""

    by_counter: ClassVar[bool] = False

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Lay out the steps: how many, or their times, falling."""
        self._set_timesteps(num_inference_steps, device, timesteps)

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


def _as_predicted(estimate: Tensor, given: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Rows to alpha x0 + sigma eps, with the noise as it is predicted, whatever clipping does to the estimate: the prediction
    stands in for a history of one."""
    a, b, c, d = given.unbind(1)
    amount = sigma / (a * d - b * c)
    return torch.cat([estimate, torch.stack([-c * amount, alpha, noise, a * amount], 1)], 1)


class DDIMScheduler(WholeChain):
    """Implicit sampling (Song et al., 2021).

    Args:
        exact_steps: not in diffusers: step to the next of ``timesteps`` rather than back by ``num_train_timesteps //
            num_inference_steps``, which misses it for linspace and trailing spacing. The rest is as in diffusers.
    """

    layout: Layout = "stride"
    by_counter: ClassVar[bool] = False
    extras = ("exact_steps",)

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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

    def _sampler(self, eta: float, unclipped: bool) -> Sampler:
        return DDIM(eta)

    def _default_options(self) -> tuple[Any, ...]:
        return 0.0, False

    def _draws(self, index: int) -> bool:
        return True

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        if not options[1]:
            return rows
        alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
        keep, signal, noise = rows[:, 2:].unbind(1)
        return _as_predicted(rows[:, :2], self._target(alpha, sigma), signal + keep * alpha, keep * sigma, noise)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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


class DDIMInverseScheduler(WholeChain):
    """Implicit sampling from the data to the noise (Song et al., 2021; Dhariwal and Nichol, 2021): each step goes to its own
    time, from ``num_train_timesteps // num_inference_steps`` before it, with the prediction of the noise there.

    Attributes:
        initial_alpha_cumprod: alpha^2 of what the first step goes from.
    """

    layout: Layout = "stride"
    by_counter: ClassVar[bool] = False
    spacings = ("leading", "trailing")
    _compatibles: ClassVar[list[str]] = []

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if prediction_type == "sample" and set_alpha_to_one:
            raise ValueError("prediction_type='sample' needs set_alpha_to_one=False: it does not tell the noise of the data")
        self._build()
        self.initial_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def _sampler(self) -> Sampler:
        return Consistency()

    def _visit(self, grid: Grid) -> None:
        back = grid.time, grid.next_alpha, grid.next_sigma, grid.time, grid.alpha, grid.sigma
        super()._visit(Grid(grid.schedule, *(values.flip(0) for values in back)))

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        alpha, sigma = rows[:, 3:].unbind(1)
        given = self._target(plan.alpha[:-1], plan.sigma[:-1])
        return _as_predicted(rows[:, :2], given, alpha, sigma, torch.zeros_like(sigma))

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Lay out this many steps."""
        self._set_timesteps(num_inference_steps, device)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """To ``timestep`` from the one before: ``prev_sample``, which is the noisier, and ``pred_original_sample``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return self._step(model_output, timestep, sample, clamp=self._clamp(), beside=model_output, return_dict=return_dict)
