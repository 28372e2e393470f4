/* AVX-512 F, BW, DQ, VL. */
#include "words.h"

#if QINS_X86_64

#include <immintrin.h>

#define ISA avx512
#define FN QINS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
#define WORD QINS_ALWAYS_INLINE FN

#include "words_avx512.h"

/* As in isa_avx2.c: byte shuffles look up 16 entries, so f is computed from two factors and a constant. */
typedef struct {
    __m512i a_low, a_high, b_low, b_high, c;
} vt;
typedef struct {
    __m512i v[2];
} vw;

#define WORD_UNIT(t) ((t)->factor_unit)
#define WORD_STEP 128
#define LEAST_MU QINS_FACTORS_MU
#define WORD_ROWS 2
#define WORD_SETS 1

/* Low and high bytes of 16 words, each repeated in all four parts. */
WORD void split_words(const int16_t *word, __m512i *low, __m512i *high)
{
    __m256i w = _mm256_loadu_si256((const __m256i *)word);
    *low = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(w));
    *high = _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(_mm256_srli_epi16(w, 8)));
}
WORD vt vt_load(const qins_log8_words *t)
{
    vt r;
    split_words(t->a, &r.a_low, &r.a_high);
    split_words(t->b, &r.b_low, &r.b_high);
    r.c = _mm512_set1_epi16(t->c);
    return r;
}
WORD __m512i factors_to_words(__m512i a, __m512i b, __m512i c)
{
    __m512i product = _mm512_mulhrs_epi16(a, b);
    return _mm512_mask_add_epi16(_mm512_sub_epi16(product, c), _mm512_movepi16_mask(a), product, c);
}
WORD vw vw_decode(const vt *t, const uint8_t *codes)
{
    __m512i nibble = _mm512_set1_epi8(15), code = _mm512_loadu_si512(codes);
    __m512i l = _mm512_and_si512(code, nibble), h = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
    __m512i al = _mm512_shuffle_epi8(t->a_low, h), ah = _mm512_shuffle_epi8(t->a_high, h);
    __m512i bl = _mm512_shuffle_epi8(t->b_low, l), bh = _mm512_shuffle_epi8(t->b_high, l);
    vw w = {{factors_to_words(_mm512_unpacklo_epi8(al, ah), _mm512_unpacklo_epi8(bl, bh), t->c),
             factors_to_words(_mm512_unpackhi_epi8(al, ah), _mm512_unpackhi_epi8(bl, bh), t->c)}};
    return w;
}
#define DECODE_PACKED
/* Low and high bytes of the words of packed codes, 16 codes to a table */
typedef struct {
    __m512i low[4], high[4];
} vp;
WORD vp vp_load(const qins_log8_words *t)
{
    vp r;
    for (int i = 0; i < 4; i++) {
        r.low[i] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)(t->packed_low + 16 * i)));
        r.high[i] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)(t->packed_high + 16 * i)));
    }
    return r;
}
WORD __m512i pick_bytes(const __m512i *table, __m512i q, int bits)
{
    const __m512i at = _mm512_and_si512(q, _mm512_set1_epi8(15));
    __m512i r = _mm512_shuffle_epi8(table[0], at);
    if (bits > 4) {
        const __mmask64 odd = _mm512_test_epi8_mask(q, _mm512_set1_epi8(16));
        r = _mm512_mask_shuffle_epi8(r, odd, table[1], at);
        if (bits > 5) {
            const __m512i upper = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table[2], at), odd, table[3], at);
            r = _mm512_mask_mov_epi8(r, _mm512_test_epi8_mask(q, _mm512_set1_epi8(32)), upper);
        }
    }
    return r;
}
WORD vw vw_decode_packed(const vp *t, const uint8_t *packed, int bits)
{
    const __m512i q = packed_indices(packed, bits);
    const __m512i low = pick_bytes(t->low, q, bits), high = pick_bytes(t->high, q, bits);
    vw w = {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
    return w;
}
WORD vi vw_add(vi sums, const vw *w, const int16_t *x)
{
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(w->v[0], _mm512_loadu_si512(x)));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(w->v[1], _mm512_loadu_si512(x + 32)));
}

#define DOT_WORDS
WORD vi vi_dot(vi sums, int32_t two, vi x)
{
    const __m512i products = _mm512_madd_epi16(_mm512_set1_epi32(two), x);
    QINS_ADD_TO("v", sums, products, _mm512_add_epi32);
    return sums;
}

#include "kernels.inc"

#endif
