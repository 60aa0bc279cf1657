"""moments: mean and centred co-moment of features, in float64, batch after batch.

    n = n_a + n_b,    delta = m_b - m_a,    m = m_a + delta n_b / n,    C = C_a + C_b + delta delta^T n_a n_b / n

for a state (n_a, m_a, C_a) and a batch with C_b = sum (x - m_b)(x - m_b)^T. C / (n - 1) is the covariance. Nothing is ever
subtracted from a raw sum of squares, so that features far from zero lose nothing, and states of several ranks merge by the
same rule in any order. Gradients flow to the features and to the state; with S = dC + dC^T

    dx = S (x - m) + dm / n,    dm_a = dm n_a / n - S delta n_a n_b / n,    dC_a = dC

float32, bfloat16 and float16 features are centred at their own mean and multiplied in float32, panels of 256 rows on the
lower triangle, each added to float64; the diagonal (hence the trace of the covariance) is summed in float64 throughout.
Against float64 that leaves about 1e-8 of the largest entry, and 1e-15 of the trace. The product, a blocked SYRK, is this
package's own kernel: PyTorch has a GEMM alone, twice the work. float64 features take PyTorch's GEMM, in the reference, and the
gradient is a GEMM of PyTorch's on every backend.

Source: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", section 3, for matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.ops import _dispatch, _native
from fastgen.ops._spec import OpSpec

__all__ = ["Moments", "merge_moments", "moments", "moments_reference"]


class Moments(NamedTuple):
    """What is known of a set of feature vectors: enough for their mean and covariance, and to go on adding."""

    count: Tensor  # type: ignore[assignment]  # tuple.count gives way, as in any named tuple with such a field
    """How many, float64 []: a tensor, so that ranks can add it up and nothing waits for a device."""
    mean: Tensor
    """Their mean, float64 [D]."""
    comoment: Tensor
    """Sum of (x - mean)(x - mean)^T, float64 [D, D]."""

    def covariance(self) -> Tensor:
        """The unbiased covariance [D, D]; NaN for fewer than two samples."""
        return self.comoment / torch.where(self.count > 1, self.count - 1, torch.nan)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """The moments of both sets together; of ranks, of shards, in any order.

    >>> merge_moments(moments(x[:100]), moments(x[100:]))  # moments(x), up to rounding
    """
    count = first.count + second.count
    share = second.count / count.clamp_min(1)
    delta = second.mean - first.mean
    far = (first.count * share) * delta
    return Moments(count, first.mean + share * delta, first.comoment + second.comoment + torch.outer(far, delta))


def moments_reference(features: Tensor, state: Moments | None = None) -> Moments:
    """:func:`moments` in plain PyTorch."""
    x = features.to(torch.float64)
    mean = x.sum(0) / max(len(x), 1)
    centred = x - mean
    batch = Moments(mean.new_tensor(float(len(x))), mean, centred.T @ centred)
    return batch if state is None else merge_moments(state, batch)


def _forward(
    features: Tensor, count: Tensor | None, mean: Tensor | None, comoment: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = features.shape
    results = [features.new_empty(shape, dtype=torch.float64) for shape in ((), (width,), (width, width))]
    if backend == "cpp":
        _native.kernel("moments_fwd")(
            _native.DTYPES[features.dtype], rows, width, features, count, mean, comoment, *results, torch.get_num_threads()
        )
    else:
        _dispatch.triton_module("moments").moments_fwd(rows, width, features, count, mean, comoment, *results)
    return results[0], results[1], results[2]


def _backward(features: Tensor, mean: Tensor, grad_mean: Tensor, grad_comoment: Tensor) -> Tensor:
    # centred at the mean of all, so that the state's share of the gradient is in it
    with torch.autocast(features.device.type, enabled=False):
        both = (grad_comoment + grad_comoment.T).to(torch.float32)
        centred = features.to(torch.float32) - mean.to(torch.float32)
        return torch.addmm(grad_mean.to(torch.float32), centred, both).to(features.dtype)


_accumulate = _dispatch.raw_op(
    "moments_fwd",
    "(Tensor features, Tensor? count, Tensor? mean, Tensor? comoment, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda features, *_: tuple(
        features.new_empty(shape, dtype=torch.float64) for shape in ((), features.shape[1:], features.shape[1:] * 2)
    ),
)
_differentiate = _dispatch.raw_op(
    "moments_bwd",
    "(Tensor features, Tensor mean, Tensor grad_mean, Tensor grad_comoment) -> Tensor",
    _backward,
    lambda features, *_: torch.empty_like(features),
)


class _Moments(torch.autograd.Function):
    """Saves the features and two means; the rest of the state is linear."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, count: Tensor | None, mean: Tensor | None, comoment: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = _accumulate(features, count, mean, comoment, backend)
        ctx.mark_non_differentiable(results[0])
        ctx.save_for_backward(features, results[0], results[1], count, mean)
        return results

    @staticmethod
    @_dispatch.differentiable_once
    def backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_comoment: Tensor) -> tuple[Tensor | None, ...]:
        features, count, mean, count_before, mean_before = ctx.saved_tensors
        total, grad_features, grad_mean_before = count.clamp_min(1), None, None
        if ctx.needs_input_grad[0]:
            grad_features = _differentiate(features, mean, grad_mean / total, grad_comoment)
        if ctx.needs_input_grad[2]:
            # n_b delta / n is what the mean moved by
            moved = grad_comoment @ (mean - mean_before) + (mean - mean_before) @ grad_comoment
            grad_mean_before = grad_mean * (count_before / total) - moved * count_before
        return grad_features, None, grad_mean_before, grad_comoment if ctx.needs_input_grad[3] else None, None


