/* One decoder layer of a transformer in one call: norms, products, rotary embedding, attention over a cache, gate. */
#ifndef QINS_DECODER_H
#define QINS_DECODER_H

#include "qins.h"

enum { QINS_DECODER_ROWS = 16 }; /* most tokens of one call, over all sequences */

/* A product with a bias, which may be NULL. Without codes there is no such product: k, v or up may be missing where the
 * matrix of q or gate has their rows below its own. */
typedef struct {
    qins_codes codes;
    const float *bias;
} qins_decoder_product;

typedef enum { QINS_SILU, QINS_GELU_TANH } qins_activation;

/* Norms are float32 weights of RMS norms; NULL: there is none. */
typedef struct {
    qins_decoder_product q, k, v, o, gate, up, down;
    size_t hidden, heads, kv_heads, head_dim, inner;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm;
    int norm_heads;                                          /* q_norm and k_norm cover one head; else all heads */
    float epsilon, head_epsilon, scaling, softcap, residual; /* softcap 0: none; residual: factor of each branch */
    qins_activation activation;
} qins_decoder_layer;

/* The tensors of one call, all of one dtype. */
typedef struct {
    qins_dtype dtype;
    const void *x; /* sequences x tokens x hidden */
    void *y;       /* same shape; may be x */
    size_t sequences, tokens;
    void *keys, *values;              /* sequences x kv_heads x room x head_dim; gets those of the new tokens */
    size_t room, past;                /* tokens that fit per head, and tokens already stored */
    const void *cos, *sin;            /* (sequences or 1) x tokens x rotary_dim, by halves; rotary_dim 0: no rotation */
    size_t rotary_dim, rotary_next;   /* elements from one sequence to the next; 0: shared */
    const void *mask;                 /* sequences x tokens x (past + tokens), or NULL */
    int mask_is_bool;                 /* bytes, 0 where a key is masked; else numbers to add, of the tensors' dtype */
    size_t mask_sequence, mask_token; /* elements from one to the next */
} qins_decoder_call;

/* Returns 0, or -1 if out of memory. sequences * tokens is at most QINS_DECODER_ROWS; without a mask tokens is 1. */
int qins_decode_layer(const qins_kernels *k, const qins_decoder_layer *layer, const qins_decoder_call *call,
                      int threads);

#endif
