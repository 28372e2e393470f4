/* Outliers: activations too large for fixed point.
 *
 * If a few activations hold much of a row's energy, products are only as exact as the weights of these few columns.
 * Those may be small next to their neighbors, with which they share a scale, and then fixed point keeps few of their
 * bits. So outliers are removed from their row before it is rounded, and multiplied with dequantized weights in
 * float32. */
#include <string.h>

#include "packed.h"

/* An outlier is more than this many times the root mean square of the rest of its row. Measured on the activations of
 * SmolLM2-135M: there are 0.9 per row, and the largest relative error of a row's products falls from 1.1e-3 to 2.2e-4
 * (AVX2). */
static const float OUTLIER = 10.0f;

int qins_take_outliers(const qins_kernels *k, const float *x, size_t n, float *rest, qins_outliers *o)
{
    const float share = OUTLIER * OUTLIER / ((float)n + OUTLIER * OUTLIER);
    o->count = 0;
    while (o->count < QINS_OUTLIERS) {
        const float *left = o->count > 0 ? rest : x;
        float most = from_bits32(k->absmax(left, n)), energy;
        k->dot_f32(left, n, left, n, 1, &energy);
        const float limit = share * energy; /* a^2 > OUTLIER^2 (energy - a^2)/n, without the difference */
        if (!(most * most > limit)) {       /* also if x has NaN or infinity */
            break;
        }
        if (left != rest) {
            memcpy(rest, x, n * sizeof *x);
        }
        for (size_t b = 0; b < n; b += QINS_BLOCK) {
            const size_t end = least(b + QINS_BLOCK, n);
            most = from_bits32(k->absmax(rest + b, end - b));
            for (size_t i = b; most * most > limit && i < end && o->count < QINS_OUTLIERS; i++) {
                if (rest[i] * rest[i] > limit) {
                    o->col[o->count] = (uint32_t)i;
                    o->value[o->count++] = rest[i];
                    rest[i] = 0.0f;
                }
            }
        }
    }
    return o->count > 0;
}

void qins_start_columns(qins_columns *c, size_t row, size_t rows)
{
    c->row = row;
    c->rows = rows;
    c->decoded = 0;
}

static void decode_column(const qins_codes *e, const qins_log8_words *t, const qins_columns *c, size_t col,
                          float *weight)
{
    uint8_t codes[QINS_WORD_ROWS];
    qins_codes_of_column(e, c->row, c->rows, col, codes);
    const size_t groups = e->group_size > 0 ? ceil_div(e->cols, e->group_size) : 0;
    const uint8_t *group = groups > 0 ? group_row(e, c->row) + col / e->group_size : NULL;
    for (size_t i = 0; i < c->rows; i++) {
        const float unit = plane_unit(e, t, c->row + i, group != NULL ? group + i * groups : NULL);
        const float signs[2] = {unit, -unit}; /* a branch would be mispredicted half the time */
        weight[i] = signs[codes[i] >> 7] * t->plane[codes[i] & 127];
    }
}

/* Compilers vectorize this loop. */
static void add_scaled(const float *restrict x, float a, size_t n, float *restrict y)
{
    for (size_t i = 0; i < n; i++) {
        y[i] += a * x[i];
    }
}

static const float *find_column(const qins_codes *e, const qins_log8_words *t, qins_columns *c, uint32_t col)
{
    const size_t there = least(c->decoded, QINS_COLUMNS);
    for (size_t i = 0; i < there; i++) {
        if (c->col[i] == col) {
            return c->weight[i];
        }
    }
    const size_t i = c->decoded++ % QINS_COLUMNS;
    c->col[i] = col;
    decode_column(e, t, c, col, c->weight[i]);
    return c->weight[i];
}

void qins_add_outliers(const qins_codes *e, const qins_log8_words *t, const qins_outliers *o, qins_columns *c, float *y)
{
    for (uint32_t j = 0; j < o->count; j++) {
        add_scaled(find_column(e, t, c, o->col[j]), o->value[j], c->rows, y);
    }
}
