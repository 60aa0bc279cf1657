// Philox4x32-10 and the normals made from its bits. fastgen/ops/_philox.py is the definition; this file must give the same
// float32 bits in exact mode (no fused multiply-add, correctly rounded square root), and does under test.
#pragma once
#include "parallel.h"

FASTGEN_BEGIN

struct Words {
  vu w[4];
};

// The ten round keys of a seed, each in a 64-bit word: read as a broadcast operand, they cost no instruction.
struct Schedule {
  uint64_t k0[10], k1[10];
  INLINE Schedule(uint32_t low, uint32_t high) {
    for (int round = 0; round < 10; ++round) {
      k0[round] = low + (uint32_t)round * 0x9E3779B9u;
      k1[round] = high + (uint32_t)round * 0xBB67AE85u;
    }
  }
};

#if defined(__AVX2__)
struct HalfCounters {  // every other counter of a vector, a word in each 64-bit lane
  vd c0, c1, c2, c3;
};
INLINE void philox_round(HalfCounters& c, uint64_t k0, uint64_t k1) {
  const vd a = multiply_low(c.c0, 0xD2511F53u), b = multiply_low(c.c2, 0xCD9E8D57u);
  c.c0 = (b >> 32) ^ c.c1 ^ k0;
  c.c1 = b;
  c.c2 = (a >> 32) ^ c.c3 ^ k1;
  c.c3 = a;
}
INLINE Words philox(vu c0, vu c1, vu c2, vu c3, const Schedule& key) {
  HalfCounters even{low_words(c0), low_words(c1), low_words(c2), low_words(c3)};
  HalfCounters odd{high_words(c0), high_words(c1), high_words(c2), high_words(c3)};
  for (int round = 0; round < 10; ++round) {
    philox_round(even, key.k0[round], key.k1[round]);
    philox_round(odd, key.k0[round], key.k1[round]);
  }
  return {{join_words(even.c0, odd.c0), join_words(even.c1, odd.c1), join_words(even.c2, odd.c2), join_words(even.c3, odd.c3)}};
}
#else
INLINE Words philox(vu c0, vu c1, vu c2, vu c3, const Schedule& key) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ (uint32_t)key.k0[round];
    c1 = low1;
    c2 = high0 ^ c3 ^ (uint32_t)key.k1[round];
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}
#endif

struct Exact {
  static constexpr bool exact = true;
};
struct Fast {
  static constexpr bool exact = false;
};

constexpr float LOG[] = {-0.1744471937417984f, 0.28733691573143005f, -0.2990453243255615f, 0.33124786615371704f,
                         -0.39913666248321533f, 0.5000414848327637f, -0.6666837334632874f, 0.9999997615814209f, -2.0f};
constexpr float SIN[] = {-3.59504520019982e-05f, 0.00249000103212893f, -0.08074543625116348f, 0.7853981852531433f};
constexpr float COS[] = {3.52876168108196e-06f, -0.0003259365039411932f, 0.015854323282837868f, -0.3084251284599304f, 1.0f};

// Horner's rule on P arguments in step: one chain alone would wait for its own latencies.
template <bool E, int P, int N>
INLINE void horner(const float (&terms)[N], const vf (&x)[P], vf (&out)[P]) {
  for (int i = 0; i < P; ++i) out[i] = splat(terms[0]);
#pragma GCC unroll 16
  for (int n = 1; n < N; ++n)
    for (int i = 0; i < P; ++i) out[i] = multiply_add<E>(out[i], x[i], splat(terms[n]));
}

