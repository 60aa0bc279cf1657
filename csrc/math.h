// Elementary functions on vectors, accurate to a few ulp of float32: a bound of the error over all float32 arguments stands
// with each, on the worst instruction set (scalar, which cannot fuse). tests/native/test_math.py reads the bounds and holds the
// functions to them. Not bit-identical across instruction sets: what must be (the normals) has its own polynomials in random.h.
// Infinite arguments give the limit and NaN stays NaN. The polynomials are minimax fits in the relative error of the result.
#pragma once
#include "simd.h"

FASTGEN_BEGIN

INLINE vf abs(vf x) { return bits<vf>(bits<vu>(x) & 0x7FFFFFFFu); }
// |magnitude| with the sign of `sign`
INLINE vf copy_sign(vf magnitude, vf sign) {
  return bits<vf>((bits<vu>(magnitude) & 0x7FFFFFFFu) | (bits<vu>(sign) & 0x80000000u));
}

// Functions on V vectors take each step for all of them in turn: a processor looks about a hundred operations ahead for some
// that need not wait for each other, and that is two chains of them.

// x = n ln 2 + r with whole n and |r| <= ln(2) / 2 (Cody and Waite), for |x| < 1e4.
template <int V>
INLINE void reduce(const vf* x, vf* r, vf* n) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int k = 0; k < V; ++k) n[k] = pinned(fma(x[k], splat(1.44269504f), magic));
  for (int k = 0; k < V; ++k) n[k] = pinned(n[k] - magic);
  for (int k = 0; k < V; ++k) r[k] = pinned(fma(n[k], splat(-0.693145752f), x[k]));
  for (int k = 0; k < V; ++k) r[k] = pinned(fma(n[k], splat(-1.42860677e-6f), r[k]));
}

// Highest power first.
template <int V, int N>
INLINE void polynomial(const float (&c)[N], const vf* x, vf* p) {
  for (int k = 0; k < V; ++k) p[k] = pinned(fma(splat(c[0]), x[k], splat(c[1])));
  for (int i = 2; i < N; ++i)
    for (int k = 0; k < V; ++k) p[k] = pinned(fma(p[k], x[k], splat(c[i])));
}
// Of e^r and (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2.
constexpr float EXP_COEFFICIENTS[] = {1.38183543e-3f, 8.36854056e-3f, 4.16682921e-2f, 0.166665226f, 0.49999994f, 1.0f, 1.0f};
constexpr float EXPM1_COEFFICIENTS[] = {1.38706574e-3f, 8.36626161e-3f, 4.16674353e-2f, 0.166665465f, 0.49999997f};

// e^x: 0 below -104, infinite above 89. Error < 1.2 ulp.
template <int V>
INLINE void exp(const vf* x, vf* e) {
  vf n[V], r[V];
  for (int k = 0; k < V; ++k) r[k] = at_least(at_most(x[k], 89.0f), -104.0f);
  reduce<V>(r, r, n);
  polynomial<V>(EXP_COEFFICIENTS, r, e);
  for (int k = 0; k < V; ++k) e[k] = times_power_of_2(e[k], n[k]);
}
INLINE vf exp(vf x) {
  exp<1>(&x, &x);
  return x;
}

// e^x for x <= 88 without the cases of exp: 1.6e-38 below -87, where exp goes on to 0. Error < 1.2 ulp.
template <int V>
INLINE void exp_bounded(const vf* x, vf* e) {
  vf n[V], r[V];
  for (int k = 0; k < V; ++k) r[k] = at_least(x[k], -87.0f);
  reduce<V>(r, r, n);
  polynomial<V>(EXP_COEFFICIENTS, r, e);
  for (int k = 0; k < V; ++k) {
#if defined(__AVX512F__)
    e[k] = times_power_of_2(e[k], n[k]);
#else
    e[k] = e[k] * bits<vf>(bits<vu>(to_int(n[k]) + 127) << 23);
#endif
  }
}
INLINE vf exp_bounded(vf x) {
  exp_bounded<1>(&x, &x);
  return x;
}

// e^x - 1 without cancellation. Error < 1.7 ulp.
INLINE vf expm1(vf x) {
  vf n, p, r = at_least(at_most(x, 89.0f), -26.0f);  // -1 from -26 on
  reduce<1>(&r, &r, &n);
  polynomial<1>(EXPM1_COEFFICIENTS, &r, &p);
  p = fma(p, r * r, r);
  const vf half_scale = times_power_of_2(splat(0.5f), n);  // 2^(n - 1), since 2^128 is out of range
  return 2.0f * fma(half_scale, p, half_scale - 0.5f);
}

// log(1 + f) + k ln 2 for |f| within the octave around 1: [sqrt(1/2) - 1, sqrt(2) - 1]
INLINE vf log_of_parts(vf f, vi k) {
  vf p = fma(splat(-7.61903971e-2f), f, splat(0.12912932f));
  p = fma(p, f, splat(-0.132480666f));
  p = fma(p, f, splat(0.14180854f));
  p = fma(p, f, splat(-0.16608411f));
  p = fma(p, f, splat(0.200020045f));
  p = fma(p, f, splat(-0.250016093f));
  p = fma(p, f, splat(0.333333254f));
  p = fma(p, f, splat(-0.499999881f));
  const vf n = to_float(k);
  return fma(n, splat(0.693145752f), f + fma(n, splat(1.42860677e-6f), f * f * p));
}

constexpr uint32_t SQRT_HALF = 0x3F3504F3;  // float32 bits of sqrt(1/2)

