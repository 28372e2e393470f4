/* AVX-512 F, BW, DQ, VL with VBMI and VNNI. */
#include "words.h"

#if QINS_X86_64

#include <immintrin.h>

#define ISA avx512vnni
#define FN QINS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,popcnt")
#define WORD QINS_ALWAYS_INLINE FN

#include "words_avx512vnni.h"

#include "kernels.inc"

#endif
