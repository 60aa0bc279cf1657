// One vector type per instruction set: the kernels are written once over these names and compiled once per set.
//
// A unit that includes this file defines FASTGEN_ISA (the namespace: scalar, avx2, avx512, neon) and gets
//   LANES, vf / vi / vu   float32, int32 and uint32 vectors; plain scalars when LANES is 1
//   arithmetic, comparisons and `condition ? a : b` by the compiler (GCC and Clang vector extensions)
//   the shims below where the language has no word for it.
// Nothing here may be used outside the namespace: an inline function shared by two units would be merged by the linker,
// and the AVX-512 copy could end up on a machine without it. For the same reason kernels use no templates of std.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(FASTGEN_NEON)
#include <arm_neon.h>
#endif

#define FASTGEN_BEGIN namespace fastgen { namespace FASTGEN_ISA {
#define FASTGEN_END }}
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

FASTGEN_BEGIN

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#elif defined(__ARM_NEON) && defined(FASTGEN_NEON)
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#define FASTGEN_ONE_LANE 1
#endif

#ifdef FASTGEN_ONE_LANE
using vf = float;
using vi = int32_t;
using vu = uint32_t;
#else
using vf = float __attribute__((vector_size(4 * LANES)));
using vi = int32_t __attribute__((vector_size(4 * LANES)));
using vu = uint32_t __attribute__((vector_size(4 * LANES)));
#endif

template <class To, class From>
INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To out;
  memcpy(&out, &value, sizeof out);
  return out;
}

INLINE vf splat(float x) { return x - vf{}; }  // not 0 + x, which -0 keeps the compiler from dropping
INLINE vu splat_u(uint32_t x) { return vu{} + x; }
INLINE vi splat_i(int32_t x) { return vi{} + x; }

template <class V, class T>
INLINE V load(const T* p) {
  V out;
  memcpy(&out, p, sizeof out);
  return out;
}
template <class V, class T>
INLINE void store(T* p, V value) {
  memcpy(p, &value, sizeof value);
}

// ---- shims --------------------------------------------------------------------------------------------------------

#if defined(__AVX2__)
// 64-bit lanes of which only the low words count: the machine multiplies them as they stand, and whatever products leave in
// the high words is ignored by the next multiplication.
using vd = uint64_t __attribute__((vector_size(4 * LANES)));
INLINE vd multiply_low(vd a, uint32_t b) {  // low words times b, as 64 bits
#if defined(__AVX512F__)
  return (vd)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#else
  return (vd)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#endif
}
INLINE vd low_words(vu a) { return bits<vd>(a); }
INLINE vd high_words(vu a) { return bits<vd>(a) >> 32; }
// The low words of two vectors, or their high words, side by side.
INLINE vu join_low(vd first, vd second) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)first, 0xAAAA, (__m512i)second, _MM_PERM_CCAA);
#else
  return (vu)_mm256_blend_epi32((__m256i)first, (__m256i)(second << 32), 0xAA);
#endif
}
INLINE vu join_high(vd first, vd second) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)second, 0x5555, (__m512i)first, _MM_PERM_DDBB);
#else
  return (vu)_mm256_blend_epi32((__m256i)(first >> 32), (__m256i)second, 0xAA);
#endif
}
#else
INLINE void multiply_wide(vu a, uint32_t b, vu& high, vu& low) {  // a * b as 64 bits
#if defined(FASTGEN_NEON)
  const uint32x4_t va = (uint32x4_t)a;
  const uint64x2_t first = vmull_n_u32(vget_low_u32(va), b), second = vmull_n_u32(vget_high_u32(va), b);
  low = (vu)vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
  high = (vu)vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
#else
  const uint64_t product = (uint64_t)a * b;
  high = (uint32_t)(product >> 32);
  low = (uint32_t)product;
#endif
}
#endif

INLINE vf to_float(vu a) {  // rounded once, to nearest even
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)a);
#elif defined(__AVX2__)
  // there is no unsigned conversion: the halves are put into the mantissas of 2^39 and 2^23, and only the sum rounds
  const __m256i low = _mm256_blend_epi16((__m256i)a, _mm256_set1_epi32(0x4B000000), 0xAA);
  const __m256i high = (__m256i)(a >> 16 | 0x53000000u);
  return (vf)_mm256_add_ps(_mm256_sub_ps((__m256)high, _mm256_set1_ps(549764202496.0f)), (__m256)low);
