/* Checks of arguments from Python. Every error names the argument, what was expected and what was passed. */
#define PY_SSIZE_T_CLEAN
#define NO_IMPORT_ARRAY
#include "args.h"
#include "packed.h"

#include <string.h>

const qins_dtype_name qins_dtype_names[QINS_DTYPE_COUNT] = {[QINS_F32] = {"float32", NPY_FLOAT32},
                                                            [QINS_F16] = {"float16", NPY_FLOAT16},
                                                            [QINS_BF16] = {"bfloat16", NPY_UINT16},
                                                            [QINS_F64] = {"float64", NPY_FLOAT64}};

const char *const qins_codec_names[QINS_CODEC_COUNT] = {
#define X(name) #name,
#include "codecs.def"
#undef X
};

int qins_find_dtype(const char *name, qins_dtype *dtype)
{
    for (size_t i = 0; i < QINS_DTYPE_COUNT; i++) {
        if (strcmp(name, qins_dtype_names[i].name) == 0) {
            *dtype = (qins_dtype)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_TypeError, "dtype: expected float32, float16, bfloat16 or float64, got %s", name);
    return -1;
}

int qins_find_codec(const char *name, qins_codec *codec)
{
    for (size_t i = 0; i < QINS_CODEC_COUNT; i++) {
        if (strcmp(name, qins_codec_names[i]) == 0) {
            *codec = (qins_codec)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "codec: unknown name '%s'", name);
    return -1;
}

int qins_wrong_argument(const char *name, const char *expected, PyObject *got)
{
    if (PyArray_Check(got)) {
        PyArrayObject *a = (PyArrayObject *)got;
        PyObject *shape = PyObject_GetAttrString(got, "shape");
        if (shape == NULL) {
            return -1;
        }
        PyErr_Format(PyExc_ValueError, "%s: expected %s, got %s%sarray of %S, shape %S", name, expected,
                     PyArray_ISWRITEABLE(a) ? "" : "read-only ", PyArray_IS_C_CONTIGUOUS(a) ? "" : "non-contiguous ",
                     (PyObject *)PyArray_DESCR(a), shape);
        Py_DECREF(shape);
    } else {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s", name, expected, Py_TYPE(got)->tp_name);
    }
    return -1;
}

int qins_array_argument(PyObject *o, const char *name, int type, const char *type_name, Py_ssize_t rows,
                        Py_ssize_t cols, int writable, void **data)
{
    char expected[160];
    PyArrayObject *a = (PyArrayObject *)o;
    int dims = cols < 0 ? 1 : 2;
    if (PyArray_Check(o) && PyArray_TYPE(a) == type && PyArray_ISNOTSWAPPED(a) && PyArray_NDIM(a) == dims &&
        PyArray_DIM(a, 0) == rows && (dims == 1 || PyArray_DIM(a, 1) == cols) && PyArray_IS_C_CONTIGUOUS(a) &&
        (!writable || PyArray_ISWRITEABLE(a))) {
        *data = PyArray_DATA(a);
        return 0;
    }
    if (dims == 1) {
        PyOS_snprintf(expected, sizeof expected, "a C-contiguous%s array of %s, shape (%zd,)",
                      writable ? " writable" : "", type_name, rows);
    } else {
        PyOS_snprintf(expected, sizeof expected, "a C-contiguous%s array of %s, shape (%zd, %zd)",
                      writable ? " writable" : "", type_name, rows, cols);
    }
    return qins_wrong_argument(name, expected, o);
}

/* First and last byte of an array's elements; strides may be negative. */
static void extent(PyArrayObject *a, const char **lo, const char **hi)
{
    *lo = *hi = PyArray_BYTES(a);
    for (int i = 0; i < PyArray_NDIM(a); i++) {
        npy_intp reach = (PyArray_DIM(a, i) - 1) * PyArray_STRIDE(a, i);
        *(reach < 0 ? lo : hi) += reach;
    }
    *hi += PyArray_ITEMSIZE(a);
}

int qins_check_overlap(PyObject *out, PyObject *in, const char *out_name, const char *in_name)
{
    if (!PyArray_Check(out) || !PyArray_Check(in) || PyArray_SIZE((PyArrayObject *)out) == 0 ||
        PyArray_SIZE((PyArrayObject *)in) == 0) {
        return 0;
    }
    const char *lo, *hi, *lo2, *hi2;
    extent((PyArrayObject *)out, &lo, &hi);
    extent((PyArrayObject *)in, &lo2, &hi2);
    if (lo < hi2 && lo2 < hi) {
        PyErr_Format(PyExc_ValueError, "%s: expected memory of its own, got memory that overlaps %s", out_name,
                     in_name);
        return -1;
    }
    return 0;
}

int qins_codec_arrays(qins_codec codec, PyObject *arrays, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t group_size,
                      int writable, qins_codes *e)
{
    const int packed = is_packed(codec);
    if (packed && (group_size < 1 || (group_size != 32 && group_size % 64 != 0) || cols % 8 != 0)) {
        PyErr_Format(PyExc_ValueError,
                     "arrays: expected a group_size of 32 or a multiple of 64 and a multiple of 8 columns for %s, got "
                     "%zd and %zd",
                     qins_codec_names[codec], group_size, cols);
        return -1;
    }
    Py_ssize_t expected = codec == QINS_rational ? 1 : log_bits(codec) > 0 && group_size > 0 ? 3 : 2;
    if (PyTuple_GET_SIZE(arrays) != expected) {
        PyErr_Format(PyExc_ValueError, "arrays: expected %zd for %s, got %zd", expected, qins_codec_names[codec],
                     PyTuple_GET_SIZE(arrays));
        return -1;
    }
    static const char *const CODES[] = {
        [QINS_golden] = "stored", [QINS_log9] = "stored", [QINS_log8] = "codes", [QINS_rational] = "w_encoded",
        [QINS_log6] = "codes6",   [QINS_log5] = "codes5", [QINS_log4] = "codes4"};
    PyObject *first = PyTuple_GET_ITEM(arrays, 0), *second = expected > 1 ? PyTuple_GET_ITEM(arrays, 1) : NULL;
    void *data = NULL;
    memset(e, 0, sizeof *e);
    e->codec = codec;
    e->rows = (size_t)rows;
    e->cols = (size_t)cols;
    const Py_ssize_t width = (Py_ssize_t)code_bytes(e, e->cols);
    if (qins_array_argument(first, CODES[codec], NPY_UINT8, "uint8", rows, width, writable, &data) < 0) {
        return -1;
    }
    e->codes = data;
    switch (codec) {
    case QINS_golden:
        if (qins_array_argument(second, "sign", NPY_INT8, "int8", rows, cols, writable, &data) < 0) {
            return -1;
        }
        e->sign = data;
        return 0;
    case QINS_log9:
        if (qins_array_argument(second, "sign_bits", NPY_UINT8, "uint8", rows, (Py_ssize_t)ceil_div((size_t)cols, 8),
                                writable, &data) < 0) {
            return -1;
        }
        e->sign_bits = data;
        return 0;
    case QINS_rational:
        return 0;
    default:
        if (qins_array_argument(second, "scale", NPY_FLOAT32, "float32", rows, -1, writable, &data) < 0) {
            return -1;
        }
        e->scale = data;
        e->group_size = (size_t)group_size;
        if (group_size > 0) {
            if (qins_array_argument(PyTuple_GET_ITEM(arrays, 2), "group_scale", NPY_UINT8, "uint8", rows,
                                    (Py_ssize_t)ceil_div((size_t)cols, (size_t)group_size), writable, &data) < 0) {
                return -1;
            }
            e->group_scale = data;
        }
        return 0;
    }
}

int qins_check_overlap_codes(PyObject *out, const char *name, PyObject *arrays)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arrays); i++) {
        if (qins_check_overlap(out, PyTuple_GET_ITEM(arrays, i), name, "the codes") < 0) {
            return -1;
        }
    }
    return 0;
}

