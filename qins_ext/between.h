/* What a transformer computes between its products: norms and gates of rows. */
#ifndef QINS_BETWEEN_H
#define QINS_BETWEEN_H

#include "qins.h"

/* RMS norm: weight[i] * x[i] / sqrt(mean of squares + epsilon). out may be x. */
void qins_norm_row(const qins_kernels *k, const float *x, size_t n, const float *weight, float epsilon, float *out);

/* The same of rows x n values of any dtype but float64, which x and y share; rounds once. Returns -1 if out of memory.
 */
int qins_norm_rows(const qins_kernels *k, qins_dtype dtype, const void *x, size_t rows, size_t n, const float *weight,
                   float epsilon, void *y, int threads);

/* y = activation(gate) * up, rows x n values. Rows of gate and up begin `next` elements apart, those of y n. Rounds
 * once. */
void qins_gate_rows(const qins_kernels *k, qins_dtype dtype, const void *gate, const void *up, size_t next, size_t rows,
                    size_t n, int gelu, void *y, int threads);

#endif
