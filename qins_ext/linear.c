/* y = x W^T straight from the codes, for a few rows of x. Rows of codes are split over threads. */
#include <stdatomic.h>
#include <string.h>

#include "packed.h"
#include "ways.h"

/* A thread's part has at least this many weights (times rows of x): a few microseconds of work. */
enum { GRAIN = 32768, ROWS_AT_ONCE = QINS_WORD_ROWS, MOST_BATCH = 512, NEAR_BYTES = 40 << 10 };

/* -- one call ------------------------------------------------------------------------------------ */

typedef struct {
    const qins_kernels *kernels;
    const qins_codes *e;
    qins_way way;
    size_t batch, blocks, padded; /* padded: floats from one row of x, or of packed ones, to the next */
    const float *x;               /* batch x padded */
    float *rest;                  /* room for x without outliers, may be x; NULL: threads allocate one row */
    qins_outliers *outliers;      /* of each row of x; only in fixed point */
    atomic_int_least32_t failed;
    size_t pairs;       /* as of qins_fixed */
    char *packed;       /* QINS_WORDS: see qins_fixed; QINS_BYTES, QINS_TILES: see qins_single and qins_few */
    float *fixed_scale; /* scales of `packed` */
    size_t step;        /* columns of activations that share a scale */
    const qins_log8_words *words;
    qins_golden_factors factors;
    qins_decoder from; /* QINS_FLOATS */
    qins_dtype dtype;
    char *y;
} product;

/* out += products of columns [k, k + n) of one row of codes with rows [m, m + batch) of x. */
static void add_product(const product *p, size_t row, size_t k, size_t n, size_t ahead, size_t m, int batch, float *out)
{
    const qins_codes *e = p->e;
    float window[QINS_WINDOW], part[QINS_BATCH];
    if (p->way == QINS_FACTORS) {
        const size_t at = row * e->cols + k;
        const int8_t *sign = e->codec == QINS_golden ? e->sign + at : NULL;
        const uint8_t *bits = e->codec == QINS_log9 ? e->sign_bits + row * ceil_div(e->cols, 8) + k / 8 : NULL;
        const float *x = (const float *)(const void *)p->packed + m * p->padded + k;
        p->kernels->dot_golden(e->codes + at, sign, bits, n, ahead, &p->factors, x, p->padded, batch, part);
    } else { /* no kernel multiplies these codes directly, so decode them */
        qins_decode_span(&p->from, row, k, n, window);
        p->kernels->dot_f32(window, n, p->x + m * p->padded + k, p->padded, batch, part);
    }
    for (int i = 0; i < batch; i++) {
        out[i] += part[i];
    }
}

/* Stores results[i][b], of row row + i of codes and row m + b of x, in y. In fixed point, results are first multiplied
 * by the rows' scales, and the outliers' products are added. */
static void store_results(const product *p, const float *results, size_t row, size_t rows, size_t m, size_t batch)
{
    const int fixed = p->outliers != NULL;
    float one[ROWS_AT_ONCE], scale[ROWS_AT_ONCE];
    qins_columns columns;
    qins_start_columns(&columns, row, rows);
    for (size_t i = 0; i < rows; i++) {
        scale[i] = fixed ? float_at(p->e->scale, row + i) : 1.0f;
    }
    for (size_t b = 0; b < batch; b++) {
        for (size_t i = 0; i < rows; i++) {
            one[i] = results[i * batch + b] * scale[i];
        }
        if (fixed) {
            qins_add_outliers(p->e, p->words, &p->outliers[m + b], &columns, one);
        }
        p->kernels->narrow[p->dtype](one, rows, p->y + ((m + b) * p->e->rows + row) * item_size(p->dtype));
    }
}

static void product_rows(void *context, size_t begin, size_t end)
{
    const product *p = context;
    float results[ROWS_AT_ONCE * QINS_BATCH];
    /* some columns of all rows of codes at a time, so that activations stay in the L1 cache */
    const size_t cols = p->e->cols, parts = least(p->batch, QINS_BATCH) * cols * sizeof(float) / NEAR_BYTES + 1;
    const size_t span = least(ceil_div(ceil_div(cols, parts), QINS_BLOCK) * QINS_BLOCK, QINS_WINDOW);
    for (size_t row = begin; row < end; row += ROWS_AT_ONCE) {
        const size_t rows = least(end - row, ROWS_AT_ONCE);
        for (size_t m = 0; m < p->batch; m += QINS_BATCH) {
            const size_t batch = least(p->batch - m, QINS_BATCH);
            memset(results, 0, rows * batch * sizeof *results);
            for (size_t k = 0; k < cols; k += span) {
                const size_t n = least(span, cols - k);
                for (size_t i = 0; i < rows; i++) {
                    add_product(p, row + i, k, n, qins_rows_ahead(span, cols), m, (int)batch, results + i * batch);
                }
            }
            store_results(p, results, row, rows, m, batch);
        }
    }
}

