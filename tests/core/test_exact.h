/* Tests of exact restoring, which test_core.c runs. */
#ifndef QINS_TEST_EXACT_H
#define QINS_TEST_EXACT_H

#include "qins.h"

/* damages: streams to damage, of each matrix */
void check_exact(const qins_kernels *k, int damages, void (*check)(int, const char *, const char *, size_t, size_t));

#endif
