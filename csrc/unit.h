// What the unit of an op needs to export its kernels: an entry per kernel that unpacks the array of 8-byte slots, and
// FASTGEN_KERNELS, with which csrc/ops/<op>.h lists them.
#pragma once
#include "kernels.h"
#include "simd.h"

FASTGEN_BEGIN

template <class T>
struct Slot;
template <class T>
struct Slot<T*> {
  static constexpr char letter = 'p';
  static INLINE T* get(const Argument& a) { return static_cast<T*>(a.pointer); }
};
template <>
struct Slot<int64_t> {
  static constexpr char letter = 'i';
  static INLINE int64_t get(const Argument& a) { return a.integer; }
};
template <>
struct Slot<double> {
  static constexpr char letter = 'r';
  static INLINE double get(const Argument& a) { return a.real; }
};

template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <auto F>
struct Unpack;
template <class... Args, void (*F)(Args...)>
struct Unpack<F> {
  static constexpr char signature[] = {Slot<Args>::letter..., 0};
  template <size_t... I>
  static INLINE void call(const Argument* a, Indices<I...>) {
    F(Slot<Args>::get(a[I])...);
  }
  static void entry(const Argument* a) { call(a, typename MakeIndices<sizeof...(Args)>::type{}); }
};

#define KERNEL(function) Kernel{#function, Unpack<&function>::signature, &Unpack<&function>::entry}
#define FASTGEN_KERNELS(op, ...) static const Kernel op##_kernels[] = {__VA_ARGS__};

FASTGEN_END
