// affine_coupling: y = x * scale + shift or its inverse, and the log-determinant per row. fastgen/ops/affine_coupling.py has
// the mathematics.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

enum Bound { UNBOUNDED, TANH, SIGMOID };

// What a raw log-scale stands for: the logarithm of the scale, what to multiply with (the scale or, for the inverse, its
// reciprocal), and the derivative of the logarithm with respect to the raw value.
struct CouplingScale {
  vf log, factor, slope;
};

template <Bound B, bool Inverse>
INLINE CouplingScale coupling_scale(vf raw) {
  if constexpr (B == UNBOUNDED) return {raw, exp(Inverse ? -raw : raw), splat(1.0f)};
  if constexpr (B == TANH) {
    const vf m = expm1(-2.0f * abs(raw)), quotient = 1.0f / (2.0f + m);
    const vf log = copy_sign(m * quotient, raw);
    // 1 - tanh^2 without its cancellation
    return {log, exp(Inverse ? -log : log), 4.0f * (1.0f + m) * (quotient * quotient)};
  }
  const vf t = raw + 2.0f;
  const auto below = t < 0.0f;
  // e^-|t|, where the rounding of t does not enter
  const vf e = exp(below ? raw : -raw) * (below ? splat(7.38905610f) : splat(0.135335283f));
  const vf all = 1.0f + e, large = 1.0f / all, small = e * large;
  const vf factor = Inverse ? (below ? all / e : all) : (below ? small : large);
  return {(below ? t : splat(0.0f)) - log1p(e), factor, below ? large : small};
}

// The raw value whose log-scale is 0, for lanes beyond a row.
template <Bound B>
constexpr float NEUTRAL = B == SIGMOID ? INFINITY : 0.0f;

template <class T, Bound B, bool Inverse>
INLINE void affine_coupling_fwd_as(int64_t rows, int64_t event, const T* x, const T* shift, const T* log_scale, T* y,
                                   float* log_det, int64_t threads) {
  const Tiling tiling(rows, event);
  RowSums sums(tiling, log_det);
  const float sign = Inverse ? -1.0f : 1.0f;
  const bool stream = streamable(y, rows, event);
  tiling.run(threads, [&](const Tile& tile) {
    const int64_t offset = tile.row * event + tile.begin;
    const auto map = [&](int64_t i, int64_t n) {
      const vf v = block_load(x + i, n), b = block_load(shift + i, n);
      const CouplingScale scale = coupling_scale<B, Inverse>(block_load(log_scale + i, n, NEUTRAL<B>));
      block_store(y + i, Inverse ? (v - b) * scale.factor : fma(v, scale.factor, b), n, stream);
      return scale.log;
    };
    if (event < LANES) {  // rows shorter than a vector: all of them at once, their sums from memory
      float logs[TILE];
      for_blocks(tile.rows * event, [&](int64_t i, int64_t n) { block_store(logs + i, map(offset + i, n), n); });
      for (int64_t r = 0; r < tile.rows; ++r) {
        float total = 0;
        for (int64_t i = 0; i < event; ++i) total += logs[r * event + i];
        sums.put(tile, r, sign * total);
      }
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = offset + r * event;
      vf total{};
      for_blocks(tile.count, [&](int64_t i, int64_t n) { total = total + map(base + i, n); });
      sums.put(tile, r, sign * sum(total));
    }
    if (stream) drain_stores();
  });
  sums.finish();
}

// grad_y or grad_log_det may be null: no gradient came from that output. The gradient of shift is grad_y itself and not
// written; the inverse has a grad_shift.
template <class T, Bound B, bool Inverse>
INLINE void affine_coupling_bwd_as(int64_t rows, int64_t event, const T* x, const T* shift, const T* log_scale,
                                   const T* grad_y, const float* grad_log_det, T* grad_x, T* grad_shift,
                                   T* grad_log_scale, int64_t threads) {
  const Tiling tiling(rows, event);
  const bool stream = streamable(grad_x, rows, event) && streamable(grad_log_scale, rows, event) &&
                      (!Inverse || streamable(grad_shift, rows, event));
  tiling.run(threads, [&](const Tile& tile) {
    const int64_t offset = tile.row * event + tile.begin;
    const auto map = [&](int64_t i, int64_t n, vf by_log) {
      const CouplingScale scale = coupling_scale<B, Inverse>(block_load(log_scale + i, n));
      vf by_x{};
      if (grad_y) {
        by_x = block_load(grad_y + i, n) * scale.factor;
        const vf v = block_load(x + i, n);
        by_log = fma(by_x, Inverse ? v - block_load(shift + i, n) : v, by_log);
      }
      block_store(grad_x + i, by_x, n, stream);
      if (Inverse) block_store(grad_shift + i, -by_x, n, stream);
      block_store(grad_log_scale + i, (Inverse ? -by_log : by_log) * scale.slope, n, stream);
    };
    if (event < LANES) {
      float spread[TILE];
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t i = 0; i < event; ++i) spread[r * event + i] = grad_log_det ? grad_log_det[tile.row + r] : 0.0f;
      for_blocks(tile.rows * event, [&](int64_t i, int64_t n) { map(offset + i, n, block_load(spread + i, n)); });
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = offset + r * event;
      const vf by_log_det = splat(grad_log_det ? grad_log_det[tile.row + r] : 0.0f);
      for_blocks(tile.count, [&](int64_t i, int64_t n) { map(base + i, n, by_log_det); });
    }
    if (stream) drain_stores();
  });
}

// body(Choice<B, Inverse>) for values known at run time.
template <Bound B, bool I>
struct Choice {
  static constexpr Bound bound = B;
  static constexpr bool inverse = I;
};
template <class Body>
INLINE void with_bound(int64_t bound, bool inverse, Body&& body) {
  if (bound == UNBOUNDED) inverse ? body(Choice<UNBOUNDED, true>{}) : body(Choice<UNBOUNDED, false>{});
  else if (bound == TANH) inverse ? body(Choice<TANH, true>{}) : body(Choice<TANH, false>{});
  else inverse ? body(Choice<SIGMOID, true>{}) : body(Choice<SIGMOID, false>{});
}

inline void affine_coupling_fwd(int64_t dtype, int64_t rows, int64_t event, const void* x, const void* shift,
                                const void* log_scale, void* y, float* log_det, int64_t bound, int64_t inverse,
                                int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_bound(bound, inverse, [&](auto choice) {
      using C = decltype(choice);
      affine_coupling_fwd_as<T, C::bound, C::inverse>(rows, event, (const T*)x, (const T*)shift, (const T*)log_scale, (T*)y,
                                            log_det, threads);
    });
  };
  with_dtype(dtype, run);
}

inline void affine_coupling_bwd(int64_t dtype, int64_t rows, int64_t event, const void* x, const void* shift,
                                const void* log_scale, const void* grad_y, const float* grad_log_det, void* grad_x,
                                void* grad_shift, void* grad_log_scale, int64_t bound, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_bound(bound, grad_shift != nullptr, [&](auto choice) {
      using C = decltype(choice);
      affine_coupling_bwd_as<T, C::bound, C::inverse>(rows, event, (const T*)x, (const T*)shift, (const T*)log_scale,
                                            (const T*)grad_y, grad_log_det, (T*)grad_x, (T*)grad_shift,
                                            (T*)grad_log_scale, threads);
    });
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(affine_coupling, KERNEL(affine_coupling_fwd), KERNEL(affine_coupling_bwd))

FASTGEN_END
