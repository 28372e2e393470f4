/* Tests of the core: every instruction set that runs here against the scalar one, on buffers that border unmapped
 * pages; tables against slow formulas; matrices against committed digests.
 *
 *   test_core DIGESTS           check
 *   test_core DIGESTS --write   write the digests of the scalar core
 *   test_core DIGESTS --no-fork where the emulator cannot start threads after a fork (qemu-user 7.2)
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "packed.h"
#include "sizes.h"
#include "pages.h"
#include "ways.h"
#include "poll.h"
#include "test_decoder.h"
#include "test_exact.h"

static int passed, failed;

static void check(int ok, const char *what, const char *isa, size_t a, size_t b)
{
    if (ok) {
        passed++;
    } else if (failed++ < 20) {
        printf("FAILED %s, %s, %zu, %zu\n", what, isa, a, b);
    }
}

static uint64_t state = 88172645463325252u;

static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static double uniform(void) { return (double)(next() >> 11) * 0x1p-53; }

/* Roughly normal, from arithmetic alone, so that its bits are the same everywhere. */
static float normal(void)
{
    double s = 0.0;
    for (int i = 0; i < 12; i++) {
        s += uniform();
    }
    return (float)((s - 6.0) * 0.02);
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static const float SPECIAL[] = {0.0f,       -0.0f,      1e-45f,   -1e-45f, 1.1754942e-38f, 1e-8f, -1e-8f, 0.99e-8f,
                                1.0000001f, 3.4028e38f, -3.4e38f, 1.0f,    -1.0f,          0.5f,  1e-30f, -1e-20f};

static float sample_weight(size_t i) { return i % 7 == 3 ? SPECIAL[next() % 16] : normal(); }

/* -- guarded buffers ---------------------------------------------------------------------------- */

typedef struct {
    char *low, *high; /* first byte after an unmapped page; one past the last byte before another */
    size_t room;
} guarded;

static guarded guard(size_t bytes)
{
    size_t room;
    char *low = between_pages(bytes, &room);
    return (guarded){low, low + room, room};
}

#ifndef SANITIZED /* build.sh */
#define SANITIZED 0
#endif

enum { MOST = 4200 };
static guarded in_f, in_u, in_v, out_a, out_b, out_c, out_d;

/* Copies data to either end of a guarded buffer. */
static void *place(guarded g, const void *data, size_t bytes, int at_end)
{
    void *p = at_end ? g.high - bytes : g.low;
    if (bytes > 0) {
        memcpy(p, data, bytes);
    }
    return p;
}

static void *room_for(guarded g, size_t bytes, int at_end)
{
    memset(g.low, 0xa5, g.room);
    return at_end ? g.high - bytes : g.low;
}

/* Fills a guarded buffer with a mark; whether it is still there but in what a result takes. */
enum { MARK = 0x5a };
static void mark_all(guarded g) { memset(g.low, MARK, g.room); }

static int is_untouched(guarded g, const char *result, size_t bytes)
{
    for (const char *p = g.low; p < g.high; p++) {
        if ((p < result || p >= result + bytes) && *p != MARK) {
            return 0;
        }
    }
    return 1;
}

static float weights[MOST];
static uint8_t codes[MOST], more[MOST];
static qins_golden_tables golden;
static qins_log8_tables log8, packed_tables[3]; /* of log6, log5 and log4 */
static qins_golden_tables small_golden;
static float weights_small[MOST], importances[MOST];

static void kernels_at(const qins_kernels *k, size_t n, int at_end)
{
    const qins_kernels *s = &qins_kernels_scalar;
    const float *w = place(in_f, weights, n * 4, at_end);
    const uint8_t *u = place(in_u, codes, n, at_end);
    uint8_t *a = room_for(out_a, n, at_end), *b = room_for(out_b, n, at_end);
    uint8_t *c = room_for(out_c, n, at_end), *d = room_for(out_d, n, at_end);

    check(k->absmax(w, n) == s->absmax(w, n), "absmax", k->name, n, at_end);
    qins_range start = {INT32_MAX, 0};
    qins_range r = k->range_golden(w, n, start), q = s->range_golden(w, n, start);
    check(r.lo == q.lo && r.hi == q.hi, "range_golden", k->name, n, at_end);

    r = k->range_rational(w, n, start), q = s->range_rational(w, n, start);
    check(r.lo == q.lo && r.hi == q.hi, "range_rational", k->name, n, at_end);

    k->encode_golden(w, n, &golden, a, (int8_t *)b);
    s->encode_golden(w, n, &golden, c, (int8_t *)d);
    check(memcmp(a, c, n) == 0 && memcmp(b, d, n) == 0, "encode_golden", k->name, n, at_end);

    static const float ROW[][3] = {{2.0f, 20.0f, 3.0f}, {1.0f, 1e10f, 100.0f}, {1e8f, 0.0f, 128.0f}};
    for (int i = 0; i < 3; i++) {
        k->encode_golden_row(w, n, ROW[i][0], ROW[i][1], ROW[i][2], a, (int8_t *)b);
        s->encode_golden_row(w, n, ROW[i][0], ROW[i][1], ROW[i][2], c, (int8_t *)d);
        check(memcmp(a, c, n) == 0 && memcmp(b, d, n) == 0, "encode_golden_row", k->name, n, at_end);
    }

    size_t bytes = (n + 7) / 8;
    a = room_for(out_a, n, at_end), b = room_for(out_b, bytes, at_end);
    c = room_for(out_c, n, at_end), d = room_for(out_d, bytes, at_end);
    k->encode_log9(w, n, &golden, a, b);
    s->encode_log9(w, n, &golden, c, d);
    check(memcmp(a, c, n) == 0 && memcmp(b, d, bytes) == 0, "encode_log9", k->name, n, at_end);

    static const float SCALE[] = {0.08f, 0.0f, 1e-45f, 3e38f};
    for (int i = 0; i < 4; i++) {
        k->encode_log8(w, n, SCALE[i], &log8, a);
        s->encode_log8(w, n, SCALE[i], &log8, c);
        check(memcmp(a, c, n) == 0, "encode_log8", k->name, n, at_end);
    }
    float inverse[3] = {12.5f, 13.0f, 0.25f}, e[3], f[3];
    k->errors_log8(w, NULL, n, inverse, 3, &log8, e);
    s->errors_log8(w, NULL, n, inverse, 3, &log8, f);
    check(memcmp(e, f, sizeof e) == 0, "errors_log8", k->name, n, at_end);
    const float *importance = place(out_d, importances, n * 4, at_end);
    k->errors_log8(w, importance, n, inverse, 3, &log8, e);
    s->errors_log8(w, importance, n, inverse, 3, &log8, f);
    check(memcmp(e, f, sizeof e) == 0, "errors_log8 with importance", k->name, n, at_end);
    for (const qins_log8_tables *t = packed_tables; t < packed_tables + 3; t++) {
        float both[6], signs[6]; /* with both signs of the scale */
        k->errors_log8(w, importance, n, inverse, 3, t, both);
        s->errors_log8(w, importance, n, inverse, 3, t, signs);
        check(memcmp(both, signs, sizeof both) == 0, "errors_log8, packed", k->name, n, at_end);
        k->errors_log8(w, NULL, n, inverse, 3, t, both);
        s->errors_log8(w, NULL, n, inverse, 3, t, signs);
        check(memcmp(both, signs, sizeof both) == 0, "errors_log8, packed, without importance", k->name, n, at_end);
    }

    float *x = room_for(out_a, n * 4, at_end), *y = room_for(out_b, n * 4, at_end);
    const int8_t *sign = place(in_v, more, n, at_end);
    k->decode_golden(u, sign, n, golden.value, x);
    s->decode_golden(u, sign, n, golden.value, y);
    check(memcmp(x, y, n * 4) == 0, "decode_golden", k->name, n, at_end);
    k->decode_golden_row(u, sign, n, -1.0f, 0.06f, x);
    s->decode_golden_row(u, sign, n, -1.0f, 0.06f, y);
    check(memcmp(x, y, n * 4) == 0, "decode_golden_row", k->name, n, at_end);
    k->project(w, n, 3.0f, x);
    s->project(w, n, 3.0f, y);
    check(memcmp(x, y, n * 4) == 0, "project", k->name, n, at_end);
    k->unproject(place(in_f, y, n * 4, at_end), n, 3.0f, x);
    s->unproject(place(in_f, y, n * 4, at_end), n, 3.0f, y);
    check(memcmp(x, y, n * 4) == 0, "unproject", k->name, n, at_end);
    w = place(in_f, weights, n * 4, at_end);
    const uint8_t *sign_bits = place(in_v, more, bytes, at_end);
    k->decode_log9(u, sign_bits, n, golden.value, x);
    s->decode_log9(u, sign_bits, n, golden.value, y);
    check(memcmp(x, y, n * 4) == 0, "decode_log9", k->name, n, at_end);
    k->decode_log8(u, 0, n, 0.07f, NULL, 0, log8.level, x);
    s->decode_log8(u, 0, n, 0.07f, NULL, 0, log8.level, y);
    check(memcmp(x, y, n * 4) == 0, "decode_log8", k->name, n, at_end);
    static const size_t GROUP[] = {1, 7, 32, 64, 5000};
    for (int i = 0; i < 5; i++) {
        size_t first = 13, groups = n ? (first + n - 1) / GROUP[i] + 1 : 0;
        static uint8_t repeated[MOST + 16];
        for (size_t j = 0; j < groups; j++) {
            repeated[j] = more[j % MOST];
        }
        guarded g = in_v;
        const uint8_t *scales = groups <= g.room ? place(g, repeated, groups, at_end) : repeated;
        k->decode_log8(u, first, n, 0.07f, scales, GROUP[i], log8.level, x);
        s->decode_log8(u, first, n, 0.07f, scales, GROUP[i], log8.level, y);
        check(memcmp(x, y, n * 4) == 0, "decode_log8 grouped", k->name, n, GROUP[i]);
    }
    static const size_t SIZE[] = {4, 2, 2, 8};
    for (int t = 0; t < 4; t++) {
        void *p = room_for(out_a, n * SIZE[t], at_end), *o = room_for(out_b, n * SIZE[t], at_end);
        k->narrow[t](w, n, p);
        s->narrow[t](w, n, o);
        check(memcmp(p, o, n * SIZE[t]) == 0, "narrow", k->name, n, (size_t)t);
        float *v = room_for(out_c, n * 4, at_end), *z = room_for(out_d, n * 4, at_end);
        k->widen[t](p, n, v);
        s->widen[t](p, n, z);
        check(memcmp(v, z, n * 4) == 0, "widen", k->name, n, (size_t)t);
    }
}

/* -- packed codes --------------------------------------------------------------------------------- */

static const qins_codec PACKED[] = {QINS_log6, QINS_log5, QINS_log4};
enum { PACKED_COUNT = sizeof PACKED / sizeof *PACKED };

/* Code i of a row, by the description in packed.h. */
static unsigned code_of_bytes(const uint8_t *packed, size_t cols, size_t i, int bits)
{
    const size_t block = i / 64 * 64, count = cols - block < 64 ? cols - block : 64, at = i - block;
    const uint8_t *low = packed + block / 8 * (size_t)bits, *high = low + count / 2;
    unsigned q = low[at % (count / 2)] >> (at < count / 2 ? 0 : 4) & 15;
    if (bits == 5) {
        q |= (high[at % (count / 8)] >> at / (count / 8) & 1u) << 4;
    } else if (bits == 6) {
        q |= (high[at % (count / 4)] >> 2 * (at / (count / 4)) & 3u) << 4;
    }
    return q;
}

/* Unpacks one row to log8's form and checks that nothing is written beside it. */
static void unpack_at(const qins_kernels *k, size_t cols, int bits, const uint8_t *flip, guarded in, guarded out,
                      size_t offset, int at_end)
{
    const size_t bytes = cols / 8 * (size_t)bits;
    char *from = at_end ? in.high - bytes : in.low + offset, *to = at_end ? out.high - cols : out.low + offset;
    mark_all(out);
    if (bytes > 0) {
        memcpy(from, more, bytes);
    }
    k->unpack((const uint8_t *)from, cols, bits, flip, (uint8_t *)to);
    const int h = 1 << (bits - 1);
    int right = 1;
    for (size_t i = 0; i < cols; i++) {
        const int q = (int)code_of_bytes(more, cols, i, bits), sign = q >= h, level = q - sign * h + sign;
        const int m = level == h ? 127 : level * 128 / h;
        right &= (uint8_t)to[i] == ((m | sign << 7) ^ flip[i / 32]);
    }
    right &= is_untouched(out, to, cols);
    check(right, "unpack", k->name, cols, (size_t)bits);
}

static void unpacking(const qins_kernels *k)
{
    static uint8_t flip[MOST / 32 + 1];
    const guarded flips = guard(sizeof flip);
    for (size_t i = 0; i < sizeof flip; i++) {
        flip[i] = next() % 2 ? 0x80 : 0;
    }
    for (int bits = 4; bits <= 6; bits++) {
        for (size_t cols = 0; cols + 8 < MOST; cols += cols == 520 ? 3560 : 8) {
            for (int at_end = 0; at_end < 2; at_end++) {
                const uint8_t *at = place(flips, flip, (cols + 31) / 32, at_end);
                unpack_at(k, cols, bits, at, in_v, out_a, 0, at_end);
            }
        }
        for (size_t offset = 1; offset < 64; offset++) {
            unpack_at(k, 152, bits, flip, in_v, out_a, offset, 0);
        }
    }
}

/* Rows of codes: packed, and unpacked whole, in parts and by columns. */
static void packing(void)
{
    enum { ROWS = 3, COLS = 5000 };
    static uint8_t levels[ROWS * COLS], bytes[ROWS * COLS], group[ROWS * COLS / 32 + ROWS], whole[COLS], part[64];
    static const size_t WIDTH[] = {8, 32, 56, 64, 72, 96, 200, 4096, 4104, 5000}, GROUP[] = {32, 64, 192, 8192};
    const qins_kernels *k = qins_isa_at(0);
    for (size_t i = 0; i < PACKED_COUNT * 10 * 4; i++) {
        const size_t cols = WIDTH[i % 10], size = GROUP[i / 10 % 4], groups = (cols + size - 1) / size;
        qins_codes e = {.codec = PACKED[i / 40], .rows = ROWS, .cols = cols, .codes = bytes, .group_size = size};
        const int bits = log_bits(e.codec), h = 1 << (bits - 1);
        e.group_scale = group;
        for (size_t j = 0; j < ROWS * groups; j++) {
            group[j] = (uint8_t)next();
        }
        for (size_t row = 0; row < ROWS; row++) {
            for (size_t c = 0; c < cols; c++) {
                levels[row * cols + c] = (uint8_t)(next() % (unsigned)(h + 1) | (next() & 0x80));
            }
            qins_pack(levels + row * cols, cols, bits, bytes + row * code_bytes(&e, cols));
        }
        int right = 1;
        for (size_t row = 0; row < ROWS; row++) {
            qins_unpack(k, &e, row, 0, cols, whole);
            for (size_t c = 0; c < cols; c++) {
                const uint8_t flip = group[row * groups + c / size] & 0x80, sign = levels[row * cols + c] & 0x80;
                int level = levels[row * cols + c] & 127;
                level = sign == 0 && level == h ? h - 1 : level; /* only exists with the other sign */
                const int m = level == h ? 127 : level * 128 / h;
                const uint8_t expected = (uint8_t)((m | (level > 0 ? sign : 0)) ^ flip);
                right &= whole[c] == expected;
                levels[row * cols + c] = expected;
            }
            for (size_t begin = 0; begin < cols; begin += 64) {
                const size_t n = cols - begin < 64 ? cols - begin : 64;
                qins_unpack(k, &e, row, begin, n, part);
                right &= memcmp(part, whole + begin, n) == 0;
            }
        }
        check(right, "packed codes", "core", cols, size);
        for (size_t c = 0; c < cols; c++) {
            const size_t first = c % 2;
            qins_codes_of_column(&e, first, ROWS - first, c, part);
            for (size_t row = first; row < ROWS; row++) {
                right &= part[row - first] == levels[row * cols + c];
            }
        }
        check(right, "a column of packed codes", "core", cols, size);
    }
}

/* -- error feedback ------------------------------------------------------------------------------- */

static void feedback_at(const qins_kernels *k, size_t cols, int at_end, const qins_log8_tables *t)
{
    const int capped = t->bits < 8; /* scales may be negative */
    enum { COLS = 70, GROUPS = 3 };
    static float panel[COLS * QINS_LANES], feedback[COLS * COLS], scale[GROUPS * QINS_LANES];
    static uint32_t group[COLS];
    for (size_t i = 0; i < cols * QINS_LANES; i++) {
        panel[i] = normal();
    }
    for (size_t i = 0; i < cols * cols; i++) {
        feedback[i] = normal() * 10.0f;
    }
    for (size_t i = 0; i < GROUPS * QINS_LANES; i++) {
        scale[i] = i % 11 == 3 ? 0.0f : 0.05f + 0.01f * (float)uniform();
        scale[i] = capped && i % 3 == 1 ? -scale[i] : scale[i];
    }
    for (size_t i = 0; i < cols; i++) {
        group[i] = (uint32_t)(next() % GROUPS);
    }
    size_t bytes = cols * QINS_LANES;
    const float *f = place(in_f, feedback, cols * cols * 4, at_end), *s = place(in_u, scale, sizeof scale, at_end);
    const uint32_t *g = place(in_v, group, cols * 4, at_end);
    float *a = place(out_a, panel, bytes * 4, at_end), *b = place(out_b, panel, bytes * 4, at_end);
    uint8_t *c = room_for(out_c, bytes, at_end), *d = room_for(out_d, bytes, at_end);
    k->feedback_log8(a, cols, f, s, g, t, c);
    qins_kernels_scalar.feedback_log8(b, cols, f, s, g, t, d);
    check(memcmp(a, b, bytes * 4) == 0 && memcmp(c, d, bytes) == 0, "feedback_log8", k->name, cols, at_end);
    for (size_t j = 0; j < cols; j++) {
        for (size_t r = 0; r < QINS_LANES; r++) {
            const int32_t level = c[j * QINS_LANES + r] & 127;
            float size = scale[group[j] * QINS_LANES + r] * t->level[level];
            check(level <= t->top || (capped && level == t->top + 1 && c[j * QINS_LANES + r] >= 128),
                  "level of feedback", k->name, j, r);
            float e = panel[j * QINS_LANES + r] - (c[j * QINS_LANES + r] & 128 ? -size : size);
            check(a[j * QINS_LANES + r] == e, "error of feedback_log8", k->name, j, r);
        }
    }
}

/* -- products -------------------------------------------------------------------------------------- */

enum { MANY = 5 * QINS_BATCH + 3 }; /* enough rows of activations that codes are decoded once for all */

/* Rows of activations, batch x n, as words; step: columns that share a scale. */
static qins_fixed fixed_rows(const qins_kernels *k, const float *x, size_t n, int batch, size_t step, int at_end)
{
    static int16_t fixed[MANY * (MOST + 2 * QINS_BLOCK)];
    static float scale[(MANY + QINS_BATCH) * (MOST / QINS_BLOCK + 1)];
    const size_t steps = (n + step - 1) / step;
    for (int m = 0; m < batch; m++) {
        const int in_set = m % QINS_BATCH, set = m - in_set, rows = batch - set < QINS_BATCH ? batch - set : QINS_BATCH;
        const float *row = place(in_f, x + (size_t)m * n, n * 4, at_end);
        k->fix_activations(row, n, step, fixed + ((size_t)set * steps + (size_t)in_set) * step, (size_t)rows * step,
                           scale + (size_t)set * steps + in_set);
    }
    return (qins_fixed){fixed, scale, steps, batch, 0};
}

/* Whether a sum is within the error allowed to fixed point, per product: half a step of the activations and 1e-4 of the
 * largest level. f: levels with their signs, times s, the group scales. scale: of the activations */
static int sum_is_right(float out, const float *x, const double *f, const double *s, size_t n, const float *scale,
                        size_t step)
{
    double sum = 0.0, bound = 1e-30;
    for (size_t i = 0; i < n; i++) {
        const double v = (double)x[i];
        sum += f[i] * v;
        bound += 1e-4 * s[i] * fabs(v) +
                 fabs(f[i]) * (0.51 + 1e-6 * (double)QINS_X_MAX) * (double)scale[i / step * QINS_BATCH];
    }
    return fabs((double)out - sum) <= bound;
}

/* The scales of the row of activations m */
static const float *scales_of(const qins_fixed *x, size_t m)
{
    const size_t in_set = m % QINS_BATCH;
    return x->scale + (m - in_set) * x->steps + in_set;
}

static void check_dots(const qins_kernels *k, const float *x, const uint8_t *u, size_t rows, size_t n, int batch,
                       size_t group_size, const uint8_t *group, int at_end, int decoded_once)
{
    static QINS_ALIGNED(64) uint8_t room[QINS_WORD_ROOM];
    static qins_log8_words words;
    float out[4 * MANY];
    qins_log8_words_build(&words, log8.mu, 8);
    const size_t step = group_size % k->word_step == 0 ? k->word_step : QINS_BLOCK;
    const size_t groups = group_size ? (n + group_size - 1) / group_size : 0;
    const qins_fixed fixed = fixed_rows(k, x, n, batch, step, at_end);
    k->dot_log8(u, rows, n, group, group_size, &words, &fixed, decoded_once ? room : NULL, out);
    static double f[MOST], s[MOST];
    for (size_t row = 0; row < rows; row++, u += n) {
        for (size_t i = 0; i < n; i++) {
            s[i] = group ? (group[row * groups + i / group_size] + 1) / 256.0 : 1.0;
            f[i] = (double)log8.level[u[i] & 127] * (u[i] & 128 ? -s[i] : s[i]);
        }
        for (size_t m = 0; m < (size_t)batch; m++) {
            check(sum_is_right(out[row * (size_t)batch + m], x + m * n, f, s, n, scales_of(&fixed, m), step),
                  "dot_log8", k->name, n, group_size);
        }
    }
}

/* Products of packed codes of arbitrary bytes; each code is decoded once for all rows of activations. */
static void packed_dots_at(const qins_kernels *k, qins_codec codec, size_t n, int batch, size_t group_size, int at_end,
                           int paired)
{
    static QINS_ALIGNED(64) uint8_t room[QINS_WORD_ROOM];
    static qins_log8_words words;
    static float x[MANY * MOST], level[QINS_LEVELS];
    static double f[MOST], s[MOST];
    float out[4 * MANY];
    const size_t rows = 1 + n / 8 % (batch == 1 && n <= 800 ? 6 : 3), groups = (n + group_size - 1) / group_size;
    qins_codes e = {.codec = codec, .rows = rows, .cols = n, .group_size = group_size};
    qins_log8_levels(2.5f, 1, level);
    qins_log8_words_build(&words, 2.5f, log_bits(codec));
    for (size_t i = 0; i < n * (size_t)batch; i++) {
        x[i] = normal() * (i % 97 == 5 ? 50000.0f : 50.0f);
    }
    e.codes = place(in_u, codes + 512, rows * code_bytes(&e, n), at_end);
    e.group_scale = place(in_v, more, rows * groups, at_end);
    qins_fixed fixed = fixed_rows(k, x, n, batch, QINS_BLOCK, at_end);
    if (paired) {
        if (batch != 1 || codec != QINS_log4 || k->pair_blocks == NULL) {
            return;
        }
        fixed.pairs = qins_pairs(n);
        k->pair_blocks((int16_t *)(uintptr_t)fixed.x, fixed.pairs);
    }
    k->dot_log8(e.codes, rows, n, e.group_scale, group_size, &words, &fixed, batch > QINS_BATCH ? room : NULL, out);
    for (size_t row = 0; row < rows; row++) {
        for (size_t i = 0; i < n; i++) {
            uint8_t code;
            qins_codes_of_column(&e, row, 1, i, &code);
            s[i] = ((e.group_scale[row * groups + i / group_size] & 127) + 1) / 128.0;
            f[i] = (double)level[code & 127] * (code & 128 ? -s[i] : s[i]);
        }
        for (size_t m = 0; m < (size_t)batch; m++) {
            check(sum_is_right(out[row * (size_t)batch + m], x + m * n, f, s, n, scales_of(&fixed, m), QINS_BLOCK),
                  "dot_log8, packed", k->name, n, group_size);
        }
    }
}

static void packed_dots(const qins_kernels *k)
{
    static const int BATCH[] = {1, 2, 3, 4, 5, 6, 7, 8, QINS_BATCH + 1, MANY};
    static const size_t GROUP[] = {32, 64, 128, 192, 8192};
    for (size_t c = 0; c < PACKED_COUNT; c++) {
        for (size_t n = 8; n < 1200; n += n < 264 ? 8 : 424) { /* 1 to 4 blocks, then two chunks of columns */
            for (size_t i = n / 8 % 2; i < sizeof BATCH / sizeof *BATCH; i += 2) {
                packed_dots_at(k, PACKED[c], n, BATCH[i], GROUP[(n / 8 + i) % 5], (int)(n / 8 + i) % 2, 0);
                packed_dots_at(k, PACKED[c], n, BATCH[i], GROUP[(n / 8 + i + 1) % 5], 1, 0);
            }
        }
        for (size_t n = 8; n < 1200; n += n < 504 ? 8 : 32) { /* units of 16 groups are computed at a time */
            packed_dots_at(k, PACKED[c], n, 1, GROUP[n / 32 % 3], 1, n < 504);
            packed_dots_at(k, PACKED[c], n, 1, GROUP[(n / 32 + 1) % 3], 1, n >= 504);
            packed_dots_at(k, PACKED[c], n, 1, GROUP[n / 8 % 5], (int)(n / 8 % 2), 1);
        }
    }
}

static void dots_at(const qins_kernels *k, size_t n, int batch, size_t group_size, int at_end)
{
    static float x[MANY * MOST];
    for (size_t i = 0; i < n * (size_t)batch; i++) {
        x[i] = normal() * (i % 97 == 5 ? 50000.0f : 50.0f);
    }
    /* up to three rows: kernels may take two at a time */
    const size_t rows = batch == 1 && n <= 600 ? 1 + n % 7
                        : n <= 200             ? 1 + n % 3
                                               : 1,
                 groups = group_size ? (n + group_size - 1) / group_size : 0;
    const uint8_t *u = place(in_u, codes, rows * n, at_end);
    const uint8_t *group = group_size ? place(in_v, more, rows * groups, at_end) : NULL;
    for (int decoded_once = 0; decoded_once < (batch > QINS_BATCH ? 2 : 1); decoded_once++) {
        check_dots(k, x, u, rows, n, batch, group_size, group, at_end, decoded_once);
    }
}

/* Every product is as large as possible, and all have one sign. */
static void largest_dots(const qins_kernels *k, int batch, size_t group_size)
{
    enum { N = 320 };
    static float x[MANY * N];
    uint8_t u[N], group[N / 32];
    for (size_t i = 0; i < N; i++) {
        u[i] = i % 3 == 0 ? 0xff : 0x7f;
        for (size_t m = 0; m < (size_t)batch; m++) {
            x[m * N + i] = i % 3 == 0 ? -2.0f : 2.0f;
        }
    }
    memset(group, 255, sizeof group);
    check_dots(k, x, u, 1, N, batch, group_size, group_size ? group : NULL, 0, 1);
}

static void float_dots_at(const qins_kernels *k, size_t n, int batch, int at_end)
{
    static float x[QINS_BATCH * MOST];
    static qins_golden_factors factors;
    qins_golden_tables_build(&small_golden, (qins_range){0x34000000, 0x3e000000});
    qins_golden_factors_build(&factors, small_golden.log_min, small_golden.log_max);
    for (size_t i = 0; i < n * (size_t)batch; i++) {
        x[i] = normal();
    }
    /* of each 64: elements 0, 4, 8, ..., then 1, 5, 9, ..., then 2, ..., then 3, ... */
    static float quarters[QINS_BATCH * (MOST + QINS_BLOCK)];
    const size_t stride = (n + QINS_BLOCK - 1) / QINS_BLOCK * QINS_BLOCK;
    for (size_t i = 0; i < stride * (size_t)batch; i++) {
        size_t m = i / stride, at = i % stride, in_block = at % QINS_BLOCK;
        size_t from = at - in_block + 4 * (in_block % 16) + in_block / 16;
        quarters[i] = from < n ? x[m * n + from] : 0.0f;
    }
    const float *rows = place(in_f, quarters, stride * (size_t)batch * 4, at_end);
    const uint8_t *u = place(in_u, codes, n, at_end);
    const int8_t *sign = place(in_v, more, n, at_end);
    const uint8_t *bits = place(out_d, more, (n + 7) / 8, at_end);
    float by_sign[QINS_BATCH], by_bits[QINS_BATCH], plain[QINS_BATCH];
    k->dot_golden(u, sign, NULL, n, QINS_AHEAD, &factors, rows, stride, batch, by_sign);
    k->dot_golden(u, NULL, bits, n, QINS_AHEAD, &factors, rows, stride, batch, by_bits);
    rows = place(in_f, x, n * (size_t)batch * 4, at_end);
    const float *w = place(out_c, weights_small, n * 4, at_end);
    k->dot_f32(w, n, rows, n, batch, plain);
    for (int m = 0; m < batch; m++) {
        double a = 0.0, b = 0.0, c = 0.0, size = 1e-30, size_c = 1e-30;
        for (size_t i = 0; i < n; i++) {
            double v = (double)x[(size_t)m * n + i], f = (double)small_golden.value[u[i] ? u[i] : 1];
            f = u[i] ? f : f * exp(((double)small_golden.log_max - (double)small_golden.log_min) / 254.0);
            a += (sign[i] < 0 ? -f : f) * v;
            b += (bits[i / 8] >> (i % 8) & 1 ? -f : f) * v;
            c += (double)w[i] * v;
            size += f * fabs(v);
            size_c += fabs((double)w[i] * v);
        }
        check(fabs((double)by_sign[m] - a) <= 2e-6 * size, "dot_golden", k->name, n, (size_t)batch);
        check(fabs((double)by_bits[m] - b) <= 2e-6 * size, "dot_golden, log9", k->name, n, (size_t)batch);
        check(fabs((double)plain[m] - c) <= 1e-6 * size_c, "dot_f32", k->name, n, (size_t)batch);
    }
}

/* The steps between a decoder layer's products. */
static void between_products_at(const qins_kernels *k, size_t n, int at_end)
{
    static float values[MOST], others[MOST];
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        values[i] = i % 7 == 3 ? -1e30f : -40.0f * (float)(i % 31) / 31.0f;
        others[i] = normal() * (i % 5 == 0 ? 40.0f : 3.0f);
        sum += exp((double)values[i]);
    }
    float *row = place(in_f, values, n * 4, at_end);
    const float total = k->exp_row(row, n, 0.0f);
    check(fabs((double)total - sum) <= 1e-6 * sum, "exp_row, sum", k->name, n, 0);
    for (size_t i = 0; i < n; i++) {
        const double e = exp((double)values[i]);
        check(fabs((double)row[i] - e) <= 3e-7 * e + 2e-38, "exp_row", k->name, n, i);
    }
    for (int gelu = 0; gelu < 2; gelu++) {
        const float *gate = place(in_f, others, n * 4, at_end), *up = place(in_v, values, n * 4, at_end);
        float *out = room_for(out_a, n * 4, at_end);
        k->gate_row(gate, up, n, gelu, out);
        for (size_t i = 0; i < n; i++) {
            const double g = (double)others[i], z = gelu ? 1.5957691216057308 * (g + 0.044715 * g * g * g) : g;
            const double want = g / (1.0 + exp(-z)) * (double)values[i];
            /* far below zero the sigmoid is about e^z, whose relative error grows with that of z */
            check(fabs((double)out[i] - want) <=
                      (2e-6 + 2e-7 * fabs(z)) * fabs(want) + 2e-37 * fabs(g * (double)values[i]),
                  gelu ? "gate_row, gelu" : "gate_row", k->name, n, i);
        }
    }
}

