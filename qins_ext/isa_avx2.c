/* AVX2 with FMA and F16C: 16 lanes are two 256-bit registers. */
#include "words.h"

#if QINS_X86_64

#include <immintrin.h>

#define ISA avx2
#define FN QINS_TARGET("avx2,fma,f16c")
#define WORD QINS_ALWAYS_INLINE FN

#include "sums_x86.h"

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
typedef const float *vl;

#define PAIR(type, f, x, ...)    \
    type r;                      \
    r.a = f((x).a, __VA_ARGS__); \
    r.b = f((x).b, __VA_ARGS__); \
    return r
#define PAIRS(type, f, x, y) \
    type r;                  \
    r.a = f((x).a, (y).a);   \
    r.b = f((x).b, (y).b);   \
    return r

WORD vf vf_load(const float *p)
{
    vf r = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    return r;
}
WORD void vf_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
WORD vf vf_set1(float x)
{
    vf r = {_mm256_set1_ps(x), _mm256_set1_ps(x)};
    return r;
}
WORD vf vf_abs(vf x) { PAIR(vf, _mm256_and_ps, x, _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX))); }
WORD vf vf_add(vf x, vf y) { PAIRS(vf, _mm256_add_ps, x, y); }
WORD vf vf_sub(vf x, vf y) { PAIRS(vf, _mm256_sub_ps, x, y); }
WORD vf vf_mul(vf x, vf y) { PAIRS(vf, _mm256_mul_ps, x, y); }
WORD vf vf_div(vf x, vf y) { PAIRS(vf, _mm256_div_ps, x, y); }
WORD vi vf_bits(vf x)
{
    vi r = {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
    return r;
}
WORD vf vf_of_bits(vi x)
{
    vf r = {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
    return r;
}
WORD vf vf_flip(vf x, vi signs) { PAIRS(vf, _mm256_xor_ps, x, vf_of_bits(signs)); }
WORD vf vf_lookup(const float *table, vi at)
{
    vf r = {_mm256_i32gather_ps(table, at.a, 4), _mm256_i32gather_ps(table, at.b, 4)};
    return r;
}
WORD vl vl_load(const float *table) { return table; }
WORD vf vf_level(const vl *table, vi m) { return vf_lookup(*table, m); }
WORD uint32_t vf_negative(vf x)
{
    __m256 zero = _mm256_setzero_ps();
    uint32_t lo = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, zero, _CMP_LT_OQ));
    uint32_t hi = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, zero, _CMP_LT_OQ));
    return lo | hi << 8;
}

