"""perceptron_coupling: an affine coupling whose conditioner is a fully connected network, in one call each way.

With x = (a, b), the part that stays and the one that moves, and the network of :mod:`fastgen.ops.perceptron` with two outputs,

    (shift, log_scale) = network(a),    y = (a, b * exp(s) + shift),    log_det = sum(s)

or its inverse, with s a function of ``log_scale`` as :mod:`fastgen.ops.affine_coupling` has it; the gradients are those of the
two ops. A tile of samples goes through all of it while it lies in the cache: x is read once and y written once, and neither
the parts nor what the network puts out are ever tensors. For large batches nothing is kept for the backward pass but the
inputs. Sums are in a fixed order: nothing depends on the number of threads. Second derivatives are those of the reference.

float32 on CPUs has kernels. Elsewhere the reference serves.

Source: Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP", equations 7 to 9; the tiles are those of
Müller et al. (2021), "Real-time neural radiance caching for path tracing" (arXiv:2106.12372), section 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec, get_spec
from fastgen.ops.affine_coupling import BOUNDS, Coupled, affine_coupling_reference, bound_code
from fastgen.ops.perceptron import (
    Parameters,
    as_tensors,
    check_network,
    differentiable_gradients,
    gradients_like,
    gradients_of_each,
    join,
    keeps_hidden,
    kept_columns,
    kept_like,
    perceptron_reference,
    supports_network,
    widths_of,
)

__all__ = ["perceptron_coupling", "perceptron_coupling_reference"]

Sizes = tuple[int, int]
"""Columns of the first and of the second part of x."""


def stays_and_moves(sizes: Sequence[int], flip: bool) -> tuple[int, int]:
    """The sizes of the part that stays and of the one that moves."""
    first, second = sizes
    return (second, first) if flip else (first, second)


def check_coupling(
    name: str,
    x: Tensor,
    parameters: Parameters,
    hidden: Sequence[int],
    sizes: Sizes,
    flip: bool,
    added: Tensor | None,
    limit: float | None,
) -> None:
    """Raise for arguments that do not fit; ``name`` is that of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be the columns of two parts, got {tuple(sizes)}")
    if x.dim() != 2 or x.shape[1] != sum(sizes):
        raise ValueError(f"{name} must have shape [N, {sum(sizes)}] as sizes say, got {list(x.shape)}")
    stays, moves = stays_and_moves(sizes, flip)
    check_network(x, stays, parameters, hidden, (moves, moves), added, limit)


def perceptron_coupling_reference(
    x: Tensor,
    parameters: Parameters,
    *,
    hidden: Sequence[int],
    sizes: Sizes,
    flip: bool = False,
    added: Tensor | None = None,
    limit: float | None = None,
    bound: str | None = None,
    inverse: bool = False,
) -> Coupled:
    """:func:`perceptron_coupling` in plain PyTorch."""
    check_coupling("x", x, parameters, hidden, sizes, flip, added, limit)
    first, second = x.split(list(sizes), 1)
    stays, moves = (second, first) if flip else (first, second)
    outputs = (moves.shape[1],) * 2
    network = perceptron_reference(stays, parameters, hidden=hidden, outputs=outputs, added=added, limit=limit)
    moved, log_det = affine_coupling_reference(moves, *network, bound=bound, inverse=inverse)
    return Coupled(torch.cat((moved, stays) if flip else (stays, moved), 1), log_det)


def _results_like(x: Tensor, hidden: Sequence[int], sizes: Sequence[int], flip: bool, keep: bool) -> list[Tensor]:
    """y, log_det, and the hidden layers and the heads in tiles and panels."""
    columns = kept_columns(*hidden, 2 * stays_and_moves(sizes, flip)[1]) if keep else 0
    return [torch.empty_like(x), _checks.per_sample(x), kept_like(x, columns)]


def _forward(
    x: Tensor,
    parameters: Tensor,
    added: Tensor | None,
    hidden: Sequence[int],
    sizes: Sequence[int],
    flip: bool,
    limit: float,
    keep: bool,
    bound: int,
    inverse: bool,
) -> list[Tensor]:
    results = y, log_det, kept = _results_like(x, hidden, sizes, flip, keep)
    stays, moves = stays_and_moves(sizes, flip)
    _native.kernel("perceptron_coupling_fwd")(
        x.shape[0], len(hidden), widths_of(stays, *hidden, moves, moves), flip, x, added, parameters, limit,
        kept if keep else None, y, log_det, bound, inverse, torch.get_num_threads(),
    )  # fmt: skip
    return results


