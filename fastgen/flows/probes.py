"""Random signs for trace estimates: v with E[v v^T] = I, so that E[v^T A v] = tr A, at the least variance."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops, random

__all__ = ["of_layer", "rademacher"]

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


def rademacher(shape: tuple[int, ...], key: Tensor, dtype: torch.dtype) -> Tensor:
    """-1 or 1 with equal probability: [N, ...], row i a function of the noise at index ``key.sample + i`` alone."""
    return torch.where(ops.uniform(shape, key) < 0.5, -1.0, 1.0).to(dtype)


def of_layer(key: Tensor | None, index: int, device: torch.device) -> Tensor:
    """The key of the probes of layer ``index`` where those of a model are at ``key``; a fresh one for None."""
    if key is None:
        return random.fresh_key(device)
    key = random.at(key, stream=random.Stream.PROBE)
    key[..., 0] += index * _ODD
    return key
