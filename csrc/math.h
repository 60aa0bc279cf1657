// Elementary functions on vectors, accurate to a few ulp of float32. Not bit-identical across instruction sets: what must
// be (the normals) has its own polynomials in random.h.
#pragma once
#include "simd.h"

FASTGEN_BEGIN

// e^x: 0 below -104, infinite above 89, NaN stays NaN. Cody-Waite reduction, degree-6 minimax polynomial, error < 1.5 ulp.
INLINE vf exp(vf x) {
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  vf p = fma(splat(1.3888889e-3f), r, splat(8.3333333e-3f));
  p = fma(p, r, splat(4.16666667e-2f));
  p = fma(p, r, splat(0.166666667f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  // 2^n in two factors, for results that are subnormal or overflow
  const vi k = bits<vi>(shifted) - bits<vi>(magic);
  const vi half = k >> 1;
  return p * bits<vf>((half + 127) << 23) * bits<vf>((k - half + 127) << 23);
}

FASTGEN_END
