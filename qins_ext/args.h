/* What the files of the glue share. Checks of arguments return 0, or -1 with an exception set. */
#ifndef QINS_ARGS_H
#define QINS_ARGS_H

#include <Python.h>

/* One table of NumPy's functions for all files; module.c fills it. */
#define PY_ARRAY_UNIQUE_SYMBOL qins_numpy_api
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include "qins.h"

enum { QINS_DTYPE_COUNT = 4 };

typedef struct {
    const char *name;
    int type; /* NumPy's number; bfloat16 travels as uint16 */
} qins_dtype_name;

extern const qins_dtype_name qins_dtype_names[QINS_DTYPE_COUNT]; /* by qins_dtype */
extern const char *const qins_codec_names[QINS_CODEC_COUNT];

/* A dtype or a codec by its name; -1 with an exception set where there is none. */
int qins_find_dtype(const char *name, qins_dtype *dtype);
int qins_find_codec(const char *name, qins_codec *codec);
/* Sets the exception for an argument that is not what was expected; returns -1. */
int qins_wrong_argument(const char *name, const char *expected, PyObject *got);
/* A C-contiguous array of this type and shape (cols < 0: one-dimensional), native byte order. */
int qins_array_argument(PyObject *o, const char *name, int type, const char *type_name, Py_ssize_t rows,
                        Py_ssize_t cols, int writable, void **data);
/* Whether `out` lies apart from `in`, or from the arrays of codes. */
int qins_check_overlap(PyObject *out, PyObject *in, const char *out_name, const char *in_name);
/* The arrays of a codec, in the order of qins.codec.ARRAYS, for a matrix of rows x cols. */
int qins_codec_arrays(qins_codec codec, PyObject *arrays, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t group_size,
                      int writable, qins_codes *e);
int qins_check_overlap_codes(PyObject *out, const char *name, PyObject *arrays);
/* A codec's scalars, in the order of qins.codec.SCALARS. */
int qins_read_scalars(qins_codes *e, PyObject *scalars);
int qins_check_group_size(Py_ssize_t group_size);
/* `count` arguments, which must be `expected` numbers, for functions that are called hundreds of times a token. */
int qins_numbers(const char *function, PyObject *const *args, Py_ssize_t count, size_t *out, Py_ssize_t expected);
/* The codes that such numbers describe: codec, addresses of codes, of the second and third array, of the first and
 * second scalar, rows, cols, group_size. */
enum { QINS_CODES_NUMBERS = 9 };
void qins_codes_at(const size_t *numbers, qins_codes *e);

/* module.c: the instruction set in use, and the tables of log8 in KV caches */
const qins_kernels *qins_active(void);
extern qins_log8_tables qins_cache_tables;
/* Work shorter than this, in elements, is done with the GIL held: releasing it costs more. */
enum { QINS_RELEASE_GIL_ABOVE = 4096 };
/* module_codes.c, module_products.c, module_decoder.c: functions of the module */
extern PyMethodDef qins_code_methods[], qins_product_methods[], qins_decoder_methods[];

#endif
