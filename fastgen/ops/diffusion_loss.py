"""diffusion_loss: how far a model's output is from the target of :mod:`fastgen.ops.diffuse`, which is made again on the way.

    e = model_out - (c x0 + d eps),    loss = weight * mean(f(e))   over the event, one number per sample

    f(e) = e^2                                                              kind "mse"
    f(e) = e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2)         kind "huber"

for the eps that ``diffuse`` drew at the same key and its rows (a, b, c, d), of which c and d count. No target is ever stored:
the pass that sums the loss leaves f'(e), up to a factor per sample, for the backward pass, which scales it. Gradients flow to
``model_out`` and ``x0``; coefficients, noise and weights are constants:

    d model_out = dloss * weight * f'(e) / E,    d x0 = -c * d model_out      for E elements of an event

min-SNR, P2, EDM and any other weighting is a vector of weights. An event of no elements has the mean NaN, as in PyTorch. Where
a sample, its row or its weight holds a NaN, that sample's loss is NaN and no other's.

Sources: Ho et al. (2020), "Denoising diffusion probabilistic models", eq. 14; Hang et al. (2023), "Efficient diffusion training
via min-SNR weighting strategy", section 3.4; Huber (1964), "Robust estimation of a location parameter".
"""

from __future__ import annotations

import functools
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import normals
from fastgen.ops._spec import OpSpec
from fastgen.random import key as make_key

__all__ = ["KINDS", "diffusion_loss", "diffusion_loss_reference"]

KINDS = ("mse", "huber")


def _check_shapes(model_out: Tensor, x0: Tensor) -> None:
    if isinstance(model_out, Tensor) and isinstance(x0, Tensor) and model_out.shape != x0.shape:
        raise ValueError(f"model_out must have the shape of x0, {tuple(x0.shape)}, got {tuple(model_out.shape)}")


