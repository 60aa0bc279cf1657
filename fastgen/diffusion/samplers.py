"""Samplers: each writes a table of coefficients for :func:`fastgen.ops.denoise`, and nothing else.

With the estimate of the data x0 made from the state x and the network's output, a step of any of these methods is

    x_next = A x + B x0 + S z + sum_k C_k x0_k        (x0_k: the estimate k evaluations ago)

or the same in estimates of the noise or of the slope, so a sampler is a function from the steps (a
:class:`fastgen.diffusion.schedules.Grid`) to rows (A, B, S, C_1 .. C_H), one per evaluation of the network, in float64.
:mod:`fastgen.diffusion.loop` runs them. Four remarks make everything fit:

* **Euler is DDIM.** The line through (x, x0) is straight in every coordinate in which x / s moves by sigma / s, so one Euler
  step of the probability flow from sigma to sigma' is sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0, be it in the
  coordinates of diffusers, of k-diffusion or of a flow-matching path; and ancestral Euler is DDIM with eta = 1.
* **A corrector needs no old state.** After an Euler step of Heun's method the old slope is (x - x0_1) / sigma', since x lies
  on that line; the correction is then w (x0_1 - x0) on top of x. UniPC's corrected state differs from its predicted one by a
  combination of estimates alone.
* **Churn belongs to the step before.** Noise that is added ahead of an evaluation is added at the end of the last row.
* **A solver on the noise is one on the data, mirrored.** In x = alpha x0 + sigma eps the two play the same part: exchange
  alpha and sigma, and the rows of DPM-Solver++ and UniPC are those of DPM-Solver and of UniPC on eps.

Sources: Ho et al. (2020), algorithm 2; Nichol and Dhariwal (2021), eq. 15; Song et al. (2021), "Denoising diffusion implicit
models", eq. 12 and 16; Karras et al. (2022), algorithms 1 and 2; Lu et al. (2022), "DPM-Solver" and "DPM-Solver++", algorithm
1 (single-step), 2 and its SDE form; Song et al. (2021), "Score-based generative modeling through stochastic differential
equations", algorithms 2 to 5; Zhao et al. (2023), "UniPC", algorithms 5 to 8; Xue et al. (2023), "SA-Solver"; Lugmayr et
al. (2022), "RePaint"; Crowson (2022), k-diffusion (ancestral Euler, dpm_2, linear multistep).
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgen.diffusion.schedules import Grid

Layout = Literal["index", "stride", "sigma", "solver"]
Estimate = Literal["data", "noise"]

__all__ = [
    "DDIM",
    "DDPM",
    "DPM2",
    "LMS",
    "SAMPLERS",
    "Consistency",
    "DPMSolver",
    "DPMSolverSinglestep",
    "Estimate",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Layout",
    "Plan",
    "PredictorCorrector",
    "SASolver",
    "Sampler",
    "UniPC",
    "block_differences",
    "differences",
    "half_log_snr",
    "make_sampler",
    "mirrored",
    "on_noise",
    "resampled",
]


class Plan(NamedTuple):
    """What a sampler wants done, all float64: one row per evaluation of the network."""

    time: Tensor
    """[E]: when the network is asked."""
    alpha: Tensor
    """[E + 1]: alpha of the state there, and at the end."""
    sigma: Tensor
    """[E + 1]: sigma, likewise."""
    rows: Tensor
    """[E, 3 + H]: (A, B, S, C_1 .. C_H)."""
    bounds: Tensor | None = None
    """[E, 2]: logarithms of the smallest and the largest variance where the network learns it between the two."""
    of: Literal["data", "noise", "slope"] = "data"
    """What the rows combine: estimates of the data, of the noise, or slopes (x - s x0) / sigma of the path."""


def _forward(grid: Grid) -> tuple[Tensor, Tensor]:
    """(alpha, sigma^2) of q(x_t | x_s) for the s that each step goes to."""
    alpha = grid.alpha / grid.next_alpha
    return alpha, (grid.sigma.square() - (alpha * grid.next_sigma).square()).clamp(min=0)


def _plan(grid: Grid, rows: Tensor, **more: Any) -> Plan:
    """The plan of one evaluation at each point of the grid."""
    alpha, sigma = torch.cat([grid.alpha, grid.next_alpha[-1:]]), torch.cat([grid.sigma, grid.next_sigma[-1:]])
    return Plan(grid.time, alpha, sigma, rows, **more)


def half_log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(alpha / sigma), in which the multistep solvers measure their steps."""
    return alpha.log() - sigma.log()


def mirrored(grid: Grid) -> Grid:
    """The steps with data and noise in each other's place: what a solver on the noise sees."""
    return grid._replace(alpha=grid.sigma, sigma=grid.alpha, next_alpha=grid.next_sigma, next_sigma=grid.next_alpha)


def on_noise(plan: Plan) -> Plan:
    """The plan on the noise that a plan of :func:`mirrored` steps stands for."""
    return plan._replace(alpha=plan.sigma, sigma=plan.alpha, of="noise")


def _check_estimate(on: str, grid: Grid) -> None:
    if on == "noise" and bool((grid.alpha == 0).any()):
        raise ValueError("a solver on the noise cannot start where alpha is 0: there x is the noise, whatever the data")


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], 1).flatten(0, 1)


