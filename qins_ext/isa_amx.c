/* AMX: tiles of 8-bit integers and of bfloat16 for many rows of activations; AVX-512 with VBMI and VNNI for the rest.
 */
#include "words.h"

#if QINS_AMX

#include <immintrin.h>

#define ISA amx
#define FN                                                                                                  \
    QINS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,avx2,fma,f16c,popcnt," \
                "amx-tile,amx-int8,amx-bf16")
#define WORD QINS_ALWAYS_INLINE FN

#include "words_avx512vnni.h"

#define HALVES 1
#define TILES 1

#include "kernels.inc"

#endif
