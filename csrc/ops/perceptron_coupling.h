// perceptron_coupling: an affine coupling whose conditioner is a perceptron, forward and backward, a tile of rows through all
// of it at a time. fastgen/ops/perceptron_coupling.py has the mathematics.
//
// The network's part is that of perceptron.h, the elementwise part that of affine_coupling.h, on a tile's rows in the cache.
#pragma once
#include "affine_coupling.h"
#include "perceptron.h"

FASTGEN_BEGIN

// Where the two parts of a row lie, the one that stays and the one that moves.
struct Parts {
  int64_t stays, moves, row, stays_at, moves_at;
  Parts(const Layers& layers, int64_t flip)
      : stays(layers.width[0]),
        moves(layers.head[0]),
        row(stays + moves),
        stays_at(flip ? moves : 0),
        moves_at(flip ? 0 : stays) {}
  Lines staying(const float* x) const { return {x + stays_at, row}; }
};

// to[r][i] = from[r][i] for `count` rows, plus what lies there where Added.
template <bool Added = false>
INLINE void copy_rows(int64_t count, int64_t columns, Lines from, float* to, int64_t pitch) {
  for_blocks(columns, [&](int64_t i, int64_t n) INLINED {
    for (int64_t r = 0; r < count; ++r) {
      float* at = to + r * pitch + i;
      const vf value = block_load(from.first + r * from.pitch + i, n);
      block_store(at, Added ? block_load(at, n) + value : value, n);
    }
  });
}

// The moving part of a tile, what the network says of it, and the gradients: [rows][moves] each, dense.
struct Moving {
  Aligned memory;
  float *x, *shift, *log_scale, *y, *grad_y, *grad_x, *grad_shift, *grad_log_scale;
  explicit Moving(int64_t moves) : memory(8 * size(moves)) {
    float** const parts[8] = {&x, &shift, &log_scale, &y, &grad_y, &grad_x, &grad_shift, &grad_log_scale};
    for (int64_t i = 0; i < 8; ++i) *parts[i] = memory.data + i * size(moves);
  }
  static int64_t size(int64_t moves) { return ceil_div(TILE_ROWS * moves, 16) * 16; }
};

// added: null, or [rows, width[1]]. hidden: null, or room for the hidden layers and the heads, by layers, tiles and panels.
inline void perceptron_coupling_fwd(int64_t rows, int64_t hidden_layers, const int64_t* widths, int64_t flip, const float* x,
                                    const float* added, const float* parameters, double limit, float* hidden, float* y,
                                    float* log_det, int64_t bound, int64_t inverse, int64_t threads) {
  const Layers layers(rows, hidden_layers, 2, widths);
  const ForwardWeights weights(layers, parameters);
  const Parts parts(layers, flip);
  parallel_ranges(layers.tiles, layers.worthwhile(threads), [&](int64_t begin, int64_t end) {
    Activations activation(layers);
    Moving moving(parts.moves);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t count = layers.rows_of(tile), row = tile * TILE_ROWS;
      float* heads = activation.spare[0];
      if (hidden) {
        const int64_t size = TILE_ROWS * padded(layers.width[layers.count]);
        heads = activation.take_empty(layers, hidden, tile) + tile * size;
        if (count < TILE_ROWS) memset(heads, 0, size * sizeof(float));
      }
      read_input(layers, tile, parts.staying(x), (float)limit, activation.of[0]);
      compute_hidden(layers, weights, tile, added, activation.of);
      compute_heads(layers, weights, tile, activation.of[layers.count - 1], 0, heads);
      Layers::write_rows(count, heads, parts.moves, 0, moving.shift, parts.moves);
      Layers::write_rows(count, heads, parts.moves, parts.moves, moving.log_scale, parts.moves);
      const Lines from{x + row * parts.row, parts.row};
      float* to = y + row * parts.row;
      copy_rows(count, parts.stays, {from.first + parts.stays_at, from.pitch}, to + parts.stays_at, parts.row);
      copy_rows(count, parts.moves, {from.first + parts.moves_at, from.pitch}, moving.x, parts.moves);
      with_bound(bound, inverse, [&](auto choice) {
        using C = decltype(choice);
        affine_coupling_fwd_as<float, C::bound, C::inverse>(count, parts.moves, moving.x, moving.shift, moving.log_scale,
                                                            moving.y, log_det + row, 1);
      });
      copy_rows(count, parts.moves, {moving.y, parts.moves}, to + parts.moves_at, parts.row);
    }
  });
}