static void product_words(void *context, size_t begin, size_t end)
{
    product *p = context;
    const qins_codes *e = p->e;
    const size_t steps = ceil_div(e->cols, p->step);
    float few[ROWS_AT_ONCE * QINS_BATCH], *results = few;
    size_t most = QINS_BATCH; /* rows of x at a time; this many if there is no memory for more */
    char *room = NULL;
    /* packed codes are decoded fast enough to decode them twice instead of storing them */
    if (p->batch > (is_packed(e->codec) ? 2 * QINS_BATCH : QINS_BATCH)) {
        room = qins_scratch_take(QINS_WORD_ROOM + p->batch * ROWS_AT_ONCE * sizeof *results);
        if (room == NULL && is_packed(e->codec)) { /* sets one after another would round otherwise */
            atomic_store(&p->failed, 1);
            return;
        }
        most = room != NULL ? p->batch : QINS_BATCH;
        results = room != NULL ? (float *)(void *)(room + QINS_WORD_ROOM) : few;
    }
    const size_t blocks = ceil_div(end - begin, ROWS_AT_ONCE), at_once = ceil_div(ceil_div(end - begin, blocks), 4) * 4;
    for (size_t row = begin; row < end; row += at_once) {
        const size_t rows = least(end - row, at_once);
        for (size_t m = 0; m < p->batch; m += most) {
            const size_t batch = least(p->batch - m, most);
            const qins_fixed x = {(const int16_t *)(const void *)p->packed + m * steps * p->step,
                                  p->fixed_scale + m * steps, steps, (int)batch, p->pairs};
            p->kernels->dot_log8(e->codes + row * code_bytes(e, e->cols), rows, e->cols, group_row(e, row),
                                 e->group_size, p->words, &x, room, results);
            store_results(p, results, row, rows, m, batch);
        }
    }
    if (room != NULL) {
        qins_scratch_give(room);
    }
}

/* Returns row m of x without its outliers: in x if it has none, else in `rest`. */
static const float *take_outliers(const product *p, size_t m, float *rest)
{
    const float *x = p->x + m * p->padded;
    return qins_take_outliers(p->kernels, x, p->e->cols, rest, &p->outliers[m]) ? rest : x;
}

static void fix_rows(void *context, size_t begin, size_t end)
{
    product *p = context;
    const size_t steps = ceil_div(p->e->cols, p->step);
    float *room = p->rest == NULL ? qins_scratch_take(p->padded * sizeof *room) : NULL;
    if (p->rest == NULL && room == NULL) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (size_t m = begin; m < end; m++) {
        const size_t in_set = m % QINS_BATCH, set = m - in_set, next = least(p->batch - set, QINS_BATCH) * p->step;
        int16_t *fixed = (int16_t *)(void *)p->packed + set * steps * p->step + in_set * p->step;
        float *scale = p->fixed_scale + set * steps + in_set;
        const float *x = take_outliers(p, m, room != NULL ? room : p->rest + m * p->padded);
        p->kernels->fix_activations(x, p->e->cols, p->step, fixed, next, scale);
        if (p->pairs > 0) {
            p->kernels->pair_blocks(fixed, p->pairs);
        }
    }
    if (room != NULL) {
        qins_scratch_give(room);
    }
}

/* Puts x in the order that dot_golden expects. */
static void quarter_rows(void *context, size_t begin, size_t end)
{
    product *p = context;
    for (size_t m = begin; m < end; m++) {
        const float *x = p->x + m * p->e->cols;
        float *out = (float *)(void *)p->packed + m * p->padded;
        for (size_t b = 0; b < p->padded; b += QINS_BLOCK) {
            float block[QINS_BLOCK] = {0};
            memcpy(block, x + b, least(p->e->cols - b, QINS_BLOCK) * sizeof *x);
            for (size_t i = 0; i < QINS_BLOCK; i++) {
                out[b + i] = block[4 * (i % 16) + i / 16];
            }
        }
    }
}

