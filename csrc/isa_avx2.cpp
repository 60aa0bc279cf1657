#define FASTGEN_ISA avx2
#include "isa.inc"
