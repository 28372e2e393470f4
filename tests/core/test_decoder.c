/* Tests of decoder layers on every instruction set, against plain loops in double precision. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "between.h"
#include "decoder.h"
#include "packed.h"
#include "sizes.h"
#include "test_decoder.h"

enum { HIDDEN = 48, HEADS = 6, KV_HEADS = 2, DIM = 24, INNER = 70, ROOM = 600, ROTARY = 12, MOST_ROWS = 8 };

static uint32_t seed = 1;

static float random_float(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) * 0x1p-23f - 1.0f;
}

static void fill(float *x, size_t n, float middle, float width)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = middle + width * random_float();
    }
}

/* Codes of a random matrix, and its dequantized values; packed ones only where the columns allow it. */
typedef struct {
    qins_codes e;
    double *values;
} matrix;

static matrix random_matrix(const qins_kernels *k, qins_codec codec, size_t rows, size_t cols, size_t group_size)
{
    codec = cols % 8 == 0 ? codec : QINS_log8;
    float *w = malloc(rows * cols * sizeof *w);
    matrix m = {.e = {.codec = codec, .rows = rows, .cols = cols, .group_size = group_size, .mu = -1.0f}};
    fill(w, rows * cols, 0.0f, 0.2f);
    m.e.codes = malloc(rows * cols);
    m.e.scale = malloc(rows * sizeof(float));
    m.e.group_scale = group_size ? malloc(rows * ((cols + group_size - 1) / group_size)) : NULL;
    const qins_matrix whole = {w, QINS_F32, rows, cols, (ptrdiff_t)(cols * sizeof *w), sizeof *w};
    qins_encode(k, &whole, NULL, 1, &m.e);
    qins_decode(k, &m.e, 0, rows, 0, cols, 1, QINS_F32, w, cols);
    m.values = malloc(rows * cols * sizeof *m.values);
    for (size_t i = 0; i < rows * cols; i++) {
        m.values[i] = (double)w[i];
    }
    free(w);
    return m;
}

static void release(matrix *m)
{
    free(m->e.codes);
    free(m->e.scale);
    free(m->e.group_scale);
    free(m->values);
}

static void slow_product(const matrix *m, const float *bias, const double *x, double *y)
{
    for (size_t row = 0; row < m->e.rows; row++) {
        y[row] = bias != NULL ? (double)bias[row] : 0.0;
        for (size_t i = 0; i < m->e.cols; i++) {
            y[row] += m->values[row * m->e.cols + i] * x[i];
        }
    }
}

static void slow_norm(const double *x, size_t n, const float *weight, double epsilon, double *y)
{
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    for (size_t i = 0; i < n; i++) {
        y[i] = weight != NULL ? (double)weight[i] * x[i] / sqrt(sum / (double)n + epsilon) : x[i];
    }
}

static void slow_rotation(double *head, const float *cosine, const float *sine)
{
    for (size_t i = 0; i < ROTARY / 2; i++) {
        const double a = head[i], b = head[ROTARY / 2 + i];
        head[i] = a * (double)cosine[i] - b * (double)sine[i];
        head[ROTARY / 2 + i] = b * (double)cosine[ROTARY / 2 + i] + a * (double)sine[ROTARY / 2 + i];
    }
}

typedef struct {
    matrix qkv, o, gate, up, down;
    float bias[(HEADS + 2 * KV_HEADS) * DIM], before[HIDDEN], after[HIDDEN], before_mlp[HIDDEN], of_heads[DIM],
        sinks[HEADS];
    qins_decoder_layer layer;
} setup;

/* Runs one row through the layer. The caches have keys and values of all earlier tokens; this adds the row's own,
 * unless they are there. */