/* Random numbers; making them anew for each case would take most of the tests' time. */
static const float *normals(size_t n)
{
    enum { POOL = 1 << 15 };
    static float pool[POOL];
    for (size_t i = 0; pool[POOL - 1] == 0.0f && i < POOL; i++) {
        pool[i] = normal();
    }
    return pool + next() % (POOL - n);
}

/* Attention over `count` rows of some type, with heads of n elements: scores, and weighted sums of the same rows. */
static void attention_at(const qins_kernels *k, qins_dtype dtype, size_t count, size_t n, int batch, int at_end)
{
    enum { ROWS = 70, WIDE = 150 };
    static float rows[ROWS * (WIDE + 3)], factors[QINS_BATCH * ROWS], queries[QINS_BATCH * WIDE],
        want[QINS_BATCH * WIDE];
    static char typed[sizeof rows];
    const size_t stride = n + 3, all = count > 0 ? (count - 1) * stride + n : 0, m_count = (size_t)batch;
    memcpy(rows, normals(all), all * sizeof *rows);
    qins_kernels_scalar.narrow[dtype](rows, all, typed);
    qins_kernels_scalar.widen[dtype](typed, all, rows);
    memcpy(factors, normals(m_count * count), m_count * count * sizeof *factors);
    memcpy(queries, normals(m_count * n), m_count * n * sizeof *queries);
    for (size_t i = 0; i < m_count * n; i++) {
        want[i] = (float)i;
    }
    const void *from = place(in_f, typed, all * item_size(dtype), at_end);
    char *out = memcpy(room_for(out_a, m_count * n * 4, at_end), want, m_count * n * 4);
    const float *weight = place(in_v, factors, m_count * count * 4, at_end);
    k->weigh_rows[dtype](from, count, stride, weight, count, batch, n, (float *)(void *)out, n);
    for (size_t i = 0; i < m_count * n; i++) {
        double exact = (double)want[i], size = fabs(exact);
        for (size_t t = 0; t < count; t++) {
            const double one = (double)factors[i / n * count + t] * (double)rows[t * stride + i % n];
            exact += one;
            size += fabs(one);
        }
        float got;
        memcpy(&got, out + i * 4, 4);
        check(fabs((double)got - exact) <= 5e-6 * size, "weigh_rows", k->name, n, count);
    }
    const float *x = place(in_v, queries, m_count * n * 4, at_end);
    out = room_for(out_a, m_count * count * 4, at_end);
    k->score_rows[dtype](from, count, stride, x, n, batch, n, (float *)(void *)out, count);
    for (size_t i = 0; i < m_count * count; i++) {
        double exact = 0.0, size = 0.0;
        for (size_t e = 0; e < n; e++) {
            const double one = (double)queries[i / count * n + e] * (double)rows[i % count * stride + e];
            exact += one;
            size += fabs(one);
        }
        float got;
        memcpy(&got, out + i * 4, 4);
        check(fabs((double)got - exact) <= 5e-6 * size, "score_rows", k->name, n, count);
    }
}

