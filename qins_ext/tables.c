/* Logarithms, levels and thresholds: everything that a format computes once per tensor.
 *
 * Uses only +, -, *, / and integer operations on doubles, so that results have the same bits on every platform. libm's
 * log and exp are not used because they may differ in the last bit. */
#include <string.h>

#include "packed.h"

static uint64_t bits64(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static double from_bits64(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* ln 2 in two parts: n * LN2_HI is exact for |n| < 2^11. Cody and Waite's split, as in fdlibm. */
static const double LN2_HI = 6.93147180369123816490e-01;
static const double LN2_LO = 1.90821492927058770002e-10;

double qins_log(double x)
{
    uint64_t u = bits64(x);
    int e = (int)(u >> 52) - 1023;
    double m = from_bits64((u & 0x000fffffffffffffu) | 0x3ff0000000000000u);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e += 1;
    }
    /* ln m = 2 atanh(s), s = (m - 1)/(m + 1), |s| < 0.1716: eleven terms reach 2^-55 */
    double s = (m - 1.0) / (m + 1.0), z = s * s, sum = 0.0;
    for (int k = 23; k >= 3; k -= 2) {
        sum = (sum + 1.0 / k) * z;
    }
    return e * LN2_HI + (e * LN2_LO + 2.0 * (s * sum) + 2.0 * s);
}

/* e^r - 1 for |r| <= 0.5, by its Taylor series. */
static double expm1_small(double r)
{
    double sum = 0.0;
    for (int k = 17; k >= 2; k--) {
        sum = (sum + 1.0) * (r / k);
    }
    return (sum + 1.0) * r;
}

double qins_exp(double x)
{
    if (x > 709.0) {
        return from_bits64(0x7ff0000000000000u);
    }
    if (x < -700.0) {
        return 0.0;
    }
    if (x != x) { /* NaN, from scalars that no encoder writes */
        return x;
    }
    double scaled = x * 1.4426950408889634;
    int n = (int)(scaled + (scaled < 0.0 ? -0.5 : 0.5));
    double r = (x - n * LN2_HI) - n * LN2_LO;
    return (expm1_small(r) + 1.0) * from_bits64((uint64_t)(n + 1023) << 52);
}

static double exp_minus_1(double x) { return x < 0.5 ? expm1_small(x) : qins_exp(x) - 1.0; }

/* ln(1 + x) without losing small x, by Kahan's method. */
static double log_1_plus(double x)
{
    double u = 1.0 + x;
    return u == 1.0 ? x : qins_log(u) * x / (u - 1.0);
}

/* -- lookup of thresholds --------------------------------------------------------------------- */

/* Writes cells of 2^shift patterns each. Returns 0 if a cell would need two thresholds or there are too many cells.
 * Cell 0 and the last one are outside all thresholds, so clamping to them is correct. */
static int try_shift(qins_lut *lut, const int32_t *threshold, int count, int shift)
{
    int32_t size = (int32_t)1 << shift;
    lut->shift = shift;
    lut->mask = size - 1;
    lut->base = threshold[0] - size;
    lut->last = (int32_t)(((int64_t)threshold[count - 1] - lut->base) >> shift) + 1;
    if (lut->last >= QINS_LUT_CELLS) {
        return 0;
    }
    int done = 0;
    for (int32_t i = 0; i <= lut->last; i++) {
        int64_t start = (int64_t)lut->base + (int64_t)i * size;
        while (done < count && threshold[done] == start) {
            done++;
        }
        uint32_t low = 0xffffff; /* above any pattern's low bits */
        if (done < count && threshold[done] < start + size) {
            low = (uint32_t)(threshold[done] - start);
        }
        lut->cell[i] = ((uint32_t)done << 24) | low;
        if (low != 0xffffff) {
            done++;
            if (done < count && threshold[done] < start + size) {
                return 0;
            }
        }
    }
    return 1;
}

void qins_lut_build(qins_lut *lut, const int32_t *threshold, int count)
{
    /* Cells of one pattern always separate thresholds. Coarser cells are tried first because fewer cells stay in the
     * L1 cache. Thresholds spaced evenly in value or in logarithm, as all of ours are, need far fewer than
     * QINS_LUT_CELLS. */
    int shift = 22;
    while (shift > 0 && !try_shift(lut, threshold, count, shift)) {
        shift--;
    }
    if (shift == 0) {
        (void)try_shift(lut, threshold, count, 0);
    }
}

uint32_t qins_lut_count(const qins_lut *lut, int32_t pattern)
{
    int32_t d = pattern - lut->base;
    int32_t i = d >> lut->shift; /* arithmetic with every compiler that builds qins; tests check it */
    i = i < 0 ? 0 : i > lut->last ? lut->last : i;
    uint32_t c = lut->cell[i];
    return (c >> 24) + ((uint32_t)(d & lut->mask) >= (c & 0xffffff));
}

/* -- log8 ------------------------------------------------------------------------------------- */

/* In log8's form, levels of packed codes have an m that is a multiple of 128/h, except that 127 stands for 128. */
static int level_position(int m, int packed) { return m + (packed && m == QINS_LEVELS - 1); }
static int last_position(int packed) { return packed ? QINS_LEVELS : QINS_LEVELS - 1; }

/* From m to the next level in use. All packed codes count as log6, whose levels include those of log5 and log4. */
static int next_used(int m, int packed) { return !packed ? 1 : m < QINS_LEVELS - 4 ? 4 : m < QINS_LEVELS - 1 ? 3 : 1; }

void qins_log8_levels(float mu, int packed, float level[QINS_LEVELS])
{
    double length = log_1_plus((double)mu);
    for (int m = 0; m < QINS_LEVELS; m++) {
        double part = (double)level_position(m, packed) / last_position(packed);
        level[m] = (float)(mu > 0.0f ? exp_minus_1(part * length) / (double)mu : part);
    }
    level[QINS_LEVELS - 1] = 1.0f;
}

void qins_log8_tables_build(qins_log8_tables *t, float mu, int bits)
{
    int32_t threshold[QINS_LEVELS - 1];
    const int packed = bits < 8;
    int last = QINS_LEVELS - 1;
    t->mu = mu;
    t->bits = bits;
    qins_log8_levels(mu, packed, t->level);
    if (packed) {
        last = 1 << (bits - 1);
        for (int i = 1; i < QINS_LEVELS; i++) { /* level i has m = i * 128/h in log8's form */
            t->level[i] = t->level[i < last ? i * (QINS_LEVELS / last) : QINS_LEVELS - 1];
        }
    }
    t->top = last - packed;
    for (int m = 0; m < last; m++) {
        double middle = ((double)t->level[m] + (double)t->level[m + 1]) * 0.5;
        float f = (float)middle;
        threshold[m] = bits32(f) + ((double)f < middle); /* the smallest float that is not below it */
    }
    qins_lut_build(&t->lut, threshold, last);
    if (packed) {
        t->split[0] = threshold[last - 1] - 1;
        for (int i = 1, first = 1; i < last; i++) { /* first: of the nodes as deep as i */
            first = i == 2 * first ? i : first;
            t->split[i] = threshold[(2 * (i - first) + 1) * (last / 2 / first) - 1] - 1;
        }
    }
}

/* -- rational --------------------------------------------------------------------------------- */

/* The magnitude at `part` of the way from z_max to z_min; exact at both ends, however far apart they are. */
static double rational_value(double part, float alpha, float z_min, float z_max)
{
    double z = (1.0 - part) * (double)z_max + part * (double)z_min;
    double w = (1.0 - z) / ((double)alpha * z);
    return w < (double)FLT_MAX ? w : (double)FLT_MAX;
}

void qins_rational_levels(float alpha, float z_min, float z_max, float level[QINS_LEVELS])
{
    for (int m = 0; m < QINS_LEVELS; m++) {
        double part = (double)m / (QINS_LEVELS - 1);
        level[m] = (float)rational_value(part, alpha, z_min, z_max);
    }
}

void qins_rational_tables_build(qins_log8_tables *t, float alpha, float z_min, float z_max)
{
    int32_t threshold[QINS_LEVELS - 1];
    t->mu = 0.0f;
    t->top = QINS_LEVELS - 1;
    t->bits = 8;
    qins_rational_levels(alpha, z_min, z_max, t->level);
    for (int m = 0; m < QINS_LEVELS - 1; m++) {
        double part = (m + 0.5) / (QINS_LEVELS - 1);
        double middle = rational_value(part, alpha, z_min, z_max);
        float f = (float)middle;
        threshold[m] = bits32(f) + ((double)f < middle);
    }
    qins_lut_build(&t->lut, threshold, QINS_LEVELS - 1);
}

/* -- golden ----------------------------------------------------------------------------------- */

void qins_golden_values(float log_min, float log_max, float value[256])
{
    double range = (double)log_max - (double)log_min;
    for (int stored = 1; stored < 256; stored++) {
        double v = qins_exp((double)log_min + (255 - stored) / 254.0 * range);
        value[stored] = v < (double)FLT_MAX ? (float)v : FLT_MAX; /* log_max may have been rounded up to float32 */
    }
    value[0] = value[1];
}

/* Whether stored(w) <= s, where stored(w) = round_half_even(255 - 254 (ln w - log_min)/range). */
static int reaches(int32_t pattern, double log_min, double range, int s)
{
    double y = 255.0 - 254.0 * ((qins_log((double)from_bits32(pattern)) - log_min) / range);
    return y < s + 0.5 || (y == s + 0.5 && s % 2 == 0);
}

void qins_golden_tables_build(qins_golden_tables *t, qins_range r)
{
    if (r.lo > r.hi) { /* nothing above 1e-8: the original implementation's range */
        t->log_min = -10.0f;
        t->log_max = 0.0f;
        t->constant = 1;
    } else {
        t->log_min = (float)qins_log((double)from_bits32(r.lo));
        t->log_max = (float)qins_log((double)from_bits32(r.hi));
        t->constant = (double)t->log_max - (double)t->log_min < 1e-8;
        if (t->constant) {
            t->log_max = t->log_min;
        }
    }
    qins_golden_values(t->log_min, t->log_max, t->value);
    if (t->constant) {
        return;
    }
    double low = t->log_min, range = (double)t->log_max - low;
    int32_t threshold[254];
    for (int s = 254; s >= 1; s--) {
        /* exp() gives the boundary up to a rounding error; from there, find the smallest float that reaches s */
        int32_t p = bits32((float)qins_exp(low + (254.5 - s) / 254.0 * range));
        while (reaches(p - 1, low, range, s)) {
            p--;
        }
        while (!reaches(p, low, range, s)) {
            p++;
        }
        threshold[254 - s] = p;
    }
    qins_lut_build(&t->lut, threshold, 254);
}

/* -- products --------------------------------------------------------------------------------- */

/* 0 if it does not fit, which only scalars cause that no encoder writes */
static int16_t fixed_point(double x, double one)
{
    const double rounded = x * one + (x < 0.0 ? -0.5 : 0.5);
    return rounded > -32769.0 && rounded < 32768.0 ? (int16_t)rounded : 0;
}

/* Factors of f in 16 bits: (1 + mu)^(m/127) is a[m / 16] * b[m % 16], and 1 is c. Their precision depends on the unit,
 * by luck of rounding, so many units are tried and the best is used. That halves the error of a product. */
static void build_factors(qins_log8_words *t, const float *level)
{
    enum { CHOICES = 128 };
    const int last = last_position(t->bits < 8);
    double mu = (double)t->mu, step = log_1_plus(mu) / last, power[8], smallest = DBL_MAX;
    double most = (double)QINS_WORD_MAX * (1.0 + mu); /* mu times the `one` at which f(127) has the largest word */
    most = mu > 0.0 && most < 32767.0 * mu ? most / mu : 32767.0;
    memset(t->a, 0, sizeof t->a); /* all remain 0 for mu = 0 */
    t->c = 0;
    t->factor_unit = 0.0f;
    /* b[15] is 1. In packed codes, only m = 127, which stands for 128, uses it. */
    const int top = 15 + (t->bits < 8);
    for (int i = 0; i < 16; i++) {
        t->b[i] = fixed_point(qins_exp(step * (i < 15 ? i - top : 0)), 32767.0);
    }
    for (int h = 0; h < 8; h++) {
        power[h] = qins_exp(step * (16 * h + top - last));
    }
    for (int choice = 0; choice < CHOICES; choice++) {
        const double one = most * (1.0 - 0.1 * choice / (double)CHOICES);
        const int16_t c = fixed_point(1.0 / (1.0 + mu), one);
        int word[QINS_LEVELS], largest = 0;
        double of_level = 0.0, of_word = 0.0, error = 0.0;
        for (int m = 0; m < QINS_LEVELS; m += next_used(m, t->bits < 8)) {
            word[m] = ((fixed_point(power[m / 16], one) * t->b[m % 16] + (1 << 14)) >> 15) - c;
            largest = word[m] > largest ? word[m] : largest;
            of_level += (double)word[m] * (double)level[m];
            of_word += (double)word[m] * word[m];
        }
        if (largest > QINS_WORD_MAX || of_word == 0.0) {
            continue;
        }
        const double unit = of_level / of_word; /* by least squares */
        for (int m = 0; m < QINS_LEVELS; m += next_used(m, t->bits < 8)) {
            const double e = word[m] * unit - (double)level[m];
            error += e * e;
        }
        if (error < smallest) {
            smallest = error;
            for (int i = 0; i < 16; i++) {
                const int16_t a = fixed_point(power[i & 7], one);
                t->a[i] = (int16_t)(i < 8 ? a : -a);
            }
            t->c = c;
            t->factor_unit = (float)unit;
        }
    }
}

void qins_log8_words_build(qins_log8_words *t, float mu, int bits)
{
    float level[QINS_LEVELS];
    qins_log8_levels(mu, bits < 8, level);
    t->mu = mu;
    t->bits = bits;
    for (int code = 0; code < 256; code++) {
        int16_t w = fixed_point((double)level[code & 127], QINS_WORD_MAX);
        w = (int16_t)(w + ((w & 255) == 0 && (code & 127) > 0)); /* see vw_decode in words_avx512vnni.h */
        w = (int16_t)(code < 128 ? w : -w);
        t->word[code] = w;
        t->word_low[code] = (uint8_t)(uint16_t)w;
        t->word_high[code] = (uint8_t)((uint16_t)w >> 8);
        t->multiplier[code] = group_multiplier(bits, (uint8_t)code);
    }
    for (int q = 0; q < 64 && bits < 8; q++) {
        const uint8_t code = log8_form((unsigned)q, bits);
        t->packed_low[q] = t->word_low[code];
        t->packed_high[q] = t->word_high[code];
    }
    t->word_unit = 1.0f / (float)QINS_WORD_MAX;
    for (int m = 0; m < QINS_LEVELS; m++) {
        t->plane[m] = level[m] * (float)QINS_PLANE_MAX;
        int word = fixed_point((double)level[m], QINS_PLANE_MAX);
        word += (word & 255) == 0 && word > 0; /* see look_up_planes */
        t->plane_low[m] = (uint8_t)(word & 255);
        t->plane_high[m] = (uint8_t)(word >> 8);
    }
    for (int q = 0; q < 64 && bits < 8; q++) {
        const uint8_t code = log8_form((unsigned)q, bits);
        const int magnitude = 256 * t->plane_high[code & 127] + t->plane_low[code & 127];
        const uint16_t negated = (uint16_t)(code < 128 ? -magnitude : magnitude);
        t->negated_low[q] = (uint8_t)(negated & 255);
        t->negated_high[q] = (uint8_t)(negated >> 8);
    }
    build_factors(t, level);
}

void qins_golden_factors_build(qins_golden_factors *t, float log_min, float log_max)
{
    double step = ((double)log_max - (double)log_min) / 254.0;
    for (int i = 0; i < 16; i++) { /* split at l = 8, so that factors are in float32's range if their product is */
        t->high[i] = (float)qins_exp((double)log_min + (247 - 16 * i) * step);
        t->low[i] = (float)qins_exp((8 - i) * step);
    }
    for (int i = 0; i < 8; i++) { /* likewise split in the middle */
        t->eighth[0][i] = (float)qins_exp((4 - i) * step);
        t->eighth[1][i] = (float)qins_exp((32 - 8 * i) * step);
        float top = (float)qins_exp((double)log_min + (219 - 64 * (i & 3)) * step);
        t->eighth[2][i] = i < 4 ? top : -top;
    }
}
