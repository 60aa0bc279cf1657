// nearest_code: for each row of z [rows, width] the nearest of the rows of a codebook [codes, width].
// fastgen/ops/nearest_code.py has the mathematics.
//
// Scores z.c - |c|^2 / 2, both centred at the mean code, are a matrix product in float32 register blocks: lanes are rows, so that
// the running maximum needs no exchange of lanes. A block updates it only where some lane comes within rounding of its maximum
// so far. Rows that another code came that close to go through the scores once more, and whatever comes that close again is
// measured in float64: the index is that of the smallest distance, not of the largest rounded score.
#pragma once
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// A register block is CODES x VECTORS sums; with the vectors of z and one broadcast it fills the register file.
#if defined(__AVX512F__)
constexpr int CODES = 8, VECTORS = 3;
#elif defined(__AVX2__)
constexpr int CODES = 4, VECTORS = 3;
#elif defined(FASTGEN_ONE_LANE)
constexpr int CODES = 4, VECTORS = 4;
#else
constexpr int CODES = 8, VECTORS = 3;
#endif
constexpr int64_t STRIP = VECTORS * LANES;  // rows of a register block
constexpr int64_t PANEL = 64 << 10;         // floats of packed codes that stay in L2 while the strips of a tile pass
constexpr int64_t ROWS = 32 << 10;          // floats of packed rows beside them
constexpr int64_t GROUP = 64;               // codes whose sums are one task
constexpr float INFINITE = __builtin_inff();

