/* The contract of the core: formats, units, shapes, aliasing.
 *
 * Matrices are rows x cols, row-major, where a row is an output feature of a linear layer. All sizes
 * are in elements unless a name says bytes. Pointers may be unaligned and none is read or written
 * outside its array. Outputs may not overlap inputs. Nothing here allocates, raises or fails:
 * callers (module*.c) have checked every argument.
 *
 * Formats. value() is what a code decodes to, in float32, on every platform the same bit for bit.
 *   golden  stored 1..255, sign -1 or +1, scalars log_min, log_max:
 *           value = sign * exp(log_min + (255 - stored)/254 * (log_max - log_min))
 *   log9    the same stored, with sign_bits: bit k%8 of byte k/8 of a row is set where negative
 *   log8    code = sign<<7 | m; value = (-1)^sign * S * f(m), f(m) = ((1+mu)^(m/127) - 1)/mu;
 *           S = scale[row], or scale[row] * ((group_scale[row, k/group_size] + 1)/256) when grouped
 *   rational code = sign<<7 | m; |z| = z_max - m/127 * (z_max - z_min);
 *           value = (-1)^sign * (1 - |z|)/(alpha |z|)
 */
#ifndef QINS_H
#define QINS_H

#include "port.h"

enum {
    QINS_LANES = 16,      /* every kernel works on 16 elements at a time, whatever the register width */
    QINS_WINDOW = 4096,   /* elements of the float32 scratch through which other dtypes pass; a multiple of 16 */
    QINS_LEVELS = 128,    /* magnitudes of log8 */
    QINS_CANDIDATES = 8,  /* most scales that one search compares */
    QINS_LUT_CELLS = 4096 /* enough for every table built by tables.c, see qins_lut_build */
};

typedef enum { QINS_F32, QINS_F16, QINS_BF16, QINS_F64 } qins_dtype;

typedef enum {
#define X(name) QINS_##name,
#include "codecs.def"
#undef X
    QINS_CODEC_COUNT
} qins_codec;

/* Counts how many of an ascending list of float thresholds are <= a magnitude, exactly, with one
 * lookup: the bit patterns of non-negative floats ascend with their values, so the pattern's high
 * bits pick a cell, and a cell is so small that at most one threshold lies past its first float.
 *   pattern p >= 0;  i = clamp((p - base) >> shift, 0, last);  c = cell[i]
 *   count = (c >> 24) + (((p - base) & mask) >= (c & 0xffffff))                                      */
typedef struct {
    int32_t base, shift, mask, last;
    uint32_t cell[QINS_LUT_CELLS];
} qins_lut;

/* What turns log8 magnitudes into indices and back, for one mu. */
typedef struct {
    float mu;
    QINS_ALIGNED(64) float level[QINS_LEVELS]; /* f(m) */
    qins_lut lut;                              /* counts midpoints of neighboring levels: the nearest m */
} qins_log8_tables;

/* What turns golden magnitudes into `stored` and back, for one (log_min, log_max). */
typedef struct {
    float log_min, log_max;
    QINS_ALIGNED(64) float value[256]; /* value[stored]; value[0] repeats value[1] */
    qins_lut lut;                      /* stored = 255 - count */
    int constant;                      /* no range to speak of: every stored is 128 */
} qins_golden_tables;

/* The levels of one mu as 16-bit fixed point, for products. Kernels use the form that suits them:
 *   word[c] = f(c & 127) * QINS_WORD_MAX, rounded so that the low byte is 0 only for 0; negated where c >= 128
 *
 *   256 * plane_high[m] + plane_low[m] = f(m) * QINS_PLANE_MAX = plane[m], rounded; both parts can be negated in 8 bits
 *
 *   f(16h + l) = (((a[h] * b[l] + 2^14) >> 15) - c) * factor_unit, of words up to QINS_WORD_MAX, where a[h] with
 *   h = code >> 4 carries the sign; exact enough only for mu >= QINS_FACTORS_MU
 */
