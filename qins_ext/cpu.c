/* Detection of CPU features that both the processor and the operating system support. */
#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* syscall() */
#endif
#include <stdatomic.h>

#include "qins.h"

#if QINS_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Processes start without AMX tiles. One request is enough for the whole process; the kernel may refuse. */
static int tiles_granted(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

#if QINS_X86_64

static int has(unsigned reg, int bit) { return (int)((reg >> bit) & 1u); }

static unsigned detect(void)
{
    unsigned one[4], seven[4], top[4];
    qins_cpuid(0, 0, top);
    if (top[0] < 7) {
        return 0;
    }
    qins_cpuid(1, 0, one);
    qins_cpuid(7, 0, seven);
    if (!has(one[2], 27)) { /* OSXSAVE: without it XGETBV is an illegal instruction */
        return 0;
    }
    uint64_t xcr0 = qins_xgetbv0();
    unsigned features = 0;
    int fma = has(one[2], 12), f16c = has(one[2], 29), avx = has(one[2], 28);
    if ((xcr0 & 0x06) == 0x06 && avx && fma && f16c && has(seven[1], 5)) {
        features |= QINS_CPU_AVX2;
    }
    /* bits 5 to 7 of XCR0: opmask registers, upper halves of ZMM0-15, ZMM16-31 */
    if ((xcr0 & 0xe6) == 0xe6 && has(one[2], 23) && has(seven[1], 16) && has(seven[1], 17) && has(seven[1], 30) &&
        has(seven[1], 31)) {
        features |= QINS_CPU_AVX512;
        features |= has(seven[2], 1) ? QINS_CPU_VBMI : 0u;
        features |= has(seven[2], 11) ? QINS_CPU_VNNI : 0u;
        if (seven[0] >= 1) {
            unsigned more[4];
            qins_cpuid(7, 1, more);
            features |= has(more[0], 5) ? QINS_CPU_BF16 : 0u;
        }
    }
#if QINS_AMX
    /* AMX-BF16, AMX-TILE and AMX-INT8; bits 17 and 18 of XCR0: tile configuration and data */
    if (features & QINS_CPU_BF16 && has(seven[3], 22) && has(seven[3], 24) && has(seven[3], 25) &&
        (xcr0 >> 17 & 3) == 3 && tiles_granted()) {
        features |= QINS_CPU_AMX;
    }
#endif
    return features;
}

#elif QINS_AARCH64

/* Advanced SIMD is mandatory in the AArch64 application profile. */
static unsigned detect(void) { return QINS_CPU_NEON; }

#else

static unsigned detect(void) { return 0; }

#endif

unsigned qins_cpu_features(void)
{
    /* Detected once: on virtual machines CPUID traps to the hypervisor, which takes tens of microseconds. */
    static atomic_uint known;
    const unsigned asked = 1u << 31;
    unsigned features = atomic_load(&known);
    if (features == 0) {
        features = detect() | asked;
        atomic_store(&known, features);
    }
    return features & ~asked;
}