static void slow_row(const setup *s, const qins_decoder_call *call, size_t sequence, size_t token, float *keys,
                     float *values, int there, double *x)
{
    const qins_decoder_layer *l = &s->layer;
    static double normed[HIDDEN], qkv[(HEADS + 2 * KV_HEADS) * DIM], attended[HEADS * DIM], gate[INNER], up[INNER];
    const float *cosine = (const float *)call->cos + sequence * call->rotary_next + token * ROTARY;
    const float *sine = (const float *)call->sin + sequence * call->rotary_next + token * ROTARY;
    const size_t at = call->past + token, total = call->past + call->tokens;
    slow_norm(x, HIDDEN, l->before_attention, (double)l->epsilon, normed);
    slow_product(&s->qkv, s->bias, normed, qkv);
    for (size_t h = 0; h < HEADS + KV_HEADS; h++) {
        slow_norm(qkv + h * DIM, DIM, l->q_norm, (double)l->head_epsilon, qkv + h * DIM);
        slow_rotation(qkv + h * DIM, cosine, sine);
    }
    for (size_t h = 0; !there && h < KV_HEADS; h++) {
        for (size_t i = 0; i < DIM; i++) {
            const size_t to = ((sequence * KV_HEADS + h) * ROOM + at) * DIM + i;
            keys[to] = (float)qkv[(HEADS + h) * DIM + i];
            values[to] = (float)qkv[(HEADS + KV_HEADS + h) * DIM + i];
        }
    }
    for (size_t h = 0; h < HEADS; h++) {
        const size_t from = (sequence * KV_HEADS + h / (HEADS / KV_HEADS)) * ROOM * DIM;
        double score[ROOM], sum = 0.0;
        for (size_t t = 0; t < total; t++) {
            score[t] = 0.0;
            for (size_t i = 0; i < DIM; i++) {
                score[t] += qkv[h * DIM + i] * (double)keys[from + t * DIM + i];
            }
            score[t] = (double)l->softcap * tanh(score[t] * (double)l->scaling / (double)l->softcap);
            const uint8_t *seen = call->mask;
            const int sees = seen == NULL || seen[sequence * call->mask_sequence + token * call->mask_token + t];
            score[t] = sees && t <= at ? exp(score[t]) : 0.0;
            sum += score[t];
        }
        sum += l->sinks != NULL ? exp((double)l->sinks[h]) : 0.0;
        for (size_t i = 0; i < DIM; i++) {
            attended[h * DIM + i] = 0.0;
            for (size_t t = 0; t <= at; t++) {
                attended[h * DIM + i] += score[t] / sum * (double)values[from + t * DIM + i];
            }
        }
    }
    slow_product(&s->o, NULL, attended, normed);
    slow_norm(normed, HIDDEN, l->after_attention, (double)l->epsilon, normed);
    for (size_t i = 0; i < HIDDEN; i++) {
        x[i] += (double)l->residual * normed[i];
    }
    if (l->gate.codes.codes == NULL) {
        return;
    }
    slow_norm(x, HIDDEN, l->before_mlp, (double)l->epsilon, normed);
    slow_product(&s->gate, NULL, normed, gate);
    slow_product(&s->up, NULL, normed, up);
    for (size_t i = 0; i < INNER; i++) {
        const double g = gate[i];
        const double z = l->activation == QINS_SILU ? g : 1.5957691216057308 * (g + 0.044715 * g * g * g);
        gate[i] = g / (1.0 + exp(-z)) * up[i];
    }
    slow_product(&s->down, NULL, gate, normed);
    for (size_t i = 0; i < HIDDEN; i++) {
        x[i] += (double)l->residual * normed[i];
    }
}

/* Whether y is what the row x of a call becomes. */
static int row_is_right(const setup *s, const qins_decoder_call *call, size_t sequence, size_t token, float *keys,
                        float *values, int there, const float *x, const float *y)
{
    double row[HIDDEN], error = 0.0, size = 0.0;
    for (size_t i = 0; i < HIDDEN; i++) {
        row[i] = (double)x[i];
    }
    slow_row(s, call, sequence, token, keys, values, there, row);
    for (size_t i = 0; i < HIDDEN; i++) {
        error += ((double)y[i] - row[i]) * ((double)y[i] - row[i]);
        size += row[i] * row[i];
    }
    return error < 1e-6 * size; /* products of log8: 1e-4 each */
}

