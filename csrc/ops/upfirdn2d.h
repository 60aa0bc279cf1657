// upfirdn2d: insert zeros, pad, filter and decimate images. fastgen/ops/upfirdn2d.py has the mathematics.
//
// No zero is ever inserted: an output meets only every up-th weight of the filter, and outputs `phases` apart meet the same
// ones. An output row is made in two steps from a float32 row in the first-level cache that has its margins of zeros: the
// vertical sum of input rows (for filters that are products; others keep the rows themselves), then the horizontal one.
#pragma once
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// One direction. Output o meets weight k of the filter at input (o * down - pad + k) / up, where that is whole. Divisions are
// slow, so that all are made beforehand.
struct Axis {
  int64_t in, out, up, down, pad, size, phases, step;
  int64_t *first, *weight;  // of each output: the first input that it meets, and the weight there
  int64_t lowest, span;     // inputs [lowest, lowest + span) are all that any output meets
  Axis(int64_t in_, int64_t out_, int64_t up_, int64_t down_, int64_t pad_, int64_t size_)
      : in(in_), out(out_), up(up_), down(down_), pad(pad_), size(size_) {
    int64_t a = up, b = down;
    while (b) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    phases = min(up / a, out), step = down / a;
    first = new int64_t[2 * out], weight = first + out;
    for (int64_t o = 0; o < out; ++o) {
      const int64_t start = o * down - pad;
      first[o] = start >= 0 ? ceil_div(start, up) : -(-start / up);
      weight[o] = first[o] * up - start;
    }
    const int64_t end = (out - 1) * down - pad + size - 1;  // the last place of the filter
    lowest = first[0];
    span = max(0, (end >= 0 ? end / up : -ceil_div(-end, up)) - lowest + 1);
  }
  Axis(const Axis&) = delete;
  ~Axis() { delete[] first; }
};

// A sum of N rows of S with weights; N = 0: as many as `taps` says.
template <int N, class S>
struct Sum {
  const S* source[N];
  vf weight[N];
  INLINE Sum(const S* const* source_, const float* weight_, int64_t) {
    for (int k = 0; k < N; ++k) source[k] = source_[k], weight[k] = splat(weight_[k]);
  }
  INLINE vf at(int64_t i, int64_t n) const {
    vf total = weight[0] * block_load(source[0] + i, n);
    for (int k = 1; k < N; ++k) total = fma(weight[k], block_load(source[k] + i, n), total);
    return total;
  }
};
template <class S>
struct Sum<0, S> {
  const S* const* source;
  const float* weight;
  int64_t taps;
  INLINE Sum(const S* const* source_, const float* weight_, int64_t taps_)
      : source(source_), weight(weight_), taps(taps_) {}
  INLINE vf at(int64_t i, int64_t n) const {
    vf total{};
    for (int64_t k = 0; k < taps; ++k) total = fma(splat(weight[k]), block_load(source[k] + i, n), total);
    return total;
  }
};
template <int N>
struct Taps {
  static constexpr int count = N;
};
// body(Taps<N>) for the common numbers of taps, else body(Taps<0>).
template <class Body>
INLINE void with_taps(int64_t taps, Body&& body) {
  if (taps == 2) body(Taps<2>{});
  else if (taps == 4) body(Taps<4>{});
  else if (taps == 6) body(Taps<6>{});
  else body(Taps<0>{});
}

// The filter in the order in which it meets the image: a product of `vertical` and `horizontal`, or whole.
struct Filter {
  int64_t height, width;
  bool product;
  float *whole, *vertical, *horizontal;

