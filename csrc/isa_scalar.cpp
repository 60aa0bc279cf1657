#define FASTGEN_ISA scalar
#include "isa.inc"