/* window: number of keys that the mask lets a query see, its own among them; 0: no mask */
static int layer_is_right(const qins_kernels *k, setup *s, size_t sequences, size_t tokens, size_t past, size_t window)
{
    enum { CACHE = MOST_ROWS * KV_HEADS * ROOM * DIM };
    float *keys = malloc(3 * CACHE * sizeof *keys), *values = malloc(3 * CACHE * sizeof *values);
    float x[MOST_ROWS * HIDDEN], y[2][MOST_ROWS * HIDDEN], turn[2][MOST_ROWS * ROTARY];
    uint8_t mask[MOST_ROWS * ROOM];
    const size_t total = past + tokens, cache = sequences * KV_HEADS * ROOM * DIM;
    fill(keys, CACHE, 0.0f, 1.0f);
    fill(values, CACHE, 0.0f, 1.0f);
    fill(x, sequences * tokens * HIDDEN, 0.0f, 1.0f);
    fill(turn[0], sequences * tokens * ROTARY, 0.0f, 1.0f);
    fill(turn[1], sequences * tokens * ROTARY, 0.0f, 1.0f);
    for (size_t m = 0; m < sequences * tokens; m++) {
        for (size_t t = 0; t < total; t++) {
            const size_t own = past + m % tokens;
            mask[m * total + t] = t <= own && t + window > own && (t % 3 != 1 || t == own);
        }
    }
    for (int i = 1; i < 3; i++) {
        memcpy(keys + i * CACHE, keys, CACHE * sizeof *keys);
        memcpy(values + i * CACHE, values, CACHE * sizeof *values);
    }
    qins_decoder_call call = {
        .dtype = QINS_F32,
        .x = x,
        .sequences = sequences,
        .tokens = tokens,
        .room = ROOM,
        .past = past,
        .cos = turn[0],
        .sin = turn[1],
        .rotary_dim = ROTARY,
        .rotary_next = tokens * ROTARY,
        .mask = window > 0 ? mask : NULL,
        .mask_is_bool = 1,
        .mask_sequence = tokens * total,
        .mask_token = total,
    };
    int right = 1;
    for (int i = 0; i < 2; i++) {
        call.y = y[i];
        call.keys.data = keys + (i + 1) * CACHE;
        call.values.data = values + (i + 1) * CACHE;
        right = right && qins_decode_layer(k, &s->layer, &call, i == 0 ? 1 : 3) == 0;
        /* what follows the sequences stays as it was */
        right = right && memcmp((float *)call.keys.data + cache, keys + cache, (CACHE - cache) * sizeof *keys) == 0;
        right = right && memcmp((float *)call.values.data + cache, values + cache, (CACHE - cache) * sizeof *keys) == 0;
    }
    right = right && memcmp(y[0], y[1], sequences * tokens * HIDDEN * sizeof(float)) == 0;
    right = right && memcmp(keys + CACHE, keys + 2 * CACHE, cache * sizeof *keys) == 0;
    for (size_t m = 0; right && m < sequences * tokens; m++) {
        right = row_is_right(s, &call, m / tokens, m % tokens, keys, values, 0, x + m * HIDDEN, y[0] + m * HIDDEN);
    }
    free(keys);
    free(values);
    return right;
}

/* A paged cache whose slots are in random order, or in order from some slot on for each sequence. */
enum { SLOTS = 3 * ROOM + 5 };

static void random_slots(int64_t *slot, size_t count, int in_order)
{
    int64_t all[SLOTS];
    for (size_t i = 0; i < SLOTS; i++) {
        const size_t j = in_order ? i : (size_t)((random_float() + 1.0f) * 0.5f * (float)i);
        all[i] = all[j];
        all[j] = (int64_t)i;
    }
    memcpy(slot, all + SLOTS - count, count * sizeof *slot);
}

