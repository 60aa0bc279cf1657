// diffusion_loss: the weighted mean error of each sample against c x0 + d noise. fastgen/ops/diffusion_loss.py has the
// mathematics.
#pragma once
#include "diffuse.h"
#include "../unit.h"

FASTGEN_BEGIN

// What turns the sum over a sample's elements into its loss: scale, and a weight of its own unless null.
struct Weights {
  const float* values;
  int64_t stride;
  double scale;

  INLINE double operator[](int64_t sample) const { return values ? scale * values[sample * stride] : scale; }
};

// slope, unless null, takes the error (clamped to +-delta for Huber): the gradient up to a factor per sample. It is float32
// whatever T is, so that the gradient is rounded once.
template <bool Huber, class T>
inline void diffusion_loss_fwd_as(int64_t rows, int64_t event, int64_t channels, const T* model_out, const T* x0,
                                  Rows coefficients, Keys keys, const float* given, Weights weights, float delta, float* loss,
                                  float* slope, bool fast, int64_t threads) {
  const Strips strips(rows, event, given ? 0 : channels);
  // a row of several strips leaves one partial sum per strip, added up in order at the end
  double* partial = strips.parts > 1 ? new double[rows * strips.parts] : nullptr;
  const vf high = splat(delta), low = splat(-delta);
  const Ahead ahead = Ahead().add(model_out).add(x0).add(slope);
  strips.run(keys, given, fast, false, ahead, threads, [&](const Strip& strip) {
    const float* row = coefficients[strip.row];
    const vf c = splat(-row[2]), d = splat(-row[3]);
    vf total{};
    for (int64_t k = 0; k < strip.runs; ++k) {
      const int64_t base = strip.offset + k * strip.stride;
      const float* eps = strip.noise + k * strip.count;
      for_blocks(strip.count, [&](int64_t i, int64_t n) {
        // lanes beyond the row hold zeros and add nothing
        const vf m = block_load(model_out + base + i, n), x = block_load(x0 + base + i, n);
        const vf error = fma(c, x, fma(d, block_load(eps + i, n), m));
        vf bounded = error;
        if constexpr (Huber) {
          bounded = error > high ? high : error < low ? low : error;
          total = fma(bounded, fma(bounded, splat(-0.5f), error), total);
        } else {
          total = fma(error, error, total);
        }
        if (slope) block_store(slope + base + i, bounded, n);
      });
    }
    if (partial) partial[strip.row * strips.parts + strip.part] = sum(total);
    else loss[strip.row] = (float)(weights[strip.row] * sum(total));
  });
  if (!partial) return;
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0;
    for (int64_t part = 0; part < strips.parts; ++part) total += partial[row * strips.parts + part];
    loss[row] = (float)(weights[row] * total);
  }
  delete[] partial;
}

// grad_loss may be null: no gradient came; so may grad_x0: it is not wanted. grad_model_out may be the memory of slope.
template <class T>
INLINE void diffusion_loss_bwd_as(int64_t rows, int64_t event, const float* slope, Rows coefficients, Weights weights,
                                  const float* grad_loss, T* grad_model_out, T* grad_x0, int64_t threads) {
  Tiling(rows, event).run(threads, [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r, base = row * event + tile.begin;
      const float factor = grad_loss ? (float)(weights[row] * grad_loss[row]) : 0.0f;
      const vf by_model_out = splat(factor), by_x0 = splat(-coefficients[row][2] * factor);
      for_blocks(tile.count, [&](int64_t i, int64_t n) {
        const vf s = block_load(slope + base + i, n);
        block_store(grad_model_out + base + i, by_model_out * s, n);
        if (grad_x0) block_store(grad_x0 + base + i, by_x0 * s, n);
      });
    }
  });
}

// huber: 0 squares the error; factor: what the means are multiplied by beside the weights. The mean of no elements is NaN.
inline void diffusion_loss_fwd(int64_t dtype, int64_t rows, int64_t event, int64_t channels, const void* model_out,
                               const void* x0, const float* coefficients, int64_t stride, const int64_t* key, int64_t keys,
                               const float* given, const float* weight, int64_t weight_stride, double factor, int64_t huber,
                               double delta, float* loss, float* slope, int64_t fast, int64_t threads) {
  const double scale = event ? factor / (double)event : NAN;
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    const auto as = huber ? diffusion_loss_fwd_as<true, T> : diffusion_loss_fwd_as<false, T>;
    as(rows, event, channels, (const T*)model_out, (const T*)x0, Rows{coefficients, stride}, Keys{key, keys}, given,
       Weights{weight, weight_stride, scale}, (float)delta, loss, slope, fast, threads);
  };
  with_dtype(dtype, run);
}

inline void diffusion_loss_bwd(int64_t dtype, int64_t rows, int64_t event, const float* slope, const float* coefficients,
                               int64_t stride, const float* weight, int64_t weight_stride, double factor, int64_t huber,
                               const float* grad_loss, void* grad_model_out, void* grad_x0, int64_t threads) {
  const double scale = (huber ? factor : 2 * factor) / (double)max(event, 1);
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    diffusion_loss_bwd_as<T>(rows, event, slope, Rows{coefficients, stride}, Weights{weight, weight_stride, scale},
                             grad_loss, (T*)grad_model_out, (T*)grad_x0, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(diffusion_loss, KERNEL(diffusion_loss_fwd), KERNEL(diffusion_loss_bwd))

FASTGEN_END
