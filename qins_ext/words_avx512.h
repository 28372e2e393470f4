/* The vector operations of AVX-512 (see words.h), except most of those for log8 products. 16 lanes are one register. */
#include "sums_x86.h"

typedef __m512 vf;
typedef __m512i vi;
/* 128 levels fit in eight registers: four two-register permutations and three blends cost less than a gather. */
typedef struct {
    __m512 t[8];
} vl;

WORD vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
WORD void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
WORD vf vf_set1(float x) { return _mm512_set1_ps(x); }
WORD vf vf_abs(vf x) { return _mm512_abs_ps(x); }
WORD vf vf_add(vf x, vf y) { return _mm512_add_ps(x, y); }
WORD vf vf_sub(vf x, vf y) { return _mm512_sub_ps(x, y); }
WORD vf vf_mul(vf x, vf y) { return _mm512_mul_ps(x, y); }
WORD vf vf_div(vf x, vf y) { return _mm512_div_ps(x, y); }
WORD vi vf_bits(vf x) { return _mm512_castps_si512(x); }
WORD vf vf_of_bits(vi x) { return _mm512_castsi512_ps(x); }
WORD vf vf_flip(vf x, vi signs) { return _mm512_xor_ps(x, vf_of_bits(signs)); }
WORD vf vf_lookup(const float *table, vi at) { return _mm512_i32gather_ps(at, table, 4); }
WORD vl vl_load(const float *table)
{
    vl r;
    for (int i = 0; i < 8; i++) {
        r.t[i] = _mm512_loadu_ps(table + 16 * i);
    }
    return r;
}
WORD vf vf_level(const vl *l, vi m)
{
    __mmask16 bit5 = _mm512_test_epi32_mask(m, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(m, _mm512_set1_epi32(64));
    __m512 lo = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(l->t[0], m, l->t[1]),
                                     _mm512_permutex2var_ps(l->t[2], m, l->t[3]));
    __m512 hi = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(l->t[4], m, l->t[5]),
                                     _mm512_permutex2var_ps(l->t[6], m, l->t[7]));
    return _mm512_mask_blend_ps(bit6, lo, hi);
}
WORD uint32_t vf_negative(vf x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }

WORD void vi_store(int32_t *p, vi x) { _mm512_storeu_si512(p, x); }
WORD vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
WORD vi vi_add(vi x, vi y) { return _mm512_add_epi32(x, y); }
WORD vi vi_sub(vi x, vi y) { return _mm512_sub_epi32(x, y); }
WORD vi vi_and(vi x, vi y) { return _mm512_and_si512(x, y); }
WORD vi vi_or(vi x, vi y) { return _mm512_or_si512(x, y); }
WORD vi vi_min(vi x, vi y) { return _mm512_min_epi32(x, y); }
WORD vi vi_max(vi x, vi y) { return _mm512_max_epi32(x, y); }
WORD vi vi_min_u(vi x, vi y) { return _mm512_min_epu32(x, y); }
WORD vi vi_srl(vi x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
WORD vi vi_sra(vi x, int n) { return _mm512_sra_epi32(x, _mm_cvtsi32_si128(n)); }
WORD vi vi_sll(vi x, int n) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(n)); }
WORD vi vi_count(vi n, vi x, vi y)
{
    return _mm512_mask_add_epi32(n, _mm512_cmpge_epi32_mask(x, y), n, _mm512_set1_epi32(1));
}
WORD vi vi_lookup(const uint32_t *table, vi at) { return _mm512_i32gather_epi32(at, table, 4); }
WORD vi vi_signs(uint32_t mask) { return _mm512_maskz_set1_epi32((__mmask16)mask, INT32_MIN); }
WORD vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
WORD void vi_store_u8(uint8_t *p, vi x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }
WORD vi vi_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
WORD void vi_store_u16(uint16_t *p, vi x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x)); }

WORD vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
WORD void vf_store_f16(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
WORD vf vf_load_f64(const double *p)
{
    __m256 lo = _mm512_cvtpd_ps(_mm512_loadu_pd(p)), hi = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
}
WORD void vf_store_f64(double *p, vf x)
{
    _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}
WORD vi vi_sign_bytes(const int8_t *p) { return vi_signs(_mm_movepi8_mask(_mm_loadu_si128((const __m128i *)p))); }
WORD vf vf_set2(float a, float b) { return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b)); }
WORD vf vf_fma(vf x, vf y, vf z) { return _mm512_fmadd_ps(x, y, z); }
/* Halves, then quarters, and so on; compilers disagree on _mm512_reduce_add_ps */
WORD float vf_sum(vf x)
{
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 eighth = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(eighth, _mm_movehdup_ps(eighth)));
}
WORD vi vi_round(vf x) { return _mm512_cvtps_epi32(x); }
WORD vf vf_of_ints(vi x) { return _mm512_cvtepi32_ps(x); }

