/* One decoder layer in one call. Everything between products is float32, whatever the tensors' dtype: results are
 * rounded once, at the end, where separate modules would round after each operation. */
#include "decoder.h"

#include <math.h>
#include <stdatomic.h>

#include "between.h"
#include "sizes.h"

/* A thread's part of attention has at least GRAIN products: a few microseconds of work. */
enum { GRAIN = 32768, TOKENS_AT_ONCE = 64, MOST_SCALES = TOKENS_AT_ONCE * QINS_DECODER_HEAD_DIM / QINS_CACHE_GROUP };

/* Score of a masked key; finite, so that differences of such scores are not NaN. */
#define UNSEEN (-1e30f)

/* Results of a product: row m begins at at + m * next. */
typedef struct {
    float *at;
    size_t next;
} rows;

typedef struct {
    const qins_kernels *kernels;
    const qins_decoder_layer *layer;
    const qins_decoder_call *call;
    size_t count;                                 /* rows: sequences * tokens */
    float *x, *normed, *attended, *gated, *added; /* count rows of hidden, hidden, heads * head_dim, inner, hidden */
    rows q, k, v, gate, up;
    atomic_int failed;
} run;

/* -- helpers ------------------------------------------------------------------------------------ */

static const float *norm_rows(const run *r, const float *x, const float *weight, float *out)
{
    const size_t n = r->layer->hidden;
    if (weight == NULL) {
        return x;
    }
    for (size_t m = 0; m < r->count; m++) {
        qins_norm_row(r->kernels, x + m * n, n, weight, r->layer->epsilon, out + m * n);
    }
    return out;
}

static void add_bias(const run *r, float *y, size_t n, const float *bias)
{
    for (size_t m = 0; bias != NULL && m < r->count; m++) {
        for (size_t i = 0; i < n; i++) {
            y[m * n + i] += bias[i];
        }
    }
}

/* Multiplies one x by several matrices and points results[i] at the i-th product. A product without codes is part of
 * the one before it, and its results follow that one's, sizes[i - 1] per row of x. */
static int multiply(const run *r, const float *x, const qins_decoder_product *const *p, size_t count, float *y,
                    rows *const *results, const size_t *sizes, int threads)
{
    const qins_codes *codes[QINS_SET];
    float *out[QINS_SET];
    size_t there = 0;
    for (size_t i = 0; i < count; i++) {
        if (p[i]->codes.codes == NULL) { /* part of the one before */
            results[i]->at = results[i - 1]->at + sizes[i - 1];
            results[i]->next = results[i - 1]->next;
            continue;
        }
        results[i]->at = y;
        results[i]->next = p[i]->codes.rows;
        codes[there] = &p[i]->codes;
        out[there++] = y;
        y += r->count * p[i]->codes.rows;
    }
    if (qins_linear_set(r->kernels, codes, there, x, r->count, out, threads) != 0) {
        return -1;
    }
    for (size_t i = 0; i < count; i++) {
        if (p[i]->codes.codes != NULL) {
            add_bias(r, results[i]->at, p[i]->codes.rows, p[i]->bias);
        }
    }
    return 0;
}

/* x += factor * norm(y) */
static void add_rows(const run *r, const float *y, const float *weight, float *room)
{
    y = norm_rows(r, y, weight, room);
    for (size_t i = 0; i < r->count * r->layer->hidden; i++) {
        r->x[i] += r->layer->residual * y[i];
    }
}

/* -- attention ---------------------------------------------------------------------------------- */

static void widen_at(const run *r, const void *src, size_t at, size_t n, float *out)
{
    r->kernels->widen[r->call->dtype]((const char *)src + at * item_size(r->call->dtype), n, out);
}

static void norm_heads(const run *r, rows y, size_t heads, const float *weight)
{
    const size_t dim = r->layer->head_dim;
    for (size_t m = 0; weight != NULL && m < r->count; m++) {
        float *row = y.at + m * y.next;
        for (size_t h = 0; r->layer->norm_heads && h < heads; h++) {
            qins_norm_row(r->kernels, row + h * dim, dim, weight, r->layer->head_epsilon, row + h * dim);
        }
        if (!r->layer->norm_heads) {
            qins_norm_row(r->kernels, row, heads * dim, weight, r->layer->head_epsilon, row);
        }
    }
}

/* Applies rotary embeddings to the first rotary_dim elements of each head: element i of the first half and element i
 * of the second half are the two coordinates of a rotation. */
