/* What a transformer computes between its products: norms and gates of rows, rotary embedding. */
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

/* Rotary embedding of heads in halves, of any dtype but float64: with x = (a, b), y = (a cos - b sin, b cos + a sin),
 * the cosines and sines of both halves given. Rounds each product and sum, as separate operations do. */
typedef struct {
    qins_dtype dtype;
    const void *x, *cosine, *sine; /* cosine, sine: (sequences or 1) x tokens x 2 half */
    void *y;
    size_t sequences, tokens, heads, half;
    size_t next_head;                                /* elements, in x and y */
    size_t x_sequence, x_token, y_sequence, y_token; /* elements to the next */
    size_t next_rotation; /* elements from a sequence's cosines to the next one's; 0: all share them */
} qins_rotation;
void qins_rotate(const qins_kernels *k, const qins_rotation *r, int threads);

#endif
