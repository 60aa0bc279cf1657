"""affine_coupling_rebuild: one step of backpropagation through :mod:`fastgen.ops.affine_coupling` from its output, in one pass.

With y = x * exp(s) + shift and log_det = sum(s), where s is ``log_scale`` as its bound has it,

    x = (y - shift) * exp(-s),    dx = dy * exp(s),    dshift = dy
    dlog_scale = (dy * (y - shift) + dlog_det) * ds/dlog_scale

so that x need not have been kept. dy * (y - shift) is dx * x without its two roundings, and the exponential of neither
direction enters it.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._rebuild import gradient_of_log_det, rebuilt
from fastgen.ops._spec import OpSpec
from fastgen.ops.affine_coupling import BOUNDS, affine_coupling_reference, bound_code

__all__ = ["RebuiltCoupling", "affine_coupling_rebuild", "affine_coupling_rebuild_reference"]


class RebuiltCoupling(NamedTuple):
    """The input of the coupling and the gradients of the loss; that in ``shift`` is ``grad_y`` itself."""

    x: Tensor
    grad_x: Tensor
    grad_log_scale: Tensor


def affine_coupling_rebuild_reference(
    y: Tensor, shift: Tensor, log_scale: Tensor, grad_y: Tensor, grad_log_det: Tensor, *, bound: str | None = None
) -> RebuiltCoupling:
    """:func:`affine_coupling_rebuild` in plain PyTorch."""
    y, shift, log_scale, grad_y = _checks.common(y=y, shift=shift, log_scale=log_scale, grad_y=grad_y)
    transform = functools.partial(affine_coupling_reference, bound=bound)
    x, grad_x, _, grad_log_scale = rebuilt(transform, y, (shift, log_scale), (grad_y, gradient_of_log_det(grad_log_det, y)))
    return RebuiltCoupling(x, grad_x, grad_log_scale)


def _run(
    y: Tensor, shift: Tensor, log_scale: Tensor, grad_y: Tensor, grad_log_det: Tensor, bound: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)
    rows, event = _checks.as_rows(y)
    if backend == "cpp":
        _native.kernel("affine_coupling_rebuild")(
            _native.DTYPES[y.dtype], rows, event, y, shift, log_scale, grad_y, grad_log_det, *outputs, bound,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("affine_coupling_rebuild").affine_coupling_rebuild(
            rows, event, y, shift, log_scale, grad_y, grad_log_det, *outputs, bound
        )
    return outputs


_rebuild = _dispatch.raw_op(
    "affine_coupling_rebuild",
    "(Tensor y, Tensor shift, Tensor log_scale, Tensor grad_y, Tensor grad_log_det, int bound, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    lambda y, *_: (torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)),
)


def affine_coupling_rebuild(
    y: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    bound: str | None = None,
    backend: str | None = None,
) -> RebuiltCoupling:
    """The input of :func:`fastgen.ops.affine_coupling` from its output, and the gradients there, in one pass.

    Args:
        y: [N, ...], floating point: what ``affine_coupling(x, shift, log_scale, bound=bound)`` gave. float64 is served by the
            reference.
        shift: broadcast against ``y``.
        log_scale: broadcast against ``y``.
        grad_y: gradient of the loss in y.
        grad_log_det: gradient of the loss in the log-determinants, [N].
        bound: as in the forward pass.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(x, grad_x, grad_log_scale)`` in the broadcast shape and the dtype of the inputs; constants for autograd.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device.

    >>> x, ones = torch.zeros(8, 16), torch.ones(8, 16)
    >>> x, grad_x, grad_log_scale = affine_coupling_rebuild(x, x, x, ones, torch.ones(8))
    >>> x.shape, grad_log_scale.sum()
    (torch.Size([8, 16]), tensor(128.))
    """
    code = bound_code(bound)
    y, shift, log_scale, grad_y = _checks.common(y=y, shift=shift, log_scale=log_scale, grad_y=grad_y)
    grad_log_det = gradient_of_log_det(grad_log_det, y)
    chosen = _dispatch.choose(SPEC, backend, y)
    if chosen == "reference":
        return affine_coupling_rebuild_reference(y, shift, log_scale, grad_y, grad_log_det, bound=bound)
    values = (v.detach().contiguous() for v in (y, shift, log_scale, grad_y))
    return RebuiltCoupling(*_rebuild(*values, grad_log_det, code, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    bound: str | None = None,
) -> dict[str, Any]:
    names = ("y", "shift", "log_scale", "grad_y")
    inputs = {name: torch.randn(rows, *event, generator=generator).to(device, dtype) for name in names}
    return {**inputs, "grad_log_det": torch.randn(rows, generator=generator).to(device), "bound": bound}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # y, shift, log_scale, dy -> x, dx, dlog_scale
    return inputs["y"].nbytes * 7 + inputs["grad_log_det"].nbytes


SPEC = OpSpec(
    name="affine_coupling_rebuild",
    function=affine_coupling_rebuild,
    reference=affine_coupling_rebuild_reference,
    outputs={"x": "elementwise", "grad_x": "elementwise", "grad_log_scale": "elementwise"},
    gradients=(),
    example_inputs=_example_inputs,
    flags={"bound": tuple(BOUNDS)},
    shapes=((64, (16,)), (512, (256,)), (4096, (512,))),
    bytes_moved=_bytes_moved,
)
