/* The original of a matrix of codes, bit for bit: residuals of bfloat16 or float16 weights.
 *
 * A residual is the distance of a weight from its dequantized code, counted in numbers of its dtype. Its spread is
 * known from the code: it is the distance to the neighboring codes. So residuals are coded with rANS (see rans.h), with
 * a table of frequencies for each quarter octave of that distance. Where it is above 32, the low bits of the residual
 * are nearly uniform, and follow as they are.
 *
 * A stream, with integers in little-endian order:
 *   4  "qex1"
 *   1  dtype: 1 float16, 2 bfloat16            3  zeros
 *   8  rows        8  columns                  4  rows per block        4  blocks
 *      tables of frequencies, as qins_rans_describe writes them, for QINS_EXACT_TABLES tables
 *      for each block: number of words (4), bytes of bits (4)
 *      for each block: the states of 16 lanes (4 each), words, bits
 * Each row begins at lane 0. The bits are in order of the weights, lowest bit first. */
#ifndef QINS_EXACT_H
#define QINS_EXACT_H

#include "rans.h"

enum {
    QINS_EXACT_CODED = 20, /* the tables of distances; see scheme_of() */
    /* the table of codes that stand for 0; their symbols begin at 0, not at a center */
    QINS_EXACT_ZERO = QINS_EXACT_CODED,
    QINS_EXACT_TABLES = QINS_EXACT_ZERO + 1,
    QINS_EXACT_CENTER = 64, /* the symbol of residual 0 */
    QINS_EXACT_ESCAPE = 16  /* bits of a weight that no symbol stands for */
};

static inline uint32_t get32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline void put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(v >> 8 * i);
    }
}

/* How a weight is coded, by its level and its dequantized value: its table's first slot, and from bit 16 on the number
 * of bits that follow. */
static inline uint32_t exact_scheme(const uint32_t *schemes, int level, uint32_t decoded, int mantissa_bits)
{
    return schemes[8 * level + (int)(decoded >> (mantissa_bits - 3) & 7)];
}
static inline uint32_t exact_table(uint32_t scheme) { return (scheme & 0xffff) / QINS_RANS_SLOTS; }
static inline int exact_shift(uint32_t scheme) { return (int)(scheme >> 16); }
static inline int exact_center(uint32_t scheme)
{
    return exact_table(scheme) == QINS_EXACT_ZERO ? 0 : QINS_EXACT_CENTER;
}

/* The bits of a number as an integer that ascends with it, seen from the side of `decoded`'s sign; and back. */
static inline int32_t exact_order(uint32_t bits, uint32_t decoded)
{
    const int32_t magnitude = bits & 0x7fff;
    return (bits ^ decoded) & 0x8000 ? ~magnitude : magnitude;
}

static inline uint16_t exact_bits(int32_t order, uint32_t decoded)
{
    const uint32_t magnitude = (uint32_t)(order < 0 ? ~order : order) & 0x7fff;
    return (uint16_t)(magnitude | ((decoded & 0x8000) ^ (order < 0 ? 0x8000u : 0)));
}

/* A block that is being decoded. */
struct qins_restoring {
    uint32_t state[QINS_RANS_LANES];
    const uint8_t *words, *end;
    const uint8_t *bits; /* that follow */
    size_t bits_bytes, at;
    const uint32_t *slots;  /* of all tables */
    const uint32_t *scheme; /* by 8 * level + the highest 3 bits of the dequantized mantissa */
    int mantissa_bits;
    uint8_t level_mask; /* of a code */
};

/* A block that is being encoded. */
struct qins_recording {
    const uint32_t *scheme; /* as in qins_restoring */
    const uint32_t *entry;  /* by 256 * table + symbol: frequency | first << 16; 0: not in the table */
    uint8_t *bits;          /* that follow: at most 2 bytes per weight, and 4 */
    uint64_t pending;       /* those that are not yet written */
    int pending_count;
    size_t bits_bytes;
    int mantissa_bits;
    uint8_t level_mask;
};

