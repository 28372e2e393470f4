/* Products with any codes and activations; of sane ones, within a bound of those with the decoded weights. */
#include "fuzz.h"
#include "ways.h"

/* |y - exact| against the sum of the products' magnitudes, and against what it would be if all codes were the largest:
 * fixed point has steps of its own size, however small a row's codes are. The core's own tests have the tight bounds */
#define BOUND 2e-2
#define STEP 1e-3

/* What the largest code of log8's family stands for; 0 for other codecs, which are multiplied in floats */
static double full_scale(const qins_codes *e, size_t row, size_t col)
{
    if (log_bits(e->codec) == 0) {
        return 0.0;
    }
    const double scale = (double)float_at(e->scale, row);
    if (e->group_size == 0) {
        return scale;
    }
    const size_t group = row * ceil_div(e->cols, e->group_size) + col / e->group_size;
    return scale * fabs((double)group_multiplier(log_bits(e->codec), e->group_scale[group]));
}

static int within(const qins_codes *e, const float *x, size_t batch, const float *y)
{
    float *w = room_at(e->cols * sizeof *w, 0);
    for (size_t row = 0; row < e->rows; row++) {
        qins_decode(&qins_kernels_scalar, e, row, 1, 0, e->cols, 1, QINS_F32, w, e->cols);
        double largest = 0.0;
        for (size_t i = 0; i < e->cols; i++) {
            largest = fmax(largest, fabs((double)w[i]));
        }
        for (size_t m = 0; m < batch; m++) {
            double sum = 0.0, size = 1e-30, full = 0.0;
            for (size_t i = 0; i < e->cols; i++) {
                sum += (double)w[i] * (double)x[m * e->cols + i];
                size += largest * fabs((double)x[m * e->cols + i]);
                full += full_scale(e, row, i) * fabs((double)x[m * e->cols + i]);
            }
            if (!(fabs((double)y[m * e->rows + row] - sum) <= BOUND * size + STEP * full)) {
                fprintf(stderr, "row %zu, batch %zu: expected %g, got %g, of %g\n", row, m, sum,
                        (double)y[m * e->rows + row], size);
                return 0;
            }
        }
    }
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const size_t BATCH[] = {1, 1, 2, 3, 4, 5, 8, 16, 31, 64, 130, 0};
    input in = {data, size};
    const qins_kernels *k = take_kernels(&in);
    qins_dtype dtype = (qins_dtype)(take(&in, 1) % 4);
    const uint32_t flags = take(&in, 1), way = take(&in, 1) % (2 * QINS_WAY_COUNT);
    const int sane = flags & 1, threads = 1 + (flags >> 1 & 1);
    size_t batch = BATCH[take(&in, 1) % (sizeof BATCH / sizeof *BATCH)];
    qins_codes e = take_shape(&in);
    take_scalars(&in, &e, sane);
    if (e.cols > 1000 && batch > 8) {
        batch = 8; /* as fast as the other inputs */
    }
    dtype = sane ? QINS_F32 : dtype;
    take_fields(&in, &e, sane, in.left / 2);
    float *x = filled(&in, batch * e.cols * item_size(dtype), 0, 0);
    if (sane) {
        tame(x, batch * e.cols);
    }
    void *y = room_at(batch * e.rows * item_size(dtype), 0);
    qins_force_way((qins_way)(way < QINS_WAY_COUNT ? way : QINS_WAY_COUNT));
    must(qins_linear(k, &e, x, batch, dtype, y, threads) == 0, "memory of products");
    must(!sane || within(&e, x, batch, y), "products");
    qins_force_way(QINS_WAY_COUNT);
    release_all();
    return 0;
}
