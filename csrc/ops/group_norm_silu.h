// group_norm_silu: normalise groups of channels, scale and shift each channel, SiLU. fastgen/ops/group_norm_silu.py has the
// mathematics.
//
// Images lie channels first, [samples, channels, pixels], or channels last, [samples, pixels, channels]. What is normalised
// alone is a unit: a group of one sample or, channels last, all groups of one sample, which lie together; the backward pass,
// which reads more, cuts large images into strips of neighbouring groups. A unit is reduced tile by tile and then written while
// the caches hold it, and meanwhile the next one is on its way to them; where there are too few units for the threads, these
// share the tiles.
#pragma once
#include "../math.h"
#include "../memory.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

constexpr int64_t NORM_TILE = 8192;
// Terms that one lane adds up before the sum is put aside: long chains of additions lose digits.
constexpr int64_t CHAIN = 64;
// Of the next unit, what is fetched at most while one is at work: half of a second-level cache.
constexpr int64_t AHEAD_BYTES = 512 << 10;
// Units of at most so many elements keep dz from one pass of the backward to the other; larger ones compute it twice. Channels
// last they keep x - center beside it: the pixels of a strip lie so regularly that they compete for a part of the cache.
constexpr int64_t KEPT = 65536;
// Strips hold at most so many elements, whose dz and x - center stay in a second-level cache, but at least STRIP channels,
// whole lines of cache. No hardware foresees where their pixels lie: they are fetched so many ahead.
constexpr int64_t STRIP_SIZE = 32768, STRIP = 32, PIXELS_AHEAD = 16;

// ---- rows in spans -------------------------------------------------------------------------------------------------

// A row is cut into spans of several whole vectors, pairs of which hold their elements in the order of load_two, and a last one
// of n elements in two vectors, of which the second may be empty.
constexpr int64_t PAIR = 2 * LANES;
template <int V>
struct Whole {
  static constexpr bool whole = true;
  static constexpr int vectors = V;
};
struct Part {
  static constexpr bool whole = false;
  static constexpr int vectors = 2;
  int64_t n;
  INLINE int64_t of(int k) const { return max(0, min(LANES, n - k * LANES)); }  // elements in the k-th vector
};
template <int V, class Body>
INLINE void for_spans(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + V * LANES <= count; i += V * LANES) body(i, Whole<V>{});
  if (V > 2 && i + PAIR <= count) body(i, Whole<2>{}), i += PAIR;
  if (i < count) body(i, Part{count - i});
}
// Two vectors of one pixel and two of the next, channels last.
struct Twice {
  static constexpr int vectors = 4;
  int64_t pitch;
};
template <class T, int V>
INLINE void span_load(const T* p, Whole<V>, vf* v) {
  for (int k = 0; k < V; k += 2) load_two(p + k * LANES, v[k], v[k + 1]);
}
template <class T>
INLINE void span_load(const T* p, Part part, vf* v) {
  for (int k = 0; k < 2; ++k) v[k] = block_load(p + k * LANES, part.of(k));
}
template <class T>
INLINE void span_load(const T* p, Twice twice, vf* v) {
  load_two(p, v[0], v[1]), load_two(p + twice.pitch, v[2], v[3]);
}
template <class T, int V>
INLINE void span_store(T* p, Whole<V>, const vf* v, bool stream = false) {
  for (int k = 0; k < V; k += 2) {
    if (stream) stream_two(p + k * LANES, v[k], v[k + 1]);
    else store_two(p + k * LANES, v[k], v[k + 1]);
  }
}
template <class T>
INLINE void span_store(T* p, Part part, const vf* v, bool stream = false) {
  for (int k = 0; k < 2; ++k) block_store(p + k * LANES, v[k], part.of(k), stream);
}
template <class T>
INLINE void span_store(T* p, Twice twice, const vf* v, bool stream = false) {
  span_store(p, Whole<2>{}, v, stream), span_store(p + twice.pitch, Whole<2>{}, v + 2, stream);
}
template <class T, class Span>
INLINE void span_prefetch(const T* p, Span) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < Span::vectors * LANES; i += LINE) prefetch(p + i);
}
template <class T>
INLINE void span_prefetch(const T* p, Twice twice) {
  span_prefetch(p, Whole<2>{}), span_prefetch(p + twice.pitch, Whole<2>{});
}

// ---- the units -----------------------------------------------------------------------------------------------------

// Part of a unit: some of its channels at some of its pixels.
struct Patch {
  int64_t channel, channels, pixel, pixels;
};

struct NormTiling {
  int64_t samples, channels, groups, pixels, per;  // `per`: channels of a group
  bool last;                                       // channels last
  int64_t strips, units, unit_groups, unit_channels, padded;  // `strips`: units of one sample
  int64_t tiles, step, parts;  // of one unit; `step` pixels or whole channels a tile, `parts` tiles a channel

