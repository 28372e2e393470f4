/* The contract of the core: formats, units, shapes, aliasing.
 *
 * Matrices are rows x cols, row-major; a row is an output feature of a linear layer. Sizes are in elements unless a
 * name says bytes. Pointers may be unaligned, and nothing is read or written outside an array. Outputs must not overlap
 * inputs. Callers (module*.c) have checked every argument, so nothing here raises, and kernels cannot fail. Functions
 * that can run out of memory, or find a non-finite element, say so by their result.
 *
 * Formats. value is the float32 that a code decodes to, the same bit for bit on every platform.
 *   golden  stored 1..255, sign -1 or +1, scalars log_min, log_max:
 *           value = sign * exp(log_min + (255 - stored)/254 * (log_max - log_min))
 *   log9    the same stored, with sign_bits: bit k%8 of byte k/8 of a row is set where negative
 *   log8    code = sign<<7 | m; value = (-1)^sign * S * f(m), f(m) = ((1+mu)^(m/127) - 1)/mu;
 *           S = scale[row], or scale[row] * ((group_scale[row, k/group_size] + 1)/256) when grouped
 *   log6, log5, log4  q = sign<<(bits-1) | i of 6, 5 or 4 bits, in planes (see packed.h), with h = 2^(bits-1);
 *           value = S * f(i/h) if sign is 0, -S * f((i+1)/h) if it is 1, f(p) = ((1+mu)^p - 1)/mu;
 *           S = scale[row] * ((group_scale[row, k/group_size] & 127) + 1)/128, negated where bit 7 of group_scale is
 *           set; group_size is 32 or a multiple of 64, and cols a multiple of 8
 *   rational code = sign<<7 | m; |z| = z_max - m/127 * (z_max - z_min);
 *           value = (-1)^sign * (1 - |z|)/(alpha |z|)
 */
#ifndef QINS_H
#define QINS_H

#include "port.h"

enum {
    QINS_LANES = 16,       /* every kernel processes 16 elements at a time, at any register width */
    QINS_WINDOW = 4096,    /* elements of the float32 scratch for other dtypes; a multiple of 16 */
    QINS_LEVELS = 128,     /* magnitudes of log8 */
    QINS_CANDIDATES = 12,  /* maximum number of scales compared in one search */
    QINS_LUT_CELLS = 4096, /* enough for every table that tables.c builds, see qins_lut_build */
    QINS_FEW_LEVELS = 32   /* most magnitudes of packed codes, without the last one */
};

typedef enum { QINS_F32, QINS_F16, QINS_BF16, QINS_F64 } qins_dtype;

typedef enum {
#define X(name) QINS_##name,
#include "codecs.def"
#undef X
    QINS_CODEC_COUNT
} qins_codec;

/* Counts exactly, with one lookup, how many of an ascending list of float thresholds are <= a magnitude. Bit patterns
 * of non-negative floats ascend with their values, so a pattern's high bits select a cell. A cell is so small that at
 * most one threshold lies after its first float.
 *   pattern p >= 0;  i = clamp((p - base) >> shift, 0, last);  c = cell[i]
 *   count = (c >> 24) + (((p - base) & mask) >= (c & 0xffffff))                                      */
typedef struct {
    int32_t base, shift, mask, last;
    uint32_t cell[QINS_LUT_CELLS];
} qins_lut;

/* Maps magnitudes of log8, log6, log5 or log4 to levels and back, for one mu. */
typedef struct {
    float mu;
    QINS_ALIGNED(64) float level[QINS_LEVELS]; /* the levels in use, ascending */
    qins_lut lut;                              /* counts midpoints between neighboring levels: the nearest one */
    int bits;                                  /* of a code; 8 for log8 and rational */
    int32_t top; /* the largest level that exists with the scale's sign. Packed codes have one more with the other. */
    /* Packed codes: one less than the same thresholds, the last one first, then the others as a search tree: the root
     * is at 1, and what follows i is at 2i if a pattern is not above split[i], else at 2i + 1. */
    int32_t split[QINS_FEW_LEVELS];
} qins_log8_tables;

/* Maps golden magnitudes to `stored` and back, for one (log_min, log_max). */
typedef struct {
    float log_min, log_max;
    QINS_ALIGNED(64) float value[256]; /* value[stored]; value[0] repeats value[1] */
    qins_lut lut;                      /* stored = 255 - count */
    int constant;                      /* the range is too small: every stored is 128 */
} qins_golden_tables;

