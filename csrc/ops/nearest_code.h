// nearest_code: for each row of z [rows, width] the nearest of the rows of a codebook [codes, width].
// fastgen/ops/nearest_code.py has the mathematics.
//
// Scores z.c - |c|^2 / 2, both centred at the mean code, are a matrix product in float32 register blocks: lanes are rows, so that
// the running maximum needs no exchange of lanes. A block updates it only where some lane comes within rounding of its maximum
// so far. Rows that another code came that close to go through the scores once more, and whatever comes that close again is
// measured in float64: the index is that of the smallest distance, not of the largest rounded score.
//
// Where the machine multiplies bytes four times as fast (AVX-512 VNNI), the scores are first taken of rows and codes rounded to
// 8 bits. |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'| says how far they can be off: what comes that close to the best is
// measured in float64, usually two or three codes. Where more than MOST of them do, the float32 scores take over.
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

INLINE int64_t worthwhile(int64_t threads, int64_t work) { return work < 4 * SERIAL ? 1 : threads; }

// |z - c|^2 in float64, by the same operations in the same order on every instruction set
template <class T>
INLINE double exact_distance(int64_t width, const T* z, const T* c) {
  constexpr int N = 8;
  double sums[N] = {};
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {  // what the loop below says
    __m512d total = _mm512_setzero_pd();
    for (; i + N <= width; i += N) {
      const __m512d a = _mm512_maskz_cvtps_pd((__mmask8)-1, _mm256_loadu_ps(z + i));
      const __m512d difference = _mm512_sub_pd(a, _mm512_maskz_cvtps_pd((__mmask8)-1, _mm256_loadu_ps(c + i)));
      total = _mm512_add_pd(total, _mm512_mul_pd(difference, difference));
    }
    _mm512_storeu_pd(sums, total);
  }
#endif
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

#if defined(__AVX512F__)
constexpr int64_t MOST = 32;     // codes of a row that are left to be measured
constexpr int64_t SCORED = 256;  // codes whose scores are kept at a time
constexpr int64_t NARROWEST = 32, WIDEST = 256, FEWEST = 64;  // vectors and codebooks for which bytes are faster

INLINE bool multiplies_bytes() { return __builtin_cpu_supports("avx512vnni"); }

// The centred codes in 8 bits, with a scale each: [block][group of four elements][CODES][4].
struct ByteCodes {
  int64_t groups, size;
  int8_t* bytes;
  int32_t* offset;  // of the sum of products: bytes of rows stand 128 too high
  float* scale;
  double error;  // the largest |c - scale * bytes|

  ByteCodes(const PackedCodes& book, int64_t threads) : groups(ceil_div(book.width, 4)), size(groups * CODES * 4) {
    bytes = new int8_t[book.blocks * size]();
    offset = new int32_t[book.blocks * CODES];
    scale = new float[book.blocks * CODES];
    double* errors = new double[book.blocks];
    parallel_for(ceil_div(book.blocks, GROUP), worthwhile(threads, book.codes * book.width), [&](int64_t task) {
      for (int64_t b = task * GROUP; b < min(book.blocks, (task + 1) * GROUP); ++b) errors[b] = round_block(book, b);
    });
    double largest = 0;
    for (int64_t b = 0; b < book.blocks; ++b) largest = errors[b] > largest ? errors[b] : largest;
    error = __builtin_sqrt(largest);
    delete[] errors;
  }
  ByteCodes(const ByteCodes&) = delete;
  ~ByteCodes() {
    delete[] bytes;
    delete[] offset;
    delete[] scale;
  }

  // Returns the largest |c - scale * bytes|^2 of a block.
  double round_block(const PackedCodes& book, int64_t block) {
    const float* lines = book.packed + block * book.size + CODES;
    float top[CODES] = {}, inverse[CODES], step[CODES];
    double squares[CODES] = {};
    int32_t sums[CODES] = {};
    for (int64_t i = 0; i < book.width; ++i)
      for (int r = 0; r < CODES; ++r) {
        const float size_ = __builtin_fabsf(lines[i * CODES + r]);
        top[r] = size_ > top[r] ? size_ : top[r];
      }
    for (int r = 0; r < CODES; ++r) {
      const bool fits = top[r] > 1e-30f;
      inverse[r] = fits ? 127.0f / top[r] : 0.0f, step[r] = fits ? top[r] / 127.0f : 0.0f;
    }
    for (int64_t i = 0; i < book.width; ++i) {
      int8_t* to = bytes + block * size + i / 4 * CODES * 4 + i % 4;
      for (int r = 0; r < CODES; ++r) {
        const float c = lines[i * CODES + r], rounded = __builtin_nearbyintf(c * inverse[r]);
        const double rest = (double)c - (double)step[r] * (double)rounded;
        squares[r] += rest * rest;
        sums[r] += (int32_t)rounded;
        to[r * 4] = (int8_t)(int32_t)rounded;
      }
    }
    double largest = 0;
    for (int r = 0; r < CODES; ++r) {
      offset[block * CODES + r] = -128 * sums[r], scale[block * CODES + r] = step[r];
      largest = squares[r] > largest ? squares[r] : largest;
    }
    return largest;
  }
};

// A strip of rows in 8 bits, and the codes that may be nearest to them.
struct ByteStrip {
  const PackedCodes& book;
  const ByteCodes& codes;
  uint8_t *memory, *bytes;  // [group][STRIP][4]
  float *scores, *line;     // scores: [SCORED][STRIP]
  alignas(64) float scale[STRIP], margin[STRIP], best[STRIP];
  int32_t found[STRIP], code[STRIP][MOST];
  float score[STRIP][MOST];

  ByteStrip(const PackedCodes& book_, const ByteCodes& codes_) : book(book_), codes(codes_) {
    const int64_t room = codes.groups * 4 + LANES;
    memory = new uint8_t[codes.groups * STRIP * 4 + (SCORED * STRIP + room) * sizeof(float) + 64];
    bytes = (uint8_t*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    scores = (float*)(bytes + codes.groups * STRIP * 4);
    line = scores + SCORED * STRIP;
  }
  ByteStrip(const ByteStrip&) = delete;
  ~ByteStrip() { delete[] memory; }

  // False where a row is not finite, or too large for a bound on its scores.
  template <class T>
  INLINE bool read(int64_t count, const T* z) {
    for (int64_t row = 0; row < STRIP; ++row) {
      found[row] = 0, best[row] = -INFINITE;
      if (row >= count) {  // its limit is infinite
        scale[row] = 0, margin[row] = -INFINITE;
        continue;
      }
      __m512 top = _mm512_setzero_ps();
      vf square{}, rest{}, length{};
      for_blocks(book.width, [&](int64_t i, int64_t n) {
        const vf x = block_load(z + row * book.width + i, n) - block_load(book.centre + i, n);
        square = fma(x, x, square);
        top = _mm512_maskz_max_ps((__mmask16)-1, top, _mm512_abs_ps((__m512)x));
        store(line + i, x);
      });
      const float largest = _mm512_reduce_max_ps(top);
      const bool fits = largest > 1e-30f;
      const vf inverse = splat(fits ? 127.0f / largest : 0.0f), step = splat(fits ? largest / 127.0f : 0.0f);
      for (int64_t i = 0; i < book.width; i += LANES) {
        const vf x = load<vf>(line + i);
        const vi whole = (vi)_mm512_maskz_cvtps_epi32((__mmask16)-1, (__m512)(x * inverse));
        const vf rounded = to_float(whole) * step;
        rest = fma(x - rounded, x - rounded, rest);
        length = fma(rounded, rounded, length);
        uint8_t words[LANES];
        _mm_storeu_si128((__m128i*)words, _mm512_maskz_cvtepi32_epi8((__mmask16)-1, (__m512i)(whole + 128)));
        for (int64_t g = 0; g < min(LANES / 4, codes.groups - i / 4); ++g)
          memcpy(bytes + ((i / 4 + g) * STRIP + row) * 4, words + g * 4, 4);
      }
      scale[row] = step[0];
      // the bounds of two scores, widened by more than these sums are rounded; and the rounding of the scores themselves
      const auto root = [](vf squares) { return __builtin_sqrt((double)_mm512_reduce_add_ps((__m512)squares)); };
      const double bound = root(rest) * book.radius + root(length) * codes.error;
      margin[row] = (float)(2.002 * bound) + 2 * book.uncertainty(root(square));
      if (!(margin[row] < INFINITE)) return false;
    }
    return true;
  }

  // total[r][v] += products of the bytes of code r of a block and of the rows of vector v. The instruction stands here alone:
  // the rest of the unit must run without it.
  INLINE void multiply(const uint8_t* z, const int8_t* code_, vi (&total)[CODES][VECTORS]) const {
    for (int64_t g = 0; g < codes.groups; ++g, z += STRIP * 4, code_ += CODES * 4) {
      vi x[VECTORS];
      for (int v = 0; v < VECTORS; ++v) x[v] = load<vi>(z + v * LANES * 4);
#pragma GCC unroll 8
      for (int r = 0; r < CODES; ++r) {
        const vi c = splat_i(load<int32_t>(code_ + r * 4));
        for (int v = 0; v < VECTORS; ++v) {
          vi sum = total[r][v];  // an element of the array itself would be kept in memory
          asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x[v]), "v"(c));
          total[r][v] = sum;
        }
      }
    }
  }

  // The scores of blocks [begin, end), and the best so far.
  INLINE void score_blocks(int64_t begin, int64_t end) {
    float* to = scores;
    for (int64_t block = begin; block < end; ++block) {
      vi total[CODES][VECTORS];
#pragma GCC unroll 8
      for (int r = 0; r < CODES; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) total[r][v] = splat_i(codes.offset[block * CODES + r]);
      multiply(bytes, codes.bytes + block * codes.size, total);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) {
        const vf step = load<vf>(scale + v * LANES);
        vf s[CODES];
#pragma GCC unroll 8
        for (int r = 0; r < CODES; ++r) {
          const vf by = splat(codes.scale[block * CODES + r]) * step;
          s[r] = fma(to_float(total[r][v]), by, splat(book.packed[block * book.size + r]));
          store(to + r * STRIP + v * LANES, s[r]);
        }
#pragma GCC unroll 8
        for (int half = CODES / 2; half; half /= 2)
          for (int r = 0; r < half; ++r) s[r] = larger(s[r], s[r + half]);
        store(best + v * LANES, larger(s[0], load<vf>(best + v * LANES)));
      }
      to += CODES * STRIP;
    }
  }

  // Drops codes of a row that are no longer close to the best.
  INLINE void forget(int64_t row) {
    int32_t kept = 0;
    for (int32_t i = 0; i < found[row]; ++i)
      if (score[row][i] >= best[row] - margin[row]) code[row][kept] = code[row][i], score[row][kept++] = score[row][i];
    found[row] = kept;
  }

  // Nearest codes of up to STRIP rows and their distances; false where bytes cannot tell enough of them apart.
  template <class T>
  INLINE bool settle(int64_t count, const T* z, const T* codebook, int64_t* index, float* distance) {
    if (!read(count, z)) return false;
    for (int64_t begin = 0; begin < book.blocks; begin += SCORED / CODES) {
      const int64_t end = min(book.blocks, begin + SCORED / CODES);
      score_blocks(begin, end);
      __m512 limit[VECTORS];
      for (int v = 0; v < VECTORS; ++v)
        limit[v] = _mm512_sub_ps(_mm512_load_ps(best + v * LANES), _mm512_load_ps(margin + v * LANES));
      const float* from = scores;
      for (int64_t k = begin * CODES; k < min(end * CODES, book.codes); ++k, from += STRIP) {
        uint64_t close = 0;
        for (int v = 0; v < VECTORS; ++v)
          close |= (uint64_t)_mm512_cmp_ps_mask(_mm512_load_ps(from + v * LANES), limit[v], _CMP_GE_OQ) << (v * LANES);
        for (; close; close &= close - 1) {
          const int64_t row = __builtin_ctzll(close);
          if (found[row] == MOST) forget(row);
          if (found[row] == MOST) return false;
          code[row][found[row]] = (int32_t)k, score[row][found[row]++] = from[row];
        }
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      if (!(best[row] > -INFINITE)) return false;
      forget(row);
      double least = (double)INFINITE;
      int64_t which = -1;
      for (int32_t i = 0; i < found[row]; ++i) {
        const double d = exact_distance(book.width, z + row * book.width, codebook + code[row][i] * book.width);
        if (d < least) least = d, which = code[row][i];
      }
      if (which < 0) return false;
      index[row] = which, distance[row] = (float)least;
    }
    return true;
  }
};
#endif

