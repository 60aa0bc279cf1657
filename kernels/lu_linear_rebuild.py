"""lu_linear_rebuild in Triton: the kernels of lu_linear, the inverse before the backward pass."""

from fastgen.kernels.lu_linear import lu_linear_bwd, multiply_by, static_cases

__all__ = ["lu_linear_rebuild", "static_cases"]


def lu_linear_rebuild(
    samples, channels, pixels, y, lower, upper, log_diagonal, sign, permutation, grad_y, grad_log_det,
    x, grad_x, grad_lower, grad_upper, grad_log_diagonal,
):  # fmt: skip
    factors = lower, upper, log_diagonal, sign, permutation
    # gradients are taken at the unrounded input, which a narrow storage type does not hold
    found = x if x.element_size() == 4 else y.new_empty(y.shape, dtype=lower.dtype)
    multiply_by(samples, channels, pixels, y, *factors, found, True)
    if found is not x:
        x.copy_(found)
    lu_linear_bwd(
        samples, channels, pixels, found, *factors, grad_y, grad_log_det, grad_x, grad_lower, grad_upper, grad_log_diagonal,
        False,
    )  # fmt: skip
