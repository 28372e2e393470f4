/* Reading streams of residuals; see exact.h. */
#include <stdatomic.h>
#include <stdlib.h>

#include "residuals.h"

typedef struct {
    qins_residuals r;
    uint32_t *slots;      /* of all tables */
    const uint8_t *index; /* words and bytes of bits of each block */
    const uint8_t *data;
    size_t *begin; /* of each block, in data */
    uint16_t *w;
    atomic_int damaged;
} decoding;

/* Restores weights [i, n) of a row; returns 0 if the words ended. */
static int restore_rest(qins_restoring *b, const uint16_t *decoded, const uint8_t *codes, size_t i, size_t n,
                        uint16_t *w)
{
    for (; i < n; i++) {
        const uint32_t scheme = exact_scheme(b->scheme, codes[i] & b->level_mask, decoded[i], b->mantissa_bits);
        uint32_t *state = &b->state[i % QINS_RANS_LANES];
        const uint8_t symbol = rans_symbol(state, b->slots + (scheme & 0xffff));
        if (*state < QINS_RANS_START) {
            if (b->end - b->words < 2) {
                return 0;
            }
            *state = *state << 16 | (uint32_t)(b->words[0] | b->words[1] << 8);
            b->words += 2;
        }
        w[i] = exact_bits(exact_next(b, scheme, symbol, decoded[i]), decoded[i]);
    }
    return 1;
}

static int decode_block(const decoding *c, size_t index)
{
    const qins_residuals *r = &c->r;
    const size_t cols = r->e->cols, first = index * r->block_rows, rows = least(r->block_rows, r->e->rows - first);
    const uint8_t *data = c->data + c->begin[index], *sizes = c->index + 8 * index;
    qins_restoring b = {.words = data + QINS_EXACT_STATES, .slots = c->slots, .scheme = r->scheme};
    b.end = b.bits = b.words + 2 * (size_t)get32(sizes);
    b.bits_bytes = get32(sizes + 4);
    b.mantissa_bits = r->mantissa_bits;
    b.level_mask = r->level_mask;
    for (int lane = 0; lane < QINS_RANS_LANES; lane++) {
        b.state[lane] = get32(data + 4 * lane);
    }
    for (size_t row = first; row < first + rows; row++) {
        for (size_t k = 0; k < cols; k += QINS_WINDOW) {
            uint16_t decoded[QINS_WINDOW];
            uint8_t room[QINS_WINDOW];
            const size_t n = least(cols - k, QINS_WINDOW);
            const uint8_t *codes = qins_residuals_window(r, row, k, n, decoded, room);
            uint16_t *w = c->w + row * cols + k;
            const size_t done = r->from.kernels->restore ? r->from.kernels->restore(&b, decoded, codes, n, w) : 0;
            if (!restore_rest(&b, decoded, codes, done, n, w)) {
                return 0;
            }
        }
    }
    uint32_t wrong = 0;
    for (int lane = 0; lane < QINS_RANS_LANES; lane++) {
        wrong |= b.state[lane] ^ QINS_RANS_START;
    }
    return b.words == b.end && (b.at + 7) / 8 == b.bits_bytes && wrong == 0;
}

static void decode_blocks(void *context, size_t from, size_t to)
{
    decoding *c = context;
    for (size_t i = from; i < to; i++) {
        if (!decode_block(c, i)) {
            atomic_store(&c->damaged, 1);
        }
    }
}

/* Checks the header, the tables and the sizes of all blocks, and sets where these begin. */
static qins_exact_result open_stream(decoding *c, const uint8_t *stream, size_t bytes)
{
    const qins_residuals *r = &c->r;
    if (bytes < QINS_EXACT_HEADER || memcmp(stream, "qex1", 4) != 0 ||
        get32(stream + 4) != (r->dtype == QINS_F16 ? 1 : 2) || get64(stream + 8) != r->e->rows ||
        get64(stream + 16) != r->e->cols || get32(stream + 24) != r->block_rows || get32(stream + 28) != r->blocks) {
        return QINS_EXACT_DAMAGED;
    }
    size_t at = QINS_EXACT_HEADER;
    for (int t = 0; t < QINS_EXACT_TABLES; t++) {
        qins_rans_table table;
        const size_t taken = qins_rans_read(stream + at, bytes - at, &table);
        if (taken == 0) {
            return QINS_EXACT_DAMAGED;
        }
        qins_rans_slots(&table, c->slots + (size_t)t * QINS_RANS_SLOTS);
        at += taken;
    }
    if (bytes - at < 8 * r->blocks) {
        return QINS_EXACT_DAMAGED;
    }
    c->index = stream + at;
    c->data = stream;
    at += 8 * r->blocks;
    for (size_t i = 0; i < r->blocks; i++) {
        const size_t size = QINS_EXACT_STATES + 2 * (size_t)get32(c->index + 8 * i) + get32(c->index + 8 * i + 4);
        if (bytes - at < size) {
            return QINS_EXACT_DAMAGED;
        }
        c->begin[i] = at;
        at += size;
    }
    return at == bytes ? QINS_EXACT_OK : QINS_EXACT_DAMAGED;
}

qins_exact_result qins_exact_decode(const qins_kernels *kernels, const qins_codes *e, const uint8_t *stream,
                                    size_t bytes, qins_dtype dtype, int threads, uint16_t *w)
{
    decoding c;
    qins_residuals_init(&c.r, kernels, e, dtype);
    c.w = w;
    c.slots = qins_scratch_take(sizeof(uint32_t) * QINS_EXACT_TABLES * QINS_RANS_SLOTS);
    c.begin = calloc(c.r.blocks + 1, sizeof *c.begin);
    atomic_init(&c.damaged, 0);
    qins_exact_result result = QINS_EXACT_NO_MEMORY;
    if (c.slots != NULL && c.begin != NULL) {
        result = open_stream(&c, stream, bytes);
    }
    if (result == QINS_EXACT_OK) {
        qins_parallel(c.r.blocks, 1, threads, decode_blocks, &c);
        result = atomic_load(&c.damaged) ? QINS_EXACT_DAMAGED : QINS_EXACT_OK;
    }
    if (c.slots != NULL) {
        qins_scratch_give(c.slots);
    }
    free(c.begin);
    return result;
}
