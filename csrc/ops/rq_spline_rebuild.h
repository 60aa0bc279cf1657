// rq_spline_rebuild: the input of rq_spline from its output, and the gradients there, in one pass: the bin is found once.
// fastgen/ops/rq_spline_rebuild.py has the mathematics.
#pragma once
#include "rq_spline.h"

FASTGEN_BEGIN

inline void rq_spline_rebuild(int64_t dtype, int64_t rows, int64_t event, int64_t bins, const void* y, const void* widths,
                              const void* heights, const void* derivatives, const void* grad_y, const float* grad_log_det,
                              void* x, void* grad_x, void* grad_widths, void* grad_heights, void* grad_derivatives,
                              double bound, int64_t zuko, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    rq_spline_bwd_as<T>(rows, event, Spline{bins, (float)bound, true},
                        zuko ? spline_backward<true, true>(bins) : spline_backward<false, true>(bins), (const T*)y,
                        (const T*)widths, (const T*)heights, (const T*)derivatives, (const T*)grad_y, grad_log_det, (T*)x,
                        (T*)grad_x, (T*)grad_widths, (T*)grad_heights, (T*)grad_derivatives, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(rq_spline_rebuild, KERNEL(rq_spline_rebuild))

FASTGEN_END
