"""lu_linear_rebuild: one step of backpropagation through :mod:`fastgen.ops.lu_linear` from its output, in one pass.

With y = W x, from y and the gradients of the loss in y and log_det come

    x = W^-1 y,    dx = W^T dy,    and from G = sum dy x^T = (sum dy y^T) W^-T the gradients of the factors, as in backward

with W and W^-1 formed in float64 once. The pixels are read once, and x need not have been kept.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._rebuild import gradient_of_log_det, rebuilt
from fastgen.ops._spec import OpSpec, get_spec
from fastgen.ops.lu_linear import check_permutation, lu_linear_reference, prepared

__all__ = ["RebuiltLinear", "lu_linear_rebuild", "lu_linear_rebuild_reference"]


class RebuiltLinear(NamedTuple):
    """The input of the product and the gradients of the loss."""

    x: Tensor
    grad_x: Tensor
    grad_lower: Tensor
    grad_upper: Tensor
    grad_log_diagonal: Tensor


def lu_linear_rebuild_reference(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
) -> RebuiltLinear:
    """:func:`lu_linear_rebuild` in plain PyTorch."""
    lower, upper, log_diagonal, sign = prepared(y, lower, upper, log_diagonal, sign, permutation)
    y, grad_y = _checks.common(y=y, grad_y=grad_y)

    def transform(x: Tensor, left: Tensor, right: Tensor, log_scale: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return lu_linear_reference(x, left, right, log_scale, sign, permutation, inverse=inverse)

    grads = grad_y, gradient_of_log_det(grad_log_det, y)
    return RebuiltLinear(*rebuilt(transform, y, (lower, upper, log_diagonal), grads))


def _run(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = (
        torch.empty_like(y), torch.empty_like(y), torch.empty_like(lower), torch.empty_like(upper),
        torch.empty_like(log_diagonal),
    )  # fmt: skip
    samples, channels, pixels = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    if backend == "cpp":
        check_permutation(permutation)
        _native.kernel("lu_linear_rebuild")(
            _native.DTYPES[y.dtype], samples, channels, pixels, y, lower, upper, log_diagonal, sign, permutation, grad_y,
            grad_log_det, *outputs, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("lu_linear_rebuild").lu_linear_rebuild(
            samples, channels, pixels, y, lower, upper, log_diagonal, sign, permutation, grad_y, grad_log_det, *outputs
        )
    return outputs


_rebuild = _dispatch.raw_op(
    "lu_linear_rebuild",
    "(Tensor y, Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation, Tensor grad_y,"
    " Tensor grad_log_det, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda y, *args: (torch.empty_like(y), torch.empty_like(y), *(torch.empty_like(v) for v in args[:3])),
)


def lu_linear_rebuild(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    backend: str | None = None,
) -> RebuiltLinear:
    """The input of :func:`fastgen.ops.lu_linear` from its output, and the gradients there, in one pass over the pixels.

    Args:
        y: [N, C, ...], floating point: what ``lu_linear(x, lower, upper, ...)`` gave. float64 is served by the reference.
        lower, upper, log_diagonal, sign, permutation: as in the forward pass.
        grad_y: gradient of the loss in y.
        grad_log_det: gradient of the loss in the log-determinants, [N].
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(x, grad_x, grad_lower, grad_upper, grad_log_diagonal)``: shape and dtype of ``y``, and those of the factors in
        float32 (float64 for float64); constants for autograd.

    Raises:
        TypeError, ValueError: as :func:`fastgen.ops.lu_linear`.

    >>> y, eye, zero, one = torch.ones(8, 3, 4, 4), torch.zeros(3, 3), torch.zeros(3), torch.ones(3)
    >>> found = lu_linear_rebuild(y, eye, eye, zero, one, torch.tensor([2, 0, 1]), y, torch.zeros(8))
    >>> found.grad_x.shape, found.grad_log_diagonal
    (torch.Size([8, 3, 4, 4]), tensor([128., 128., 128.]))
    """
    factors = prepared(y, lower, upper, log_diagonal, sign, permutation)
    y, grad_y = _checks.common(y=y, grad_y=grad_y)
    grad_log_det = gradient_of_log_det(grad_log_det, y)
    chosen = _dispatch.choose(SPEC, backend, y)
    if chosen == "reference":
        return lu_linear_rebuild_reference(y, *factors, permutation, grad_y, grad_log_det)
    values = (v.detach().contiguous() for v in (y, *factors, permutation, grad_y))
    return RebuiltLinear(*_rebuild(*values, grad_log_det, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    channels: int = 3,
) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    inputs = get_spec("lu_linear").example_inputs(rows, event, channels=channels, **options)
    inputs.pop("inverse")
    y = inputs.pop("x")
    grads = {
        "grad_y": torch.randn(y.shape, generator=generator).to(device, dtype),
        "grad_log_det": torch.randn(rows, generator=generator).to(device),
    }
    return {"y": y, **inputs, **grads}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # y, dy -> x, dx; the factors and their gradients once
    return 4 * inputs["y"].nbytes + 2 * sum(inputs[name].nbytes for name in ("lower", "upper", "log_diagonal"))


SPEC = OpSpec(
    name="lu_linear_rebuild",
    function=lu_linear_rebuild,
    reference=lu_linear_rebuild_reference,
    outputs={
        "x": "elementwise",
        "grad_x": "elementwise",
        "grad_lower": "cancelling",
        "grad_upper": "cancelling",
        "grad_log_diagonal": "cancelling",
    },
    gradients=(),
    example_inputs=_example_inputs,
    flags={"channels": (3, 1, 12, 21)},
    shapes=((16, (12, 32, 32)), (16, (48, 16, 16)), (16, (96, 8, 8))),
    bytes_moved=_bytes_moved,
    samplewise=False,
)
