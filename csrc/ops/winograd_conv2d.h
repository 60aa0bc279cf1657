// winograd_conv2d: a 3x3 convolution of stride 1 and padding 1 on channels-last images, by minimal filtering; and a 1x1
// convolution, for which there is nothing to transform.
// fastgen/ops/winograd_conv2d.py has the mathematics.
//
// The image is cut into tiles of M x M outputs, each read from a patch of N x N = (M + 2)^2 inputs, or M = N = 1. Transformed, patches are
// V[N * N][tile][input channel] and weights U[N * N][block][input channel][BLOCK output channels], so that the convolution is
// N * N matrix products. They go by register blocks of ROWS tiles x COLUMNS vectors of output channels, a chunk of output
// channels at a time, whose products M[N * N][tile][CHUNK] stay in L2 until they are transformed back. What differs between
// calls of different thread counts is who computes a block, not how.
//
// The products may be those of integers: patches and weights in 16 bits, two channels to a word, and sums of 32 bits. A tile has
// one unit for all its integers, and a weight one for each frequency and output channel. They are chosen so that no sum
// overflows, whatever the order and the depth: by Cauchy and Schwarz it is at most the product of the two norms over the
// channels, for which there are PATCH_NORM and WEIGHT_NORM. The norm of a transformed patch is no larger than that of the patch
// times that of a row of the transformation, and so is bounded before there is anything to round.
//
// What the next normalisation needs of the result is put aside while it is written: mean and squared differences from it, of each
// row of tiles and channel. A task then has whole rows of tiles.
//
// What is convolved may be made on the way: two images side by side, normalised, through SiLU. Then the rows that a row of
// tiles reads are made first, into a ring of N of them, of which the next row of tiles finds two done.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// A register block fills the register file beside a line of weights and a broadcast.
#if defined(__AVX512F__)
constexpr int ROWS = 14, COLUMNS = 2;
#elif defined(__AVX2__)
constexpr int ROWS = 6, COLUMNS = 2;
#elif defined(FASTGEN_ONE_LANE)
constexpr int ROWS = 3, COLUMNS = 4;
#else
constexpr int ROWS = 7, COLUMNS = 4;
#endif
constexpr int64_t BLOCK = 32;              // output channels that are packed together, on every instruction set
constexpr int64_t CHUNK = 2 * BLOCK;       // output channels of a task
constexpr int64_t TILES = 56;              // tiles of a task: its products take 0.5 MB
constexpr int64_t MANY = 8;                // tasks of so many tiles are enough to keep all threads at work
constexpr int64_t SHARED_BYTES = 8 << 20;  // transformed patches that threads share where there are fewer
constexpr int64_t SKEW = 16;               // floats that keep the N * N matrices from competing for the same lines of L1

// F(4x4, 3x3) at the points 0, +-A, +-B and infinity. With 5/8 and 3/2 the error is half that of 1 and 2.
template <int M>
struct Minimal {
  static constexpr int N = 6;
  static constexpr float A = 0.625f, B = 1.5f, A2 = A * A, B2 = B * B;
  static constexpr float NORMS[N] = {2.9588f, 2.9031f, 2.9031f, 1.9353f, 1.9353f, 2.9588f};  // of the rows of `patch`
  static INLINE void patch(const vf* d, int step, vf* out) {
    const vf d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const vf even_a = fma(d2, splat(-B2), d4), odd_a = fma(d1, splat(-B2), d3) * A;
    const vf even_b = fma(d2, splat(-A2), d4), odd_b = fma(d1, splat(-A2), d3) * B;
    out[0] = fma(d0, splat(A2 * B2), fma(d2, splat(-A2 - B2), d4));
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = fma(d1, splat(A2 * B2), fma(d3, splat(-A2 - B2), d5));
  }
  static INLINE void result(const vf* m, int step, vf* out) {
    const vf even_a = m[step] + m[2 * step], odd_a = (m[step] - m[2 * step]) * A;
    const vf even_b = m[3 * step] + m[4 * step], odd_b = (m[3 * step] - m[4 * step]) * B;
    out[0] = m[0] + even_a + even_b;
    out[1] = odd_a + odd_b;
    out[2] = fma(even_a, splat(A2), even_b * B2);
    out[3] = fma(odd_a, splat(A2), fma(odd_b, splat(B2), m[5 * step]));
  }
  template <class W>
  static INLINE void weight(const W* w, int step, W* out) {
    constexpr double a = A, b = B, at_0 = 1 / (a * a * b * b);
    constexpr double at_a = 1 / (2 * a * a * (a * a - b * b)), at_b = 1 / (2 * b * b * (b * b - a * a));
    const W w0 = w[0], w1 = w[step], w2 = w[2 * step];
    out[0] = w0 * at_0;
    out[1] = (w0 + a * w1 + a * a * w2) * at_a, out[2] = (w0 - a * w1 + a * a * w2) * at_a;
    out[3] = (w0 + b * w1 + b * b * w2) * at_b, out[4] = (w0 - b * w1 + b * b * w2) * at_b;
    out[5] = w2;
  }
};