/* Sequences of different lengths in one paged cache. */
static int pages_are_right(const qins_kernels *k, const setup *s, size_t longest, int in_order)
{
    enum { SEQUENCES = 3, CACHE = SLOTS * KV_HEADS * DIM, PLAIN = SEQUENCES * KV_HEADS * ROOM * DIM };
    const size_t past[SEQUENCES] = {longest, longest / 2, 0}; /* the last one is not the longest */
    float *paged[2], *plain[2], x[SEQUENCES * HIDDEN], y[SEQUENCES * HIDDEN], turn[2][SEQUENCES * ROTARY];
    int64_t slot[SLOTS];
    int32_t begin[SEQUENCES + 1] = {0};
    for (size_t i = 0; i < SEQUENCES; i++) {
        begin[i + 1] = begin[i] + (int32_t)past[i] + 1;
    }
    random_slots(slot, (size_t)begin[SEQUENCES], in_order);
    fill(x, SEQUENCES * HIDDEN, 0.0f, 1.0f);
    fill(turn[0], SEQUENCES * ROTARY, 0.0f, 1.0f);
    fill(turn[1], SEQUENCES * ROTARY, 0.0f, 1.0f);
    for (int i = 0; i < 2; i++) {
        paged[i] = malloc(2 * CACHE * sizeof(float));
        plain[i] = malloc(PLAIN * sizeof(float));
        fill(paged[i], CACHE, 0.0f, 1.0f);
        memcpy(paged[i] + CACHE, paged[i], CACHE * sizeof(float));
        for (size_t q = 0; q < SEQUENCES; q++) {
            for (size_t t = 0; t < past[q]; t++) {
                for (size_t h = 0; h < KV_HEADS; h++) {
                    memcpy(plain[i] + ((q * KV_HEADS + h) * ROOM + t) * DIM,
                           paged[i] + ((size_t)slot[(size_t)begin[q] + t] * KV_HEADS + h) * DIM, DIM * sizeof(float));
                }
            }
        }
    }
    qins_decoder_call call = {
        .dtype = QINS_F32,
        .x = x,
        .y = y,
        .sequences = SEQUENCES,
        .tokens = 1,
        .keys = {.data = paged[0]},
        .values = {.data = paged[1]},
        .pages = {slot, begin, (size_t)begin[SEQUENCES], SLOTS},
        .cos = turn[0],
        .sin = turn[1],
        .rotary_dim = ROTARY,
        .rotary_next = ROTARY,
    };
    int right = qins_decode_layer(k, &s->layer, &call, 2) == 0;
    for (size_t q = 0; q < SEQUENCES; q++) { /* all but the new tokens' slots stay as they were */
        for (int i = 0; i < 2; i++) {
            const size_t at = (size_t)slot[begin[q + 1] - 1] * KV_HEADS * DIM;
            memcpy(paged[i] + CACHE + at, paged[i] + at, KV_HEADS * DIM * sizeof(float));
        }
    }
    right = right && memcmp(paged[0], paged[0] + CACHE, CACHE * sizeof(float)) == 0;
    right = right && memcmp(paged[1], paged[1] + CACHE, CACHE * sizeof(float)) == 0;
    for (size_t q = 0; q < SEQUENCES; q++) {
        call.past = past[q];
        right = right && row_is_right(s, &call, q, 0, plain[0], plain[1], 0, x + q * HIDDEN, y + q * HIDDEN);
    }
    /* pages of another cache */
    const float before = y[0];
    slot[1] = SLOTS;
    right = right && qins_decode_layer(k, &s->layer, &call, 1) == 2;
    slot[1] = -1;
    right = right && qins_decode_layer(k, &s->layer, &call, 1) == 2;
    slot[1] = 0;
    call.pages.count--;
    right = right && qins_decode_layer(k, &s->layer, &call, 1) == 2;
    call.pages.count++;
    begin[1] = begin[2];
    right = right && qins_decode_layer(k, &s->layer, &call, 1) == 2;
    begin[0] = -1;
    right = right && qins_decode_layer(k, &s->layer, &call, 1) == 2 && memcmp(&before, y, sizeof before) == 0;
    for (int i = 0; i < 2; i++) {
        free(paged[i]);
        free(plain[i]);
    }
    return right;
}

/* Whether a paged cache of any dtype gives, bit for bit, what the same states one after another do. */
static int pages_change_nothing(const qins_kernels *k, const setup *s, qins_dtype dtype, size_t past, int in_order)
{
    enum { SEQUENCES = 3, ROW = KV_HEADS * DIM };
    const size_t size = item_size(dtype), total = past + 1;
    float x[SEQUENCES * HIDDEN], turn[SEQUENCES * ROTARY], states[ROW];
    double of_x[SEQUENCES * HIDDEN], of_turn[SEQUENCES * ROTARY], y[2][SEQUENCES * HIDDEN]; /* room for any dtype */
    int64_t slot[SLOTS];
    int32_t begin[SEQUENCES + 1];
    char *paged[2], *plain[2];
    for (size_t i = 0; i <= SEQUENCES; i++) {
        begin[i] = (int32_t)(i * total);
    }
    random_slots(slot, SEQUENCES * total, in_order);
    fill(x, SEQUENCES * HIDDEN, 0.0f, 1.0f);
    fill(turn, SEQUENCES * ROTARY, 0.0f, 1.0f);
    k->narrow[dtype](x, SEQUENCES * HIDDEN, of_x);
    k->narrow[dtype](turn, SEQUENCES * ROTARY, of_turn);
    for (int i = 0; i < 2; i++) {
        paged[i] = malloc(SLOTS * ROW * size);
        plain[i] = malloc(SEQUENCES * KV_HEADS * ROOM * DIM * size);
        for (size_t q = 0; q < SEQUENCES; q++) {
            for (size_t t = 0; t < past; t++) {
                char *there = paged[i] + (size_t)slot[q * total + t] * ROW * size;
                fill(states, ROW, 0.0f, 1.0f);
                k->narrow[dtype](states, ROW, there);
                for (size_t h = 0; h < KV_HEADS; h++) {
                    memcpy(plain[i] + ((q * KV_HEADS + h) * ROOM + t) * DIM * size, there + h * DIM * size, DIM * size);
                }
            }
        }
    }
    memset(y, 0, sizeof y);
    qins_decoder_call call = {
        .dtype = dtype,
        .x = of_x,
        .y = y[0],
        .sequences = SEQUENCES,
        .tokens = 1,
        .keys = {.data = plain[0]},
        .values = {.data = plain[1]},
        .room = ROOM,
        .past = past,
        .cos = of_turn,
        .sin = of_turn,
        .rotary_dim = ROTARY,
        .rotary_next = ROTARY,
    };
    int right = qins_decode_layer(k, &s->layer, &call, 1) == 0;
    call.y = y[1];
    call.keys.data = paged[0];
    call.values.data = paged[1];
    call.pages = (qins_decoder_pages){slot, begin, SEQUENCES * total, SLOTS};
    right = right && qins_decode_layer(k, &s->layer, &call, 3) == 0 && memcmp(y[0], y[1], sizeof y[0]) == 0;
    for (int i = 0; i < 2; i++) {
        free(paged[i]);
        free(plain[i]);
    }
    return right;
}

