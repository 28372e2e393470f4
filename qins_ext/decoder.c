/* One decoder layer in one call. Everything between products is float32, whatever the tensors' dtype: results are
 * rounded once, at the end, where separate modules would round after each operation. */
#include "decoder.h"

#include <math.h>
#include <stdatomic.h>

#include "between.h"
#include "sizes.h"

/* A thread's part of attention has at least GRAIN products: a few microseconds of work. A part is up to SPAN keys of a
 * head, whatever the number of threads, so that results do not depend on it. */
enum {
    GRAIN = 32768,
    SPAN = 256,
    TOKENS_AT_ONCE = 64,
    MOST_SCALES = TOKENS_AT_ONCE * QINS_HEAD_DIM / QINS_CACHE_GROUP
};

/* Score of a masked key; finite, so that differences of such scores are not NaN. */
#define UNSEEN (-1e30f)

/* Results of a product: row m begins at at + m * next. */
typedef struct {
    float *at;
    size_t next;
} rows;

typedef struct {
    size_t begin, end;
} range;

/* Attention of one query over a span of keys: with weights e^(score - most) of sum `sum`. */
typedef struct {
    float most, sum;
} softmax;

typedef struct {
    const qins_kernels *kernels;
    const qins_decoder_layer *layer;
    const qins_decoder_call *call;
    size_t count;                                 /* rows: sequences * tokens */
    float *x, *normed, *attended, *gated, *added; /* count rows of hidden, hidden, heads * head_dim, inner, hidden */
    rows q, k, v, gate, up;
    range *seen;    /* by row: keys from the first to the last that its queries see */
    size_t spans;   /* most of them that a batch of queries has */
    softmax *parts; /* by span, innermost, of each batch of queries of each KV head: QINS_BATCH each */
    float *sums;    /* likewise: QINS_BATCH rows of head_dim, weighted sums of values */
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

/* Applies the mask to the scores of row m of x and keys [t, t + n), at most SPAN. */
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
    float more[SPAN];
    widen_at(r, r->call->mask, at, n, more);
    for (size_t i = 0; i < n; i++) {
        score[i] = more[i] > UNSEEN ? score[i] + more[i] : UNSEEN;
    }
}

/* Keys from the first to the last that row m of x sees; all if it sees none, which weighs them alike. */
static range seen_by(const run *r, size_t m, size_t total)
{
    range all = {0, total};
    if (r->call->mask == NULL || !r->call->mask_is_bool) {
        return all;
    }
    const uint8_t *seen = (const uint8_t *)r->call->mask + mask_at(r, m);
    while (all.begin < total && !seen[all.begin]) {
        all.begin++;
    }
    if (all.begin == total) {
        return (range){0, total};
    }
    while (!seen[all.end - 1]) {
        all.end--;
    }
    return all;
}

/* The number of queries that share a KV head, and of batches of them. */
static size_t sharing(const run *r) { return r->layer->heads / r->layer->kv_heads * r->call->tokens; }

static size_t batches_of(const run *r) { return ceil_div(sharing(r), QINS_BATCH); }

/* A batch of queries that share a KV head: query i is that of token row row[i] and head head[i]. */
typedef struct {
    size_t sequence, kv_head, row[QINS_BATCH], head[QINS_BATCH];
    int count;
    range seen; /* by any of them */
} queries;

/* Batch i, counted over the KV heads of all sequences */
static queries queries_of(const run *r, size_t i)
{
    const qins_decoder_layer *layer = r->layer;
    const size_t batches = batches_of(r), group = layer->heads / layer->kv_heads, first = i % batches * QINS_BATCH;
    queries some = {.sequence = i / batches / layer->kv_heads, .kv_head = i / batches % layer->kv_heads};
    some.count = (int)least(sharing(r) - first, QINS_BATCH);
    for (size_t j = 0; j < (size_t)some.count; j++) {
        some.row[j] = some.sequence * r->call->tokens + (first + j) / group;
        some.head[j] = some.kv_head * group + (first + j) % group;
        const range seen = r->seen[some.row[j]];
        some.seen.begin = j == 0 ? seen.begin : least(some.seen.begin, seen.begin);
        some.seen.end = seen.end > some.seen.end ? seen.end : some.seen.end;
    }
    return some;
}

