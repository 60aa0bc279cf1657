"""What each layer of a flow does to a batch: log-determinants, magnitudes, errors of inversion, the first layer that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.flows.transform import Bijection

__all__ = ["LayerReport", "Report", "diagnose"]


class LayerReport(NamedTuple):
    """One elementary layer at work, in the direction that was asked for; extremes over the batch."""

    name: str
    """Where the layer is in the flow's transform, such as "1.0.3"."""
    kind: str
    """Its class."""
    log_det_min: float
    """Nats per sample."""
    log_det_mean: float
    log_det_max: float
    largest: float
    """Largest magnitude in the output."""
    error: float
    """Error of the input rebuilt from the output, relative, 2-norm, of the worst sample; NaN where it is not finite."""
    finite: bool
    """Whether output and log-determinant are finite."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers in the order in which they ran; printed, a table.

    Attributes:
        layers: a row each.
    """

    layers: list[LayerReport]

    @property
    def first_bad(self) -> LayerReport | None:
        """The first layer whose output or log-determinant is not finite."""
        return next((layer for layer in self.layers if not layer.finite), None)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "log-det min", "mean", "max (nats)", "largest |y|", "rebuild error", "")
        ]
        for r in self.layers:
            numbers = (r.log_det_min, r.log_det_mean, r.log_det_max, r.largest, r.error)
            mark = "" if r.finite else "NOT FINITE, first" if r is self.first_bad else "NOT FINITE"
            rows.append((r.name, r.kind, *(f"{value:.3g}" for value in numbers), mark))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextmanager
def _watched(transform: Bijection, seen: Callable[[str, Bijection, Tensor, Tensor, Tensor, bool], None]) -> Iterator[None]:
    """Call ``seen(name, layer, x, y, ladj, inverse)`` whenever an elementary layer has run."""
    layers = [
        (name, module)
        for name, module in transform.named_modules()
        if isinstance(module, Bijection) and not any(isinstance(m, Bijection) for m in module.modules() if m is not module)
    ]

    busy: set[str] = set()  # an inverse that is found by search calls its own layer

    def watch(name: str, layer: Bijection, method: str) -> None:
        run = getattr(layer, method)

        def watched(x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if name in busy:
                return run(x, context)
            busy.add(name)
            try:
                y, ladj = run(x, context)
            finally:
                busy.remove(name)
            seen(name, layer, x, y, ladj, method == "inv_and_ladj")
            return y, ladj

        vars(layer)[method] = watched

    for name, layer in layers:
        watch(name, layer, "call_and_ladj")
        watch(name, layer, "inv_and_ladj")
    try:
        yield
    finally:
        for _, layer in layers:
            del vars(layer)["call_and_ladj"], vars(layer)["inv_and_ladj"]


@torch.no_grad()
def diagnose(transform: Bijection, x: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Report:
    """Run a transform, or its inverse, on a batch and report on every elementary layer."""
    steps: list[tuple[Any, ...]] = []
    with _watched(transform, lambda *step: steps.append(step)):
        if inverse:
            transform.inv_and_ladj(x, context)
        else:
            transform.call_and_ladj(x, context)
    return Report([_report(*step, context=context) for step in steps])


def _report(
    name: str, layer: Bijection, x: Tensor, y: Tensor, ladj: Tensor, inverse: bool, *, context: Tensor | None
) -> LayerReport:
    back = layer.call_and_ladj(y, context)[0] if inverse else layer.inv_and_ladj(y, context)[0]
    error = (back - x).flatten(1).norm(dim=1) / (x.flatten(1).norm(dim=1) + torch.finfo(x.dtype).tiny)
    return LayerReport(
        name=name,
        kind=type(layer).__name__,
        log_det_min=float(ladj.min()),
        log_det_mean=float(ladj.mean()),
        log_det_max=float(ladj.max()),
        largest=float(y.abs().max()),
        error=float(error.max()),
        finite=bool(y.isfinite().all() and ladj.isfinite().all()),
    )