/* A layer whose keys and values are codes, or float16, against one that has the same values as floats. */
static int coded_layer_is_right(const qins_kernels *k, const setup *s, qins_store_kind kind, size_t past)
{
    enum { SEQUENCES = 2, ROWS = SEQUENCES * KV_HEADS * ROOM, BYTES = 4 * ROWS * DIM };
    static const qins_codec CODEC[QINS_STORE_COUNT] = {
        [QINS_STORE_GOLDEN] = QINS_golden, [QINS_STORE_LOG8] = QINS_log8, [QINS_STORE_LOG6] = QINS_log6,
        [QINS_STORE_LOG5] = QINS_log5,     [QINS_STORE_LOG4] = QINS_log4,
    };
    static qins_cache_tables tables[QINS_CODEC_COUNT];
    const size_t total = past + 1, rows = SEQUENCES * KV_HEADS;
    const int is_coded = kind != QINS_STORE_FLOAT16, golden = kind == QINS_STORE_GOLDEN;
    const qins_codec codec = CODEC[kind];
    float x[SEQUENCES * HIDDEN], y[2][SEQUENCES * HIDDEN], turn[SEQUENCES * ROTARY], *plain[2];
    float *dense = malloc(BYTES);
    char *data[2][3];
    qins_decoder_store stores[2];
    qins_cache caches[2];
    if (is_coded && !golden) {
        qins_cache_tables_build(&tables[codec], codec, 3.0f);
    }
    fill(x, SEQUENCES * HIDDEN, 0.0f, 1.0f);
    fill(turn, SEQUENCES * ROTARY, 0.0f, 1.0f);
    int right = 1;
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 3; j++) {
            data[i][j] = calloc(1, BYTES);
        }
        plain[i] = calloc(1, BYTES);
        stores[i] = (qins_decoder_store){kind, data[i][0], data[i][1], data[i][2]};
        caches[i] = (qins_cache){
            .codec = codec,
            .heads = rows,
            .room = ROOM,
            .dim = DIM,
            .codes = (uint8_t *)data[i][0],
            .sign = golden ? (int8_t *)data[i][1] : NULL,
            .range = golden ? (float *)(void *)data[i][2] : NULL,
            .scale = golden ? NULL : (uint16_t *)(void *)data[i][1],
            .group_scale = golden ? NULL : (uint8_t *)data[i][2],
            .tables = &tables[codec],
        };
        fill(dense, rows * past * DIM, 0.0f, 1.0f);
        if (is_coded) {
            right = right && qins_cache_encode(k, &caches[i], dense, QINS_F32, 0, past, 1) == 0;
        }
        for (size_t row = 0; !is_coded && row < rows; row++) {
            k->narrow[QINS_F16](dense + row * past * DIM, past * DIM, data[i][0] + 2 * row * ROOM * DIM);
        }
    }
    qins_decoder_call call = {
        .dtype = QINS_F32,
        .x = x,
        .sequences = SEQUENCES,
        .tokens = 1,
        .keys = stores[0],
        .values = stores[1],
        .tables = tables,
        .room = ROOM,
        .past = past,
        .cos = turn,
        .sin = turn,
        .rotary_dim = ROTARY,
        .rotary_next = ROTARY,
    };
    for (int threads = 1; threads < 4; threads += 2) { /* the new token's keys are written twice */
        call.y = y[threads / 2];
        right = right && qins_decode_layer(k, &s->layer, &call, threads) == 0;
    }
    right = right && memcmp(y[0], y[1], sizeof y[0]) == 0;
    for (int i = 0; i < 2; i++) {
        if (is_coded) {
            qins_cache_decode(k, &caches[i], 0, total, QINS_F32, dense, 1);
        }
        for (size_t row = 0; row < rows; row++) {
            float *to = plain[i] + row * ROOM * DIM;
            if (is_coded) {
                memcpy(to, dense + row * total * DIM, total * DIM * sizeof *to);
            } else {
                k->widen[QINS_F16](data[i][0] + 2 * row * ROOM * DIM, total * DIM, to);
            }
        }
    }
    for (size_t q = 0; q < SEQUENCES; q++) {
        right = right && row_is_right(s, &call, q, 0, plain[0], plain[1], 1, x + q * HIDDEN, y[0] + q * HIDDEN);
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 3; j++) {
            free(data[i][j]);
        }
        free(plain[i]);
    }
    free(dense);
    return right;
}

