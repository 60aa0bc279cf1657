// normal: standard normals [rows, event] at the keys. fastgen/ops/normal.py has the mathematics.
#pragma once
#include "../random.h"
#include "../unit.h"

FASTGEN_BEGIN

template <class Kind>
INLINE void fill(int64_t dtype, void* out, int64_t rows, int64_t event, Keys keys, bool fast, int64_t threads) {
  const Tiling tiling(rows, event);
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    tiling.run(threads, [&](const Tile& tile) {
      T* to = (T*)out + tile.row * event + tile.begin;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (tile.count % (4 * LANES) == 0) return draw_tile<Kind>(keys, tile, fast, to);
      }
      TileNoise noise;
      draw_tile<Kind>(keys, tile, fast, noise.values);
      for_blocks(tile.rows * tile.count,
                 [&](int64_t i, int64_t n) { block_store(to + i, block_load(noise.values + i, n), n); });
    });
  };
  with_dtype(dtype, run);
}

inline void normal(int64_t dtype, void* out, int64_t rows, int64_t event, const int64_t* key, int64_t keys, int64_t fast,
                   int64_t threads) {
  fill<Normal>(dtype, out, rows, event, Keys{key, keys}, fast, threads);
}

FASTGEN_KERNELS(normal, KERNEL(normal))

FASTGEN_END
