/* Residuals. Any stream: refused, or the same weights on every instruction set. Any weights: restored bit for bit, and
 * their stream refused when it is cut. */
#include "fuzz.h"
#include "residuals.h"

/* The header that these codes need, so that the fuzzer gets beyond it */
static void put_header(const qins_codes *e, qins_dtype dtype, uint8_t *stream)
{
    const size_t block_rows = e->cols < 65536 && e->cols > 0 ? 65536 / e->cols : 1;
    memcpy(stream, "qex1", 4);
    put32(stream + 4, dtype == QINS_F16 ? 1 : 2);
    put64(stream + 8, e->rows);
    put64(stream + 16, e->cols);
    put32(stream + 24, (uint32_t)block_rows);
    put32(stream + 28, (uint32_t)(e->cols > 0 ? ceil_div(e->rows, block_rows) : 0));
}

static void restored(const qins_kernels *k, const qins_codes *e, const uint8_t *stream, size_t bytes, qins_dtype dtype,
                     int threads)
{
    const size_t n = e->rows * e->cols;
    uint16_t *got = room_at(n * sizeof *got, 0), *expected = room_at(n * sizeof *got, 0);
    const qins_exact_result result = qins_exact_decode(k, e, stream, bytes, dtype, threads, got);
    const qins_exact_result other = qins_exact_decode(&qins_kernels_scalar, e, stream, bytes, dtype, 1, expected);
    if (!valid_scalars(e) || !valid_scales(e)) {
        return;
    }
    must(result == other, "verdict");
    must(result != QINS_EXACT_OK || n == 0 || memcmp(got, expected, n * sizeof *got) == 0, "restored weights");
}

/* Encodes any weights and restores them; then damages the stream with what is left of the input. */
static void round_trip(const qins_kernels *k, const qins_codes *e, input *in, qins_dtype dtype, int threads)
{
    const size_t n = e->rows * e->cols;
    uint16_t *w = filled(in, n * sizeof *w, 0, 3 * (in->left / 4)), *got = room_at(n * sizeof *w, 0);
    uint8_t *stream = NULL, *other = NULL;
    size_t bytes = 0, others = 0;
    if (take(in, 1) & 1) { /* near their codes, as weights are */
        uint16_t *decoded = room_at(n * sizeof *w, 0);
        qins_decode(&qins_kernels_scalar, e, 0, e->rows, 0, e->cols, 1, dtype, decoded, e->cols);
        for (size_t i = 0; i < n; i++) {
            w[i] = (uint16_t)(decoded[i] + w[i] % 64 - 32);
        }
    }
    must(qins_exact_encode(k, e, w, dtype, threads, &stream, &bytes) == QINS_EXACT_OK, "memory of a stream");
    must(qins_exact_encode(&qins_kernels_scalar, e, w, dtype, 1, &other, &others) == QINS_EXACT_OK, "memory");
    must(!valid_scalars(e) || !valid_scales(e) || (bytes == others && memcmp(stream, other, bytes) == 0),
         "the same stream");
    free(other);
    must(qins_exact_decode(k, e, stream, bytes, dtype, threads, got) == QINS_EXACT_OK, "a whole stream");
    must(n == 0 || memcmp(w, got, n * sizeof *w) == 0, "weights restored");
    const size_t part = take(in, 1) & 1 ? bytes : take(in, 2) % bytes;
    uint8_t *cut = room_at(part, 0);
    if (part > 0) {
        memcpy(cut, stream, part);
    }
    free(stream);
    must(part == bytes || qins_exact_decode(k, e, cut, part, dtype, 1, got) == QINS_EXACT_DAMAGED, "a cut stream");
    while (in->left > 0 && part > 0) {
        const size_t at = take(in, 2) % part;
        cut[at] = (uint8_t)(cut[at] ^ take(in, 1));
    }
    restored(k, e, cut, part, dtype, threads);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {data, size};
    const qins_kernels *k = take_kernels(&in);
    const uint32_t flags = take(&in, 1);
    const qins_dtype dtype = flags & 1 ? QINS_F16 : QINS_BF16;
    const int threads = 1 + (flags >> 1 & 1);
    qins_codes e = take_shape(&in);
    take_scalars(&in, &e, flags >> 2 & 1);
    if (e.rows * e.cols > 20000) {
        e.rows = 20000 / e.cols;
    }
    if (flags & 8) {
        input short_one = {in.at, least(in.left, 8)}; /* the stream is what follows */
        in.at += short_one.left;
        in.left -= short_one.left;
        take_fields(&short_one, &e, flags >> 2 & 1, 0);
        const size_t bytes = in.left;
        uint8_t *stream = filled(&in, bytes, 0, 0);
        if (flags & 16 && bytes >= QINS_EXACT_HEADER) {
            put_header(&e, dtype, stream);
        }
        restored(k, &e, stream, bytes, dtype, threads);
    } else {
        take_fields(&in, &e, flags >> 2 & 1, in.left / 2);
        round_trip(k, &e, &in, dtype, threads);
    }
    release_all();
    return 0;
}
