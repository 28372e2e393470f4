/* Python bindings for products and KV caches. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"

#include <string.h>

#include "ways.h"

enum { MULTIPLICATIONS = 64 }; /* in a nanosecond of several threads; one row of activations is never long */

PyDoc_STRVAR(read_doc, "read(array, threads, /)\n--\n\nOnly read a C-contiguous array, for benchmarks.");

static PyObject *read_array(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *array;
    int threads;
    if (!PyArg_ParseTuple(args, "O!i:read", &PyArray_Type, &array, &threads)) {
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)array;
    if (!PyArray_IS_C_CONTIGUOUS(a)) {
        qins_wrong_argument("array", "a C-contiguous array", array);
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    Py_BEGIN_ALLOW_THREADS qins_read(kernels, PyArray_DATA(a), (size_t)PyArray_NBYTES(a), threads);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* linear_at(codec, addresses of the arrays and scalars, ...): for callers that have checked everything.
 * A model calls it hundreds of times per token, so it takes plain numbers by position. */
PyDoc_STRVAR(linear_at_doc,
             "linear_at(codec, codes, second, third, first_scalar, second_scalar, rows, cols, group_size, x, batch, "
             "dtype, y, threads, /)\n--\n\n"
             "y = x @ W.T; arrays and scalars by address, codec and dtype by number. Checks nothing.");

static PyObject *linear_at(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    enum { CODEC, CODES, SECOND, THIRD, SCALAR, SCALAR2, ROWS, COLS, GROUP, X, BATCH, DTYPE, Y, THREADS, COUNT };
    size_t a[COUNT];
    qins_codes e;
    if (qins_numbers("linear_at", args, count, a, COUNT) < 0) {
        return NULL;
    }
    qins_codes_at(a, &e);
    const qins_kernels *kernels = qins_active();
    const int small = a[ROWS] * a[COLS] <= QINS_RELEASE_GIL_ABOVE;
    qins_released released;
    if (!small) {
        qins_release(&released, a[ROWS] * a[COLS] * a[BATCH] / MULTIPLICATIONS);
    }
    int failed =
        qins_linear(kernels, &e, (const void *)a[X], a[BATCH], (qins_dtype)a[DTYPE], (void *)a[Y], (int)a[THREADS]);
    if (!small && qins_retake(&released) < 0) {
        return NULL;
    }
    if (failed) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(linear_doc, "linear(codec, arrays, scalars, rows, cols, group_size, x, dtype, y, threads, /)\n--\n\n"
                         "y = x @ W.T for C-contiguous x (batch, cols) and y (batch, rows) of one dtype.");

static PyObject *linear(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name, *dtype_name;
    PyObject *arrays, *scalars, *x, *y;
    Py_ssize_t rows, cols, group_size;
    int threads;
    qins_codec codec;
    qins_dtype dtype;
    qins_codes e;
    void *x_data, *y_data;
    if (!PyArg_ParseTuple(args, "sO!O!nnnO!sO!i:linear", &codec_name, &PyTuple_Type, &arrays, &PyTuple_Type, &scalars,
                          &rows, &cols, &group_size, &PyArray_Type, &x, &dtype_name, &PyArray_Type, &y, &threads) ||
        qins_find_codec(codec_name, &codec) < 0 || qins_find_dtype(dtype_name, &dtype) < 0 ||
        qins_check_group_size(group_size) < 0 || qins_codec_arrays(codec, arrays, rows, cols, group_size, 0, &e) < 0 ||
        qins_read_scalars(&e, scalars) < 0) {
        return NULL;
    }
    Py_ssize_t batch = PyArray_NDIM((PyArrayObject *)x) == 2 ? PyArray_DIM((PyArrayObject *)x, 0) : 0;
    if (qins_array_argument(x, "x", qins_dtype_names[dtype].type, dtype_name, batch, cols, 0, &x_data) < 0 ||
        qins_array_argument(y, "y", qins_dtype_names[dtype].type, dtype_name, batch, rows, 1, &y_data) < 0 ||
        qins_check_overlap(y, x, "y", "x") < 0) {
        return NULL;
    }
    if (qins_check_overlap_codes(y, "y", arrays) < 0) {
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    int failed;
    qins_released released;
    qins_release(&released, e.rows * e.cols * (size_t)batch / MULTIPLICATIONS);
    failed = qins_linear(kernels, &e, x_data, (size_t)batch, dtype, y_data, threads);
    if (qins_retake(&released) < 0) {
        return NULL;
    }
    if (failed) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(way_doc, "way(codec, mu, group_size, batch, dtype, /)\n--\n\n"
                      "Name of the way (one of WAYS) that multiplies `batch` rows of activations here.");

static PyObject *way(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name, *dtype_name;
    Py_ssize_t group_size, batch;
    qins_dtype dtype;
    qins_codes e = {.rows = 1};
    if (!PyArg_ParseTuple(args, "sfnns:way", &codec_name, &e.mu, &group_size, &batch, &dtype_name) ||
        qins_find_codec(codec_name, &e.codec) < 0 || qins_find_dtype(dtype_name, &dtype) < 0 ||
        qins_check_group_size(group_size) < 0) {
        return NULL;
    }
    e.group_size = (size_t)group_size;
    return PyUnicode_FromString(qins_way_names[qins_choose_way(qins_active(), &e, (size_t)batch, dtype)]);
}

PyDoc_STRVAR(force_way_doc,
             "force_way(name, /)\n--\n\n"
             "Force this way on every product that supports it; None: back to the fastest. For tests and "
             "benchmarks.");

static PyObject *force_way(PyObject *module, PyObject *arg)
{
    (void)module;
    const char *name = arg == Py_None ? "" : PyUnicode_AsUTF8(arg);
    if (name == NULL) {
        return NULL;
    }
    int found = 0;
    while (found < QINS_WAY_COUNT && strcmp(name, qins_way_names[found]) != 0) {
        found++;
    }
    if (found == QINS_WAY_COUNT && arg != Py_None) {
        PyErr_Format(PyExc_ValueError, "way: expected one of _core.WAYS, got %R", arg);
        return NULL;
    }
    qins_force_way((qins_way)found);
    Py_RETURN_NONE;
}

/* -- KV cache ---------------------------------------------------------------------------------- */

PyDoc_STRVAR(cache_at_doc,
             "cache_at(write, codec, codes, second, third, heads, room, dim, start, tokens, x, dtype, threads, /)"
             "\n--\n\n"
             "Encode tokens from x into a cache, or decode them to x; arrays by address, codec and dtype "
             "by number. Returns whether all were finite. Checks nothing.");

static PyObject *cache_at(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    enum { WRITE, CODEC, CODES, SECOND, THIRD, HEADS, ROOM, DIM, START, TOKENS, X, DTYPE, THREADS, COUNT };
    size_t a[COUNT];
    if (qins_numbers("cache_at", args, count, a, COUNT) < 0) {
        return NULL;
    }
    qins_cache c = {.codec = (qins_codec)a[CODEC], .heads = a[HEADS], .room = a[ROOM], .dim = a[DIM]};
    c.codes = (uint8_t *)a[CODES];
    c.tables = &qins_tables_of_caches[c.codec];
    if (c.codec == QINS_golden) {
        c.sign = (int8_t *)a[SECOND];
        c.range = (float *)a[THIRD];
    } else {
        c.scale = (uint16_t *)a[SECOND];
        c.group_scale = (uint8_t *)a[THIRD];
    }
    const qins_kernels *kernels = qins_active();
    int failed = 0;
    PyThreadState *released = a[HEADS] * a[TOKENS] * a[DIM] > QINS_RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    if (a[WRITE]) {
        failed = qins_cache_encode(kernels, &c, (const void *)a[X], (qins_dtype)a[DTYPE], a[START], a[TOKENS],
                                   (int)a[THREADS]);
    } else {
        qins_cache_decode(kernels, &c, a[START], a[TOKENS], (qins_dtype)a[DTYPE], (void *)a[X], (int)a[THREADS]);
    }
    if (released != NULL) {
        PyEval_RestoreThread(released);
    }
    if (failed < 0) {
        return PyErr_NoMemory();
    }
    return PyBool_FromLong(!failed);
}

PyMethodDef qins_product_methods[] = {
    {"linear", linear, METH_VARARGS, linear_doc},
    {"linear_at", (PyCFunction)(void (*)(void))linear_at, METH_FASTCALL, linear_at_doc},
    {"way", way, METH_VARARGS, way_doc},
    {"force_way", force_way, METH_O, force_way_doc},
    {"read", read_array, METH_VARARGS, read_doc},
    {"cache_at", (PyCFunction)(void (*)(void))cache_at, METH_FASTCALL, cache_at_doc},
    {NULL, NULL, 0, NULL},
};
