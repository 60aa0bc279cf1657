// moments: float64 mean and centred co-moment of [rows, width], merged with a state. fastgen/ops/moments.py has the
// mathematics.
//
// The product is a SYRK in float32 on the lower triangle: the features, less their mean, are packed into strips of STRIP
// columns [panel][strip][row][STRIP], so that one packing serves both operands; each panel of PANEL rows is summed in float32
// registers and added to the float64 result. The diagonal is summed in float64 throughout.
#pragma once
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// A register block is BLOCK_ROWS x STRIP sums; with the strip's vectors and one broadcast it fills the register file.
#if defined(__AVX512F__)
constexpr int BLOCK_ROWS = 8, BLOCK_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int BLOCK_ROWS = 4, BLOCK_VECTORS = 3;
#elif defined(FASTGEN_ONE_LANE)
constexpr int BLOCK_ROWS = 4, BLOCK_VECTORS = 4;
#else
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = 3;
#endif
constexpr int STRIP = BLOCK_VECTORS * LANES;
static_assert(STRIP % BLOCK_ROWS == 0, "a register block reads its rows from one strip");
constexpr int64_t PANEL = 256;                                  // rows summed in float32
constexpr int64_t AHEAD = 8;                                    // rows that stand on their way from L2
constexpr int64_t SUPER = (192 + STRIP - 1) / STRIP * STRIP;  // side of a task's tile: its operands and sums fit in L2
constexpr int64_t PACKED = 4 << 20;                             // floats packed at a time: they stay in L3

// to[BLOCK_ROWS][STRIP] += sum over `count` rows of a[row][i] * b[row][j]; rows of both are STRIP floats apart
INLINE void add_product(int64_t count, const float* a, const float* b, double* to) {
  vf total[BLOCK_ROWS][BLOCK_VECTORS] = {};
  for (int64_t row = 0; row < count; ++row, a += STRIP, b += STRIP) {
    vf right[BLOCK_VECTORS];
    __builtin_prefetch(a + AHEAD * STRIP);
    for (int v = 0; v < BLOCK_VECTORS; ++v) {
      right[v] = load<vf>(b + v * LANES);
      __builtin_prefetch(b + AHEAD * STRIP + v * LANES);
    }
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_ROWS; ++i) {
      const vf left = splat(a[i]);
      for (int v = 0; v < BLOCK_VECTORS; ++v) total[i][v] = fma(left, right[v], total[i][v]);
    }
  }
  float sums[BLOCK_ROWS * STRIP];
  for (int i = 0; i < BLOCK_ROWS; ++i)
    for (int v = 0; v < BLOCK_VECTORS; ++v) store(sums + i * STRIP + v * LANES, total[i][v]);
  for (int i = 0; i < BLOCK_ROWS * STRIP; ++i) to[i] += sums[i];
}

// Adds the product of `rows` packed rows to the tile [from, from + SUPER) x [to, to + SUPER) of the lower triangle, or
// begins it. The sums are kept by register block: rows of `out` lie a power of two apart, and would evict each other.
inline void add_tile(int64_t rows, int64_t width, const float* packed, int64_t from, int64_t to, bool begin, double* out) {
  const int64_t end = min(from + SUPER, width), right = min(to + SUPER, width);
  double sums[SUPER * SUPER];
  memset(sums, 0, sizeof sums);
  const auto at = [&](int64_t i, int64_t j) { return sums + (i - from) * SUPER + (j - to) * BLOCK_ROWS; };
  for (int64_t first = 0; first < rows; first += PANEL, packed += ceil_div(width, STRIP) * STRIP * PANEL)
    for (int64_t i = from; i < end; i += BLOCK_ROWS) {
      const float* a = packed + i / STRIP * STRIP * PANEL + i % STRIP;
      for (int64_t j = to; j < min(right, i + BLOCK_ROWS); j += STRIP)
        add_product(min(PANEL, rows - first), a, packed + j * PANEL, at(i, j));
    }
  for (int64_t i = from; i < end; i += BLOCK_ROWS)
    for (int64_t j = to; j < min(right, i + BLOCK_ROWS); j += STRIP)
      for (int64_t r = 0; r < min(BLOCK_ROWS, end - i); ++r) {
        double* line = out + (i + r) * width + j;
        const double* sum = at(i, j) + r * STRIP;
        for (int64_t c = 0; c < min(STRIP, width - j); ++c) line[c] = begin ? sum[c] : line[c] + sum[c];
      }
}

// A row of a strip in float32, zeros beyond its columns. Rows lie far apart: the hardware does not see the next one coming.
template <class T>
INLINE void load_strip(const T* from, int64_t width, int64_t columns, float* to) {
  for (int v = 0; v < BLOCK_VECTORS; ++v) {
    __builtin_prefetch(from + 2 * AHEAD * width + v * LANES);
    const int64_t n = max(0, min(LANES, columns - v * LANES));
    store(to + v * LANES, n ? block_load(from + v * LANES, n) : vf{});
  }
}

