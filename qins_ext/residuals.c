/* How the residuals of a matrix of codes are coded; see exact.h. */
#include "residuals.h"

#include <math.h>

#include "packed.h"

enum { BLOCK = 65536 }; /* weights of a block, in whole rows */

/* Quarter octaves of a distance of 1 or more; of enormous ones, about as many */
static int quarters(double distance)
{
    static const double quarter[] = {1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429};
    int octave = 0, q = 3;
    for (; distance >= 2.0 && octave < 32; octave++) {
        distance *= 0.5;
    }
    while (q > 0 && distance < quarter[q]) {
        q--;
    }
    return 4 * octave + q;
}

/* How to code the residual of a code whose neighbors are `distance` numbers away; 0: of a code that stands for 0 */
static uint32_t scheme_of(double distance, int mantissa_bits)
{
    if (distance <= 0.0) {
        return QINS_EXACT_ZERO * QINS_RANS_SLOTS | (uint32_t)mantissa_bits << 16; /* the symbol is the exponent */
    }
    const int q = quarters(distance), octaves = QINS_EXACT_CODED / 4;
    const int shift = q < QINS_EXACT_CODED ? 0 : q / 4 - octaves + 1;
    return (uint32_t)(q - 4 * shift) * QINS_RANS_SLOTS | (uint32_t)(shift < 15 ? shift : 15) << 16;
}

/* Sets the schemes of all levels, from half the distance between the two neighbors of each. */
static void classify(qins_residuals *r)
{
    const qins_codec codec = r->e->codec;
    const int golden = codec == QINS_golden || codec == QINS_log9, packed = is_packed(codec);
    const int top = golden ? 255 : packed ? 128 : 127, step = packed ? 1 << (8 - log_bits(codec)) : 1;
    const float *value = r->from.table;
    memset(r->scheme, 0, sizeof r->scheme);
    r->level_mask = golden ? 255 : 127;
    for (int p = 0; p <= top; p += step) {
        const int level = p < 128 || golden ? p : 127; /* of packed codes, 127 stands for 128 */
        const int below = p - step < 0 ? p : p - step, above = p + step > top ? p : p + step;
        const double low = (double)value[below], high = (double)value[above < 128 || golden ? above : 127];
        const double spacing = fabs(high - low) * step / (above - below), v = (double)value[level];
        for (int m = 0; m < 8; m++) {
            const double numbers = v > 0.0 ? spacing / v * (double)(1 << r->mantissa_bits) * (8.5 + m) / 8.0 : 0.0;
            r->scheme[8 * level + m] = scheme_of(v > 0.0 ? fmax(numbers, 1.0) : 0.0, r->mantissa_bits);
        }
    }
}

void qins_residuals_init(qins_residuals *r, const qins_kernels *kernels, const qins_codes *e, qins_dtype dtype)
{
    r->e = e;
    r->dtype = dtype;
    r->mantissa_bits = dtype == QINS_F16 ? 10 : 7;
    qins_decoder_init(&r->from, kernels, e);
    classify(r);
    r->block_rows = e->cols < BLOCK && e->cols > 0 ? BLOCK / e->cols : 1;
    r->blocks = e->cols > 0 ? ceil_div(e->rows, r->block_rows) : 0;
}

const uint8_t *qins_residuals_window(const qins_residuals *r, size_t row, size_t k, size_t n, uint16_t *decoded,
                                     uint8_t *room)
{
    float value[QINS_WINDOW];
    qins_decode_span(&r->from, row, k, n, value);
    r->from.kernels->narrow[r->dtype](value, n, decoded);
    if (!is_packed(r->e->codec)) {
        return r->e->codes + row * r->e->cols + k;
    }
    qins_unpack(r->from.kernels, r->e, row, k, n, room);
    return room;
}
