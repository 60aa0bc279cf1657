// uniform: uniforms on (0, 1), [rows, event], at the keys. fastgen/ops/uniform.py has the mathematics.
#pragma once
#include "normal.h"
#include "../unit.h"

FASTGEN_BEGIN

inline void uniform(int64_t dtype, void* out, int64_t rows, int64_t event, const int64_t* key, int64_t keys,
                    int64_t threads) {
  fill<Uniform>(dtype, out, rows, event, Keys{key, keys}, false, threads);
}

FASTGEN_KERNELS(uniform, KERNEL(uniform))

FASTGEN_END
