/* Encoding of whole matrices to log8, log6, log5 or log4: the search for mu, and the scales of rows and groups. */
#include <float.h>
#include <stdlib.h>

#include "encode.h"
#include "packed.h"

/* Candidate scales of a row, in percent of its largest magnitude: clipping a few large weights slightly makes every
 * other level finer. COARSE ones come first, then those NEAR the best of them. */
static const int COARSE[] = {100, 96, 92, 88}, NEAR[] = {2, 1, -1, -2};
enum { SCALES = 4 };

/* Candidate multipliers of a group: LESS below and MORE above the smallest one that covers its largest magnitude. Each
 * places the levels differently among the group's weights, and the best of several has up to 10 % less squared error.
 * The search for mu compares sums over many groups, for which fewer candidates suffice. */
enum { LESS = 2, MORE = 9, MORE_IF_FEW = 0 };

/* The multiplier that stands for a row's largest magnitude. Those above it are the candidates of the largest groups. */
enum { FULL = 240 };

/* Rows with other scales are not searched: reciprocals or squares would leave float32's normal range. */
static int searchable(float scale) { return scale > 7.9e-31f && scale < 1.2e30f; }

/* Squared error of elements [k, k + n) of a row under each candidate scale, and of packed codes, each negated one. */
static void span_errors(qins_reader *r, const qins_encoding *e, size_t row, size_t k, size_t n, const float *scale,
                        int candidates, double *error)
{
    const int count = candidates * (is_packed(e->e->codec) ? 2 : 1);
    float inverse[QINS_CANDIDATES], part_error[2 * QINS_CANDIDATES];
    for (int c = 0; c < candidates; c++) {
        inverse[c] = 1.0f / scale[c];
    }
    for (int c = 0; c < count; c++) {
        error[c] = 0.0;
    }
    for (size_t part; n > 0; k += part, n -= part) {
        part = n;
        const float *w = qins_read_row(r, row, k, &part);
        r->kernels->errors_log8(w, e->importance != NULL ? e->importance + k : NULL, part, inverse, candidates,
                                e->tables.log8, part_error);
        for (int c = 0; c < count; c++) {
            error[c] += (double)part_error[c];
        }
    }
    for (int c = 0; c < count; c++) {
        error[c] *= (double)scale[c % candidates] * (double)scale[c % candidates];
    }
}

static int smallest(const double *error, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        best = error[i] < error[best] ? i : best;
    }
    return best;
}

static int best_percent(qins_reader *r, const qins_encoding *e, size_t row, size_t n, float most, const int *percent,
                        double *least)
{
    float scale[SCALES];
    double error[2 * SCALES];
    for (int i = 0; i < SCALES; i++) {
        scale[i] = most * ((float)percent[i] * 0.01f);
    }
    span_errors(r, e, row, 0, n, scale, SCALES, error);
    int best = smallest(error, SCALES);
    *least = error[best];
    return percent[best];
}

/* The scale of a row of n elements whose largest magnitude is `most`; adds its squared error to *total. */
static float row_scale(qins_reader *r, const qins_encoding *e, size_t row, size_t n, float most, double *total)
{
    if (!searchable(most)) {
        return most;
    }
    double error, near_error;
    int near[SCALES], percent = best_percent(r, e, row, n, most, COARSE, &error);
    for (int i = 0; i < SCALES; i++) {
        near[i] = percent + NEAR[i] < 100 ? percent + NEAR[i] : 100;
    }
    int near_percent = best_percent(r, e, row, n, most, near, &near_error);
    if (near_error < error) {
        percent = near_percent;
        error = near_error;
    }
    *total += error;
    return most * ((float)percent * 0.01f);
}

/* multiplier: in 256ths */
static float group_scale(float scale, int multiplier) { return scale * ((float)multiplier / 256.0f); }

/* The scale of a row in groups whose largest magnitude is `most`: the smallest one of which FULL is not less. */
float qins_grouped_scale(float most)
{
    if (!searchable(most)) {
        return most;
    }
    float scale = most * (256.0f / (float)FULL);
    while (group_scale(scale, FULL) < most) {
        scale = from_bits32(bits32(scale) + 1);
    }
    return scale;
}