  // `cut`: images that lie channels last may be cut into strips.
  NormTiling(int64_t samples_, int64_t channels_, int64_t groups_, int64_t pixels_, bool last_, bool cut)
      : samples(samples_), channels(channels_), groups(groups_), pixels(pixels_), per(channels / groups),
        last(last_ || pixels == 1) {
    unit_groups = !last ? 1 : cut ? strip_groups() : groups;
    strips = groups / unit_groups;
    units = samples * strips;
    unit_channels = unit_groups * per;
    padded = ceil_div(unit_channels, 32) * 32;
    parts = last ? 1 : max(1, ceil_div(pixels, NORM_TILE));
    step = parts > 1 ? NORM_TILE : max(1, NORM_TILE / max(1, last ? unit_channels : pixels));
    if (last) step = min(2 * step, CHAIN);
    tiles = last ? ceil_div(pixels, step) : parts > 1 ? per * parts : ceil_div(per, step);
  }
  int64_t unit_size() const { return unit_channels * pixels; }
  Patch patch(int64_t tile) const {
    if (last) return {0, unit_channels, tile * step, min(step, pixels - tile * step)};
    if (parts > 1) return {tile / parts, 1, tile % parts * step, min(step, pixels - tile % parts * step)};
    return {tile * step, min(step, per - tile * step), 0, pixels};
  }
  // where a patch begins in memory
  int64_t offset(int64_t unit, const Patch& p) const {
    if (!last) return (unit * per + p.channel) * pixels + p.pixel;
    return (unit / strips * pixels + p.pixel) * channels + unit % strips * unit_channels;
  }
  // sample * channels + channel of the first channel of a unit
  int64_t first_channel(int64_t unit) const { return unit * unit_channels; }
  // floats of a unit in whole spans, and where in them those of a patch begin
  int64_t spans_size() const { return last ? pixels * padded : unit_channels * ceil_div(pixels, PAIR) * PAIR; }
  int64_t spans_begin(const Patch& p) const {
    return last ? p.pixel * padded : p.channel * ceil_div(pixels, PAIR) * PAIR + p.pixel;
  }
  template <class T>
  bool streams(const T* out) const {
    const int64_t event = last ? channels : pixels;
    const bool aligned = !EVEN_ODD<T> || ((size_t)out % 64 == 0 && event % PAIR == 0);
    return aligned && streamable(out, samples * channels * pixels / max(1, event), event);
  }
  // Channels last, per-channel numbers in scratch lie as the channels of a span do: where the i-th channel does.
  template <class T>
  INLINE int64_t slot(int64_t i) const {
    if (!EVEN_ODD<T> || !last || i >= unit_channels / PAIR * PAIR) return i;
    return i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2;
  }
  template <class T>
  INLINE void to_slots(float* p) const {
    if (!EVEN_ODD<T> || !last) return;
    for (int64_t i = 0; i + PAIR <= unit_channels; i += PAIR) {
      vf a, b;
      deinterleave(load_float(p + i), load_float(p + i + LANES), a, b);
      store_float(p + i, a), store_float(p + i + LANES, b);
    }
  }
  // Whether the threads share the tiles of every unit.
  bool shared(int64_t threads) const { return 4 * threads * ceil_div(units, threads) > 5 * units; }
  int64_t useful(int64_t threads) const { return samples * channels * pixels < SERIAL ? 1 : threads; }

  // For every unit: prepare(unit, scratch), reduce(unit, tile, scratch, ahead) of all tiles, finish(unit, scratch) and
  // apply(unit, tile, scratch, ahead) of all tiles. `scratch` holds `size` floats of the unit; `ahead` elements on in memory is
  // what should be fetched meanwhile, of which `bytes` an element are read. The next unit is fetched beside the pass that
  // computes most, which `early` says is the first; one too large to wait in the cache for so long, beside the second.
  template <class Prepare, class Reduce, class Finish, class Apply>
  void run(int64_t threads, int64_t size, int64_t bytes, bool early, Prepare&& prepare, Reduce&& reduce, Finish&& finish,
           Apply&& apply) const {
    threads = useful(threads);
    size = ceil_div(size, 16) * 16;
    if (!shared(threads)) {
      // the first tiles of the next unit are fetched with the last ones of this
      const int64_t fetched = min(tiles, max(1, AHEAD_BYTES / max(1, bytes * ceil_div(unit_size(), max(1, tiles)))));
      early = early && 2 * bytes * unit_size() <= AHEAD_BYTES;
      parallel_ranges(units, threads, [&](int64_t first, int64_t end) {
        const Aligned scratch(size);
        for (int64_t unit = first; unit < end; ++unit) {
          prepare(unit, scratch.data);
          const bool more = unit + 1 < end;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const bool last_tile = tile + 1 == tiles;
            const int64_t to_unit = early ? unit + 1 : unit, to_tile = early ? tile : tile + 1;
            reduce(unit, tile, scratch.data, (early ? more : !last_tile) ? distance(unit, tile, to_unit, to_tile) : 0);
          }
          finish(unit, scratch.data);
          for (int64_t tile = tiles; tile-- > 0;)  // what was read last is nearest
            apply(unit, tile, scratch.data,
                  more && !early && tile < fetched ? distance(unit, tile, unit + 1, fetched - 1 - tile) : 0);
        }
      });
      return;
    }
    const Aligned scratch(units * size);
    const auto of = [&](int64_t unit) { return scratch.data + unit * size; };
    parallel_for(units, 1, [&](int64_t unit) { prepare(unit, of(unit)); });
    parallel_for(units * tiles, threads, [&](int64_t i) { reduce(i / tiles, i % tiles, of(i / tiles), 0); });
    parallel_for(units, threads, [&](int64_t unit) { finish(unit, of(unit)); });
    parallel_for(units * tiles, threads, [&](int64_t i) { apply(i / tiles, i % tiles, of(i / tiles), 0); });
  }

 private:
  // Groups of a strip: most that STRIP_SIZE allows, of those counts that fill whole spans; all where none does.
  int64_t strip_groups() const {
    int64_t found = channels * pixels <= STRIP_SIZE ? groups : 0;
    for (int64_t count = 1; count < groups && found < groups; ++count)
      if (groups % count == 0 && count * per % STRIP == 0 && (!found || count * per * pixels <= STRIP_SIZE)) found = count;
    return found ? found : groups;
  }
  int64_t distance(int64_t unit, int64_t tile, int64_t to_unit, int64_t to_tile) const {
    return offset(to_unit, patch(to_tile)) - offset(unit, patch(tile));
  }
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

