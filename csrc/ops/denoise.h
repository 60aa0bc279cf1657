// denoise: one step of a sampler, driven by one row of coefficients per sample. fastgen/ops/denoise.py has the mathematics.
#pragma once
#include "../math.h"
#include "../random.h"
#include "../unit.h"

FASTGEN_BEGIN

// What a step reads besides x. A row of `coefficients` is (p, q, A, B, S, C_1 .. C_H).
template <class T, class M>
struct DenoiseInputs {
  int64_t rows, event;
  const float* coefficients;
  int64_t coefficient_stride, past;  // 0: one row for all samples; H
  const T* x;
  const M* model_out;  // [rows, event] at `model_stride`; guided: the conditional rows follow after as many others
  int64_t model_stride;
  bool guided;
  const float* guidance;  // one per sample, or null: `scale` for all
  float scale, low, high;

  struct Row {
    float p, q, A, B, S, g;
    const float* C;
    const M *plain, *conditional;
  };
  INLINE bool clamped() const { return low > -INFINITY || high < INFINITY; }
  // Whether neighbouring samples lie end to end and take the same step: a tile of them is then as good as one long row.
  INLINE bool alike() const { return coefficient_stride == 0 && model_stride == event && !guidance; }
  INLINE Row row(int64_t r) const {
    const float* c = coefficients + r * coefficient_stride;
    return {c[0], c[1], c[2], c[3], c[4], guidance ? guidance[r] : scale, c + 5, model_out + r * model_stride,
            model_out + (rows + r) * model_stride};
  }
  // p x + q m of n elements from the i-th of a row, before the clamp; `xs` receives x
  template <bool Guided>
  INLINE vf estimate(const Row& row, int64_t r, int64_t i, int64_t n, vf& xs) const {
    xs = block_load(x + r * event + i, n);
    vf m = block_load(row.plain + i, n);
    if (Guided && guided) m = fma(splat(row.g), block_load(row.conditional + i, n) - m, m);
    return fma(splat(row.p), xs, m * row.q);
  }
};

// Log-variances: `values` as they stand, or, with `bounds`, positions in [-1, 1] between the (low, high) of a row.
template <class M>
struct LogVariance {
  const M* values;
  int64_t stride;
  const float* bounds;
  int64_t bounds_stride;

  INLINE vf sigma(int64_t r, int64_t i, int64_t n) const {
    const vf v = block_load(values + r * stride + i, n);
    if (!bounds) return exp(v * 0.5f);
    const float* b = bounds + r * bounds_stride;
    return exp(fma(v, splat(0.25f * (b[1] - b[0])), splat(0.25f * (b[0] + b[1]))));
  }
};

// The noise of a tile, skipping the rows that take none.
template <class T, class M>
INLINE void denoise_noise(const DenoiseInputs<T, M>& in, const Keys& keys, const Tile& tile, bool fast, float* out,
                          const Ahead& ahead = {}) {
  if (in.coefficient_stride == 0) {
    if (in.row(0).S != 0.0f) draw_tile<Normal>(keys, tile, fast, out, ahead);
    return;
  }
  for (int64_t r = 0; r < tile.rows;) {
    const int64_t first = r;
    while (r < tile.rows && in.row(tile.row + r).S != 0.0f) ++r;
    if (r > first)
      draw_tile<Normal>(keys, Tile{tile.row + first, r - first, tile.begin, tile.count, tile.part}, fast,
                        out + first * tile.count, ahead.from(first * tile.count));
    else ++r;
  }
}

// Rich: with guidance, history or a log-variance; the plain step does not even ask for them.
template <bool Rich, class T, class M>
inline void denoise_fwd_as(const DenoiseInputs<T, M>& in, Keys keys, const float* given, const T* history,
                           const LogVariance<M>& variance, T* x_next, T* x0, bool fast, int64_t threads) {
  const Tiling tiling(in.rows, in.event);
  const vf low = splat(in.low), high = splat(in.high);
  const bool together = in.alike() && (!variance.values || (variance.stride == in.event && !variance.bounds_stride));
  tiling.run(threads, [&](const Tile& tile) {
    TileNoise drawn;
    if (!given) {
      const int64_t offset = tile.row * in.event + tile.begin;
      const M* model = in.model_out + tile.row * in.model_stride + tile.begin;
      denoise_noise(in, keys, tile, fast, drawn.values,
                    Ahead().add(in.x + offset).add(model).add(x_next + offset).add(x0 ? x0 + offset : nullptr));
    }
    const int64_t rows = together ? 1 : tile.rows, count = together ? tile.rows * tile.count : tile.count;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t sample = tile.row + r, base = sample * in.event;
      const auto row = in.row(sample);
      const float* noise = given ? given + base + tile.begin : drawn.values + r * count;
      for_blocks(count, [&](int64_t block, int64_t n) {
        const int64_t i = tile.begin + block;
        vf xs;
        vf clean = in.template estimate<Rich>(row, sample, i, n, xs);
        if (in.clamped()) {  // a NaN passes both comparisons
          clean = clean < low ? low : clean;
          clean = clean > high ? high : clean;
        }
        vf next = fma(splat(row.A), xs, clean * row.B);
        for (int64_t h = 0; Rich && h < in.past; ++h)
          next = fma(splat(row.C[h]), block_load(history + h * in.rows * in.event + base + i, n), next);
        if (row.S != 0.0f) {
          vf z = block_load(noise + block, n) * row.S;
          if (Rich && variance.values) z = z * variance.sigma(sample, i, n);
          next = next + z;
        }
        block_store(x_next + base + i, next, n);
        if (x0) block_store(x0 + base + i, clean, n);
      });
    }
  });
}