def _prepared(features: Tensor, state: Moments | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The parts of a state, checked against the features."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"features must be a floating-point tensor, got {getattr(features, 'dtype', type(features).__name__)}")
    if features.dim() != 2:
        raise ValueError(f"features must have shape [N, D], got {list(features.shape)}")
    if state is None:
        return None, None, None
    width = features.shape[1]
    for name, value, shape in zip(Moments._fields, state, ((), (width,), (width, width)), strict=True):
        if not isinstance(value, Tensor) or value.dtype is not torch.float64:
            raise TypeError(f"state.{name} must be a float64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != shape or value.device != features.device:
            raise ValueError(
                f"state.{name} must have shape {list(shape)} on {features.device} like the features, "
                f"got {list(value.shape)} on {value.device}"
            )
    return state.count, state.mean.contiguous(), state.comoment.contiguous()


def moments(features: Tensor, state: Moments | None = None, *, backend: str | None = None) -> Moments:
    """Count, mean and centred co-moment of feature vectors, added to those seen before.

    Args:
        features: [N, D], floating point; no samples (N = 0) change nothing. float64 is served by the reference.
        state: what an earlier call returned, or None to begin; never changed.
        backend: None, "reference", "cpp" or "triton".

    Returns:
        ``(count, mean, comoment)``, float64 on the device of the features; ``.covariance()`` divides by count - 1.

    Raises:
        TypeError, ValueError: for features that are not a floating-point [N, D], or a state of another width, type or device.

    >>> state = None
    >>> for batch in torch.randn(10, 64, 8):
    ...     state = moments(batch, state)
    >>> state.covariance().shape
    torch.Size([8, 8])
    """
    count, mean, comoment = _prepared(features, state)
    chosen = _dispatch.choose(SPEC, backend, features)
    if chosen == "reference":
        return moments_reference(features, state)
    features = features.contiguous()
    if torch.is_grad_enabled() and (features.requires_grad or any(t is not None and t.requires_grad for t in (mean, comoment))):
        return Moments(*_Moments.apply(features, count, mean, comoment, chosen))
    return Moments(*_accumulate(features, count, mean, comoment, chosen))


def _example_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    streaming: bool = False,
) -> dict[str, Any]:
    def draw(rows: int) -> Tensor:
        return (torch.randn(rows, *event, generator=generator) * 1.5 + 3 * torch.randn(event, generator=generator)).to(device)

    before = moments_reference(draw(7)) if streaming else None
    return {"features": draw(rows).to(dtype), "state": before}


def _bytes_moved(inputs: dict[str, Any], mode: str) -> int:
    # forward: features -> co-moment; backward: features, mean, its gradient -> gradient
    features = inputs["features"]
    square = 8 * features.shape[1] ** 2
    return features.nbytes + square + (0 if mode == "fwd" else 2 * features.nbytes + square)


def _operations(inputs: dict[str, Any], mode: str) -> int:
    # forward: the lower triangle of a product; backward: a whole one
    samples, width = inputs["features"].shape
    return samples * width**2 * (1 if mode == "fwd" else 3)


SPEC = OpSpec(
    name="moments",
    function=moments,
    reference=moments_reference,
    outputs={"count": "exact", "mean": "reduction", "comoment": "accumulation"},
    gradients=("features",),
    example_inputs=_example_inputs,
    flags={"streaming": (False, True)},
    event_ranks=(1,),
    sizes=(0, 1, 2, 3, 5, 16, 17, 33, 48, 65, 127, 210),
    shapes=((64, (64,)), (512, (512,)), (8192, (2048,))),
    bytes_moved=_bytes_moved,
    operations=_operations,
    gradient_precision="reduction",
    samplewise=False,
)