typedef struct {
    float mu;
    QINS_ALIGNED(64) int16_t word[256];
    QINS_ALIGNED(64) uint8_t word_low[256];
    QINS_ALIGNED(64) uint8_t word_high[256];
    QINS_ALIGNED(64) float plane[QINS_LEVELS]; /* not rounded */
    QINS_ALIGNED(64) int8_t plane_high[QINS_LEVELS];
    QINS_ALIGNED(64) int8_t plane_low[QINS_LEVELS];
    QINS_ALIGNED(32) int16_t a[16];
    QINS_ALIGNED(32) int16_t b[16];
    int16_t c;
    float multiplier[256];        /* (group_scale + 1)/256 */
    float word_unit, factor_unit; /* what 1 stands for, in levels */
    void *room;                   /* whoever allocated it keeps what is to be freed here */
} qins_log8_words;
#define QINS_FACTORS_MU 0.75f /* relative error of a product about 1e-4 there and less above, 1.6e-4 at 0.5 */

/* golden's value(stored) = high[stored >> 4] * low[stored & 15]
 *                      = eighth[0][stored & 7] * eighth[1][stored >> 3 & 7] * eighth[2][stored >> 6],
 * to a few units in the last place; eighth[2][4 + i] = -eighth[2][i]. */
typedef struct {
    QINS_ALIGNED(64) float high[16];
    QINS_ALIGNED(64) float low[16];
    QINS_ALIGNED(32) float eighth[3][8];
} qins_golden_factors;

/* How far ahead a streaming loop asks for memory, into the second cache. Measured: of one distance for each line, 5 to
 * 7 KiB are the best, and requests for the first cache only get in their way. */
enum { QINS_AHEAD = 6144 }; /* bytes */

/* The same in loops that read only `cols` of `row` bytes before they go on to the next row: a multiple of rows. */
static inline size_t qins_rows_ahead(size_t cols, size_t row)
{
    return cols < row && cols > 0 ? (QINS_AHEAD + cols - 1) / cols * row : QINS_AHEAD;
}

enum {
    QINS_BLOCK = 64, /* codes that a kernel takes at once */
    QINS_BATCH = 8,  /* most rows of activations that a kernel takes at once */
    /* of codes that are decoded once for many rows of activations, into words of 2 bytes */
    QINS_WORD_ROWS = 64,
    QINS_WORD_COLS = 1024,
    QINS_WORD_ROOM = 2 * QINS_WORD_ROWS * QINS_WORD_COLS,
    /* Largest words of activations and of weights: 8 products of them, a step's sums in a lane, stay below 2^31. Where
     * one of a step's activations is far larger than the others, these lose as much as the words of weights do. */
    QINS_X_MAX = 23170,
    QINS_WORD_MAX = 11585
};

/* Rows of activations in fixed point for dot_log8: sets of up to QINS_BATCH rows, one after the other. A set goes step
 * by step, of each row `step` words: blocks of 64, in the order that the kernel reads. */
typedef struct {
    const int16_t *x;
    const float *scale; /* of a set QINS_BATCH for each step */
    size_t steps;       /* a step: the kernel's word_step columns, or 64 where groups are no multiple of these */
    int batch;          /* rows of all sets */
} qins_fixed;

/* Memory that a kernel asks for on its way, line by line: `lines` of each piece, pieces `jump` bytes from the end of
 * one to the beginning of the next. Prefetching never faults, so pieces may lie anywhere. */
typedef struct {
    uintptr_t next;
    size_t lines, left, jump; /* left: of this piece */
    uintptr_t other;          /* as many lines are asked for so many bytes further on; 0: are not */
} qins_fetch;

/* Products with many rows of activations. They are cut into panels of 16 rows, a lane each, and a block of
 * weights is decoded once for all panels, in one of these forms:
 *   floats  columns of a panel one after the other, 16 float32 each; weights row by row
 *   planes  bytes of 16-bit words in tiles of 16 x 64: high ones, low ones. Weights are words of log8
 *           (plane_high, plane_low); activations are words that share a scale over `step` columns
 *   halves  bfloat16 in tiles of 16 x 32; the other way round, a row of weights to a lane
 * In a tile, the left factor lies row by row; of the right one the 4 (planes) or 2 (halves) columns that one 32-bit
 * lane multiplies, then the 16 lanes. Columns are padded with zeros to a multiple of QINS_DEPTH. */
enum { QINS_PANEL = 16, QINS_DEPTH = 64, QINS_PLANE_MAX = 127 * 256 + 127 };

