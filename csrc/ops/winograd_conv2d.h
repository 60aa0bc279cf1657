// winograd_conv2d: a 3x3 convolution of stride 1 and padding 1 on channels-last images, by minimal filtering.
// fastgen/ops/winograd_conv2d.py has the mathematics.
//
// The image is cut into tiles of M x M outputs, each read from a patch of N x N = (M + 2)^2 inputs. Transformed, patches are
// V[N * N][tile][input channel] and weights U[N * N][block][input channel][BLOCK output channels], so that the convolution is
// N * N matrix products. They go by register blocks of ROWS tiles x COLUMNS vectors of output channels, a chunk of output
// channels at a time, whose products M[N * N][tile][CHUNK] stay in L2 until they are transformed back. What differs between
// calls of different thread counts is who computes a block, not how.
#pragma once
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

// Brings the line of p into L1, to be read or to be written.
INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
INLINE void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// What a register block fetches while it computes, a line of each for every step: rows of the next register block, which no
// hardware recognises as a stream, and the next block of weights.
struct Ahead {
  const float* rows;
  const char* weights;
};

// R rows of a, `pitch` floats apart, times a block of weights [depth][BLOCK], from a column of it on.
template <int R, class U>
INLINE void product_block(int64_t depth, const float* a, int64_t pitch, const U* u, float* m, Ahead ahead) {
  vf total[R][COLUMNS] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vf line[COLUMNS];
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; ++v) line[v] = load_float(u + k * BLOCK + v * LANES);
    prefetch_near(ahead.rows + k * 16);
    prefetch(ahead.weights + k * 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf factor = splat(a[r * pitch + k]);
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; ++v) total[r][v] = fma(factor, line[v], total[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; ++v) store(m + r * CHUNK + v * LANES, total[r][v]);
}

template <int R>
struct Product {
  template <class U>
  static void run(int64_t rows, int64_t depth, const float* a, int64_t pitch, const U* u, float* m, Ahead ahead) {
    if (rows < R) return Product<R - 1>::run(rows, depth, a, pitch, u, m, ahead);
    for (int64_t c = 0; c < BLOCK; c += COLUMNS * LANES) product_block<R>(depth, a, pitch, u + c, m + c, ahead);
  }
};
template <>
struct Product<0> {
  template <class U>
  static void run(int64_t, int64_t, const float*, int64_t, const U*, float*, Ahead) {}
};

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

// Images, their tiles, and the buffers that a call works on. U: what transformed weights are stored as.
template <int M, class U>
struct Convolution {
  static constexpr int N = Minimal<M>::N;
  int64_t height, width, inputs, outputs, doubled;
  const float* x;
  const U* packed;
  const float* bias;
  int64_t bias_step;  // from sample to sample; 0: one bias for all
  const float* residual;
  float* y;
  int64_t down, across, pitch, blocks;

  Convolution(int64_t height_, int64_t width_, int64_t inputs_, int64_t outputs_, int64_t doubled_, const float* x_,
              const U* packed_, const float* bias_, int64_t bias_step_, const float* residual_, float* y_)
      : height(height_), width(width_), inputs(inputs_), outputs(outputs_), doubled(doubled_), x(x_), packed(packed_),
        bias(bias_), bias_step(bias_step_), residual(residual_), y(y_), down(ceil_div(height_, M)),
        across(ceil_div(width_, M)), pitch(ceil_div(inputs_, 16) * 16), blocks(ceil_div(outputs_, BLOCK)) {}

  // Floats from one of the N * N matrices of transformed patches to the next.
  INLINE int64_t patch_step(int64_t tiles) const { return tiles * pitch + SKEW; }
  static constexpr int64_t result_step = TILES * CHUNK + SKEW;

  struct Place {
    int64_t sample, top, left;
  };
  INLINE Place place(int64_t tile) const {
    return {tile / (down * across), tile / across % down * M, tile % across * M};
  }