static int rotate(const run *r)
{
    const qins_decoder_call *call = r->call;
    const size_t dim = r->layer->head_dim, n = call->rotary_dim;
    if (n == 0) {
        return 0;
    }
    float *room = qins_scratch_take(2 * n * sizeof *room), *cosine = room, *sine = room + n;
    if (room == NULL) {
        return -1;
    }
    for (size_t m = 0; m < r->count; m++) {
        const size_t at = m / call->tokens * call->rotary_next + m % call->tokens * n;
        widen_at(r, call->cos, at, n, cosine);
        widen_at(r, call->sin, at, n, sine);
        float *q = r->q.at + m * r->q.next, *k = r->k.at + m * r->k.next;
        r->kernels->rotate[QINS_F32](q, cosine, sine, r->layer->heads, dim, n / 2, q);
        r->kernels->rotate[QINS_F32](k, cosine, sine, r->layer->kv_heads, dim, n / 2, k);
    }
    qins_scratch_give(room);
    return 0;
}

static int is_paged(const run *r) { return r->call->pages.slot != NULL; }

/* Number of a sequence's tokens before this call. */
static size_t past_of(const run *r, size_t sequence)
{
    const int32_t *begin = r->call->pages.begin;
    return is_paged(r) ? (size_t)(begin[sequence + 1] - begin[sequence] - 1) : r->call->past;
}

/* A head's row in a store. */
static size_t row_at(const run *r, size_t sequence, size_t head, size_t token)
{
    const qins_decoder_pages *p = &r->call->pages;
    if (is_paged(r)) {
        return (size_t)p->slot[(size_t)p->begin[sequence] + token] * r->layer->kv_heads + head;
    }
    return (sequence * r->layer->kv_heads + head) * r->call->room + token;
}

static int holds_codes(const qins_decoder_store *s) { return s->kind >= QINS_STORE_GOLDEN; }

static qins_dtype dtype_of(const run *r, const qins_decoder_store *s)
{
    return s->kind == QINS_STORE_FLOAT16 ? QINS_F16 : r->call->dtype;
}

static qins_cache codes_of(const run *r, const qins_decoder_store *s)
{
    static const qins_codec CODEC[QINS_STORE_COUNT] = {
        [QINS_STORE_GOLDEN] = QINS_golden, [QINS_STORE_LOG8] = QINS_log8, [QINS_STORE_LOG6] = QINS_log6,
        [QINS_STORE_LOG5] = QINS_log5,     [QINS_STORE_LOG4] = QINS_log4,
    };
    const int golden = s->kind == QINS_STORE_GOLDEN;
    const qins_cache_tables *tables = &r->call->tables[CODEC[s->kind]];
    /* Not of packed codes: the difference would change more of the next layers' codes to neighbors, which are far. */
    const int by_words =
        s->kind == QINS_STORE_LOG8 && r->kernels->word_values != NULL && tables->nearest.mu >= r->kernels->least_mu;
    return (qins_cache){
        .codec = CODEC[s->kind],
        .heads = r->call->sequences * r->layer->kv_heads,
        .room = r->call->room,
        .dim = r->layer->head_dim,
        .codes = s->data,
        .sign = golden ? s->second : NULL,
        .range = golden ? s->third : NULL,
        .scale = golden ? NULL : s->second,
        .group_scale = golden ? NULL : s->third,
        .tables = tables,
        .words = by_words ? qins_log8_words_of(tables->nearest.mu, 8, NULL) : NULL,
    };
}

static int keep_codes(const run *r, rows from, const qins_decoder_store *to)
{
    const size_t dim = r->layer->head_dim, heads = r->layer->kv_heads, tokens = r->call->tokens;
    const qins_cache c = codes_of(r, to);
    float *dense = qins_scratch_take(r->count * heads * dim * sizeof *dense);
    if (dense == NULL) {
        return -1;
    }
    for (size_t m = 0; m < r->count; m++) {
        for (size_t h = 0; h < heads; h++) {
            memcpy(dense + ((m / tokens * heads + h) * tokens + m % tokens) * dim, from.at + m * from.next + h * dim,
                   dim * sizeof *dense);
        }
    }
    const int failed = qins_cache_encode(r->kernels, &c, dense, QINS_F32, r->call->past, tokens, 1);
    qins_scratch_give(dense);
    return failed;
}

