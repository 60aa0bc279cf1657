// group_norm_silu: normalise groups of channels, scale and shift each channel, SiLU. fastgen/ops/group_norm_silu.py has the
// mathematics.
//
// Images lie channels first, [samples, channels, pixels], or channels last, [samples, pixels, channels]. What is normalised
// alone is a unit: a group of one sample or, channels last, all groups of one sample, which lie together. A unit is reduced
// tile by tile and then written while the caches hold it; where there are too few units for the threads, these share the tiles.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

constexpr int64_t NORM_TILE = 8192;
// Terms that one lane adds up before the sum is put aside: long chains of additions lose digits.
constexpr int64_t CHAIN = 64;

// Part of a unit: some of its channels at some of its pixels.
struct Patch {
  int64_t channel, channels, pixel, pixels;
};

struct NormTiling {
  int64_t samples, channels, groups, pixels, per;  // `per`: channels of a group
  bool last;                                       // channels last
  int64_t units, unit_groups, unit_channels, padded;
  int64_t tiles, step, parts;  // of one unit; `step` pixels or whole channels a tile, `parts` tiles a channel

  NormTiling(int64_t samples_, int64_t channels_, int64_t groups_, int64_t pixels_, bool last_)
      : samples(samples_), channels(channels_), groups(groups_), pixels(pixels_), per(channels / groups),
        last(last_ || pixels == 1) {
    units = last ? samples : samples * groups;
    unit_groups = last ? groups : 1;
    unit_channels = unit_groups * per;
    padded = ceil_div(unit_channels, 16) * 16;
    parts = last ? 1 : max(1, ceil_div(pixels, NORM_TILE));
    step = parts > 1 ? NORM_TILE : max(1, NORM_TILE / max(1, last ? channels : pixels));
    if (last) step = min(step, CHAIN);
    tiles = last ? ceil_div(pixels, step) : parts > 1 ? per * parts : ceil_div(per, step);
  }
  Patch patch(int64_t tile) const {
    if (last) return {0, channels, tile * step, min(step, pixels - tile * step)};
    if (parts > 1) return {tile / parts, 1, tile % parts * step, min(step, pixels - tile % parts * step)};
    return {tile * step, min(step, per - tile * step), 0, pixels};
  }
  // where a patch begins in memory
  int64_t offset(int64_t unit, const Patch& p) const {
    return last ? (unit * pixels + p.pixel) * channels : (unit * per + p.channel) * pixels + p.pixel;
  }
  // sample * channels + channel of the first channel of a unit
  int64_t first_channel(int64_t unit) const { return last ? unit * channels : unit * per; }
  template <class T>
  bool streams(const T* out) const {
    return last ? streamable(out, samples * pixels, channels) : streamable(out, samples * channels, pixels);
  }
  // For every unit: prepare(unit, scratch), reduce(unit, tile, scratch) of all tiles, finish(unit, scratch) and apply(unit,
  // tile, scratch) of all tiles. `scratch` holds `size` floats of the unit.
  template <class Prepare, class Reduce, class Finish, class Apply>
  void run(int64_t threads, int64_t size, Prepare&& prepare, Reduce&& reduce, Finish&& finish, Apply&& apply) const {
    if (samples * channels * pixels < SERIAL) threads = 1;
    size = ceil_div(size, 16) * 16;
    if (4 * threads * ceil_div(units, threads) <= 5 * units) {
      parallel_for(units, threads, [&](int64_t unit) {
        const Scratch scratch(size);
        prepare(unit, scratch.at);
        for (int64_t tile = 0; tile < tiles; ++tile) reduce(unit, tile, scratch.at);
        finish(unit, scratch.at);
        for (int64_t tile = tiles; tile-- > 0;) apply(unit, tile, scratch.at);  // what was read last is nearest
      });
      return;
    }
    const Scratch scratch(units * size);
    parallel_for(units, 1, [&](int64_t unit) { prepare(unit, scratch.at + unit * size); });
    parallel_for(units * tiles, threads, [&](int64_t i) { reduce(i / tiles, i % tiles, scratch.at + i / tiles * size); });
    parallel_for(units, threads, [&](int64_t unit) { finish(unit, scratch.at + unit * size); });
    parallel_for(units * tiles, threads, [&](int64_t i) { apply(i / tiles, i % tiles, scratch.at + i / tiles * size); });
  }

