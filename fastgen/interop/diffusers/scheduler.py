"""What all schedulers with diffusers' verbs share: a sampler's plan as a table, and ``step`` as one row of it.

A scheduler is a chain or a flow, a grid of steps as diffusers lays them out (:mod:`fastgen.diffusion.upstream`), and one of our
samplers. ``step`` finds its row by a counter, or by where the time lies in ``timesteps``: nothing is read from the device and
nothing is searched. The row goes to :func:`fastgen.ops.denoise`, ``add_noise`` and ``get_velocity`` to
:func:`fastgen.ops.diffuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.loop import tabulate
from fastgen.diffusion.samplers import Layout, Plan, Sampler
from fastgen.diffusion.schedules import (
    Discrete,
    Grid,
    Levels,
    Schedule,
    Target,
    betas,
    estimate_rows,
    target_rows,
    zero_terminal_snr,
)
from fastgen.diffusion.upstream import upstream_chain, upstream_grid, upstream_plan
from fastgen.interop.diffusers.config import Configured

__all__ = ["Betas", "ChainScheduler", "Device", "Generators", "Scheduler", "SchedulerOutput", "StepOutput", "drawn"]

Betas = Sequence[float] | Tensor | None
Device = torch.device | str | None
Generators = torch.Generator | list[torch.Generator]

_BETAS = {name: name for name in ("linear", "scaled_linear", "sigmoid", "laplace")} | {"squaredcos_cap_v2": "cosine"}
_TARGETS: dict[str, Target] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
_LEVELS: dict[str, Levels] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "exponential",  # evenly in log(alpha / sigma): the same
}


class StepOutput:
    """What ``step`` gives: attributes, or items by name or position. Subclasses say what there is beside the next sample.

    That may be made when it is first asked for, from the tensors that ``step`` was given; where these have been changed in
    place by then, asking raises a RuntimeError.
    """

    __slots__ = ("_beside", "prev_sample")

    def __init__(self, prev_sample: Tensor, beside: Tensor | Callable[[], Tensor] | None = None) -> None:
        self.prev_sample = prev_sample
        self._beside = beside

    def _second(self) -> Tensor | None:
        if callable(self._beside):
            self._beside = self._beside()
        return self._beside

    def to_tuple(self) -> tuple[Tensor, ...]:
        """What there is."""
        second = self._second()
        return (self.prev_sample,) if second is None else (self.prev_sample, second)

    def __getitem__(self, item: str | int) -> Tensor:
        if isinstance(item, str):
            value = getattr(self, item, None)
            if value is None:
                raise KeyError(item)
            return value
        return self.to_tuple()[item]


class SchedulerOutput(StepOutput):
    """The next sample, and of most schedulers the estimate of the data."""

    __slots__ = ()

    @property
    def pred_original_sample(self) -> Tensor | None:
        """The estimate of the data; None where the method gives none."""
        return self._second()


class _Rows(NamedTuple):
    """The table of one trajectory on a device: a row, and what the host must know about it, for each step."""

    rows: tuple[Tensor, ...]
    """(p, q, A, B, S, C_1 .. C_H); with thresholding (p, q) take the estimate of the data in place of the output."""
    estimating: tuple[Tensor, ...]
    """Rows that give the estimate alone."""
    beside: tuple[Tensor, ...]
    """Rows that give what a step returns beside the next sample, from what the step itself is made of."""
    bounds: tuple[Tensor, ...] | None
    noisy: list[bool]
    """Whether S is not 0."""
    slots: int
    """H."""
    of_slopes: bool
    quiet: Tensor
    """Key of steps without noise."""


def drawn(like: Tensor, generator: Generators, dtype: torch.dtype) -> Tensor:
    """Noise of the shape of ``like`` as diffusers draws it: on the generator's device, and sample by sample from a list."""
    if isinstance(generator, (list, tuple)):
        if len(generator) not in (1, len(like)):
            raise ValueError(f"{len(generator)} generators were given for {len(like)} samples")
        if len(generator) > 1:
            return torch.cat([drawn(part, each, dtype) for part, each in zip(like.split(1), generator, strict=True)])
        generator = generator[0]
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=dtype).to(like.device)