/* Adds the new tokens to a store. Returns what qins_decode_layer does. */
static int keep(const run *r, rows from, const qins_decoder_store *to)
{
    const int32_t too_large = 0x477ff000; /* 65520, which is rounded to infinity */
    const qins_dtype dtype = dtype_of(r, to);
    const size_t dim = r->layer->head_dim, size = item_size(dtype), tokens = r->call->tokens;
    if (holds_codes(to)) {
        return keep_codes(r, from, to);
    }
    for (size_t m = 0; m < r->count; m++) {
        for (size_t h = 0; h < r->layer->kv_heads; h++) {
            const float *row = from.at + m * from.next + h * dim;
            if (to->kind == QINS_STORE_FLOAT16 && r->kernels->absmax(row, dim) >= too_large) {
                return 1;
            }
            const size_t at = row_at(r, m / tokens, h, past_of(r, m / tokens) + m % tokens) * dim;
            r->kernels->narrow[dtype](row, dim, (char *)to->data + at * size);
        }
    }
    return 0;
}

/* Where the mask of row m of x begins. */
static size_t mask_at(const run *r, size_t m)
{
    const qins_decoder_call *call = r->call;
    return m / call->tokens * call->mask_sequence + m % call->tokens * call->mask_token;
}

/* Applies the mask to the scores of row m of x and keys [t, t + n), at most TOKENS_AT_ONCE. */
static void mask_scores(const run *r, size_t m, size_t t, size_t n, float *score)
{
    const size_t at = mask_at(r, m) + t;
    if (r->call->mask_is_bool) {
        const uint8_t *seen = (const uint8_t *)r->call->mask + at;
        for (size_t i = 0; i < n; i++) {
            score[i] = seen[i] ? score[i] : UNSEEN;
        }
        return;
    }
    float more[TOKENS_AT_ONCE];
    widen_at(r, r->call->mask, at, n, more);
    for (size_t i = 0; i < n; i++) {
        score[i] = more[i] > UNSEEN ? score[i] + more[i] : UNSEEN;
    }
}

/* A batch of queries that share a KV head: query i is that of token row row[i] and head head[i]. */
typedef struct {
    float q[QINS_BATCH][QINS_DECODER_HEAD_DIM], out[QINS_BATCH][QINS_DECODER_HEAD_DIM];
    size_t row[QINS_BATCH], head[QINS_BATCH];
} queries;

typedef struct {
    size_t begin, end;
} range;

/* Keys from the first to the last that any of these queries sees; all if one sees none, which weighs them alike. */
static range seen_by(const run *r, const queries *some, int batch, size_t total)
{
    if (r->call->mask == NULL || !r->call->mask_is_bool) {
        return (range){0, total};
    }
    range all = {total, 0};
    for (int j = 0; j < batch; j++) {
        const uint8_t *seen = (const uint8_t *)r->call->mask + mask_at(r, some->row[j]);
        range one = {0, total};
        while (one.begin < total && !seen[one.begin]) {
            one.begin++;
        }
        if (one.begin == total) {
            return (range){0, total};
        }
        while (one.end > all.end && !seen[one.end - 1]) {
            one.end--;
        }
        all.begin = least(all.begin, one.begin);
        all.end = one.end;
    }
    return all;
}

/* Rows of a head's tokens [t, t + n), as float32 and `next` elements apart; `window` has room for them. Those of codes
 * are still to be multiplied by `scale`, see qins_cache_rows. */
static const float *kept(const run *r, const qins_decoder_store *s, size_t sequence, size_t head, size_t t, size_t n,
                         float *window, float *scale, size_t *next)
{
    const size_t dim = r->layer->head_dim, row = row_at(r, sequence, head, t);
    const size_t apart = is_paged(r) ? r->layer->kv_heads : 1; /* rows from a token to the next, in one page */
    const qins_dtype dtype = dtype_of(r, s);
    *next = dim;
    if (holds_codes(s)) {
        const qins_cache c = codes_of(r, s);
        qins_cache_rows(r->kernels, &c, row, n, window, scale);
        return window;
    }
    size_t in_order = 1;
    while (is_paged(r) && in_order < n && row_at(r, sequence, head, t + in_order) == row + in_order * apart) {
        in_order++;
    }
    if (dtype == QINS_F32 && (in_order == n || !is_paged(r))) {
        *next = apart * dim;
        return (const float *)s->data + row * dim;
    }
    const size_t size = dim * item_size(dtype);
    for (size_t i = 0, at_once = is_paged(r) ? 1 : n; i < n; i += at_once) {
        const char *from = (const char *)s->data + row_at(r, sequence, head, t + i) * size;
        r->kernels->widen[dtype](from, at_once * dim, window + i * dim);
    }
    return window;
}