#elif defined(FASTGEN_NEON)
  return (vf)vcvtq_f32_u32((uint32x4_t)a);
#else
  return (float)a;
#endif
}

INLINE vf to_float(vi a) {
#ifdef FASTGEN_ONE_LANE
  return (float)a;
#else
  return __builtin_convertvector(a, vf);
#endif
}

INLINE vi to_int(vf a) {  // truncates; the result is unspecified for NaN and out of range
#ifdef FASTGEN_ONE_LANE
  return a >= -2147483648.0f && a < 2147483648.0f ? (int32_t)a : INT32_MIN;
#else
  return __builtin_convertvector(a, vi);
#endif
}

INLINE vf sqrt(vf a) {  // correctly rounded
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(FASTGEN_NEON)
  return (vf)vsqrtq_f32((float32x4_t)a);
#else
  return __builtin_sqrtf(a);
#endif
}

// a * b + c: rounded twice where Exact, else fused where the machine can
template <bool Exact>
INLINE vf multiply_add(vf a, vf b, vf c) {
  if constexpr (Exact) return a * b + c;
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FASTGEN_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE vf fma(vf a, vf b, vf c) { return multiply_add<false>(a, b, c); }

// x, computed where it stands: chains that are written in step stay in step, where GCC would take up one after the other.
INLINE vf pinned(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// The smaller or the larger of x and the bound; NaN stays NaN. (The masked forms keep GCC 12 from warning of its headers.)
INLINE vf at_most(vf x, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps((__mmask16)-1, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return x > bound ? splat(bound) : x;
#endif
}
INLINE vf at_least(vf x, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps((__mmask16)-1, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return x < bound ? splat(bound) : x;
#endif
}

// x * 2^n for a whole n in [-252, 254]; subnormal and infinite results are right.
INLINE vf times_power_of_2(vf x, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)x, (__m512)n);
#else  // in two factors, since 2^n itself may be out of range
  const vi k = to_int(n), half = k >> 1;
  return x * bits<vf>(bits<vu>(half + 127) << 23) * bits<vf>(bits<vu>(k - half + 127) << 23);
#endif
}

INLINE vf larger(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE vf reciprocal(vf a) {  // of normal numbers: 1 / a to 1 ulp, without the divider where that is slow
#if defined(__AVX512F__)
  const vf guess = (vf)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)a);
  return fma(fma(-a, guess, splat(1.0f)), guess, guess);
#else
  return 1.0f / a;
#endif
}

// x no further from 0 than `bound`; what becomes of NaN is unspecified.
INLINE vf within(vf x, float bound) {
#if defined(__AVX512F__)  // the smaller magnitude, with the sign of x
  return (vf)_mm512_maskz_range_ps((__mmask16)-1, (__m512)x, _mm512_set1_ps(bound), 2);
#else
  return at_least(at_most(x, bound), -bound);
#endif
}

INLINE float sum(vf a) {  // in a fixed order: pairwise over the lanes
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_maskz_extractf32x8_ps((__mmask8)-1, (__m512)a, 0),
                                     _mm512_maskz_extractf32x8_ps((__mmask8)-1, (__m512)a, 1));
#else
  const __m256 eight = (__m256)a;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(FASTGEN_ONE_LANE)
  return a;
#else
  float lane[LANES];
  store(lane, a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

INLINE int64_t sum(vi a) {
#ifdef FASTGEN_ONE_LANE
  return a;
#else
  int64_t total = 0;
  for (int i = 0; i < LANES; ++i) total += a[i];
  return total;
#endif
}

#ifdef FASTGEN_ONE_LANE
INLINE bool any(bool chosen) { return chosen; }
#else
INLINE bool any(vi chosen) {  // whether a comparison of vf holds in some lane
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)chosen) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)chosen) != 0;
#else
  return vmaxvq_u32((uint32x4_t)chosen) != 0;
#endif
}
#endif

INLINE float minimum(vf a) {  // of the lanes; none may be NaN
#ifdef FASTGEN_ONE_LANE
  return a;
#else
  float out = a[0];
  for (int i = 1; i < LANES; ++i) out = a[i] < out ? a[i] : out;
  return out;
#endif
}

