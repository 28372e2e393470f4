/* Quantized KV caches: short rows, each with its own range, written a few at a time and read all at once. */
#include "encode.h"
#include "packed.h"

enum { GRAIN_ELEMENTS = 16384, CANDIDATES = 4 };

/* Candidate scales of a row, as fractions of its largest magnitude. */
static const float FACTORS[CANDIDATES] = {1.0f, 0.97f, 0.94f, 0.91f};

typedef struct {
    const qins_kernels *kernels;
    const qins_cache *c;
    const char *x;
    char *out;
    qins_dtype dtype;
    size_t start, tokens;
    atomic_int nonfinite;
} caching;

/* The cache row for row `item` of the dense array, heads x tokens. */
static size_t cache_row(const caching *p, size_t item)
{
    return item / p->tokens * p->c->room + p->start + item % p->tokens;
}

static float from_bfloat16(uint16_t h) { return from_bits32((int32_t)((uint32_t)h << 16)); }

static uint16_t to_bfloat16(float x) /* finite */
{
    const uint32_t u = (uint32_t)bits32(x);
    uint32_t rounded = u + 0x7fffu + (u >> 16 & 1u);
    return (uint16_t)((rounded < 0x7f800000u ? rounded : u) >> 16); /* never rounds up to infinity */
}

/* -- golden ------------------------------------------------------------------------------------- */

static void golden_row(const caching *p, const float *w, size_t row)
{
    const qins_cache *c = p->c;
    size_t n = c->dim;
    qins_range none = {INT32_MAX, 0}, r = p->kernels->range_golden(w, n, none);
    uint8_t *stored = c->codes + row * n;
    float log_min = -10.0f, log_max = 0.0f; /* the original implementation's range for zeros */
    double range = 0.0;
    if (r.lo <= r.hi) {
        log_min = (float)qins_log((double)from_bits32(r.lo));
        log_max = (float)qins_log((double)from_bits32(r.hi));
        range = (double)log_max - (double)log_min;
        log_max = range < 1e-8 ? log_min : log_max;
    }
    /* Logarithms of ratios to the largest magnitude are more exact near it. But in a wide range the ratios would
     * leave float32's normal range. */
    int ratios = range < 80.0;
    float inverse = ratios && range > 0.0 ? 1.0f / from_bits32(r.hi) : 1.0f;
    double slope = range < 1e-8 ? 0.0 : 254.0 / range;
    double offset = (ratios && range > 0.0 ? qins_log((double)from_bits32(r.hi)) : 0.0) - (double)log_min;
    p->kernels->encode_golden_row(w, n, inverse, (float)slope, (float)(255.0 - slope * offset), stored,
                                  c->sign + row * n);
    if (range < 1e-8) {
        memset(stored, 128, n);
    }
    c->range[2 * row] = log_min;
    c->range[2 * row + 1] = log_max;
}

static void golden_values(const caching *p, size_t row, size_t k, size_t n, float *out)
{
    const qins_cache *c = p->c;
    float log_min = c->range[2 * row], log_max = c->range[2 * row + 1];
    double step = ((double)log_max - (double)log_min) / 254.0;
    size_t at = row * c->dim + k;
    p->kernels->decode_golden_row(c->codes + at, c->sign + at, n, (float)((double)log_max + step), (float)step, out);
}

/* -- log8 --------------------------------------------------------------------------------------- */

static void log8_row(const caching *p, const float *w, float most, size_t row)
{
    const qins_cache *c = p->c;
    uint16_t best = to_bfloat16(most);
    if (most > 1e-30f && most < 1e30f) { /* squares and reciprocals stay normal */
        float inverse[CANDIDATES], error[CANDIDATES], least_error = 0.0f;
        uint16_t scale[CANDIDATES];
        for (int i = 0; i < CANDIDATES; i++) {
            scale[i] = to_bfloat16(most * FACTORS[i]);
            inverse[i] = 1.0f / from_bfloat16(scale[i]);
        }
        p->kernels->errors_log8(w, NULL, c->dim, inverse, CANDIDATES, &c->tables->nearest, error);
        for (int i = 0; i < CANDIDATES; i++) {
            float s = from_bfloat16(scale[i]), e = error[i] * s * s;
            if (i == 0 || e < least_error) {
                least_error = e;
                best = scale[i];
            }
        }
    }
    c->scale[row] = best;
    p->kernels->encode_log8(w, c->dim, from_bfloat16(best), &c->tables->nearest, c->codes + row * c->dim);
}

