/* What encoding and decoding of streams of residuals share; see exact.h. */
#ifndef QINS_RESIDUALS_H
#define QINS_RESIDUALS_H

#include "exact.h"
#include "reader.h"

enum {
    QINS_EXACT_HEADER = 32,
    QINS_EXACT_STATES = 4 * QINS_RANS_LANES /* bytes at the beginning of a block */
};

/* A matrix of codes, and how the residuals of its weights are coded */
typedef struct {
    const qins_codes *e;
    qins_dtype dtype;
    int mantissa_bits;
    uint8_t level_mask;
    qins_decoder from;
    uint32_t scheme[256 * 8]; /* see qins_restoring */
    size_t block_rows, blocks;
} qins_residuals;

void qins_residuals_init(qins_residuals *r, const qins_kernels *kernels, const qins_codes *e, qins_dtype dtype);
/* Dequantizes n <= QINS_WINDOW weights from column k, a multiple of QINS_WINDOW. Returns their codes, a byte each;
 * `room` is for n rounded up to 64. */
const uint8_t *qins_residuals_window(const qins_residuals *r, size_t row, size_t k, size_t n, uint16_t *decoded,
                                     uint8_t *room);

static inline uint32_t scheme_at(const qins_residuals *r, uint8_t code, uint16_t decoded)
{
    return exact_scheme(r->scheme, code & r->level_mask, decoded, r->mantissa_bits);
}

static inline uint64_t get64(const uint8_t *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }

static inline void put64(uint8_t *p, uint64_t v)
{
    put32(p, (uint32_t)v);
    put32(p + 4, (uint32_t)(v >> 32));
}

#endif