// Writes the lanes of x where `chosen`, a result of comparing vf, holds: one after the other from p, and returns how many.
// Up to LANES floats from p are overwritten, whatever the number.
#ifdef FASTGEN_ONE_LANE
INLINE int64_t compress_store(float* p, vf x, bool chosen) {
  if (chosen) *p = x;
  return chosen;
}
#else
INLINE int64_t compress_store(float* p, vf x, vi chosen) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)chosen);
  store(p, (vf)_mm512_maskz_compress_ps(mask, (__m512)x));
  return __builtin_popcount(mask);
#elif defined(__AVX2__)
  const unsigned mask = (unsigned)_mm256_movemask_ps((__m256)chosen);
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101u) * 0xFF;
  const uint64_t lanes = _pext_u64(0x0706050403020100u, bytes);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)lanes));
  store(p, (vf)_mm256_permutevar8x32_ps((__m256)x, order));
  return __builtin_popcount(mask);
#else
  int64_t n = 0;
  for (int i = 0; i < LANES; ++i) {  // no branch: a lane not chosen is overwritten by the next
    p[n] = x[i];
    n += chosen[i] != 0;
  }
  return n;
#endif
}
#endif

// In each group of four lanes, transpose the 4x4 block that a, b, c, d make.
INLINE void transpose4(vf& a, vf& b, vf& c, vf& d) {
#if defined(__AVX512F__)
  const __m512 ab_low = _mm512_unpacklo_ps((__m512)a, (__m512)b), ab_high = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd_low = _mm512_unpacklo_ps((__m512)c, (__m512)d), cd_high = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  a = (vf)_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab_low), _mm512_castps_pd(cd_low)));
  b = (vf)_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab_low), _mm512_castps_pd(cd_low)));
  c = (vf)_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab_high), _mm512_castps_pd(cd_high)));
  d = (vf)_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab_high), _mm512_castps_pd(cd_high)));
#elif defined(__AVX2__)
  const __m256 ab_low = _mm256_unpacklo_ps((__m256)a, (__m256)b), ab_high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  const __m256 cd_low = _mm256_unpacklo_ps((__m256)c, (__m256)d), cd_high = _mm256_unpackhi_ps((__m256)c, (__m256)d);
  a = (vf)_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab_low), _mm256_castps_pd(cd_low)));
  b = (vf)_mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab_low), _mm256_castps_pd(cd_low)));
  c = (vf)_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(ab_high), _mm256_castps_pd(cd_high)));
  d = (vf)_mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(ab_high), _mm256_castps_pd(cd_high)));
#elif defined(FASTGEN_NEON)
  const float32x4x2_t ab = vtrnq_f32((float32x4_t)a, (float32x4_t)b), cd = vtrnq_f32((float32x4_t)c, (float32x4_t)d);
  a = (vf)vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  b = (vf)vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  c = (vf)vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  d = (vf)vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
#else
  (void)a, (void)b, (void)c, (void)d;  // one lane: the four words already stand in order
#endif
}

// Columns 0 to 3 of a matrix of LANES rows, `stride` floats from row to row: lane i of a, b, c, d holds p[i * stride + 0 .. 3].
INLINE void load_columns4(const float* p, int64_t stride, vf& a, vf& b, vf& c, vf& d) {
#if defined(__AVX512F__)
  const auto rows = [&](int64_t first) {
    const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(p + first * stride));
    const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(p + (first + 4) * stride), 1);
    const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(p + (first + 8) * stride), 2);
    return (vf)_mm512_insertf32x4(three, _mm_loadu_ps(p + (first + 12) * stride), 3);
  };
#elif defined(__AVX2__)
  const auto rows = [&](int64_t first) {
    const __m256 one = _mm256_castps128_ps256(_mm_loadu_ps(p + first * stride));
    return (vf)_mm256_insertf128_ps(one, _mm_loadu_ps(p + (first + 4) * stride), 1);
  };
#else
  const auto rows = [&](int64_t first) { return load<vf>(p + first * (LANES > 1 ? stride : 1)); };
