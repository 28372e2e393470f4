/* NEON on AArch64: 16 lanes are four 128-bit registers. Lookups go lane by lane: there is no gather. */
#include "words.h"

#if QINS_AARCH64

#include <arm_neon.h>

#define ISA neon
#define FN
#define WORD QINS_ALWAYS_INLINE FN

typedef float32x4x4_t vf;
typedef uint32x4x4_t vi;
typedef const float *vl;

#define QUARTERS for (int i = 0; i < 4; i++)
#define EACH(type, expression)            \
    type r;                               \
    QUARTERS { r.val[i] = (expression); } \
    return r
#define AS_INT(x) vreinterpretq_s32_u32(x)
#define AS_UINT(x) vreinterpretq_u32_s32(x)

/* Byte pointers, because the arrays may be unaligned. */
WORD vf vf_load(const float *p) { EACH(vf, vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)p + 16 * i))); }
WORD void vf_store(float *p, vf x)
{
    QUARTERS { vst1q_u8((uint8_t *)p + 16 * i, vreinterpretq_u8_f32(x.val[i])); }
}
WORD vf vf_set1(float x) { EACH(vf, vdupq_n_f32(x)); }
WORD vf vf_abs(vf x) { EACH(vf, vabsq_f32(x.val[i])); }
WORD vf vf_add(vf x, vf y) { EACH(vf, vaddq_f32(x.val[i], y.val[i])); }
WORD vf vf_sub(vf x, vf y) { EACH(vf, vsubq_f32(x.val[i], y.val[i])); }
WORD vf vf_mul(vf x, vf y) { EACH(vf, vmulq_f32(x.val[i], y.val[i])); }
WORD vf vf_div(vf x, vf y) { EACH(vf, vdivq_f32(x.val[i], y.val[i])); }
WORD vi vf_bits(vf x) { EACH(vi, vreinterpretq_u32_f32(x.val[i])); }
WORD vf vf_of_bits(vi x) { EACH(vf, vreinterpretq_f32_u32(x.val[i])); }
WORD vf vf_flip(vf x, vi signs)
{
    EACH(vf, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x.val[i]), signs.val[i])));
}

WORD void vi_store(int32_t *p, vi x)
{
    QUARTERS { vst1q_u8((uint8_t *)p + 16 * i, vreinterpretq_u8_u32(x.val[i])); }
}
WORD vi vi_set1(int32_t x) { EACH(vi, vdupq_n_u32((uint32_t)x)); }
WORD vi vi_add(vi x, vi y) { EACH(vi, vaddq_u32(x.val[i], y.val[i])); }
WORD vi vi_sub(vi x, vi y) { EACH(vi, vsubq_u32(x.val[i], y.val[i])); }
WORD vi vi_and(vi x, vi y) { EACH(vi, vandq_u32(x.val[i], y.val[i])); }
WORD vi vi_or(vi x, vi y) { EACH(vi, vorrq_u32(x.val[i], y.val[i])); }
WORD vi vi_min(vi x, vi y) { EACH(vi, AS_UINT(vminq_s32(AS_INT(x.val[i]), AS_INT(y.val[i])))); }
WORD vi vi_max(vi x, vi y) { EACH(vi, AS_UINT(vmaxq_s32(AS_INT(x.val[i]), AS_INT(y.val[i])))); }
WORD vi vi_min_u(vi x, vi y) { EACH(vi, vminq_u32(x.val[i], y.val[i])); }
WORD vi vi_srl(vi x, int n) { EACH(vi, vshlq_u32(x.val[i], vdupq_n_s32(-n))); }
WORD vi vi_sra(vi x, int n) { EACH(vi, AS_UINT(vshlq_s32(AS_INT(x.val[i]), vdupq_n_s32(-n)))); }
WORD vi vi_sll(vi x, int n) { EACH(vi, vshlq_u32(x.val[i], vdupq_n_s32(n))); }
/* where true, a comparison is -1, which is all ones when unsigned */
WORD vi vi_count(vi n, vi x, vi y) { EACH(vi, vsubq_u32(n.val[i], vcgeq_s32(AS_INT(x.val[i]), AS_INT(y.val[i])))); }
WORD vi vi_lookup(const uint32_t *table, vi at)
{
    uint32_t index[QINS_LANES], found[QINS_LANES];
    vi_store((int32_t *)index, at);
    for (int i = 0; i < QINS_LANES; i++) {
        found[i] = table[index[i]];
    }
    EACH(vi, vld1q_u32(found + 4 * i));
}
WORD vf vf_lookup(const float *table, vi at)
{
    uint32_t index[QINS_LANES];
    float found[QINS_LANES];
    vi_store((int32_t *)index, at);
    for (int i = 0; i < QINS_LANES; i++) {
        found[i] = table[index[i]];
    }
    return vf_load(found);
}
WORD vl vl_load(const float *table) { return table; }
WORD vf vf_level(const vl *table, vi m) { return vf_lookup(*table, m); }

