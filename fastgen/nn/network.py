"""What every denoising network is, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["Network", "recompute"]


class Network(Protocol):
    """A function of a noisy x and its time, in the networks of :mod:`fastgen.nn`: ``UNet``, ``DiT``, ``TimeMLP``.

    Shape: x [N, *event]; time [N], or one for the whole batch ([1], or it expanded), which costs less; labels int64 [N] in
    0..K, where K = ``num_classes`` is the null class of classifier-free guidance, as is None; context [N, T, D], None the null
    context -> [N, out, ...] in the dtype of x, whatever the dtype of the weights.
    """

    def __call__(self, x: Tensor, time: Tensor, *, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor: ...


def recompute(module: Callable[..., Tensor], *args: Any, enabled: bool) -> Tensor:
    """``module(*args)``; where gradients are wanted and ``enabled``, its activations are not kept but computed again."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)
