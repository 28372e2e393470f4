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
/* The scale of a row in groups whose largest magnitude is `most` */
float qins_grouped_scale(float most);
/* Fills group scales and codes of `e`, which is one row in groups with a scale, from its e->cols finite elements w. It
 * compares fewer group scales than qins_encode_log8. */
void qins_encode_groups(const qins_kernels *kernels, const float *w, const qins_log8_tables *t, qins_codes *e);

#endif