// F(2x2, 3x3) at the points 0, +-1 and infinity.
template <>
struct Minimal<2> {
  static constexpr int N = 4;
  static constexpr float NORMS[N] = {1.4143f, 1.4143f, 1.4143f, 1.4143f};
  static INLINE void patch(const vf* d, int step, vf* out) {
    const vf d1 = d[step], d2 = d[2 * step];
    out[0] = d[0] - d2, out[1] = d2 + d1, out[2] = d2 - d1, out[3] = d[3 * step] - d1;
  }
  static INLINE void result(const vf* m, int step, vf* out) {
    const vf m1 = m[step], m2 = m[2 * step];
    out[0] = m[0] + m1 + m2, out[1] = m1 - m2 + m[3 * step];
  }
  template <class W>
  static INLINE void weight(const W* w, int step, W* out) {
    const W w0 = w[0], w1 = w[step], w2 = w[2 * step];
    out[0] = w0, out[1] = (w0 + w1 + w2) / 2, out[2] = (w0 - w1 + w2) / 2, out[3] = w2;
  }
};

// F(1x1, 1x1).
template <>
struct Minimal<1> {
  static constexpr int N = 1;
  static constexpr float NORMS[N] = {1.0f};
  static INLINE void patch(const vf* d, int, vf* out) { out[0] = d[0]; }
  static INLINE void result(const vf* m, int, vf* out) { out[0] = m[0]; }
  template <class W>
  static INLINE void weight(const W* w, int, W* out) {
    out[0] = w[0];
  }
};

// Brings the line of p into L1, to be read or to be written.
INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// Two channels in a word.
struct Pair {
  int16_t even, odd;
};
template <class Word>
constexpr bool PAIRED = false;
template <>
constexpr bool PAIRED<Pair> = true;

// Whether some CPUs of this instruction set multiply pairs and add the products in one instruction; a unit must ask. Clang's
// assembler does not know it here.
#ifndef FASTGEN_FUSED_PAIRS
#if defined(__AVX512F__) && !defined(__clang__)
#define FASTGEN_FUSED_PAIRS 1
#else
#define FASTGEN_FUSED_PAIRS 0
#endif
#endif
INLINE bool fuses_pairs() {
#if FASTGEN_FUSED_PAIRS
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Products of a word with a vector of words, summed.
template <class Word, bool Fused>
struct Sum {
  using Vector = vf;
  static INLINE vf spread(float word) { return splat(word); }
  static INLINE vf add(vf a, vf b, vf sum) { return fma(a, b, sum); }
};
template <bool Fused>
struct Sum<Pair, Fused> {
  using Vector = vi;
  static INLINE vi spread(Pair word) { return splat_i(bits<int32_t>(word)); }
  static INLINE vi add(vi a, vi b, vi sum) {
#if FASTGEN_FUSED_PAIRS
    if constexpr (Fused) {
      asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    }
#endif
#if defined(__AVX512F__)
    return (vi)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    return (vi)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
    const vi even = (bits<vi>(bits<vu>(a) << 16) >> 16) * (bits<vi>(bits<vu>(b) << 16) >> 16), odd = (a >> 16) * (b >> 16);
    return bits<vi>(bits<vu>(sum) + bits<vu>(even) + bits<vu>(odd));
#endif
  }
};

// What a register block fetches while it computes, a line of each for every step: rows of the next register block, which no
// hardware recognises as a stream, and the next block of weights.
struct Ahead {
  const char *rows, *weights;
};

// R rows of a, `pitch` words apart, times a block of weights [depth][BLOCK], from a column of it on.
template <int R, bool Fused, class Word>
INLINE void product_block(int64_t depth, const Word* a, int64_t pitch, const Word* u, float* m, Ahead ahead) {
  using Terms = Sum<Word, Fused>;
  using Vector = typename Terms::Vector;
  Vector total[R][COLUMNS] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vector line[COLUMNS];
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; ++v) line[v] = load<Vector>(u + k * BLOCK + v * LANES);
    prefetch_near(ahead.rows + k * 64);
    prefetch(ahead.weights + k * 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector factor = Terms::spread(a[r * pitch + k]);
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; ++v) total[r][v] = Terms::add(factor, line[v], total[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; ++v) store(m + r * CHUNK + v * LANES, total[r][v]);
}

template <int R, bool Fused>
struct Product {
  template <class Word>
  static void run(int64_t rows, int64_t depth, const Word* a, int64_t pitch, const Word* u, float* m, Ahead ahead) {
    if (rows < R) return Product<R - 1, Fused>::run(rows, depth, a, pitch, u, m, ahead);
    for (int64_t c = 0; c < BLOCK; c += COLUMNS * LANES) product_block<R, Fused>(depth, a, pitch, u + c, m + c, ahead);
  }
};
template <bool Fused>
struct Product<0, Fused> {
  template <class Word>
  static void run(int64_t, int64_t, const Word*, int64_t, const Word*, float*, Ahead) {}
};

// The largest norms over `inputs` channels, before rounding, that keep sums of products below 2^31, and the largest integer;
// each with a margin for the rounding of what they are computed from.
INLINE double patch_norm(int64_t inputs) { return 131072 - 64 - __builtin_sqrt((double)inputs) / 2; }
INLINE double weight_norm(int64_t inputs) { return 16384 - 1 - __builtin_sqrt((double)inputs) / 2; }
constexpr float LARGEST = 32760.0f;

// Stores x, rounded to 16 bits and to even: the sum's mantissa is the integer.
INLINE void store_rounded(int16_t* p, vf x, vf factor) {
  const vu word = bits<vu>(fma(x, factor, splat(12582912.0f)));
#ifdef FASTGEN_ONE_LANE
  *p = (int16_t)word;
#else
  store(p, __builtin_convertvector(word, vh));
#endif
}

// Memory that a thread keeps between calls, since fresh pages would cost as much as the transformations that are written to
// them; its vectors lie in a line of cache each.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { delete[] data; }
  float* get(int64_t wanted) {
    if (wanted > size) {
      delete[] data;
      data = new float[wanted + 16];
      size = wanted;
    }
    return (float*)(((size_t)data + 63) / 64 * 64);
  }
};
inline Scratch& own_scratch() {  // of a task
  static thread_local Scratch scratch;
  return scratch;
}
inline Scratch& common_scratch() {  // of a call
  static thread_local Scratch scratch;
  return scratch;
}