#endif
  a = rows(0), b = rows(1), c = rows(2), d = rows(3);
  transpose4(a, b, c, d);
}
INLINE void store_columns4(float* p, int64_t stride, vf a, vf b, vf c, vf d) {
  transpose4(a, b, c, d);
  const vf rows[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    _mm_storeu_ps(p + i * stride, _mm512_castps512_ps128((__m512)rows[i]));
    _mm_storeu_ps(p + (i + 4) * stride, _mm512_extractf32x4_ps((__m512)rows[i], 1));
    _mm_storeu_ps(p + (i + 8) * stride, _mm512_extractf32x4_ps((__m512)rows[i], 2));
    _mm_storeu_ps(p + (i + 12) * stride, _mm512_extractf32x4_ps((__m512)rows[i], 3));
#elif defined(__AVX2__)
    _mm_storeu_ps(p + i * stride, _mm256_castps256_ps128((__m256)rows[i]));
    _mm_storeu_ps(p + (i + 4) * stride, _mm256_extractf128_ps((__m256)rows[i], 1));
#else
    store(p + i * (LANES > 1 ? stride : 1), rows[i]);
#endif
  }
}

// a0 b0 a1 b1 ... as two vectors, and back.
INLINE void interleave(vf a, vf b, vf& low, vf& high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (vf)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (vf)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (vf)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (vf)_mm256_permute2f128_ps(even, odd, 0x31);
#elif defined(FASTGEN_NEON)
  low = (vf)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
  high = (vf)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
#else
  low = a, high = b;
#endif
}
INLINE void deinterleave(vf low, vf high, vf& a, vf& b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  a = (vf)_mm512_permutex2var_ps((__m512)low, even, (__m512)high);
  b = (vf)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), (__m512)high);
#elif defined(__AVX2__)
  const __m256 one = _mm256_permute2f128_ps((__m256)low, (__m256)high, 0x20);
  const __m256 two = _mm256_permute2f128_ps((__m256)low, (__m256)high, 0x31);
  a = (vf)_mm256_shuffle_ps(one, two, 0x88);
  b = (vf)_mm256_shuffle_ps(one, two, 0xDD);
#elif defined(FASTGEN_NEON)
  a = (vf)vuzp1q_f32((float32x4_t)low, (float32x4_t)high);
  b = (vf)vuzp2q_f32((float32x4_t)low, (float32x4_t)high);
#else
  a = low, b = high;
#endif
}

// (cosine, sine) turns to (-sine, cosine) where bit 30 of `angle` is set.
INLINE void quarter_turn(vu angle, vf& cosine, vf& sine) {
#if defined(__AVX512F__)
  const __mmask16 turn = _mm512_test_epi32_mask((__m512i)angle, _mm512_set1_epi32(0x40000000));
  const __m512i c = (__m512i)cosine, s = (__m512i)sine;
  cosine = (vf)_mm512_mask_xor_epi32(c, turn, s, _mm512_set1_epi32((int)0x80000000u));
  sine = (vf)_mm512_mask_mov_epi32(s, turn, c);
#else
  const auto turn = (angle & 0x40000000u) != 0u;
  const vf c = cosine, s = sine;
  cosine = bits<vf>(turn ? bits<vu>(s) ^ 0x80000000u : bits<vu>(c));
  sine = turn ? c : s;
#endif
}

// Elements of LANES quartets in order, from the pairs (x0, y0) and (x1, y1) that random.h makes of their words; and which
// quartet stands in which lane of its counters for that.
INLINE void in_order(vf x0, vf y0, vf x1, vf y1, vf (&out)[4]) {
#if defined(__AVX512F__)
  // a quartet takes two lanes: x0 and y0 hold those of even counters, x1 and y1 those of odd ones
  out[0] = (vf)_mm512_unpacklo_ps((__m512)x0, (__m512)y0), out[1] = (vf)_mm512_unpackhi_ps((__m512)x0, (__m512)y0);
  out[2] = (vf)_mm512_unpacklo_ps((__m512)x1, (__m512)y1), out[3] = (vf)_mm512_unpackhi_ps((__m512)x1, (__m512)y1);
#elif defined(__AVX2__)
  out[0] = (vf)_mm256_unpacklo_ps((__m256)x0, (__m256)y0), out[1] = (vf)_mm256_unpackhi_ps((__m256)x0, (__m256)y0);
  out[2] = (vf)_mm256_unpacklo_ps((__m256)x1, (__m256)y1), out[3] = (vf)_mm256_unpackhi_ps((__m256)x1, (__m256)y1);
#else
  out[0] = x0, out[1] = y0, out[2] = x1, out[3] = y1;
  transpose4(out[0], out[1], out[2], out[3]);
#endif
}
INLINE vu natural_order() {
#ifdef FASTGEN_ONE_LANE
  return 0;
#else
  vu out{};
  for (int lane = 0; lane < LANES; ++lane) out[lane] = (uint32_t)lane;
  return out;
#endif
}
INLINE vu quartet_of_lane() {
#ifdef FASTGEN_ONE_LANE
  return 0;
#else
  vu out{};
#if defined(__AVX2__)
  for (int lane = 0; lane < LANES; ++lane)
    out[lane] = (uint32_t)(lane % 2 * (LANES / 2) + lane / 2 % 2 * (LANES / 4) + lane / 4);
#else
  for (int lane = 0; lane < LANES; ++lane) out[lane] = (uint32_t)(lane % 4 * (LANES / 4) + lane / 4);
#endif
  return out;
#endif
}