class Sampler(abc.ABC):
    """A sampling method with its options.

    Attributes:
        layout: which of diffusers' layouts of steps its counterpart upstream has, for ``compat="diffusers"``.
    """

    layout: ClassVar[Layout] = "sigma"

    @property
    def clamps(self) -> bool:
        """Whether estimates of the data may be clamped; a method that combines slopes or noises has none."""
        return True

    @abc.abstractmethod
    def plan(self, grid: Grid) -> Plan:
        """The table for these steps."""


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling from the posterior q(x_s | x_t, x0), for any s < t.

    Args:
        variance: "small", the posterior's own; "large", that of q(x_t | x_s); "learned", between the two as the network says.
    """

    variance: Literal["small", "large", "learned"] = "small"
    layout: ClassVar[Layout] = "index"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise ValueError(f"variance must be 'small', 'large' or 'learned', got {self.variance!r}")

    def plan(self, grid: Grid) -> Plan:
        alpha, large = _forward(grid)
        share = (grid.next_sigma / grid.sigma).square()
        small = large * share
        signal = grid.next_alpha * large / grid.sigma.square()
        noisy = (small > 0).double()
        if self.variance == "learned":
            highest = large.log()
            lowest = torch.where(small > 0, small, large).log()
            bounds, scale = torch.stack([lowest, highest], 1), noisy
        else:
            bounds, scale = None, noisy * (small if self.variance == "small" else large).sqrt()
        return _plan(grid, torch.stack([alpha * share, signal, scale], 1), bounds=bounds)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Implicit sampling: deterministic at ``eta`` 0, ancestral (DDPM with its small variance) at 1."""

    eta: float = 0.0
    layout: ClassVar[Layout] = "stride"

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def plan(self, grid: Grid) -> Plan:
        _, large = _forward(grid)
        noise = self.eta * large.sqrt() * grid.next_sigma / grid.sigma
        if bool((noise > grid.next_sigma * (1 + 1e-12)).any()):
            raise ValueError(f"eta {self.eta} adds more noise than a step leaves; it may be up to 1")
        keep = (grid.next_sigma.square() - noise.square()).clamp(min=0).sqrt() / grid.sigma
        return _plan(grid, torch.stack([keep, grid.next_alpha - grid.alpha * keep, noise], 1))


@dataclasses.dataclass(frozen=True)
class EulerAncestral(DDIM):
    """Ancestral Euler of k-diffusion: an Euler step down to less noise than wanted, and noise up again; DDIM with eta 1."""

    eta: float = 1.0
    layout: ClassVar[Layout] = "sigma"


@dataclasses.dataclass(frozen=True)
class Consistency(Sampler):
    """Each step goes past where it ends, and back there by fresh noise: for networks that estimate the data well at once.

    Args:
        gamma: how much of the way from there to the data it goes in time. 1 is the estimate of the data with fresh noise (Song
            et al., 2023, "Consistency models", algorithm 1; LCM, and stochastic sampling of a flow), 0 is DDIM, and what is
            between keeps detail over many steps (Zheng et al., 2024, "Trajectory consistency distillation", algorithm 2).
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in 0 .. 1, got {self.gamma}")

    def plan(self, grid: Grid) -> Plan:
        clean = grid.schedule.clean
        time = clean + (1 - self.gamma) * (grid.next_time - clean)
        alpha, sigma = grid.schedule.at(time.clamp(min=0))
        at_data = time == clean
        return self.plan_past(grid, torch.where(at_data, 1.0, alpha), torch.where(at_data, 0.0, sigma))

    @staticmethod
    def plan_past(grid: Grid, alpha: Tensor, sigma: Tensor) -> Plan:
        """The plan with each step going to a point of its own first, on the way from its end to the data."""
        keep, back = torch.where(sigma > 0, sigma / grid.sigma, 0.0), grid.next_alpha / alpha
        noise = (grid.next_sigma.square() - (back * sigma).square()).clamp(min=0).sqrt()
        return _plan(grid, torch.stack([back * keep, back * (alpha - grid.alpha * keep), noise], 1))


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Steps of Langevin dynamics at each level, then an ancestral step to the next.

    A Langevin step of size e moves x by e * score + sqrt(2 e) z. Here e = 2 snr^2 sigma^2, which is the published rule with the
    norms of noise and score at their expectations, so that no sample depends on another; and the noise is scaled such that a
    step leaves the level exactly as it is.

    Args:
        snr: signal-to-noise ratio r of a Langevin step.
        corrections: how many of them at each level.
    """

    snr: float = 0.16
    corrections: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.snr < 1:
            raise ValueError(f"snr must be in (0, 1), got {self.snr}")
        if self.corrections < 0:
            raise ValueError(f"corrections must not be negative, got {self.corrections}")

    def plan(self, grid: Grid) -> Plan:
        share = 2 * self.snr**2
        corrector = torch.stack(
            [torch.full_like(grid.alpha, 1 - share), share * grid.alpha, grid.sigma * math.sqrt(1 - (1 - share) ** 2)], 1
        )
        evaluations = self.corrections + 1
        rows = torch.stack([corrector] * self.corrections + [DDIM(eta=1.0).plan(grid).rows], 1).flatten(0, 1)
        time, alpha, sigma = (v.repeat_interleave(evaluations) for v in (grid.time, grid.alpha, grid.sigma))
        return Plan(time, torch.cat([alpha, grid.next_alpha[-1:]]), torch.cat([sigma, grid.next_sigma[-1:]]), rows)


