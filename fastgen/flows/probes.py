"""Jacobians of maps of samples, whole or probed by random signs v: E[v v^T] = I, so that E[v^T J v] = tr J, at the least
variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fastgen import random

__all__ = ["jacobian", "of_layer", "push"]

_ODD = 0x9E3779B97F4A7C15


def of_layer(key: Tensor | None, index: int, device: torch.device) -> Tensor:
    """The key of the probes of layer ``index`` where those of a model are at ``key``; a fresh one for None."""
    if key is None:
        return random.fresh_key(device)
    key = random.at(key, stream=random.Stream.PROBE)
    key[..., 0] += (index * _ODD + (1 << 63)) % (1 << 64) - (1 << 63)
    return key


def push(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and J v for x [N, D] and v that broadcasts to it, forward in one pass."""
    return cast("tuple[Tensor, Tensor]", torch.func.jvp(function, (x,), (v.expand_as(x),)))


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) [N, D] and J [N, D, D] for f that maps each row of x [N, D] by itself: D forward derivatives in one batch."""
    basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    columns = torch.func.vmap(lambda v: push(function, x, v), out_dims=(None, 0))  # type: ignore[arg-type]
    y, pushed = columns(basis)
    return y, pushed.permute(1, 2, 0)
