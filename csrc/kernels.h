// The table of kernels that an instruction set exports: name, signature, entry. An entry takes its arguments as an array of
// 8-byte slots; the typed C++ function behind it is unpacked at compile time, so that bindings and harnesses know no kernel
// by name. One table per op and instruction set.
#pragma once
#include <cstdint>

namespace fastgen {

union Argument {
  void* pointer;
  int64_t integer;
  double real;
};

struct Kernel {
  const char* name;
  const char* signature;  // one letter per argument: p(ointer), i(nteger), r(eal)
  void (*entry)(const Argument*);
};

struct Table {
  const char* isa;
  const Kernel* kernels;
  int count;
};

}  // namespace fastgen
