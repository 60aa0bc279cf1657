"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.denoise import Denoised, denoise
from fastgen.ops.dynamic_threshold import dynamic_threshold
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.uniform import uniform

__all__ = [
    "Denoised",
    "OpSpec",
    "Reparameterized",
    "all_specs",
    "denoise",
    "dynamic_threshold",
    "explain",
    "get_spec",
    "info",
    "normal",
    "reparameterize",
    "uniform",
    "use_backend",
    "use_math",
]
