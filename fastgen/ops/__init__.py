"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.moments import Moments, merge_moments, moments
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.sqrtm import sqrtm
from fastgen.ops.trace_sqrt_product import (
    CovarianceFactor,
    Polar,
    covariance_factor,
    polar,
    trace_sqrt_product,
    trace_sqrt_product_features,
)
from fastgen.ops.uniform import uniform

__all__ = [
    "CovarianceFactor",
    "Moments",
    "OpSpec",
    "Polar",
    "Reparameterized",
    "all_specs",
    "covariance_factor",
    "explain",
    "get_spec",
    "info",
    "merge_moments",
    "moments",
    "normal",
    "polar",
    "reparameterize",
    "sqrtm",
    "trace_sqrt_product",
    "trace_sqrt_product_features",
    "uniform",
    "use_backend",
    "use_math",
]
