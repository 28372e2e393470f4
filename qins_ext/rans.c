/* Tables of rANS; see rans.h. */
#include "rans.h"

/* A number of occurrences in a byte: 8 to 15, times 2^exponent; 0 is none */
static uint8_t rounded(uint64_t count)
{
    uint64_t v = 8 * count;
    int exponent = 0;
    for (; v >= 16; exponent++) {
        v = (v + 1) >> 1;
    }
    return count == 0 ? 0 : (uint8_t)(1 + (v - 8) + 8 * (uint64_t)exponent);
}

static uint64_t number(uint8_t stored)
{
    return stored == 0 ? 0 : (uint64_t)(8 + (stored - 1) % 8) << (stored - 1) / 8;
}

/* Frequencies that sum to the number of slots, at least 1 where a symbol occurs */
static void set_table(const uint64_t weight[256], qins_rans_table *t)
{
    uint64_t total = 0;
    int sum = 0;
    for (int s = 0; s < 256; s++) {
        total += weight[s];
    }
    for (int s = 0; s < 256; s++) {
        const uint64_t f = (weight[s] * QINS_RANS_SLOTS + total / 2) / total;
        t->frequency[s] = (uint16_t)(weight[s] > 0 && f == 0 ? 1 : f);
        sum += t->frequency[s];
    }
    while (sum != QINS_RANS_SLOTS) { /* one by one, so that the largest ones share what rounding changed */
        int most = 0;
        for (int s = 1; s < 256; s++) {
            most = t->frequency[s] > t->frequency[most] ? s : most;
        }
        const int step = sum < QINS_RANS_SLOTS ? 1 : -1;
        t->frequency[most] = (uint16_t)(t->frequency[most] + step);
        sum += step;
    }
    for (int s = 0, first = 0; s < 256; first += t->frequency[s], s++) {
        t->first[s] = (uint16_t)first;
    }
}

size_t qins_rans_describe(const uint32_t count[256], uint8_t *stored, qins_rans_table *t)
{
    int first = 0, end = QINS_RANS_ESCAPE;
    while (first < end && count[first] == 0) {
        first++;
    }
    while (end > first && count[end - 1] == 0) {
        end--;
    }
    size_t n = 0;
    stored[n++] = (uint8_t)first;
    stored[n++] = (uint8_t)(end - first);
    for (int s = first; s < end; s++) {
        stored[n++] = rounded(count[s]);
    }
    stored[n++] = rounded((uint64_t)count[QINS_RANS_ESCAPE] + 1);
    qins_rans_read(stored, n, t);
    return n;
}

size_t qins_rans_read(const uint8_t *stored, size_t bytes, qins_rans_table *t)
{
    if (bytes < 3 || stored[0] + stored[1] > QINS_RANS_ESCAPE || bytes < 3 + (size_t)stored[1]) {
        return 0;
    }
    uint64_t weight[256] = {0};
    const int first = stored[0], n = stored[1];
    for (int s = 0; s < n; s++) {
        weight[first + s] = number(stored[2 + s]);
    }
    weight[QINS_RANS_ESCAPE] = number(stored[2 + n]);
    if (weight[QINS_RANS_ESCAPE] == 0) {
        return 0;
    }
    set_table(weight, t);
    return 3 + (size_t)n;
}

void qins_rans_slots(const qins_rans_table *t, uint32_t slot[QINS_RANS_SLOTS])
{
    for (uint32_t s = 0; s < 256; s++) {
        for (uint32_t i = 0; i < t->frequency[s]; i++) {
            slot[t->first[s] + i] = s | (uint32_t)t->frequency[s] << 8 | i << 19;
        }
    }
}

void qins_rans_inverses(uint64_t inverse[QINS_RANS_SLOTS + 1])
{
    inverse[0] = 0;
    for (uint64_t f = 1; f <= QINS_RANS_SLOTS; f++) {
        inverse[f] = (((uint64_t)1 << 42) + f - 1) / f;
    }
}
