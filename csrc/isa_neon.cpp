#define FASTGEN_ISA neon
#define FASTGEN_NEON 1
#include "isa.inc"
