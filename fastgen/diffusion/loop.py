"""The one loop that all samplers run in, and the table that drives it.

A :class:`Table` holds one row of :func:`fastgen.ops.denoise` for every evaluation of the network; :func:`run` evaluates, takes
the step and moves on. Everything is on the device before the first step and nothing is read back, so the loop never waits
for the device. Evaluation i of sample j draws at step word i and sample word j of the key's stream ``DENOISE``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen import ops, random
from fastgen.diffusion.samplers import Plan
from fastgen.diffusion.schedules import Schedule, estimate_rows
from fastgen.random import Stream

__all__ = ["Step", "Table", "run", "tabulate"]


class Table(NamedTuple):
    """Rows (p, q, A, B, S, C_1 .. C_H) of all evaluations, on the device and in the dtype of the state."""

    time: Tensor
    """[E]: what the network is told."""
    coefficients: Tensor
    """[E, 5 + H]; C is in the order of the slots of a ring of the last H estimates."""
    alpha: Tensor
    """[E + 1]: alpha of the state before each evaluation, and at the end."""
    sigma: Tensor
    """[E + 1]: sigma, likewise."""
    bounds: Tensor | None
    """[E, 2]: range of the logarithm of a learned variance."""


class Step(NamedTuple):
    """Where the loop is, for callbacks. Tensors are the loop's own: clone what is to be kept."""

    step: int
    """Of the evaluation, from 0."""
    total: int
    """How many evaluations there are."""
    time: Tensor
    """[N]: what the network was told."""
    alpha: Tensor
    """[]: alpha of the state ``x``; of the input of the network for ``adjust``."""
    sigma: Tensor
    """[]: sigma, likewise."""
    x: Tensor
    """[N, ...]: the state."""
    x0: Tensor | None
    """[N, ...]: the estimate of the data that the step used, where somebody needs it."""


