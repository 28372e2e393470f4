/* The Python module qins._core: checks every argument once, releases the GIL, calls the core. No arithmetic.
 *
 * The Python side (python/qins/codec/array.py) passes matrices as 2-D arrays. NumPy has no type number for bfloat16, so
 * element types are passed as names beside the arrays, and bfloat16 arrays as uint16. */
#define PY_SSIZE_T_CLEAN
#include "args.h"

#include <stdatomic.h>
#include <string.h>

#include "decoder.h"
#include "ways.h"

/* One for the process: an instruction set is a property of the machine, not of an interpreter. */
static _Atomic(const qins_kernels *) active;

const qins_kernels *qins_active(void) { return atomic_load(&active); }

/* KV caches all use one mu: in log8, 2 is best for SmolLM2's values, 8 for its keys, and 3 within 0.7 dB of both; in
 * fewer bits, 2 for values, 4 or more for keys, and 3 within 0.3 dB. */
#define CACHE_MU 3.0f
qins_cache_tables qins_tables_of_caches[QINS_CODEC_COUNT];

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
    {"isas", isas, METH_NOARGS, isas_doc},
    {"isa", isa, METH_NOARGS, isa_doc},
    {"has_bf16", has_bf16, METH_O, has_bf16_doc},
    {"set_isa", set_isa, METH_O, set_isa_doc},
    {"set_fork_join", set_fork_join, METH_O, set_fork_join_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *tuple_of_names(const char *const *names, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, i, name);
        }
    }
    return tuple;
}

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    if (atomic_load(&active) == NULL) {
        const qins_codec coded[] = {QINS_log8, QINS_log6, QINS_log5, QINS_log4};
        for (size_t i = 0; i < sizeof coded / sizeof *coded; i++) {
            qins_cache_tables_build(&qins_tables_of_caches[coded[i]], coded[i], CACHE_MU);
        }
        atomic_store(&active, qins_isa_at(0));
    }
    PyObject *codecs = tuple_of_names(qins_codec_names, QINS_CODEC_COUNT);
    PyObject *ways = tuple_of_names(qins_way_names, QINS_WAY_COUNT);
    PyObject *mu_max = PyFloat_FromDouble((double)QINS_MU_MAX);
    int failed = codecs == NULL || ways == NULL || mu_max == NULL ||
                 PyModule_AddFunctions(module, qins_code_methods) < 0 ||
                 PyModule_AddFunctions(module, qins_product_methods) < 0 ||
                 PyModule_AddFunctions(module, qins_decoder_methods) < 0 ||
                 PyModule_AddFunctions(module, qins_exact_methods) < 0 ||
                 PyModule_AddIntConstant(module, "DECODER_ROWS", QINS_DECODER_ROWS) < 0 ||
                 PyModule_AddIntConstant(module, "DECODER_HEAD_DIM", QINS_HEAD_DIM) < 0 ||
                 PyModule_AddObjectRef(module, "CODECS", codecs) < 0 ||
                 PyModule_AddObjectRef(module, "WAYS", ways) < 0 || PyModule_AddObjectRef(module, "MU_MAX", mu_max) < 0;
    Py_XDECREF(codecs);
    Py_XDECREF(ways);
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
    .m_doc = "Codecs and kernels in C, for use by qins.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
