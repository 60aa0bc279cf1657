"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.moments import Moments, merge_moments, moments
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.uniform import uniform

__all__ = [
    "Moments",
    "OpSpec",
    "Reparameterized",
    "all_specs",
    "explain",
    "get_spec",
    "info",
    "merge_moments",
    "moments",
    "normal",
    "reparameterize",
    "uniform",
    "use_backend",
    "use_math",
]
