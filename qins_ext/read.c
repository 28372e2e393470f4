/* Plain reading of an array, the baseline of benchmarks. */
#include <stdatomic.h>

#include "qins.h"

typedef struct {
    const qins_kernels *kernels;
    const char *data;
    atomic_int_least32_t seen;
} reading;

static void read_part(void *context, size_t begin, size_t end)
{
    reading *r = context;
    enum { CHUNK = 1024 };
    atomic_fetch_xor(&r->seen, r->kernels->read(r->data + begin * CHUNK, (end - begin) * CHUNK));
}

void qins_read(const qins_kernels *kernels, const void *data, size_t bytes, int threads)
{
    reading r = {.kernels = kernels, .data = data};
    atomic_init(&r.seen, 0);
    enum { CHUNKS = 32 }; /* least for a thread: a few microseconds of work */
    qins_parallel(bytes / 1024, CHUNKS, threads, read_part, &r);
}