/* One product of some weights and panels. */
typedef struct {
    const void *w, *x; /* prepared weights; the first panel, or the first row of activations as they came (whole) */
    size_t next_x;     /* bytes from a panel to the next */
    int panels;
    size_t cols;
    const float *x_scale, *w_scale; /* planes: 16 and `rows` for each `step` columns */
    size_t step;
    qins_fetch *fetch; /* NULL, or a line for each 64 of these weights */
    float *c;          /* sums; those of panels `next_c` floats apart */
    size_t next_c;
    /* whole: rows that are there; whether c has no sums yet; where sums become y (which is NULL before the last
     * columns), its rows next_y bytes apart */
    size_t x_rows, w_rows;
    int first;
    char *y;
    size_t next_y;
} qins_panel_product;

typedef struct {
    int rows;         /* of weights that one multiply() takes */
    int panels;       /* that it takes at most */
    qins_dtype packs; /* what pack() takes: QINS_F32 or QINS_BF16 */
    size_t item;      /* bytes of an activation, and of a weight */
    size_t depth;     /* most columns of one multiply(); prepared weights have room for as many */
    size_t block;     /* rows of weights that are prepared at a time; a multiple of `rows` and of 16 */
    /* Around a thread's calls of multiply(); may be NULL. */
    void (*begin)(void);
    void (*end)(void);
    /* At most 16 rows of activations, `stride` apart; scale (planes): 16 for each `step` columns */
    void (*pack)(const void *x, size_t stride, size_t rows, size_t cols, size_t step, void *packed, float *scale);
    /* One row of weights into row `row` of `prepared`: from codes of log8, or from float32 values if t is NULL
     * (halves). factor, one for each `step` columns, makes halves of words. NULL: multiply() takes float32 values. */
    void (*prepare)(const void *w, size_t cols, const qins_log8_words *t, const float *factor, size_t step, size_t row,
                    void *prepared);
    /* Where weights are the right factor: makes it of so many prepared rows, from the first; else NULL. */
    void (*turn)(void *prepared, size_t rows, size_t cols);
    /* c[panel][row][lane] += sums of products, or with turn c[panel][lane][row], next_c / 16 rows apart; planes: times
     * x_scale[column / step][lane] * w_scale[column / step][row]. */
    void (*multiply)(const qins_panel_product *p);
    /* Whether multiply() takes bfloat16 rows of activations as they are, next_x / 16 bytes apart, where their columns
     * are a multiple of QINS_DEPTH (pack() makes others so), begins sums and ends them in y. */
    int whole;
} qins_panels;

/* Products of log8 with one row of activations: the words of the planes, but the low bytes of weights are 0 to 255, and
 * activations take over the weights' signs. */
typedef struct {
    /* packed: for each 64 columns 64 high bytes and 64 low ones, columns padded with zeros to a multiple of `step`;
     * scale: one for each `step` columns */
    void (*pack)(const float *x, size_t cols, size_t step, void *packed, float *scale);
    /* out[row] = sum over a row of f(codes) * group scale * x. group_scale: NULL, or that of all rows, for a group_size
     * that is a multiple of step, which is 64 or 128 */
    void (*multiply)(const uint8_t *codes, size_t rows, size_t cols, const uint8_t *group_scale, size_t group_size,
                     const qins_log8_words *t, const void *packed, const float *x_scale, size_t step, float *out);
} qins_single;

/* Products of log8 with some rows of activations, 16 rows of codes at a time: bytes as in planes, but weights are
 * decoded just ahead of their products, and a panel holds 8 rows of activations, the high and the low bytes of each in
 * two neighboring lanes. Fewer than 5 rows take 4 or 8 lanes. */
enum { QINS_FEW = 128, QINS_FEW_ROWS = 8 }; /* most rows of activations, and of a panel */

static inline size_t qins_few_panels(size_t batch) { return (batch + QINS_FEW_ROWS - 1) / QINS_FEW_ROWS; }
static inline size_t qins_few_lanes(size_t batch) { return batch > 4 ? 16 : batch > 2 ? 8 : 4; }

