/* The ways to multiply, and which of them a product takes. */
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
/* The panels that a way goes through, or NULL. */
const qins_panels *qins_panels_of(const qins_kernels *k, qins_way way);
/* From now on every product that can takes this way, for tests and benchmarks; QINS_WAY_COUNT: the fastest again. */
void qins_force_way(qins_way way);

#endif
