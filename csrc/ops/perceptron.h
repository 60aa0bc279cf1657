// perceptron: a fully connected network with ReLU between its layers, forward and backward, a tile of rows through all layers
// at a time. fastgen/ops/perceptron.py has the mathematics.
//
// Activations lie in panels, [columns / PANEL][TILE_ROWS][PANEL], padded with zeros: a panel of 16 KB and the weights that it
// meets, packed to [inputs][PANEL], stay in the first-level cache, a tile of a whole layer in the second. All products go by
// the same register block of ROWS x VECTORS sums, in ascending order of what they sum over, so that a row's result depends
// neither on its tile nor on the threads. Gradients of weights are summed over TASK_TILES tiles at a time, then over those in
// order.
#pragma once
#include "../math.h"
#include "../memory.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

// A register block fills the register file beside a line of vectors and a broadcast.
#if defined(__AVX512F__)
constexpr int ROWS = 12, VECTORS = 2;
#elif defined(__AVX2__)
constexpr int ROWS = 6, VECTORS = 2;
#elif defined(FASTGEN_ONE_LANE)
constexpr int ROWS = 3, VECTORS = 4;
#else
constexpr int ROWS = 6, VECTORS = 4;
#endif
constexpr int64_t PANEL = 32, TILE_ROWS = 128, TASK_TILES = 4;  // on every instruction set
constexpr int64_t BLOCK = VECTORS * LANES;                      // columns of a register block
constexpr int REST = TILE_ROWS % ROWS;                          // a last block of fewer rows
static_assert(REST == PANEL % ROWS && PANEL % BLOCK == 0, "tiles and panels are cut into the same two blocks");
constexpr int MOST_LAYERS = 8, MOST_HEADS = 4;

INLINE int64_t padded(int64_t columns) { return ceil_div(columns, PANEL) * PANEL; }

// total[m][v] += sum over `count` steps k of a[m * Row + k * Step] * b[k][v].
template <int M, int64_t Row, int64_t Step>
INLINE void add_products(int64_t count, const float* a, const float* b, vf (&total)[M][VECTORS]) {
  for (int64_t k = 0; k < count; ++k) {
    vf right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = load<vf>(b + k * PANEL + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf left = splat(a[m * Row + k * Step]);
      for (int v = 0; v < VECTORS; ++v) total[m][v] = fma(left, right[v], total[m][v]);
    }
  }
}

// body(Rows<M>, first) for the register blocks that cover rows [0, count) of `all`, a tile or a panel.
template <int M>
struct Rows {
  static constexpr int count = M;
};
template <class Body>
INLINE void for_row_blocks(int64_t count, int64_t all, Body&& body) {
  for (int64_t r = 0; r < count; r += ROWS)
    if (r + ROWS <= all) body(Rows<ROWS>{}, r);
    else body(Rows<REST>{}, r);
}

// One panel of a product: `finish(start of a line of BLOCK columns, v, sum)` for panel = a * b, with a in panels, of `depth`
// columns, and b packed. The sums start from `start(column)`, and from what lies in `out` where Added.
template <bool Added, class Start, class Finish>
INLINE void panel_product(int64_t count, int64_t depth, const float* a, const float* b, float* out, Start&& start,
                          Finish&& finish) {
  for (int64_t column = 0; column < PANEL; column += BLOCK)
    for_row_blocks(count, TILE_ROWS, [&](auto rows, int64_t r) {
      constexpr int M = decltype(rows)::count;
      vf total[M][VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const vf first = start(column + v * LANES);
        for (int m = 0; m < M; ++m)
          total[m][v] = Added ? first + load<vf>(out + (r + m) * PANEL + column + v * LANES) : first;
      }
      for (int64_t k = 0; k < depth; k += PANEL)
        add_products<M, PANEL, 1>(min(PANEL, depth - k), a + k * TILE_ROWS + r * PANEL, b + k * PANEL + column, total);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < VECTORS; ++v) {
          const int64_t at = (r + m) * PANEL + column + v * LANES;
          store(out + at, finish(at, total[m][v]));
        }
    });
}

// Rows in memory: the first one, and the distance from row to row. Null for rows of zeros.
struct Lines {
  const float* first;
  int64_t pitch;
  Lines from(int64_t row) const { return {first ? first + row * pitch : nullptr, pitch}; }
};

