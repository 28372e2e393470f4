/* y = x W^T for many rows of x: each block of weights is decoded once and multiplied with all panels of x.
 *
 * The blocking is that of K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with
 * decoding in place of packing the left factor. */
#include <stdatomic.h>
#include <string.h>

#include "packed.h"

enum {
    BATCH_ROWS = 512,               /* of x at a time: bounds the sums of a block */
    PACKED_BYTES = 32 << 20,        /* of x in panels: likewise */
    MOST_ROWS = 3 * QINS_WORD_ROWS, /* of weights in a block: the largest `block` of any form */
    FEW_ROWS = 64,                  /* up to this many rows of x, decoding is the bottleneck */
    FEW_SPAN = 512,                 /* columns of weights that are then prepared at a time */
    GRAIN_ELEMENTS = 16384          /* least packing work for a thread */
};

typedef struct {
    const qins_kernels *kernels;
    const qins_panels *form;
    const qins_log8_words *words;
    const qins_codes *e;
    qins_decoder decoder;
    size_t batch, padded, step, steps; /* padded: columns; steps: per row */
    size_t each;                       /* columns of weights that share a scale, at most `step` */
    size_t block, span;                /* rows and columns of weights that are prepared at a time */
    int few;                           /* so few rows of x that decoding is the bottleneck */
    const char *x;
    char *packed;
    const char *panels;      /* packed, or x itself */
    float *x_scale;          /* panels x steps x 16 */
    qins_outliers *outliers; /* of each row of x; NULL: they stay in it */
    qins_dtype dtype;
    char *y; /* of the first row of this batch */
    atomic_int_least32_t failed;
} panels;

static size_t panel_bytes(const panels *p) { return p->padded * QINS_PANEL * p->form->item; }

/* Rows of a block of weights, rounded up to multiples of `rows` and of 16. */
static size_t block_room(const panels *p)
{
    size_t height = (size_t)p->form->rows;
    return ceil_div(ceil_div(p->block, height) * height, 16) * 16;
}

static void pack_panels(void *context, size_t begin, size_t end)
{
    panels *p = context;
    size_t cols = p->e->cols, size = item_size(p->dtype);
    const int widen = p->dtype != p->form->packs, copy = widen || p->outliers != NULL;
    float *wide = copy ? qins_scratch_take(QINS_PANEL * cols * sizeof *wide) : NULL;
    if (copy && wide == NULL) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (size_t i = begin; i < end; i++) {
        size_t m = i * QINS_PANEL, rows = least(p->batch - m, QINS_PANEL);
        const void *x = p->x + m * cols * size;
        if (widen) {
            p->kernels->widen[p->dtype](x, rows * cols, wide);
            x = wide;
        } else if (copy) {
            x = memcpy(wide, x, rows * cols * size);
        }
        for (size_t j = 0; p->outliers != NULL && j < rows; j++) {
            float *row = wide + j * cols;
            qins_take_outliers(p->kernels, row, cols, row, &p->outliers[m + j]);
        }
        p->form->pack(x, cols, rows, cols, p->step, p->packed + i * panel_bytes(p),
                      p->x_scale + i * p->steps * QINS_PANEL);
    }
    if (wide != NULL) {
        qins_scratch_give(wide);
    }
}

/* The value of 1 in words of a row's weights, for each `each` columns from k on. */
static void word_factors(const panels *p, size_t row, size_t k, size_t count, float *factor)
{
    const uint8_t *group = group_row(p->e, row);
    for (size_t i = 0; i < count; i++, k += p->each) {
        factor[i] = plane_unit(p->e, p->words, row, group != NULL ? group + k / p->e->group_size : NULL);
    }
}

/* What levels of a row's weights are multiplied by, for each `each` columns from k on. */
static void signed_factors(const panels *p, size_t row, size_t k, size_t count, float *factor)
{
    const uint8_t *group = group_row(p->e, row);
    const float scale = float_at(p->e->scale, row);
    for (size_t i = 0; i < count; i++, k += p->each) {
        factor[i] = group != NULL ? scale * p->words->multiplier[group[k / p->e->group_size]] : scale;
    }
}

/* Divides the factors of each step by the largest of them, which is its scale. */
static void fold_factors(const panels *p, size_t steps, size_t count, float *factor, float *scale)
{
    const size_t parts = p->step / p->each;
    for (size_t s = 0; s < steps; s++) {
        const size_t begin = s * parts, end = least(begin + parts, count);
        scale[s] = factor[begin];
        for (size_t i = begin + 1; i < end; i++) {
            scale[s] = factor[i] > scale[s] ? factor[i] : scale[s];
        }
        for (size_t i = begin; i < end; i++) {
            factor[i] = scale[s] > 0.0f ? factor[i] / scale[s] : 0.0f;
        }
    }
}