WORD void vi_store(int32_t *p, vi x)
{
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)(p + 8), x.b);
}
WORD vi vi_set1(int32_t x)
{
    vi r = {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
    return r;
}
WORD vi vi_add(vi x, vi y) { PAIRS(vi, _mm256_add_epi32, x, y); }
WORD vi vi_sub(vi x, vi y) { PAIRS(vi, _mm256_sub_epi32, x, y); }
WORD vi vi_and(vi x, vi y) { PAIRS(vi, _mm256_and_si256, x, y); }
WORD vi vi_or(vi x, vi y) { PAIRS(vi, _mm256_or_si256, x, y); }
WORD vi vi_min(vi x, vi y) { PAIRS(vi, _mm256_min_epi32, x, y); }
WORD vi vi_max(vi x, vi y) { PAIRS(vi, _mm256_max_epi32, x, y); }
WORD vi vi_min_u(vi x, vi y) { PAIRS(vi, _mm256_min_epu32, x, y); }
WORD vi vi_srl(vi x, int n) { PAIR(vi, _mm256_srl_epi32, x, _mm_cvtsi32_si128(n)); }
WORD vi vi_sra(vi x, int n) { PAIR(vi, _mm256_sra_epi32, x, _mm_cvtsi32_si128(n)); }
WORD vi vi_sll(vi x, int n) { PAIR(vi, _mm256_sll_epi32, x, _mm_cvtsi32_si128(n)); }
WORD vi vi_count(vi n, vi x, vi y)
{
    /* n + 1 - (y > x): a comparison is -1 where true */
    vi above = {_mm256_cmpgt_epi32(y.a, x.a), _mm256_cmpgt_epi32(y.b, x.b)};
    return vi_add(vi_add(n, vi_set1(1)), above);
}
WORD vi vi_lookup(const uint32_t *table, vi at)
{
    vi r = {_mm256_i32gather_epi32((const int *)table, at.a, 4), _mm256_i32gather_epi32((const int *)table, at.b, 4)};
    return r;
}
WORD vi vi_signs(uint32_t mask)
{
    __m256i m = _mm256_set1_epi32((int)mask), top = _mm256_set1_epi32(INT32_MIN);
    __m256i left = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    vi r = {_mm256_and_si256(_mm256_sllv_epi32(m, left), top),
            _mm256_and_si256(_mm256_sllv_epi32(m, _mm256_sub_epi32(left, _mm256_set1_epi32(8))), top)};
    return r;
}
WORD vi vi_load_u8(const uint8_t *p)
{
    __m128i c = _mm_loadu_si128((const __m128i *)p);
    vi r = {_mm256_cvtepu8_epi32(c), _mm256_cvtepu8_epi32(_mm_srli_si128(c, 8))};
    return r;
}
/* Packing two registers interleaves their 128-bit halves; the permutation puts them in order. */
WORD __m256i pack32(vi x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8); }
WORD void vi_store_u8(uint8_t *p, vi x)
{
    __m256i words = pack32(vi_and(x, vi_set1(0xff)));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
WORD vi vi_load_u16(const uint16_t *p)
{
    vi r = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)))};
    return r;
}
WORD void vi_store_u16(uint16_t *p, vi x) { _mm256_storeu_si256((__m256i *)p, pack32(vi_and(x, vi_set1(0xffff)))); }

