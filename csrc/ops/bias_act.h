// bias_act: activation(x + bias) * gain, clamped, its gradient and the gradient of that. fastgen/ops/bias_act.py has the
// mathematics.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

enum Activation { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

struct ActOptions {
  float alpha, gain, clamp;  // clamp is infinite where there is none
  float scale, low;          // ELU: of both sides, and of exp(v) - 1
};

// An activation at v, and its first and second derivative.
struct Jet {
  vf value, slope, curve;
};

// Values that are not asked for cost nothing: the compiler drops them.
template <Activation A>
INLINE Jet activate(vf v, const ActOptions& o) {
  const vf zero{}, one = splat(1.0f);
  // NaN stays NaN in the value, and counts as negative in the slope
  if constexpr (A == RELU) return {at_least(v, 0.0f), v > 0.0f ? one : zero, zero};
  if constexpr (A == LRELU) return {v > 0.0f ? v : v * o.alpha, v > 0.0f ? one : splat(o.alpha), zero};
  if constexpr (A == ELU) {
    const vf e = exp(v) * o.low;
    const auto above = v > 0.0f;
    return {above ? v * o.scale : expm1(v) * o.low, above ? splat(o.scale) : e, v >= 0.0f ? zero : e};  // as PyTorch at 0
  }
  if constexpr (A == TANH) {
    vf t, slope;
    tanh_and_slope<1>(&v, &t, &slope);
    return {t, slope, -2.0f * t * slope};
  }
  // sigmoid and its complement without a subtraction
  const vf e = exp(-abs(v)), large = 1.0f / (1.0f + e), small = e * large;
  const auto below = v < 0.0f;
  const vf s = below ? small : large, rest = below ? large : small, slope = small * large;
  if constexpr (A == SIGMOID) return {s, slope, slope * (rest - s)};
  if constexpr (A == SOFTPLUS) return {softplus(v), s, slope};
  return {v * s, fma(v, slope, s), slope * fma(v, rest - s, splat(2.0f))};
}

// With gain and clamp: where the value is cut off it has no derivatives.
template <Activation A, int Order>
INLINE Jet bias_act_at(vf v, const ActOptions& o) {
  Jet jet = activate<A>(v, o);
  jet.value = jet.value * o.gain;
  jet.slope = jet.slope * o.gain;
  jet.curve = jet.curve * o.gain;
  if (o.clamp < INFINITY) {
    if (Order > 0) {
      const auto inside = abs(jet.value) <= o.clamp;
      jet.slope = inside ? jet.slope : vf{};
      jet.curve = inside ? jet.curve : vf{};
    } else {
      jet.value = at_least(at_most(jet.value, o.clamp), -o.clamp);
    }
  }
  return jet;
}

// x as [outer, channels, inner]. Runs of `inner` elements that share one bias are taken as rows; where runs are short, a row
// is as many whole periods of channels * inner elements as fill a tile, and the biases are spread out over it.
struct BiasTiles {
  static constexpr int64_t SHORT = 64;
  int64_t outer, channels, inner, all, row, rows, group, groups;
  bool spread;

  BiasTiles(int64_t outer_, int64_t channels_, int64_t inner_)
      : outer(outer_), channels(channels_), inner(inner_), all(outer_ * channels_ * inner_), spread(inner_ < SHORT) {
    const int64_t period = channels * inner;
    row = spread ? period * max(1, min(outer, TILE / max(1, period))) : inner;
    rows = ceil_div(all, max(1, row));
    // spread rows of one group add up their columns in one place
    group = spread ? max(8, ceil_div(rows, 64)) : rows;
    groups = ceil_div(rows, max(1, group));
  }

  // Numbers per channel as one span sees them: spread out, or all the same.
  struct PerChannel {
    const float* spread;
    float same;
    INLINE vf at(int64_t i, int64_t n) const { return spread ? block_load(spread + i, n) : splat(same); }
  };
  // map(offset, count, bias, more) -> a sum, over the elements from `offset`: added to `column`, or returned.
  template <class Map>
  static float span(const void* map, int64_t base, int64_t count, PerChannel bias, PerChannel more, float* column) {
    vf total{};
    for_blocks(count, [&](int64_t i, int64_t n) {
      const vf out = (*(const Map*)map)(base + i, n, bias.at(i, n), more.at(i, n));
      if (column) block_store(column + i, block_load(column + i, n) + out, n);
      else total = total + out;
    });
    return sum(total);
  }
  using Span = float (*)(const void*, int64_t, int64_t, PerChannel, PerChannel, float*);