// What the layers are, and their weights packed for one direction. Layer i goes from width[i] to width[i + 1]; the last one is
// all heads side by side. In memory the parameters are weight [out, in], bias [out] of each layer, and of each head.
struct Layers {
  int64_t rows, tiles, count, heads;
  int64_t width[MOST_LAYERS + 1], head[MOST_HEADS];
  int64_t widest = 0;  // padded columns of the widest activation

  Layers(int64_t rows_, int64_t hidden, int64_t heads_, const int64_t* widths) : rows(rows_), count(hidden + 1), heads(heads_) {
    tiles = ceil_div(rows, TILE_ROWS);
    for (int64_t i = 0; i <= hidden; ++i) width[i] = widths[i];
    width[count] = 0;
    for (int64_t i = 0; i < heads; ++i) width[count] += head[i] = widths[hidden + 1 + i];
    for (int64_t i = 0; i <= count; ++i) widest = max(widest, padded(width[i]));
  }
  int64_t rows_of(int64_t tile) const { return min(TILE_ROWS, rows - tile * TILE_ROWS); }
  // multiplications a row
  int64_t work() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += width[i] * width[i + 1];
    return total;
  }
  int64_t worthwhile(int64_t threads) const { return rows * work() < 32 * SERIAL ? 1 : threads; }

  // body(layer, weights, biases, first output, outputs): where the parameters of a layer or head begin in the flat array
  template <class Body>
  INLINE void for_parameters(Body&& body) const {
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t first = 0;
      for (int64_t h = 0; h < (i + 1 < count ? 1 : heads); ++h) {
        const int64_t outputs = i + 1 < count ? width[i + 1] : head[h];
        body(i, at, at + outputs * width[i], first, outputs);
        at += outputs * (width[i] + 1);
        first += outputs;
      }
    }
  }

  // Rows of a tile, [rows, columns] in memory, as panels from `column` on, and back.
  INLINE void read(int64_t tile, const float* from, int64_t columns, int64_t column, float* out) const {
    read_rows(rows_of(tile), Lines{from, columns}.from(tile * TILE_ROWS), columns, column, out);
  }
  INLINE void write(int64_t tile, const float* in, int64_t columns, int64_t column, float* to) const {
    write_rows(rows_of(tile), in, columns, column, to + tile * TILE_ROWS * columns, columns);
  }
  static INLINE void read_rows(int64_t count, Lines from, int64_t columns, int64_t column, float* out) {
    for_pieces(columns, column, [&](int64_t i, int64_t at, int64_t n) INLINED {
      if (from.first)
        for (int64_t r = 0; r < count; ++r)
          block_store(out + at + r * PANEL, block_load(from.first + r * from.pitch + i, n), n);
      else
        for (int64_t r = 0; r < count; ++r) block_store(out + at + r * PANEL, vf{}, n);
    });
  }
  static INLINE void write_rows(int64_t count, const float* in, int64_t columns, int64_t column, float* to, int64_t pitch) {
    for_pieces(columns, column, [&](int64_t i, int64_t at, int64_t n) INLINED {
      for (int64_t r = 0; r < count; ++r) block_store(to + r * pitch + i, block_load(in + at + r * PANEL, n), n);
    });
  }
  // body(i, offset in panels of row 0, n) for pieces of at most a vector that lie in one panel
  template <class Body>
  static INLINE void for_pieces(int64_t columns, int64_t column, Body&& body) {
    for (int64_t i = 0; i < columns;) {
      const int64_t c = column + i, n = min(min((int64_t)LANES, columns - i), PANEL - c % PANEL);
      const int64_t at = c / PANEL * TILE_ROWS * PANEL + c % PANEL;
      if (n == LANES) body(i, at, (int64_t)LANES);
      else body(i, at, n);
      i += n;
    }
  }
};

