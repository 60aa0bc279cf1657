"""bias_act: add a bias, apply an activation, scale and clamp, in one pass.

    y = clamp(gain * act(x + b), -clamp, clamp)

with one bias per position along ``dim``. Activations, and the gain that keeps the second moment of their output:

    linear v, 1;  relu max(v, 0), sqrt(2);  lrelu v or alpha * v below 0 (alpha 0.2), sqrt(2);  tanh, 1;  sigmoid, 1;
    elu v or exp(v) - 1 below 0, 1;  selu, 1;  softplus log(1 + exp(v)), 1;  swish v * sigmoid(v), sqrt(2)

Gradients flow to ``x`` and ``b``, and, for penalties on gradients, from the gradients on to ``x``, ``b`` and dy: with v = x + b
and F(v) = gain * act(v) where that is within the clamp, else a constant,

    dx = dy * F'(v),  db = sum(dx);    for g, the gradient of dx:  d(dy) = g * F'(v),  d(x) = g * dy * F''(v)

Source: Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN" (arXiv:1912.04958), appendix B; He et al.
(2015), "Delving deep into rectifiers" (arXiv:1502.01852) for the gains; Ramachandran et al. (2017), arXiv:1710.05941, for
swish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["ACTIVATIONS", "Activation", "bias_act", "bias_act_reference"]


class Activation(NamedTuple):
    """An activation of :func:`bias_act`."""

    code: int
    """In the kernels."""
    gain: float
    """Used where the caller gives none."""
    function: Callable[[Tensor, float], Tensor]
    """Of the biased input and alpha."""


ACTIVATIONS = {
    "linear": Activation(0, 1.0, lambda v, alpha: v),
    "relu": Activation(1, math.sqrt(2), lambda v, alpha: torch.relu(v)),
    "lrelu": Activation(2, math.sqrt(2), functional.leaky_relu),
    "tanh": Activation(3, 1.0, lambda v, alpha: torch.tanh(v)),
    "sigmoid": Activation(4, 1.0, lambda v, alpha: torch.sigmoid(v)),
    "elu": Activation(5, 1.0, lambda v, alpha: functional.elu(v)),
    "selu": Activation(6, 1.0, lambda v, alpha: torch.selu(v)),
    "softplus": Activation(7, 1.0, lambda v, alpha: functional.softplus(v)),
    "swish": Activation(8, math.sqrt(2), lambda v, alpha: functional.silu(v)),
}
"""What ``act`` may be."""


class _Options(NamedTuple):
    act: int
    alpha: float
    gain: float
    clamp: float


def _prepared(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float | None, gain: float | None, clamp: float | None
) -> tuple[int, _Options]:
    """``dim`` counted from the front, and the options with their defaults; an infinite clamp is none."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if alpha is not None and act != "lrelu":
        raise ValueError(f"alpha is the slope of lrelu below 0, act is {act!r}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp must be None or at least 0, got {clamp}")
    rank = x.dim()
    if b is not None:
        if not isinstance(b, Tensor) or not b.is_floating_point():
            raise TypeError(f"b must be None or a floating-point tensor, got {getattr(b, 'dtype', type(b).__name__)}")
        if not -rank <= dim < rank:
            raise ValueError(f"dim must be a dimension of x {tuple(x.shape)}, got {dim}")
        if b.shape != (x.shape[dim],) or b.device != x.device:
            raise ValueError(f"b must have shape [{x.shape[dim]}] on {x.device}, got {list(b.shape)} on {b.device}")
    found = ACTIVATIONS[act]
    return dim % max(rank, 1), _Options(
        found.code,
        0.2 if alpha is None else float(alpha),
        found.gain if gain is None else float(gain),
        math.inf if clamp is None else float(clamp),
    )


