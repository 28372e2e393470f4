/* The one place for what differs between compilers. Everything else is C11. */
#ifndef QINS_PORT_H
#define QINS_PORT_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>

#if FLT_EVAL_METHOD != 0
#error "qins needs float arithmetic in float precision (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

/* 64-bit x86 only: 32-bit x86 gets the scalar core, like every processor without an isa_*.c. */
#if defined(__x86_64__) || defined(_M_X64)
#define QINS_X86_64 1
#else
#define QINS_X86_64 0
#endif

/* NEON is part of every AArch64 processor; the float16 conversions used are, too. */
#if defined(__aarch64__) || defined(_M_ARM64)
#define QINS_AARCH64 1
#else
#define QINS_AARCH64 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define QINS_TARGET(features) __attribute__((target(features)))
#define QINS_ALWAYS_INLINE static inline __attribute__((always_inline, unused))
#define QINS_RESTRICT restrict
#define QINS_PREFETCH(p) __builtin_prefetch((p), 0, 3)
#else
#define QINS_TARGET(features)
#define QINS_ALWAYS_INLINE static __forceinline
#define QINS_RESTRICT __restrict
#define QINS_PREFETCH(p) ((void)(p))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define QINS_ALIGNED(n) __declspec(align(n))
#else
#define QINS_ALIGNED(n) _Alignas(n)
#endif

#endif
