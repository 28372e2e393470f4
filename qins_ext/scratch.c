/* Working memory that outlives a call: fresh pages would cost more than many a product. */
#include <stdatomic.h>
#include <stdlib.h>

#include "qins.h"

enum { SLOTS = 32, ALIGNMENT = 64 };
#define KEPT_BYTES ((size_t)16 << 20) /* larger blocks are given back to the system */

/* In front of the aligned memory that a caller sees. */
typedef struct {
    void *room; /* as malloc returned it */
    size_t bytes;
} header;

static _Atomic(header *) slots[SLOTS];

static header *header_of(void *memory) { return (header *)memory - 1; }

void *qins_scratch_take(size_t bytes)
{
    for (int i = 0; i < SLOTS; i++) {
        header *h = atomic_exchange(&slots[i], NULL);
        if (h != NULL && h->bytes >= bytes) {
            return h + 1;
        }
        header *nothing = NULL;
        if (h != NULL && !atomic_compare_exchange_strong(&slots[i], &nothing, h)) {
            free(h->room); /* another thread has filled the slot meanwhile */
        }
    }
    bytes += bytes / 4; /* room for a somewhat larger call */
    char *room = malloc(bytes + sizeof(header) + ALIGNMENT);
    if (room == NULL) {
        return NULL;
    }
    uintptr_t first = (uintptr_t)room + sizeof(header);
    header *h = (header *)(void *)(room + sizeof(header) + (ALIGNMENT - first % ALIGNMENT) % ALIGNMENT) - 1;
    h->room = room;
    h->bytes = bytes;
    return h + 1;
}

void qins_scratch_give(void *memory)
{
    header *h = header_of(memory);
    for (int i = 0; h->bytes <= KEPT_BYTES && i < SLOTS; i++) {
        header *nothing = NULL;
        if (atomic_compare_exchange_strong(&slots[i], &nothing, h)) {
            return;
        }
    }
    free(h->room);
}
