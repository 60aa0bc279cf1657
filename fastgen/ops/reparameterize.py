"""reparameterize: draw from N(mean, exp(log_var)) and measure its divergence from N(0, I), in one pass.

    z = mean + exp(log_var / 2) * eps,    kl = 1/2 sum(mean^2 + exp(log_var) - 1 - log_var)   over the event, nats

for eps ~ N(0, I) drawn at the key. Gradients flow to ``mean`` and ``log_var``:

    d mean = dz + dkl * mean,    d log_var = 1/2 (dz * eps * exp(log_var / 2) + dkl * (exp(log_var) - 1))

Any finite log_var is fine; beyond about 88 exp(log_var) overflows float32 and the results are infinite. Where a sample holds
a NaN, that sample's outputs are NaN and no other's.

Source: Kingma and Welling (2014), "Auto-encoding variational Bayes", section 2.4 and appendix B.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._philox import normals
from fastgen.ops._spec import OpSpec
from fastgen.random import fresh_key
from fastgen.random import key as make_key

__all__ = ["Reparameterized", "reparameterize", "reparameterize_reference"]


class Reparameterized(NamedTuple):
    """The latents and their divergence from the prior."""

    z: Tensor
    """Samples of N(mean, exp(log_var)); shape and dtype of ``mean``."""
    kl: Tensor
    """KL(N(mean, exp(log_var)) || N(0, I)) per sample in nats, summed over the event: [N], float32 or wider."""


def reparameterize_reference(
    mean: Tensor, log_var: Tensor, key: Tensor | None = None, *, noise: Tensor | None = None
) -> Reparameterized:
    """:func:`reparameterize` in plain PyTorch."""
    mean, log_var = _checks.common(mean=mean, log_var=log_var)
    if noise is None:
        noise = normals(tuple(mean.shape), _checks.prepare_key(key, mean.shape[0], mean.device))
    wide = torch.promote_types(mean.dtype, torch.float32)
    mu, lv = mean.to(wide), log_var.to(wide)
    z = mu + torch.exp(0.5 * lv) * noise.to(wide)
    kl = 0.5 * (mu.square() + torch.expm1(lv) - lv)
    return Reparameterized(z.to(mean.dtype), kl.reshape(len(kl), math.prod(kl.shape[1:])).sum(1))


_forward_cpp = _native.Launch("reparameterize_fwd", "dtype rows event like like key wide >like >row null flag threads")
_forward_cpp_keeping = _native.Launch("reparameterize_fwd", "dtype rows event like like key wide >like >row >wide flag threads")
_backward_cpp = _native.Launch("reparameterize_bwd", "dtype rows event like like key wide like? row >like >like flag threads")


def _forward(
    keep: bool, mean: Tensor, log_var: Tensor, key: Tensor | None, noise: Tensor | None, fast: bool, backend: str
) -> tuple[Tensor, ...]:
    if backend == "cpp":
        return (_forward_cpp_keeping if keep else _forward_cpp)(mean, log_var, key, noise, fast)
    z, kl = torch.empty_like(mean), _checks.per_sample(mean)
    kept = torch.empty_like(mean, dtype=torch.float32) if keep else None
    rows, event = _checks.as_rows(mean)
    _dispatch.triton_module("reparameterize").reparameterize_fwd(rows, event, mean, log_var, key, noise, z, kl, kept, fast)
    return (z, kl) if kept is None else (z, kl, kept)


def _backward(
    mean: Tensor,
    log_var: Tensor,
    key: Tensor | None,
    noise: Tensor | None,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    fast: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        return _backward_cpp(mean, log_var, key, noise, grad_z, grad_kl, fast)
    grad_mean, grad_log_var = torch.empty_like(mean), torch.empty_like(mean)
    rows, event = _checks.as_rows(mean)
    _dispatch.triton_module("reparameterize").reparameterize_bwd(
        rows, event, mean, log_var, key, noise, grad_z, grad_kl, grad_mean, grad_log_var, fast
    )
    return grad_mean, grad_log_var


_ARGUMENTS = "Tensor mean, Tensor log_var, Tensor? key, Tensor? noise"

_sample = _dispatch.raw_op(
    "reparameterize",
    f"({_ARGUMENTS}, bool fast, str backend) -> (Tensor, Tensor)",
    functools.partial(_forward, False),
    lambda mean, *_: (torch.empty_like(mean), _checks.per_sample(mean)),
)
_sample_keeping_noise = _dispatch.raw_op(
    "reparameterize_fwd",
    f"({_ARGUMENTS}, bool fast, str backend) -> (Tensor, Tensor, Tensor)",
    functools.partial(_forward, True),
    lambda mean, *_: (
        torch.empty_like(mean),
        _checks.per_sample(mean),
        torch.empty_like(mean, dtype=torch.float32),
    ),
)
_differentiate = _dispatch.raw_op(
    "reparameterize_bwd",
    f"({_ARGUMENTS}, Tensor? grad_z, Tensor? grad_kl, bool fast, str backend) -> (Tensor, Tensor)",
    _backward,
    lambda mean, *_: (torch.empty_like(mean), torch.empty_like(mean)),
)


class _Reparameterize(torch.autograd.Function):
    """Saves the inputs and either the noise (given, or kept) or the key that draws it again."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        log_var: Tensor,
        key: Tensor | None,
        noise: Tensor | None,
        keep: bool,
        fast: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        if keep and noise is None:
            z, kl, noise = _sample_keeping_noise(mean, log_var, key, noise, fast, backend)
        else:
            z, kl = _sample(mean, log_var, key, noise, fast, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, log_var, noise, None if noise is not None else key)
        ctx.fast, ctx.backend = fast, backend
        return z, kl

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, log_var, noise, *key = ctx.saved_tensors
        grad_z = grad_z if grad_z is None else grad_z.contiguous()
        grad_kl = grad_kl if grad_kl is None else grad_kl.contiguous()
        grads = _differentiate(mean, log_var, *(key or [None]), noise, grad_z, grad_kl, ctx.fast, ctx.backend)
        return *grads, None, None, None, None, None