/* The smallest multiplier, in 256ths and a multiple of `unit`, that covers a group's largest magnitude `most` */
static int covering_multiplier(float most, float scale, int unit)
{
    int cover = (int)(most / scale * 256.0f) / unit * unit;
    cover = cover < unit ? unit : cover > 256 ? 256 : cover;
    while (cover < 256 && group_scale(scale, cover) < most) {
        cover += unit;
    }
    while (cover > unit && group_scale(scale, cover - unit) >= most) {
        cover -= unit;
    }
    return cover;
}

/* Lists candidate multipliers of log8: `cover`, up to LESS below it and `more` above it, in order of preference. */
static int log8_multipliers(int cover, int more, int *multiplier)
{
    int count = 0;
    for (int i = cover; i >= 1 && i >= cover - LESS; i--) {
        multiplier[count++] = i;
    }
    for (int i = cover + 1; i <= 256 && i <= cover + more; i++) {
        multiplier[count++] = i;
    }
    return count;
}

/* Candidate multipliers of packed codes, in percent of the one that covers the group's largest magnitude: PERCENT with
 * each sign, then steps of NEARER from the best of those. An exhaustive search gains 0.02 to 0.09 dB more. */
static const int PERCENT[] = {100, 95, 90, 105, 97, 92, 87, 82, 102, 107, 85, 110}, NEARER[] = {-2, -1, 1, 2};
enum { PERCENTS = 12, PERCENTS_IF_FEW = 4, NEARERS = 4 };

static void packed_multipliers(int cover, int around, const int *percent, int count, int *multiplier)
{
    for (int i = 0; i < count; i++) {
        const int half = percent[i] < 0 ? -50 : 50; /* division rounds toward zero */
        const int m = around + (cover * percent[i] / 2 + half) / 100 * 2;
        multiplier[i] = m < 2 ? 2 : m > 256 ? 256 : m;
    }
}

/* Signs of candidate multipliers; only packed codes have negative ones. */
enum { PLUS = 1, MINUS = 2 };

/* Compares candidates. If one has less error than *least_error, it replaces *best. Of equal errors, the first wins. */
static void compare_multipliers(qins_reader *r, const qins_encoding *e, size_t row, size_t k, size_t n, float scale,
                                const int *multiplier, int count, int signs, int *best, double *least_error)
{
    float candidate[QINS_CANDIDATES] = {0}; /* for gcc 11, which warns of what a count of 0 would leave */
    double error[2 * QINS_CANDIDATES];
    for (int i = 0; i < count; i++) {
        candidate[i] = group_scale(scale, multiplier[i]);
    }
    span_errors(r, e, row, k, n, candidate, count, error);
    for (int sign = PLUS; sign <= MINUS; sign++) {
        if ((signs & sign) == 0) {
            continue;
        }
        const double *of_sign = error + (sign == MINUS ? count : 0);
        const int found = smallest(of_sign, count);
        if (of_sign[found] < *least_error) {
            *least_error = of_sign[found];
            *best = sign == MINUS ? -multiplier[found] : multiplier[found];
        }
    }
}

/* The multiplier with the smallest squared error of a group, among candidates around the one that covers its largest
 * magnitude: few in the search for mu, and in KV caches, which are encoded while a model runs. */
static int best_multiplier(qins_reader *r, const qins_encoding *e, size_t row, size_t k, size_t n, float scale, int few,
                           double *total)
{
    const int packed = is_packed(e->e->codec);
    float most = from_bits32(qins_absmax(r, row, k, n));
    if (most == 0.0f) {
        return 1 + packed;
    }
    const int cover = covering_multiplier(most, scale, 1 + packed);
    if (!searchable(scale)) {
        return cover;
    }
    int multiplier[QINS_CANDIDATES], best = cover;
    double least_error = DBL_MAX;
    if (!packed) {
        const int count = log8_multipliers(cover, few ? MORE_IF_FEW : MORE, multiplier);
        compare_multipliers(r, e, row, k, n, scale, multiplier, count, PLUS, &best, &least_error);
        *total += least_error;
        return best;
    }
    const int percents = few ? PERCENTS_IF_FEW : PERCENTS;
    packed_multipliers(cover, 0, PERCENT, percents, multiplier);
    compare_multipliers(r, e, row, k, n, scale, multiplier, percents, PLUS | MINUS, &best, &least_error);
    if (!few) {
        const int sign = best < 0 ? MINUS : PLUS;
        packed_multipliers(cover, abs(best), NEARER, NEARERS, multiplier);
        compare_multipliers(r, e, row, k, n, scale, multiplier, NEARERS, sign, &best, &least_error);
    }
    *total += least_error;
    return best;
}

