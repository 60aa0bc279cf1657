"""denoise: one step of a sampler, for every sampler that is linear once the estimate of the data is known.

    m      = model_out,  or  u + g (c - u)                    guidance: model_out holds u, then c
    x0     = clamp(p x + q m)                                 the estimate of the data
    x_next = A x + B x0 + S sigma z + sum_h C_h history_h     z ~ N(0, I) drawn at the key

with one row (p, q, A, B, S, C_1 .. C_H) per sample, or one for all. sigma is 1, or exp(log_variance / 2) where the network
gives the variance. A row with S = 0 draws nothing. With x = alpha x_0 + sigma eps, a prediction of the noise has
(p, q) = (1 / alpha, -sigma / alpha), of the velocity (alpha, -sigma), of the data (0, 1). For example, from t to s:

    DDPM                (A, B, S) of the posterior q(x_s | x_t, x_0)
    DDIM                A = sigma_s / sigma_t,  B = alpha_s - alpha_t A,  S = 0
    DPM-Solver++ (2M)   A = sigma_s / sigma_t,  B = -alpha_s (e^-h - 1) (1 + r),  S = 0,  C_1 = alpha_s (e^-h - 1) r
                        for h = lambda_s - lambda_t, r = h / (2 h_before) and history = the estimate of the step before

Gradients flow to ``x``, ``model_out``, ``history`` and ``log_variance``; coefficients, guidance, bounds and noise are
constants. With d = dx0 + B dx_next where p x + q m lies within the clamp, 0 elsewhere:

    dx = A dx_next + p d,    dm = q d  (du = (1 - g) dm, dc = g dm),    dhistory_h = C_h dx_next,
    dlog_variance = S sigma z dx_next / 2

Any finite values are fine. Where a sample holds a NaN, that sample's outputs are NaN and no other's.

Sources: Ho et al. (2020), "Denoising diffusion probabilistic models", algorithm 2; Song et al. (2021), "Denoising diffusion
implicit models", eq. 12; Lu et al. (2022), "DPM-Solver++", algorithm 2; Ho and Salimans (2022), "Classifier-free diffusion
guidance"; Nichol and Dhariwal (2021), "Improved denoising diffusion probabilistic models", eq. 15.
"""

from __future__ import annotations

import math as _math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import normals
from fastgen.ops._spec import OpSpec
from fastgen.random import key as make_key

__all__ = ["Denoised", "denoise", "denoise_reference"]


class Denoised(NamedTuple):
    """The next state of the sampler and the estimate of the data it was made from."""

    x_next: Tensor
    """Shape and dtype of ``x``."""
    x0: Tensor | None
    """clamp(p x + q m), likewise; None where it was not asked for."""


_UNLIMITED = -_math.inf, _math.inf


class _Inputs(NamedTuple):
    """The checked arguments, in the order of the raw operators."""

    x: Tensor
    model_out: Tensor
    coefficients: Tensor
    key: Tensor | None
    noise: Tensor | None
    history: Tensor | None
    guidance: Tensor | None
    scale: float
    low: float
    high: float
    log_variance: Tensor | None
    bounds: Tensor | None


def _rows(x: Tensor) -> Tensor:
    """``x``, if each of its samples is contiguous: half the channels of a larger tensor are read in place. Else a copy."""
    if x.is_contiguous() or (x.dim() > 1 and len(x) and x[0].is_contiguous()):
        return x
    return x.contiguous()


