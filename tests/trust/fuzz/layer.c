/* A decoder layer with any codes, norms, cache and mask, in any of the sizes that a config.json may ask for. */
#include "decoder.h"
#include "fuzz.h"

enum { MOST_ROWS = 40 }; /* of QINS_DECODER_ROWS: more than any block of rows */

/* Sizes that scalar kernels under the sanitizers take a millisecond for; some are of several blocks of columns. */
static size_t take_width(input *in)
{
    const size_t v = take(in, 1);
    return 1 + (v < 240 ? v % 72 : v - 110);
}

/* Any instruction set; for one input of eight the scalar one, whose vectors are checked in calls of the sanitizer. */
static const qins_kernels *take_some_kernels(input *in)
{
    const size_t v = take(in, 1), vectors = qins_isa_count() - 1;
    return qins_isa_at(v >= 224 || vectors == 0 ? vectors : v % vectors);
}

/* Tokens of each sequence: mostly few */
static size_t take_tokens(input *in, size_t most)
{
    const size_t v = take(in, 1);
    return 1 + (v < 224 ? v % 4 : v) % most;
}

/* Tokens before these: mostly few, sometimes more than a span of attention */
static size_t take_past(input *in)
{
    const size_t v = take(in, 1);
    return v < 248 ? v % 70 : 200 + (v - 248) * 20;
}

/* A product of rows x cols. Its bias, if there is one, is any floats. */
static qins_decoder_product take_product(input *in, size_t rows, size_t cols)
{
    qins_decoder_product p = {.codes = take_shape(in)};
    take_scalars(in, &p.codes, take(in, 1) & 1);
    p.codes.rows = rows;
    p.codes.cols = cols;
    if (is_packed(p.codes.codec) && cols % 8 != 0) {
        p.codes.codec = QINS_log8;
    }
    take_fields(in, &p.codes, 0, 3 * (in->left / 4));
    p.bias = take(in, 1) & 1 ? filled(in, rows * sizeof(float), 0, 3 * (in->left / 4)) : NULL;
    return p;
}

static const float *take_norm(input *in, size_t n)
{
    return take(in, 1) & 1 ? filled(in, n * sizeof(float), 0, 3 * (in->left / 4)) : NULL;
}

static void take_products(input *in, qins_decoder_layer *l, uint32_t flags)
{
    const size_t q = l->heads * l->head_dim, kv = l->kv_heads * l->head_dim;
    if (flags & 1) { /* fused */
        l->q = take_product(in, q + 2 * kv, l->hidden);
    } else {
        l->q = take_product(in, q, l->hidden);
        l->k = take_product(in, kv, l->hidden);
        l->v = take_product(in, kv, l->hidden);
    }
    l->o = take_product(in, l->hidden, q);
    if (flags & 2) {
        l->gate = take_product(in, flags & 1 ? 2 * l->inner : l->inner, l->hidden);
        if (!(flags & 1)) {
            l->up = take_product(in, l->inner, l->hidden);
        }
        l->down = take_product(in, l->hidden, l->inner);
    }
}