def bias_act_reference(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """:func:`bias_act` in plain PyTorch."""
    dim, options = _prepared(x, b, dim, act, alpha, gain, clamp)
    v = x.to(torch.promote_types(x.dtype, torch.float32))
    if b is not None:
        v = v + b.to(v.dtype).reshape([-1 if i == dim else 1 for i in range(x.dim())])
    v = ACTIVATIONS[act].function(v, options.alpha) * options.gain
    if clamp is not None:
        v = v.clamp(-clamp, clamp)
    return v.to(x.dtype)


def _extents(x: Tensor, b: Tensor | None, dim: int) -> tuple[int, int, int]:
    """Memory as [outer, channels, inner] with the bias along channels; ``x`` is dense."""
    if b is None:
        return 1, 1, x.numel()
    channels = x.shape[dim]
    if _checks.is_channels_last(x):
        return x.shape[0] * x.shape[2] * x.shape[3], channels, 1
    return math.prod(x.shape[:dim]), channels, math.prod(x.shape[dim + 1 :])


def _forward(x: Tensor, b: Tensor | None, dim: int, act: int, alpha: float, gain: float, clamp: float, backend: str) -> Tensor:
    y, extents = torch.empty_like(x), _extents(x, b, dim)
    if backend == "cpp":
        _native.kernel("bias_act_fwd")(
            _native.DTYPES[x.dtype], *extents, x, b, y, act, alpha, gain, clamp, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("bias_act").bias_act_fwd(*extents, x, b, y, act, alpha, gain, clamp)
    return y


def _backward(
    x: Tensor,
    b: Tensor | None,
    grad_y: Tensor,
    summed: bool,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_b = _gradients(x, b, summed)
    extents, sums = _extents(x, b, dim), grad_b if summed else None
    if backend == "cpp":
        _native.kernel("bias_act_bwd")(
            _native.DTYPES[x.dtype], *extents, x, b, grad_y, grad_x, sums, act, alpha, gain, clamp, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("bias_act").bias_act_bwd(*extents, x, b, grad_y, grad_x, sums, act, alpha, gain, clamp)
    return grad_x, grad_b


def _backward_of_backward(
    x: Tensor,
    b: Tensor | None,
    grad_y: Tensor,
    along_x: Tensor | None,
    along_b: Tensor | None,
    summed: bool,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out_grad_y, (out_x, out_b) = torch.empty_like(x), _gradients(x, b, summed)
    extents, sums = _extents(x, b, dim), out_b if summed else None
    if backend == "cpp":
        _native.kernel("bias_act_bwd_bwd")(
            _native.DTYPES[x.dtype], *extents, x, b, grad_y, along_x, along_b, out_grad_y, out_x, sums, act, alpha, gain, clamp,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("bias_act").bias_act_bwd_bwd(
            *extents, x, b, grad_y, along_x, along_b, out_grad_y, out_x, sums, act, alpha, gain, clamp
        )
    return out_grad_y, out_x, out_b


def _gradients(x: Tensor, b: Tensor | None, summed: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradients of x and b; the second is empty where nobody asks for it."""
    return torch.empty_like(x), x.new_empty(b.shape[0] if b is not None and summed else 0, dtype=torch.float32)


_OPTIONS = "int dim, int act, float alpha, float gain, float clamp, str backend"

_activate = _dispatch.raw_op(
    "bias_act", f"(Tensor x, Tensor? b, {_OPTIONS}) -> Tensor", _forward, lambda x, *_: torch.empty_like(x)
)
_differentiate = _dispatch.raw_op(
    "bias_act_bwd",
    f"(Tensor x, Tensor? b, Tensor grad_y, bool summed, {_OPTIONS}) -> (Tensor, Tensor)",
    _backward,
    lambda x, b, grad_y, summed, *_: _gradients(x, b, summed),
)
_differentiate_again = _dispatch.raw_op(
    "bias_act_bwd_bwd",
    f"(Tensor x, Tensor? b, Tensor grad_y, Tensor? along_x, Tensor? along_b, bool summed, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward_of_backward,
    lambda x, b, grad_y, along_x, along_b, summed, *_: (torch.empty_like(x), *_gradients(x, b, summed)),
)


class _BiasAct(torch.autograd.Function):
    """Saves the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, dim: int, options: _Options, backend: str) -> Tensor:
        ctx.save_for_backward(x, b)
        ctx.dim, ctx.options, ctx.backend = dim, options, backend
        return _activate(x, b, dim, *options, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, b = ctx.saved_tensors
        grad_y = _checks.dense(grad_y, _checks.is_channels_last(x))
        summed = b is not None and ctx.needs_input_grad[1]
        # torch.compile has no second derivatives
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _BiasActGradient.apply if again else _first_gradient
        grad_x, grad_b = run(x, b, grad_y, summed, ctx.dim, ctx.options, ctx.backend)
        return grad_x, grad_b if summed else None, None, None, None


def _first_gradient(
    x: Tensor, b: Tensor | None, grad_y: Tensor, summed: bool, dim: int, options: _Options, backend: str
) -> tuple[Tensor, Tensor]:
    return _differentiate(x, b, grad_y, summed, dim, *options, backend)


class _BiasActGradient(torch.autograd.Function):
    """The gradient as a function of its own, which has a gradient too. Saves the inputs and dy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, grad_y: Tensor, summed: bool, dim: int, options: _Options, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, grad_y)
        ctx.dim, ctx.options, ctx.backend = dim, options, backend
        return _first_gradient(x, b, grad_y, summed, dim, options, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, along_x: Tensor | None, along_b: Tensor | None) -> tuple[Tensor | None, ...]:
        x, b, grad_y = ctx.saved_tensors
        along_x = along_x if along_x is None else _checks.dense(along_x, _checks.is_channels_last(x))
        along_b = None if along_b is None or not along_b.numel() else along_b.contiguous()
        summed = b is not None and ctx.needs_input_grad[1]
        out_grad_y, out_x, out_b = _differentiate_again(
            x, b, grad_y, along_x, along_b, summed, ctx.dim, *ctx.options, ctx.backend
        )
        return out_x, out_b if summed else None, out_grad_y, None, None, None, None


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """clamp(gain * act(x + b), -clamp, clamp) in one pass, with first and second gradients in one pass each.

    Args:
        x: any shape, floating point, contiguous or channels last. float64 is served by the reference.
        b: bias [x.shape[dim]] of any floating-point type; None for no bias.
        dim: the dimension of ``x`` that ``b`` runs along.
        act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus" or "swish".
        alpha: slope of "lrelu" below 0; None takes 0.2.
        gain: factor after the activation; None takes that of the activation, see :data:`ACTIVATIONS`.
        clamp: bound of the absolute value of the result; None for no bound.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        Shape, dtype and memory format of ``x``. Twice differentiable.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, device or value.

    >>> bias_act(torch.randn(8, 64, 16, 16), torch.zeros(64), act="lrelu", clamp=256).shape
    torch.Size([8, 64, 16, 16])
    """
    dim, options = _prepared(x, b, dim, act, alpha, gain, clamp)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return bias_act_reference(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)
    x = _checks.dense(x, _checks.is_channels_last(x) and (b is None or dim == 1))
    if b is not None:
        b = b.to(torch.float32).contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad)):
        return _BiasAct.apply(x, b, dim, options, chosen)
    return _activate(x, b, dim, *options, chosen)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    act: str = "lrelu",
    biased: bool = True,
    clamp: float | None = None,
    dim: int = 1,
    channels_last: bool = False,
) -> dict[str, Any]:
    x = (2 * torch.randn(rows, *event, generator=generator)).to(device, dtype)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    b = torch.randn(x.shape[dim], generator=generator).to(device, dtype) if biased else None
    return {"x": x, "b": b, "dim": dim, "act": act, "clamp": clamp}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x -> y; backward: x, dy -> dx
    return inputs["x"].nbytes * (2 if mode == "fwd" else 5)


SPEC = OpSpec(
    name="bias_act",
    function=bias_act,
    reference=bias_act_reference,
    outputs={"y": "elementwise"},
    gradients=("x", "b"),
    example_inputs=_example_inputs,
    flags={
        "act": ("lrelu", *(name for name in ACTIVATIONS if name != "lrelu")),
        "biased": (True, False),
        "clamp": (None, 0.75),
        "dim": (1, 0, -1),
        "channels_last": (False, True),
    },
    event_ranks=(1, 3),
    shapes=((64, (512,)), (4, (64, 64, 64)), (8, (128, 128, 128))),
    bytes_moved=_bytes_moved,
    gradient_precision="reduction",
    double_backward=True,
)