/* The levels of one mu for products, as 16-bit fixed-point values (words). Each kernel uses one of these forms:
 *   word[c] = f(c & 127) * QINS_WORD_MAX, rounded so that the low byte is 0 only for 0; negated where c >= 128
 *
 *   256 * plane_high[m] + plane_low[m] = f(m) * QINS_PLANE_MAX = plane[m], rounded so that plane_low is 0 only for 0
 *
 *   f(16h + l) = (((a[h] * b[l] + 2^14) >> 15) - c) * factor_unit, of words up to QINS_WORD_MAX, where a[h] with
 *   h = code >> 4 has the sign; exact enough only for mu >= QINS_FACTORS_MU
 */
typedef struct {
    float mu;
    int bits; /* of a code. Codes of fewer than 8 are packed (see packed.h); these tables then are for log8's form */
    QINS_ALIGNED(64) int16_t word[256];
    QINS_ALIGNED(64) uint8_t word_low[256];
    QINS_ALIGNED(64) uint8_t word_high[256];
    QINS_ALIGNED(64) float plane[QINS_LEVELS]; /* not rounded */
    QINS_ALIGNED(64) uint8_t plane_high[QINS_LEVELS];
    QINS_ALIGNED(64) uint8_t plane_low[QINS_LEVELS];
    QINS_ALIGNED(32) int16_t a[16];
    QINS_ALIGNED(32) int16_t b[16];
    int16_t c;
    float multiplier[256]; /* by the codec's group_scale; that of packed codes has a sign */
    /* By packed code, repeated to 64 entries, without the group scale's sign: the two bytes of its word, and of its
     * plane's negated one */
    QINS_ALIGNED(64) uint8_t packed_low[64];
    QINS_ALIGNED(64) uint8_t packed_high[64];
    QINS_ALIGNED(64) uint8_t negated_low[64];
    QINS_ALIGNED(64) uint8_t negated_high[64];
    float word_unit, factor_unit; /* the value of 1, in levels */
    void *room;                   /* for the allocator: the memory to free */
} qins_log8_words;
/* The smallest mu that encoders choose; the relative error of a product is 1.4e-4 there, 1e-4 at 2.5. */
#define QINS_FACTORS_MU 0.5f

/* golden's value(stored) = high[stored >> 4] * low[stored & 15]
 *                      = eighth[0][stored & 7] * eighth[1][stored >> 3 & 7] * eighth[2][stored >> 6],
 * to a few units in the last place; eighth[2][4 + i] = -eighth[2][i]. */
typedef struct {
    QINS_ALIGNED(64) float high[16];
    QINS_ALIGNED(64) float low[16];
    QINS_ALIGNED(32) float eighth[3][8];
} qins_golden_factors;

/* Prefetch distance of a streaming loop, into the second-level cache. Measured: 5 to 7 KiB is best for a fixed
 * distance, and prefetches into the first-level cache only compete with these. */
enum { QINS_AHEAD = 6144 }; /* bytes */

/* The distance for loops that read only `cols` of `row` bytes per row: a whole number of rows. */
static inline size_t qins_rows_ahead(size_t cols, size_t row)
{
    return cols < row && cols > 0 ? (QINS_AHEAD + cols - 1) / cols * row : QINS_AHEAD;
}

enum {
    QINS_BLOCK = 64,     /* codes that a kernel processes at a time */
    QINS_BATCH = 8,      /* maximum rows of activations that a kernel processes at a time */
    QINS_HEAD_DIM = 512, /* maximum elements of a head of attention */
    /* block of codes that is decoded once for many rows of activations, into words of 2 bytes */
    QINS_WORD_ROWS = 64,
    QINS_WORD_COLS = 1024,
    QINS_WORD_ROOM = 2 * QINS_WORD_ROWS * QINS_WORD_COLS,
    /* Largest words of activations and of weights. A lane sums 8 products per step, which stay below 2^31. If one
     * activation of a step is far larger than the others, the others lose as many bits as the words of weights do. */
    QINS_X_MAX = 23170,
    QINS_WORD_MAX = 11585
};

/* Rows of activations in fixed point for dot_log8: consecutive sets of up to QINS_BATCH rows. A set is stored step by
 * step, with `step` words of each row: blocks of 64, in the order in which the kernel reads them. */
typedef struct {
    const int16_t *x;
    const float *scale; /* QINS_BATCH per step of a set */
    size_t steps;       /* a step: the kernel's word_step columns, or 64 if the group size is not a multiple of that */
    int batch;          /* total rows of all sets */
    size_t pairs;       /* of blocks of one row that pair_blocks has reordered */
} qins_fixed;

/* How many pairs of whole blocks of log4 are multiplied together with one row of activations, where an instruction set
 * has pair_blocks: none in rows that are wider than a kernel's table of factors. */
static inline size_t qins_pairs(size_t cols) { return cols <= 32 * 1024 ? cols / (2 * QINS_BLOCK) : 0; }

/* Memory that a kernel prefetches as it runs, line by line: `lines` per piece, and `jump` bytes from the end of a piece
 * to the beginning of the next. Prefetching never faults, so pieces may be at any address. */
