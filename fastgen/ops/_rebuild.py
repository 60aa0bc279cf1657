"""What the rebuilding ops share: one step of backpropagation from a layer's output, x and all gradients in one pass.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgen.ops import _checks

__all__ = ["gradient_of_log_det", "rebuilt"]


def gradient_of_log_det(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the loss in the log-determinants, checked: [N] in float32, or float64 if ``like`` is.

    Raises:
        TypeError, ValueError: for something else than a floating-point tensor [N] on the device of ``like``.
    """
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        raise TypeError(f"grad_log_det must be a floating-point tensor, got {getattr(grad, 'dtype', type(grad).__name__)}")
    if grad.shape != like.shape[:1] or grad.device != like.device:
        raise ValueError(
            f"grad_log_det must have shape [{len(like)}] on {like.device}, got {list(grad.shape)} on {grad.device}"
        )
    return _checks.constant(grad, like).contiguous()


@torch.no_grad()
def rebuilt(
    transform: Callable[..., Sequence[Tensor]], y: Tensor, parameters: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """In plain PyTorch: x, and the gradients in x and in each of ``parameters``.

    Args:
        transform: ``transform(x, *parameters, inverse=)`` -> output and log-determinant.
        grads: gradients of the loss in both.
    """
    x = transform(y, *parameters, inverse=True)[0]
    pull = torch.func.vjp(lambda *leaves: tuple(transform(*leaves, inverse=False)), x, *parameters)[1]
    return x, *pull(tuple(grads))
