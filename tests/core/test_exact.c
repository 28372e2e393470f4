/* Tests of exact restoring on every instruction set: streams between unmapped pages, whole and damaged. */
#include <stdlib.h>
#include <string.h>

#include "exact.h"
#include "packed.h"
#include "pages.h"
#include "test_exact.h"

static uint32_t seed;

static uint32_t next(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* About normal: the sum of 4 uniform numbers */
static float weight(void)
{
    float sum = -2.0f;
    for (int i = 0; i < 4; i++) {
        sum += (float)next() * 0x1p-24f;
    }
    return 0.05f * sum;
}

static void *bytes_of(size_t n)
{
    void *p = malloc(n > 0 ? n : 1);
    if (p == NULL) {
        exit(2);
    }
    return p;
}

typedef struct {
    qins_codes e;
    uint16_t *w; /* the weights' bits */
} matrix;

static matrix random_matrix(qins_codec codec, size_t rows, size_t cols, size_t group_size, qins_dtype dtype)
{
    const size_t n = rows * cols, groups = group_size > 0 ? ceil_div(cols, group_size) : 0;
    matrix m = {
        .e = {.codec = codec, .rows = rows, .cols = cols, .group_size = group_size, .mu = -1.0f, .alpha = 1.0f}};
    float *w = bytes_of(4 * n);
    m.w = bytes_of(2 * n);
    for (size_t i = 0; i < n; i++) {
        w[i] = weight();
    }
    qins_kernels_scalar.narrow[dtype](w, n, m.w);
    qins_kernels_scalar.widen[dtype](m.w, n, w);
    for (size_t i = 0; i < n; i += 97) {
        m.w[i] = (uint16_t)next(); /* any number, which no code is near to */
    }
    m.e.codes = bytes_of(n);
    m.e.sign = bytes_of(n);
    m.e.sign_bits = bytes_of(rows * ceil_div(cols, 8));
    m.e.scale = bytes_of(4 * rows);
    m.e.group_scale = bytes_of(rows * groups);
    const qins_matrix whole = {w, QINS_F32, rows, cols, (ptrdiff_t)(4 * cols), 4};
    qins_encode(&qins_kernels_scalar, &whole, NULL, 1, &m.e);
    free(w);
    return m;
}

static void release(matrix *m)
{
    free(m->w);
    free(m->e.codes);
    free(m->e.sign);
    free(m->e.sign_bits);
    free(m->e.scale);
    free(m->e.group_scale);
}

/* A copy that ends before a forbidden page, and the memory to give back */
static uint8_t *before_a_page(const uint8_t *data, size_t bytes, char **memory, size_t *room)
{
    *memory = between_pages(bytes, room);
    uint8_t *p = (uint8_t *)*memory + *room - bytes;
    memcpy(p, data, bytes);
    return p;
}

static uint32_t hash(const uint8_t *p, size_t n)
{
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ p[i]) * 16777619u;
    }
    return h;
}

/* Damaged streams: the same result as from the scalar kernels, and nothing read beyond them. */
static int damage_is_harmless(const qins_kernels *k, const matrix *m, const uint8_t *stream, size_t bytes,
                              qins_dtype dtype, int damages)
{
    const size_t n = m->e.rows * m->e.cols;
    uint16_t *one = bytes_of(2 * n), *other = bytes_of(2 * n);
    int same = 1;
    for (int i = 0; i < damages && same; i++) {
        char *memory;
        size_t room, part = next() % 4 == 0 ? next() % bytes : bytes;
        uint8_t *p = before_a_page(stream, part, &memory, &room);
        for (uint32_t j = next() % 4; j > 0 && part > 32; j--) {
            p[32 + next() % (part - 32)] = (uint8_t)next();
        }
        const qins_exact_result result = qins_exact_decode(k, &m->e, p, part, dtype, 1, one);
        same = result == qins_exact_decode(&qins_kernels_scalar, &m->e, p, part, dtype, 1, other) &&
               (result != QINS_EXACT_OK || memcmp(one, other, 2 * n) == 0) &&
               (part == bytes || result == QINS_EXACT_DAMAGED);
        give_back_pages(memory, room);
    }
    free(one);
    free(other);
    return same;
}

static uint32_t check_matrix(const qins_kernels *k, qins_codec codec, size_t rows, size_t cols, size_t group_size,
                             qins_dtype dtype, int damages,
                             void (*check)(int, const char *, const char *, size_t, size_t))
{
    seed = (uint32_t)(codec + 8 * cols); /* streams do not depend on what was tested before */
    matrix m = random_matrix(codec, rows, cols, group_size, dtype);
    const size_t n = rows * cols;
    uint8_t *stream = NULL, *again = NULL;
    size_t bytes = 0, bytes_again = 0;
    const int made =
        qins_exact_encode(k, &m.e, m.w, dtype, 1, &stream, &bytes) == QINS_EXACT_OK &&
        qins_exact_encode(&qins_kernels_scalar, &m.e, m.w, dtype, 3, &again, &bytes_again) == QINS_EXACT_OK;
    check(made && bytes == bytes_again && memcmp(stream, again, bytes) == 0, "exact_encode", k->name, cols, codec);
    if (made) {
        char *memory;
        size_t room;
        const uint8_t *p = before_a_page(stream, bytes, &memory, &room);
        uint16_t *w = bytes_of(2 * n);
        const int whole = qins_exact_decode(k, &m.e, p, bytes, dtype, 2, w) == QINS_EXACT_OK;
        check(whole && memcmp(w, m.w, 2 * n) == 0, "exact_decode", k->name, cols, codec);
        give_back_pages(memory, room);
        free(w);
        check(n == 0 || damage_is_harmless(k, &m, stream, bytes, dtype, damages), "damaged stream", k->name, cols,
              codec);
    }
    const uint32_t h = made ? hash(stream, bytes) : 0;
    free(stream);
    free(again);
    release(&m);
    return h;
}

void check_exact(const qins_kernels *k, int damages, void (*check)(int, const char *, const char *, size_t, size_t))
{
    static const size_t COLS[] = {0, 1, 15, 16, 17, 33, 64, 328, 4099};
    static const size_t GROUPS[] = {0, 0, 64, 0, 64, 128, 32}; /* by codec */
    uint32_t all = 0;
    for (int codec = 0; codec < QINS_CODEC_COUNT; codec++) {
        for (size_t i = 0; i < sizeof COLS / sizeof *COLS; i++) {
            const size_t cols = is_packed(codec) ? ceil_div(COLS[i], 8) * 8 : COLS[i], rows = 1 + i % 3 * 9;
            all = all * 31 +
                  check_matrix(k, codec, rows, cols, GROUPS[codec], i % 2 ? QINS_F16 : QINS_BF16, damages, check);
        }
    }
    check(all == 2241402373u, "streams are those of earlier versions", k->name, all, 0);
}