/* The same over rows of log8's codes: near the levels, and nothing beyond the buffers. */
static void coded_attention_at(const qins_kernels *k, float mu, size_t count, size_t n, int batch, size_t offset)
{
    enum { ROWS = 70 };
    static float level[QINS_LEVELS], factors[QINS_BATCH * ROWS], queries[QINS_BATCH * QINS_HEAD_DIM],
        want[QINS_BATCH * QINS_HEAD_DIM], scale[ROWS], value[ROWS * QINS_HEAD_DIM];
    static uint8_t code[ROWS * QINS_HEAD_DIM];
    static uint16_t stored[ROWS];
    static qins_log8_words words;
    const size_t m_count = (size_t)batch;
    const int at_end = offset == 0;
    static float last_mu;
    if (mu != last_mu) {
        qins_log8_words_build(&words, mu, 8);
        qins_log8_levels(mu, 0, level);
        last_mu = mu;
    }
    for (size_t t = 0; t < count; t++) {
        scale[t] = fabsf(normal()) + 0.1f;
    }
    qins_kernels_scalar.narrow[QINS_BF16](scale, count, stored);
    qins_kernels_scalar.widen[QINS_BF16](stored, count, scale);
    for (size_t i = 0; i < count * n; i++) {
        code[i] = (uint8_t)(next() >> 3);
        value[i] = (code[i] < 128 ? level[code[i]] : -level[code[i] - 128]) * scale[i / n];
    }
    memcpy(factors, normals(m_count * count), m_count * count * sizeof *factors);
    memcpy(queries, normals(m_count * n), m_count * n * sizeof *queries);
    for (size_t i = 0; i < m_count * n; i++) {
        queries[i] *= i / n == 1 ? 1e-30f : 1.0f;
        want[i] = (float)i;
    }
#define AT(g, data, bytes, at) memcpy(at_end ? room_for(g, bytes, 1) : (void *)((g).low + (at)), data, bytes)
    const size_t of_floats = offset % 16 * 4;
    const uint8_t *from = AT(in_f, code, count * n, offset);
    const uint16_t *scales = place(out_b, stored, count * sizeof *stored, 1);
    const float *x = AT(in_v, queries, m_count * n * 4, of_floats);
    char *out = at_end ? out_a.high - m_count * count * 4 : out_a.low + of_floats;
    mark_all(out_a);
    k->score_log8(from, scales, count, n, &words, x, batch, (float *)(void *)out, count);
    int right = 1;
    for (size_t i = 0; i < m_count * count; i++) {
        const float *q = queries + i / count * n, *row = value + i % count * n;
        double exact = 0.0, size = 0.0, most = 0.0;
        for (size_t e = 0; e < n; e++) {
            exact += (double)q[e] * (double)row[e];
            most = fmax(most, fabs((double)q[e]));
            size += 2e-4 * fabs((double)q[e]) * (double)scale[i % count];
        }
        for (size_t e = 0; e < n; e++) {
            size += most / QINS_X_MAX * fabs((double)row[e]);
        }
        float got;
        memcpy(&got, out + i * 4, 4);
        right &= fabs((double)got - exact) <= size;
    }
    right &= is_untouched(out_a, out, m_count * count * 4);
    check(right, "score_log8", k->name, n, count);
    out = at_end ? out_a.high - m_count * n * 4 : out_a.low + of_floats;
    mark_all(out_a);
    right = 1;
    memcpy(out, want, m_count * n * 4);
    float *weight = AT(in_v, factors, m_count * count * 4, of_floats);
    k->weigh_log8(from, scales, count, n, &words, weight, count, batch, (float *)(void *)out);
    for (size_t i = 0; i < m_count * n; i++) {
        double exact = (double)want[i], size = 1e-6 * fabs(exact);
        for (size_t t = 0; t < count; t++) {
            const double factor = (double)factors[i / n * count + t];
            exact += factor * (double)value[t * n + i % n];
            size += 2e-4 * fabs(factor) * (double)scale[t];
        }
        float got;
        memcpy(&got, out + i * 4, 4);
        right &= fabs((double)got - exact) <= size;
    }
    right &= is_untouched(out_a, out, m_count * n * 4);
    check(right, "weigh_log8", k->name, n, count);
#undef AT
}

