// winograd_conv2d_weight_gradient: the gradient of the weight of winograd_conv2d, by minimal filtering.
// fastgen/ops/winograd_conv2d.py has the mathematics.
//
// Patches of x are transformed as in the forward pass to V[N * N][tile][input channel], tiles of grad_y by the transpose of
// the way back to D[N * N][tile][output channel]. Their products, summed over all tiles, are the gradient of the transformed
// weight, sum[N * N][input channel][output channel]. Groups of tiles that fit the caches follow each other: all threads
// transform a group, and then share the N * N products. So every sum has one order, however many threads there are.
#pragma once
#include "winograd_conv2d.h"

FASTGEN_BEGIN

constexpr int64_t GROUP_BYTES = 3 << 20;  // of the transforms of a group
constexpr int64_t SUM_BYTES = 10 << 20;   // of sums: more output channels take turns
constexpr int64_t GROUP_TILES = 512;      // of a group, at most; a group's sum is added to the total as a whole

// The way back from products to a tile, transposed: a tile of grad_y on its way there.
template <int M>
struct Adjoint {
  static INLINE void result(const vf* y, vf* out) {
    constexpr float A = Minimal<M>::A, B = Minimal<M>::B, A2 = Minimal<M>::A2, B2 = Minimal<M>::B2;
    const vf even_a = fma(y[2], splat(A2), y[0]), odd_a = fma(y[3], splat(A2), y[1]) * A;
    const vf even_b = fma(y[2], splat(B2), y[0]), odd_b = fma(y[3], splat(B2), y[1]) * B;
    out[0] = y[0];
    out[1] = even_a + odd_a, out[2] = even_a - odd_a;
    out[3] = even_b + odd_b, out[4] = even_b - odd_b;
    out[5] = y[3];
  }
  static INLINE void weight(const vf* m, int step, vf* out) {
    constexpr double a = Minimal<M>::A, b = Minimal<M>::B;
    constexpr float at_0 = (float)(1 / (a * a * b * b)), at_a = (float)(1 / (2 * a * a * (a * a - b * b))),
                    at_b = (float)(1 / (2 * b * b * (b * b - a * a)));
    const vf even_a = (m[step] + m[2 * step]) * at_a, odd_a = (m[step] - m[2 * step]) * at_a;
    const vf even_b = (m[3 * step] + m[4 * step]) * at_b, odd_b = (m[3 * step] - m[4 * step]) * at_b;
    out[0] = fma(m[0], splat(at_0), even_a + even_b);
    out[1] = fma(odd_a, splat((float)a), odd_b * (float)b);
    out[2] = fma(even_a, splat((float)(a * a)), fma(even_b, splat((float)(b * b)), m[5 * step]));
  }
};
template <>
struct Adjoint<2> {
  static INLINE void result(const vf* y, vf* out) { out[0] = y[0], out[1] = y[0] + y[1], out[2] = y[0] - y[1], out[3] = y[1]; }
  static INLINE void weight(const vf* m, int step, vf* out) {
    const vf even = (m[step] + m[2 * step]) * 0.5f;
    out[0] = m[0] + even, out[1] = (m[step] - m[2 * step]) * 0.5f, out[2] = even + m[3 * step];
  }
};

