// Philox4x32-10 and the normals made from its bits. fastgen/ops/_philox.py is the definition; this file must give the same
// float32 bits in exact mode (no fused multiply-add, correctly rounded square root), and does under test.
#pragma once
#include "parallel.h"

FASTGEN_BEGIN

struct Words {
  vu w[4];
};

INLINE Words philox(vu c0, vu c1, vu c2, vu c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    mul_wide(c0, 0xD2511F53u, high0, low0);
    mul_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct Exact {
  static constexpr bool exact = true;
};
struct Fast {
  static constexpr bool exact = false;
};

// Box-Muller: two vectors of normals from two of words.
template <class Math>
INLINE void box_muller(vu a, vu b, vf& x, vf& y) {
  constexpr bool E = Math::exact;
  const auto horner = [](vf p, vf v, float c) __attribute__((always_inline)) { return multiply_add<E>(p, v, splat(c)); };

  const vf shifted = to_float(a) + 0.5f;
  const vu word = bits<vu>(shifted) + (0x3F800000u - 0x3F3504F3u);
  const vf exponent = to_float(bits<vi>(word >> 23) - (127 + 32));
  const vf f = bits<vf>((word & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
  vf p = splat(-0.1744471937417984f);
  p = horner(p, f, 0.28733691573143005f);
  p = horner(p, f, -0.2990453243255615f);
  p = horner(p, f, 0.33124786615371704f);
  p = horner(p, f, -0.39913666248321533f);
  p = horner(p, f, 0.5000414848327637f);
  p = horner(p, f, -0.6666837334632874f);
  p = horner(p, f, 0.9999997615814209f);
  p = horner(p, f, -2.0f);
  const vf minus_2_log = multiply_add<E>(f, p, exponent * -1.3862943649291992f);
  const vf radius = sqrt(minus_2_log);

  const vf t = to_float(bits<vi>(b << 2 | 2u)) * 4.656612873077393e-10f;
  const vf square = t * t;
  vf sine = splat(-3.59504520019982e-05f);
  sine = horner(sine, square, 0.00249000103212893f);
  sine = horner(sine, square, -0.08074543625116348f);
  sine = horner(sine, square, 0.7853981852531433f);
  sine = sine * t;
  vf cosine = splat(3.52876168108196e-06f);
  cosine = horner(cosine, square, -0.0003259365039411932f);
  cosine = horner(cosine, square, 0.015854323282837868f);
  cosine = horner(cosine, square, -0.3084251284599304f);
  cosine = horner(cosine, square, 1.0f);

  const vu turned = b + 0x20000000u;  // bits 31 and 30: the quadrant
  const auto swap = (turned & 0x40000000u) != 0u;
  const vu xs = bits<vu>(swap ? sine : cosine) ^ ((turned + 0x40000000u) & 0x80000000u);
  const vu ys = bits<vu>(swap ? cosine : sine) ^ (turned & 0x80000000u);
  x = radius * bits<vf>(xs);
  y = radius * bits<vf>(ys);
}

struct Normal {  // what to make of a quartet of words: four normals
  template <class Math>
  static INLINE void draw(const Words& words, bool both_pairs, vf* out) {
    box_muller<Math>(words.w[0], words.w[1], out[0], out[1]);
    if (both_pairs) box_muller<Math>(words.w[2], words.w[3], out[2], out[3]);
    else out[2] = out[3] = vf{};
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
  const vu c1 = splat_u(row.c1), c2 = splat_u(row.c2), c3 = splat_u(row.c3);
  vu c0 = quartet_of_lane() + (uint32_t)(begin / 4);
  for (int64_t i = 0; i < count; i += 4 * LANES) {
    vf z[4];
    Kind::template draw<Math>(philox(c0, c1, c2, c3, row.seed_low, row.seed_high), true, z);
    transpose4(z[0], z[1], z[2], z[3]);
    for (int k = 0; k < 4; ++k) store(out + i + k * LANES, z[k]);
    c0 = c0 + (uint32_t)LANES;
  }
}

// Whole short rows back to back: lanes run over (sample, quartet), so that no lane idles when a row has few elements.
// Samples that share a vector must share a seed, or they go one by one.
template <class Kind, class Math>
INLINE void draw_short_rows(const Keys& keys, int64_t first, int64_t rows, int64_t event, float* out) {
  const int64_t quartets = ceil_div(event, 4), total = rows * quartets;
  uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
  float z[4 * LANES];
  uint32_t order[LANES];
  store(order, quartet_of_lane());
  int64_t row = 0, quartet = 0;
  for (int64_t at = 0; at < total;) {
    const Keys::Row lead = keys.row(first + row);
    const int64_t row_before = row, quartet_before = quartet;
    uint32_t slot0[LANES], slot1[LANES], slot2[LANES], slot3[LANES];
    int64_t used = 0;
    Keys::Row current = lead;
    while (used < min(LANES, total - at)) {
      if (current.seed_low != lead.seed_low || current.seed_high != lead.seed_high) break;
      slot0[used] = (uint32_t)quartet, slot1[used] = current.c1, slot2[used] = current.c2, slot3[used] = current.c3;
      ++used;
      if (++quartet == quartets) {
        quartet = 0;
        if (++row < rows) current = keys.row(first + row);
      }
    }
    for (int64_t s = used; s < LANES; ++s) slot0[s] = slot1[s] = slot2[s] = slot3[s] = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      const uint32_t s = order[lane];
      c0[lane] = slot0[s], c1[lane] = slot1[s], c2[lane] = slot2[s], c3[lane] = slot3[s];
    }
    vf v[4];
    Kind::template draw<Math>(philox(load<vu>(c0), load<vu>(c1), load<vu>(c2), load<vu>(c3), lead.seed_low, lead.seed_high),
                              event > 2, v);
    transpose4(v[0], v[1], v[2], v[3]);
    for (int k = 0; k < 4; ++k) store(z + k * LANES, v[k]);
    int64_t r = row_before, q = quartet_before;
    for (int64_t s = 0; s < used; ++s) {
      const int64_t n = min(4, event - 4 * q);
      float* to = out + r * event + 4 * q;
      for (int64_t i = 0; i < n; ++i) to[i] = z[4 * s + i];
      if (++q == quartets) q = 0, ++r;
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
