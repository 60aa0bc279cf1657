// Philox4x32-10 and the normals made from its bits. fastgen/ops/_philox.py is the definition; this file must give the same
// float32 bits in exact mode (no fused multiply-add, correctly rounded square root), and does under test.
#pragma once
#include "parallel.h"

FASTGEN_BEGIN

// The ten round keys of a seed, each in a 64-bit word: read as a broadcast operand, they cost no instruction.
struct Schedule {
  uint64_t k0[10], k1[10], last;  // last: the tenth of both
  INLINE Schedule(uint32_t low, uint32_t high) {
    for (int round = 0; round < 10; ++round) {
      k0[round] = low + (uint32_t)round * 0x9E3779B9u;
      k1[round] = high + (uint32_t)round * 0xBB67AE85u;
    }
    last = k0[9] | k1[9] << 32;
  }
};

// The words of B blocks of LANES quartets, paired as Box-Muller takes them: both pairs of each quartet, in a[0 .. 2B) and
// b[0 .. 2B), where what stands in which lane is the business of `in_order`; or the first pair alone, in a[0 .. B) and
// b[0 .. B), in the order of the counters. The blocks go in step: one alone would wait for its own multiplications.
#if defined(__AVX2__)
struct HalfCounters {  // every other counter of a vector, a word in each 64-bit lane
  vd c0, c1, c2, c3;
};
template <int B, int PAIRS>
INLINE void philox(const vu (&c0)[B], const vu (&c1)[B], vu c2, vu c3, const Schedule& key, vu (&a)[PAIRS],
                   vu (&b)[PAIRS]) {
  HalfCounters half[2 * B];
  for (int i = 0; i < B; ++i) {
    half[2 * i] = {low_words(c0[i]), low_words(c1[i]), low_words(c2), low_words(c3)};
    half[2 * i + 1] = {high_words(c0[i]), high_words(c1[i]), high_words(c2), high_words(c3)};
  }
#pragma GCC unroll 16
  for (int round = 0; round < 9; ++round)
    for (HalfCounters& c : half) {
      const vd first = multiply_low(c.c0, 0xD2511F53u), second = multiply_low(c.c2, 0xCD9E8D57u);
      c = {(second >> 32) ^ c.c1 ^ key.k0[round], second, (first >> 32) ^ c.c3 ^ key.k1[round], first};
    }
  if constexpr (PAIRS == B) {
    for (int i = 0; i < B; ++i) {  // words 0 of neighbours side by side, and words 1
      const HalfCounters &even = half[2 * i], &odd = half[2 * i + 1];
      const vd first = multiply_low(even.c2, 0xCD9E8D57u), second = multiply_low(odd.c2, 0xCD9E8D57u);
      a[i] = join_high(first, second) ^ join_low(even.c1, odd.c1) ^ splat_u((uint32_t)key.k0[9]);
      b[i] = join_low(first, second);
    }
  } else {
    for (int i = 0; i < 2 * B; ++i) {  // words 0 and 2 of a counter side by side, and 1 and 3: no transposition is needed
      const HalfCounters& c = half[i];
      const vd first = multiply_low(c.c0, 0xD2511F53u), second = multiply_low(c.c2, 0xCD9E8D57u);
      a[i] = join_high(second, first) ^ join_low(c.c1, c.c3) ^ bits<vu>(vd{} + key.last);
      b[i] = join_low(second, first);
    }
  }
}
#else
template <int B, int PAIRS>
INLINE void philox(const vu (&c0)[B], const vu (&c1)[B], vu c2, vu c3, const Schedule& key, vu (&a)[PAIRS],
                   vu (&b)[PAIRS]) {
  for (int i = 0; i < B; ++i) {
    vu w[4] = {c0[i], c1[i], c2, c3};
    for (int round = 0; round < 10; ++round) {
      vu high0, low0, high1, low1;
      multiply_wide(w[0], 0xD2511F53u, high0, low0);
      multiply_wide(w[2], 0xCD9E8D57u, high1, low1);
      w[0] = high1 ^ w[1] ^ (uint32_t)key.k0[round];
      w[1] = low1;
      w[2] = high0 ^ w[3] ^ (uint32_t)key.k1[round];
      w[3] = low0;
    }
    constexpr int EACH = PAIRS / B;
    a[EACH * i] = w[0], b[EACH * i] = w[1];
    if constexpr (EACH == 2) a[2 * i + 1] = w[2], b[2 * i + 1] = w[3];
  }
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

// Step n of Horner's rule on P arguments: one chain alone would wait for its own latencies.
template <bool E, int P, int N>
INLINE void horner(const float (&terms)[N], int n, const vf (&x)[P], vf (&out)[P]) {
  for (int i = 0; i < P; ++i)
    if (n < N) out[i] = pinned(n ? multiply_add<E>(out[i], x[i], splat(terms[n])) : splat(terms[0]));
}

// Box-Muller on P pairs of words, in step.
template <class Math, int P>
INLINE void box_muller(const vu (&a)[P], const vu (&b)[P], vf (&x)[P], vf (&y)[P]) {
  constexpr bool E = Math::exact;
  vf f[P], exponent[P], poly[P], t[P], square[P], sine[P], cosine[P];
  for (int i = 0; i < P; ++i) {
    const vu word = bits<vu>(to_float(a[i]) + 0.5f) + (0x3F800000u - 0x3F3504F3u - (159u << 23));  // 159 = 127 + 32
    exponent[i] = to_float(bits<vi>(word) >> 23);
    f[i] = bits<vf>((word & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
    t[i] = to_float(bits<vi>(b[i] << 2 | 2u)) * 4.656612873077393e-10f;
    square[i] = t[i] * t[i];
  }
#pragma GCC unroll 16
  for (int n = 0; n < 9; ++n) {
    horner<E>(LOG, n, f, poly);  // the longest, which the square root waits for: the others fill the gaps in between
    if (n % 2 == 0) horner<E>(COS, n / 2, square, cosine);
    else horner<E>(SIN, n / 2, square, sine);
  }
  for (int i = 0; i < P; ++i) {
    const vf minus_2_log = multiply_add<E>(f[i], poly[i], exponent[i] * -1.3862943649291992f);
    sine[i] = sine[i] * t[i];
    const vu turned = b[i] + 0x20000000u;  // bits 31 and 30: the quadrant
    const vf radius = bits<vf>(bits<vu>(sqrt(minus_2_log)) ^ (turned & 0x80000000u));
    quarter_turn(turned, cosine[i], sine[i]);
    x[i] = radius * cosine[i];
    y[i] = radius * sine[i];
  }
}

// What to make of the words.
struct Normal {
  template <class Math, int P>
  static INLINE void draw(const vu (&a)[P], const vu (&b)[P], vf (&x)[P], vf (&y)[P]) {
    box_muller<Math>(a, b, x, y);
  }
};

struct Uniform {
  static INLINE vf of(vu word) { return (to_float(bits<vi>(word >> 9)) + 0.5f) * 1.1920928955078125e-07f; }
  template <class Math, int P>
  static INLINE void draw(const vu (&a)[P], const vu (&b)[P], vf (&x)[P], vf (&y)[P]) {
    for (int i = 0; i < P; ++i) x[i] = of(a[i]), y[i] = of(b[i]);
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

// Blocks of LANES quartets that are drawn in step: as many as there are registers for.
constexpr int STEP = LANES == 16 ? 2 : 1;
template <int N>
struct Count {
  static constexpr int value = N;
};
// body(i, Count<B>) for blocks [i, i + B), until all `blocks` are done: B is MOST as long as there are so many.
template <int MOST = STEP, class Body>
INLINE void in_steps(int64_t blocks, Body&& body) {
  int64_t i = 0;
  for (; MOST > 1 && i + MOST <= blocks; i += MOST) body(i, Count<MOST>{});
  for (; i < blocks; ++i) body(i, Count<1>{});
}

// The elements of B blocks of quartets, 4 * LANES a block.
template <class Kind, class Math, int B>
INLINE void draw_blocks(const vu (&c0)[B], const vu (&c1)[B], vu c2, vu c3, const Schedule& schedule, float* out) {
  vu a[2 * B], b[2 * B];
  vf x[2 * B], y[2 * B], z[4];
  philox(c0, c1, c2, c3, schedule, a, b);
  Kind::template draw<Math>(a, b, x, y);
  for (int i = 0; i < B; ++i) {
    in_order(x[2 * i], y[2 * i], x[2 * i + 1], y[2 * i + 1], z);
    for (int k = 0; k < 4; ++k) store(out + (4 * i + k) * LANES, z[k]);
  }
}

// The first one or two elements of the quartets of B blocks.
template <class Kind, class Math, int B>
INLINE void draw_pairs(const vu (&c0)[B], const vu (&c1)[B], vu c2, vu c3, const Schedule& schedule, int64_t event,
                       float* out) {
  constexpr int S = B < STEP ? B : STEP;  // as many as Philox has registers for; Box-Muller has them for all
  vu a[B], b[B];
  vf x[B], y[B];
#pragma GCC unroll 2
  for (int i = 0; i < B; i += S) {
    vu part0[S], part1[S], first[S], second[S];
    for (int k = 0; k < S; ++k) part0[k] = c0[i + k], part1[k] = c1[i + k];
    philox(part0, part1, c2, c3, schedule, first, second);
    for (int k = 0; k < S; ++k) a[i + k] = first[k], b[i + k] = second[k];
  }
  Kind::template draw<Math>(a, b, x, y);
  for (int i = 0; i < B; ++i) {
    vf low, high;
    interleave(x[i], y[i], low, high);
    store(out + event * LANES * i, event == 2 ? low : x[i]);
    if (event == 2) store(out + event * LANES * i + LANES, high);
  }
}

// What an op will read and write beside the noise of a tile: drawing takes no memory bandwidth, so that these lines are fetched
// meanwhile. An address is that of the tile's first element.
class Ahead {
  const char* first[4];
  int64_t size[4], count = 0;

 public:
  template <class T>
  INLINE Ahead& add(const T* p) {
    if (p) first[count] = (const char*)p, size[count++] = sizeof(T);
    return *this;
  }
  // the same from a later element on
  INLINE Ahead from(int64_t element) const {
    Ahead out = *this;
    for (int64_t i = 0; i < count; ++i) out.first[i] += element * size[i];
    return out;
  }
  // fetches `elements` from `begin` on, every other line: caches take them by twos. Addresses beyond the end do no harm
  INLINE void fetch(int64_t begin, int64_t elements) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t b = begin * size[i]; b < (begin + elements) * size[i]; b += 128) __builtin_prefetch(first[i] + b);
  }
};

// Elements [begin, begin + count) of one sample; begin is a multiple of 4. Writes up to 4 * LANES - 1 floats beyond count.
template <class Kind, class Math>
INLINE void draw_row(const Keys& keys, int64_t sample, int64_t begin, int64_t count, float* out, const Ahead& ahead = {}) {
  const Keys::Row row = keys.row(sample);
  const Schedule schedule(row.seed_low, row.seed_high);
  const vu c2 = splat_u(row.c2), c3 = splat_u(row.c3);
  const vu first = quartet_of_lane() + (uint32_t)(begin / 4);
  in_steps(ceil_div(count, 4 * LANES), [&](int64_t block, auto blocks) INLINED {
    ahead.fetch(4 * LANES * block, 4 * LANES * blocks.value);
    vu c0[blocks.value], c1[blocks.value];
    for (int i = 0; i < blocks.value; ++i) c0[i] = first + (uint32_t)(LANES * (block + i)), c1[i] = splat_u(row.c1);
    draw_blocks<Kind, Math>(c0, c1, c2, c3, schedule, out + 4 * LANES * block);
  });
}

// Whole short rows back to back: lanes run over (sample, quartet), so that few idle when a row has few elements. Writes up to
// 4 * LANES - 1 floats beyond the last.
template <class Kind, class Math>
INLINE void draw_short_rows(const Keys& keys, int64_t first, int64_t rows, int64_t event, float* out, const Ahead& ahead) {
  const bool pairs = event <= 2;  // all of a row in the first two words
  const int64_t quartets = ceil_div(event, 4), total = rows * quartets;
  const vu order = pairs ? natural_order() : quartet_of_lane();

  // the quartets [at, at + LANES * B), of which those from `total` on do not count
  const auto draw = [&](int64_t at, const auto& c0, const auto& c1, vu c2, vu c3, const Schedule& schedule,
                        auto blocks) INLINED {
    constexpr int B = decltype(blocks)::value;
    ahead.fetch(min(event, 4) * at, min(event, 4) * LANES * B);
    if (pairs) return draw_pairs<Kind, Math, B>(c0, c1, c2, c3, schedule, event, out + at * event);
    if (event % 4 == 0) return draw_blocks<Kind, Math, B>(c0, c1, c2, c3, schedule, out + 4 * at);
    float values[4 * LANES * B];
    draw_blocks<Kind, Math, B>(c0, c1, c2, c3, schedule, values);
    const int64_t end = min(total, at + LANES * B);
    int64_t row = at / quartets, quartet = at % quartets;
    for (int64_t s = at; s < end; ++s) {  // what stands beyond a row is overwritten by the next
      memcpy(out + row * event + 4 * quartet, values + 4 * (s - at), 4 * sizeof(float));
      if (++quartet == quartets) quartet = 0, ++row;
    }
  };

  const Keys::Row lead = keys.row(first);
  if (keys.count == 1 && lead.c1 <= 0xFFFFFFFFu - (uint32_t)rows) {  // counters are arithmetic
    const Schedule schedule(lead.seed_low, lead.seed_high);
    const vu c2 = splat_u(lead.c2), c3 = splat_u(lead.c3);
    if (pairs) {  // nothing of what follows, and a counter word that is 0: the first two rounds are nearly constant
      return in_steps<2 * STEP>(ceil_div(total, LANES), [&](int64_t block, auto blocks) INLINED {
        vu c0[blocks.value], c1[blocks.value];
        for (int i = 0; i < blocks.value; ++i) c0[i] = vu{}, c1[i] = order + (lead.c1 + (uint32_t)(LANES * (block + i)));
        draw(LANES * block, c0, c1, c2, c3, schedule, blocks);
      });
    }
    const float inverse = 1.0f / (float)quartets;
    return in_steps(ceil_div(total, LANES), [&](int64_t block, auto blocks) INLINED {
      vu c0[blocks.value], c1[blocks.value];
      for (int i = 0; i < blocks.value; ++i) {
        const vu slot = order + (uint32_t)(LANES * (block + i));
        const vu row = bits<vu>(to_int((to_float(bits<vi>(slot)) + 0.5f) * inverse));  // exact for slots of a tile
        c0[i] = slot - row * (uint32_t)quartets;
        c1[i] = row + lead.c1;
      }
      draw(LANES * block, c0, c1, c2, c3, schedule, blocks);
    });
  }
  uint32_t lane_of[LANES];
  store(lane_of, order);
  for (int64_t at = 0, used; at < total; at += used) {
    const Keys::Row front = keys.row(first + at / quartets);
    uint32_t slots[4][LANES] = {}, lanes[4][LANES];
    int64_t row = at / quartets, quartet = at % quartets;
    for (used = 0; used < min(LANES, total - at); ++used) {
      const Keys::Row current = keys.row(first + row);
      // a vector has one seed
      if (current.seed_low != front.seed_low || current.seed_high != front.seed_high) break;
      slots[0][used] = (uint32_t)quartet, slots[1][used] = current.c1, slots[2][used] = current.c2, slots[3][used] = current.c3;
      if (++quartet == quartets) quartet = 0, ++row;
    }
    for (int word = 0; word < 4; ++word)
      for (int lane = 0; lane < LANES; ++lane) lanes[word][lane] = slots[word][lane_of[lane]];
    const vu c0[1] = {load<vu>(lanes[0])}, c1[1] = {load<vu>(lanes[1])};
    draw(at, c0, c1, load<vu>(lanes[2]), load<vu>(lanes[3]), Schedule(front.seed_low, front.seed_high), Count<1>{});
  }
}

// Room for the noise of one tile, with what draw_row writes beyond the end.
struct alignas(64) TileNoise {
  float values[TILE + 4 * LANES];
};

// The noise of one tile, rows back to back.
template <class Kind, class Math>
inline void draw_tile(const Keys& keys, const Tile& tile, float* out, const Ahead& ahead) {
  if (tile.count == 0) return;  // there may be no key at all: an empty tensor has no address
  // where lanes need no arrangement by hand, they run over samples as long as the last block of a row matters
  const int64_t short_row = keys.count == 1 && tile.count % 4 == 0 ? 32 * LANES : 8 * LANES;
  if (tile.count % (4 * LANES) == 0 || tile.count > short_row || tile.rows == 1) {
    for (int64_t r = 0; r < tile.rows; ++r)  // what is written beyond a row is overwritten by the next
      draw_row<Kind, Math>(keys, tile.row + r, tile.begin, tile.count, out + r * tile.count, ahead.from(r * tile.count));
  } else {
    draw_short_rows<Kind, Math>(keys, tile.row, tile.rows, tile.count, out, ahead);
  }
}
template <class Kind>
inline void draw_tile(const Keys& keys, const Tile& tile, bool fast, float* out, const Ahead& ahead = {}) {
  if (fast) draw_tile<Kind, Fast>(keys, tile, out, ahead);
  else draw_tile<Kind, Exact>(keys, tile, out, ahead);
}

FASTGEN_END
