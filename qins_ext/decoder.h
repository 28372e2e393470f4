/* One decoder layer of a transformer in one call: norms, products, rotary embedding, attention over a cache, gate. */
#ifndef QINS_DECODER_H
#define QINS_DECODER_H

#include "qins.h"

enum { QINS_DECODER_ROWS = 16 }; /* most tokens of one call, over all sequences */

/* A product with a bias, which may be NULL. No codes: there is no such product. Those of k and v may be rows of q, and
 * those of up rows of gate, below its own; without gate the layer ends after attention. */
typedef struct {
    qins_codes codes;
    const float *bias;
} qins_decoder_product;

typedef enum { QINS_SILU, QINS_GELU_TANH } qins_activation;

/* Norms are weights of root mean square norms, in float32; NULL: there is none. */
typedef struct {
    qins_decoder_product q, k, v, o, gate, up, down;
    size_t hidden, heads, kv_heads, head_dim, inner;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;
    const float *q_norm, *k_norm;
    const float *sinks; /* a logit of each head that takes part in its softmax and has no value; NULL: none */
    int norm_heads;     /* q_norm and k_norm are of one head; else of all */
    float epsilon, head_epsilon, scaling, softcap, residual; /* softcap 0: none; residual: factor of what is added */
    qins_activation activation;
} qins_decoder_layer;

/* What one call works on. Tensors are of one dtype. */
typedef struct {
    qins_dtype dtype;
    const void *x; /* sequences x tokens x hidden */
    void *y;       /* likewise; may be x */
    size_t sequences, tokens;
    void *keys, *values;            /* sequences x kv_heads x room x head_dim; those of the new tokens are written */
    size_t room, past;              /* tokens that a head's part has room for, and that are there */
    const void *cos, *sin;          /* (sequences or 1) x tokens x rotary_dim, by halves; rotary_dim 0: no rotation */
    size_t rotary_dim, rotary_next; /* elements from a sequence to the next, 0 where all have one */
    const void *mask;               /* sequences x tokens x (past + tokens), or NULL */
    int mask_is_bool; /* bytes, 0 where a key is not seen; else numbers that are added, of the tensors' dtype */
    size_t mask_sequence, mask_token; /* elements from one to the next */
} qins_decoder_call;

/* Returns 0, or -1 without memory. sequences * tokens is at most QINS_DECODER_ROWS; without a mask tokens is 1. */
int qins_decode_layer(const qins_kernels *k, const qins_decoder_layer *layer, const qins_decoder_call *call,
                      int threads);

#endif