// Weights by panels of their outputs, [padded outputs / PANEL][inputs][PANEL], and padded biases: for the way forward.
struct ForwardWeights {
  Aligned memory;
  float *weight[MOST_LAYERS], *bias[MOST_LAYERS];
  // Empty where there are no parameters.
  ForwardWeights(const Layers& layers, const float* parameters) : memory(parameters ? size(layers) : 0) {
    if (!parameters) return;
    float* at = memory.data;
    for (int64_t i = 0; i < layers.count; ++i) {
      const int64_t outputs = padded(layers.width[i + 1]), inputs = layers.width[i];
      weight[i] = at, bias[i] = at + outputs * inputs;
      at = bias[i] + outputs;
      for (int64_t n = layers.width[i + 1]; n < outputs; ++n) {
        for (int64_t k = 0; k < inputs; ++k) weight[i][(n / PANEL * inputs + k) * PANEL + n % PANEL] = 0;
        bias[i][n] = 0;
      }
    }
    layers.for_parameters([&](int64_t i, int64_t w, int64_t b, int64_t first, int64_t outputs) {
      const int64_t inputs = layers.width[i];
      // by vectors of outputs where they lie in one of a panel, four inputs at a time
      for (int64_t n = 0; n < outputs;) {
        const int64_t column = first + n;
        const bool whole = column % LANES == 0 && n + LANES <= outputs;
        const float* from = parameters + w + n * inputs;
        float* to = weight[i] + column / PANEL * inputs * PANEL + column % PANEL;
        int64_t k = 0;
        if (whole)
          for (; k + 4 <= inputs; k += 4) {
            vf line[4];
            load_columns4(from + k, inputs, line[0], line[1], line[2], line[3]);
            for (int64_t j = 0; j < 4; ++j) store(to + (k + j) * PANEL, line[j]);
          }
        for (int64_t j = 0; j < (whole ? LANES : 1); ++j, ++n) {
          for (int64_t l = k; l < inputs; ++l) to[l * PANEL + j] = from[j * inputs + l];
          bias[i][column + j] = parameters[b + n];
        }
      }
    });
  }
  static int64_t size(const Layers& layers) {
    int64_t total = 0;
    for (int64_t i = 0; i < layers.count; ++i) total += padded(layers.width[i + 1]) * (layers.width[i] + 1);
    return total;
  }
};

// Weights by panels of their inputs, [padded inputs / PANEL][outputs][PANEL]: for the way back.
struct BackwardWeights {
  Aligned memory;
  float* weight[MOST_LAYERS];
  BackwardWeights(const Layers& layers, const float* parameters) : memory(size(layers)) {
    float* at = memory.data;
    for (int64_t i = 0; i < layers.count; ++i) {
      weight[i] = at;
      at += padded(layers.width[i]) * layers.width[i + 1];
    }
    layers.for_parameters([&](int64_t i, int64_t w, int64_t, int64_t first, int64_t outputs) {
      const int64_t inputs = layers.width[i], all = layers.width[i + 1];
      for (int64_t n = 0; n < outputs; ++n)
        for (int64_t k = 0; k < padded(inputs); k += LANES) {
          float* to = weight[i] + (k / PANEL * all + first + n) * PANEL + k % PANEL;
          const int64_t left = max(0, min(LANES, inputs - k));
          store(to, block_load(parameters + w + n * inputs + k, left));
        }
    });
  }
  static int64_t size(const Layers& layers) {
    int64_t total = 0;
    for (int64_t i = 0; i < layers.count; ++i) total += padded(layers.width[i]) * layers.width[i + 1];
    return total;
  }
};

// x of a tile as panels, saturated.
INLINE void read_input(const Layers& layers, int64_t tile, Lines x, float limit, float* out) {
  Layers::read_rows(layers.rows_of(tile), x.from(tile * TILE_ROWS), layers.width[0], 0, out);
  const int64_t count = layers.rows_of(tile), width = padded(layers.width[0]);
  for (int64_t k = 0; k < width; k += PANEL)
    for (int64_t i = 0; i < count * PANEL; i += LANES) {
      float* at = out + k * TILE_ROWS + i;
      store(at, at_most(at_least(load<vf>(at), -limit), limit));
    }
}

// The hidden layers of a tile, activation[1 .. count - 1], from activation[0].
INLINE void compute_hidden(const Layers& layers, const ForwardWeights& weights, int64_t tile, const float* added,
                           float* const* activation) {
  const int64_t count = layers.rows_of(tile);
  for (int64_t i = 0; i + 1 < layers.count; ++i) {
    const int64_t width = layers.width[i + 1], depth = layers.width[i];
    const bool with_added = added && i == 0;
    float* out = activation[i + 1];
    if (with_added) {
      if (width % PANEL)
        for (int64_t j = 0; j < TILE_ROWS * PANEL; ++j) out[width / PANEL * TILE_ROWS * PANEL + j] = 0;
      layers.read(tile, added, width, 0, out);
    }
    for (int64_t n = 0; n < width; n += PANEL) {
      const auto bias = [&](int64_t column) { return load<vf>(weights.bias[i] + n + column); };
      const auto relu = [](int64_t, vf sum) { return at_least(sum, 0.0f); };
      const float* w = weights.weight[i] + n * depth;
      if (with_added) panel_product<true>(count, depth, activation[i], w, out + n * TILE_ROWS, bias, relu);
      else panel_product<false>(count, depth, activation[i], w, out + n * TILE_ROWS, bias, relu);
    }
  }
}