static float largest(const float *x, size_t n)
{
    enum { LANES = 16 };
    float most[LANES];
    for (int i = 0; i < LANES; i++) {
        most[i] = x[0];
    }
    for (size_t k = 0; k + LANES <= n; k += LANES) {
        for (int i = 0; i < LANES; i++) {
            most[i] = x[k + (size_t)i] > most[i] ? x[k + (size_t)i] : most[i];
        }
    }
    for (size_t k = n - n % LANES; k < n; k++) {
        most[0] = x[k] > most[0] ? x[k] : most[0];
    }
    for (int i = 1; i < LANES; i++) {
        most[0] = most[i] > most[0] ? most[i] : most[0];
    }
    return most[0];
}

/* Scores of n tokens' keys, at most TOKENS_AT_ONCE. Where they are codes, a row has one scale. */
static void score_some(const run *r, size_t sequence, size_t kv_head, size_t t, size_t n, const queries *some,
                       int batch, float *window, float *scores, size_t total)
{
    float scale[MOST_SCALES];
    size_t next;
    const float *keys = kept(r, &r->call->keys, sequence, kv_head, t, n, window, scale, &next);
    r->kernels->score_rows(keys, n, next, some->q[0], QINS_DECODER_HEAD_DIM, batch, r->layer->head_dim, scores, total);
    for (size_t j = 0; holds_codes(&r->call->keys) && j < (size_t)batch; j++) {
        for (size_t i = 0; i < n; i++) {
            scores[j * total + i] *= scale[i];
        }
    }
}

/* Scores of all keys, straight from codes of log8's family: keys are the rows of a matrix. Returns -1 if out of memory.
 */
static int score_codes(const run *r, size_t begin, size_t total, const queries *some, int batch, float *dense,
                       float *scale, float *scores)
{
    const size_t dim = r->layer->head_dim;
    const qins_cache c = codes_of(r, &r->call->keys);
    const qins_codes keys = qins_cache_matrix(r->kernels, &c, begin, total, scale);
    for (int j = 0; j < batch; j++) {
        memcpy(dense + (size_t)j * dim, some->q[j], dim * sizeof *dense);
    }
    return qins_linear(r->kernels, &keys, dense, (size_t)batch, QINS_F32, scores, 1);
}

/* Adds the values of n tokens of codes, times their scales and the weights of each query. */
static void weigh_codes(const run *r, const float *values, size_t n, const float *scale, const float *weight,
                        size_t next, int batch, queries *some)
{
    const size_t dim = r->layer->head_dim;
    const qins_cache c = codes_of(r, &r->call->values);
    const size_t span = qins_cache_span(&c), groups = ceil_div(dim, span);
    float scaled[QINS_BATCH * TOKENS_AT_ONCE];
    for (size_t g = 0, k = 0; g < groups; g++, k += span) {
        for (size_t j = 0; j < (size_t)batch; j++) {
            for (size_t i = 0; i < n; i++) {
                scaled[j * n + i] = weight[j * next + i] * scale[i * groups + g];
            }
        }
        r->kernels->weigh_rows(values + k, n, dim, scaled, n, batch, least(dim - k, span), some->out[0] + k,
                               QINS_DECODER_HEAD_DIM);
    }
}