INLINE float canonical(float x) { return x == x ? x : NAN; }  // as store_two wants a NaN
INLINE vf canonical(vf x, int) { return x == x ? x : splat(NAN); }

// Numbers of the channels of a unit, `padded` apart: z = (x - center) * slope + level, and in the backward pass
// dx = dz * slope + (x - center) * pull + push. `factor` is weight * (1 + scale), `own` 1 + scale.
struct NormCoefficients {
  static constexpr int64_t FORWARD = 3, BACKWARD = 7;
  float *center, *slope, *level, *pull, *push, *factor, *own;
  NormCoefficients(const NormTiling& tiling, float* scratch)
      : center(scratch), slope(center + tiling.padded), level(slope + tiling.padded), pull(level + tiling.padded),
        push(pull + tiling.padded), factor(push + tiling.padded), own(factor + tiling.padded) {}
  // of one group, before modulate(): mean = center + remainder
  INLINE void group(int64_t first, int64_t per, float mean, float remainder, float rstd) const {
    for (int64_t i = first; i < first + per; ++i) center[i] = mean, level[i] = remainder, slope[i] = rstd;
  }
  template <class T, bool Backward>
  INLINE void modulate(const NormTiling& tiling, int64_t unit, const Modulation& m) const {
    const int64_t at = tiling.first_channel(unit), channel = at % tiling.channels;
    for_blocks(tiling.unit_channels, [&](int64_t i, int64_t n) {
      const vf rstd = block_load(slope + i, n);
      const vf weight = m.weight ? Modulation::read(m.weight, m.affine_dtype, channel + i, n) : splat(1.0f);
      const vf one = 1.0f + Modulation::read(m.scale, m.dtype, at + i, n), a = rstd * weight;
      const vf b = fma(-block_load(level + i, n), a, Modulation::read(m.bias, m.affine_dtype, channel + i, n));
      block_store(slope + i, canonical(a * one, 0), n);
      block_store(level + i, canonical(fma(b, one, Modulation::read(m.shift, m.dtype, at + i, n)), 0), n);
      if (Backward) block_store(factor + i, weight * one, n), block_store(own + i, one, n);
    });
    tiling.to_slots<T>(center), tiling.to_slots<T>(slope), tiling.to_slots<T>(level);
  }
};

// Coefficients of a row: of each channel channels last, else of its one channel.
template <bool Last>
struct RowOf {
  const float* p;
  vf same;
  INLINE RowOf(const float* numbers, int64_t channel) : p(numbers), same(Last ? vf{} : splat(numbers[channel])) {}
  INLINE vf at(int64_t i) const { return Last ? load_float(p + i) : same; }
};

// body(j, channel, count) for the rows of a patch: `count` elements from j in memory, channels last all channels of a pixel,
// else pixels of the channel.
template <bool Last, class Body>
INLINE void for_rows(const NormTiling& tiling, int64_t unit, const Patch& patch, Body&& body) {
  const int64_t rows = Last ? patch.pixels : patch.channels, count = Last ? tiling.channels : patch.pixels;
  int64_t at = tiling.offset(unit, patch);
  for (int64_t row = 0; row < rows; ++row, at += Last ? tiling.channels : tiling.pixels)
    body(at, Last ? 0 : patch.channel + row, count);
}

