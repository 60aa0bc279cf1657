"""Pseudo linear multistep of order 4: along a chain, and along a quarter circle."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import Plan
from fastgen.diffusion.schedules import Cosine, Grid, target_rows
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Betas, ChainScheduler, Device, Scheduler

__all__ = ["IPNDMScheduler", "PNDMScheduler"]


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
        trained_betas: Betas = None,
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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


class IPNDMScheduler(Scheduler):
    """Pseudo linear multistep of order 4 on the noise (Liu et al., 2022) along alpha^2 + sigma^2 = 1, the first steps of as
    much as there is; for networks that predict v and are told 2 / pi of the angle, 0 to 1.

    Attributes:
        betas, alphas: sigma and alpha at each of ``timesteps`` and at the end, float32 on the CPU, with diffusers' bits.
    """

    gives_estimate: ClassVar[bool] = False
    init_noise_sigma: ClassVar[float] = 1.0

    @recorded
    def __init__(self, num_train_timesteps: int = 1000, trained_betas: Betas = None) -> None:
        self._schedule = Cosine()
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Lay out this many steps: sigma from 1 to 0 as sin^2; or, with ``trained_betas``, those."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        given = self._arguments["trained_betas"]
        if given is None:
            falling = torch.linspace(1, 0, num_inference_steps + 1)
            self.betas = torch.sin(falling * math.pi / 2) ** 2
        else:
            self.betas = torch.as_tensor(given, dtype=torch.float32)
        self.alphas = (1.0 - self.betas**2) ** 0.5
        time = torch.atan2(self.betas, self.alphas) / math.pi * 2
        self._visit(Grid.through(self._schedule, time.double(), self.alphas.double(), self.betas.double()))
        self._publish(time[:-1], device)
        self.num_inference_steps = num_inference_steps
        self._rows(torch.empty(0, device=device), ())

    def _target(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return target_rows("v", alpha, sigma)

    def _plan(self, grid: Grid) -> Plan:
        # without any data the state is the noise, and what is predicted adds nothing
        keep = torch.where(grid.alpha > 0, grid.next_alpha / grid.alpha, 0.0)
        gain = grid.next_sigma - keep * grid.sigma
        weights = torch.zeros(len(gain), 4, dtype=torch.float64)
        for i, row in enumerate(weights):
            order = min(i + 1, 4)
            row[:order] = gain[i] * torch.tensor(_ADAMS_BASHFORTH[order], dtype=torch.float64)
        rows = torch.cat([keep[:, None], weights[:, :1], torch.zeros_like(weights[:, :1]), weights[:, 1:]], 1)
        alphas, sigmas = (values[-len(gain) - 1 :] for values in self._points())
        return Plan(grid.time, alphas, sigmas, rows, of="noise")

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next step: ``prev_sample``."""
        return self._step(model_output, timestep, sample, return_dict=return_dict)