static void attend_some(run *r, size_t sequence, size_t kv_head, queries *some, int batch, float *scores, float *window,
                        float *scales)
{
    const qins_decoder_call *call = r->call;
    const qins_decoder_layer *layer = r->layer;
    const size_t dim = layer->head_dim, total = past_of(r, sequence) + call->tokens;
    const range seen = seen_by(r, some, batch, total);
    size_t next;
    float scale[MOST_SCALES];
    /* A product of so few columns costs more than converting codes to floats, where that is done by words. */
    const int at_once = call->keys.kind >= QINS_STORE_LOG8 && codes_of(r, &call->keys).words == NULL;
    const size_t count = seen.end - seen.begin, first = row_at(r, sequence, kv_head, seen.begin);
    if (at_once && score_codes(r, first, count, some, batch, window, scales, scores) != 0) {
        atomic_store(&r->failed, 1);
        return;
    }
    for (size_t t = 0; t < count; t += TOKENS_AT_ONCE) {
        const size_t n = least(count - t, TOKENS_AT_ONCE);
        if (!at_once) {
            score_some(r, sequence, kv_head, seen.begin + t, n, some, batch, window, scores + t, count);
        }
        for (int j = 0; j < batch; j++) {
            float *row = scores + (size_t)j * count + t;
            for (size_t i = 0; layer->softcap > 0.0f && i < n; i++) {
                row[i] = layer->softcap * tanhf(row[i] / layer->softcap);
            }
            if (call->mask != NULL) {
                mask_scores(r, some->row[j], seen.begin + t, n, row);
            }
        }
    }
    float inverse[QINS_BATCH];
    for (int j = 0; j < batch; j++) {
        float *row = scores + (size_t)j * count, most = largest(row, count);
        const float *sink = layer->sinks != NULL ? layer->sinks + some->head[j] : NULL;
        most = sink != NULL && *sink > most ? *sink : most;
        float sum = r->kernels->exp_row(row, count, most);
        sum += sink != NULL ? expf(*sink - most) : 0.0f;
        inverse[j] = 1.0f / sum;
        memset(some->out[j], 0, dim * sizeof(float));
    }
    for (size_t t = 0; t < count; t += TOKENS_AT_ONCE) {
        const size_t n = least(count - t, TOKENS_AT_ONCE);
        const float *values = kept(r, &call->values, sequence, kv_head, seen.begin + t, n, window, scale, &next);
        if (holds_codes(&call->values)) {
            weigh_codes(r, values, n, scale, scores + t, count, batch, some);
        } else {
            r->kernels->weigh_rows(values, n, next, scores + t, count, batch, dim, some->out[0], QINS_DECODER_HEAD_DIM);
        }
    }
    for (int j = 0; j < batch; j++) {
        float *out = r->attended + some->row[j] * layer->heads * dim + some->head[j] * dim;
        for (size_t i = 0; i < dim; i++) {
            out[i] = some->out[j][i] * inverse[j];
        }
    }
}

/* The number of queries that share a KV head. */
static size_t sharing(const run *r) { return r->layer->heads / r->layer->kv_heads * r->call->tokens; }

/* Attention of batches [begin, end), counted over the KV heads of all sequences. */
static void attend(void *context, size_t begin, size_t end)
{
    run *r = context;
    const qins_decoder_layer *layer = r->layer;
    const size_t dim = layer->head_dim, group = layer->heads / layer->kv_heads;
    const size_t batches = ceil_div(sharing(r), QINS_BATCH);
    size_t total = 0;
    for (size_t unit = begin; unit < end; unit++) {
        const size_t its = past_of(r, unit / batches / layer->kv_heads) + r->call->tokens;
        total = its > total ? its : total;
    }
    const size_t scores = ceil_div(QINS_BATCH * total, 16) * 16, window = TOKENS_AT_ONCE * dim;
    char *room = qins_scratch_take(sizeof(queries) + (scores + window + total) * sizeof(float));
    if (room == NULL) {
        atomic_store(&r->failed, 1);
        return;
    }
    queries *some = (queries *)(void *)room;
    float *of_scores = (float *)(void *)(room + sizeof *some), *of_window = of_scores + scores;
    for (size_t unit = begin; unit < end; unit++) {
        const size_t sequence = unit / batches / layer->kv_heads, kv_head = unit / batches % layer->kv_heads;
        const size_t first = unit % batches * QINS_BATCH, batch = least(sharing(r) - first, QINS_BATCH);
        for (size_t j = 0; j < batch; j++) {
            some->row[j] = sequence * r->call->tokens + (first + j) / group;
            some->head[j] = kv_head * group + (first + j) % group;
            const float *q = r->q.at + some->row[j] * r->q.next + some->head[j] * dim;
            for (size_t k = 0; k < dim; k++) {
                some->q[j][k] = q[k] * layer->scaling;
            }
        }
        attend_some(r, sequence, kv_head, some, (int)batch, of_scores, of_window, of_window + window);
    }
    qins_scratch_give(room);
}