// One step of backpropagation. `x`: the input of the coupling, or its output: the part that stays is the same. differentiate(
// row, count, moving) goes from the moving part of `count` rows and its gradient to the gradients in x and in both heads. Those
// given back are null where they are not wanted; grad_y is null where there is none.
template <class Differentiate>
inline void perceptron_coupling_gradients(int64_t rows, int64_t hidden_layers, const int64_t* widths, int64_t flip,
                                          const float* x, const float* added, const float* parameters, double limit,
                                          float* hidden, bool shifted, const float* grad_y, float* rebuilt, float* grad_x,
                                          float* grad_added, float* grad_parameters, int64_t threads,
                                          Differentiate&& differentiate) {
  const Layers layers(rows, hidden_layers, 2, widths);
  const ForwardWeights forward(layers, hidden ? nullptr : parameters);
  const BackwardWeights backward(layers, parameters);
  const WeightGradients weights(layers, grad_parameters);
  const Parts parts(layers, flip);
  const int64_t moves = parts.moves;
  parallel_ranges(weights.tasks, layers.worthwhile(threads), [&](int64_t begin, int64_t end) {
    Activations activation(layers);
    Moving moving(moves);
    for (int64_t tile = begin * TASK_TILES; tile < min(layers.tiles, end * TASK_TILES); ++tile) {
      const int64_t count = layers.rows_of(tile), row = tile * TILE_ROWS, start = row * parts.row;
      float *heads = activation.spare[0], *grad = heads;
      read_input(layers, tile, parts.staying(x), (float)limit, activation.of[0]);
      if (hidden) heads = activation.take(layers, hidden, tile) + tile * TILE_ROWS * padded(layers.width[layers.count]);
      else {
        compute_hidden(layers, forward, tile, added, activation.of);
        compute_heads(layers, forward, tile, activation.of[layers.count - 1], shifted ? 0 : moves, heads);
      }
      if (shifted) Layers::write_rows(count, heads, moves, 0, moving.shift, moves);
      Layers::write_rows(count, heads, moves, moves, moving.log_scale, moves);
      copy_rows(count, moves, {x + start + parts.moves_at, parts.row}, moving.x, moves);
      if (grad_y) copy_rows(count, moves, {grad_y + start + parts.moves_at, parts.row}, moving.grad_y, moves);
      differentiate(row, count, moving);
      clear_padding(layers, grad);
      Layers::read_rows(count, {moving.grad_shift, moves}, moves, 0, grad);
      Layers::read_rows(count, {moving.grad_log_scale, moves}, moves, moves, grad);
      const float* by_x = propagate(layers, backward, weights, tile, activation, parts.staying(x), (float)limit,
                                    grad_x != nullptr, grad_added);
      if (grad_x) {
        float *to = grad_x + start, *staying = to + parts.stays_at;
        copy_rows(count, moves, {moving.grad_x, moves}, to + parts.moves_at, parts.row);
        Layers::write_rows(count, by_x, parts.stays, 0, staying, parts.row);
        if (grad_y) copy_rows<true>(count, parts.stays, {grad_y + start + parts.stays_at, parts.row}, staying, parts.row);
      }
      if (rebuilt) {
        copy_rows(count, parts.stays, parts.staying(x).from(row), rebuilt + start + parts.stays_at, parts.row);
        copy_rows(count, moves, {moving.y, moves}, rebuilt + start + parts.moves_at, parts.row);
      }
    }
  });
  weights.finish(threads);
}

// grad_y or grad_log_det may be null: no gradient came from that output. So may be the gradients: not wanted. hidden: null, or
// what the forward pass left there.
inline void perceptron_coupling_bwd(int64_t rows, int64_t hidden_layers, const int64_t* widths, int64_t flip, const float* x,
                                    const float* added, const float* parameters, double limit, float* hidden,
                                    const float* grad_y, const float* grad_log_det, float* grad_x, float* grad_added,
                                    float* grad_parameters, int64_t bound, int64_t inverse, int64_t threads) {
  const auto differentiate = [&](int64_t row, int64_t count, const Moving& moving) {
    const float *by_y = grad_y ? moving.grad_y : nullptr, *by_log_det = grad_log_det ? grad_log_det + row : nullptr;
    const int64_t moves = widths[hidden_layers + 1];
    with_bound(bound, inverse, [&](auto choice) {
      using C = decltype(choice);
      affine_coupling_bwd_as<float, C::bound, C::inverse>(count, moves, moving.x, moving.shift, moving.log_scale, by_y,
                                                          by_log_det, moving.grad_x, moving.grad_shift,
                                                          moving.grad_log_scale, 1);
    });
    if (inverse) return;
    for (int64_t i = 0; i < count * moves; ++i) moving.grad_shift[i] = by_y ? by_y[i] : 0.0f;
  };
  perceptron_coupling_gradients(rows, hidden_layers, widths, flip, x, added, parameters, limit, hidden, inverse != 0, grad_y,
                                nullptr, grad_x, grad_added, grad_parameters, threads, differentiate);
}

FASTGEN_KERNELS(perceptron_coupling, KERNEL(perceptron_coupling_fwd), KERNEL(perceptron_coupling_bwd))

FASTGEN_END
