/* Portable C, one lane at a time: the reference that every other instruction set must match. */
#define ONE_BODY 1
#include "words.h"

#define ISA scalar
#define FN

typedef struct {
    float v[QINS_LANES];
} vf;
typedef struct {
    uint32_t v[QINS_LANES];
} vi;
typedef const float *vl;

#define LANES for (int i = 0; i < QINS_LANES; i++)
#define EACH(type, expression)       \
    type r;                          \
    LANES { r.v[i] = (expression); } \
    return r

static uint32_t to_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float to_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static int32_t to_int(uint32_t u)
{
    int32_t i;
    memcpy(&i, &u, sizeof i);
    return i;
}

QINS_ALWAYS_INLINE vf vf_load(const float *p)
{
    vf r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
QINS_ALWAYS_INLINE void vf_store(float *p, vf a) { memcpy(p, a.v, sizeof a.v); }
QINS_ALWAYS_INLINE vf vf_set1(float x) { EACH(vf, x); }
QINS_ALWAYS_INLINE vf vf_abs(vf a) { EACH(vf, to_float(to_bits(a.v[i]) & 0x7fffffffu)); }
QINS_ALWAYS_INLINE vf vf_add(vf a, vf b) { EACH(vf, a.v[i] + b.v[i]); }
QINS_ALWAYS_INLINE vf vf_sub(vf a, vf b) { EACH(vf, a.v[i] - b.v[i]); }
QINS_ALWAYS_INLINE vf vf_mul(vf a, vf b) { EACH(vf, a.v[i] * b.v[i]); }
QINS_ALWAYS_INLINE vf vf_div(vf a, vf b) { EACH(vf, a.v[i] / b.v[i]); }
QINS_ALWAYS_INLINE vi vf_bits(vf a) { EACH(vi, to_bits(a.v[i])); }
QINS_ALWAYS_INLINE vf vf_of_bits(vi a) { EACH(vf, to_float(a.v[i])); }
QINS_ALWAYS_INLINE vf vf_flip(vf a, vi signs) { EACH(vf, to_float(to_bits(a.v[i]) ^ signs.v[i])); }
QINS_ALWAYS_INLINE vf vf_lookup(const float *table, vi at) { EACH(vf, table[at.v[i]]); }
QINS_ALWAYS_INLINE vl vl_load(const float *table) { return table; }
QINS_ALWAYS_INLINE vf vf_level(const vl *table, vi m) { return vf_lookup(*table, m); }
QINS_ALWAYS_INLINE uint32_t vf_negative(vf a)
{
    uint32_t mask = 0;
    LANES { mask |= (uint32_t)(a.v[i] < 0.0f) << i; }
    return mask;
}

QINS_ALWAYS_INLINE void vi_store(int32_t *p, vi a) { memcpy(p, a.v, sizeof a.v); }
QINS_ALWAYS_INLINE vi vi_set1(int32_t x) { EACH(vi, (uint32_t)x); }
QINS_ALWAYS_INLINE vi vi_add(vi a, vi b) { EACH(vi, a.v[i] + b.v[i]); }
QINS_ALWAYS_INLINE vi vi_sub(vi a, vi b) { EACH(vi, a.v[i] - b.v[i]); }
QINS_ALWAYS_INLINE vi vi_and(vi a, vi b) { EACH(vi, a.v[i] & b.v[i]); }
QINS_ALWAYS_INLINE vi vi_or(vi a, vi b) { EACH(vi, a.v[i] | b.v[i]); }
QINS_ALWAYS_INLINE vi vi_min(vi a, vi b) { EACH(vi, to_int(a.v[i]) < to_int(b.v[i]) ? a.v[i] : b.v[i]); }
QINS_ALWAYS_INLINE vi vi_max(vi a, vi b) { EACH(vi, to_int(a.v[i]) > to_int(b.v[i]) ? a.v[i] : b.v[i]); }
QINS_ALWAYS_INLINE vi vi_min_u(vi a, vi b) { EACH(vi, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QINS_ALWAYS_INLINE vi vi_srl(vi a, int n) { EACH(vi, a.v[i] >> n); }
QINS_ALWAYS_INLINE vi vi_sra(vi a, int n) { EACH(vi, (uint32_t)(to_int(a.v[i]) >> n)); }
QINS_ALWAYS_INLINE vi vi_sll(vi a, int n) { EACH(vi, a.v[i] << n); }
QINS_ALWAYS_INLINE vi vi_count(vi n, vi a, vi b) { EACH(vi, n.v[i] + (to_int(a.v[i]) >= to_int(b.v[i]))); }
QINS_ALWAYS_INLINE vi vi_lookup(const uint32_t *table, vi at) { EACH(vi, table[at.v[i]]); }
QINS_ALWAYS_INLINE vi vi_signs(uint32_t mask) { EACH(vi, (mask >> i & 1u) << 31); }
QINS_ALWAYS_INLINE vi vi_load_u8(const uint8_t *p) { EACH(vi, p[i]); }
QINS_ALWAYS_INLINE void vi_store_u8(uint8_t *p, vi a)
{
    LANES { p[i] = (uint8_t)a.v[i]; }
}
QINS_ALWAYS_INLINE vi vi_load_u16(const uint16_t *p)
{
    uint16_t h[QINS_LANES];
    memcpy(h, p, sizeof h);
    EACH(vi, h[i]);
}
QINS_ALWAYS_INLINE void vi_store_u16(uint16_t *p, vi a)
{
    uint16_t h[QINS_LANES];
    LANES { h[i] = (uint16_t)a.v[i]; }
    memcpy(p, h, sizeof h);
}

QINS_ALWAYS_INLINE vf vf_load_f64(const double *p)
{
    double d[QINS_LANES];
    memcpy(d, p, sizeof d);
    EACH(vf, (float)d[i]);
}
QINS_ALWAYS_INLINE void vf_store_f64(double *p, vf a)
{
    double d[QINS_LANES];
    LANES { d[i] = (double)a.v[i]; }
    memcpy(p, d, sizeof d);
}

/* IEEE binary16 in integer arithmetic: exponents differ by 112; subnormal halves are multiples of 2^-24. */
static float half_to_float(uint32_t h)
{
    uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude < 0x400u) {
        return to_float(sign | to_bits((float)magnitude * 5.9604644775390625e-08f));
    }
    if (magnitude >= 0x7c00u) {
        /* infinity, or NaN made quiet as the hardware conversions do */
        uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
        return to_float(sign | 0x7f800000u | quiet | (magnitude & 0x3ffu) << 13);
    }
    return to_float(sign | ((magnitude << 13) + (112u << 23)));
}

static uint16_t half_from_float(float x)
{
    uint32_t u = to_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    }
    if (a >= 0x477ff000u) { /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (a < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the subnormal's integer, rounded, in the low bits */
        return (uint16_t)(sign | (to_bits(to_float(a) + 0.5f) - to_bits(0.5f)));
    }
    uint32_t rounded = a + 0xfffu + (a >> 13 & 1u);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

QINS_ALWAYS_INLINE vf vf_load_f16(const uint16_t *p)
{
    vi h = vi_load_u16(p);
    EACH(vf, half_to_float(h.v[i]));
}
QINS_ALWAYS_INLINE void vf_store_f16(uint16_t *p, vf a)
{
    vi h;
    LANES { h.v[i] = half_from_float(a.v[i]); }
    vi_store_u16(p, h);
}

QINS_ALWAYS_INLINE vi vi_sign_bytes(const int8_t *p) { EACH(vi, p[i] < 0 ? 0x80000000u : 0u); }
QINS_ALWAYS_INLINE vf vf_set2(float a, float b) { EACH(vf, i < QINS_LANES / 2 ? a : b); }
QINS_ALWAYS_INLINE vf vf_fma(vf a, vf b, vf c) { EACH(vf, a.v[i] * b.v[i] + c.v[i]); }
QINS_ALWAYS_INLINE float vf_sum(vf a) { return sum_lanes(a.v); }
/* Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low bits: |a| < 2^22 here. */
QINS_ALWAYS_INLINE vi vi_round(vf a) { EACH(vi, to_bits(a.v[i] + 12582912.0f) - to_bits(12582912.0f)); }
QINS_ALWAYS_INLINE vf vf_of_ints(vi a) { EACH(vf, (float)to_int(a.v[i])); }

typedef const int16_t *vt;
typedef struct {
    int16_t v[QINS_BLOCK];
} vw;
#define X_ORDER {0, 1, 2, 3, 4, 5, 6, 7}
#define WORD_UNIT(t) ((t)->word_unit)
#define WORD_STEP 64
#define LEAST_MU 0.0f
#define WORD_ROWS 1
#define WORD_SETS 1
QINS_ALWAYS_INLINE vt vt_load(const qins_log8_words *t) { return t->word; }
QINS_ALWAYS_INLINE vw vw_decode(const vt *table, const uint8_t *codes)
{
    vw w;
    for (int i = 0; i < QINS_BLOCK; i++) {
        w.v[i] = (*table)[codes[i]];
    }
    return w;
}
QINS_ALWAYS_INLINE vi vw_add(vi sums, const vw *w, const int16_t *x)
{
    LANES
    {
        int32_t sum = to_int(sums.v[i]);
        for (int j = 4 * i; j < 4 * i + 4; j++) {
            sum += (int32_t)w->v[j] * x[j];
        }
        sums.v[i] = (uint32_t)sum;
    }
    return sums;
}

#define FLOAT_ROWS 4
#define FLOAT_PANELS 1

#include "kernels.inc"
