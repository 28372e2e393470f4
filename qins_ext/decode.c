/* Decoding: spans of rows for kernels, and whole matrices. */
#include "packed.h"
#include "reader.h"

typedef struct {
    qins_decoder from;
    size_t row, col, cols, stride, windows;
    qins_dtype dtype;
    char *out;
} decoding;

void qins_decoder_init(qins_decoder *d, const qins_kernels *kernels, const qins_codes *e)
{
    d->kernels = kernels;
    d->e = e;
    if (log_bits(e->codec) > 0) {
        qins_log8_levels(e->mu, is_packed(e->codec), d->table);
    } else if (e->codec == QINS_rational) {
        qins_rational_levels(e->alpha, e->z_min, e->z_max, d->table);
    } else {
        qins_golden_values(e->log_min, e->log_max, d->table);
    }
}

/* k may be any column: unpacking starts at its block of 64. */
void qins_decode_packed(const qins_kernels *kernels, const qins_codes *e, const float *level, size_t row, size_t k,
                        size_t n, float *out)
{
    enum { WINDOW = 1024 };
    const uint8_t *group = group_row(e, row);
    uint8_t codes[WINDOW], scale[WINDOW / 32 + 1];
    while (n > 0) {
        const size_t begin = k / QINS_BLOCK * QINS_BLOCK, before = k - begin, part = least(n, WINDOW - before);
        const size_t first = k / e->group_size;
        qins_unpack(kernels, e, row, begin, before + part, codes);
        for (size_t g = first; g <= (k + part - 1) / e->group_size; g++) {
            scale[g - first] = log8_group_scale(group[g]);
        }
        kernels->decode_log8(codes + before, k - first * e->group_size, part, float_at(e->scale, row), scale,
                             e->group_size, level, out);
        k += part;
        n -= part;
        out += part;
    }
}

void qins_decode_span(const qins_decoder *d, size_t row, size_t k, size_t n, float *out)
{
    const qins_codes *e = d->e;
    if (is_packed(e->codec)) {
        qins_decode_packed(d->kernels, e, d->table, row, k, n, out);
        return;
    }
    const uint8_t *codes = e->codes + row * e->cols + k;
    switch (e->codec) {
    case QINS_golden:
        d->kernels->decode_golden(codes, e->sign + row * e->cols + k, n, d->table, out);
        break;
    case QINS_log9:
        d->kernels->decode_log9(codes, e->sign_bits + row * ceil_div(e->cols, 8) + k / 8, n, d->table, out);
        break;
    case QINS_rational:
        d->kernels->decode_log8(codes, k, n, 1.0f, NULL, 0, d->table, out);
        break;
    default:
        d->kernels->decode_log8(codes, k, n, float_at(e->scale, row), group_row(e, row), e->group_size, d->table, out);
    }
}

static void decode_items(void *context, size_t begin, size_t end)
{
    const decoding *d = context;
    float window[QINS_WINDOW + 8];
    for (size_t item = begin, i, k; item < end; item++) {
        size_t n = item_columns(item, d->windows, d->cols, &i, &k);
        char *out = d->out + (i * d->stride + k) * item_size(d->dtype);
        size_t before = d->from.e->codec == QINS_log9 ? (d->col + k) % 8 : 0;
        if (d->dtype == QINS_F32 && before == 0) {
            qins_decode_span(&d->from, d->row + i, d->col + k, n, (float *)(void *)out);
        } else {
            qins_decode_span(&d->from, d->row + i, d->col + k - before, n + before, window);
            d->from.kernels->narrow[d->dtype](window + before, n, out);
        }
    }
}

void qins_decode(const qins_kernels *kernels, const qins_codes *e, size_t row, size_t rows, size_t col, size_t cols,
                 int threads, qins_dtype dtype, void *out, size_t stride)
{
    decoding d = {.row = row, .col = col, .cols = cols, .stride = stride, .dtype = dtype, .out = out};
    qins_decoder_init(&d.from, kernels, e);
    d.windows = ceil_div(cols, QINS_WINDOW);
    size_t grain = items_per_grain(cols < QINS_WINDOW ? cols : QINS_WINDOW);
    qins_parallel(rows * d.windows, grain, threads, decode_items, &d);
}
