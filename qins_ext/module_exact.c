/* Python bindings for exact restoring; see exact.h. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"
#include "exact.h"

#include <stdlib.h>

/* Parses what both functions begin with; half: the array of the weights' bits. */
static int codes_and_weights(PyObject *args, const char *format, PyObject *more[2], qins_codes *e, qins_dtype *dtype,
                             int *threads, int writable, uint16_t **w)
{
    const char *codec_name, *dtype_name;
    PyObject *arrays, *scalars, **half = writable ? &more[1] : &more[0];
    Py_ssize_t rows, cols, group_size;
    qins_codec codec;
    void *data;
    const int parsed =
        writable
            ? PyArg_ParseTuple(args, format, &codec_name, &PyTuple_Type, &arrays, &PyTuple_Type, &scalars, &rows, &cols,
                               &group_size, &PyArray_Type, &more[0], &PyArray_Type, &more[1], &dtype_name, threads)
            : PyArg_ParseTuple(args, format, &codec_name, &PyTuple_Type, &arrays, &PyTuple_Type, &scalars, &rows, &cols,
                               &group_size, &PyArray_Type, &more[0], &dtype_name, threads);
    if (!parsed || qins_find_codec(codec_name, &codec) < 0 || qins_find_dtype(dtype_name, dtype) < 0 ||
        qins_check_group_size(group_size) < 0 || qins_codec_arrays(codec, arrays, rows, cols, group_size, 0, e) < 0 ||
        qins_read_scalars(e, scalars) < 0) {
        return -1;
    }
    if (*dtype != QINS_F16 && *dtype != QINS_BF16) {
        PyErr_Format(PyExc_ValueError, "dtype: expected float16 or bfloat16, got %s", dtype_name);
        return -1;
    }
    if (qins_array_argument(*half, "weights", qins_dtype_names[*dtype].type, dtype_name, rows, cols, writable, &data) <
        0) {
        return -1;
    }
    if (!PyArray_ISALIGNED((PyArrayObject *)*half)) {
        return qins_wrong_argument("weights", "an aligned array", *half);
    }
    *w = data;
    return writable ? qins_check_overlap_codes(*half, "weights", arrays) : 0;
}

PyDoc_STRVAR(encode_doc, "exact_encode(codec, arrays, scalars, rows, cols, group_size, weights, dtype, threads, /)\n"
                         "--\n\n"
                         "Return the bytes that restore the weights, of float16 or bfloat16, from their codes.");

static PyObject *exact_encode(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *given[2];
    qins_codes e;
    qins_dtype dtype;
    int threads;
    uint16_t *w;
    uint8_t *stream = NULL;
    size_t bytes = 0;
    qins_exact_result result;
    if (codes_and_weights(args, "sO!O!nnnO!si:exact_encode", given, &e, &dtype, &threads, 0, &w) < 0) {
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    Py_BEGIN_ALLOW_THREADS result = qins_exact_encode(kernels, &e, w, dtype, threads, &stream, &bytes);
    Py_END_ALLOW_THREADS if (result != QINS_EXACT_OK) { return PyErr_NoMemory(); }
    PyObject *told = PyBytes_FromStringAndSize((const char *)stream, (Py_ssize_t)bytes);
    free(stream);
    return told;
}

PyDoc_STRVAR(decode_doc,
             "exact_decode(codec, arrays, scalars, rows, cols, group_size, stream, weights, dtype, threads, /)\n--\n\n"
             "Restore the weights, of float16 or bfloat16. Return False if the stream is damaged or another one's.");

static PyObject *exact_decode(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *given[2];
    qins_codes e;
    qins_dtype dtype;
    int threads;
    uint16_t *w;
    void *stream;
    qins_exact_result result;
    if (codes_and_weights(args, "sO!O!nnnO!O!si:exact_decode", given, &e, &dtype, &threads, 1, &w) < 0) {
        return NULL;
    }
    const Py_ssize_t bytes = PyArray_SIZE((PyArrayObject *)given[0]);
    if (qins_array_argument(given[0], "stream", NPY_UINT8, "uint8", bytes, -1, 0, &stream) < 0 ||
        qins_check_overlap(given[1], given[0], "weights", "the stream") < 0) {
        return NULL;
    }
    const qins_kernels *kernels = qins_active();
    Py_BEGIN_ALLOW_THREADS result = qins_exact_decode(kernels, &e, stream, (size_t)bytes, dtype, threads, w);
    Py_END_ALLOW_THREADS if (result == QINS_EXACT_NO_MEMORY) { return PyErr_NoMemory(); }
    return PyBool_FromLong(result == QINS_EXACT_OK);
}

PyMethodDef qins_exact_methods[] = {
    {"exact_encode", exact_encode, METH_VARARGS, encode_doc},
    {"exact_decode", exact_decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};