/* Whether keys that float16 cannot hold are told, and the result left alone. */
static int overflow_is_told(const qins_kernels *k, const setup *s)
{
    qins_decoder_layer layer = s->layer;
    float x[HIDDEN], y[HIDDEN] = {0.0f}, turn[ROTARY] = {0.0f}, large[KV_HEADS * DIM];
    uint16_t keys[KV_HEADS * ROOM * DIM], values[KV_HEADS * ROOM * DIM];
    fill(x, HIDDEN, 0.0f, 1.0f);
    fill(large, KV_HEADS * DIM, 1e6f, 1.0f);
    layer.k.bias = large;
    layer.k_norm = NULL;
    const qins_decoder_call call = {
        .dtype = QINS_F32,
        .x = x,
        .y = y,
        .sequences = 1,
        .tokens = 1,
        .room = ROOM,
        .cos = turn,
        .sin = turn,
        .keys = {.kind = QINS_STORE_FLOAT16, .data = keys},
        .values = {.kind = QINS_STORE_FLOAT16, .data = values},
    };
    int told = qins_decode_layer(k, &layer, &call, 1) == 1;
    for (size_t i = 0; i < HIDDEN; i++) {
        told = told && y[i] == 0.0f;
    }
    return told;
}

static setup *random_setup(const qins_kernels *k, qins_codec codec, size_t group_size, qins_activation activation,
                           int fused)
{
    setup *s = calloc(1, sizeof *s);
    qins_decoder_layer *l = &s->layer;
    s->qkv = random_matrix(k, codec, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, group_size);
    s->o = random_matrix(k, codec, HIDDEN, HEADS * DIM, group_size);
    s->gate = random_matrix(k, codec, INNER, HIDDEN, group_size);
    s->up = random_matrix(k, codec, INNER, HIDDEN, group_size);
    s->down = random_matrix(k, codec, HIDDEN, INNER, group_size);
    fill(s->bias, sizeof s->bias / sizeof(float), 0.0f, 0.3f);
    fill(s->before, HIDDEN, 1.0f, 0.3f);
    fill(s->after, HIDDEN, 1.0f, 0.3f);
    fill(s->before_mlp, HIDDEN, 1.0f, 0.3f);
    fill(s->of_heads, DIM, 1.0f, 0.3f);
    fill(s->sinks, HEADS, 1.0f, 4.0f);
    l->q = (qins_decoder_product){s->qkv.e, s->bias};
    if (!fused) { /* parts of the same matrix, as separate products */
        const size_t groups = group_size ? (HIDDEN + group_size - 1) / group_size : 0, of_q = HEADS * DIM;
        l->q.codes.rows = of_q;
        l->k = l->v = l->q;
        qins_decoder_product *const parts[] = {&l->k, &l->v};
        for (size_t i = 0; i < 2; i++) {
            const size_t row = of_q + i * KV_HEADS * DIM;
            parts[i]->codes.rows = KV_HEADS * DIM;
            parts[i]->codes.codes += row * code_bytes(&s->qkv.e, HIDDEN);
            parts[i]->codes.scale += row;
            parts[i]->codes.group_scale = groups ? parts[i]->codes.group_scale + row * groups : NULL;
            parts[i]->bias += row;
        }
    }
    l->o.codes = s->o.e;
    l->gate.codes = s->gate.e;
    l->up.codes = s->up.e;
    l->down.codes = s->down.e;
    l->hidden = HIDDEN;
    l->heads = HEADS;
    l->kv_heads = KV_HEADS;
    l->head_dim = DIM;
    l->inner = INNER;
    l->before_attention = s->before;
    l->after_attention = fused ? s->after : NULL;
    l->before_mlp = s->before_mlp;
    l->q_norm = l->k_norm = s->of_heads;
    l->norm_heads = 1;
    l->sinks = fused ? NULL : s->sinks;
    l->epsilon = 1e-5f;
    l->head_epsilon = 1e-6f;
    l->scaling = 0.3f;
    l->softcap = 20.0f;
    l->residual = fused ? 0.7f : 1.0f;
    l->activation = activation;
    return s;
}

