/* Streams of residuals; see exact.h. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "exact.h"
#include "packed.h"
#include "rans.h"
#include "reader.h"

enum {
    HEADER = 32,
    BLOCK = 65536,    /* weights of a block, in whole rows */
    SAMPLE = 1 << 17, /* weights whose residuals are counted */
    LANES_BYTES = 4 * QINS_RANS_LANES
};

typedef struct {
    const qins_codes *e;
    qins_dtype dtype;
    int mantissa_bits;
    uint8_t level_mask;
    qins_decoder from;
    uint32_t scheme[256 * 8]; /* see qins_restoring */
    size_t block_rows, blocks;
} residuals;

static uint32_t get32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get64(const uint8_t *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }

static void put32(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(v >> 8 * i);
    }
}

static void put64(uint8_t *p, uint64_t v)
{
    put32(p, (uint32_t)v);
    put32(p + 4, (uint32_t)(v >> 32));
}

/* Quarter octaves of a distance of 1 or more; of enormous ones, about as many */
static int quarters(double distance)
{
    static const double quarter[] = {1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429};
    int octave = 0, q = 3;
    for (; distance >= 2.0 && octave < 32; octave++) {
        distance *= 0.5;
    }
    while (q > 0 && distance < quarter[q]) {
        q--;
    }
    return 4 * octave + q;
}

/* How to code the residual of a code whose neighbors are `distance` numbers away; 0: of a code that stands for 0 */
static uint32_t scheme_of(double distance, int mantissa_bits)
{
    if (distance <= 0.0) {
        return QINS_EXACT_ZERO * QINS_RANS_SLOTS | (uint32_t)mantissa_bits << 16; /* the symbol is the exponent */
    }
    const int q = quarters(distance), octaves = QINS_EXACT_CODED / 4;
    const int shift = q < QINS_EXACT_CODED ? 0 : q / 4 - octaves + 1;
    return (uint32_t)(q - 4 * shift) * QINS_RANS_SLOTS | (uint32_t)(shift < 15 ? shift : 15) << 16;
}

/* Sets the schemes of all levels, from half the distance between the two neighbors of each. */
static void classify(residuals *r)
{
    const qins_codec codec = r->e->codec;
    const int golden = codec == QINS_golden || codec == QINS_log9, packed = is_packed(codec);
    const int top = golden ? 255 : packed ? 128 : 127, step = packed ? 1 << (8 - log_bits(codec)) : 1;
    const float *value = r->from.table;
    memset(r->scheme, 0, sizeof r->scheme);
    r->level_mask = golden ? 255 : 127;
    for (int p = 0; p <= top; p += step) {
        const int level = p < 128 || golden ? p : 127; /* of packed codes, 127 stands for 128 */
        const int below = p - step < 0 ? p : p - step, above = p + step > top ? p : p + step;
        const double low = (double)value[below], high = (double)value[above < 128 || golden ? above : 127];
        const double spacing = fabs(high - low) * step / (above - below), v = (double)value[level];
        for (int m = 0; m < 8; m++) {
            const double numbers = v > 0.0 ? spacing / v * (double)(1 << r->mantissa_bits) * (8.5 + m) / 8.0 : 0.0;
            r->scheme[8 * level + m] = scheme_of(v > 0.0 ? fmax(numbers, 1.0) : 0.0, r->mantissa_bits);
        }
    }
}

static void begin(residuals *r, const qins_kernels *kernels, const qins_codes *e, qins_dtype dtype)
{
    r->e = e;
    r->dtype = dtype;
    r->mantissa_bits = dtype == QINS_F16 ? 10 : 7;
    qins_decoder_init(&r->from, kernels, e);
    classify(r);
    r->block_rows = e->cols < BLOCK && e->cols > 0 ? BLOCK / e->cols : 1;
    r->blocks = e->cols > 0 ? ceil_div(e->rows, r->block_rows) : 0;
}

static uint32_t scheme_at(const residuals *r, uint8_t code, uint16_t decoded)
{
    return exact_scheme(r->scheme, code & r->level_mask, decoded, r->mantissa_bits);
}

/* Dequantizes n <= QINS_WINDOW weights from column k, a multiple of QINS_WINDOW. Returns their codes, a byte each;
 * `room` is for n rounded up to 64. */
static const uint8_t *window(const residuals *r, size_t row, size_t k, size_t n, uint16_t *decoded, uint8_t *room)
{
    float value[QINS_WINDOW];
    qins_decode_span(&r->from, row, k, n, value);
    r->from.kernels->narrow[r->dtype](value, n, decoded);
    if (!is_packed(r->e->codec)) {
        return r->e->codes + row * r->e->cols + k;
    }
    qins_unpack(r->from.kernels, r->e, row, k, n, room);
    return room;
}

/* -- encoding ------------------------------------------------------------------------------------- */

typedef struct {
    residuals r;
    const uint16_t *w;
    uint32_t entry[QINS_EXACT_TABLES * 256]; /* see qins_recording */
    uint64_t inverse[QINS_RANS_SLOTS + 1];
    uint8_t **block; /* allocated */
    uint32_t *words, *bits;
    atomic_int failed;
} encoding;