 private:
  struct Scratch {  // vectors in it do not straddle cache lines
    float *all, *at;
    explicit Scratch(int64_t size) : all(new float[size + 16]), at(all + (64 - (size_t)all % 64) % 64 / sizeof(float)) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { delete[] all; }
  };
};

// weight, bias [channels] and scale, shift [samples, channels] in two storage types; each may be missing.
struct Modulation {
  int64_t affine_dtype, dtype;
  const void *weight, *bias, *scale, *shift;

  static INLINE vf read(const void* p, int64_t dtype, int64_t i, int64_t n) {
    if (!p) return vf{};
    if (dtype == 0) return block_load((const float*)p + i, n);
    if (dtype == 1) return block_load((const bf16*)p + i, n);
    return block_load((const f16*)p + i, n);
  }
  static INLINE float read(const void* p, int64_t dtype, int64_t i) {
    if (!p) return 0;
    if (dtype == 0) return ((const float*)p)[i];
    if (dtype == 1) return widen(((const bf16*)p)[i]);
    return widen(((const f16*)p)[i]);
  }
  static INLINE void write(void* p, int64_t dtype, int64_t i, float x) {
    if (!p) return;
    if (dtype == 0) ((float*)p)[i] = x;
    else if (dtype == 1) narrow(x, ((bf16*)p)[i]);
    else narrow(x, ((f16*)p)[i]);
  }
  // of channel c: weight, bias and, of one sample, 1 + scale
  INLINE float weight_at(int64_t c) const { return weight ? read(weight, affine_dtype, c) : 1.0f; }
  INLINE float bias_at(int64_t c) const { return read(bias, affine_dtype, c); }
  INLINE float factor_at(int64_t sample_channel) const { return 1.0f + read(scale, dtype, sample_channel); }
};

// Coefficients of the channels of a unit, `padded` apart: z = (x - center) * slope + level, and in the backward pass
// dx = dz * slope + (x - center) * pull + push.
struct NormCoefficients {
  float *center, *slope, *level, *pull, *push;
  NormCoefficients(const NormTiling& tiling, float* scratch)
      : center(scratch), slope(center + tiling.padded), level(slope + tiling.padded), pull(level + tiling.padded),
        push(pull + tiling.padded) {}
  // of one group, before modulate(): mean = center + remainder
  INLINE void group(int64_t first, int64_t per, float mean, float remainder, float rstd) const {
    for (int64_t i = first; i < first + per; ++i) center[i] = mean, level[i] = remainder, slope[i] = rstd;
  }
  INLINE void modulate(const NormTiling& tiling, int64_t unit, const Modulation& m) const {
    const int64_t at = tiling.first_channel(unit), channel = at % tiling.channels;
    for_blocks(tiling.unit_channels, [&](int64_t i, int64_t n) {
      vf a = block_load(slope + i, n);
      if (m.weight) a = a * Modulation::read(m.weight, m.affine_dtype, channel + i, n);
      const vf b = fma(-block_load(level + i, n), a, Modulation::read(m.bias, m.affine_dtype, channel + i, n));
      const vf factor = 1.0f + Modulation::read(m.scale, m.dtype, at + i, n);
      block_store(slope + i, a * factor, n);
      block_store(level + i, fma(b, factor, Modulation::read(m.shift, m.dtype, at + i, n)), n);
    });
  }
};

