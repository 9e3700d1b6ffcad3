/* Which sources a library is built from, and whether this machine can run it. Compiled for the oldest processor of the
   architecture, so that any build may be opened anywhere and asked. */
#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__arm__)
#include <sys/auxv.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default"), used))

EXPORTED const char nk_sources[] = "nestling sources " NK_SOURCES;

#if defined(NK_NEEDS_AVX2) || defined(NK_NEEDS_AVX512)
/* The register sets that the system saves when it changes threads (XCR0). */
static uint64_t saved() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static int32_t has(uint64_t registers, unsigned wanted) {
  const unsigned fma = 1u << 12, xgetbv = 1u << 27;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (fma | xgetbv)) != (fma | xgetbv)) return 0;
  if ((saved() & registers) != registers) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}
#endif

/* 1 if the processor has every instruction of this build and the system keeps its registers, 0 if not. */
EXPORTED int32_t nk_runs_here(void) {
  const unsigned avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  (void)avx2, (void)f, (void)dq, (void)bw, (void)vl;
#if defined(NK_NEEDS_AVX512)
  return has(0xe6, avx2 | f | dq | bw | vl);
#elif defined(NK_NEEDS_AVX2)
  return has(0x06, avx2);
#elif defined(__arm__)
  const unsigned long neon = 1ul << 12, vfpv4 = 1ul << 16;
  return (getauxval(AT_HWCAP) & (neon | vfpv4)) == (neon | vfpv4);
#else
  return 1;
#endif
}
