"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.affine_coupling import Coupled, affine_coupling
from fastgen.ops.denoise import Denoised, denoise
from fastgen.ops.diffuse import Diffused, diffuse
from fastgen.ops.diffusion_loss import diffusion_loss
from fastgen.ops.dynamic_threshold import dynamic_threshold
from fastgen.ops.lu_linear import lu_linear
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.rq_spline import Splined, rq_spline
from fastgen.ops.uniform import uniform

__all__ = [
    "Coupled",
    "Denoised",
    "Diffused",
    "OpSpec",
    "Reparameterized",
    "Splined",
    "affine_coupling",
    "all_specs",
    "denoise",
    "diffuse",
    "diffusion_loss",
    "dynamic_threshold",
    "explain",
    "get_spec",
    "info",
    "lu_linear",
    "normal",
    "reparameterize",
    "rq_spline",
    "uniform",
    "use_backend",
    "use_math",
]