def _check_options(key: Tensor | None, noise: Tensor | None, kind: str, delta: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not (delta > 0 and isfinite(delta)):
        raise ValueError(f"delta must be positive and finite, got {delta}")
    if (key is None) == (noise is None):
        raise ValueError("give key or noise, one of them: that with which diffuse made x_t")


def _weights(weight: Tensor | float | None, like: Tensor) -> tuple[Tensor | None, float]:
    """A weight as (tensor [] or [N] of constants, or None; factor), checked."""
    if weight is None:
        return None, 1.0
    if not isinstance(weight, Tensor):
        return None, float(weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a number or a floating-point tensor, got {weight.dtype}")
    if weight.dim() and weight.shape != (like.shape[0],):
        raise ValueError(f"weight must be a number or have shape [{like.shape[0]}], got {list(weight.shape)}")
    if weight.device != like.device:
        raise ValueError(f"weight is on {weight.device}, expected {like.device}")
    return _checks.constant(weight, like).contiguous(), 1.0


def diffusion_loss_reference(
    model_out: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    key: Tensor | None = None,
    *,
    weight: Tensor | float | None = None,
    kind: str = "mse",
    delta: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """:func:`diffusion_loss` in plain PyTorch."""
    _check_options(key, noise, kind, delta)
    _check_shapes(model_out, x0)
    model_out, x0 = _checks.common(model_out=model_out, x0=x0)
    _, _, c, d = _checks.coefficient_rows(coefficients, 4, x0).reshape(-1, 4, *[1] * (x0.dim() - 1)).unbind(1)
    if noise is None:
        noise = normals(tuple(x0.shape), _checks.prepare_key(key, x0.shape[0], x0.device))
    wide = torch.promote_types(x0.dtype, torch.float32)
    target = c * x0.to(wide) + d * noise.detach().to(wide)
    error = model_out.to(wide) - target
    each = error.square() if kind == "mse" else F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    rows, scale = _weights(weight, x0)
    loss = each.reshape(len(each), prod(each.shape[1:])).mean(1) * scale
    return loss if rows is None else loss * rows


_PLAN = "dtype rows event last like like table4 key wide weights number flag number >row {slope} flag threads"
_forward_cpp = _native.Launch("diffusion_loss_fwd", _PLAN.format(slope="null"))
_forward_cpp_keeping = _native.Launch("diffusion_loss_fwd", _PLAN.format(slope=">wide"))


def _record(huber: bool, with_x0: bool) -> _native.Record:
    """For float32 alone, where the gradient of ``model_out`` may be written over the slope."""
    plan = f"dtype rows event like table4 weights number {int(huber)} row {{}} {'>like' if with_x0 else 'null'} threads"

    def longer(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        ctx.factor, ctx.huber, ctx.with_x0 = ctx.remembered[0], huber, with_x0
        ctx.dtype, ctx.backend = torch.float32, "cpp"
        return _DiffusionLoss.backward(ctx, grad_loss)[:10]

    return _native.Record(
        _forward_cpp,
        _forward_cpp_keeping,
        _native.Launch("diffusion_loss_bwd", plan.format(">like")),
        final=_native.Launch("diffusion_loss_bwd", plan.format(">first")),
        takes="o1 i2 i5 n6 g0",
        gives="o0 o1" if with_x0 else "o0",
        returns=1,
        longer=longer,
    )


_records = {(huber, with_x0): _record(huber, with_x0) for huber in (False, True) for with_x0 in (False, True)}


def _forward(
    keep: bool,
    model_out: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    weight: Tensor | None,
    factor: float,
    huber: bool,
    delta: float,
    fast: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if backend == "cpp":
        launch = _forward_cpp_keeping if keep else _forward_cpp
        return launch(model_out, x0, coefficients, key, noise, weight, factor, huber, delta, fast)
    loss = _checks.per_sample(model_out)
    slope = torch.empty_like(model_out, dtype=torch.float32) if keep else None
    rows, event = _checks.as_rows(model_out)
    channels = model_out.shape[1] if _checks.is_channels_last(model_out) else 0
    scale = factor / event if event else float("nan")
    _dispatch.triton_module("diffusion_loss").diffusion_loss_fwd(
        rows, event, channels, model_out, x0, coefficients, key, noise, weight, scale, huber, delta, loss, slope, fast
    )
    return (loss,) if slope is None else (loss, slope)


def _backward(
    slope: Tensor,
    coefficients: Tensor,
    weight: Tensor | None,
    factor: float,
    huber: bool,
    grad_loss: Tensor,
    with_x0: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    grads = [torch.empty_like(slope, dtype=dtype) for _ in range(1 + with_x0)]
    rows, event = _checks.as_rows(slope)
    grad_model_out, grad_x0 = grads[0], grads[1] if with_x0 else None
    if backend == "cpp":
        _native.kernel("diffusion_loss_bwd")(
            _native.DTYPES[dtype], rows, event, slope, coefficients, 0 if coefficients.dim() == 1 else 4, weight,
            0 if weight is None else weight.dim(), factor, huber, grad_loss, grad_model_out, grad_x0, torch.get_num_threads(),
        )  # fmt: skip
    else:
        scale = (factor if huber else 2 * factor) / max(event, 1)
        _dispatch.triton_module("diffusion_loss").diffusion_loss_bwd(
            rows, event, slope, coefficients, weight, scale, grad_loss, grad_model_out, grad_x0
        )
    return grads


_ARGUMENTS = (
    "Tensor model_out, Tensor x0, Tensor coefficients, Tensor? key, Tensor? noise, Tensor? weight, float factor, bool huber, "
    "float delta, bool fast, str backend"
)

_loss = _dispatch.raw_op(
    "diffusion_loss",
    f"({_ARGUMENTS}) -> Tensor",
    lambda *args: _forward(False, *args)[0],
    lambda model_out, *_: _checks.per_sample(model_out),
)
_loss_keeping_slope = _dispatch.raw_op(
    "diffusion_loss_fwd",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    functools.partial(_forward, True),
    lambda model_out, *_: (
        _checks.per_sample(model_out),
        torch.empty_like(model_out, dtype=torch.float32),
    ),
)
_differentiate = _dispatch.raw_op(
    "diffusion_loss_bwd",
    "(Tensor slope, Tensor coefficients, Tensor? weight, float factor, bool huber, Tensor grad_loss, bool with_x0, "
    "ScalarType dtype, str backend) -> Tensor[]",
    _backward,
    lambda slope, coefficients, weight, factor, huber, grad_loss, with_x0, dtype, backend: [
        torch.empty_like(slope, dtype=dtype) for _ in range(1 + with_x0)
    ],
)


class _DiffusionLoss(torch.autograd.Function):
    """Saves the slope of the loss at every element, in float32 and without the factors, so that gradients round once."""

    @staticmethod
    def forward(
        ctx: Any,
        model_out: Tensor,
        x0: Tensor,
        coefficients: Tensor,
        key: Tensor | None,
        noise: Tensor | None,
        weight: Tensor | None,
        factor: float,
        huber: bool,
        delta: float,
        with_x0: bool,
        fast: bool,
        backend: str,
    ) -> Tensor:
        loss, slope = _loss_keeping_slope(model_out, x0, coefficients, key, noise, weight, factor, huber, delta, fast, backend)
        ctx.save_for_backward(slope, coefficients, weight)
        ctx.factor, ctx.huber, ctx.with_x0, ctx.dtype, ctx.backend = factor, huber, with_x0, model_out.dtype, backend
        return loss

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        slope, coefficients, weight = ctx.saved_tensors
        grads = _differentiate(
            slope, coefficients, weight, ctx.factor, ctx.huber, grad_loss.contiguous(), ctx.with_x0, ctx.dtype, ctx.backend
        )
        return grads[0], grads[1] if ctx.with_x0 else None, *[None] * 10


def diffusion_loss(
    model_out: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    key: Tensor | None = None,
    *,
    weight: Tensor | float | None = None,
    kind: str = "mse",
    delta: float = 1.0,
    noise: Tensor | None = None,
    math: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted error of a model's output against the target that :func:`fastgen.ops.diffuse` makes at the same key.

    Args:
        model_out: [N, ...], floating point. float64 is served by the reference.
        x0: the samples that were noised, in the shape of ``model_out``.
        coefficients: the rows (a, b, c, d) given to ``diffuse``, [N, 4] or [4]; the target is c x0 + d eps. A constant for
            autograd.
        key: the key given to ``diffuse``; there is no default, since fresh noise would have nothing to do with x_t.
        weight: [N], or one number for all samples; a constant for autograd.
        kind: "mse", or "huber": half the square up to ``delta``, then linear, as :func:`torch.nn.functional.huber_loss`.
        delta: where "huber" turns linear.
        noise: the noise given to ``diffuse``, instead of a key; a constant for autograd. A target that was kept may be given
            as noise with the row (a, b, 0, 1): on a CPU reading it costs less than drawing it again, for 4 bytes an element.
        math: "exact" or "fast", as for ``diffuse``, see :func:`fastgen.ops.normal`.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        Loss per sample [N]: weight times the mean over the event, in float32 (float64 for float64). Its mean over the samples
        is what ``F.mse_loss`` gives for weight 1.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device; see :mod:`fastgen.ops._checks`.

    >>> row = torch.tensor([0.8, 0.6, 0.0, 1.0])
    >>> x0, key = torch.zeros(8, 3, 32, 32), fastgen.random.key(0)
    >>> x_t, _ = diffuse(x0, row, key, target=False)
    >>> diffusion_loss(model(x_t), x0, row, key).mean().backward()
    """
    _check_options(key, noise, kind, delta)
    huber, fast = kind == "huber", _dispatch.launch_mode(backend, math)
    if fast is not None and weight is None and isinstance(model_out, Tensor) and isinstance(x0, Tensor):
        arguments = (model_out, x0, coefficients, key, noise, None, 1.0, huber, delta, fast)
        if model_out.dtype is torch.float32:
            made = _records[huber, x0.requires_grad].attempt(*arguments)
        else:
            made = _forward_cpp.attempt(*arguments)
        if made:
            return made[0]
    _check_shapes(model_out, x0)
    model_out, x0 = _checks.common(model_out=model_out, x0=x0)
    channels_last = _checks.is_channels_last(model_out)
    rows = _checks.coefficient_rows(coefficients, 4, x0)
    weights, factor = _weights(weight, x0)
    if key is not None:
        key = _checks.prepare_key(key, x0.shape[0], x0.device)
    elif noise is not None:
        noise = _checks.noise_like(noise, x0, channels_last=channels_last)
    chosen = _dispatch.choose(SPEC, backend, x0)
    if chosen == "reference":
        return diffusion_loss_reference(model_out, x0, rows, key, weight=weight, kind=kind, delta=delta, noise=noise)
    model_out, x0 = _checks.dense(model_out, channels_last), _checks.dense(x0, channels_last)
    fast = _dispatch.is_fast(math)
    if torch.is_grad_enabled() and (model_out.requires_grad or x0.requires_grad):
        with_x0 = x0.requires_grad
        return _DiffusionLoss.apply(model_out, x0, rows, key, noise, weights, factor, huber, delta, with_x0, fast, chosen)
    return _loss(model_out, x0, rows, key, noise, weights, factor, huber, delta, fast, chosen)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    kind: str = "mse",
    weighted: str = "rows",
    shared: bool = False,
    per_sample: bool = False,
    given: bool = False,
    channels_last: bool = False,
) -> dict[str, Any]:
    def draw() -> Tensor:
        x = torch.randn(rows, *event, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    coefficients = torch.randn(4, generator=generator) if shared else torch.randn(rows, 4, generator=generator)
    inputs: dict[str, Any] = {"model_out": draw(), "x0": draw(), "coefficients": coefficients.to(device)}
    if weighted == "rows":
        inputs["weight"] = (torch.rand(rows, generator=generator) + 0.5).to(device)
    elif weighted == "one":
        inputs["weight"] = 0.7
    inputs |= {"kind": kind, "delta": 0.8}
    if given:
        return {**inputs, "noise": draw()}
    seeds = torch.randint(2**62, (rows if per_sample else 1,), generator=generator).tolist()
    return {**inputs, "key": make_key(seeds if per_sample else seeds[0], stream=6, step=11, device=device)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: model_out, x0 -> a number; with gradients: also the gradients of both
    return inputs["model_out"].nbytes * (2 if mode == "fwd" else 4) + inputs["coefficients"].nbytes + 8 * len(inputs["x0"])


SPEC = OpSpec(
    name="diffusion_loss",
    function=diffusion_loss,
    reference=diffusion_loss_reference,
    outputs={"loss": "reduction"},
    gradients=("model_out", "x0"),
    example_inputs=_example_inputs,
    flags={
        "kind": ("mse", "huber"),
        "weighted": ("rows", "one", "none"),
        "shared": (False, True),
        "per_sample": (False, True),
        "given": (False, True),
        "channels_last": (False, True),
    },
    shapes=((1, (3, 32, 32)), (64, (3, 32, 32)), (64, (3, 256, 256))),
    bytes_moved=_bytes_moved,
    needs_key=True,
)
