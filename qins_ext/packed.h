/* Packed codes: log6, log5 and log4.
 *
 * A row is a sequence of blocks of 64 codes; the last block may have 8 to 56. A block of c codes is stored in planes:
 * first the low 4 bits of every code, then the remaining 2 (log6) or 1 (log5). A plane of w bits has c*w/8 bytes. Bits
 * w*j to w*j + w - 1 of byte i belong to code i + j*c*w/8. So a vector unpacks a plane with one shift that is uniform
 * over consecutive bytes, and a block of 64 is 8*bits consecutive bytes.
 *
 * Most kernels read log8's form instead: sign<<7 | m. The magnitude f(p) of qins.h has m = 128 p, except that 127
 * stands for 128 (see qins_log8_levels). The sign of a code then includes that of its group's scale, and the
 * group_scale becomes log8's: 2 * (group_scale & 127) + 1. */
#ifndef QINS_PACKED_H
#define QINS_PACKED_H

#include <math.h>

#include "sizes.h"

/* Bits of a code; 0 for codecs that are not of log8's family */
static inline int log_bits(qins_codec codec)
{
    return codec == QINS_log8 ? 8 : codec == QINS_log6 ? 6 : codec == QINS_log5 ? 5 : codec == QINS_log4 ? 4 : 0;
}

static inline int is_packed(qins_codec codec) { return log_bits(codec) % 8 != 0; }

/* Bytes of a row of codes; for packed ones, cols is a multiple of 8. */
static inline size_t code_bytes(const qins_codes *e, size_t cols)
{
    return is_packed(e->codec) ? cols / 8 * (size_t)log_bits(e->codec) : cols;
}

/* What a group_scale multiplies the row's scale by, in codes of `bits` bits */
static inline float group_multiplier(int bits, uint8_t group_scale)
{
    if (bits == 8) {
        return (float)(group_scale + 1) / 256.0f;
    }
    const float multiplier = (float)((group_scale & 127) + 1) / 128.0f;
    return group_scale < 128 ? multiplier : -multiplier;
}

static inline uint8_t log8_group_scale(uint8_t packed) { return (uint8_t)(2 * (packed & 127) + 1); }

/* log8's form of a packed code, but with the code's own sign: relative to that of the group's scale */
static inline uint8_t log8_form(unsigned q, int bits)
{
    const unsigned sign = q >> (bits - 1) & 1, m = ((q & ((1u << (bits - 1)) - 1)) + sign) << (8 - bits);
    return (uint8_t)((m - (m >> 7)) | sign << 7);
}

/* Writes the planes of one block of packed codes. */
static inline void pack_planes(const uint8_t *q, size_t count, int bits, uint8_t *packed)
{
    for (int low = 0, width = 4; low < bits; low += width, width = bits - 4) {
        const size_t bytes = count / 8 * (size_t)width;
        memset(packed, 0, bytes);
        for (int shift = 0; shift < 8; shift += width, q += bytes) {
            for (size_t i = 0; i < bytes; i++) { /* compilers vectorize this */
                const unsigned part = q[i] >> low & ((1u << width) - 1);
                packed[i] = (uint8_t)(packed[i] | part << shift);
            }
        }
        q -= count;
        packed += bytes;
    }
}

/* The value of 1 in planes, in a row of codes with this group scale; NULL if the inputs are not grouped. */
static inline float plane_unit(const qins_codes *e, const qins_log8_words *t, size_t row, const uint8_t *group_scale)
{
    const float scale = float_at(e->scale, row) * (1.0f / (float)QINS_PLANE_MAX);
    /* in log8's form, the codes have the sign */
    return group_scale != NULL ? fabsf(scale * t->multiplier[*group_scale]) : scale;
}

/* Unpacks columns [k, k + n) of a row; k is a multiple of 64. `codes` has room for n rounded up to 64. */
void qins_unpack(const qins_kernels *kernels, const qins_codes *e, size_t row, size_t k, size_t n, uint8_t *codes);
/* Decodes columns [k, k + n) of a row; level: see qins_log8_levels. */
void qins_decode_packed(const qins_kernels *kernels, const qins_codes *e, const float *level, size_t row, size_t k,
                        size_t n, float *out);
/* The codes of one column of rows [row, row + rows), in log8's form */
void qins_codes_of_column(const qins_codes *e, size_t row, size_t rows, size_t col, uint8_t *codes);
/* Packs one row of codes, given as sign<<7 | level, with signs relative to those of the group scales. A level that does
 * not exist with its sign becomes the nearest one that does. */
void qins_pack(const uint8_t *codes, size_t cols, int bits, uint8_t *packed);

#endif
