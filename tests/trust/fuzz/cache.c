/* KV caches: any stored bytes decode, and any floats encode, to the same on every instruction set. */
#include "fuzz.h"

static qins_cache take_cache(input *in, qins_codec codec, size_t heads, size_t room, size_t dim,
                             const qins_cache_tables *tables)
{
    qins_cache c = {.codec = codec, .heads = heads, .room = room, .dim = dim, .tables = tables};
    const size_t n = heads * room;
    c.codes = filled(in, n * (is_packed(codec) ? dim / 8 * (size_t)log_bits(codec) : dim), 0, in->left / 2);
    if (codec == QINS_golden) {
        c.sign = filled(in, n * dim, 0, in->left / 2);
        c.range = filled(in, 2 * n * sizeof *c.range, 0, in->left / 2);
    } else {
        c.scale = filled(in, n * sizeof *c.scale, 0, in->left / 2);
        c.group_scale = is_packed(codec) ? filled(in, n * ceil_div(dim, QINS_CACHE_GROUP), 0, in->left / 2) : NULL;
    }
    return c;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const qins_codec CODEC[] = {QINS_log8, QINS_golden, QINS_log6, QINS_log5, QINS_log4};
    static qins_cache_tables tables[QINS_CODEC_COUNT];
    for (int i = 0; tables[QINS_log4].nearest.top == 0 && i < 5; i++) {
        if (CODEC[i] != QINS_golden) {
            qins_cache_tables_build(&tables[CODEC[i]], CODEC[i], 255.0f);
        }
    }
    input in = {data, size};
    const qins_kernels *k = take_kernels(&in);
    const qins_dtype dtype = (qins_dtype)(take(&in, 1) % 4);
    const qins_codec codec = CODEC[take(&in, 1) % 5];
    const size_t heads = 1 + take(&in, 1) % 3, room = 1 + take(&in, 1) % 5, cols = take_cols(&in),
                 dim = is_packed(codec) ? cols / 8 * 8 : cols;
    const size_t start = take(&in, 1) % room, tokens = take(&in, 1) % (room - start + 1), n = heads * tokens * dim;
    const qins_cache c = take_cache(&in, codec, heads, room, dim, &tables[codec]);
    char *got = room_at(n * item_size(dtype), 0), *expected = room_at(n * item_size(dtype), 0);
    qins_cache_decode(k, &c, start, tokens, dtype, got, 1);
    qins_cache_decode(&qins_kernels_scalar, &c, start, tokens, dtype, expected, 1);
    /* golden's rows use each instruction set's own exponential */
    must(codec == QINS_golden || same(got, expected, n, dtype), "decoded cache");
    void *x = filled(&in, n * item_size(dtype), 0, 0);
    const int refused = qins_cache_encode(k, &c, x, dtype, start, tokens, 1);
    must(refused == qins_cache_encode(&qins_kernels_scalar, &c, x, dtype, start, tokens, 2), "refusal");
    float *wide = room_at(n * sizeof *wide, 0);
    qins_kernels_scalar.widen[dtype](x, n, wide);
    must((refused != 0) == (qins_kernels_scalar.absmax(wide, n) >= 0x7f800000), "refusal of what is not finite");
    if (!refused) {
        qins_cache_decode(k, &c, start, tokens, QINS_F32, wide, 1);
        must(qins_kernels_scalar.absmax(wide, n) < 0x7f800000, "finite floats stay finite");
    }
    release_all();
    return 0;
}