// ---- storage types -----------------------------------------------------------------------------------------------

struct bf16 { uint16_t word; };
struct f16 { uint16_t word; };

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return bits<float>((uint32_t)x.word << 16); }
INLINE float widen(f16 x) {  // subnormals through an exact subtraction
  const uint32_t sign = (uint32_t)(x.word & 0x8000) << 16, rest = (uint32_t)(x.word & 0x7FFF) << 13;
  if (rest >= 0x0F800000u) return bits<float>(sign | rest | 0x7F800000u);
  if (rest >= 0x00800000u) return bits<float>(sign | (rest + 0x38000000u));
  return bits<float>(sign | bits<uint32_t>(bits<float>(rest + 0x38800000u) - bits<float>(0x38800000u)));
}
INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, bf16& out) {
  const uint32_t u = bits<uint32_t>(x);
  out.word = x != x ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, f16& out) {
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
  uint32_t word;
  if (magnitude > 0x7F800000u) word = 0x7E00;
  else if (magnitude >= 0x477FF000u) word = 0x7C00;
  else if (magnitude < 0x38800000u) word = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3F000000u;
  else word = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
  out.word = (uint16_t)(sign | word);
}

INLINE vf load_float(const float* p) { return load<vf>(p); }
INLINE void store_float(float* p, vf x) { store(p, x); }

#ifdef FASTGEN_ONE_LANE
INLINE vf load_float(const bf16* p) { return widen(*p); }
INLINE vf load_float(const f16* p) { return widen(*p); }
INLINE void store_float(bf16* p, vf x) { narrow(x, *p); }
INLINE void store_float(f16* p, vf x) { narrow(x, *p); }
#else
using vh = uint16_t __attribute__((vector_size(2 * LANES)));
INLINE vf load_float(const bf16* p) {  // GCC 12 widens in halves
#if defined(__AVX512F__)
  return bits<vf>((vu)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return bits<vf>((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return bits<vf>(__builtin_convertvector(load<vh>(p), vu) << 16);
#endif
}
INLINE void store_float(bf16* p, vf x) {
  const vu u = bits<vu>(x);
  const vu rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
  store(p, __builtin_convertvector(x != x ? nan : rounded, vh));
}
#if defined(__AVX512F__)
INLINE vf load_float(const f16* p) { return (vf)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_float(f16* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0)); }
#elif defined(__AVX2__)
INLINE vf load_float(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_float(f16* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#else
INLINE vf load_float(const f16* p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
INLINE void store_float(f16* p, vf x) { vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x))); }
#endif
#endif

// Two vectors at once, in whichever order costs least: two elements of bfloat16 are a word, so that they come as the even and
// the odd ones, `EVEN_ODD`; others come as they lie.
template <class T>
constexpr bool EVEN_ODD = false;
template <>
constexpr bool EVEN_ODD<bf16> = true;
template <class T>
INLINE void load_two(const T* p, vf& a, vf& b) {
  if constexpr (EVEN_ODD<T>) {
    const vu words = load<vu>(p);
    a = bits<vf>(words << 16), b = bits<vf>(words & 0xFFFF0000u);
  } else {
    a = load_float(p), b = load_float(p + LANES);
  }
}
// To the nearest bfloat16, the one further from 0 of two as near; a NaN must be a canonical one, or come from a bfloat16.
INLINE vu join_even_odd(vf even, vf odd) {
  return (bits<vu>(even) + 0x8000u) >> 16 | ((bits<vu>(odd) + 0x8000u) & 0xFFFF0000u);
}
template <class T>
INLINE void store_two(T* p, vf a, vf b) {
  if constexpr (EVEN_ODD<T>) store(p, join_even_odd(a, b));
  else store_float(p, a), store_float(p + LANES, b);
}

// Asks for the cache line of p in the second-level cache. Any address will do.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// Asks in the first-level cache for what a reader that goes through memory from p on needs soon: the hardware stops at every
// page. Measured 5 to 8 % faster on three streams.
INLINE void fetch_ahead(const void* p) { __builtin_prefetch((const char*)p + 1024, 0, 3); }

// Like store_float, around the caches: the line is not read first. `p` must be aligned to a vector of T, and drain_stores()
// follow on the same thread, as it does at the end of parallel_for.
template <class T>
INLINE void stream_float(T* p, vf x) {
#if defined(__AVX2__)
  alignas(64) T out[LANES];
  store_float(out, x);
  constexpr int BYTES = LANES * sizeof(T);
#if defined(__AVX512F__)
  if constexpr (BYTES == 64) {
    _mm512_stream_si512((__m512i*)p, _mm512_load_si512(out));
    return;
  }
#endif
  if constexpr (BYTES == 32) _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)out));
  else _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)out));
