/* Encoding of whole matrices: ranges, levels, and the split of rows over threads. */
#include <float.h>

#include "encode.h"

static void atomic_lower(atomic_int_least32_t *a, int32_t x)
{
    int_least32_t seen = atomic_load(a);
    while (seen > x && !atomic_compare_exchange_weak(a, &seen, x)) {
    }
}

/* -- golden and log9 -------------------------------------------------------------------------- */

static void range_items(void *context, size_t begin, size_t end)
{
    qins_encoding *c = context;
    qins_reader r;
    qins_reader_init(&r, c->kernels, c->w);
    qins_range range = {INT32_MAX, 0};
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, c->w->cols, &row, &k);
        const float *w = qins_read_row(&r, row, k, &n);
        range = c->e->codec == QINS_rational ? c->kernels->range_rational(w, n, range)
                                             : c->kernels->range_golden(w, n, range);
    }
    atomic_lower(&c->lo, range.lo);
    atomic_raise(&c->hi, range.hi);
}

static void golden_items(void *context, size_t begin, size_t end)
{
    qins_encoding *c = context;
    const qins_golden_tables *t = c->tables.golden;
    qins_reader r;
    qins_reader_init(&r, c->kernels, c->w);
    size_t cols = c->w->cols;
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, cols, &row, &k);
        const float *w = qins_read_row(&r, row, k, &n);
        uint8_t *stored = c->e->codes + row * cols + k;
        if (c->e->codec == QINS_golden) {
            c->kernels->encode_golden(w, n, t, stored, c->e->sign + row * cols + k);
        } else {
            c->kernels->encode_log9(w, n, t, stored, c->e->sign_bits + row * ceil_div(cols, 8) + k / 8);
        }
    }
}

static int encode_golden(qins_encoding *c, int threads)
{
    size_t cols = c->w->cols, items = c->w->rows * c->windows;
    size_t grain = items_per_grain(cols < QINS_WINDOW ? cols : QINS_WINDOW);
    qins_parallel(items, grain, threads, range_items, c);
    qins_range range = {atomic_load(&c->lo), atomic_load(&c->hi)};
    if (range.hi >= QINS_INFINITY_BITS) {
        return 1;
    }
    qins_golden_tables t;
    qins_golden_tables_build(&t, range);
    c->e->log_min = t.log_min;
    c->e->log_max = t.log_max;
    c->tables.golden = &t;
    qins_parallel(items, grain, threads, golden_items, c);
    return 0;
}

/* -- rational --------------------------------------------------------------------------------- */

static void rational_items(void *context, size_t begin, size_t end)
{
    qins_encoding *c = context;
    qins_reader r;
    qins_reader_init(&r, c->kernels, c->w);
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, c->w->cols, &row, &k);
        const float *w = qins_read_row(&r, row, k, &n);
        c->kernels->encode_log8(w, n, 1.0f, c->tables.log8, c->e->codes + row * c->w->cols + k);
    }
}

static float projected(float alpha, int32_t magnitude)
{
    float z = (float)(1.0 / (1.0 + (double)alpha * (double)from_bits32(magnitude)));
    return z > FLT_MIN ? z : FLT_MIN; /* not 0, which would decode to infinity */
}

static int encode_rational(qins_encoding *c, int threads)
{
    size_t cols = c->w->cols, items = c->w->rows * c->windows;
    size_t grain = items_per_grain(cols < QINS_WINDOW ? cols : QINS_WINDOW);
    qins_parallel(items, grain, threads, range_items, c);
    int32_t lo = atomic_load(&c->lo), hi = atomic_load(&c->hi);
    if (hi >= QINS_INFINITY_BITS) {
        return 1;
    }
    c->e->z_min = projected(c->e->alpha, hi);
    c->e->z_max = projected(c->e->alpha, lo < hi ? lo : hi);
    qins_log8_tables t;
    qins_rational_tables_build(&t, c->e->alpha, c->e->z_min, c->e->z_max);
    c->tables.log8 = &t;
    qins_parallel(items, grain, threads, rational_items, c);
    return 0;
}

typedef struct {
    void (*kernel)(const float *, size_t, float, float *);
    const float *src;
    float *dst, alpha;
} projection;

static void project_part(void *context, size_t begin, size_t end)
{
    const projection *p = context;
    p->kernel(p->src + begin, end - begin, p->alpha, p->dst + begin);
}

void qins_rational(const qins_kernels *kernels, const float *src, size_t n, float alpha, int back, int threads,
                   float *dst)
{
    projection p = {back ? kernels->unproject : kernels->project, src, dst, alpha};
    qins_parallel(n, QINS_GRAIN, threads, project_part, &p);
}

/* -- any codec ---------------------------------------------------------------------------------- */

int qins_encode(const qins_kernels *kernels, const qins_matrix *w, const float *importance, int threads, qins_codes *e)
{
    qins_encoding c = {.kernels = kernels, .w = w, .e = e, .importance = importance};
    c.windows = ceil_div(w->cols, QINS_WINDOW);
    atomic_init(&c.lo, INT32_MAX);
    atomic_init(&c.hi, 0);
    switch (e->codec) {
    case QINS_log8:
    case QINS_log6:
    case QINS_log5:
    case QINS_log4:
        return qins_encode_log8(&c, threads);
    case QINS_rational:
        return encode_rational(&c, threads);
    default:
        return encode_golden(&c, threads);
    }
}