// |z - c|^2 in float64, by the same operations in the same order on every instruction set
template <class T>
INLINE double exact_distance(int64_t width, const T* z, const T* c) {
  constexpr int N = 8;
  double sums[N] = {};
  int64_t i = 0;
  for (; i + N <= width; i += N)
    for (int j = 0; j < N; ++j) {
      const double difference = (double)widen(z[i + j]) - (double)widen(c[i + j]);
      sums[j] += difference * difference;
    }
  for (int j = 0; i < width; ++i, ++j) {
    const double difference = (double)widen(z[i]) - (double)widen(c[i]);
    sums[j] += difference * difference;
  }
  for (int half = N / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// The codebook, centred: [block][1 + width][CODES], the first line being -|c|^2 / 2. Codes that are not finite are never nearest,
// unless all are, and get -infinity, as do those that fill up the last block.
struct PackedCodes {
  int64_t codes, width, blocks, size;
  float *centre, *packed;
  double radius;  // of the largest code

  template <class T>
  PackedCodes(int64_t codes_, int64_t width_, const T* codebook, int64_t threads) : codes(codes_), width(width_) {
    blocks = ceil_div(codes, CODES), size = (width + 1) * CODES;
    centre = new float[width + blocks * size];
    packed = centre + width;
    double* scratch = new double[max(width, blocks)]();
    for (int64_t k = 0; k < codes; ++k)
      for (int64_t i = 0; i < width; ++i) scratch[i] += widen(codebook[k * width + i]);
    for (int64_t i = 0; i < width; ++i) {
      centre[i] = (float)(scratch[i] / (double)codes);
      if (!(__builtin_fabsf(centre[i]) < INFINITE)) centre[i] = 0;
    }
    parallel_for(ceil_div(blocks, GROUP), threads, [&](int64_t task) {
      for (int64_t b = task * GROUP; b < min(blocks, (task + 1) * GROUP); ++b) {
        scratch[b] = 0;
        for (int64_t r = 0; r < CODES; ++r) scratch[b] = pack(codebook, b * CODES + r, packed + b * size + r, scratch[b]);
      }
    });
    double largest = 0;
    for (int64_t b = 0; b < blocks; ++b) largest = scratch[b] > largest ? scratch[b] : largest;
    radius = __builtin_sqrt(largest);
    delete[] scratch;
  }
  PackedCodes(const PackedCodes&) = delete;
  ~PackedCodes() { delete[] centre; }

  // Writes a code, CODES floats from one component to the next; returns its square where that is larger than `largest`.
  template <class T>
  INLINE double pack(const T* codebook, int64_t code, float* to, double largest) {
    double square = 0, finite = 0;
    if (code < codes)
      for (int64_t i = 0; i < width; ++i) {
        const float c = widen(codebook[code * width + i]), x = c - centre[i];
        to[(i + 1) * CODES] = x;
        square += (double)x * x;
        finite += c - c;
      }
    if (code < codes && finite == 0) {
      to[0] = (float)(-0.5 * square);
      return square > largest ? square : largest;
    }
    for (int64_t i = 0; i < width; ++i) to[(i + 1) * CODES] = 0;
    to[0] = -INFINITE;
    return largest;
  }

  // How far two scores of a row of this length may be off together; infinite where they may overflow. A score has width + 1
  // roundings (twice as many without fused multiply-add) of at most 2^-24 of (|z| + |c|) |c|, and some from centring.
  float uncertainty(double length) const {
    const double scale = (length + radius) * radius;
    return scale < 1e37 ? (float)((double)(4 * width + 24) * 0x1p-24 * scale + 1e-37) : INFINITE;
  }
};

// total[r][v] = score of code r of a block and the rows of vector v; lines of z are `pitch` floats apart
template <int V>
INLINE void score(int64_t width, const float* z, int64_t pitch, const float* codes, vf (&total)[CODES][V]) {
  for (int r = 0; r < CODES; ++r)
    for (int v = 0; v < V; ++v) total[r][v] = splat(codes[r]);
  for (int64_t i = 0; i < width; ++i, z += pitch) {
    codes += CODES;
    vf x[V];
    for (int v = 0; v < V; ++v) x[v] = load<vf>(z + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < CODES; ++r) {
      const vf c = splat(codes[r]);
      for (int v = 0; v < V; ++v) total[r][v] = fma(c, x[v], total[r][v]);
    }
  }
}

// The largest of the scores of a vector of rows; NaN counts as none.
template <int V>
INLINE vf largest(const vf (&total)[CODES][V], int v) {
  vf top = splat(-INFINITE);
  for (int r = 0; r < CODES; ++r) top = larger(total[r][v], top);
  return top;
}

// What is known of the rows of a tile.
struct RowTile {
  int64_t capacity;
  float *memory, *packed, *best, *limit, *slack;  // packed: [strip][width][STRIP], aligned; limit = best - slack
  int32_t *index, *near;                 // near: another code's score came within the slack

  RowTile(int64_t strips, int64_t width) : capacity(strips * STRIP) {
    memory = new float[capacity * (width + 3) + 16];  // three lines more, since lines are written by fours
    packed = (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    best = new float[3 * capacity], limit = best + capacity, slack = limit + capacity;
    index = new int32_t[2 * capacity], near = index + capacity;
  }
  RowTile(const RowTile&) = delete;
  ~RowTile() {
    delete[] memory;
    delete[] best;
    delete[] index;
  }

  template <class T>
  INLINE void read(int64_t count, const PackedCodes& book, const T* z) {
    const int64_t width = book.width, pitch = ceil_div(width, 4) * 4;
    float* lines = new float[LANES * pitch + 1];
    for (int64_t first = 0; first < ceil_div(count, STRIP) * STRIP; first += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) {
        float* line = lines + lane * pitch;
        const int64_t row = first + lane;
        vf square{};
        for (int64_t i = width; i < pitch; ++i) line[i] = 0;
        for_blocks(width, [&](int64_t i, int64_t n) {
          const vf x = row < count ? block_load(z + row * width + i, n) - block_load(book.centre + i, n) : vf{};
          square = fma(x, x, square);
          block_store(line + i, x, n);
        });
        slack[row] = book.uncertainty(__builtin_sqrt((double)sum(square)));
        best[row] = limit[row] = -INFINITE;
        index[row] = near[row] = 0;
      }
      float* to = strip(first / STRIP, width) + first % STRIP;
      for (int64_t i = 0; i < width; i += 4) {
        vf a, b, c, d;
        load_columns4(lines + i, pitch, a, b, c, d);
        store(to + i * STRIP, a), store(to + (i + 1) * STRIP, b), store(to + (i + 2) * STRIP, c), store(to + (i + 3) * STRIP, d);
      }
    }
    delete[] lines;
  }
  INLINE float* strip(int64_t i, int64_t width) const { return packed + i * STRIP * width; }

  // Passes blocks [begin, end) of the codebook by a strip of which V vectors hold rows.
  template <int V>
  INLINE void pass(int64_t strip_, const PackedCodes& book, int64_t begin, int64_t end) {
    const float *z = strip(strip_, book.width), *codes = book.packed + begin * book.size;
    for (int64_t block = begin; block < end; ++block, codes += book.size) {
      vf total[CODES][V];
      score<V>(book.width, z, STRIP, codes, total);
      for (int v = 0; v < V; ++v) {
        const int64_t at = strip_ * STRIP + v * LANES;
        if (any(largest<V>(total, v) > load<vf>(limit + at))) update<V>(at, total, v, (int32_t)(block * CODES));
      }
    }
  }
  template <int V>
  INLINE void update(int64_t at, const vf (&total)[CODES][V], int v, int32_t code) {
    vf top = load<vf>(best + at), low = load<vf>(limit + at);
    const vf margin = load<vf>(slack + at);
    vi which = load<vi>(index + at), close = load<vi>(near + at);
    for (int r = 0; r < CODES; ++r) {
      const vf s = total[r][v];
      close = s - margin > top ? splat_i(0) : s > low ? splat_i(1) : close;
      which = s > top ? splat_i(code + r) : which;
      top = s > top ? s : top;
      low = top - margin;
    }
    store(best + at, top), store(limit + at, low), store(index + at, which), store(near + at, close);
  }
  // Whether the scores leave open which code is nearest to a row.
  INLINE bool open(int64_t row) const { return near[row] || !(slack[row] < INFINITE) || !(best[row] > -INFINITE); }

  // Settles up to LANES open rows in float64, among the codes whose score comes within the slack of the best.
  template <class T>
  INLINE void settle(const int32_t* rows, int64_t count, const PackedCodes& book, const T* z, const T* codebook) {
    const int64_t width = book.width;
    float *lines = new float[LANES * width + 1], low[LANES];
    double least[LANES];
    int64_t which[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t row = rows[min(lane, count - 1)];
      low[lane] = slack[row] < INFINITE && best[row] > -INFINITE ? limit[row] : -INFINITE;
      least[lane] = (double)INFINITE, which[lane] = -1;
      const float* from = strip(row / STRIP, width) + row % STRIP;
      for (int64_t i = 0; i < width; ++i) lines[i * LANES + lane] = from[i * STRIP];
    }
    const vf floor = load<vf>(low);
    for (int64_t block = 0; block < book.blocks; ++block) {
      vf total[CODES][1];
      score<1>(width, lines, LANES, book.packed + block * book.size, total);
      if (!any(largest<1>(total, 0) >= floor)) continue;
      for (int64_t r = 0; r < min(CODES, book.codes - block * CODES); ++r) {
        float scores[LANES];
        store(scores, total[r][0]);
        const int64_t code = block * CODES + r;
        for (int64_t lane = 0; lane < count; ++lane) {
          if (scores[lane] < low[lane]) continue;
          // repeated codes, of a codebook that has collapsed, are not measured again
          if (which[lane] >= 0 && !memcmp(codebook + code * width, codebook + which[lane] * width, width * sizeof(T))) continue;
          const double distance = exact_distance(width, z + rows[lane] * width, codebook + code * width);
          if (distance < least[lane]) least[lane] = distance, which[lane] = code;
        }
      }
    }
    for (int64_t lane = 0; lane < count; ++lane) index[rows[lane]] = which[lane] < 0 ? 0 : (int32_t)which[lane];
    delete[] lines;
  }
};

// The rows of each code, in their order: code k has rows [begin[k], begin[k + 1]) of `row`.
struct RowsOfCodes {
  int64_t codes;
  int64_t *begin, *row;
  // Rows whose `distance` is not finite are left out; all take part where it is null.
  RowsOfCodes(int64_t rows, int64_t codes_, const int64_t* index, const float* distance) : codes(codes_) {
    const auto counts = [&](int64_t i) { return !distance || distance[i] < INFINITE; };
    begin = new int64_t[codes + 2 + rows]();
    row = begin + codes + 2;
    for (int64_t i = 0; i < rows; ++i) begin[index[i] + 2] += counts(i);
    for (int64_t k = 0; k < codes; ++k) begin[k + 2] += begin[k + 1];
    for (int64_t i = 0; i < rows; ++i)
      if (counts(i)) row[begin[index[i] + 1]++] = i;
  }
  RowsOfCodes(const RowsOfCodes&) = delete;
  ~RowsOfCodes() { delete[] begin; }

  // out[k][i] = sum of term(row, k, i) over the rows of code k, in float64 and in their order
  template <class T, class Term>
  INLINE void sum(int64_t width, T* out, int64_t threads, Term&& term) const {
    parallel_uneven(ceil_div(codes, GROUP), threads, [&](int64_t task) {
      double* total = new double[width + 1];
      for (int64_t k = task * GROUP; k < min(codes, (task + 1) * GROUP); ++k) {
        for (int64_t i = 0; i < width; ++i) total[i] = 0;
        for (int64_t j = begin[k]; j < begin[k + 1]; ++j)
          for (int64_t i = 0; i < width; ++i) total[i] += term(row[j], k, i);
        for (int64_t i = 0; i < width; ++i) narrow((float)total[i], out[k * width + i]);
      }
      delete[] total;
    });
  }
};

INLINE int64_t worthwhile(int64_t threads, int64_t work) { return work < 4 * SERIAL ? 1 : threads; }

template <class T>
INLINE void nearest_code_fwd_as(int64_t rows, int64_t codes, int64_t width, const T* z, const T* codebook, int64_t* index,
                                float* distance, int64_t* counts, float* sums, int64_t threads) {
  const PackedCodes book(codes, width, codebook, worthwhile(threads, codes * width));
  const int64_t strips = ceil_div(rows, STRIP);
  const int64_t height = max(1, min(strips / 16, ROWS / (STRIP * (width + 1))));  // of a tile, in strips
  const int64_t panel = max(1, PANEL / book.size);
  parallel_uneven(ceil_div(strips, height), worthwhile(threads, rows * (codes * width / 64 + 1)), [&](int64_t task) {
    const int64_t first = task * height * STRIP, count = min(height * STRIP, rows - first);
    const T* own = z + first * width;
    RowTile tile(height, width);
    tile.read(count, book, own);
    for (int64_t begin = 0; begin < book.blocks; begin += panel) {
      const int64_t end = min(book.blocks, begin + panel);
      for (int64_t strip = 0; strip * STRIP < count; ++strip) {
        const int64_t vectors = ceil_div(min(STRIP, count - strip * STRIP), LANES);
        if (vectors == VECTORS) tile.template pass<VECTORS>(strip, book, begin, end);
        else if (vectors == 1) tile.template pass<1>(strip, book, begin, end);
        else if (vectors == 2) tile.template pass<2>(strip, book, begin, end);
        else tile.template pass<3>(strip, book, begin, end);
      }
    }
    int32_t open[LANES];
    int64_t waiting = 0;
    for (int64_t row = 0; row < count; ++row) {
      if (tile.open(row)) open[waiting++] = (int32_t)row;
      if (waiting == LANES || (waiting && row == count - 1)) {
        tile.settle(open, waiting, book, own, codebook);
        waiting = 0;
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      index[first + row] = tile.index[row];
      distance[first + row] = (float)exact_distance(width, own + row * width, codebook + tile.index[row] * width);
    }
  });
  if (!counts) return;
  const RowsOfCodes members(rows, codes, index, distance);
  for (int64_t k = 0; k < codes; ++k) counts[k] = members.begin[k + 1] - members.begin[k];
  members.sum(width, sums, worthwhile(threads, rows * width),
              [&](int64_t row, int64_t, int64_t i) { return (double)widen(z[row * width + i]); });
}

// grad_z or grad_codebook may be null: not wanted.
template <class T>
INLINE void nearest_code_bwd_as(int64_t rows, int64_t codes, int64_t width, const T* z, const T* codebook,
                                const int64_t* index, const float* grad_distance, T* grad_z, T* grad_codebook,
                                int64_t threads) {
  if (grad_z)
    parallel_for(ceil_div(rows, GROUP), worthwhile(threads, rows * width), [&](int64_t task) {
      for (int64_t row = task * GROUP; row < min(rows, (task + 1) * GROUP); ++row) {
        const vf factor = splat(2.0f * grad_distance[row]);
        const T *from = z + row * width, *code = codebook + index[row] * width;
        for_blocks(width, [&](int64_t i, int64_t n) {
          block_store(grad_z + row * width + i, factor * (block_load(from + i, n) - block_load(code + i, n)), n);
        });
      }
    });
  if (!grad_codebook) return;
  const RowsOfCodes members(rows, codes, index, nullptr);
  members.sum(width, grad_codebook, worthwhile(threads, rows * width), [&](int64_t row, int64_t k, int64_t i) {
    return 2.0 * grad_distance[row] * ((double)widen(codebook[k * width + i]) - (double)widen(z[row * width + i]));
  });
}

// counts and sums may be null: no statistics are wanted.
inline void nearest_code_fwd(int64_t dtype, int64_t rows, int64_t codes, int64_t width, const void* z, const void* codebook,
                             int64_t* index, float* distance, int64_t* counts, float* sums, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    nearest_code_fwd_as<T>(rows, codes, width, (const T*)z, (const T*)codebook, index, distance, counts, sums, threads);
  };
  with_dtype(dtype, run);
}

inline void nearest_code_bwd(int64_t dtype, int64_t rows, int64_t codes, int64_t width, const void* z, const void* codebook,
                             const int64_t* index, const float* grad_distance, void* grad_z, void* grad_codebook,
                             int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    nearest_code_bwd_as<T>(rows, codes, width, (const T*)z, (const T*)codebook, index, grad_distance, (T*)grad_z,
                           (T*)grad_codebook, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(nearest_code, KERNEL(nearest_code_fwd), KERNEL(nearest_code_bwd))

FASTGEN_END