@dataclasses.dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on the probability flow, with EDM's churn.

    Args:
        churn: how much noise is added over all steps, as a multiple of the level; 0 for none (EDM: S_churn).
        churn_min, churn_max: levels sigma / alpha between which it is.
        churn_noise: scale of what is added (EDM: S_noise).
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.churn >= 0:
            raise ValueError(f"churn must not be negative, got {self.churn}")

    def _churned(self, grid: Grid) -> tuple[Grid, Tensor, Tensor]:
        """The grid whose steps start where churn has brought them; and what a state is multiplied by and how much noise
        is added on arrival at each next point."""
        stay, quiet = torch.ones_like(grid.alpha), torch.zeros_like(grid.alpha)
        if not self.churn:
            return grid, stay, quiet
        ratio = grid.sigma / grid.alpha
        more = min(self.churn / len(ratio), math.sqrt(2) - 1)
        within = (ratio >= self.churn_min) & (ratio <= self.churn_max) & torch.isfinite(ratio)
        churned = torch.where(within, ratio * (1 + more), ratio)
        moved = grid.schedule.of_ratio(churned)
        alpha, sigma = torch.where(within, moved[0], grid.alpha), torch.where(within, moved[1], grid.sigma)
        time = torch.where(within, grid.schedule.time(churned), grid.time)
        added = self.churn_noise * alpha * torch.where(within, churned.square() - ratio.square(), 0.0).sqrt()
        stay[:-1], quiet[:-1] = (alpha / grid.alpha)[1:], added[1:]
        return grid._replace(time=time, alpha=alpha, sigma=sigma), stay, quiet

    def plan(self, grid: Grid) -> Plan:
        grid, stay, noise = self._churned(grid)
        keep = grid.next_sigma / grid.sigma
        return _plan(grid, torch.stack([stay * keep, stay * (grid.next_alpha - grid.alpha * keep), noise], 1))


@dataclasses.dataclass(frozen=True)
class Heun(Euler):
    """Heun's method of second order, with EDM's churn: two evaluations a step, one for a last step to the data."""

    def plan(self, grid: Grid) -> Plan:
        straight = grid.schedule.straight_scale
        start, stay, noise = self._churned(grid)
        scale = straight(grid.next_alpha, grid.next_sigma)
        before, level = start.sigma / straight(start.alpha, start.sigma), grid.next_sigma / scale
        weight = scale * (level - before) / (2 * level)
        keep, zero = start.next_sigma / start.sigma, torch.zeros_like(level)
        euler = torch.stack([keep, start.next_alpha - start.alpha * keep, zero, zero], 1)
        correction = torch.stack([stay, -stay * weight, noise, stay * weight], 1)
        # there is no slope to correct with at the data, where sigma is 0, nor where alpha is
        corrects = (level > 0) & torch.isfinite(before)
        done = _interleave(torch.ones_like(corrects), corrects)
        end_alpha, end_sigma = grid.next_alpha[-1:], grid.next_sigma[-1:]
        return Plan(
            _interleave(start.time, grid.next_time)[done],
            torch.cat([_interleave(start.alpha, grid.next_alpha)[done], end_alpha]),
            torch.cat([_interleave(start.sigma, grid.next_sigma)[done], end_sigma]),
            _interleave(euler, correction)[done],
        )