/* Stores the scales of the steps of one row, so that those of `height` rows are consecutive. */
static void store_scales(float *w_scale, size_t i, const float *scale, size_t steps, size_t height)
{
    for (size_t s = 0; s < steps; s++) {
        w_scale[(i / height * steps + s) * height + i % height] = scale[s];
    }
}

/* Prepares columns [k, k + n) of one row of weights, n at most `depth`, and the factors that multiply() needs. */
static void prepare_row(const panels *p, size_t row, size_t i, size_t k, size_t n, char *prepared, float *w_scale)
{
    const qins_panels *form = p->form;
    const size_t steps = ceil_div(n, p->step), height = (size_t)form->rows;
    float values[QINS_WINDOW], factor[2 * QINS_WINDOW / QINS_DEPTH + 1], scale[QINS_WINDOW / QINS_DEPTH + 1];
    factor[0] = 0.0f;
    if (form == p->kernels->words) {
        signed_factors(p, row, k, ceil_div(n, p->each), factor);
        form->prepare(p->e->codes + row * code_bytes(p->e, p->e->cols) + code_bytes(p->e, k), n, p->words, factor,
                      p->each, i, prepared, scale);
        store_scales(w_scale, i, scale, steps, height);
        return;
    }
    if (p->words != NULL) {
        const size_t count = ceil_div(n, p->each);
        uint8_t unpacked[QINS_WINDOW];
        const uint8_t *codes = unpacked;
        if (is_packed(p->e->codec)) {
            qins_unpack(p->kernels, p->e, row, k, n, unpacked);
        } else {
            codes = p->e->codes + row * p->e->cols + k;
        }
        word_factors(p, row, k, count, factor);
        if (form->turn != NULL) {
            form->prepare(codes, n, p->words, factor, p->each, i, prepared, NULL);
            return;
        }
        fold_factors(p, steps, count, factor, scale);
        form->prepare(codes, n, p->words, p->each < p->step ? factor : NULL, p->each, i, prepared, NULL);
        store_scales(w_scale, i, scale, steps, height);
        return;
    }
    float *out = form->prepare != NULL ? values : (float *)(void *)(prepared + i * form->depth * form->item);
    qins_decode_span(&p->decoder, row, k, n, out);
    if (form->prepare != NULL) {
        form->prepare(values, n, NULL, NULL, p->step, i, prepared, NULL);
    } else {
        for (size_t j = n; j % QINS_DEPTH != 0; j++) {
            out[j] = 0.0f; /* x is zero here, but weights must be finite */
        }
    }
}

/* Adds the products of one row's outliers to its sums. */
static void add_outliers(const panels *p, size_t m, size_t rows, qins_columns *columns, float *sums)
{
    for (size_t i = 0; i < rows; i += QINS_WORD_ROWS) {
        qins_add_outliers(p->e, p->words, &p->outliers[m], columns++, sums + i);
    }
}

/* Stores the sums of one block in the rows of y. */
static void store_block(const panels *p, const float *c, size_t row, size_t rows, size_t padded_rows)
{
    size_t size = item_size(p->dtype);
    float turned[QINS_PANEL * MOST_ROWS];
    qins_columns columns[MOST_ROWS / QINS_WORD_ROWS];
    for (size_t i = 0; i < rows; i += QINS_WORD_ROWS) {
        qins_start_columns(&columns[i / QINS_WORD_ROWS], row + i, least(rows - i, QINS_WORD_ROWS));
    }
    for (size_t m = 0; m < p->batch; m += QINS_PANEL) {
        const float *from = c + m * padded_rows;
        size_t next = padded_rows;
        if (p->form->turn == NULL) { /* 16 lanes per row */
            for (size_t i = 0; i < rows; i += QINS_PANEL) {
                p->kernels->transpose(from + i * QINS_PANEL, QINS_PANEL, turned + i, MOST_ROWS);
            }
            from = turned;
            next = MOST_ROWS;
        }
        for (size_t lane = 0; lane < QINS_PANEL && m + lane < p->batch; lane++) {
            char *y = p->y + ((m + lane) * p->e->rows + row) * size;
            if (p->outliers != NULL) {
                add_outliers(p, m + lane, rows, columns, turned + lane * MOST_ROWS);
            }
            p->kernels->narrow[p->dtype](from + lane * next, rows, y);
        }
    }
}

