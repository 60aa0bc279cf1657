"""Few steps of networks that are distilled to estimate the data at once: LCM and TCD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import Consistency, Plan
from fastgen.diffusion.schedules import Grid
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Betas, Device, Generators, StepOutput
from fastgen.interop.diffusers.schedulers.chain import InOrder

__all__ = ["LCMScheduler", "LCMSchedulerOutput", "TCDScheduler", "TCDSchedulerOutput"]


class _Distilled(InOrder):
    """Schedulers whose steps are some of those that the network was distilled for.

    As upstream a run of ``timesteps`` that ``strength`` cuts short does not end at its last step, but at the noise of that.
    """

    _compatibles: ClassVar[list[str]] = []
    _cut: int | None = None
    """The time of a last step that does not end at the data."""

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Betas = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._build()

    def _build(self) -> None:
        super()._build()
        self.final_alpha_cumprod = torch.tensor(1.0) if self._arguments["set_alpha_to_one"] else self.alphas_cumprod[0]

    def _draws(self, index: int) -> bool:
        return index != self.num_inference_steps - 1  # type: ignore[operator]

    def _learned(self, original: int | None, strength: float) -> Tensor:
        """The times that the network was distilled for, falling."""
        count = original or self._arguments["original_inference_steps"]
        return torch.arange(int(count * strength), 0, -1) * (len(self) // count) - 1

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Lay out the steps: how many of those of the distillation, or their times, falling.

        Args:
            original_inference_steps: how many steps the network was distilled for, in place of the scheduler's.
            strength: the share of these steps that is left, from the data on; of ``timesteps``, that many of the last.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give one of num_inference_steps and timesteps")
        original = original_inference_steps or self._arguments["original_inference_steps"]
        if not 1 <= original <= len(self):
            raise ValueError(f"original_inference_steps must be in 1 .. {len(self)}, got {original}")
        if timesteps is not None:
            kept = list(timesteps)[len(timesteps) - min(int(len(timesteps) * strength), len(timesteps)) :]
            count = len(timesteps)
        else:
            count = int(num_inference_steps or 0)
            learned = self._learned(original_inference_steps, strength)
            most = min(len(learned), original)
            if not 1 <= count <= most:
                raise ValueError(
                    f"num_inference_steps must be in 1 .. {most} with original_inference_steps={original} and "
                    f"strength={strength}, got {count}"
                )
            places = torch.arange(count, dtype=torch.float64) * (len(learned) / count)
            kept = learned[places.long()].tolist()
        self._cut = kept[-1] if 0 < len(kept) < count else None
        self._set_timesteps(None, device, kept)
        self.num_inference_steps = count


class LCMSchedulerOutput(StepOutput):
    """The next sample and the estimate of the data."""

    __slots__ = ()

    @property
    def denoised(self) -> Tensor | None:
        """The estimate of the data, and what is left of the sample at times near it."""
        return self._second()


class LCMScheduler(_Distilled):
    """Latent consistency models (Luo et al., 2023): the estimate of the data, and fresh noise."""

    output = LCMSchedulerOutput

    def get_scalings_for_boundary_condition_discrete(self, timestep: Any) -> tuple[Any, Any]:
        """(c_skip, c_out) at a time, with which the estimate becomes the sample itself towards time 0."""
        time = timestep * self._arguments["timestep_scaling"]
        return 0.25 / (time**2 + 0.25), time / (time**2 + 0.25) ** 0.5

    def _end(self) -> tuple[float, float]:
        if self._cut is None:
            return 1.0, 0.0
        bar = float(self._schedule.alphas_cumprod[self._cut])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _plan(self, grid: Grid) -> Plan:
        plan = Consistency().plan(grid)
        skip, out = self.get_scalings_for_boundary_condition_discrete(grid.time)
        rows = torch.stack([plan.rows[:, 1] * skip, plan.rows[:, 1] * out, plan.rows[:, 2]], 1)
        return plan._replace(rows=rows)

    def _beside(self, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        return torch.stack(self.get_scalings_for_boundary_condition_discrete(plan.time), 1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample`` and ``denoised``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        return self._step(model_output, timestep, sample, generator=generator, clamp=self._clamp(), return_dict=return_dict)


class TCDSchedulerOutput(StepOutput):
    """The next sample, and before its noise."""

    __slots__ = ()

    @property
    def pred_noised_sample(self) -> Tensor | None:
        """The sample at the time that the step goes to before it comes back by noise."""
        return self._second()


class TCDScheduler(_Distilled):
    """Trajectory consistency distillation (Zheng et al., 2024): steps past where they end, and back there by noise.

    As upstream the last step ends at time 0 and not at the data, and estimates are neither clipped nor thresholded.
    """

    output = TCDSchedulerOutput
    _thresholds = False

    def _learned(self, original: int | None, strength: float) -> Tensor:
        # told how many there were upstream takes all of the chain's
        if original is None:
            return super()._learned(original, strength)
        return torch.arange(int(len(self) * strength) - 1, -1, -1)

    def _end(self) -> tuple[float, float]:
        bar = float(self._schedule.alphas_cumprod[0])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _default_options(self) -> tuple[Any, ...]:
        return (0.3,)

    def _past(self, grid: Grid, eta: float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the times that steps go to first."""
        return self._schedule.at(((1 - eta) * grid.next_time.clamp(min=0)).floor())

    def _plan(self, grid: Grid, eta: float) -> Plan:
        return Consistency.plan_past(grid, *self._past(grid, eta))

    def _beside(self, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        alpha, sigma = self._past(self._grid.tail(len(plan.time)), *options)
        keep = sigma / plan.sigma[:-1]
        return torch.stack([keep, alpha - plan.alpha[:-1] * keep], 1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample`` and ``pred_noised_sample``.

        Args:
            eta: how much of the way from where the step ends to time 0 it goes too far (gamma in the paper), 0 to 1.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in 0 .. 1, got {eta}")
        generator = generator if eta > 0 else None
        return self._step(model_output, timestep, sample, options=(float(eta),), generator=generator, return_dict=return_dict)