typedef struct {
    uintptr_t next;
    size_t lines, left, jump; /* left: lines of this piece */
    uintptr_t other;          /* also prefetch at this distance in bytes; 0: no */
} qins_fetch;

/* Products with many rows of activations. The rows are split into panels of 16, one lane each. A block of weights is
 * decoded once for all panels, in one of these forms:
 *   floats  consecutive columns of a panel, 16 float32 each; weights row by row
 *   words   consecutive pairs of columns of a panel, 16 words each; weights row by row. Both share a scale over `step`
 *           columns
 *   planes  bytes of 16-bit words in tiles of 16 x 64: high bytes, then low bytes. Weights are words of log8
 *           (plane_high, plane_low); activations are words that share a scale over `step` columns
 *   halves  bfloat16 in tiles of 16 x 32, with the roles exchanged: one lane per row of weights
 * In a tile, the left factor is stored row by row. The right factor has the 4 (planes) or 2 (halves) columns that a
 * 32-bit lane multiplies, for each of the 16 lanes. Columns are padded with zeros to a multiple of QINS_DEPTH. */
enum { QINS_PANEL = 16, QINS_DEPTH = 64, QINS_PLANE_MAX = 127 * 256 + 127 };

/* One product of a block of weights and panels. */
typedef struct {
    const void *w, *x; /* prepared weights; the first panel, or (whole) the first row of unpacked activations */
    size_t next_x;     /* bytes from one panel to the next */
    int panels;
    size_t cols;
    const float *x_scale, *w_scale; /* words, planes: 16, and `rows`, per `step` columns */
    size_t next_scale;              /* from one panel's scales to the next */
    size_t step;
    qins_fetch *fetch; /* NULL, or one line per 64 of these weights */
    float *c;          /* sums; panels are `next_c` floats apart */
    size_t next_c;
    /* finishes: numbers of valid rows; whether c has no sums yet; the output y, NULL before the last columns, with rows
     * next_y bytes apart */
    size_t x_rows, w_rows;
    int first;
    char *y;
    size_t next_y;
} qins_panel_product;

typedef struct {
    int rows;         /* rows of weights per multiply() */
    int panels;       /* most panels per multiply() */
    qins_dtype packs; /* input of pack(): QINS_F32 or QINS_BF16 */
    size_t item;      /* bytes per activation, and per weight */
    size_t depth;     /* most columns per multiply(); prepared weights have room for these */
    size_t block;     /* rows of weights prepared at a time; a multiple of `rows` and of 16 */
    size_t step;      /* words: columns that share a scale; 0: a matter of the groups */
    /* Called before and after a thread's calls to multiply(); may be NULL. */
    void (*begin)(void);
    void (*end)(void);
    /* Packs at most 16 rows of activations, `stride` apart; scale (words, planes): 16 per `step`
     * columns */
    void (*pack)(const void *x, size_t stride, size_t rows, size_t cols, size_t step, void *packed, float *scale);
    /* Prepares one row of weights as row `row` of `prepared`: from codes of log8, or from float32 values if t is NULL
     * (halves). factor, one per `step` columns: halves: converts words to halves; planes: multiplies words, at most
     * 1, or NULL; words: what the codes' levels are multiplied by. words: w are packed codes as they are, and `scale`
     * gets the prepared weights' scales, one for each of their steps. prepare NULL: multiply() takes float32 values. */
    void (*prepare)(const void *w, size_t cols, const qins_log8_words *t, const float *factor, size_t step, size_t row,
                    void *prepared, float *scale);
    /* If weights are the right factor: builds it from the first `rows` prepared rows; else NULL. */
    void (*turn)(void *prepared, size_t rows, size_t cols);
    /* c[panel][row][lane] += sums of products, or with turn c[panel][lane][row] with rows next_c / 16 apart; planes:
     * multiplied by x_scale[column / step][lane] * w_scale[column / step][row]. */
    void (*multiply)(const qins_panel_product *p);
    /* Whether multiply() begins the sums and writes them to y, in bfloat16. */
    int finishes;
    /* Whether multiply() takes unpacked bfloat16 rows of activations, next_x / 16 bytes apart. Their columns must be a
     * multiple of QINS_DEPTH; pack() pads others. */
    int whole;
} qins_panels;

/* Products of log8 with one row of activations. They use the words of the planes, except that the low bytes of weights
 * are 0 to 255 and the activations take the signs of the weights. */