/* A permutation of two tables uses five bits of each lane: the low bits of `stored`, and above them the sign. */
#define GOLDEN_WORDS 1
typedef struct {
    __m512 high, low, minus_low;
} vg;
typedef struct {
    __m512i stored, low;
} vs;
WORD vg vg_load(const qins_golden_factors *t)
{
    __m512 low = _mm512_loadu_ps(t->low);
    vg r = {_mm512_loadu_ps(t->high), low, _mm512_sub_ps(_mm512_setzero_ps(), low)};
    return r;
}
/* Bit 4 of each byte of sign is set where negative. */
WORD vs with_signs(const uint8_t *stored, __m512i sign)
{
    __m512i s = _mm512_loadu_si512(stored);
    vs r = {s, _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), s, sign, 0xca)}; /* 15 ? s : sign */
    return r;
}
WORD vs vs_golden(const uint8_t *stored, const int8_t *sign)
{
    return with_signs(stored, _mm512_srli_epi16(_mm512_loadu_si512(sign), 3));
}
WORD vs vs_log9(const uint8_t *stored, const uint8_t *bits)
{
    uint64_t mask;
    memcpy(&mask, bits, sizeof mask);
    return with_signs(stored, _mm512_maskz_set1_epi8(mask, 16));
}
WORD vf golden_value(const vg *t, __m512i high, __m512i low)
{
    return _mm512_mul_ps(_mm512_permutexvar_ps(high, t->high), _mm512_permutex2var_ps(t->low, low, t->minus_low));
}
#define vs_value(t, s, k) \
    golden_value(t, _mm512_srli_epi32((s)->stored, 8 * (k) + 4), _mm512_srli_epi32((s)->low, 8 * (k)))

#define RESTORE 1
WORD vi vi_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
WORD vi vi_xor(vi x, vi y) { return _mm512_xor_si512(x, y); }
WORD vi vi_mul(vi x, vi y) { return _mm512_mullo_epi32(x, y); }
WORD uint32_t vi_nonzero(vi x) { return _mm512_test_epi32_mask(x, x); }
/* Stores the lanes of the mask, one after another; returns their number. Writes 16 elements. */
WORD size_t vi_list(uint32_t *list, vi x, uint32_t mask)
{
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32((__mmask16)mask, x));
    return (size_t)_mm_popcnt_u32(mask);
}
/* States below 2^16 take the next words, in the order of the lanes. */
WORD vi vi_refill(vi state, const uint8_t **words)
{
    const __mmask16 more = _mm512_cmplt_epu32_mask(state, _mm512_set1_epi32(1 << 16));
    const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)*words));
    *words += 2 * _mm_popcnt_u32(more);
    return _mm512_mask_or_epi32(state, more, _mm512_slli_epi32(state, 16), _mm512_maskz_expand_epi32(more, next));
}

#define FLOAT_ROWS 12
#define FLOAT_PANELS 2
#define TRANSPOSE
/* Transposes pairs of rows, then pairs of pairs, within each 128-bit quarter; then the quarters. */
static FN void NAME(transpose)(const float *src, size_t src_stride, float *dst, size_t dst_stride)
{
    __m512 r[16], t[16];
    for (size_t i = 0; i < 16; i++) {
        r[i] = _mm512_loadu_ps(src + i * src_stride);
    }
    for (int i = 0; i < 16; i += 4) {
        __m512 lo01 = _mm512_unpacklo_ps(r[i], r[i + 1]), hi01 = _mm512_unpackhi_ps(r[i], r[i + 1]);
        __m512 lo23 = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), hi23 = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i] = _mm512_shuffle_ps(lo01, lo23, 0x44);
        t[i + 1] = _mm512_shuffle_ps(lo01, lo23, 0xee);
        t[i + 2] = _mm512_shuffle_ps(hi01, hi23, 0x44);
        t[i + 3] = _mm512_shuffle_ps(hi01, hi23, 0xee);
    }
    for (int j = 0; j < 4; j++) { /* t[4a + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4a to 4a + 3 */
        __m512 a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x44), b = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x44);
        __m512 c = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xee), d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xee);
        _mm512_storeu_ps(dst + (size_t)j * dst_stride, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_storeu_ps(dst + (size_t)(4 + j) * dst_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_storeu_ps(dst + (size_t)(8 + j) * dst_stride, _mm512_shuffle_f32x4(c, d, 0x88));
        _mm512_storeu_ps(dst + (size_t)(12 + j) * dst_stride, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
}

/* Unpacking bytes to words stays within the four 128-bit parts: bytes 0-7 of each, then 8-15 of each. */
#define X_ORDER {0, 2, 4, 6, 1, 3, 5, 7}

/* A whole block of 64 packed codes, one to a byte. Bits above a code's own are arbitrary, so tables that bytes index
 * are repeated to 64 entries. */
WORD __m512i packed_indices(const uint8_t *packed, int bits)
{
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)packed));
    const __m512i nibbles = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    __m512i more;
    if (bits == 4) {
        return nibbles;
    }
    if (bits == 5) {
        int64_t plane;
        memcpy(&plane, packed + 32, sizeof plane);
        more = _mm512_rolv_epi64(_mm512_set1_epi64(plane), _mm512_setr_epi64(4, 3, 2, 1, 0, 63, 62, 61));
    } else {
        more = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)(packed + 32)));
        more = _mm512_rolv_epi64(more, _mm512_setr_epi64(4, 4, 2, 2, 0, 0, 62, 62));
    }
    /* the low four bits from nibbles, the others from more */
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), nibbles, more, 0xca);
}

