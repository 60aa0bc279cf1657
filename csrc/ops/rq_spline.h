// rq_spline: the monotonic rational-quadratic spline, its logarithmic derivative summed over the row, and the inverse of both.
// fastgen/ops/rq_spline.py has the mathematics and the names. A vector holds LANES elements; their parameters, which stand
// side by side in memory, are transposed on the way in, and the gradients on the way out.
#pragma once
#include "../math.h"
#include "../parallel.h"
#include "../unit.h"

FASTGEN_BEGIN

struct Spline {
  int64_t bins;
  float bound;
  bool inverse;
};

constexpr float LEAST = 1e-3f;               // nflows: least width and height as a share of the whole, and least derivative
constexpr float UNIT_SLOPE = 0.539742417f;   // nflows: the parameter of derivative 1, log(exp(1 - LEAST) - 1)
constexpr float SOFT_CLIP = 0.144764827f;    // zuko: -1 / log(1e-3)

// Columns of a matrix of LANES rows. N columns if the compiler knows, else `columns`.
template <int N>
INLINE void load_columns(const float* p, int64_t columns, vf* out) {
  const int64_t n = N ? N : columns;
  if (n < 4) {
    for (int64_t k = 0; k < n; ++k) {
      float lane[LANES];
      for (int64_t i = 0; i < LANES; ++i) lane[i] = p[i * n + k];
      out[k] = load<vf>(lane);
    }
    return;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k += 4) {
    const int64_t at = min(k, n - 4);  // the last four may be read twice
    load_columns4(p + at, n, out[at], out[at + 1], out[at + 2], out[at + 3]);
  }
}
template <int N>
INLINE void store_columns(float* p, int64_t columns, const vf* values) {
  const int64_t n = N ? N : columns;
  if (n < 4) {
    for (int64_t k = 0; k < n; ++k) {
      float lane[LANES];
      store(lane, values[k]);
      for (int64_t i = 0; i < LANES; ++i) p[i * n + k] = lane[i];
    }
    return;
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < n; k += 4) {
    const int64_t at = min(k, n - 4);
    store_columns4(p + at, n, values[at], values[at + 1], values[at + 2], values[at + 3]);
  }
}