WORD uint32_t vf_negative(vf x)
{
    static const uint32_t weight[4] = {1, 2, 4, 8};
    uint32_t mask = 0;
    QUARTERS { mask |= vaddvq_u32(vandq_u32(vcltzq_f32(x.val[i]), vld1q_u32(weight))) << (4 * i); }
    return mask;
}
WORD vi vi_signs(uint32_t mask)
{
    static const int32_t left[4] = {31, 30, 29, 28};
    uint32x4_t m = vdupq_n_u32(mask), top = vdupq_n_u32(0x80000000u);
    EACH(vi, vandq_u32(vshlq_u32(m, vsubq_s32(vld1q_s32(left), vdupq_n_s32(4 * i))), top));
}

WORD vi widen_u16(uint16x8_t a, uint16x8_t b)
{
    vi r = {{vmovl_u16(vget_low_u16(a)), vmovl_high_u16(a), vmovl_u16(vget_low_u16(b)), vmovl_high_u16(b)}};
    return r;
}
WORD uint16x8_t low_u16(uint32x4_t a, uint32x4_t b) { return vmovn_high_u32(vmovn_u32(a), b); }

WORD vi vi_load_u8(const uint8_t *p)
{
    uint8x16_t c = vld1q_u8(p);
    return widen_u16(vmovl_u8(vget_low_u8(c)), vmovl_high_u8(c));
}
WORD void vi_store_u8(uint8_t *p, vi x)
{
    uint16x8_t a = low_u16(x.val[0], x.val[1]), b = low_u16(x.val[2], x.val[3]);
    vst1q_u8(p, vmovn_high_u16(vmovn_u16(a), b));
}
WORD vi vi_load_u16(const uint16_t *p)
{
    return widen_u16(vreinterpretq_u16_u8(vld1q_u8((const uint8_t *)p)),
                     vreinterpretq_u16_u8(vld1q_u8((const uint8_t *)p + 16)));
}
WORD void vi_store_u16(uint16_t *p, vi x)
{
    vst1q_u8((uint8_t *)p, vreinterpretq_u8_u16(low_u16(x.val[0], x.val[1])));
    vst1q_u8((uint8_t *)p + 16, vreinterpretq_u8_u16(low_u16(x.val[2], x.val[3])));
}

WORD vf vf_load_f16(const uint16_t *p)
{
    EACH(vf, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p + 8 * i))));
}
WORD void vf_store_f16(uint16_t *p, vf x)
{
    QUARTERS { vst1_u8((uint8_t *)p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(x.val[i]))); }
}
WORD float64x2_t load2_f64(const double *p) { return vreinterpretq_f64_u8(vld1q_u8((const uint8_t *)p)); }
WORD vf vf_load_f64(const double *p)
{
    EACH(vf, vcvt_high_f32_f64(vcvt_f32_f64(load2_f64(p + 4 * i)), load2_f64(p + 4 * i + 2)));
}
WORD void vf_store_f64(double *p, vf x)
{
    QUARTERS
    {
        vst1q_u8((uint8_t *)(p + 4 * i), vreinterpretq_u8_f64(vcvt_f64_f32(vget_low_f32(x.val[i]))));
        vst1q_u8((uint8_t *)(p + 4 * i + 2), vreinterpretq_u8_f64(vcvt_high_f64_f32(x.val[i])));
    }
}