// log x: -infinite at 0, NaN below. Error < 1.1 ulp.
INLINE vf log(vf x) {
  const vi tiny = x < 1.17549435e-38f;  // subnormal: scaled by 2^23
  const vf scaled = tiny ? x * 8388608.0f : x;
  const vi k = bits<vi>(bits<vu>(scaled) - SQRT_HALF) >> 23;
  const vf f = bits<vf>(bits<vu>(scaled) - (bits<vu>(k) << 23)) - 1.0f;
  vf y = log_of_parts(f, tiny ? k - 23 : k);
  y = x < INFINITY ? y : x;  // infinite or NaN
  y = x > 0.0f ? y : splat(-INFINITY);
  return x >= 0.0f ? y : splat(NAN);
}

// log(1 + x): -infinite at -1, NaN below. Error < 1.6 ulp.
INLINE vf log1p(vf x) {
  // 1 + x = 2^k (1 + f), where f is formed from x and not from the rounded sum
  const vu shift = (bits<vu>(1.0f + x) - SQRT_HALF) & 0xFF800000u;
  const vf four = bits<vf>(0x40800000u - shift);  // 4 * 2^-k, since 2^-k may be subnormal
  const vf f = bits<vf>(bits<vu>(x) - shift) + fma(splat(0.25f), four, splat(-1.0f));
  vf y = log_of_parts(f, bits<vi>(shift) >> 23);
  y = x < INFINITY ? y : x;
  y = x > -1.0f ? y : splat(-INFINITY);
  return x >= -1.0f ? y : splat(NAN);
}

// tanh x of V vectors, and its derivative 1 - tanh^2 without the cancellation in that.
template <int V>
INLINE void tanh_and_slope(const vf* x, vf* value, vf* slope) {
  vf n[V], r[V], m[V], quotient[V];
  for (int k = 0; k < V; ++k) r[k] = at_least(-2.0f * abs(x[k]), -26.0f);  // tanh 9 rounds to 1
  reduce<V>(r, r, n);
  polynomial<V>(EXPM1_COEFFICIENTS, r, m);
  for (int k = 0; k < V; ++k) m[k] = pinned(fma(m[k], r[k] * r[k], r[k]));
  for (int k = 0; k < V; ++k) {  // m = e^(-2|x|) - 1
    const vf scale = times_power_of_2(splat(1.0f), n[k]);
    m[k] = pinned(fma(scale, m[k], scale - 1.0f));
  }
  for (int k = 0; k < V; ++k) quotient[k] = pinned(reciprocal(2.0f + m[k]));
  for (int k = 0; k < V; ++k) {
    value[k] = copy_sign(m[k] * quotient[k], x[k]);
    slope[k] = (4.0f * quotient[k]) * (quotient[k] * (1.0f + m[k]));
  }
}

// tanh x. Error < 3 ulp.
INLINE vf tanh(vf x) {
  vf value, slope;
  tanh_and_slope<1>(&x, &value, &slope);
  return value;
}

// 1 / (1 + e^-x), as accurate for large negative x. Error < 3 ulp.
INLINE vf sigmoid(vf x) {
  const vf e = exp(-abs(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// 2^f for |f| <= 1/2, highest power first: a relative error of 1e-7.
constexpr float EXP2_COEFFICIENTS[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 0.240222424f, 0.693147004f, 1.0f};

// e^-x for |x| <= 80, beyond which it stops; NaN does not stay NaN. The error grows with |x| by 1.3e-8 of the result.
template <int V>
INLINE void exp_of_minus(const vf* x, vf* e) {
  const vf magic = splat(12582912.0f), rate = splat(-1.44269504f);  // 1.5 * 2^23: adding it rounds to an integer
  vf f[V], shifted[V], p[V];
  for (int k = 0; k < V; ++k) f[k] = within(x[k], 80.0f);
  for (int k = 0; k < V; ++k) shifted[k] = pinned(fma(f[k], rate, magic));
  for (int k = 0; k < V; ++k) f[k] = pinned(fma(f[k], rate, magic - shifted[k]));
  polynomial<V>(EXP2_COEFFICIENTS, f, p);
  for (int k = 0; k < V; ++k) {
#if defined(__AVX512F__)
    e[k] = times_power_of_2(p[k], shifted[k] - magic);
#else
    e[k] = bits<vf>(bits<vu>(p[k]) + (bits<vu>(shifted[k]) << 23));  // the integer stands in the low bits
#endif
  }
}

// 1 / (1 + e^-x), and `rest` = 1 - that without its cancellation, of V vectors: factors of SiLU and its derivative. Both stop
// at 1.8e-35 and do not keep NaN, which x itself brings into those products. Error < 20 ulp to |x| = 20, < 70 ulp
// beyond; < 7 and < 20 ulp where multiply-adds are fused.
template <int V>
INLINE void sigmoid_factors(const vf* x, vf* out, vf* rest) {
  vf e[V];
  exp_of_minus<V>(x, e);
  for (int k = 0; k < V; ++k) out[k] = pinned(reciprocal(1.0f + e[k]));
  for (int k = 0; k < V; ++k) rest[k] = e[k] * out[k];
}
// log(1 + e^x). Error < 3 ulp.
INLINE vf softplus(vf x) { return (x < 0.0f ? splat(0.0f) : x) + log1p(exp(-abs(x))); }

// log(sigmoid(x)). Error < 3 ulp.
INLINE vf log_sigmoid(vf x) { return -softplus(-x); }

FASTGEN_END
