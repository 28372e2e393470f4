/* One decoder layer of a transformer in one call: norms, products, rotary embedding, attention over a cache, gate. */
#ifndef QINS_DECODER_H
#define QINS_DECODER_H

#include "qins.h"

enum {
    QINS_DECODER_ROWS = 256 /* maximum tokens of one call, over all sequences */
};

/* A matrix and its bias, which may be NULL. A product without codes is absent, except that k and v may be rows of q's
 * matrix, below its own, and up may be rows of gate's matrix, below its own. Without gate, the layer ends after
 * attention. */
typedef struct {
    qins_codes codes;
    const float *bias;
} qins_decoder_product;

typedef enum { QINS_SILU, QINS_GELU_TANH } qins_activation;

/* Norms are float32 weights of RMS norms; NULL: no norm. */
typedef struct {
    qins_decoder_product q, k, v, o, gate, up, down;
    size_t hidden, heads, kv_heads, head_dim, inner;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm;
    const float *sinks; /* a logit per head that takes part in its softmax but has no value; NULL: none */
    int norm_heads;     /* q_norm and k_norm apply to each head; else to all heads as one row */
    float epsilon, head_epsilon, scaling, softcap, residual; /* softcap 0: none; residual: factor of each addend */
    qins_activation activation;
} qins_decoder_layer;

/* How keys or values are kept: as floats of the call's dtype, or as in cache.c, which takes only finite ones. */
typedef enum {
    QINS_STORE_FLOATS,
    QINS_STORE_FLOAT16,
    QINS_STORE_GOLDEN,
    QINS_STORE_LOG8,
    QINS_STORE_LOG6,
    QINS_STORE_LOG5,
    QINS_STORE_LOG4,
    QINS_STORE_COUNT
} qins_store_kind;

/* sequences x kv_heads x room rows of head_dim elements */
typedef struct {
    qins_store_kind kind;
    void *data;           /* floats, or codes */
    void *second, *third; /* golden: signs and ranges; log8: scales; log6, log5, log4: scales and group scales */
} qins_decoder_store;

/* Where a paged cache, which all sequences share, has their tokens: those of sequence s, the new one last, in slots
 * slot[begin[s]] to slot[begin[s + 1] - 1]. A slot is kv_heads rows of a store of floats. */
typedef struct {
    const int64_t *slot;  /* NULL: not paged */
    const int32_t *begin; /* sequences + 1 */
    size_t count, slots;  /* numbers of slot's elements, and of slots in both stores */
} qins_decoder_pages;

/* What one call works on. Tensors are of one dtype. */
typedef struct {
    qins_dtype dtype;
    const void *x; /* sequences x tokens x hidden */
    void *y;       /* likewise; may be x */
    size_t sequences, tokens;
    qins_decoder_store keys, values;  /* the new tokens' are written */
    const qins_cache_tables *tables;  /* by qins_codec, those of log8's family in a store */
    size_t room, past;                /* tokens that a head has room for, and those already there; unused if paged */
    qins_decoder_pages pages;         /* tokens is 1 then, and there is no mask */
    const void *cos, *sin;            /* (sequences or 1) x tokens x rotary_dim, by halves; rotary_dim 0: no rotation */
    size_t rotary_dim, rotary_next;   /* elements from a sequence to the next, 0 if all share one */
    const void *mask;                 /* sequences x tokens x (past + tokens), or NULL */
    int mask_is_bool;                 /* bytes, 0 where a key is masked; else addends of the tensors' dtype */
    size_t mask_sequence, mask_token; /* elements from one sequence, or token, to the next */
} qins_decoder_call;

/* Returns 0, or -1 if out of memory, or 1 if a store that takes only finite keys and values got others, or 2 if pages
 * are not of this cache; y is then not written. sequences * tokens is at most QINS_DECODER_ROWS; without a mask tokens
 * is 1. */
int qins_decode_layer(const qins_kernels *k, const qins_decoder_layer *layer, const qins_decoder_call *call,
                      int threads);

#endif