// The panels of the heads' columns from `first` on, rounded down to whole panels, from the last hidden layer.
INLINE void compute_heads(const Layers& layers, const ForwardWeights& weights, int64_t tile, const float* hidden, int64_t first,
                          float* out) {
  const int64_t last = layers.count - 1, depth = layers.width[last];
  for (int64_t n = first / PANEL * PANEL; n < layers.width[last + 1]; n += PANEL)
    panel_product<false>(
        layers.rows_of(tile), depth, hidden, weights.weight[last] + n * depth, out + n * TILE_ROWS,
        [&](int64_t column) { return load<vf>(weights.bias[last] + n + column); }, [](int64_t, vf sum) { return sum; });
}

// A thread's activations of one tile, and room for two more.
struct Activations {
  Aligned memory;
  float *of[MOST_LAYERS], *spare[2];
  explicit Activations(const Layers& layers) : memory(size(layers)) {
    float* at = memory.data;
    memset(at, 0, size(layers) * sizeof(float));
    for (int64_t i = 0; i < layers.count; ++i) {
      of[i] = at;
      at += TILE_ROWS * padded(layers.width[i]);
    }
    spare[0] = at, spare[1] = at + TILE_ROWS * layers.widest;
  }
  // The hidden layers lie in what is kept for the backward pass instead. Returns the end of that.
  float* take(const Layers& layers, float* hidden, int64_t tile) {
    for (int64_t i = 1; i < layers.count; ++i) {
      of[i] = hidden + tile * TILE_ROWS * padded(layers.width[i]);
      hidden += layers.tiles * TILE_ROWS * padded(layers.width[i]);
    }
    return hidden;
  }
  // The same for the pass that fills it. Rows that nobody writes are zero.
  float* take_empty(const Layers& layers, float* hidden, int64_t tile) {
    float* const end = take(layers, hidden, tile);
    for (int64_t i = 1; i < layers.count && layers.rows_of(tile) < TILE_ROWS; ++i)
      memset(of[i], 0, TILE_ROWS * padded(layers.width[i]) * sizeof(float));
    return end;
  }
  static int64_t size(const Layers& layers) {
    int64_t columns = 2 * layers.widest;
    for (int64_t i = 0; i < layers.count; ++i) columns += padded(layers.width[i]);
    return TILE_ROWS * columns;
  }
};

// added: null, or [rows, width[1]]. hidden: null, or room for the hidden layers, by layers, tiles and panels.
inline void perceptron_fwd(int64_t rows, int64_t hidden_layers, int64_t heads, const int64_t* widths, const float* x,
                           const float* added, const float* parameters, double limit, float* hidden, float* y0, float* y1,
                           float* y2, float* y3, int64_t threads) {
  const Layers layers(rows, hidden_layers, heads, widths);
  const ForwardWeights weights(layers, parameters);
  float* const outputs[MOST_HEADS] = {y0, y1, y2, y3};
  parallel_ranges(layers.tiles, layers.worthwhile(threads), [&](int64_t begin, int64_t end) {
    Activations activation(layers);
    for (int64_t tile = begin; tile < end; ++tile) {
      if (hidden) activation.take_empty(layers, hidden, tile);
      read_input(layers, tile, {x, layers.width[0]}, (float)limit, activation.of[0]);
      compute_hidden(layers, weights, tile, added, activation.of);
      float* out = activation.spare[0];
      compute_heads(layers, weights, tile, activation.of[layers.count - 1], 0, out);
      for (int64_t h = 0, first = 0; h < heads; first += layers.head[h++])
        layers.write(tile, out, layers.head[h], first, outputs[h]);
    }
  });
}

