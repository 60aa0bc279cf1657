// Attention with narrow heads: softmax(q k' scale) v. A head of D <= MOST_WIDTH numbers leaves a matrix library little to do per
// call; here a head's keys and values lie packed in a cache, lanes over keys, and blocks of queries go through them whole: a
// block's scores, which nobody else sees, never leave the first-level cache.
#pragma once
#include "../math.h"
#include "../memory.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

constexpr int64_t MOST_WIDTH = 32;
constexpr int ROWS = 4;  // queries at a time: each vector of keys that is loaded serves them all
constexpr int COLUMNS = LANES == 16 ? 4 : 2;  // columns of a head, or vectors of keys, at a time
constexpr int64_t BLOCK = 16;  // queries whose weights lie in the cache while they are summed over

// A tensor [N, T, heads, D] whose last dimension is dense; the strides of the others.
template <class T>
struct Heads {
  T* data;
  int64_t sample, token, head;
  T* of(int64_t n, int64_t h) const { return data + n * sample + h * head; }
};

struct Shape {
  int64_t queries, keys, width;
  int64_t vectors, pitch, columns;  // vectors of keys, keys with padding, width with padding
  Shape(int64_t queries_, int64_t keys_, int64_t width_)
      : queries(queries_),
        keys(keys_),
        width(width_),
        vectors(ceil_div(keys_, LANES)),
        pitch(vectors * LANES),
        columns(ceil_div(width_, 4) * 4) {}
  int64_t panel() const { return (columns + 1) * pitch; }
};

template <int N>
struct Count {
  static constexpr int value = N;
};
// body(Count, first) over `all` items, several at a time while there are as many.
template <int N, class Body>
INLINE void for_groups(int64_t all, Body&& body) {
  int64_t i = 0;
  for (; i + N <= all; i += N) body(Count<N>{}, i);
  for (; i < all; ++i) body(Count<1>{}, i);
}

// Rows [keys, width] transposed to [columns][pitch], zeros in the padding; after them a row of `start`, what scores start
// from: 0, and `padding` where there is no key.
inline void pack(const Shape& shape, const float* rows, int64_t step, float padding, float* panel) {
  const int64_t whole = shape.width % 4 ? 0 : shape.keys / LANES * LANES;
  for (int64_t d = 0; d < shape.columns; d += 4)
    for (int64_t j = 0; j < whole; j += LANES) {
      vf part[4];
      float* at = panel + d * shape.pitch + j;
      if (LANES == 1) {
        for (int c = 0; c < 4; ++c) at[c * shape.pitch] = rows[j * step + d + c];
        continue;
      }
      load_columns4(rows + j * step + d, step, part[0], part[1], part[2], part[3]);
      for (int c = 0; c < 4; ++c) store(at + c * shape.pitch, part[c]);
    }
  for (int64_t d = 0; d < shape.columns; ++d)
    for (int64_t j = whole; j < shape.pitch; ++j)
      panel[d * shape.pitch + j] = d < shape.width && j < shape.keys ? rows[j * step + d] : 0.0f;
  for (int64_t j = 0; j < shape.pitch; ++j) panel[shape.columns * shape.pitch + j] = j < shape.keys ? 0.0f : padding;
}

// The way back.
inline void unpack(const Shape& shape, const float* panel, float* rows, int64_t step) {
  const int64_t whole = LANES == 1 || shape.width % 4 ? 0 : shape.keys / LANES * LANES;
  for (int64_t d = 0; d < shape.columns; d += 4)
    for (int64_t j = 0; j < whole; j += LANES) {
      vf part[4];
      for (int c = 0; c < 4; ++c) part[c] = load<vf>(panel + (d + c) * shape.pitch + j);
      store_columns4(rows + j * step + d, step, part[0], part[1], part[2], part[3]);
    }
  for (int64_t j = whole; j < shape.keys; ++j)
    for (int64_t d = 0; d < shape.width; ++d) rows[j * step + d] = panel[d * shape.pitch + j];
}

// Four floats, whatever the instruction set.
using v4 = float __attribute__((vector_size(16)));

// ROWS rows from `rows`, times factor[r], as [ROWS][MOST_WIDTH]; zeros for rows past `count`.
INLINE void take_rows(const Shape& shape, const float* rows, int64_t step, int64_t count, const float* factor, float* out) {
  for (int64_t r = 0; r < ROWS; ++r, out += MOST_WIDTH) {
    if (r >= count) {
      memset(out, 0, MOST_WIDTH * sizeof(float));
      continue;
    }
    int64_t d = 0;
    for (; d + 4 <= shape.width; d += 4) store(out + d, load<v4>(rows + r * step + d) * factor[r]);
    for (; d < shape.columns; ++d) out[d] = d < shape.width ? rows[r * step + d] * factor[r] : 0.0f;
  }
}