  // values [height, width], or [width] for both directions if height is 0; null is the identity
  Filter(const float* values, int64_t height_, int64_t width_, bool flipped, float gain)
      : height(values ? height_ ? height_ : width_ : 1), width(values ? width_ : 1), product(!values || !height_) {
    whole = new float[height * width + height + width];
    vertical = whole + height * width, horizontal = vertical + height;
    for (int64_t i = 0; product && i < width; ++i) {
      horizontal[i] = values ? values[flipped ? i : width - 1 - i] : 1.0f;
      vertical[i] = gain * horizontal[i];
    }
    if (product) return;
    for (int64_t i = 0; i < height * width; ++i) whole[i] = values[flipped ? i : height * width - 1 - i];
    product = separate(gain);
    for (int64_t i = 0; i < height * width; ++i) whole[i] *= gain;
  }
  Filter(const Filter&) = delete;
  ~Filter() { delete[] whole; }

  // Whether the filter is a product to within the rounding of its values, as outer products are; finds the factors.
  bool separate(float gain) const {
    int64_t largest = 0;
    for (int64_t i = 0; i < height * width; ++i)
      if (magnitude(whole[i]) > magnitude(whole[largest])) largest = i;
    const double pivot = whole[largest];
    const float *row = whole + largest / width * width, *column = whole + largest % width;
    for (int64_t i = 0; i < height; ++i) {
      const double factor = pivot != 0 ? column[i * width] / pivot : 0;
      for (int64_t j = 0; j < width; ++j) {
        const double value = factor * row[j];
        if (!(magnitude(whole[i * width + j] - value) <= 2.4e-7 * magnitude(value))) return false;
        horizontal[j] = row[j];
      }
      vertical[i] = (float)(gain * factor);
    }
    return true;
  }
  static INLINE double magnitude(double x) { return x < 0 ? -x : x; }
};

// What one task needs: rows with margins, and for each phase the sources and the weights of its outputs. A row of pixels that
// are `unit` floats wide is split into `step` parts, so that an output's neighbours are neighbours in memory (not where the
// channels come last: there pixels are far apart anyway).
struct Workspace {
  const Axis& axis;
  const Filter& filter;
  int64_t unit, parts, part, row, most;
  int64_t begin, count, offset;  // inputs [begin, begin + count) are in the image, `offset` pixels into the row here
  float *memory, *whole, *scratch, *weights;
  const float** sources;
  int64_t *taps, *places;  // places: of each tap within a row

