/* The glue: checks every argument once, releases the GIL, calls the core. No arithmetic.
 *
 * Python's side (python/qins/array.py) passes matrices as 2-D arrays. bfloat16 has no type number
 * of NumPy's own, so element types travel as names beside the arrays, and bfloat16 as uint16. */
#define PY_SSIZE_T_CLEAN
#include "args.h"

#include <stdatomic.h>
#include <string.h>

/* One for the process: an instruction set is a property of the machine, not of an interpreter. */
static _Atomic(const qins_kernels *) active;

/* -- encode and decode -------------------------------------------------------------------------- */

static PyObject *nonfinite_error(PyArrayObject *weights, qins_nonfinite bad)
{
    Py_ssize_t cols = PyArray_DIM(weights, 1);
    PyErr_Format(PyExc_ValueError,
                 "weights: expected finite float32 values, got %zu NaN or infinite, the first at flat index %zu "
                 "(row %zu, column %zu)",
                 bad.count, bad.first, bad.first / (size_t)cols, bad.first % (size_t)cols);
    return NULL;
}

PyDoc_STRVAR(encode_doc, "encode(codec, weights, dtype, arrays, group_size, parameter, importance, threads, /)\n--\n\n"
                         "Fill the arrays; return the scalars as a tuple of floats. The parameter is log8's mu "
                         "(negative: search it) or rational's alpha. importance: None, or for log8 a float32 for each "
                         "column that weighs its squared errors.");

static PyObject *encode(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name, *dtype_name;
    PyObject *weights, *arrays, *importance;
    Py_ssize_t group_size;
    double parameter;
    void *importance_data = NULL;
    int threads;
    qins_codec codec;
    qins_matrix w;
    qins_codes e;
    if (!PyArg_ParseTuple(args, "sO!sO!ndOi:encode", &codec_name, &PyArray_Type, &weights, &dtype_name, &PyTuple_Type,
                          &arrays, &group_size, &parameter, &importance, &threads) ||
        qins_find_codec(codec_name, &codec) < 0 || qins_find_dtype(dtype_name, &w.dtype) < 0 ||
        qins_check_group_size(group_size) < 0) {
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)weights;
    if (PyArray_NDIM(a) != 2 || PyArray_TYPE(a) != qins_dtype_names[w.dtype].type || !PyArray_ISNOTSWAPPED(a)) {
        qins_wrong_argument("weights", "a 2-D array of its dtype in native byte order", weights);
        return NULL;
    }
    if (codec == QINS_rational ? !((float)parameter > 0.0f) : !(parameter <= (double)QINS_MU_MAX)) {
        PyErr_Format(PyExc_ValueError, "%s, got %R",
                     codec == QINS_rational ? "alpha: expected a positive number" : "mu: expected 0 to 65536",
                     PyTuple_GET_ITEM(args, 5));
        return NULL;
    }
    Py_ssize_t rows = PyArray_DIM(a, 0), cols = PyArray_DIM(a, 1);
    if (qins_codec_arrays(codec, arrays, rows, cols, group_size, 1, &e) < 0 ||
        (importance != Py_None &&
         qins_array_argument(importance, "importance", NPY_FLOAT32, "float32", cols, -1, 0, &importance_data) < 0)) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arrays); i++) {
        if (qins_check_overlap(PyTuple_GET_ITEM(arrays, i), weights, "arrays", "weights") < 0) {
            return NULL;
        }
    }
    w.data = PyArray_DATA(a);
    w.rows = (size_t)rows;
    w.cols = (size_t)cols;
    w.row_stride = PyArray_STRIDE(a, 0);
    w.col_stride = PyArray_STRIDE(a, 1);
    e.mu = e.alpha = (float)parameter;
    const qins_kernels *kernels = atomic_load(&active);
    qins_nonfinite bad = {0, 0};
    Py_BEGIN_ALLOW_THREADS if (qins_encode(kernels, &w, importance_data, threads, &e))
    {
        bad = qins_find_nonfinite(kernels, &w);
    }
    Py_END_ALLOW_THREADS if (bad.count > 0) { return nonfinite_error(a, bad); }
    if (codec == QINS_log8) {
        return Py_BuildValue("(d)", (double)e.mu);
    }
    if (codec == QINS_rational) {
        return Py_BuildValue("(ddd)", (double)e.alpha, (double)e.z_min, (double)e.z_max);
    }
    return Py_BuildValue("(dd)", (double)e.log_min, (double)e.log_max);
}