template <class T>
INLINE void nearest_code_fwd_as(int64_t rows, int64_t codes, int64_t width, const T* z, const T* codebook, int64_t* index,
                                float* distance, int64_t* counts, float* sums, int64_t threads) {
  const PackedCodes book(codes, width, codebook, worthwhile(threads, codes * width));
#if defined(__AVX512F__)
  const bool fine = multiplies_bytes() && width >= NARROWEST && width <= WIDEST && codes >= FEWEST && rows >= STRIP;
  const ByteCodes* bytes = fine ? new ByteCodes(book, threads) : nullptr;
  int64_t failures = 0, successes = 0;
#endif
  const int64_t strips = ceil_div(rows, STRIP);
  const int64_t height = max(1, min(strips / 16, ROWS / (STRIP * (width + 1))));  // of a tile, in strips
  const int64_t panel = max(1, PANEL / book.size);
  parallel_uneven(ceil_div(strips, height), worthwhile(threads, rows * (codes * width / 64 + 1)), [&](int64_t task) {
    int64_t first = task * height * STRIP, count = min(height * STRIP, rows - first);
#if defined(__AVX512F__)
    // the result is the same either way: bytes are given up where they have failed more often than not
    if (bytes && __atomic_load_n(&failures, __ATOMIC_RELAXED) <= 1 + __atomic_load_n(&successes, __ATOMIC_RELAXED)) {
      ByteStrip strip(book, *bytes);
      while (count > 0 && strip.settle(min(STRIP, count), z + first * width, codebook, index + first, distance + first))
        first += STRIP, count -= STRIP;
      __atomic_fetch_add(count > 0 ? &failures : &successes, 1, __ATOMIC_RELAXED);
      if (count <= 0) return;
    }
#endif
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
#if defined(__AVX512F__)
  delete bytes;
#endif
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
