/* Python bindings for exact restoring; see exact.h. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"
#include "exact.h"

#include <stdlib.h>

typedef struct {
    qins_codes e;
    qins_dtype dtype;
    int threads;
    uint16_t *w; /* of `weights` */
    PyObject *weights, *stream;
} arguments;

/* format: of both functions' arguments; exact_decode's ends with a stream, and its weights are written */
static int parse(PyObject *args, const char *format, int restoring, arguments *a)
{
    const char *codec_name, *dtype_name;
    PyObject *arrays, *scalars;
    Py_ssize_t rows, cols, group_size;
    qins_codec codec;
    void *data;
    if (!PyArg_ParseTuple(args, format, &codec_name, &PyTuple_Type, &arrays, &PyTuple_Type, &scalars, &rows, &cols,
                          &group_size, &PyArray_Type, &a->weights, &dtype_name, &a->threads, &PyArray_Type,
                          &a->stream) ||
        qins_find_codec(codec_name, &codec) < 0 || qins_find_dtype(dtype_name, &a->dtype) < 0 ||
        qins_check_group_size(group_size) < 0 ||
        qins_codec_arrays(codec, arrays, rows, cols, group_size, 0, &a->e) < 0 ||
        qins_read_scalars(&a->e, scalars) < 0) {
        return -1;
    }
    if (a->dtype != QINS_F16 && a->dtype != QINS_BF16) {
        PyErr_Format(PyExc_ValueError, "dtype: expected float16 or bfloat16, got %s", dtype_name);
        return -1;
    }
    if (qins_array_argument(a->weights, "weights", qins_dtype_names[a->dtype].type, dtype_name, rows, cols, restoring,
                            &data) < 0) {
        return -1;
    }
    if (!PyArray_ISALIGNED((PyArrayObject *)a->weights)) {
        return qins_wrong_argument("weights", "an aligned array", a->weights);
    }
    a->w = data;
    return restoring ? qins_check_overlap_codes(a->weights, "weights", arrays) : 0;
}

PyDoc_STRVAR(encode_doc, "exact_encode(codec, arrays, scalars, rows, cols, group_size, weights, dtype, threads, /)\n"
                         "--\n\n"
                         "Return the bytes that restore the weights, of float16 or bfloat16, from their codes.");

static PyObject *exact_encode(PyObject *module, PyObject *args)
{
    (void)module;
    arguments a;
    uint8_t *stream = NULL;
    size_t bytes = 0;
    qins_exact_result result;
    if (parse(args, "sO!O!nnnO!si:exact_encode", 0, &a) < 0) {
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    qins_released released;
    qins_release(&released, 8 * a.e.rows * a.e.cols);
    result = qins_exact_encode(kernels, &a.e, a.w, a.dtype, a.threads, &stream, &bytes);
    if (qins_retake(&released) < 0) {
        return NULL; /* without a stream, since some blocks are missing */
    }
    if (result != QINS_EXACT_OK) {
        return PyErr_NoMemory();
    }
    PyObject *told = PyBytes_FromStringAndSize((const char *)stream, (Py_ssize_t)bytes);
    free(stream);
    return told;
}

PyDoc_STRVAR(decode_doc,
             "exact_decode(codec, arrays, scalars, rows, cols, group_size, weights, dtype, threads, stream, /)\n--\n\n"
             "Restore the weights, of float16 or bfloat16. Return False if the stream is damaged or another one's.");

static PyObject *exact_decode(PyObject *module, PyObject *args)
{
    (void)module;
    arguments a;
    void *stream;
    qins_exact_result result;
    if (parse(args, "sO!O!nnnO!siO!:exact_decode", 1, &a) < 0) {
        return NULL;
    }
    const Py_ssize_t bytes = PyArray_SIZE((PyArrayObject *)a.stream);
    if (qins_array_argument(a.stream, "stream", NPY_UINT8, "uint8", bytes, -1, 0, &stream) < 0 ||
        qins_check_overlap(a.weights, a.stream, "weights", "the stream") < 0) {
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    qins_released released;
    qins_release(&released, 8 * a.e.rows * a.e.cols);
    result = qins_exact_decode(kernels, &a.e, stream, (size_t)bytes, a.dtype, a.threads, a.w);
    if (qins_retake(&released) < 0) {
        return NULL;
    }
    if (result == QINS_EXACT_NO_MEMORY) {
        return PyErr_NoMemory();
    }
    return PyBool_FromLong(result == QINS_EXACT_OK);
}

PyMethodDef qins_exact_methods[] = {
    {"exact_encode", exact_encode, METH_VARARGS, encode_doc},
    {"exact_decode", exact_decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};
