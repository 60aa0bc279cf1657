"""diffuse: the noised sample of the forward process and what the model is to predict, in one pass.

    x_t = a x0 + b eps,    target = c x0 + d eps

for eps ~ N(0, I) drawn at the key and one row (a, b, c, d) per sample. Every schedule and every target is such a row, with
alpha and sigma the schedule's signal and noise scales at the sample's time t:

    noise prediction  (alpha, sigma, 0, 1)         velocity             (alpha, sigma, -sigma, alpha)
    data prediction   (alpha, sigma, 1, 0)         flow matching        (1 - t, t, -1, 1)

The gradient flows to ``x0``, the coefficients and the noise are constants:

    d x0 = a dx_t + c dtarget

Any finite values are fine. Where a sample or its row holds a NaN, that sample's outputs are NaN and no other's; since 0 times
NaN is NaN, that holds for a target that does not depend on x0 as well.

Sources: Ho et al. (2020), "Denoising diffusion probabilistic models", eq. 4; Salimans and Ho (2022), "Progressive distillation
for fast sampling of diffusion models", appendix D; Lipman et al. (2023), "Flow matching for generative modeling", section 4.1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import normals
from fastgen.ops._spec import OpSpec
from fastgen.random import key as make_key

__all__ = ["Diffused", "diffuse", "diffuse_reference"]


class Diffused(NamedTuple):
    """The input and the regression target of a denoising model."""

    x_t: Tensor
    """a x0 + b eps; shape, dtype and layout of ``x0``."""
    target: Tensor | None
    """c x0 + d eps, likewise; None where it was not asked for."""


def diffuse_reference(
    x0: Tensor, coefficients: Tensor, key: Tensor | None = None, *, noise: Tensor | None = None, target: bool = True
) -> Diffused:
    """:func:`diffuse` in plain PyTorch."""
    (x0,) = _checks.common(x0=x0)
    a, b, c, d = _checks.coefficient_rows(coefficients, 4, x0).reshape(-1, 4, *[1] * (x0.dim() - 1)).unbind(1)
    if noise is None:
        noise = normals(tuple(x0.shape), _checks.prepare_key(key, x0.shape[0], x0.device))
    wide = torch.promote_types(x0.dtype, torch.float32)
    x, eps = x0.to(wide), noise.detach().to(wide)
    return Diffused((a * x + b * eps).to(x0.dtype), (c * x + d * eps).to(x0.dtype) if target else None)


_forward_cpp = _native.Launch("diffuse_fwd", "dtype rows event last like table4 key wide >like >like flag threads")
_forward_cpp_alone = _native.Launch("diffuse_fwd", "dtype rows event last like table4 key wide >like null flag threads")


def _forward(
    target: bool, x0: Tensor, coefficients: Tensor, key: Tensor | None, noise: Tensor | None, fast: bool, backend: str
) -> tuple[Tensor, ...]:
    if backend == "cpp":
        return (_forward_cpp if target else _forward_cpp_alone)(x0, coefficients, key, noise, fast)
    x_t = torch.empty_like(x0)
    wanted = torch.empty_like(x0) if target else None
    rows, event = _checks.as_rows(x0)
    channels = x0.shape[1] if _checks.is_channels_last(x0) else 0
    _dispatch.triton_module("diffuse").diffuse_fwd(rows, event, channels, x0, coefficients, key, noise, x_t, wanted, fast)
    return (x_t,) if wanted is None else (x_t, wanted)


def _backward(coefficients: Tensor, grad_x_t: Tensor | None, grad_target: Tensor | None, backend: str) -> Tensor:
    grad = grad_x_t if grad_x_t is not None else grad_target
    assert grad is not None
    grad_x0 = torch.empty_like(grad)
    rows, event = _checks.as_rows(grad)
    if backend == "cpp":
        _native.kernel("diffuse_bwd")(
            _native.DTYPES[grad.dtype], rows, event, coefficients, 0 if coefficients.dim() == 1 else 4, grad_x_t, grad_target,
            grad_x0, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _dispatch.triton_module("diffuse").diffuse_bwd(rows, event, coefficients, grad_x_t, grad_target, grad_x0)
    return grad_x0


_ARGUMENTS = "Tensor x0, Tensor coefficients, Tensor? key, Tensor? noise, bool fast, str backend"

_diffuse = _dispatch.raw_op(
    "diffuse",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    functools.partial(_forward, True),
    lambda x0, *_: (torch.empty_like(x0), torch.empty_like(x0)),
)
_diffuse_alone = _dispatch.raw_op(
    "diffuse_alone",
    f"({_ARGUMENTS}) -> Tensor",
    lambda *args: _forward(False, *args)[0],
    lambda x0, *_: torch.empty_like(x0),
)
_differentiate = _dispatch.raw_op(
    "diffuse_bwd",
    "(Tensor coefficients, Tensor? grad_x_t, Tensor? grad_target, str backend) -> Tensor",
    _backward,
    lambda coefficients, grad_x_t, grad_target, backend: torch.empty_like(grad_target if grad_x_t is None else grad_x_t),
)


class _Diffuse(torch.autograd.Function):
    """Saves the coefficients alone: the noise is a constant of a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        coefficients: Tensor,
        key: Tensor | None,
        noise: Tensor | None,
        target: bool,
        channels_last: bool,
        fast: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coefficients)
        ctx.channels_last, ctx.backend = channels_last, backend
        return (_diffuse if target else _diffuse_alone)(x0, coefficients, key, noise, fast, backend)

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_x_t: Tensor | None, grad_target: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (coefficients,) = ctx.saved_tensors
        grad_x0 = None
        if grad_x_t is not None or grad_target is not None:
            grad_x_t = grad_x_t if grad_x_t is None else _checks.dense(grad_x_t, ctx.channels_last)
            grad_target = grad_target if grad_target is None else _checks.dense(grad_target, ctx.channels_last)
            grad_x0 = _differentiate(coefficients, grad_x_t, grad_target, ctx.backend)
        return grad_x0, None, None, None, None, None, None, None