WORD vi vi_sign_bytes(const int8_t *p)
{
    vi b = vi_load_u8((const uint8_t *)p);
    return vi_sll(vi_and(b, vi_set1(0x80)), 24);
}
WORD vf vf_set2(float a, float b) { EACH(vf, vdupq_n_f32(i < 2 ? a : b)); }
WORD vf vf_fma(vf x, vf y, vf z) { EACH(vf, vfmaq_f32(z.val[i], x.val[i], y.val[i])); }
WORD float vf_sum(vf x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.val[0], x.val[1]), vaddq_f32(x.val[2], x.val[3]))); }
#define SUM4
WORD void vf_sum4(const vf *v, float *sums)
{
    float32x4_t quarter[4];
    for (int i = 0; i < 4; i++) {
        quarter[i] = vaddq_f32(vaddq_f32(v[i].val[0], v[i].val[1]), vaddq_f32(v[i].val[2], v[i].val[3]));
    }
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(quarter[0], quarter[1]), vpaddq_f32(quarter[2], quarter[3])));
}
WORD vi vi_round(vf x) { EACH(vi, AS_UINT(vcvtnq_s32_f32(x.val[i]))); }
WORD vf vf_of_ints(vi x) { EACH(vf, vcvtq_f32_s32(AS_INT(x.val[i]))); }

/* Magnitudes, with low and high bytes apart: a table lookup covers 64 entries. */
typedef struct {
    uint8x16x4_t low[2], high[2];
} vt;
typedef struct {
    int16x8_t v[8];
} vw;
#define X_ORDER {0, 1, 2, 3, 4, 5, 6, 7}
#define WORD_UNIT(t) ((t)->word_unit)
#define WORD_STEP 64
#define LEAST_MU 0.0f
#define WORD_ROWS 1
#define WORD_SETS 1
WORD vt vt_load(const qins_log8_words *t)
{
    vt r;
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            r.low[i].val[j] = vld1q_u8(t->word_low + 64 * i + 16 * j);
            r.high[i].val[j] = vld1q_u8(t->word_high + 64 * i + 16 * j);
        }
    }
    return r;
}
/* Where an index is 64 or more, vqtbx4q keeps its first operand. */
WORD uint8x16_t lookup128(const uint8x16x4_t *table, uint8x16_t m)
{
    return vqtbx4q_u8(vqtbl4q_u8(table[0], m), table[1], vsubq_u8(m, vdupq_n_u8(64)));
}
WORD int16x8_t negate_where(int16x8_t magnitude, int16x8_t negative)
{
    return vsubq_s16(veorq_s16(magnitude, negative), negative);
}
WORD vw vw_decode(const vt *t, const uint8_t *codes)
{
    vw w;
    QUARTERS
    {
        uint8x16_t c = vld1q_u8(codes + 16 * i), m = vandq_u8(c, vdupq_n_u8(0x7f));
        int8x16_t negative = vshrq_n_s8(vreinterpretq_s8_u8(c), 7);
        uint8x16_t low = lookup128(t->low, m), high = lookup128(t->high, m);
        w.v[2 * i] = negate_where(vreinterpretq_s16_u8(vzip1q_u8(low, high)), vmovl_s8(vget_low_s8(negative)));
        w.v[2 * i + 1] = negate_where(vreinterpretq_s16_u8(vzip2q_u8(low, high)), vmovl_high_s8(negative));
    }
    return w;
}
WORD vi vw_add(vi sums, const vw *w, const int16_t *x)
{
    QUARTERS
    {
        int16x8_t w0 = w->v[2 * i], w1 = w->v[2 * i + 1], x0 = vld1q_s16(x + 16 * i), x1 = vld1q_s16(x + 16 * i + 8);
        int32x4_t sum = vmlal_s16(AS_INT(sums.val[i]), vget_low_s16(w0), vget_low_s16(x0));
        sum = vmlal_high_s16(sum, w0, x0);
        sum = vmlal_s16(sum, vget_low_s16(w1), vget_low_s16(x1));
        sums.val[i] = AS_UINT(vmlal_high_s16(sum, w1, x1));
    }
    return sums;
}