// N of these numbers for the vectors of a span: of each channel channels last, else of its one channel.
template <int N, bool Last>
struct SpanNumbers {
  vf of[N][Last ? 2 : 1];
  INLINE SpanNumbers(const float* const (&numbers)[N], int64_t channel) {
    for (int n = 0; n < N; ++n)
      if constexpr (Last) of[n][0] = load_float(numbers[n] + channel), of[n][1] = load_float(numbers[n] + channel + LANES);
      else of[n][0] = splat(numbers[n][channel]);
  }
  INLINE vf at(int n, int k) const { return of[n][Last ? k % 2 : 0]; }
};

// body(j, span, numbers, at) for the spans of a patch, from j on in memory, with N numbers for each; `at` is where one begins
// if those of the unit lie one after the other in the order of these calls. Channels last, the pixels of the same channels
// follow each other, and then comes done(channel, true); else done(channel, first) after at most CHAIN spans of a channel.
template <bool Last, int N, class Body, class Done>
INLINE void for_patch(const NormTiling& tiling, int64_t unit, const Patch& patch, const float* const (&numbers)[N], Body&& body,
                      Done&& done) {
  int64_t j = tiling.offset(unit, patch), at = tiling.spans_begin(patch);
  if constexpr (Last) {
    for_spans<2>(tiling.unit_channels, [&](int64_t i, auto span) {
      const SpanNumbers<N, Last> own(numbers, i);
      int64_t here = j + i, pixel = 0;
      if constexpr (decltype(span)::whole)
        for (; pixel + 2 <= patch.pixels; pixel += 2, here += 2 * tiling.channels, at += 2 * PAIR)
          body(here, Twice{tiling.channels}, own, at);
      for (; pixel < patch.pixels; ++pixel, here += tiling.channels, at += PAIR) body(here, span, own, at);
      done(i, true);
    });
  } else {
    for (int64_t channel = patch.channel; channel < patch.channel + patch.channels; ++channel, j += tiling.pixels) {
      const SpanNumbers<N, Last> own(numbers, channel);
      for (int64_t begin = 0; begin == 0 || begin < patch.pixels; begin += 2 * CHAIN * PAIR) {  // once for no pixels as well
        for_spans<4>(min(2 * CHAIN * PAIR, patch.pixels - begin), [&](int64_t i, auto span) {
          body(j + begin + i, span, own, at);
          at += span.vectors * LANES;
        });
        done(channel, begin == 0);
      }
    }
  }
}

// ---- statistics ----------------------------------------------------------------------------------------------------

// Sums of x - pivot and of its square over elements of one group, with a pivot near their mean: that of one in SHARE of them,
// which is within sqrt(SHARE - 1) deviations of it.
struct Moments {
  float pivot, sum, squares;
};
constexpr int64_t SHARE = 16;