/* -- log6, log5 and log4 ------------------------------------------------------------------------ */

/* The smallest bfloat16 that is not less, unless that is infinite */
static uint16_t bfloat16_above(float x)
{
    const uint32_t u = (uint32_t)bits32(x), above = (u + 0xffffu) >> 16;
    return (uint16_t)(above < 0x7f80u ? above : u >> 16);
}

/* As rows of weights, except that the row's scale is a bfloat16. */
static void packed_row(const caching *p, const float *w, float most, size_t row)
{
    const qins_cache *c = p->c;
    float scale;
    c->scale[row] = bfloat16_above(qins_grouped_scale(most));
    qins_codes e = qins_cache_matrix(p->kernels, c, row, 1, &scale);
    qins_encode_groups(p->kernels, w, &c->tables->nearest, &e);
}

/* The levels of n consecutive rows, with the signs of their codes */
static void packed_levels(const qins_kernels *kernels, const qins_cache *c, size_t row, size_t n, float *out)
{
    static const uint8_t no_flips[QINS_WINDOW / QINS_CACHE_GROUP];
    const int bits = log_bits(c->codec);
    const size_t row_bytes = c->dim / 8 * (size_t)bits;
    if (bits <= kernels->value_bits) {
        kernels->packed_values(c->codes + row * row_bytes, n, c->dim, bits, c->tables->packed_value, out);
        return;
    }
    const size_t unpacked = c->dim % QINS_BLOCK == 0 ? QINS_WINDOW / c->dim : 1; /* rows of whole blocks join */
    const uint8_t *packed = c->codes + row * row_bytes;
    uint8_t codes[QINS_WINDOW];
    for (size_t part; n > 0; n -= part) {
        part = least(n, QINS_WINDOW / c->dim);
        for (size_t i = 0, some; i < part; i += some, packed += some * row_bytes) {
            some = least(part - i, unpacked);
            kernels->unpack(packed, some * c->dim, bits, no_flips, codes + i * c->dim);
        }
        kernels->decode_log8(codes, 0, part * c->dim, 1.0f, NULL, 0, c->tables->level, out);
        out += part * c->dim;
    }
}

/* -- all of them -------------------------------------------------------------------------------- */

void qins_cache_tables_build(qins_cache_tables *t, qins_codec codec, float mu)
{
    qins_log8_tables_build(&t->nearest, mu, log_bits(codec));
    qins_log8_levels(mu, is_packed(codec), t->level);
    for (unsigned q = 0; is_packed(codec) && q < 1u << log_bits(codec); q++) {
        const uint8_t code = log8_form(q, log_bits(codec));
        t->packed_value[q] = code < 128 ? t->level[code] : -t->level[code & 127];
    }
}

size_t qins_cache_span(const qins_cache *c) { return is_packed(c->codec) ? QINS_CACHE_GROUP : c->dim; }

qins_codes qins_cache_matrix(const qins_kernels *kernels, const qins_cache *c, size_t row, size_t n, float *scale)
{
    const int packed = is_packed(c->codec);
    qins_codes e = {
        .codec = c->codec,
        .rows = n,
        .cols = c->dim,
        .scale = scale,
        .mu = c->tables->nearest.mu,
        .group_size = packed ? QINS_CACHE_GROUP : 0,
    };
    e.codes = c->codes + row * code_bytes(&e, c->dim);
    e.group_scale = packed ? c->group_scale + row * ceil_div(c->dim, QINS_CACHE_GROUP) : NULL;
    kernels->widen[QINS_BF16](c->scale + row, n, scale);
    return e;
}

