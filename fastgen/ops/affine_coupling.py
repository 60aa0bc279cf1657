"""affine_coupling: scale and shift every element and sum the log-determinant, in one pass.

    y = x * exp(s) + shift,    log_det = sum(s)   over the event, nats

and its inverse y = (x - shift) * exp(-s) with log_det = -sum(s). The log-scale s is one of three functions of ``log_scale``:

    bound None: s = log_scale,    "tanh": s = tanh(log_scale),    "sigmoid": s = log(sigmoid(log_scale + 2))

so that "sigmoid" scales by sigmoid(log_scale + 2), Glow's choice, and "tanh" by a factor within [1/e, e]. Gradients flow to
``x``, ``shift`` and ``log_scale``; with ds = dy * x * exp(s) + dlog_det

    dx = dy * exp(s),    dshift = dy,    dlog_scale = ds * ds/dlog_scale

and for the inverse dx = dy * exp(-s), dshift = -dx, ds = -(dx * (x - shift) + dlog_det). The derivatives 1 - tanh^2 and
1 - sigmoid are formed without their subtraction. Unbounded log-scales beyond about 88 overflow float32. Where a sample holds
a NaN, that sample's outputs are NaN and no other's.

Source: Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP", equations 7 to 9; Kingma and Dhariwal
(2018), "Glow: generative flow with invertible 1x1 convolutions", table 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["Coupled", "affine_coupling", "affine_coupling_reference"]

BOUNDS: dict[str | None, int] = {None: 0, "tanh": 1, "sigmoid": 2}
"""Values of ``bound`` and their codes in the kernels."""


class Coupled(NamedTuple):
    """The transformed elements and the log-determinant of the transformation."""

    y: Tensor
    """Broadcast shape and promoted dtype of the inputs."""
    log_det: Tensor
    """log |det dy/dx| per sample in nats: [N], float32 or wider."""


def bound_code(bound: str | None) -> int:
    if bound not in BOUNDS:
        raise ValueError(f"bound must be None, 'tanh' or 'sigmoid', got {bound!r}")
    return BOUNDS[bound]


def affine_coupling_reference(
    x: Tensor, shift: Tensor, log_scale: Tensor, *, bound: str | None = None, inverse: bool = False
) -> Coupled:
    """:func:`affine_coupling` in plain PyTorch."""
    bound_code(bound)
    x, shift, log_scale = _checks.common(x=x, shift=shift, log_scale=log_scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    s = log_scale.to(wide)
    if bound == "tanh":
        s = torch.tanh(s)
    elif bound == "sigmoid":
        s = functional.logsigmoid(s + 2)
    if inverse:
        s = -s
        y = (x.to(wide) - shift.to(wide)) * torch.exp(s)
    else:
        y = x.to(wide) * torch.exp(s) + shift.to(wide)
    return Coupled(y.to(x.dtype), s.reshape(len(s), math.prod(s.shape[1:])).sum(1))


class _Kernels(NamedTuple):
    """The C++ kernels of one choice of bound and direction."""

    forward: _native.Launch
    backward: _native.Launch
    record: _native.Record


def _kernels(bound: int, inverse: bool) -> _Kernels:
    plan = f"dtype rows event like like like >like >row {bound} {int(inverse)} threads"
    forward = _native.Launch("affine_coupling_fwd", plan)
    # forward, the gradient of shift is that of y, and its value does not enter the others
    shift, grad_shift = ("like", ">like") if inverse else ("null", "null")
    plan = f"dtype rows event like {shift} like like? row >like {grad_shift} >like {bound} threads"
    backward = _native.Launch("affine_coupling_bwd", plan)

    def longer(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.bound, ctx.backend = bound, "cpp"
        return _AffineCoupling.backward(ctx, *grads)[:3]

    takes, gives = ("i0 i1 i2 g0 g1", "o0 o1 o2") if inverse else ("i0 i2 g0 g1", "o0 g0 o1")
    record = _native.Record(forward, forward, backward, takes=takes, gives=gives, returns=2, longer=longer)
    return _Kernels(forward, backward, record)


_cpp = {(bound, inverse): _kernels(bound, inverse) for bound in BOUNDS.values() for inverse in (False, True)}


def _forward(x: Tensor, shift: Tensor, log_scale: Tensor, bound: int, inverse: bool, backend: str) -> tuple[Tensor, ...]:
    if backend == "cpp":
        return _cpp[bound, inverse].forward(x, shift, log_scale)
    y, log_det = torch.empty_like(x), _checks.per_sample(x)
    rows, event = _checks.as_rows(x)
    _dispatch.triton_module("affine_coupling").affine_coupling_fwd(rows, event, x, shift, log_scale, y, log_det, bound, inverse)
    return y, log_det


def _backward(
    x: Tensor,
    shift: Tensor | None,
    log_scale: Tensor,
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    bound: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """The gradients of x, of shift for the inverse alone, and of log_scale."""
    if backend == "cpp":
        given = (x, log_scale) if shift is None else (x, shift, log_scale)
        return _cpp[bound, shift is not None].backward(*given, grad_y, grad_log_det)
    grad_x, grad_log_scale = torch.empty_like(x), torch.empty_like(x)
    grad_shift = None if shift is None else torch.empty_like(x)
    rows, event = _checks.as_rows(x)
    _dispatch.triton_module("affine_coupling").affine_coupling_bwd(
        rows, event, x, shift, log_scale, grad_y, grad_log_det, grad_x, grad_shift, grad_log_scale, bound
    )
    return (grad_x, grad_log_scale) if grad_shift is None else (grad_x, grad_shift, grad_log_scale)


_GRADIENTS = "Tensor? grad_y, Tensor? grad_log_det, int bound, str backend"

_transform = _dispatch.raw_op(
    "affine_coupling",
    "(Tensor x, Tensor shift, Tensor log_scale, int bound, bool inverse, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(x), _checks.per_sample(x)),
)
_differentiate = _dispatch.raw_op(
    "affine_coupling_bwd",
    f"(Tensor x, Tensor log_scale, {_GRADIENTS}) -> (Tensor, Tensor)",
    lambda x, log_scale, *rest: _backward(x, None, log_scale, *rest),
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
_differentiate_inverse = _dispatch.raw_op(
    "affine_coupling_inverse_bwd",
    f"(Tensor x, Tensor shift, Tensor log_scale, {_GRADIENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)),
)


class _AffineCoupling(torch.autograd.Function):
    """Saves the inputs and recomputes the scale; the forward direction needs no shift."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, log_scale: Tensor, bound: int, inverse: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *((shift,) if inverse else ()), log_scale)
        ctx.bound, ctx.backend = bound, backend
        return _transform(x, shift, log_scale, bound, inverse, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_y: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *shift, log_scale = ctx.saved_tensors
        grad_y = grad_y if grad_y is None else grad_y.contiguous()
        grad_log_det = grad_log_det if grad_log_det is None else grad_log_det.contiguous()
        if not shift:
            grad_x, grad_log_scale = _differentiate(x, log_scale, grad_y, grad_log_det, ctx.bound, ctx.backend)
            return grad_x, grad_y, grad_log_scale, None, None, None
        grads = _differentiate_inverse(x, *shift, log_scale, grad_y, grad_log_det, ctx.bound, ctx.backend)
        return *grads, None, None, None


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    *,
    bound: str | None = None,
    inverse: bool = False,
    backend: str | None = None,
) -> Coupled:
    """Scale and shift every element: x * exp(s) + shift, or its inverse, and the log-determinant, in one pass.

    Args:
        x: [N, ...], floating point. float64 is served by the reference.
        shift: broadcast against ``x``.
        log_scale: broadcast against ``x``; what the conditioner puts out.
        bound: None takes ``log_scale`` as the log-scale s, "tanh" takes s = tanh(log_scale), "sigmoid" scales by
            sigmoid(log_scale + 2).
        inverse: compute (x - shift) * exp(-s), which undoes the forward direction.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(y, log_det)``: the elements in the shape and dtype of ``x``, and nats per sample [N] in float32 (float64 for
        float64), negated for the inverse.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device; see :mod:`fastgen.ops._checks`.

    >>> y, log_det = affine_coupling(torch.ones(8, 16), torch.zeros(8, 16), torch.zeros(8, 16))
    >>> y.shape, log_det.shape
    (torch.Size([8, 16]), torch.Size([8]))
    """
    code = bound_code(bound)
    if _dispatch.launch_mode(backend, None) is not None:
        made = _cpp[code, inverse].record.attempt(x, shift, log_scale)
        if made:
            return Coupled._make(made)
    x, shift, log_scale = _checks.common(x=x, shift=shift, log_scale=log_scale)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return affine_coupling_reference(x, shift, log_scale, bound=bound, inverse=inverse)
    x, shift, log_scale = x.contiguous(), shift.contiguous(), log_scale.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or log_scale.requires_grad):
        return Coupled(*_AffineCoupling.apply(x, shift, log_scale, code, inverse, chosen))
    return Coupled(*_transform(x, shift, log_scale, code, inverse, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    bound: str | None = None,
    inverse: bool = False,
) -> dict[str, Any]:
    x, shift, log_scale = ((torch.randn(rows, *event, generator=generator)).to(device, dtype) for _ in range(3))
    return {"x": x, "shift": shift, "log_scale": log_scale, "bound": bound, "inverse": inverse}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x, shift, log_scale -> y; backward: x, log_scale, dy -> dx, dlog_scale, while dshift is dy itself;
    # the inverse reads shift and writes dshift as well
    passes = 4 if mode == "fwd" else 11 if inputs["inverse"] else 9
    return inputs["x"].nbytes * passes + 4 * len(inputs["x"]) * (1 if mode == "fwd" else 2)


SPEC = OpSpec(
    name="affine_coupling",
    function=affine_coupling,
    reference=affine_coupling_reference,
    outputs={"y": "elementwise", "log_det": "reduction"},
    gradients=("x", "shift", "log_scale"),
    example_inputs=_example_inputs,
    flags={"bound": (None, "tanh", "sigmoid"), "inverse": (False, True)},
    shapes=((64, (16,)), (512, (256,)), (4096, (512,))),
    bytes_moved=_bytes_moved,
)