  Workspace(const Axis& axis_, const Filter& filter_, int64_t unit_, int64_t rows)
      : axis(axis_), filter(filter_), unit(unit_), parts(unit == 1 ? axis.step : 1), most(rows * axis.size) {
    part = (ceil_div(axis.span, parts) + 2) * unit + 2 * LANES;
    row = part * parts;
    begin = min(max(axis.lowest, 0), axis.in);
    count = max(0, min(axis.lowest + axis.span, axis.in) - begin);
    offset = begin - axis.lowest;
    const int64_t scattered = unit == 1 && axis.phases > 2 ? ceil_div(axis.out, axis.phases) + LANES : 0;
    memory = new float[rows * row + axis.span * unit + LANES + scattered + axis.phases * most + 1];
    for (int64_t i = 0; i < rows * row; ++i) memory[i] = 0;
    whole = memory + rows * row;
    scratch = whole + axis.span * unit + LANES;
    weights = scratch + scattered;
    sources = new const float*[axis.phases * most + 1];
    taps = new int64_t[axis.phases * (axis.size + 1)];
    places = taps + axis.phases;
    for (int64_t r = 0; r < axis.phases; ++r) {
      int64_t at = axis.first[r] - axis.lowest;
      for (int64_t t = 0, k = axis.weight[r]; k < axis.size; ++t, ++at, k += axis.up)
        places[r * axis.size + t] = at % parts * part + at / parts * unit;
    }
    meet_none();
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    delete[] memory;
    delete[] sources;
    delete[] taps;
  }
  // Row `slot` = the sum of input rows with weights.
  template <class T>
  INLINE void fill(int64_t slot, const T* const* inputs, const float* weight, int64_t number) {
    float* out = parts == 1 ? memory + slot * row + offset * unit : whole;
    with_taps(number, [&](auto chosen) {
      const Sum<decltype(chosen)::count, T> sum(inputs, weight, number);
      for_blocks(count * unit, [&](int64_t i, int64_t n) { block_store(out + i, sum.at(i, n), n); });
    });
    if (parts > 1) split(memory + slot * row);
  }
  INLINE void split(float* out) const {
    int64_t i = 0;
    if (parts == 2) {
      float *even = out + offset % 2 * part + offset / 2, *odd = out + (offset + 1) % 2 * part + (offset + 1) / 2;
      for (; i + 2 * LANES <= count; i += 2 * LANES) {
        vf a, b;
        deinterleave(load<vf>(whole + i), load<vf>(whole + i + LANES), a, b);
        store(even + i / 2, a);
        store(odd + i / 2, b);
      }
    }
    for (; i < count; ++i) out[(offset + i) % parts * part + (offset + i) / parts] = whole[i];
  }
  // Sources and weights of every phase from row `slot` and a row of the filter; adds to those of rows before.
  INLINE void meet(int64_t slot, const float* weight) {
    const float* from = memory + slot * row;
    for (int64_t r = 0; r < axis.phases; ++r) {
      const int64_t *place = places + r * axis.size, at = r * most + taps[r];
      for (int64_t t = 0, k = axis.weight[r]; k < axis.size; ++t, k += axis.up) {
        sources[at + t] = from + place[t];
        weights[at + t] = weight[k];
        ++taps[r];
      }
    }
  }
  INLINE void meet_none() {
    for (int64_t r = 0; r < axis.phases; ++r) taps[r] = 0;
  }
  template <int N>
  INLINE Sum<N, float> sum(int64_t r) const {
    return Sum<N, float>(sources + r * most, weights + r * most, taps[r]);
  }
  // The outputs of one row.
  template <class T>
  INLINE void emit(T* y, bool stream) const {
    if (unit > 1) return emit_pixels(y, stream);
    if (axis.phases > 2) return emit_scattered(y);
    if (axis.phases == 1)
      return with_taps(taps[0], [&](auto chosen) {
        const auto total = sum<decltype(chosen)::count>(0);
        for_blocks(axis.out, [&](int64_t i, int64_t n) { block_store(y + i, total.at(i, LANES), n, stream); });
      });
    with_taps(axis.out < 2 || taps[0] == taps[1] ? taps[0] : 0, [&](auto chosen) {
      const auto total0 = sum<decltype(chosen)::count>(0), total1 = sum<decltype(chosen)::count>(axis.out > 1);
      const auto pair = [&](int64_t i, int64_t n0, int64_t n1) {
        vf low, high;
        interleave(total0.at(i, LANES), total1.at(i, LANES), low, high);
        block_store(y + 2 * i, low, n0, stream);
        block_store(y + 2 * i + LANES, high, n1, stream);
      };
      int64_t i = 0;
      for (; 2 * (i + LANES) <= axis.out; i += LANES) pair(i, LANES, LANES);
      const int64_t rest = axis.out - 2 * i;
      if (rest > LANES) pair(i, LANES, rest - LANES);
      else if (rest > 0) {
        vf low, high;
        interleave(total0.at(i, LANES), total1.at(i, LANES), low, high);
        block_store(y + 2 * i, low, rest, stream);
      }
    });
  }
  template <class T>
  INLINE void emit_scattered(T* y) const {
    const int64_t length = ceil_div(axis.out, axis.phases);
    for (int64_t r = 0; r < axis.phases; ++r) {
      const auto total = sum<0>(r);
      for (int64_t i = 0; i < length; i += LANES) store(scratch + i, total.at(i, LANES));
      for (int64_t o = r, i = 0; o < axis.out; o += axis.phases, ++i) narrow(scratch[i], y[o]);
    }
  }
  template <class T>
  INLINE void emit_pixels(T* y, bool stream) const {
    for (int64_t r = 0; r < axis.phases; ++r)
      with_taps(taps[r], [&](auto chosen) {
        const auto total = sum<decltype(chosen)::count>(r);
        for (int64_t o = r, q = 0; o < axis.out; o += axis.phases, q += axis.step)
          for_blocks(unit, [&](int64_t i, int64_t n) { block_store(y + o * unit + i, total.at(q * unit + i, n), n, stream); });
      });
  }
};

