// lu_linear: a C x C matrix, given by its LU factors, times the channels of every pixel, or its inverse.
// fastgen/ops/lu_linear.py has the mathematics.
//
// The matrix is formed from its factors once per call, in float64, so that every pixel costs one dense product: as many
// multiplications as the two triangular ones, all of them in full register blocks.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// The factors in float64, their product or its inverse, and the way back from a gradient of that to the factors.
struct LuFactors {
  int64_t size;
  const float *log_diagonal, *sign;
  const int64_t* permutation;
  double *l, *u, *matrix, *work, *turned;

  LuFactors(int64_t size_, const float* lower, const float* upper, const float* log_diagonal_, const float* sign_,
            const int64_t* permutation_, bool inverse)
      : size(size_), log_diagonal(log_diagonal_), sign(sign_), permutation(permutation_) {
    const int64_t all = size * size;
    l = new double[5 * all + 1];
    u = l + all, matrix = u + all, work = matrix + all, turned = work + all;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) {
        l[i * size + j] = j < i ? lower[i * size + j] : i == j;
        u[i * size + j] = j > i ? upper[i * size + j] : i == j ? diagonal(i) : 0.0;
      }
    inverse ? invert() : multiply();
  }
  LuFactors(const LuFactors&) = delete;
  ~LuFactors() { delete[] l; }

  double diagonal(int64_t i) const { return sign[i] * __builtin_exp(log_diagonal[i]); }
  static INLINE void add(double* row, double factor, const double* other, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) row[j] += factor * other[j];
  }
  static INLINE void clear(double* row, int64_t count) {
    for (int64_t j = 0; j < count; ++j) row[j] = 0;
  }
  void turn(const double* from) const {  // so that all inner loops run along rows
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) turned[j * size + i] = from[i * size + j];
  }
  // matrix = P L U
  void multiply() {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t from = permutation[i];
      double* row = matrix + i * size;
      clear(row, size);
      for (int64_t k = 0; k <= from; ++k) add(row, l[from * size + k], u + k * size, k, size);
    }
  }
  // matrix = U^-1 L^-1 P^T, by substitution on the rows of the identity
  void invert() {
    for (int64_t i = 0; i < size; ++i) {
      double* row = matrix + i * size;
      for (int64_t j = 0; j < size; ++j) row[j] = permutation[j] == i;
      for (int64_t k = 0; k < i; ++k) add(row, -l[i * size + k], matrix + k * size, 0, size);
    }
    for (int64_t i = size; i-- > 0;) {
      double* row = matrix + i * size;
      for (int64_t k = i + 1; k < size; ++k) add(row, -u[i * size + k], matrix + k * size, 0, size);
      const double scale = 1.0 / u[i * size + i];
      for (int64_t j = 0; j < size; ++j) row[j] *= scale;
    }
  }
  // From the gradient of `matrix`, overwritten, and the sum of pixels * grad_log_det.
  void differentiate(double* grad, double by_log_det, bool inverse, float* grad_lower, float* grad_upper,
                     float* grad_log_diagonal) const {
    if (inverse) {  // of W = matrix^-1: -matrix^T grad matrix^T
      for (int64_t i = 0; i < size; ++i) {
        double* row = work + i * size;
        clear(row, size);
        for (int64_t k = 0; k < size; ++k) add(row, -matrix[k * size + i], grad + k * size, 0, size);
      }
      turn(matrix);
      for (int64_t i = 0; i < size; ++i) {
        double* row = grad + i * size;
        clear(row, size);
        for (int64_t k = 0; k < size; ++k) add(row, work[i * size + k], turned + k * size, 0, size);
      }
    }
    for (int64_t i = 0; i < size; ++i)  // of L U
      for (int64_t j = 0; j < size; ++j) work[permutation[i] * size + j] = grad[i * size + j];
    turn(u);
    for (int64_t i = 0; i < size; ++i) {
      double* row = grad + i * size;
      clear(row, size);
      for (int64_t k = 0; k < size; ++k) add(row, work[i * size + k], turned + k * size, 0, min(i, k + 1));
      for (int64_t j = 0; j < size; ++j) grad_lower[i * size + j] = (float)row[j];
      clear(row, size);
      for (int64_t k = i; k < size; ++k) add(row, l[k * size + i], work + k * size, i, size);
      for (int64_t j = 0; j < size; ++j) grad_upper[i * size + j] = j > i ? (float)row[j] : 0.0f;
      grad_log_diagonal[i] = (float)(row[i] * u[i * size + i] + (inverse ? -by_log_det : by_log_det));
    }
  }
};