/* The codes to prefetch while columns [k, k + n) of this block are multiplied. */
static qins_fetch next_codes(const panels *p, size_t row, size_t rows, size_t k, size_t n)
{
    const size_t bytes = code_bytes(p->e, p->e->cols);
    uintptr_t block = (uintptr_t)p->e->codes + row * bytes, after = block + rows * bytes;
    uintptr_t signs = p->e->codec == QINS_golden ? (uintptr_t)p->e->sign - (uintptr_t)p->e->codes : 0;
    if (p->few) {
        /* part of the next block, which follows this one, in memory order: the processor recognizes that as a stream
         * and reads ahead. The order of use, parts of many rows, is not one. */
        return (qins_fetch){after + code_bytes(p->e, k) * rows, SIZE_MAX, SIZE_MAX, 0, signs};
    }
    /* only what is used next: the panels would evict codes that are used later, in the next block */
    uintptr_t next = k + n < p->e->cols ? block + code_bytes(p->e, k + n) : after;
    size_t lines = ceil_div(code_bytes(p->e, p->span), 64);
    return (qins_fetch){next, lines, lines, bytes - least(lines * 64, bytes), signs};
}

static void multiply_block(const panels *p, size_t row, size_t rows, char *prepared, float *w_scale, float *c)
{
    const qins_panels *form = p->form;
    size_t cols = p->e->cols, height = (size_t)form->rows, count = ceil_div(p->batch, QINS_PANEL);
    size_t padded_rows = ceil_div(ceil_div(rows, height) * height, 16) * 16, next_c = padded_rows * QINS_PANEL;
    const int finishes = form->finishes && cols > 0;
    if (!finishes) {
        memset(c, 0, count * next_c * sizeof *c);
    }
    for (size_t k = 0; k < cols; k += p->span) {
        size_t n = least(p->span, cols - k), depth = ceil_div(n, QINS_DEPTH) * QINS_DEPTH, steps = ceil_div(n, p->step);
        for (size_t i = 0; i < rows; i++) {
            prepare_row(p, row + i, i, k, n, prepared, w_scale);
        }
        if (form->turn != NULL) {
            form->turn(prepared, rows, depth);
        }
        qins_fetch fetch = next_codes(p, row, rows, k, n);
        for (size_t i = 0; i < count; i += (size_t)form->panels) {
            qins_panel_product product = {
                .x = p->panels + i * panel_bytes(p) + k * form->item * (form->whole ? 1 : QINS_PANEL),
                .next_x = panel_bytes(p),
                .panels = (int)least(count - i, (size_t)form->panels),
                .cols = depth,
                .x_scale = p->x_scale + (i * p->steps + k / p->step) * QINS_PANEL,
                .next_scale = p->steps * QINS_PANEL,
                .step = p->step,
                .fetch = i > 0 ? NULL : &fetch,
                .next_c = next_c,
                .x_rows = least(p->batch - i * QINS_PANEL, (size_t)form->panels * QINS_PANEL),
                .first = k == 0,
                .next_y = p->e->rows * item_size(p->dtype),
            };
            for (size_t r = 0; r < rows; r += height) {
                product.w = prepared + r * form->depth * form->item;
                product.w_scale = w_scale + r * steps;
                product.c = c + i * next_c + (form->turn != NULL ? r : r * QINS_PANEL);
                product.w_rows = rows - r;
                if (finishes && k + n == cols) {
                    product.y = p->y + (i * QINS_PANEL * p->e->rows + row + r) * item_size(p->dtype);
                }
                form->multiply(&product);
            }
        }
    }
    if (!finishes) {
        store_block(p, c, row, rows, padded_rows);
    }
}

static void panel_blocks(void *context, size_t begin, size_t end)
{
    panels *p = context;
    const qins_panels *form = p->form;
    size_t prepared = block_room(p) * form->depth * form->item, scales = block_room(p) * form->depth / QINS_DEPTH;
    size_t sums = ceil_div(p->batch, QINS_PANEL) * QINS_PANEL * block_room(p);
    char *room = qins_scratch_take(prepared + (scales + sums) * sizeof(float));
    if (room == NULL) {
        atomic_store(&p->failed, 1);
        return;
    }
    float *w_scale = (float *)(void *)(room + prepared);
    if (form->begin != NULL) {
        form->begin();
    }
    for (size_t i = begin; i < end; i++) {
        size_t row = i * p->block, rows = p->e->rows - row < p->block ? p->e->rows - row : p->block;
        multiply_block(p, row, rows, room, w_scale, w_scale + scales);
    }
    if (form->end != NULL) {
        form->end();
    }
    qins_scratch_give(room);
}

/* Matrices that are multiplied with the same panels of x; blocks are counted over all of them. */
typedef struct {
    panels p[QINS_SET];
    size_t count, first[QINS_SET + 1];
} panels_set;

static void set_blocks(void *context, size_t begin, size_t end)
{
    panels_set *set = context;
    for (size_t i = 0; i < set->count; i++) {
        const size_t first = set->first[i], from = begin > first ? begin : first, to = least(end, set->first[i + 1]);
        if (from < to) {
            panel_blocks(&set->p[i], from - first, to - first);
        }
    }
}