/* How a multiplier in 256ths is stored */
static uint8_t stored_multiplier(int multiplier, int packed)
{
    return (uint8_t)(packed ? (abs(multiplier) / 2 - 1) | (multiplier < 0 ? 0x80 : 0) : multiplier - 1);
}

static void row_codes(qins_reader *r, size_t row, size_t k, size_t n, float scale, const qins_log8_tables *t,
                      uint8_t *codes)
{
    for (size_t part; n > 0; k += part, n -= part, codes += part) {
        part = n;
        const float *w = qins_read_row(r, row, k, &part);
        r->kernels->encode_log8(w, part, scale, t, codes);
    }
}

/* Rounds a row whose group scales are known, a window at a time. */
static void grouped_codes(qins_reader *r, const qins_encoding *c, size_t row, float scale)
{
    const qins_codes *e = c->e;
    const uint8_t *group = group_row(e, row);
    const size_t cols = e->cols;
    const int packed = is_packed(e->codec);
    uint8_t unpacked[QINS_WINDOW], *out = e->codes + row * code_bytes(e, cols);
    for (size_t begin = 0, n; begin < cols; begin += n) {
        n = least(cols - begin, QINS_WINDOW);
        uint8_t *codes = packed ? unpacked : out + begin;
        for (size_t k = begin, part; k < begin + n; k += part) {
            const size_t g = k / e->group_size;
            part = least((g + 1) * e->group_size - k, begin + n - k);
            const float s = scale * group_multiplier(log_bits(e->codec), group[g]), magnitude = s < 0.0f ? -s : s;
            row_codes(r, row, k, part, magnitude, c->tables.log8, codes + (k - begin));
            for (size_t i = k - begin; s < 0.0f && i < k - begin + part; i++) {
                codes[i] ^= 0x80; /* signs are relative to the scale's */
            }
        }
        if (packed) {
            qins_pack(unpacked, n, log_bits(e->codec), out + code_bytes(e, begin));
        }
    }
}

/* Group scales and codes of a row whose scale is known */
static void encode_groups(qins_reader *r, const qins_encoding *c, size_t row, int few)
{
    const qins_codes *e = c->e;
    const int packed = is_packed(e->codec);
    const float scale = float_at(e->scale, row);
    double ignored = 0.0;
    uint8_t *group = e->group_scale + row * ceil_div(e->cols, e->group_size);
    for (size_t k = 0, g = 0; k < e->cols; k += e->group_size, g++) {
        const size_t n = least(e->cols - k, e->group_size);
        const int multiplier = scale > 0.0f ? best_multiplier(r, c, row, k, n, scale, few, &ignored) : 1 + packed;
        group[g] = stored_multiplier(multiplier, packed);
    }
    grouped_codes(r, c, row, scale);
}

void qins_encode_groups(const qins_kernels *kernels, const float *w, const qins_log8_tables *t, qins_codes *e)
{
    const qins_matrix one = {w, QINS_F32, 1, e->cols, 0, sizeof *w};
    const qins_encoding c = {.kernels = kernels, .w = &one, .e = e, .tables.log8 = t};
    qins_reader r;
    qins_reader_init(&r, kernels, &one);
    encode_groups(&r, &c, 0, 1);
}

static void log8_rows(void *context, size_t begin, size_t end)
{
    qins_encoding *c = context;
    qins_codes *e = c->e;
    size_t cols = c->w->cols;
    double ignored = 0.0;
    qins_reader r;
    qins_reader_init(&r, c->kernels, c->w);
    for (size_t row = begin; row < end; row++) {
        int32_t most = qins_absmax(&r, row, 0, cols);
        if (most >= QINS_INFINITY_BITS) {
            atomic_raise(&c->hi, most);
            return;
        }
        float scale = from_bits32(most);
        if (e->group_size == 0) {
            e->scale[row] = scale = row_scale(&r, c, row, cols, scale, &ignored);
            row_codes(&r, row, 0, cols, scale, c->tables.log8, e->codes + row * cols);
            continue;
        }
        e->scale[row] = qins_grouped_scale(scale);
        encode_groups(&r, c, row, 0);
    }
}

/* The search for mu uses a sample: rows, or the beginnings of long ones, spread over the matrix. */
enum { SAMPLE_WEIGHTS = 1 << 17, SAMPLE_COLS = 8192, SAMPLE_ROWS = 1024, SAMPLE_ROWS_MIN = 16 };