typedef struct {
    /* packed: 64 high bytes and 64 low bytes per 64 columns, padded with zeros to a multiple of `step` columns;
     * scale: one per `step` columns */
    void (*pack)(const float *x, size_t cols, size_t step, void *packed, float *scale);
    /* out[row] = sum over a row of f(codes) * group scale * x. group_scale: NULL, or that of all rows; group_size is
     * then a multiple of step, which is 64 or 128 */
    void (*multiply)(const uint8_t *codes, size_t rows, size_t cols, const uint8_t *group_scale, size_t group_size,
                     const qins_log8_words *t, const void *packed, const float *x_scale, size_t step, float *out);
} qins_single;

/* Products of log8 with a few rows of activations, 16 rows of codes at a time. The bytes are those of planes, but
 * weights are decoded just ahead of their products. A panel holds 8 rows of activations, with the high and low bytes of
 * each in two neighboring lanes. Fewer than 5 rows use 4 or 8 lanes. */
enum { QINS_FEW = 128, QINS_FEW_ROWS = 8 }; /* most rows of activations, and of a panel */

static inline size_t qins_few_panels(size_t batch) { return (batch + QINS_FEW_ROWS - 1) / QINS_FEW_ROWS; }
static inline size_t qins_few_lanes(size_t batch) { return batch > 4 ? 16 : batch > 2 ? 8 : 4; }

typedef struct {
    /* Called before and after a thread's calls to multiply(). */
    void (*begin)(int batch);
    void (*end)(void);
    /* Packs columns of all rows of activations, beginning at a multiple of `step`. packed: panels x lanes bytes per
     * column, with columns padded with zeros to a multiple of QINS_DEPTH; scale: panels x 16 per `step` columns */
    void (*pack)(const float *x, size_t stride, int batch, size_t cols, size_t step, void *packed, float *scale);
    /* out[m][row] for 16 rows of codes, of which `rows` are valid; scale: 16. group_scale and group_size as in
     * dot_log8, with group_size a multiple of step, which is 64 or 128, or 32 or 64 with a step of 128. next: codes to
     * prefetch, as many as these. */
    void (*multiply)(const uint8_t *codes, size_t rows, size_t cols, const float *scale, const uint8_t *group_scale,
                     size_t group_size, const qins_log8_words *t, const void *packed, const float *x_scale, size_t step,
                     int batch, const uint8_t *next, float out[QINS_FEW][QINS_PANEL]);
} qins_few;

typedef struct {
    int32_t lo, hi; /* bit patterns of the smallest and largest |w| above 1e-8f; lo > hi if there is none.
                       hi >= 0x7f800000 means that a NaN or an infinity is among them */
} qins_range;

typedef struct qins_recording qins_recording; /* exact.h */
typedef struct qins_restoring qins_restoring;

enum {
#define X(name, guard, features) QINS_ISA_##name,
#include "isas.def"
#undef X
};

