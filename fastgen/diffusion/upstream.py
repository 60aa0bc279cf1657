"""``compat="diffusers"``: where the steps of diffusers 0.42.1 lie, errors and rounding included, for comparing trajectories.

Upstream lays out steps in four ways, and a sampler's ``layout`` says which its counterpart has:

* "index" (DDPM, LCM): rounded times; the next of a step is the next of the table;
* "stride" (DDIM, PNDM): the same times, but each step goes back by T // steps, wherever that is;
* "sigma" (Euler, Heun, the midpoint method, LMS): "linspace" times are not rounded, and sigma / alpha is interpolated
  linearly;
* "solver" (DPM-Solver++, DEIS, UniPC): "linspace" and "leading" lay out one step more and leave out its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastgen.diffusion.samplers import (
    DDPM,
    DPMSolver,
    DPMSolverSinglestep,
    Plan,
    Sampler,
    block_differences,
    differences,
    half_log_snr,
    mirrored,
)
from fastgen.diffusion.schedules import Discrete, Grid, Levels, Schedule, Spacing, noise_levels

__all__ = ["upstream_block_order", "upstream_chain", "upstream_grid", "upstream_plan", "upstream_third_order"]


def upstream_chain(betas: Tensor) -> Discrete:
    """The chain with the rounding of upstream's tables: its products are taken in float32, and 1 - alpha_bar of the first steps
    keeps four digits of them."""
    rounded = betas.float().cpu()
    chain = Discrete(rounded)
    chain.alphas_cumprod = (1 - rounded).cumprod(0).double()
    return chain


def _times(chain: int, steps: int, layout: str, spacing: Spacing, offset: int, longest: int, rising: bool) -> Tensor:
    if spacing == "trailing":
        falling = torch.arange(longest, 0, -chain / steps, dtype=torch.float64).round() - 1
        return falling.flip(0) if rising else falling
    more = layout == "solver"
    count = torch.arange(steps + more, dtype=torch.float64)
    # as numpy's linspace, from below: halves then round as upstream's
    stride = longest // (steps + more) if spacing == "leading" else (longest - 1) / max(steps + more - 1, 1)
    times = (count if rising else count.flip(0))[:steps] * stride
    if spacing == "leading":
        return times + offset
    times = times.clamp(max=longest - 1)
    return times if layout == "sigma" else times.round()


def upstream_grid(
    schedule: Schedule,
    steps: int | Sequence[float],
    layout: str,
    spacing: Spacing | None = None,
    *,
    offset: int = 0,
    longest: int | None = None,
    levels: Levels | None = None,
    low: float | None = None,
    high: float | None = None,
    end: tuple[float, float] = (1.0, 0.0),
    rising: bool = False,
) -> Grid:
    """The grid of diffusers' sampler with this layout.

    A flow's times are ``FlowMatchEulerDiscreteScheduler``'s: from 1 to 1 / 1000 in even steps, then 0, with its shift
    applied to the ends and to the steps.

    Args:
        schedule: a chain or a flow; the rest is for chains.
        steps: how many, or the times themselves, falling.
        layout: of the sampler.
        spacing: "leading", "linspace" or "trailing"; None: upstream's default for the layout.
        offset: added to "leading" times (``steps_offset``).
        longest: steps of the chain that are used, from the cleanest; None: all (what ``lambda_min_clipped`` leaves).
        levels: how the noise levels sigma / alpha are spaced instead.
        low, high: ends of these levels; None: the levels of the first and the last time, or of the chain ("solver").
        end: alpha and sigma after the last step.
        rising: whether a chain's steps go from the data to the noise, the last to the noisiest time that is used; with
            ``levels`` it stays where it is.
    """
    if not isinstance(schedule, Discrete):
        if not isinstance(steps, int):
            return schedule.grid(steps)
        shift = getattr(schedule, "shift", None)
        if shift is None:
            raise ValueError(f"compat='diffusers' is for chains and flows, not for {type(schedule).__name__}")
        last = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        time = torch.linspace(1, last, steps, dtype=torch.float64)
        return schedule.grid((shift * time / (1 + (shift - 1) * time)).tolist())
    spacing = spacing or ("leading" if layout in ("index", "stride") else "linspace")
    chain, bar = schedule.steps, schedule.alphas_cumprod
    if isinstance(steps, int):
        if not 1 <= steps <= chain:
            raise ValueError(f"steps must be in 1 .. {chain}, got {steps}")
        time = _times(chain, steps, layout, spacing, offset, longest or chain, rising)
    else:
        time = torch.as_tensor(steps, dtype=torch.float64)
        if time.dim() != 1 or len(time) < 1 or not bool(((time.diff() > 0) == rising).all()):
            raise ValueError(f"steps must be a number or {'rising' if rising else 'falling'} times, got {steps!r}")
    if float(time.max()) > chain - 1 or float(time.min()) < 0:
        raise ValueError(f"times must be in 0 .. {chain - 1}, got {float(time[0]):g} .. {float(time[-1]):g} (offset {offset})")
    ratios = ((1 - bar) / bar).sqrt()
    below = time.long()
    if levels is not None:
        ends = ratios[[0, -1]] if layout == "solver" else ratios[below[[-1, 0]]]
        low, high = (float(ends[0]) if low is None else low), (float(ends[1]) if high is None else high)
        ratio = noise_levels(levels, len(time), low, high)
        ratio = ratio.flip(0) if rising else ratio
        time, (alpha, sigma) = schedule.time(ratio), schedule.of_ratio(ratio)
    elif layout == "sigma":
        ratio = ratios[below].lerp(ratios[(below + 1).clamp(max=chain - 1)], time - below)
        alpha, sigma = schedule.of_ratio(ratio)
    else:
        alpha, sigma = bar[below].sqrt(), (1 - bar[below]).sqrt()
    if layout == "stride":
        after = (time - chain // len(time)).long()
        kept = torch.where(after >= 0, bar[after.clamp(min=0)], end[0] ** 2)
        return Grid(schedule, time, alpha, sigma, after.double(), kept.sqrt(), (1 - kept).sqrt())
    after_all = schedule.clean
    if rising:
        noisiest = (longest or chain) - 1
        kept = bar[noisiest] if levels is None else alpha[-1].square()
        after_all, end = float(noisiest), (float(kept.sqrt()), float((1 - kept).sqrt()))
    last_point = [torch.tensor([value], dtype=torch.float64) for value in (after_all, *end)]
    return Grid.through(schedule, *(torch.cat(pair) for pair in zip((time, alpha, sigma), last_point, strict=True)))


def upstream_third_order(grid: Grid, steps: Iterable[int], sampler: DPMSolver) -> Tensor:
    """What upstream's third order differs by in the rows of these steps: it weighs the curvature of the estimate by half of its
    integral, and less by alpha where it solves the SDE (-1/2 in place of +1/2)."""
    if sampler.on == "noise":
        grid = mirrored(grid)
    stochastic = sampler.stochastic
    here, rows = half_log_snr(grid.alpha, grid.sigma), torch.zeros(len(grid.time), 5, dtype=torch.float64)
    h = half_log_snr(grid.next_alpha, grid.next_sigma) - here
    width = 2 * h if stochastic else h
    for step in steps:
        if bool(torch.isfinite(h[step]) & (h[step] != 0)):
            _, second = differences(here, h, step, 3)
            w = width[step]
            half = 0.5 - (1 + torch.expm1(-w) / w) / w
            rows[step, [1, 3, 4]] = -grid.next_alpha[step] * (half + stochastic) * second
    return rows


def upstream_block_order(grid: Grid, orders: Sequence[int], sampler: DPMSolverSinglestep) -> Tensor:
    """What upstream's single-step solver of the SDE differs by in its rows from the blocks' starts: with "heun" it weighs the
    curvature of the estimate by twice alpha less (-1/2 in place of +1/2)."""
    rows = torch.zeros(len(orders), 2 + sampler.order, dtype=torch.float64)
    here = half_log_snr(grid.alpha, grid.sigma)
    if sampler.solver == "heun":
        for step, order in enumerate(orders):
            if order == 3:
                h = half_log_snr(grid.next_alpha, grid.next_sigma) - here[step - 2]
                rows[step, [1, 3, 4]] = -2 * grid.next_alpha[step] * block_differences(here, h, step, 3)[1]
    return rows


def upstream_plan(sampler: Sampler, grid: Grid) -> Plan:
    """The sampler's plan as upstream's: its DDPM adds noise in a last step from t > 0 to the data, with the large variance all
    of it, with a learned one between that and 1e-20; its solver of third order is as :func:`upstream_third_order` says."""
    plan = sampler.plan(grid)
    if isinstance(sampler, DPMSolver) and sampler.order == 3:
        more = upstream_third_order(grid, range(2, len(grid.time)), sampler)
        plan = plan._replace(rows=plan.rows + more)
    if isinstance(sampler, DDPM) and sampler.variance != "small" and float(grid.time[-1]) > 0:
        large, rows = 1 - grid.alpha[-1].square(), plan.rows.clone()
        rows[-1, 2] = large.sqrt()
        if plan.bounds is not None:
            rows[-1, 2], bounds = 1.0, plan.bounds.clone()
            bounds[-1] = torch.stack([torch.full_like(large, 1e-20), large]).log()
            plan = plan._replace(bounds=bounds)
        plan = plan._replace(rows=rows)
    return plan
