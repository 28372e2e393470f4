/* Shared by the files of the Python bindings. Argument checks return 0, or -1 with an exception set. */
#ifndef QINS_ARGS_H
#define QINS_ARGS_H

#include <Python.h>

/* All files share one table of NumPy's functions; module.c fills it. */
#define PY_ARRAY_UNIQUE_SYMBOL qins_numpy_api
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#include <numpy/arrayobject.h>

#include "poll.h"
#include "qins.h"

enum { QINS_DTYPE_COUNT = 4 };

typedef struct {
    const char *name;
    int type; /* NumPy's type number; bfloat16 is passed as uint16 */
} qins_dtype_name;

extern const qins_dtype_name qins_dtype_names[QINS_DTYPE_COUNT]; /* indexed by qins_dtype */
extern const char *const qins_codec_names[QINS_CODEC_COUNT];

/* Finds a dtype or a codec by name; -1 with an exception set if there is none. */
int qins_find_dtype(const char *name, qins_dtype *dtype);
int qins_find_codec(const char *name, qins_codec *codec);
/* Sets the exception for an argument of the wrong kind; returns -1. */
int qins_wrong_argument(const char *name, const char *expected, PyObject *got);
/* Checks a C-contiguous array of this type and shape (cols < 0: one-dimensional) in native byte order. */
int qins_array_argument(PyObject *o, const char *name, int type, const char *type_name, Py_ssize_t rows,
                        Py_ssize_t cols, int writable, void **data);
/* Checks that `out` does not overlap `in`, or the arrays of codes. */
int qins_check_overlap(PyObject *out, PyObject *in, const char *out_name, const char *in_name);
/* Reads a codec's arrays, in the order of qins.codec.ARRAYS, for a matrix of rows x cols. */
int qins_codec_arrays(qins_codec codec, PyObject *arrays, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t group_size,
                      int writable, qins_codes *e);
int qins_check_overlap_codes(PyObject *out, const char *name, PyObject *arrays);
/* Reads a codec's scalars, in the order of qins.codec.SCALARS. */
int qins_read_scalars(qins_codes *e, PyObject *scalars);
int qins_check_group_size(Py_ssize_t group_size);
/* Reads `count` arguments, which must be `expected` numbers; for functions that run hundreds of times per token. */
int qins_numbers(const char *function, PyObject *const *args, Py_ssize_t count, size_t *out, Py_ssize_t expected);
/* The codes described by such numbers: codec; addresses of the codes, of the second and third array, and of the first
 * and second scalar; rows, cols, group_size. */
enum { QINS_CODES_NUMBERS = 9 };
void qins_codes_at(const size_t *numbers, qins_codes *e);

/* module.c: the instruction set in use, and the tables of KV caches, by codec */
const qins_kernels *qins_active(void);
extern qins_cache_tables qins_tables_of_caches[QINS_CODEC_COUNT];
/* A call without the GIL. If it may take long (`work`: very roughly, in nanoseconds of one thread), it ends early when
 * a signal's handler raises. qins_retake then returns -1 with that exception set, else 0. */
typedef struct {
    PyThreadState *thread;
    int asks, raised;
} qins_released;
void qins_release(qins_released *r, size_t work);
int qins_retake(qins_released *r);

/* Below this many elements the GIL stays held: releasing it would cost more than it gains. */
enum { QINS_RELEASE_GIL_ABOVE = 4096 };
/* module_codes.c, module_products.c, module_decoder.c, module_exact.c: the functions of the module */
extern PyMethodDef qins_code_methods[], qins_product_methods[], qins_decoder_methods[], qins_exact_methods[];

#endif