// Sums of x - pivot and of its square over elements of one group, with a pivot near their mean: that of some of them, which is
// within sqrt(1 / share - 1) deviations of it.
struct Moments {
  float pivot, sum, squares;
};
constexpr int64_t SHARE = 4;

template <class T>
INLINE Moments moments_of(const T* x, int64_t count) {
  if (!count) return {};
  vf some{};
  int64_t used = 0;
  for (; used * SHARE + LANES <= count; used += LANES) some = some + load_float(x + used * SHARE);
  if (!used) some = load_part(x, used = count);
  const float pivot = sum(some) / (float)used;
  vf total{}, square{};
  for (int64_t begin = 0; begin < count; begin += 4 * CHAIN * LANES) {
    const int64_t end = min(count, begin + 4 * CHAIN * LANES);
    vf sums[4] = {}, squares[4] = {};
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES)
      for (int k = 0; k < 4; ++k) {
        const vf d = load_float(x + i + k * LANES) - pivot;
        sums[k] = sums[k] + d;
        squares[k] = fma(d, d, squares[k]);
      }
    for_blocks(end - i, [&](int64_t j, int64_t n) {
      const vf d = block_load(x + i + j, n, pivot) - pivot;
      sums[0] = sums[0] + d;
      squares[0] = fma(d, d, squares[0]);
    });
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    square = square + ((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  return {pivot, sum(total), sum(square)};
}

// The same for each group of `pixels` rows of all channels.
template <class T>
INLINE void moments_of_rows(const T* x, int64_t pixels, const NormTiling& tiling, Moments* out) {
  const int64_t channels = tiling.channels, per = tiling.per, used = ceil_div(pixels, SHARE);
  float* pivots = new float[3 * tiling.padded];
  float *sums = pivots + tiling.padded, *squares = sums + tiling.padded;
  for_blocks(channels, [&](int64_t c, int64_t n) {
    vf some{};
    for (int64_t p = 0; p < pixels; p += SHARE) some = some + block_load(x + p * channels + c, n);
    block_store(sums + c, some, n);
  });
  for (int64_t g = 0; g < tiling.groups; ++g) {
    float total = 0;
    for (int64_t i = g * per; i < (g + 1) * per; ++i) total += sums[i];
    out[g].pivot = total / (float)(used * per);
    for (int64_t i = g * per; i < (g + 1) * per; ++i) pivots[i] = out[g].pivot, sums[i] = squares[i] = 0;
  }
  constexpr int64_t ROWS = 4;  // read side by side, so that sums go through memory once for all of them
  for (int64_t p = 0; p < pixels; p += ROWS) {
    const int64_t rows = min(ROWS, pixels - p);
    const auto add = [&](int64_t c, int64_t n) {
      const vf pivot = block_load(pivots + c, n);
      vf total = block_load(sums + c, n), square = block_load(squares + c, n);
      for (int64_t r = 0; r < rows; ++r) {
        const vf d = block_load(x + (p + r) * channels + c, n) - pivot;
        total = total + d;
        square = fma(d, d, square);
      }
      block_store(sums + c, total, n);
      block_store(squares + c, square, n);
    };
    for_blocks(channels, add);
  }
  for (int64_t g = 0; g < tiling.groups; ++g) {
    double total = 0, square = 0;
    for (int64_t i = g * per; i < (g + 1) * per; ++i) total += sums[i], square += squares[i];
    out[g].sum = (float)total;
    out[g].squares = (float)square;
  }
  delete[] pivots;
}

// body(j, k, n) for the blocks of a patch: element j in memory, whose channel, or first channel, is the k-th of the unit.
template <bool Last, class Body>
INLINE void for_patch(const NormTiling& tiling, int64_t unit, const Patch& patch, Body&& body) {
  const int64_t rows = Last ? patch.pixels : patch.channels, count = Last ? tiling.channels : patch.pixels;
  int64_t at = tiling.offset(unit, patch);
  for (int64_t row = 0; row < rows; ++row, at += Last ? tiling.channels : tiling.pixels)
    for_blocks(count, [&](int64_t i, int64_t n) { body(at + i, Last ? i : patch.channel + row, n); });
}
// A coefficient of the channels of a block.
template <bool Last>
INLINE vf channel_load(const float* p, int64_t k, int64_t n) {
  return Last ? block_load(p + k, n) : splat(p[k]);
}

template <class T, bool Silu, bool Last>
INLINE void group_norm_silu_fwd_as(const NormTiling& tiling, const Modulation& modulation, const T* x, double eps, T* y,
                                   float* stats, int64_t threads) {
  const bool stream = tiling.streams(y);
  const int64_t coefficients = 3 * tiling.padded;  // the moments of the tiles follow
  const auto moments = [&](float* scratch, int64_t tile) {
    return (Moments*)(scratch + coefficients) + tile * tiling.unit_groups;
  };
  const auto reduce = [&](int64_t unit, int64_t tile, float* scratch) {
    const Patch patch = tiling.patch(tile);
    const T* in = x + tiling.offset(unit, patch);
    if (Last) moments_of_rows(in, patch.pixels, tiling, moments(scratch, tile));
    else *moments(scratch, tile) = moments_of(in, patch.channels * patch.pixels);
  };
  const auto finish = [&](int64_t unit, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    const double whole = 1.0 / (double)max(1, tiling.per * tiling.pixels);
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
      const auto each = [&](auto&& body) {
        for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
          const Patch patch = tiling.patch(tile);
          body(moments(scratch, tile)[g], (double)((Last ? tiling.per : patch.channels) * patch.pixels));
        }
      };
      double mean = 0, spread = 0;
      each([&](const Moments& m, double count) { mean += count * m.pivot + m.sum; });
      mean *= whole;
      each([&](const Moments& m, double count) {  // sum of (x - mean)^2
        const double off = m.pivot - mean;
        spread += m.squares + off * (2 * m.sum + count * off);
      });
      const float center = (float)mean, remainder = (float)(mean - center);
      const float rstd = (float)(1 / __builtin_sqrt((spread < 0 ? 0 : spread) * whole + eps));
      c.group(g * tiling.per, tiling.per, center, remainder, rstd);
      if (!stats) continue;
      float* out = stats + 3 * (unit * tiling.unit_groups + g);
      out[0] = center, out[1] = remainder, out[2] = rstd;
    }
    c.modulate(tiling, unit, modulation);
  };
  const auto apply = [&](int64_t unit, int64_t tile, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    for_patch<Last>(tiling, unit, tiling.patch(tile), [&](int64_t j, int64_t k, int64_t n) {
      vf rest, z = fma(block_load(x + j, n) - channel_load<Last>(c.center, k, n), channel_load<Last>(c.slope, k, n),
                       channel_load<Last>(c.level, k, n));
      if (Silu) z = z * sigmoid_factor(z, rest);
      block_store(y + j, z, n, stream);
    });
    if (stream) drain_stores();
  };
  tiling.run(threads, coefficients + 3 * tiling.tiles * tiling.unit_groups, [](int64_t, float*) {}, reduce, finish, apply);
}

