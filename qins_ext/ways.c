/* Dispatch of products to ways. To change a crossover, edit RULES; to measure it, run benchmarks/crossovers.py. */
#include "packed.h"
#include "ways.h"

#include <stdatomic.h>

const char *const qins_way_names[QINS_WAY_COUNT] = {
#define X(name) #name,
#include "ways.def"
#undef X
};

/* Kinds of codes; bits of a set. */
enum {
    DECODED = 1,         /* rational; log8 or packed, if groups do not fit words or words are not exact enough */
    FACTORED = 2,        /* golden, log9 */
    WORDED = 4,          /* log8 or packed, with per-row scales, or groups of 32 or of a multiple of 64 */
    WORD_BLOCKS = 8,     /* likewise, in groups that need steps of 64 columns instead of the longest */
    PLANED = 16,         /* log8 or packed, with per-row scales, or groups of a multiple of 64 */
    PLANED_128 = 32,     /* log8 only, likewise, of a multiple of 128 */
    FOLDED = 64,         /* log8, in groups of 32 or 64 */
    FOLDED_PACKED = 128, /* packed, likewise */
    SINGLE = 256,        /* PLANED, but log8 only */
    ANY_CODES = DECODED | FACTORED | WORDED
};

static unsigned kinds_of(const qins_kernels *k, const qins_codes *e)
{
    if (log_bits(e->codec) == 0) {
        return e->codec == QINS_rational ? DECODED : FACTORED;
    }
    const size_t group = e->group_size;
    unsigned kinds = group % QINS_DEPTH == 0 ? PLANED : 0;
    kinds |= scale_step(e) > QINS_DEPTH && !is_packed(e->codec) ? PLANED_128 : 0;
    kinds |= !folded(e) ? 0 : is_packed(e->codec) ? FOLDED_PACKED : FOLDED;
    kinds |= group % QINS_DEPTH == 0 && !is_packed(e->codec) ? SINGLE : 0;
    const int exact = is_packed(e->codec) || e->mu >= k->least_mu; /* words of packed codes come from tables */
    if (!exact || (group % QINS_BLOCK != 0 && group != QINS_BLOCK / 2)) {
        return kinds | DECODED;
    }
    return kinds | WORDED | (group % k->word_step == 0 ? 0 : WORD_BLOCKS);
}

typedef struct {
    unsigned codes;
    unsigned dtypes;
    unsigned isas;
    qins_way way;
    size_t from, to; /* rows of activations: fastest from `from` on; `to` is the most that the way supports */
} rule;

#define ANY (~0u)
#define BF16 (1u << QINS_BF16)
#define ISA(name) (1u << QINS_ISA_##name)
#define NEVER SIZE_MAX /* only if forced */
#define ALL SIZE_MAX