static inline void exact_put_bits(qins_recording *r, uint32_t value, int count)
{
    r->pending |= (uint64_t)value << r->pending_count;
    r->pending_count += count;
    if (r->pending_count >= 32) {
        put32(r->bits + r->bits_bytes, (uint32_t)r->pending);
        r->bits_bytes += 4;
        r->pending >>= 32;
        r->pending_count -= 32;
    }
}

/* The symbol of a weight; *low: the bits that follow. */
static inline uint32_t exact_symbol(uint32_t scheme, uint32_t w, uint32_t decoded, uint32_t *low)
{
    const int32_t residual = exact_order(w, decoded) - (int32_t)(decoded & 0x7fff);
    const int32_t symbol = (residual >> exact_shift(scheme)) + exact_center(scheme);
    *low = (uint32_t)residual & ((1u << exact_shift(scheme)) - 1);
    return symbol >= 0 && symbol < QINS_RANS_ESCAPE ? (uint32_t)symbol : QINS_RANS_ESCAPE;
}

/* The entry of a weight's symbol; records the bits that follow. */
static inline uint32_t exact_record(qins_recording *r, uint32_t scheme, uint32_t w, uint32_t decoded)
{
    uint32_t low;
    const uint32_t *entry = r->entry + (size_t)256 * exact_table(scheme);
    const uint32_t found = exact_symbol(scheme, w, decoded, &low), symbol = entry[found] > 0 ? found : QINS_RANS_ESCAPE;
    if (symbol == QINS_RANS_ESCAPE) {
        exact_put_bits(r, w, QINS_EXACT_ESCAPE);
    } else if (exact_shift(scheme) > 0) {
        exact_put_bits(r, low, exact_shift(scheme));
    }
    return entry[symbol];
}

/* The next bits, at most 16; zeros beyond the end, which qins_exact_decode notices afterward */
static inline uint32_t exact_get_bits(qins_restoring *r, int count)
{
    const size_t byte = r->at / 8;
    uint32_t word = 0;
    if (byte + 4 <= r->bits_bytes) {
        word = get32(r->bits + byte);
    } else {
        for (size_t i = byte; i < r->bits_bytes; i++) {
            word |= (uint32_t)r->bits[i] << 8 * (i - byte);
        }
    }
    word = word >> r->at % 8 & ((1u << count) - 1);
    r->at += (size_t)count;
    return word;
}

/* The order of a weight, see exact_order */
static inline int32_t exact_next(qins_restoring *r, uint32_t scheme, uint8_t symbol, uint32_t decoded)
{
    if (symbol == QINS_RANS_ESCAPE) {
        return exact_order(exact_get_bits(r, QINS_EXACT_ESCAPE), decoded);
    }
    const int shift = exact_shift(scheme);
    const int32_t low = shift > 0 ? (int32_t)exact_get_bits(r, shift) : 0;
    return (int32_t)(decoded & 0x7fff) + (symbol - exact_center(scheme)) * (1 << shift) + low;
}

typedef enum { QINS_EXACT_OK, QINS_EXACT_NO_MEMORY, QINS_EXACT_DAMAGED } qins_exact_result;

/* Writes what restores w: rows x cols numbers of `dtype` (float16 or bfloat16), as their bits. *stream is allocated,
 * and to be freed. */
qins_exact_result qins_exact_encode(const qins_kernels *kernels, const qins_codes *e, const uint16_t *w,
                                    qins_dtype dtype, int threads, uint8_t **stream, size_t *bytes);
/* Restores rows x cols numbers of `dtype`. If the stream is damaged, their values are unspecified. */
qins_exact_result qins_exact_decode(const qins_kernels *kernels, const qins_codes *e, const uint8_t *stream,
                                    size_t bytes, qins_dtype dtype, int threads, uint16_t *w);

#endif