typedef struct {
    /* Around a thread's calls of multiply(). */
    void (*begin)(int batch);
    void (*end)(void);
    /* Columns of all rows of activations, from a multiple of `step` on. packed: panels x lanes bytes for each column,
     * which are padded with zeros to a multiple of QINS_DEPTH; scale: panels x 16 for each `step` columns */
    void (*pack)(const float *x, size_t stride, int batch, size_t cols, size_t step, void *packed, float *scale);
    /* out[m][row] of 16 rows of codes, of which `rows` are there; scale: 16. group_scale and group_size as in dot_log8,
     * group_size a multiple of step, which is 64 or 128. next: codes to ask for on the way, as many as these. */
    void (*multiply)(const uint8_t *codes, size_t rows, size_t cols, const float *scale, const uint8_t *group_scale,
                     size_t group_size, const qins_log8_words *t, const void *packed, const float *x_scale, size_t step,
                     int batch, const uint8_t *next, float out[QINS_FEW][QINS_PANEL]);
} qins_few;

typedef struct {
    int32_t lo, hi; /* bit patterns of the smallest and largest |w| above 1e-8f; lo > hi when there is none.
                       hi >= 0x7f800000 says that a NaN or an infinity is among them */
} qins_range;

enum {
#define X(name, guard, features) QINS_ISA_##name,
#include "isas.def"
#undef X
};