/* Copies all rows, so that those without outliers are stored next to the others. */
static void copy_rows(void *context, size_t begin, size_t end)
{
    const product *p = context;
    for (size_t m = begin; m < end; m++) {
        float *rest = p->rest + m * p->padded;
        const float *x = take_outliers(p, m, rest);
        if (x != rest) {
            memcpy(rest, x, p->e->cols * sizeof *x);
        }
    }
}

static void pack_steps(void *context, size_t begin, size_t end)
{
    product *p = context;
    size_t from = begin * p->step, to = least(end * p->step, p->e->cols), panels = qins_few_panels(p->batch);
    p->kernels->few->pack(p->rest + from, p->padded, (int)p->batch, to - from, p->step,
                          p->packed + from * panels * qins_few_lanes(p->batch),
                          p->fixed_scale + begin * panels * QINS_PANEL);
}

static void product_single(void *context, size_t begin, size_t end)
{
    const product *p = context;
    const qins_codes *e = p->e;
    for (size_t row = begin; row < end; row += ROWS_AT_ONCE) {
        float out[ROWS_AT_ONCE];
        const size_t rows = least(end - row, ROWS_AT_ONCE);
        p->kernels->single->multiply(e->codes + row * e->cols, rows, e->cols, group_row(e, row), e->group_size,
                                     p->words, p->packed, p->fixed_scale, p->step, out);
        store_results(p, out, row, rows, 0, 1);
    }
}

/* Sixteen rows of codes at a time. */
static void product_blocks(void *context, size_t begin, size_t end)
{
    const product *p = context;
    const qins_codes *e = p->e;
    const size_t size = item_size(p->dtype);
    const size_t bytes = code_bytes(e, e->cols);
    p->kernels->few->begin((int)p->batch);
    for (size_t block = begin; block < end; block++) {
        size_t row = block * QINS_PANEL, rows = least(e->rows - row, QINS_PANEL);
        float scale[QINS_PANEL] = {0}, out[QINS_FEW][QINS_PANEL];
        for (size_t i = 0; i < rows; i++) {
            scale[i] = float_at(e->scale, row + i) * (1.0f / (float)QINS_PLANE_MAX);
        }
        const uint8_t *codes = e->codes + row * bytes, *next = codes + (block + 1 < end ? QINS_PANEL * bytes : 0);
        p->kernels->few->multiply(codes, rows, e->cols, scale, group_row(e, row), e->group_size, p->words, p->packed,
                                  p->fixed_scale, p->step, (int)p->batch, next, out);
        qins_columns columns;
        qins_start_columns(&columns, row, rows);
        for (size_t m = 0; m < p->batch; m++) {
            qins_add_outliers(e, p->words, &p->outliers[m], &columns, out[m]);
            p->kernels->narrow[p->dtype](out[m], rows, p->y + (m * e->rows + row) * size);
        }
    }
    p->kernels->few->end();
}

/* -- one x, and one or more matrices -------------------------------------------------------------- */

/* The prepared rows of x, and the function that multiplies them. */
typedef struct {
    char *room;     /* scratch memory, or NULL */
    size_t at_once; /* a thread's part is a multiple of this many rows of codes */
    void (*multiply)(void *, size_t, size_t);
} preparation;

/* Converts x to the form that the chosen way needs. Matrices with the same cols, group_size and way can share it.
 * Returns 0, or -1 if out of memory. */