static void attention(const qins_kernels *k)
{
    static const size_t COUNT[] = {0, 1, 3, 4, 5, 8, 17, 33, 70},
                        WIDTH[] = {1, 8, 15, 16, 17, 24, 63, 64, 65, 80, 96, 128, 150, 256, 512};
    for (size_t c = 0; c < sizeof COUNT / sizeof *COUNT; c++) {
        for (size_t w = 0; w < sizeof WIDTH / sizeof *WIDTH; w++) {
            for (int batch = 1; batch <= QINS_BATCH; batch++) {
                for (int i = 0; WIDTH[w] <= 150 && i < 6; i++) {
                    attention_at(k, (qins_dtype)(i / 2), COUNT[c], WIDTH[w], batch, i % 2);
                }
                if (k->score_log8 != NULL) {
                    coded_attention_at(k, w % 2 > 0 ? 3.0f : QINS_FACTORS_MU, COUNT[c], WIDTH[w], batch, 0);
                }
            }
        }
    }
    for (size_t offset = 1; k->score_log8 != NULL && offset < 64; offset++) {
        coded_attention_at(k, 16.0f, 9, 80, 3, offset);
        coded_attention_at(k, 16.0f, 9, 64, 5, offset);
    }
}

static void between_products(const qins_kernels *k)
{
    static const size_t LENGTH[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 576, 4097};
    for (size_t i = 0; i < sizeof LENGTH / sizeof *LENGTH; i++) {
        between_products_at(k, LENGTH[i], 0);
        between_products_at(k, LENGTH[i], 1);
    }
}

static void dots(const qins_kernels *k, int brief)
{
    static const size_t LENGTH[] = {0,  1,   2,   7,   15,  16,  17,  31,  32,  33,  63,  64,  65,   95,   96,
                                    97, 127, 128, 129, 130, 160, 191, 192, 193, 255, 256, 576, 1000, 1536, 4097};
    static const size_t GROUP[] = {0, 32, 64, 128, 192, 4096, 8192};
    for (size_t g = 0; g < sizeof GROUP / sizeof *GROUP; g++) {
        for (size_t i = brief ? g % 4 : 0; i < sizeof LENGTH / sizeof *LENGTH; i += brief ? 4 : 1) {
            for (int batch = 1; batch <= QINS_BATCH; batch += brief ? 7 : 1) {
                dots_at(k, LENGTH[i], batch, GROUP[g], 0);
                dots_at(k, LENGTH[i], batch, GROUP[g], 1);
            }
            if (i % 3 == 2) {
                dots_at(k, LENGTH[i], QINS_BATCH + 1, GROUP[g], 1);
                dots_at(k, LENGTH[i], MANY, GROUP[g], 0);
            }
        }
        for (int batch = 1; batch <= MANY; batch += 3) {
            largest_dots(k, batch, GROUP[g]);
        }
    }
    for (size_t i = 0; i < sizeof LENGTH / sizeof *LENGTH && LENGTH[i] <= 1000; i++) {
        for (int batch = 1; batch <= QINS_BATCH; batch++) {
            float_dots_at(k, LENGTH[i], batch, 0);
            float_dots_at(k, LENGTH[i], batch, 1);
        }
    }
    /* tiny and huge activations keep their precision; NaN and infinity make only their own row NaN */
    static const float SCALES[] = {1e-36f, 1e-30f, 1.0f, 1e30f};
    for (int s = 0; s < 4; s++) {
        float x[QINS_BLOCK], scale;
        int16_t fixed[QINS_BLOCK];
        double sum = 0.0, exact = 0.0;
        for (int i = 0; i < QINS_BLOCK; i++) {
            x[i] = (float)(i + 1) * SCALES[s];
            exact += (double)x[i];
        }
        k->fix_activations(x, QINS_BLOCK, QINS_BLOCK, fixed, QINS_BLOCK, &scale);
        for (int i = 0; i < QINS_BLOCK; i++) {
            sum += fixed[i] * (double)scale;
        }
        check(fabs(sum / exact - 1.0) < 1e-4, "fix_activations", k->name, (size_t)s, 0);
        const double unit = (double)x[QINS_BLOCK - 1] / (double)QINS_X_MAX;
        check(fabs((double)scale / unit - 1.0) < 1e-5, "scale of activations", k->name, (size_t)s, 0);
    }
    static const float BAD[] = {NAN, INFINITY, -INFINITY};
    for (int b = 0; b < 3; b++) {
        float x[2][100], out[4];
        static qins_log8_words words;
        qins_log8_words_build(&words, 2.5f, 8);
        for (int i = 0; i < 100; i++) {
            x[0][i] = x[1][i] = 1.0f;
        }
        x[0][77] = BAD[b];
        const qins_fixed fixed = fixed_rows(k, x[0], 100, 2, k->word_step, 0);
        k->dot_log8(codes, 1, 100, NULL, 0, &words, &fixed, NULL, out);
        check(isnan(out[0]) && isfinite(out[1]), "not finite activations", k->name, (size_t)b, 0);
    }
}

/* -- whole products ------------------------------------------------------------------------------- */

static double exact_product(const float *w, const float *x, size_t n)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)w[i] * (double)x[i];
    }
    return sum;
}

/* Makes codes of any codec, with random scales, in arrays that end where their pages end. For packed codes, cols is a
 * multiple of 8. */
static qins_codes some_codes(qins_codec codec, size_t rows, size_t cols, size_t group_size, float mu)
{
    static float scale[MOST];
    static uint8_t all[9 * MOST]; /* the largest shape, with columns rounded up */
    for (size_t i = 0; i < rows * cols; i++) {
        all[i] = (uint8_t)(i < 256 ? i : next());
        all[i] = log_bits(codec) == 0 && all[i] == 0 ? 1 : all[i];
    }
    for (size_t i = 0; i < rows; i++) {
        scale[i] = (float)(0.5 + uniform());
    }
    size_t groups = group_size ? (cols + group_size - 1) / group_size : 0;
    qins_codes e = {.codec = codec, .rows = rows, .cols = cols, .group_size = group_size, .mu = mu};
    e.codes = place(in_u, all, rows * code_bytes(&e, cols), 1);
    e.log_min = -6.0f;
    e.log_max = 1.0f;
    e.alpha = 2.0f;
    e.z_min = 0.25f;
    e.z_max = 0.96875f;
    e.scale = place(out_a, scale, rows * 4, 1);
    if (log_bits(codec) > 0) {
        e.group_scale = place(in_v, more, rows * groups, 1);
    } else {
        for (size_t i = 0; i < rows * cols; i++) {
            all[i] = (uint8_t)next();
        }
        e.sign = place(in_v, all, rows * cols, 1);
        e.sign_bits = place(in_v, all, rows * ((cols + 7) / 8), 1);
    }
    return e;
}

static void product_at(const qins_kernels *k, const qins_codes *e, size_t batch, qins_dtype dtype)
{
    size_t n = e->rows * e->cols, size = dtype == QINS_F32 ? 4 : 2;
    float *w = malloc(n * 4), *x = malloc(batch * e->cols * 4), *y = malloc(batch * e->rows * 4);
    char *xs = malloc(batch * e->cols * size), *ys = malloc(batch * e->rows * size),
         *again = malloc(batch * e->rows * size);
    qins_decode(&qins_kernels_scalar, e, 0, e->rows, 0, e->cols, 1, QINS_F32, w, e->cols);
    for (size_t i = 0; i < batch * e->cols; i++) {
        x[i] = normal();
    }
    if (batch > 2) {
        x[2 * e->cols] *= 1000.0f; /* an outlier */
        memset(x + e->cols, 0, e->cols * 4);
    }
    qins_kernels_scalar.narrow[dtype](x, batch * e->cols, xs);
    qins_kernels_scalar.widen[dtype](xs, batch * e->cols, x);
    check(qins_linear(k, e, xs, batch, dtype, ys, 1) == 0, "product", k->name, n, batch);
    check(qins_linear(k, e, xs, batch, dtype, again, 3) == 0, "product, 3 threads", k->name, n, batch);
    check(memcmp(ys, again, batch * e->rows * size) == 0, "threads do not matter", k->name, n, batch);
    qins_kernels_scalar.widen[dtype](ys, batch * e->rows, y);
    /* twice the promised error, as so few sums vary by chance (tests/nn/test_linear.py checks the promise) */
    double limit = dtype == QINS_F32 ? 4e-4 : 1e-2, mean_square = 0.0;
    if (n < 64) {
        limit *= 2; /* if all weights happen to be small beside their scale, their words keep fewer bits */
    }
    if (qins_choose_way(k, e, batch, dtype) == QINS_BYTES && e->codec == QINS_log8 && n > 20000 &&
        e->group_size % QINS_DEPTH == 0) {
        limit = 8e-5; /* weights and activations have 15 bits, and products are exact */
    }
    for (size_t i = 0; i < n; i++) {
        mean_square += (double)w[i] * (double)w[i] / (double)n;
    }
    for (size_t m = 0; m < batch; m++) {
        /* relative to the sum expected of weights of this size: a single sum may happen to be small */
        double error = 0.0, size_of = 0.0, rounding = 0.0;
        for (size_t j = 0; j < e->cols; j++) {
            double v = (double)x[m * e->cols + j];
            size_of += v * v * mean_square * (double)e->rows;
        }
        for (size_t i = 0; i < e->rows; i++) {
            const double sum = exact_product(w + i * e->cols, x + m * e->cols, e->cols);
            double d = (double)y[m * e->rows + i] - sum;
            error += d * d;
            rounding += dtype == QINS_F32 ? 0.0 : sum * sum / 65536.0;
        }
        check(error <= limit * limit * size_of + rounding, "product against float64", k->name, m, batch);
    }
    free(w), free(x), free(y), free(xs), free(ys), free(again);
}