// Box-Muller on P pairs of words, in step.
template <class Math, int P>
INLINE void box_muller(const vu (&a)[P], const vu (&b)[P], vf (&x)[P], vf (&y)[P]) {
  constexpr bool E = Math::exact;
  vf f[P], exponent[P], poly[P], radius[P], t[P], square[P], sine[P], cosine[P];
  for (int i = 0; i < P; ++i) {
    const vu word = bits<vu>(to_float(a[i]) + 0.5f) + (0x3F800000u - 0x3F3504F3u);
    exponent[i] = to_float(bits<vi>(word >> 23) - (127 + 32));
    f[i] = bits<vf>((word & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
    t[i] = to_float(bits<vi>(b[i] << 2 | 2u)) * 4.656612873077393e-10f;
    square[i] = t[i] * t[i];
  }
  horner<E>(LOG, f, poly);
  for (int i = 0; i < P; ++i) {
    const vf minus_2_log = multiply_add<E>(f[i], poly[i], exponent[i] * -1.3862943649291992f);
    radius[i] = E ? sqrt(minus_2_log) : sqrt_fast(minus_2_log);
  }
  horner<E>(SIN, square, sine);
  horner<E>(COS, square, cosine);
  for (int i = 0; i < P; ++i) {
    sine[i] = sine[i] * t[i];
    const vu turned = b[i] + 0x20000000u;  // bits 31 and 30: the quadrant
    const auto swap = (turned & 0x40000000u) != 0u;
    const vu xs = bits<vu>(swap ? sine[i] : cosine[i]) ^ ((turned + 0x40000000u) & 0x80000000u);
    const vu ys = bits<vu>(swap ? cosine[i] : sine[i]) ^ (turned & 0x80000000u);
    x[i] = radius[i] * bits<vf>(xs);
    y[i] = radius[i] * bits<vf>(ys);
  }
}

// What to make of the words of a quartet.
struct Normal {
  template <class Math>
  static INLINE void draw(const Words& words, bool both_pairs, vf* out) {
    if (both_pairs) {
      vf x[2], y[2];
      box_muller<Math, 2>({words.w[0], words.w[2]}, {words.w[1], words.w[3]}, x, y);
      out[0] = x[0], out[1] = y[0], out[2] = x[1], out[3] = y[1];
    } else {
      vf x[1], y[1];
      box_muller<Math, 1>({words.w[0]}, {words.w[1]}, x, y);
      out[0] = x[0], out[1] = y[0], out[2] = out[3] = vf{};
    }
  }
};

struct Uniform {
  template <class Math>
  static INLINE void draw(const Words& words, bool, vf* out) {
    for (int i = 0; i < 4; ++i) out[i] = (to_float(bits<vi>(words.w[i] >> 9)) + 0.5f) * 1.1920928955078125e-07f;
  }
};

// The rows of a key tensor: one row of four words for all samples, or one per sample.
struct Keys {
  const int64_t* words;
  int64_t count;  // 1: sample i is drawn at words[3] + i

  struct Row {
    uint32_t seed_low, seed_high, c1, c2, c3;
  };
  INLINE Row row(int64_t sample) const {
    const bool shared = count == 1;
    const int64_t* w = words + (shared ? 0 : 4 * sample);
    const uint64_t index = (uint64_t)w[3] + (shared ? (uint64_t)sample : 0);
    return {(uint32_t)w[0], (uint32_t)((uint64_t)w[0] >> 32), (uint32_t)index, (uint32_t)w[2],
            (uint32_t)w[1] | (uint32_t)(index >> 32) << 8};
  }
};

// Elements [begin, begin + count) of one sample; begin is a multiple of 4. Writes up to 4 * LANES - 1 floats beyond count.
template <class Kind, class Math>
INLINE void draw_row(const Keys& keys, int64_t sample, int64_t begin, int64_t count, float* out) {
  const Keys::Row row = keys.row(sample);
  const Schedule schedule(row.seed_low, row.seed_high);
  const vu c1 = splat_u(row.c1), c2 = splat_u(row.c2), c3 = splat_u(row.c3);
  vu c0 = quartet_of_lane() + (uint32_t)(begin / 4);
  for (int64_t i = 0; i < count; i += 4 * LANES) {
    vf z[4];
    Kind::template draw<Math>(philox(c0, c1, c2, c3, schedule), true, z);
    transpose4(z[0], z[1], z[2], z[3]);
    for (int k = 0; k < 4; ++k) store(out + i + k * LANES, z[k]);
    c0 = c0 + (uint32_t)LANES;
  }
}

// Whole short rows back to back: lanes run over (sample, quartet), so that no lane idles when a row has few elements.
template <class Kind, class Math>
INLINE void draw_short_rows(const Keys& keys, int64_t first, int64_t rows, int64_t event, float* out) {
  const int64_t quartets = ceil_div(event, 4), total = rows * quartets;
  // Where one key serves all and rows fill vectors evenly, counters are the same from vector to vector but for c1.
  const bool even = keys.count == 1 && LANES % quartets == 0;
  uint32_t order[LANES], quartet_of[LANES], row_of[LANES];
  store(order, quartet_of_lane());
  for (int lane = 0; lane < LANES; ++lane) {
    quartet_of[lane] = (uint32_t)(order[lane] % quartets);
    row_of[lane] = (uint32_t)(order[lane] / quartets);
  }
  for (int64_t at = 0; at < total;) {
    const int64_t row = at / quartets, quartet = at % quartets;
    const Keys::Row lead = keys.row(first + row);
    int64_t used = min(LANES, total - at);
    vu c0, c1, c2, c3;
    if (even && used == LANES && lead.c1 <= 0xFFFFFFFFu - LANES) {
      c0 = load<vu>(quartet_of), c1 = load<vu>(row_of) + lead.c1, c2 = splat_u(lead.c2), c3 = splat_u(lead.c3);
    } else {
      uint32_t slots[4][LANES] = {}, lanes[4][LANES];
      int64_t r = row, q = quartet;
      for (int64_t s = 0; s < used; ++s) {
        const Keys::Row current = keys.row(first + r);
        if (current.seed_low != lead.seed_low || current.seed_high != lead.seed_high) {
          used = s;  // a vector has one seed
          break;
        }
        slots[0][s] = (uint32_t)q, slots[1][s] = current.c1, slots[2][s] = current.c2, slots[3][s] = current.c3;
        if (++q == quartets) q = 0, ++r;
      }
      for (int word = 0; word < 4; ++word)
        for (int lane = 0; lane < LANES; ++lane) lanes[word][lane] = slots[word][order[lane]];
      c0 = load<vu>(lanes[0]), c1 = load<vu>(lanes[1]), c2 = load<vu>(lanes[2]), c3 = load<vu>(lanes[3]);
    }
    vf z[4];
    Kind::template draw<Math>(philox(c0, c1, c2, c3, Schedule(lead.seed_low, lead.seed_high)), event > 2, z);
    transpose4(z[0], z[1], z[2], z[3]);
    if (event % 4 == 0 && used == LANES) {  // quartets stand back to back in the output too
      for (int k = 0; k < 4; ++k) store(out + 4 * at + k * LANES, z[k]);
    } else {
      float values[4 * LANES];
      for (int k = 0; k < 4; ++k) store(values + k * LANES, z[k]);
      int64_t r = row, q = quartet;
      for (int64_t s = 0; s < used; ++s) {
        const int64_t n = min(4, event - 4 * q);
        for (int64_t i = 0; i < n; ++i) out[r * event + 4 * q + i] = values[4 * s + i];
        if (++q == quartets) q = 0, ++r;
      }
    }
    at += used;
  }
}

// Room for the noise of one tile, with what draw_row writes beyond the end.
struct alignas(64) TileNoise {
  float values[TILE + 4 * LANES];
};

// The noise of one tile, rows back to back.
template <class Kind, class Math>
inline void draw_tile(const Keys& keys, const Tile& tile, float* out) {
  if (tile.count == 0) return;  // there may be no key at all: an empty tensor has no address
  if (tile.count % (4 * LANES) == 0 || tile.rows == 1) {
    for (int64_t r = 0; r < tile.rows; ++r)
      draw_row<Kind, Math>(keys, tile.row + r, tile.begin, tile.count, out + r * tile.count);
  } else {
    draw_short_rows<Kind, Math>(keys, tile.row, tile.rows, tile.count, out);
  }
}
template <class Kind>
inline void draw_tile(const Keys& keys, const Tile& tile, bool fast, float* out) {
  if (fast) draw_tile<Kind, Fast>(keys, tile, out);
  else draw_tile<Kind, Exact>(keys, tile, out);
}

FASTGEN_END
