/* Reading matrices of any dtype and strides as float32, a window at a time. */
#include <string.h>

#include "reader.h"

void qins_reader_init(qins_reader *r, const qins_kernels *kernels, const qins_matrix *w)
{
    r->kernels = kernels;
    r->w = w;
    r->row = r->start = r->end = 0;
}

static void fill_window(qins_reader *r, size_t row, size_t k)
{
    const qins_matrix *w = r->w;
    size_t size = item_size(w->dtype), n = w->cols - k < QINS_WINDOW ? w->cols - k : QINS_WINDOW;
    const char *src = (const char *)w->data + (ptrdiff_t)row * w->row_stride + (ptrdiff_t)k * w->col_stride;
    if (w->col_stride == (ptrdiff_t)size) {
        r->kernels->widen[w->dtype](src, n, r->window);
    } else {
        QINS_ALIGNED(8) char gathered[256 * 8];
        for (size_t i = 0; i < n; i += 256) {
            size_t part = n - i < 256 ? n - i : 256;
            for (size_t j = 0; j < part; j++) {
                memcpy(gathered + j * size, src + (ptrdiff_t)(i + j) * w->col_stride, size);
            }
            r->kernels->widen[w->dtype](gathered, part, r->window + i);
        }
    }
    r->row = row;
    r->start = k;
    r->end = k + n;
}

const float *qins_read_row(qins_reader *r, size_t row, size_t k, size_t *n)
{
    const qins_matrix *w = r->w;
    if (*n > QINS_WINDOW) {
        *n = QINS_WINDOW;
    }
    if (w->dtype == QINS_F32 && w->col_stride == (ptrdiff_t)sizeof(float)) {
        return (const float *)(const void *)((const char *)w->data + (ptrdiff_t)row * w->row_stride) + k;
    }
    if (r->row != row || k < r->start || k + *n > r->end) {
        fill_window(r, row, k);
    }
    return r->window + (k - r->start);
}

int32_t qins_absmax(qins_reader *r, size_t row, size_t k, size_t n)
{
    int32_t best = 0;
    for (size_t part; n > 0; k += part, n -= part) {
        part = n;
        const float *w = qins_read_row(r, row, k, &part);
        int32_t m = r->kernels->absmax(w, part);
        best = m > best ? m : best;
    }
    return best;
}

qins_nonfinite qins_find_nonfinite(const qins_kernels *kernels, const qins_matrix *w)
{
    qins_nonfinite found = {0, 0};
    qins_reader r;
    qins_reader_init(&r, kernels, w);
    for (size_t row = 0; row < w->rows; row++) {
        for (size_t k = 0, n; k < w->cols; k += n) {
            n = w->cols - k;
            const float *p = qins_read_row(&r, row, k, &n);
            if (kernels->absmax(p, n) < QINS_INFINITY_BITS) {
                continue;
            }
            for (size_t i = 0; i < n; i++) {
                if ((bits32(float_at(p, i)) & INT32_MAX) >= QINS_INFINITY_BITS && found.count++ == 0) {
                    found.first = row * w->cols + k + i;
                }
            }
        }
    }
    return found;
}