/* Batches around every crossover between ways, and sizes around the ends of blocks, panels, tiles and column chunks. */
static void products(const qins_kernels *k, int slow, size_t every)
{
    static const size_t BATCH[] = {1, 2, 3, 5, 8, 9, 16, 17, 33, 65, 128, 129};
    static const struct {
        size_t rows, cols, group_size;
        float mu;
    } SHAPE[] = {{1, 1, 0, 2.5f},      {5, 70, 64, 2.5f},     {33, 130, 128, 2.5f}, {48, 576, 128, 2.5f},
                 {17, 1100, 64, 2.5f}, {250, 130, 128, 2.5f}, {13, 96, 32, 2.5f},   {16, 64, 0, 0.0f},
                 {31, 640, 192, 4.0f}, {15, 2100, 128, 6.0f}, {3, 4200, 64, 2.5f},  {7, 100, 10, 2.5f},
                 {2, 4200, 192, 2.5f}, {15, 2170, 32, 2.5f},  {15, 2112, 64, 2.5f}, {67, 328, 64, 0.5f}};
    for (size_t i = 0; i < sizeof SHAPE / sizeof *SHAPE; i += every) {
        for (int codec = 0; codec < QINS_CODEC_COUNT; codec++) {
            const int packed = is_packed((qins_codec)codec);
            size_t group = log_bits((qins_codec)codec) > 0 ? SHAPE[i].group_size : 0, cols = SHAPE[i].cols;
            if (packed) { /* the next shape that they can have */
                group = group % 64 == 0 && group > 0 ? group : 32;
                cols = (cols + 7) / 8 * 8;
            }
            if (packed && ((size_t)codec + i) % PACKED_COUNT != 0) {
                continue; /* they differ only in how they are unpacked, so each shape needs only one of them */
            }
            qins_codes e = some_codes((qins_codec)codec, SHAPE[i].rows, cols, group, SHAPE[i].mu);
            /* emulators and sanitizers are slow: a third of the batches with each shape and codec, but all of them */
            const size_t first = slow ? ((size_t)codec + i / 3) % 3 : 0;
            for (size_t b = first; b < sizeof BATCH / sizeof *BATCH; b += slow ? 3 : 1) {
                product_at(k, &e, BATCH[b], QINS_F32);
                product_at(k, &e, BATCH[b], QINS_BF16);
            }
            if (SHAPE[i].rows == 5 && !slow) {
                product_at(k, &e, 520, QINS_F32); /* more than one batch of panels */
                product_at(k, &e, 1041, QINS_BF16);
            }
        }
    }
}

static qins_codes rows_of(const qins_codes *e, size_t row, size_t rows)
{
    qins_codes part = *e;
    const size_t groups = e->group_size ? (e->cols + e->group_size - 1) / e->group_size : 0;
    part.rows = rows;
    part.codes += row * code_bytes(e, e->cols);
    if (log_bits(e->codec) > 0) {
        part.scale += row;
        part.group_scale += row * groups;
    } else {
        part.sign += row * e->cols;
        part.sign_bits += row * ((e->cols + 7) / 8);
    }
    return part;
}

/* Matrices of one x, which has outliers: the same as one by one. */
static void sets(const qins_kernels *k)
{
    enum { ROWS = 177, COLS = 200, MOST_BATCH = 520 };
    static const size_t BATCH[] = {1, 3, 9, 70, MOST_BATCH}, FIRST[] = {0, 40, 47, ROWS};
    static const struct {
        qins_codec codec;
        size_t group_size;
    } FORMAT[] = {{QINS_log8, 0}, {QINS_log8, 64}, {QINS_log8, 32}, {QINS_log8, 10}, {QINS_log5, 32}, {QINS_golden, 0}};
    static float x[MOST_BATCH * COLS], together[3][MOST_BATCH * ROWS], alone[MOST_BATCH * ROWS];
    for (size_t i = 0; i < MOST_BATCH * COLS; i++) {
        x[i] = normal() * (i % 171 == 0 ? 100.0f : 1.0f);
    }
    for (size_t f = 0; f < sizeof FORMAT / sizeof *FORMAT; f++) {
        const qins_codes e = some_codes(FORMAT[f].codec, ROWS, COLS, FORMAT[f].group_size, 2.5f);
        for (size_t b = 0; b < sizeof BATCH / sizeof *BATCH; b++) {
            qins_codes part[3];
            const qins_codes *parts[3];
            float *y[3];
            for (size_t i = 0; i < 3; i++) {
                part[i] = rows_of(&e, FIRST[i], FIRST[i + 1] - FIRST[i]);
                parts[i] = &part[i];
                y[i] = together[i];
            }
            check(qins_linear_set(k, parts, 3, x, BATCH[b], y, 3) == 0, "set", k->name, f, BATCH[b]);
            for (size_t i = 0; i < 3; i++) {
                check(qins_linear(k, parts[i], x, BATCH[b], QINS_F32, alone, 1) == 0, "alone", k->name, f, BATCH[b]);
                check(memcmp(alone, y[i], BATCH[b] * part[i].rows * sizeof *alone) == 0, "set and alone", k->name, f,
                      BATCH[b]);
            }
        }
    }
}

static void take_outliers(const qins_kernels *k)
{
    enum { N = 4100, LARGE = QINS_OUTLIERS + 4 };
    static float x[N], rest[N];
    static qins_outliers o;
    for (size_t i = 0; i < N; i++) {
        x[i] = normal();
    }
    const float *there = place(in_f, x, sizeof x, 1);
    check(!qins_take_outliers(k, there, N, rest, &o) && o.count == 0, "none", k->name, N, 0);
    /* at both ends of blocks, and in the last, partial one; one of them dwarfs the others */
    static const uint32_t AT[] = {0, 63, 64, 2000, N - 1};
    enum { COUNT = sizeof AT / sizeof *AT };
    float expected[N];
    memcpy(expected, x, sizeof x);
    for (size_t j = 0; j < COUNT; j++) {
        x[AT[j]] = (j % 2 ? -30.0f : 30.0f) * (j == 3 ? 1e4f : 1.0f);
        expected[AT[j]] = 0.0f;
    }
    for (int in_place = 0; in_place < 2; in_place++) {
        there = place(in_f, x, sizeof x, 1);
        float *left = in_place ? (float *)(void *)(uintptr_t)there : rest;
        check(qins_take_outliers(k, there, N, left, &o) && o.count == COUNT, "count", k->name, o.count, 0);
        check(memcmp(left, expected, sizeof rest) == 0, "rest", k->name, (size_t)in_place, 0);
        check(in_place || memcmp(there, x, sizeof x) == 0, "x stays", k->name, 0, 0);
        for (size_t i = 0; i < COUNT; i++) {
            size_t j = 0;
            while (j < o.count && o.col[j] != AT[i]) {
                j++;
            }
            check(j < o.count && o.value[j] == x[AT[i]], "outlier", k->name, i, j);
        }
    }
    static const float BAD[] = {NAN, INFINITY, -INFINITY, 3e38f};
    for (size_t b = 0; b < sizeof BAD / sizeof *BAD; b++) {
        x[77] = BAD[b];
        check(!qins_take_outliers(k, x, N, rest, &o), "not finite, or its square", k->name, b, 0);
    }
    memset(x, 0, sizeof x);
    check(!qins_take_outliers(k, x, N, rest, &o) && !qins_take_outliers(k, x, 0, rest, &o), "zeros", k->name, 0, 0);
    for (size_t i = 0; i < LARGE; i++) { /* more than there is room for */
        x[100 * i] = 1.0f;
    }
    check(qins_take_outliers(k, x, N, rest, &o) && o.count == QINS_OUTLIERS, "many", k->name, o.count, 0);
    for (size_t i = 0; i < LARGE; i++) {
        check(rest[100 * i] == (i < QINS_OUTLIERS ? 0.0f : 1.0f), "rest of many", k->name, i, 0);
    }
}

/* Activations that dominate a row, where weights are small beside their neighbors. */
static void outliers_at(const qins_kernels *k, qins_codec codec, size_t batch, size_t group_size, qins_dtype dtype)
{
    enum { ROWS = 67, COLS = 320, COLUMNS = QINS_COLUMNS + 5, MOST_BATCH = 70 };
    static uint8_t u[ROWS * COLS], packed[ROWS * COLS], group[ROWS * COLS];
    static float scale[ROWS], x[MOST_BATCH * COLS], y[MOST_BATCH * ROWS];
    static char xs[sizeof x], ys[sizeof y];
    qins_codes e = {.codec = codec, .rows = ROWS, .cols = COLS, .mu = 2.5f, .group_size = group_size};
    const int bits = log_bits(codec);
    for (size_t i = 0; i < ROWS * COLS; i++) {
        const size_t col = i % COLS;
        u[i] = (uint8_t)(next() & (col % 13 == 2 ? 0x87 : 0xff));
        if (bits < 8) {
            u[i] = (uint8_t)((u[i] & 0x80) | next() % (col % 13 == 2 ? 2u : 1u << (bits - 1)));
        }
        group[i] = (uint8_t)next();
    }
    const size_t bytes = ROWS * code_bytes(&e, COLS);
    if (bits < 8) {
        qins_pack(u, ROWS * COLS, bits, packed); /* COLS is a multiple of 64, so rows continue one another */
    }
    for (size_t i = 0; i < ROWS; i++) {
        scale[i] = (float)(0.5 + uniform());
    }
    for (size_t i = 0; i < batch * COLS; i++) {
        x[i] = normal();
    }
    for (size_t m = 0; m < batch; m++) { /* more columns than stay decoded, three per row; every fifth row has none */
        for (size_t j = 0; j < (m % 5 == 4 ? 0u : 3u); j++) {
            x[m * COLS + (2 + 13 * ((m + 7 * j) % COLUMNS)) % COLS] = (j % 2 ? -3e3f : 3e3f) + 1e3f * normal();
        }
    }
    e.codes = place(in_u, bits < 8 ? packed : u, bytes, 1);
    e.group_scale = group_size ? place(in_v, group, ROWS * ((COLS + group_size - 1) / group_size), 1) : NULL;
    e.scale = place(out_a, scale, sizeof scale, 1);
    qins_kernels_scalar.narrow[dtype](x, batch * COLS, xs);
    qins_kernels_scalar.widen[dtype](xs, batch * COLS, x);
    check(qins_linear(k, &e, xs, batch, dtype, ys, 2) == 0, "product with outliers", k->name, batch, group_size);
    qins_kernels_scalar.widen[dtype](ys, batch * ROWS, y);
    static float w[ROWS * COLS];
    qins_decode(&qins_kernels_scalar, &e, 0, ROWS, 0, COLS, 1, QINS_F32, w, COLS);
    for (size_t m = 0; m < batch; m++) {
        double error = 0.0, size = 0.0;
        for (size_t i = 0; i < ROWS; i++) {
            const double sum = exact_product(w + i * COLS, x + m * COLS, COLS), d = (double)y[m * ROWS + i] - sum;
            error += d * d;
            size += sum * sum;
        }
        const double limit = dtype == QINS_F32 ? (m % 5 == 4 ? 4e-4 : 4e-5) : 5e-4;
        check(error <= limit * limit * size, "product with outliers against float64", k->name, batch, m);
    }
}

static void outliers(const qins_kernels *k)
{
    static const size_t BATCH[] = {1, 2, 8, 11, 70}, GROUP[] = {0, 32, 64, 128, 192};
    take_outliers(k);
    for (size_t b = 0; b < sizeof BATCH / sizeof *BATCH; b++) {
        for (size_t g = 0; g < sizeof GROUP / sizeof *GROUP; g++) {
            outliers_at(k, QINS_log8, BATCH[b], GROUP[g], QINS_F32);
            outliers_at(k, QINS_log8, BATCH[b], GROUP[g], QINS_F16);
            if (GROUP[g] > 0) {
                outliers_at(k, PACKED[(b + g) % PACKED_COUNT], BATCH[b], GROUP[g], QINS_F32);
            }
        }
    }
}