// `stats` are those of the forward pass. grad_weight and grad_bias are [channels], grad_scale and grad_shift [samples,
// channels]; null where they are not wanted.
template <class T, bool Silu, bool Last>
INLINE void group_norm_silu_bwd_as(const NormTiling& tiling, const Modulation& modulation, const T* x, const T* grad_y,
                                   const float* stats, T* grad_x, void* grad_weight, void* grad_bias, void* grad_scale,
                                   void* grad_shift, int64_t threads) {
  const bool stream = tiling.streams(grad_x);
  const int64_t coefficients = 5 * tiling.padded;  // the sums of the tiles follow: of dz, then of dz * (x - center)
  const int64_t width = tiling.unit_channels, slots = Last ? tiling.tiles : tiling.parts;
  const auto sums_of = [&](float* scratch, int64_t slot) { return scratch + coefficients + 2 * slot * width; };
  // of the samples: dz and dz * xhat summed over the pixels, for the gradients of weight and bias
  const int64_t all = tiling.samples * tiling.channels;
  float* totals = new float[2 * all + 1];
  const auto gradient = [&](const NormCoefficients& c, int64_t j, int64_t k, int64_t n, vf& d) {  // of z
    const vf dy = block_load(grad_y + j, n);
    d = block_load(x + j, n) - channel_load<Last>(c.center, k, n);
    if (!Silu) return dy;
    const vf z = fma(d, channel_load<Last>(c.slope, k, n), channel_load<Last>(c.level, k, n));
    vf rest;
    const vf sigma = sigmoid_factor(z, rest);
    return dy * (sigma * fma(z, rest, splat(1.0f)));
  };
  const auto prepare = [&](int64_t unit, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
      const float* in = stats + 3 * (unit * tiling.unit_groups + g);
      c.group(g * tiling.per, tiling.per, in[0], in[1], in[2]);
    }
    c.modulate(tiling, unit, modulation);
  };
  const auto reduce = [&](int64_t unit, int64_t tile, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    const Patch patch = tiling.patch(tile);
    if (Last) {
      float *sums = sums_of(scratch, tile), *products = sums + width;
      for (int64_t i = 0; i < 2 * width; ++i) sums[i] = 0;
      for_patch<Last>(tiling, unit, patch, [&](int64_t j, int64_t k, int64_t n) {
        vf d;
        const vf dz = gradient(c, j, k, n, d);
        block_store(sums + k, block_load(sums + k, n) + dz, n);
        block_store(products + k, fma(dz, d, block_load(products + k, n)), n);
      });
      return;
    }
    float* sums = sums_of(scratch, tiling.parts > 1 ? tile % tiling.parts : 0);
    for (int64_t row = 0; row < patch.channels; ++row) {
      vf total{}, product{};
      for (int64_t begin = 0; begin < patch.pixels; begin += CHAIN * LANES) {
        const Patch link{patch.channel + row, 1, patch.pixel + begin, min(CHAIN * LANES, patch.pixels - begin)};
        vf some{}, products{};
        for_patch<Last>(tiling, unit, link, [&](int64_t j, int64_t k, int64_t n) {
          vf d;
          const vf dz = gradient(c, j, k, n, d);
          some = some + dz;
          products = fma(dz, d, products);
        });
        total = total + some, product = product + products;
      }
      sums[patch.channel + row] = sum(total);
      sums[width + patch.channel + row] = sum(product);
    }
  };
  const auto finish = [&](int64_t unit, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    const int64_t at = tiling.first_channel(unit), channel = at % tiling.channels;
    const double size = (double)(tiling.per * tiling.pixels);
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
      const float* in = stats + 3 * (unit * tiling.unit_groups + g);
      const double remainder = in[1], rstd = in[2];
      double by_mean = 0, by_deviation = 0;
      for (int64_t i = g * tiling.per; i < (g + 1) * tiling.per; ++i) {
        double total = 0, product = 0;
        for (int64_t slot = 0; slot < slots; ++slot) {
          const float* sums = sums_of(scratch, slot);
          total += sums[i], product += sums[width + i];
        }
        product = rstd * (product - remainder * total);
        totals[at + i] = (float)total, totals[all + at + i] = (float)product;
        const float weight = modulation.weight_at(channel + i);
        const double factor = (double)weight * modulation.factor_at(at + i);
        by_mean += factor * total, by_deviation += factor * product;
        Modulation::write(grad_shift, modulation.dtype, at + i, (float)total);
        Modulation::write(grad_scale, modulation.dtype, at + i,
                          (float)(weight * product + modulation.bias_at(channel + i) * total));
      }
      const double pull = -rstd * rstd * by_deviation / size, push = -rstd * by_mean / size - pull * remainder;
      for (int64_t i = g * tiling.per; i < (g + 1) * tiling.per; ++i) {
        c.pull[i] = (float)pull, c.push[i] = (float)push;
        if (size == 1) c.slope[i] = c.push[i] = 0;  // a constant: x - center is 0 wherever these are used
      }
    }
  };
  const auto apply = [&](int64_t unit, int64_t tile, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    for_patch<Last>(tiling, unit, tiling.patch(tile), [&](int64_t j, int64_t k, int64_t n) {
      vf d;
      const vf dz = gradient(c, j, k, n, d);
      const vf flat = fma(d, channel_load<Last>(c.pull, k, n), channel_load<Last>(c.push, k, n));
      block_store(grad_x + j, fma(dz, channel_load<Last>(c.slope, k, n), flat), n, stream);
    });
    if (stream) drain_stores();
  };
  tiling.run(threads, coefficients + 2 * slots * width, prepare, reduce, finish, apply);
  for (int64_t c = 0; (grad_weight || grad_bias) && c < tiling.channels; ++c) {
    double by_weight = 0, by_bias = 0;
    for (int64_t i = c; i < all; i += tiling.channels) {
      const double factor = modulation.factor_at(i);
      by_bias += factor * totals[i], by_weight += factor * totals[all + i];
    }
    Modulation::write(grad_weight, modulation.affine_dtype, c, (float)by_weight);
    Modulation::write(grad_bias, modulation.affine_dtype, c, (float)by_bias);
  }
  delete[] totals;
}

