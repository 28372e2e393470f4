/* A cache of the tables for products of log8 and packed codes, by mu and bits. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "sizes.h"

/* mu comes from a grid of a few dozen values, so the tables of a model's layers fit in a small cache.
 * Entries are built once and never freed. Once the cache is full, every call builds other tables anew. */
enum { CACHED = 256 };
static _Atomic(const qins_log8_words *) cache[CACHED];

/* Returns NULL if out of memory. */
static const qins_log8_words *make_words(float mu, int bits)
{
    /* 64 extra bytes to align by hand: not every platform has aligned_alloc */
    char *room = malloc(sizeof(qins_log8_words) + 64);
    if (room == NULL) {
        return NULL;
    }
    qins_log8_words *made = (qins_log8_words *)(void *)(room + (64 - (uintptr_t)room % 64));
    qins_log8_words_build(made, mu, bits);
    made->room = room;
    return made;
}

const qins_log8_words *qins_log8_words_of(float mu, int bits, qins_log8_words *own)
{
    const uint32_t pattern = (uint32_t)bits32(mu);
    for (uint32_t i = 0; i < CACHED; i++) {
        _Atomic(const qins_log8_words *) *slot = &cache[(((pattern * 2654435761u) >> 24) + i) % CACHED];
        const qins_log8_words *found = atomic_load(slot);
        if (found == NULL) {
            const qins_log8_words *made = make_words(mu, bits);
            if (made == NULL) {
                break;
            }
            if (atomic_compare_exchange_strong(slot, &found, made)) {
                return made;
            }
            free(made->room); /* another thread was faster */
        }
        if (memcmp(&found->mu, &mu, sizeof mu) == 0 && found->bits == bits) {
            return found;
        }
    }
    if (own != NULL) {
        qins_log8_words_build(own, mu, bits);
    }
    return own;
}