// The image that is convolved: channels of x, then those of skip, which may be null; (value - center) * slope + level of each,
// and SiLU of that.
struct Source {
  const float *x, *skip = nullptr;
  int64_t channels = 0;         // of x, where there is more to be made of it than is there
  const float* norm = nullptr;  // [samples][center, slope, level][channels], or null
  bool silu = false;

  bool made() const { return skip || norm || silu; }

  // A pixel of `inputs` channels, `at` pixels from the first.
  INLINE void pixel(int64_t sample, int64_t at, int64_t inputs, float* out) const {
    const float* own = norm ? norm + sample * 3 * inputs : nullptr;
    some(x + at * channels, channels, own, inputs, out);
    if (skip) some(skip + at * (inputs - channels), inputs - channels, own ? own + channels : nullptr, inputs, out + channels);
  }

 private:
  static constexpr int SPAN = 4;  // vectors whose exponentials go side by side
  INLINE void some(const float* from, int64_t count, const float* own, int64_t inputs, float* out) const {
    const auto span = [&](auto several, int64_t c, int64_t n) INLINED {
      constexpr int V = decltype(several)::value;
      vf v[V], sigma[V], rest[V];
      for (int k = 0; k < V; ++k) {
        const int64_t at = c + k * LANES;
        v[k] = block_load(from + at, n);
        if (own)
          v[k] = fma(v[k] - block_load(own + at, n), block_load(own + inputs + at, n), block_load(own + 2 * inputs + at, n));
      }
      if (silu) {
        sigmoid_factors<V>(v, sigma, rest);
        for (int k = 0; k < V; ++k) v[k] = v[k] * sigma[k];
      }
      for (int k = 0; k < V; ++k) block_store(out + c + k * LANES, v[k], n);
    };
    int64_t c = 0;
    for (; c + SPAN * LANES <= count; c += SPAN * LANES) span(Several<SPAN>{}, c, LANES);
    for_blocks(c, count, [&](int64_t i, int64_t n) { span(Several<1>{}, i, n); });
  }
  template <int V>
  struct Several {
    static constexpr int value = V;
  };
};

// Rows of the image that have been made: those before `end` of a sample, from a column on, in a ring.
struct Ring {
  float* data;
  int64_t pitch;  // pixels
  int64_t sample = -1, left = 0, right = 0, end = 0;
};

// Images, their tiles, and the buffers that a call works on. Word: what products take, a float or a Pair.
template <int M, class Word>
struct Convolution {
  static constexpr int N = Minimal<M>::N, PADDING = (N - M) / 2;
  int64_t height, width, inputs, outputs, doubled;
  Source source;
  const Word* packed;
  const float* scale;  // of pairs: the unit of the products of each frequency and output channel, for a tile of unit 1
  const float* bias;
  int64_t bias_step;  // from sample to sample; 0: one bias for all
  const float* residual;
  float* y;
  float* parts;  // [samples][down][mean, squares, count][outputs], or null
  int64_t down, across, depth, pitch, blocks;

