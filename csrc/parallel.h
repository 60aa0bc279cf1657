// Work sharing. The cut into tasks depends on the shapes alone, never on the number of threads, and every reduction has
// a fixed order: results do not depend on how many threads ran.
#pragma once
#include "simd.h"

FASTGEN_BEGIN

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(task) for every task, shared by at most `threads` threads. What a thread has streamed is drained once, at its end: to
// wait for memory after every tile costs some percent.
template <class Body>
inline void parallel_for(int64_t tasks, int64_t threads, Body&& body) {
  threads = min(threads, tasks);
  (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) if (threads > 1)
#endif
  {
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
    for (int64_t task = 0; task < tasks; ++task) body(task);
    drain_stores();
  }
}

// The same for tasks of uneven length: a thread takes the next one when it is done.
template <class Body>
inline void parallel_uneven(int64_t tasks, int64_t threads, Body&& body) {
  threads = min(threads, tasks);
  (void)threads;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) if (threads > 1)
#endif
  {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) nowait
#endif
    for (int64_t task = 0; task < tasks; ++task) body(task);
    drain_stores();
  }
}

// body(first, end) for one range of tasks a thread: for work that sets something up once.
template <class Body>
inline void parallel_ranges(int64_t tasks, int64_t threads, Body&& body) {
  threads = max(1, min(threads, tasks));
  parallel_for(threads, threads, [&](int64_t i) { body(tasks * i / threads, tasks * (i + 1) / threads); });
}

// Elements that one task handles: the noise of a tile (8 KB) stays in the first-level cache beside its operands.
constexpr int64_t TILE = 2048;
// Below this many elements in all, waking a second thread costs more than it saves.
constexpr int64_t SERIAL = 16384;

// A tile: `rows` whole rows, or, where a row is longer than TILE, elements [begin, begin + count) of one row.
struct Tile {
  int64_t row, rows, begin, count, part;
};

// How [rows, event] is cut: into parts of rows (parts > 1) or into groups of whole rows. Ops that spend much more on an element
// than a few arithmetic operations take smaller tiles of `size` elements, and wake a second thread earlier.
struct Tiling {
  int64_t rows, event, size, parts, group, tiles;
  Tiling(int64_t rows_, int64_t event_, int64_t size_ = TILE) : rows(rows_), event(event_), size(size_) {
    parts = max(1, ceil_div(event, size));
    group = parts > 1 ? 1 : max(1, size / max(1, event));
    tiles = parts > 1 ? rows * parts : ceil_div(rows, group);
  }
  Tile tile(int64_t index) const {
    if (parts > 1) {
      const int64_t row = index / parts, part = index % parts, begin = part * size;
      return {row, 1, begin, min(size, event - begin), part};
    }
    return {index * group, min(group, rows - index * group), 0, event, 0};
  }
  // body(tile) for all tiles. Neighbouring tiles go to one thread.
  template <class Body>
  void run(int64_t threads, Body&& body) const {
    const int64_t batch = max(1, 8192 / TILE);  // amortises the loop of the thread pool
    const int64_t tasks = ceil_div(tiles, batch);
    parallel_for(tasks, rows * event * (TILE / size) < SERIAL ? 1 : threads, [&](int64_t task) {
      for (int64_t i = task * batch; i < min(tiles, (task + 1) * batch); ++i) body(tile(i));
    });
  }
};

// One float32 sum per row. A row longer than a tile leaves one partial sum per part; they are added up in order, in float64.
struct RowSums {
  const Tiling& tiling;
  float* out;
  double* partial;
  RowSums(const Tiling& tiling_, float* out_)
      : tiling(tiling_), out(out_), partial(tiling_.parts > 1 ? new double[tiling_.rows * tiling_.parts] : nullptr) {}
  RowSums(const RowSums&) = delete;
  ~RowSums() { delete[] partial; }
  // the sum over row r of a tile, counted from the tile's first
  void put(const Tile& tile, int64_t r, float value) {
    if (partial) partial[tile.row * tiling.parts + tile.part] = value;
    else out[tile.row + r] = value;
  }
  void finish() {
    if (!partial) return;
    for (int64_t row = 0; row < tiling.rows; ++row) {
      double total = 0;
      for (int64_t part = 0; part < tiling.parts; ++part) total += partial[row * tiling.parts + part];
      out[row] = (float)total;
    }
  }
};

FASTGEN_END