// Adds to `sum`, or puts there, the product of R columns of v, transposed, and COLUMNS vectors of d, over `depth` tiles.
template <int R>
INLINE void outer_block(int64_t depth, const float* v, int64_t v_pitch, const float* d, int64_t d_pitch, float* sum,
                        int64_t sum_pitch, bool add) {
  vf total[R][COLUMNS] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vf line[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) line[j] = load<vf>(d + k * d_pitch + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf factor = splat(v[k * v_pitch + r]);
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) total[r][j] = fma(factor, line[j], total[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) {
      float* to = sum + r * sum_pitch + j * LANES;
      store(to, add ? load<vf>(to) + total[r][j] : total[r][j]);
    }
}

template <int R>
struct Outer {
  template <class... Rest>
  static INLINE void run(int64_t rows, Rest... rest) {
    if (rows < R) Outer<R - 1>::run(rows, rest...);
    else outer_block<R>(rest...);
  }
};
template <>
struct Outer<0> {
  template <class... Rest>
  static INLINE void run(int64_t, Rest...) {}
};

template <int M>
struct WeightGradient {
  static constexpr int N = Minimal<M>::N;
  const Convolution<M, float> images;
  const float* grad_y;
  float* grad_weight;

  // Transforms the tile of grad_y: output channels [first, first + count), and zeros up to a whole block.
  INLINE void transform(int64_t tile, int64_t first, int64_t count, const float* zeros, float* d, int64_t step) const {
    const auto at = images.place(tile);
    const float* pixel[M * M];
    for (int64_t i = 0; i < M; ++i)
      for (int64_t j = 0; j < M; ++j) {
        const int64_t row = at.top + i, column = at.left + j;
        const bool inside = row < images.height && column < images.width;
        const int64_t index = (at.sample * images.height + row) * images.width + column;
        pixel[i * M + j] = inside ? grad_y + index * images.outputs + first : zeros;
      }
    for_blocks(count, [&](int64_t o, int64_t n) {
      vf y[M], half[N * M], out[N];
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) y[i] = block_load(pixel[i * M + j] + o, n);
        Adjoint<M>::result(y, out);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) half[i * M + j] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        Adjoint<M>::result(half + i * M, out);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) store(d + (i * N + j) * step + o, out[j]);
      }
    });
    for (int64_t o = ceil_div(count, LANES) * LANES; o < ceil_div(count, BLOCK) * BLOCK; o += LANES)
      for (int i = 0; i < N * N; ++i) store(d + i * step + o, vf{});
  }

  // sum[input channel][output channel] of one of the N * N frequencies.
  INLINE void multiply(int64_t depth, const float* v, const float* d, int64_t d_pitch, float* sum, bool add) const {
    const int64_t inputs = images.inputs, parts = ceil_div(inputs, ROWS), rows = ceil_div(inputs, parts);
    for (int64_t c = 0; c < inputs; c += rows)
      for (int64_t o = 0; o < d_pitch; o += COLUMNS * LANES)
        Outer<ROWS>::run(min(rows, inputs - c), depth, v + c, images.pitch, d + o, d_pitch, sum + c * d_pitch + o, d_pitch,
                         add);
  }

  // Transforms the sums of an input channel back.
  INLINE void emit(int64_t c, int64_t first, int64_t count, const float* sum, int64_t d_pitch, int64_t sum_step) const {
    for_blocks(count, [&](int64_t o, int64_t n) {
      vf m[N], half[3 * N], out[9];
      for (int j = 0; j < N; ++j) {
        for (int i = 0; i < N; ++i) m[i] = load<vf>(sum + (i * N + j) * sum_step + c * d_pitch + o);
        vf column[3];
        Adjoint<M>::weight(m, 1, column);
        for (int i = 0; i < 3; ++i) half[i * N + j] = column[i];
      }
      float lanes[9][LANES];
      for (int i = 0; i < 3; ++i) Adjoint<M>::weight(half + i * N, 1, out + i * 3);
      for (int i = 0; i < 9; ++i) store(lanes[i], out[i]);
      for (int64_t lane = 0; lane < n; ++lane)
        for (int i = 0; i < 9; ++i)
          grad_weight[((first + o + lane) * images.inputs + c) * 9 + i] = lanes[i][lane];
    });
  }

  void run(int64_t samples, int64_t threads) const {
    constexpr int64_t FEW = 8, NN = N * N;  // tiles whose transformation is a task
    const int64_t inputs = images.inputs, outputs = images.outputs, tiles = samples * images.down * images.across;
    if (tiles * inputs * outputs < SERIAL) threads = 1;
    const int64_t most = max(1, SUM_BYTES / (NN * inputs * BLOCK * (int64_t)sizeof(float)));  // blocks in a turn
    const int64_t chunk = ceil_div(images.blocks, ceil_div(images.blocks, most)) * BLOCK;
    const int64_t fitting = GROUP_BYTES / (NN * (images.pitch + chunk) * (int64_t)sizeof(float)) / FEW * FEW;
    const int64_t groups = ceil_div(tiles, min(max(fitting, 4 * FEW), GROUP_TILES));
    const int64_t group = max(1, ceil_div(tiles, max(groups, 1)));
    const int64_t v_step = group * images.pitch + SKEW, d_step = group * chunk + SKEW, sum_step = inputs * chunk + SKEW;
    float *v = common_scratch().get(NN * (v_step + d_step + sum_step)), *d = v + NN * v_step, *sum = d + NN * d_step;
    float* zeros = new float[max(inputs, outputs) + 1]();
    for (int64_t first = 0; first < outputs; first += chunk) {
      const int64_t count = min(chunk, outputs - first), d_pitch = ceil_div(count, BLOCK) * BLOCK;
      for (int64_t begin = 0; begin < tiles || begin == 0; begin += group) {
        const int64_t depth = min(group, tiles - begin);
        parallel_uneven(ceil_div(depth, FEW), threads, [&](int64_t task) {
          const int64_t from = task * FEW, end = min(depth, from + FEW);
          images.transform(begin + from, end - from, zeros, v + from * images.pitch, v_step, nullptr, {});
          for (int64_t i = from; i < end; ++i) transform(begin + i, first, count, zeros, d + i * d_pitch, d_step);
        });
        parallel_uneven(NN, threads, [&](int64_t i) {
          multiply(depth, v + i * v_step, d + i * d_step, d_pitch, sum + i * sum_step, begin > 0);
        });
      }
      parallel_for(inputs, threads, [&](int64_t c) { emit(c, first, count, sum, d_pitch, sum_step); });
    }
    delete[] zeros;
  }
};

template <int M>
inline void winograd_weight_gradient_as(int64_t samples, int64_t height, int64_t width, int64_t inputs, int64_t outputs,
                                        int64_t doubled, const float* x, const float* grad_y, float* grad_weight,
                                        int64_t threads) {
  const Convolution<M, float> images(height, width, inputs, outputs, doubled, Source{x}, nullptr, nullptr, nullptr, 0,
                                     nullptr, nullptr);
  WeightGradient<M>{images, grad_y, grad_weight}.run(samples, threads);
}

// height and width are those of grad_y; with `doubled`, x has half of both.
inline void winograd_conv2d_weight_gradient(int64_t tile, int64_t samples, int64_t height, int64_t width, int64_t inputs,
                                            int64_t outputs, int64_t doubled, const float* x, const float* grad_y,
                                            float* grad_weight, int64_t threads) {
  const auto run = tile == 2 ? winograd_weight_gradient_as<2> : winograd_weight_gradient_as<4>;
  run(samples, height, width, inputs, outputs, doubled, x, grad_y, grad_weight, threads);
}

FASTGEN_KERNELS(winograd_conv2d_weight_gradient, KERNEL(winograd_conv2d_weight_gradient))

FASTGEN_END
