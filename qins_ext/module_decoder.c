/* Python bindings for decoder layers. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"

#include <stdlib.h>
#include <string.h>

#include "between.h"
#include "decoder.h"

#define CAPSULE "qins._core.decoder_layer"

static void free_layer(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, CAPSULE)); }

/* (codec, codes, second, third, first_scalar, second_scalar, rows, cols, group_size, bias), or None. */
static int read_product(PyObject *o, qins_decoder_product *p)
{
    enum { BIAS = QINS_CODES_NUMBERS, COUNT };
    size_t a[COUNT];
    memset(p, 0, sizeof *p);
    if (o == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(o) || PyTuple_GET_SIZE(o) != COUNT) {
        PyErr_Format(PyExc_TypeError, "product: expected None or a tuple of %d numbers, got %R", COUNT, o);
        return -1;
    }
    for (int i = 0; i < COUNT; i++) {
        a[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(o, i));
    }
    if (PyErr_Occurred()) {
        return -1;
    }
    qins_codes_at(a, &p->codes);
    p->bias = (const float *)a[BIAS];
    return 0;
}

PyDoc_STRVAR(
    decoder_layer_doc,
    "decoder_layer(products, norms, sizes, numbers, /)\n--\n\n"
    "Describe a layer for decode_layer; everything by address, nothing is checked or kept alive. products: "
    "q, k, v, o, gate, up, down, each a tuple (codec, ..., group_size as for linear_at, bias) or None; norms: "
    "before and after attention, before and after the MLP, of queries and of keys, sinks; sizes: hidden, heads, "
    "kv_heads, head_dim, inner, norm_heads, activation; numbers: epsilon, head_epsilon, scaling, softcap, "
    "residual.");

static PyObject *decoder_layer(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *q, *k, *v, *o, *gate, *up, *down;
    Py_ssize_t norm[7], size[7];
    qins_decoder_layer *l = calloc(1, sizeof *l);
    if (l == NULL) {
        return PyErr_NoMemory();
    }
    if (!PyArg_ParseTuple(args, "(OOOOOOO)(nnnnnnn)(nnnnnnn)(fffff):decoder_layer", &q, &k, &v, &o, &gate, &up, &down,
                          &norm[0], &norm[1], &norm[2], &norm[3], &norm[4], &norm[5], &norm[6], &size[0], &size[1],
                          &size[2], &size[3], &size[4], &size[5], &size[6], &l->epsilon, &l->head_epsilon, &l->scaling,
                          &l->softcap, &l->residual) ||
        read_product(q, &l->q) < 0 || read_product(k, &l->k) < 0 || read_product(v, &l->v) < 0 ||
        read_product(o, &l->o) < 0 || read_product(gate, &l->gate) < 0 || read_product(up, &l->up) < 0 ||
        read_product(down, &l->down) < 0) {
        free(l);
        return NULL;
    }
    const float **const norms[] = {&l->before_attention, &l->after_attention, &l->before_mlp, &l->after_mlp,
                                   &l->q_norm,           &l->k_norm,          &l->sinks};
    for (int i = 0; i < 7; i++) {
        *norms[i] = (const float *)norm[i];
    }
    l->hidden = (size_t)size[0];
    l->heads = (size_t)size[1];
    l->kv_heads = (size_t)size[2];
    l->head_dim = (size_t)size[3];
    l->inner = (size_t)size[4];
    l->norm_heads = (int)size[5];
    l->activation = (qins_activation)size[6];
    PyObject *capsule = PyCapsule_New(l, CAPSULE, free_layer);
    if (capsule == NULL) {
        free(l);
    }
    return capsule;
}

PyDoc_STRVAR(decode_layer_doc,
             "decode_layer(layer, dtype, x, y, sequences, tokens, keys, values, room, past, cos, sin, rotary_dim, "
             "rotary_next, mask, mask_is_bool, mask_sequence, mask_token, threads, keys_kind, keys_second, keys_third, "
             "values_kind, values_second, values_third, slot, begin, slot_count, slots, /)\n--\n\n"
             "Run a layer on a few tokens; see qins_decoder_call in decoder.h. Tensors by address. Checks nothing but "
             "pages. The last four may be omitted: nothing is paged then; and the six before them: keys and values are "
             "then of `dtype`. Returns whether they were finite where their store needs that.");