/* One instruction set. Elements are contiguous; n may be any size, 0 included. */
typedef struct {
    const char *name;
    unsigned isa; /* QINS_ISA_<name> */
    /* Conversions from and to float32, round to nearest even, overflow to infinity. */
    void (*widen[4])(const void *src, size_t n, float *dst);  /* by qins_dtype */
    void (*narrow[4])(const float *src, size_t n, void *dst); /* by qins_dtype */
    int32_t (*absmax)(const float *w, size_t n);              /* largest bit pattern of |w|; 0 for n = 0 */
    /* Only reads: what benchmarks compare the other kernels with. Returns something of no meaning. */
    int32_t (*read)(const void *data, size_t bytes);
    /* golden and log9 */
    qins_range (*range_golden)(const float *w, size_t n, qins_range r);
    void (*encode_golden)(const float *w, size_t n, const qins_golden_tables *t, uint8_t *stored, int8_t *sign);
    void (*decode_golden)(const uint8_t *stored, const int8_t *sign, size_t n, const float *value, float *out);
    /* sign_bits of n elements from a byte boundary; unused bits of the last byte are 0 */
    void (*encode_log9)(const float *w, size_t n, const qins_golden_tables *t, uint8_t *stored, uint8_t *sign_bits);
    void (*decode_log9)(const uint8_t *stored, const uint8_t *sign_bits, size_t n, const float *value, float *out);
    /* log8 */
    void (*encode_log8)(const float *w, size_t n, float scale, const qins_log8_tables *t, uint8_t *codes);
    /* error[i] = sum of importance * (|w| inverse[i] - nearest level)^2, in 16 lanes, the same on every instruction
     * set; importance may be NULL */
    void (*errors_log8)(const float *w, const float *importance, size_t n, const float *inverse, int candidates,
                        const qins_log8_tables *t, float *error);
    /* Rounds with error feedback in a panel of 16 rows, a lane each: columns, 16 floats each, get in turn the code
     * nearest to w + sum over earlier columns i of feedback[column * cols + i] * e_i, where e_i is the weight i minus
     * its code's value, and e replaces the weights. scale: 16 for each group; group: of each column. */
    void (*feedback_log8)(float *panel, size_t cols, const float *feedback, const float *scale, const uint32_t *group,
                          const qins_log8_tables *t, uint8_t *codes);
    /* one row from column k on; group_scale is that row's, or NULL */
    void (*decode_log8)(const uint8_t *codes, size_t k, size_t n, float scale, const uint8_t *group_scale,
                        size_t group_size, const float *level, float *out);
    /* rational. z = sign/(1 + alpha |w|) and back; every bit pattern of |w| between range's lo and hi */
    qins_range (*range_rational)(const float *w, size_t n, qins_range r);
    void (*project)(const float *w, size_t n, float alpha, float *z);
    void (*unproject)(const float *z, size_t n, float alpha, float *w);
    /* Rows of a KV cache, each with its own range: stored = round(first - slope * ln(|w| inverse)) within 1 and 255,
     * and sign * e^(first - step * stored), in float32. */
    void (*encode_golden_row)(const float *w, size_t n, float inverse, float slope, float first, uint8_t *stored,
                              int8_t *sign);
    void (*decode_golden_row)(const uint8_t *stored, const int8_t *sign, size_t n, float first, float step, float *out);
    /* Products. Sums depend on the instruction set, but not on how rows are grouped into calls. */
    float least_mu;   /* dot_log8 is exact enough from this mu on */
    size_t word_step; /* columns of activations that share a scale, see qins_fixed */
    /* n activations, a row of a set: `next` words from one of its steps to the next, the last padded with zeros; its
     * scales are QINS_BATCH apart */
    void (*fix_activations)(const float *x, size_t n, size_t step, int16_t *fixed, size_t next, float *scale);
    /* out[row][m] = sum over a row of f(codes) * group scale * x[m], batch to a row, with room for an even number of
     * rows. group_scale: NULL, or that of all rows, for a group_size of 32 or a multiple of 64. room: QINS_WORD_ROOM
     * bytes, aligned to 64, for at most QINS_WORD_ROWS rows of codes, so that many rows of activations find them
     * decoded; or NULL */
    void (*dot_log8)(const uint8_t *codes, size_t rows, size_t cols, const uint8_t *group_scale, size_t group_size,
                     const qins_log8_words *t, const qins_fixed *x, void *room, float *out);
    /* out[m] = sum of decoded values * x[m]; sign or sign_bits is NULL. x: batch rows, `stride` apart, padded with
     * zeros to blocks of 64: elements 0, 4, 8 and so on of a block, then 1, 5, 9, then 2, then 3. ahead: bytes to what
     * is asked for */
    void (*dot_golden)(const uint8_t *stored, const int8_t *sign, const uint8_t *sign_bits, size_t n, size_t ahead,
                       const qins_golden_factors *t, const float *x, size_t stride, int batch, float *out);
    /* out[m] = sum of w * x[m] */
    void (*dot_f32)(const float *w, size_t n, const float *x, size_t stride, int batch, float *out);
    /* Between the products of a decoder layer, see decoder.c. x = e^(x - most), where x <= most; returns their sum. */
    float (*exp_row)(float *x, size_t n, float most);
    /* out = up * silu(gate), or of gelu's tanh form */
    void (*gate_row)(const float *gate, const float *up, size_t n, int gelu, float *out);
    /* out[m] += sum over rows t of weight[m][t] * rows[t], n elements; rows `stride` apart, weights of an m `next` */
    void (*weigh_rows)(const float *rows, size_t count, size_t stride, const float *weight, size_t next, int batch,
                       size_t n, float *out, size_t out_stride);
    const qins_panels *floats, *planes, *halves; /* NULL: this instruction set has nothing better than floats */
    const qins_single *single;                   /* or NULL */
    const qins_few *few;                         /* or NULL */
    /* A 16 x 16 matrix of 32-bit elements; strides in elements */
    void (*transpose)(const float *src, size_t src_stride, float *dst, size_t dst_stride);
} qins_kernels;

/* dispatch.c ---------------------------------------------------------------------------------- */
#define X(name, guard, features) extern const qins_kernels qins_kernels_##name;
#include "isas.def"
#undef X
size_t qins_isa_count(void);                         /* those that run here */
const qins_kernels *qins_isa_at(size_t i);           /* i < qins_isa_count(), best first */
const qins_kernels *qins_isa_find(const char *name); /* NULL: unknown, or does not run here */

/* cpu.c: what the processor and the operating system both allow ------------------------------- */
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
/* Splits [0, items) into at most `threads` contiguous parts of at least `grain` items and runs
 * task(context, begin, end) on each, on this thread and on pool threads. Any number of threads may
 * call at once. What a task computes must not depend on where the parts begin and end. */
void qins_parallel(size_t items, size_t grain, int threads, void (*task)(void *, size_t, size_t), void *context);
/* Uses `parallel` (the signature of libgomp's GOMP_parallel) in place of the pool; NULL: the pool again. */
typedef void (*qins_fork_join)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
void qins_set_fork_join(qins_fork_join parallel);

