/* Vectors by the compiler's extensions: one source for AVX-512, AVX2, SSE2 and NEON. */
#ifndef NESTLING_VECTORS_H
#define NESTLING_VECTORS_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

#if defined(__aarch64__)
#define ARM64 1
#else
#define ARM64 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))

namespace nk {

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));
#if LANES == 16
typedef v16 vec;
#elif LANES == 8
typedef v8 vec;
#else
typedef v4 vec;
#endif

/* The widest vector that is not wider than W floats. */
template <int W> struct Vector {
  typedef vec type;
};
#if LANES > 4
template <> struct Vector<4> {
  typedef v4 type;
};
#endif
#if LANES > 8
template <> struct Vector<8> {
  typedef v8 type;
};
#endif

/* The compiler takes p as it is: an address in one register, not a sum of the parts it was made of. */
template <class T> INLINE T *pinned(T *p) {
  __asm__("" : "+r"(p));
  return p;
}

/* A template's argument loses the attributes above, so they are said once more. */
template <class V> struct Anywhere {
  typedef V type __attribute__((aligned(4), may_alias));
};
template <class V> INLINE V load(const float *p) { return *(const typename Anywhere<V>::type *)p; }
template <class V> INLINE void store(float *p, V v) { *(typename Anywhere<V>::type *)p = v; }

INLINE v4 fold(v4 a) { return a; }
INLINE v4 fold(v8 a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7); }
#if LANES == 16
INLINE v4 fold(v16 a) {
  v8 low = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7);
  return fold(low + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

/* The sums of four vectors, side by side. */
INLINE v4 sums(v4 a, v4 b, v4 c, v4 d) {
#if defined(__aarch64__)
  return (v4)vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b), vpaddq_f32((float32x4_t)c, (float32x4_t)d));
#else
  v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}
INLINE float sum(v4 a) { return (a[0] + a[2]) + (a[1] + a[3]); }

/* The panels of a batch. */
struct Panels {
  int32_t sixteens, eight, four;
  explicit Panels(int32_t batch) {
    int32_t filled = (batch + 3) & ~3;
    sixteens = filled / 16;
    eight = (filled / 8) & 1;
    four = (filled / 4) & 1;
  }
  int32_t count() const { return sixteens + eight + four; }
  int32_t width(int32_t p) const { return p < sixteens ? 16 : (p == sixteens && eight) ? 8 : 4; }
  /* Samples before panel p; times the rows of a buffer it is the panel's first float. */
  int64_t before(int32_t p) const { return p <= sixteens ? (int64_t)16 * p : (int64_t)16 * sixteens + 8; }
};

} // namespace nk
#endif
