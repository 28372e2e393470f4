/* Python bindings for encoding and decoding. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"
#include "packed.h"

static PyObject *nonfinite_error(PyArrayObject *weights, qins_nonfinite bad)
{
    Py_ssize_t cols = PyArray_DIM(weights, 1);
    PyErr_Format(PyExc_ValueError,
                 "weights: expected finite float32 values, got %zu NaN or infinite, the first at flat index %zu "
                 "(row %zu, column %zu)",
                 bad.count, bad.first, bad.first / (size_t)cols, bad.first % (size_t)cols);
    return NULL;
}

PyDoc_STRVAR(encode_doc,
             "encode(codec, weights, dtype, arrays, group_size, parameter, importance, threads, /)\n--\n\n"
             "Fill the arrays; return the scalars as a tuple of floats. The parameter is log8's mu "
             "(negative: search for it) or rational's alpha. importance: None, or for log8 a float32 weight "
             "for each column's squared errors.");

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
    const qins_kernels *kernels = qins_active();
    qins_nonfinite bad = {0, 0};
    qins_released released;
    qins_release(&released, 32 * w.rows * w.cols);
    if (qins_encode(kernels, &w, importance_data, threads, &e) && !qins_stopped()) {
        bad = qins_find_nonfinite(kernels, &w);
    }
    if (qins_retake(&released) < 0) {
        return NULL;
    }
    if (bad.count > 0) {
        return nonfinite_error(a, bad);
    }
    if (log_bits(codec) > 0) {
        return Py_BuildValue("(d)", (double)e.mu);
    }
    if (codec == QINS_rational) {
        return Py_BuildValue("(ddd)", (double)e.alpha, (double)e.z_min, (double)e.z_max);
    }
    return Py_BuildValue("(dd)", (double)e.log_min, (double)e.log_max);
}

PyDoc_STRVAR(feedback_doc,
             "feedback(codec, weights, order, feedback, arrays, mu, group_size, threads, /)\n--\n\n"
             "Round weights to a codec of log8's family with error feedback: fill the codes, given the scales in the "
             "arrays. weights: float32, C-contiguous, (rows, cols); order: uint32, a permutation "
             "of the columns; feedback: float32, (cols, cols), row j for the j-th column in order.");

static PyObject *feedback(PyObject *module, PyObject *args)
{
    (void)module;
    const char *codec_name;
    PyObject *weights, *order, *factors, *arrays;
    qins_codec codec;
    Py_ssize_t group_size;
    float mu;
    int threads, failed;
    void *w, *o, *f;
    qins_codes e;
    if (!PyArg_ParseTuple(args, "sO!O!O!O!fni:feedback", &codec_name, &PyArray_Type, &weights, &PyArray_Type, &order,
                          &PyArray_Type, &factors, &PyTuple_Type, &arrays, &mu, &group_size, &threads) ||
        qins_find_codec(codec_name, &codec) < 0 || qins_check_group_size(group_size) < 0) {
        return NULL;
    }
    if (log_bits(codec) == 0) {
        PyErr_Format(PyExc_ValueError, "codec: expected log8, log6, log5 or log4, got %s", codec_name);
        return NULL;
    }
    PyArrayObject *a = (PyArrayObject *)weights;
    Py_ssize_t rows = PyArray_NDIM(a) == 2 ? PyArray_DIM(a, 0) : 0, cols = PyArray_NDIM(a) == 2 ? PyArray_DIM(a, 1) : 0;
    if (qins_array_argument(weights, "weights", NPY_FLOAT32, "float32", rows, cols, 0, &w) < 0 ||
        qins_array_argument(order, "order", NPY_UINT32, "uint32", cols, -1, 0, &o) < 0 ||
        qins_array_argument(factors, "feedback", NPY_FLOAT32, "float32", cols, cols, 0, &f) < 0 ||
        qins_codec_arrays(codec, arrays, rows, cols, group_size, 1, &e) < 0 ||
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
    const qins_kernels *kernels = qins_active();
    qins_released released;
    qins_release(&released, (size_t)rows * (size_t)cols * (size_t)cols / 16);
    failed = qins_round_with_feedback(kernels, w, o, f, threads, &e);
    if (qins_retake(&released) < 0) {
        return NULL;
    }
    if (failed) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(decode_doc,
             "decode(codec, arrays, scalars, rows, cols, group_size, out, dtype, row, col, threads, /)\n--\n\n"
             "Decode the block of out's shape that begins at (row, col) of a rows x cols matrix into out.");

/* Whether rows are contiguous, a whole number of elements apart, and not overlapping. */
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
    const qins_kernels *kernels = qins_active();
    size_t r = (size_t)PyArray_DIM(o, 0), c = (size_t)PyArray_DIM(o, 1);
    size_t stride = (size_t)(PyArray_STRIDE(o, 0) / PyArray_ITEMSIZE(o));
    const int small = PyArray_SIZE(o) <= QINS_RELEASE_GIL_ABOVE;
    qins_released released;
    if (!small) {
        qins_release(&released, r * c);
    }
    qins_decode(kernels, &e, (size_t)row, r, (size_t)col, c, threads, dtype, PyArray_DATA(o), stride);
    if (!small && qins_retake(&released) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(levels_doc,
             "levels(codec, scalars, /)\n--\n\n"
             "Return, as float32 bytes, the 128 magnitudes of log8 or rational, or golden's 256 by stored.");

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
    qins_decoder_init(&d, qins_active(), &e);
    int by_level = log_bits(e.codec) > 0 || e.codec == QINS_rational;
    return PyBytes_FromStringAndSize((const char *)d.table, (by_level ? QINS_LEVELS : 256) * sizeof *d.table);
}

PyDoc_STRVAR(rational_doc,
             "rational(source, alpha, back, out, threads, /)\n--\n\n"
             "Compute z of weights, or (back) weights of z; C-contiguous float32 arrays of the same size.");

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
    const qins_kernels *kernels = qins_active();
    qins_released released;
    qins_release(&released, (size_t)n);
    qins_rational(kernels, src, (size_t)n, alpha, back, threads, dst);
    if (qins_retake(&released) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyMethodDef qins_code_methods[] = {
    {"encode", encode, METH_VARARGS, encode_doc},       {"feedback", feedback, METH_VARARGS, feedback_doc},
    {"decode", decode, METH_VARARGS, decode_doc},       {"levels", levels, METH_VARARGS, levels_doc},
    {"rational", rational, METH_VARARGS, rational_doc}, {NULL, NULL, 0, NULL},
};
