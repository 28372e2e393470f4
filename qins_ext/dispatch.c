/* The kernel tables that run on this machine. */
#include <string.h>

#include "qins.h"

static const struct {
    const qins_kernels *kernels;
    unsigned features;
} built[] = {
#define ENTRY_1(name, features) {&qins_kernels_##name, features},
#define ENTRY_0(name, features)
#define ENTRY_(guard) ENTRY_##guard
#define ENTRY(guard) ENTRY_(guard)
#define X(name, guard, features) ENTRY(guard)(name, features)
#include "isas.def"
#undef X
};

const qins_kernels *qins_isa_at(size_t index)
{
    unsigned features = qins_cpu_features();
    for (size_t i = 0; i < sizeof built / sizeof *built; i++) {
        if ((built[i].features & ~features) == 0 && index-- == 0) {
            return built[i].kernels;
        }
    }
    return NULL;
}

size_t qins_isa_count(void)
{
    size_t n = 0;
    while (qins_isa_at(n) != NULL) {
        n++;
    }
    return n;
}

const qins_kernels *qins_isa_find(const char *name)
{
    for (size_t i = 0; i < qins_isa_count(); i++) {
        if (strcmp(qins_isa_at(i)->name, name) == 0) {
            return qins_isa_at(i);
        }
    }
    return NULL;
}