// Images of [images] planes, or, with unit > 1, of pixels of `unit` channels.
template <class T>
INLINE void upfirdn2d_as(int64_t images, int64_t unit, const T* x, const Filter& filter, const Axis& vertical,
                         const Axis& horizontal, T* y, int64_t threads) {
  const int64_t line = horizontal.out * unit, all = images * vertical.out;
  const bool stream = streamable(y, unit > 1 ? all * horizontal.out : all, unit > 1 ? unit : line);
  const int64_t group = max(1, 4 * TILE / max(1, line));  // output rows, counted through all images, of a task
  const int64_t rows = filter.product ? 1 : max(1, ceil_div(vertical.size, vertical.up));
  parallel_for(ceil_div(all, group), all * line < SERIAL ? 1 : threads, [&](int64_t task) {
    Workspace work(horizontal, filter, unit, rows);
    const T** inputs = new const T*[vertical.size];
    float* weight = new float[vertical.size];
    int64_t* held = new int64_t[rows];  // which input row each slot holds, for filters that are no products
    for (int64_t i = 0; i < rows; ++i) held[i] = -1;
    if (filter.product) work.meet(0, filter.horizontal);
    const int64_t begin = task * group, end = min(all, begin + group);
    int64_t image = begin / vertical.out, o = begin % vertical.out;
    for (int64_t i = begin; i < end; ++i) {
      int64_t number = 0;
      if (!filter.product) work.meet_none();
      for (int64_t from = vertical.first[o], k = vertical.weight[o]; k < vertical.size; ++from, k += vertical.up) {
        if (from < 0 || from >= vertical.in) continue;
        const int64_t which = image * vertical.in + from;
        inputs[number] = x + (which * horizontal.in + work.begin) * unit;
        weight[number] = filter.product ? filter.vertical[k] : 1.0f;
        if (!filter.product) {
          const int64_t slot = from % rows;
          if (held[slot] != which) work.fill(slot, inputs + number, weight + number, 1);
          held[slot] = which;
          work.meet(slot, filter.whole + k * filter.width);
        }
        ++number;
      }
      if (filter.product) work.fill(0, inputs, weight, number);
      work.emit(y + i * line, stream);
      if (++o == vertical.out) o = 0, ++image;
    }
    delete[] inputs;
    delete[] weight;
    delete[] held;
  });
}

inline void upfirdn2d(int64_t dtype, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t channels_last,
                      const void* x, const float* filter, int64_t filter_height, int64_t filter_width, int64_t up_x,
                      int64_t up_y, int64_t down_x, int64_t down_y, int64_t pad_x, int64_t pad_y, int64_t flipped,
                      double gain, int64_t out_height, int64_t out_width, void* y, int64_t threads) {
  if (!samples || !channels) return;
  const Filter prepared(filter, filter_height, filter_width, flipped, (float)gain);
  const Axis vertical(height, out_height, up_y, down_y, pad_y, prepared.height);
  const Axis horizontal(width, out_width, up_x, down_x, pad_x, prepared.width);
  with_dtype(dtype, [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    upfirdn2d_as<T>(channels_last ? samples : samples * channels, channels_last ? channels : 1, (const T*)x, prepared,
                    vertical, horizontal, (T*)y, threads);
  });
}

FASTGEN_KERNELS(upfirdn2d, KERNEL(upfirdn2d))

FASTGEN_END