WORD vf vf_load_f16(const uint16_t *p)
{
    vf r = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
    return r;
}
WORD void vf_store_f16(uint16_t *p, vf x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
WORD __m256 load8_f64(const double *p)
{
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
}
WORD vf vf_load_f64(const double *p)
{
    vf r = {load8_f64(p), load8_f64(p + 8)};
    return r;
}
WORD void store8_f64(double *p, __m256 x)
{
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}
WORD void vf_store_f64(double *p, vf x)
{
    store8_f64(p, x.a);
    store8_f64(p + 8, x.b);
}

WORD vi vi_sign_bytes(const int8_t *p)
{
    vi b = vi_load_u8((const uint8_t *)p);
    return vi_sll(vi_and(b, vi_set1(0x80)), 24);
}
WORD vf vf_set2(float a, float b)
{
    vf r = {_mm256_set1_ps(a), _mm256_set1_ps(b)};
    return r;
}
WORD vf vf_fma(vf x, vf y, vf z)
{
    vf r = {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    return r;
}
#define SUM_LANES
WORD float vf_sum(vf x)
{
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
#define SUM4
WORD void vf_sum4(const vf *v, float *sums)
{
    __m256 half[4];
    for (int i = 0; i < 4; i++) {
        half[i] = _mm256_add_ps(v[i].a, v[i].b);
    }
    sum4_halves(half, sums);
}
WORD vi vi_round(vf x)
{
    vi r = {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
    return r;
}
WORD vf vf_of_ints(vi x)
{
    vf r = {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
    return r;
}

#define RESTORE 1
WORD vi vi_load(const uint32_t *p)
{
    vi r = {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
    return r;
}
WORD vi vi_xor(vi x, vi y) { PAIRS(vi, _mm256_xor_si256, x, y); }
WORD vi vi_mul(vi x, vi y) { PAIRS(vi, _mm256_mullo_epi32, x, y); }
WORD uint32_t lanes_of(__m256i x) { return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(x)); }
WORD uint32_t vi_nonzero(vi x)
{
    const __m256i zero = _mm256_setzero_si256();
    return 0xffff & ~(lanes_of(_mm256_cmpeq_epi32(x.a, zero)) | lanes_of(_mm256_cmpeq_epi32(x.b, zero)) << 8);
}
/* By mask of lanes, a byte per lane. RANK: how many lanes of the mask are below it; LISTED: the lanes of the mask, one
 * after another. */
#define BITS(x) \
    (((x) & 1) + ((x) >> 1 & 1) + ((x) >> 2 & 1) + ((x) >> 3 & 1) + ((x) >> 4 & 1) + ((x) >> 5 & 1) + ((x) >> 6 & 1))
#define BELOW(mask, lane) ((uint64_t)BITS((mask) & ((1 << (lane)) - 1)))
#define RANK(m)                                                                                         \
    (BELOW(m, 1) << 8 | BELOW(m, 2) << 16 | BELOW(m, 3) << 24 | BELOW(m, 4) << 32 | BELOW(m, 5) << 40 | \
     BELOW(m, 6) << 48 | BELOW(m, 7) << 56)
#define LIST_LANE(m, lane) ((uint64_t)((m) >> (lane) & 1) * (lane) << 8 * BELOW(m, lane))
#define LISTED(m)                                                                                                \
    (LIST_LANE(m, 1) | LIST_LANE(m, 2) | LIST_LANE(m, 3) | LIST_LANE(m, 4) | LIST_LANE(m, 5) | LIST_LANE(m, 6) | \
     LIST_LANE(m, 7))
#define FOUR(of, m) of(m), of((m) + 1), of((m) + 2), of((m) + 3)
#define SIXTEEN(of, m) FOUR(of, m), FOUR(of, (m) + 4), FOUR(of, (m) + 8), FOUR(of, (m) + 12)
#define MANY(of, m) SIXTEEN(of, m), SIXTEEN(of, (m) + 16), SIXTEEN(of, (m) + 32), SIXTEEN(of, (m) + 48)
static const uint64_t RANKS[256] = {MANY(RANK, 0), MANY(RANK, 64), MANY(RANK, 128), MANY(RANK, 192)};
static const uint64_t LISTS[256] = {MANY(LISTED, 0), MANY(LISTED, 64), MANY(LISTED, 128), MANY(LISTED, 192)};
WORD __m256i permute_by(const uint64_t *bytes, __m256i x)
{
    return _mm256_permutevar8x32_epi32(x, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
}
WORD uint32_t count_of(uint32_t mask) { return (uint32_t)(RANKS[mask] >> 56) + (mask >> 7); }
WORD size_t vi_list(uint32_t *list, vi x, uint32_t mask)
{
    const uint32_t a = mask & 255, b = mask >> 8, count = count_of(a);
    _mm256_storeu_si256((__m256i *)list, permute_by(LISTS + a, x.a));
    _mm256_storeu_si256((__m256i *)(list + count), permute_by(LISTS + b, x.b));
    return count + count_of(b);
}
WORD __m256i refill8(__m256i state, const uint8_t **words)
{
    const __m256i more = _mm256_cmpeq_epi32(_mm256_srli_epi32(state, 16), _mm256_setzero_si256());
    const uint32_t mask = lanes_of(more);
    const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)*words));
    *words += 2 * count_of(mask);
    return _mm256_blendv_epi8(state, _mm256_or_si256(_mm256_slli_epi32(state, 16), permute_by(RANKS + mask, next)),
                              more);
}
WORD vi vi_refill(vi state, const uint8_t **words)
{
    state.a = refill8(state.a, words);
    state.b = refill8(state.b, words);
    return state;
}

/* A permutation uses three bits of each lane: `stored` is split in three, and the sign joins the last two bits. */
#define GOLDEN_WORDS 1
typedef struct {
    __m256 factor[3];
} vg;
typedef struct {
    __m256i stored[2], top[2];
} vs;
WORD vg vg_load(const qins_golden_factors *t)
{
    vg r = {{_mm256_loadu_ps(t->eighth[0]), _mm256_loadu_ps(t->eighth[1]), _mm256_loadu_ps(t->eighth[2])}};
    return r;
}
/* Bit 2 of each byte of sign is set where negative. */
WORD __m256i top_bits(__m256i stored, __m256i sign)
{
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(stored, 6), _mm256_set1_epi8(3)),
                           _mm256_and_si256(sign, _mm256_set1_epi8(4)));
}
WORD vs vs_golden(const uint8_t *stored, const int8_t *sign)
{
    vs r;
    for (int i = 0; i < 2; i++) {
        r.stored[i] = _mm256_loadu_si256((const __m256i *)(stored + 32 * i));
        r.top[i] = top_bits(r.stored[i], _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)(sign + 32 * i)), 5));
    }
    return r;
}
WORD vs vs_log9(const uint8_t *stored, const uint8_t *bits)
{
    const __m256i eight_times = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    vs r;
    for (int i = 0; i < 2; i++) {
        int32_t some;
        memcpy(&some, bits + 4 * i, sizeof some);
        __m256i sign = _mm256_shuffle_epi8(_mm256_set1_epi32(some), eight_times);
        r.stored[i] = _mm256_loadu_si256((const __m256i *)(stored + 32 * i));
        r.top[i] = top_bits(r.stored[i], _mm256_cmpeq_epi8(_mm256_and_si256(sign, bit), bit));
    }
    return r;
}
WORD __m256 golden_value(const vg *t, __m256i first, __m256i second, __m256i third)
{
    __m256 two =
        _mm256_mul_ps(_mm256_permutevar8x32_ps(t->factor[0], first), _mm256_permutevar8x32_ps(t->factor[1], second));
    return _mm256_mul_ps(two, _mm256_permutevar8x32_ps(t->factor[2], third));
}
#define HALF_VALUE(t, s, i, k)                                                                                  \
    golden_value(t, _mm256_srli_epi32((s)->stored[i], 8 * (k)), _mm256_srli_epi32((s)->stored[i], 8 * (k) + 3), \
                 _mm256_srli_epi32((s)->top[i], 8 * (k)))
