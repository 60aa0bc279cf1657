"""Schedulers along a flow x = (1 - sigma) x0 + sigma eps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.samplers import Consistency, Euler, Plan, Sampler, mirrored, on_noise
from fastgen.diffusion.schedules import Flow, Grid, Levels, noise_levels, target_rows
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Device, Generators, Scheduler, SchedulerOutput, drawn
from fastgen.interop.diffusers.schedulers.k_diffusion import InPairs, churned

__all__ = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "check_shift_type",
    "ending_at",
    "shift_of",
    "shifted",
]


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Levels of a flow moved towards the noise, or from it where ``shift`` is below 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def check_shift_type(kind: str) -> None:
    """Raise a ValueError for a ``time_shift_type`` that :func:`shift_of` does not know."""
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type must be 'exponential' or 'linear', got {kind!r}")


def shift_of(mu: float, kind: str) -> float:
    """The shift that ``mu`` is the logarithm of, or if its ``kind`` is "linear" the shift itself."""
    return math.exp(mu) if kind == "exponential" else mu


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

    def _take(self, sigma: Tensor, time: Tensor | None, device: Device, inverted: bool = False) -> None:
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


class _Shifted(_FlowMatch):
    """Levels that are shifted, stretched or spaced as the config says.

    Attributes:
        sigmas: with the 0 (inverted the 1) at the end, on the device of ``timesteps`` = ``num_train_timesteps`` sigma.
    """

    noise_dtype = torch.float32

    def _build(self) -> None:
        given = self._arguments
        kinds = [kind for kind in get_args(Levels) if given[f"use_{kind}_sigmas"]]
        if len(kinds) > 1:
            raise ValueError(f"only one of {' and '.join(f'use_{kind}_sigmas' for kind in kinds)} can be used")
        self._kind: Levels | None = kinds[0] if kinds else None
        check_shift_type(given["time_shift_type"])
        self._shift = float(given["shift"])
        total = given["num_train_timesteps"]
        sigma = torch.arange(total, 0, -1, dtype=torch.float64) / total
        self._start_from(sigma if given["use_dynamic_shifting"] else shifted(sigma, self._shift))

    @property
    def shift(self) -> float:
        """s: sampling visits s sigma / (1 + (s - 1) sigma)."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Another shift, for the next :meth:`set_timesteps`."""
        self._shift = float(shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
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
            shift = shift_of(mu, given["time_shift_type"])
        sigma = shifted(sigma, shift)
        if given["shift_terminal"]:
            sigma = ending_at(sigma, given["shift_terminal"])
        if self._kind is not None:
            sigma = noise_levels(self._kind, count, float(sigma[-1]), float(sigma[0]))
        self._take(sigma.clamp(max=1.0), told, device, given["invert_sigmas"])
        self.num_inference_steps = count


class FlowMatchEulerDiscreteScheduler(_Shifted):
    """Euler's method along a flow x = (1 - sigma) x0 + sigma eps, whose network predicts eps - x0.

    With ``invert_sigmas`` it goes the other way, from sigma 0 to 1: its network tells time from the data on.
    """

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
        self._build()

    def _sampler(self) -> Sampler:
        return Consistency() if self._arguments["stochastic_sampling"] else Euler()

    def _plan(self, grid: Grid) -> Plan:
        sampler = self._sampler()
        if self._arguments["invert_sigmas"] and isinstance(sampler, Euler):
            return on_noise(sampler.plan(mirrored(grid)))  # from sigma = 0 there is no slope towards the noise
        return sampler.plan(grid)

    def _draws(self, index: int) -> bool:
        return bool(self._arguments["stochastic_sampling"])  # in the last step too, which uses none

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


class FlowMatchLCMScheduler(_Shifted):
    """The estimate of the data with fresh noise along a flow, for networks that are distilled to few steps; with
    ``scale_factors`` from small samples to large ones (Starodubcev et al., 2025, "Scale-wise distillation").

    Args:
        scale_factors: after each step but the last, the size of the sample over that of the first; None: it stays.
        upscale_mode: how estimates are resized, a mode of :func:`torch.nn.functional.interpolate`.
    """

    _scale_factors: Sequence[float] | None
    _upscale_mode: str | None
    _first_size: torch.Size

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        time_shift_type: str = "exponential",
        scale_factors: list[float] | None = None,
        upscale_mode: str = "bicubic",
    ) -> None:
        self.set_scale_factors(scale_factors, upscale_mode)
        self._build()

    def set_scale_factors(self, scale_factors: Sequence[float] | None, upscale_mode: str | None) -> None:
        """Other sizes, from now on."""
        self._scale_factors, self._upscale_mode = scale_factors, upscale_mode

    def _default_options(self) -> tuple[Any, ...]:
        return (False,)

    def _plan(self, grid: Grid, known: bool) -> Plan:
        return Consistency().plan(grid)

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        if options == (False,):
            return rows
        # the estimate is known, and stands in for the output
        return torch.cat([torch.zeros_like(rows[:, :1]), torch.ones_like(rows[:, :1]), rows[:, 2:]], 1)

    def _draws(self, index: int) -> bool:
        return True  # in the last step too, which uses none

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``, of the next size."""
        factors = self._scale_factors if self._upscale_mode else None
        if not factors:
            options = self._default_options()
            return self._step(model_output, timestep, sample, options=options, generator=generator, return_dict=return_dict)
        if len(factors) + 1 != len(self.timesteps):
            raise ValueError(f"{len(self.timesteps)} steps need one factor less in scale_factors, got {len(factors)}")
        if self._step_index is None:
            self._first_size = model_output.shape[2:]
        index = self._position(timestep)
        known = sample.to(torch.promote_types(sample.dtype, torch.float32))
        table = self._rows(known, self._default_options())
        known = ops.denoise(known, model_output, table.estimating[index - self._start], table.quiet, return_x0=False).x_next
        if index < len(factors):
            size = [round(factors[index] * length) for length in self._first_size]
            known = torch.nn.functional.interpolate(known, size=size, mode=self._upscale_mode)  # type: ignore[arg-type]
        out = self._step(known, timestep, known, options=(True,), generator=generator).prev_sample.to(model_output.dtype)
        return SchedulerOutput(out) if return_dict else (out,)


class FlowMatchHeunDiscreteScheduler(InPairs, _FlowMatch):
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
        hat, noise, way = churned(here, there, churn, 2 * len(self._grid.time) - 1)
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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