  Convolution(int64_t height_, int64_t width_, int64_t inputs_, int64_t outputs_, int64_t doubled_, const Source& source_,
              const Word* packed_, const float* scale_, const float* bias_, int64_t bias_step_, const float* residual_,
              float* y_, float* parts_ = nullptr)
      : height(height_), width(width_), inputs(inputs_), outputs(outputs_), doubled(doubled_), source(source_),
        packed(packed_), scale(scale_), bias(bias_), bias_step(bias_step_), residual(residual_), y(y_), parts(parts_),
        down(ceil_div(height_, M)), across(ceil_div(width_, M)), depth(PAIRED<Word> ? ceil_div(inputs_, 2) : inputs_),
        pitch(ceil_div(depth, 16) * 16), blocks(ceil_div(outputs_, BLOCK)) {}

  // Words from one of the N * N matrices of transformed patches to the next.
  INLINE int64_t patch_step(int64_t tiles) const { return tiles * pitch + SKEW; }
  static constexpr int64_t result_step = TILES * CHUNK + SKEW;

  struct Place {
    int64_t sample, top, left;
  };
  INLINE Place place(int64_t tile) const {
    return {tile / (down * across), tile / across % down * M, tile % across * M};
  }
  // Of the next tile; divisions would take as long as a 1x1 convolution of a pixel.
  INLINE Place after(Place at) const {
    if ((at.left += M) < width) return at;
    if ((at.top += M) < height) return {at.sample, at.top, 0};
    return {at.sample + 1, 0, 0};
  }

  // Rows and columns of the image from which the patches of tiles beside each other are read.
  struct Window {
    int64_t top, bottom, left, right;
  };
  INLINE Window window(const Place& first, int64_t tiles) const {
    const int64_t shift = doubled ? 1 : 0;
    const auto begin = [&](int64_t at) { return max(0, at - PADDING) >> shift; };
    const auto end = [&](int64_t at, int64_t size) { return ((min(size, at + PADDING) - 1) >> shift) + 1; };
    return {begin(first.top), end(first.top + M, height), begin(first.left), end(first.left + tiles * M, width)};
  }
  // Pixels of a row of the ring for `tiles` tiles beside each other.
  int64_t ring_pitch(int64_t tiles) const { return min(width, tiles * M + 2 * PADDING); }
  int64_t ring_size(int64_t tiles) const { return source.made() ? ceil_div(N * ring_pitch(tiles) * inputs, 16) * 16 : 0; }

  // Makes what tiles beside each other read, but for what the ring holds.
  void make(const Place& first, int64_t tiles, Ring& ring) const {
    const Window w = window(first, tiles);
    const int64_t shift = doubled ? 1 : 0, rows = height >> shift, columns = width >> shift;
    const bool goes_on = ring.sample == first.sample && ring.left == w.left && ring.right == w.right && ring.end > w.top;
    for (int64_t row = goes_on ? ring.end : w.top; row < w.bottom; ++row) {
      float* out = ring.data + row % N * ring.pitch * inputs;
      const int64_t from = (first.sample * rows + row) * columns;
      for (int64_t column = w.left; column < w.right; ++column)
        source.pixel(first.sample, from + column, inputs, out + (column - w.left) * inputs);
    }
    ring.sample = first.sample, ring.left = w.left, ring.right = w.right, ring.end = w.bottom;
  }

  // Sums over a patch of the squares of its elements times `factor`: all, and the largest of a channel.
  struct Squares {
    float all, most;
  };
  Squares squares(const float* const* pixel, float factor) const {
    vf all{}, most{};
    for_blocks(inputs, [&](int64_t c, int64_t n) {
      vf total[N] = {};
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
          const vf d = block_load(pixel[i * N + j] + c, n) * factor;
          total[j] = fma(d, d, total[j]);
        }
      vf own = total[0];
      for (int j = 1; j < N; ++j) own += total[j];
      all += own, most = larger(most, own);
    });
    float lane[LANES];
    store(lane, most);
    for (int width = LANES / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return {sum(all), lane[0]};
  }
  // The unit of the integers of a tile; NaN where something in its patch is not finite.
  INLINE float unit_of(const float* const* pixel) const {
    constexpr float LEAST = 4e-23f, SHRINK = 0x1p-64f;  // of smaller elements the squares may vanish, of large ones overflow
    const auto unit = [&](Squares s) {
      const float norm = __builtin_sqrtf(s.all) / (float)patch_norm(inputs), peak = __builtin_sqrtf(s.most) / LARGEST;
      return norm > peak ? norm : peak;
    };
    const Squares plain = squares(pixel, 1.0f);
    if (plain.all <= 3e38f) return unit(plain) > LEAST ? unit(plain) : LEAST;
    const Squares shrunk = squares(pixel, SHRINK);
    return shrunk.all <= 3e38f ? unit(shrunk) / SHRINK : __builtin_nanf("");
  }