/* scratch.c ----------------------------------------------------------------------------------- */
void *qins_scratch_take(size_t bytes); /* 64-byte aligned, of any content; NULL: no memory. From any thread */
void qins_scratch_give(void *memory);

/* tables.c ------------------------------------------------------------------------------------ */
double qins_log(double x); /* x > 0, normal */
double qins_exp(double x);
/* Ascending bit patterns of thresholds, repeats allowed. */
void qins_lut_build(qins_lut *lut, const int32_t *threshold, int count);
uint32_t qins_lut_count(const qins_lut *lut, int32_t pattern);
void qins_log8_levels(float mu, float level[QINS_LEVELS]);  /* mu >= 0, finite */
void qins_log8_tables_build(qins_log8_tables *t, float mu); /* mu in [0, QINS_MU_MAX] */
/* rational's magnitudes by m, and the table that finds m, by nearest |z|; alpha > 0, 0 < z_min <= z_max <= 1 */
void qins_rational_levels(float alpha, float z_min, float z_max, float level[QINS_LEVELS]);
void qins_rational_tables_build(qins_log8_tables *t, float alpha, float z_min, float z_max);
void qins_golden_values(float log_min, float log_max, float value[256]);
void qins_golden_tables_build(qins_golden_tables *t, qins_range range);
void qins_log8_words_build(qins_log8_words *t, float mu);
/* log8_words.c: those of mu, kept for good, or built in `own` where many have been asked for */
const qins_log8_words *qins_log8_words_of(float mu, qins_log8_words *own);
void qins_golden_factors_build(qins_golden_factors *t, float log_min, float log_max);
#define QINS_MU_MAX 65536.0f

/* reader.c, encode.c, encode_log8.c, decode.c: whole matrices ------------------------------------- */
typedef struct {
    const void *data;
    qins_dtype dtype;
    size_t rows, cols;
    ptrdiff_t row_stride, col_stride; /* bytes */
} qins_matrix;

/* The codes of a matrix; only the fields of its codec are set. */
typedef struct {
    qins_codec codec;
    size_t rows, cols;
    uint8_t *codes;     /* stored (golden, log9), codes (log8) or w_encoded (rational), rows x cols */
    int8_t *sign;       /* golden, rows x cols */
    uint8_t *sign_bits; /* log9, rows x ceil(cols/8) */
    float log_min, log_max;
    float *scale; /* log8, rows */
    float mu;
    uint8_t *group_scale;      /* log8 when grouped, rows x ceil(cols/group_size) */
    size_t group_size;         /* 0: not grouped */
    float alpha, z_min, z_max; /* rational */
} qins_codes;

/* How many elements are NaN or infinite in float32, and the flat index of the first. */
typedef struct {
    size_t count, first;
} qins_nonfinite;
qins_nonfinite qins_find_nonfinite(const qins_kernels *k, const qins_matrix *w);

/* Fills the arrays and scalars of `e`. Returns 0, or 1 if w has a non-finite element (then the
 * arrays' contents are unspecified). For log8, e->mu < 0 asks for the search, and importance, if it is not NULL,
 * has a weight >= 0 of the squared error for each column. */
int qins_encode(const qins_kernels *k, const qins_matrix *w, const float *importance, int threads, qins_codes *e);

/* n floats: rational's z of w, or (back != 0) w of z. */
void qins_rational(const qins_kernels *k, const float *src, size_t n, float alpha, int back, int threads, float *dst);

/* Decodes rows [row, row + rows) x columns [col, col + cols) into out, `stride` elements a row. */
void qins_decode(const qins_kernels *k, const qins_codes *e, size_t row, size_t rows, size_t col, size_t cols,
                 int threads, qins_dtype dtype, void *out, size_t stride);

/* Decodes spans of rows, as kernels need them; `table` has golden's values by stored, or the
 * levels of log8 or rational by m. */
typedef struct {
    const qins_kernels *kernels;
    const qins_codes *e;
    QINS_ALIGNED(64) float table[256];
} qins_decoder;
void qins_decoder_init(qins_decoder *d, const qins_kernels *k, const qins_codes *e);
/* Columns [k, k + n) of a row; k is a multiple of 8 for log9. */
void qins_decode_span(const qins_decoder *d, size_t row, size_t k, size_t n, float *out);