/* The kernels of one instruction set. Elements are contiguous; n may be any size, including 0. */
typedef struct {
    const char *name;
    unsigned isa; /* QINS_ISA_<name> */
    /* Conversions from and to float32: round to nearest even, overflow to infinity. */
    void (*widen[4])(const void *src, size_t n, float *dst);  /* by qins_dtype */
    void (*narrow[4])(const float *src, size_t n, void *dst); /* by qins_dtype */
    int32_t (*absmax)(const float *w, size_t n);              /* largest bit pattern of |w|; 0 for n = 0 */
    /* Only reads, as a baseline for benchmarks. The result is meaningless. */
    int32_t (*read)(const void *data, size_t bytes);
    /* golden and log9 */
    qins_range (*range_golden)(const float *w, size_t n, qins_range r);
    void (*encode_golden)(const float *w, size_t n, const qins_golden_tables *t, uint8_t *stored, int8_t *sign);
    void (*decode_golden)(const uint8_t *stored, const int8_t *sign, size_t n, const float *value, float *out);
    /* sign_bits of n elements, from a byte boundary; unused bits of the last byte are 0 */
    void (*encode_log9)(const float *w, size_t n, const qins_golden_tables *t, uint8_t *stored, uint8_t *sign_bits);
    void (*decode_log9)(const uint8_t *stored, const uint8_t *sign_bits, size_t n, const float *value, float *out);
    /* log8 */
    void (*encode_log8)(const float *w, size_t n, float scale, const qins_log8_tables *t, uint8_t *codes);
    /* error[i] = sum of importance * (|w inverse[i]| - nearest level)^2, in 16 lanes, the same on every instruction
     * set; importance may be NULL, inverse is positive. Of packed codes, weights with the scale's sign have only the
     * levels up to t->top, and the errors with the negated scales follow in error[candidates + i]. */
    void (*errors_log8)(const float *w, const float *importance, size_t n, const float *inverse, int candidates,
                        const qins_log8_tables *t, float *error);
    /* Rounds a panel of 16 rows, one lane each, with error feedback. Each column (16 floats) in turn gets the code
     * nearest to w + sum over earlier columns i of feedback[column * cols + i] * e_i, where e_i is weight i minus its
     * code's value. The e replace the weights. scale: 16 per group; group: the group of each column. Scales of packed
     * codes may be negative, and signs of codes are relative to those of the scales. */
    void (*feedback_log8)(float *panel, size_t cols, const float *feedback, const float *scale, const uint32_t *group,
                          const qins_log8_tables *t, uint8_t *codes);
    /* Decodes one row from column k on; group_scale: that row's, or NULL */
    void (*decode_log8)(const uint8_t *codes, size_t k, size_t n, float scale, const uint8_t *group_scale,
                        size_t group_size, const float *level, float *out);
    /* Unpacks `cols` packed codes (see packed.h), a whole row or whole blocks of 64, to log8's form. flip: for each 32
     * codes, 0x80 to negate them, or 0 */
    void (*unpack)(const uint8_t *packed, size_t cols, int bits, const uint8_t *flip, uint8_t *codes);
    /* rational: z = sign/(1 + alpha |w|) and back; any bit pattern of |w| between range's lo and hi */
    qins_range (*range_rational)(const float *w, size_t n, qins_range r);
    void (*project)(const float *w, size_t n, float alpha, float *z);
    void (*unproject)(const float *z, size_t n, float alpha, float *w);
    /* Rows of a KV cache, each with its own range: stored = round(first - slope * ln(|w| inverse)), limited to 1..255,
     * and value = sign * e^(first - step * stored), in float32. */
    void (*encode_golden_row)(const float *w, size_t n, float inverse, float slope, float first, uint8_t *stored,
                              int8_t *sign);
    void (*decode_golden_row)(const uint8_t *stored, const int8_t *sign, size_t n, float first, float step, float *out);
    /* Products. Sums depend on the instruction set, but not on how calls group the rows. */
    float least_mu;   /* the smallest mu for which dot_log8 of log8 is exact enough; packed codes may have any */
    size_t word_step; /* columns of activations per scale, see qins_fixed */
    /* Converts n activations, one row of a set. Its steps are `next` words apart, the last one padded with zeros; its
     * scales are QINS_BATCH apart */
    void (*fix_activations)(const float *x, size_t n, size_t step, int16_t *fixed, size_t next, float *scale);
    /* Reorders a row's words in pairs of blocks, for log4: first the even elements of the first halves of both blocks,
     * then their odd ones, then the same of the second halves. NULL: pairs are not faster */
    void (*pair_blocks)(int16_t *fixed, size_t pairs);
    /* out[row][m] = sum over a row of f(codes) * group scale * x[m], with batch values per row and room for an even
     * number of rows. group_scale: NULL, or that of all rows; group_size is then 32 or a multiple of 64. room:
     * QINS_WORD_ROOM bytes, aligned to 64, in which at most QINS_WORD_ROWS rows of codes are decoded once for many rows
     * of activations; or NULL. Packed codes (t->bits < 8) are grouped, their steps are 64, and with more than
     * QINS_BATCH rows they need room */
    void (*dot_log8)(const uint8_t *codes, size_t rows, size_t cols, const uint8_t *group_scale, size_t group_size,
                     const qins_log8_words *t, const qins_fixed *x, void *room, float *out);
    /* out[m] = sum of decoded values * x[m]; sign or sign_bits is NULL. x: batch rows, `stride` apart, padded with
     * zeros to blocks of 64, whose elements are in the order 0, 4, 8, ..., 1, 5, 9, ..., 2, ..., 3, .... ahead:
     * prefetch distance in bytes */
    void (*dot_golden)(const uint8_t *stored, const int8_t *sign, const uint8_t *sign_bits, size_t n, size_t ahead,
                       const qins_golden_factors *t, const float *x, size_t stride, int batch, float *out);
    /* out[m] = sum of w * x[m] */
    void (*dot_f32)(const float *w, size_t n, const float *x, size_t stride, int batch, float *out);
    /* Between the products of a decoder layer, see decoder.c: x = e^(x - most), with x <= most; returns the sum */
    float (*exp_row)(float *x, size_t n, float most);
    /* out = up * silu(gate), or up * gelu(gate) in its tanh form */
    void (*gate_row)(const float *gate, const float *up, size_t n, int gelu, float *out);
    /* By dtype but float64; see qins_rotation. Heads are `next` elements apart in x and y, which may be the same */
    void (*rotate[3])(const void *x, const void *cosine, const void *sine, size_t heads, size_t next, size_t half,
                      void *y);
    /* By dtype of the rows but float64: out[m * next + t] = rows[t] . x[m], n elements. Rows are `stride` elements
     * apart. Rows that are not float32 are widened again for every score_queries of x */
    int score_queries;
    void (*score_rows[3])(const void *rows, size_t count, size_t stride, const float *x, size_t x_stride, int batch,
                          size_t n, float *out, size_t next);
    /* By dtype of the rows but float64: out[m] += sum over rows t of weight[m][t] * rows[t], n elements. Rows are
     * `stride` elements apart, and the weights of consecutive m `next` */
    void (*weigh_rows[3])(const void *rows, size_t count, size_t stride, const float *weight, size_t next, int batch,
                          size_t n, float *out, size_t out_stride);
    /* value[q] of rows of packed codes, of 4 to value_bits bits; NULL: unpack and decode_log8 are as fast */
    int value_bits;
    void (*packed_values)(const uint8_t *packed, size_t rows, size_t cols, int bits, const float *value, float *out);
    /* The same two of rows of log8's codes, one after another; scale: bfloat16, of each row. x and out of weigh_log8
     * are rows of dim elements, at most QINS_HEAD_DIM; weights are overwritten. NULL: decode_log8 is as fast */
    void (*score_log8)(const uint8_t *codes, const uint16_t *scale, size_t count, size_t dim, const qins_log8_words *t,
                       const float *x, int batch, float *out, size_t next);
    void (*weigh_log8)(const uint8_t *codes, const uint16_t *scale, size_t count, size_t dim, const qins_log8_words *t,
                       float *weight, size_t next, int batch, float *out);
    /* exact.h, n <= QINS_WINDOW: entries of the symbols of the first weights, a multiple of 16; returns their number.
     * NULL: no faster than without */
    size_t (*record)(qins_recording *r, const uint16_t *decoded, const uint8_t *codes, const uint16_t *w, size_t n,
                     uint32_t *entry);
    /* exact.h: restores the first weights of a row, a multiple of 16, while the words last; returns their number. NULL:
     * no faster than without */
    size_t (*restore)(qins_restoring *r, const uint16_t *decoded, const uint8_t *codes, size_t n, uint16_t *w);
    const qins_panels *floats, *words, *planes, *halves; /* NULL: floats is the best here */
    const qins_single *single;                           /* or NULL */
    const qins_few *few;                                 /* or NULL */
    /* Transposes a 16 x 16 matrix of 32-bit elements; strides in elements */
    void (*transpose)(const float *src, size_t src_stride, float *dst, size_t dst_stride);
} qins_kernels;

