/* Preloaded: makes the n-th allocation, or the n-th start of a thread, of the extension fail. glibc only.
 *
 * An allocation is the extension's own if it is called from within _core*.so; it is made on the extension's behalf if
 * _core*.so is anywhere on the stack, as with tuples that Python makes for it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

/* what may fail; LARGE: whoever allocates at least LARGE_BYTES */
enum { NOTHING, OWN, ON_BEHALF, THREADS, LARGE };
enum { LARGE_BYTES = 1 << 15, DEPTH = 64, LIVE = 1 << 16, PROBES = 32 };

static uintptr_t begin, end;           /* of the extension's code and data */
static atomic_int armed;               /* one of the enum */
static atomic_long nth, seen, refused; /* the one to fail, 0: none, -1: all; how many there were; how many failed */
static _Atomic(void *) live[LIVE];     /* the extension's own blocks, by hash of the address */
static atomic_long live_count;
static __thread int inside; /* backtrace() may allocate */

static int within(const void *at) { return (uintptr_t)at >= begin && (uintptr_t)at < end; }

static int on_stack(void)
{
    void *frame[DEPTH];
    inside = 1;
    const int n = backtrace(frame, DEPTH);
    inside = 0;
    for (int i = 0; i < n; i++) {
        if (within(frame[i])) {
            return 1;
        }
    }
    return 0;
}

static int count_one(void)
{
    const long at = atomic_fetch_add(&seen, 1) + 1, wanted = atomic_load(&nth);
    if (wanted != -1 && at != wanted) {
        return 0;
    }
    atomic_fetch_add(&refused, 1);
    errno = ENOMEM;
    return 1;
}

static int refuse(size_t bytes, const void *caller)
{
    if (inside) {
        return 0;
    }
    switch (atomic_load(&armed)) {
    case OWN:
        return within(caller) && count_one();
    case ON_BEHALF:
        return on_stack() && count_one();
    case LARGE:
        return bytes >= LARGE_BYTES && count_one();
    default:
        return 0;
    }
}

static size_t slot(const void *block, size_t probe)
{
    return ((uintptr_t)block / 16 * 2654435761u / 64 + probe) % LIVE;
}

static void *note(void *block, const void *caller)
{
    if (block == NULL || !within(caller)) {
        return block;
    }
    for (size_t i = 0; i < PROBES; i++) {
        void *nothing = NULL;
        if (atomic_compare_exchange_strong(&live[slot(block, i)], &nothing, block)) {
            atomic_fetch_add(&live_count, 1);
            return block;
        }
    }
    abort(); /* the table is too small */
}

static void forget(void *block)
{
    for (size_t i = 0; block != NULL && i < PROBES; i++) {
        void *expected = block;
        if (atomic_load_explicit(&live[slot(block, i)], memory_order_relaxed) == block &&
            atomic_compare_exchange_strong(&live[slot(block, i)], &expected, NULL)) {
            atomic_fetch_sub(&live_count, 1);
            return;
        }
    }
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t bytes) { return refuse(bytes, CALLER) ? NULL : note(__libc_malloc(bytes), CALLER); }

void *calloc(size_t count, size_t bytes)
{
    return refuse(count * bytes, CALLER) ? NULL : note(__libc_calloc(count, bytes), CALLER);
}

void *realloc(void *block, size_t bytes)
{
    if (refuse(bytes, CALLER)) {
        return NULL;
    }
    forget(block);
    return note(__libc_realloc(block, bytes), CALLER);
}

int posix_memalign(void **out, size_t alignment, size_t bytes)
{
    void *block = refuse(bytes, CALLER) ? NULL : note(__libc_memalign(alignment, bytes), CALLER);
    if (block == NULL) {
        return ENOMEM;
    }
    *out = block;
    return 0;
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    return refuse(bytes, CALLER) ? NULL : note(__libc_memalign(alignment, bytes), CALLER);
}

void free(void *block)
{
    forget(block);
    __libc_free(block);
}

void *mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset)
{
    static _Atomic(void *(*)(void *, size_t, int, int, int, off_t)) real;
    if (refuse(bytes, CALLER)) {
        return MAP_FAILED;
    }
    if (atomic_load(&real) == NULL) {
        atomic_store(&real, (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap"));
    }
    return atomic_load(&real)(at, bytes, protection, flags, file, offset);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    static _Atomic(int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *)) real;
    if (atomic_load(&armed) == THREADS && within(CALLER) && count_one()) {
        return EAGAIN;
    }
    if (atomic_load(&real) == NULL) {
        atomic_store(&real, (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(
                                RTLD_NEXT, "pthread_create"));
    }
    return atomic_load(&real)(thread, attributes, start, argument);
}

/* -- for ctypes ------------------------------------------------------------------------------------ */

static int find(struct dl_phdr_info *info, size_t size, void *name)
{
    (void)size;
    const char *file = strrchr(info->dlpi_name, '/');
    if (file == NULL || strncmp(file + 1, name, strlen(name)) != 0 || strstr(info->dlpi_name, "/qins/") == NULL) {
        return 0;
    }
    begin = UINTPTR_MAX;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        if (part->p_type == PT_LOAD) {
            const uintptr_t from = info->dlpi_addr + part->p_vaddr;
            begin = from < begin ? from : begin;
            end = from + part->p_memsz > end ? from + part->p_memsz : end;
        }
    }
    return 1;
}

/* Finds qins/NAME*.so, which must be loaded; returns whether it is. */
int failing_watch(const char *name)
{
    void *frame[1];
    backtrace(frame, 1); /* loads libgcc */
    return dl_iterate_phdr(find, (void *)name) != 0;
}

void failing_arm(int what, long n)
{
    atomic_store(&nth, n);
    atomic_store(&seen, 0);
    atomic_store(&refused, 0);
    atomic_store(&armed, what);
}

/* Returns how many failed. */
long failing_disarm(void)
{
    atomic_store(&armed, NOTHING);
    return atomic_load(&refused);
}

long failing_seen(void) { return atomic_load(&seen); }
long failing_live(void) { return atomic_load(&live_count); }
