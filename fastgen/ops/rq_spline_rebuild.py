"""rq_spline_rebuild: one step of backpropagation through :mod:`fastgen.ops.rq_spline` from its output, in one pass.

From y, its parameters and the gradients of the loss in y and log_det come x, by the stable root of the quadratic, and the
gradients in x and in all parameters at that x. The parameters are normalised and the bin is searched once, along the heights;
x need not have been kept.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._rebuild import gradient_of_log_det, rebuilt
from fastgen.ops._spec import OpSpec, get_spec
from fastgen.ops.rq_spline import CONVENTIONS, prepare, rq_spline_reference

__all__ = ["RebuiltSpline", "rq_spline_rebuild", "rq_spline_rebuild_reference"]


class RebuiltSpline(NamedTuple):
    """The input of the spline and the gradients of the loss."""

    x: Tensor
    grad_x: Tensor
    grad_widths: Tensor
    grad_heights: Tensor
    grad_derivatives: Tensor


def rq_spline_rebuild_reference(
    y: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    bound: float,
    convention: str = "nflows",
) -> RebuiltSpline:
    """:func:`rq_spline_rebuild` in plain PyTorch."""
    y, *parameters = prepare(y, widths, heights, derivatives, bound, convention)
    y, grad_y = _checks.common(y=y, grad_y=grad_y)
    transform = functools.partial(rq_spline_reference, bound=bound, convention=convention)
    x, *grads = rebuilt(transform, y, parameters, (grad_y, gradient_of_log_det(grad_log_det, y)))
    # a derivative that the element's bin does not have goes unread: 0 times its NaN is none of the result
    unread = parameters[2].isnan() & ~x.isnan()[..., None]
    grads[3] = torch.where(unread, 0.0, grads[3])
    return RebuiltSpline(x, *grads)


def _run(
    y: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    bound: float,
    zuko: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = (
        torch.empty_like(y), torch.empty_like(y), torch.empty_like(widths), torch.empty_like(heights),
        torch.empty_like(derivatives),
    )  # fmt: skip
    rows, event = _checks.as_rows(y)
    if backend == "cpp":
        _native.kernel("rq_spline_rebuild")(
            _native.DTYPES[y.dtype], rows, event, widths.shape[-1], y, widths, heights, derivatives, grad_y, grad_log_det,
            *outputs, bound, zuko, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("rq_spline_rebuild").rq_spline_rebuild(
            rows, event, widths.shape[-1], y, widths, heights, derivatives, grad_y, grad_log_det, *outputs, bound, zuko
        )
    return outputs


_rebuild = _dispatch.raw_op(
    "rq_spline_rebuild",
    "(Tensor y, Tensor widths, Tensor heights, Tensor derivatives, Tensor grad_y, Tensor grad_log_det, float bound, bool zuko,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda y, *args: (torch.empty_like(y), torch.empty_like(y), *(torch.empty_like(v) for v in args[:3])),
)


def rq_spline_rebuild(
    y: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    bound: float,
    convention: str = "nflows",
    backend: str | None = None,
) -> RebuiltSpline:
    """The input of :func:`fastgen.ops.rq_spline` from its output, and the gradients there, in one pass.

    Args:
        y: [N, ...], floating point: what ``rq_spline(x, widths, heights, derivatives, ...)`` gave. float64 is served by the
            reference.
        widths, heights, derivatives: as in the forward pass.
        grad_y: gradient of the loss in y.
        grad_log_det: gradient of the loss in the log-determinants, [N].
        bound, convention: as in the forward pass.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(x, grad_x, grad_widths, grad_heights, grad_derivatives)`` in the shapes of ``y`` and of the parameters, broadcast to
        it; constants for autograd.

    Raises:
        TypeError, ValueError: as :func:`fastgen.ops.rq_spline`.

    >>> y, knots, slopes = torch.zeros(8, 2), torch.zeros(8, 2, 5), torch.zeros(8, 2, 4)
    >>> x, grad_x, *_ = rq_spline_rebuild(y, knots, knots, slopes, y, torch.zeros(8), bound=3.0)
    >>> x.shape, grad_x.abs().sum()
    (torch.Size([8, 2]), tensor(0.))
    """
    y, widths, heights, derivatives = prepare(y, widths, heights, derivatives, bound, convention)
    y, grad_y = _checks.common(y=y, grad_y=grad_y)
    grad_log_det = gradient_of_log_det(grad_log_det, y)
    chosen = _dispatch.choose(SPEC, backend, y)
    if chosen == "reference":
        return rq_spline_rebuild_reference(
            y, widths, heights, derivatives, grad_y, grad_log_det, bound=bound, convention=convention
        )
    values = (v.detach().contiguous() for v in (y, widths, heights, derivatives, grad_y))
    return RebuiltSpline(*_rebuild(*values, grad_log_det, float(bound), convention == "zuko", chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    bins: int = 8,
    convention: str = "nflows",
) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    inputs = get_spec("rq_spline").example_inputs(rows, event, bins=bins, inverse=True, convention=convention, **options)
    inputs.pop("inverse")
    grads = {
        "grad_y": torch.randn(rows, *event, generator=generator).to(device, dtype),
        "grad_log_det": torch.randn(rows, generator=generator).to(device),
    }
    return {"y": inputs.pop("x"), **inputs, **grads}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # y, dy and the parameters -> x, dx and the gradients of the parameters
    everything = sum(inputs[name].nbytes for name in ("y", "grad_y", "widths", "heights", "derivatives"))
    return 2 * everything + inputs["grad_log_det"].nbytes


SPEC = OpSpec(
    name="rq_spline_rebuild",
    function=rq_spline_rebuild,
    reference=rq_spline_rebuild_reference,
    outputs=dict.fromkeys(RebuiltSpline._fields, "conditioned"),
    gradients=(),
    example_inputs=_example_inputs,
    flags={"bins": (8, 1, 2, 3, 4, 5, 10, 16, 32), "convention": CONVENTIONS},
    shapes=((64, (2,)), (512, (32,)), (4096, (32,))),
    bytes_moved=_bytes_moved,
)
