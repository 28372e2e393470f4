/* Scratch memory that is reused across calls: fresh pages would cost more than many products do.
 *
 * Block sizes are powers of two. A few free blocks of each size are kept, so that a call can reuse those of the last
 * one. Only the pages of a block that are used are ever backed by memory. */
#include <stdatomic.h>
#include <stdlib.h>

#include "qins.h"

enum { SIZES = 9, KEPT = 8, ALIGNMENT = 64 };
#define SMALLEST ((size_t)1 << 16) /* bytes; the largest that is kept is 2^(SIZES - 1) times this, 16 MiB */

/* Precedes the aligned memory that a caller gets. */
typedef struct {
    void *room; /* as malloc returned it */
    int size;   /* index of the size; SIZES: too large to keep */
} header;

static _Atomic(header *) kept[SIZES][KEPT];

void *qins_scratch_take(size_t bytes)
{
    int size = 0;
    while (size < SIZES && SMALLEST << size < bytes) {
        size++;
    }
    for (int i = 0; size < SIZES && i < KEPT; i++) {
        header *h = atomic_exchange(&kept[size][i], NULL);
        if (h != NULL) {
            return h + 1;
        }
    }
    char *room = malloc((size < SIZES ? SMALLEST << size : bytes) + sizeof(header) + ALIGNMENT);
    if (room == NULL) {
        return NULL;
    }
    uintptr_t first = (uintptr_t)room + sizeof(header);
    header *h = (header *)(void *)(room + sizeof(header) + (ALIGNMENT - first % ALIGNMENT) % ALIGNMENT) - 1;
    h->room = room;
    h->size = size;
    return h + 1;
}

void qins_scratch_give(void *memory)
{
    header *h = (header *)memory - 1;
    for (int i = 0; h->size < SIZES && i < KEPT; i++) {
        header *nothing = NULL;
        if (atomic_compare_exchange_strong(&kept[h->size][i], &nothing, h)) {
            return;
        }
    }
    free(h->room);
}
