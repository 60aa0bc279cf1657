// dynamic_threshold: clamp and rescale a sample by a quantile of its magnitudes. fastgen/ops/dynamic_threshold.py has the
// mathematics.
#pragma once
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

INLINE vf magnitude(vf x) { return bits<vf>(bits<vu>(x) & 0x7FFFFFFFu); }

// The element of rank `index` in a sorted copy of the n <= 32 floats at `step` apart: the pivot of a round.
inline float ranked_sample(const float* v, int64_t n, int64_t step, int64_t index) {
  float sorted[32];
  for (int64_t i = 0; i < n; ++i) {
    const float x = v[i * step];
    int64_t j = i;
    for (; j > 0 && sorted[j - 1] > x; --j) sorted[j] = sorted[j - 1];
    sorted[j] = x;
  }
  return sorted[index];
}

// The element of rank k (from 0) of n nonnegative floats without NaN, by quickselect; overwrites v, which has room for LANES
// more. Pivots are drawn from evenly spaced elements; after a few rounds bisection of the bits takes over, whose number of
// rounds is bounded.
inline float select_rank(float* v, int64_t n, int64_t k) {
  uint32_t low = 0, high = 0x7F800000u;  // bits between which the answer lies
  for (int64_t round = 0;; ++round) {
    const int64_t samples = min(n, 32), step = n / samples;
    const float pivot = round < 16 ? ranked_sample(v, samples, step, k * samples / n) : bits<float>(low + (high - low) / 2);
    const vf p = splat(pivot);
    vi below{}, upto{};
    for_blocks(n, [&](int64_t i, int64_t count) {
      const vf x = block_load(v + i, count, NAN);
      below = below + (x < p ? splat_i(1) : splat_i(0));
      upto = upto + (x <= p ? splat_i(1) : splat_i(0));
    });
    const int64_t less = sum(below), not_more = sum(upto);
    if (k >= less && k < not_more) return pivot;
    const bool up = k >= not_more;
    int64_t kept = 0;
    for_blocks(n, [&](int64_t i, int64_t count) {
      const vf x = block_load(v + i, count, NAN);
      kept += compress_store(v + kept, x, up ? x > p : x < p);
    });
    if (up) k -= not_more, low = bits<uint32_t>(pivot) + 1;
    else high = bits<uint32_t>(pivot) - 1;
    n = kept;
  }
}

// clamp(quantile of |x|, 1, maximum) of one row; `v` has room for event + LANES floats. Only magnitudes of 1 and more
// matter, since the quantile is not let below 1.
template <class T>
INLINE float threshold_of_row(const T* x, int64_t event, float quantile, float maximum, float* v) {
  int64_t n = 0;
  vi odd{};
  for_blocks(event, [&](int64_t i, int64_t count) {
    const vf a = magnitude(block_load(x + i, count));
    odd = odd | (a != a ? splat_i(1) : splat_i(0));
    n += compress_store(v + n, a, a >= 1.0f);
  });
  if (sum(odd)) return NAN;
  const float rank = quantile * (float)(event - 1);  // as torch.quantile: in float32
  const int64_t first = min((int64_t)rank, event - 1), second = min((int64_t)__builtin_ceilf(rank), event - 1);
  const int64_t small = event - n;  // so many are below 1
  if (second < small) return 1.0f;
  // with only the second of the two ranks among them, the first is still needed: select among all
  if (first < small) {
    n = event;
    for_blocks(event, [&](int64_t i, int64_t count) { block_store(v + i, magnitude(block_load(x + i, count)), count); });
  }
  const float a = select_rank(v, n, first - (event - n));
  float b = a;
  if (second > first) {  // the next larger one, unless `a` stands at that rank too
    vf above = splat(INFINITY);
    vi upto{};
    const vf p = splat(a);
    for_blocks(event, [&](int64_t i, int64_t count) {
      const vf m = magnitude(block_load(x + i, count, INFINITY));
      above = (m > p) & (m < above) ? m : above;
      upto = upto + (m <= p ? splat_i(1) : splat_i(0));
    });
    if (sum(upto) <= second) b = minimum(above);
  }
  if (b == INFINITY) return maximum;  // not the NaN of an infinity interpolated
  const float weight = rank - (float)first;
  const float s = weight < 0.5f ? __builtin_fmaf(weight, b - a, a) : __builtin_fmaf(weight - 1.0f, b - a, b);
  return s < 1.0f ? 1.0f : s > maximum ? maximum : s;
}

// Rows to a task: a few thousand elements.
INLINE int64_t rows_of_task(int64_t event) { return max(1, 8192 / max(1, event)); }

template <class T>
INLINE void dynamic_threshold_fwd_as(int64_t rows, int64_t event, const T* x, float quantile, float maximum, T* y,
                                     float* threshold, int64_t threads) {
  const int64_t group = rows_of_task(event);
  parallel_for(ceil_div(rows, group), rows * event < SERIAL ? 1 : threads, [&](int64_t task) {
    float* v = new float[event + LANES];
    for (int64_t r = task * group; r < min(rows, (task + 1) * group); ++r) {
      const float s = threshold_of_row(x + r * event, event, quantile, maximum, v);
      threshold[r] = s;
      const vf high = splat(s), low = splat(-s);
      for_blocks(event, [&](int64_t i, int64_t count) {
        vf a = block_load(x + r * event + i, count);
        a = a < low ? low : a;
        a = a > high ? high : a;
        block_store(y + r * event + i, s == 1.0f ? a : a / high, count);
      });
    }
    delete[] v;
  });
}

template <class T>
INLINE void dynamic_threshold_bwd_as(int64_t rows, int64_t event, const T* x, const float* threshold, const T* grad_y,
                                     T* grad_x, int64_t threads) {
  const Tiling tiling(rows, event);
  tiling.run(threads, [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = (tile.row + r) * event + tile.begin;
      const vf s = splat(threshold[tile.row + r]);
      for_blocks(tile.count, [&](int64_t i, int64_t count) {
        const vf inside = magnitude(block_load(x + base + i, count));
        block_store(grad_x + base + i, inside <= s ? block_load(grad_y + base + i, count) / s : vf{}, count);
      });
    }
  });
}

inline void dynamic_threshold_fwd(int64_t dtype, int64_t rows, int64_t event, const void* x, double quantile,
                                  double maximum, void* y, float* threshold, int64_t threads) {
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    dynamic_threshold_fwd_as<T>(rows, event, (const T*)x, (float)quantile, (float)maximum, (T*)y, threshold, threads);
  });
}

inline void dynamic_threshold_bwd(int64_t dtype, int64_t rows, int64_t event, const void* x, const float* threshold,
                                  const void* grad_y, void* grad_x, int64_t threads) {
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    dynamic_threshold_bwd_as<T>(rows, event, (const T*)x, threshold, (const T*)grad_y, (T*)grad_x, threads);
  });
}

FASTGEN_KERNELS(dynamic_threshold, KERNEL(dynamic_threshold_fwd), KERNEL(dynamic_threshold_bwd))

FASTGEN_END
