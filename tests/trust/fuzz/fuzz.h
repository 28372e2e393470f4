/* Inputs of the fuzz targets: arrays and numbers from the fuzzer's bytes, as args.c lets them through to the core. */
#ifndef QINS_FUZZ_H
#define QINS_FUZZ_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "packed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The bytes that are left */
typedef struct {
    const uint8_t *at;
    size_t left;
} input;

static inline void must(int right, const char *what)
{
    if (!right) {
        fprintf(stderr, "wrong: %s\n", what);
        abort();
    }
}

/* A number of `bytes` bytes, little-endian; missing bytes are 0. */
static inline uint32_t take(input *in, size_t bytes)
{
    uint32_t v = 0;
    for (size_t i = 0; i < bytes && in->left > 0; i++, in->at++, in->left--) {
        v |= (uint32_t)*in->at << 8 * i;
    }
    return v;
}

static inline float take_float(input *in) { return from_bits32((int32_t)take(in, 4)); }

/* Memory of exactly this size, so that the sanitizer sees every access outside it. It begins `off` bytes after an
 * aligned address, as arrays in mapped files may. Every array of a run is freed by release_all(). */
enum { MOST_ARRAYS = 64 };
static void *arrays[MOST_ARRAYS];
static size_t array_count;

static inline void *room_at(size_t bytes, size_t off)
{
    must(array_count < MOST_ARRAYS, "number of arrays");
    char *p = malloc(bytes + off > 0 ? bytes + off : 1);
    must(p != NULL, "memory");
    arrays[array_count++] = p;
    return p + off;
}

static inline void release_all(void)
{
    while (array_count > 0) {
        free(arrays[--array_count]);
    }
}

/* An array of the input's bytes. Where these end, pseudo-random ones follow, so that a short input makes a large array;
 * `least` bytes of the input are left for what comes later. */
static inline void *filled(input *in, size_t bytes, size_t off, size_t least)
{
    uint8_t *p = room_at(bytes, off);
    uint32_t seed = 2166136261u;
    for (size_t i = 0; i < bytes; i++) {
        if (in->left > least) {
            p[i] = *in->at;
            seed = (seed ^ *in->at++) * 16777619u;
            in->left--;
        } else {
            seed = seed * 1664525u + 1013904223u;
            p[i] = (uint8_t)(seed >> 24);
        }
    }
    return p;
}

/* Weights or activations of about the same size, from an array's bytes */
static inline void tame(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = (uint32_t)bits32(x[i]);
        x[i] = (float)((int32_t)(u & 0xffff) - 32768) * 0x1p-15f * (u >> 16 & 63 ? 1.0f : 30.0f);
    }
}

static inline const qins_kernels *take_kernels(input *in) { return qins_isa_at(take(in, 1) % qins_isa_count()); }

/* Columns: mostly few, sometimes more than a window */
static inline size_t take_cols(input *in)
{
    const size_t v = take(in, 2);
    return v < 0xf000 ? v % 74 : v < 0xffc0 ? v % 331 : 4064 + v % 64;
}

/* What a matrix needs before its fields: codec, rows, cols and group_size, as args.c checks them */
static inline qins_codes take_shape(input *in)
{
    static const size_t GROUPS[] = {0, 0, 32, 64, 96, 128, 192, 256, 1024, (size_t)1 << 30};
    qins_codes e = {.codec = (qins_codec)(take(in, 1) % QINS_CODEC_COUNT)};
    const size_t group = take(in, 1);
    const size_t rows = take(in, 1);
    e.rows = rows < 240 ? rows % 5 : rows % 37;
    e.cols = take_cols(in);
    if (log_bits(e.codec) > 0) {
        e.group_size = group < 200 ? GROUPS[group % 10] : group - 199; /* any of 1 to 56 */
    }
    if (is_packed(e.codec)) {
        e.cols = e.cols / 8 * 8;
        e.group_size = e.group_size < 64 ? 32 : e.group_size / 64 * 64;
    }
    return e;
}

