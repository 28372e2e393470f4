/* Tests of decoder layers, which test_core.c runs. */
#ifndef QINS_TEST_DECODER_H
#define QINS_TEST_DECODER_H

#include "qins.h"

void check_decoder(const qins_kernels *k, int slow, void (*check)(int, const char *, const char *, size_t, size_t));

#endif
