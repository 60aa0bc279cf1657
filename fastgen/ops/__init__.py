"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.rq_spline import Splined, rq_spline
from fastgen.ops.uniform import uniform

__all__ = [
    "OpSpec",
    "Reparameterized",
    "Splined",
    "all_specs",
    "explain",
    "get_spec",
    "info",
    "normal",
    "reparameterize",
    "rq_spline",
    "uniform",
    "use_backend",
    "use_math",
]