PyDoc_STRVAR(feedback_doc, "feedback(weights, order, feedback, arrays, mu, group_size, threads, /)\n--\n\n"
                           "Round weights to log8 with error feedback under the scales that the arrays have, into "
                           "their codes. weights: float32, C-contiguous, (rows, cols); order: uint32, a permutation "
                           "of the columns; feedback: float32, (cols, cols), row j for the j-th column in order.");

static PyObject *feedback(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *weights, *order, *factors, *arrays;
    Py_ssize_t group_size;
    float mu;
    int threads, failed;
    void *w, *o, *f;
    qins_codes e;
    if (!PyArg_ParseTuple(args, "O!O!O!O!fni:feedback", &PyArray_Type, &weights, &PyArray_Type, &order, &PyArray_Type,
                          &factors, &PyTuple_Type, &arrays, &mu, &group_size, &threads) ||
        qins_check_group_size(group_size) < 0) {
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)weights;
    Py_ssize_t rows = PyArray_NDIM(a) == 2 ? PyArray_DIM(a, 0) : 0, cols = PyArray_NDIM(a) == 2 ? PyArray_DIM(a, 1) : 0;
    if (qins_array_argument(weights, "weights", NPY_FLOAT32, "float32", rows, cols, 0, &w) < 0 ||
        qins_array_argument(order, "order", NPY_UINT32, "uint32", cols, -1, 0, &o) < 0 ||
        qins_array_argument(factors, "feedback", NPY_FLOAT32, "float32", cols, cols, 0, &f) < 0 ||
        qins_codec_arrays(QINS_log8, arrays, rows, cols, group_size, 1, &e) < 0 ||
        qins_check_overlap(PyTuple_GET_ITEM(arrays, 0), weights, "codes", "weights") < 0) {
        return NULL;
    }
    if (!PyArray_ISALIGNED(a) || !PyArray_ISALIGNED((PyArrayObject *)order) ||
        !PyArray_ISALIGNED((PyArrayObject *)factors) || !(mu >= 0.0f && mu <= QINS_MU_MAX)) {
        PyErr_SetString(PyExc_ValueError, "weights, order, feedback, mu: expected aligned arrays and mu 0 to 65536");
        return NULL;
    }
    for (Py_ssize_t j = 0; j < cols; j++) {
        if (((const uint32_t *)o)[j] >= (size_t)cols) {
            PyErr_Format(PyExc_ValueError, "order: expected columns below %zd, got %lu", cols,
                         (unsigned long)((const uint32_t *)o)[j]);
            return NULL;
        }
    }
    e.mu = mu;
    const qins_kernels *kernels = atomic_load(&active);
    Py_BEGIN_ALLOW_THREADS failed = qins_round_with_feedback(kernels, w, o, f, threads, &e);
    Py_END_ALLOW_THREADS if (failed) { return PyErr_NoMemory(); }
    Py_RETURN_NONE;
}

/* Work shorter than this is done with the GIL held: releasing it costs more. */
enum { RELEASE_GIL_ABOVE = 4096 };

PyDoc_STRVAR(decode_doc,
             "decode(codec, arrays, scalars, rows, cols, group_size, out, dtype, row, col, threads, /)\n--\n\n"
             "Decode the block of out's shape that begins at (row, col) of a rows x cols matrix into out.");

/* Rows of adjacent elements, a whole number of elements apart, not overlapping. */
static int rows_contiguous(PyArrayObject *a)
{
    npy_intp size = PyArray_ITEMSIZE(a), rows = PyArray_DIM(a, 0), cols = PyArray_DIM(a, 1);
    if (rows == 0 || cols == 0) {
        return 1; /* NumPy gives empty arrays any strides */
    }
    return (cols == 1 || PyArray_STRIDE(a, 1) == size) &&
           (rows == 1 || (PyArray_STRIDE(a, 0) >= cols * size && PyArray_STRIDE(a, 0) % size == 0));
}