def _backward_again(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ctx.fast, ctx.backend = False, "cpp"
    return _Reparameterize.backward(ctx, *grads)[:5]


_record = _native.Record(
    _forward_cpp,
    _forward_cpp_keeping,
    _native.Launch("reparameterize_bwd", "dtype rows event like like null 0 wide like? row >like >like 0 threads"),
    takes="i0 i1 o2 g0 g1",
    gives="o0 o1",
    returns=2,
    longer=_backward_again,
)


def reparameterize(
    mean: Tensor,
    log_var: Tensor,
    key: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    save_noise: bool | None = None,
    math: str | None = None,
    backend: str | None = None,
) -> Reparameterized:
    """Draw z ~ N(mean, exp(log_var)) and compute KL(N(mean, exp(log_var)) || N(0, I)), in one pass.

    Args:
        mean: [N, ...], floating point. float64 is served by the reference.
        log_var: logarithm of the variance; broadcast against ``mean``.
        key: :func:`fastgen.random.key`, [4] or [N, 4]; None takes a fresh seed from PyTorch's default generator.
        noise: standard normal draws of the shape of ``mean``, instead of a key; a constant for autograd.
        save_noise: keep the noise for the backward pass (4 bytes an element) or draw it again from the key. None keeps it on
            the CPU, where reading costs less than drawing, and draws it again on a GPU.
        math: "exact" or "fast", see :func:`fastgen.ops.normal`.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(z, kl)``: samples in the shape and dtype of ``mean``, and nats per sample [N] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape or device; see :mod:`fastgen.ops._checks`.

    >>> z, kl = reparameterize(torch.zeros(8, 16), torch.zeros(8, 16))
    >>> z.shape, kl.shape
    (torch.Size([8, 16]), torch.Size([8]))
    """
    fast = _dispatch.launch_mode(backend, math)
    if fast is not None and noise is None and save_noise is not False and isinstance(mean, Tensor):
        key = fresh_key(mean.device) if key is None else key
        made = _record.attempt(mean, log_var, key, None, fast)
        if made:
            return Reparameterized._make(made)
    mean, log_var = _checks.common(mean=mean, log_var=log_var)
    if noise is None:
        key = _checks.prepare_key(key, mean.shape[0], mean.device)
    elif key is not None:
        raise ValueError("give key or noise, not both")
    else:
        noise = _checks.noise_like(noise, mean)
    chosen = _dispatch.choose(SPEC, backend, mean)
    if chosen == "reference":
        return reparameterize_reference(mean, log_var, key, noise=noise)
    mean, log_var, fast = mean.contiguous(), log_var.contiguous(), _dispatch.is_fast(math)
    if torch.is_grad_enabled() and (mean.requires_grad or log_var.requires_grad):
        keep = mean.device.type == "cpu" if save_noise is None else save_noise
        return Reparameterized(*_Reparameterize.apply(mean, log_var, key, noise, keep, fast, chosen))
    return Reparameterized(*_sample(mean, log_var, key, noise, fast, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    per_sample: bool = False,
    given: bool = False,
    save_noise: bool | None = None,
) -> dict[str, Any]:
    def draw(scale: float) -> Tensor:
        return (torch.randn(rows, *event, generator=generator) * scale).to(device, dtype)

    inputs = {"mean": draw(1.5), "log_var": draw(2.0), "save_noise": save_noise}
    if given:
        return {**inputs, "noise": draw(1.0)}
    seeds = torch.randint(2**62, (rows if per_sample else 1,), generator=generator).tolist()
    return {**inputs, "key": make_key(seeds if per_sample else seeds[0], stream=3, sample=11, device=device)}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: mean, log_var -> z; backward: mean, log_var, dz -> two gradients; the noise costs nothing where it is redrawn
    return inputs["mean"].nbytes * (3 if mode == "fwd" else 8) + 4 * len(inputs["mean"]) * (1 if mode == "fwd" else 2)


SPEC = OpSpec(
    name="reparameterize",
    function=reparameterize,
    reference=reparameterize_reference,
    outputs={"z": "elementwise", "kl": "reduction"},
    gradients=("mean", "log_var"),
    example_inputs=_example_inputs,
    flags={"per_sample": (False, True), "given": (False, True), "save_noise": (None, False, True)},
    shapes=((64, (16,)), (512, (256,)), (4096, (1024,))),
    bytes_moved=_bytes_moved,
)