/* -- packed codes */

/* 16 of a block of 64 packed codes, one to a byte; see packed.h */
WORD uint8x16_t packed_indices(const uint8_t *packed, int bits, int quarter)
{
    const uint8x16_t nibbles = vld1q_u8(packed + 16 * (quarter % 2));
    const uint8x16_t low = quarter < 2 ? vandq_u8(nibbles, vdupq_n_u8(15)) : vshrq_n_u8(nibbles, 4);
    if (bits == 4) {
        return low;
    }
    const int8_t at = (int8_t)(-2 * quarter); /* to the right by as many bits */
    uint8x16_t more;
    if (bits == 5) {
        const uint8x8_t plane = vld1_u8(packed + 32);
        more = vshlq_u8(vcombine_u8(plane, plane), vcombine_s8(vdup_n_s8(at), vdup_n_s8((int8_t)(at - 1))));
        more = vandq_u8(more, vdupq_n_u8(1));
    } else {
        more = vandq_u8(vshlq_u8(vld1q_u8(packed + 32), vdupq_n_s8(at)), vdupq_n_u8(3));
    }
    return vorrq_u8(low, vshlq_n_u8(more, 4));
}

#define UNPACK_BLOCK
/* A block in log8's form; see packed.h */
WORD void unpack_block(const uint8_t *packed, int bits, uint8_t *codes)
{
    const uint8x16_t top = vdupq_n_u8((uint8_t)((1 << (bits - 1)) - 1));
    QUARTERS
    {
        const uint8x16_t q = packed_indices(packed, bits, i), sign = vcgtq_u8(q, top); /* all bits where set */
        const uint8x16_t level = vsubq_u8(vandq_u8(q, top), sign);
        const uint8x16_t m = vminq_u8(vshlq_u8(level, vdupq_n_s8((int8_t)(8 - bits))), vdupq_n_u8(127));
        vst1q_u8(codes + 16 * i, vorrq_u8(m, vandq_u8(sign, vdupq_n_u8(128))));
    }
}

#define DECODE_PACKED
/* Low and high bytes of the words of packed codes */
typedef struct {
    uint8x16x4_t low, high;
} vp;
WORD vp vp_load(const qins_log8_words *t)
{
    vp r;
    QUARTERS
    {
        r.low.val[i] = vld1q_u8(t->packed_low + 16 * i);
        r.high.val[i] = vld1q_u8(t->packed_high + 16 * i);
    }
    return r;
}
WORD uint8x16_t pick_bytes(const uint8x16x4_t *table, uint8x16_t q, int bits)
{
    const uint8x16x2_t half = {{table->val[0], table->val[1]}};
    return bits == 4 ? vqtbl1q_u8(table->val[0], q) : bits == 5 ? vqtbl2q_u8(half, q) : vqtbl4q_u8(*table, q);
}
WORD vw vw_decode_packed(const vp *t, const uint8_t *packed, int bits)
{
    vw w;
    QUARTERS
    {
        const uint8x16_t q = packed_indices(packed, bits, i);
        const uint8x16_t low = pick_bytes(&t->low, q, bits), high = pick_bytes(&t->high, q, bits);
        w.v[2 * i] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
        w.v[2 * i + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
    }
    return w;
}

#define FLOAT_ROWS 6
#define FLOAT_PANELS 1

#include "kernels.inc"

#endif