WORD vf both_halves(__m256 a, __m256 b)
{
    vf r = {a, b};
    return r;
}
#define vs_value(t, s, k) both_halves(HALF_VALUE(t, s, 0, k), HALF_VALUE(t, s, 1, k))

/* Products of log8. Byte shuffles look up 16 entries, so f is computed from two factors (see qins_log8_words):
 * a[code >> 4], with the sign, times b[code & 15], minus the constant c with a's sign. */
typedef struct {
    __m256i a_low, a_high, b_low, b_high, c;
} vt;
typedef struct {
    __m256i v[4];
} vw;

/* Unpacking bytes to words works within 128-bit halves: 0-7 and 16-23, then 8-15 and 24-31. */
#define X_ORDER {0, 2, 1, 3, 4, 6, 5, 7}
#define WORD_UNIT(t) ((t)->factor_unit)
#define WORD_STEP 128
#define LEAST_MU QINS_FACTORS_MU
#define WORD_ROWS 1
#define WORD_SETS 1

/* Low and high bytes of 16 words, each repeated in both halves. */
WORD void split_words(const int16_t *word, __m256i *low, __m256i *high)
{
    __m256i w = _mm256_loadu_si256((const __m256i *)word);
    __m256i bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1,
                                     3, 5, 7, 9, 11, 13, 15);
    w = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(w, bytes), 0xd8); /* low bytes, then high bytes */
    *low = _mm256_permute4x64_epi64(w, 0x44);
    *high = _mm256_permute4x64_epi64(w, 0xee);
}

WORD vt vt_load(const qins_log8_words *t)
{
    vt r;
    split_words(t->a, &r.a_low, &r.a_high);
    split_words(t->b, &r.b_low, &r.b_high);
    r.c = _mm256_set1_epi16(t->c);
    return r;
}

WORD __m256i factors_to_words(__m256i a, __m256i b, __m256i c)
{
    return _mm256_sub_epi16(_mm256_mulhrs_epi16(a, b), _mm256_sign_epi16(c, a));
}

