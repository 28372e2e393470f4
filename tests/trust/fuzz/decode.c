/* Codes of every codec, with any fields, decoded at any place: the same values on every instruction set. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const qins_kernels *k = take_kernels(&in);
    const qins_dtype dtype = (qins_dtype)(take(&in, 1) % 4);
    const int threads = 1 + (int)(take(&in, 1) % 2);
    qins_codes e = take_shape(&in);
    take_scalars(&in, &e, (int)(take(&in, 1) & 1));
    const size_t row = e.rows ? take(&in, 1) % e.rows : 0, col = e.cols ? take(&in, 2) % e.cols : 0;
    const size_t rows = take(&in, 1) % (e.rows - row + 1), cols = take(&in, 2) % (e.cols - col + 1);
    const size_t stride = cols + take(&in, 1) % 4;
    take_fields(&in, &e, 0, 0);
    const size_t n = rows > 0 ? (rows - 1) * stride + cols : 0;
    char *got = room_at(n * item_size(dtype), 0), *expected = room_at(n * item_size(dtype), 0);
    if (n > 0) {
        memset(got, 1, n * item_size(dtype));
        memset(expected, 1, n * item_size(dtype));
    }
    qins_decode(k, &e, row, rows, col, cols, threads, dtype, got, stride);
    qins_decode(&qins_kernels_scalar, &e, row, rows, col, cols, 1, dtype, expected, stride);
    must(!valid_scalars(&e) || same(got, expected, n, dtype), "decoded values");
    release_all();
    return 0;
}
