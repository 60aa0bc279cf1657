"""rq_spline_rebuild in Triton: the backward kernel of rq_spline, searching along the heights."""

from fastgen.kernels._static import TYPES
from fastgen.kernels.rq_spline import backward_case, rq_spline_bwd


def rq_spline_rebuild(
    rows, event, bins, y, widths, heights, derivatives, grad_y, grad_log_det, x, grad_x, grad_widths, grad_heights,
    grad_derivatives, bound, zuko,
):  # fmt: skip
    rq_spline_bwd(
        rows, event, bins, y, widths, heights, derivatives, grad_y, grad_log_det, grad_x, grad_widths, grad_heights,
        grad_derivatives, bound, True, zuko, rebuilt=x,
    )  # fmt: skip


def static_cases():
    return [backward_case(dtype, True, rebuild=True) for dtype in TYPES]
