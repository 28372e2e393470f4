/* AVX-512 with VBMI (byte permutations over 128 entries) and VNNI (16-bit dot products that accumulate). */
#include "words_avx512.h"

/* Magnitudes, low bytes and high bytes apart; a byte permutation reaches 64 entries. */
typedef struct {
    __m512i low[2], high[2];
} vt;
typedef struct {
    __m512i v[2];
} vw;

/* Words are put together from the bytes at even and at odd places, without unpacking. */
#define X_ORDER                                                                              \
    {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, \
     44, 46, 48, 50, 52, 54, 56, 58, 60, 62, 1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, \
     25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63}
#define WORD_UNIT(t) ((t)->word_unit)
#define LEAST_MU 0.0f
#define WORD_ROWS 2
#define BYTES 1

WORD vt vt_load(const qins_log8_words *t)
{
    vt r;
    for (int i = 0; i < 2; i++) {
        r.low[i] = _mm512_loadu_si512(t->word_low + 64 * i);
        r.high[i] = _mm512_loadu_si512(t->word_high + 64 * i);
    }
    return r;
}
/* Looks up bits 0 to 6 of each byte; `upper` is the mask of bit 6. Permutations that take two tables (TWO_TABLES) are
 * one operation on AMD's processors, but three on Intel's. */
WORD __m512i lookup128(const __m512i *table, __m512i c, __mmask64 upper)
{
#if TWO_TABLES
    (void)upper;
    return _mm512_permutex2var_epi8(table[0], c, table[1]);
#else
    return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(c, table[0]), upper, c, table[1]);
#endif
}
WORD __m512i negate_where(__m512i words, __mmask32 negative)
{
    return _mm512_mask_sub_epi16(words, negative, _mm512_setzero_si512(), words);
}
WORD vw vw_decode(const vt *t, const uint8_t *codes)
{
    const __mmask64 odd = 0xaaaaaaaaaaaaaaaau;
    __m512i c = _mm512_loadu_si512(codes);
    __mmask64 upper = _mm512_test_epi8_mask(c, _mm512_set1_epi8(0x40));
    __m512i low = lookup128(t->low, c, upper), high = lookup128(t->high, c, upper);
    __m512i even_words = _mm512_mask_blend_epi8(odd, low, _mm512_slli_epi16(high, 8));
    __m512i odd_words = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(low, 8), high);
    vw w = {{negate_where(even_words, _mm512_movepi16_mask(_mm512_slli_epi16(c, 8))),
             negate_where(odd_words, _mm512_movepi16_mask(c))}};
    return w;
}
WORD vf vw_dot(vf acc, vw w, const int16_t *x, vf scale)
{
    __m512i sums = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w.v[0], _mm512_loadu_si512(x));
    sums = _mm512_dpwssd_epi32(sums, w.v[1], _mm512_loadu_si512(x + 32));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, acc);
}
