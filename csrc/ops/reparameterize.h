// reparameterize: z = mean + exp(log_var / 2) * noise and the KL divergence per row. fastgen/ops/reparameterize.py has the
// mathematics.
#pragma once
#include "../math.h"
#include "../random.h"
#include "../unit.h"

FASTGEN_BEGIN

template <class T>
INLINE void reparameterize_fwd_as(int64_t rows, int64_t event, const T* mean, const T* log_var, Keys keys,
                                  const float* given, T* z, float* kl, float* kept, bool fast, int64_t threads) {
  const Tiling tiling(rows, event);
  RowSums sums(tiling, kl);
  const Ahead ahead = Ahead().add(mean).add(log_var).add(z).add(kept);
  tiling.run(threads, [&](const Tile& tile) {
    TileNoise drawn;
    const int64_t offset = tile.row * event + tile.begin;
    const float* noise = given ? given + offset : drawn.values;
    if (!given) draw_tile<Normal>(keys, tile, fast, drawn.values, ahead.from(offset));
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = offset + r * event;
      const float* eps = noise + r * tile.count;
      vf total{};
      for_blocks(tile.count, [&](int64_t i, int64_t n) {
        const vf m = block_load(mean + base + i, n), v = block_load(log_var + base + i, n), e = block_load(eps + i, n);
        const vf sigma = exp(v * 0.5f);
        block_store(z + base + i, fma(sigma, e, m), n);
        if (kept) block_store(kept + base + i, e, n);
        // lanes beyond the row hold mean = log_var = 0 and add nothing
        total = total + fma(m, m, fma(sigma, sigma, splat(-1.0f)) - v);
      });
      sums.put(tile, r, 0.5f * sum(total));
    }
  });
  sums.finish();
}

// grad_z or grad_kl may be null: no gradient came from that output. The noise is `kept`, or drawn again at the keys.
template <class T>
INLINE void reparameterize_bwd_as(int64_t rows, int64_t event, const T* mean, const T* log_var, Keys keys,
                                  const float* kept, const T* grad_z, const float* grad_kl, T* grad_mean, T* grad_log_var,
                                  bool fast, int64_t threads) {
  const Tiling tiling(rows, event);
  tiling.run(threads, [&](const Tile& tile) {
    TileNoise drawn;
    const int64_t offset = tile.row * event + tile.begin;
    const float* noise = kept ? kept + offset : drawn.values;
    if (!kept && grad_z) draw_tile<Normal>(keys, tile, fast, drawn.values);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t base = offset + r * event;
      const float* eps = noise + r * tile.count;
      const vf gk = splat(grad_kl ? grad_kl[tile.row + r] : 0.0f);
      for_blocks(tile.count, [&](int64_t i, int64_t n) {
        const vf m = block_load(mean + base + i, n), v = block_load(log_var + base + i, n);
        const vf sigma = exp(v * 0.5f);
        vf by_mean{}, by_log_var{};
        if (grad_kl) {
          by_mean = gk * m;
          by_log_var = gk * fma(sigma, sigma, splat(-1.0f));
        }
        if (grad_z) {
          const vf gz = block_load(grad_z + base + i, n);
          by_mean = by_mean + gz;
          by_log_var = fma(gz * block_load(eps + i, n), sigma, by_log_var);
        }
        block_store(grad_mean + base + i, by_mean, n);
        block_store(grad_log_var + base + i, by_log_var * 0.5f, n);
      });
    }
  });
}

inline void reparameterize_fwd(int64_t dtype, int64_t rows, int64_t event, const void* mean, const void* log_var,
                               const int64_t* key, int64_t keys, const float* given, void* z, float* kl, float* kept,
                               int64_t fast, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    reparameterize_fwd_as<T>(rows, event, (const T*)mean, (const T*)log_var, Keys{key, keys}, given, (T*)z, kl, kept, fast,
                             threads);
  };
  with_dtype(dtype, run);
}

inline void reparameterize_bwd(int64_t dtype, int64_t rows, int64_t event, const void* mean, const void* log_var,
                               const int64_t* key, int64_t keys, const float* kept, const void* grad_z,
                               const float* grad_kl, void* grad_mean, void* grad_log_var, int64_t fast, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    reparameterize_bwd_as<T>(rows, event, (const T*)mean, (const T*)log_var, Keys{key, keys}, kept, (const T*)grad_z,
                             grad_kl, (T*)grad_mean, (T*)grad_log_var, fast, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(reparameterize, KERNEL(reparameterize_fwd), KERNEL(reparameterize_bwd))

FASTGEN_END