enum { CACHE_ROWS = 5 };

/* A cache of one head, whose arrays end at the ends of buffers */
static qins_cache cache_at_ends(qins_codec codec, size_t dim, const qins_cache_tables *tables, const guarded *buffers)
{
    qins_cache c = {.codec = codec, .heads = 1, .room = CACHE_ROWS, .dim = dim, .tables = tables};
    const size_t groups = (dim + QINS_CACHE_GROUP - 1) / QINS_CACHE_GROUP;
    c.codes = room_for(buffers[0], CACHE_ROWS * (is_packed(codec) ? dim / 8 * (size_t)log_bits(codec) : dim), 1);
    if (codec == QINS_golden) {
        c.sign = room_for(buffers[1], CACHE_ROWS * dim, 1);
        c.range = room_for(buffers[2], CACHE_ROWS * 2 * sizeof *c.range, 1);
    } else {
        c.scale = room_for(buffers[1], CACHE_ROWS * sizeof *c.scale, 1);
        c.group_scale = is_packed(codec) ? room_for(buffers[2], CACHE_ROWS * groups, 1) : NULL;
    }
    return c;
}

/* Values of rows [row, row + n), in a buffer that ends after them */
static const float *scaled_rows(const qins_kernels *k, const qins_cache *c, size_t row, size_t n)
{
    const size_t dim = c->dim, span = qins_cache_span(c), groups = (dim + span - 1) / span;
    float *out = room_for(out_a, n * dim * sizeof *out, 1);
    float *scale = room_for(out_b, n * groups * sizeof *scale, 1);
    qins_cache_rows(k, c, row, n, out, scale);
    for (size_t i = 0; i < n * dim; i++) {
        out[i] *= scale[i % dim / span * n + i / dim];
    }
    return out;
}

/* Rows of a cache, into buffers that end after them: the values that decoding gives, before their scales. Codes of
 * log8's family are those of the scalar kernels. */
static void cache_rows(const qins_kernels *k, qins_codec codec, size_t dim)
{
    static const qins_codec SCALED[] = {QINS_log8, QINS_log6, QINS_log5, QINS_log4};
    static qins_cache_tables tables[QINS_CODEC_COUNT];
    static float whole[MOST];
    static char of_scalar[8 * MOST];
    for (size_t i = 0; tables[QINS_log4].nearest.top == 0 && i < sizeof SCALED / sizeof *SCALED; i++) {
        qins_cache_tables_build(&tables[SCALED[i]], SCALED[i], 3.0f);
    }
    const guarded buffers[] = {in_u, in_v, out_c};
    qins_cache c = cache_at_ends(codec, dim, &tables[codec], buffers);
    for (int scalar = 1; scalar >= 0; scalar--) {
        const qins_kernels *by = scalar ? &qins_kernels_scalar : k;
        const int failed_here = qins_cache_encode(by, &c, weights_small, QINS_F32, 0, CACHE_ROWS, 1);
        check(failed_here == 0, "cache rows, encode", k->name, (size_t)codec, dim);
        char *to = of_scalar;
        for (int i = 0; codec != QINS_golden && i < 3; i++) {
            const char *from = i == 0 ? (char *)c.codes : i == 1 ? (char *)c.scale : (char *)c.group_scale;
            const size_t bytes = from != NULL ? (size_t)(buffers[i].high - from) : 0;
            check(scalar || bytes == 0 || memcmp(to, from, bytes) == 0, "cache codes", k->name, (size_t)codec, dim);
            if (scalar && bytes > 0) {
                memcpy(to, from, bytes);
            }
            to += bytes;
        }
    }
    qins_cache_decode(k, &c, 0, CACHE_ROWS, QINS_F32, whole, 1);
    for (size_t row = 0; row < CACHE_ROWS; row++) {
        const size_t n = CACHE_ROWS - row;
        const float *out = scaled_rows(k, &c, row, n);
        check(memcmp(out, whole + row * dim, n * dim * sizeof *out) == 0, "cache rows", k->name, (size_t)codec, row);
    }
}

/* Values of rows of packed codes, bit for bit. */
static void packed_values_at(const qins_kernels *k, size_t rows, size_t cols, int bits, size_t offset, int at_end)
{
    static float value[64], expected[MOST];
    const size_t n = rows * cols, row_bytes = cols / 8 * (size_t)bits, bytes = rows * row_bytes;
    for (size_t q = 0; q < 64; q++) {
        value[q] = normal();
    }
    for (size_t i = 0; i < n; i++) {
        expected[i] = value[code_of_bytes(more + i / cols * row_bytes, cols, i % cols, bits)];
    }
    mark_all(out_a);
    char *from = at_end ? in_v.high - bytes : in_v.low + offset;
    char *to = at_end ? out_a.high - n * sizeof *value : out_a.low + offset;
    memcpy(from, more, bytes);
    k->packed_values((const uint8_t *)from, rows, cols, bits, value, (float *)(void *)to);
    int right = memcmp(to, expected, n * sizeof *value) == 0;
    right &= is_untouched(out_a, to, n * sizeof *value);
    check(right, "packed_values", k->name, cols, (size_t)bits);
}

static void packed_values(const qins_kernels *k)
{
    for (int bits = 4; bits <= k->value_bits; bits++) {
        for (size_t cols = 8; cols <= 520; cols += cols < 136 ? 8 : 64) {
            for (size_t rows = 0; rows <= 3; rows++) {
                packed_values_at(k, rows, cols, bits, 0, 1);
            }
        }
        for (size_t offset = 1; offset < 64; offset++) {
            packed_values_at(k, 2, 96, bits, offset, 0);
        }
    }
}

/* Buffers at every offset from an aligned address. */
static void kernels_misaligned(const qins_kernels *k)
{
    const qins_kernels *s = &qins_kernels_scalar;
    enum { N = 100 };
    for (size_t offset = 0; offset < 64; offset++) {
        float *w = memcpy(in_f.low + offset, weights, N * 4);
        uint8_t *u = memcpy(in_u.low + offset, codes, N);
        void *x = out_a.low + offset, *y = out_b.low;
        memset(out_a.low, 0x5a, 64 + N * 4 + 64);
        k->decode_log8(u, 0, N, 0.5f, NULL, 0, log8.level, x);
        s->decode_log8(codes, 0, N, 0.5f, NULL, 0, log8.level, y);
        int ok = memcmp(x, y, N * 4) == 0;
        for (size_t i = 0; i < offset; i++) {
            ok &= out_a.low[i] == 0x5a;
        }
        for (size_t i = 0; i < 64; i++) {
            ok &= out_a.low[offset + N * 4 + i] == 0x5a;
        }
        check(ok, "misaligned decode", k->name, offset, 0);
        k->encode_log8(w, N, 0.1f, &log8, x);
        s->encode_log8(weights, N, 0.1f, &log8, (uint8_t *)y);
        check(memcmp(x, y, N) == 0, "misaligned encode", k->name, offset, 0);
        for (int t = 1; t < 4; t++) {
            k->narrow[t](w, N, x);
            s->narrow[t](weights, N, y);
            check(memcmp(x, y, N * (t == 3 ? 8 : 2)) == 0, "misaligned narrow", k->name, offset, (size_t)t);
            k->widen[t](x, N, (float *)(void *)(out_c.low + offset));
            s->widen[t](y, N, (float *)(void *)out_d.low);
            check(memcmp(out_c.low + offset, out_d.low, N * 4) == 0, "misaligned widen", k->name, offset, (size_t)t);
        }
    }
}

/* Every half, and every float whose rounding to half or bfloat16 could differ. */
static void conversions(const qins_kernels *k)
{
    const qins_kernels *s = &qins_kernels_scalar;
    static uint16_t half[1 << 16], a[1 << 16], b[1 << 16];
    static float x[1 << 16], y[1 << 16];
    for (size_t i = 0; i < 1 << 16; i++) {
        half[i] = (uint16_t)i;
    }
    k->widen[QINS_F16](half, 1 << 16, x);
    s->widen[QINS_F16](half, 1 << 16, y);
    check(memcmp(x, y, sizeof x) == 0, "all halves", k->name, 0, 0);
    k->widen[QINS_BF16](half, 1 << 16, x);
    s->widen[QINS_BF16](half, 1 << 16, y);
    check(memcmp(x, y, sizeof x) == 0, "all bfloat16", k->name, 0, 0);
    for (uint32_t low = 0; low < 4; low++) {
        static const uint32_t LOW[] = {0x0fff, 0x1000, 0x1001, 0x8000};
        for (uint32_t i = 0; i < 1 << 16; i++) {
            uint32_t u = i << 16 | LOW[low];
            x[i] = (u & 0x7fffffff) >= 0x7f800000 ? 0.0f : float_of(u);
        }
        k->narrow[QINS_F16](x, 1 << 16, a);
        s->narrow[QINS_F16](x, 1 << 16, b);
        check(memcmp(a, b, sizeof a) == 0, "to half", k->name, low, 0);
        k->narrow[QINS_BF16](x, 1 << 16, a);
        s->narrow[QINS_BF16](x, 1 << 16, b);
        check(memcmp(a, b, sizeof a) == 0, "to bfloat16", k->name, low, 0);
    }
}

/* -- tables --------------------------------------------------------------------------------------- */

/* Levels of log8 or a packed codec, the search for the nearest one, and their log8 form */
static void levels_at(float mu, int bits, int last)
{
    static qins_log8_tables t;
    float form[QINS_LEVELS];
    qins_log8_tables_build(&t, mu, bits);
    qins_log8_levels(mu, bits < 8, form);
    const float *level = t.level;
    for (int m = 0; m <= last; m++) {
        double part = (double)m / last;
        double f = mu == 0.0f ? part : expm1(part * log1p((double)mu)) / (double)mu;
        check(fabs((double)level[m] - f) <= 6.1e-8 * f, "level", "core", (size_t)bits, (size_t)m);
        check(bits == 8 || form[m == last ? 127 : m << (8 - bits)] == level[m], "form", "core", (size_t)bits,
              (size_t)m);
    }
    check(level[0] == 0.0f && level[last] == 1.0f, "level ends", "core", (size_t)bits, 0);
    check(t.top == (bits == 8 ? 127 : last - 1) && t.bits == bits, "top", "core", (size_t)bits, 0);
    for (int j = 0; j < 20000; j++) { /* nearest level, near and far from the thresholds */
        double r =
            j % 2 ? uniform() * 1.2
                  : ((double)level[j % last] + (double)level[j % last + 1]) * 0.5 * (1.0 + (uniform() - 0.5) * 1e-6);
        float x = (float)r;
        uint32_t m = 0;
        while ((int)m < last && ((double)level[m] + (double)level[m + 1]) * 0.5 <= (double)x) {
            m++;
        }
        check(qins_lut_count(&t.lut, (int32_t)bits_of(x)) == m, "nearest level", "core", (size_t)bits, (size_t)j);
    }
}

/* Weights at and beside each of the thresholds: every kernel takes the same level. */
static void levels_beside_thresholds(const qins_kernels *k, float mu, int bits)
{
    static qins_log8_tables t;
    qins_log8_tables_build(&t, mu, bits);
    const int last = bits == 8 ? QINS_LEVELS - 1 : 1 << (bits - 1);
    static float w[6 * QINS_LEVELS];
    size_t n = 0;
    for (int m = 0; m < last; m++) {
        const float middle = (float)(((double)t.level[m] + (double)t.level[m + 1]) * 0.5);
        for (int by = -1; by <= 1; by++) {
            uint32_t pattern = bits_of(middle) + (uint32_t)by;
            float x;
            memcpy(&x, &pattern, sizeof x);
            w[n++] = x;
            w[n++] = -x;
        }
    }
    for (size_t i = 0; i < n; i++) {
        const float inverse = 1.0f;
        float a[2] = {0.0f}, b[2] = {0.0f};
        k->errors_log8(w + i, NULL, 1, &inverse, 1, &t, a);
        qins_kernels_scalar.errors_log8(w + i, NULL, 1, &inverse, 1, &t, b);
        check(memcmp(a, b, sizeof a) == 0, "level beside a threshold", k->name, (size_t)bits, i);
        const float near[2] = {fabsf(w[i]) - t.level[i / 6], fabsf(w[i]) - t.level[i / 6 + 1]};
        const float least = near[0] * near[0] < near[1] * near[1] ? near[0] : near[1];
        for (int sign = 0; sign < (bits == 8 ? 1 : 2); sign++) { /* the last level is for weights of the other sign */
            const int exists = (int)(i / 6) + 1 <= t.top || (w[i] < 0.0f) == (sign == 0);
            const float e = exists ? least : near[0];
            check(a[sign] <= e * e * 1.00001f && a[sign] >= least * least, "error beside a threshold", k->name,
                  (size_t)bits, i);
        }
    }
}

