// The functions of csrc/math.h over arrays, for tests/native/test_math.py. Built by tests/emulation.py as if it were an op.
#pragma once
#include "../../../csrc/math.h"
#include "../../../csrc/unit.h"

FASTGEN_BEGIN

// n is a multiple of LANES
#define OVER_ARRAYS(function)                                                   \
  inline void function##_all(int64_t n, const float* x, float* y) {             \
    for (int64_t i = 0; i < n; i += LANES) store(y + i, function(load<vf>(x + i))); \
  }

INLINE vf sigmoid_factors(vf x) {
  vf out, rest;
  sigmoid_factors<1>(&x, &out, &rest);
  return out;
}
INLINE vf sigmoid_factors_rest(vf x) {
  vf out, rest;
  sigmoid_factors<1>(&x, &out, &rest);
  return rest;
}

OVER_ARRAYS(exp)
OVER_ARRAYS(exp_bounded)
OVER_ARRAYS(expm1)
OVER_ARRAYS(log)
OVER_ARRAYS(log1p)
OVER_ARRAYS(tanh)
OVER_ARRAYS(sigmoid)
OVER_ARRAYS(sigmoid_factors)
OVER_ARRAYS(sigmoid_factors_rest)
OVER_ARRAYS(softplus)
OVER_ARRAYS(log_sigmoid)
OVER_ARRAYS(reciprocal)
OVER_ARRAYS(sqrt)

FASTGEN_KERNELS(elementary, KERNEL(exp_all), KERNEL(exp_bounded_all), KERNEL(expm1_all), KERNEL(log_all), KERNEL(log1p_all),
                KERNEL(tanh_all), KERNEL(sigmoid_all), KERNEL(sigmoid_factors_all), KERNEL(sigmoid_factors_rest_all),
                KERNEL(softplus_all), KERNEL(log_sigmoid_all), KERNEL(reciprocal_all), KERNEL(sqrt_all))

FASTGEN_END