static int take_activations(product *p, const void *x, int threads, preparation *plan)
{
    const qins_codes *e = p->e;
    const size_t batch = p->batch;
    const int fixed = p->way == QINS_WORDS || p->way == QINS_BYTES || p->way == QINS_TILES;
    const int copied = p->dtype != QINS_F32 || p->way == QINS_BYTES || p->way == QINS_TILES;
    /* sizes in bytes, multiples of 64; `scales` in floats */
    size_t floats = copied ? ceil_div(batch * e->cols * sizeof(float), 64) * 64 : 0;
    size_t outliers = fixed ? ceil_div(batch * sizeof(qins_outliers), 64) * 64 : 0, packed = 0, scales = 0;
    p->step = scale_step(e);
    switch (p->way) {
    case QINS_WORDS:
        p->step = is_packed(e->codec) ? QINS_BLOCK : least(p->step, p->kernels->word_step);
        scales = ceil_div(batch, QINS_BATCH) * QINS_BATCH * ceil_div(e->cols, p->step);
        packed = batch * ceil_div(e->cols, p->step) * p->step * sizeof(int16_t);
        if (batch == 1 && e->codec == QINS_log4 && p->kernels->pair_blocks != NULL) {
            p->pairs = qins_pairs(e->cols);
        }
        break;
    case QINS_BYTES:
        scales = ceil_div(e->cols, p->step);
        packed = scales * p->step * 2;
        break;
    case QINS_TILES:
        p->step = folding_step(e);
        scales = p->blocks * qins_few_panels(batch) * QINS_PANEL;
        packed = p->blocks * QINS_DEPTH * qins_few_panels(batch) * qins_few_lanes(batch);
        break;
    case QINS_FACTORS:
        p->padded = p->blocks * QINS_BLOCK;
        packed = batch * p->padded * sizeof(float);
        break;
    default:
        break;
    }
    const size_t all = floats + outliers + packed + scales * sizeof(float);
    plan->room = all > 0 ? qins_scratch_take(all) : NULL;
    if (all > 0 && plan->room == NULL) {
        return -1;
    }
    p->x = x;
    if (copied) {
        p->rest = (float *)(void *)plan->room;
    }
    if (p->dtype != QINS_F32) {
        p->kernels->widen[p->dtype](x, batch * e->cols, p->rest);
        p->x = p->rest;
    }
    if (fixed) {
        p->outliers = (qins_outliers *)(void *)(plan->room + floats);
    }
    if (packed > 0) {
        p->packed = plan->room + floats + outliers;
        p->fixed_scale = (float *)(void *)(p->packed + packed);
    }
    const size_t row_grain = ceil_div(GRAIN, e->cols + 1);
    plan->at_once = 1;
    plan->multiply = product_rows;
    switch (p->way) {
    case QINS_WORDS:
        qins_parallel(batch, row_grain, threads, fix_rows, p);
        plan->multiply = product_words;
        break;
    case QINS_BYTES:
        p->kernels->single->pack(take_outliers(p, 0, p->rest), e->cols, p->step, p->packed, p->fixed_scale);
        plan->multiply = product_single;
        break;
    case QINS_TILES:
        qins_parallel(batch, row_grain, threads, copy_rows, p);
        qins_parallel(ceil_div(e->cols, p->step), ceil_div(GRAIN, p->step * batch + 1), threads, pack_steps, p);
        plan->multiply = product_blocks;
        plan->at_once = QINS_PANEL;
        break;
    case QINS_FACTORS:
        qins_parallel(batch, row_grain, threads, quarter_rows, p);
        break;
    default:
        break;
    }
    return atomic_load(&p->failed) == 0 ? 0 : -1;
}

/* Builds the tables of one matrix; `own` has room for log8's in case they are not cached. */
static void take_matrix(product *p, const qins_codes *e, void *y, qins_log8_words *own)
{
    p->e = e;
    p->y = y;
    switch (p->way) {
    case QINS_WORDS:
    case QINS_BYTES:
    case QINS_TILES:
        p->words = qins_log8_words_of(e->mu, log_bits(e->codec), own);
        break;
    case QINS_FACTORS:
        qins_golden_factors_build(&p->factors, e->log_min, e->log_max);
        break;
    default:
        qins_decoder_init(&p->from, p->kernels, e);
        break;
    }
}

static int linear_panels(const qins_kernels *kernels, const qins_panels *form, const qins_codes *const *e, size_t count,
                         const void *x, size_t batch, qins_dtype dtype, void *const *y, int threads)
{
    const int by_words =
        form != kernels->floats && log_bits(e[0]->codec) > 0 && (e[0]->group_size % QINS_DEPTH == 0 || folded(e[0]));
    qins_log8_words own[QINS_SET];
    const qins_log8_words *words[QINS_SET] = {NULL};
    for (size_t i = 0; by_words && i < count; i++) {
        words[i] = qins_log8_words_of(e[i]->mu, log_bits(e[i]->codec), &own[i]);
    }
    return qins_linear_panels(kernels, form, e, words, count, x, batch, dtype, y, threads);
}