#else
  store_float(p, x);
#endif
}
// The same of store_two; `p` must be aligned to both vectors.
template <class T>
INLINE void stream_two(T* p, vf a, vf b) {
  if constexpr (EVEN_ODD<T>) stream_float((float*)p, bits<vf>(join_even_odd(a, b)));
  else stream_float(p, a), stream_float(p + LANES, b);
}
// Orders streamed stores before whatever this thread does next.
INLINE void drain_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Outputs of this many bytes and more are streamed: they would not be found in a cache later. Measured 4 to 9 % faster on one
// thread, with a third less traffic.
constexpr int64_t STREAM_BYTES = 8 << 20;
// Whether an output of [rows, event] should be streamed: large, and its vectors aligned.
template <class T>
INLINE bool streamable(const T* p, int64_t rows, int64_t event) {
  const int64_t vector = LANES * sizeof(T);
  return LANES > 1 && rows * event * (int64_t)sizeof(T) >= STREAM_BYTES && (size_t)p % vector == 0 &&
         event * (int64_t)sizeof(T) % vector == 0;
}

template <class P>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};
// body(T*) with the storage type of a dtype code; _native.py has the same codes.
template <class Body>
INLINE void with_dtype(int64_t dtype, Body&& body) {
  if (dtype == 0) body((float*)nullptr);
  else if (dtype == 1) body((bf16*)nullptr);
  else body((f16*)nullptr);
}

// The first n lanes only, 0 <= n < LANES; lanes beyond hold `fill` and are not touched in memory.
template <class T>
INLINE vf load_part(const T* p, int64_t n, float fill = 0.0f) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
  if constexpr (EVEN_ODD<T>) {
    const __m256i words = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    const __m512i wide = _mm512_maskz_slli_epi32((__mmask16)-1, _mm512_cvtepu16_epi32(words), 16);
    return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), (__m512)wide);
  }
#endif
  float lane[LANES];
  for (int i = 0; i < LANES; ++i) lane[i] = fill;
  for (int64_t i = 0; i < n; ++i) lane[i] = widen(p[i]);
  return load<vf>(lane);
}
template <class T>
INLINE void store_part(T* p, vf x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
    return;
  } else {
    T lane[LANES];
    store_float(lane, x);
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm256_loadu_si256((const __m256i*)lane));
    return;
  }
#endif
  float lane[LANES];
  store(lane, x);
  for (int64_t i = 0; i < n; ++i) narrow(lane[i], p[i]);
}

// Calls body(i, n) for blocks of a row of `count` elements: n == LANES for whole vectors, less for the tail. The body is
// compiled twice, so that `block_load` and `block_store` cost nothing on whole vectors. The first form goes on from i.
template <class Body>
INLINE void for_blocks(int64_t i, int64_t count, Body&& body) {
  for (; i + LANES <= count; i += LANES) body(i, (int64_t)LANES);
  if (LANES > 1 && i < count) body(i, count - i);
}
template <class Body>
INLINE void for_blocks(int64_t count, Body&& body) {
  for_blocks(0, count, body);
}
template <class T>
INLINE vf block_load(const T* p, int64_t n, float fill = 0.0f) {
  return n == LANES ? load_float(p) : load_part(p, n, fill);
}
template <class T>
INLINE void block_store(T* p, vf x, int64_t n, bool stream = false) {
  if (n != LANES) store_part(p, x, n);
  else if (stream) stream_float(p, x);
  else store_float(p, x);
}

FASTGEN_END