static PyObject *decode(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name, *dtype_name;
    PyObject *arrays, *scalars, *out;
    Py_ssize_t rows, cols, group_size, row, col;
    int threads;
    qins_codec codec;
    qins_dtype dtype;
    qins_codes e;
    if (!PyArg_ParseTuple(args, "sO!O!nnnO!snni:decode", &codec_name, &PyTuple_Type, &arrays, &PyTuple_Type, &scalars,
                          &rows, &cols, &group_size, &PyArray_Type, &out, &dtype_name, &row, &col, &threads) ||
        qins_find_codec(codec_name, &codec) < 0 || qins_find_dtype(dtype_name, &dtype) < 0 ||
        qins_check_group_size(group_size) < 0 || qins_codec_arrays(codec, arrays, rows, cols, group_size, 0, &e) < 0 ||
        qins_read_scalars(&e, scalars) < 0) {
        return NULL;
    }
    PyArrayObject *o = (PyArrayObject *)out;
    if (PyArray_NDIM(o) != 2 || PyArray_TYPE(o) != qins_dtype_names[dtype].type || !PyArray_ISNOTSWAPPED(o) ||
        !PyArray_ISWRITEABLE(o) || !rows_contiguous(o)) {
        qins_wrong_argument("out", "a writable 2-D array of its dtype whose rows are contiguous", out);
        return NULL;
    }
    if (row < 0 || col < 0 || row > rows - PyArray_DIM(o, 0) || col > cols - PyArray_DIM(o, 1)) {
        PyErr_Format(PyExc_ValueError, "out: expected a block inside (%zd, %zd), got (%zd, %zd) at (%zd, %zd)", rows,
                     cols, (Py_ssize_t)PyArray_DIM(o, 0), (Py_ssize_t)PyArray_DIM(o, 1), row, col);
        return NULL;
    }
    if (qins_check_overlap_codes(out, "out", arrays) < 0) {
        return NULL;
    }
    const qins_kernels *kernels = atomic_load(&active);
    size_t r = (size_t)PyArray_DIM(o, 0), c = (size_t)PyArray_DIM(o, 1);
    size_t stride = (size_t)(PyArray_STRIDE(o, 0) / PyArray_ITEMSIZE(o));
    PyThreadState *released = PyArray_SIZE(o) > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    qins_decode(kernels, &e, (size_t)row, r, (size_t)col, c, threads, dtype, PyArray_DATA(o), stride);
    if (released != NULL) {
        PyEval_RestoreThread(released);
    }
    Py_RETURN_NONE;
}

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
    const qins_kernels *kernels = atomic_load(&active);
    Py_BEGIN_ALLOW_THREADS qins_read(kernels, PyArray_DATA(a), (size_t)PyArray_NBYTES(a), threads);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* linear_at(codec, addresses of the arrays and scalars, ...): for callers that have checked everything.
 * A model calls it hundreds of times a token, so it takes plain numbers by position. */
PyDoc_STRVAR(linear_at_doc,
             "linear_at(codec, codes, second, third, first_scalar, second_scalar, rows, cols, group_size, x, batch, "
             "dtype, y, threads, /)\n--\n\n"
             "y = x @ W.T; arrays and scalars by address, codec and dtype by number. Checks nothing.");