// body(Variant<Silu, Last>) for values known at run time.
template <bool S, bool L>
struct Variant {
  static constexpr bool silu = S, last = L;
};
template <class Body>
INLINE void with_variant(bool silu, bool last, Body&& body) {
  if (silu) last ? body(Variant<true, true>{}) : body(Variant<true, false>{});
  else last ? body(Variant<false, true>{}) : body(Variant<false, false>{});
}

inline void group_norm_silu_fwd(int64_t dtype, int64_t samples, int64_t channels, int64_t groups, int64_t pixels,
                                int64_t last, const void* x, int64_t affine_dtype, const void* weight, const void* bias,
                                int64_t modulation_dtype, const void* scale, const void* shift, double eps, int64_t silu,
                                void* y, float* stats, int64_t threads) {
  const NormTiling tiling(samples, channels, groups, pixels, last);
  const Modulation modulation{affine_dtype, modulation_dtype, weight, bias, scale, shift};
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_variant(silu, tiling.last, [&](auto variant) {
      using V = decltype(variant);
      group_norm_silu_fwd_as<T, V::silu, V::last>(tiling, modulation, (const T*)x, eps, (T*)y, stats, threads);
    });
  };
  with_dtype(dtype, run);
}

inline void group_norm_silu_bwd(int64_t dtype, int64_t samples, int64_t channels, int64_t groups, int64_t pixels,
                                int64_t last, const void* x, int64_t affine_dtype, const void* weight, const void* bias,
                                int64_t modulation_dtype, const void* scale, const void* shift, int64_t silu,
                                const float* stats, const void* grad_y, void* grad_x, void* grad_weight, void* grad_bias,
                                void* grad_scale, void* grad_shift, int64_t threads) {
  const NormTiling tiling(samples, channels, groups, pixels, last);
  const Modulation modulation{affine_dtype, modulation_dtype, weight, bias, scale, shift};
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_variant(silu, tiling.last, [&](auto variant) {
      using V = decltype(variant);
      group_norm_silu_bwd_as<T, V::silu, V::last>(tiling, modulation, (const T*)x, (const T*)grad_y, stats, (T*)grad_x,
                                                  grad_weight, grad_bias, grad_scale, grad_shift, threads);
    });
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(group_norm_silu, KERNEL(group_norm_silu_fwd), KERNEL(group_norm_silu_bwd))

FASTGEN_END