// Sums of the gradients of one task: for each layer [outputs][padded inputs] of the weight, [padded outputs] of the bias.
struct GradientSums {
  int64_t weight[MOST_LAYERS], bias[MOST_LAYERS], size = 0;
  explicit GradientSums(const Layers& layers) {
    for (int64_t i = 0; i < layers.count; ++i) {
      weight[i] = size, bias[i] = size + layers.width[i + 1] * padded(layers.width[i]);
      size = bias[i] + padded(layers.width[i + 1]);
    }
  }
};

// grad [rows, outputs], a [rows, inputs], both panels of one tile, to the sums of a weight and its bias; as them if First
template <bool First>
INLINE void add_weight_gradient(int64_t count, int64_t outputs, int64_t inputs, const float* grad, const float* a,
                                float* weight, float* bias) {
  const int64_t pitch = padded(inputs);
  for (int64_t k = 0; k < pitch; k += BLOCK) {
    const float* right = a + k / PANEL * TILE_ROWS * PANEL + k % PANEL;
    for (int64_t n = 0; n < outputs; n += PANEL)
      for_row_blocks(min(PANEL, outputs - n), PANEL, [&](auto rows, int64_t r) {
        constexpr int M = decltype(rows)::count;
        vf total[M][VECTORS] = {};
        add_products<M, 1, PANEL>(count, grad + n * TILE_ROWS + r, right, total);
        for (int m = 0; m < min(M, outputs - n - r); ++m)
          for (int v = 0; v < VECTORS; ++v) {
            float* at = weight + (n + r + m) * pitch + k + v * LANES;
            store(at, First ? total[m][v] : load<vf>(at) + total[m][v]);
          }
      });
  }
  for (int64_t n = 0; n < padded(outputs); n += BLOCK) {
    vf total[VECTORS] = {};
    const float* from = grad + n / PANEL * TILE_ROWS * PANEL + n % PANEL;
    for (int64_t r = 0; r < count; ++r)
      for (int v = 0; v < VECTORS; ++v) total[v] = total[v] + load<vf>(from + r * PANEL + v * LANES);
    for (int v = 0; v < VECTORS; ++v) {
      float* at = bias + n + v * LANES;
      store(at, First ? total[v] : load<vf>(at) + total[v]);
    }
  }
}

// Gradients of weights, summed task by task.
struct WeightGradients {
  const Layers& layers;
  const GradientSums sums;
  const int64_t tasks;
  float *const out, *const partial;
  // out: null where they are not wanted
  WeightGradients(const Layers& layers_, float* out_)
      : layers(layers_),
        sums(layers_),
        tasks(ceil_div(layers_.tiles, TASK_TILES)),
        out(out_),
        partial(out_ ? new float[tasks * sums.size + 1] : nullptr) {}
  WeightGradients(const WeightGradients&) = delete;
  ~WeightGradients() { delete[] partial; }

  // those of layer i from a tile's gradient in what the layer puts out, and what goes into it
  INLINE void add(int64_t tile, int64_t i, const float* grad, const float* a) const {
    if (!partial) return;
    float* own = partial + tile / TASK_TILES * sums.size;
    const int64_t count = layers.rows_of(tile), outputs = layers.width[i + 1], inputs = layers.width[i];
    if (tile % TASK_TILES == 0)
      add_weight_gradient<true>(count, outputs, inputs, grad, a, own + sums.weight[i], own + sums.bias[i]);
    else add_weight_gradient<false>(count, outputs, inputs, grad, a, own + sums.weight[i], own + sums.bias[i]);
  }
  void finish(int64_t threads) const {
    if (!partial) return;
    layers.for_parameters([&](int64_t i, int64_t w, int64_t b, int64_t first, int64_t outputs) {
      const int64_t inputs = layers.width[i], pitch = padded(inputs);
      const auto reduce = [&](int64_t from, int64_t length, float* to) {
        for_blocks(length, [&](int64_t j, int64_t n) {
          vf total{};
          for (int64_t task = 0; task < tasks; ++task) total = total + block_load(partial + task * sums.size + from + j, n);
          block_store(to + j, total, n);
        });
      };
      parallel_for(outputs, tasks * outputs * inputs < 4 * SERIAL ? 1 : threads, [&](int64_t n) {
        reduce(sums.weight[i] + (first + n) * pitch, inputs, out + w + n * inputs);
      });
      reduce(sums.bias[i] + first, outputs, out + b);
    });
  }
};

