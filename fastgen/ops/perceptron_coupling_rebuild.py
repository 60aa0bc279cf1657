"""perceptron_coupling_rebuild: one step of backpropagation through :mod:`fastgen.ops.perceptron_coupling` from its output,
in one pass.

With y = (a, b * exp(s) + shift), where the network makes shift and s of a, which stands in y as it did in x, the network is
computed once, for the inverse and for the gradients:

    x = (a, (b - shift) * exp(-s)),    dx = (da + network gradient, db * exp(s))

and the gradients in shift and log-scale, which those of the network start from, are those of
:mod:`fastgen.ops.affine_coupling_rebuild`. Nothing need have been kept, and nothing lies in memory between the steps.

Source: Gomez, Ren, Urtasun and Grosse (2017), "The reversible residual network: backpropagation without storing activations".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._rebuild import gradient_of_log_det, rebuilt
from fastgen.ops._spec import OpSpec, get_spec
from fastgen.ops.affine_coupling import Coupled, bound_code
from fastgen.ops.perceptron import Parameters, as_tensors, gradients_like, join, widths_of
from fastgen.ops.perceptron_coupling import Sizes, check_coupling, perceptron_coupling_reference, stays_and_moves

__all__ = ["perceptron_coupling_rebuild", "perceptron_coupling_rebuild_reference"]


def perceptron_coupling_rebuild_reference(
    y: Tensor,
    parameters: Parameters,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    hidden: Sequence[int],
    sizes: Sizes,
    flip: bool = False,
    added: Tensor | None = None,
    limit: float | None = None,
    bound: str | None = None,
) -> tuple[Tensor, ...]:
    """:func:`perceptron_coupling_rebuild` in plain PyTorch."""
    check_coupling("y", y, parameters, hidden, sizes, flip, added, limit)

    def transform(x: Tensor, flat: Tensor, *rest: Tensor, inverse: bool) -> Coupled:
        options: dict[str, Any] = {"hidden": hidden, "sizes": sizes, "flip": flip, "limit": limit, "bound": bound}
        return perceptron_coupling_reference(x, flat, added=rest[0] if rest else None, inverse=inverse, **options)

    y, grad_y = _checks.common(y=y, grad_y=grad_y)
    leaves = [join(as_tensors(parameters)), *(() if added is None else (added,))]
    return rebuilt(transform, y, leaves, (grad_y, gradient_of_log_det(grad_log_det, y)))


def _results_like(x: Tensor, parameters: Tensor, added: Tensor | None, hidden: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(x), *gradients_like(x, parameters, hidden, (True, True, added is not None))]


def _run(
    y: Tensor,
    parameters: Tensor,
    added: Tensor | None,
    grad_y: Tensor,
    grad_log_det: Tensor,
    hidden: Sequence[int],
    sizes: Sequence[int],
    flip: bool,
    limit: float,
    bound: int,
) -> list[Tensor]:
    results = x, grad_x, grad_parameters, grad_added = _results_like(y, parameters, added, hidden)
    stays, moves = stays_and_moves(sizes, flip)
    _native.kernel("perceptron_coupling_rebuild")(
        y.shape[0], len(hidden), widths_of(stays, *hidden, moves, moves), flip, y, added, parameters, limit, grad_y,
        grad_log_det, x, grad_x, None if added is None else grad_added, grad_parameters, bound, torch.get_num_threads(),
    )  # fmt: skip
    return results


_rebuild = _dispatch.raw_op(
    "perceptron_coupling_rebuild",
    "(Tensor y, Tensor parameters, Tensor? added, Tensor grad_y, Tensor grad_log_det, int[] hidden, int[] sizes, bool flip,"
    " float limit, int bound) -> Tensor[]",
    _run,
    lambda y, parameters, added, grad_y, grad_log_det, hidden, *_: _results_like(y, parameters, added, hidden),
)


def perceptron_coupling_rebuild(
    y: Tensor,
    parameters: Parameters,
    grad_y: Tensor,
    grad_log_det: Tensor,
    *,
    hidden: Sequence[int],
    sizes: Sizes,
    flip: bool = False,
    added: Tensor | None = None,
    limit: float | None = None,
    bound: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The input of :func:`fastgen.ops.perceptron_coupling` from its output, and the gradients there, in one pass.

    Args:
        y: [N, D], floating point: what ``perceptron_coupling(x, parameters, ...)`` gave, not its inverse.
        parameters, hidden, sizes, flip, added, limit, bound: as in the forward pass.
        grad_y: gradient of the loss in y.
        grad_log_det: gradient of the loss in the log-determinants, [N].
        backend: None, "reference" or "cpp".

    Returns:
        ``(x, grad_x, grad_parameters)``, and ``grad_added`` where there is ``added``; the gradients in all parameters are
        flattened in one vector, in the order of ``parameters``. Constants for autograd.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device.

    >>> y, parameters = torch.ones(8, 4), torch.zeros(25)
    >>> x, grad_x, grad = perceptron_coupling_rebuild(y, parameters, y, torch.ones(8), hidden=(3,), sizes=(2, 2))
    >>> x.shape, grad_x.shape, grad.shape
    (torch.Size([8, 4]), torch.Size([8, 4]), torch.Size([25]))
    """
    code = bound_code(bound)
    check_coupling("y", y, parameters, hidden, sizes, flip, added, limit)
    y, grad_y = _checks.common(y=y, grad_y=grad_y)
    grad_log_det = gradient_of_log_det(grad_log_det, y)
    if _dispatch.choose(SPEC, backend, y, inputs={"hidden": hidden}) == "reference":
        return perceptron_coupling_rebuild_reference(
            y, parameters, grad_y, grad_log_det, hidden=hidden, sizes=sizes, flip=flip, added=added, limit=limit, bound=bound
        )
    joined = join([t.detach() for t in as_tensors(parameters)]).contiguous()
    added = None if added is None else added.detach().contiguous()
    values = y.detach().contiguous(), joined, added, grad_y.detach().contiguous(), grad_log_det
    results = _rebuild(*values, tuple(hidden), tuple(sizes), flip, math.inf if limit is None else float(limit), code)
    return tuple(results if added is not None else results[:-1])


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    **flags: Any,
) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    inputs = get_spec("perceptron_coupling").example_inputs(rows, event, **options, **flags)
    for name in ("inverse", "keep"):
        inputs.pop(name)
    y = inputs.pop("x")
    grads = {
        "grad_y": torch.randn(y.shape, generator=generator).to(device, dtype),
        "grad_log_det": torch.randn(rows, generator=generator).to(device),
    }
    return {"y": y, **inputs, **grads}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # y, dy, dlog_det -> x, dx; the parameters and their gradients
    return 4 * inputs["y"].nbytes + inputs["grad_log_det"].nbytes + 2 * inputs["parameters"].nbytes


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # the network once, and its gradients
    operations = get_spec("perceptron_coupling").operations
    assert operations is not None
    return operations({**inputs, "x": inputs["y"]}, "fwdbwd")


_COUPLING = get_spec("perceptron_coupling")
SPEC = OpSpec(
    name="perceptron_coupling_rebuild",
    function=perceptron_coupling_rebuild,
    reference=perceptron_coupling_rebuild_reference,
    outputs=dict.fromkeys(("x", "grad_x", "grad_parameters"), "reduction"),
    extra_outputs={"grad_added": "reduction"},
    gradients=(),
    example_inputs=_example_inputs,
    flags={name: values for name, values in _COUPLING.flags.items() if name not in ("inverse", "keep")},
    event_ranks=_COUPLING.event_ranks,
    sizes=_COUPLING.sizes,
    backends=_COUPLING.backends,
    shapes=_COUPLING.shapes,
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=_COUPLING.dtypes,
    samplewise=False,
    supports=_COUPLING.supports,
)
