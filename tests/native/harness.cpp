// Runs kernels of one instruction set for another process: a call comes on standard input, its buffers go back on standard
// output. Built for another architecture it runs under an emulator; built with sanitizers it watches every access, since
// each buffer is an allocation of its own.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

// units.inc: UNIT(isa, op) for every unit that is linked in.
#define UNIT(isa, op)             \
  namespace fastgen::isa {        \
  extern const Table op##_table;  \
  }
#include "units.inc"
#undef UNIT

static const fastgen::Table* const units[] = {
#define UNIT(isa, op) &fastgen::isa::op##_table,
#include "units.inc"
#undef UNIT
};

template <class T>
static T take() {
  T value;
  if (fread(&value, sizeof value, 1, stdin) != 1) exit(0);
  return value;
}

// Request: name length, name, then per argument a letter and 8 bytes; for p the 8 bytes count the buffer's bytes (-1: null),
// which follow. Answer: the buffers, in order.
int main() {
  for (;;) {
    std::string name(take<int64_t>(), 0);
    if (fread(name.data(), 1, name.size(), stdin) != name.size()) return 1;
    const fastgen::Kernel* kernel = nullptr;
    for (const fastgen::Table* table : units)
      for (int i = 0; i < table->count; ++i)
        if (name == table->kernels[i].name) kernel = &table->kernels[i];
    if (!kernel) return 2;
    std::vector<fastgen::Argument> slots;
    std::vector<std::pair<char*, int64_t>> buffers;
    for (const char* letter = kernel->signature; *letter; ++letter) {
      fastgen::Argument slot;
      slot.integer = take<int64_t>();
      if (*letter == 'p') {
        const int64_t size = slot.integer;
        slot.pointer = nullptr;
        if (size >= 0) {
          buffers.emplace_back(static_cast<char*>(malloc(size)), size);
          if (fread(buffers.back().first, 1, size, stdin) != static_cast<size_t>(size)) return 3;
          slot.pointer = buffers.back().first;
        }
      }
      slots.push_back(slot);
    }
    kernel->entry(slots.data());
    for (auto& [data, size] : buffers) {
      fwrite(data, 1, size, stdout);
      free(data);
    }
    fflush(stdout);
  }
}
