#define FASTGEN_ISA avx512
#include "isa.inc"