static int attention(run *r, float *room, int threads)
{
    const qins_decoder_layer *layer = r->layer;
    const qins_decoder_product *p[] = {&layer->q, &layer->k, &layer->v};
    rows *results[] = {&r->q, &r->k, &r->v};
    const size_t sizes[] = {layer->heads * layer->head_dim, layer->kv_heads * layer->head_dim, 0};
    const float *x = norm_rows(r, r->x, layer->before_attention, r->normed);
    if (multiply(r, x, p, 3, room, results, sizes, threads) != 0) {
        return -1;
    }
    norm_heads(r, r->q, layer->heads, layer->q_norm);
    norm_heads(r, r->k, layer->kv_heads, layer->k_norm);
    if (rotate(r) != 0) {
        return -1;
    }
    int failed = keep(r, r->k, &r->call->keys);
    failed = failed != 0 ? failed : keep(r, r->v, &r->call->values);
    if (failed != 0) {
        return failed;
    }
    const size_t each = is_paged(r) ? r->call->pages.count / r->call->sequences : r->call->past + r->call->tokens;
    const size_t batches = ceil_div(sharing(r), QINS_BATCH);
    const size_t work = each * layer->head_dim * ceil_div(sharing(r), batches);
    qins_parallel(r->call->sequences * layer->kv_heads * batches, ceil_div(GRAIN, work + 1), threads, attend, r);
    if (atomic_load(&r->failed) != 0 ||
        qins_linear(r->kernels, &layer->o.codes, r->attended, r->count, QINS_F32, r->added, threads) != 0) {
        return -1;
    }
    add_bias(r, r->added, layer->hidden, layer->o.bias);
    add_rows(r, r->added, layer->after_attention, r->normed);
    return 0;
}

/* -- MLP, and the whole layer --------------------------------------------------------------------- */

static int gated_products(run *r, float *room, int threads)
{
    const qins_decoder_layer *layer = r->layer;
    const qins_decoder_product *p[] = {&layer->gate, &layer->up};
    rows *results[] = {&r->gate, &r->up};
    const size_t sizes[] = {layer->inner, 0};
    const float *x = norm_rows(r, r->x, layer->before_mlp, r->normed);
    if (multiply(r, x, p, 2, room, results, sizes, threads) != 0) {
        return -1;
    }
    for (size_t m = 0; m < r->count; m++) {
        r->kernels->gate_row(r->gate.at + m * r->gate.next, r->up.at + m * r->up.next, layer->inner,
                             layer->activation == QINS_GELU_TANH, r->gated + m * layer->inner);
    }
    if (qins_linear(r->kernels, &layer->down.codes, r->gated, r->count, QINS_F32, r->added, threads) != 0) {
        return -1;
    }
    add_bias(r, r->added, layer->hidden, layer->down.bias);
    add_rows(r, r->added, layer->after_mlp, r->normed);
    return 0;
}

static int pages_are_right(const qins_decoder_pages *p, size_t sequences)
{
    if (p->slot == NULL) {
        return 1;
    }
    for (size_t s = 0; s < sequences; s++) {
        if (p->begin[s] < 0 || p->begin[s] >= p->begin[s + 1]) {
            return 0;
        }
    }
    if ((size_t)p->begin[sequences] > p->count) {
        return 0;
    }
    for (size_t i = 0; i < p->count; i++) {
        if (p->slot[i] < 0 || (size_t)p->slot[i] >= p->slots) {
            return 0;
        }
    }
    return 1;
}

int qins_decode_layer(const qins_kernels *kernels, const qins_decoder_layer *layer, const qins_decoder_call *call,
                      int threads)
{
    run r = {.kernels = kernels, .layer = layer, .call = call, .count = call->sequences * call->tokens};
    atomic_init(&r.failed, 0);
    if (!pages_are_right(&call->pages, call->sequences)) {
        return 2;
    }
    const size_t attended = layer->heads * layer->head_dim, qkv = attended + 2 * layer->kv_heads * layer->head_dim;
    const size_t products = qkv > 2 * layer->inner ? qkv : 2 * layer->inner;
    const size_t all = 3 * layer->hidden + attended + layer->inner + products;
    float *room = qins_scratch_take(r.count * all * sizeof *room);
    if (room == NULL) {
        return -1;
    }
    r.x = room;
    r.normed = r.x + r.count * layer->hidden;
    r.added = r.normed + r.count * layer->hidden;
    r.attended = r.added + r.count * layer->hidden;
    r.gated = r.attended + r.count * attended;
    float *rest = r.gated + r.count * layer->inner;
    kernels->widen[call->dtype](call->x, r.count * layer->hidden, r.x);
    int failed = attention(&r, rest, threads);
    if (!failed && layer->gate.codes.codes != NULL) {
        failed = gated_products(&r, rest, threads);
    }
    if (!failed) {
        kernels->narrow[call->dtype](r.x, r.count * layer->hidden, call->y);
    }
    qins_scratch_give(room);
    return failed;
}