class Scheduler(Configured):
    """Base of the schedulers.

    ``step`` takes ``generator=`` as diffusers does, and then draws the values that diffusers would. Without one it draws from a
    fresh key of our own generator, whose seed comes from PyTorch's: ``torch.manual_seed`` makes runs repeat, with other values
    than diffusers'. Gradients flow through the current evaluation; earlier ones that a multistep method keeps are constants.

    Attributes:
        timesteps: what the network is told at each step.
        sigmas: sigma / alpha at each step and at the end, where diffusers has them; float32 on the CPU.
        num_inference_steps: None before :meth:`set_timesteps`.
        order: evaluations of the network in a step.
        init_noise_sigma: scale of the noise that sampling starts from.
    """

    sigmas: Tensor
    order: ClassVar[int] = 1
    _compatibles: ClassVar[list[str]] = []
    layout: Layout = "sigma"
    by_counter: ClassVar[bool] = True
    """Whether a step after the first is the next one, whatever time is given, as with most of diffusers' schedulers."""
    in_levels: ClassVar[bool] = False
    """Whether samples are x / alpha, as in k-diffusion, and ``scale_model_input`` brings them back."""
    whole_times: ClassVar[bool] = False
    """Whether times are int64, and an integer may be given for one."""
    narrow: ClassVar[bool] = False
    """Whether the next sample has the dtype of the network's output rather than of the sample."""
    noise_dtype: ClassVar[torch.dtype | None] = None
    """Of the noise that a generator draws; None: that of the network's output."""
    gives_estimate: ClassVar[bool] = True
    """Whether ``step`` returns the estimate of the data, or what ``output`` has in its place."""
    output: ClassVar[type[StepOutput]] = SchedulerOutput

    timesteps: Tensor
    num_inference_steps: int | None = None
    _schedule: Schedule
    _grid: Grid
    _levels: list[float]
    """sigma / alpha at each of ``timesteps`` and at the end."""

    # -- what subclasses say

    def _sampler(self, *options: Any) -> Sampler:
        """The sampler, with what ``step`` may change about it."""
        raise NotImplementedError

    def _plan(self, grid: Grid, *options: Any) -> Plan:
        return upstream_plan(self._sampler(*options), grid)

    def _target(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _draws(self, index: int) -> bool:
        """Whether diffusers draws noise in this step, used or not."""
        return False

    def _beside(self, plan: Plan, options: tuple[Any, ...]) -> Tensor | None:
        """(A, B) of what a step returns beside the next sample; None: the estimate of the data."""
        return None

    @property
    def _thresholds(self) -> bool:
        return bool(self._arguments.get("thresholding"))

    # -- the table

    def _visit(self, grid: Grid) -> None:
        """Make the steps of a grid those of the scheduler."""
        self._grid = grid
        self._tables: dict[tuple[Any, ...], _Rows] = {}
        self._fresh()

    def _fresh(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._start = 0
        self._history: Tensor | None = None

    def _publish(self, time: Tensor, device: torch.device | str | None) -> None:
        self.timesteps = self._own = time.to(device, torch.int64 if self.whole_times else torch.float32)
        self._places: dict[float, int] = {}
        self._list: list[float] = self.timesteps.tolist()
        twice = set()
        for i, t in enumerate(self._list):
            # of a time that comes more than once diffusers takes the second
            if t not in twice:
                twice |= {t} & self._places.keys()
                self._places[t] = i

    def _points(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at each of ``timesteps`` and at the end, float64."""
        grid = self._grid
        return torch.cat([grid.alpha, grid.next_alpha[-1:]]), torch.cat([grid.sigma, grid.next_sigma[-1:]])

    def _rows(self, like: Tensor, options: tuple[Any, ...]) -> _Rows:
        start = self._start
        key = (options, start, like.device, like.dtype is torch.float64)
        rows = self._tables.get(key)
        if rows is None:
            grid = self._grid.tail(len(self._grid.time) - start // self.order)
            rows = self._tables[key] = self._tabulated(grid, like.device, like.dtype, options)
        return rows

    def _tabulated(self, grid: Grid, device: torch.device, dtype: torch.dtype, options: tuple[Any, ...]) -> _Rows:
        plan = self._plan(grid, *options)
        table = tabulate(plan, self._target, self._schedule, dtype=torch.float64)
        rows = self._finished(table.coefficients, plan, options)
        if self.in_levels:
            here, there, one = plan.alpha[:-1], plan.alpha[1:], torch.ones_like(plan.alpha[1:])
            rows = rows * torch.stack([here, one, here / there, *[1 / there] * (rows.shape[1] - 3)], 1)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        one, none = torch.ones(len(rows), 1, dtype=torch.float64), torch.zeros(len(rows), 1, dtype=torch.float64)
        of_data = rows[:, :2]
        if self._thresholds:
            given = none, one
            if plan.of == "noise":
                # the estimate of the data is thresholded, and the noise is what is left of the state
                alpha, sigma = plan.alpha[:-1, None], plan.sigma[:-1, None]
                of_data = estimate_rows(self._target(plan.alpha[:-1], plan.sigma[:-1]))
                given = 1 / sigma, -alpha / sigma
            rows = torch.cat([*given, rows[:, 2:]], 1)
        estimating = torch.cat([of_data, none, one, none], 1).to(device, wide).unbind()
        share = self._beside(plan, options)
        beside = None if share is None else torch.cat([rows[:, :2], share, none], 1).to(device, wide).unbind()
        return _Rows(
            rows.to(device, wide).unbind(),
            estimating,
            beside or estimating,
            None if table.bounds is None else table.bounds.to(device, wide).unbind(),
            (rows[:, 4] != 0).tolist(),
            plan.rows.shape[1] - 3,
            plan.of == "slope",
            random.key(0, device=device),
        )

    def _finished(self, rows: Tensor, plan: Plan, options: tuple[Any, ...]) -> Tensor:
        return rows

    # -- where a step is

    @property
    def step_index(self) -> int | None:
        """Position of the next step in ``timesteps``; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position of the first step, where it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of ``timesteps``, rather than at that of the first time that is given."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Position of a time in ``timesteps``. An element of ``timesteps`` is known by its place in memory, without reading it.

        Raises:
            ValueError: if it is not one of them.
        """
        if isinstance(timestep, Tensor):
            own = self._own
            if not timestep.dim() and timestep.dtype is own.dtype and timestep.device == own.device:
                offset = timestep.data_ptr() - own.data_ptr()
                if 0 <= offset < own.nbytes:
                    return offset // own.element_size()
            timestep = timestep.item()
        place = self._places.get(timestep)
        if place is None:
            raise ValueError(f"timestep {timestep} is not one of the {len(self._places)} of timesteps")
        return place

    def _position(self, timestep: float | Tensor) -> int:
        if not self.whole_times and self.narrow:
            whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
            if whole:
                raise ValueError("timestep must be one of timesteps, such as 999.0, got an integer, which may be an index")
        if self._step_index is None or not self.by_counter:
            index = self._begin_index
            if index is None or not self.by_counter:
                index = self.index_for_timestep(timestep)
            if self.by_counter:
                # evaluations of one step stay together
                index += -index % self.order
                self._start, self._history = index, None
            self._step_index = index
        return self._step_index

    # -- verbs

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is shown: the sample, in the units that it knows."""
        return sample

    def _step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        options: tuple[Any, ...] = (),
        generator: Generators | None = None,
        noise: Tensor | None = None,
        clamp: float | None = None,
        log_variance: Tensor | None = None,
        beside: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        index = self._position(timestep)
        given = model_output.dtype
        if sample.dtype is not given:
            sample = sample.to(torch.promote_types(sample.dtype, given))
        table = self._rows(sample, options)
        i = index - self._start
        if i >= len(table.rows):
            raise ValueError(f"all {len(self.timesteps)} steps have been taken; call set_timesteps for another trajectory")
        row = table.rows[i]
        if noise is None and generator is not None and (table.noisy[i] or self._draws(index)):
            noise = drawn(sample, generator, self.noise_dtype or given)
        key = None
        if not table.noisy[i]:
            noise, key = None, table.quiet
        elif noise is None:
            key = random.fresh_key(sample.device)

        estimate, thresholds = model_output, self._thresholds
        if thresholds:
            estimate, clamp = self._thresholded(sample, model_output, table.quiet, table.estimating[i]), None
        history = slot = None
        if table.slots:
            if self._history is None:
                self._history = sample.new_zeros((table.slots, *sample.shape))
            history, slot = self._history, self._history[i % table.slots]
        if beside is not None:
            history = beside[None] if history is None else torch.cat([history, beside[None]])
        differentiate = torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad)
        into = None if slot is None or differentiate else (torch.empty_like(sample), slot)
        later, others = None, table.beside is not table.estimating
        if return_dict and self.gives_estimate and slot is None and not (thresholds or differentiate):
            later = self._later(sample, model_output, table, i, clamp)
        out, x0 = ops.denoise(
            sample,
            estimate,
            row,
            key,
            noise=noise,
            history=history,
            clamp=clamp,
            log_variance=None if log_variance is None else (log_variance, table.bounds[i]) if table.bounds else log_variance,
            out=into,
            return_x0=slot is not None or (self.gives_estimate and later is None and not (thresholds or others)),
        )
        if others and later is None:
            x0 = ops.denoise(sample, estimate, table.beside[i], table.quiet, clamp=clamp, return_x0=False).x_next
        elif thresholds and slot is None:
            x0 = estimate
        if slot is not None:
            assert x0 is not None
            if into is None:
                slot.copy_(x0.detach())
            elif self.gives_estimate and not table.of_slopes:
                x0 = x0.clone()
        if table.of_slopes and self.gives_estimate:
            assert x0 is not None
            x0 = torch.add(sample, x0, alpha=-self._levels[index])
        if self.narrow and out.dtype is not given:
            out = out.to(given)
        self._step_index = index + 1
        if not self.gives_estimate:
            x0 = None
        if return_dict:
            return self.output(out, x0 if later is None else later)
        return (out,) if x0 is None else (out, x0)

    def _thresholded(self, sample: Tensor, model_output: Tensor, quiet: Tensor, rows: Tensor) -> Tensor:
        """The estimate of the data that these rows give, thresholded."""
        given = self._arguments
        estimate = ops.denoise(sample, model_output, rows, quiet, return_x0=False).x_next
        return ops.dynamic_threshold(estimate, given["dynamic_thresholding_ratio"], max(1.0, given["sample_max_value"]))

    @staticmethod
    def _later(sample: Tensor, model_output: Tensor, table: _Rows, i: int, clamp: float | None) -> Callable[[], Tensor] | None:
        """What makes the second part of the output: most callers never look at it, and writing it costs as much as the step."""
        if table.of_slopes or sample.is_inference() or model_output.is_inference():
            return None
        versions = sample._version, model_output._version

        def estimate() -> Tensor:
            if (sample._version, model_output._version) != versions:
                raise RuntimeError("the estimate is gone: the sample or the model's output was changed in place")
            return ops.denoise(sample, model_output, table.beside[i], table.quiet, clamp=clamp, return_x0=False).x_next

        return estimate

    def _diffused(self, sample: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
        return ops.diffuse(sample, rows, noise=noise.to(sample.dtype), target=False).x_t

    def _indices(self, timesteps: Tensor) -> Tensor | int:
        """Positions of times in ``timesteps``, on their device."""
        if self._begin_index is not None:
            return self._begin_index if self._step_index is None else self._step_index
        own = self._own.to(timesteps.device)
        match = timesteps.reshape(-1, 1) == own
        count = match.sum(1)
        if not bool((count > 0).all()):
            raise ValueError(f"timesteps must be among the {len(own)} of the scheduler, got {timesteps.tolist()}")
        return match.int().argmax(1) + (count > 1)

    def _noised(self, sample: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """alpha x0 + sigma eps at positions of the grid; in units of alpha with ``in_levels``."""
        alpha, sigma = self._points()
        if self.in_levels:
            alpha, sigma = torch.ones_like(alpha), sigma / alpha
        none = torch.zeros_like(alpha)
        table = torch.stack([alpha, sigma, none, none], 1).to(sample.device, torch.promote_types(sample.dtype, torch.float32))
        rows = table[self._indices(timesteps.to(sample.device))]
        return self._diffused(sample, noise, rows)

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes here that take this one's config."""
        from fastgen.interop import diffusers

        return [getattr(diffusers, name) for name in dict.fromkeys([type(self).__name__, *self._compatibles])]

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


class ChainScheduler(Scheduler):
    """Base of the schedulers over a chain of betas: everything but the flow.

    Attributes:
        betas, alphas, alphas_cumprod: of the chain, float32 on the CPU, with the bits of diffusers'.
    """

    _compatibles: ClassVar[list[str]] = [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "EDMEulerScheduler",
    ]
    init_noise_sigma: Any = 1.0
    spacings: ClassVar[tuple[str, ...]] = ("leading", "linspace", "trailing")
    rising: ClassVar[bool] = False
    """Whether steps go from the data to the noise."""
    finite_levels: ClassVar[bool] = True
    """Whether a chain without signal at its end gets as much as makes sigma / alpha 4096, as upstream."""
    _schedule: Discrete

    def _build(self) -> None:
        """Make the chain, and its full length the steps until told otherwise."""
        given = self._arguments
        kind, target, steps = given["beta_schedule"], given["prediction_type"], given["num_train_timesteps"]
        if given["trained_betas"] is None and kind not in _BETAS:
            raise ValueError(f"beta_schedule must be one of {', '.join(_BETAS)}, got {kind!r}")
        targets = [name for name in _TARGETS if name != "flow_prediction" or given.get("use_flow_sigmas")]
        if target not in targets:
            raise ValueError(f"prediction_type must be one of {', '.join(targets)}, got {target!r}")
        if self._spacing not in self.spacings:
            raise ValueError(f"timestep_spacing must be one of {', '.join(self.spacings)}, got {self._spacing!r}")
        if given["trained_betas"] is not None:
            chain = torch.as_tensor(given["trained_betas"], dtype=torch.float32)
        else:
            ends = {"start": given["beta_start"], "end": given["beta_end"]}
            chain = betas(_BETAS[kind], steps, **ends, dtype=torch.float32)  # type: ignore[arg-type]
        rescaled = given.get("rescale_betas_zero_snr", False)
        self._schedule = upstream_chain(zero_terminal_snr(chain) if rescaled else chain)
        if rescaled and self.finite_levels:
            self._schedule.alphas_cumprod[-1] = 2.0**-24
        self.betas = self._schedule.betas.float()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self._schedule.alphas_cumprod.float()
        self._levels_kind()
        self._full_rows: dict[tuple[torch.device, bool], Tensor] = {}
        times = range(self._schedule.steps)
        self._lay_out(times if self.rising else times[::-1], None, levels=None)

    @property
    def _spacing(self) -> Any:
        return self._arguments.get("timestep_spacing", "linspace")

    def _target(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return target_rows(_TARGETS[self._arguments["prediction_type"]], alpha, sigma)

    def _end(self) -> tuple[float, float]:
        """(alpha, sigma) after the last step."""
        last = self._arguments.get("final_sigmas_type", "zero")
        if last not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', got {last!r}")
        if last == "zero":
            return 1.0, 0.0
        bar = self._schedule.alphas_cumprod[0]
        return float(bar.sqrt()), float((1 - bar).sqrt())

    def _levels_kind(self) -> Levels | None:
        """How the config spaces the levels sigma / alpha, where it does."""
        chosen = [name for name in _LEVELS if self._arguments.get(name)]
        if len(chosen) > 1:
            raise ValueError(f"only one of {' and '.join(chosen)} can be used")
        return _LEVELS[chosen[0]] if chosen else None

    def _lay_out(
        self,
        steps: int | Sequence[float],
        device: torch.device | str | None,
        *,
        levels: Levels | None,
        longest: int | None = None,
    ) -> None:
        given = self._arguments
        grid = upstream_grid(
            self._schedule,
            steps if isinstance(steps, int) else [float(t) for t in steps],
            self.layout,
            self._spacing,
            offset=given.get("steps_offset", 0),
            longest=longest,
            levels=levels,
            low=self.config.get("sigma_min"),
            high=self.config.get("sigma_max"),
            end=self._end(),
            rising=self.rising,
        )
        self._visit(grid)
        self._publish(self._times(), device)
        self._level()

    def _times(self) -> Tensor:
        """What ``timesteps`` is made of."""
        return self._grid.time

    def _level(self) -> None:
        alpha, sigma = self._points()
        ratio = sigma / alpha
        self._levels = ratio.tolist()
        self._scales: list[float] = alpha.tolist()
        if self.by_counter:
            self.sigmas = ratio.float()

    def _set_timesteps(
        self,
        num_inference_steps: int | None,
        device: torch.device | str | None,
        timesteps: Sequence[float] | None = None,
        longest: int | None = None,
    ) -> None:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give one of num_inference_steps and timesteps")
        levels = self._levels_kind()
        if timesteps is not None and levels:
            raise ValueError(f"timesteps cannot be given with {levels} levels")
        steps: int | Sequence[float] = int(num_inference_steps) if timesteps is None else list(timesteps)  # type: ignore[arg-type]
        self._lay_out(steps, device, levels=levels, longest=longest)
        self.num_inference_steps = steps if isinstance(steps, int) else len(steps)
        # what cannot be done is said here and not in the first step
        self._rows(torch.empty(0, device=device), self._default_options())

    def _default_options(self) -> tuple[Any, ...]:
        """What ``step`` passes to the sampler unless told otherwise."""
        return ()

    def _chain_rows(self, like: Tensor, timesteps: Tensor, *, velocity: bool = False) -> Tensor:
        """(alpha, sigma, 0, 0) or (-sigma, alpha, 0, 0) at any times of the chain, gathered on the device."""
        key = like.device, velocity
        table = self._full_rows.get(key)
        if table is None:
            alpha, sigma = self._schedule.at(torch.arange(self._schedule.steps))
            none = torch.zeros_like(alpha)
            rows = torch.stack([-sigma, alpha, none, none] if velocity else [alpha, sigma, none, none], 1)
            table = self._full_rows[key] = rows.to(like.device, torch.float32)
        rows = table[timesteps.to(like.device)]
        return rows.expand(len(like), 4) if rows.dim() == 2 else rows

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The samples with the noise of ``timesteps`` [N]: in the units of ``step``, as float32 tables give it in any dtype.

        Raises:
            ValueError: for a time that is not one of the scheduler's, where it has only some.
        """
        return self._noised(original_samples, timesteps, noise)
