"""lu_linear: multiply the channels of every pixel by an invertible matrix given as its LU factors; Glow's 1x1 convolution.

    W = P L (U + diag(d)),  d = sign * exp(log_diagonal),    y = W x,    log_det = pixels * sum(log_diagonal)   nats

with L unit lower triangular (the part of ``lower`` below its diagonal), U strictly upper triangular (the part of ``upper``
above) and P the rows of the identity in the order ``permutation``: row i of W is row permutation[i] of L (U + diag(d)). The
inverse is y = W^-1 x with log_det = -pixels * sum(log_diagonal). Gradients flow to ``x``, ``lower``, ``upper`` and
``log_diagonal``: with G = sum dy x^T over samples and pixels, and A = P^T G,

    dx = W^T dy,    dlower = A (U + diag(d))^T below the diagonal,    dupper = L^T A above it,
    dlog_diagonal = diag(L^T A) * d + pixels * sum(dlog_det)

and for the inverse dx = W^-T dy, while G = -W^-T (sum dy x^T) W^-T. The parts of ``lower`` and ``upper`` outside their
triangles are not read, and their gradients are 0.

W, or its inverse by substitution, is formed in float64 once per call: for a C x C matrix that costs C^3 operations beside
C^2 for each of many pixels.

Source: Kingma and Dhariwal (2018), "Glow: generative flow with invertible 1x1 convolutions", section 3.2, equations 10, 11.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec
from fastgen.ops.affine_coupling import Coupled

__all__ = ["lu_linear", "lu_linear_reference"]


def prepared(
    x: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor, permutation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors in float32 (float64 for float64), checked against the channels of ``x``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, ...], got {list(x.shape)}")
    channels, wide = x.shape[1], torch.float64 if x.dtype is torch.float64 else torch.float32
    factors = []
    for name, value, rank in (("lower", lower, 2), ("upper", upper, 2), ("log_diagonal", log_diagonal, 1), ("sign", sign, 1)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.dim() != rank or value.shape[0] != channels or value.shape[-1] != channels or value.device != x.device:
            raise ValueError(
                f"{name} must have shape {[channels] * rank} on {x.device}, got {list(value.shape)} on {value.device}"
            )
        factors.append(value.to(wide).contiguous())
    if not isinstance(permutation, Tensor) or permutation.dtype is not torch.int64:
        what = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permutation must be an int64 tensor, got {what}")
    if permutation.dim() != 1 or permutation.shape[0] != channels or permutation.device != x.device:
        raise ValueError(
            f"permutation must have shape [{channels}] on {x.device}, got {list(permutation.shape)} on {permutation.device}"
        )
    lower, upper, log_diagonal, sign = factors
    return lower, upper, log_diagonal, sign


def check_permutation(permutation: Tensor) -> None:
    """At run time and on the CPU alone: elsewhere it would wait for the device, and indexing there checks by itself."""
    if sorted(permutation.tolist()) != list(range(len(permutation))):
        raise ValueError(f"permutation must hold each of 0 ... {len(permutation) - 1} once, got {permutation.tolist()}")


def lu_linear_reference(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    *,
    inverse: bool = False,
) -> Coupled:
    """:func:`lu_linear` in plain PyTorch."""
    lower, upper, log_diagonal, sign = prepared(x, lower, upper, log_diagonal, sign, permutation)
    if x.is_cpu and not torch.compiler.is_compiling():
        check_permutation(permutation)
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    left = torch.tril(lower, -1) + torch.eye(channels, dtype=lower.dtype, device=x.device)
    right = torch.triu(upper, 1) + torch.diag(sign * torch.exp(log_diagonal))
    columns = x.to(lower.dtype).reshape(x.shape[0], channels, pixels)
    if inverse:
        z = columns[:, torch.argsort(permutation)]
        h = torch.linalg.solve_triangular(left, z, upper=False, unitriangular=True)
        y = torch.linalg.solve_triangular(right, h, upper=True)
    else:
        y = (left @ (right @ columns))[:, permutation]
    log_det = pixels * log_diagonal.sum()
    return Coupled(y.reshape(x.shape).to(x.dtype), (-log_det if inverse else log_det).expand(x.shape[0]).clone())


def _forward(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y, log_det = torch.empty_like(x), _checks.per_sample(x)
    samples, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if backend == "cpp":
        check_permutation(permutation)
        _native.kernel("lu_linear_fwd")(
            _native.DTYPES[x.dtype], samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, y, log_det,
            inverse, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("lu_linear").lu_linear_fwd(
            samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, y, log_det, inverse
        )
    return y, log_det


def _backward(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor | None,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = torch.empty_like(x), torch.empty_like(lower), torch.empty_like(upper), torch.empty_like(log_diagonal)
    samples, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if backend == "cpp":
        _native.kernel("lu_linear_bwd")(
            _native.DTYPES[x.dtype], samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, grad_y,
            grad_log_det, *grads, inverse, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("lu_linear").lu_linear_bwd(
            samples, channels, pixels, x, lower, upper, log_diagonal, sign, permutation, grad_y, grad_log_det, *grads, inverse
        )
    return grads


_ARGUMENTS = "Tensor x, Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation"

_transform = _dispatch.raw_op(
    "lu_linear",
    f"({_ARGUMENTS}, bool inverse, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(x), _checks.per_sample(x)),
)
_differentiate = _dispatch.raw_op(
    "lu_linear_bwd",
    f"({_ARGUMENTS}, Tensor grad_y, Tensor? grad_log_det, bool inverse, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda x, lower, upper, log_diagonal, *_: tuple(torch.empty_like(v) for v in (x, lower, upper, log_diagonal)),
)


class _LuLinear(torch.autograd.Function):
    """Saves the inputs and forms the matrix again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lower: Tensor,
        upper: Tensor,
        log_diagonal: Tensor,
        sign: Tensor,
        permutation: Tensor,
        inverse: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, lower, upper, log_diagonal, sign, permutation)
        ctx.inverse, ctx.backend = inverse, backend
        return _transform(x, lower, upper, log_diagonal, sign, permutation, inverse, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_y: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad_y = torch.zeros_like(saved[0]) if grad_y is None else grad_y.contiguous()
        grad_log_det = grad_log_det if grad_log_det is None else grad_log_det.contiguous()
        return *_differentiate(*saved, grad_y, grad_log_det, ctx.inverse, ctx.backend), None, None, None, None


def lu_linear(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    *,
    inverse: bool = False,
    backend: str | None = None,
) -> Coupled:
    """Multiply the channels of every pixel by W = P L (U + diag(sign * exp(log_diagonal))), or by its inverse.

    Args:
        x: [N, C, ...], floating point: vectors [N, C], images [N, C, H, W]. float64 is served by the reference.
        lower: [C, C]; read below the diagonal alone, L has ones there.
        upper: [C, C]; read above the diagonal alone.
        log_diagonal: [C], logarithm of the magnitude of U's diagonal.
        sign: [C], -1 or 1; a constant for autograd.
        permutation: [C], int64: row i of W is row permutation[i] of L U.
        inverse: multiply by the inverse matrix.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(y, log_det)``: shape and dtype of ``x``, and log |det dy/dx| per sample [N] in nats, float32 (float64 for float64):
        the number of pixels times sum(log_diagonal), negated for the inverse.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for wrong shapes or devices, and on the CPU for indices that are no permutation.

    >>> eye, zero, one = torch.zeros(3, 3), torch.zeros(3), torch.ones(3)
    >>> y, log_det = lu_linear(torch.ones(8, 3, 4, 4), eye, eye, zero, one, torch.tensor([2, 0, 1]))
    >>> y.shape, log_det.shape
    (torch.Size([8, 3, 4, 4]), torch.Size([8]))
    """
    factors = prepared(x, lower, upper, log_diagonal, sign, permutation)
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        return lu_linear_reference(x, *factors, permutation, inverse=inverse)
    x, permutation = x.contiguous(), permutation.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for f in factors)):
        return Coupled(*_LuLinear.apply(x, *factors, permutation, inverse, chosen))
    return Coupled(*_transform(x, *factors, permutation, inverse, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    channels: int = 3,
    inverse: bool = False,
) -> dict[str, Any]:
    # an event of fewer than two dimensions counts the pixels of each channel
    shape = event if len(event) > 1 else (channels, *event)
    size = shape[0]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    scale = 0.5 / math.sqrt(max(size, 1))
    return {
        "x": draw(rows, *shape).to(dtype),
        "lower": scale * draw(size, size),
        "upper": scale * draw(size, size),
        "log_diagonal": 0.3 * draw(size),
        "sign": torch.where(draw(size) < 0, -1.0, 1.0),
        "permutation": torch.randperm(size, generator=generator).to(device),
        "inverse": inverse,
    }


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x -> y; backward: x, dy -> dx; the factors and their gradients once
    factors = sum(inputs[name].nbytes for name in ("lower", "upper", "log_diagonal"))
    return inputs["x"].nbytes * (2 if mode == "fwd" else 5) + factors * (1 if mode == "fwd" else 3)


SPEC = OpSpec(
    name="lu_linear",
    function=lu_linear,
    reference=lu_linear_reference,
    outputs={"y": "elementwise", "log_det": "reduction"},
    gradients=("x", "lower", "upper", "log_diagonal"),
    example_inputs=_example_inputs,
    flags={"channels": (3, 1, 12, 21), "inverse": (False, True)},
    shapes=((16, (12, 32, 32)), (16, (48, 16, 16)), (16, (96, 8, 8))),
    bytes_moved=_bytes_moved,
    gradient_precision="reduction",
    samplewise=False,
)