  // Transforms the patches of `count` tiles, of each to v[i * step] for the N * N frequencies i, and their units. The ring has
  // room for what is made first, if anything is.
  INLINE void transform(int64_t first, int64_t count, const float* zeros, Word* v, int64_t step, float* units, Ring ring) const {
    Place at = place(first);
    for (int64_t i = 0, beside = 0; i < count; ++i) {
      if (source.made() && --beside < 0) {
        beside = min((width - at.left - 1) / M, count - i - 1);
        make(at, beside + 1, ring);
      }
      const Place next = after(at);
      transform(at, next, zeros, v + i * pitch, step, units + i, ring);
      at = next;
    }
  }

  // The same of one tile, while it fetches the next. Outside of the image it reads `zeros`.
  INLINE void transform(const Place& at, const Place& next, const float* zeros, Word* v, int64_t step, float* unit,
                        const Ring& ring) const {
    const int64_t shift = doubled ? 1 : 0, rows = height >> shift, columns = width >> shift;
    const bool made = source.made();
    const float* pixel[N * N];
    for (int64_t i = 0; i < N; ++i) {
      const int64_t row = at.top + i - PADDING;
      const float* line = made ? ring.data + ((row >> shift) % N * ring.pitch - ring.left) * inputs
                               : source.x + (at.sample * rows + (row >> shift)) * columns * inputs;
      for (int64_t j = 0; j < N; ++j) {
        const int64_t column = at.left + j - PADDING;
        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
        pixel[i * N + j] = inside ? line + (column >> shift) * inputs : zeros;
      }
    }
    float factor[N * N];
    if constexpr (PAIRED<Word>) {
      *unit = unit_of(pixel);
      for (int i = 0; i < N * N; ++i) {
        const float wanted = 1 / (Minimal<M>::NORMS[i / N] * Minimal<M>::NORMS[i % N] * *unit);
        factor[i] = wanted == wanted ? wanted : 0.0f;
        if (inputs % 2) v[i * step + depth - 1].odd = 0;
      }
    }
    // of the next tile's pixels, those that this one does not read
    const int64_t above = (next.top - PADDING) >> shift, beside = (next.left + PADDING) >> shift;
    const float* later = source.x + ((next.sample * rows + above) * columns + beside) * inputs;
    for_blocks(inputs, [&](int64_t c, int64_t n) {
      for (int64_t i = 0; i < N >> shift && c % 16 == 0 && !made; ++i)
        for (int64_t j = 0; j < M >> shift; ++j) prefetch_near(later + (i * columns + j) * inputs + c);
      vf d[N], half[N * N], out[N];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) d[i] = block_load(pixel[i * N + j] + c, n);
        Minimal<M>::patch(d, 1, out);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) half[i * N + j] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        Minimal<M>::patch(half + i * N, 1, out);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
          Word* to = v + (i * N + j) * step;
          if constexpr (PAIRED<Word>) store_rounded((int16_t*)to + c, out[j], splat(factor[i * N + j]));
          else store(to + c, out[j]);
        }
      }
    });
  }

  // Products of `count` transformed patches with a chunk of the weights.
  template <bool Fused>
  INLINE void multiply(int64_t count, int64_t chunk, const Word* v, int64_t step, float* m) const {
    const int64_t first = chunk * (CHUNK / BLOCK), last = min(blocks, first + CHUNK / BLOCK);
    const int64_t lines = depth * 64;  // bytes that a register block fetches of the weights
    for (int64_t i = 0; i < N * N; ++i)
      for (int64_t block = first; block < last; ++block) {
        const Word* own = v + i * step;
        const Word* u = packed + (i * blocks + block) * depth * BLOCK;
        const Word* next = u + (block + 1 < last ? 1 : blocks - (last - first - 1)) * depth * BLOCK;
        for (int64_t row = 0; row < count; row += ROWS) {
          const Word* a = own + row * pitch;
          const Word* more = row + ROWS < count ? a + ROWS * pitch : block + 1 < last ? own : own + step;
          Product<ROWS, Fused>::run(min(ROWS, count - row), depth, a, pitch, u,
                                    m + i * result_step + row * CHUNK + (block - first) * BLOCK,
                                    {(const char*)more, (const char*)next + min(row / ROWS, 2) * lines});
        }
      }
  }

  // Transforms the products of a tile back, adds bias and residual, and writes what lies in the image; fetches lines of the next.
  INLINE void emit(const Place& at, const Place& next, int64_t chunk, const float* m, const float* unit) const {
    const int64_t first = chunk * CHUNK, rows = min(M, height - at.top), columns = min(M, width - at.left);
    const int64_t origin = ((at.sample * height + at.top) * width + at.left) * outputs + first;
    const float* shift = bias ? bias + at.sample * bias_step + first : nullptr;
    const int64_t later = ((next.sample * height + next.top) * width + next.left) * outputs + first;
    for_blocks(min(CHUNK, outputs - first), [&](int64_t c, int64_t n) {
      vf d[N], half[M * N], out[M];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) {
          const float* from = m + (i * N + j) * result_step + c;
          if constexpr (PAIRED<Word>)
            d[i] = to_float(load<vi>(from)) * load<vf>(scale + (i * N + j) * blocks * BLOCK + first + c);
          else d[i] = load<vf>(from);
        }
        Minimal<M>::result(d, 1, out);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) half[i * N + j] = out[i];
      }
      for (int i = 0; i < M && c % 16 == 0; ++i)
        for (int j = 0; j < M; ++j) {
          const int64_t to = later + (i * width + j) * outputs + c;
          prefetch_to_write(y + to);
          if (residual) prefetch_near(residual + to);
        }
      const vf b = shift ? block_load(shift + c, n) : vf{};
      vf written[M * M];
      for (int i = 0; i < rows; ++i) {
        Minimal<M>::result(half + i * N, 1, out);
        const int64_t line = origin + i * width * outputs + c;
        for (int j = 0; j < columns; ++j) {
          const int64_t to = line + j * outputs;
          vf whole = PAIRED<Word> ? fma(out[j], splat(*unit), b) : out[j] + b;
          if (residual) whole = whole + block_load(residual + to, n);
          block_store(y + to, whole, n);
          written[i * M + j] = whole;
        }
      }
      if (parts && M > 1) put_aside(at, written, rows, columns, part_of(at) + first + c, n);
    });
  }
  INLINE float* part_of(const Place& at) const { return parts + (at.sample * down + at.top / M) * 3 * outputs; }
  // Adds the pixels of a tile to what is known of those left of it (Chan, Golub and LeVeque 1983).
  INLINE void put_aside(const Place& at, const vf* pixels, int64_t rows, int64_t columns, float* part, int64_t n) const {
    const float count = (float)(rows * columns), before = (float)(rows * at.left), whole = before + count;
    vf mean{}, squares{};
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) mean += pixels[i * M + j];
    mean = mean * (1 / count);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        const vf off = pixels[i * M + j] - mean;
        squares = fma(off, off, squares);
      }
    if (at.left) {
      const vf off = mean - block_load(part, n);
      mean = fma(off, splat(count / whole), block_load(part, n));
      squares = fma(off * off, splat(before * count / whole), squares + block_load(part + outputs, n));
    }
    block_store(part, mean, n), block_store(part + outputs, squares, n), block_store(part + 2 * outputs, splat(whole), n);
  }
  // The same of a row of pixels that has been written.
  INLINE void put_row_aside(const Place& at, int64_t chunk) const {
    const int64_t first = chunk * CHUNK;
    const float* from = y + (at.sample * height + at.top) * width * outputs + first;
    float* part = part_of(at) + first;
    for_blocks(min(CHUNK, outputs - first), [&](int64_t c, int64_t n) {
      vf mean{}, squares{};
      for (int64_t j = 0; j < width; ++j) mean += block_load(from + j * outputs + c, n);
      mean = mean * (1 / (float)width);
      for (int64_t j = 0; j < width; ++j) {
        const vf off = block_load(from + j * outputs + c, n) - mean;
        squares = fma(off, off, squares);
      }
      block_store(part + c, mean, n), block_store(part + outputs + c, squares, n);
      block_store(part + 2 * outputs + c, splat((float)width), n);
    });
  }
  INLINE void finish(int64_t tile, int64_t count, int64_t chunk, const Word* v, int64_t step, const float* units, float* m) const {
    if (PAIRED<Word> && fuses_pairs()) multiply<PAIRED<Word>>(count, chunk, v, step, m);
    else multiply<false>(count, chunk, v, step, m);
    Place at = place(tile);
    for (int64_t i = 0; i < count; ++i) {
      const Place next = after(at);
      emit(at, next, chunk, m + i * CHUNK, units + i);
      if (M == 1 && parts && next.left == 0) put_row_aside(at, chunk);
      at = next;
    }
  }

  // With many tiles a thread transforms those of its own tasks. With few, and so mostly with many channels, all transform
  // the tiles together and then share the output channels, so that the weights are read once.
  void run(int64_t samples, int64_t threads) const {
    const int64_t tiles = samples * down * across, strips = ceil_div(tiles, TILES);
    float* zeros = new float[inputs + 1]();
    if (strips >= MANY) run_apart(tiles, whole_rows(ceil_div(tiles, strips), TILES), zeros, threads);
    else if (tiles) run_together(tiles, zeros, threads);
    delete[] zeros;
  }
  // About so many tiles and at most `most`: whole rows of tiles where rows are made for them or summed up.
  int64_t whole_rows(int64_t tiles, int64_t most) const {
    return (source.made() || parts) && across <= most ? max(1, min(ceil_div(tiles, across), most / across)) * across : tiles;
  }
  void run_apart(int64_t tiles, int64_t strip, const float* zeros, int64_t threads) const {
    const int64_t step = patch_step(strip), chunks = ceil_div(outputs, CHUNK), ring = ring_size(strip);
    parallel_uneven(ceil_div(tiles, strip), threads, [&](int64_t task) {
      const int64_t first = task * strip, count = min(strip, tiles - first);
      float* m = own_scratch().get(ring + N * N * (result_step + step) + strip);
      float* rows = m + N * N * result_step;
      Word* v = (Word*)(rows + ring);
      float* units = (float*)(v + N * N * step);
      transform(first, count, zeros, v, step, units, {rows, ring_pitch(strip)});
      for (int64_t chunk = 0; chunk < chunks; ++chunk) finish(first, count, chunk, v, step, units, m);
    });
  }
  void run_together(int64_t tiles, const float* zeros, int64_t threads) const {
    constexpr int64_t FEW = 8, SOME = 16;  // tiles whose transformation is a task
    const int64_t most = max(1, SHARED_BYTES / (N * N * patch_step(TILES) * (int64_t)sizeof(Word)));
    const int64_t wanted = min(ceil_div(tiles, TILES), most) * TILES, group = whole_rows(wanted, wanted), step = patch_step(group);
    const int64_t chunks = ceil_div(outputs, CHUNK);
    if (tiles * inputs * outputs < SERIAL) threads = 1;
    Word* v = (Word*)common_scratch().get(N * N * step + group);
    float* units = (float*)(v + N * N * step);
    const int64_t few = source.made() ? whole_rows(tiles >= 4 * SOME ? SOME : FEW, TILES) : FEW;
    for (int64_t first = 0; first < tiles; first += group) {
      const int64_t count = min(group, tiles - first);
      const int64_t strip = whole_rows(ceil_div(count, ceil_div(count, TILES)), TILES), strips = ceil_div(count, strip);
      parallel_uneven(ceil_div(count, few), threads, [&](int64_t task) {
        const int64_t begin = task * few;
        transform(first + begin, min(few, count - begin), zeros, v + begin * pitch, step, units + begin,
                  {own_scratch().get(ring_size(few)), ring_pitch(few)});
      });
      parallel_uneven(strips * chunks, threads, [&](int64_t task) {
        const int64_t begin = task % strips * strip;
        float* m = own_scratch().get(N * N * result_step);
        finish(first + begin, min(strip, count - begin), task / strips, v + begin * pitch, step, units + begin, m);
      });
    }
  }
};