// e^x for |x| <= 80; NaN stays NaN. The relative error is 1e-7, and 1.3e-8 |x|.
template <int V>
INLINE void exp_within(const vf* x, vf* e) {
  if constexpr (LANES == 1) return exp_bounded<V>(x, e);  // without fused operations it would be worse
  const vf magic = splat(12582912.0f), rate = splat(1.44269504f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n[V], f[V], p[V];
  for (int k = 0; k < V; ++k) n[k] = pinned(fma(x[k], rate, magic));
  for (int k = 0; k < V; ++k) n[k] = pinned(n[k] - magic);
  for (int k = 0; k < V; ++k) f[k] = pinned(fma(x[k], rate, -n[k]));
  polynomial<V>(EXP2_COEFFICIENTS, f, p);
  for (int k = 0; k < V; ++k) {
#if defined(__AVX512F__)
    e[k] = times_power_of_2(p[k], n[k]);
#else
    e[k] = p[k] * bits<vf>(bits<vu>(to_int(n[k]) + 127) << 23);
#endif
  }
}

// log x of positive normal numbers; infinite and NaN stay so.
INLINE vf log_of_positive(vf x) {
  const vi k = bits<vi>(bits<vu>(x) - SQRT_HALF) >> 23;
  const vf f = bits<vf>(bits<vu>(x) - (bits<vu>(k) << 23)) - 1.0f;
  const vf y = log_of_parts(f, k);
  return x < INFINITY ? y : x;
}

// log(1 + x) for x in [0, 1].
INLINE vf log1p_of_share(vf x) {
  const auto upper = x > 0.41421354f;
  return log_of_parts(upper ? fma(x, splat(0.5f), splat(-0.5f)) : x, upper ? splat_i(1) : splat_i(0));
}

// The larger of |a| and |b|; |a| or |b| where the other is NaN, on some machines.
INLINE vf larger_magnitude(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_range_ps((__mmask16)-1, (__m512)a, (__m512)b, 11);
#else
  return larger(abs(a), abs(b));
#endif
}

// The exponentials behind a softmax and the reciprocal of their sum. zuko clips the parameters softly: `clip`, where it is
// wanted, gets the factors.
template <int BINS, bool Zuko>
INLINE vf exponentials(const float* p, int64_t bins, vf* e, vf* clip) {
  const int64_t n = BINS ? BINS : bins;
  load_columns<BINS>(p, bins, e);
  if constexpr (!Zuko) {
    vf furthest{};
#pragma GCC unroll 8
    for (int64_t k = 0; k < n; ++k) furthest = larger_magnitude(furthest, e[k]);
    const auto far = furthest > 60.0f;
    if (any(far)) {  // there alone: subtracting the largest rounds
      vf most = e[0];
      for (int64_t k = 1; k < n; ++k) most = larger(most, e[k]);
      for (int64_t k = 0; k < n; ++k) e[k] = far ? at_least(e[k] - most, -80.0f) : e[k];
    }
  }
  constexpr int STEP_OF_BINS = BINS % 4 == 0 && BINS ? 4 : 1;
  vf total{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < n; k += STEP_OF_BINS) {
    if constexpr (Zuko)
      for (int j = 0; j < STEP_OF_BINS; ++j) {
        const vf factor = reciprocal(fma(abs(e[k + j]), splat(2.0f * SOFT_CLIP), splat(1.0f)));
        if (clip) clip[k + j] = factor;
        e[k + j] = e[k + j] * factor;
      }
    exp_within<STEP_OF_BINS>(e + k, e + k);
    for (int j = 0; j < STEP_OF_BINS; ++j) total = total + e[k + j];
  }
  return reciprocal(total);
}

// The bin that an element falls in: along the axis that is searched and along the other one, where it begins and how far it
// goes; the parameters of the derivatives at its ends; its index.
struct Bin {
  vf from, length, other_from, other_length, first, second, index;
  vi last;
};

// Knots are compared with x while they are added up; whatever belongs to the last knot not above x stays selected.
template <int BINS, bool Zuko>
INLINE Bin find(const Spline& s, vf x, const vf* e, vf inverse, const vf* other, vf other_inverse, const vf* u) {
  const int64_t n = BINS ? BINS : s.bins;
  const vf edge = splat(Zuko ? 0.0f : UNIT_SLOPE);
  const vf step = splat(Zuko ? 0.0f : 2.0f * s.bound * LEAST), start = splat(-s.bound);
  const float share = Zuko ? 2.0f * s.bound : 2.0f * s.bound * (1.0f - LEAST * (float)n);
  const vf scale = inverse * share, other_scale = other_inverse * share;
  Bin bin{start, fma(e[0], scale, step), start, fma(other[0], other_scale, step), edge, n > 1 ? u[0] : edge, vf{}, vi{}};
  vf knot = bin.from + bin.length, other_knot = bin.other_from + bin.other_length;
  vf lost{}, other_lost{};
  if (n == 1) bin.last = bin.last == 0;
#pragma GCC unroll 8
  for (int64_t k = 1; k < n; ++k) {
    const vf length = fma(e[k], scale, step), other_length = fma(other[k], other_scale, step);
    const vi reached = Zuko ? knot < x : knot <= x;
    bin.from = reached ? knot : bin.from;
    bin.length = reached ? length : bin.length;
    bin.other_from = reached ? other_knot : bin.other_from;
    bin.other_length = reached ? other_length : bin.other_length;
    bin.first = reached ? u[k - 1] : bin.first;
    bin.second = reached ? (k + 1 < n ? u[k] : edge) : bin.second;
    bin.index = reached ? splat((float)k) : bin.index;
    if (k + 1 == n) bin.last = reached;
    if constexpr (BINS == 4 || BINS == 8) {
      knot = knot + length;
      other_knot = other_knot + other_length;
    } else {  // many roundings add up: carry on what is lost (Kahan)
      const vf more = length - lost, other_more = other_length - other_lost;
      const vf next = knot + more, other_next = other_knot + other_more;
      lost = (next - knot) - more;
      other_lost = (other_next - other_knot) - other_more;
      knot = next;
      other_knot = other_next;
    }
  }
  return bin;
}

// Derivatives of V parameters; `slope`, where it is wanted, gets d derivative / d parameter.
template <bool Zuko, int V>
INLINE void derivatives_of(const vf* u, vf* d, vf* slope) {
  vf e[V];
  if constexpr (Zuko) {
    vf factor[V];
    for (int k = 0; k < V; ++k) factor[k] = reciprocal(fma(abs(u[k]), splat(SOFT_CLIP), splat(1.0f)));
    for (int k = 0; k < V; ++k) e[k] = u[k] * factor[k];
    exp_within<V>(e, d);
    for (int k = 0; slope && k < V; ++k) slope[k] = d[k] * factor[k] * factor[k];
  } else {
    for (int k = 0; k < V; ++k) e[k] = -at_most(abs(u[k]), 80.0f);
    exp_within<V>(e, e);
    for (int k = 0; k < V; ++k) d[k] = LEAST + ((u[k] < 0.0f ? splat(0.0f) : u[k]) + log1p_of_share(e[k]));
    for (int k = 0; slope && k < V; ++k) slope[k] = (u[k] < 0.0f ? e[k] : splat(1.0f)) * reciprocal(1.0f + e[k]);
  }
}

// An element within its bin. theta + phi = 1; numerator + rest = denominator; every term is positive, so that nothing cancels.
struct Point {
  vf width, height, slope, d0, d1, theta, phi, numerator, rest, per_denominator, curve;
  vf out, derivative;  // of the spline, whichever way it was asked for
};

// V of them, whose derivatives are known, in step: one alone would wait for its own divisions.
template <int V>
INLINE void locate(const Spline& s, const vf* x, const Bin* bins, Point* points) {
  for (int k = 0; k < V; ++k) {
    Point& p = points[k];
    const Bin& bin = bins[k];
    p.width = s.inverse ? bin.other_length : bin.length;
    p.height = s.inverse ? bin.length : bin.other_length;
    p.slope = p.height / p.width;
    // the last bin is measured from its end, which is at the bound exactly
    const vf part = (bin.last ? s.bound - x[k] : x[k] - bin.from) / bin.length;
    const vf near = part < 0.0f ? splat(0.0f) : part > 1.0f ? splat(1.0f) : part, far = 1.0f - near;
    p.theta = bin.last ? far : near;
    p.phi = bin.last ? near : far;
  }
  for (int k = 0; s.inverse && k < V; ++k) {
    Point& p = points[k];
    const vf begin = p.d0 * p.phi, end = p.d1 * p.theta, twice = 2.0f * p.slope;
    const vf difference = begin - end;
    const vf root = sqrt(fma(difference, difference, twice * twice * p.theta * p.phi)) + abs(difference);
    const vi rising = difference < 0.0f;
    const vf small = twice * (rising ? p.phi : p.theta);
    const vf per_sum = 1.0f / (root + small), major = root * per_sum, minor = small * per_sum;
    p.theta = rising ? major : minor;
    p.phi = rising ? minor : major;
  }
  for (int k = 0; k < V; ++k) {
    Point& p = points[k];
    const vf q = p.theta * p.phi, theta2 = p.theta * p.theta, phi2 = p.phi * p.phi;
    p.numerator = fma(p.slope, theta2, p.d0 * q);
    p.rest = fma(p.slope, phi2, p.d1 * q);
    p.per_denominator = 1.0f / (p.numerator + p.rest);
    p.curve = fma(p.d1, theta2, fma(p.d0, phi2, 2.0f * p.slope * q));
  }
  for (int k = 0; k < V; ++k) {
    Point& p = points[k];
    const Bin& bin = bins[k];
    const vf ratio = p.slope * p.per_denominator;
    p.derivative = p.curve * ratio * ratio;
    const vf length = bin.other_length;
    const vf share = s.inverse ? p.theta : p.numerator * p.per_denominator;
    const vf missing = s.inverse ? p.phi : p.rest * p.per_denominator;
    p.out = bin.last ? s.bound - length * missing : fma(length, share, bin.other_from);
  }
}

template <bool Zuko>
INLINE vi outside(const Spline& s, vf x) {
  return Zuko ? (x <= -s.bound) | (x > s.bound) : (x < -s.bound) | (x > s.bound);
}

template <int V>
struct Together {
  static constexpr int value = V;
};
// body(block, Together<V>) for blocks [block, block + V): two as long as there are two.
template <class Body>
INLINE void in_pairs(int64_t blocks, Body&& body) {
  int64_t block = 0;
  for (; block + 2 <= blocks; block += 2) body(block, Together<2>{});
  if (block < blocks) body(block, Together<1>{});
}

// Storage of n vectors: in registers or on the stack where the compiler knows their number, else in `scratch`.
#define VECTORS(name, n, scratch) \
  vf name##_[BINS ? n : 1];       \
  vf* const name = BINS ? name##_ : scratch

// The bins of the LANES elements x.
template <int BINS, bool Zuko>
INLINE Bin bin_of(const Spline& s, vf x, const float* searched, const float* followed, const float* derivatives, vf* scratch) {
  const int64_t n = BINS ? BINS : s.bins;
  VECTORS(e, BINS, scratch);
  VECTORS(other, BINS, scratch + n);
  VECTORS(u, BINS, scratch + 2 * n);
  const vf inverse = exponentials<BINS, Zuko>(searched, n, e, nullptr);
  const vf other_inverse = exponentials<BINS, Zuko>(followed, n, other, nullptr);
  load_columns<BINS ? BINS - 1 : 0>(derivatives, n - 1, u);
  return find<BINS, Zuko>(s, x, e, inverse, other, other_inverse, u);
}

// `blocks` times LANES elements.
template <int BINS, bool Zuko>
static void rq_spline_fwd_blocks(int64_t blocks, const Spline& s, const float* x, const float* widths, const float* heights,
                                 const float* derivatives, float* y, float* log_det, vf* scratch) {
  const int64_t n = BINS ? BINS : s.bins;
  const float* searched = s.inverse ? heights : widths;
  const float* followed = s.inverse ? widths : heights;
  in_pairs(blocks, [&](int64_t block, auto width) INLINED {
    constexpr int V = decltype(width)::value;
    const int64_t first = block * LANES;
    vf given[V], u[2 * V], d[2 * V];
    Bin bins[V];
    Point p[V];
    for (int k = 0; k < V; ++k) {
      const int64_t i = first + k * LANES;
      given[k] = load<vf>(x + i);
      bins[k] = bin_of<BINS, Zuko>(s, given[k], searched + i * n, followed + i * n, derivatives + i * (n - 1), scratch);
      u[2 * k] = bins[k].first, u[2 * k + 1] = bins[k].second;
    }
    derivatives_of<Zuko, 2 * V>(u, d, nullptr);
    for (int k = 0; k < V; ++k) p[k].d0 = d[2 * k], p[k].d1 = d[2 * k + 1];
    locate<V>(s, given, bins, p);
    for (int k = 0; k < V; ++k) {
      const vi tail = outside<Zuko>(s, given[k]);
      const vf slope = log_of_positive(p[k].derivative);
      store(y + first + k * LANES, tail ? given[k] : p[k].out);
      store(log_det + first + k * LANES, tail ? vf{} : s.inverse ? -slope : slope);
    }
  });
}

// grad_log_det holds the gradient of its row for every element. With Rebuild, x is the output of the spline, whose input goes to
// `rebuilt`; the gradients are those of the spline there, although s.inverse is how it is found.
template <int BINS, bool Zuko, bool Rebuild>
static void rq_spline_bwd_blocks(int64_t blocks, const Spline& s, const float* x, const float* widths, const float* heights,
                                 const float* derivatives, const float* grad_y, const float* grad_log_det, float* rebuilt,
                                 float* grad_x, float* grad_widths, float* grad_heights, float* grad_derivatives, vf* scratch) {
  const int64_t n = BINS ? BINS : s.bins;
  const vf step = splat(Zuko ? 0.0f : 2.0f * s.bound * LEAST);
  const float share = Zuko ? 2.0f * s.bound : 2.0f * s.bound * (1.0f - LEAST * (float)n);
  const float* searched = s.inverse ? heights : widths;
  const float* followed = s.inverse ? widths : heights;
  float* const grad_searched = s.inverse ? grad_heights : grad_widths;
  float* const grad_followed = s.inverse ? grad_widths : grad_heights;
  for (int64_t i = 0; i < blocks * LANES; i += LANES) {
    VECTORS(e, BINS, scratch);
    VECTORS(other, BINS, scratch + n);
    VECTORS(u, BINS, scratch + 2 * n);
    VECTORS(clip, BINS, scratch + 3 * n);
    VECTORS(other_clip, BINS, scratch + 4 * n);
    const vf inverse = exponentials<BINS, Zuko>(searched + i * n, n, e, clip);
    const vf other_inverse = exponentials<BINS, Zuko>(followed + i * n, n, other, other_clip);
    load_columns<BINS ? BINS - 1 : 0>(derivatives + i * (n - 1), n - 1, u);
    vf given = load<vf>(x + i);
    const vi tail = outside<Zuko>(s, given);
    const vf outer = given;
    given = tail ? vf{} : given;
    const vf by_out = load<vf>(grad_y + i);
    const vf by_y = tail ? vf{} : by_out, by_log = tail ? vf{} : load<vf>(grad_log_det + i);
    const Bin bin = find<BINS, Zuko>(s, given, e, inverse, other, other_inverse, u);
    const vf parameters[2] = {bin.first, bin.second};
    vf d[2], slopes[2];
    derivatives_of<Zuko, 2>(parameters, d, slopes);
    Point p;
    const vf d0 = p.d0 = d[0], d1 = p.d1 = d[1];
    locate<1>(s, &given, &bin, &p);

    // log derivative: A = log(slope^2 curve / denominator^2), with its derivatives in theta, slope, d0, d1
    const vf per_width = reciprocal(p.width), per_curve = reciprocal(p.curve), per = p.per_denominator;
    const vf q = p.theta * p.phi, theta2 = p.theta * p.theta, phi2 = p.phi * p.phi, skew = p.phi - p.theta;
    const vf log_theta = 2.0f * ((fma(p.slope, skew, d1 * p.theta - d0 * p.phi)) * per_curve - (d0 + d1 - 2.0f * p.slope) * skew * per);
    const vf log_slope = 2.0f * q * fma((d0 + d1) * per, reciprocal(p.slope), per_curve);
    const vf log_d0 = fma(phi2, per_curve, -2.0f * q * per), log_d1 = fma(theta2, per_curve, -2.0f * q * per);
    const vf rise = p.derivative * p.width;  // d y / d theta
    vf a = by_y, b = by_log, by_theta, by_x;
    if (!Rebuild && s.inverse) {  // x is the inverse of y at the knots that are given: the implicit function theorem
      b = -by_log;
      by_x = fma(by_y, p.width, b * log_theta) / rise;
      a = -by_x;
      by_theta = -by_y * p.width;
    } else {
      by_theta = fma(a, rise, b * log_theta);
      by_x = by_theta * per_width;
    }
    const vf scaled = a * p.height * q * per * per;
    const vf by_slope = fma(scaled, d1 * theta2 - d0 * phi2, b * log_slope);
    const vf by_u0 = slopes[0] * fma(scaled, p.rest, b * log_d0), by_u1 = slopes[1] * fma(-scaled, p.numerator, b * log_d1);
    const vf by_height = fma(a, p.numerator * per, by_slope * per_width);
    const vf by_width = -fma(by_slope, p.slope, by_theta * p.theta) * per_width;
    const vf by_left = -by_theta * per_width;  // a moves the lower knot
    store(grad_x + i, tail ? by_out : by_x);
    if constexpr (Rebuild) store(rebuilt + i, tail ? outer : p.out);

    // through the softmax: every parameter below the bin, the bin's own and those above it get one value each
    const vf by_from = s.inverse ? a : by_left, by_length = s.inverse ? by_height : by_width;
    const vf by_other_from = s.inverse ? by_left : a, by_other_length = s.inverse ? by_width : by_height;
    const vf taken = splat(s.bound) - step * bin.index;
    const vf mean = fma(by_from, bin.from + taken, by_length * (bin.length - step));
    const vf other_mean = fma(by_other_from, bin.other_from + taken, by_other_length * (bin.other_length - step));
    const vf below = inverse * fma(splat(share), by_from, -mean), at = inverse * fma(splat(share), by_length, -mean);
    const vf above = inverse * -mean;
    const vf other_below = other_inverse * fma(splat(share), by_other_from, -other_mean);
    const vf other_at = other_inverse * fma(splat(share), by_other_length, -other_mean);
    const vf other_above = other_inverse * -other_mean;
#pragma GCC unroll 8
    for (int64_t k = 0; k < n; ++k) {
      const vi passed = bin.index > (float)k, here = bin.index == (float)k;
      e[k] = e[k] * (passed ? below : here ? at : above);
      other[k] = other[k] * (passed ? other_below : here ? other_at : other_above);
      if constexpr (Zuko) {
        e[k] = e[k] * clip[k] * clip[k];
        other[k] = other[k] * other_clip[k] * other_clip[k];
      }
      if (k > 0) u[k - 1] = here ? by_u0 : u[k - 1];
      if (k + 1 < n) u[k] = here ? by_u1 : vf{};
    }
    store_columns<BINS>(grad_searched + i * n, n, e);
    store_columns<BINS>(grad_followed + i * n, n, other);
    store_columns<BINS ? BINS - 1 : 0>(grad_derivatives + i * (n - 1), n - 1, u);
  }
}
#undef VECTORS

// Rows of `columns` values for LANES elements as float32: in place, or widened (and padded with zeros beyond n) in `stage`.
template <class T>
INLINE const float* staged(const T* p, int64_t n, int64_t columns, float* stage) {
  if constexpr (sizeof(T) == 4)
    if (n == LANES) return p;
  for (int64_t k = n * columns; k < LANES * columns; ++k) stage[k] = 0.0f;
  for_blocks(n * columns, [&](int64_t i, int64_t m) { block_store(stage + i, block_load(p + i, m), m); });
  return stage;
}
// Where to put such rows; `unstage` brings them to their place.
template <class T>
INLINE float* place(T* p, int64_t n, float* stage) {
  if constexpr (sizeof(T) == 4)
    if (n == LANES) return p;
  return stage;
}
template <class T>
INLINE void unstage(T* p, int64_t n, int64_t columns, const float* stage) {
  if constexpr (sizeof(T) == 4)
    if (n == LANES) return;
  for_blocks(n * columns, [&](int64_t i, int64_t m) { block_store(p + i, block_load(stage + i, m), m); });
}

// Elements of a tile: an element costs some twenty times one of a simple op.
constexpr int64_t SPLINE_TILE = 512;

// Working memory of a tile: rows of parameters and of their gradients as float32, and vectors for bins without a template.
struct Workspace {
  static constexpr int64_t ROOM = 2048;
  alignas(64) float local[LANES * ROOM / 16];
  float* heap;
  float* at;
  explicit Workspace(int64_t floats) : heap(nullptr), at(local) {
    if (floats <= (int64_t)(sizeof local / sizeof *local)) return;
    heap = new float[floats + 16];
    at = heap + (64 - (uintptr_t)heap % 64) % 64 / 4;
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() { delete[] heap; }
  float* take(int64_t floats) {
    float* const out = at;
    at += floats;
    return out;
  }
};

using SplineForward = void (*)(int64_t, const Spline&, const float*, const float*, const float*, const float*, float*, float*, vf*);
using SplineBackward = void (*)(int64_t, const Spline&, const float*, const float*, const float*, const float*, const float*,
                                const float*, float*, float*, float*, float*, float*, vf*);

template <bool Zuko>
INLINE SplineForward spline_forward(int64_t bins) {
  switch (bins) {
    case 4: return rq_spline_fwd_blocks<4, Zuko>;
    case 8: return rq_spline_fwd_blocks<8, Zuko>;
    case 16: return rq_spline_fwd_blocks<16, Zuko>;
    case 32: return rq_spline_fwd_blocks<32, Zuko>;
    default: return rq_spline_fwd_blocks<0, Zuko>;
  }
}
template <bool Zuko, bool Rebuild = false>
INLINE SplineBackward spline_backward(int64_t bins) {
  switch (bins) {
    case 4: return rq_spline_bwd_blocks<4, Zuko, Rebuild>;
    case 8: return rq_spline_bwd_blocks<8, Zuko, Rebuild>;
    case 16: return rq_spline_bwd_blocks<16, Zuko, Rebuild>;
    case 32: return rq_spline_bwd_blocks<32, Zuko, Rebuild>;
    default: return rq_spline_bwd_blocks<0, Zuko, Rebuild>;
  }
}

template <class T>
INLINE void rq_spline_fwd_as(int64_t rows, int64_t event, Spline s, SplineForward blocks, const T* x, const T* widths,
                             const T* heights, const T* derivatives, T* y, float* log_det, int64_t threads) {
  const Tiling tiling(rows, event, SPLINE_TILE);
  const int64_t n = s.bins, knots = s.bins - 1;
  RowSums sums(tiling, log_det);
  tiling.run(threads, [&](const Tile& tile) {
    Workspace work(LANES * (6 * n + 2));
    vf* const vectors = (vf*)work.take(LANES * 3 * n);
    float *const staged_x = work.take(LANES), *const staged_y = work.take(LANES), *const staged_w = work.take(LANES * n),
                 *const staged_h = work.take(LANES * n), *const staged_d = work.take(LANES * n);
    float slopes[SPLINE_TILE + LANES];
    const int64_t offset = tile.row * event + tile.begin, count = tile.rows * tile.count;
    const int64_t whole = sizeof(T) == 4 ? count / LANES * LANES : 0;
    if constexpr (sizeof(T) == 4)
      blocks(whole / LANES, s, x + offset, widths + offset * n, heights + offset * n, derivatives + offset * knots, y + offset,
             slopes, vectors);
    for (int64_t i = whole; i < count; i += LANES) {
      const int64_t o = offset + i, m = min(LANES, count - i);
      float* const out = place(y + o, m, staged_y);
      blocks(1, s, staged(x + o, m, 1, staged_x), staged(widths + o * n, m, n, staged_w),
             staged(heights + o * n, m, n, staged_h), staged(derivatives + o * knots, m, knots, staged_d), out, slopes + i,
             vectors);
      unstage(y + o, m, 1, out);
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      vf total{};
      for_blocks(tile.count, [&](int64_t i, int64_t m) { total = total + block_load(slopes + r * tile.count + i, m); });
      sums.put(tile, r, sum(total));
    }
  });
  sums.finish();
}

// grad_y or grad_log_det may be null: no gradient came from that output. `rebuilt` is null but for the rebuilding blocks.
template <class T>
INLINE void rq_spline_bwd_as(int64_t rows, int64_t event, Spline s, SplineBackward blocks, const T* x, const T* widths,
                             const T* heights, const T* derivatives, const T* grad_y, const float* grad_log_det, T* rebuilt,
                             T* grad_x, T* grad_widths, T* grad_heights, T* grad_derivatives, int64_t threads) {
  const Tiling tiling(rows, event, SPLINE_TILE);
  const int64_t n = s.bins, knots = s.bins - 1;
  tiling.run(threads, [&](const Tile& tile) {
    Workspace work(LANES * (11 * n + 4));
    vf* const vectors = (vf*)work.take(LANES * 5 * n);
    float *const staged_x = work.take(LANES), *const staged_gy = work.take(LANES), *const staged_gx = work.take(LANES),
                 *const staged_out = work.take(LANES),
                 *const staged_w = work.take(LANES * n), *const staged_h = work.take(LANES * n),
                 *const staged_d = work.take(LANES * n), *const staged_gw = work.take(LANES * n),
                 *const staged_gh = work.take(LANES * n), *const staged_gd = work.take(LANES * n);
    const int64_t offset = tile.row * event + tile.begin, count = tile.rows * tile.count;
    float by_log[SPLINE_TILE + LANES], none[SPLINE_TILE + LANES];
    for (int64_t i = 0; i < count; ++i) by_log[i] = grad_log_det ? grad_log_det[tile.row + i / tile.count] : 0.0f;
    for (int64_t i = 0; i < LANES; ++i) by_log[count + i] = 0.0f;
    if (!grad_y)
      for (int64_t i = 0; i < count + LANES; ++i) none[i] = 0.0f;
    const int64_t whole = sizeof(T) == 4 ? count / LANES * LANES : 0;
    if constexpr (sizeof(T) == 4)
      blocks(whole / LANES, s, x + offset, widths + offset * n, heights + offset * n, derivatives + offset * knots,
             grad_y ? grad_y + offset : none, by_log, rebuilt ? rebuilt + offset : nullptr, grad_x + offset,
             grad_widths + offset * n, grad_heights + offset * n, grad_derivatives + offset * knots, vectors);
    for (int64_t i = whole; i < count; i += LANES) {
      const int64_t o = offset + i, m = min(LANES, count - i);
      float* const out = rebuilt ? place(rebuilt + o, m, staged_out) : nullptr;
      float* const gx = place(grad_x + o, m, staged_gx);
      float* const gw = place(grad_widths + o * n, m, staged_gw);
      float* const gh = place(grad_heights + o * n, m, staged_gh);
      float* const gd = place(grad_derivatives + o * knots, m, staged_gd);
      blocks(1, s, staged(x + o, m, 1, staged_x), staged(widths + o * n, m, n, staged_w),
             staged(heights + o * n, m, n, staged_h), staged(derivatives + o * knots, m, knots, staged_d),
             grad_y ? staged(grad_y + o, m, 1, staged_gy) : none, by_log + i, out, gx, gw, gh, gd, vectors);
      if (rebuilt) unstage(rebuilt + o, m, 1, out);
      unstage(grad_x + o, m, 1, gx);
      unstage(grad_widths + o * n, m, n, gw);
      unstage(grad_heights + o * n, m, n, gh);
      unstage(grad_derivatives + o * knots, m, knots, gd);
    }
  });
}

inline void rq_spline_fwd(int64_t dtype, int64_t rows, int64_t event, int64_t bins, const void* x, const void* widths,
                          const void* heights, const void* derivatives, void* y, float* log_det, double bound,
                          int64_t inverse, int64_t zuko, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    rq_spline_fwd_as<T>(rows, event, Spline{bins, (float)bound, inverse != 0},
                        zuko ? spline_forward<true>(bins) : spline_forward<false>(bins), (const T*)x, (const T*)widths,
                        (const T*)heights, (const T*)derivatives, (T*)y, log_det, threads);
  };
  with_dtype(dtype, run);
}

inline void rq_spline_bwd(int64_t dtype, int64_t rows, int64_t event, int64_t bins, const void* x, const void* widths,
                          const void* heights, const void* derivatives, const void* grad_y, const float* grad_log_det,
                          void* grad_x, void* grad_widths, void* grad_heights, void* grad_derivatives, double bound,
                          int64_t inverse, int64_t zuko, int64_t threads) {
  const auto run = [&](auto* t) {
    using T = typename Pointee<decltype(t)>::type;
    rq_spline_bwd_as<T>(rows, event, Spline{bins, (float)bound, inverse != 0},
                        zuko ? spline_backward<true>(bins) : spline_backward<false>(bins), (const T*)x, (const T*)widths,
                        (const T*)heights, (const T*)derivatives, (const T*)grad_y, grad_log_det, (T*)nullptr, (T*)grad_x,
                        (T*)grad_widths, (T*)grad_heights, (T*)grad_derivatives, threads);
  };
  with_dtype(dtype, run);
}

FASTGEN_KERNELS(rq_spline, KERNEL(rq_spline_fwd), KERNEL(rq_spline_bwd))

FASTGEN_END
