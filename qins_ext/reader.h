/* Reads any matrix as float32, and splits matrices into work items, for encoding and decoding. */
#ifndef QINS_READER_H
#define QINS_READER_H

#include "sizes.h"

enum { QINS_INFINITY_BITS = 0x7f800000 };

typedef struct {
    const qins_kernels *kernels;
    const qins_matrix *w;
    size_t row, start, end; /* contents of the window */
    float window[QINS_WINDOW];
} qins_reader;

void qins_reader_init(qins_reader *r, const qins_kernels *kernels, const qins_matrix *w);
/* Returns elements [k, k + *n) of a row; *n is reduced to at most QINS_WINDOW. Float32 rows are not copied. */
const float *qins_read_row(qins_reader *r, size_t row, size_t k, size_t *n);
/* Returns the largest bit pattern of |w| among elements [k, k + n) of a row. */
int32_t qins_absmax(qins_reader *r, size_t row, size_t k, size_t n);

/* Each part for a thread has at least this many elements: about 20 microseconds of work. */
enum { QINS_GRAIN = 32768 };

static inline size_t items_per_grain(size_t cols) { return ceil_div(QINS_GRAIN, cols < 1 ? 1 : cols); }

/* A work item is a window of columns. Maps an item's number to a row and its columns [*k, *k + returned). */
static inline size_t item_columns(size_t item, size_t windows, size_t cols, size_t *row, size_t *k)
{
    *row = item / windows;
    *k = item % windows * QINS_WINDOW;
    return cols - *k < QINS_WINDOW ? cols - *k : QINS_WINDOW;
}

#endif