constexpr int64_t WIDE = 8;  // output channels that are transformed together
using WideDouble = double __attribute__((vector_size(8 * WIDE)));
using WideFloat = float __attribute__((vector_size(4 * WIDE)));

// weight [outputs, inputs, K, K] -> packed [N * N][blocks][inputs][BLOCK], in float64 and rounded once.
template <int M>
INLINE void winograd_weight_as(int64_t outputs, int64_t inputs, const float* weight, float* packed, int64_t threads) {
  constexpr int N = Minimal<M>::N, K = N - M + 1;
  const int64_t blocks = ceil_div(outputs, BLOCK);
  parallel_for(blocks * inputs, outputs * inputs * N * N < SERIAL ? 1 : threads, [&](int64_t task) {
    const int64_t block = task / inputs, c = task % inputs;
    float* const to = packed + (block * inputs + c) * BLOCK;
    for (int64_t o = 0; o < BLOCK; o += WIDE) {
      WideDouble w[K * K] = {}, half[K * N], line[N];
      for (int64_t lane = 0; lane < min(WIDE, outputs - block * BLOCK - o); ++lane)
        for (int i = 0; i < K * K; ++i) w[i][lane] = (double)weight[((block * BLOCK + o + lane) * inputs + c) * K * K + i];
      for (int j = 0; j < K; ++j) {
        Minimal<M>::weight(w + j, K, line);
        for (int i = 0; i < N; ++i) half[i * K + j] = line[i];
      }
      for (int i = 0; i < N; ++i) {
        Minimal<M>::weight(half + i * K, 1, line);
        for (int j = 0; j < N; ++j)
          store(to + (i * N + j) * blocks * inputs * BLOCK + o, __builtin_convertvector(line[j], WideFloat));
      }
    }
  });
}

