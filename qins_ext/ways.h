/* Dispatch of products. A way is one of the kernels that can compute a product. */
#ifndef QINS_WAYS_H
#define QINS_WAYS_H

#include "sizes.h"

typedef enum {
#define X(name) QINS_##name,
#include "ways.def"
#undef X
    QINS_WAY_COUNT
} qins_way;

extern const char *const qins_way_names[QINS_WAY_COUNT];

qins_way qins_choose_way(const qins_kernels *k, const qins_codes *e, size_t batch, qins_dtype dtype);
/* The panels that a way uses, or NULL. */
const qins_panels *qins_panels_of(const qins_kernels *k, qins_way way);
/* For tests and benchmarks: forces this way on every product that supports it; QINS_WAY_COUNT: back to the fastest. */
void qins_force_way(qins_way way);

#endif
