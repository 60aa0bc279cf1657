"""How far a fused backend may be from the float64 reference: one table, by precision class and storage dtype.

An error is measured as |result - reference| <= relative * |reference| + absolute * max(1, largest |reference|), the second
term for sums whose terms cancel. docs/accuracy.md has the worst errors that were measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = {
    # (class, dtype): (relative, absolute)
    ("exact", torch.float32): (0.0, 0.0),
    ("exact", torch.bfloat16): (0.0, 0.0),
    ("exact", torch.float16): (0.0, 0.0),
    ("fast", torch.float32): (1e-6, 2e-7),
    ("fast", torch.bfloat16): (2.0**-7, 2e-7),
    ("fast", torch.float16): (2.0**-10, 2e-7),
    ("elementwise", torch.float32): (1e-6, 1e-6),
    ("elementwise", torch.bfloat16): (2.0**-8, 1e-6),
    ("elementwise", torch.float16): (2.0**-11, 1e-6),
    ("reduction", torch.float32): (2e-6, 2e-6),
    ("reduction", torch.bfloat16): (2.0**-8, 2e-6),
    ("reduction", torch.float16): (2.0**-11, 2e-6),
    # gradients of two channels' factors have one element each, and where its terms, of 166 together, cancel to 0.25, float32
    # knows it to 1e-5: half a unit in the last place of the terms. PyTorch in float32 is as far off
    ("cancelling", torch.float32): (5e-6, 5e-6),
    ("iterative", torch.float32): (1e-6, 1e-6),
    ("filtering", torch.float32): (5e-6, 5e-6),  # minimal filtering rounds sums of transformed images
    # splines: a knot is known to 1e-7 of the interval, which gradients of log_det amplify by (interval / bin)^2. PyTorch in
    # float32 is as far off: tests/ops/test_rq_spline.py holds the kernels to its errors
    ("conditioned", torch.float32): (5e-4, 5e-4),
    ("conditioned", torch.bfloat16): (2.0**-8 + 5e-4, 5e-4),
    ("conditioned", torch.float16): (2.0**-11 + 5e-4, 5e-4),
    ("exact", torch.float64): (0.0, 0.0),
    ("reduction", torch.float64): (1e-13, 1e-13),
    ("accumulation", torch.float64): (0.0, 5e-7),  # float32 products of 256 rows, summed in float64
    ("iterative", torch.float64): (1e-9, 1e-9),
}


def error(result: Tensor, reference: Tensor, precision: str) -> float:
    """Largest error in units of the bound; infinite where one is finite and the other is not."""
    if not result.dtype.is_floating_point:  # counts and choices are right or wrong
        return 0.0 if torch.equal(result.cpu(), reference.cpu()) else float("inf")
    relative, absolute = BOUNDS[precision, result.dtype]
    result, reference = result.detach().double().cpu(), reference.detach().double().cpu()
    assert result.shape == reference.shape, (result.shape, reference.shape)
    if not reference.numel() or torch.equal(result.nan_to_num(0.5), reference.nan_to_num(0.5)):
        return 0.0
    odd = ~reference.isfinite()
    if not torch.equal(result[odd].nan_to_num(0.5, 7, -7), reference[odd].nan_to_num(0.5, 7, -7)):
        return float("inf")
    result, reference = result[~odd], reference[~odd]
    bound = relative * reference.abs() + absolute * max(1.0, reference.abs().max().item())
    ratio = (result - reference).abs() / bound.clamp_min(1e-300)
    return ratio.nan_to_num(float("inf")).max().item()
