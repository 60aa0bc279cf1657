// lu_linear_rebuild: the input of lu_linear from its output, and the gradients there, in one pass over the pixels.
// fastgen/ops/lu_linear_rebuild.py has the mathematics.
#pragma once
#include "lu_linear.h"

FASTGEN_BEGIN

// A matrix [channels, channels] in float32, transposed or not, with rows of zeros up to whole register blocks.
inline float* padded_matrix(const PixelTiling& tiling, const double* matrix, bool transpose) {
  const int64_t channels = tiling.channels;
  float* out = new float[tiling.padded * channels + 1];
  for (int64_t i = 0; i < tiling.padded; ++i)
    for (int64_t j = 0; j < channels; ++j)
      out[i * channels + j] = i < channels ? (float)matrix[transpose ? j * channels + i : i * channels + j] : 0;
  return out;
}

// Leaves sum dy y^T in `products`, [channels, channels].
template <class T>
INLINE void lu_linear_rebuild_as(int64_t samples, int64_t channels, int64_t pixels, const T* y, const LuFactors& forward,
                                 const LuFactors& inverse, const T* grad_y, T* x, T* grad_x, double* products,
                                 int64_t threads) {
  const PixelTiling tiling(samples, channels, pixels, 256);
  float *const back = padded_matrix(tiling, inverse.matrix, false), *const turned = padded_matrix(tiling, forward.matrix, true);
  const int64_t batch = max(1, ceil_div(tiling.tiles, OUTER_TASKS)), tasks = ceil_div(tiling.tiles, batch);
  const int64_t size = channels * channels;
  double* partial = new double[tasks * size + 1];
  parallel_for(tasks, tiling.worthwhile(threads, 3 * size), [&](int64_t task) {
    const int64_t area = tiling.padded * tiling.pitch;
    float* given = new float[3 * area];
    float *found = given + area, *grad = found + area, *sums = new float[tiling.outer_size()]();
    for (int64_t tile = task * batch; tile < min(tiling.tiles, (task + 1) * batch); ++tile) {
      const int64_t count = tiling.count(tile);
      tiling.read(tile, y, given);
      tiling.read(tile, grad_y, grad);
      tiling.add_outer(grad, given, count, sums);
      tiling.product(back, given, found, count);
      tiling.write(tile, found, x);
      tiling.product(turned, grad, found, count);
      tiling.write(tile, found, grad_x);
    }
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < channels; ++j) partial[task * size + i * channels + j] = tiling.outer(sums, i, j);
    delete[] sums;
    delete[] given;
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < size; ++i) products[i] += partial[task * size + i];
  delete[] partial;
  delete[] turned;
  delete[] back;
}

inline void lu_linear_rebuild(int64_t dtype, int64_t samples, int64_t channels, int64_t pixels, const void* y,
                              const float* lower, const float* upper, const float* log_diagonal, const float* sign,
                              const int64_t* permutation, const void* grad_y, const float* grad_log_det, void* x,
                              void* grad_x, float* grad_lower, float* grad_upper, float* grad_log_diagonal,
                              int64_t threads) {
  const LuFactors forward(channels, lower, upper, log_diagonal, sign, permutation, false);
  const LuFactors inverse(channels, lower, upper, log_diagonal, sign, permutation, true);
  const int64_t size = channels * channels;
  double *const products = new double[2 * size + 1](), *const grad_matrix = products + size;
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    lu_linear_rebuild_as<T>(samples, channels, pixels, (const T*)y, forward, inverse, (const T*)grad_y, (T*)x, (T*)grad_x,
                            products, threads);
  };
  with_dtype(dtype, run);
  // sum dy x^T = (sum dy y^T) W^-T, in float64: the pixels of x are rounded, the sum of those of y is not
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j < channels; ++j)
      for (int64_t k = 0; k < channels; ++k)
        grad_matrix[i * channels + j] += products[i * channels + k] * inverse.matrix[j * channels + k];
  double by_log_det = 0;
  for (int64_t n = 0; n < samples; ++n) by_log_det += grad_log_det[n];
  forward.differentiate(grad_matrix, by_log_det * (double)pixels, false, grad_lower, grad_upper, grad_log_diagonal);
  delete[] products;
}

FASTGEN_KERNELS(lu_linear_rebuild, KERNEL(lu_linear_rebuild))

FASTGEN_END
