"""dynamic_threshold: bring an estimate of the data into [-1, 1] by a quantile of its own magnitudes.

    s = clamp(quantile_q |x0|, 1, maximum)   over the event,    y = clamp(x0, -s, s) / s

The quantile interpolates linearly between the two elements around rank q (n - 1), to the same float32 bits as torch.quantile.
Where one of the two is infinite, s is the maximum.
A sampler calls it between two steps: ``denoise`` with the row (p, q, 0, 1, 0) gives the estimate, and ``denoise`` with the row
(0, 1, A, B, S) on the result takes the step.

The gradient flows to ``x0``, with s a constant (it depends on two elements alone):

    dx0 = dy / s  where |x0| <= s,  0 elsewhere

Any values are fine. Where a sample holds a NaN, all of that sample is NaN and no other.

Source: Saharia et al. (2022), "Photorealistic text-to-image diffusion models with deep language understanding", section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _checks, _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["dynamic_threshold", "dynamic_threshold_reference"]

_LARGEST = 1 << 24
"""torch.quantile takes this many elements at most."""


def _check(quantile: float, maximum: float) -> tuple[float, float]:
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    if not maximum >= 1:
        raise ValueError(f"maximum must be at least 1, got {maximum}")
    return float(quantile), float(maximum)


def dynamic_threshold_reference(x0: Tensor, quantile: float, maximum: float) -> Tensor:
    """:func:`dynamic_threshold` in plain PyTorch."""
    (x0,) = _checks.common(x0=x0)
    quantile, maximum = _check(quantile, maximum)
    if not x0.numel():
        return x0.clone()
    rows, event = _checks.as_rows(x0)
    x = x0.to(torch.promote_types(x0.dtype, torch.float32)).reshape(rows, event)
    magnitudes = x.detach().abs()
    s = torch.cat([torch.quantile(part, quantile, dim=1) for part in magnitudes.split(max(1, _LARGEST // event))])
    s = torch.where(s.isnan() & ~magnitudes.isnan().any(1), maximum, s).clamp(1, maximum).unsqueeze(1)
    return (x.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)


def _forward(x0: Tensor, quantile: float, maximum: float, backend: str) -> tuple[Tensor, Tensor]:
    y, threshold = torch.empty_like(x0), _checks.per_sample(x0)
    rows, event = _checks.as_rows(x0)
    if backend == "cpp":
        _native.kernel("dynamic_threshold_fwd")(
            _native.DTYPES[x0.dtype], rows, event, x0, quantile, maximum, y, threshold, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("dynamic_threshold").dynamic_threshold_fwd(rows, event, x0, quantile, maximum, y, threshold)
    return y, threshold


def _backward(x0: Tensor, threshold: Tensor, grad_y: Tensor, backend: str) -> Tensor:
    grad_x0 = torch.empty_like(x0)
    rows, event = _checks.as_rows(x0)
    if backend == "cpp":
        _native.kernel("dynamic_threshold_bwd")(
            _native.DTYPES[x0.dtype], rows, event, x0, threshold, grad_y, grad_x0, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("dynamic_threshold").dynamic_threshold_bwd(rows, event, x0, threshold, grad_y, grad_x0)
    return grad_x0


_threshold = _dispatch.raw_op(
    "dynamic_threshold",
    "(Tensor x0, float quantile, float maximum, str backend) -> (Tensor, Tensor)",
    _forward,
    lambda x0, *_: (torch.empty_like(x0), _checks.per_sample(x0)),
)
_differentiate = _dispatch.raw_op(
    "dynamic_threshold_bwd",
    "(Tensor x0, Tensor threshold, Tensor grad_y, str backend) -> Tensor",
    _backward,
    lambda x0, *_: torch.empty_like(x0),
)


class _DynamicThreshold(torch.autograd.Function):
    """Saves the input and the thresholds."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, quantile: float, maximum: float, backend: str) -> Tensor:
        y, threshold = _threshold(x0, quantile, maximum, backend)
        ctx.save_for_backward(x0, threshold)
        ctx.backend = backend
        return y

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(*ctx.saved_tensors, grad_y.contiguous(), ctx.backend), None, None, None


def dynamic_threshold(x0: Tensor, quantile: float, maximum: float, *, backend: str | None = None) -> Tensor:
    """Clamp each sample at a quantile of its magnitudes, and rescale it to [-1, 1].

    Args:
        x0: estimates of the data [N, ...], floating point. float64 is served by the reference.
        quantile: of the magnitudes of a sample, in [0, 1]; 0.995 in the paper.
        maximum: upper limit of the threshold, at least 1; the lower is 1, so that an estimate within [-1, 1] stays as it is.

    Returns:
        Tensor of the shape and dtype of ``x0``, within [-1, 1].

    Raises:
        TypeError, ValueError: for arguments of the wrong type or range.

    >>> dynamic_threshold(torch.tensor([[0.5, -1.0, 2.0]]), 1.0, 10.0)
    tensor([[ 0.2500, -0.5000,  1.0000]])
    """
    (x0,) = _checks.common(x0=x0)
    quantile, maximum = _check(quantile, maximum)
    chosen = _dispatch.choose(SPEC, backend, x0)
    if chosen == "reference":
        return dynamic_threshold_reference(x0, quantile, maximum)
    x0 = x0.contiguous()
    if torch.is_grad_enabled() and x0.requires_grad:
        return _DynamicThreshold.apply(x0, quantile, maximum, chosen)
    return _threshold(x0, quantile, maximum, chosen)[0]


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    quantile: float = 0.9375,
    maximum: float = 100.0,
    scale: float = 2.0,
) -> dict[str, Any]:
    # ranks of such quantiles are exact in float32, or the float64 truth of the tests would interpolate elsewhere
    x0 = (torch.randn(rows, *event, generator=generator) * scale).to(device, dtype)
    return {"x0": x0, "quantile": quantile, "maximum": maximum}


SPEC = OpSpec(
    name="dynamic_threshold",
    function=dynamic_threshold,
    reference=dynamic_threshold_reference,
    outputs={"y": "elementwise"},
    gradients=("x0",),
    example_inputs=_example_inputs,
    flags={"quantile": (0.9375, 0.0, 0.5, 1.0), "maximum": (100.0, 1.0, 2.0), "scale": (2.0, 0.3, 50.0)},
    shapes=((1, (3, 64, 64)), (64, (3, 64, 64)), (8, (3, 512, 512))),
    stops_gradient=True,
    bytes_moved=lambda inputs, mode: inputs["x0"].nbytes * (2 if mode == "fwd" else 5),
)
