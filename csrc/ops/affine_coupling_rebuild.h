// affine_coupling_rebuild: the input of affine_coupling from its output, and the gradients there, in one pass.
// fastgen/ops/affine_coupling_rebuild.py has the mathematics.
#pragma once
#include "affine_coupling.h"

FASTGEN_BEGIN

template <class T, Bound B>
INLINE void affine_coupling_rebuild_as(int64_t rows, int64_t event, const T* y, const T* shift, const T* log_scale,
                                       const T* grad_y, const float* grad_log_det, T* x, T* grad_x, T* grad_log_scale,
                                       int64_t threads) {
  const Tiling tiling(rows, event);
  const bool stream =
      streamable(x, rows, event) && streamable(grad_x, rows, event) && streamable(grad_log_scale, rows, event);
  tiling.run(threads, [&](const Tile& tile) {
    const int64_t offset = tile.row * event + tile.begin;
    const auto map = [&](int64_t i, int64_t n, vf by_log_det) {
      const vf raw = block_load(log_scale + i, n), by_y = block_load(grad_y + i, n);
      const auto scale = coupling_scale<B, false, 1>(&raw);
      const vf moved = block_load(y + i, n) - block_load(shift + i, n);
      block_store(x + i, moved * *coupling_scale<B, true, 1>(&raw).factor, n, stream);
      block_store(grad_x + i, by_y * *scale.factor, n, stream);
      vf by_log = fma(by_y, moved, by_log_det);
      if constexpr (B == UNBOUNDED) by_log = fma(raw, splat(0.0f), by_log);  // nothing else would show a NaN there
      block_store(grad_log_scale + i, by_log * *scale.slope, n, stream);
    };
    if (event < LANES) {
      float spread[TILE];
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t i = 0; i < event; ++i) spread[r * event + i] = grad_log_det[tile.row + r];
      for_blocks(tile.rows * event, [&](int64_t i, int64_t n) { map(offset + i, n, block_load(spread + i, n)); });
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = offset + r * event;
      const vf by_log_det = splat(grad_log_det[tile.row + r]);
      for_blocks(tile.count, [&](int64_t i, int64_t n) { map(base + i, n, by_log_det); });
    }
  });
}

inline void affine_coupling_rebuild(int64_t dtype, int64_t rows, int64_t event, const void* y, const void* shift,
                                    const void* log_scale, const void* grad_y, const float* grad_log_det, void* x,
                                    void* grad_x, void* grad_log_scale, int64_t bound, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    with_bound(bound, false, [&](auto choice) {
      affine_coupling_rebuild_as<T, decltype(choice)::bound>(rows, event, (const T*)y, (const T*)shift, (const T*)log_scale,
                                                             (const T*)grad_y, grad_log_det, (T*)x, (T*)grad_x,
                                                             (T*)grad_log_scale, threads);
    });
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(affine_coupling_rebuild, KERNEL(affine_coupling_rebuild))

FASTGEN_END
