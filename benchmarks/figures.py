"""The published figures: what is compared with what, and how far ahead fastgen means to be. Data only."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.workload import Workload

__all__ = ["FIGURES", "Figure"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table of figures.

    Attributes:
        work: what is done, in words.
        op, rows, event, mode, flags, dtype: the workload that does it; ``op`` may be a composite.
        against: names of providers (peers, "reference", "compile"); with several, the fastest counts. Empty: a time.
        target: how many times faster than ``against``; microseconds if ``against`` is empty. None: it explains another row.
        floor: below which (above which, for a time) the figure is not reached; None: the target.
    """

    work: str
    op: str
    rows: int
    event: tuple[int, ...]
    against: tuple[str, ...]
    target: float | None
    floor: float | None = None
    mode: str = "fwd"
    flags: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"

    @property
    def workload(self) -> Workload:
        return Workload(self.op, self.rows, self.event, self.mode, self.flags, self.dtype)


_RANDN = ("torch.randn",)
_GENERATORS = ("diffusers randn_tensor, one generator a sample",)
_EAGER, _COMPILED = ("eager PyTorch",), ("torch.compile of it",)
_NOTHING = ("an autograd function that computes nothing",)
_REFERENCE = ("reference",)
_ONEDNN = ("oneDNN, weight laid out beforehand",)
_GROUP_NORM = ("group_norm_silu", 8, (256, 32, 32), _EAGER + _COMPILED)
_LAST = (("channels_last", True),)
_TANH = (("bound", "tanh"),)
_PERCEPTRON = (("hidden", (128, 128)), ("outputs", (32, 32)))
_COUPLING = (("hidden", (64, 64)),)
_FUSED_ATTENTION, _HEADS = ("F.scaled_dot_product_attention",), (("heads", 8), ("width", 8))
_IMAGES = (3, 32, 32)
_DDPM = (("history", 0), ("clamp", 1.0))
_DDIM = (("history", 0), ("deterministic", True))
_DPM = (("deterministic", True),)
_SPLINES, _COMPILED_SPLINE = ("zuko", "nflows"), ("torch.compile of zuko's",)