WORD void decode32(const vt *t, const uint8_t *codes, __m256i *v)
{
    __m256i nibble = _mm256_set1_epi8(15), code = _mm256_loadu_si256((const __m256i *)codes);
    __m256i l = _mm256_and_si256(code, nibble), h = _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble);
    __m256i al = _mm256_shuffle_epi8(t->a_low, h), ah = _mm256_shuffle_epi8(t->a_high, h);
    __m256i bl = _mm256_shuffle_epi8(t->b_low, l), bh = _mm256_shuffle_epi8(t->b_high, l);
    v[0] = factors_to_words(_mm256_unpacklo_epi8(al, ah), _mm256_unpacklo_epi8(bl, bh), t->c);
    v[1] = factors_to_words(_mm256_unpackhi_epi8(al, ah), _mm256_unpackhi_epi8(bl, bh), t->c);
}

WORD vw vw_decode(const vt *t, const uint8_t *codes)
{
    vw w;
    decode32(t, codes, w.v);
    decode32(t, codes + 32, w.v + 2);
    return w;
}

/* -- packed codes */

/* Unpacks a whole block of packed codes, one to a byte. */
WORD void packed_indices(const uint8_t *packed, int bits, __m256i *q)
{
    const __m256i nibbles = _mm256_loadu_si256((const __m256i *)packed), low = _mm256_set1_epi8(15);
    q[0] = _mm256_and_si256(nibbles, low);
    q[1] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low);
    if (bits == 5) {
        int64_t plane;
        memcpy(&plane, packed + 32, sizeof plane);
        const __m256i all = _mm256_set1_epi64x(plane), bit = _mm256_set1_epi8(1);
        const __m256i a = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(0, 1, 2, 3)), bit);
        const __m256i b = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(4, 5, 6, 7)), bit);
        q[0] = _mm256_or_si256(q[0], _mm256_slli_epi16(a, 4));
        q[1] = _mm256_or_si256(q[1], _mm256_slli_epi16(b, 4));
    } else if (bits == 6) {
        const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(packed + 32)));
        const __m256i two = _mm256_set1_epi8(3);
        const __m256i a = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(0, 0, 2, 2)), two);
        const __m256i b = _mm256_and_si256(_mm256_srlv_epi64(all, _mm256_setr_epi64x(4, 4, 6, 6)), two);
        q[0] = _mm256_or_si256(q[0], _mm256_slli_epi16(a, 4));
        q[1] = _mm256_or_si256(q[1], _mm256_slli_epi16(b, 4));
    }
}

#define UNPACK_BLOCK
/* A block in log8's form; see packed.h */
WORD void unpack_block(const uint8_t *packed, int bits, uint8_t *codes)
{
    const __m256i top = _mm256_set1_epi8((char)((1 << (bits - 1)) - 1));
    const __m128i shift = _mm_cvtsi32_si128(8 - bits);
    __m256i q[2];
    packed_indices(packed, bits, q);
    for (int i = 0; i < 2; i++) {
        const __m256i sign = _mm256_cmpgt_epi8(q[i], top); /* -1 where set */
        const __m256i level = _mm256_sub_epi8(_mm256_and_si256(q[i], top), sign);
        const __m256i m = _mm256_min_epu8(_mm256_sll_epi16(level, shift), _mm256_set1_epi8(127));
        const __m256i code = _mm256_or_si256(m, _mm256_and_si256(sign, _mm256_set1_epi8(INT8_MIN)));
        _mm256_storeu_si256((__m256i *)(codes + 32 * i), code);
    }
}