typedef struct {
    qins_encoding *c;
    size_t rows, cols;
    double error[SAMPLE_ROWS];
} sample;

static void sample_rows(void *context, size_t begin, size_t end)
{
    sample *s = context;
    const qins_encoding *c = s->c;
    size_t group_size = c->e->group_size;
    qins_reader r;
    qins_reader_init(&r, c->kernels, c->w);
    for (size_t i = begin; i < end; i++) {
        /* i * rows / s->rows without overflow */
        size_t row = c->w->rows / s->rows * i + c->w->rows % s->rows * i / s->rows;
        int32_t most = qins_absmax(&r, row, 0, s->cols);
        float scale = from_bits32(most);
        s->error[i] = 0.0;
        if (most == 0 || most >= QINS_INFINITY_BITS) {
            continue; /* log8_rows reports non-finite weights */
        }
        if (group_size == 0) {
            (void)row_scale(&r, c, row, s->cols, scale, &s->error[i]);
            continue;
        }
        scale = qins_grouped_scale(scale);
        for (size_t k = 0; k < s->cols; k += group_size) {
            size_t n = s->cols - k < group_size ? s->cols - k : group_size;
            (void)best_multiplier(&r, c, row, k, n, scale, 1, &s->error[i]);
        }
    }
}

/* mu = 2^(i/8 - 1), i in 0..MU_STEPS: 0.5 to 32. The error has one minimum over log mu, apart from noise
 * far below the effect of a step of an eighth of an octave. */
enum { MU_STEPS = 48 };

static float mu_at(int i)
{
    static const double eighth[8] = {1.0,
                                     1.0905077326652577,
                                     1.189207115002721,
                                     1.2968395546510096,
                                     1.4142135623730951,
                                     1.5422108254079407,
                                     1.681792830507429,
                                     1.8340080864093424};
    return (float)(eighth[i % 8] * (double)(1 << (i / 8)) * 0.5);
}

static double mu_error(sample *s, int i, int threads, qins_log8_tables *t)
{
    qins_log8_tables_build(t, mu_at(i), log_bits(s->c->e->codec));
    s->c->tables.log8 = t;
    qins_parallel(s->rows, items_per_grain(s->cols), threads, sample_rows, s);
    double total = 0.0;
    for (size_t row = 0; row < s->rows; row++) { /* in a fixed order, whatever the threads did */
        total += s->error[row];
    }
    return total;
}

static float search_mu(qins_encoding *c, int threads, qins_log8_tables *t)
{
    sample s = {.c = c};
    s.cols = c->w->cols < SAMPLE_COLS ? c->w->cols : SAMPLE_COLS;
    s.rows = s.cols > 0 ? SAMPLE_WEIGHTS / s.cols : 0;
    s.rows = s.rows < SAMPLE_ROWS_MIN ? SAMPLE_ROWS_MIN : s.rows > SAMPLE_ROWS ? SAMPLE_ROWS : s.rows;
    s.rows = s.rows < c->w->rows ? s.rows : c->w->rows;
    int best = 16; /* mu = 2 */
    double least = mu_error(&s, best, threads, t);
    if (least == 0.0) { /* no error to minimize */
        return mu_at(best);
    }
    for (int step = 8; step >= 1; step /= 2) {
        const int before = best;
        for (int direction = -1; direction <= 1 && best == before; direction += 2) { /* `before` is worse than best */
            for (int moved = 1; moved;) { /* continue while the error falls */
                int i = best + direction * step;
                moved = 0;
                if (i >= 0 && i <= MU_STEPS) {
                    double error = mu_error(&s, i, threads, t);
                    if (error < least) {
                        least = error;
                        best = i;
                        moved = 1;
                    }
                }
            }
        }
    }
    return mu_at(best);
}

int qins_encode_log8(qins_encoding *c, int threads)
{
    qins_log8_tables t;
    if (c->e->mu < 0.0f) {
        c->e->mu = search_mu(c, threads, &t);
    }
    qins_log8_tables_build(&t, c->e->mu, log_bits(c->e->codec));
    c->tables.log8 = &t;
    qins_parallel(c->w->rows, items_per_grain(c->w->cols), threads, log8_rows, c);
    return atomic_load(&c->hi) >= QINS_INFINITY_BITS;
}
