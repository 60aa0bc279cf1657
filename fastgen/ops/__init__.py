"""Fused ops: one file each, with the formula, the reference, the kernels' entry and the SPEC."""

from fastgen.ops._dispatch import explain, info, use_backend, use_math
from fastgen.ops._spec import OpSpec, all_specs, get_spec
from fastgen.ops.affine_coupling import Coupled, affine_coupling
from fastgen.ops.affine_coupling_rebuild import RebuiltCoupling, affine_coupling_rebuild
from fastgen.ops.attention import attention, attention_serves
from fastgen.ops.bias_act import bias_act
from fastgen.ops.denoise import Denoised, denoise
from fastgen.ops.diffuse import Diffused, diffuse
from fastgen.ops.diffusion_loss import diffusion_loss
from fastgen.ops.dynamic_threshold import dynamic_threshold
from fastgen.ops.group_norm_silu import group_norm_coefficients, group_norm_silu
from fastgen.ops.lu_linear import lu_linear
from fastgen.ops.lu_linear_rebuild import RebuiltLinear, lu_linear_rebuild
from fastgen.ops.moments import Moments, merge_moments, moments
from fastgen.ops.nearest_code import CodeStatistics, NearestCode, nearest_code
from fastgen.ops.normal import normal
from fastgen.ops.perceptron import perceptron, perceptron_serves
from fastgen.ops.perceptron_coupling import perceptron_coupling
from fastgen.ops.perceptron_coupling_rebuild import perceptron_coupling_rebuild
from fastgen.ops.reparameterize import Reparameterized, reparameterize
from fastgen.ops.rq_spline import Splined, rq_spline
from fastgen.ops.rq_spline_rebuild import RebuiltSpline, rq_spline_rebuild
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
from fastgen.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d
from fastgen.ops.winograd_conv2d import (
    WinogradWeight,
    winograd_conv2d,
    winograd_pairs,
    winograd_serves,
    winograd_tile,
    winograd_weight,
)
from fastgen.ops.winograd_residual import NormedConvolution, winograd_residual

__all__ = [
    "CodeStatistics",
    "Coupled",
    "CovarianceFactor",
    "Denoised",
    "Diffused",
    "Moments",
    "NearestCode",
    "NormedConvolution",
    "OpSpec",
    "Polar",
    "RebuiltCoupling",
    "RebuiltLinear",
    "RebuiltSpline",
    "Reparameterized",
    "Splined",
    "WinogradWeight",
    "affine_coupling",
    "affine_coupling_rebuild",
    "all_specs",
    "attention",
    "attention_serves",
    "bias_act",
    "covariance_factor",
    "denoise",
    "diffuse",
    "diffusion_loss",
    "downsample2d",
    "dynamic_threshold",
    "explain",
    "filter2d",
    "get_spec",
    "group_norm_coefficients",
    "group_norm_silu",
    "info",
    "lu_linear",
    "lu_linear_rebuild",
    "merge_moments",
    "moments",
    "nearest_code",
    "normal",
    "perceptron",
    "perceptron_coupling",
    "perceptron_coupling_rebuild",
    "perceptron_serves",
    "polar",
    "reparameterize",
    "rq_spline",
    "rq_spline_rebuild",
    "setup_filter",
    "sqrtm",
    "trace_sqrt_product",
    "trace_sqrt_product_features",
    "uniform",
    "upfirdn2d",
    "upsample2d",
    "use_backend",
    "use_math",
    "winograd_conv2d",
    "winograd_pairs",
    "winograd_residual",
    "winograd_serves",
    "winograd_tile",
    "winograd_weight",
]
