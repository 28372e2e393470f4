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

typedef struct {
    const qins_decoder_layer *layer;
    qins_decoder_store keys, values;
    size_t room, past, rotary_dim;
} layer_place;

/* (layer, keys, values, room, past, rotary_dim); keys and values: (kind, data, second, third) */
static int read_place(PyObject *o, layer_place *p)
{
    enum { LAYER, KEYS, VALUES, ROOM, COUNT = 6, OF_STORE = 4 };
    size_t a[2 * OF_STORE + COUNT - ROOM];
    if (!PyTuple_Check(o) || PyTuple_GET_SIZE(o) != COUNT || !PyTuple_Check(PyTuple_GET_ITEM(o, KEYS)) ||
        !PyTuple_Check(PyTuple_GET_ITEM(o, VALUES))) {
        PyErr_Format(PyExc_TypeError, "decode_layers: expected (layer, keys, values, room, past, rotary_dim), got %R",
                     o);
        return -1;
    }
    PyObject *const stores[] = {PyTuple_GET_ITEM(o, KEYS), PyTuple_GET_ITEM(o, VALUES)};
    p->layer = PyCapsule_GetPointer(PyTuple_GET_ITEM(o, LAYER), CAPSULE);
    if (p->layer == NULL) {
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        if (qins_numbers("decode_layers", &PyTuple_GET_ITEM(stores[i], 0), PyTuple_GET_SIZE(stores[i]),
                         a + i * OF_STORE, OF_STORE) < 0) {
            return -1;
        }
    }
    if (qins_numbers("decode_layers", &PyTuple_GET_ITEM(o, ROOM), COUNT - ROOM, a + 2 * OF_STORE, COUNT - ROOM) < 0) {
        return -1;
    }
    p->keys = (qins_decoder_store){(qins_store_kind)a[0], (void *)a[1], (void *)a[2], (void *)a[3]};
    p->values = (qins_decoder_store){(qins_store_kind)a[4], (void *)a[5], (void *)a[6], (void *)a[7]};
    p->room = a[8];
    p->past = a[9];
    p->rotary_dim = a[10];
    return 0;
}

static size_t weights_of(const qins_decoder_layer *l)
{
    const qins_decoder_product *p[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    size_t n = 0;
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) {
        n += p[i]->codes.rows * p[i]->codes.cols;
    }
    return n;
}

enum { ASK_AFTER = 1 << 29 }; /* multiplications: some hundredths of a second */

PyDoc_STRVAR(
    decode_layers_doc,
    "decode_layers(places, dtype, x, y, y_next, sequences, cos, sin, rotary_next, mask, mask_is_bool, mask_sequence, "
    "threads, /)\n--\n\n"
    "Run layers on one another's results, one token for each sequence; what each returns is written to y, "
    "y_next bytes after the layer before. places: a list of (layer, keys, values, room, past, rotary_dim), keys and "
    "values as (kind, data, second, third). All other tensors by address. Returns how many layers ran: all, or those "
    "before one whose store cannot hold its keys and values.");

static PyObject *decode_layers(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    enum { DTYPE, X, Y, Y_NEXT, SEQUENCES, COS, SIN, ROTARY_NEXT, MASK, MASK_IS_BOOL, MASK_SEQUENCE, THREADS, COUNT };
    size_t a[COUNT];
    if (count < 1 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "decode_layers: expected a list");
        return NULL;
    }
    if (qins_numbers("decode_layers", args + 1, count - 1, a, COUNT) < 0) {
        return NULL;
    }
    const Py_ssize_t layers = PyList_GET_SIZE(args[0]);
    layer_place *places = calloc((size_t)layers + 1, sizeof *places);
    if (places == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < layers; i++) {
        if (read_place(PyList_GET_ITEM(args[0], i), &places[i]) < 0) {
            free(places);
            return NULL;
        }
    }
    qins_decoder_call call = {
        .dtype = (qins_dtype)a[DTYPE],
        .x = (const void *)a[X],
        .y = (void *)a[Y],
        .sequences = a[SEQUENCES],
        .tokens = 1,
        .tables = qins_tables_of_caches,
        .cos = (const void *)a[COS],
        .sin = (const void *)a[SIN],
        .rotary_next = a[ROTARY_NEXT],
        .mask = (const void *)a[MASK],
        .mask_is_bool = a[MASK_IS_BOOL] != 0,
        .mask_sequence = a[MASK_SEQUENCE],
    };
    int failed = 0, raised = 0;
    Py_ssize_t ran = 0;
    size_t multiplied = 0; /* since signals were asked for */
    PyThreadState *thread = PyEval_SaveThread();
    for (; ran < layers; ran++) {
        if (multiplied >= ASK_AFTER) {
            PyEval_RestoreThread(thread);
            raised = PyErr_CheckSignals();
            thread = PyEval_SaveThread();
            multiplied = 0;
        }
        const layer_place *p = &places[ran];
        call.keys = p->keys;
        call.values = p->values;
        call.room = p->room;
        call.past = p->past;
        call.rotary_dim = p->rotary_dim;
        failed = raised ? -1 : qins_decode_layer(qins_active(), p->layer, &call, (int)a[THREADS]);
        if (failed) {
            break;
        }
        multiplied += weights_of(p->layer) * call.sequences;
        call.x = call.y;
        call.y = (char *)call.y + a[Y_NEXT];
    }
    PyEval_RestoreThread(thread);
    free(places);
    if (failed < 0) {
        return raised ? NULL : PyErr_NoMemory();
    }
    return PyLong_FromSsize_t(ran);
}

PyDoc_STRVAR(are_unchanged_doc,
             "are_unchanged(values, empty, /)\n--\n\n"
             "Return whether each of a tuple's (dict, key, value) has this very value under this key, and whether the "
             "other tuple's dicts are empty. For what is asked of every layer for every token.");

static PyObject *are_unchanged(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (count != 2 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "are_unchanged: expected two tuples");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i++) {
        PyObject *one = PyTuple_GET_ITEM(args[0], i);
        if (!PyTuple_Check(one) || PyTuple_GET_SIZE(one) != 3 || !PyDict_Check(PyTuple_GET_ITEM(one, 0))) {
            PyErr_Format(PyExc_TypeError, "are_unchanged: expected (dict, key, value), got %R", one);
            return NULL;
        }
        PyObject *found = PyDict_GetItemWithError(PyTuple_GET_ITEM(one, 0), PyTuple_GET_ITEM(one, 1));
        if (found == NULL && PyErr_Occurred()) {
            return NULL;
        }
        if (found != PyTuple_GET_ITEM(one, 2)) {
            Py_RETURN_FALSE;
        }
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); i++) {
        PyObject *one = PyTuple_GET_ITEM(args[1], i);
        if (!PyDict_Check(one)) {
            PyErr_Format(PyExc_TypeError, "are_unchanged: expected a dict, got %R", one);
            return NULL;
        }
        if (PyDict_GET_SIZE(one) != 0) {
            Py_RETURN_FALSE;
        }
    }
    Py_RETURN_TRUE;
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
    {"decode_layers", (PyCFunction)(void (*)(void))decode_layers, METH_FASTCALL, decode_layers_doc},
    {"are_unchanged", (PyCFunction)(void (*)(void))are_unchanged, METH_FASTCALL, are_unchanged_doc},
    {"norm_at", norm_at, METH_VARARGS, norm_at_doc},
    {"gate_at", gate_at, METH_VARARGS, gate_at_doc},
    {"rotate_at", rotate_at, METH_VARARGS, rotate_at_doc},
    {NULL, NULL, 0, NULL},
};