  // Runs `map` over all elements. bias and more hold a number per channel, or are null and count as 0; sums[channel] is what
  // the map returns, or null.
  template <class Map>
  INLINE void run(const float* bias, const float* more, float* sums, int64_t threads, const Map& map) const {
    const auto go = spread ? &BiasTiles::run_spread : &BiasTiles::run_rows;
    if (all) return (this->*go)(bias, more, sums, threads, &span<Map>, &map);
    for (int64_t c = 0; sums && c < channels; ++c) sums[c] = 0;
  }

  void run_rows(const float* bias, const float* more, float* out, int64_t threads, Span call, const void* map) const {
    const Tiling tiling(rows, row);
    float* totals = out ? new float[rows] : nullptr;
    RowSums sums(tiling, totals);
    tiling.run(threads, [&](const Tile& tile) {
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t i = tile.row + r, c = i % channels;
        const PerChannel b{nullptr, bias ? bias[c] : 0.0f}, m{nullptr, more ? more[c] : 0.0f};
        const float total = call(map, i * row + tile.begin, tile.count, b, m, nullptr);
        if (out) sums.put(tile, r, total);
      }
    });
    if (!out) return;
    sums.finish();
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = c; i < rows; i += channels) total += totals[i];
      out[c] = (float)total;
    }
    delete[] totals;
  }

  void run_spread(const float* bias, const float* more, float* out, int64_t threads, Span call, const void* map) const {
    const auto spread_out = [&](const float* values) {
      float* wide = values ? new float[row] : nullptr;
      for (int64_t i = 0, c = 0; values && i < row; c = c + 1 < channels ? c + 1 : 0)
        for (int64_t j = 0; j < inner; ++j) wide[i++] = values[c];
      return wide;
    };
    const float *biases = spread_out(bias), *mores = spread_out(more);
    float* columns = out ? new float[groups * row] : nullptr;
    const int64_t parts = ceil_div(row, TILE);
    parallel_for(groups * parts, all < SERIAL ? 1 : threads, [&](int64_t task) {
      const int64_t first = task / parts, begin = task % parts * TILE, count = min(TILE, row - begin);
      float* column = out ? columns + first * row + begin : nullptr;
      const PerChannel b{bias ? biases + begin : nullptr, 0.0f}, m{more ? mores + begin : nullptr, 0.0f};
      for (int64_t i = 0; out && i < count; ++i) column[i] = 0;
      for (int64_t r = first * group; r < min(rows, (first + 1) * group); ++r)
        call(map, r * row + begin, min(count, all - r * row - begin), b, m, column);
    });
    for (int64_t c = 0; out && c < channels; ++c) {
      double total = 0;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = c * inner; i < row; i += channels * inner)
          for (int64_t j = 0; j < inner; ++j) total += columns[g * row + i + j];
      out[c] = (float)total;
    }
    delete[] biases;
    delete[] mores;
    delete[] columns;
  }
};

template <Activation A>
struct ActChoice {
  static constexpr Activation act = A;
};
// body(ActChoice<A>, options) for the activation of a code: LINEAR is an LRELU, and SELU an ELU.
template <class Body>
INLINE void with_activation(int64_t act, double alpha, double gain, double clamp, Body&& body) {
  ActOptions o{act == LINEAR ? 1.0f : (float)alpha, (float)gain, (float)clamp, 1.0f, 1.0f};
  if (act == SELU) o.scale = 1.05070099f, o.low = 1.75809934f;
  switch (act) {
    case RELU: return body(ActChoice<RELU>{}, o);
    case TANH: return body(ActChoice<TANH>{}, o);
    case SIGMOID: return body(ActChoice<SIGMOID>{}, o);
    case ELU:
    case SELU: return body(ActChoice<ELU>{}, o);
    case SOFTPLUS: return body(ActChoice<SOFTPLUS>{}, o);
    case SWISH: return body(ActChoice<SWISH>{}, o);
    default: return body(ActChoice<LRELU>{}, o);
  }
}