/* Rotary embedding of every dtype: the same bits as separate products and sums, each rounded; heads lie apart. */
static void check_rotation(const qins_kernels *k, size_t half,
                           void (*check)(int, const char *, const char *, size_t, size_t))
{
    enum { LISTS = 2, TIMES = 5, WIDTH = 3, GAP = 3 };
    const size_t dim = 2 * half, head = dim + GAP, token = WIDTH * head + GAP, sequence = TIMES * token + GAP;
    const size_t all = LISTS * sequence, angles = LISTS * TIMES * dim;
    float *x = malloc((all + 2 * angles) * sizeof *x), *y = malloc(all * sizeof *y), *c = x + all, *s = c + angles;
    char *in = malloc((all + 2 * angles) * sizeof *x), *out = malloc(all * sizeof *x);
    for (int d = 0; d < 3; d++) {
        const size_t size = d == QINS_F32 ? 4 : 2;
        fill(x, all + 2 * angles, 0.1f, 4.0f);
        k->narrow[d](x, all + 2 * angles, in);
        k->widen[d](in, all + 2 * angles, x);
        for (int shared = 0; shared < 2; shared++) {
            const qins_rotation r = {(qins_dtype)d,
                                     in,
                                     in + all * size,
                                     in + (all + angles) * size,
                                     out,
                                     LISTS,
                                     TIMES,
                                     WIDTH,
                                     half,
                                     head,
                                     sequence,
                                     token,
                                     sequence,
                                     token,
                                     shared ? 0 : TIMES * dim};
            memset(out, 0, all * size);
            qins_rotate(k, &r, 1 + 2 * shared);
            k->widen[d](out, all, y);
            int right = 1;
            size_t written = 0;
            for (size_t i = 0; i < LISTS * TIMES * WIDTH * dim; i++) {
                const size_t e = i % dim, h = i / dim % WIDTH, t = i / dim / WIDTH % TIMES, b = i / dim / WIDTH / TIMES;
                const size_t row = b * sequence + t * token + h * head,
                             angle = ((shared ? 0 : b) * TIMES + t) * dim + e;
                const float other = e < half ? -x[row + e + half] : x[row + e - half];
                float part[2] = {x[row + e] * c[angle], other * s[angle]}, sum;
                uint32_t narrow[2]; /* room for two elements of any dtype */
                k->narrow[d](part, 2, narrow);
                k->widen[d](narrow, 2, part);
                sum = part[0] + part[1];
                k->narrow[d](&sum, 1, narrow);
                k->widen[d](narrow, 1, &sum);
                right = right && sum == y[row + e];
                written += y[row + e] != 0.0f;
            }
            size_t nonzero = 0;
            for (size_t i = 0; i < all; i++) {
                nonzero += y[i] != 0.0f;
            }
            check(right && written == nonzero, "rotation", k->name, half, (size_t)d);
        }
    }
    free(x);
    free(y);
    free(in);
    free(out);
}

/* Norms and gates of rows, of every dtype and with every number of threads; n is the length of a row. */
static void check_between(const qins_kernels *k, size_t n,
                          void (*check)(int, const char *, const char *, size_t, size_t))
{
    enum { ROWS = 37 };
    static const qins_dtype DTYPE[] = {QINS_F32, QINS_F16, QINS_BF16};
    static const double ROUNDING[] = {1e-6, 0x1p-11, 0x1p-8};
    const size_t all = ROWS * 2 * n;
    float *x = malloc(all * sizeof *x), *y = malloc(all * sizeof *y), *weight = malloc(n * sizeof *weight);
    double *want = malloc(n * sizeof *want), *wide = malloc(n * sizeof *wide);
    char *in = malloc(all * sizeof *x), *out = malloc(all * sizeof *x);
    fill(weight, n, 1.0f, 0.5f);
    for (size_t d = 0; d < sizeof DTYPE / sizeof *DTYPE; d++) {
        const size_t size = DTYPE[d] == QINS_F32 ? 4 : 2;
        fill(x, all, 0.1f, 4.0f);
        k->narrow[DTYPE[d]](x, all, in);
        k->widen[DTYPE[d]](in, all, x); /* what the core reads */
        for (int threads = 1; threads < 4; threads += 2) {
            int right = qins_norm_rows(k, DTYPE[d], in, ROWS, n, weight, 1e-3f, out, threads) == 0;
            k->widen[DTYPE[d]](out, ROWS * n, y);
            for (size_t m = 0; m < ROWS; m++) {
                for (size_t i = 0; i < n; i++) {
                    wide[i] = (double)x[m * n + i];
                }
                slow_norm(wide, n, weight, (double)1e-3f, want);
                for (size_t i = 0; i < n; i++) {
                    right = right && fabs((double)y[m * n + i] - want[i]) <= 1.01 * ROUNDING[d] * fabs(want[i]) + 1e-7;
                }
            }
            check(right, "norm of rows", k->name, n, d);
            for (int gelu = 0; gelu < 2; gelu++) {
                right = 1;
                qins_gate_rows(k, DTYPE[d], in, in + n * size, 2 * n, ROWS, n, gelu, out, threads);
                k->widen[DTYPE[d]](out, ROWS * n, y);
                for (size_t m = 0; m < ROWS; m++) {
                    const float *gate = x + m * 2 * n, *up = gate + n;
                    for (size_t i = 0; i < n; i++) {
                        const double g = (double)gate[i];
                        const double z = gelu ? 1.5957691216057308 * (g + 0.044715 * g * g * g) : g;
                        const double exact = g / (1.0 + exp(-z)) * (double)up[i];
                        right = right &&
                                fabs((double)y[m * n + i] - exact) <= (1.01 * ROUNDING[d] + 3e-6) * fabs(exact) + 1e-7;
                    }
                }
                check(right, gelu ? "gates of rows, gelu" : "gates of rows", k->name, n, d);
            }
        }
    }
    free(x);
    free(y);
    free(weight);
    free(want);
    free(wide);
    free(in);
    free(out);
}

