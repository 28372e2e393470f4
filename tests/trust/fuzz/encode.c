/* Any floats with any strides: the same codes on every instruction set, or refused if one is not finite; and rounding
 * with error feedback. */
#include "fuzz.h"

typedef struct {
    qins_codes e;
    size_t codes, groups;
} result;

static result space_for(const qins_codes *shape)
{
    result r = {.e = *shape};
    qins_codes *e = &r.e;
    r.codes = e->rows * code_bytes(e, e->cols);
    r.groups = e->group_size > 0 ? e->rows * ceil_div(e->cols, e->group_size) : 0;
    e->codes = room_at(r.codes, 0);
    e->sign = e->codec == QINS_golden ? room_at(e->rows * e->cols, 0) : NULL;
    e->sign_bits = e->codec == QINS_log9 ? room_at(e->rows * ceil_div(e->cols, 8), 0) : NULL;
    e->scale = log_bits(e->codec) > 0 ? room_at(e->rows * sizeof(float), 0) : NULL;
    e->group_scale = e->group_size > 0 ? room_at(r.groups, 0) : NULL;
    return r;
}

static int equal(const void *a, const void *b, size_t n) { return a == NULL || n == 0 || memcmp(a, b, n) == 0; }

static int same_codes(const result *a, const result *b)
{
    const qins_codes *x = &a->e, *y = &b->e;
    const size_t n = x->rows * x->cols;
    return equal(x->codes, y->codes, a->codes) && equal(x->sign, y->sign, n) &&
           equal(x->sign_bits, y->sign_bits, x->rows * ceil_div(x->cols, 8)) &&
           equal(x->scale, y->scale, x->rows * sizeof(float)) && equal(x->group_scale, y->group_scale, a->groups) &&
           equal(&x->mu, &y->mu, sizeof(float)) && equal(&x->log_min, &y->log_min, sizeof(float)) &&
           equal(&x->log_max, &y->log_max, sizeof(float)) && equal(&x->z_min, &y->z_min, sizeof(float)) &&
           equal(&x->z_max, &y->z_max, sizeof(float));
}

/* A matrix whose strides may be 0, negative or larger than its elements, over memory of exactly its extent */
static qins_matrix take_matrix(input *in, const qins_codes *e, qins_dtype dtype, int is_tame)
{
    const ptrdiff_t item = (ptrdiff_t)item_size(dtype);
    const uint32_t how = take(in, 1);
    const ptrdiff_t near = item * (1 + (ptrdiff_t)(how & 1)), far = near * (ptrdiff_t)e->cols + item * (how >> 1 & 3);
    qins_matrix w = {.dtype = dtype, .rows = e->rows, .cols = e->cols, .row_stride = far, .col_stride = near};
    if (how & 8) { /* transposed */
        w.col_stride = item * (ptrdiff_t)e->rows;
        w.row_stride = item;
    }
    w.row_stride = how & 16 ? 0 : how & 32 ? -w.row_stride : w.row_stride;
    w.col_stride = how & 64 ? -w.col_stride : w.col_stride;
    const ptrdiff_t down = e->rows > 0 ? (ptrdiff_t)(e->rows - 1) * w.row_stride : 0;
    const ptrdiff_t across = e->cols > 0 ? (ptrdiff_t)(e->cols - 1) * w.col_stride : 0;
    const size_t bytes = (size_t)(labs(down) + labs(across) + item);
    char *all = filled(in, bytes, how & 128 ? 1 : 0, 0);
    if (is_tame && dtype == QINS_F32 && !(how & 128)) {
        tame((float *)(void *)all, bytes / 4);
    }
    w.data = all - (down < 0 ? down : 0) - (across < 0 ? across : 0);
    return w;
}

static void feedback(const qins_kernels *k, result r, input *in)
{
    const size_t n = r.e.rows * r.e.cols;
    if (r.e.cols == 0 || r.e.cols > 80) {
        return;
    }
    result other = space_for(&r.e);
    memcpy(other.e.scale, r.e.scale, r.e.rows * sizeof(float));
    if (r.groups > 0) {
        memcpy(other.e.group_scale, r.e.group_scale, r.groups);
    }
    uint32_t *order = room_at(r.e.cols * sizeof *order, 0);
    float *w = filled(in, n * sizeof *w, 0, in->left / 2), *factors;
    factors = filled(in, r.e.cols * r.e.cols * sizeof *factors, 0, 0);
    for (uint32_t j = 0; j < r.e.cols; j++) {
        order[j] = (uint32_t)r.e.cols - 1 - j;
    }
    must(qins_round_with_feedback(k, w, order, factors, 1, &r.e) == 0, "memory of rounding");
    must(qins_round_with_feedback(&qins_kernels_scalar, w, order, factors, 1, &other.e) == 0, "memory of rounding");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const qins_kernels *k = take_kernels(&in);
    const uint32_t flags = take(&in, 1);
    const qins_dtype dtype = (qins_dtype)(flags & 3);
    qins_codes e = take_shape(&in);
    const float parameter = take_float(&in);
    if (e.cols > 1000) { /* the search for mu is slow */
        e.rows %= 3;
    }
    e.mu = e.alpha = e.codec == QINS_rational ? (parameter > 0.0f ? parameter : 1.0f)
                                              : (parameter <= QINS_MU_MAX ? parameter : -1.0f);
    const qins_matrix w = take_matrix(&in, &e, dtype, flags >> 2 & 1);
    float *importance = NULL;
    if (flags & 8 && log_bits(e.codec) > 0) {
        importance = filled(&in, e.cols * sizeof *importance, 0, 0);
    }
    result got = space_for(&e), expected = space_for(&e);
    const int refused = qins_encode(k, &w, importance, 1 + (flags >> 4 & 1), &got.e);
    must(refused == qins_encode(&qins_kernels_scalar, &w, importance, 1, &expected.e), "refusal");
    const qins_nonfinite bad = qins_find_nonfinite(k, &w);
    must((bad.count > 0) == refused, "refusal of what is not finite");
    if (!refused) {
        must(same_codes(&got, &expected), "codes");
        const size_t n = e.rows * e.cols;
        float *one = room_at(n * sizeof *one, 0), *other = room_at(n * sizeof *one, 0);
        qins_decode(k, &got.e, 0, e.rows, 0, e.cols, 1, QINS_F32, one, e.cols);
        qins_decode(&qins_kernels_scalar, &got.e, 0, e.rows, 0, e.cols, 1, QINS_F32, other, e.cols);
        must(same(one, other, n, QINS_F32), "decoded values");
        if (log_bits(e.codec) > 0) {
            feedback(k, got, &in);
        }
    }
    release_all();
    return 0;
}
