// affine_coupling: y = x * scale + shift or its inverse, and the log-determinant per row. fastgen/ops/affine_coupling.py has
// the mathematics.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

enum Bound { UNBOUNDED, TANH, SIGMOID };

// What a raw log-scale stands for: the logarithm of the scale, what to multiply with (the scale or, for the inverse, its
// reciprocal), and the derivative of the logarithm with respect to the raw value; of V vectors.
template <int V>
struct CouplingScale {
  vf log[V], factor[V], slope[V];
};

template <Bound B, bool Inverse, int V>
INLINE CouplingScale<V> coupling_scale(const vf* raw) {
  CouplingScale<V> out;
  if constexpr (B == SIGMOID) {
    for (int k = 0; k < V; ++k) {
      const vf t = raw[k] + 2.0f;
      const auto below = t < 0.0f;
      // e^-|t|, where the rounding of t does not enter
      const vf e = exp(below ? raw[k] : -raw[k]) * (below ? splat(7.38905610f) : splat(0.135335283f));
      const vf all = 1.0f + e, large = 1.0f / all, small = e * large;
      out.log[k] = (below ? t : splat(0.0f)) - log1p(e);
      out.factor[k] = Inverse ? (below ? all / e : all) : (below ? small : large);
      out.slope[k] = below ? large : small;
    }
    return out;
  }
  if constexpr (B == TANH) tanh_and_slope<V>(raw, out.log, out.slope);
  else
    for (int k = 0; k < V; ++k) out.log[k] = raw[k], out.slope[k] = splat(1.0f);
  vf power[V];
  for (int k = 0; k < V; ++k) power[k] = Inverse ? -out.log[k] : out.log[k];
  if constexpr (B == TANH) exp_bounded<V>(power, out.factor);
  else exp<V>(power, out.factor);
  return out;
}

// The raw value whose log-scale is 0, for lanes beyond a row.
template <Bound B>
constexpr float NEUTRAL = B == SIGMOID ? INFINITY : 0.0f;

// Vectors side by side: enough for the arithmetic of one to go on while another waits, and runs of stores to one place.
constexpr int SPAN = 4;
template <int V>
struct Width {
  static constexpr int value = V;
};

template <class T, Bound B, bool Inverse>
INLINE void affine_coupling_fwd_as(int64_t rows, int64_t event, const T* x, const T* shift, const T* log_scale, T* y,
                                   float* log_det, int64_t threads) {
  const Tiling tiling(rows, event);
  RowSums sums(tiling, log_det);
  const float sign = Inverse ? -1.0f : 1.0f;
  const auto moved_by = [](vf v, vf b, vf factor) INLINED { return Inverse ? (v - b) * factor : fma(v, factor, b); };
  const bool stream = streamable(y, rows, event);
  tiling.run(threads, [&](const Tile& tile) {
    const int64_t offset = tile.row * event + tile.begin;
    const auto map = [&](int64_t i, int64_t n) {
      const vf raw = block_load(log_scale + i, n, NEUTRAL<B>);
      const auto scale = coupling_scale<B, Inverse, 1>(&raw);
      block_store(y + i, moved_by(block_load(x + i, n), block_load(shift + i, n), *scale.factor), n, stream);
      return *scale.log;
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
      vf totals[SPAN] = {};
      int64_t i = 0;
      for (; i + SPAN * LANES <= tile.count; i += SPAN * LANES) {
        const int64_t at = base + i;
        vf raw[SPAN], moved[SPAN];
        for (int k = 0; k < SPAN; ++k) {
          raw[k] = load_float(log_scale + at + k * LANES);
          if (stream) fetch_ahead(log_scale + at + k * LANES), fetch_ahead(x + at + k * LANES), fetch_ahead(shift + at + k * LANES);
        }
        const auto scale = coupling_scale<B, Inverse, SPAN>(raw);
        for (int k = 0; k < SPAN; ++k) {
          moved[k] = moved_by(load_float(x + at + k * LANES), load_float(shift + at + k * LANES), scale.factor[k]);
          totals[k] = totals[k] + scale.log[k];
        }
        for (int k = 0; k < SPAN; ++k) block_store(y + at + k * LANES, moved[k], LANES, stream);
      }
      for_blocks(i, tile.count, [&](int64_t j, int64_t n) { totals[0] = totals[0] + map(base + j, n); });
      sums.put(tile, r, sign * sum((totals[0] + totals[1]) + (totals[2] + totals[3])));
    }
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
    // writes the gradients of V vectors of n elements
    const auto differentiate = [&](auto width, int64_t i, int64_t n, vf by_log_det) INLINED {
      constexpr int V = decltype(width)::value;
      vf raw[V], by_x[V] = {}, by_log[V];
      for (int k = 0; k < V; ++k) raw[k] = block_load(log_scale + i + k * LANES, n), by_log[k] = by_log_det;
      const auto scale = coupling_scale<B, Inverse, V>(raw);
      for (int k = 0; grad_y && k < V; ++k) {
        by_x[k] = block_load(grad_y + i + k * LANES, n) * scale.factor[k];
        const vf v = block_load(x + i + k * LANES, n);
        by_log[k] = fma(by_x[k], Inverse ? v - block_load(shift + i + k * LANES, n) : v, by_log[k]);
      }
      for (int k = 0; k < V; ++k) block_store(grad_x + i + k * LANES, by_x[k], n, stream);
      for (int k = 0; Inverse && k < V; ++k) block_store(grad_shift + i + k * LANES, -by_x[k], n, stream);
      for (int k = 0; k < V; ++k)
        block_store(grad_log_scale + i + k * LANES, (Inverse ? -by_log[k] : by_log[k]) * scale.slope[k], n, stream);
    };
    const auto map = [&](int64_t i, int64_t n, vf by_log_det) { differentiate(Width<1>{}, i, n, by_log_det); };
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
      int64_t i = 0;
      for (; i + SPAN * LANES <= tile.count; i += SPAN * LANES) {
        for (int k = 0; stream && k < SPAN; ++k) {
          const int64_t at = base + i + k * LANES;
          fetch_ahead(log_scale + at), fetch_ahead(x + at), fetch_ahead(grad_y + at);
        }
        differentiate(Width<SPAN>{}, base + i, LANES, by_log_det);
      }
      for_blocks(i, tile.count, [&](int64_t j, int64_t n) { map(base + j, n, by_log_det); });
    }
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
