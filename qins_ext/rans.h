/* Entropy coding of bytes with rANS (J. Duda, "Asymmetric numeral systems", arXiv:1311.2540), in 16 interleaved lanes.
 *
 * Each symbol is coded by one of several tables of frequencies, which the decoder must know beforehand. Symbol i of a
 * row belongs to lane i % 16. A lane's state is 32 bits, and lanes read 16-bit words from one stream, in the order in
 * which they need them. All arithmetic is on integers, so streams are the same on every machine. */
#ifndef QINS_RANS_H
#define QINS_RANS_H

#include "sizes.h"

enum {
    QINS_RANS_LANES = 16,
    QINS_RANS_BITS = 10, /* the frequencies of a table sum to 2^10, so that the tables in use stay in the L1 cache */
    QINS_RANS_SLOTS = 1 << QINS_RANS_BITS,
    QINS_RANS_ESCAPE = 255, /* the symbol that every table has; stands for those that a table does not have */
    QINS_RANS_START = 1 << 16
};

typedef struct {
    uint16_t frequency[256], first[256]; /* of the symbol's slots */
} qins_rans_table;

/* Sets the frequencies from numbers of occurrences, as exactly as `stored` tells them. Writes at most 258 bytes to
 * `stored` and returns how many. */
size_t qins_rans_describe(const uint32_t count[256], uint8_t *stored, qins_rans_table *t);
/* The same table from at most `bytes` stored bytes; returns how many it took, or 0 if these describe none. */
size_t qins_rans_read(const uint8_t *stored, size_t bytes, qins_rans_table *t);

/* Per slot: symbol | frequency << 8 | (slot - first) << 19 */
void qins_rans_slots(const qins_rans_table *t, uint32_t slot[QINS_RANS_SLOTS]);

/* One symbol, in the opposite order of decoding; entry: its frequency | first << 16. Words are written downward from
 * `out`, which is returned. */
static inline uint8_t *rans_put(uint32_t *state, const uint64_t inverse[QINS_RANS_SLOTS + 1], uint32_t entry,
                                uint8_t *out)
{
    const uint32_t f = entry & 0xffff;
    uint32_t s = *state;
    /* written in any case: half of the symbols need it, which no branch prediction foresees */
    out[-2] = (uint8_t)s;
    out[-1] = (uint8_t)(s >> 8);
    const uint32_t full = s >> (32 - QINS_RANS_BITS) >= f;
    out -= 2 * full;
    s >>= 16 * full;
    /* s / f, exact because s < f * 2^22 and f <= 2^10 */
    const uint32_t quotient = (uint32_t)((s * inverse[f]) >> 42);
    *state = s + (entry >> 16) + quotient * (QINS_RANS_SLOTS - f);
    return out;
}

/* inverse[f] = ceil(2^42 / f) */
void qins_rans_inverses(uint64_t inverse[QINS_RANS_SLOTS + 1]);

/* The symbol of a state, which becomes the next one; it may then need a word. */
static inline uint8_t rans_symbol(uint32_t *state, const uint32_t *slots)
{
    const uint32_t slot = slots[*state & (QINS_RANS_SLOTS - 1)];
    *state = (slot >> 8 & 2047) * (*state >> QINS_RANS_BITS) + (slot >> 19);
    return (uint8_t)slot;
}

#endif