template <class T>
INLINE Moments moments_of(const T* x, int64_t count, int64_t ahead) {
  if (!count) return {};
  vf some{};
  int64_t used = 0;
  for (; used * SHARE + LANES <= count; used += LANES) some = some + load_float(x + used * SHARE);
  if (!used) some = load_part(x, used = count);
  const float pivot = sum(some) / (float)used;
  vf total{}, square{};
  for (int64_t begin = 0; begin < count; begin += 2 * CHAIN * PAIR) {
    const int64_t end = min(count, begin + 2 * CHAIN * PAIR);
    vf sums[4] = {}, squares[4] = {};
    int64_t i = begin;
    for (; i + 2 * PAIR <= end; i += 2 * PAIR)
      for (int k = 0; k < 4; k += 2) {
        vf v[2];
        span_load(x + i + k * LANES, Whole<2>{}, v);
        if (ahead) span_prefetch(x + i + k * LANES + ahead, Whole<2>{});
        for (int h = 0; h < 2; ++h) {
          const vf d = v[h] - pivot;
          sums[k + h] = sums[k + h] + d;
          squares[k + h] = fma(d, d, squares[k + h]);
        }
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

// The same of each of `count` channels over `pixels` rows of `channels`: pivots, sums and squares, `padded` apart.
template <class T>
INLINE void moments_of_columns(const T* x, int64_t pixels, int64_t channels, int64_t count, int64_t padded, float* out,
                               int64_t ahead) {
  const float share = 1.0f / (float)ceil_div(pixels, SHARE);
  for_spans<2>(count, [&](int64_t c, auto span) {
    constexpr int V = decltype(span)::vectors;
    vf pivot[V] = {}, sums[2][V] = {}, squares[2][V] = {}, v[V];
    for (int64_t p = 0; p < pixels; p += SHARE) {
      span_load(x + p * channels + c, span, v);
      for (int i = 0; i < V; ++i) pivot[i] = fma(v[i], splat(share), pivot[i]);
    }
    const auto add = [&](int64_t p, int k) {
      const T* at = x + p * channels + c;
      span_load(at, span, v);
      if (ahead) span_prefetch(at + ahead, span);
      for (int i = 0; i < V; ++i) {
        const vf d = v[i] - pivot[i];
        sums[k][i] = sums[k][i] + d;
        squares[k][i] = fma(d, d, squares[k][i]);
      }
    };
    int64_t p = 0;
    for (; p + 2 <= pixels; p += 2) add(p, 0), add(p + 1, 1);
    if (p < pixels) add(p, 0);
    for (int i = 0; i < V; ++i) {
      float* at = out + c + i * LANES;
      const int64_t n = min(LANES, count - c - i * LANES);
      if (n <= 0) continue;
      block_store(at, pivot[i], n);
      block_store(at + padded, sums[0][i] + sums[1][i], n);
      block_store(at + 2 * padded, squares[0][i] + squares[1][i], n);
    }
  });
}

// The same of units whose channels lie last: for_parts(add) calls add(slot, count, pivot, sum, squares) for parts of each channel.
template <class T, class Body, class Parts>
INLINE void groups_of_parts(const NormTiling& tiling, Body&& body, Parts&& for_parts) {
  const double whole = 1.0 / (double)max(1, tiling.per * tiling.pixels);
  double *means = new double[2 * tiling.padded], *totals = means + tiling.padded;  // per channel first
  const auto clear = [&] {
    for (int64_t k = 0; k < tiling.unit_channels; ++k) totals[k] = 0;
  };
  const auto of_group = [&](int64_t g) {
    double total = 0;
    for (int64_t i = g * tiling.per; i < (g + 1) * tiling.per; ++i) total += totals[tiling.slot<T>(i)];
    return total * whole;
  };
  clear();
  for_parts([&](int64_t k, double count, double pivot, double sum, double) { totals[k] += count * pivot + sum; });
  for (int64_t g = 0; g < tiling.unit_groups; ++g) {
    const double mean = of_group(g);
    for (int64_t i = g * tiling.per; i < (g + 1) * tiling.per; ++i) means[tiling.slot<T>(i)] = mean;
  }
  clear();
  for_parts([&](int64_t k, double count, double pivot, double sum, double squares) {
    const double off = pivot - means[k];
    totals[k] += squares + off * (2 * sum + count * off);
  });
  for (int64_t g = 0; g < tiling.unit_groups; ++g) body(g, means[tiling.slot<T>(g * tiling.per)], of_group(g));
  delete[] means;
}

// Mean and sum of squared differences from it, of every group of a unit. `moments` are those of its tiles.
template <class T, bool Last, class Body>
INLINE void for_groups(const NormTiling& tiling, const float* moments, Body&& body) {
  const double whole = 1.0 / (double)max(1, tiling.per * tiling.pixels);
  if constexpr (!Last) {
    const auto* of = (const Moments*)moments;
    double mean = 0, spread = 0;
    const auto count = [&](int64_t tile) {
      const Patch patch = tiling.patch(tile);
      return (double)(patch.channels * patch.pixels);
    };
    for (int64_t tile = 0; tile < tiling.tiles; ++tile) mean += count(tile) * of[tile].pivot + of[tile].sum;
    mean *= whole;
    for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
      const double off = of[tile].pivot - mean;
      spread += of[tile].squares + off * (2 * of[tile].sum + count(tile) * off);
    }
    body(0, mean, spread * whole);
  } else {
    groups_of_parts<T>(tiling, body, [&](auto&& add) {
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        const float* pivots = moments + 3 * tile * tiling.padded;
        const double count = (double)tiling.patch(tile).pixels;
        for (int64_t k = 0; k < tiling.unit_channels; ++k)
          add(k, count, pivots[k], pivots[tiling.padded + k], pivots[2 * tiling.padded + k]);
      }
    });
  }
}

// ---- forward and backward ------------------------------------------------------------------------------------------

template <class T, bool Silu, bool Last>
INLINE void group_norm_silu_fwd_as(const NormTiling& tiling, const Modulation& modulation, const T* x, double eps, T* y,
                                   float* stats, int64_t threads) {
  const bool stream = tiling.streams(y);
  const int64_t coefficients = NormCoefficients::FORWARD * tiling.padded;  // the moments of the tiles follow
  const int64_t moments = 3 * (Last ? tiling.padded : 1);
  const auto reduce = [&](int64_t unit, int64_t tile, float* scratch, int64_t ahead) {
    const Patch patch = tiling.patch(tile);
    const T* in = x + tiling.offset(unit, patch);
    float* out = scratch + coefficients + tile * moments;
    if constexpr (Last)
      moments_of_columns(in, patch.pixels, tiling.channels, tiling.unit_channels, tiling.padded, out, ahead);
    else *(Moments*)out = moments_of(in, patch.channels * patch.pixels, ahead);
  };
  const auto finish = [&](int64_t unit, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    for_groups<T, Last>(tiling, scratch + coefficients, [&](int64_t g, double mean, double variance) {
      const float center = (float)mean, remainder = (float)(mean - center);
      const float rstd = (float)(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps));
      c.group(g * tiling.per, tiling.per, center, remainder, rstd);
      if (!stats) return;
      float* out = stats + 3 * (unit * tiling.unit_groups + g);
      out[0] = center, out[1] = remainder, out[2] = rstd;
    });
    c.template modulate<T, false>(tiling, unit, modulation);
  };
  const auto apply = [&](int64_t unit, int64_t tile, float* scratch, int64_t ahead) {
    const NormCoefficients c(tiling, scratch);
    for_rows<Last>(tiling, unit, tiling.patch(tile), [&](int64_t row, int64_t channel, int64_t count) {
      const RowOf<Last> center(c.center, channel), slope(c.slope, channel), level(c.level, channel);
      for_spans<4>(count, [&](int64_t i, auto span) {
        constexpr int V = decltype(span)::vectors;
        vf v[V], sigma[V], rest[V];
        span_load(x + row + i, span, v);
        if (ahead) span_prefetch(x + row + i + ahead, span);
        for (int k = 0; k < V; ++k) {
          const int64_t at = i + k * LANES;
          v[k] = fma(v[k] - center.at(at), slope.at(at), level.at(at));
        }
        if constexpr (Silu) {
          sigmoid_factors<V>(v, sigma, rest);
          for (int k = 0; k < V; ++k) v[k] = v[k] * sigma[k];
        }
        span_store(y + row + i, span, v, stream);
      });
    });
  };
  tiling.run(threads, coefficients + tiling.tiles * moments, sizeof(T), false, [](int64_t, float*) {}, reduce, finish, apply);
}