/* feedback.c: log8's codes, rounded with error feedback, under the scales and mu that `e` has ----- */
/* w: dense rows x cols. Columns are rounded in the order given (order[j] is the j-th), row j of feedback (cols x cols,
 * dense) belongs to the j-th. Returns 0, or -1 without memory. */
int qins_round_with_feedback(const qins_kernels *k, const float *w, const uint32_t *order, const float *feedback,
                             int threads, qins_codes *e);

/* cache.c: keys or values of attention, a range for each token and head ------------------------ */
/* Token t of head h is row h * room + t, of dim elements. Only the fields of its codec are set. */
typedef struct {
    qins_codec codec; /* golden or log8 */
    size_t heads, room, dim;
    uint8_t *codes;                 /* stored, or codes */
    int8_t *sign;                   /* golden */
    float *range;                   /* golden: log_min and log_max of each row */
    uint16_t *scale;                /* log8: bfloat16, of each row */
    const qins_log8_tables *tables; /* log8 */
} qins_cache;
/* x: heads x tokens x dim, dense, to tokens [start, start + tokens). Returns 0, or 1 if x has a non-finite element
 * (then those tokens' contents are unspecified), or -1 without memory. */
int qins_cache_encode(const qins_kernels *k, const qins_cache *c, const void *x, qins_dtype dtype, size_t start,
                      size_t tokens, int threads);
/* Tokens [start, start + tokens) to out: heads x tokens x dim, dense. */
void qins_cache_decode(const qins_kernels *k, const qins_cache *c, size_t start, size_t tokens, qins_dtype dtype,
                       void *out, int threads);

/* linear.c: y = x W^T straight from the codes -------------------------------------------------- */
/* x is batch x cols, y is batch x rows, both dense; float32, bfloat16, float16 or float64 (computed in
 * float32). Returns 0, or -1 if memory for `batch` rows of activations cannot be had. */
int qins_linear(const qins_kernels *k, const qins_codes *e, const void *x, size_t batch, qins_dtype dtype, void *y,
                int threads);
/* The same x, float32, with up to QINS_SET matrices of as many columns, in one go where their codes are alike. */
enum { QINS_SET = 3 };
int qins_linear_set(const qins_kernels *k, const qins_codes *const *e, size_t count, const float *x, size_t batch,
                    float *const *y, int threads);
/* panels.c: the same for many rows, in one of the forms of qins_panels. words: for log8 whose group_size
 * is a multiple of QINS_DEPTH, else NULL; must be there for planes, is not used for floats. */
int qins_linear_panels(const qins_kernels *k, const qins_panels *form, const qins_codes *e,
                       const qins_log8_words *words, const void *x, size_t batch, qins_dtype dtype, void *y,
                       int threads);
/* read.c: reads an array with all threads, as fast as this instruction set does. */
void qins_read(const qins_kernels *k, const void *data, size_t bytes, int threads);

/* outliers.c: activations that products of log8 leave to float32 ------------------------------------ */
enum { QINS_OUTLIERS = 32, QINS_COLUMNS = 16 };
/* Those of one row of activations. */
typedef struct {
    uint32_t count, col[QINS_OUTLIERS];
    float value[QINS_OUTLIERS];
} qins_outliers;
/* Whether the n activations at x have some; then `rest` (which may be x) is x with zeros in their place. */
int qins_take_outliers(const qins_kernels *k, const float *x, size_t n, float *rest, qins_outliers *o);
/* Weights of some rows of codes in the columns that were asked for last. */
typedef struct {
    size_t row, rows, decoded; /* decoded: columns, those that were replaced included */
    uint32_t col[QINS_COLUMNS];
    float weight[QINS_COLUMNS][QINS_WORD_ROWS];
} qins_columns;
/* Those of rows [row, row + rows), at most QINS_WORD_ROWS. */
void qins_start_columns(qins_columns *c, size_t row, size_t rows);
/* y[i] += product of row i of the columns' rows of codes and the outliers. */
void qins_add_outliers(const qins_codes *e, const qins_log8_words *t, const qins_outliers *o, qins_columns *c,
                       float *y);

#endif