#define PACKED_VALUES 6
WORD __m512 pick_floats(const __m512 *value, __m128i q, int bits)
{
    const __m512i at = _mm512_cvtepu8_epi32(q);
    if (bits == 4) {
        return _mm512_permutexvar_ps(at, value[0]);
    }
    const __m512 lower = _mm512_permutex2var_ps(value[0], at, value[1]);
    if (bits == 5) {
        return lower;
    }
    const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
    return _mm512_mask_mov_ps(lower, upper, _mm512_permutex2var_ps(value[2], at, value[3]));
}
WORD void packed_floats(const uint8_t *packed, size_t n, const float *table, int bits, float *out)
{
    __m512 value[4];
    for (int i = 0; i < 1 << (bits - 4); i++) {
        value[i] = _mm512_loadu_ps(table + 16 * i);
    }
    for (; n > 0; n -= QINS_BLOCK, packed += QINS_BLOCK / 8 * bits, out += QINS_BLOCK) {
        const __m512i q = packed_indices(packed, bits);
        _mm512_storeu_ps(out, pick_floats(value, _mm512_castsi512_si128(q), bits));
        _mm512_storeu_ps(out + 16, pick_floats(value, _mm512_extracti32x4_epi32(q, 1), bits));
        _mm512_storeu_ps(out + 32, pick_floats(value, _mm512_extracti32x4_epi32(q, 2), bits));
        _mm512_storeu_ps(out + 48, pick_floats(value, _mm512_extracti32x4_epi32(q, 3), bits));
    }
}

#define UNPACK_BLOCK
/* A block in log8's form; see packed.h */
WORD void unpack_block(const uint8_t *packed, int bits, uint8_t *codes)
{
    const int half = 1 << (bits - 1);
    const __m512i q = packed_indices(packed, bits), one = _mm512_set1_epi8(1);
    const __mmask64 sign = _mm512_test_epi8_mask(q, _mm512_set1_epi8((char)half));
    __m512i level = _mm512_and_si512(q, _mm512_set1_epi8((char)(half - 1)));
    level = _mm512_mask_add_epi8(level, sign, level, one);
    const __m512i m = _mm512_min_epu8(_mm512_sll_epi16(level, _mm_cvtsi32_si128(8 - bits)), _mm512_set1_epi8(127));
    _mm512_storeu_si512(codes, _mm512_mask_add_epi8(m, sign, m, _mm512_set1_epi8(INT8_MIN)));
}

/* Sums of pairs of lanes, of fours, of eights and of all sixteen. */
#define SUMS
WORD __m512 sum_pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
WORD __m512 sum_fours(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
WORD __m512 sum_parts(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
WORD void vf_sums(const vf *v, int n, float *sums)
{
    int i = 0;
    for (; i + 16 <= n; i += 16, v += 16) {
        __m512 four[4];
        for (int j = 0; j < 4; j++) {
            four[j] = sum_fours(sum_pairs(v[4 * j], v[4 * j + 1]), sum_pairs(v[4 * j + 2], v[4 * j + 3]));
        }
        _mm512_storeu_ps(sums + i, sum_parts(sum_parts(four[0], four[1]), sum_parts(four[2], four[3])));
    }
    for (; i < n; i++) {
        sums[i] = vf_sum(*v++);
    }
}

#define ROWS_OF_ONE 4
#define SUM_REGISTERS "v"
#define ATTEND_QUERIES 4
#define SUM4
WORD void vf_sum4(const vf *v, float *sums)
{
    __m256 half[4];
    for (int i = 0; i < 4; i++) {
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
    }
    sum4_halves(half, sums);
}

/* Multiplies 64 words in place, the first and last half by these times 2^-14. */
WORD void vw_multiply(int16_t *w, int first, int second)
{
    const __m512i by = _mm512_mask_set1_epi16(_mm512_set1_epi16((short)first), 0xffff0000, (short)second);
    for (int i = 0; i < 2; i++, w += 32) {
        _mm512_storeu_si512(w, _mm512_mulhrs_epi16(_mm512_slli_epi16(_mm512_loadu_si512(w), 1), by));
    }
}

/* Words times 2^16 are floats without further shuffles. Both instruction sets' words are two registers. */
#define WORD_VALUES
#define VALUE_UNIT 0x1p-16f
#define VALUE_ORDER(v, j) (16 * ((j) / 4) + 8 * ((v) / 2) + 2 * ((j) % 4) + (v) % 2)
#define vw_values(w, to) words_to_values((w).v, to)
WORD void words_to_values(const __m512i *w, vf *to)
{
    for (int i = 0; i < 2; i++) {
        to[2 * i] = _mm512_cvtepi32_ps(_mm512_slli_epi32(w[i], 16));
        to[2 * i + 1] = _mm512_cvtepi32_ps(_mm512_and_si512(w[i], _mm512_set1_epi32((int)0xffff0000)));
    }
}