int qins_linear(const qins_kernels *kernels, const qins_codes *e, const void *x, size_t batch, qins_dtype dtype,
                void *y, int threads)
{
    if (batch == 0 || e->rows == 0) {
        return 0;
    }
    if (e->cols == 0) {
        memset(y, 0, batch * e->rows * item_size(dtype));
        return 0;
    }
    const qins_way way = qins_choose_way(kernels, e, batch, dtype);
    const qins_panels *form = qins_panels_of(kernels, way);
    if (form != NULL) {
        return linear_panels(kernels, form, &e, 1, x, batch, dtype, &y, threads);
    }
    qins_log8_words own;
    if (batch > MOST_BATCH) { /* bounds the memory for activations */
        const size_t size = item_size(dtype), left = batch - MOST_BATCH;
        const void *rest = (const char *)x + MOST_BATCH * e->cols * size;
        return qins_linear(kernels, e, x, MOST_BATCH, dtype, y, threads) != 0
                   ? -1
                   : qins_linear(kernels, e, rest, left, dtype, (char *)y + MOST_BATCH * e->rows * size, threads);
    }
    product p = {.kernels = kernels, .e = e, .way = way, .batch = batch, .dtype = dtype};
    preparation plan;
    atomic_init(&p.failed, 0);
    p.blocks = ceil_div(e->cols, QINS_BLOCK);
    p.padded = e->cols;
    int failed = take_activations(&p, x, threads, &plan);
    if (!failed) {
        take_matrix(&p, e, y, &own);
        qins_parallel(ceil_div(e->rows, plan.at_once), ceil_div(GRAIN, plan.at_once * e->cols * batch + 1), threads,
                      plan.multiply, &p);
        failed = atomic_load(&p.failed) == 0 ? 0 : -1;
    }
    if (plan.room != NULL) {
        qins_scratch_give(plan.room);
    }
    return failed;
}

typedef struct {
    product *p; /* one for each matrix */
    size_t count, first[QINS_SET + 1];
    void (*multiply)(void *, size_t, size_t);
} product_set;

static void multiply_set(void *context, size_t begin, size_t end)
{
    const product_set *set = context;
    for (size_t i = 0; i < set->count; i++) {
        const size_t first = set->first[i], from = begin > first ? begin : first, to = least(end, set->first[i + 1]);
        if (from < to) {
            set->multiply(&set->p[i], from - first, to - first);
        }
    }
}

int qins_linear_set(const qins_kernels *kernels, const qins_codes *const *e, size_t count, const float *x, size_t batch,
                    float *const *y, int threads)
{
    const qins_way way = qins_choose_way(kernels, e[0], batch, QINS_F32);
    const qins_panels *form = qins_panels_of(kernels, way);
    int alike = count <= QINS_SET && (form != NULL || batch <= MOST_BATCH);
    for (size_t i = 1; alike && i < count; i++) {
        alike = e[i]->cols == e[0]->cols && e[i]->codec == e[0]->codec && e[i]->group_size == e[0]->group_size &&
                qins_choose_way(kernels, e[i], batch, QINS_F32) == way;
    }
    if (!alike || count == 1) {
        int failed = 0;
        for (size_t i = 0; i < count && !failed; i++) {
            failed = qins_linear(kernels, e[i], x, batch, QINS_F32, y[i], threads);
        }
        return failed;
    }
    if (form != NULL) {
        void *results[QINS_SET];
        for (size_t i = 0; i < count; i++) {
            results[i] = y[i];
        }
        return linear_panels(kernels, form, e, count, x, batch, QINS_F32, results, threads);
    }
    product p[QINS_SET] = {{.kernels = kernels, .e = e[0], .way = way, .batch = batch, .dtype = QINS_F32}};
    qins_log8_words own[QINS_SET];
    preparation plan;
    atomic_init(&p[0].failed, 0);
    p[0].blocks = ceil_div(e[0]->cols, QINS_BLOCK);
    p[0].padded = e[0]->cols;
    int failed = take_activations(&p[0], x, threads, &plan);
    if (!failed) {
        product_set set = {.p = p, .count = count, .multiply = plan.multiply};
        for (size_t i = 0; i < count; i++) {
            if (i > 0) {
                memcpy(&p[i], &p[0], sizeof p[i]);
            }
            take_matrix(&p[i], e[i], y[i], &own[i]);
            set.first[i + 1] = set.first[i] + ceil_div(e[i]->rows, plan.at_once);
        }
        qins_parallel(set.first[count], ceil_div(GRAIN, plan.at_once * e[0]->cols * batch + 1), threads, multiply_set,
                      &set);
        for (size_t i = 0; i < count; i++) {
            failed = atomic_load(&p[i].failed) == 0 ? failed : -1;
        }
    }
    if (plan.room != NULL) {
        qins_scratch_give(plan.room);
    }
    return failed;
}