  // Transforms the patch of one tile: v[i * step + c] for the N * N frequencies i. Outside of the image it reads `zeros`.
  INLINE void transform(int64_t tile, const float* zeros, float* v, int64_t step) const {
    const Place at = place(tile);
    const int64_t shift = doubled ? 1 : 0, rows = height >> shift, columns = width >> shift;
    const float* pixel[N * N];
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j) {
        const int64_t row = at.top + i - 1, column = at.left + j - 1;
        const bool inside = row >= 0 && row < height && column >= 0 && column < width;
        const int64_t index = (at.sample * rows + (row >> shift)) * columns + (column >> shift);
        pixel[i * N + j] = inside ? x + index * inputs : zeros;
      }
    const Place next = place(tile + 1);  // of its pixels, those that this tile does not read
    const float* later =
        x + ((next.sample * rows + ((next.top - 1) >> shift)) * columns + ((next.left + 1) >> shift)) * inputs;
    for_blocks(inputs, [&](int64_t c, int64_t n) {
      for (int64_t i = 0; i < N >> shift && c % 16 == 0; ++i)
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
        for (int j = 0; j < N; ++j) store(v + (i * N + j) * step + c, out[j]);
      }
    });
  }

  // Products of `count` transformed patches with a chunk of the weights.
  INLINE void multiply(int64_t count, int64_t chunk, const float* v, int64_t step, float* m) const {
    const int64_t first = chunk * (CHUNK / BLOCK), last = min(blocks, first + CHUNK / BLOCK);
    const int64_t lines = inputs * 64;  // bytes that a register block fetches of the weights
    for (int64_t i = 0; i < N * N; ++i)
      for (int64_t block = first; block < last; ++block) {
        const float* own = v + i * step;
        const U* u = packed + (i * blocks + block) * inputs * BLOCK;
        const U* next = u + (block + 1 < last ? 1 : blocks - (last - first - 1)) * inputs * BLOCK;
        for (int64_t row = 0; row < count; row += ROWS) {
          const float* a = own + row * pitch;
          const float* more = row + ROWS < count ? a + ROWS * pitch : block + 1 < last ? own : own + step;
          Product<ROWS>::run(min(ROWS, count - row), inputs, a, pitch, u,
                             m + i * result_step + row * CHUNK + (block - first) * BLOCK,
                             {more, (const char*)next + min(row / ROWS, 2) * lines});
        }
      }
  }

  // Transforms the products of a tile back, adds bias and residual, and writes what lies in the image.
  INLINE void emit(int64_t tile, int64_t chunk, const float* m) const {
    const Place at = place(tile);
    const int64_t first = chunk * CHUNK, rows = min(M, height - at.top), columns = min(M, width - at.left);
    const int64_t origin = ((at.sample * height + at.top) * width + at.left) * outputs + first;
    const float* shift = bias ? bias + at.sample * bias_step + first : nullptr;
    const Place next = place(tile + 1);  // where lines are fetched meanwhile
    const int64_t later = ((next.sample * height + next.top) * width + next.left) * outputs + first;
    for_blocks(min(CHUNK, outputs - first), [&](int64_t c, int64_t n) {
      vf d[N], half[M * N], out[M];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) d[i] = load<vf>(m + (i * N + j) * result_step + c);
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
      for (int i = 0; i < rows; ++i) {
        Minimal<M>::result(half + i * N, 1, out);
        const int64_t line = origin + i * width * outputs + c;
        for (int j = 0; j < columns; ++j) {
          const int64_t to = line + j * outputs;
          const vf whole = out[j] + b;
          block_store(y + to, residual ? whole + block_load(residual + to, n) : whole, n);
        }
      }
    });
  }
  INLINE void finish(int64_t tile, int64_t count, int64_t chunk, const float* v, int64_t step, float* m) const {
    multiply(count, chunk, v, step, m);
    for (int64_t i = 0; i < count; ++i) emit(tile + i, chunk, m + i * CHUNK);
  }

  // With many tiles a thread transforms those of its own tasks. With few, and so mostly with many channels, all transform
  // the tiles together and then share the output channels, so that the weights are read once.
  void run(int64_t samples, int64_t threads) const {
    const int64_t tiles = samples * down * across, strips = ceil_div(tiles, TILES);
    float* zeros = new float[inputs + 1]();
    if (strips >= MANY) run_apart(tiles, ceil_div(tiles, strips), zeros, threads);
    else if (tiles) run_together(tiles, zeros, threads);
    delete[] zeros;
  }
  void run_apart(int64_t tiles, int64_t strip, const float* zeros, int64_t threads) const {
    const int64_t step = patch_step(strip), chunks = ceil_div(outputs, CHUNK);
    parallel_uneven(ceil_div(tiles, strip), threads, [&](int64_t task) {
      const int64_t first = task * strip, count = min(strip, tiles - first);
      float *v = own_scratch().get(N * N * (step + result_step)), *m = v + N * N * step;
      for (int64_t i = 0; i < count; ++i) transform(first + i, zeros, v + i * pitch, step);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) finish(first, count, chunk, v, step, m);
    });
  }
  void run_together(int64_t tiles, const float* zeros, int64_t threads) const {
    constexpr int64_t FEW = 8;  // tiles whose transformation is a task
    const int64_t most = max(1, SHARED_BYTES / (N * N * patch_step(TILES) * (int64_t)sizeof(float)));
    const int64_t group = min(ceil_div(tiles, TILES), most) * TILES, step = patch_step(group);
    const int64_t chunks = ceil_div(outputs, CHUNK);
    if (tiles * inputs * outputs < SERIAL) threads = 1;
    float* v = common_scratch().get(N * N * step);
    for (int64_t first = 0; first < tiles; first += group) {
      const int64_t count = min(group, tiles - first), strips = ceil_div(count, TILES), strip = ceil_div(count, strips);
      parallel_uneven(ceil_div(count, FEW), threads, [&](int64_t task) {
        for (int64_t i = task * FEW; i < min(count, (task + 1) * FEW); ++i)
          transform(first + i, zeros, v + i * pitch, step);
      });
      parallel_uneven(strips * chunks, threads, [&](int64_t task) {
        const int64_t begin = task % strips * strip;
        float* m = own_scratch().get(N * N * result_step);
        finish(first + begin, min(strip, count - begin), task / strips, v + begin * pitch, step, m);
      });
    }
  }
};

