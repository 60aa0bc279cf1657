"""Schedulers of the networks of Karras et al. (2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.diffusion.samplers import DPMSolver, Euler, Plan
from fastgen.diffusion.schedules import Grid, Karras, estimate_rows
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Device, Generators, Scheduler
from fastgen.interop.diffusers.schedulers.k_diffusion import churned
from fastgen.interop.diffusers.schedulers.solvers import Multistep

__all__ = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]


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

    def _lay(self, ramp: Tensor, device: Device) -> None:
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

    def _set_timesteps(self, ramp: Tensor, device: Device) -> None:
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
        hat, noise, way = churned(plan.sigma[:-1], plan.sigma[1:], tuple(churn), len(self.sigmas) - 1)
        p, q = estimate_rows(self._target(torch.ones_like(hat), hat)).unbind(1)
        if given:
            p, q = torch.zeros_like(p), torch.ones_like(q)
        # a step along (x + z - x0) / hat, where p z of x0 is the noise's
        step = way / hat
        return torch.stack([p, q, 1 + step, -step, noise * (1 + step - step * p)], 1)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, sigmas: Tensor | Sequence[float] | None = None
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


class EDMDPMSolverMultistepScheduler(Multistep, _EDM):
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
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