def diffuse(
    x0: Tensor,
    coefficients: Tensor,
    key: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    target: bool = True,
    math: str | None = None,
    backend: str | None = None,
) -> Diffused:
    """Noise samples: x_t = a x0 + b eps, and the target c x0 + d eps of a denoising model, in one pass.

    Args:
        x0: [N, ...], floating point. float64 is served by the reference. Channels-last images stay so, without a copy.
        coefficients: rows (a, b, c, d), [N, 4], or [4] for all samples; floating point, used in float32; a constant for
            autograd.
        key: :func:`fastgen.random.key`, [4] or [N, 4]; None takes a fresh seed from PyTorch's default generator.
        noise: standard normal draws of the shape of ``x0``, instead of a key; a constant for autograd.
        target: whether the target is wanted. Without it the pass writes x_t alone; :func:`fastgen.ops.diffusion_loss` makes
            the target again from the same key.
        math: "exact" or "fast", see :func:`fastgen.ops.normal`.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(x_t, target)`` in the shape, dtype and layout of ``x0``; target is None unless wanted.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device; see :mod:`fastgen.ops._checks`.

    >>> x_t, velocity = diffuse(torch.zeros(8, 3, 32, 32), torch.tensor([0.8, 0.6, -0.6, 0.8]))
    >>> x_t.shape
    torch.Size([8, 3, 32, 32])
    """
    fast = _dispatch.launch_mode(backend, math)
    if fast is not None and key is not None and noise is None:
        made = (_forward_cpp if target else _forward_cpp_alone).attempt(x0, coefficients, key, None, fast)
        if made:
            return Diffused(*made) if target else Diffused(made[0], None)
    (x0,) = _checks.common(x0=x0)
    channels_last = _checks.is_channels_last(x0)
    rows = _checks.coefficient_rows(coefficients, 4, x0)
    if noise is None:
        key = _checks.prepare_key(key, x0.shape[0], x0.device)
    elif key is not None:
        raise ValueError("give key or noise, not both")
    else:
        noise = _checks.noise_like(noise, x0, channels_last=channels_last)
    chosen = _dispatch.choose(SPEC, backend, x0)
    if chosen == "reference":
        return diffuse_reference(x0, rows, key, noise=noise, target=target)
    x0, fast = _checks.dense(x0, channels_last), _dispatch.is_fast(math)
    if torch.is_grad_enabled() and x0.requires_grad:
        out = _Diffuse.apply(x0, rows, key, noise, target, channels_last, fast, chosen)
    else:
        out = (_diffuse if target else _diffuse_alone)(x0, rows, key, noise, fast, chosen)
    return Diffused(*out) if target else Diffused(out, None)


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    shared: bool = False,
    per_sample: bool = False,
    given: bool = False,
    channels_last: bool = False,
) -> dict[str, Any]:
    def draw() -> Tensor:
        return torch.randn(rows, *event, generator=generator).to(device, dtype)

    x0 = draw()
    if channels_last and x0.dim() == 4:
        x0 = x0.contiguous(memory_format=torch.channels_last)
    coefficients = torch.randn(4, generator=generator) if shared else torch.randn(rows, 4, generator=generator)
    inputs = {"x0": x0, "coefficients": coefficients.to(device)}
    if given:
        return {**inputs, "noise": draw()}
    seeds = torch.randint(2**62, (rows if per_sample else 1,), generator=generator).tolist()
    return {**inputs, "key": make_key(seeds if per_sample else seeds[0], stream=6, step=11, device=device)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: x0 -> x_t, target; backward: their gradients -> that of x0
    return inputs["x0"].nbytes * (3 if mode == "fwd" else 6) + inputs["coefficients"].nbytes


SPEC = OpSpec(
    name="diffuse",
    function=diffuse,
    reference=diffuse_reference,
    outputs={"x_t": "elementwise", "target": "elementwise"},
    gradients=("x0",),
    example_inputs=_example_inputs,
    flags={
        "shared": (False, True),
        "per_sample": (False, True),
        "given": (False, True),
        "channels_last": (False, True),
    },
    shapes=((1, (3, 32, 32)), (64, (3, 32, 32)), (64, (3, 256, 256))),
    bytes_moved=_bytes_moved,
)
