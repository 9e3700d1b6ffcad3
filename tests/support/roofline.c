/* What this processor can do at most: multiply-adds in registers, and reading memory. Built on the spot by roofline.py. */
#include <stddef.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef float lane __attribute__((vector_size(BYTES)));
#define LANES (BYTES / sizeof(float))

/* Twelve chains: enough for two units of latency 4 to 5, few enough for 16 registers. Each in a variable of its own, since
   an array would live in memory. */
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define CHAINS 12
#define BEGIN(c) lane sum##c = term * (float)c;
#define STEP(c) sum##c = sum##c * factor + term;
#define ADD(c) total += sum##c;

/* `times` rounds of multiply-adds in independent chains; gives the floating-point operations done. */
double peak(long times, float *sink) {
  lane factor, term, total = {0};
  for (int i = 0; i < (int)LANES; i++) {
    factor[i] = sink[0] + 0.999f; /* not known when this is compiled */
    term[i] = sink[0] + 0.001f;
  }
  EACH(BEGIN)
  for (long t = 0; t < times; t++) {
    EACH(STEP)
    __asm__ volatile("");
  }
  EACH(ADD)
  sink[1] = total[0];
  return 2.0 * LANES * CHAINS * (double)times;
}

/* Read `bytes` of `data`, `times` over; gives the bytes read. */
#define ZERO(c) lane sum##c = {0};
#define READ(c) sum##c += at[i + c];
double scan(const float *data, size_t bytes, long times, float *sink) {
  lane total = {0};
  const size_t vectors = bytes / BYTES / CHAINS * CHAINS;
  EACH(ZERO)
  for (long t = 0; t < times; t++) {
    const lane *at = (const lane *)data;
    for (size_t i = 0; i < vectors; i += CHAINS) {
      EACH(READ)
    }
    __asm__ volatile("" ::: "memory");
  }
  EACH(ADD)
  sink[1] = total[0];
  return (double)vectors * BYTES * (double)times;
}
