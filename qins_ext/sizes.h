/* Small arithmetic shared by the files of the core. */
#ifndef QINS_SIZES_H
#define QINS_SIZES_H

#include <string.h>

#include "qins.h"

static inline size_t ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }
static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

static inline int32_t bits32(float x)
{
    int32_t i;
    memcpy(&i, &x, sizeof i);
    return i;
}

static inline float from_bits32(int32_t i)
{
    float x;
    memcpy(&x, &i, sizeof x);
    return x;
}

/* Arrays in mapped files may be unaligned, so their floats are read with memcpy. */
static inline float float_at(const float *p, size_t i)
{
    float x;
    memcpy(&x, (const char *)p + i * sizeof x, sizeof x);
    return x;
}

static inline size_t item_size(qins_dtype dtype)
{
    static const size_t size[] = {[QINS_F32] = 4, [QINS_F16] = 2, [QINS_BF16] = 2, [QINS_F64] = 8};
    return size[dtype];
}

/* Columns that share one activation scale in planes. */
static inline size_t scale_step(const qins_codes *e)
{
    return e->group_size % (2 * QINS_DEPTH) == 0 ? 2 * QINS_DEPTH : QINS_DEPTH;
}

/* Groups of 32 or 64, whose scales are folded into the words of planes. */
static inline int folded(const qins_codes *e) { return e->group_size == QINS_DEPTH / 2 || e->group_size == QINS_DEPTH; }

/* Columns that share one activation scale in kernels that fold. */
static inline size_t folding_step(const qins_codes *e) { return folded(e) ? 2 * QINS_DEPTH : scale_step(e); }

/* A row's group scales; NULL if the inputs are not grouped. */
static inline const uint8_t *group_row(const qins_codes *e, size_t row)
{
    return e->group_size > 0 ? e->group_scale + row * ceil_div(e->cols, e->group_size) : NULL;
}

#endif