// Any of the gradients that come in may be null, and any of those that go out. The noise is `given` or drawn again.
template <class T, class M>
INLINE void denoise_bwd_as(const DenoiseInputs<T, M>& in, Keys keys, const float* given, const LogVariance<M>& variance,
                           const T* grad_next, const T* grad_x0, T* grad_x, M* grad_model, T* grad_history,
                           M* grad_variance, bool fast, int64_t threads) {
  const Tiling tiling(in.rows, in.event);
  const vf low = splat(in.low), high = splat(in.high);
  tiling.run(threads, [&](const Tile& tile) {
    TileNoise drawn;
    if (grad_variance && grad_next && !given) denoise_noise(in, keys, tile, fast, drawn.values);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t sample = tile.row + r, base = sample * in.event;
      const auto row = in.row(sample);
      const float* noise = given ? given + base + tile.begin : drawn.values + r * tile.count;
      for_blocks(tile.count, [&](int64_t block, int64_t n) {
        const int64_t i = tile.begin + block;
        vf xs;
        const vf clean = in.template estimate<true>(row, sample, i, n, xs);
        const vf by_next = grad_next ? block_load(grad_next + base + i, n) : vf{};
        vf by_clean = by_next * row.B;
        if (grad_x0) by_clean = by_clean + block_load(grad_x0 + base + i, n);
        if (in.clamped()) {
          by_clean = clean >= low ? by_clean : vf{};
          by_clean = clean <= high ? by_clean : vf{};
        }
        if (grad_x) block_store(grad_x + base + i, fma(by_clean, splat(row.p), by_next * row.A), n);
        if (grad_model) {
          const vf by_model = by_clean * row.q;
          if (in.guided) {
            block_store(grad_model + base + i, by_model * (1.0f - row.g), n);
            block_store(grad_model + in.rows * in.event + base + i, by_model * row.g, n);
          } else {
            block_store(grad_model + base + i, by_model, n);
          }
        }
        if (grad_history)
          for (int64_t h = 0; h < in.past; ++h)
            block_store(grad_history + h * in.rows * in.event + base + i, by_next * row.C[h], n);
        if (grad_variance) {
          vf out{};
          if (row.S != 0.0f && grad_next) {
            const float* b = variance.bounds ? variance.bounds + sample * variance.bounds_stride : nullptr;
            const float slope = row.S * (b ? 0.25f * (b[1] - b[0]) : 0.5f);
            out = by_next * block_load(noise + block, n) * variance.sigma(sample, i, n) * slope;
          }
          block_store(grad_variance + base + i, out, n);
        }
      });
    }
  });
}

// body(T*, M*): states are of storage type T, what the network gave of M: the same, or narrower than float32 states.
template <class Body>
INLINE void with_two_dtypes(int64_t dtype, int64_t model_dtype, Body&& body) {
  with_dtype(dtype, [&](auto* t) {
    if (sizeof(*t) == sizeof(float)) with_dtype(model_dtype, [&](auto* m) { body(t, m); });
    else body(t, t);
  });
}

inline void denoise_fwd(int64_t dtype, int64_t model_dtype, int64_t rows, int64_t event, const void* x,
                        const void* model_out, int64_t model_stride, const void* history, int64_t past,
                        const float* coefficients, int64_t coefficient_stride, const int64_t* key, int64_t keys,
                        const float* given, int64_t guided, const float* guidance, double scale, double low, double high,
                        const void* log_variance, int64_t variance_stride, const float* bounds, int64_t bounds_stride,
                        void* x_next, void* x0, int64_t fast, int64_t threads) {
  with_two_dtypes(dtype, model_dtype, [&](auto* t, auto* m) {
    using T = typename Pointee<decltype(t)>::type;
    using M = typename Pointee<decltype(m)>::type;
    const DenoiseInputs<T, M> in{rows, event, coefficients, coefficient_stride, past, (const T*)x, (const M*)model_out,
                                 model_stride, guided != 0, guidance, (float)scale, (float)low, (float)high};
    const LogVariance<M> variance{(const M*)log_variance, variance_stride, bounds, bounds_stride};
    const auto run = guided || past || log_variance ? denoise_fwd_as<true, T, M> : denoise_fwd_as<false, T, M>;
    run(in, Keys{key, keys}, given, (const T*)history, variance, (T*)x_next, (T*)x0, fast != 0, threads);
  });
}

inline void denoise_bwd(int64_t dtype, int64_t model_dtype, int64_t rows, int64_t event, const void* x,
                        const void* model_out, int64_t model_stride, const float* coefficients, int64_t coefficient_stride,
                        const int64_t* key, int64_t keys, const float* given, int64_t past, int64_t guided,
                        const float* guidance, double scale, double low, double high, const void* log_variance,
                        int64_t variance_stride, const float* bounds, int64_t bounds_stride, const void* grad_next,
                        const void* grad_x0, void* grad_x, void* grad_model, void* grad_history, void* grad_variance,
                        int64_t fast, int64_t threads) {
  with_two_dtypes(dtype, model_dtype, [&](auto* t, auto* m) {
    using T = typename Pointee<decltype(t)>::type;
    using M = typename Pointee<decltype(m)>::type;
    const DenoiseInputs<T, M> in{rows, event, coefficients, coefficient_stride, past, (const T*)x, (const M*)model_out,
                                 model_stride, guided != 0, guidance, (float)scale, (float)low, (float)high};
    denoise_bwd_as<T, M>(in, Keys{key, keys}, given, {(const M*)log_variance, variance_stride, bounds, bounds_stride},
                         (const T*)grad_next, (const T*)grad_x0, (T*)grad_x, (M*)grad_model, (T*)grad_history,
                         (M*)grad_variance, fast, threads);
  });
}

FASTGEN_KERNELS(denoise, KERNEL(denoise_fwd), KERNEL(denoise_bwd))

FASTGEN_END