static void encode_rows(void *context, size_t begin, size_t end)
{
    caching *p = context;
    size_t n = p->c->dim, size = item_size(p->dtype);
    float *wide = p->dtype == QINS_F32 ? NULL : qins_scratch_take(n * sizeof *wide);
    if (p->dtype != QINS_F32 && wide == NULL) {
        atomic_store(&p->nonfinite, -1);
        return;
    }
    for (size_t i = begin; i < end; i++) {
        const void *x = p->x + i * n * size;
        if (wide != NULL) {
            p->kernels->widen[p->dtype](x, n, wide);
        }
        const float *w = wide != NULL ? wide : x;
        int32_t most = p->kernels->absmax(w, n);
        if (most >= 0x7f800000) {
            atomic_store(&p->nonfinite, 1);
            break;
        }
        if (p->c->codec == QINS_golden) {
            golden_row(p, w, cache_row(p, i));
        } else if (is_packed(p->c->codec)) {
            packed_row(p, w, from_bits32(most), cache_row(p, i));
        } else {
            log8_row(p, w, from_bits32(most), cache_row(p, i));
        }
    }
    if (wide != NULL) {
        qins_scratch_give(wide);
    }
}

static size_t grain(const qins_cache *c) { return ceil_div(GRAIN_ELEMENTS, c->dim + 1); }

int qins_cache_encode(const qins_kernels *kernels, const qins_cache *c, const void *x, qins_dtype dtype, size_t start,
                      size_t tokens, int threads)
{
    caching p = {.kernels = kernels, .c = c, .x = x, .dtype = dtype, .start = start, .tokens = tokens};
    atomic_init(&p.nonfinite, 0);
    qins_parallel(c->heads * tokens, grain(c), threads, encode_rows, &p);
    return atomic_load(&p.nonfinite);
}

static void decode_rows(void *context, size_t begin, size_t end)
{
    const caching *p = context;
    const qins_cache *c = p->c;
    float window[QINS_WINDOW];
    size_t size = item_size(p->dtype);
    for (size_t i = begin; i < end; i++) {
        size_t row = cache_row(p, i);
        float scale;
        const qins_codes e =
            c->codec == QINS_golden ? (qins_codes){0} : qins_cache_matrix(p->kernels, c, row, 1, &scale);
        for (size_t k = 0; k < c->dim; k += QINS_WINDOW) {
            size_t n = least(c->dim - k, QINS_WINDOW);
            char *out = p->out + (i * c->dim + k) * size;
            float *values = p->dtype == QINS_F32 ? (float *)(void *)out : window;
            if (c->codec == QINS_golden) {
                golden_values(p, row, k, n, values);
            } else if (is_packed(c->codec)) {
                qins_decode_packed(p->kernels, &e, c->tables->level, 0, k, n, values);
            } else {
                p->kernels->decode_log8(e.codes + k, 0, n, scale, NULL, 0, c->tables->level, values);
            }
            if (values == window) {
                p->kernels->narrow[p->dtype](window, n, out);
            }
        }
    }
}

void qins_cache_rows(const qins_kernels *kernels, const qins_cache *c, size_t row, size_t n, float *out, float *scale)
{
    if (c->codec == QINS_golden) {
        const caching p = {.kernels = kernels, .c = c};
        for (size_t i = 0; i < n; i++) {
            scale[i] = 1.0f;
            golden_values(&p, row + i, 0, c->dim, out + i * c->dim);
        }
        return;
    }
    if (is_packed(c->codec)) {
        packed_levels(kernels, c, row, n, out);
    } else {
        kernels->decode_log8(c->codes + row * c->dim, 0, n * c->dim, 1.0f, NULL, 0, c->tables->level, out);
    }
    const size_t groups = is_packed(c->codec) ? ceil_div(c->dim, QINS_CACHE_GROUP) : 0;
    const uint16_t *of_row = c->scale + row;
    for (size_t i = 0; groups == 0 && i < n; i++) {
        scale[i] = from_bfloat16(of_row[i]);
    }
    for (size_t g = 0; g < groups; g++, scale += n) {
        const uint8_t *group = c->group_scale + row * groups + g;
        for (size_t i = 0; i < n; i++) {
            scale[i] = from_bfloat16(of_row[i]) * group_multiplier(log_bits(c->codec), group[i * groups]);
        }
    }
}

void qins_cache_decode(const qins_kernels *kernels, const qins_cache *c, size_t start, size_t tokens, qins_dtype dtype,
                       void *out, int threads)
{
    caching p = {.kernels = kernels, .c = c, .out = out, .dtype = dtype, .start = start, .tokens = tokens};
    qins_parallel(c->heads * tokens, grain(c), threads, decode_rows, &p);
}
