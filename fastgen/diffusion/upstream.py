"""``compat="diffusers"``: where the steps of diffusers 0.42.1 lie, errors included, for comparing trajectories.

Upstream lays out steps in four ways, and a sampler's ``layout`` says which its counterpart has:

* "index" (DDPM): rounded times; the next of a step is the next of the table;
* "stride" (DDIM): the same times, but each step goes back by T // steps, wherever that is;
* "sigma" (Euler, ancestral Euler, Heun, LMS): "linspace" times are not rounded, and sigma / alpha is interpolated linearly;
* "solver" (DPM-Solver++, UniPC): "linspace" and "leading" lay out one step more and leave out its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.diffusion.samplers import DDPM, Plan, Sampler
from fastgen.diffusion.schedules import Discrete, Grid, Schedule, Spacing

__all__ = ["upstream_grid", "upstream_plan"]


def _times(chain: int, steps: int, layout: str, spacing: Spacing) -> Tensor:
    if spacing == "trailing":
        return torch.arange(chain, 0, -chain / steps, dtype=torch.float64).round() - 1
    more = layout == "solver"
    if spacing == "leading":
        return (torch.arange(steps + more, dtype=torch.float64) * (chain // (steps + more))).flip(0)[:steps]
    times = torch.linspace(0, chain - 1, steps + more, dtype=torch.float64).flip(0)[:steps]
    return times if layout == "sigma" else times.round()


def upstream_grid(schedule: Schedule, steps: int | Sequence[float], layout: str, spacing: Spacing | None = None) -> Grid:
    """The grid of diffusers' sampler with this layout.

    A flow's times are ``FlowMatchEulerDiscreteScheduler``'s: from 1 to 1 / 1000 in even steps, then 0, with its shift
    applied to the ends and to the steps.
    """
    if not isinstance(steps, int):
        return schedule.grid(steps)
    if not isinstance(schedule, Discrete):
        shift = getattr(schedule, "shift", None)
        if shift is None:
            raise ValueError(f"compat='diffusers' is for chains and flows, not for {type(schedule).__name__}")
        last = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
        time = torch.linspace(1, last, steps, dtype=torch.float64)
        return schedule.grid((shift * time / (1 + (shift - 1) * time)).tolist())
    spacing = spacing or ("leading" if layout in ("index", "stride") else "linspace")
    chain, bar = schedule.steps, schedule.alphas_cumprod
    time = _times(chain, steps, layout, spacing)
    ratios = ((1 - bar) / bar).sqrt()
    below = time.long()
    if layout == "sigma":
        ratio = ratios[below].lerp(ratios[(below + 1).clamp(max=chain - 1)], time - below)
        alpha, sigma = schedule.of_ratio(ratio)
    else:
        alpha, sigma = bar[below].sqrt(), (1 - bar[below]).sqrt()
    if layout == "stride":
        after = (time - chain // steps).long()
        kept = torch.where(after >= 0, bar[after.clamp(min=0)], 1.0)
        return Grid(schedule, time, alpha, sigma, after.double(), kept.sqrt(), (1 - kept).sqrt())
    end = [torch.tensor([value], dtype=torch.float64) for value in (schedule.clean, 1.0, 0.0)]
    return Grid.through(schedule, *(torch.cat(pair) for pair in zip((time, alpha, sigma), end, strict=True)))


def upstream_plan(sampler: Sampler, grid: Grid) -> Plan:
    """The sampler's plan as upstream's: its DDPM with the large variance adds noise in a last step from t > 0 to the data."""
    plan = sampler.plan(grid)
    if isinstance(sampler, DDPM) and sampler.variance == "large" and float(grid.time[-1]) > 0:
        rows = plan.rows.clone()
        rows[-1, 2] = (1 - grid.alpha[-1].square()).sqrt()
        plan = plan._replace(rows=rows)
    return plan