/* dispatch.c ---------------------------------------------------------------------------------- */
#define X(name, guard, features) extern const qins_kernels qins_kernels_##name;
#include "isas.def"
#undef X
size_t qins_isa_count(void);                         /* number of those that run here */
const qins_kernels *qins_isa_at(size_t i);           /* i < qins_isa_count(), best first */
const qins_kernels *qins_isa_find(const char *name); /* NULL: unknown, or does not run here */

/* cpu.c: features that the processor and the operating system both support -------------------- */
enum {
    QINS_CPU_AVX2 = 1 << 0,   /* AVX2, FMA, F16C */
    QINS_CPU_AVX512 = 1 << 1, /* F, BW, DQ, VL */
    QINS_CPU_VBMI = 1 << 2,
    QINS_CPU_VNNI = 1 << 3, /* the 512-bit one */
    QINS_CPU_BF16 = 1 << 4, /* AVX512_BF16 */
    QINS_CPU_AMX = 1 << 5,  /* tiles of 8-bit integers and of bfloat16 */
    QINS_CPU_NEON = 1 << 6
};
unsigned qins_cpu_features(void);

/* threads.c ----------------------------------------------------------------------------------- */
/* Splits [0, items) into at most `threads` contiguous parts of at least `grain` items, and runs task(context, begin,
 * end) on each, on this thread and on pool threads. Any number of threads may call it at once. The result of a task
 * must not depend on where the parts begin and end. */
void qins_parallel(size_t items, size_t grain, int threads, void (*task)(void *, size_t, size_t), void *context);
/* Uses `parallel` (with the signature of libgomp's GOMP_parallel) instead of the pool; NULL: back to the pool. */
typedef void (*qins_fork_join)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
void qins_set_fork_join(qins_fork_join parallel);

/* scratch.c ----------------------------------------------------------------------------------- */
void *qins_scratch_take(size_t bytes); /* 64-byte aligned, uninitialized; NULL: out of memory. Any thread */
void qins_scratch_give(void *memory);

/* tables.c ------------------------------------------------------------------------------------ */
double qins_log(double x); /* x > 0, normal */
double qins_exp(double x);
/* threshold: ascending bit patterns, repeats allowed. */
void qins_lut_build(qins_lut *lut, const int32_t *threshold, int count);
uint32_t qins_lut_count(const qins_lut *lut, int32_t pattern);
/* Levels by m: of log8, or, if packed, of packed codes in log8's form. mu >= 0, finite */
void qins_log8_levels(float mu, int packed, float level[QINS_LEVELS]);
/* For codes of `bits` bits; mu in [0, QINS_MU_MAX] */
void qins_log8_tables_build(qins_log8_tables *t, float mu, int bits);
/* rational's magnitudes by m, and the table that finds the m with the nearest |z|; alpha > 0, 0 < z_min <= z_max <= 1
 */