// out[r][j] = start[j] + sum over d of a[r][d] panel[d][j], and `each(r, sum)` of every vector of it.
template <class Each>
INLINE void products(const Shape& shape, const float* a, const float* panel, float* out, Each&& each) {
  for_groups<COLUMNS>(shape.vectors, [&](auto count, int64_t v) INLINED {
    constexpr int V = decltype(count)::value;
    const float* at = panel + v * LANES;
    vf total[ROWS][V];
    for (int k = 0; k < V; ++k) {
      const vf start = load<vf>(at + shape.columns * shape.pitch + k * LANES);
      for (int r = 0; r < ROWS; ++r) total[r][k] = start;
    }
    for (int64_t d = 0; d < shape.width; ++d, at += shape.pitch) {
      vf right[V];
      for (int k = 0; k < V; ++k) right[k] = load<vf>(at + k * LANES);
      for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < V; ++k) total[r][k] = fma(splat(a[r * MOST_WIDTH + d]), right[k], total[r][k]);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < V; ++k) {
        store(out + r * shape.pitch + (v + k) * LANES, total[r][k]);
        each(r, total[r][k]);
      }
  });
}

struct Add {
  template <class V>
  INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {  // either where one is NaN
  template <class V>
  INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

// Four vectors to the four numbers that `join` makes of the lanes of each, in a fixed order.
template <class Join>
INLINE v4 fold4(vf a, vf b, vf c, vf d, Join join) {
  float lane[4 * LANES];
  if constexpr (LANES == 1) {
    lane[0] = a, lane[1] = b, lane[2] = c, lane[3] = d;
    return load<v4>(lane);
  } else {
    transpose4(a, b, c, d);
    store(lane, join(join(a, b), join(c, d)));
    v4 all = load<v4>(lane);
    for (int i = 4; i < LANES; i += 4) all = join(all, load<v4>(lane + i));
    return all;
  }
}

// out[r][d] = factor[r] * sum over keys of weight[r][j] panel[d][j], for the first `count` rows.
INLINE void sums(const Shape& shape, const float* weight, const float* panel, const float* factor, int64_t count, float* out,
                 int64_t step) {
  for (int64_t d = 0; d < shape.columns; d += 4) {
    vf total[4][ROWS];
    for (int first = 0; first < 4; first += COLUMNS) {
      const float* at = panel + (d + first) * shape.pitch;
      vf part[COLUMNS][ROWS] = {};
      for (int64_t j = 0; j < shape.pitch; j += LANES)
        for (int r = 0; r < ROWS; ++r) {
          const vf w = load<vf>(weight + r * shape.pitch + j);
          for (int c = 0; c < COLUMNS; ++c) part[c][r] = fma(w, load<vf>(at + c * shape.pitch + j), part[c][r]);
        }
      for (int c = 0; c < COLUMNS; ++c)
        for (int r = 0; r < ROWS; ++r) total[first + c][r] = part[c][r];
    }
    for (int r = 0; r < ROWS; ++r) {
      const v4 four = fold4(total[0][r], total[1][r], total[2][r], total[3][r], Add{}) * factor[r];
      float* const at = out + r * step + d;
      if (r >= count) continue;
      if (d + 4 <= shape.width) store(at, four);
      else
        for (int64_t c = 0; c < shape.width - d; ++c) at[c] = four[c];
    }
  }
}

// weight[r][j] = e^(weight[r][j] - most[r]), and `each(r, j, weight)` of every vector of it. What is less than e^-80 is 0, in the
// padding too: products of it would be subnormal, which costs a hundred times as much.
template <class Each>
INLINE void exponentials(const Shape& shape, const float* most, float* weight, Each&& each) {
  for (int64_t j = 0; j < shape.pitch; j += LANES) {
    vf x[ROWS], e[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = load<vf>(weight + r * shape.pitch + j) - splat(most[r]);
    exp_bounded<ROWS>(x, e);
    for (int r = 0; r < ROWS; ++r) {
      e[r] = x[r] < -80.0f ? vf{} : e[r];  // a NaN stays
      store(weight + r * shape.pitch + j, e[r]);
      each(r, j, e[r]);
    }
  }
}

// The work of a call in units of about a nanosecond, for `threads`
INLINE int64_t worthwhile(int64_t heads, const Shape& shape, int64_t threads) {
  return heads * shape.queries * shape.keys * (shape.width + 8) < 16 * SERIAL ? 1 : threads;
}

// query, key, value: strides of samples, tokens and heads. out [N, T, heads, D]. kept: null, or [N, heads, T, 2] for the largest
// score of a query and 1 / the sum of e^(score - that).
inline void attention_fwd(int64_t samples, int64_t heads, int64_t queries, int64_t keys, int64_t width, double scale,
                          const float* query, int64_t query_sample, int64_t query_token, int64_t query_head,
                          const float* key, int64_t key_sample, int64_t key_token, int64_t key_head, const float* value,
                          int64_t value_sample, int64_t value_token, int64_t value_head, float* out, float* kept,
                          int64_t threads) {
  const Shape shape(queries, keys, width);
  const Heads<const float> q{query, query_sample, query_token, query_head}, k{key, key_sample, key_token, key_head},
      v{value, value_sample, value_token, value_head};
  const Heads<float> y{out, queries * heads * width, heads * width, width};
  // a head goes in parts where there are few of them: each packs the keys again
  const int64_t all = samples * heads;
  if (!all || !queries) return;
  const int64_t wanted = all < 16 ? ceil_div(16, all) : 1;
  const int64_t part = ceil_div(ceil_div(queries, min(wanted, ceil_div(queries, 64))), ROWS) * ROWS;
  const int64_t parts = ceil_div(queries, part);
  parallel_ranges(all * parts, worthwhile(all, shape, threads), [&](int64_t begin, int64_t end) {
    const Aligned room(2 * shape.panel() + ROWS * shape.pitch);
    float *const keys_of = room.data, *const values_of = room.data + shape.panel(), *const weight = values_of + shape.panel();
    float own[ROWS * MOST_WIDTH], most[ROWS], inverse[ROWS], factor[ROWS];
    for (int r = 0; r < ROWS; ++r) factor[r] = (float)scale;
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / parts, n = index / heads, h = index % heads, first = task % parts * part;
      if (index != packed) {
        pack(shape, k.of(n, h), k.token, -INFINITY, keys_of);
        pack(shape, v.of(n, h), v.token, 0.0f, values_of);
        packed = index;
      }
      for (int64_t t = first; t < min(queries, first + part); t += ROWS) {
        const int64_t count = min(ROWS, queries - t);
        take_rows(shape, q.of(n, h) + t * q.token, q.token, count, factor, own);
        vf largest[ROWS], total[ROWS] = {};
        for (int r = 0; r < ROWS; ++r) largest[r] = splat(-INFINITY);
        products(shape, own, keys_of, weight, [&](int r, vf score) INLINED { largest[r] = larger(score, largest[r]); });
        store(most, fold4(largest[0], largest[1], largest[2], largest[3], Larger{}));
        exponentials(shape, most, weight, [&](int r, int64_t, vf e) INLINED { total[r] = total[r] + e; });
        store(inverse, 1.0f / fold4(total[0], total[1], total[2], total[3], Add{}));
        sums(shape, weight, values_of, inverse, count, y.of(n, h) + t * y.token, y.token);
        if (kept)
          for (int64_t r = 0; r < count; ++r) {
            float* const pair = kept + (index * queries + t + r) * 2;
            pair[0] = most[r], pair[1] = inverse[r];
          }
      }
    }
  });
}

// total[d][j] += sum over `count` rows of weight[r][j] a[r][d].
INLINE void accumulate(const Shape& shape, int64_t count, const float* weight, const float* a, float* total) {
  for (int64_t d = 0; d < shape.columns; d += 4)
    for_groups<COLUMNS>(shape.vectors, [&](auto vectors, int64_t v) INLINED {
      constexpr int V = decltype(vectors)::value;
      float* const at = total + d * shape.pitch + v * LANES;
      vf sum[4][V];
      for (int c = 0; c < 4; ++c)
        for (int k = 0; k < V; ++k) sum[c][k] = load<vf>(at + c * shape.pitch + k * LANES);
      for (int64_t r = 0; r < count; ++r) {
        vf w[V];
        for (int k = 0; k < V; ++k) w[k] = load<vf>(weight + r * shape.pitch + (v + k) * LANES);
        for (int c = 0; c < 4; ++c)
          for (int k = 0; k < V; ++k) sum[c][k] = fma(splat(a[r * MOST_WIDTH + d + c]), w[k], sum[c][k]);
      }
      for (int c = 0; c < 4; ++c)
        for (int k = 0; k < V; ++k) store(at + c * shape.pitch + k * LANES, sum[c][k]);
    });
}

// out, grad [N, T, heads, D]; kept as attention_fwd left it; the gradients have strides of their own. With e the exponentials of
// a query, z the inverse of their sum and g = z grad, what is summed is e (g . value - g . out) for scores, and e g for values.
inline void attention_bwd(int64_t samples, int64_t heads, int64_t queries, int64_t keys, int64_t width, double scale,
                          const float* query, int64_t query_sample, int64_t query_token, int64_t query_head,
                          const float* key, int64_t key_sample, int64_t key_token, int64_t key_head, const float* value,
                          int64_t value_sample, int64_t value_token, int64_t value_head, const float* out, const float* kept,
                          const float* grad, float* grad_query, int64_t grad_query_sample, int64_t grad_query_token,
                          int64_t grad_query_head, float* grad_key, int64_t grad_key_sample, int64_t grad_key_token,
                          int64_t grad_key_head, float* grad_value, int64_t grad_value_sample, int64_t grad_value_token,
                          int64_t grad_value_head, int64_t threads) {
  const Shape shape(queries, keys, width);
  const Heads<const float> q{query, query_sample, query_token, query_head}, k{key, key_sample, key_token, key_head},
      v{value, value_sample, value_token, value_head};
  const Heads<const float> y{out, queries * heads * width, heads * width, width}, by_y{grad, y.sample, y.token, y.head};
  const Heads<float> by_q{grad_query, grad_query_sample, grad_query_token, grad_query_head},
      by_k{grad_key, grad_key_sample, grad_key_token, grad_key_head},
      by_v{grad_value, grad_value_sample, grad_value_token, grad_value_head};
  parallel_ranges(samples * heads, worthwhile(samples * heads, shape, threads), [&](int64_t begin, int64_t end) {
    const Aligned room(4 * shape.panel() + 2 * BLOCK * shape.pitch);
    float *const keys_of = room.data, *const values_of = keys_of + shape.panel(), *const by_keys = values_of + shape.panel(),
          *const by_values = by_keys + shape.panel(), *const weight = by_values + shape.panel(),
          *const by_score = weight + BLOCK * shape.pitch;
    float own[BLOCK * MOST_WIDTH], by_own[BLOCK * MOST_WIDTH], factor[ROWS];
    for (int r = 0; r < ROWS; ++r) factor[r] = (float)scale;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / heads, h = index % heads;
      pack(shape, k.of(n, h), k.token, -INFINITY, keys_of);
      pack(shape, v.of(n, h), v.token, 0.0f, values_of);
      memset(by_keys, 0, 2 * shape.panel() * sizeof(float));
      for (int64_t first = 0; first < queries; first += BLOCK) {
        const int64_t all = min(BLOCK, queries - first);
        for (int64_t i = 0; i < all; i += ROWS) {
          const int64_t t = first + i, count = min(ROWS, queries - t);
          float most[ROWS] = {}, inverse[ROWS] = {};
          vf mean[ROWS] = {};
          float *const g = by_own + i * MOST_WIDTH, *const by = by_score + i * shape.pitch;
          for (int64_t r = 0; r < count; ++r) {
            const float* const pair = kept + (index * queries + t + r) * 2;
            most[r] = pair[0], inverse[r] = pair[1];
          }
          take_rows(shape, q.of(n, h) + t * q.token, q.token, count, factor, own + i * MOST_WIDTH);
          take_rows(shape, by_y.of(n, h) + t * by_y.token, by_y.token, count, inverse, g);
          for (int64_t r = 0; r < count; ++r)  // in the order of `products`: what one key has all the weight of cancels
            for (int64_t d = 0; d < width; ++d)
              mean[r] = fma(splat(g[r * MOST_WIDTH + d]), splat(y.of(n, h)[(t + r) * y.token + d]), mean[r]);
          products(shape, own + i * MOST_WIDTH, keys_of, weight + i * shape.pitch, [](int, vf) INLINED {});
          products(shape, g, values_of, by, [](int, vf) INLINED {});
          exponentials(shape, most, weight + i * shape.pitch, [&](int r, int64_t j, vf e) INLINED {
            float* const at = by + r * shape.pitch + j;
            store(at, e * (load<vf>(at) - mean[r]));
          });
          sums(shape, by, keys_of, factor, count, by_q.of(n, h) + t * by_q.token, by_q.token);
        }
        accumulate(shape, all, weight, by_own, by_values);
        accumulate(shape, all, by_score, own, by_keys);
      }
      unpack(shape, by_keys, by_k.of(n, h), by_k.token);
      unpack(shape, by_values, by_v.of(n, h), by_v.token);
    }
  });
}

FASTGEN_KERNELS(attention, KERNEL(attention_fwd), KERNEL(attention_bwd))

FASTGEN_END