constexpr int64_t WIDE = 8;  // output channels that are transformed together
using WideDouble = double __attribute__((vector_size(8 * WIDE)));
using WideFloat = float __attribute__((vector_size(4 * WIDE)));

// weight [outputs, inputs, 3, 3] -> packed [N * N][blocks][inputs][BLOCK], in float64 and rounded once.
template <int M>
INLINE void winograd_weight_as(int64_t outputs, int64_t inputs, const float* weight, float* packed, int64_t threads) {
  constexpr int N = Minimal<M>::N;
  const int64_t blocks = ceil_div(outputs, BLOCK);
  parallel_for(blocks * inputs, outputs * inputs * N * N < SERIAL ? 1 : threads, [&](int64_t task) {
    const int64_t block = task / inputs, c = task % inputs;
    float* const to = packed + (block * inputs + c) * BLOCK;
    for (int64_t o = 0; o < BLOCK; o += WIDE) {
      WideDouble w[9] = {}, half[3 * N], line[N];
      for (int64_t lane = 0; lane < min(WIDE, outputs - block * BLOCK - o); ++lane)
        for (int i = 0; i < 9; ++i) w[i][lane] = (double)weight[((block * BLOCK + o + lane) * inputs + c) * 9 + i];
      for (int j = 0; j < 3; ++j) {
        Minimal<M>::weight(w + j, 3, line);
        for (int i = 0; i < N; ++i) half[i * 3 + j] = line[i];
      }
      for (int i = 0; i < N; ++i) {
        Minimal<M>::weight(half + i * 3, 1, line);
        for (int j = 0; j < N; ++j)
          store(to + (i * N + j) * blocks * inputs * BLOCK + o, __builtin_convertvector(line[j], WideFloat));
      }
    }
  });
}

inline void winograd_conv2d_weight(int64_t tile, int64_t outputs, int64_t inputs, const float* weight, float* packed,
                                   int64_t threads) {
  if (tile == 2) winograd_weight_as<2>(outputs, inputs, weight, packed, threads);
  else winograd_weight_as<4>(outputs, inputs, weight, packed, threads);
}

// height and width are those of y; with `doubled`, x has half of both and each of its pixels counts as 2 x 2. `dtype` is that of
// the transformed weights, float32 or float16.
inline void winograd_conv2d(int64_t tile, int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t outputs,
                            int64_t doubled, const float* x, int64_t dtype, const void* packed, const float* bias,
                            int64_t bias_step, const float* residual, float* y, int64_t threads) {
  const auto run = [&](auto* weights) {
    using U = typename Pointee<decltype(weights)>::type;
    const U* u = (const U*)packed;
    if (tile == 2)
      Convolution<2, U>(height, width, inputs, outputs, doubled, x, u, bias, bias_step, residual, y).run(samples, threads);
    else
      Convolution<4, U>(height, width, inputs, outputs, doubled, x, u, bias, bias_step, residual, y).run(samples, threads);
  };
  if (dtype == 0) run((float*)nullptr);
  else run((f16*)nullptr);
}

FASTGEN_KERNELS(winograd_conv2d, KERNEL(winograd_conv2d_weight), KERNEL(winograd_conv2d))

FASTGEN_END