inline void winograd_conv2d_weight(int64_t tile, int64_t outputs, int64_t inputs, const float* weight, float* packed,
                                   int64_t threads) {
  if (tile == 1) winograd_weight_as<1>(outputs, inputs, weight, packed, threads);
  else if (tile == 2) winograd_weight_as<2>(outputs, inputs, weight, packed, threads);
  else winograd_weight_as<4>(outputs, inputs, weight, packed, threads);
}

// packed, as above, [N * N][blocks][inputs][BLOCK] -> pairs [N * N][blocks][inputs / 2][BLOCK] and scale [N * N][blocks][BLOCK].
template <int M>
INLINE void winograd_pairs_of(int64_t outputs, int64_t inputs, const float* packed, Pair* pairs, float* scale,
                              int64_t threads) {
  constexpr int N = Minimal<M>::N;
  const int64_t blocks = ceil_div(outputs, BLOCK), depth = ceil_div(inputs, 2);
  parallel_for(N * N * blocks, outputs * inputs * N * N < SERIAL ? 1 : threads, [&](int64_t task) {
    const float* from = packed + task * inputs * BLOCK;
    Pair* to = pairs + task * depth * BLOCK;
    double squares[BLOCK] = {}, most[BLOCK] = {}, unit[BLOCK];
    for (int64_t k = 0; k < inputs * BLOCK; ++k) {
      const double w = (double)from[k], size = w < 0 ? -w : w;
      squares[k % BLOCK] += w * w;
      if (size > most[k % BLOCK]) most[k % BLOCK] = size;
    }
    const int i = (int)(task / blocks);
    for (int64_t o = 0; o < BLOCK; ++o) {
      const double norm = __builtin_sqrt(squares[o]) / weight_norm(inputs), peak = most[o] / (double)LARGEST;
      unit[o] = norm > peak ? norm : peak;
      scale[task * BLOCK + o] = (float)(unit[o] * (double)Minimal<M>::NORMS[i / N] * (double)Minimal<M>::NORMS[i % N]);
    }
    const auto rounded = [&](int64_t c, int64_t o) {
      return c < inputs && unit[o] > 0 ? (int16_t)__builtin_lrint((double)from[c * BLOCK + o] / unit[o]) : (int16_t)0;
    };
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t o = 0; o < BLOCK; ++o) to[k * BLOCK + o] = {rounded(2 * k, o), rounded(2 * k + 1, o)};
  });
}