template <class T, Activation A>
INLINE void bias_act_fwd_as(const BiasTiles& tiles, const T* x, const float* bias, T* y, const ActOptions& o,
                            int64_t threads) {
  const bool stream = streamable(y, tiles.rows, tiles.row);
  tiles.run(bias, nullptr, nullptr, threads, [&](int64_t i, int64_t n, vf b, vf) {
    fetch_ahead(x + i);
    block_store(y + i, bias_act_at<A, 0>(block_load(x + i, n) + b, o).value, n, stream);
    return vf{};
  });
}

// grad_bias may be null.
template <class T, Activation A>
INLINE void bias_act_bwd_as(const BiasTiles& tiles, const T* x, const float* bias, const T* grad_y, T* grad_x,
                            float* grad_bias, const ActOptions& o, int64_t threads) {
  tiles.run(bias, nullptr, grad_bias, threads, [&](int64_t i, int64_t n, vf b, vf) {
    fetch_ahead(x + i), fetch_ahead(grad_y + i);
    const vf gradient = block_load(grad_y + i, n) * bias_act_at<A, 1>(block_load(x + i, n) + b, o).slope;
    block_store(grad_x + i, gradient, n);
    return gradient;
  });
}

// The gradient of bias_act_bwd: along_x and along_bias are those of grad_x and grad_bias, and may be null.
template <class T, Activation A>
INLINE void bias_act_bwd_bwd_as(const BiasTiles& tiles, const T* x, const float* bias, const T* grad_y, const T* along_x,
                                const float* along_bias, T* out_grad_y, T* out_x, float* out_bias, const ActOptions& o,
                                int64_t threads) {
  tiles.run(bias, along_bias, out_bias, threads, [&](int64_t i, int64_t n, vf b, vf along) {
    const Jet jet = bias_act_at<A, 2>(block_load(x + i, n) + b, o);
    if (along_x) along = along + block_load(along_x + i, n);
    block_store(out_grad_y + i, along * jet.slope, n);
    const vf gradient = along * block_load(grad_y + i, n) * jet.curve;
    block_store(out_x + i, gradient, n);
    return gradient;
  });
}

inline void bias_act_fwd(int64_t dtype, int64_t outer, int64_t channels, int64_t inner, const void* x, const float* bias,
                         void* y, int64_t act, double alpha, double gain, double clamp, int64_t threads) {
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_activation(act, alpha, gain, clamp, [&](auto choice, const ActOptions& o) {
      bias_act_fwd_as<T, decltype(choice)::act>(BiasTiles(outer, channels, inner), (const T*)x, bias, (T*)y, o, threads);
    });
  });
}

inline void bias_act_bwd(int64_t dtype, int64_t outer, int64_t channels, int64_t inner, const void* x, const float* bias,
                         const void* grad_y, void* grad_x, float* grad_bias, int64_t act, double alpha, double gain,
                         double clamp, int64_t threads) {
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_activation(act, alpha, gain, clamp, [&](auto choice, const ActOptions& o) {
      bias_act_bwd_as<T, decltype(choice)::act>(BiasTiles(outer, channels, inner), (const T*)x, bias, (const T*)grad_y,
                                                (T*)grad_x, grad_bias, o, threads);
    });
  });
}

inline void bias_act_bwd_bwd(int64_t dtype, int64_t outer, int64_t channels, int64_t inner, const void* x,
                             const float* bias, const void* grad_y, const void* along_x, const float* along_bias,
                             void* out_grad_y, void* out_x, float* out_bias, int64_t act, double alpha, double gain,
                             double clamp, int64_t threads) {
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_activation(act, alpha, gain, clamp, [&](auto choice, const ActOptions& o) {
      bias_act_bwd_bwd_as<T, decltype(choice)::act>(
          BiasTiles(outer, channels, inner), (const T*)x, bias, (const T*)grad_y, (const T*)along_x, along_bias,
          (T*)out_grad_y, (T*)out_x, out_bias, o, threads);
    });
  });
}

FASTGEN_KERNELS(bias_act, KERNEL(bias_act_fwd), KERNEL(bias_act_bwd), KERNEL(bias_act_bwd_bwd))

FASTGEN_END
