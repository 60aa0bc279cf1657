// trace_sqrt_product: the sum of the square roots of the eigenvalues of a symmetric positive definite matrix, float64.
// fastgen/ops/trace_sqrt_product.py has the mathematics.
//
// 1. Householder reflections, BAND columns at a time, take the matrix to a band B of BAND diagonals on either side:
//    A <- A - V W^T - W V^T. All but a few percent of it are products of tiles, near the speed of the machine, where a
//    reduction to tridiagonal form is half matrix-vector products at the speed of the memory. The matrix is kept as tiles of
//    BAND x BAND, of the lower triangle only.
// 2. sum sqrt(lambda) = n sqrt((a + g) / 2) + 1/(2 pi) integral over x of
//        e^(x/2) [log det(I + B e^-x) - n/2 log(1 + 2a e^-x + g^2 e^-2x)]
//    with a and g the arithmetic and the geometric mean of the eigenvalues, which trace and determinant give: the second term
//    belongs to n/2 pairs of eigenvalues with these means, whose roots sum to the first, and makes the integrand fall off as
//    e^(-3|x|/2) on both sides. The trapezoidal rule converges exponentially. The determinants come from L D L^T of the band,
//    a shift e^x to each lane of a vector.
#pragma once
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

constexpr int DOUBLES = LANES > 2 ? LANES / 2 : 2;
using v64 = double __attribute__((vector_size(8 * DOUBLES)));
INLINE v64 splat64(double x) { return x - v64{}; }
INLINE v64 fma(v64 a, v64 b, v64 c) {
#if defined(__AVX512F__)
  return (v64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (v64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(FASTGEN_NEON)
  return (v64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// A register block is ROWS x 3 vectors of sums; with those of the right side and one broadcast it fills the register file.
#if defined(__AVX512F__) || defined(FASTGEN_NEON)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
constexpr int COLUMNS = 3 * DOUBLES;
constexpr int64_t BAND = 48;
constexpr int64_t AREA = BAND * BAND;
constexpr int GROUPS = BAND / COLUMNS;  // a right side is packed by groups of columns: [GROUPS][rows][COLUMNS]
static_assert(BAND % COLUMNS == 0 && BAND % ROWS == 0, "a tile is whole register blocks");

// Memory of doubles on cache lines.
struct Doubles {
  double *memory, *data;
  explicit Doubles(int64_t count, bool zero = false) : memory(new double[count + 8]) {
    data = (double*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    if (zero) memset(data, 0, count * sizeof(double));
  }
  Doubles(const Doubles&) = delete;
  ~Doubles() { delete[] memory; }
};

// to[ROWS][COLUMNS] += sum over k of a[r * across + k * along] * b[k][COLUMNS]. Half a line at `ahead` is fetched for each k.
INLINE void add_block(int64_t count, const double* a, int64_t across, int64_t along, const double* b, double* to,
                      int64_t pitch, const double* ahead) {
  v64 total[ROWS][3];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 3; ++v) total[r][v] = load<v64>(to + r * pitch + v * DOUBLES);
  for (int64_t k = 0; k < count; ++k, a += along, b += COLUMNS, ahead += 4) {
    v64 right[3];
    for (int v = 0; v < 3; ++v) right[v] = load<v64>(b + v * DOUBLES);
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const v64 left = splat64(a[r * across]);
      for (int v = 0; v < 3; ++v) total[r][v] = fma(left, right[v], total[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 3; ++v) store(to + r * pitch + v * DOUBLES, total[r][v]);
}

// to[BAND][BAND] += a * b, both b and the result packed like right sides. The tile `next` is on its way meanwhile.
INLINE void add_tile(const double* a, int64_t across, int64_t along, const double* b, double* to, const double* next) {
  for (int g = 0; g < GROUPS; ++g, b += BAND * COLUMNS)
    for (int64_t r = 0; r < BAND; r += ROWS, to += ROWS * COLUMNS, next += AREA / (GROUPS * (BAND / ROWS)))
      add_block(BAND, a + r * across, across, along, b, to, COLUMNS, next);
}
INLINE void pack_tile(const double* from, int64_t pitch, double* to) {
  for (int g = 0; g < GROUPS; ++g)
    for (int64_t r = 0; r < BAND; ++r)
      for (int c = 0; c < COLUMNS; ++c) to[(g * BAND + r) * COLUMNS + c] = from[r * pitch + g * COLUMNS + c];
}
INLINE void unpack_tile(const double* from, double* to, int64_t pitch) {
  for (int g = 0; g < GROUPS; ++g)
    for (int64_t r = 0; r < BAND; ++r)
      for (int c = 0; c < COLUMNS; ++c) to[r * pitch + g * COLUMNS + c] = from[(g * BAND + r) * COLUMNS + c];
}

// The lower triangle of a symmetric matrix as tiles, a column of tiles after the other; tiles of the diagonal are whole. Rows
// that fill up the last tiles are zero.
struct Tiles {
  int64_t side;
  Doubles memory;
  explicit Tiles(int64_t n) : side(ceil_div(n, BAND)), memory(side * (side + 1) / 2 * AREA) {}
  INLINE double* at(int64_t i, int64_t j) const { return memory.data + (j * side - j * (j - 1) / 2 + i - j) * AREA; }

  // from the lower half of a row-major matrix
  void read(int64_t n, const double* a, double scale, int64_t threads) {
    parallel_uneven(side, threads, [&](int64_t i) {
      for (int64_t j = 0; j <= i; ++j) {
        double* to = at(i, j);
        for (int64_t r = 0; r < BAND; ++r) {
          const int64_t row = i * BAND + r;
          const int64_t count = row < n ? min(BAND, row + 1 - j * BAND) : 0;
          const double* from = a + row * n + j * BAND;
          for (int64_t c = 0; c < count; ++c) to[r * BAND + c] = scale * from[c];
          for (int64_t c = count; c < BAND; ++c) to[r * BAND + c] = 0;
        }
      }
      double* tile = at(i, i);
      for (int64_t r = 0; r < BAND; ++r)
        for (int64_t c = r + 1; c < BAND; ++c) tile[r * BAND + c] = tile[c * BAND + r];
    });
  }
};

// Householder QR of a panel [rows, BAND]. The panel is left with R in its upper triangle and, below that, vectors which
// `scale` takes to those with a leading one: H_k = I - tau_k v_k v_k^T. A pass over the rows applies one reflection and finds
// the products of the next column with those right of it. Columns of groups before First are done.
template <int First>
INLINE void reflect_rows(int64_t rows, double* panel, int64_t k, const double* factor, double* products) {
  constexpr int VECTORS = BAND / DOUBLES, BEGIN = First * 3;
  v64 by[VECTORS], sums[VECTORS] = {};
  for (int v = BEGIN; v < VECTORS; ++v) by[v] = load<v64>(factor + v * DOUBLES);
  for (int64_t row = k + 1; row < rows; ++row) {
    double* line = panel + row * BAND;
    const v64 x = splat64(line[k]);
    v64 updated[VECTORS];
    for (int v = BEGIN; v < VECTORS; ++v) {
      updated[v] = fma(x, by[v], load<v64>(line + v * DOUBLES));
      store(line + v * DOUBLES, updated[v]);
    }
    if (row == k + 1) continue;
    const v64 next = splat64(line[min(k + 1, BAND - 1)]);
    for (int v = BEGIN; v < VECTORS; ++v) sums[v] = fma(next, updated[v], sums[v]);
  }
  for (int v = BEGIN; v < VECTORS; ++v) store(products + v * DOUBLES, sums[v]);
}
template <int First>
inline void reflect_from(int64_t rows, double* panel, int64_t k, const double* factor, double* products) {
  if constexpr (First + 1 < GROUPS)
    if (k >= (First + 1) * COLUMNS) return reflect_from<First + 1>(rows, panel, k, factor, products);
  reflect_rows<First>(rows, panel, k, factor, products);
}
inline void factor_panel(int64_t rows, double* panel, double* tau, double* scale) {
  double products[BAND] = {}, factor[BAND];
  for (int64_t row = 1; row < rows; ++row)
    for (int64_t c = 0; c < BAND; ++c) products[c] += panel[row * BAND] * panel[row * BAND + c];
  for (int64_t k = 0; k < BAND; ++k) {
    double* pivot = panel + k * BAND;
    tau[k] = scale[k] = 0;
    for (double& f : factor) f = 0;
    if (products[k] > 0) {
      const double length = __builtin_sqrt(pivot[k] * pivot[k] + products[k]), beta = pivot[k] > 0 ? -length : length;
      tau[k] = (beta - pivot[k]) / beta;
      scale[k] = 1 / (pivot[k] - beta);
      for (int64_t c = k + 1; c < BAND; ++c) {
        const double dot = tau[k] * (pivot[c] + scale[k] * products[c]);
        pivot[c] -= dot;
        factor[c] = -scale[k] * dot;
      }
      pivot[k] = beta;
    }
    reflect_from<0>(rows, panel, k, factor, products);
  }
}

// Takes the tiles to a band: what is left of column j are the tile of the diagonal and the upper triangle of the tile below it.
inline void reduce_to_band(const Tiles& tiles, int64_t threads) {
  const int64_t side = tiles.side;
  // rows or columns of tiles of a task: the other side of the product is read so many times less
  constexpr int64_t TALL = 2, WIDE = 3;
  constexpr int64_t PARTS = 8;  // sums over rows are taken in so many parts, whatever the number of threads
  const Doubles left(side * 2 * AREA), packed(side * AREA), image(side * AREA), right(side * 2 * AREA);
  const Doubles parts(PARTS * AREA), triangle(4 * AREA);
  double *gram = triangle.data, *t = gram + AREA, *tp = t + AREA, *cp = tp + AREA, tau[BAND], scale[BAND];
  const auto sum_parts = [&](double* to) {
    for (int64_t i = 0; i < AREA; ++i) {
      double total = 0;
      for (int64_t part = 0; part < PARTS; ++part) total += parts.data[part * AREA + i];
      parts.data[i] = total;
    }
    unpack_tile(parts.data, to, BAND);
  };
  for (int64_t j = 0; j + 1 < side; ++j) {
    const int64_t first = j + 1, count = side - first;
    double* panel = tiles.at(first, j);
    factor_panel(count * BAND, panel, tau, scale);
    // left [row][V | W], and V packed as a right side
    parallel_for(count, threads, [&](int64_t i) {
      double* v = left.data + i * 2 * AREA;
      for (int64_t r = 0; r < BAND; ++r)
        for (int64_t c = 0; c < BAND; ++c) {
          const int64_t row = i * BAND + r;
          v[r * 2 * BAND + c] = row > c ? panel[row * BAND + c] * scale[c] : row == c ? 1.0 : 0.0;
        }
      pack_tile(v, 2 * BAND, packed.data + i * AREA);
    });
    // sum over the rows of V^T X for a packed X
    const auto project = [&](const double* x, double* to) {
      parallel_for(PARTS, threads, [&](int64_t part) {
        double* sum = parts.data + part * AREA;
        memset(sum, 0, AREA * sizeof(double));
        for (int64_t i = count * part / PARTS; i < count * (part + 1) / PARTS; ++i)
          add_tile(left.data + i * 2 * AREA, 1, 2 * BAND, x + i * AREA, sum, x + (i + 1) * AREA);
      });
      sum_parts(to);
    };
    // T with H_1 H_2 ... = I - V T V^T
    project(packed.data, gram);
    for (int64_t k = 0; k < BAND; ++k) {
      for (int64_t r = 0; r < BAND; ++r) t[r * BAND + k] = 0;
      for (int64_t r = 0; r < k; ++r) {
        double sum = 0;
        for (int64_t c = r; c < k; ++c) sum += t[r * BAND + c] * gram[c * BAND + k];
        t[r * BAND + k] = -tau[k] * sum;
      }
      t[k * BAND + k] = tau[k];
    }
    pack_tile(t, BAND, tp);
    // Z = A V
    parallel_uneven(ceil_div(count, TALL), threads, [&](int64_t task) {
      const int64_t begin = task * TALL, end = min(count, begin + TALL);
      const auto tile = [&](int64_t i, int64_t c) { return tiles.at(first + max(i, c), first + min(i, c)); };
      memset(image.data + begin * AREA, 0, (end - begin) * AREA * sizeof(double));
      for (int64_t c = 0; c < count; ++c)
        for (int64_t i = begin; i < end; ++i) {
          const double* next = i + 1 < end ? tile(i + 1, c) : tile(begin, min(c + 1, count - 1));
          const int64_t across = c <= i ? BAND : 1;
          add_tile(tile(i, c), across, BAND + 1 - across, packed.data + c * AREA, image.data + i * AREA, next);
        }
      for (int64_t i = begin; i < end; ++i) unpack_tile(image.data + i * AREA, left.data + i * 2 * AREA + BAND, 2 * BAND);
    });
    // C = T^T (V^T Z) T / 2
    project(image.data, gram);
    double* half = parts.data;
    for (int64_t r = 0; r < BAND; ++r)
      for (int64_t c = 0; c < BAND; ++c) {
        double sum = 0;
        for (int64_t k = 0; k <= c; ++k) sum += gram[r * BAND + k] * t[k * BAND + c];
        half[r * BAND + c] = -0.5 * sum;
      }
    for (int64_t r = 0; r < BAND; ++r)
      for (int64_t c = 0; c < BAND; ++c) {
        double sum = 0;
        for (int64_t k = 0; k <= r; ++k) sum += t[k * BAND + r] * half[k * BAND + c];
        gram[r * BAND + c] = sum;
      }
    pack_tile(gram, BAND, cp);
    // W = Z T - V C, and -[W | V] transposed and packed as right sides
    parallel_for(count, threads, [&](int64_t i) {
      double *v = left.data + i * 2 * AREA, *w = image.data + i * AREA;
      memset(w, 0, AREA * sizeof(double));
      add_tile(v + BAND, 2 * BAND, 1, tp, w, w + AREA);
      add_tile(v, 2 * BAND, 1, cp, w, v + 2 * AREA);
      unpack_tile(w, v + BAND, 2 * BAND);
      double* to = right.data + i * 2 * AREA;
      for (int g = 0; g < GROUPS; ++g)
        for (int64_t k = 0; k < 2 * BAND; ++k, to += COLUMNS)
          for (int c = 0; c < COLUMNS; ++c) to[c] = -v[(g * COLUMNS + c) * 2 * BAND + (k + BAND) % (2 * BAND)];
    });
    // A -= [V | W] [W | V]^T
    parallel_uneven(ceil_div(count, WIDE), threads, [&](int64_t task) {
      const int64_t begin = task * WIDE, end = min(count, begin + WIDE);
      for (int64_t i = begin; i < count; ++i)
        for (int64_t c = begin; c < min(end, i + 1); ++c) {
          const bool last = c + 1 == min(end, i + 1);
          const double* next = last ? tiles.at(first + i, first + begin) + AREA : tiles.at(first + i, first + c + 1);
          double* to = tiles.at(first + i, first + c);
          for (int g = 0; g < GROUPS; ++g)
            for (int64_t r = 0; r < BAND; r += ROWS, next += AREA / (GROUPS * (BAND / ROWS)))
              add_block(2 * BAND, left.data + (i * BAND + r) * 2 * BAND, 2 * BAND, 1,
                        right.data + (c * GROUPS + g) * 2 * BAND * COLUMNS, to + r * BAND + g * COLUMNS, BAND, next);
        }
    });
  }
}

// A band matrix and its factors L D L^T at DOUBLES shifts at once.
struct Band {
  static constexpr int64_t BLOCK = 4;               // rows that are found together
  static constexpr int64_t LINE = BAND + BLOCK;     // elements of a row of L, from the first of its block
  static constexpr int64_t RING = LINE / BLOCK;     // blocks of rows that the next one needs, and itself
  int64_t n, rows;
  Doubles memory;  // [rows][BAND + 1]: elements (i, i - BAND) to (i, i); rows beyond n are zero

  Band(int64_t n_, const Tiles& tiles) : n(n_), rows(ceil_div(n, BLOCK) * BLOCK), memory(rows * (BAND + 1), true) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t tile = i / BAND, r = i % BAND;
      for (int64_t c = 0; c <= r; ++c) put(i, tile * BAND + c, tiles.at(tile, tile)[r * BAND + c]);
      if (tile)
        for (int64_t c = r; c < BAND; ++c) put(i, (tile - 1) * BAND + c, tiles.at(tile, tile - 1)[r * BAND + c]);
    }
  }
  void put(int64_t i, int64_t j, double value) { memory.data[i * (BAND + 1) + j - i + BAND] = value; }

  // For B + shift: log det(I + B / shift), or with Pivots log det(B + shift); and the smallest pivot.
  template <bool Pivots>
  inline void factor(const double* shifts, double* log_det, double* smallest) const {
    const Doubles ring(RING * BLOCK * (LINE + 1) * DOUBLES, true);
    double* inverse = ring.data + RING * BLOCK * LINE * DOUBLES;  // 1 / pivot of the rows of the ring
    const auto line = [&](int64_t block, int64_t r) {
      return ring.data + ((block + RING) % RING * BLOCK + r) * LINE * DOUBLES;
    };
    const v64 shift = load<v64>(shifts);
    v64 least = splat64(1e300);
    double total[DOUBLES] = {};
    alignas(64) double own[BLOCK * LINE * DOUBLES];  // rows of L D
    const auto w = [&](int64_t r, int64_t c) { return own + (r * LINE + c) * DOUBLES; };
    for (int64_t block = 0; block * BLOCK < rows; ++block) {
      for (int64_t r = 0; r < BLOCK; ++r)
        for (int64_t c = 0; c < LINE; ++c)
          store(w(r, c), splat64(c >= r && c <= BAND + r ? memory.data[(block * BLOCK + r) * (BAND + 1) + c - r] : 0));
      for (int64_t before = 0; before < RING - 1; ++before) {  // columns of an earlier block
        const int64_t at = before * BLOCK, skip = (RING - 1 - before) * BLOCK;  // its rows of L begin so much earlier
        const double* l = line(block + before - (RING - 1), 0) + skip * DOUBLES;
        v64 sums[BLOCK][BLOCK];
        for (int r = 0; r < BLOCK; ++r)
          for (int c = 0; c < BLOCK; ++c) sums[r][c] = load<v64>(w(r, at + c));
        for (int64_t k = 0; k < at; ++k) {
          v64 other[BLOCK];
          for (int c = 0; c < BLOCK; ++c) other[c] = load<v64>(l + (c * LINE + k) * DOUBLES);
#pragma GCC unroll 4
          for (int r = 0; r < BLOCK; ++r) {
            const v64 x = -load<v64>(w(r, k));
            for (int c = 0; c < BLOCK; ++c) sums[r][c] = fma(x, other[c], sums[r][c]);
          }
        }
        for (int r = 0; r < BLOCK; ++r)
          for (int c = 0; c < BLOCK; ++c) {
            for (int k = 0; k < c; ++k) sums[r][c] = fma(-sums[r][k], load<v64>(l + (c * LINE + at + k) * DOUBLES), sums[r][c]);
            store(w(r, at + c), sums[r][c]);
          }
      }
      v64 product = Pivots ? splat64(1) : v64{};  // of the pivots; or of (1 + pivot / shift - 1), less 1
      for (int64_t r = 0; r < BLOCK; ++r) {
        double* l = line(block, r);
        v64 pivot = load<v64>(w(r, BAND + r));
        for (int64_t c = 0; c < BAND + r; ++c) {
          v64 x = load<v64>(w(r, c));
          if (c >= BAND) {
            const double* other = line(block, c - BAND);
            for (int64_t k = 0; k < c; ++k) x = fma(-load<v64>(w(r, k)), load<v64>(other + k * DOUBLES), x);
            store(w(r, c), x);
          }
          const int64_t column = (block * BLOCK + RING * BLOCK - BAND + c) % (RING * BLOCK);
          const v64 scaled = x * load<v64>(inverse + column * DOUBLES);
          store(l + c * DOUBLES, scaled);
          pivot = fma(-x, scaled, pivot);
        }
        if (block * BLOCK + r >= n) continue;
        const v64 whole = shift + pivot;
        store(inverse + (block * BLOCK + r) % (RING * BLOCK) * DOUBLES, 1.0 / whole);
        least = whole < least || whole != whole ? whole : least;
        const v64 ratio = pivot / shift;
        product = Pivots ? product * whole : product + ratio * (1.0 + product);
      }
      double factors[DOUBLES];
      store(factors, product);
      for (int i = 0; i < DOUBLES; ++i) total[i] += Pivots ? __builtin_log(factors[i]) : __builtin_log1p(factors[i]);
    }
    for (int i = 0; i < DOUBLES; ++i) log_det[i] = total[i];
    store(smallest, least);
  }

  // factor() for any number of shifts, a multiple of DOUBLES
  template <bool Pivots>
  void factor_all(int64_t count, const double* shifts, double* log_det, double* smallest, int64_t threads) const {
    parallel_uneven(count / DOUBLES, threads, [&](int64_t i) {
      factor<Pivots>(shifts + i * DOUBLES, log_det + i * DOUBLES, smallest + i * DOUBLES);
    });
  }

  // Sum of the square roots of the eigenvalues; NaN where it cannot be told that all are above 8 roundings of the largest.
  double trace_sqrt(int64_t threads) const {
    double trace = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c <= BAND; ++c) {
        const double x = memory.data[i * (BAND + 1) + c];
        squares += c < BAND ? 2 * x * x : x * x;
        trace += c < BAND ? 0 : x;
      }
    const double norm = __builtin_sqrt(squares);  // at least the largest eigenvalue
    constexpr int PROBES = 8;
    double shifts[PROBES] = {0, -8 * 0x1p-52, -1e-13, -1e-11, -1e-9, -1e-7, -1e-5, -1e-3}, log_det[PROBES], smallest[PROBES];
    for (double& shift : shifts) shift *= norm;
    factor_all<true>(PROBES, shifts, log_det, smallest, threads);
    if (!(smallest[0] > 0 && smallest[1] > 0)) return (double)__builtin_nan("");
    int bound = 1;
    while (bound + 1 < PROBES && smallest[bound + 1] > 0) ++bound;
    const double arithmetic = trace / (double)n, geometric = __builtin_exp(log_det[0] / (double)n);
    const double square = geometric * geometric, low = square / (2 * arithmetic);  // at most the smaller one of a pair
    const double begin = __builtin_log(-shifts[bound] < low ? -shifts[bound] : low) - TAIL, end = __builtin_log(norm) + TAIL;
    const int64_t count = ceil_div((int64_t)((end - begin) / STEP) + 1, PROBES) * PROBES;
    const double step = (end - begin) / (double)(count - 1);
    const Doubles points(3 * count);
    double *at = points.data, *value = at + count, *unused = value + count;
    for (int64_t i = 0; i < count; ++i) at[i] = __builtin_exp(begin + (double)i * step);
    factor_all<false>(count, at, value, unused, threads);
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double pairs = 0.5 * (double)n * __builtin_log1p((2 * arithmetic + square / at[i]) / at[i]);
      sum += __builtin_sqrt(at[i]) * (value[i] - pairs);
    }
    const double roots = (double)n * __builtin_sqrt(0.5 * (arithmetic + geometric));
    return roots + sum * step / 6.283185307179586;
  }
  static constexpr double STEP = 0.66;  // of the rule: its error is about e^(-2 pi^2 / STEP), 1e-13
  static constexpr double TAIL = 18.5;  // beyond the eigenvalues on either side: what is left out is about e^(-3 TAIL / 2)
};

// a: float64 [n, n] of which the lower half is read. out: the sum, or NaN where eigenvalues are not clear of zero.
inline void trace_sqrt_fwd(int64_t n, const double* a, double* out, int64_t threads) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(a[i * n + i] > 0 && a[i * n + i] < 1e300)) largest = (double)INFINITY;
    else largest = a[i * n + i] > largest ? a[i * n + i] : largest;
  }
  *out = n ? (double)__builtin_nan("") : 0;
  if (!n || !(largest < 1e300)) return;
  int exponent;
  __builtin_frexp(largest, &exponent);
  exponent = exponent / 2 * 2;
  Tiles tiles(n);
  tiles.read(n, a, __builtin_ldexp(1.0, -exponent), threads);
  reduce_to_band(tiles, threads);
  *out = __builtin_ldexp(Band(n, tiles).trace_sqrt(threads), exponent / 2);
}

FASTGEN_KERNELS(trace_sqrt_product, KERNEL(trace_sqrt_fwd))

FASTGEN_END