template <class T>
INLINE void moments_fwd_as(int64_t rows, int64_t width, const T* features, const double* count, const double* mean,
                           const double* comoment, double* new_count, double* new_mean, double* new_comoment,
                           int64_t threads) {
  const int64_t strips = ceil_div(width, STRIP), chunk = max(PANEL, PACKED / max(1, width) / PANEL * PANEL);
  threads = rows * width < SERIAL ? 1 : threads;
  double* own = new double[3 * strips * STRIP];  // mean of the features, their diagonal, and later mean - state mean
  double *diagonal = own + strips * STRIP, *moved = diagonal + strips * STRIP;
  float* shift = new float[strips * STRIP];
  float* memory = new float[min(ceil_div(rows, PANEL) * PANEL, chunk) * strips * STRIP + 16];
  float* packed = (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);

  parallel_for(strips, threads, [&](int64_t strip) {
    double total[STRIP] = {};
    const int64_t begin = strip * STRIP, columns = min(STRIP, width - begin);
    for (int64_t row = 0; row < rows; ++row) {
      float x[STRIP];
      load_strip(features + row * width + begin, width, columns, x);
      for (int c = 0; c < STRIP; ++c) total[c] += x[c];
    }
    for (int c = 0; c < STRIP; ++c) {
      own[begin + c] = total[c] / (double)max(1, rows);
      shift[begin + c] = (float)own[begin + c];
      diagonal[begin + c] = 0;
    }
  });

  const int64_t side = ceil_div(width, SUPER), tiles = side * (side + 1) / 2;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t taken = min(chunk, rows - first);
    parallel_for(strips, threads, [&](int64_t strip) {
      const int64_t begin = strip * STRIP, columns = min(STRIP, width - begin);
      double centre[STRIP], squares[STRIP];
      for (int c = 0; c < STRIP; ++c) centre[c] = own[begin + c], squares[c] = diagonal[begin + c];
      for (int64_t row = 0; row < taken; ++row) {
        float x[STRIP];
        load_strip(features + (first + row) * width + begin, width, columns, x);
        float* to = packed + ((row / PANEL * strips + strip) * PANEL + row % PANEL) * STRIP;
        for (int c = 0; c < STRIP; ++c) to[c] = x[c] - shift[begin + c];
        for (int c = 0; c < STRIP; ++c) squares[c] += (x[c] - centre[c]) * (x[c] - centre[c]);
      }
      for (int c = 0; c < STRIP; ++c) diagonal[begin + c] = squares[c];
    });
    parallel_uneven(tiles, threads, [&](int64_t task) {
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= task) ++i;
      const int64_t from = i * SUPER, to = (task - i * (i + 1) / 2) * SUPER;
      add_tile(taken, width, packed, from, to, !first, new_comoment);
    });
  }
  delete[] memory;

  // Chan's merge. What the products lack of the mean (shift is rounded to float32) is taken off in the same pass.
  const double before = count ? *count : 0, after = before + (double)rows;
  const double weight = after > 0 ? before * (double)rows / after : 0;
  *new_count = after;
  for (int64_t i = 0; i < width; ++i) {
    const double old = mean ? mean[i] : 0;
    moved[i] = rows ? own[i] - old : 0;
    new_mean[i] = after > 0 ? old + moved[i] * ((double)rows / after) : 0;
    own[i] -= shift[i];
  }
  constexpr int64_t EDGE = 32;
  const int64_t lines = ceil_div(width, EDGE);
  parallel_uneven(lines, threads, [&](int64_t task) {
    const int64_t from = task * EDGE, end = min(from + EDGE, width);
    for (int64_t to = 0; to <= from; to += EDGE) {
      const int64_t right = min(to + EDGE, width);
      double tile[EDGE][EDGE];
      for (int64_t i = from; i < end; ++i) {
        double* line = tile[i - from];
        const double lack = (double)rows * own[i], far = weight * moved[i];
        for (int64_t j = to; j < right; ++j) {
          const double product = rows ? new_comoment[i * width + j] - lack * own[j] : 0;
          line[j - to] = product + far * moved[j];
        }
        if (to == from) line[i - to] = diagonal[i] + far * moved[i];
        if (comoment)
          for (int64_t j = to; j < right; ++j) line[j - to] += comoment[i * width + j];
        for (int64_t j = to; j < min(right, i + 1); ++j) new_comoment[i * width + j] = line[j - to];
      }
      for (int64_t j = to; j < right; ++j)
        for (int64_t i = max(from, j + 1); i < end; ++i) new_comoment[j * width + i] = tile[i - from][j - to];
    }
  });
  delete[] own;
  delete[] shift;
}

inline void moments_fwd(int64_t dtype, int64_t rows, int64_t width, const void* features, const double* count,
                        const double* mean, const double* comoment, double* new_count, double* new_mean,
                        double* new_comoment, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    moments_fwd_as<T>(rows, width, (const T*)features, count, mean, comoment, new_count, new_mean, new_comoment, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(moments, KERNEL(moments_fwd))

FASTGEN_END