@dataclasses.dataclass(frozen=True)
class DPM2(Sampler):
    """Midpoint method of second order in log(sigma / alpha), the dpm_2 of k-diffusion: two evaluations a step, one for a step
    from no data at all or to no noise.

    With ``eta`` each step goes down to less noise than wanted, and noise brings it up again, as in :class:`DDIM`; at 1 it is
    dpm_2_ancestral.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0 .. 1, got {self.eta}")

    def plan(self, grid: Grid) -> Plan:
        noise = self.eta * _forward(grid)[1].sqrt() * grid.next_sigma / grid.sigma
        down = (grid.next_sigma.square() - noise.square()).clamp(min=0).sqrt()
        before, after = grid.sigma / grid.alpha, down / grid.next_alpha
        halves = (after > 0) & torch.isfinite(before)
        level = torch.where(halves, (before * after).sqrt(), 1.0)
        (alpha, sigma), time = grid.schedule.of_ratio(level), grid.schedule.time(level)
        # to the middle, or of a step that has none to its end
        keep = torch.where(halves, sigma, down) / grid.sigma
        signal = torch.where(halves, alpha, grid.next_alpha) - grid.alpha * keep
        first = torch.stack([keep, signal, torch.where(halves, 0.0, noise), torch.zeros_like(level)], 1)
        # the slope there, on top of where the step began: what led to the middle is known, and subtracted
        back = grid.next_alpha / level
        second = torch.stack([down / sigma, back * (before - after), noise, back * (level - before)], 1)
        done = _interleave(torch.ones_like(halves), halves)
        return Plan(
            _interleave(grid.time, time)[done],
            torch.cat([_interleave(grid.alpha, alpha)[done], grid.next_alpha[-1:]]),
            torch.cat([_interleave(grid.sigma, sigma)[done], grid.next_sigma[-1:]]),
            _interleave(first, second)[done],
        )


@dataclasses.dataclass(frozen=True)
class LMS(Sampler):
    """Linear multistep (Adams-Bashforth on uneven steps): the polynomial through the last ``order`` slopes, integrated."""

    order: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ValueError(f"order must be in 1 .. 8, got {self.order}")

    @property
    def clamps(self) -> bool:
        return False

    def plan(self, grid: Grid) -> Plan:
        straight = grid.schedule.straight_scale
        scale, next_scale = straight(grid.alpha, grid.sigma), straight(grid.next_alpha, grid.next_sigma)
        if bool((scale == 0).any()):
            raise ValueError("lms cannot start where alpha is 0: there the slope is infinite")
        levels, ends = (grid.sigma / scale).tolist(), (grid.next_sigma / next_scale).tolist()
        weights = torch.zeros(len(levels), self.order, dtype=torch.float64)
        for i, (low, high) in enumerate(zip(levels, ends, strict=True)):
            past = levels[max(0, i - self.order + 1) : i + 1][::-1]
            weights[i, : len(past)] = torch.tensor(_lagrange_integrals(past, low, high), dtype=torch.float64)
        newest, *older = (weights * next_scale[:, None]).unbind(1)
        return _plan(grid, torch.stack([next_scale / scale, newest, torch.zeros_like(scale), *older], 1), of="slope")


_gauss_legendre = functools.cache(np.polynomial.legendre.leggauss)


def _lagrange_integrals(nodes: list[float], low: float, high: float) -> list[float]:
    """Integrals from low to high of the Lagrange polynomials on the nodes; exact, by Gauss-Legendre quadrature."""
    points, quadrature = _gauss_legendre(len(nodes) // 2 + 1)
    at = 0.5 * (high - low) * points + 0.5 * (high + low)
    out = []
    for j, node in enumerate(nodes):
        values = np.prod([(at - other) / (node - other) for k, other in enumerate(nodes) if k != j], axis=0)
        out.append(float(0.5 * (high - low) * (quadrature * values).sum()))
    return out


def _widths(grid: Grid) -> Tensor:
    """Of each step in log(alpha / sigma)."""
    return half_log_snr(grid.next_alpha, grid.next_sigma) - half_log_snr(grid.alpha, grid.sigma)


def _integrals(grid: Grid, stochastic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What DPM-Solver++ makes each step of: the share of the state that is kept; the integrals of an estimate that is 1, or the
    share of the step that is done, or its square; and the noise."""
    h = _widths(grid)
    width = 2 * h if stochastic else h
    share = -torch.expm1(-width)
    keep = grid.next_sigma / grid.sigma
    value = grid.next_alpha * share
    slope = grid.next_alpha * (1 - share / width)
    curvature = grid.next_alpha - 2 * slope / width
    if stochastic:
        return keep * torch.exp(-h), value, slope, curvature, grid.next_sigma * share.sqrt()
    value = torch.where(torch.isfinite(h), value, grid.next_alpha - keep * grid.alpha)
    return keep, value, slope, curvature, torch.zeros_like(h)


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++, multistep: 2M and 3M, or with ``stochastic`` 2M-SDE and 3M-SDE; on the noise, DPM-Solver.

    Args:
        order: 1 to 3; the first steps, and a last step to the data, are of as much as there are estimates for. Order 3 is
            exact for a parabola; the published code, k-diffusion and diffusers weigh its curvature by half.
        stochastic: solve the SDE instead of the probability flow.
        solver: how steps of the second order are integrated, "midpoint" or "heun".
        on: what the polynomial goes through: estimates of the "data", which may be clamped and stay bounded under guidance, or
            of the "noise" (DPM-Solver; where it is stochastic up to order 2).
    """

    order: int = 2
    stochastic: bool = False
    solver: Literal["midpoint", "heun"] = "midpoint"
    on: Estimate = "data"
    layout: ClassVar[Layout] = "solver"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")
        if self.solver not in ("midpoint", "heun"):
            raise ValueError(f"solver must be 'midpoint' or 'heun', got {self.solver!r}")
        if self.on not in ("data", "noise"):
            raise ValueError(f"on must be 'data' or 'noise', got {self.on!r}")
        if self.on == "noise" and self.stochastic and self.order == 3:
            raise ValueError("order must be 1 or 2 for the stochastic solver on the noise, got 3")

    @property
    def clamps(self) -> bool:
        return self.on == "data"

    def plan(self, grid: Grid) -> Plan:
        return self.plan_of_orders(grid, [min(self.order, step + 1) for step in range(len(grid.time))])

    def plan_of_orders(self, grid: Grid, orders: Sequence[int]) -> Plan:
        """The plan with each step of an order of its own, at most as many as there are estimates by then."""
        _check_estimate(self.on, grid)
        if self.on == "noise":
            plan = _plan(mirrored(grid), self._integrated(mirrored(grid), orders, stochastic=False))
            return on_noise(plan._replace(rows=self._diffusing(grid, plan.rows)) if self.stochastic else plan)
        return _plan(grid, self._integrated(grid, orders, self.stochastic))

    def _integrated(self, grid: Grid, orders: Sequence[int], stochastic: bool) -> Tensor:
        here, h = half_log_snr(grid.alpha, grid.sigma), _widths(grid)
        keep, value, slope, curvature, noise = _integrals(grid, stochastic)
        rows = torch.zeros(len(h), 3 + self.order - 1, dtype=torch.float64)
        rows[:, 0], rows[:, 1], rows[:, 2] = keep, value, noise
        for step, order in enumerate(orders):
            if order == 1 or not bool(torch.isfinite(h[step]) & (h[step] != 0) & torch.isfinite(here[step - 1])):
                continue
            combined = torch.zeros(self.order, dtype=torch.float64)
            first, second = differences(here, h, step, order)
            if order == 2:
                combined[:2] = (0.5 * value[step] if self.solver == "midpoint" else slope[step]) * first
            else:
                combined[:3] = slope[step] * first + curvature[step] * second
            rows[step, 1] += combined[0]
            rows[step, 3:] += combined[1:]
        return rows

    @staticmethod
    def _diffusing(grid: Grid, rows: Tensor) -> Tensor:
        """The SDE on the noise: it goes twice as far towards the data, and back half of the way by chance; but not from its
        last step to the data itself, which has no noise."""
        h = _widths(grid)
        twice = torch.isfinite(h)
        rows = rows.clone()
        rows[:, 1:] *= torch.where(twice, 2.0, 1.0)[:, None]
        rows[:, 2] = torch.where(twice, grid.next_sigma * torch.expm1(2 * h).sqrt(), 0.0)
        return rows


def differences(here: Tensor, h: Tensor, step: int, order: int) -> tuple[Tensor, Tensor]:
    """The line or, at order 3, the parabola through the last estimates, in the share of a step that is done: weights of these,
    newest first, in its linear and its quadratic coefficient."""
    recent = (here[step] - here[step - 1]) / h[step]
    newest = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[:order] / recent
    if order == 2 or not bool(torch.isfinite(here[step - 2])):
        return newest, torch.zeros_like(newest)
    before = (here[step - 1] - here[step - 2]) / h[step]
    change = newest - torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64) / before
    return newest + recent / (recent + before) * change, change / (recent + before)


@dataclasses.dataclass(frozen=True)
class DPMSolverSinglestep(Sampler):
    """DPM-Solver++, single-step: blocks of ``order`` evaluations, each of which steps from the block's start again (2S, 3S); on
    the noise, DPM-Solver-2 and 3.

    The points of the grid are the evaluations, so a run of n steps costs what one of any other sampler does. The state at the
    block's start is not kept: what led from it to the present one is known, and subtracted.

    Args:
        order: 1 to 3; the last step to the data is of the first.
        solver: "midpoint", the line through the block's first and its last estimate, as published; or "heun", integrated
            exactly, at order 3 the parabola through all.
        on: what is combined: estimates of the "data" or of the "noise".
    """

    order: int = 2
    solver: Literal["midpoint", "heun"] = "midpoint"
    on: Estimate = "data"
    layout: ClassVar[Layout] = "solver"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")
        if self.solver not in ("midpoint", "heun"):
            raise ValueError(f"solver must be 'midpoint' or 'heun', got {self.solver!r}")
        if self.on not in ("data", "noise"):
            raise ValueError(f"on must be 'data' or 'noise', got {self.on!r}")

    @property
    def clamps(self) -> bool:
        return self.on == "data"

    def orders(self, steps: int, *, lower_final: bool = True) -> list[int]:
        """The order of each step: 1 .. ``order`` again and again, cut short at the end.

        Args:
            steps: how many.
            lower_final: whether whole blocks too leave their last step to the first order, which is stable.
        """
        short = steps % self.order or (self.order if lower_final and steps else 0)
        blocks = [*range(1, self.order + 1)] * ((steps - short) // self.order)
        if short == self.order:
            return [*blocks, *range(1, self.order), 1]
        return [*blocks, *range(1, short + 1)]

    def plan(self, grid: Grid) -> Plan:
        # a step from no data at all, or to no noise, is endless in log-SNR: of the first order, a block of its own
        alone = bool(grid.alpha[0] == 0)
        orders = [1] * alone + self.orders(len(grid.time) - alone)
        if not bool(grid.next_sigma[-1] > 0):
            orders[-1] = 1
        return self.plan_of_orders(grid, orders)

    def plan_of_orders(self, grid: Grid, orders: Sequence[int]) -> Plan:
        """The plan with each step of an order of its own: 1, or one more than that of the step before."""
        plan = self.from_starts(grid, orders)
        rows = plan.rows.clone()
        for step, order in enumerate(orders):
            if order > 1:
                # the state before this step is a share of that at the block's start and estimates that are known
                share = rows[step, 0] / plan.rows[step - 1, 0]
                rows[step, 0] = share
                rows[step, 3:] -= share * plan.rows[step - 1, [1, *range(3, plan.rows.shape[1] - 1)]]
        return plan._replace(rows=rows)

    def from_starts(self, grid: Grid, orders: Sequence[int], *, stochastic: bool = False) -> Plan:
        """The same plan, but of the state at the block's start in place of the present one; with ``stochastic`` that of the
        SDE, which has no other."""
        _check_estimate(self.on, grid)
        if self.on == "noise":
            return on_noise(dataclasses.replace(self, on="data").from_starts(mirrored(grid), orders))
        starts = torch.arange(len(orders)) - torch.tensor(orders) + 1
        blocks = grid._replace(alpha=grid.alpha[starts], sigma=grid.sigma[starts])
        here, h = half_log_snr(grid.alpha, grid.sigma), _widths(blocks)
        keep, value, slope, curvature, noise = _integrals(blocks, stochastic)
        rows = torch.zeros(len(h), 3 + self.order - 1, dtype=torch.float64)
        rows[:, 0], rows[:, 2] = keep, noise
        for step, order in enumerate(orders):
            weights = torch.zeros(order, dtype=torch.float64)
            if order > 1:
                line, bend = block_differences(here, h, step, order)
                if self.solver == "heun":
                    weights = slope[step] * line + curvature[step] * bend
                else:
                    to_newest = line + bend * (here[step] - here[starts[step]]) / h[step]
                    weights = (0.5 * value[step] if order == 2 else slope[step]) * to_newest
            weights[-1] += value[step]
            rows[step, 1], rows[step, 3 : 2 + order] = weights[0], weights[1:]
        return _plan(grid, rows)


def block_differences(here: Tensor, h: Tensor, step: int, order: int) -> tuple[Tensor, Tensor]:
    """The line or, at order 3, the parabola through a block's estimates, in the share of the block that is done: weights of
    these, newest first, in its linear and its quadratic coefficient."""
    start = here[step - order + 1]
    newest = (here[step] - start) / h[step]
    line = torch.tensor([1.0, *[0.0] * (order - 2), -1.0], dtype=torch.float64) / newest
    if order == 2:
        return line, torch.zeros_like(line)
    middle = (here[step - 1] - start) / h[step]
    to_middle = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64) / middle
    bend = (line - to_middle) / (newest - middle)
    return to_middle - middle * bend, bend


@dataclasses.dataclass(frozen=True)
class UniPC(Sampler):
    """Unified predictor-corrector with B(h) = e^h - 1 ("bh2") or h ("bh1"), of order 1 to 3, one evaluation a step.

    Args:
        order: of the predictor; the corrector has one more.
        solver: which B.
        lower_order_final: whether the order falls to 1 over the last steps, which are unstable otherwise.
        uncorrected: steps, counted from 0, whose result is left as predicted, as with strong guidance at first.
        on: whether estimates of the "data" or of the "noise" are combined.
    """

    order: int = 2
    solver: Literal["bh2", "bh1"] = "bh2"
    lower_order_final: bool = True
    uncorrected: tuple[int, ...] = ()
    on: Estimate = "data"
    layout: ClassVar[Layout] = "solver"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")
        if self.solver not in ("bh1", "bh2"):
            raise ValueError(f"solver must be 'bh1' or 'bh2', got {self.solver!r}")
        if self.on not in ("data", "noise"):
            raise ValueError(f"on must be 'data' or 'noise', got {self.on!r}")

    @property
    def clamps(self) -> bool:
        return self.on == "data"

    def _combination(self, places: list[float], h: float, alpha: float) -> list[float]:
        """Weights of the estimates at ``places`` in log-SNR, measured from the start in steps; the start's own comes first.

        The predictor uses the places behind it, the corrector also that of the step's end, 1.
        """
        growth = math.expm1(-h)
        scale = -h if self.solver == "bh1" else growth
        weights = [0.5] * len(places)  # as published for a single place, instead of the solution
        if len(places) > 1:
            size = len(places)
            matrix = torch.tensor([[place**k for place in places] for k in range(size)], dtype=torch.float64)
            right, phi, factorial = [], growth / -h - 1, 1
            for k in range(1, size + 1):
                right.append(phi * factorial / scale)
                factorial *= k + 1
                phi = phi / -h - 1 / factorial
            weights = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
        others = [-alpha * scale * weight / place for weight, place in zip(weights, places, strict=True)]
        return [-alpha * growth - sum(others), *others]

    def _weights(self, grid: Grid) -> list[tuple[float, list[float], list[float] | None]]:
        """Of each step what is kept of the state, and the weights of the estimates, newest first, for its prediction; and for
        its correction, where the estimate at its end comes before them."""
        here = half_log_snr(grid.alpha, grid.sigma).tolist()
        there = half_log_snr(grid.next_alpha, grid.next_sigma).tolist()
        keeps, alphas = (grid.next_sigma / grid.sigma).tolist(), grid.next_alpha.tolist()
        straight = (grid.next_alpha - grid.next_sigma / grid.sigma * grid.alpha).tolist()
        count = len(here)
        out: list[tuple[float, list[float], list[float] | None]] = []
        for i, (keep, alpha) in enumerate(zip(keeps, alphas, strict=True)):
            h = there[i] - here[i]
            if not math.isfinite(h):
                out.append((keep, [straight[i]], None))
                continue
            order = min(self.order, i + 1, count - i if self.lower_order_final else self.order)
            places = [(here[i - k] - here[i]) / h for k in range(1, order)]
            places = [place for place in places if math.isfinite(place)]
            corrector = None
            if i not in self.uncorrected:
                start, *past, end = self._combination([*places, 1.0], h, alpha)
                corrector = [end, start, *past]
            out.append((keep, self._combination(places, h, alpha), corrector))
        return out

    def plan(self, grid: Grid) -> Plan:
        _check_estimate(self.on, grid)
        if self.on == "noise":
            return on_noise(dataclasses.replace(self, on="data").plan(mirrored(grid)))
        rows = torch.zeros(len(grid.time), 3 + self.order, dtype=torch.float64)
        correction = torch.zeros(self.order + 1, dtype=torch.float64)  # of the state by the estimates, newest first
        for i, (keep, predictor, corrector) in enumerate(self._weights(grid)):
            row = keep * correction
            row[: len(predictor)] += torch.tensor(predictor, dtype=torch.float64)
            rows[i, 0], rows[i, 1], rows[i, 3:] = keep, row[0], row[1:]
            correction = torch.zeros_like(correction)
            if corrector is not None:
                correction[: len(corrector)] = torch.tensor(corrector, dtype=torch.float64)
                correction[1 : 1 + len(predictor)] -= torch.tensor(predictor, dtype=torch.float64)
        return _plan(grid, rows)

    def corrections(self, grid: Grid) -> Plan:
        """The corrector alone, behind another method's predictions: rows that correct the state before each step, with one
        column more, for the corrected state a step before."""
        _check_estimate(self.on, grid)
        if self.on == "noise":
            return on_noise(dataclasses.replace(self, on="data").corrections(mirrored(grid)))
        rows = torch.zeros(len(grid.time), 4 + self.order, dtype=torch.float64)
        rows[0, 0] = 1.0
        for row, (keep, _, corrector) in zip(rows[1:], self._weights(grid), strict=False):
            if corrector is None:
                row[0] = 1.0
            else:
                row[1], row[3 : 2 + len(corrector)], row[-1] = (
                    corrector[0],
                    torch.tensor(corrector[1:], dtype=torch.float64),
                    keep,
                )
        return _plan(grid, rows)


@dataclasses.dataclass(frozen=True)
class SASolver(Sampler):
    """Stochastic Adams method, predictor and corrector, for the SDE with ``tau`` times the noise of the reverse diffusion; one
    evaluation a step.

    Args:
        order: of the predictor, 1 to 4.
        corrector: order of the corrector, 1 to 4; 0 for none.
        tau: 0 solves the probability flow, 1 the reverse diffusion.
        lower_order_final: whether the orders fall to 1 and 2 over the last steps.
        on: whether estimates of the "data" or of the "noise" are combined.
    """

    order: int = 2
    corrector: int = 2
    tau: float = 1.0
    lower_order_final: bool = True
    on: Estimate = "data"
    layout: ClassVar[Layout] = "solver"

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"order must be in 1 .. 4, got {self.order}")
        if not 0 <= self.corrector <= 4:
            raise ValueError(f"corrector must be in 0 .. 4, got {self.corrector}")
        if not self.tau >= 0:
            raise ValueError(f"tau must not be negative, got {self.tau}")
        if self.on not in ("data", "noise"):
            raise ValueError(f"on must be 'data' or 'noise', got {self.on!r}")

    @property
    def clamps(self) -> bool:
        return self.on == "data"

    def _integrals(self, places: list[float], low: float, high: float, tau: float, published: bool) -> Tensor:
        """Of the Lagrange polynomials on the estimates' ``places`` in log(alpha / sigma), with the step's weight, over a step
        from ``low`` to ``high``; to be multiplied by alpha or, on the noise, by -sigma."""
        rate = 1 + tau**2
        points, quadrature = _gauss_legendre(32)
        at = low + 0.5 * (high - low) * (points + 1)
        decay = np.exp(rate * (at - high) if self.on == "data" else high - at)
        weight = 0.5 * (high - low) * rate * quadrature * decay
        if published and self.on == "data" and len(places) == 2:
            other = places[0] if places[1] == low else places[1]
            slope = 0.5 * rate * (high - low) ** 2 / (other - low)
            values = [slope if place == other else float(weight.sum()) - slope for place in places]
        else:
            lagrange = [np.prod([(at - b) / (a - b) for b in places if b != a], axis=0) for a in places]
            values = [float((weight * polynomial).sum()) for polynomial in lagrange]
        return torch.tensor(values, dtype=torch.float64)

    def plan(self, grid: Grid) -> Plan:
        return self.plan_of(grid, [self.tau] * len(grid.time))

    def plan_of(self, grid: Grid, taus: Sequence[float], *, published: bool = False) -> Plan:
        """The plan with a tau for each step.

        Args:
            grid: the steps.
            taus: one for each.
            published: whether a line through two estimates of the data is integrated as in the published code, which weighs its
                slope as if nothing of it decayed.
        """
        _check_estimate(self.on, grid)
        tau, h = torch.tensor(taus, dtype=torch.float64), _widths(grid)
        if self.on == "data":
            # without noise an endless step keeps what a straight one does
            renewed = torch.where(tau > 0, tau.square() * h, 0.0)
            keep = grid.next_sigma / grid.sigma * torch.exp(-renewed)
            noise = grid.next_sigma * (-torch.expm1(-2 * renewed)).clamp(min=0).sqrt()
            scale, straight = grid.next_alpha, grid.next_alpha - keep * grid.alpha
        else:
            keep = grid.next_alpha / grid.alpha
            noise = torch.where(torch.isfinite(h), tau * grid.next_sigma * torch.expm1(2 * h).clamp(min=0).sqrt(), 0.0)
            scale, straight = -grid.next_sigma, grid.next_sigma - keep * grid.sigma
        here = half_log_snr(grid.alpha, grid.sigma).tolist()
        there = half_log_snr(grid.next_alpha, grid.next_sigma).tolist()
        count, slots = len(here), max(self.order, self.corrector - 1)
        rows = torch.zeros(count, 3 + slots, dtype=torch.float64)
        rows[:, 0], rows[:, 2] = keep, noise
        correction = torch.zeros(slots + 1, dtype=torch.float64)  # of the state by the estimates, newest first
        for i, (low, high) in enumerate(zip(here, there, strict=True)):
            past = [place for place in here[max(0, i - slots) : i + 1][::-1] if math.isfinite(place)]
            left = count - i if self.lower_order_final else count
            predicted, following = torch.zeros_like(correction), torch.zeros_like(correction)
            if math.isfinite(high - low):
                places = past[: min(self.order, left)]
                predicted[: len(places)] = scale[i] * self._integrals(places, low, high, taus[i], published)
                places = [high, *past][: min(self.corrector, left + 1)]
                if places and high != low:
                    # with the noise of the prediction it differs from that by estimates alone
                    following[: len(places)] = scale[i] * self._integrals(places, low, high, taus[i], published)
                    following[1:] -= predicted[:-1]
            else:
                predicted[0] = straight[i]
            row = keep[i] * correction + predicted
            rows[i, 1], rows[i, 3:] = row[0], row[1:]
            correction = following
        return _plan(grid, rows, of=self.on)


def resampled(plan: Plan, times: int, jump: int) -> Plan:
    """The plan with each stretch of ``jump`` steps gone through ``times`` times (Lugmayr et al., 2022, "RePaint", section 4.2).

    Between two passes the state gets the noise of q(x_t | x_s) from the stretch's end s back to its start t: a factor and a
    variance more in the row of the last step before. Stretches end at the last state that has noise; what is left over at the
    top is gone through once.

    Raises:
        ValueError: unless every row stands on its own: one evaluation a step, no history, a variance that is not learned.
    """
    if times < 1 or jump < 1:
        raise ValueError(f"resample and jump must be at least 1, got {times} and {jump}")
    if times == 1:
        return plan
    noisier = bool((plan.sigma.diff() * plan.alpha[:-1] < plan.sigma[:-1] * plan.alpha.diff()).all())
    if plan.rows.shape[1] > 3 or plan.bounds is not None or not noisier:
        raise ValueError("resample needs a sampler of independent steps with a fixed variance: ddpm, ddim, euler_ancestral")
    last = len(plan.time) - 1
    ends = {end for end in range(last, 0, -jump) if end >= jump}
    order: list[int] = []
    leaps: list[tuple[int, int, int]] = []  # row, from point, to point
    for step in range(last + 1):
        order.append(step)
        if step + 1 in ends:
            for _ in range(times - 1):
                leaps.append((len(order) - 1, step + 1, step + 1 - jump))
                order += range(step + 1 - jump, step + 1)
    at = torch.tensor(order)
    rows = plan.rows[at]
    for row, low, high in leaps:
        factor = plan.alpha[high] / plan.alpha[low]
        rows[row] *= factor
        more = (plan.sigma[high].square() - (factor * plan.sigma[low]).square()).clamp(min=0)
        rows[row, 2] = (rows[row, 2].square() + more).sqrt()
    return plan._replace(
        time=plan.time[at],
        alpha=torch.cat([plan.alpha[at], plan.alpha[-1:]]),
        sigma=torch.cat([plan.sigma[at], plan.sigma[-1:]]),
        rows=rows,
    )


SAMPLERS: dict[str, tuple[type[Sampler], dict[str, Any]]] = {
    "ddpm": (DDPM, {}),
    "ddim": (DDIM, {}),
    "euler": (Euler, {}),
    "euler_ancestral": (EulerAncestral, {}),
    "heun": (Heun, {}),
    "edm": (Heun, {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}),
    "dpm2": (DPM2, {}),
    "dpm2_ancestral": (DPM2, {"eta": 1.0}),
    "lms": (LMS, {}),
    "pc": (PredictorCorrector, {}),
    "dpmpp_2m": (DPMSolver, {}),
    "dpmpp_2m_sde": (DPMSolver, {"stochastic": True}),
    "dpmpp_3m": (DPMSolver, {"order": 3}),
    "dpmpp_3m_sde": (DPMSolver, {"order": 3, "stochastic": True}),
    "dpmpp_2s": (DPMSolverSinglestep, {}),
    "dpmpp_3s": (DPMSolverSinglestep, {"order": 3}),
    "unipc": (UniPC, {}),
    "sa_solver": (SASolver, {}),
    "consistency": (Consistency, {}),
    "tcd": (Consistency, {"gamma": 0.3}),
}
"""Names of the samplers: class and the options in which a name differs from the class. "edm" is the paper's for ImageNet."""


def make_sampler(sampler: str | Sampler, **options: Any) -> Sampler:
    """A sampler by name, with options that are not None.

    >>> make_sampler("ddim", eta=0.5)
    DDIM(eta=0.5)

    Raises:
        ValueError: for an unknown name, or an option that the sampler does not have.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(sampler, Sampler):
        if given:
            raise ValueError(f"{', '.join(given)}: options of a sampler are given to its class, {type(sampler).__name__}")
        return sampler
    if not isinstance(sampler, str):
        raise TypeError(f"sampler must be a name or a Sampler, got {sampler!r}")
    if sampler not in SAMPLERS:
        near = difflib.get_close_matches(sampler, SAMPLERS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SAMPLERS)}"
        raise ValueError(f"unknown sampler {sampler!r}; {hint}")
    kind, preset = SAMPLERS[sampler]
    known = list(inspect.signature(kind).parameters)
    for name in given:
        if name not in known:
            raise ValueError(f"sampler {sampler!r} has no option {name!r}; it has: {', '.join(known)}")
    return kind(**{**preset, **given})
