/* State of one encoding, shared by encode.c and encode_log8.c. */
#ifndef QINS_ENCODE_H
#define QINS_ENCODE_H

#include <stdatomic.h>

#include "reader.h"

typedef struct {
    const qins_kernels *kernels;
    const qins_matrix *w;
    qins_codes *e;
    const float *importance; /* log8, packed: weight of each column's squared error, or NULL */
    size_t windows;          /* windows per row */
    union {
        const qins_golden_tables *golden;
        const qins_log8_tables *log8;
    } tables;
    atomic_int_least32_t lo, hi; /* golden: the range; hi also reveals non-finite weights */
} qins_encoding;

static inline void atomic_raise(atomic_int_least32_t *a, int32_t x)
{
    int_least32_t seen = atomic_load(a);
    while (seen < x && !atomic_compare_exchange_weak(a, &seen, x)) {
    }
}

/* encode_log8.c: returns 0, or 1 if a weight is not finite */
int qins_encode_log8(qins_encoding *c, int threads);

#endif