/* A processor's features are separate bits, or a set would run where its instructions are missing. */
static void features(void)
{
    static const unsigned ALL[] = {QINS_CPU_AVX2, QINS_CPU_AVX512, QINS_CPU_VBMI, QINS_CPU_VNNI,
                                   QINS_CPU_BF16, QINS_CPU_AMX,    QINS_CPU_NEON};
    unsigned before = 0;
    for (size_t i = 0; i < sizeof ALL / sizeof *ALL; i++) {
        check(ALL[i] != 0 && (before & ALL[i]) == 0, "features", "core", i, ALL[i]);
        before |= ALL[i];
    }
}

/* The unit of log8's factors is the best of those tried; the worst doubles the errors. */
static void factors(void)
{
    static const float MU[] = {0.25f, 0.5f, 1.0f, 2.0f, 2.5f, 4.0f, 8.0f, 20.0f};
    for (size_t i = 0; i < sizeof MU / sizeof *MU; i++) {
        const double most = i == 0 ? 7e-5 : i == 1 ? 4e-5 : 3.2e-5; /* a small mu leaves few units that fit */
        qins_log8_words t;
        float level[QINS_LEVELS];
        double error = 0.0;
        qins_log8_words_build(&t, MU[i], 8);
        qins_log8_levels(MU[i], 0, level);
        for (int m = 0; m < QINS_LEVELS; m++) {
            const int word = ((t.a[m / 16] * t.b[m % 16] + (1 << 14)) >> 15) - t.c;
            const double e = word * (double)t.factor_unit - (double)level[m];
            error += e * e;
        }
        check(sqrt(error / (double)QINS_LEVELS) < most, "factors", "core", i, 0);
    }
}

static void tables(void)
{
    for (int i = 0; i < 20000; i++) {
        double x = exp((uniform() - 0.5) * 180.0), l = qins_log(x), e = qins_exp((uniform() - 0.5) * 200.0);
        check(fabs(l - log(x)) <= 1e-15 * (1.0 + fabs(log(x))), "log", "core", (size_t)i, 0);
        check(isfinite(e) && fabs(qins_log(e) - log(e)) < 1e-13, "exp", "core", (size_t)i, 0);
    }
    for (double x = -90.0; x < 90.0; x += 0.0371) {
        check(fabs(qins_exp(x) / exp(x) - 1.0) < 4e-16, "exp", "core", 0, 0);
    }
    check(qins_exp(-1e9) == 0.0 && isinf(qins_exp(1e9)), "exp ends", "core", 0, 0);

    static const float MU[] = {0.0f, 1e-30f, 1e-6f, 0.01f, 0.5f, 1.0f, 2.5f, 4.0f, 6.0f, 32.0f, 255.0f, 65536.0f};
    for (size_t i = 0; i < sizeof MU / sizeof *MU; i++) {
        for (int bits = 8; bits >= 4; bits -= bits == 8 ? 2 : 1) {
            const int last = bits == 8 ? 127 : 1 << (bits - 1);
            levels_at(MU[i], bits, last);
        }
    }
    /* ranges from two neighboring floats to all of float32 */
    static const uint32_t SPAN[] = {1, 2, 3, 100, 253, 254, 1000, 65536, 1u << 20, 1u << 24, 1u << 27};
    for (size_t i = 0; i < sizeof SPAN / sizeof *SPAN; i++) {
        qins_range r = {0x3f000000 - (int32_t)(SPAN[i] / 2), 0x3f000000 + (int32_t)((SPAN[i] + 1) / 2)};
        qins_golden_tables_build(&golden, r);
        if (golden.constant) {
            check(SPAN[i] < 4, "constant", "core", i, 0);
            continue;
        }
        double lo = golden.log_min, range = (double)golden.log_max - lo;
        for (int j = 0; j < 20000; j++) {
            int32_t p = r.lo + (int32_t)(next() % (SPAN[i] + 1));
            double y = 255.0 - 254.0 * ((log((double)float_of((uint32_t)p)) - lo) / range), n = nearbyint(y);
            n = n < 1.0 ? 1.0 : n > 255.0 ? 255.0 : n;
            double near_tie = fabs(fabs(y - floor(y)) - 0.5);
            int stored = 255 - (int)qins_lut_count(&golden.lut, p);
            check(stored == (int)n || near_tie < 1e-12 / range, "stored", "core", i, (size_t)j);
        }
    }
    qins_range all = {0x322bcc78, 0x7f7fffff};
    qins_golden_tables_build(&golden, all);
    check(qins_lut_count(&golden.lut, 0x7f7fffff) == 254 && qins_lut_count(&golden.lut, 0) == 0, "ends", "core", 0, 0);
    qins_range none = {INT32_MAX, 0};
    qins_golden_tables_build(&golden, none);
    check(golden.constant && golden.log_min == -10.0f && golden.log_max == 0.0f, "nothing", "core", 0, 0);
}

/* -- matrices and their digests ------------------------------------------------------------------ */

typedef struct {
    const char *name;
    qins_codec codec;
    qins_dtype dtype;
    size_t rows, cols, group_size;
    float mu, spread; /* mu < 0: search; spread: rows differ by powers of it */
    int special;
} matrix_case;

static const matrix_case CASES[] = {
    {"golden", QINS_golden, QINS_F32, 37, 301, 0, 0, 1.0f, 0},
    {"golden-special", QINS_golden, QINS_F32, 5, 4099, 0, 0, 1.0f, 1},
    {"golden-f16", QINS_golden, QINS_F16, 16, 129, 0, 0, 1.0f, 0},
    {"log9", QINS_log9, QINS_F32, 37, 301, 0, 0, 1.0f, 0},
    {"log9-bf16", QINS_log9, QINS_BF16, 3, 5000, 0, 0, 1.0f, 0},
    {"log9-f64", QINS_log9, QINS_F64, 9, 77, 0, 0, 1.0f, 0},
    {"log8", QINS_log8, QINS_F32, 65, 576, 0, -1.0f, 1.0f, 0},
    {"log8-g128", QINS_log8, QINS_F32, 65, 576, 128, -1.0f, 1.0f, 0},
    {"log8-g64", QINS_log8, QINS_F32, 33, 1000, 64, -1.0f, 1.0f, 0},
    {"log8-g32", QINS_log8, QINS_F32, 33, 1000, 32, 2.5f, 1.0f, 0},
    {"log8-g1", QINS_log8, QINS_F32, 3, 50, 1, 2.5f, 1.0f, 0},
    {"log8-g5000", QINS_log8, QINS_F32, 3, 9001, 5000, -1.0f, 1.0f, 0},
    {"log8-linear", QINS_log8, QINS_F32, 4, 999, 0, 0.0f, 1.0f, 0},
    {"log8-spread", QINS_log8, QINS_F32, 40, 333, 0, -1.0f, 100.0f, 0},
    {"log8-spread-g64", QINS_log8, QINS_F32, 40, 333, 64, -1.0f, 100.0f, 0},
    {"log8-special", QINS_log8, QINS_F32, 7, 4500, 64, -1.0f, 1.0f, 1},
    {"log8-f16", QINS_log8, QINS_F16, 12, 640, 0, -1.0f, 1.0f, 0},
    {"log8-bf16-g64", QINS_log8, QINS_BF16, 12, 640, 64, -1.0f, 1.0f, 0},
    {"log8-one", QINS_log8, QINS_F32, 1, 1, 0, -1.0f, 1.0f, 0},
    {"rational", QINS_rational, QINS_F32, 37, 301, 0, 0, 1.0f, 0},
    {"rational-special", QINS_rational, QINS_F32, 5, 4099, 0, 0, 1.0f, 1},
    {"rational-spread", QINS_rational, QINS_BF16, 40, 333, 0, 0, 100.0f, 0},
    {"log6", QINS_log6, QINS_F32, 33, 1000, 32, -1.0f, 1.0f, 0},
    {"log6-spread-g64", QINS_log6, QINS_F32, 40, 328, 64, -1.0f, 100.0f, 0},
    {"log5", QINS_log5, QINS_F32, 65, 576, 32, -1.0f, 1.0f, 0},
    {"log5-f16-g192", QINS_log5, QINS_F16, 12, 648, 192, -1.0f, 1.0f, 0},
    {"log4", QINS_log4, QINS_F32, 33, 1000, 32, -1.0f, 1.0f, 0},
    {"log4-linear-g128", QINS_log4, QINS_BF16, 4, 1000, 128, 0.0f, 1.0f, 0},
    {"log4-special", QINS_log4, QINS_F32, 7, 4504, 64, -1.0f, 1.0f, 1},
};
enum { CASE_COUNT = sizeof CASES / sizeof *CASES, BIG = 1 << 16 };

static float source[BIG], decoded[BIG], decoded2[BIG];
static char typed[BIG * 8], narrow_out[BIG * 8];

static uint64_t fnv(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) {
        h = (h ^ p[i]) * 1099511628211u;
    }
    return h;
}

static void make_weights(const matrix_case *c, size_t seed)
{
    state = 88172645463325252u + 7919 * seed;
    for (size_t row = 0; row < c->rows; row++) {
        float factor = 1.0f;
        for (size_t i = 0; i < row % 19; i++) {
            factor *= row % 2 ? c->spread : 1.0f / c->spread;
        }
        for (size_t k = 0; k < c->cols; k++) {
            float w = c->special && k % 5 == 2 ? SPECIAL[next() % 16] : normal();
            source[row * c->cols + k] = row == 2 ? 0.0f : w * factor; /* one row of zeros */
        }
    }
    qins_kernels_scalar.narrow[c->dtype](source, c->rows * c->cols, typed);
}

static uint64_t run_case(const matrix_case *c, const qins_kernels *k, int threads, ptrdiff_t col_step)
{
    static const size_t SIZE[] = {4, 2, 2, 8};
    size_t n = c->rows * c->cols, size = SIZE[c->dtype];
    static char strided[BIG * 16];
    qins_matrix w = {typed, c->dtype, c->rows, c->cols, (ptrdiff_t)(c->cols * size), (ptrdiff_t)size};
    if (col_step != 1) { /* the same matrix, columns two apart and backwards */
        for (size_t i = 0; i < n; i++) {
            memcpy(strided + (n - 1 - i) * 2 * size, typed + i * size, size);
        }
        w.data = strided + (n - 1) * 2 * size;
        w.row_stride *= -2;
        w.col_stride *= -2;
    }
    size_t groups = c->group_size ? (c->cols + c->group_size - 1) / c->group_size : 0, bits = (c->cols + 7) / 8;
    uint8_t *u = malloc(n + 1), *sign_bits = malloc(c->rows * bits + 1), *group = malloc(c->rows * groups + 1);
    int8_t *sign = malloc(n + 1);
    float *scale = malloc(c->rows * 4 + 4);
    qins_codes e = {.codec = c->codec,
                    .rows = c->rows,
                    .cols = c->cols,
                    .codes = u,
                    .sign = sign,
                    .sign_bits = sign_bits,
                    .scale = scale,
                    .mu = c->mu,
                    .alpha = 1.0f,
                    .group_scale = group,
                    .group_size = c->group_size};
    uint64_t h = 14695981039346656037u;
    check(qins_encode(k, &w, NULL, threads, &e) == 0, "finite", k->name, 0, 0);
    h = fnv(h, u, c->rows * code_bytes(&e, c->cols));
    if (log_bits(c->codec) > 0) {
        h = fnv(fnv(fnv(h, scale, c->rows * 4), &e.mu, 4), group, c->rows * groups);
    } else if (c->codec == QINS_rational) {
        h = fnv(fnv(h, &e.z_min, 4), &e.z_max, 4);
    } else {
        h = fnv(fnv(h, &e.log_min, 4), &e.log_max, 4);
        h = c->codec == QINS_golden ? fnv(h, sign, n) : fnv(h, sign_bits, c->rows * bits);
    }
    qins_decode(k, &e, 0, c->rows, 0, c->cols, threads, QINS_F32, decoded, c->cols);
    h = fnv(h, decoded, n * 4);
    for (int t = 1; t < 4; t++) {
        qins_decode(k, &e, 0, c->rows, 0, c->cols, threads, (qins_dtype)t, narrow_out, c->cols);
        h = fnv(h, narrow_out, n * SIZE[t]);
    }
    if (c->rows > 2 && c->cols > 9) { /* an inner block */
        size_t rows = c->rows - 2, cols = c->cols - 7;
        qins_decode(k, &e, 1, rows, 5, cols, threads, QINS_F32, decoded2, cols);
        int same = 1;
        for (size_t r = 0; r < rows; r++) {
            same &= memcmp(decoded2 + r * cols, decoded + (r + 1) * c->cols + 5, cols * 4) == 0;
        }
        check(same, "block", c->name, 0, 0);
    }
    free(u), free(sign_bits), free(group), free(sign), free(scale);
    return h;
}