/* What depends on the width of the weights and on their groups. */
static void start_panels(panels *p, const qins_codes *e, size_t batch)
{
    const qins_panels *form = p->form;
    p->padded = ceil_div(e->cols, QINS_DEPTH) * QINS_DEPTH;
    p->step = form->step > 0 ? form->step : folding_step(e);
    p->each = folded(e) ? e->group_size : least(scale_step(e), p->step);
    p->steps = ceil_div(e->cols, p->step);
    /* equal spans: in a short last one, loading and storing sums takes longer than the products */
    const size_t spans = ceil_div(p->padded, form->depth), unit = p->step > QINS_DEPTH ? p->step : QINS_DEPTH;
    p->span = spans > 1 ? ceil_div(ceil_div(p->padded, spans), unit) * unit : form->depth;
    p->few = batch <= FEW_ROWS && form != p->kernels->halves;
    if (p->few) { /* keep decoded weights in the L1 cache */
        p->span = least(form->depth, FEW_SPAN);
    }
}

/* What depends on the rows of the weights; `rows` are those of the whole set. */
static void take_weights(panels *p, const qins_codes *e, const qins_log8_words *words, size_t rows, int threads)
{
    const qins_panels *form = p->form;
    p->e = e;
    p->words = words;
    p->block = p->few ? ceil_div(16, (size_t)form->rows) * (size_t)form->rows : form->block;
    /* smaller blocks if there are too few rows to split over threads; results do not depend on the size */
    const size_t share = ceil_div(rows, 4 * (size_t)(threads > 0 ? threads : 1));
    const size_t unit = form->rows > 32 ? (size_t)form->rows : 32;
    p->block = p->block > unit ? least(p->block, ceil_div(share, unit) * unit) : p->block;
    if (words == NULL) {
        qins_decoder_init(&p->decoder, p->kernels, e);
    }
}

int qins_linear_panels(const qins_kernels *kernels, const qins_panels *form, const qins_codes *const *e,
                       const qins_log8_words *const *words, size_t count, const void *x, size_t batch, qins_dtype dtype,
                       void *const *y, int threads)
{
    panels_set set = {.count = count};
    panels *p = &set.p[0];
    *p = (panels){.kernels = kernels, .form = form, .e = e[0], .dtype = dtype};
    atomic_init(&p->failed, 0);
    start_panels(p, e[0], batch);
    size_t most = least(ceil_div(least(batch, BATCH_ROWS), QINS_PANEL), PACKED_BYTES / panel_bytes(p)), rows = 0;
    most = most > 0 ? most : 1;
    const int as_they_are = form->whole && dtype == form->packs && e[0]->cols % QINS_DEPTH == 0;
    const size_t bytes = as_they_are ? 0 : most * panel_bytes(p);
    const size_t scales = most * p->steps * QINS_PANEL * sizeof(float);
    const size_t outliers = form == kernels->words ? most * QINS_PANEL * sizeof(qins_outliers) : 0;
    char *room = qins_scratch_take(bytes + scales + outliers);
    if (room == NULL) {
        return -1;
    }
    p->packed = room;
    p->x_scale = (float *)(void *)(p->packed + bytes);
    p->outliers = outliers > 0 ? (qins_outliers *)(void *)(p->packed + bytes + scales) : NULL;
    for (size_t i = 0; i < count; i++) {
        rows += e[i]->rows;
    }
    for (size_t i = 0; i < count; i++) {
        if (i > 0) {
            memcpy(&set.p[i], p, sizeof *p);
        }
        take_weights(&set.p[i], e[i], words[i], rows, threads);
        set.first[i + 1] = set.first[i] + ceil_div(e[i]->rows, set.p[i].block);
    }
    int failed = 0;
    for (size_t m = 0; m < batch && !failed; m += p->batch) {
        p->batch = least(batch - m, most * QINS_PANEL);
        p->x = (const char *)x + m * e[0]->cols * item_size(dtype);
        p->panels = as_they_are ? p->x : p->packed;
        if (!as_they_are) {
            qins_parallel(ceil_div(p->batch, QINS_PANEL), ceil_div(GRAIN_ELEMENTS, QINS_PANEL * e[0]->cols + 1),
                          threads, pack_panels, p);
            if (atomic_load(&p->failed)) { /* numbers of outliers are missing, too */
                failed = 1;
                break;
            }
        }
        for (size_t i = 0; i < count; i++) {
            set.p[i].batch = p->batch;
            set.p[i].panels = p->panels;
            set.p[i].y = (char *)y[i] + m * e[i]->rows * item_size(dtype);
        }
        qins_parallel(set.first[count], 1, threads, set_blocks, &set);
        for (size_t i = 0; i < count; i++) {
            failed = failed || atomic_load(&set.p[i].failed);
        }
    }
    qins_scratch_give(room);
    return failed ? -1 : 0;
}
