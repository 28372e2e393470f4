/* Whole matrices: windows, scales, the search for mu, and how rows are shared among threads. */
#include <stdatomic.h>
#include <string.h>

#include "sizes.h"

/* A part handed to a thread has at least this many elements: about 20 microseconds of work. */
enum { GRAIN = 32768 };

static const int32_t INFINITY_BITS = 0x7f800000;

/* -- reading any matrix as float32 ------------------------------------------------------------ */

typedef struct {
    const qins_kernels *kernels;
    const qins_matrix *w;
    size_t row, start, end; /* what the window holds */
    float window[QINS_WINDOW];
} reader;

static void reader_init(reader *r, const qins_kernels *kernels, const qins_matrix *w)
{
    r->kernels = kernels;
    r->w = w;
    r->row = r->start = r->end = 0;
}

static void fill_window(reader *r, size_t row, size_t k)
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

/* Elements [k, k + *n) of a row; *n is cut to QINS_WINDOW. Float32 rows are not copied. */
static const float *read_row(reader *r, size_t row, size_t k, size_t *n)
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

static int32_t absmax(reader *r, size_t row, size_t k, size_t n)
{
    int32_t best = 0;
    for (size_t part; n > 0; k += part, n -= part) {
        part = n;
        const float *w = read_row(r, row, k, &part);
        int32_t m = r->kernels->absmax(w, part);
        best = m > best ? m : best;
    }
    return best;
}

qins_nonfinite qins_find_nonfinite(const qins_kernels *kernels, const qins_matrix *w)
{
    qins_nonfinite found = {0, 0};
    reader r;
    reader_init(&r, kernels, w);
    for (size_t row = 0; row < w->rows; row++) {
        for (size_t k = 0, n; k < w->cols; k += n) {
            n = w->cols - k;
            const float *p = read_row(&r, row, k, &n);
            if (kernels->absmax(p, n) < INFINITY_BITS) {
                continue;
            }
            for (size_t i = 0; i < n; i++) {
                if ((bits32(float_at(p, i)) & INT32_MAX) >= INFINITY_BITS && found.count++ == 0) {
                    found.first = row * w->cols + k + i;
                }
            }
        }
    }
    return found;
}

/* -- work items: (row, window of columns) ----------------------------------------------------- */

typedef struct {
    const qins_kernels *kernels;
    const qins_matrix *w;
    qins_codes *e;
    const float *importance; /* log8: of each column, or NULL */
    size_t windows;          /* in a row */
    union {
        const qins_golden_tables *golden;
        const qins_log8_tables *log8;
    } tables;
    atomic_int_least32_t lo, hi; /* golden: the range; hi also tells non-finite weights */
} encoding;

static size_t items_per_grain(size_t cols) { return ceil_div(GRAIN, cols < 1 ? 1 : cols); }

/* Splits an item number into a row and its columns [*k, *k + returned). */
static size_t item_columns(size_t item, size_t windows, size_t cols, size_t *row, size_t *k)
{
    *row = item / windows;
    *k = item % windows * QINS_WINDOW;
    return cols - *k < QINS_WINDOW ? cols - *k : QINS_WINDOW;
}

static void atomic_raise(atomic_int_least32_t *a, int32_t x)
{
    int_least32_t seen = atomic_load(a);
    while (seen < x && !atomic_compare_exchange_weak(a, &seen, x)) {
    }
}

static void atomic_lower(atomic_int_least32_t *a, int32_t x)
{
    int_least32_t seen = atomic_load(a);
    while (seen > x && !atomic_compare_exchange_weak(a, &seen, x)) {
    }
}

/* -- golden and log9 -------------------------------------------------------------------------- */

static void range_items(void *context, size_t begin, size_t end)
{
    encoding *c = context;
    reader r;
    reader_init(&r, c->kernels, c->w);
    qins_range range = {INT32_MAX, 0};
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, c->w->cols, &row, &k);
        const float *w = read_row(&r, row, k, &n);
        range = c->e->codec == QINS_rational ? c->kernels->range_rational(w, n, range)
                                             : c->kernels->range_golden(w, n, range);
    }
    atomic_lower(&c->lo, range.lo);
    atomic_raise(&c->hi, range.hi);
}

