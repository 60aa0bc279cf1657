// diffuse: x_t = a x0 + b noise and target = c x0 + d noise, one row (a, b, c, d) per sample. fastgen/ops/diffuse.py has the
// mathematics.
#pragma once
#include "../noise.h"
#include "../unit.h"

FASTGEN_BEGIN

// The rows of a coefficient table: one for all samples, or one per sample.
struct Rows {
  const float* values;
  int64_t stride;  // 0: one row for all

  INLINE const float* operator[](int64_t sample) const { return values + sample * stride; }
};

// target may be null: it is not wanted.
template <class T>
INLINE void diffuse_fwd_as(int64_t rows, int64_t event, int64_t channels, const T* x0, Rows coefficients, Keys keys,
                           const float* given, T* x_t, T* target, bool fast, int64_t threads) {
  const Strips strips(rows, event, given ? 0 : channels);  // given noise lies as x0 does
  const Ahead ahead = Ahead().add(x0).add(x_t).add(target);
  strips.run(keys, given, fast, coefficients.stride == 0, ahead, threads, [&](const Strip& strip) {
    const float* row = coefficients[strip.row];
    const vf a = splat(row[0]), b = splat(row[1]), c = splat(row[2]), d = splat(row[3]);
    for (int64_t k = 0; k < strip.runs; ++k) {
      const int64_t base = strip.offset + k * strip.stride;
      const float* eps = strip.noise + k * strip.count;
      for_blocks(strip.count, [&](int64_t i, int64_t n) {
        const vf x = block_load(x0 + base + i, n), e = block_load(eps + i, n);
        block_store(x_t + base + i, fma(a, x, b * e), n);
        if (target) block_store(target + base + i, fma(c, x, d * e), n);
      });
    }
  });
}

// grad_x0 = a grad_x_t + c grad_target; either may be null: no gradient came from that output.
template <class T>
INLINE void diffuse_bwd_as(int64_t rows, int64_t event, Rows coefficients, const T* grad_x_t, const T* grad_target, T* grad_x0,
                           int64_t threads) {
  Tiling(rows, event).run(threads, [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = (tile.row + r) * event + tile.begin;
      const float* row = coefficients[tile.row + r];
      const vf a = splat(row[0]), c = splat(row[2]);
      for_blocks(tile.count, [&](int64_t i, int64_t n) {
        vf out{};
        if (grad_x_t) out = a * block_load(grad_x_t + base + i, n);
        if (grad_target) out = fma(c, block_load(grad_target + base + i, n), out);
        block_store(grad_x0 + base + i, out, n);
      });
    }
  });
}

inline void diffuse_fwd(int64_t dtype, int64_t rows, int64_t event, int64_t channels, const void* x0,
                        const float* coefficients, int64_t stride, const int64_t* key, int64_t keys, const float* given,
                        void* x_t, void* target, int64_t fast, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    diffuse_fwd_as<T>(rows, event, channels, (const T*)x0, Rows{coefficients, stride}, Keys{key, keys}, given, (T*)x_t,
                      (T*)target, fast, threads);
  };
  with_dtype(dtype, run);
}

inline void diffuse_bwd(int64_t dtype, int64_t rows, int64_t event, const float* coefficients, int64_t stride,
                        const void* grad_x_t, const void* grad_target, void* grad_x0, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    diffuse_bwd_as<T>(rows, event, Rows{coefficients, stride}, (const T*)grad_x_t, (const T*)grad_target, (T*)grad_x0,
                      threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(diffuse, KERNEL(diffuse_fwd), KERNEL(diffuse_bwd))

FASTGEN_END
