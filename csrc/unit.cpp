// The translation unit of one op for one instruction set, named by -DFASTGEN_OP and -DFASTGEN_ISA.
#define FASTGEN_TEXT_(x) #x
#define FASTGEN_TEXT(x) FASTGEN_TEXT_(x)
#include FASTGEN_TEXT(ops/FASTGEN_OP.h)

#define FASTGEN_JOIN_(a, b) a##b
#define FASTGEN_JOIN(a, b) FASTGEN_JOIN_(a, b)

FASTGEN_BEGIN

#define KERNELS FASTGEN_JOIN(FASTGEN_OP, _kernels)
__attribute__((visibility("hidden"))) extern const Table FASTGEN_JOIN(FASTGEN_OP, _table);
const Table FASTGEN_JOIN(FASTGEN_OP, _table) = {FASTGEN_TEXT(FASTGEN_ISA), KERNELS, (int)(sizeof KERNELS / sizeof *KERNELS)};

FASTGEN_END
