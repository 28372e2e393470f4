/* Packed codes to log8's form and back; see packed.h. */
#include "packed.h"

enum { HALF = QINS_BLOCK / 2, FLIPS = QINS_WINDOW / HALF };

/* For each 32 columns from k on: 0x80 if their group scale is negative, else 0 */
static void flips_of(const qins_codes *e, size_t row, size_t k, size_t n, uint8_t *flip)
{
    const size_t each = e->group_size / HALF, first = k / HALF, count = ceil_div(n, HALF);
    const uint8_t *group = group_row(e, row) + first / each;
    size_t left = each - first % each; /* 32s left in this group */
    for (size_t i = 0; i < count; i++) {
        flip[i] = *group & 0x80;
        if (--left == 0) {
            left = each;
            group++;
        }
    }
}

void qins_unpack(const qins_kernels *kernels, const qins_codes *e, size_t row, size_t k, size_t n, uint8_t *codes)
{
    const int bits = log_bits(e->codec);
    const uint8_t *packed = e->codes + row * code_bytes(e, e->cols) + code_bytes(e, k);
    n = least(ceil_div(n, QINS_BLOCK) * QINS_BLOCK, e->cols - k);
    for (size_t part; n > 0; k += part, n -= part, codes += part, packed += code_bytes(e, part)) {
        uint8_t flip[FLIPS];
        part = least(n, QINS_WINDOW);
        flips_of(e, row, k, part, flip);
        kernels->unpack(packed, part, bits, flip, codes);
    }
}

void qins_codes_of_column(const qins_codes *e, size_t row, size_t rows, size_t col, uint8_t *codes)
{
    const size_t row_bytes = code_bytes(e, e->cols);
    const uint8_t *from = e->codes + row * row_bytes;
    if (!is_packed(e->codec)) {
        for (size_t i = 0; i < rows; i++) {
            codes[i] = from[i * row_bytes + col];
        }
        return;
    }
    const int bits = log_bits(e->codec), more = bits - 4; /* bits in the second plane, if there is one */
    const size_t begin = col / QINS_BLOCK * QINS_BLOCK, count = least(e->cols - begin, QINS_BLOCK), at = col - begin;
    const size_t bytes = count / 8 * 4, more_bytes = count / 8 * (size_t)more;
    const size_t low = at % bytes, high = more > 0 ? bytes + at % more_bytes : 0;
    const size_t low_shift = at / bytes * 4, high_shift = more > 0 ? at / more_bytes * (size_t)more : 0;
    const unsigned mask = (1u << more) - 1;
    const size_t groups = ceil_div(e->cols, e->group_size);
    const uint8_t *group = group_row(e, row) + col / e->group_size;
    for (size_t i = 0; i < rows; i++) {
        const uint8_t *block = from + i * row_bytes + code_bytes(e, begin);
        const unsigned q = (block[low] >> low_shift & 15) | (block[high] >> high_shift & mask) << 4;
        codes[i] = (uint8_t)(log8_form(q, bits) ^ (group[i * groups] & 0x80));
    }
}

void qins_pack(const uint8_t *codes, size_t cols, int bits, uint8_t *packed)
{
    const uint8_t top = (uint8_t)((1 << (bits - 1)) - 1);
    for (size_t begin = 0; begin < cols; begin += QINS_BLOCK) {
        const size_t count = least(cols - begin, QINS_BLOCK);
        uint8_t q[QINS_BLOCK];
        for (size_t i = 0; i < count; i++) {
            const unsigned level = codes[begin + i] & 127u, negative = codes[begin + i] >> 7 & (unsigned)(level > 0);
            const unsigned index = level - negative;
            q[i] = (uint8_t)((index < top ? index : top) | negative << (bits - 1));
        }
        pack_planes(q, count, bits, packed);
        packed += count / 8 * (size_t)bits;
    }
}