def tabulate(
    plan: Plan,
    rows: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    *,
    time_scale: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Table:
    """The table of a plan for what a network predicts.

    Args:
        plan: of a sampler.
        rows: (alpha, sigma) -> rows (a, b, c, d) of the target, such as :func:`fastgen.diffusion.schedules.target_rows`.
        schedule: the one that the plan's grid came from.
        time_scale: factor of the time for the network.
        device, dtype: of the state; a table for half precision is float32.
    """
    alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
    given = rows(alpha, sigma)
    estimate = estimate_rows(given)
    if plan.of == "noise":
        a, b, c, d = given.unbind(-1)
        estimate = torch.stack([-c, a], -1) / (a * d - b * c)[..., None]
    elif plan.of == "slope":
        scale = schedule.straight_scale(alpha, sigma)
        p, q = estimate.unbind(1)
        estimate = torch.stack([(1 - scale * p) / sigma, -scale * q / sigma], 1)
    own, past = plan.rows[:, :3], plan.rows[:, 3:]
    slots = past.shape[1]
    if slots:
        # the estimate of evaluation i lies in slot i mod H: C_k of evaluation i belongs to slot (i - k) mod H
        ages = (torch.arange(len(past))[:, None] - torch.arange(slots)[None] - 1) % slots
        past = past.gather(1, ages)
    coefficients = torch.cat([estimate, own, past], 1)
    wide = torch.promote_types(dtype, torch.float32)
    return Table(
        (plan.time * time_scale).to(device, wide),
        coefficients.to(device, wide),
        plan.alpha.to(device, wide),
        plan.sigma.to(device, wide),
        None if plan.bounds is None else plan.bounds.to(device, wide),
    )


def _advancing(key: Tensor, steps: int) -> Callable[[int], Tensor]:
    """The key of each step, made without reading anything back."""
    key = random.at(key, stream=Stream.DENOISE)
    if key.dim() == 1:
        keys = key.repeat(steps, 1)
        keys[:, 2] = torch.arange(steps, device=key.device)
        return list(keys.unbind()).__getitem__

    def at(step: int) -> Tensor:
        key[:, 2] = step
        return key

    return at


@torch.no_grad()
def run(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    table: Table,
    key: Tensor,
    *,
    guidance: float | Tensor | None = None,
    clamp: float | tuple[float, float] | None = None,
    noise: Callable[[int], Tensor] | None = None,
    adjust: Callable[[Step], Tensor] | None = None,
    callback: Callable[[Step], Tensor | None] | None = None,
) -> Tensor:
    """From the state at the table's first evaluation to its end.

    Args:
        network: (x [N, ...], time [N]) -> prediction [N, ...], or [N, 2C, ...] with a learned variance behind it, which
            samplers that have their own leave alone. With ``guidance`` it is given [2N, ...], twice the same, and returns the
            unconditional predictions first.
        x: the state [N, ...]; left as it is.
        table: from :func:`tabulate`, on the device of ``x``.
        key: noise of sample i is drawn at index i of it, [4] or [N, 4].
        guidance: weight of classifier-free guidance, a number or [N].
        clamp: limit of the estimate of the data, as for :func:`fastgen.ops.denoise`.
        noise: index of an evaluation -> noise [N, ...] to use instead of the key's.
        adjust: called with the estimate in ``Step.x0`` before it is used; what it returns is used instead. For dynamic
            thresholding, classifier guidance and the like.
        callback: called after each evaluation; a tensor that it returns becomes the state.

    Returns:
        The state at the end [N, ...].
    """
    samples, evaluations = len(x), len(table.time)
    copies = 1 if guidance is None else 2
    both = x.new_empty((copies * samples, *x.shape[1:]))
    for half in both.chunk(copies):
        half.copy_(x)
    x = both[:samples]
    slots = table.coefficients.shape[1] - 5
    history = x.new_zeros((slots, *x.shape)) if slots else None
    kept = None if history is None else history.unbind()
    spare = torch.empty_like(x) if adjust is not None or (callback is not None and not slots) else None
    times = table.time[:, None].expand(-1, copies * samples).unbind()
    coefficients = table.coefficients.unbind()
    bounds = None if table.bounds is None else table.bounds.unbind()
    keys = _advancing(key, evaluations)
    if adjust is not None:
        # in two passes: the estimate, then a step from what has become of it
        zero, one = torch.zeros(evaluations, device=x.device), torch.ones(evaluations, device=x.device)
        estimating = torch.cat(
            [table.coefficients[:, :2], torch.stack([zero, one, zero], 1).to(table.coefficients.dtype)], 1
        ).unbind()
        given = torch.stack([zero, one], 1).to(table.coefficients.dtype)
        coefficients = torch.cat([given, table.coefficients[:, 2:]], 1).unbind()

    for i in range(evaluations):
        out = network(both, times[i])
        log_variance = None
        if out.shape[1] != x.shape[1]:
            out, spread = out.chunk(2, 1)
            if bounds is not None:
                log_variance = spread[-samples:], bounds[i]
        weight, limit = guidance, clamp
        if adjust is not None:
            assert spare is not None
            ops.denoise(x, out, estimating[i], key, guidance=guidance, clamp=clamp, out=spare, return_x0=False)
            out = adjust(Step(i, evaluations, times[i][:samples], table.alpha[i], table.sigma[i], x, spare))
            weight, limit = None, None
        slot = spare if kept is None else kept[i % slots]
        ops.denoise(
            x,
            out,
            coefficients[i],
            keys(i) if noise is None else None,
            noise=None if noise is None else noise(i),
            history=history,
            guidance=weight,
            clamp=limit,
            log_variance=log_variance,
            out=x if slot is None else (x, slot),
            return_x0=slot is not None,
        )
        if callback is not None:
            now = table.alpha[i + 1], table.sigma[i + 1]
            instead = callback(Step(i, evaluations, times[i][:samples], *now, x, slot))
            if instead is not None and instead is not x:
                x.copy_(instead)
        if copies == 2:
            both[samples:].copy_(x)
    return x