# fmt: off
FIGURES = (
    Figure("normal, 2^22, exact", "normal", 1024, (4096,), _RANDN, 4),
    Figure("normal, 2^22, fast", "normal", 1024, (4096,), _RANDN, 7, flags=(("math", "fast"),)),
    Figure("normal 64x3x32x32, a seed per sample", "normal", 64, (3, 32, 32), _GENERATORS, 5, flags=(("per_sample", True),)),
    Figure("reparameterize 512x256, forward + backward", "reparameterize", 512, (256,), _EAGER, 6, mode="fwdbwd"),
    Figure("reparameterize 64x16, forward + backward", "reparameterize", 64, (16,), _EAGER, 3, mode="fwdbwd"),
    Figure("reparameterize 512x256, forward + backward", "reparameterize", 512, (256,), _NOTHING, None, mode="fwdbwd"),
    Figure("reparameterize 64x16, forward + backward", "reparameterize", 64, (16,), _NOTHING, None, mode="fwdbwd"),
    Figure("reparameterize 512x256, forward + backward", "reparameterize", 512, (256,), _COMPILED, 3, mode="fwdbwd"),
    Figure("reparameterize 4x16, no gradients", "reparameterize", 4, (16,), (), 10),
    Figure("diffuse 64x3x32x32", "diffuse", 64, _IMAGES, ("diffusers add_noise + randn_like",), 7, 4),
    Figure(
        "diffuse + diffusion_loss + gradient 64x3x32x32", "diffusion_objective", 64, _IMAGES,
        ("diffusers add_noise + F.mse_loss",), 5, 3, mode="fwdbwd",
    ),
    Figure(
        "the same, the noise drawn again and never stored", "diffusion_objective", 64, _IMAGES,
        ("diffusers add_noise + F.mse_loss",), 5, 3, mode="fwdbwd", flags=(("kept", False),),
    ),
    Figure("denoise 64x3x32x32, DDPM", "denoise", 64, _IMAGES, ("diffusers DDPMScheduler.step",), 10, 6, flags=_DDPM),
    Figure("denoise 1x3x32x32, DDPM", "denoise", 1, _IMAGES, ("diffusers DDPMScheduler.step",), 5, 3, flags=_DDPM),
    Figure("denoise 64x3x32x32, DDPM", "denoise", 64, _IMAGES, _COMPILED, 30, 20, flags=_DDPM),
    Figure("denoise 64x3x32x32, DDIM", "denoise", 64, _IMAGES, ("diffusers DDIMScheduler.step",), 4, 3, flags=_DDIM),
    Figure(
        "denoise 64x3x32x32, DPM-Solver++ 2M", "denoise", 64, _IMAGES, ("diffusers DPMSolverMultistepScheduler.step",), 8, 4,
        flags=_DPM,
    ),
    Figure(
        "dynamic_threshold 64x12288", "dynamic_threshold", 64, (3, 64, 64), ("torch.quantile, clamp, divide",), 15, 10
    ),
    Figure("affine_coupling 4096x512", "affine_coupling", 4096, (512,), _EAGER, 4, 2.5),
    Figure("affine_coupling 4096x512, forward + backward", "affine_coupling", 4096, (512,), _EAGER, 4, 2.5, mode="fwdbwd"),
    Figure("affine_coupling 4096x512, tanh", "affine_coupling", 4096, (512,), _EAGER, 4, 2.5, flags=_TANH),
    Figure(
        "affine_coupling 4096x512, tanh, forward + backward", "affine_coupling", 4096, (512,), _EAGER, 4, 2.5, mode="fwdbwd",
        flags=_TANH,
    ),
    Figure("affine_coupling 4096x512", "affine_coupling", 4096, (512,), _COMPILED, 1.3, 1.0),
    Figure("affine_coupling 4096x512, forward + backward", "affine_coupling", 4096, (512,), _COMPILED, 1.3, 1.0, mode="fwdbwd"),
    Figure("lu_linear 16x48x16x16", "lu_linear", 16, (48, 16, 16), _EAGER, 1.5, 1.0),
    Figure("lu_linear 16x48x16x16, forward + backward", "lu_linear", 16, (48, 16, 16), _EAGER, 1.5, 1.0, mode="fwdbwd"),
    Figure("perceptron 4096x32, hidden 128-128", "perceptron", 4096, (32,), _EAGER, 1.3, 1.0, flags=_PERCEPTRON),
    Figure(
        "perceptron 4096x32, hidden 128-128, forward + backward", "perceptron", 4096, (32,), _EAGER, 1.6, 1.2, mode="fwdbwd",
        flags=_PERCEPTRON,
    ),
    Figure(
        "perceptron_coupling 16384x64, hidden 64-64", "perceptron_coupling", 16384, (64,), _EAGER, 1.5, 1.0, flags=_COUPLING,
    ),
    Figure(
        "perceptron_coupling 16384x64, hidden 64-64, forward + backward", "perceptron_coupling", 16384, (64,), _EAGER, 1.5, 1.0,
        mode="fwdbwd", flags=_COUPLING,
    ),
    Figure("attention 64x196, 8 heads of 8", "attention", 64, (196,), _FUSED_ATTENTION, 1.8, 1.3, flags=_HEADS),
    Figure(
        "attention 64x196, 8 heads of 8, forward + backward", "attention", 64, (196,), _FUSED_ATTENTION, 1.6, 1.2,
        mode="fwdbwd", flags=_HEADS,
    ),
    Figure("rq_spline 4096x32, 8 bins", "rq_spline", 4096, (32,), _SPLINES, 30, 20),
    Figure("rq_spline 4096x32, 8 bins, forward + backward", "rq_spline", 4096, (32,), _SPLINES, 20, 10, mode="fwdbwd"),
    Figure("rq_spline 4096x32, 8 bins", "rq_spline", 4096, (32,), _COMPILED_SPLINE, 6, 4),
    Figure("rq_spline 4096x32, 8 bins, forward + backward", "rq_spline", 4096, (32,), _COMPILED_SPLINE, 4, 3, mode="fwdbwd"),
    Figure(
        "trace_sqrt_product 2048, float64", "trace_sqrt_product", 1, (2048,), ("torchmetrics' way, eigvals",), 4.3, 3.5,
        dtype="float64",
    ),
    Figure(
        "trace_sqrt_product 2048, float64", "trace_sqrt_product", 1, (2048,), ("scipy sqrtm",), 20, 15, dtype="float64"
    ),
    Figure("nearest_code 16384x64, 1024 codes", "nearest_code", 16384, (64,), ("torch.cdist + argmin",), 5, 4),
    Figure("codebook step 8192x32, 8192 codes", "codebook_step", 8192, (32,), ("vector-quantize-pytorch",), 25, 10),
    Figure(
        "moments 8192x2048, added to a state", "moments", 8192, (2048,), ("torchmetrics' update, float64",), 3, 1.8,
        flags=(("streaming", True),),
    ),
    Figure("upfirdn2d up 2, 4x64x64x64", "upfirdn2d", 4, (64, 64, 64), _REFERENCE, 8, 4),
    Figure("upfirdn2d up 2, 4x64x64x64, forward + backward", "upfirdn2d", 4, (64, 64, 64), _REFERENCE, 8, 4, mode="fwdbwd"),
    Figure("upfirdn2d up 2, 4x64x64x64, channels last", "upfirdn2d", 4, (64, 64, 64), _REFERENCE, 8, 4, flags=_LAST),
    Figure("upfirdn2d up 2, 4x64x64x64", "upfirdn2d", 4, (64, 64, 64), ("depthwise conv_transpose2d",), 8, 4),
    Figure("3x3 convolution 8x128x32x32", "ready_conv2d", 8, (128, 32, 32), _ONEDNN, 2),
    Figure("3x3 convolution 8x256x16x16", "ready_conv2d", 8, (256, 16, 16), _ONEDNN, 2),
    Figure("3x3 convolution 64x32x28x28", "ready_conv2d", 64, (32, 28, 28), _ONEDNN, 1.5),
    Figure("bias_act lrelu 4x64x64x64", "bias_act", 4, (64, 64, 64), _EAGER, 2.5),
    Figure("bias_act lrelu 4x64x64x64, forward + backward", "bias_act", 4, (64, 64, 64), _EAGER, 2.5, mode="fwdbwd"),
    Figure("bias_act lrelu 4x64x64x64", "bias_act", 4, (64, 64, 64), _COMPILED, 1.0),
    Figure(
        "group_norm_silu 8x256x16x16, bfloat16, channels last",
        "group_norm_silu",
        8,
        (256, 16, 16),
        _EAGER,
        10,
        6,
        flags=_LAST,
        dtype="bfloat16",
    ),
    Figure("group_norm_silu 8x256x32x32", *_GROUP_NORM, 3, 1.8),
    Figure("group_norm_silu 8x256x32x32, channels last", *_GROUP_NORM, 3, 1.8, flags=_LAST),
    Figure("group_norm_silu 8x256x32x32, forward + backward", *_GROUP_NORM, 3, 1.8, mode="fwdbwd"),
    Figure("group_norm_silu 8x256x32x32, channels last, forward + backward", *_GROUP_NORM, 3, 1.8, mode="fwdbwd", flags=_LAST),
)
# fmt: on