// The gradient in the heads of a tile, which are read next, is zero in the padding.
INLINE void clear_padding(const Layers& layers, float* grad) {
  const int64_t outputs = layers.width[layers.count];
  if (outputs % PANEL)
    for (int64_t j = 0; j < TILE_ROWS * PANEL; ++j) grad[outputs / PANEL * TILE_ROWS * PANEL + j] = 0;
}

// From the gradient in the heads of a tile, panels in spare[0], those in all weights, in what was added, and in x, whose panels
// are returned. `by_x`: whether that one is wanted. activation.of[0] is overwritten.
INLINE const float* propagate(const Layers& layers, const BackwardWeights& backward, const WeightGradients& weights,
                              int64_t tile, Activations& activation, Lines x, float limit, bool by_x, float* grad_added) {
  const int64_t count = layers.rows_of(tile);
  const bool unlimited = limit == INFINITY;  // then a NaN in x lets its gradient pass, as it does in PyTorch
  float *grad = activation.spare[0], *next = activation.spare[1];
  for (int64_t i = layers.count; i-- > 0;) {
    const float* a = activation.of[i];
    const int64_t depth = layers.width[i + 1], width = layers.width[i];
    weights.add(tile, i, grad, a);
    if (i == 0 && grad_added) layers.write(tile, grad, depth, 0, grad_added);
    if (i == 0 && !by_x) continue;
    if (i == 0) Layers::read_rows(count, x.from(tile * TILE_ROWS), width, 0, activation.of[0]);  // as before it saturated
    for (int64_t k = 0; k < width; k += PANEL) {
      const float* before = a + k * TILE_ROWS;
      const auto product = [&](auto&& finish) INLINED {
        panel_product<false>(
            count, depth, grad, backward.weight[i] + k * depth, next + k * TILE_ROWS, [](int64_t) { return vf{}; }, finish);
      };
      if (i == 0 && unlimited) product([](int64_t, vf sum) { return sum; });
      else if (i == 0) product([&](int64_t at, vf sum) { return abs(load<vf>(before + at)) <= splat(limit) ? sum : vf{}; });
      else  // a NaN lets its gradient pass, as PyTorch's does
        product([&](int64_t at, vf sum) { return load<vf>(before + at) <= 0.0f ? vf{} : sum; });
    }
    float* const done = grad;
    grad = next, next = done;
  }
  return grad;
}

// A gradient of an output may be null: none came from it. So may be grad_x, grad_added and grad_parameters: not wanted. hidden:
// null, or what the forward pass left there.
inline void perceptron_bwd(int64_t rows, int64_t hidden_layers, int64_t heads, const int64_t* widths, const float* x,
                           const float* added, const float* parameters, double limit, float* hidden, const float* grad0,
                           const float* grad1, const float* grad2, const float* grad3, float* grad_x, float* grad_added,
                           float* grad_parameters, int64_t threads) {
  const Layers layers(rows, hidden_layers, heads, widths);
  const ForwardWeights forward(layers, hidden ? nullptr : parameters);
  const BackwardWeights backward(layers, parameters);
  const WeightGradients weights(layers, grad_parameters);
  const float* const grads[MOST_HEADS] = {grad0, grad1, grad2, grad3};
  const Lines input{x, layers.width[0]};
  parallel_ranges(weights.tasks, layers.worthwhile(threads), [&](int64_t begin, int64_t end) {
    Activations activation(layers);
    for (int64_t tile = begin * TASK_TILES; tile < min(layers.tiles, end * TASK_TILES); ++tile) {
      read_input(layers, tile, input, (float)limit, activation.of[0]);
      if (hidden) activation.take(layers, hidden, tile);
      else compute_hidden(layers, forward, tile, added, activation.of);
      clear_padding(layers, activation.spare[0]);
      for (int64_t h = 0, first = 0; h < heads; first += layers.head[h++])
        layers.read(tile, grads[h], layers.head[h], first, activation.spare[0]);
      const float* by_x =
          propagate(layers, backward, weights, tile, activation, input, (float)limit, grad_x != nullptr, grad_added);
      if (grad_x) layers.write(tile, by_x, layers.width[0], 0, grad_x);
    }
  });
  weights.finish(threads);
}

FASTGEN_KERNELS(perceptron, KERNEL(perceptron_fwd), KERNEL(perceptron_bwd))

FASTGEN_END
