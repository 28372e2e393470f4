/* Shared by every isa_<name>.c: names, and loops over n elements, 16 at a time.
 *
 * Before including this, an isa_<name>.c defines
 *   ISA     its name
 *   FN      function attributes (the target features that the compiler may use in the function)
 * and then the vector operations in which the *.inc files are written. (WORD, in front of most of their definitions, is
 * the isa's own macro for an inlined FN.) Each operates on 16 lanes:
 *   types   vf (float32), vi (int32), vl (a table of 128 float32, loaded)
 *   floats  vf_load vf_store vf_set1 vf_abs vf_add vf_sub vf_mul vf_div vf_bits vf_flip(v, signs)
 *           vf_lookup(const float *table, vi index)  vl_load(const float *)  vf_level(const vl *, vi m)
 *           vf_negative(v): 16-bit mask, lane i in bit i, of v < 0 (not -0.0, not NaN)
 *   ints    vi_set1 vi_add vi_sub vi_and vi_or vi_min vi_max vi_sra vi_srl vi_sll (one count for all lanes)
 *           vi_count(n, a, b): n + (a >= b)      vi_lookup(const uint32_t *table, vi index)
 *           vi_load_u8 vi_store_u8 (low bytes)   vi_signs(mask): 0x80000000 where the mask's bit is set
 *           vi_sign_bytes(const int8_t *): 0x80000000 where negative
 *   levels  FEW_LEVELS, if it searches for the nearest level of packed codes in registers: ve_load(t, bits)
 *           vf_nearest(const ve *, vf magnitude, int bits, vi *last): see nearest_value
 *   sums    vf_fma(a, b, c): a * b + c, fused or not     vf_sum(v)     vi_round(v): to nearest, |v| < 2^31
 *           SUM_LANES, if its vf_sum adds in the order of sum_lanes
 *           SUMS, if it has its own vf_sums(const vf *, int n, float *sums), the sums of n vectors
 *           SUM4, if it has its own vf_sum4(const vf *, float *sums): as four times vf_sum, bit for bit
 *           ATTEND_QUERIES: queries of attention, 1 or 4, whose sums with 4 keys, or of 4 vectors, fit in registers
 *           vf_set2(a, b): a in lanes 0 to 7, b in the others
 *   golden  if GOLDEN_WORDS: 64 magnitudes with their signs, element 4j + k in byte k of lane j, and their values
 *           vg_load(const qins_golden_factors *)   vs_golden(stored, sign)   vs_log9(stored, sign_bits)
 *           vs_value(const vg *, const vs *, k): values of elements 4j + k in lane j; k is a literal
 *   words   64 weights of log8 as 16-bit fixed-point values, called words below; see qins_log8_words:
 *           vt_load(t)  vw_decode(const vt *, const uint8_t *codes)
 *           vw_add(vi sums, const vw *, const int16_t *x): sums + products, four to a lane; lanes 0 to 7
 *           get elements 0 to 31, and x is in X_ORDER: its eight i belongs to eight X_ORDER[i] of the elements
 *           vf_of_ints(vi)     WORD_UNIT(t): the value of 1        LEAST_MU: the smallest mu that is exact enough
 *           WORD_STEP: columns whose sums fit 32 bits: 64 or, for words up to QINS_WORD_MAX, 128
 *           WORD_ROWS: rows of weights, 1 or 2, whose sums with 8 rows of activations fit in registers
 *           ROWS_OF_ONE: rows of weights that are multiplied together with one row of activations: 1, or 4 where what
 *           a row costs beside its columns (sums of lanes, factors, a branch that is hard to predict) is as much as a
 *           few hundred columns
 *           WORD_SETS: up to this many sets of 8 rows of activations, decoding codes again is faster than loading words
 *   packed  optional, for whole blocks of 64 packed codes (see packed.h). If DECODE_PACKED, words without log8's form:
 *           vp_load(t)  vw_decode_packed(const vp *, const uint8_t *packed, int bits)
 *           If PAIRED, words of log4, two blocks at a time: vm_load(t)
 *           vw_decode_pair(const vm *, const uint8_t *packed, vw *): two of 64 words, the first block in lanes 0 to 7,
 *           in the order of pair_blocks      pair_words(int16_t *): reorders two blocks of activations from X_ORDER
 *           If UNPACK_BLOCK, log8's form: unpack_block(packed, bits, codes)
 *           If PACKED_VALUES, the most bits for which it has packed_floats(packed, n, value, bits, out), which looks up
 *           the values of whole blocks faster than decode_log8
 *   values  WORD_VALUES, if it has vw_values(vw, vf *to), which converts 64 words to four vectors, times VALUE_UNIT:
 *           lane j of vector v is that of element VALUE_ORDER(v, j)
 *   pairs   DOT_WORDS, if it multiplies words faster than floats (see word_panels.inc):
 *           vi_dot(vi sums, int32_t two, vi x): sums + products of the two words in `two` with those of each lane of x
 *           vi_load   vw_multiply(int16_t *w, first, second): 64 words of vw, times these times 2^-14, rounded
 *   panels  FLOAT_ROWS, FLOAT_PANELS: rows and panels of sums that fit in registers (see panels.inc);
 *           TRANSPOSE, if it has its own transpose_<isa>; TILES, if it has AMX tiles
 *   bytes   BYTES, if it has AVX-512's VBMI and VNNI (see single.inc); HALVES, if it has AVX512_BF16, too
 *   restore if RESTORE, for restore.inc: vi_load vi_xor vi_min_u vi_mul   vi_nonzero(v): 16-bit mask of v != 0
 *           vi_refill(states, &words)      vi_list(list, v, mask)
 *   others  vf_load_f16 vf_store_f16 vf_load_f64 vf_store_f64 vi_load_u16 vi_store_u16 (low halves) vf_of_bits
 * Loads and stores accept any alignment. Float sums are never contracted into fused multiply-adds.
 */
