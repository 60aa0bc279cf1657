// Memory that a task works in.
#pragma once
#include "simd.h"

FASTGEN_BEGIN

// Memory at the start of a cache line.
struct Aligned {
  float *memory, *data;
  explicit Aligned(int64_t size) : memory(new float[size + 16]) {
    data = (float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
  }
  Aligned(const Aligned&) = delete;
  ~Aligned() { delete[] memory; }
};

FASTGEN_END