static void golden_items(void *context, size_t begin, size_t end)
{
    encoding *c = context;
    const qins_golden_tables *t = c->tables.golden;
    reader r;
    reader_init(&r, c->kernels, c->w);
    size_t cols = c->w->cols;
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, cols, &row, &k);
        const float *w = read_row(&r, row, k, &n);
        uint8_t *stored = c->e->codes + row * cols + k;
        if (c->e->codec == QINS_golden) {
            c->kernels->encode_golden(w, n, t, stored, c->e->sign + row * cols + k);
        } else {
            c->kernels->encode_log9(w, n, t, stored, c->e->sign_bits + row * ceil_div(cols, 8) + k / 8);
        }
    }
}

static int encode_golden(encoding *c, int threads)
{
    size_t cols = c->w->cols, items = c->w->rows * c->windows;
    size_t grain = items_per_grain(cols < QINS_WINDOW ? cols : QINS_WINDOW);
    qins_parallel(items, grain, threads, range_items, c);
    qins_range range = {atomic_load(&c->lo), atomic_load(&c->hi)};
    if (range.hi >= INFINITY_BITS) {
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
    encoding *c = context;
    reader r;
    reader_init(&r, c->kernels, c->w);
    for (size_t item = begin, row, k; item < end; item++) {
        size_t n = item_columns(item, c->windows, c->w->cols, &row, &k);
        const float *w = read_row(&r, row, k, &n);
        c->kernels->encode_log8(w, n, 1.0f, c->tables.log8, c->e->codes + row * c->w->cols + k);
    }
}

static float projected(float alpha, int32_t magnitude)
{
    float z = (float)(1.0 / (1.0 + (double)alpha * (double)from_bits32(magnitude)));
    return z > FLT_MIN ? z : FLT_MIN; /* not 0, which would decode to infinity */
}

static int encode_rational(encoding *c, int threads)
{
    size_t cols = c->w->cols, items = c->w->rows * c->windows;
    size_t grain = items_per_grain(cols < QINS_WINDOW ? cols : QINS_WINDOW);
    qins_parallel(items, grain, threads, range_items, c);
    int32_t lo = atomic_load(&c->lo), hi = atomic_load(&c->hi);
    if (hi >= INFINITY_BITS) {
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
    qins_parallel(n, GRAIN, threads, project_part, &p);
}

/* -- log8 ------------------------------------------------------------------------------------- */

/* Scales that a row tries, in hundredths of its largest magnitude: clipping a few large weights a
 * little makes every other level finer. First COARSE, then NEAR the best of those. */
static const int COARSE[] = {100, 96, 92, 88}, NEAR[] = {2, 1, -1, -2};
enum { SCALES = 4, MULTIPLIERS = 3 };

/* Outside, reciprocals or squares would leave float32's normal range; such rows are not searched. */
static int searchable(float scale) { return scale > 7.9e-31f && scale < 1.2e30f; }

/* Squared error of elements [k, k + n) of a row under each candidate scale. */
static void span_errors(reader *r, const encoding *e, size_t row, size_t k, size_t n, const float *scale,
                        int candidates, double *error)
{
    float inverse[QINS_CANDIDATES], part_error[QINS_CANDIDATES];
    for (int c = 0; c < candidates; c++) {
        inverse[c] = 1.0f / scale[c];
        error[c] = 0.0;
    }
    for (size_t part; n > 0; k += part, n -= part) {
        part = n;
        const float *w = read_row(r, row, k, &part);
        r->kernels->errors_log8(w, e->importance != NULL ? e->importance + k : NULL, part, inverse, candidates,
                                e->tables.log8, part_error);
        for (int c = 0; c < candidates; c++) {
            error[c] += (double)part_error[c];
        }
    }
    for (int c = 0; c < candidates; c++) {
        error[c] *= (double)scale[c] * (double)scale[c];
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

static int best_percent(reader *r, const encoding *e, size_t row, size_t n, float most, const int *percent,
                        double *least)
{
    float scale[SCALES];
    double error[SCALES];
    for (int i = 0; i < SCALES; i++) {
        scale[i] = most * ((float)percent[i] * 0.01f);
    }
    span_errors(r, e, row, 0, n, scale, SCALES, error);
    int best = smallest(error, SCALES);
    *least = error[best];
    return percent[best];
}

/* The scale of a row of n elements whose largest magnitude is `most`; adds its squared error. */
static float row_scale(reader *r, const encoding *e, size_t row, size_t n, float most, double *total)
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

static float group_scale(float scale, int multiplier) { return scale * ((float)multiplier / 256.0f); }

/* The multiplier 1..256 of a group: the least that covers its largest magnitude, or one or two less. */
static int group_multiplier(reader *r, const encoding *e, size_t row, size_t k, size_t n, float scale, double *total)
{
    float most = from_bits32(absmax(r, row, k, n));
    if (most == 0.0f) {
        return 1;
    }
    int cover = (int)(most / scale * 256.0f);
    cover = cover < 1 ? 1 : cover > 256 ? 256 : cover;
    while (cover < 256 && group_scale(scale, cover) < most) {
        cover++;
    }
    while (cover > 1 && group_scale(scale, cover - 1) >= most) {
        cover--;
    }
    if (!searchable(scale)) {
        return cover;
    }
    float candidate[MULTIPLIERS];
    double error[MULTIPLIERS];
    int candidates = cover < MULTIPLIERS ? cover : MULTIPLIERS;
    for (int i = 0; i < candidates; i++) {
        candidate[i] = group_scale(scale, cover - i);
    }
    span_errors(r, e, row, k, n, candidate, candidates, error);
    int best = smallest(error, candidates);
    *total += error[best];
    return cover - best;
}

static void row_codes(reader *r, size_t row, size_t k, size_t n, float scale, const qins_log8_tables *t, uint8_t *codes)
{
    for (size_t part; n > 0; k += part, n -= part, codes += part) {
        part = n;
        const float *w = read_row(r, row, k, &part);
        r->kernels->encode_log8(w, part, scale, t, codes);
    }
}

static void log8_rows(void *context, size_t begin, size_t end)
{
    encoding *c = context;
    qins_codes *e = c->e;
    const qins_log8_tables *t = c->tables.log8;
    size_t cols = c->w->cols;
    double ignored = 0.0;
    reader r;
    reader_init(&r, c->kernels, c->w);
    for (size_t row = begin; row < end; row++) {
        int32_t most = absmax(&r, row, 0, cols);
        if (most >= INFINITY_BITS) {
            atomic_raise(&c->hi, most);
            return;
        }
        uint8_t *codes = e->codes + row * cols;
        float scale = from_bits32(most);
        if (e->group_size == 0) {
            e->scale[row] = scale = row_scale(&r, c, row, cols, scale, &ignored);
            row_codes(&r, row, 0, cols, scale, t, codes);
            continue;
        }
        e->scale[row] = scale;
        uint8_t *group = e->group_scale + row * ceil_div(cols, e->group_size);
        for (size_t k = 0, g = 0; k < cols; k += e->group_size, g++) {
            size_t n = cols - k < e->group_size ? cols - k : e->group_size;
            int multiplier = scale > 0.0f ? group_multiplier(&r, c, row, k, n, scale, &ignored) : 1;
            group[g] = (uint8_t)(multiplier - 1);
            row_codes(&r, row, k, n, group_scale(scale, multiplier), t, codes + k);
        }
    }
}

/* The search for mu tries whole rows, or the beginnings of long ones, spread over the matrix. */
enum { SAMPLE_WEIGHTS = 1 << 17, SAMPLE_COLS = 8192, SAMPLE_ROWS = 1024, SAMPLE_ROWS_MIN = 16 };

typedef struct {
    encoding *c;
    size_t rows, cols;
    double error[SAMPLE_ROWS];
} sample;

static void sample_rows(void *context, size_t begin, size_t end)
{
    sample *s = context;
    const encoding *c = s->c;
    size_t group_size = c->e->group_size;
    reader r;
    reader_init(&r, c->kernels, c->w);
    for (size_t i = begin; i < end; i++) {
        /* i * rows / s->rows without overflow */
        size_t row = c->w->rows / s->rows * i + c->w->rows % s->rows * i / s->rows;
        int32_t most = absmax(&r, row, 0, s->cols);
        float scale = from_bits32(most);
        s->error[i] = 0.0;
        if (most == 0 || most >= INFINITY_BITS) {
            continue; /* log8_rows reports non-finite weights */
        }
        if (group_size == 0) {
            (void)row_scale(&r, c, row, s->cols, scale, &s->error[i]);
            continue;
        }
        for (size_t k = 0; k < s->cols; k += group_size) {
            size_t n = s->cols - k < group_size ? s->cols - k : group_size;
            (void)group_multiplier(&r, c, row, k, n, scale, &s->error[i]);
        }
    }
}

/* mu = 2^(i/8 - 1), i in 0..MU_STEPS: 0.5 to 32. The error has one minimum over log mu, apart from
 * noise that is far below what a step of an eighth of an octave changes. */
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
    qins_log8_tables_build(t, mu_at(i));
    s->c->tables.log8 = t;
    qins_parallel(s->rows, items_per_grain(s->cols), threads, sample_rows, s);
    double total = 0.0;
    for (size_t row = 0; row < s->rows; row++) { /* one order, whatever the threads did */
        total += s->error[row];
    }
    return total;
}

static float search_mu(encoding *c, int threads, qins_log8_tables *t)
{
    sample s = {.c = c};
    s.cols = c->w->cols < SAMPLE_COLS ? c->w->cols : SAMPLE_COLS;
    s.rows = s.cols > 0 ? SAMPLE_WEIGHTS / s.cols : 0;
    s.rows = s.rows < SAMPLE_ROWS_MIN ? SAMPLE_ROWS_MIN : s.rows > SAMPLE_ROWS ? SAMPLE_ROWS : s.rows;
    s.rows = s.rows < c->w->rows ? s.rows : c->w->rows;
    int best = 16; /* mu = 2 */
    double least = mu_error(&s, best, threads, t);
    if (least == 0.0) { /* nothing to choose by */
        return mu_at(best);
    }
    for (int step = 8; step >= 1; step /= 2) {
        for (int direction = -1; direction <= 1; direction += 2) {
            for (int moved = 1; moved;) { /* walk on while it gets better */
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

static int encode_log8(encoding *c, int threads)
{
    qins_log8_tables t;
    if (c->e->mu < 0.0f) {
        c->e->mu = search_mu(c, threads, &t);
    }
    qins_log8_tables_build(&t, c->e->mu);
    c->tables.log8 = &t;
    qins_parallel(c->w->rows, items_per_grain(c->w->cols), threads, log8_rows, c);
    return atomic_load(&c->hi) >= INFINITY_BITS;
}

int qins_encode(const qins_kernels *kernels, const qins_matrix *w, const float *importance, int threads, qins_codes *e)
{
    encoding c = {.kernels = kernels, .w = w, .e = e, .importance = importance};
    c.windows = ceil_div(w->cols, QINS_WINDOW);
    atomic_init(&c.lo, INT32_MAX);
    atomic_init(&c.hi, 0);
    switch (e->codec) {
    case QINS_log8:
        return encode_log8(&c, threads);
    case QINS_rational:
        return encode_rational(&c, threads);
    default:
        return encode_golden(&c, threads);
    }
}

/* -- decoding --------------------------------------------------------------------------------- */

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
    if (e->codec == QINS_log8) {
        qins_log8_levels(e->mu, d->table);
    } else if (e->codec == QINS_rational) {
        qins_rational_levels(e->alpha, e->z_min, e->z_max, d->table);
    } else {
        qins_golden_values(e->log_min, e->log_max, d->table);
    }
}

void qins_decode_span(const qins_decoder *d, size_t row, size_t k, size_t n, float *out)
{
    const qins_codes *e = d->e;
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