/* Keys or values: `rows` of `dim` elements, kept in any way. */
static qins_decoder_store take_store(input *in, size_t rows, size_t dim, size_t item)
{
    qins_decoder_store s = {.kind = (qins_store_kind)(take(in, 1) % QINS_STORE_COUNT)};
    static const size_t BITS[] = {[QINS_STORE_LOG6] = 6, [QINS_STORE_LOG5] = 5, [QINS_STORE_LOG4] = 4};
    const size_t size = s.kind == QINS_STORE_FLOATS ? item : s.kind == QINS_STORE_FLOAT16 ? 2 : 1;
    s.kind = s.kind > QINS_STORE_LOG8 && dim % 8 != 0 ? QINS_STORE_LOG8 : s.kind;
    s.data = filled(in, s.kind > QINS_STORE_LOG8 ? rows * dim / 8 * BITS[s.kind] : rows * dim * size, 0, in->left / 2);
    if (s.kind == QINS_STORE_GOLDEN) {
        s.second = filled(in, rows * dim, 0, in->left / 2);
        s.third = filled(in, rows * 2 * sizeof(float), 0, in->left / 2);
    } else if (s.kind >= QINS_STORE_LOG8) {
        s.second = filled(in, rows * sizeof(uint16_t), 0, in->left / 2);
        s.third = filled(in, rows * ceil_div(dim, QINS_CACHE_GROUP), 0, in->left / 2);
    }
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const size_t DIM[] = {2, 4, 8, 16, 64, 80, 128, 512};
    input in = {data, size};
    const qins_kernels *k = take_some_kernels(&in);
    const uint32_t flags = take(&in, 1);
    qins_decoder_layer l = {.norm_heads = flags >> 2 & 1, .activation = (qins_activation)(flags >> 3 & 1)};
    l.kv_heads = 1 + take(&in, 1) % 2;
    l.heads = l.kv_heads * (1 + take(&in, 1) % 10);
    l.head_dim = DIM[take(&in, 1) % 8];
    if (l.head_dim > 80) {
        l.heads = l.kv_heads;
    }
    l.hidden = take_width(&in);
    l.inner = take_width(&in);
    if (take(&in, 1) & 1) { /* as packed codes need them */
        l.hidden = (l.hidden + 7) / 8 * 8;
        l.inner = (l.inner + 7) / 8 * 8;
    }
    l.epsilon = take_float(&in);
    l.head_epsilon = take_float(&in);
    l.scaling = take_float(&in);
    l.softcap = take_float(&in);
    l.residual = take_float(&in);
    take_products(&in, &l, flags);
    const size_t sequences = 1 + take(&in, 1) % 4, most = MOST_ROWS / sequences;
    /* two threads for few: one that waits for the other takes the time of a run */
    const int masked = flags >> 4 & 1, threads = 1 + ((flags >> 5 & 1) != 0 && sequences == 3);
    const size_t tokens = masked ? take_tokens(&in, most) : 1, past = take_past(&in), total = past + tokens;
    qins_decoder_call call = {.sequences = sequences, .tokens = tokens, .past = past, .mask_is_bool = flags >> 6 & 1};
    call.dtype = (qins_dtype)(take(&in, 1) % 4);
    call.room = total + take(&in, 1) % 5;
    call.rotary_dim = take(&in, 1) % (l.head_dim / 2 + 1) * 2;
    call.rotary_next = flags >> 7 ? tokens * call.rotary_dim : 0;
    const size_t item = item_size(call.dtype), turns = (flags >> 7 ? sequences : 1) * tokens * call.rotary_dim;
    const size_t kept = sequences * l.kv_heads * call.room;
    l.before_attention = take_norm(&in, l.hidden);
    l.after_attention = take_norm(&in, l.hidden);
    l.before_mlp = take_norm(&in, l.hidden);
    l.after_mlp = take_norm(&in, l.hidden);
    l.q_norm = take_norm(&in, l.norm_heads ? l.head_dim : l.heads * l.head_dim);
    l.k_norm = take_norm(&in, l.norm_heads ? l.head_dim : l.kv_heads * l.head_dim);
    l.sinks = take_norm(&in, l.heads);
    call.cos = filled(&in, turns * item, 0, in.left / 2);
    call.sin = filled(&in, turns * item, 0, in.left / 2);
    static qins_cache_tables tables[QINS_CODEC_COUNT]; /* the same for each input */
    for (int i = 0; tables[QINS_log4].nearest.top == 0 && i < QINS_CODEC_COUNT; i++) {
        if (log_bits((qins_codec)i) > 0) {
            qins_cache_tables_build(&tables[i], (qins_codec)i, 2.5f);
        }
    }
    call.tables = tables;
    call.keys = take_store(&in, kept, l.head_dim, item);
    call.values = take_store(&in, kept, l.head_dim, item);
    call.x = filled(&in, sequences * tokens * l.hidden * item, 0, in.left / 2);
    call.y = take(&in, 1) & 1 ? (void *)call.x : room_at(sequences * tokens * l.hidden * item, 0);
    call.mask_token = total;
    call.mask_sequence = tokens * total;
    call.mask = masked ? filled(&in, sequences * tokens * total * (call.mask_is_bool ? 1 : item), 0, 0) : NULL;
    must(qins_decode_layer(k, &l, &call, threads) >= 0, "memory of a layer");
    release_all();
    return 0;
}