inline void winograd_conv2d_pairs(int64_t tile, int64_t outputs, int64_t inputs, const float* packed, void* pairs,
                                  float* scale, int64_t threads) {
  if (tile == 1) winograd_pairs_of<1>(outputs, inputs, packed, (Pair*)pairs, scale, threads);
  else if (tile == 2) winograd_pairs_of<2>(outputs, inputs, packed, (Pair*)pairs, scale, threads);
  else winograd_pairs_of<4>(outputs, inputs, packed, (Pair*)pairs, scale, threads);
}

// height and width are those of x; with `doubled`, y has twice both, and each pixel of x counts as 2 x 2. `own` of the input
// channels are those of x, the others of skip. The transformed weights are floats, or, where there is a scale, pairs. `parts`
// may be null; images of more than TILES tiles across have none.
inline void winograd_conv2d(int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t own, const float* x,
                            const float* skip, const float* norm, int64_t silu, int64_t tile, int64_t outputs,
                            int64_t doubled, const void* packed, const float* scale, const float* bias, int64_t bias_step,
                            const float* residual, float* y, float* parts, int64_t threads) {
  if (doubled) height *= 2, width *= 2;
  if (tile == 1 && !doubled && !parts) {  // nothing but rows of pixels
    width *= height, height = 1;
    if (bias_step == 0 && !norm) width *= samples, samples = 1;
  }
  const Source source{x, skip, own, norm, silu != 0};
  const auto run = [&](auto* words) {
    using Word = typename Pointee<decltype(words)>::type;
    const Word* u = (const Word*)packed;
    const auto go = [&](auto convolution) { convolution.run(samples, threads); };
    if (tile == 1)
      go(Convolution<1, Word>(height, width, inputs, outputs, doubled, source, u, scale, bias, bias_step, residual, y, parts));
    else if (tile == 2)
      go(Convolution<2, Word>(height, width, inputs, outputs, doubled, source, u, scale, bias, bias_step, residual, y, parts));
    else go(Convolution<4, Word>(height, width, inputs, outputs, doubled, source, u, scale, bias, bias_step, residual, y, parts));
  };
  if (scale) run((Pair*)nullptr);
  else run((float*)nullptr);
}

// Whether pairs are multiplied faster than floats. AVX-512 needs two instructions for them where it does not fuse them, which is
// no gain; AVX2 too, but has a third port for one of the two.
inline void winograd_conv2d_pairs_pay(int64_t* answer) { *answer = LANES == 8 || fuses_pairs(); }

FASTGEN_KERNELS(winograd_conv2d, KERNEL(winograd_conv2d_weight), KERNEL(winograd_conv2d_pairs),
                KERNEL(winograd_conv2d_pairs_pay), KERNEL(winograd_conv2d))

FASTGEN_END