static PyObject *decode_layer(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    enum {
        DTYPE,
        X,
        Y,
        SEQUENCES,
        TOKENS,
        KEYS,
        VALUES,
        ROOM,
        PAST,
        COS,
        SIN,
        ROTARY,
        ROTARY_NEXT,
        MASK,
        IS_BOOL,
        MASK_SEQUENCE,
        MASK_TOKEN,
        THREADS,
        KEYS_KIND,
        KEYS_SECOND,
        KEYS_THIRD,
        VALUES_KIND,
        VALUES_SECOND,
        VALUES_THIRD,
        SLOT,
        BEGIN,
        SLOT_COUNT,
        SLOTS,
        COUNT
    };
    size_t a[COUNT] = {0};
    const int given = count - 1 == KEYS_KIND ? KEYS_KIND : count - 1 == SLOT ? SLOT : COUNT;
    if (count < 1) {
        PyErr_SetString(PyExc_TypeError, "decode_layer: expected a layer");
        return NULL;
    }
    const qins_decoder_layer *layer = PyCapsule_GetPointer(args[0], CAPSULE);
    if (layer == NULL || qins_numbers("decode_layer", args + 1, count - 1, a, given) < 0) {
        return NULL;
    }
    const qins_decoder_call call = {
        .dtype = (qins_dtype)a[DTYPE],
        .x = (const void *)a[X],
        .y = (void *)a[Y],
        .sequences = a[SEQUENCES],
        .tokens = a[TOKENS],
        .keys = {(qins_store_kind)a[KEYS_KIND], (void *)a[KEYS], (void *)a[KEYS_SECOND], (void *)a[KEYS_THIRD]},
        .values = {(qins_store_kind)a[VALUES_KIND], (void *)a[VALUES], (void *)a[VALUES_SECOND],
                   (void *)a[VALUES_THIRD]},
        .tables = qins_tables_of_caches,
        .room = a[ROOM],
        .past = a[PAST],
        .pages = {(const int64_t *)a[SLOT], (const int32_t *)a[BEGIN], a[SLOT_COUNT], a[SLOTS]},
        .cos = (const void *)a[COS],
        .sin = (const void *)a[SIN],
        .rotary_dim = a[ROTARY],
        .rotary_next = a[ROTARY_NEXT],
        .mask = (const void *)a[MASK],
        .mask_is_bool = (int)a[IS_BOOL],
        .mask_sequence = a[MASK_SEQUENCE],
        .mask_token = a[MASK_TOKEN],
    };
    int failed;
    Py_BEGIN_ALLOW_THREADS failed = qins_decode_layer(qins_active(), layer, &call, (int)a[THREADS]);
    Py_END_ALLOW_THREADS if (failed < 0) { return PyErr_NoMemory(); }
    if (failed == 2) {
        return PyErr_Format(PyExc_ValueError, "pages: expected slots from 0 to %zu for each sequence, got others",
                            call.pages.slots - 1);
    }
    return PyBool_FromLong(failed == 0);
}

PyDoc_STRVAR(norm_at_doc, "norm_at(dtype, x, rows, n, weight, epsilon, y, threads, /)\n--\n\n"
                          "RMS norm of rows of n values; see qins_norm_rows. Arrays by address. Checks nothing.");

static PyObject *norm_at(PyObject *module, PyObject *args)
{
    (void)module;
    int dtype, threads, failed;
    Py_ssize_t x, rows, n, weight, y;
    float epsilon;
    if (!PyArg_ParseTuple(args, "innnnfni:norm_at", &dtype, &x, &rows, &n, &weight, &epsilon, &y, &threads)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS failed = qins_norm_rows(qins_active(), (qins_dtype)dtype, (const void *)x, (size_t)rows,
                                                   (size_t)n, (const float *)weight, epsilon, (void *)y, threads);
    Py_END_ALLOW_THREADS if (failed != 0) { return PyErr_NoMemory(); }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(gate_at_doc, "gate_at(dtype, gate, up, next, rows, n, activation, y, threads, /)\n--\n\n"
                          "activation(gate) * up of rows of n values; see qins_gate_rows. Arrays by address. Checks "
                          "nothing.");

static PyObject *gate_at(PyObject *module, PyObject *args)
{
    (void)module;
    int dtype, threads, activation;
    Py_ssize_t gate, up, next, rows, n, y;
    if (!PyArg_ParseTuple(args, "innnnnini:gate_at", &dtype, &gate, &up, &next, &rows, &n, &activation, &y, &threads)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS qins_gate_rows(qins_active(), (qins_dtype)dtype, (const void *)gate, (const void *)up,
                                          (size_t)next, (size_t)rows, (size_t)n, activation == QINS_GELU_TANH,
                                          (void *)y, threads);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

PyDoc_STRVAR(rotate_at_doc,
             "rotate_at(dtype, x, y, cosine, sine, sequences, tokens, heads, half, next_head, x_sequence, x_token, "
             "y_sequence, y_token, next_rotation, threads, /)\n--\n\n"
             "Rotary embedding; see qins_rotation. Arrays by address. Checks nothing.");

static PyObject *rotate_at(PyObject *module, PyObject *args)
{
    (void)module;
    int dtype, threads;
    Py_ssize_t x, y, cosine, sine, size[10];
    if (!PyArg_ParseTuple(args, "innnnnnnnnnnnnni:rotate_at", &dtype, &x, &y, &cosine, &sine, &size[0], &size[1],
                          &size[2], &size[3], &size[4], &size[5], &size[6], &size[7], &size[8], &size[9], &threads)) {
        return NULL;
    }
    const qins_rotation r = {
        .dtype = (qins_dtype)dtype,
        .x = (const void *)x,
        .cosine = (const void *)cosine,
        .sine = (const void *)sine,
        .y = (void *)y,
        .sequences = (size_t)size[0],
        .tokens = (size_t)size[1],
        .heads = (size_t)size[2],
        .half = (size_t)size[3],
        .next_head = (size_t)size[4],
        .x_sequence = (size_t)size[5],
        .x_token = (size_t)size[6],
        .y_sequence = (size_t)size[7],
        .y_token = (size_t)size[8],
        .next_rotation = (size_t)size[9],
    };
    Py_BEGIN_ALLOW_THREADS qins_rotate(qins_active(), &r, threads);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

PyMethodDef qins_decoder_methods[] = {
    {"decoder_layer", decoder_layer, METH_VARARGS, decoder_layer_doc},
    {"decode_layer", (PyCFunction)(void (*)(void))decode_layer, METH_FASTCALL, decode_layer_doc},
    {"norm_at", norm_at, METH_VARARGS, norm_at_doc},
    {"gate_at", gate_at, METH_VARARGS, gate_at_doc},
    {"rotate_at", rotate_at, METH_VARARGS, rotate_at_doc},
    {NULL, NULL, 0, NULL},
};