static size_t spans_of(const queries *some) { return ceil_div(some->seen.end - some->seen.begin, SPAN); }

/* Keys of the i-th span; none of spans beyond the last one. They are about equally long. */
static range part_of(const queries *some, size_t i)
{
    const size_t count = some->seen.end - some->seen.begin, each = ceil_div(count, spans_of(some));
    const size_t length = ceil_div(each, 16) * 16, begin = least(i * length, count);
    return (range){some->seen.begin + begin, some->seen.begin + least(begin + length, count)};
}

/* Rows of keys or values, `next` elements apart */
typedef struct {
    const void *at;
    size_t next;
    qins_dtype dtype;
} block;

/* Rows of a head's tokens [t, t + n); `window` has room for them as float32, which they are if `widen`, or float64.
 * Those of codes are still to be multiplied by `scale`, see qins_cache_rows. */
static block kept(const run *r, const qins_decoder_store *s, const queries *some, size_t t, size_t n, int widen,
                  float *window, float *scale)
{
    const size_t dim = r->layer->head_dim, row = row_at(r, some->sequence, some->kv_head, t);
    const size_t apart = is_paged(r) ? r->layer->kv_heads : 1; /* rows from a token to the next, in one page */
    const qins_dtype dtype = dtype_of(r, s);
    const block widened = {window, dim, QINS_F32};
    if (holds_codes(s)) {
        const qins_cache c = codes_of(r, s);
        qins_cache_rows(r->kernels, &c, row, n, window, scale);
        return widened;
    }
    size_t in_order = 1;
    while (is_paged(r) && in_order < n &&
           row_at(r, some->sequence, some->kv_head, t + in_order) == row + in_order * apart) {
        in_order++;
    }
    const size_t size = dim * item_size(dtype);
    const int as_they_are = dtype == QINS_F32 || (dtype != QINS_F64 && !widen);
    if (as_they_are && (in_order == n || !is_paged(r))) {
        return (block){(const char *)s->data + row * size, apart * dim, dtype};
    }
    for (size_t i = 0, at_once = is_paged(r) ? 1 : n; i < n; i += at_once) {
        const char *from = (const char *)s->data + row_at(r, some->sequence, some->kv_head, t + i) * size;
        r->kernels->widen[dtype](from, at_once * dim, window + i * dim);
    }
    return widened;
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

/* For multiplying log8 codes in a store by words; or NULL. Not packed codes: words' values differ from those of
 * decoding, which would change more of the next layers' codes to neighbors, which are far. */
static const qins_log8_words *words_of(const run *r, const qins_decoder_store *s)
{
    const float mu = s->kind == QINS_STORE_LOG8 ? r->call->tables[QINS_log8].nearest.mu : 0.0f;
    const int can = s->kind == QINS_STORE_LOG8 && r->kernels->score_log8 != NULL && mu >= r->kernels->least_mu;
    return can ? qins_log8_words_of(mu, 8, NULL) : NULL;
}

/* Where a thread's work is kept. */
typedef struct {
    float q[QINS_BATCH * QINS_HEAD_DIM]; /* rows of head_dim */
    float scores[QINS_BATCH * SPAN], scales[SPAN], scale[MOST_SCALES];
    float window[TOKENS_AT_ONCE * QINS_HEAD_DIM];
} workplace;

/* Scores of the keys of a span, those of one query `n` apart from another's. Returns -1 if out of memory. */
static int score_span(const run *r, const queries *some, size_t begin, size_t n, workplace *w)
{
    const qins_decoder_store *s = &r->call->keys;
    const size_t dim = r->layer->head_dim, row = row_at(r, some->sequence, some->kv_head, begin);
    if (s->kind >= QINS_STORE_LOG8) {
        const qins_cache c = codes_of(r, s);
        const qins_log8_words *words = words_of(r, s);
        if (words != NULL) {
            r->kernels->score_log8(c.codes + row * dim, c.scale + row, n, dim, words, w->q, some->count, w->scores, n);
            return 0;
        }
        const qins_codes keys =
            qins_cache_matrix(r->kernels, &c, row, n, w->scales); /* keys are the rows of a matrix */
        return qins_linear(r->kernels, &keys, w->q, (size_t)some->count, QINS_F32, w->scores, 1);
    }
    const int widen = some->count > 2 * r->kernels->score_queries;
    for (size_t t = 0, part; t < n; t += part) {
        part = least(n - t, TOKENS_AT_ONCE);
        const block keys = kept(r, s, some, begin + t, part, widen, w->window, w->scale); /* golden's scales are 1 */
        r->kernels->score_rows[keys.dtype](keys.at, part, keys.next, w->q, dim, some->count, dim, w->scores + t, n);
    }
    return 0;
}

/* Adds the values of n tokens of codes, times their scales and the weights of each query, `next` apart. */
static void weigh_codes(const run *r, const block *values, size_t n, const float *scale, const float *weight,
                        size_t next, int batch, float *out)
{
    const size_t dim = r->layer->head_dim;
    const qins_cache c = codes_of(r, &r->call->values);
    const size_t span = qins_cache_span(&c), groups = ceil_div(dim, span);
    float scaled[QINS_BATCH * TOKENS_AT_ONCE];
    for (size_t g = 0, k = 0; g < groups; g++, k += span) {
        for (size_t j = 0; j < (size_t)batch; j++) {
            for (size_t i = 0; i < n; i++) {
                scaled[j * n + i] = weight[j * next + i] * scale[g * n + i];
            }
        }
        r->kernels->weigh_rows[QINS_F32]((const float *)values->at + k, n, dim, scaled, n, batch, least(dim - k, span),
                                         out + k, dim);
    }
}

/* Adds the values of a span, times the weights of each query, which are `count` apart. */
static void weigh_span(const run *r, const queries *some, range keys, workplace *w, float *sums)
{
    const qins_decoder_store *s = &r->call->values;
    const size_t dim = r->layer->head_dim, count = keys.end - keys.begin;
    const qins_log8_words *words = words_of(r, s);
    if (words != NULL) {
        const qins_cache c = codes_of(r, s);
        const size_t row = row_at(r, some->sequence, some->kv_head, keys.begin);
        r->kernels->weigh_log8(c.codes + row * dim, c.scale + row, count, dim, words, w->scores, count, some->count,
                               sums);
        return;
    }
    for (size_t t = 0; t < count; t += TOKENS_AT_ONCE) {
        const size_t n = least(count - t, TOKENS_AT_ONCE);
        const block values = kept(r, s, some, keys.begin + t, n, 0, w->window, w->scale);
        if (holds_codes(s)) {
            weigh_codes(r, &values, n, w->scale, w->scores + t, count, some->count, sums);
        } else {
            r->kernels->weigh_rows[values.dtype](values.at, n, values.next, w->scores + t, count, some->count, dim,
                                                 sums, dim);
        }
    }
}

/* Attention over keys [begin, end), at most SPAN: its softmax, and the sums of values in rows of head_dim. Returns -1
 * if out of memory. */
static int attend_span(const run *r, const queries *some, range keys, workplace *w, softmax *part, float *sums)
{
    const qins_decoder_layer *layer = r->layer;
    const size_t dim = layer->head_dim, count = keys.end - keys.begin;
    if (score_span(r, some, keys.begin, count, w) != 0) {
        return -1;
    }
    for (size_t j = 0; j < (size_t)some->count; j++) {
        float *row = w->scores + j * count;
        for (size_t i = 0; layer->softcap > 0.0f && i < count; i++) {
            row[i] = layer->softcap * tanhf(row[i] / layer->softcap);
        }
        if (r->call->mask != NULL) {
            mask_scores(r, some->row[j], keys.begin, count, row);
        }
        part[j].most = largest(row, count);
        part[j].sum = r->kernels->exp_row(row, count, part[j].most);
    }
    memset(sums, 0, (size_t)some->count * dim * sizeof *sums);
    weigh_span(r, some, keys, w, sums);
    return 0;
}

/* Attention of spans [begin, end), counted over all batches of queries */
static void attend(void *context, size_t begin, size_t end)
{
    run *r = context;
    const size_t dim = r->layer->head_dim;
    workplace *w = qins_scratch_take(sizeof *w);
    if (w == NULL) {
        atomic_store(&r->failed, 1);
        return;
    }
    size_t of = SIZE_MAX;
    queries some;
    for (size_t i = begin; i < end; i++) {
        if (i / r->spans != of) {
            of = i / r->spans;
            some = queries_of(r, of);
            for (size_t j = 0; j < (size_t)some.count; j++) {
                const float *q = r->q.at + some.row[j] * r->q.next + some.head[j] * dim;
                for (size_t k = 0; k < dim; k++) {
                    w->q[j * dim + k] = q[k] * r->layer->scaling;
                }
            }
        }
        const range keys = part_of(&some, i % r->spans);
        softmax *part = r->parts + i * QINS_BATCH;
        if (keys.begin < keys.end && attend_span(r, &some, keys, w, part, r->sums + i * QINS_BATCH * dim) != 0) {
            atomic_store(&r->failed, 1);
            break;
        }
    }
    qins_scratch_give(w);
}

/* Puts the spans of batches [begin, end) together: each softmax is relative to its own largest score. */
static void join(void *context, size_t begin, size_t end)
{
    const run *r = context;
    const size_t dim = r->layer->head_dim;
    for (size_t i = begin; i < end; i++) {
        const queries some = queries_of(r, i);
        const size_t spans = spans_of(&some);
        for (size_t j = 0; j < (size_t)some.count; j++) {
            const softmax *part = r->parts + i * r->spans * QINS_BATCH + j;
            const float *sums = r->sums + (i * r->spans * QINS_BATCH + j) * dim;
            const float *sink = r->layer->sinks != NULL ? r->layer->sinks + some.head[j] : NULL;
            float most = part[0].most, sum = 0.0f;
            for (size_t s = 1; s < spans; s++) {
                most = part[s * QINS_BATCH].most > most ? part[s * QINS_BATCH].most : most;
            }
            most = sink != NULL && *sink > most ? *sink : most;
            for (size_t s = 0; s < spans; s++) {
                sum += part[s * QINS_BATCH].sum * expf(part[s * QINS_BATCH].most - most);
            }
            sum += sink != NULL ? expf(*sink - most) : 0.0f;
            float *out = r->attended + some.row[j] * r->layer->heads * dim + some.head[j] * dim;
            memset(out, 0, dim * sizeof *out);
            for (size_t s = 0; s < spans; s++, sums += QINS_BATCH * dim) {
                const float by = expf(part[s * QINS_BATCH].most - most) / sum;
                for (size_t k = 0; k < dim; k++) {
                    out[k] += by * sums[k];
                }
            }
        }
    }
}

/* Attention of all queries over all keys. Returns -1 if out of memory. */
static int attend_all(run *r, int threads)
{
    const qins_decoder_call *call = r->call;
    const size_t dim = r->layer->head_dim, batches = call->sequences * r->layer->kv_heads * batches_of(r);
    r->seen = qins_scratch_take(r->count * sizeof *r->seen);
    if (r->seen == NULL) {
        return -1;
    }
    for (size_t m = 0; m < r->count; m++) {
        r->seen[m] = seen_by(r, m, past_of(r, m / call->tokens) + call->tokens);
    }
    size_t keys = 0;
    r->spans = 0;
    for (size_t i = 0; i < batches; i++) {
        const queries some = queries_of(r, i);
        r->spans = spans_of(&some) > r->spans ? spans_of(&some) : r->spans;
        keys += some.seen.end - some.seen.begin;
    }
    const size_t parts = batches * r->spans * QINS_BATCH;
    r->sums = qins_scratch_take(parts * (dim * sizeof *r->sums + sizeof *r->parts));
    if (r->sums != NULL) {
        r->parts = (softmax *)(void *)(r->sums + parts * dim);
        const size_t each = least(sharing(r), QINS_BATCH) * dim;
        qins_parallel(batches * r->spans, ceil_div(GRAIN, keys * each / (batches * r->spans) + 1), threads, attend, r);
        if (atomic_load(&r->failed) == 0) {
            qins_parallel(batches, ceil_div(GRAIN, r->spans * each), threads, join, r);
        }
        qins_scratch_give(r->sums);
    }
    const int failed = r->sums == NULL || atomic_load(&r->failed) != 0;
    qins_scratch_give(r->seen);
    return failed ? -1 : 0;
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
    if (attend_all(r, threads) != 0 ||
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