int qins_read_scalars(qins_codes *e, PyObject *scalars)
{
    switch (e->codec) {
    case QINS_log8:
    case QINS_log6:
    case QINS_log5:
    case QINS_log4:
        return PyArg_ParseTuple(scalars, "f;scalars", &e->mu) ? 0 : -1;
    case QINS_rational:
        return PyArg_ParseTuple(scalars, "fff;scalars", &e->alpha, &e->z_min, &e->z_max) ? 0 : -1;
    default:
        return PyArg_ParseTuple(scalars, "ff;scalars", &e->log_min, &e->log_max) ? 0 : -1;
    }
}

int qins_check_group_size(Py_ssize_t group_size)
{
    if (group_size < 0) {
        PyErr_Format(PyExc_ValueError, "group_size: expected a positive number or None, got %zd", group_size);
        return -1;
    }
    if (group_size > (Py_ssize_t)1 << 30) { /* kernels multiply it, which must not overflow */
        PyErr_Format(PyExc_ValueError, "group_size: expected at most 1073741824, got %zd", group_size);
        return -1;
    }
    return 0;
}

int qins_numbers(const char *function, PyObject *const *args, Py_ssize_t count, size_t *out, Py_ssize_t expected)
{
    if (count != expected) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd numbers, got %zd", function, expected, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsSize_t(args[i]);
    }
    return PyErr_Occurred() ? -1 : 0;
}

