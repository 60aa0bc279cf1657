"""The exponential integrators DPM-Solver, DPM-Solver++, DEIS and UniPC, along a chain or a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.diffusion.samplers import DPMSolver, DPMSolverSinglestep, Estimate, Plan, Sampler, SASolver, UniPC
from fastgen.diffusion.schedules import Flow, Grid, noise_levels
from fastgen.diffusion.upstream import upstream_block_order, upstream_third_order
from fastgen.interop.diffusers.config import recorded
from fastgen.interop.diffusers.scheduler import Betas, ChainScheduler, Device, Generators, Scheduler, SchedulerOutput
from fastgen.interop.diffusers.schedulers.flow import check_shift_type, ending_at, shift_of, shifted

__all__ = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "Multistep",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]


class _Solver(ChainScheduler):
    """The multistep solvers on x0: whole times, and ``prev_sample`` alone; over the chain, or with flow sigmas along a flow."""

    layout = "solver"
    whole_times: ClassVar[bool] = True
    gives_estimate: ClassVar[bool] = False

    def _build(self) -> None:
        check_shift_type(self._arguments.get("time_shift_type", "exponential"))
        super()._build()

    def _times(self) -> Tensor:
        return self._grid.time.round() if self._rounds() else self._grid.time

    def _rounds(self) -> bool:
        """Whether times that belong to levels are rounded; else their fraction is cut off."""
        return bool(self._arguments["use_karras_sigmas"])

    def _follow(self, sigma: Tensor, last: float, device: Device) -> None:
        """Make these levels of a flow the steps, the last to ``last``."""
        flow, levels = Flow(), torch.cat([sigma, sigma.new_tensor([last])]).float().double()
        self._visit(Grid.through(flow, levels, *flow.at(levels)))
        self._publish(sigma * self._arguments["num_train_timesteps"], device)
        self.sigmas = levels.float()
        self._levels = levels.tolist()
        self.num_inference_steps = len(sigma)
        self._rows(torch.empty(0, device=device), self._default_options())


class Multistep(Scheduler):
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


class _DPMSolver(Multistep, _Solver):
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
        if not self._algorithm.endswith("++") and given.get("final_sigmas_type") == "zero":
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
        self, num_inference_steps: int | None, device: Device, mu: float | None, timesteps: Sequence[int] | None = None
    ) -> None:
        given = self._arguments
        if mu is not None:
            if not given["use_dynamic_shifting"]:
                raise ValueError("mu needs use_dynamic_shifting=True")
            self._shift = shift_of(mu, given["time_shift_type"])
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
    noise_dtype: ClassVar[torch.dtype | None] = torch.float32
    _algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, falling.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on; the shift itself if
                ``time_shift_type`` is "linear", which upstream refuses.
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


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ and DPM-Solver from the data to the noise, multistep, of order 1 to 3.

    As upstream a time that spaced levels have more than once is visited once, by the level that is next in turn, the last of
    these steps goes nowhere, and flow sigmas lead to the data all the same.
    """

    narrow = False
    noise_dtype = None
    rising = True

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._check()
        if self._stochastic and not use_flow_sigmas:
            raise ValueError(f"algorithm_type={algorithm_type!r} has no way from the data to the noise, only to the data")
        self._build()

    def _rounds(self) -> bool:
        return bool(self._arguments["use_karras_sigmas"])

    def _last_of_flow(self, sigma: Tensor) -> float:
        return float(sigma[-1])

    def _lay_out(self, *args: Any, **kwargs: Any) -> None:
        super()._lay_out(*args, **kwargs)
        times = self._times().tolist()
        kept = list(dict.fromkeys(times))
        if len(kept) < len(times):
            sigmas, device = self.sigmas, self.timesteps.device
            self._visit(Grid(self._grid.schedule, *(values[: len(kept)] for values in self._grid[1:])))
            self._publish(torch.tensor(kept, dtype=torch.float64), device)
            self._level()
            self.sigmas = sigmas

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:  # type: ignore[override]
        """Lay out this many steps."""
        self._lay(num_inference_steps, device, None)
        self.num_inference_steps = len(self.timesteps)


class DPMSolverSinglestepScheduler(_DPMSolver):
    """DPM-Solver++, DPM-Solver on the noise and the former's stochastic form, single-step, of order 1 to 3.

    As upstream the last steps are of lower order where the number of steps is not a multiple of ``solver_order`` or the end is
    the data itself, whatever ``lower_order_final`` says (upstream then keeps it so for later runs), and "sde-dpmsolver++" of
    order 3 with "heun" weighs a curvature with the wrong sign.
    """

    _algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")
    _block: Tensor | None = None

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the steps: how many, or their times, falling.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on; the shift itself if
                ``time_shift_type`` is "linear", which upstream refuses.
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

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
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

    def set_timesteps(self, num_inference_steps: int, device: Device = None, mu: float | None = None) -> None:
        """Lay out this many steps.

        Args:
            mu: with ``use_dynamic_shifting`` the logarithm of the shift of a flow, from now on; the shift itself if
                ``time_shift_type`` is "linear", which upstream refuses.
        """
        self._lay(num_inference_steps, device, mu)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next step: ``prev_sample``."""
        return self._step(self._mean(model_output, sample), timestep, sample, return_dict=return_dict)


class SASolverScheduler(_DPMSolver):
    """Stochastic Adams method of Xue et al. (2023), predictor and corrector, of order 1 to 4.

    Args:
        tau_func: time -> how much noise the step from there adds, 0 for none, 1 for the reverse diffusion's; None: 1 at 200 to
            800, 0 elsewhere. A config with one cannot be saved.
    """

    @recorded
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        predictor_order: int = 2,
        corrector_order: int = 2,
        prediction_type: str = "epsilon",
        tau_func: Callable[[Any], float] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "data_prediction",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        if algorithm_type not in ("data_prediction", "noise_prediction"):
            raise ValueError(f"algorithm_type must be 'data_prediction' or 'noise_prediction', got {algorithm_type!r}")
        if corrector_order < 1:
            raise ValueError(f"corrector_order must be in 1 .. 4, got {corrector_order}")
        self.tau_func = tau_func or (lambda time: float(200 <= time <= 800))
        self._sampler()
        self._build()

    def _sampler(self) -> SASolver:
        given = self._arguments
        on: Estimate = "data" if given["algorithm_type"] == "data_prediction" else "noise"
        orders = given["predictor_order"], given["corrector_order"]
        return SASolver(*orders, lower_order_final=given["lower_order_final"], on=on)

    def _plan(self, grid: Grid) -> Plan:
        taus = [float(self.tau_func(time)) for time in self._list[len(self._list) - len(grid.time) :]]
        return self._sampler().plan_of(grid, taus, published=True)

    def _draws(self, index: int) -> bool:
        return True

    def _end(self) -> tuple[float, float]:
        bar = float(self._schedule.alphas_cumprod[0])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def _last_of_flow(self, sigma: Tensor) -> float:
        return float(sigma[-1])

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:
        """Lay out this many steps."""
        self._lay(num_inference_steps, device, None)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The next step: ``prev_sample``."""
        model_output = self._mean(model_output, sample)
        return self._step(model_output, timestep, sample, generator=generator, return_dict=return_dict)


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
        trained_betas: Betas = None,
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
        device: Device = None,
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

    def _lay(self, num_inference_steps: int | None, device: Device, sigmas: Sequence[float] | None, mu: float | None) -> None:
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
                shift = shift_of(mu, given["time_shift_type"])
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
