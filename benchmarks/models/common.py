"""What comparisons of models share: how results are compared, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parity import ParityError

__all__ = ["difference", "training_step"]


def difference(got: Tensor, expected: Tensor, bound: float) -> float:
    """Relative difference in the 2-norm.

    Raises:
        ParityError: above ``bound``, or for another shape.
    """
    if got.shape != expected.shape:
        raise ParityError(f"shape {list(got.shape)}, expected {list(expected.shape)}")
    off = float((got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
    if not off <= bound:
        raise ParityError(f"results differ by {off:.2g} of their norm, more than {bound:g}")
    return off


def training_step(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], Any]:
    """Loss, gradients, and a step of Adam: PyTorch's fused one, since that of loops over parameters is no side's own work."""
    optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=True)

    def call() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return call
