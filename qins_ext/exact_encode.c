/* Writing streams of residuals; see exact.h. */
#include <stdatomic.h>
#include <stdlib.h>

#include "poll.h"
#include "residuals.h"

enum { SAMPLE = 1 << 17 }; /* weights whose residuals are counted */

typedef struct {
    qins_residuals r;
    const uint16_t *w;
    uint32_t entry[QINS_EXACT_TABLES * 256]; /* see qins_recording */
    uint64_t inverse[QINS_RANS_SLOTS + 1];
    uint8_t **block; /* allocated */
    uint32_t *words, *bits;
    atomic_int failed;
} encoding;

static void count_symbols(const encoding *c, uint32_t count[QINS_EXACT_TABLES][256])
{
    const qins_residuals *r = &c->r;
    const size_t rows = r->e->rows, cols = r->e->cols, sampled = SAMPLE / cols > 0 ? SAMPLE / cols : 1;
    for (size_t row = 0; row < rows; row += ceil_div(rows, sampled)) {
        for (size_t k = 0; k < cols; k += QINS_WINDOW) {
            uint16_t decoded[QINS_WINDOW];
            uint8_t room[QINS_WINDOW];
            const size_t n = least(cols - k, QINS_WINDOW);
            const uint16_t *w = c->w + row * cols + k;
            const uint8_t *codes = qins_residuals_window(r, row, k, n, decoded, room);
            for (size_t i = 0; i < n; i++) {
                uint32_t low, scheme = scheme_at(r, codes[i], decoded[i]);
                count[exact_table(scheme)][exact_symbol(scheme, w[i], decoded[i], &low)]++;
            }
        }
    }
}

static void record_row(const encoding *c, size_t row, qins_recording *b, uint32_t *entry)
{
    const qins_residuals *r = &c->r;
    const size_t cols = r->e->cols;
    for (size_t k = 0; k < cols; k += QINS_WINDOW, entry += QINS_WINDOW) {
        uint16_t decoded[QINS_WINDOW];
        uint8_t room[QINS_WINDOW];
        const size_t n = least(cols - k, QINS_WINDOW);
        const uint16_t *w = c->w + row * cols + k;
        const uint8_t *codes = qins_residuals_window(r, row, k, n, decoded, room);
        size_t i = r->from.kernels->record ? r->from.kernels->record(b, decoded, codes, w, n, entry) : 0;
        for (; i < n; i++) {
            entry[i] = exact_record(b, scheme_at(r, codes[i], decoded[i]), w[i], decoded[i]);
        }
    }
}

static void encode_block(encoding *c, size_t index)
{
    const size_t cols = c->r.e->cols, first = index * c->r.block_rows;
    const size_t rows = least(c->r.block_rows, c->r.e->rows - first), n = rows * cols;
    /* entries, bits, words: at most 2 bytes of these per weight */
    uint8_t *room = qins_scratch_take(4 * n + (2 * n + 4) + (2 * n + 2));
    if (room == NULL) {
        atomic_store(&c->failed, 1);
        return;
    }
    uint32_t *entry = (uint32_t *)(void *)room, state[QINS_RANS_LANES];
    qins_recording b = {.scheme = c->r.scheme, .entry = c->entry, .bits = room + 4 * n};
    b.mantissa_bits = c->r.mantissa_bits;
    b.level_mask = c->r.level_mask;
    for (size_t row = 0; row < rows; row++) {
        record_row(c, first + row, &b, entry + row * cols);
    }
    for (; b.pending_count > 0; b.pending_count -= 8, b.pending >>= 8) {
        b.bits[b.bits_bytes++] = (uint8_t)b.pending;
    }
    for (int lane = 0; lane < QINS_RANS_LANES; lane++) {
        state[lane] = QINS_RANS_START;
    }
    const uint8_t *end = room + 8 * n + 6;
    uint8_t *words = room + 8 * n + 6;
    for (size_t row = rows; row-- > 0;) {
        for (size_t k = cols; k-- > 0;) {
            words = rans_put(&state[k % QINS_RANS_LANES], c->inverse, entry[row * cols + k], words);
        }
    }
    const size_t size = (size_t)(end - words);
    uint8_t *out = malloc(QINS_EXACT_STATES + size + b.bits_bytes);
    if (out == NULL) {
        atomic_store(&c->failed, 1);
    } else {
        for (int lane = 0; lane < QINS_RANS_LANES; lane++) {
            put32(out + 4 * lane, state[lane]);
        }
        memcpy(out + QINS_EXACT_STATES, words, size);
        memcpy(out + QINS_EXACT_STATES + size, b.bits, b.bits_bytes);
    }
    c->block[index] = out;
    c->words[index] = (uint32_t)(size / 2);
    c->bits[index] = (uint32_t)b.bits_bytes;
    qins_scratch_give(room);
}