/* slow: emulated or with sanitizers, the first and the last positions */
void check_decoder(const qins_kernels *k, int slow, void (*check)(int, const char *, const char *, size_t, size_t))
{
    static const size_t GROUP[] = {0, 16, 32, 64, 32};
    static const qins_codec CODEC[] = {QINS_log8, QINS_log8, QINS_log8, QINS_log8, QINS_log5};
    static const qins_dtype DTYPE[] = {QINS_F32, QINS_F16, QINS_BF16, QINS_F64};
    static const size_t PAST[] = {1, 9, 33, 255, 256, 300, 590};    /* spans of attention have 256 keys */
    static const size_t LENGTH[] = {1, 15, 48, 70, 511, 513, 1100}; /* the last ones around the pieces of gates */
    for (size_t i = 0; i < sizeof LENGTH / sizeof *LENGTH; i++) {
        check_between(k, LENGTH[i], check);
        check_rotation(k, LENGTH[i] < 70 ? LENGTH[i] : LENGTH[i] % 70, check);
    }
    for (size_t g = 0; g < sizeof GROUP / sizeof *GROUP; g++) {
        for (int fused = 0; fused < 2; fused++) {
            setup *s = random_setup(k, CODEC[g], GROUP[g], fused ? QINS_GELU_TANH : QINS_SILU, fused);
            for (size_t i = 0; i < sizeof PAST / sizeof *PAST; i += slow ? 4 : 1) {
                const size_t past = PAST[i];
                check(layer_is_right(k, s, 1, 1, past, 0), "decoder layer, a token", k->name, GROUP[g], past);
                check(layer_is_right(k, s, 3, 1, past, 0), "decoder layer, sequences", k->name, GROUP[g], past);
                check(layer_is_right(k, s, 2, 4, past, ROOM), "decoder layer, masked", k->name, GROUP[g], past);
                check(layer_is_right(k, s, 2, 4, past, 6), "decoder layer, window", k->name, GROUP[g], past);
                check(layer_is_right(k, s, 2, 4, past, 270), "decoder layer, wide window", k->name, GROUP[g], past);
                for (int in_order = 0; in_order < 2; in_order++) {
                    check(pages_are_right(k, s, past, in_order), "decoder layer, paged", k->name, GROUP[g], past);
                    for (int d = 0; d < 4; d++) {
                        check(pages_change_nothing(k, s, DTYPE[d], past, in_order), "decoder layer, paged dtypes",
                              k->name, GROUP[g], past);
                    }
                }
                for (qins_store_kind kind = QINS_STORE_FLOAT16; kind < QINS_STORE_COUNT; kind++) {
                    check(coded_layer_is_right(k, s, kind, past), "decoder layer, codes", k->name, (size_t)kind, past);
                }
            }
            if (!fused) { /* keys are a product of their own */
                check(overflow_is_told(k, s), "decoder layer, overflow", k->name, GROUP[g], 0);
            }
            s->layer.gate.codes.codes = NULL;
            check(layer_is_right(k, s, 3, 1, 5, 0), "decoder layer, attention alone", k->name, GROUP[g], 5);
            release(&s->qkv);
            release(&s->o);
            release(&s->gate);
            release(&s->up);
            release(&s->down);
            free(s);
        }
    }
}