#define DECODE_PACKED
/* Low and high bytes of the words of packed codes, 16 codes to a table */
typedef struct {
    __m256i low[4], high[4];
} vp;
WORD vp vp_load(const qins_log8_words *t)
{
    vp r;
    for (int i = 0; i < 4; i++) {
        r.low[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(t->packed_low + 16 * i)));
        r.high[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(t->packed_high + 16 * i)));
    }
    return r;
}
/* Shuffles read the low four bits of q; blends read bit 7, to which q is shifted. */
WORD __m256i pick_bytes(const __m256i *table, __m256i q, int bits)
{
    __m256i r = _mm256_shuffle_epi8(table[0], q);
    if (bits > 4) {
        const __m256i odd = _mm256_slli_epi16(q, 3);
        r = _mm256_blendv_epi8(r, _mm256_shuffle_epi8(table[1], q), odd);
        if (bits > 5) {
            const __m256i upper =
                _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], q), _mm256_shuffle_epi8(table[3], q), odd);
            r = _mm256_blendv_epi8(r, upper, _mm256_slli_epi16(q, 2));
        }
    }
    return r;
}
WORD vw vw_decode_packed(const vp *t, const uint8_t *packed, int bits)
{
    vw w;
    __m256i q[2];
    packed_indices(packed, bits, q);
    for (int i = 0; i < 2; i++) {
        const __m256i low = pick_bytes(t->low, q[i], bits), high = pick_bytes(t->high, q[i], bits);
        w.v[2 * i] = _mm256_unpacklo_epi8(low, high);
        w.v[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
    }
    return w;
}

/* The element of a table of 8, 16 or 32 that the low 3, 4 or 5 bits of an index select. Permutations look up 8; blends
 * read bit 31, to which the index is shifted. */
WORD __m256 pick_floats(const __m256 *table, __m256i index, int index_bits)
{
    __m256 r = _mm256_permutevar8x32_ps(table[0], index);
    if (index_bits > 3) {
        const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        r = _mm256_blendv_ps(r, _mm256_permutevar8x32_ps(table[1], index), odd);
        if (index_bits > 4) {
            const __m256 upper = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table[2], index),
                                                  _mm256_permutevar8x32_ps(table[3], index), odd);
            r = _mm256_blendv_ps(r, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
        }
    }
    return r;
}

#define FEW_LEVELS
/* The tree's nodes: two and four repeated in both halves of a register, where a shorter permutation finds them by two
 * bits of the node; eight and sixteen; and all levels but the last, which is 1. A gather takes longer than the whole
 * search. */
typedef struct {
    __m256i last, root;
    __m256 two, four, eight[1], sixteen[2], level[4];
} ve;
WORD ve ve_load(const qins_log8_tables *t, int bits)
{
    const float *split = (const float *)(const void *)t->split; /* only moved, never computed with */
    ve r;
    r.last = _mm256_set1_epi32(t->split[0]);
    r.root = _mm256_set1_epi32(t->split[1]);
    r.two = _mm256_broadcast_ps((const __m128 *)(const void *)split);
    r.four = _mm256_broadcast_ps((const __m128 *)(const void *)(split + 4));
    r.eight[0] = _mm256_loadu_ps(split + 8);
    r.sixteen[0] = _mm256_loadu_ps(split + 16);
    r.sixteen[1] = _mm256_loadu_ps(split + 24);
    for (int i = 0; i < 1 << (bits - 4); i++) {
        r.level[i] = _mm256_loadu_ps(t->level + 8 * i);
    }
    return r;
}
/* From a node to the next: a comparison is -1 where true. */
WORD __m256i next_node(__m256i node, __m256i pattern, __m256 split)
{
    const __m256i above = _mm256_cmpgt_epi32(pattern, _mm256_castps_si256(split));
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
}
WORD __m256 nearest8(const ve *t, __m256i p, int bits)
{
    __m256i node = _mm256_sub_epi32(_mm256_set1_epi32(2), _mm256_cmpgt_epi32(p, t->root));
    node = next_node(node, p, _mm256_permutevar_ps(t->two, node));
    node = next_node(node, p, _mm256_permutevar_ps(t->four, node));
    if (bits > 4) {
        node = next_node(node, p, pick_floats(t->eight, node, 3));
    }
    if (bits > 5) {
        node = next_node(node, p, pick_floats(t->sixteen, node, 4));
    }
    return pick_floats(t->level, node, bits - 1);
}
WORD vf vf_nearest(const ve *t, vf magnitude, int bits, vi *last)
{
    const vi p = vf_bits(magnitude);
    vf v = {nearest8(t, p.a, bits), nearest8(t, p.b, bits)};
    last->a = _mm256_cmpgt_epi32(p.a, t->last);
    last->b = _mm256_cmpgt_epi32(p.b, t->last);
    return v;
}