static void digests(const char *path, int write)
{
    FILE *f = fopen(path, write ? "w" : "r");
    if (f == NULL) {
        perror(path);
        exit(2);
    }
    for (size_t i = 0; i < CASE_COUNT; i++) {
        const matrix_case *c = &CASES[i];
        make_weights(c, i);
        char name[64];
        unsigned long long expected = 0;
        if (write) {
            fprintf(f, "%s %016llx\n", c->name, (unsigned long long)run_case(c, &qins_kernels_scalar, 1, 1));
            continue;
        }
        check(fscanf(f, "%63s %llx", name, &expected) == 2 && strcmp(name, c->name) == 0, "digest file", c->name, i, 0);
        for (size_t j = 0; j < qins_isa_count(); j++) {
            const qins_kernels *k = qins_isa_at(j);
            for (int threads = 1; threads <= 7; threads += 3) {
                check(run_case(c, k, threads, 1) == expected, c->name, k->name, (size_t)threads, 1);
            }
            check(run_case(c, k, 2, -2) == expected, c->name, k->name, 2, 2);
        }
    }
    fclose(f);
}

static void nonfinite(void)
{
    enum { ROWS = 37, COLS = 296 }; /* columns that every codec can have */
    make_weights(&CASES[0], 0);
    qins_matrix w = {source, QINS_F32, ROWS, COLS, COLS * 4, 4};
    for (int codec = 0; codec < QINS_CODEC_COUNT; codec++) {
        static const float BAD[] = {NAN, INFINITY, -INFINITY};
        for (int b = 0; b < 3; b++) {
            source[777] = source[9999] = BAD[b];
            static uint8_t u[BIG], v[BIG], g[BIG];
            static float scale[BIG];
            qins_codes e = {.codec = (qins_codec)codec,
                            .rows = ROWS,
                            .cols = COLS,
                            .codes = u,
                            .mu = -1.0f,
                            .alpha = 1.0f,
                            .sign = (int8_t *)v,
                            .sign_bits = v,
                            .scale = scale,
                            .group_scale = g,
                            .group_size = 64};
            for (size_t j = 0; j < qins_isa_count(); j++) {
                check(qins_encode(qins_isa_at(j), &w, NULL, 2, &e) == 1, "not finite", qins_isa_at(j)->name, (size_t)b,
                      0);
                qins_nonfinite found = qins_find_nonfinite(qins_isa_at(j), &w);
                check(found.count == 2 && found.first == 777, "found", qins_isa_at(j)->name, (size_t)b, 0);
            }
            source[777] = source[9999] = 0.0f;
        }
    }
}

/* -- threads -------------------------------------------------------------------------------------- */

static void mark(void *context, size_t begin, size_t end)
{
    unsigned char *seen = context;
    for (size_t i = begin; i < end; i++) {
        seen[i]++;
    }
}

static int covers(size_t items, size_t grain, int threads)
{
    static unsigned char seen[10000];
    memset(seen, 0, sizeof seen);
    qins_parallel(items, grain, threads, mark, seen);
    for (size_t i = 0; i < sizeof seen; i++) {
        if (seen[i] != (i < items)) {
            return 0;
        }
    }
    return 1;
}

static void serial_fork_join(void (*fn)(void *), void *data, unsigned threads, unsigned flags)
{
    (void)flags;
    for (unsigned i = 0; i < threads; i++) {
        fn(data);
    }
}

/* Stops at the third poll, after calls of its own. */
static int third(void *context)
{
    int *polls = context;
    check(!qins_stopped() && covers(777, 1, 3), "calls in a poll", "core", (size_t)*polls, 0);
    return ++*polls == 3;
}

static void wait_and_count(void *context, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; i++) {
        const struct timespec pause = {0, 5000000};
        nanosleep(&pause, NULL);
        atomic_fetch_add((atomic_size_t *)context, 1);
    }
}

/* An item takes longer than a piece should, which cannot become less than one item. */
static void wait_longer_and_count(void *context, size_t begin, size_t end)
{
    const struct timespec pause = {0, 45000000};
    nanosleep(&pause, NULL);
    atomic_fetch_add((atomic_size_t *)context, end - begin);
}

static void polling(int threads)
{
    enum { PAUSES = 5000, SLOW = 4 };
    int polls = 0;
    atomic_size_t done;
    atomic_init(&done, 0);
    qins_set_poll(third, &polls);
    qins_parallel(PAUSES, 1, threads, wait_and_count, &done);
    check(polls == 3 && qins_stopped(), "stopped", "core", (size_t)polls, (size_t)threads);
    const size_t before = atomic_load(&done);
    check(before > 0 && before < PAUSES, "left out", "core", before, (size_t)threads);
    qins_parallel(PAUSES, 1, threads, wait_and_count, &done);
    check(atomic_load(&done) == before, "later calls", "core", before, (size_t)threads);
    polls = 10; /* never stops */
    qins_set_poll(third, &polls);
    for (size_t items = 0; items < 9999; items += 333) {
        check(covers(items, 1 + items % 5, threads), "pieces", "core", items, (size_t)threads);
    }
    polls = -100; /* stops what never ends */
    atomic_store(&done, 0);
    qins_parallel(SLOW, 1, threads, wait_longer_and_count, &done);
    check(atomic_load(&done) == SLOW, "slow items", "core", atomic_load(&done), (size_t)threads);
    qins_set_poll(NULL, NULL);
    check(!qins_stopped() && covers(1000, 1, threads), "after polling", "core", (size_t)threads, 0);
}

static void after_fork(void)
{
#if defined(_WIN32)
    printf("NOT RUN fork: Windows has none\n");
#else
    pid_t child = fork(); /* the pool's threads are gone in the child */
    if (child == 0) {
        _exit(covers(1000, 1, 4) && covers(5000, 1, 4) ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "after fork", "core", 0, 0);
#endif
}

static void parallel(int with_fork)
{
    static const size_t ITEMS[] = {0, 1, 2, 3, 7, 100, 9999};
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < 7; i++) {
            check(covers(ITEMS[i], 1 + (size_t)round % 5, 1 + round % 9), "parallel", "core", ITEMS[i], (size_t)round);
        }
    }
    if (with_fork) {
        after_fork();
    } else {
        printf("NOT RUN fork: --no-fork\n");
    }
    for (int threads = 1; threads <= 3; threads++) {
        polling(threads);
    }
    qins_set_fork_join(serial_fork_join);
    check(covers(1234, 1, 4), "fork-join", "core", 0, 0);
    polling(3);
    qins_set_fork_join(NULL);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: test_core DIGESTS [--write | --no-fork | --brief | --best]\n");
        return 2;
    }
    if (argc > 2 && strcmp(argv[2], "--write") == 0) {
        digests(argv[1], 1);
        return 0;
    }
    /* best: brief, and the best instruction set alone, for emulated processors whose sets all run here natively, too */
    const int best = argc > 2 && strcmp(argv[2], "--best") == 0;
    const int all_brief = best || (argc > 2 && strcmp(argv[2], "--brief") == 0), slow = argc > 2 || SANITIZED;
    features();
    factors();
    tables();
    for (size_t i = 0; i < MOST; i++) {
        weights[i] = sample_weight(i);
        codes[i] = (uint8_t)(i < 512 ? i : next()); /* every code, under either sign */
        more[i] = (uint8_t)next();
        weights_small[i] = normal();
        importances[i] = (float)uniform();
    }
    qins_range range = qins_kernels_scalar.range_golden(weights, MOST, (qins_range){INT32_MAX, 0});
    qins_golden_tables_build(&golden, range);
    qins_log8_tables_build(&log8, 2.5f, 8);
    for (int i = 0; i < 3; i++) {
        qins_log8_tables_build(&packed_tables[i], 2.5f, 6 - i);
    }
    in_f = guard((MOST + QINS_BLOCK) * 4 * QINS_BATCH), in_u = guard(MOST * 8), in_v = guard(MOST * 8);
    out_a = guard(MOST * 8), out_b = guard(MOST * 8), out_c = guard(MOST * 8), out_d = guard(MOST * 8);
    for (size_t i = 0; i < (best ? 1 : qins_isa_count()); i++) {
        const qins_kernels *k = qins_isa_at(i);
        const int brief = all_brief || (argc > 2 && i > 0); /* emulated: in full, the best set alone */
        for (size_t n = 0; n <= 100; n += brief ? 9 : 1) {
            kernels_at(k, n, 0);
            kernels_at(k, n, 1);
        }
        static const size_t LENGTH[] = {127, 128, 129, 255, 256, 257, 4095, 4096, 4097};
        for (size_t j = 0; j < sizeof LENGTH / sizeof *LENGTH; j += brief ? 4 : 1) {
            kernels_at(k, LENGTH[j], (int)j % 2);
        }
        kernels_misaligned(k);
        conversions(k);
        for (int bits = 4; bits <= 8; bits += bits == 6 ? 2 : 1) {
            levels_beside_thresholds(k, 0.0f, bits);
            levels_beside_thresholds(k, 0.5f, bits);
            levels_beside_thresholds(k, 32.0f, bits);
        }
        for (size_t n = 0; n <= 70; n += brief ? 23 : n < 20 ? 1 : 5) {
            for (int at_end = 0; at_end < 2; at_end++) {
                feedback_at(k, n, at_end, &log8);
                feedback_at(k, n, at_end, &packed_tables[1]); /* packed codecs differ only in their tables */
            }
        }
        unpacking(k);
        dots(k, brief);
        packed_dots(k);
        between_products(k);
        attention(k);
        check_decoder(k, slow, check);
        check_exact(k, brief ? 1 : slow ? 6 : 60, check);
        products(k, slow, brief ? 6 : 1);
        outliers(k);
        sets(k);
        static const size_t DIMS[] = {8, 24, 64, 80, 128, 832, 840}; /* the last two need several windows */
        packed_values(k);
        for (size_t j = 0; j < sizeof DIMS / sizeof *DIMS; j++) {
            cache_rows(k, QINS_log8, DIMS[j]);
            cache_rows(k, QINS_golden, DIMS[j]);
            cache_rows(k, QINS_log6, DIMS[j]);
            cache_rows(k, QINS_log5, DIMS[j]);
            cache_rows(k, QINS_log4, DIMS[j]);
        }
        printf("ran %s\n", k->name);
    }
#define X(name, guard, features)                                        \
    if (qins_isa_find(#name) == NULL) {                                 \
        printf("NOT RUN %s: this processor does not have it\n", #name); \
    }
#include "isas.def"
#undef X
    packing();
    if (!best) {
        digests(argv[1], 0);
    }
    nonfinite();
    parallel(argc < 3);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
