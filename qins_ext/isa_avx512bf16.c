/* AVX-512 with VBMI, VNNI and BF16 (dot products of bfloat16). */
#include "words.h"

#if QINS_AVX512BF16

#include <immintrin.h>

#define ISA avx512bf16
#define FN QINS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,avx2,fma,f16c,popcnt")
#define WORD QINS_ALWAYS_INLINE FN

#define TWO_TABLES 1 /* AMD processors so far: Intel's with BF16 and VBMI also have AMX */

#include "words_avx512vnni.h"

#define HALVES 1

#include "kernels.inc"

#endif