def _state(value: Tensor, name: str, shape: torch.Size, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != shape or value.device != x.device:
        raise ValueError(f"{name} must have shape {tuple(shape)} on {x.device}, got {tuple(value.shape)} on {value.device}")
    return value


def _limits(clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if clamp is None:
        return _UNLIMITED
    low, high = (-clamp, clamp) if isinstance(clamp, (int, float)) else clamp
    if not low <= high:
        raise ValueError(f"clamp must be a positive number or (low, high), got {clamp!r}")
    return float(low), float(high)


def _prepare(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
    guidance: float | Tensor | None,
    clamp: float | tuple[float, float] | None,
    log_variance: Tensor | tuple[Tensor, Tensor] | None,
) -> _Inputs:
    (x,) = _checks.common(x=x)
    samples, scale, weights = x.shape[0], 1.0, None
    if guidance is None:
        model_out = _state(model_out, "model_out", x.shape, x)
    else:
        model_out = _state(model_out, "model_out with guidance", torch.Size((2 * samples, *x.shape[1:])), x)
        if isinstance(guidance, Tensor):
            if guidance.shape != (samples,) and guidance.dim():
                raise ValueError(f"guidance must be a number or have shape [{samples}], got {list(guidance.shape)}")
            weights = _checks.coefficient_rows(guidance.expand(samples), samples, x, "guidance")
        else:
            scale = float(guidance)
    if history is not None:
        if not isinstance(history, Tensor) or history.dim() == 0:
            raise TypeError(f"history must be a tensor [H, {', '.join(map(str, x.shape))}], got {type(history).__name__}")
        history = _state(history, "history", torch.Size((history.shape[0], *x.shape)), x).to(x.dtype)
    coefficients = _checks.coefficient_rows(coefficients, 5 + (0 if history is None else history.shape[0]), x)
    bounds = None
    if log_variance is not None:
        if isinstance(log_variance, (tuple, list)):
            log_variance, bounds = log_variance
            bounds = _checks.coefficient_rows(bounds, 2, x, "bounds of log_variance")
        log_variance = _state(log_variance, "log_variance", x.shape, x)
    # the network's output may be narrower than a float32 state, and is then read as it is
    narrow = x.dtype is torch.float32 and model_out.dtype in SPEC.dtypes
    dtype = model_out.dtype if narrow and (log_variance is None or log_variance.dtype is model_out.dtype) else x.dtype
    if noise is None:
        key = _checks.prepare_key(key, samples, x.device)
    elif key is not None:
        raise ValueError("give key or noise, not both")
    else:
        noise = _checks.noise_like(noise, x)
    low, high = _limits(clamp)
    return _Inputs(
        x.contiguous(),
        _rows(model_out if model_out.dtype is dtype else model_out.to(dtype)),
        coefficients,
        key,
        noise,
        None if history is None else history.contiguous(),
        weights,
        scale,
        low,
        high,
        None if log_variance is None else _rows(log_variance.to(dtype)),
        bounds,
    )


def _reference(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    dtype = inputs.x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    ones = [1] * (inputs.x.dim() - 1)
    p, q, A, B, S, *C = inputs.coefficients.reshape(-1, inputs.coefficients.shape[-1], *ones).unbind(1)
    x, m = inputs.x.to(wide), inputs.model_out.to(wide)
    if m.shape[0] != x.shape[0]:
        plain, conditional = m.chunk(2)
        g = inputs.scale if inputs.guidance is None else inputs.guidance.reshape(-1, *ones)
        m = plain + g * (conditional - plain)
    x0 = p * x + q * m
    if inputs.low > -_math.inf or inputs.high < _math.inf:
        x0 = x0.clamp(inputs.low, inputs.high)
    z = normals(tuple(x.shape), inputs.key) if inputs.noise is None and inputs.key is not None else inputs.noise
    assert z is not None
    z = S * z.to(wide)
    if inputs.log_variance is not None:
        log_variance = inputs.log_variance.to(wide)
        if inputs.bounds is not None:
            low, high = inputs.bounds.reshape(-1, 2, *ones).unbind(1)
            log_variance = low + 0.5 * (log_variance + 1) * (high - low)
        z = torch.exp(0.5 * log_variance) * z
    x_next = A * x + B * x0 + torch.where(S != 0, z, 0)
    if inputs.history is not None:
        for c, before in zip(C, inputs.history.to(wide), strict=True):
            x_next = x_next + c * before
    return x_next.to(dtype), x0.to(dtype)


def denoise_reference(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    guidance: float | Tensor | None = None,
    clamp: float | tuple[float, float] | None = None,
    log_variance: Tensor | tuple[Tensor, Tensor] | None = None,
    return_x0: bool = True,
) -> Denoised:
    """:func:`denoise` in plain PyTorch."""
    inputs = _prepare(x, model_out, coefficients, key, noise, history, guidance, clamp, log_variance)
    x_next, x0 = _reference(inputs)
    return Denoised(x_next, x0 if return_x0 else None)


def _strided(x: Tensor | None, event: int) -> tuple[Tensor | None, int]:
    """The memory that rows of ``event`` elements span, and the distance of two of them."""
    if x is None or x.is_contiguous():
        return x, event
    stride = x.stride(0)
    return x.as_strided(((len(x) - 1) * stride + event,), (1,)), stride


def _row_stride(table: Tensor | None) -> int:
    return 0 if table is None or table.dim() == 1 else table.shape[1]


def _fill(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
    guidance: Tensor | None,
    scale: float,
    low: float,
    high: float,
    log_variance: Tensor | None,
    bounds: Tensor | None,
    fast: bool,
    backend: str,
    x_next: Tensor,
    x0: Tensor | None,
) -> None:
    rows, event = _checks.as_rows(x)
    guided, past = model_out.shape[0] != rows, coefficients.shape[-1] - 5
    memory, model_stride = _strided(model_out, event)
    variance, variance_stride = _strided(log_variance, event)
    if backend == "cpp":
        dtypes = _native.DTYPES
        _native.kernel("denoise_fwd")(
            dtypes[x.dtype], dtypes[model_out.dtype], rows, event, x, memory, model_stride, history, past, coefficients,
            _row_stride(coefficients), key, key.numel() // 4 if key is not None else 0, noise, guided, guidance, scale, low,
            high, variance, variance_stride, bounds, _row_stride(bounds), x_next, x0, fast, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("denoise").denoise_fwd(
            rows, event, x, memory, model_stride, coefficients, key, noise, history, past, guided, guidance, scale, low, high,
            variance, variance_stride, bounds, x_next, x0, fast,
        )  # fmt: skip


_LAUNCHES = {
    (out, x0): _native.Launch(
        "denoise_fwd",
        "dtype dtype rows event like like event history table5 key null 0 null 0 number number "
        f"null 0 null 0 {out} {x0} flag threads",
    )
    for out in (">like", "like")
    for x0 in ("null", ">like", "like")
}
"""The step of a network's output like the state, without guidance, by where x_next and x0 go."""


def _launched(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None,
    history: Tensor | None,
    clamp: float | tuple[float, float] | None,
    out: Tensor | tuple[Tensor, Tensor] | None,
    return_x0: bool,
    fast: bool,
) -> Denoised | None:
    """The step by a launch; None where something is not plain, and nothing has been done."""
    if key is None:
        return None
    low, high = _limits(clamp)
    if out is None:
        launch = _LAUNCHES[">like", ">like" if return_x0 else "null"]
        made = launch.attempt(x, model_out, history, coefficients, key, low, high, fast)
        return Denoised(made[0], made[1] if return_x0 else None) if made else None
    if isinstance(out, Tensor):
        launch = _LAUNCHES["like", ">like" if return_x0 else "null"]
        made = launch.attempt(x, model_out, history, coefficients, key, low, high, out, fast)
        return Denoised(out, made[0] if return_x0 else None) if isinstance(made, tuple) else None
    to, room = out
    if not return_x0:
        return None
    made = _LAUNCHES["like", "like"].attempt(x, model_out, history, coefficients, key, low, high, to, room, fast)
    return Denoised(to, room) if isinstance(made, tuple) else None


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    arguments: list[Any] = [x, *rest, x_next, x0]
    _fill(*arguments)
    return x_next, x0


def _forward_alone(x: Tensor, *rest: Any) -> Tensor:
    x_next = torch.empty_like(x)
    arguments: list[Any] = [x, *rest, x_next, None]
    _fill(*arguments)
    return x_next


def _backward(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | None,
    scale: float,
    low: float,
    high: float,
    log_variance: Tensor | None,
    bounds: Tensor | None,
    grad_next: Tensor | None,
    grad_x0: Tensor | None,
    wanted: list[bool],
    fast: bool,
    backend: str,
) -> list[Tensor]:
    rows, event = _checks.as_rows(x)
    guided, past = model_out.shape[0] != rows, coefficients.shape[-1] - 5
    grads = _gradients(x, model_out, coefficients, wanted)
    left = iter(grads)
    outputs = [next(left) if want else None for want in wanted]
    memory, model_stride = _strided(model_out, event)
    variance, variance_stride = _strided(log_variance, event)
    if backend == "cpp":
        dtypes = _native.DTYPES
        _native.kernel("denoise_bwd")(
            dtypes[x.dtype], dtypes[model_out.dtype], rows, event, x, memory, model_stride, coefficients,
            _row_stride(coefficients), key, key.numel() // 4 if key is not None else 0, noise, past, guided, guidance, scale,
            low, high, variance, variance_stride, bounds, _row_stride(bounds), grad_next, grad_x0, *outputs, fast,
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("denoise").denoise_bwd(
            rows, event, x, memory, model_stride, coefficients, key, noise, past, guided, guidance, scale, low, high, variance,
            variance_stride, bounds, grad_next, grad_x0, *outputs, fast,
        )  # fmt: skip
    return grads


def _gradients(x: Tensor, model_out: Tensor, coefficients: Tensor, wanted: list[bool]) -> list[Tensor]:
    """Room for the wanted ones of the gradients of x, model_out, history and log_variance."""
    shapes = (x.shape, model_out.shape, (coefficients.shape[-1] - 5, *x.shape), x.shape)
    dtypes = (x.dtype, model_out.dtype, x.dtype, model_out.dtype)
    return [x.new_empty(shape, dtype=dtype) for want, shape, dtype in zip(wanted, shapes, dtypes, strict=True) if want]


_SHARED = "float scale, float low, float high, Tensor? log_variance, Tensor? bounds"
_ARGUMENTS = (
    "Tensor x, Tensor model_out, Tensor coefficients, Tensor? key, Tensor? noise, Tensor? history, Tensor? guidance, "
    f"{_SHARED}, bool fast, str backend"
)

_step = _dispatch.raw_op(
    "denoise",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
_step_alone = _dispatch.raw_op("denoise_alone", f"({_ARGUMENTS}) -> Tensor", _forward_alone, lambda x, *_: torch.empty_like(x))
_step_into = _dispatch.raw_op(
    "denoise_into", f"({_ARGUMENTS}, Tensor(a!) x_next, Tensor(b!)? x0) -> ()", _fill, lambda *_: None
)
_differentiate = _dispatch.raw_op(
    "denoise_bwd",
    "(Tensor x, Tensor model_out, Tensor coefficients, Tensor? key, Tensor? noise, Tensor? guidance, "
    f"{_SHARED}, Tensor? grad_next, Tensor? grad_x0, bool[] wanted, bool fast, str backend) -> Tensor[]",
    _backward,
    lambda x, model_out, coefficients, *rest: _gradients(x, model_out, coefficients, rest[-3]),
)


class _Denoise(torch.autograd.Function):
    """Saves the inputs but the history; noise from a key is drawn again, and only for the gradient of a log-variance."""

    @staticmethod
    def forward(ctx: Any, fast: bool, backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:
        given = _Inputs(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            given.x,
            given.model_out,
            given.coefficients,
            given.key,
            given.noise,
            given.guidance,
            given.log_variance,
            given.bounds,
        )
        ctx.constants = given.scale, given.low, given.high
        ctx.fast, ctx.backend = fast, backend
        return _step(*inputs, fast, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_next: Tensor | None, grad_x0: Tensor | None) -> tuple[Tensor | None, ...]:
        *before, log_variance, bounds = ctx.saved_tensors
        names = ("x", "model_out", "history", "log_variance")
        positions = [2 + _Inputs._fields.index(name) for name in names]
        wanted = [ctx.needs_input_grad[i] for i in positions]
        grad_next = grad_next if grad_next is None else grad_next.contiguous()
        grad_x0 = grad_x0 if grad_x0 is None else grad_x0.contiguous()
        left = iter(
            _differentiate(*before, *ctx.constants, log_variance, bounds, grad_next, grad_x0, wanted, ctx.fast, ctx.backend)
        )
        grads: list[Tensor | None] = [None] * (2 + len(_Inputs._fields))
        for position, want in zip(positions, wanted, strict=True):
            if want:
                grads[position] = next(left)
        return tuple(grads)


def denoise(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    key: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    guidance: float | Tensor | None = None,
    clamp: float | tuple[float, float] | None = None,
    log_variance: Tensor | tuple[Tensor, Tensor] | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    return_x0: bool = True,
    math: str | None = None,
    backend: str | None = None,
) -> Denoised:
    """Advance a sampler by one step: guidance, estimate of the data, clamp, linear combination and noise in one pass.

    Args:
        x: the state [N, ...], floating point. float64 is served by the reference.
        model_out: what the network gave, of the shape of ``x``; with ``guidance`` [2N, ...], unconditional first. It may be
            bfloat16 or float16 beside a float32 ``x``, and a view whose samples are contiguous, such as half the channels.
        coefficients: (p, q, A, B, S, C_1 .. C_H), [5 + H] or one row per sample [N, 5 + H].
        key: :func:`fastgen.random.key`, [4] or [N, 4]; None takes a fresh seed from PyTorch's default generator. A sampler
            advances the key's step word. Rows with S = 0 draw nothing.
        noise: standard normal draws of the shape of ``x``, instead of a key; not read where S = 0.
        history: [H, N, ...], such as earlier estimates of the data; a ring buffer serves, with C_h in the order of its slots.
        guidance: weight g of u + g (c - u), a number or [N]; 1 is the conditional output alone.
        clamp: limit of the estimate: a number for [-clamp, clamp], or (low, high).
        log_variance: logarithm of a variance per element, of the shape of ``x``: exp(log_variance / 2) multiplies S z. Or a
            pair (v, bounds) for a learned range: v as the network gives it, -1 and 1 at the two bounds (low, high) of the
            logarithm, [2] or one row per sample [N, 2].
        out: receives ``x_next``; may be ``x`` itself. Or a pair that receives both: ``x0`` may go to a slot of ``history``
            that is read by the same step. Not where gradients are required.
        return_x0: False saves writing the estimate (4 bytes an element).
        math: "exact" or "fast", see :func:`fastgen.ops.normal`.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(x_next, x0)`` in the shape and dtype of ``x``; x0 is None without ``return_x0``.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device; see :mod:`fastgen.ops._checks`.

    >>> x = torch.randn(8, 3, 16, 16)
    >>> x, x0 = denoise(x, torch.zeros_like(x), torch.tensor([1.0, -0.1, 0.4, 0.5, 0.1]), clamp=1.0)
    """
    mode = _dispatch.launch_mode(backend, math)
    if mode is not None and noise is None and guidance is None and log_variance is None:
        made = _launched(x, model_out, coefficients, key, history, clamp, out, return_x0, mode)
        if made is not None:
            return made
    inputs = _prepare(x, model_out, coefficients, key, noise, history, guidance, clamp, log_variance)
    x = inputs.x
    differentiate = torch.is_grad_enabled() and (
        x.requires_grad
        or inputs.model_out.requires_grad
        or (inputs.history is not None and inputs.history.requires_grad)
        or (inputs.log_variance is not None and inputs.log_variance.requires_grad)
    )
    out, room = out if isinstance(out, tuple) else (out, None)
    for given in (out, room):
        if given is None or (given is x and not differentiate):
            continue
        if differentiate:
            raise ValueError("out= cannot be given where gradients are required")
        if not isinstance(given, Tensor) or given.dtype is not x.dtype or given.shape != x.shape or given.device != x.device:
            raise ValueError(f"out must be a tensor like x: {x.dtype} {tuple(x.shape)} on {x.device}")
    if room is not None and not (return_x0 and room.is_contiguous()):
        raise ValueError("out for x0 must be contiguous, and return_x0 left True")
    chosen = _dispatch.choose(SPEC, backend, x)
    if chosen == "reference":
        x_next, x0 = _reference(inputs)
        if room is not None:
            x0 = room.copy_(x0)
        return Denoised(x_next if out is None else out.copy_(x_next), x0 if return_x0 else None)
    fast = _dispatch.is_fast(math)
    if differentiate:
        x_next, x0 = _Denoise.apply(fast, chosen, *inputs)
        return Denoised(x_next, x0 if return_x0 else None)
    if room is not None or (out is not None and out.is_contiguous()):
        to = out if out is not None and out.is_contiguous() else torch.empty_like(x)
        estimate = torch.empty_like(x) if return_x0 and room is None else room
        _step_into(*inputs, fast, chosen, to, estimate)
        return Denoised(to if out is None or to is out else out.copy_(to), estimate)
    if return_x0:
        x_next, estimate = _step(*inputs, fast, chosen)
    else:
        x_next, estimate = _step_alone(*inputs, fast, chosen), None
    return Denoised(x_next if out is None else out.copy_(x_next), estimate)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    per_sample: bool = False,
    deterministic: bool = False,
    history: int = 1,
    guidance: str | None = None,
    clamp: float | tuple[float, float] | None = None,
    variance: str | None = None,
    given: bool = False,
    bfloat16_model: bool = False,
    return_x0: bool = True,
) -> dict[str, Any]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    def table(*columns: float) -> Tensor:
        """Rows around the given one, or that row."""
        row = torch.tensor(columns)
        return (row * (1 + 0.1 * torch.randn(rows, len(row), generator=generator)) if per_sample else row).to(device)

    coefficients = table(1.3, -0.8, 0.6, 0.4, 0.3, *(0.2 * (-0.5) ** h for h in range(history)))
    if per_sample:
        coefficients[::3, 4] = 0
    if deterministic:
        coefficients[..., 4] = 0
    model_dtype = torch.bfloat16 if bfloat16_model and dtype is torch.float32 else dtype
    inputs: dict[str, Any] = {
        "x": draw(rows, *event).to(dtype),
        "model_out": draw(rows if guidance is None else 2 * rows, *event).to(model_dtype),
        "coefficients": coefficients,
        "history": draw(history, rows, *event).to(dtype) if history else None,
        "clamp": clamp,
        "return_x0": return_x0,
    }
    if guidance is not None:
        inputs["guidance"] = 2.5 if guidance == "number" else 1 + draw(rows).abs()
    if clamp is not None:
        # away from the limits, where the gradient jumps and float32 cannot tell the sides apart
        x, m = inputs["x"].double(), inputs["model_out"].double()
        own, quiet = coefficients[..., :5].double(), torch.zeros_like(x)
        estimate = denoise_reference(x, m, own, noise=quiet, guidance=inputs.get("guidance")).x0
        assert estimate is not None
        low, high = _limits(clamp)
        near = ((estimate - low).abs() < 1e-5) | ((estimate - high).abs() < 1e-5)
        inputs["x"] = inputs["x"].masked_fill(near, 0.0)
        inputs["model_out"] = inputs["model_out"].masked_fill(near if guidance is None else torch.cat([near, near]), 0.0)
    if variance == "logarithm":
        inputs["log_variance"] = draw(rows, *event).to(model_dtype)
    elif variance == "range":
        inputs["log_variance"] = draw(rows, *event).to(model_dtype), table(-3.0, -1.0)
    if given:
        return {**inputs, "noise": draw(rows, *event).to(dtype)}
    seeds = torch.randint(2**62, (rows if per_sample else 1,), generator=generator).tolist()
    return {**inputs, "key": make_key(seeds if per_sample else seeds[0], stream=7, step=11, device=device)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x, model_out, history, log_variance -> x_next, x0
    # backward: x, model_out, dx_next, dx0 -> dx, dmodel_out, dhistory
    x, m, h = (0 if inputs[name] is None else inputs[name].nbytes for name in ("x", "model_out", "history"))
    variance = inputs.get("log_variance")
    variance = variance[0] if isinstance(variance, tuple) else variance
    forward = (3 if inputs["return_x0"] else 2) * x + m + h + (0 if variance is None else variance.nbytes)
    return forward if mode == "fwd" else forward + 4 * x + 2 * m + h


SPEC = OpSpec(
    name="denoise",
    function=denoise,
    reference=denoise_reference,
    outputs={"x_next": "elementwise", "x0": "elementwise"},
    gradients=("x", "model_out", "history"),
    example_inputs=_example_inputs,
    flags={
        "per_sample": (False, True),
        "deterministic": (False, True),
        "history": (1, 0, 3),
        "guidance": (None, "number", "tensor"),
        "clamp": (None, 1.0, (-0.5, 2.0)),
        "variance": (None, "logarithm", "range"),
        "given": (False, True),
        "bfloat16_model": (False, True),
    },
    shapes=((1, (3, 32, 32)), (64, (3, 32, 32)), (64, (4, 64, 64))),
    bytes_moved=_bytes_moved,
)