// Pixels of [samples, channels, pixels], counted through all samples, in tiles. A tile in memory is [padded, pitch] float32,
// the channels padded with zeros to whole register blocks of ROWS, the pixels to whole blocks of VECTORS vectors.
struct PixelTiling {
  static constexpr int64_t ROWS = 4, VECTORS = LANES == 8 ? 2 : 4;
  int64_t channels, pixels, all, width, pitch, padded, tiles;

  PixelTiling(int64_t samples, int64_t channels_, int64_t pixels_, int64_t width_)
      : channels(channels_), pixels(pixels_), width(width_) {
    all = samples * pixels;
    pitch = width + 16;  // rows a power of two apart would share cache sets
    padded = ceil_div(channels, ROWS) * ROWS;
    tiles = ceil_div(all, width);
  }
  int64_t count(int64_t tile) const { return min(width, all - tile * width); }
  // body(offset in memory of channel 0, offset in the tile, length) for the runs of pixels of a tile that lie together
  template <class Body>
  INLINE void for_runs(int64_t tile, Body&& body) const {
    const int64_t begin = tile * width, end = begin + count(tile);
    for (int64_t q = begin; q < end;) {
      const int64_t sample = q / pixels, first = q % pixels, length = min(pixels - first, end - q);
      body(sample * channels * pixels + first, q - begin, length);
      q += length;
    }
  }
  template <class T>
  INLINE void read(int64_t tile, const T* x, float* out) const {
    for_runs(tile, [&](int64_t offset, int64_t at, int64_t length) {
      if (length == 1) {
        for (int64_t c = 0; c < channels; ++c) out[c * pitch + at] = widen(x[offset + c * pixels]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for_blocks(length, [&](int64_t i, int64_t n) {
            block_store(out + c * pitch + at + i, block_load(x + offset + c * pixels + i, n), n);
          });
      }
    });
    for (int64_t c = 0; c < padded; ++c)
      for (int64_t i = c < channels ? count(tile) : 0; i < width; ++i) out[c * pitch + i] = 0;
  }
  template <class T>
  INLINE void write(int64_t tile, const float* in, T* y) const {
    for_runs(tile, [&](int64_t offset, int64_t at, int64_t length) {
      if (length == 1) {
        for (int64_t c = 0; c < channels; ++c) narrow(in[c * pitch + at], y[offset + c * pixels]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for_blocks(length, [&](int64_t i, int64_t n) {
            block_store(y + offset + c * pixels + i, block_load(in + c * pitch + at + i, n), n);
          });
      }
    });
  }
  // out = matrix * in for a float32 matrix [padded, channels] whose rows beyond `channels` are zero
  INLINE void product(const float* matrix, const float* in, float* out, int64_t count) const {
    for (int64_t p = 0; p < count; p += VECTORS * LANES)
      for (int64_t i = 0; i < padded; i += ROWS) {
        vf total[ROWS][VECTORS] = {};
        for (int64_t j = 0; j < channels; ++j) {
          vf value[VECTORS];
          for (int64_t v = 0; v < VECTORS; ++v) value[v] = load<vf>(in + j * pitch + p + v * LANES);
          for (int64_t r = 0; r < ROWS; ++r) {
            const vf m = splat(matrix[(i + r) * channels + j]);
            for (int64_t v = 0; v < VECTORS; ++v) total[r][v] = fma(m, value[v], total[r][v]);
          }
        }
        for (int64_t r = 0; r < ROWS; ++r)
          for (int64_t v = 0; v < VECTORS; ++v) store(out + (i + r) * pitch + p + v * LANES, total[r][v]);
      }
  }

  // sum over pixels of a * b^T, [padded, padded], as GROUPS partial sums of four neighbouring columns each
  static constexpr int64_t GROUPS = LANES == 1 ? 1 : LANES / 4;
  int64_t outer_size() const { return padded * padded * GROUPS; }
  INLINE void add_outer(const float* a, const float* b, int64_t count, float* sums) const {
    for (int64_t i = 0; i < padded; i += ROWS)
      for (int64_t j = 0; j < padded; j += 4) {
        vf total[ROWS][4] = {};
        for (int64_t p = 0; p < count; p += LANES) {
          vf right[4];
          for (int64_t k = 0; k < 4; ++k) right[k] = load<vf>(b + (j + k) * pitch + p);
          for (int64_t r = 0; r < ROWS; ++r) {
            const vf left = load<vf>(a + (i + r) * pitch + p);
            for (int64_t k = 0; k < 4; ++k) total[r][k] = fma(left, right[k], total[r][k]);
          }
        }
        for (int64_t r = 0; r < ROWS; ++r) {
          float* at = sums + ((i + r) * padded + j) * GROUPS;
          vf* t = total[r];
          if constexpr (LANES == 1) {
            for (int64_t k = 0; k < 4; ++k) at[k] += sum(t[k]);
          } else {
            transpose4(t[0], t[1], t[2], t[3]);
            store(at, load<vf>(at) + ((t[0] + t[1]) + (t[2] + t[3])));
          }
        }
      }
  }
  double outer(const float* sums, int64_t i, int64_t j) const {
    double total = 0;
    for (int64_t g = 0; g < GROUPS; ++g) total += sums[(i * padded + j / 4 * 4) * GROUPS + 4 * g + j % 4];
    return total;
  }
  // threads worth waking for this many multiplications a pixel
  int64_t worthwhile(int64_t threads, int64_t work) const { return all * work < 32 * SERIAL ? 1 : threads; }
};

// Tasks into which the tiles are cut; one takes its tiles one after the other with the same scratch memory.
constexpr int64_t PIXEL_TASKS = 64, OUTER_TASKS = 16;

template <class T>
INLINE void lu_linear_fwd_as(int64_t samples, int64_t channels, int64_t pixels, const T* x, const LuFactors& factors, T* y,
                             int64_t threads) {
  const PixelTiling tiling(samples, channels, pixels, channels <= 32 ? 256 : channels <= 64 ? 128 : 64);
  float* matrix = new float[tiling.padded * channels + 1];
  for (int64_t i = 0; i < tiling.padded * channels; ++i) matrix[i] = i < channels * channels ? (float)factors.matrix[i] : 0;
  const int64_t batch = max(1, ceil_div(tiling.tiles, PIXEL_TASKS));
  parallel_for(ceil_div(tiling.tiles, batch), tiling.worthwhile(threads, channels * channels), [&](int64_t task) {
    float* in = new float[2 * tiling.padded * tiling.pitch];
    float* out = in + tiling.padded * tiling.pitch;
    for (int64_t tile = task * batch; tile < min(tiling.tiles, (task + 1) * batch); ++tile) {
      tiling.read(tile, x, in);
      tiling.product(matrix, in, out, tiling.count(tile));
      tiling.write(tile, out, y);
    }
    delete[] in;
  });
  delete[] matrix;
}

// Leaves the gradient of the matrix in `grad_matrix`, [channels, channels].
template <class T>
INLINE void lu_linear_bwd_as(int64_t samples, int64_t channels, int64_t pixels, const T* x, const LuFactors& factors,
                             const T* grad_y, T* grad_x, double* grad_matrix, int64_t threads) {
  // wider, so that folding the sums of a tile is little beside making them
  const PixelTiling tiling(samples, channels, pixels, 256);
  float* transposed = new float[tiling.padded * channels + 1];
  for (int64_t i = 0; i < tiling.padded; ++i)
    for (int64_t j = 0; j < channels; ++j)
      transposed[i * channels + j] = i < channels ? (float)factors.matrix[j * channels + i] : 0;
  const int64_t batch = max(1, ceil_div(tiling.tiles, OUTER_TASKS)), tasks = ceil_div(tiling.tiles, batch);
  const int64_t size = channels * channels;
  double* partial = new double[tasks * size + 1];
  parallel_for(tasks, tiling.worthwhile(threads, 2 * size), [&](int64_t task) {
    const int64_t area = tiling.padded * tiling.pitch;
    float* in = new float[3 * area];
    float *grad = in + area, *out = grad + area, *sums = new float[tiling.outer_size()]();
    for (int64_t tile = task * batch; tile < min(tiling.tiles, (task + 1) * batch); ++tile) {
      tiling.read(tile, x, in);
      tiling.read(tile, grad_y, grad);
      tiling.product(transposed, grad, out, tiling.count(tile));
      tiling.write(tile, out, grad_x);
      tiling.add_outer(grad, in, tiling.count(tile), sums);
    }
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < channels; ++j) partial[task * size + i * channels + j] = tiling.outer(sums, i, j);
    delete[] sums;
    delete[] in;
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < size; ++i) grad_matrix[i] += partial[task * size + i];
  delete[] partial;
  delete[] transposed;
}

inline void lu_linear_fwd(int64_t dtype, int64_t samples, int64_t channels, int64_t pixels, const void* x,
                          const float* lower, const float* upper, const float* log_diagonal, const float* sign,
                          const int64_t* permutation, void* y, float* log_det, int64_t inverse, int64_t threads) {
  const LuFactors factors(channels, lower, upper, log_diagonal, sign, permutation, inverse);
  double total = 0;
  for (int64_t i = 0; i < channels; ++i) total += log_diagonal[i];
  total *= (double)(inverse ? -pixels : pixels);
  for (int64_t n = 0; n < samples; ++n) log_det[n] = (float)total;
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    lu_linear_fwd_as<T>(samples, channels, pixels, (const T*)x, factors, (T*)y, threads);
  };
  with_dtype(dtype, run);
}

// grad_log_det may be null: no gradient came from it.
inline void lu_linear_bwd(int64_t dtype, int64_t samples, int64_t channels, int64_t pixels, const void* x,
                          const float* lower, const float* upper, const float* log_diagonal, const float* sign,
                          const int64_t* permutation, const void* grad_y, const float* grad_log_det, void* grad_x,
                          float* grad_lower, float* grad_upper, float* grad_log_diagonal, int64_t inverse,
                          int64_t threads) {
  const LuFactors factors(channels, lower, upper, log_diagonal, sign, permutation, inverse);
  double* grad_matrix = new double[channels * channels + 1]();
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    lu_linear_bwd_as<T>(samples, channels, pixels, (const T*)x, factors, (const T*)grad_y, (T*)grad_x, grad_matrix, threads);
  };
  with_dtype(dtype, run);
  double by_log_det = 0;
  for (int64_t n = 0; grad_log_det && n < samples; ++n) by_log_det += grad_log_det[n];
  factors.differentiate(grad_matrix, by_log_det * (double)pixels, inverse, grad_lower, grad_upper, grad_log_diagonal);
  delete[] grad_matrix;
}

FASTGEN_KERNELS(lu_linear, KERNEL(lu_linear_fwd), KERNEL(lu_linear_bwd))

FASTGEN_END