#include <string.h>

#include "packed.h"

#define NAME__(base, isa) base##_##isa
#define NAME_(base, isa) NAME__(base, isa)
#define NAME(base) NAME_(base, ISA)

/* The last, partial block of an array uses a padded copy, so that no operation needs a mask. */
#define TAIL_IN(type, name, src, n) \
    type name[QINS_LANES] = {0};    \
    memcpy(name, (src), (size_t)(n) * sizeof(type))
#define TAIL_OUT(dst, name, n) memcpy((dst), name, (size_t)(n) * sizeof(*name))

/* Computed as an integer: prefetching beyond the array never faults, but forming such a pointer is undefined. */
#define AHEAD(p, bytes) ((const void *)((uintptr_t)(p) + (bytes)))

static inline void fetch_lines(qins_fetch *f, size_t lines)
{
    for (; lines > 0; lines--, f->next += 64) {
        if (f->left-- == 0) {
            f->left = f->lines - 1;
            f->next += f->jump;
        }
        QINS_PREFETCH((const void *)f->next);
        if (f->other != 0) {
            QINS_PREFETCH((const void *)(f->next + f->other));
        }
    }
}

/* Adds 16 lanes in a fixed order. */
static inline float sum_lanes(float *lane)
{
    for (int s = QINS_LANES / 2; s > 0; s /= 2) {
        for (int i = 0; i < s; i++) {
            lane[i] += lane[i + s];
        }
    }
    return lane[0];
}

/* Functions marked SPECIALIZED are compiled anew for each combination of some arguments that their callers know, so
 * that sums stay in registers. EACH_BATCH is one body per number of rows of activations; CALL(n) is the body for a
 * constant n. With ONE_BODY, which takes a tenth of the time to compile, both are left to loops. */
#if ONE_BODY
#define SPECIALIZED static
#define EACH_BATCH(n, CALL)    \
    {                          \
        const int n_ = (int)n; \
        CALL(n_);              \
    }
#else
#define SPECIALIZED QINS_ALWAYS_INLINE
#define EACH_BATCH(n, CALL) \
    switch (n) {            \
    case 1:                 \
        CALL(1);            \
        break;              \
    case 2:                 \
        CALL(2);            \
        break;              \
    case 3:                 \
        CALL(3);            \
        break;              \
    case 4:                 \
        CALL(4);            \
        break;              \
    case 5:                 \
        CALL(5);            \
        break;              \
    case 6:                 \
        CALL(6);            \
        break;              \
    case 7:                 \
        CALL(7);            \
        break;              \
    default:                \
        CALL(8);            \
    }
#endif
