#include "between.h"

#include <math.h>
#include <stdatomic.h>

#include "sizes.h"

enum { GRAIN = 8192, PIECE = 512 }; /* elements: of a thread's least work, and converted at a time */

typedef struct {
    const qins_kernels *kernels;
    qins_dtype dtype;
    const char *x, *up; /* up: of gates */
    char *y;
    size_t n, next;
    const float *weight;
    float epsilon;
    int gelu;
    atomic_int failed;
} job;

static size_t grain(size_t n) { return ceil_div(GRAIN, n + 1); }

void qins_norm_row(const qins_kernels *k, const float *x, size_t n, const float *weight, float epsilon, float *out)
{
    float squares;
    k->dot_f32(x, n, x, n, 1, &squares);
    const float factor = 1.0f / sqrtf(squares / (float)n + epsilon);
    for (size_t i = 0; i < n; i++) {
        out[i] = weight[i] * (x[i] * factor);
    }
}

static void norm_some(void *context, size_t begin, size_t end)
{
    job *j = context;
    const size_t size = item_size(j->dtype) * j->n;
    float *room = j->dtype == QINS_F32 ? NULL : qins_scratch_take(j->n * sizeof *room);
    if (j->dtype != QINS_F32 && room == NULL) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (size_t i = begin; i < end; i++) {
        const char *x = j->x + i * size;
        char *y = j->y + i * size;
        if (room == NULL) {
            qins_norm_row(j->kernels, (const float *)(const void *)x, j->n, j->weight, j->epsilon, (float *)(void *)y);
            continue;
        }
        j->kernels->widen[j->dtype](x, j->n, room);
        qins_norm_row(j->kernels, room, j->n, j->weight, j->epsilon, room);
        j->kernels->narrow[j->dtype](room, j->n, y);
    }
    if (room != NULL) {
        qins_scratch_give(room);
    }
}

int qins_norm_rows(const qins_kernels *k, qins_dtype dtype, const void *x, size_t rows, size_t n, const float *weight,
                   float epsilon, void *y, int threads)
{
    job j = {.kernels = k, .dtype = dtype, .x = x, .y = y, .n = n, .weight = weight, .epsilon = epsilon};
    atomic_init(&j.failed, 0);
    qins_parallel(rows, grain(n), threads, norm_some, &j);
    return atomic_load(&j.failed) != 0 ? -1 : 0;
}

static void gate_some(void *context, size_t begin, size_t end)
{
    const job *j = context;
    const size_t size = item_size(j->dtype);
    float gate[PIECE], up[PIECE];
    for (size_t i = begin; i < end; i++) {
        for (size_t at = 0; at < j->n; at += PIECE) {
            const size_t n = least(j->n - at, PIECE);
            j->kernels->widen[j->dtype](j->x + (i * j->next + at) * size, n, gate);
            j->kernels->widen[j->dtype](j->up + (i * j->next + at) * size, n, up);
            j->kernels->gate_row(gate, up, n, j->gelu, gate);
            j->kernels->narrow[j->dtype](gate, n, j->y + (i * j->n + at) * size);
        }
    }
}

void qins_gate_rows(const qins_kernels *k, qins_dtype dtype, const void *gate, const void *up, size_t next, size_t rows,
                    size_t n, int gelu, void *y, int threads)
{
    job j = {.kernels = k, .dtype = dtype, .x = gate, .up = up, .y = y, .n = n, .next = next, .gelu = gelu};
    qins_parallel(rows, grain(n), threads, gate_some, &j);
}

typedef struct {
    const qins_kernels *kernels;
    const qins_rotation *r;
} rotating;

static void rotate_some(void *context, size_t begin, size_t end)
{
    const rotating *p = context;
    const qins_rotation *r = p->r;
    const size_t size = item_size(r->dtype);
    for (size_t i = begin; i < end; i++) {
        const size_t sequence = i / r->tokens, token = i % r->tokens;
        const size_t from = (sequence * r->x_sequence + token * r->x_token) * size;
        const size_t to = (sequence * r->y_sequence + token * r->y_token) * size;
        const size_t angle = (sequence * r->next_rotation + token * 2 * r->half) * size;
        p->kernels->rotate[r->dtype]((const char *)r->x + from, (const char *)r->cosine + angle,
                                     (const char *)r->sine + angle, r->heads, r->next_head, r->half, (char *)r->y + to);
    }
}

void qins_rotate(const qins_kernels *k, const qins_rotation *r, int threads)
{
    rotating p = {k, r};
    qins_parallel(r->sequences * r->tokens, grain(2 * r->heads * r->half), threads, rotate_some, &p);
}
