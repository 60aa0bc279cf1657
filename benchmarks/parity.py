"""Nothing is timed that is not right: outputs and gradients on the very inputs to be timed, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Workload, bind, tensors_of
from tests.ops.tolerances import error

__all__ = ["ParityError", "check_baseline", "check_fused", "check_normal", "truth"]


class ParityError(Exception):
    """A provider does not compute what it is timed for."""


def truth(workload: Workload, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Outputs, and in mode "fwdbwd" gradients, of the reference on float64 copies of the inputs."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in workload.for_reference(inputs).items()
    }
    return tensors_of(bind(workload.spec.reference, wide, workload.mode, workload.spec.gradients)())


def _names(workload: Workload, inputs: Mapping[str, Any], count: int) -> list[tuple[str, str]]:
    """(name, precision class) of the ``count`` tensors that a call returns."""
    spec = workload.spec
    fast = dict(workload.flags).get("math") == "fast"
    leaves = [g for g in spec.gradients if inputs.get(g) is not None] if workload.mode == "fwdbwd" else []
    outputs = spec.precisions(count - len(leaves)).items()
    return [
        *((name, "fast" if fast and kind == "exact" else kind) for name, kind in outputs),
        *((f"gradient of {g}", spec.gradient_precision) for g in leaves),
    ]


def check_fused(workload: Workload, inputs: Mapping[str, Any], result: Any, expected: Sequence[Tensor]) -> None:
    """A fused backend: within the table of tests/ops/tolerances.py.

    Raises:
        ParityError: naming the output and how far off it is.
    """
    for (name, precision), got, want in zip(_names(workload, inputs, len(expected)), tensors_of(result), expected, strict=True):
        off = error(got, want, precision) if got.shape == want.shape else float("inf")
        if not off <= 1:
            raise ParityError(f"{workload.title}: {name} is off by {off:.3g} times its tolerance")


def check_baseline(workload: Workload, inputs: Mapping[str, Any], result: Any, expected: Sequence[Tensor]) -> None:
    """A baseline or a deterministic peer: the same computation to 0.1 % of the largest value (2 % below float32).

    Raises:
        ParityError: naming the output and how far off it is.
    """
    for (name, _), got, want in zip(_names(workload, inputs, len(expected)), tensors_of(result), expected, strict=True):
        bound = 1e-3 if got.dtype.itemsize >= 4 else 2e-2
        if got.shape != want.shape:
            raise ParityError(f"{workload.title}: {name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        off, scale = (
            (got.detach().double() - want.detach()).abs(),
            want.detach().abs().max().clamp_min(1e-30) if want.numel() else torch.ones(()),
        )
        if off.numel() and not bool((off <= bound * scale).all()):
            raise ParityError(f"{workload.title}: {name} is off by {float(off.max() / scale):.3g} of its largest value")


def check_normal(result: Tensor, shape: Sequence[int]) -> None:
    """Independent standard normals of a shape, by their first four moments (7 standard errors).

    Raises:
        ParityError: naming the moment.
    """
    if tuple(result.shape) != tuple(shape):
        raise ParityError(f"shape {tuple(result.shape)}, expected {tuple(shape)}")
    z, n = result.double().flatten(), max(result.numel(), 1)
    moments: tuple[tuple[str, Callable[[Tensor], Tensor], float, float], ...] = (
        ("mean", lambda x: x, 0.0, 1.0),
        ("variance", lambda x: x**2, 1.0, 2.0),
        ("third moment", lambda x: x**3, 0.0, 15.0),
        ("fourth moment", lambda x: x**4, 3.0, 96.0),
    )
    for name, power, expected, variance in moments:
        got = float(power(z).mean())
        if not abs(got - expected) <= 7 * (variance / n) ** 0.5:
            raise ParityError(f"not standard normal: {name} {got:.4g}, expected {expected:g}")
