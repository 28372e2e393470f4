/* The only file with compiler-specific code. Everything else is C11. */
#ifndef QINS_PORT_H
#define QINS_PORT_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>

/* The digests of the core's tests are of bytes in native order, so no test shows that codes are right on others. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "qins needs a little-endian processor"
#endif

#if FLT_EVAL_METHOD != 0
#error "qins needs float arithmetic in float precision (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

/* 64-bit x86 only: 32-bit x86 uses the scalar core, like every processor without an isa_*.c. */
#if defined(__x86_64__) || defined(_M_X64)
#define QINS_X86_64 1
#else
#define QINS_X86_64 0
#endif

/* Every AArch64 processor has NEON and the float16 conversions used here. */
#if defined(__aarch64__) || defined(_M_ARM64)
#define QINS_AARCH64 1
#else
#define QINS_AARCH64 0
#endif

/* The versions are the first whose AVX512_BF16 intrinsics have vectors that can be cast. Clang 16 is left out, since
 * its VectorCombine pass recurses without end on these kernels. */
#if QINS_X86_64 && ((defined(__clang__) && __clang_major__ >= 9 && __clang_major__ != 16) || \
                    (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10))
#define QINS_AVX512BF16 1
#else
#define QINS_AVX512BF16 0
#endif

/* AMX tiles need the operating system's permission, which is requested here for Linux only. The versions are the first
 * with AMX intrinsics. */
#if QINS_X86_64 && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define QINS_AMX 1
#else
#define QINS_AMX 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define QINS_TARGET(features) __attribute__((target(features)))
#define QINS_ALWAYS_INLINE static inline __attribute__((always_inline, unused))
#define QINS_NOINLINE __attribute__((noinline))
#define QINS_RESTRICT restrict
#define QINS_PREFETCH(p) __builtin_prefetch((p), 0, 3)
#define QINS_PREFETCH_FAR(p) __builtin_prefetch((p), 0, 2) /* into the second-level cache, not the first */
/* A prefetch that stays just before the first use of a vector. Compilers otherwise gather prefetches in one place,
 * where they wait for each other: a loop over memory took 0.91 ms instead of 0.73. */
#if defined(__x86_64__) && (!defined(__clang__) || __clang_major__ >= 13)
#define QINS_PREFETCH_BESIDE(address, vector) \
    __asm__ volatile("prefetcht1 %1" : "+v"(vector) : "m"(*(const char *)(address)))
#elif defined(__x86_64__) /* clang 9 does not take a vector of a function's own target there; 13 does */
#define QINS_PREFETCH_BESIDE(address, vector) QINS_PREFETCH_FAR(address)
#endif
#else
#define QINS_TARGET(features)
#define QINS_ALWAYS_INLINE static __forceinline
#define QINS_NOINLINE __declspec(noinline)
#define QINS_RESTRICT __restrict
#define QINS_PREFETCH(p) ((void)(p))
#define QINS_PREFETCH_FAR(p) ((void)(p))
#define QINS_PREFETCH_BESIDE(address, vector) ((void)(address))
#endif

/* Keeps a vector that a loop accumulates in its register, of the class `constraint`: GCC copies such vectors, stores
 * them, and moves operations until there are not enough registers. */
#if defined(__GNUC__) && !defined(__clang__)
#define QINS_KEEP(constraint, vector) __asm__("" : "+" constraint(vector))
#define QINS_ADD_TO(constraint, sums, more, add) __asm__("vpaddd %1, %0, %0" : "+" constraint(sums) : constraint(more))
#else
#define QINS_KEEP(constraint, vector) ((void)0)
#define QINS_ADD_TO(constraint, sums, more, add) ((sums) = add((sums), (more)))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define QINS_ALIGNED(n) __declspec(align(n))
#else
#define QINS_ALIGNED(n) _Alignas(n)
#endif

/* CPUID, XGETBV of register 0, and the hint for a loop that waits for another thread. */
#if QINS_X86_64 && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
static __inline void qins_cpuid(unsigned leaf, unsigned sub, unsigned r[4])
{
    __cpuidex((int *)r, (int)leaf, (int)sub);
}
static __inline uint64_t qins_xgetbv0(void) { return _xgetbv(0); }
#define QINS_SPIN() _mm_pause()
#elif QINS_X86_64
#include <cpuid.h>
QINS_ALWAYS_INLINE void qins_cpuid(unsigned leaf, unsigned sub, unsigned r[4])
{
    __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
}
QINS_ALWAYS_INLINE uint64_t qins_xgetbv0(void)
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
}
#define QINS_SPIN() __builtin_ia32_pause()
#elif QINS_AARCH64 && (defined(__GNUC__) || defined(__clang__))
#define QINS_SPIN() __asm__ volatile("yield")
#else
#define QINS_SPIN() ((void)0)
#endif

#endif
