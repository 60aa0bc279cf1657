// perceptron_coupling_rebuild: the input of perceptron_coupling from its output, and the gradients there, in one pass.
// fastgen/ops/perceptron_coupling_rebuild.py has the mathematics.
#pragma once
#include "affine_coupling_rebuild.h"
#include "perceptron_coupling.h"

FASTGEN_BEGIN

inline void perceptron_coupling_rebuild(int64_t rows, int64_t hidden_layers, const int64_t* widths, int64_t flip,
                                        const float* y, const float* added, const float* parameters, double limit,
                                        const float* grad_y, const float* grad_log_det, float* x, float* grad_x,
                                        float* grad_added, float* grad_parameters, int64_t bound, int64_t threads) {
  const auto differentiate = [&](int64_t row, int64_t count, const Moving& moving) {
    const int64_t moves = widths[hidden_layers + 1];
    with_bound(bound, false, [&](auto choice) {
      affine_coupling_rebuild_as<float, decltype(choice)::bound>(count, moves, moving.x, moving.shift, moving.log_scale,
                                                                 moving.grad_y, grad_log_det + row, moving.y, moving.grad_x,
                                                                 moving.grad_log_scale, 1);
    });
    memcpy(moving.grad_shift, moving.grad_y, count * moves * sizeof(float));
  };
  perceptron_coupling_gradients(rows, hidden_layers, widths, flip, y, added, parameters, limit, nullptr, true, grad_y, x,
                                grad_x, grad_added, grad_parameters, threads, differentiate);
}

FASTGEN_KERNELS(perceptron_coupling_rebuild, KERNEL(perceptron_coupling_rebuild))

FASTGEN_END