// `stats` are those of the forward pass. grad_weight and grad_bias are [channels], grad_scale and grad_shift [samples,
// channels]; null where they are not wanted.
template <class T, bool Silu, bool Last>
INLINE void group_norm_silu_bwd_as(const NormTiling& tiling, const Modulation& modulation, const T* x, const T* grad_y,
                                   const float* stats, T* grad_x, void* grad_weight, void* grad_bias, void* grad_scale,
                                   void* grad_shift, int64_t threads) {
  // Where half of a second-level cache holds x, dz and dx of a unit, the lines of dx are fetched while dz is computed: stores
  // around the caches leave memory idle then, and wait for it in the short pass that follows.
  const bool fetch = !Last && !tiling.shared(tiling.useful(threads)) &&
                     tiling.unit_size() * (int64_t)(2 * sizeof(T) + sizeof(float)) <= AHEAD_BYTES;
  const bool stream = !fetch && tiling.streams(grad_x);
  const int64_t coefficients = NormCoefficients::BACKWARD * tiling.padded;
  // then the sums of the tiles: of dz, and of dz * (x - center); then dz itself, where it is kept
  const int64_t width = tiling.padded, slots = Last ? tiling.tiles : tiling.parts, sums = 2 * slots * width;
  const auto sums_of = [&](float* scratch, int64_t slot) { return scratch + coefficients + 2 * slot * width; };
  constexpr int COPIES = Last ? 2 : 1;  // what is kept
  const bool keep = (Silu || Last) && tiling.unit_size() <= KEPT && !tiling.shared(tiling.useful(threads));
  // of the samples: (1 + scale) * dz and (1 + scale) * dz * xhat summed over the pixels, for the gradients of weight and bias
  const int64_t all = tiling.samples * tiling.channels;
  const bool affine = grad_weight || grad_bias;
  float* totals = new float[affine ? 2 * all + 1 : 1];
  // v: from x to d = x - center; dz: from dy to dz. The first numbers are center, slope and level.
  const auto differentiate = [](auto span, const auto& own, vf* v, vf* dz) {
    constexpr int V = decltype(span)::vectors;
    vf z[V], sigma[V], rest[V];
    for (int k = 0; k < V; ++k) v[k] = v[k] - own.at(0, k);
    if constexpr (Silu) {
      for (int k = 0; k < V; ++k) z[k] = fma(v[k], own.at(1, k), own.at(2, k));
      sigmoid_factors<V>(z, sigma, rest);
      for (int k = 0; k < V; ++k) dz[k] = dz[k] * (sigma[k] * fma(z[k], rest[k], splat(1.0f)));
    }
  };
  const auto prepare = [&](int64_t unit, float* scratch) {
    const NormCoefficients c(tiling, scratch);
    for (int64_t g = 0; g < tiling.unit_groups; ++g) {
      const float* in = stats + 3 * (unit * tiling.unit_groups + g);
      c.group(g * tiling.per, tiling.per, in[0], in[1], in[2]);
    }
    c.template modulate<T, true>(tiling, unit, modulation);
  };
  const auto reduce = [&](int64_t unit, int64_t tile, float* scratch, int64_t) {
    const NormCoefficients c(tiling, scratch);
    const float* const numbers[] = {c.center, c.slope, c.level};
    float* kept = scratch + coefficients + sums;
    float* out = sums_of(scratch, Last ? tile : tiling.parts > 1 ? tile % tiling.parts : 0);
    vf some[4] = {}, products[4] = {};
    const auto body = [&](int64_t j, auto span, const auto& own, int64_t at) {
      constexpr int V = decltype(span)::vectors;
      vf v[V], dz[V];
      span_load(x + j, span, v);
      span_load(grad_y + j, span, dz);
      if constexpr (Last) {
        const int64_t later = j + PIXELS_AHEAD * tiling.channels;
        span_prefetch(x + later, span), span_prefetch(grad_y + later, span);
      } else {
        for (int k = 0; k < V; ++k) fetch_ahead(x + j + k * LANES), fetch_ahead(grad_y + j + k * LANES);
        if (fetch) span_prefetch(grad_x + j, span);
      }
      differentiate(span, own, v, dz);
      for (int k = 0; k < V; ++k) some[k] = some[k] + dz[k], products[k] = fma(dz[k], v[k], products[k]);
      if (!keep) return;
      float* to = kept + COPIES * at;
      for (int k = 0; k < V; ++k) store(to + k * LANES, dz[k]);
      if (Last)
        for (int k = 0; k < V; ++k) store(to + (V + k) * LANES, v[k]);
    };
    const auto done = [&](int64_t channel, bool first) {
      if constexpr (Last) {
        for (int k = 0; k < 2; ++k) {
          store(out + channel + k * LANES, some[k] + some[k + 2]);
          store(out + width + channel + k * LANES, products[k] + products[k + 2]);
        }
      } else {
        const float total = sum((some[0] + some[1]) + (some[2] + some[3]));
        const float product = sum((products[0] + products[1]) + (products[2] + products[3]));
        out[channel] = first ? total : out[channel] + total;
        out[width + channel] = first ? product : out[width + channel] + product;
      }
      for (int k = 0; k < 4; ++k) some[k] = products[k] = vf{};
    };
    for_patch<Last>(tiling, unit, tiling.patch(tile), numbers, body, done);
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
          const float* from = sums_of(scratch, slot) + tiling.slot<T>(i);
          total += from[0], product += from[width];
        }
        product = rstd * (product - remainder * total);
        by_mean += c.factor[i] * total, by_deviation += c.factor[i] * product;
        if (affine) totals[at + i] = (float)(c.own[i] * total), totals[all + at + i] = (float)(c.own[i] * product);
        Modulation::write(grad_shift, modulation.dtype, at + i, (float)total);
        if (grad_scale)
          Modulation::write(grad_scale, modulation.dtype, at + i,
                            (float)(modulation.weight_at(channel + i) * product + modulation.bias_at(channel + i) * total));
      }
      const double pull = -rstd * rstd * by_deviation / size, push = -rstd * by_mean / size - pull * remainder;
      for (int64_t i = g * tiling.per; i < (g + 1) * tiling.per; ++i) {
        c.pull[i] = canonical((float)pull), c.push[i] = canonical((float)push);
        if (size == 1) c.slope[tiling.slot<T>(i)] = c.push[i] = 0;  // a constant: x - center is 0 wherever these are used
      }
    }
    tiling.to_slots<T>(c.pull), tiling.to_slots<T>(c.push);
  };
  const auto apply = [&](int64_t unit, int64_t tile, float* scratch, int64_t ahead) {
    const NormCoefficients c(tiling, scratch);
    const float *const kept = scratch + coefficients + sums, *const numbers[] = {c.center, c.slope, c.level, c.pull, c.push};
    const auto body = [&](int64_t j, auto span, const auto& own, int64_t at) {
      constexpr int V = decltype(span)::vectors;
      vf v[V], dz[V];
      const float* from = kept + COPIES * at;
      if (!Last || !keep) span_load(x + j, span, v);
      if (!keep) span_load(grad_y + j, span, dz);
      else
        for (int k = 0; k < V; ++k)
          dz[k] = load<vf>(from + k * LANES), v[k] = Last ? load<vf>(from + (V + k) * LANES) : v[k] - own.at(0, k);
      if (ahead) span_prefetch(x + j + ahead, span), span_prefetch(grad_y + j + ahead, span);
      if (!keep) differentiate(span, own, v, dz);
      for (int k = 0; k < V; ++k) v[k] = fma(dz[k], own.at(1, k), fma(v[k], own.at(3, k), own.at(4, k)));
      span_store(grad_x + j, span, v, stream);
    };
    for_patch<Last>(tiling, unit, tiling.patch(tile), numbers, body, [](int64_t, bool) {});
  };
  const int64_t size = coefficients + sums + (keep ? COPIES * tiling.spans_size() : 0);
  tiling.run(threads, size, 2 * sizeof(T), keep, prepare, reduce, finish, apply);
  if (affine) {
    double *by_bias = new double[2 * tiling.channels], *by_weight = by_bias + tiling.channels;
    for (int64_t c = 0; c < 2 * tiling.channels; ++c) by_bias[c] = 0;
    for (int64_t i = 0; i < all; i += tiling.channels)
      for (int64_t c = 0; c < tiling.channels; ++c) by_bias[c] += totals[i + c], by_weight[c] += totals[all + i + c];
    for (int64_t c = 0; c < tiling.channels; ++c) {
      Modulation::write(grad_weight, modulation.affine_dtype, c, (float)by_weight[c]);
      Modulation::write(grad_bias, modulation.affine_dtype, c, (float)by_bias[c]);
    }
    delete[] by_bias;
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

inline void group_norm_silu_fwd(int64_t dtype, int64_t samples, int64_t channels, int64_t pixels, int64_t last,
                                const void* x, int64_t affine_dtype, const void* weight, const void* bias,
                                int64_t modulation_dtype, const void* scale, const void* shift, int64_t groups, double eps,
                                int64_t silu, void* y, float* stats, int64_t threads) {
  const NormTiling tiling(samples, channels, groups, pixels, last, false);
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

inline void group_norm_silu_bwd(int64_t dtype, int64_t samples, int64_t channels, int64_t pixels, int64_t last,
                                const void* x, int64_t affine_dtype, const void* weight, const void* bias,
                                int64_t modulation_dtype, const void* scale, const void* shift, int64_t groups, int64_t silu,
                                const float* stats, const void* grad_y, void* grad_x, void* grad_weight, void* grad_bias,
                                void* grad_scale, void* grad_shift, int64_t threads) {
  const NormTiling tiling(samples, channels, groups, pixels, last, true);
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

// One of two images side by side, and, where it is known already, [samples][parts][mean, squares, count][channels] of it.
struct NormImage {
  const float* x;
  int64_t channels;
  const float* known;
  int64_t parts;
};

// Center, slope and level of each channel, out [samples][3][channels]: what z is of an image whose channels lie last, `own` of
// them in x and the others in skip.
inline void group_norm_coefficients(int64_t samples, int64_t channels, int64_t pixels, int64_t own, const float* x,
                                    const float* skip, const float* known, int64_t parts, const float* skip_known,
                                    int64_t skip_parts, int64_t affine_dtype, const void* weight, const void* bias,
                                    int64_t modulation_dtype, const void* scale, const void* shift, int64_t groups, double eps,
                                    float* out, int64_t threads) {
  const NormTiling tiling(samples, channels, groups, pixels, true, false);
  const Modulation modulation{affine_dtype, modulation_dtype, weight, bias, scale, shift};
  const NormImage images[] = {{x, own, known, parts}, {skip, channels - own, skip_known, skip_parts}};
  const int64_t moments = 3 * tiling.padded, unit = tiling.tiles * moments;
  const bool read = !known || (skip && !skip_known);
  const Aligned all(read ? samples * unit : 0);
  threads = tiling.useful(threads);
  parallel_for(read ? samples * tiling.tiles : 0, threads, [&](int64_t i) {
    const Patch patch = tiling.patch(i % tiling.tiles);
    const int64_t pixel = i / tiling.tiles * pixels + patch.pixel;
    float* to = all.data + i * moments;
    for (const NormImage& image : images) {
      const int64_t count = image.channels;
      if (image.x && !image.known) moments_of_columns(image.x + pixel * count, patch.pixels, count, count, tiling.padded, to, 0);
      to += count;
    }
  });
  parallel_for(samples, samples * channels < 4096 ? 1 : threads, [&](int64_t sample) {
    const Aligned scratch(NormCoefficients::FORWARD * tiling.padded);
    const NormCoefficients c(tiling, scratch.data);
    const auto finish = [&](int64_t g, double mean, double variance) {
      const float center = (float)mean, rstd = (float)(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps));
      c.group(g * tiling.per, tiling.per, center, (float)(mean - center), rstd);
    };
    groups_of_parts<float>(tiling, finish, [&](auto&& add) {
      int64_t first = 0;
      for (const NormImage& image : images) {
        const int64_t count = image.channels, steps = !image.x ? 0 : image.known ? image.parts : tiling.tiles;
        for (int64_t part = 0; part < steps; ++part) {
          if (image.known) {
            const float* from = image.known + (sample * image.parts + part) * 3 * count;
            for (int64_t k = 0; k < count; ++k) add(first + k, from[2 * count + k], from[k], 0, from[count + k]);
          } else {
            const float* from = all.data + sample * unit + part * moments + first;
            const double size = (double)tiling.patch(part).pixels;
            for (int64_t k = 0; k < count; ++k)
              add(first + k, size, from[k], from[tiling.padded + k], from[2 * tiling.padded + k]);
          }
        }
        first += count;
      }
    });
    c.template modulate<float, false>(tiling, sample, modulation);
    for (int64_t k = 0; k < 3; ++k)
      for_blocks(channels, [&](int64_t i, int64_t n) {
        block_store(out + (sample * 3 + k) * channels + i, block_load(scratch.data + k * tiling.padded + i, n), n);
      });
  });
}

FASTGEN_KERNELS(group_norm_silu, KERNEL(group_norm_silu_fwd), KERNEL(group_norm_silu_bwd), KERNEL(group_norm_coefficients))

FASTGEN_END