static PyObject *linear_at(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    enum { CODEC, CODES, SECOND, THIRD, SCALAR, SCALAR2, ROWS, COLS, GROUP, X, BATCH, DTYPE, Y, THREADS, COUNT };
    size_t a[COUNT];
    if (count != COUNT) {
        PyErr_Format(PyExc_TypeError, "linear_at: expected %d arguments, got %zd", COUNT, count);
        return NULL;
    }
    for (int i = 0; i < COUNT; i++) {
        a[i] = PyLong_AsSize_t(args[i]);
    }
    if (PyErr_Occurred()) {
        return NULL;
    }
    qins_codes e = {.codec = (qins_codec)a[CODEC], .rows = a[ROWS], .cols = a[COLS], .group_size = a[GROUP]};
    e.codes = (uint8_t *)a[CODES];
    if (e.codec == QINS_log8) {
        e.scale = (float *)a[SECOND];
        e.group_scale = (uint8_t *)a[THIRD];
        memcpy(&e.mu, (const void *)a[SCALAR], sizeof e.mu);
    } else if (e.codec == QINS_rational) {
        memcpy(&e.alpha, (const void *)a[SECOND], sizeof e.alpha);
        memcpy(&e.z_min, (const void *)a[SCALAR], sizeof e.z_min);
        memcpy(&e.z_max, (const void *)a[SCALAR2], sizeof e.z_max);
    } else {
        e.sign = (int8_t *)a[SECOND];
        e.sign_bits = (uint8_t *)a[SECOND];
        memcpy(&e.log_min, (const void *)a[SCALAR], sizeof e.log_min);
        memcpy(&e.log_max, (const void *)a[SCALAR2], sizeof e.log_max);
    }
    const qins_kernels *kernels = atomic_load(&active);
    PyThreadState *released = a[ROWS] * a[COLS] > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    int failed =
        qins_linear(kernels, &e, (const void *)a[X], a[BATCH], (qins_dtype)a[DTYPE], (void *)a[Y], (int)a[THREADS]);
    if (released != NULL) {
        PyEval_RestoreThread(released);
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
    const qins_kernels *kernels = atomic_load(&active);
    int failed;
    Py_BEGIN_ALLOW_THREADS failed = qins_linear(kernels, &e, x_data, (size_t)batch, dtype, y_data, threads);
    Py_END_ALLOW_THREADS if (failed) { return PyErr_NoMemory(); }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(levels_doc, "levels(codec, scalars, /)\n--\n\n"
                         "Float32 bytes: the 128 magnitudes of log8 or rational, or golden's 256 by stored.");

static PyObject *levels(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name;
    PyObject *scalars;
    qins_codes e = {.rows = 0};
    qins_decoder d;
    if (!PyArg_ParseTuple(args, "sO!:levels", &codec_name, &PyTuple_Type, &scalars) ||
        qins_find_codec(codec_name, &e.codec) < 0 || qins_read_scalars(&e, scalars) < 0) {
        return NULL;
    }
    qins_decoder_init(&d, atomic_load(&active), &e);
    int by_level = e.codec == QINS_log8 || e.codec == QINS_rational;
    return PyBytes_FromStringAndSize((const char *)d.table, (by_level ? QINS_LEVELS : 256) * sizeof *d.table);
}

PyDoc_STRVAR(rational_doc, "rational(source, alpha, back, out, threads, /)\n--\n\n"
                           "z of weights, or weights of z: C-contiguous float32 arrays of one size.");

static PyObject *rational(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *source, *out;
    float alpha;
    int back, threads;
    void *src, *dst;
    if (!PyArg_ParseTuple(args, "O!fpO!i:rational", &PyArray_Type, &source, &alpha, &back, &PyArray_Type, &out,
                          &threads)) {
        return NULL;
    }
    Py_ssize_t n = PyArray_SIZE((PyArrayObject *)source);
    if (qins_array_argument(source, "source", NPY_FLOAT32, "float32", n, -1, 0, &src) < 0 ||
        qins_array_argument(out, "out", NPY_FLOAT32, "float32", n, -1, 1, &dst) < 0 ||
        qins_check_overlap(out, source, "out", "source") < 0) {
        return NULL;
    }
    const qins_kernels *kernels = atomic_load(&active);
    Py_BEGIN_ALLOW_THREADS qins_rational(kernels, src, (size_t)n, alpha, back, threads, dst);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* -- KV cache ---------------------------------------------------------------------------------- */

/* log8 in caches has one mu for all: 2 is the best for SmolLM2's values, 8 for its keys, 3 within 0.7 dB of both. */
#define CACHE_MU 3.0f
static qins_log8_tables cache_tables;

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
    if (count != COUNT) {
        PyErr_Format(PyExc_TypeError, "cache_at: expected %d arguments, got %zd", COUNT, count);
        return NULL;
    }
    for (int i = 0; i < COUNT; i++) {
        a[i] = PyLong_AsSize_t(args[i]);
    }
    if (PyErr_Occurred()) {
        return NULL;
    }
    qins_cache c = {.codec = (qins_codec)a[CODEC], .heads = a[HEADS], .room = a[ROOM], .dim = a[DIM]};
    c.codes = (uint8_t *)a[CODES];
    c.tables = &cache_tables;
    if (c.codec == QINS_golden) {
        c.sign = (int8_t *)a[SECOND];
        c.range = (float *)a[THIRD];
    } else {
        c.scale = (uint16_t *)a[SECOND];
    }
    const qins_kernels *kernels = atomic_load(&active);
    int failed = 0;
    PyThreadState *released = a[HEADS] * a[TOKENS] * a[DIM] > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
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

/* -- instruction sets and threads --------------------------------------------------------------- */

PyDoc_STRVAR(isas_doc, "isas()\n--\n\nNames of the instruction sets that run here, best first.");

static PyObject *isas(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    size_t n = qins_isa_count();
    PyObject *names = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; names != NULL && i < n; i++) {
        PyObject *name = PyUnicode_FromString(qins_isa_at(i)->name);
        if (name == NULL) {
            Py_CLEAR(names);
        } else {
            PyTuple_SET_ITEM(names, (Py_ssize_t)i, name);
        }
    }
    return names;
}

PyDoc_STRVAR(isa_doc, "isa()\n--\n\nName of the instruction set in use.");

static PyObject *isa(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(atomic_load(&active)->name);
}

PyDoc_STRVAR(has_bf16_doc,
             "has_bf16(name, /)\n--\n\nWhether this instruction set runs here and has bfloat16 arithmetic.");

static PyObject *has_bf16(PyObject *module, PyObject *arg)
{
    (void)module;
    const char *name = PyUnicode_AsUTF8(arg);
    if (name == NULL) {
        return NULL;
    }
    const qins_kernels *k = qins_isa_find(name);
    return PyBool_FromLong(k != NULL && k->halves != NULL);
}

PyDoc_STRVAR(set_isa_doc, "set_isa(name, /)\n--\n\nUse this instruction set from now on, in the whole process.");

static PyObject *set_isa(PyObject *module, PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8(arg);
    if (name == NULL) {
        return NULL;
    }
    const qins_kernels *k = qins_isa_find(name);
    if (k == NULL) {
        PyObject *available = isas(module, NULL);
        if (available != NULL) {
            PyErr_Format(PyExc_ValueError, "isa: expected one of %R (those that run here), got %R", available, arg);
            Py_DECREF(available);
        }
        return NULL;
    }
    atomic_store(&active, k);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_fork_join_doc,
             "set_fork_join(address, /)\n--\n\n"
             "Run parallel work through the GOMP_parallel at this address; 0: through our own pool.");

static PyObject *set_fork_join(PyObject *module, PyObject *arg)
{
    (void)module;
    void *address = PyLong_AsVoidPtr(arg);
    if (PyErr_Occurred()) {
        return NULL;
    }
    qins_fork_join parallel = NULL;
    memcpy(&parallel, &address, sizeof address);
    qins_set_fork_join(parallel);
    Py_RETURN_NONE;
}

/* -- the module ----------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, encode_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {"feedback", feedback, METH_VARARGS, feedback_doc},
    {"linear", linear, METH_VARARGS, linear_doc},
    {"linear_at", (PyCFunction)(void (*)(void))linear_at, METH_FASTCALL, linear_at_doc},
    {"read", read_array, METH_VARARGS, read_doc},
    {"rational", rational, METH_VARARGS, rational_doc},
    {"cache_at", (PyCFunction)(void (*)(void))cache_at, METH_FASTCALL, cache_at_doc},
    {"levels", levels, METH_VARARGS, levels_doc},
    {"isas", isas, METH_NOARGS, isas_doc},
    {"isa", isa, METH_NOARGS, isa_doc},
    {"has_bf16", has_bf16, METH_O, has_bf16_doc},
    {"set_isa", set_isa, METH_O, set_isa_doc},
    {"set_fork_join", set_fork_join, METH_O, set_fork_join_doc},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    if (atomic_load(&active) == NULL) {
        qins_log8_tables_build(&cache_tables, CACHE_MU);
        atomic_store(&active, qins_isa_at(0));
    }
    PyObject *codecs = PyTuple_New(QINS_CODEC_COUNT);
    for (Py_ssize_t i = 0; codecs != NULL && i < QINS_CODEC_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(qins_codec_names[i]);
        if (name == NULL) {
            Py_CLEAR(codecs);
        } else {
            PyTuple_SET_ITEM(codecs, i, name);
        }
    }
    PyObject *mu_max = PyFloat_FromDouble((double)QINS_MU_MAX);
    int failed = codecs == NULL || mu_max == NULL || PyModule_AddObjectRef(module, "CODECS", codecs) < 0 ||
                 PyModule_AddObjectRef(module, "MU_MAX", mu_max) < 0;
    Py_XDECREF(codecs);
    Py_XDECREF(mu_max);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
/* NumPy's C API is bound to the main interpreter. */
#ifdef Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "qins._core",
    .m_doc = "Codecs and kernels in C; qins is its user.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