#define PACKED_VALUES 5
WORD void packed_floats(const uint8_t *packed, size_t n, const float *table, int bits, float *out)
{
    __m256 value[4];
    for (int i = 0; i < 1 << (bits - 3); i++) {
        value[i] = _mm256_loadu_ps(table + 8 * i);
    }
    for (; n > 0; n -= QINS_BLOCK, packed += QINS_BLOCK / 8 * bits) {
        __m256i q[2];
        packed_indices(packed, bits, q);
        for (int i = 0; i < 4; i++, out += 16) {
            const __m128i low = _mm256_castsi256_si128(q[i / 2]), high = _mm256_extracti128_si256(q[i / 2], 1);
            const __m128i of = i % 2 ? high : low;
            _mm256_storeu_ps(out, pick_floats(value, _mm256_cvtepu8_epi32(of), bits));
            _mm256_storeu_ps(out + 8, pick_floats(value, _mm256_cvtepu8_epi32(_mm_srli_si128(of, 8)), bits));
        }
    }
}

#define WORD_VALUES
#define VALUE_UNIT 0x1p-16f /* words times 2^16 are floats without further shuffles */
#define VALUE_ORDER(v, j) (32 * ((v) / 2) + 8 * ((j) / 8) + 16 * ((j) % 8 / 4) + 2 * ((j) % 4) + (v) % 2)
WORD void vw_values(vw w, vf *to)
{
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    for (int i = 0; i < 2; i++) {
        const __m256i *v = w.v + 2 * i;
        to[2 * i].a = _mm256_cvtepi32_ps(_mm256_slli_epi32(v[0], 16));
        to[2 * i].b = _mm256_cvtepi32_ps(_mm256_slli_epi32(v[1], 16));
        to[2 * i + 1].a = _mm256_cvtepi32_ps(_mm256_and_si256(v[0], upper));
        to[2 * i + 1].b = _mm256_cvtepi32_ps(_mm256_and_si256(v[1], upper));
    }
}

/* Adds products of 32 weights, four in each of eight lanes. */
WORD __m256i add_half(__m256i sums, const __m256i *w, const int16_t *x)
{
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(w[0], _mm256_loadu_si256((const __m256i *)x)));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w[1], _mm256_loadu_si256((const __m256i *)(x + 16))));
}

WORD vi vw_add(vi sums, const vw *w, const int16_t *x)
{
    vi r = {add_half(sums.a, w->v, x), add_half(sums.b, w->v + 2, x + 32)};
    return r;
}

/* Words of 32 codes are used before the next 32 are decoded, so that all fit in registers. */
#define DECODE_AND_ADD
WORD vi vw_decode_and_add(vi sums, const vt *t, const uint8_t *codes, const int16_t *x)
{
    __m256i w[2];
    decode32(t, codes, w);
    sums.a = add_half(sums.a, w, x);
    QINS_KEEP("x", sums.a); /* before the next 32, or compilers run out of registers all the same */
    decode32(t, codes + 32, w);
    sums.b = add_half(sums.b, w, x + 32);
    return sums;
}

#define FLOAT_ROWS 6
#define FLOAT_PANELS 1

#define DOT_WORDS
/* Multiplies 64 words in place, the first and last half by these times 2^-14. */
WORD void vw_multiply(int16_t *w, int first, int second)
{
    for (int i = 0; i < 4; i++, w += 16) {
        const __m256i by = _mm256_set1_epi16((short)(i < 2 ? first : second));
        __m256i *at = (__m256i *)(void *)w;
        _mm256_storeu_si256(at, _mm256_mulhrs_epi16(_mm256_slli_epi16(_mm256_loadu_si256(at), 1), by));
    }
}
WORD vi vi_dot(vi sums, int32_t two, vi x)
{
    const __m256i both = _mm256_set1_epi32(two), a = _mm256_madd_epi16(both, x.a), b = _mm256_madd_epi16(both, x.b);
    QINS_ADD_TO("x", sums.a, a, _mm256_add_epi32);
    QINS_ADD_TO("x", sums.b, b, _mm256_add_epi32);
    return sums;
}

#include "kernels.inc"

#endif