static void count_symbols(const encoding *c, uint32_t count[QINS_EXACT_TABLES][256])
{
    const residuals *r = &c->r;
    const size_t rows = r->e->rows, cols = r->e->cols, sampled = SAMPLE / cols > 0 ? SAMPLE / cols : 1;
    for (size_t row = 0; row < rows; row += ceil_div(rows, sampled)) {
        for (size_t k = 0; k < cols; k += QINS_WINDOW) {
            uint16_t decoded[QINS_WINDOW];
            uint8_t room[QINS_WINDOW];
            const size_t n = least(cols - k, QINS_WINDOW);
            const uint16_t *w = c->w + row * cols + k;
            const uint8_t *codes = window(r, row, k, n, decoded, room);
            for (size_t i = 0; i < n; i++) {
                uint32_t low, scheme = scheme_at(r, codes[i], decoded[i]);
                count[exact_table(scheme)][exact_symbol(scheme, w[i], decoded[i], &low)]++;
            }
        }
    }
}

static void record_row(const encoding *c, size_t row, qins_recording *b, uint32_t *entry)
{
    const residuals *r = &c->r;
    const size_t cols = r->e->cols;
    for (size_t k = 0; k < cols; k += QINS_WINDOW, entry += QINS_WINDOW) {
        uint16_t decoded[QINS_WINDOW];
        uint8_t room[QINS_WINDOW];
        const size_t n = least(cols - k, QINS_WINDOW);
        const uint16_t *w = c->w + row * cols + k;
        const uint8_t *codes = window(r, row, k, n, decoded, room);
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
    uint8_t *out = malloc(LANES_BYTES + size + b.bits_bytes);
    if (out == NULL) {
        atomic_store(&c->failed, 1);
    } else {
        for (int lane = 0; lane < QINS_RANS_LANES; lane++) {
            put32(out + 4 * lane, state[lane]);
        }
        memcpy(out + LANES_BYTES, words, size);
        memcpy(out + LANES_BYTES + size, b.bits, b.bits_bytes);
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
    const residuals *r = &c->r;
    memcpy(out, "qex1", 4);
    put32(out + 4, r->dtype == QINS_F16 ? 1 : 2);
    put64(out + 8, r->e->rows);
    put64(out + 16, r->e->cols);
    put32(out + 24, (uint32_t)r->block_rows);
    put32(out + 28, (uint32_t)r->blocks);
    memcpy(out + HEADER, tables, bytes);
    out += HEADER + bytes;
    for (size_t i = 0; i < r->blocks; i++, out += 8) {
        put32(out, c->words[i]);
        put32(out + 4, c->bits[i]);
    }
    return out;
}

static qins_exact_result encode_all(encoding *c, int threads, uint8_t **stream, size_t *bytes)
{
    const residuals *r = &c->r;
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
    *bytes = HEADER + tables_bytes + 8 * r->blocks;
    for (size_t i = 0; i < r->blocks; i++) {
        *bytes += LANES_BYTES + 2 * (size_t)c->words[i] + c->bits[i];
    }
    *stream = atomic_load(&c->failed) ? NULL : malloc(*bytes);
    if (*stream == NULL) {
        return QINS_EXACT_NO_MEMORY;
    }
    uint8_t *out = put_beginning(c, tables, tables_bytes, *stream);
    for (size_t i = 0; i < r->blocks; i++) {
        const size_t size = LANES_BYTES + 2 * (size_t)c->words[i] + c->bits[i];
        memcpy(out, c->block[i], size);
        out += size;
    }
    return QINS_EXACT_OK;
}

qins_exact_result qins_exact_encode(const qins_kernels *kernels, const qins_codes *e, const uint16_t *w,
                                    qins_dtype dtype, int threads, uint8_t **stream, size_t *bytes)
{
    encoding c;
    begin(&c.r, kernels, e, dtype);
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

/* -- decoding ------------------------------------------------------------------------------------- */

typedef struct {
    residuals r;
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
    const residuals *r = &c->r;
    const size_t cols = r->e->cols, first = index * r->block_rows, rows = least(r->block_rows, r->e->rows - first);
    const uint8_t *data = c->data + c->begin[index], *sizes = c->index + 8 * index;
    qins_restoring b = {.words = data + LANES_BYTES, .slots = c->slots, .scheme = r->scheme};
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
            const uint8_t *codes = window(r, row, k, n, decoded, room);
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
    const residuals *r = &c->r;
    if (bytes < HEADER || memcmp(stream, "qex1", 4) != 0 || get32(stream + 4) != (r->dtype == QINS_F16 ? 1 : 2) ||
        get64(stream + 8) != r->e->rows || get64(stream + 16) != r->e->cols || get32(stream + 24) != r->block_rows ||
        get32(stream + 28) != r->blocks) {
        return QINS_EXACT_DAMAGED;
    }
    size_t at = HEADER;
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
        const size_t size = LANES_BYTES + 2 * (size_t)get32(c->index + 8 * i) + get32(c->index + 8 * i + 4);
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
    begin(&c.r, kernels, e, dtype);
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
