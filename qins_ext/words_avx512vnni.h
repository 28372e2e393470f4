/* AVX-512 with VBMI (byte permutations over 128 entries) and VNNI (accumulating 16-bit dot products). */
#include "words_avx512.h"

/* Magnitudes, with low and high bytes apart: a byte permutation covers 64 entries. */
typedef struct {
    __m512i low[2], high[2];
    __m512i bound, ones; /* constants; compilers would load the one from memory for each vector, and make the other */
} vt;
typedef struct {
    __m512i v[2];
} vw;

#define WORD_UNIT(t) ((t)->word_unit)
#define WORD_STEP 128
#define LEAST_MU 0.0f
#define WORD_ROWS 2
#define WORD_SETS 4
#define BYTES 1

WORD vt vt_load(const qins_log8_words *t)
{
    vt r;
    for (int i = 0; i < 2; i++) {
        r.low[i] = _mm512_loadu_si512(t->word_low + 64 * i);
        r.high[i] = _mm512_loadu_si512(t->word_high + 64 * i);
    }
    r.bound = _mm512_set1_epi8(INT8_MIN);
    r.ones = _mm512_set1_epi8(-1);
    QINS_KEEP("v", r.bound);
    QINS_KEEP("v", r.ones);
    return r;
}
/* Looks up bits 0 to 6 of each byte; `upper` is the mask of bit 6. A permutation of two tables (TWO_TABLES) is one
 * operation on AMD processors, but three on Intel processors. */
WORD __m512i lookup128(const __m512i *table, __m512i c, __mmask64 upper)
{
#if TWO_TABLES
    (void)upper;
    return _mm512_permutex2var_epi8(table[0], c, table[1]);
#else
    return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(c, table[0]), upper, c, table[1]);
#endif
}
/* Negates words bytewise: negates the low byte and complements the high byte. That is exact because the low byte of a
 * negated word is not 0: words have low byte 0 only for m = 0, which is not negated. */
WORD vw vw_decode(const vt *t, const uint8_t *codes)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i c = _mm512_loadu_si512(codes);
    QINS_KEEP("v", c);
    const __mmask64 upper = _mm512_test_epi8_mask(c, _mm512_set1_epi8(0x40));
    const __mmask64 negative = _mm512_cmpgt_epu8_mask(c, t->bound);
    __m512i low = lookup128(t->low, c, upper), high = lookup128(t->high, c, upper);
    low = _mm512_mask_sub_epi8(low, negative, zero, low);
    high = _mm512_mask_sub_epi8(high, negative, t->ones, high);
    vw w = {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
    return w;
}
#define DECODE_PACKED
/* Low and high bytes of the words of packed codes. A table holds both signs. */
typedef struct {
    __m512i low, high;
} vp;
WORD vp vp_load(const qins_log8_words *t)
{
    vp r = {_mm512_load_si512(t->packed_low), _mm512_load_si512(t->packed_high)};
    return r;
}
WORD vw vw_decode_packed(const vp *t, const uint8_t *packed, int bits)
{
    const __m512i q = packed_indices(packed, bits);
    const __m512i low = _mm512_permutexvar_epi8(q, t->low), high = _mm512_permutexvar_epi8(q, t->high);
    vw w = {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
    return w;
}
#define PAIRED
/* Words of the 16 codes of log4, repeated: permutations of words use five bits of an index. */
typedef __m512i vm;
WORD vm vm_load(const qins_log8_words *t)
{
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *)(const void *)t->packed_low));
    const __m512i high = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *)(const void *)t->packed_high));
    vm r = _mm512_or_si512(low, _mm512_slli_epi16(high, 8));
    QINS_KEEP("v", r);
    return r;
}
/* Each 16 bits of two blocks have four codes, which need no unpacking to words. */
WORD void vw_decode_pair(const vm *t, const uint8_t *packed, vw *w)
{
    __m512i q = _mm512_loadu_si512(packed);
    QINS_KEEP("v", q);
    w[0].v[0] = _mm512_permutexvar_epi16(q, *t);
    w[0].v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 8), *t);
    w[1].v[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), *t);
    w[1].v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(q, 12), *t);
}
/* Element `first` of one half of a block in X_ORDER, and every other one after it */
#define EVERY_OTHER(first) \
    first, first + 2, first + 4, first + 6, 32 + first, 32 + first + 2, 32 + first + 4, 32 + first + 6
WORD void pair_words(int16_t *x)
{
    static const QINS_ALIGNED(64) int16_t halves[2][32] = {
        {EVERY_OTHER(0), EVERY_OTHER(8), EVERY_OTHER(1), EVERY_OTHER(9)},
        {EVERY_OTHER(16), EVERY_OTHER(24), EVERY_OTHER(17), EVERY_OTHER(25)},
    };
    __m512i part[2][2];
    for (int b = 0; b < 2; b++) {
        const __m512i first = _mm512_loadu_si512(x + 64 * b), second = _mm512_loadu_si512(x + 64 * b + 32);
        for (int h = 0; h < 2; h++) {
            part[h][b] = _mm512_permutex2var_epi16(first, _mm512_load_si512(halves[h]), second);
        }
    }
    for (int h = 0; h < 2; h++, x += 64) {
        _mm512_storeu_si512(x, _mm512_shuffle_i64x2(part[h][0], part[h][1], 0x44));
        _mm512_storeu_si512(x + 32, _mm512_shuffle_i64x2(part[h][0], part[h][1], 0xee));
    }
}

WORD vi vw_add(vi sums, const vw *w, const int16_t *x)
{
    sums = _mm512_dpwssd_epi32(sums, w->v[0], _mm512_loadu_si512(x));
    return _mm512_dpwssd_epi32(sums, w->v[1], _mm512_loadu_si512(x + 32));
}

#define DOT_WORDS
WORD vi vi_dot(vi sums, int32_t two, vi x)
{
    sums = _mm512_dpwssd_epi32(sums, _mm512_set1_epi32(two), x);
    QINS_KEEP("v", sums);
    return sums;
}