static void encode_blocks(void *context, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++) {
        encode_block(context, i);
    }
}

/* Header, tables and index; returns their end. */
static uint8_t *put_beginning(const encoding *c, const uint8_t *tables, size_t bytes, uint8_t *out)
{
    const qins_residuals *r = &c->r;
    memcpy(out, "qex1", 4);
    put32(out + 4, r->dtype == QINS_F16 ? 1 : 2);
    put64(out + 8, r->e->rows);
    put64(out + 16, r->e->cols);
    put32(out + 24, (uint32_t)r->block_rows);
    put32(out + 28, (uint32_t)r->blocks);
    memcpy(out + QINS_EXACT_HEADER, tables, bytes);
    out += QINS_EXACT_HEADER + bytes;
    for (size_t i = 0; i < r->blocks; i++, out += 8) {
        put32(out, c->words[i]);
        put32(out + 4, c->bits[i]);
    }
    return out;
}

static qins_exact_result encode_all(encoding *c, int threads, uint8_t **stream, size_t *bytes)
{
    const qins_residuals *r = &c->r;
    uint32_t (*count)[256] = calloc(QINS_EXACT_TABLES, sizeof *count);
    if (count == NULL || c->block == NULL || c->words == NULL || c->bits == NULL) {
        free(count);
        return QINS_EXACT_NO_MEMORY;
    }
    uint8_t tables[QINS_EXACT_TABLES * 258];
    size_t tables_bytes = 0;
    if (r->blocks > 0) {
        count_symbols(c, count);
    }
    for (int t = 0; t < QINS_EXACT_TABLES; t++) {
        qins_rans_table table;
        tables_bytes += qins_rans_describe(count[t], tables + tables_bytes, &table);
        for (int symbol = 0; symbol < 256; symbol++) {
            const uint32_t frequency = table.frequency[symbol], slot = table.first[symbol];
            c->entry[256 * t + symbol] = frequency > 0 ? frequency | slot << 16 : 0;
        }
    }
    free(count);
    qins_rans_inverses(c->inverse);
    qins_parallel(r->blocks, 1, threads, encode_blocks, c);
    if (qins_stopped()) { /* some blocks are missing */
        return QINS_EXACT_NO_MEMORY;
    }
    *bytes = QINS_EXACT_HEADER + tables_bytes + 8 * r->blocks;
    for (size_t i = 0; i < r->blocks; i++) {
        *bytes += QINS_EXACT_STATES + 2 * (size_t)c->words[i] + c->bits[i];
    }
    *stream = atomic_load(&c->failed) ? NULL : malloc(*bytes);
    if (*stream == NULL) {
        return QINS_EXACT_NO_MEMORY;
    }
    uint8_t *out = put_beginning(c, tables, tables_bytes, *stream);
    for (size_t i = 0; i < r->blocks; i++) {
        const size_t size = QINS_EXACT_STATES + 2 * (size_t)c->words[i] + c->bits[i];
        memcpy(out, c->block[i], size);
        out += size;
    }
    return QINS_EXACT_OK;
}

qins_exact_result qins_exact_encode(const qins_kernels *kernels, const qins_codes *e, const uint16_t *w,
                                    qins_dtype dtype, int threads, uint8_t **stream, size_t *bytes)
{
    encoding c;
    qins_residuals_init(&c.r, kernels, e, dtype);
    const size_t room = c.r.blocks + 1; /* calloc may return NULL for 0 */
    c.w = w;
    c.block = calloc(room, sizeof *c.block);
    c.words = calloc(room, sizeof *c.words);
    c.bits = calloc(room, sizeof *c.bits);
    atomic_init(&c.failed, 0);
    const qins_exact_result result = encode_all(&c, threads, stream, bytes);
    for (size_t i = 0; c.block != NULL && i < c.r.blocks; i++) {
        free(c.block[i]);
    }
    free(c.block);
    free(c.words);
    free(c.bits);
    return result;
}