def _backward(
    x: Tensor,
    parameters: Tensor,
    added: Tensor | None,
    kept: Tensor,
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    hidden: Sequence[int],
    sizes: Sequence[int],
    flip: bool,
    limit: float,
    bound: int,
    inverse: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    found = gradients_like(x, parameters, hidden, wanted)
    grad_x, grad_parameters, grad_added = (g if want else None for g, want in zip(found, wanted, strict=True))
    stays, moves = stays_and_moves(sizes, flip)
    _native.kernel("perceptron_coupling_bwd")(
        x.shape[0], len(hidden), widths_of(stays, *hidden, moves, moves), flip, x, added, parameters, limit,
        kept if kept.numel() else None, grad_y, grad_log_det, grad_x, grad_added, grad_parameters, bound, inverse,
        torch.get_num_threads(),
    )  # fmt: skip
    return found


_apply = _dispatch.raw_op(
    "perceptron_coupling",
    "(Tensor x, Tensor parameters, Tensor? added, int[] hidden, int[] sizes, bool flip, float limit, bool keep, int bound,"
    " bool inverse) -> Tensor[]",
    _forward,
    lambda x, parameters, added, hidden, sizes, flip, limit, keep, bound, inverse: _results_like(x, hidden, sizes, flip, keep),
)
_differentiate = _dispatch.raw_op(
    "perceptron_coupling_bwd",
    "(Tensor x, Tensor parameters, Tensor? added, Tensor kept, Tensor? grad_y, Tensor? grad_log_det, int[] hidden,"
    " int[] sizes, bool flip, float limit, int bound, bool inverse, bool[] wanted) -> Tensor[]",
    _backward,
    lambda x, parameters, added, kept, grad_y, grad_log_det, hidden, *rest: gradients_like(x, parameters, hidden, rest[-1]),
)
_NAMES = {code: bound for bound, code in BOUNDS.items()}


class _PerceptronCoupling(torch.autograd.Function):
    """Saves the inputs, and the hidden layers and the heads where they are to be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        hidden: tuple[int, ...],
        sizes: Sizes,
        flip: bool,
        limit: float,
        keep: bool,
        bound: int,
        inverse: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, log_det, kept = _apply(x, join(parameters), added, hidden, sizes, flip, limit, keep, bound, inverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, added, kept, *parameters)
        ctx.sizes, ctx.limit, ctx.transform = (hidden, sizes, flip), limit, (bound, inverse)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        x, added, kept, *parameters = ctx.saved_tensors
        by_x, by_added, *_ = ctx.needs_input_grad
        by_each = ctx.needs_input_grad[9:]
        # torch.compile has no second derivatives
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            (hidden, sizes, flip), (bound, inverse) = ctx.sizes, ctx.transform
            transform = functools.partial(
                perceptron_coupling_reference, hidden=hidden, sizes=sizes, flip=flip, bound=_NAMES[bound], inverse=inverse,
                limit=None if math.isinf(ctx.limit) else ctx.limit,
            )  # fmt: skip
            wanted = (by_x, by_added, *by_each)
            first, second, *rest = differentiable_gradients(transform, x, added, parameters, (grad_y, grad_log_det), wanted)
            return first, second, *(None,) * 7, *rest
        dense = (g if g is None else g.contiguous() for g in (grad_y, grad_log_det))
        joined, wanted = join(parameters), (by_x, any(by_each), by_added)
        grad_x, grad, grad_added = _differentiate(x, joined, added, kept, *dense, *ctx.sizes, ctx.limit, *ctx.transform, wanted)
        of_each = gradients_of_each(grad, parameters, by_each)
        return grad_x if by_x else None, grad_added if by_added else None, *(None,) * 7, *of_each


def _supports(backend: str, inputs: dict[str, Any]) -> str | None:
    return supports_network(backend, {**inputs, "outputs": (1, 1)})


def perceptron_coupling(
    x: Tensor,
    parameters: Parameters,
    *,
    hidden: Sequence[int],
    sizes: Sizes,
    flip: bool = False,
    added: Tensor | None = None,
    limit: float | None = None,
    bound: str | None = None,
    inverse: bool = False,
    keep: bool | None = None,
    backend: str | None = None,
) -> Coupled:
    """Transform one part of x, element by element, by what a fully connected network makes of the other.

    Args:
        x: [N, D], floating point. float32 on CPUs has kernels, the rest the reference.
        parameters: of the network as :func:`fastgen.ops.perceptron` takes them; its outputs are shift and log-scale, as many of
            each as columns move.
        hidden: widths of the hidden layers, at least one.
        sizes: columns of the first and of the second part of x.
        flip: the second part stays and the first one moves.
        added: [N, hidden[0]], added to what enters the first ReLU.
        limit: what the network reads saturates at -limit and limit; None: it does not.
        bound, inverse: as :func:`fastgen.ops.affine_coupling` has them.
        keep: as :func:`fastgen.ops.perceptron` has it.
        backend: None, "reference" or "cpp".

    Returns:
        ``(y, log_det)``: y in the shape of ``x``, and nats per sample [N].

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device.

    >>> layers = [torch.nn.Linear(2, 8), torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)]
    >>> parameters = [(layer.weight, layer.bias) for layer in layers]
    >>> y, log_det = perceptron_coupling(torch.randn(6, 5), parameters, hidden=(8,), sizes=(2, 3))
    >>> y.shape, log_det.shape
    (torch.Size([6, 5]), torch.Size([6]))
    """
    code = bound_code(bound)
    check_coupling("x", x, parameters, hidden, sizes, flip, added, limit)
    if _dispatch.choose(SPEC, backend, x, inputs={"hidden": hidden}) == "reference":
        return perceptron_coupling_reference(
            x, parameters, hidden=hidden, sizes=sizes, flip=flip, added=added, limit=limit, bound=bound, inverse=inverse
        )
    x, added = x.contiguous(), added if added is None else added.contiguous()
    tensors = tuple(t.contiguous() for t in as_tensors(parameters))
    first, most = (tuple(hidden), tuple(sizes), flip), math.inf if limit is None else float(limit)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, added, *tensors)):
        keep = keeps_hidden(x, hidden) if keep is None else keep
        return Coupled(*_PerceptronCoupling.apply(x, added, *first, most, keep, code, inverse, *tensors))
    return Coupled(*_apply(x, join(tensors), added, *first, most, False, code, inverse)[:2])


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    hidden: tuple[int, ...] = (33, 8),
    flip: bool = False,
    added: bool = False,
    limit: float | None = 1.125,
    bound: str | None = "tanh",
    inverse: bool = False,
    keep: bool | None = None,
) -> dict[str, Any]:
    sizes = event[0] // 2, event[0] - event[0] // 2
    stays, moves = stays_and_moves(sizes, flip)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator, "keep": keep}
    example_of = get_spec("perceptron").example_inputs
    inputs = example_of(rows, (stays,), hidden=hidden, outputs=(moves, moves), added=added, limit=limit, **options)
    inputs.pop("outputs")
    stay, move = inputs["x"], torch.randn(rows, moves, generator=generator).to(device, dtype)
    inputs["x"] = torch.cat((move, stay) if flip else (stay, move), 1)
    return {**inputs, "sizes": sizes, "flip": flip, "bound": bound, "inverse": inverse}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x, parameters -> y, log_det; backward: x, parameters, dy, dlog_det -> dx, dparameters
    passes = 1 if mode == "fwd" else 3
    return (2 * inputs["x"].nbytes + 4 * len(inputs["x"]) + inputs["parameters"].nbytes) * passes


def _operations(inputs: dict[str, Any], mode: str) -> int:
    stays, moves = stays_and_moves(inputs["sizes"], inputs["flip"])
    operations = get_spec("perceptron").operations
    assert operations is not None
    return operations({**inputs, "x": inputs["x"][:, :stays], "outputs": (moves, moves)}, mode)


SPEC = OpSpec(
    name="perceptron_coupling",
    function=perceptron_coupling,
    reference=perceptron_coupling_reference,
    outputs={"y": "reduction", "log_det": "reduction"},
    gradients=("x", "parameters", "added"),
    example_inputs=_example_inputs,
    flags={
        "hidden": ((33, 8), (130,), (64, 32), (4, 3, 2), (128, 128), (64, 64)),
        "flip": (False, True),
        "added": (False, True),
        "limit": (1.125, None),
        "bound": ("tanh", None, "sigmoid"),
        "inverse": (False, True),
        "keep": (None, False),
    },
    event_ranks=(1,),
    sizes=(2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 300),
    backends=("cpp",),
    shapes=((64, (32,)), (4096, (64,)), (16384, (64,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    dtypes=(torch.float32,),
    gradient_precision="reduction",
    double_backward=True,
    supports=_supports,
)