/* Whether the scalars are ones that encode() makes, so that products have an error bound */
static inline void take_scalars(input *in, qins_codes *e, int sane)
{
    const float a = take_float(in), b = take_float(in), c = take_float(in);
    e->mu = a;
    e->log_min = e->alpha = a;
    e->log_max = e->z_min = b;
    e->z_max = c;
    if (sane) {
        const uint32_t u = (uint32_t)bits32(a), v = (uint32_t)bits32(b);
        e->mu = (float)(u % 8192) / 64.0f;
        e->alpha = 0.01f + (float)(u % 1024);
        e->z_min = 0.001f + (float)(v % 100) / 200.0f;
        e->z_max = e->z_min + (float)(v / 100 % 100) / 250.0f;
        if (e->codec == QINS_golden || e->codec == QINS_log9) {
            e->log_min = -20.0f + (float)(u % 160) / 8.0f;
            e->log_max = e->log_min + (float)(v % 160) / 8.0f;
        }
    }
}

/* Whether from_fields() in codec/array.py takes these scalars. Of others, only memory is safe: their levels may be
 * negative, which instruction sets treat in their own ways. */
static inline int valid_scalars(const qins_codes *e)
{
    if (e->codec == QINS_rational) {
        return isfinite(e->alpha) && e->alpha > 0.0f && e->z_min > 0.0f && e->z_min <= e->z_max && e->z_max <= 1.0f;
    }
    if (log_bits(e->codec) > 0) {
        return e->mu >= 0.0f && e->mu <= QINS_MU_MAX;
    }
    return isfinite(e->log_min) && e->log_min <= e->log_max && e->log_max <= 88.7228394f;
}

/* Likewise for scales, whose NaN have bits that depend on the instruction set */
static inline int valid_scales(const qins_codes *e)
{
    for (size_t row = 0; log_bits(e->codec) > 0 && row < e->rows; row++) {
        const float scale = float_at(e->scale, row);
        if (!(isfinite(scale) && scale >= 0.0f)) {
            return 0;
        }
    }
    return 1;
}

/* The fields of a matrix, in arrays of exactly their sizes */
static inline void take_fields(input *in, qins_codes *e, int sane, size_t least)
{
    const size_t off = take(in, 1) % 8, groups = e->group_size > 0 ? ceil_div(e->cols, e->group_size) : 0;
    e->codes = filled(in, e->rows * code_bytes(e, e->cols), off, least);
    if (e->codec == QINS_golden) {
        e->sign = filled(in, e->rows * e->cols, off, least);
    } else if (e->codec == QINS_log9) {
        e->sign_bits = filled(in, e->rows * ceil_div(e->cols, 8), off, least);
    } else if (log_bits(e->codec) > 0) {
        float *scale = filled(in, e->rows * sizeof *scale, off, least);
        for (size_t row = 0; sane && row < e->rows; row++) {
            const float s = 0.001f + (float)((uint32_t)bits32(float_at(scale, row)) % 1000) * 0.001f;
            memcpy((char *)scale + row * sizeof s, &s, sizeof s);
        }
        e->scale = scale;
        e->group_scale = e->group_size > 0 ? filled(in, e->rows * groups, off, least) : NULL;
    }
    for (size_t i = 0; sane && i < e->rows * e->cols; i++) {
        if (e->codec == QINS_golden) {
            e->sign[i] = e->sign[i] < 0 ? -1 : 1;
        }
        if (e->codec == QINS_golden || e->codec == QINS_log9) {
            e->codes[i] |= 1; /* 1 to 255 */
        }
    }
}

/* Whether n elements are the same bits, or both NaN: whose bits depend on the instruction set */
static inline int same(const void *a, const void *b, size_t n, qins_dtype dtype)
{
    const size_t size = item_size(dtype);
    if (n == 0 || memcmp(a, b, n * size) == 0) {
        return 1;
    }
    for (size_t i = 0; i < n; i++) {
        float x, y;
        qins_kernels_scalar.widen[dtype]((const char *)a + i * size, 1, &x);
        qins_kernels_scalar.widen[dtype]((const char *)b + i * size, 1, &y);
        if (memcmp((const char *)a + i * size, (const char *)b + i * size, size) != 0 && !(isnan(x) && isnan(y))) {
            fprintf(stderr, "element %zu: %a and %a\n", i, (double)x, (double)y);
            return 0;
        }
    }
    return 1;
}

#endif
