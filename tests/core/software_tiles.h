/* AMX tiles emulated in C, for processors that have everything else that isa_amx.c needs: compile all files with
 * -include software_tiles.h. The instructions are specified in Intel's Architecture Instruction Set Extensions
 * reference. */
#ifndef SOFTWARE_TILES_H
#define SOFTWARE_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "port.h"

#if QINS_AMX

/* -- CPUID reports tiles, and the kernel grants them ------------------------------------------------ */

static inline void software_cpuid(unsigned leaf, unsigned sub, unsigned r[4])
{
    qins_cpuid(leaf, sub, r);
    if (leaf == 7 && sub == 0) {
        r[3] |= 1u << 22 | 1u << 24 | 1u << 25;
    }
}
#define qins_cpuid software_cpuid
static inline uint64_t software_xgetbv0(void) { return qins_xgetbv0() | 3u << 17; }
#define qins_xgetbv0 software_xgetbv0
#define syscall(...) 0

/* -- the tiles -------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t palette, zero[15];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_shapes;

typedef struct {
    tile_shapes shape;
    union {
        int8_t i8[16][64];
        int32_t i32[16][16];
        uint16_t bf16[16][32];
        float f32[16][16];
    } tile[8];
} software_tiles;

static _Thread_local software_tiles tiles_;

/* Traps like the instructions, which fault if shapes do not fit or are not configured. */
static inline void tiles_demand(int fits)
{
    if (!fits) {
        __builtin_trap();
    }
}

static inline void tiles_configure(const void *shapes)
{
    memset(&tiles_, 0, sizeof tiles_);
    memcpy(&tiles_.shape, shapes, sizeof tiles_.shape);
    tiles_demand(tiles_.shape.palette == 1);
}

static inline void tile_move(int t, char *memory, size_t stride, int store)
{
    tiles_demand(tiles_.shape.palette == 1);
    if (!store) {
        memset(&tiles_.tile[t], 0, sizeof tiles_.tile[t]);
    }
    for (size_t row = 0; row < tiles_.shape.rows[t]; row++) {
        void *at = memory + row * stride, *here = tiles_.tile[t].i8[row];
        memcpy(store ? at : here, store ? here : at, tiles_.shape.bytes[t]);
    }
}

/* c += a * b; a 32-bit lane of a and b has 4 bytes, those of b signed, or 2 bfloat16. */
enum { SIGNED, UNSIGNED, HALVES_ };
static inline void tile_multiply(int c, int a, int b, int kind)
{
    const tile_shapes *s = &tiles_.shape;
    tiles_demand(s->palette == 1 && s->rows[c] == s->rows[a] && s->bytes[c] == s->bytes[b]);
    tiles_demand(s->bytes[a] / 4 == s->rows[b]);
    for (size_t i = 0; i < s->rows[c]; i++) {
        for (size_t j = 0; j < s->bytes[c] / 4u; j++) {
            for (size_t k = 0; k < s->rows[b]; k++) {
                for (size_t e = 0; kind != HALVES_ && e < 4; e++) {
                    const int8_t left = tiles_.tile[a].i8[i][4 * k + e];
                    const int factor = kind == UNSIGNED ? (uint8_t)left : left;
                    tiles_.tile[c].i32[i][j] += factor * tiles_.tile[b].i8[k][4 * j + e];
                }
                for (size_t e = 0; kind == HALVES_ && e < 2; e++) {
                    uint32_t x = (uint32_t)tiles_.tile[a].bf16[i][2 * k + e] << 16;
                    uint32_t y = (uint32_t)tiles_.tile[b].bf16[k][2 * j + e] << 16;
                    float v, w;
                    memcpy(&v, &x, 4);
                    memcpy(&w, &y, 4);
                    tiles_.tile[c].f32[i][j] += v * w;
                }
            }
        }
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) tiles_configure(shapes)
#define _tile_release() memset(&tiles_, 0, sizeof tiles_)
#define _tile_zero(t) memset(&tiles_.tile[t], 0, sizeof tiles_.tile[t])
#define _tile_loadd(t, from, stride) tile_move(t, (char *)(uintptr_t)(from), stride, 0)
#define _tile_stored(t, to, stride) tile_move(t, (char *)(to), stride, 1)
#define _tile_dpbssd(c, a, b) tile_multiply(c, a, b, SIGNED)
#define _tile_dpbusd(c, a, b) tile_multiply(c, a, b, UNSIGNED)
#define _tile_dpbf16ps(c, a, b) tile_multiply(c, a, b, HALVES_)

#endif
#endif
