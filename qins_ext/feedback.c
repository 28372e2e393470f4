/* Rounding with error feedback: whole matrices as panels of 16 rows.
 *
 * Frantar et al., "GPTQ" (2022), in the form of Chee et al., "QuIP" (2023), Theorem 6: with the inputs' Gram matrix
 * H = (A + I) D (A + I)^T, A strictly upper triangular and D diagonal, column j is rounded to the level nearest to
 * w_j + sum over i < j of (w_i - value_i) A[i, j]. Row j of `feedback` holds A[i, j] at i. */
#include <stdatomic.h>

#include "packed.h"

typedef struct {
    const qins_kernels *kernels;
    const float *w, *feedback;
    const uint32_t *order, *group; /* group: of the j-th column in order */
    const qins_log8_tables *tables;
    qins_codes *e;
    size_t groups;
    atomic_int failed;
} feeding;

/* 16 scales for each group; lanes beyond the last row have 0. */
static void panel_scales(const feeding *f, size_t row, size_t rows, float *scale)
{
    memset(scale, 0, f->groups * QINS_LANES * sizeof *scale);
    for (size_t r = 0; r < rows; r++) {
        float s = float_at(f->e->scale, row + r);
        const uint8_t *multiplier = group_row(f->e, row + r);
        for (size_t g = 0; g < f->groups; g++) {
            scale[g * QINS_LANES + r] =
                multiplier != NULL ? s * group_multiplier(log_bits(f->e->codec), multiplier[g]) : s;
        }
    }
}

static void feed_panel(const feeding *f, size_t row, float *panel, float *scale, uint8_t *codes)
{
    size_t cols = f->e->cols, rows = least(f->e->rows - row, QINS_LANES);
    panel_scales(f, row, rows, scale);
    memset(panel, 0, cols * QINS_LANES * sizeof *panel);
    for (size_t r = 0; r < rows; r++) {
        for (size_t j = 0; j < cols; j++) {
            panel[j * QINS_LANES + r] = f->w[(row + r) * cols + f->order[j]];
        }
    }
    f->kernels->feedback_log8(panel, cols, f->feedback, scale, f->group, f->tables, codes);
    const int packed = is_packed(f->e->codec);
    for (size_t r = 0; r < rows; r++) {
        uint8_t *to = f->e->codes + (row + r) * code_bytes(f->e, cols);
        uint8_t *in_order = packed ? (uint8_t *)(void *)panel : to; /* the panel's floats are no longer needed */
        for (size_t j = 0; j < cols; j++) {
            in_order[f->order[j]] = codes[j * QINS_LANES + r];
        }
        if (packed) {
            qins_pack(in_order, cols, log_bits(f->e->codec), to);
        }
    }
}

static void feed_panels(void *context, size_t begin, size_t end)
{
    feeding *f = context;
    size_t lanes = f->e->cols * QINS_LANES;
    float *panel = qins_scratch_take(lanes * (sizeof *panel + 1) + f->groups * QINS_LANES * sizeof *panel);
    if (panel == NULL) {
        atomic_store(&f->failed, -1);
        return;
    }
    float *scale = panel + lanes;
    for (size_t i = begin; i < end; i++) {
        feed_panel(f, i * QINS_LANES, panel, scale, (uint8_t *)(scale + f->groups * QINS_LANES));
    }
    qins_scratch_give(panel);
}

int qins_round_with_feedback(const qins_kernels *kernels, const float *w, const uint32_t *order, const float *feedback,
                             int threads, qins_codes *e)
{
    uint32_t *group = qins_scratch_take(e->cols * sizeof *group + 1);
    if (group == NULL) {
        return -1;
    }
    for (size_t j = 0; j < e->cols; j++) {
        group[j] = e->group_size > 0 ? (uint32_t)(order[j] / e->group_size) : 0;
    }
    qins_log8_tables t;
    qins_log8_tables_build(&t, e->mu, log_bits(e->codec));
    feeding f = {
        .kernels = kernels, .w = w, .feedback = feedback, .order = order, .group = group, .tables = &t, .e = e};
    f.groups = e->group_size > 0 ? ceil_div(e->cols, e->group_size) : 1;
    atomic_init(&f.failed, 0);
    qins_parallel(ceil_div(e->rows, QINS_LANES), 1, threads, feed_panels, &f);
    qins_scratch_give(group);
    return atomic_load(&f.failed);
}