void qins_rational_levels(float alpha, float z_min, float z_max, float level[QINS_LEVELS]);
void qins_rational_tables_build(qins_log8_tables *t, float alpha, float z_min, float z_max);
void qins_golden_values(float log_min, float log_max, float value[256]);
void qins_golden_tables_build(qins_golden_tables *t, qins_range range);
void qins_log8_words_build(qins_log8_words *t, float mu, int bits);
/* log8_words.c: the words of mu and bits, cached forever. Once the cache is full: built in `own`, or NULL without it */
const qins_log8_words *qins_log8_words_of(float mu, int bits, qins_log8_words *own);
void qins_golden_factors_build(qins_golden_factors *t, float log_min, float log_max);
#define QINS_MU_MAX 65536.0f

/* reader.c, encode.c, encode_log8.c, decode.c: whole matrices ------------------------------------- */
typedef struct {
    const void *data;
    qins_dtype dtype;
    size_t rows, cols;
    ptrdiff_t row_stride, col_stride; /* bytes */
} qins_matrix;

/* The codes of a matrix; only fields of its codec are set. */
typedef struct {
    qins_codec codec;
    size_t rows, cols;
    uint8_t *codes;     /* stored (golden, log9), codes (log8), w_encoded (rational), rows x cols; or packed codes */
    int8_t *sign;       /* golden, rows x cols */
    uint8_t *sign_bits; /* log9, rows x ceil(cols/8) */
    float log_min, log_max;
    float *scale; /* log8, log6, log5, log4: rows */
    float mu;
    uint8_t *group_scale;      /* likewise, when grouped: rows x ceil(cols/group_size) */
    size_t group_size;         /* 0: not grouped */
    float alpha, z_min, z_max; /* rational */
} qins_codes;

/* Number of elements that are NaN or infinite in float32, and the flat index of the first. */
typedef struct {
    size_t count, first;
} qins_nonfinite;
qins_nonfinite qins_find_nonfinite(const qins_kernels *k, const qins_matrix *w);

/* Fills the arrays and scalars of `e`. Returns 0, or 1 if w has a non-finite element (the arrays' contents are then
 * unspecified). For log8, e->mu < 0 requests the search for mu; importance, unless NULL, has a weight >= 0 for each
 * column's squared error. */
int qins_encode(const qins_kernels *k, const qins_matrix *w, const float *importance, int threads, qins_codes *e);

/* n floats: rational's z of w, or (back != 0) w of z. */
void qins_rational(const qins_kernels *k, const float *src, size_t n, float alpha, int back, int threads, float *dst);

/* Decodes rows [row, row + rows) x columns [col, col + cols) into out, with `stride` elements per row. */
void qins_decode(const qins_kernels *k, const qins_codes *e, size_t row, size_t rows, size_t col, size_t cols,
                 int threads, qins_dtype dtype, void *out, size_t stride);

/* Decodes spans of rows for kernels; `table` has golden's values by stored, or the levels of log8 or rational by m. */
typedef struct {
    const qins_kernels *kernels;
    const qins_codes *e;
    QINS_ALIGNED(64) float table[256];
} qins_decoder;
void qins_decoder_init(qins_decoder *d, const qins_kernels *k, const qins_codes *e);
/* Decodes columns [k, k + n) of a row; k is a multiple of 8 for log9. */
void qins_decode_span(const qins_decoder *d, size_t row, size_t k, size_t n, float *out);

/* feedback.c: rounding to log8 with error feedback, given the scales and mu of `e` -------------- */
/* w: dense rows x cols. order[j] is the column rounded j-th, and row j of feedback (cols x cols, dense) belongs to it.
 * Returns 0, or -1 if out of memory. */
int qins_round_with_feedback(const qins_kernels *k, const float *w, const uint32_t *order, const float *feedback,
                             int threads, qins_codes *e);

/* cache.c: keys or values of attention, one range per token and head --------------------------- */
/* Of log8's family, for one mu: the table that finds levels, the levels by m (see qins_log8_levels), and those of
 * packed codes with their signs */