void qins_codes_at(const size_t *numbers, qins_codes *e)
{
    enum { CODEC, CODES, SECOND, THIRD, SCALAR, SCALAR2, ROWS, COLS, GROUP };
    memset(e, 0, sizeof *e);
    e->codec = (qins_codec)numbers[CODEC];
    e->rows = numbers[ROWS];
    e->cols = numbers[COLS];
    e->group_size = numbers[GROUP];
    e->codes = (uint8_t *)numbers[CODES];
    if (log_bits(e->codec) > 0) {
        e->scale = (float *)numbers[SECOND];
        e->group_scale = (uint8_t *)numbers[THIRD];
        memcpy(&e->mu, (const void *)numbers[SCALAR], sizeof e->mu);
    } else if (e->codec == QINS_rational) {
        memcpy(&e->alpha, (const void *)numbers[SECOND], sizeof e->alpha);
        memcpy(&e->z_min, (const void *)numbers[SCALAR], sizeof e->z_min);
        memcpy(&e->z_max, (const void *)numbers[SCALAR2], sizeof e->z_max);
    } else {
        e->sign = (int8_t *)numbers[SECOND];
        e->sign_bits = (uint8_t *)numbers[SECOND];
        memcpy(&e->log_min, (const void *)numbers[SCALAR], sizeof e->log_min);
        memcpy(&e->log_max, (const void *)numbers[SCALAR2], sizeof e->log_max);
    }
}

/* Less work is not worth splitting. */
enum { LONG_WORK = 1 << 24 };

static int handle_signals(void *context)
{
    qins_released *r = context;
    PyEval_RestoreThread(r->thread);
    r->raised = PyErr_CheckSignals() < 0;
    r->thread = PyEval_SaveThread();
    return r->raised;
}

void qins_release(qins_released *r, size_t work)
{
    r->raised = 0;
    r->asks = work >= LONG_WORK;
    r->thread = PyEval_SaveThread();
    if (r->asks) {
        qins_set_poll(handle_signals, r);
    }
}

int qins_retake(qins_released *r)
{
    if (r->asks) {
        qins_set_poll(NULL, NULL);
    }
    PyEval_RestoreThread(r->thread);
    return r->raised ? -1 : 0;
}