/* The last row that applies wins. Ways that an instruction set does not have (see available) are skipped. */
/* clang-format off */
static const rule RULES[] = {
    /* codes       dtypes  isas           way                 from      to         measured on */
    {ANY_CODES,    BF16,   ANY,           QINS_HALF_PANELS,   NEVER,    ALL},
    {ANY_CODES,    ANY,    ANY,           QINS_FLOAT_PANELS,  NEVER,    ALL},
    {ANY_CODES,    ANY,    ANY,           QINS_FLOATS,        1,        ALL},

    {DECODED,      ANY,    ANY,           QINS_FLOAT_PANELS,  9,        ALL},   /* Zen 5, Granite Rapids */
    {DECODED,      BF16,   ANY,           QINS_HALF_PANELS,   9,        ALL},   /* Zen 5, Granite Rapids */

    {FACTORED,     ANY,    ANY,           QINS_FACTORS,       1,        ALL},
    {FACTORED,     ANY,    ~ISA(avx2),    QINS_FLOAT_PANELS,  9,        ALL},   /* Zen 5, Granite Rapids */
    {FACTORED,     ANY,    ISA(avx2),     QINS_FLOAT_PANELS,  25,       ALL},   /* Zen 5 */
    {FACTORED,     BF16,   ANY,           QINS_HALF_PANELS,   9,        ALL},   /* Zen 5, Granite Rapids */

    {WORDED,       ANY,    ANY,           QINS_WORDS,         1,        ALL},
    {WORDED,       ANY,    ISA(scalar),   QINS_FLOAT_PANELS,  9,        ALL},   /* Zen 5 */
    {WORDED,       ANY,    ISA(neon),     QINS_FLOAT_PANELS,  33,       ALL},   /* not measured, only run in qemu */
    {WORDED,       ANY,    ANY,           QINS_WORD_PANELS,   65,       ALL},   /* Zen 4, with AVX2, too */
    {WORD_BLOCKS,  ANY,    ANY,           QINS_WORD_PANELS,   41,       ALL},   /* Zen 4, with AVX2, too */
    {WORDED,       BF16,   ANY,           QINS_HALF_PANELS,   16,       ALL},   /* Zen 5 */

    {SINGLE,       ANY,    ANY,           QINS_BYTES,         1,        1},     /* Granite Rapids */
    {SINGLE,       ANY,    ISA(avx512bf16), QINS_WORDS,       1,        1},     /* Zen 4 */
    {PLANED_128,   ANY,    ANY,           QINS_TILES,         2,        QINS_FEW},     /* Granite Rapids */
    {PLANED,       ANY,    ANY,           QINS_TILES,         4,        QINS_FEW},     /* Granite Rapids */
    {PLANED | FOLDED | FOLDED_PACKED, ANY, ANY, QINS_PLANE_PANELS, QINS_FEW + 1, ALL}, /* Granite Rapids */
    {PLANED,       BF16,   ISA(amx),      QINS_HALF_PANELS,   49,       ALL},   /* Granite Rapids */
    {FOLDED,       ANY,    ANY,           QINS_TILES,         5,        QINS_FEW},     /* Granite Rapids */
    {FOLDED_PACKED, ANY,   ANY,           QINS_TILES,         7,        QINS_FEW},     /* Granite Rapids */
    {FOLDED | FOLDED_PACKED, BF16, ISA(amx), QINS_HALF_PANELS, 73,      ALL},   /* Granite Rapids */
};
/* clang-format on */

const qins_panels *qins_panels_of(const qins_kernels *k, qins_way way)
{
    switch (way) {
    case QINS_FLOAT_PANELS:
        return k->floats;
    case QINS_HALF_PANELS:
        return k->halves;
    case QINS_PLANE_PANELS:
        return k->planes;
    case QINS_WORD_PANELS:
        return k->words;
    default:
        return NULL;
    }
}

static int available(const qins_kernels *k, qins_way way)
{
    switch (way) {
    case QINS_BYTES:
        return k->single != NULL;
    case QINS_TILES:
        return k->few != NULL;
    case QINS_HALF_PANELS:
    case QINS_PLANE_PANELS:
    case QINS_WORD_PANELS:
        return qins_panels_of(k, way) != NULL;
    default:
        return 1;
    }
}

static atomic_int forced = QINS_WAY_COUNT;

void qins_force_way(qins_way way) { atomic_store(&forced, (int)way); }

qins_way qins_choose_way(const qins_kernels *k, const qins_codes *e, size_t batch, qins_dtype dtype)
{
    const unsigned codes = kinds_of(k, e);
    const int want = atomic_load_explicit(&forced, memory_order_relaxed);
    int fastest = -1;
    for (size_t i = sizeof RULES / sizeof *RULES; i-- > 0;) {
        const rule *r = &RULES[i];
        if ((r->codes & codes) == 0 || (r->dtypes & 1u << dtype) == 0 || (r->isas & 1u << k->isa) == 0 ||
            batch > r->to || !available(k, r->way)) {
            continue;
        }
        if ((int)r->way == want) {
            return r->way;
        }
        if (fastest < 0 && batch >= r->from) {
            fastest = (int)r->way;
            if (want == QINS_WAY_COUNT) {
                break;
            }
        }
    }
    return (qins_way)fastest; /* FLOATS supports every product */
}