typedef struct {
    qins_log8_tables nearest;
    QINS_ALIGNED(64) float level[QINS_LEVELS];
    QINS_ALIGNED(64) float packed_value[64];
} qins_cache_tables;
void qins_cache_tables_build(qins_cache_tables *t, qins_codec codec, float mu);
enum { QINS_CACHE_GROUP = 32 }; /* elements of packed codes that share a group scale */
/* Token t of head h is row h * room + t, with dim elements. Only fields of its codec are set. */
typedef struct {
    qins_codec codec;                /* golden, log8, log6, log5 or log4 */
    size_t heads, room, dim;         /* dim: for packed codes, a multiple of 8 */
    uint8_t *codes;                  /* stored, codes, or packed codes */
    int8_t *sign;                    /* golden */
    float *range;                    /* golden: log_min and log_max of each row */
    uint16_t *scale;                 /* log8, log6, log5, log4: bfloat16, of each row */
    uint8_t *group_scale;            /* log6, log5, log4: ceil(dim/32) of each row */
    const qins_cache_tables *tables; /* log8, log6, log5, log4 */
} qins_cache;
/* Encodes x (heads x tokens x dim, dense) as tokens [start, start + tokens). Returns 0, or 1 if x has a non-finite
 * element (the contents of those tokens are then unspecified), or -1 if out of memory. */
int qins_cache_encode(const qins_kernels *k, const qins_cache *c, const void *x, qins_dtype dtype, size_t start,
                      size_t tokens, int threads);
/* Decodes tokens [start, start + tokens) to out: heads x tokens x dim, dense. */
void qins_cache_decode(const qins_kernels *k, const qins_cache *c, size_t start, size_t tokens, qins_dtype dtype,
                       void *out, int threads);
/* Elements of a row that share one scale of qins_cache_rows: 32 for packed codes, else all */
size_t qins_cache_span(const qins_cache *c);
/* Decodes rows [row, row + n) to out: n x dim, with dim at most QINS_WINDOW. The values are still to be multiplied by
 * scale: ceil(dim / span) x n, 1 for golden. */
void qins_cache_rows(const qins_kernels *k, const qins_cache *c, size_t row, size_t n, float *out, float *scale);
/* Rows [row, row + n) of log8, log6, log5 or log4 as a matrix, whose scales are written to `scale`. */
qins_codes qins_cache_matrix(const qins_kernels *k, const qins_cache *c, size_t row, size_t n, float *scale);

/* linear.c: y = x W^T straight from the codes -------------------------------------------------- */
/* x is batch x cols, y is batch x rows, both dense; float32, bfloat16, float16 or float64 (computed in float32).
 * Returns 0, or -1 if out of memory for `batch` rows of activations. */
int qins_linear(const qins_kernels *k, const qins_codes *e, const void *x, size_t batch, qins_dtype dtype, void *y,
                int threads);
/* The products of one x, float32, with up to QINS_SET matrices of the same width; in one pass if codec, group_size and
 * way are the same. */
enum { QINS_SET = 3 };
int qins_linear_set(const qins_kernels *k, const qins_codes *const *e, size_t count, const float *x, size_t batch,
                    float *const *y, int threads);
/* panels.c: the same for many rows, in one of the forms of qins_panels, with up to QINS_SET matrices of the same width,
 * codec and group_size. words[i]: for log8 with a group_size that is 32 or a multiple of QINS_DEPTH, else NULL;
 * required for words and planes, unused for floats. */
int qins_linear_panels(const qins_kernels *k, const qins_panels *form, const qins_codes *const *e,
                       const qins_log8_words *const *words, size_t count, const void *x, size_t batch, qins_dtype dtype,
                       void *const *y, int threads);
/* read.c: reads an array with all threads, as fast as this instruction set can. */
void qins_read(const qins_kernels *k, const void *data, size_t bytes, int threads);

/* outliers.c: outlier activations, whose products are computed in float32 -------------------------- */
enum { QINS_OUTLIERS = 32, QINS_COLUMNS = 16 };
/* The outliers of one row of activations. */
typedef struct {
    uint32_t count, col[QINS_OUTLIERS];
    float value[QINS_OUTLIERS];
} qins_outliers;
/* Returns whether the n activations at x have outliers; if so, `rest` (which may be x) is x with zeros in their place.
 */
int qins_take_outliers(const qins_kernels *k, const float *x, size_t n, float *rest, qins_outliers *o);
/* A cache of dequantized weights of some rows, in the most recently used columns. */
typedef struct {
    size_t row, rows, decoded; /* decoded: number of columns so far, including replaced ones */
    uint32_t col[QINS_COLUMNS];
    float weight[QINS_COLUMNS][QINS_WORD_ROWS];
} qins_columns;
/* Begins with rows [row, row + rows), at most QINS_WORD_ROWS. */
void qins_start_columns(qins_columns *c, size_t row, size_t rows);
/* y[i] += product of row row + i of the codes and the outliers. */
void qins_add_outliers(const qins_codes *e, const qins_log8_words *t, const qins_outliers *o, qins_columns *c,
                       float *y);

#endif
