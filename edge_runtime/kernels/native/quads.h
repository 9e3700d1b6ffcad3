/* Many inner products at once: partial sums of LANES rows are transposed against each other, so that one vector of sums
   costs 30 shuffles (AVX-512), 14 (AVX2) or 6 instead of LANES horizontal sums. */
#ifndef NESTLING_QUADS_H
#define NESTLING_QUADS_H

namespace nk {

#if LANES == 16
INLINE v16 join(v8 a, v8 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE v16 halves(v16 a, v16 b) { /* 8 partial sums of a, 8 of b */
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE v16 quarters(v16 ab, v16 cd) { /* 4 of a, 4 of b, 4 of c, 4 of d */
  return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE v8 join(v4 a, v4 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
/* Element 4 j + g is the sum of quarter j of vector g. */
INLINE v16 sums(v16 a, v16 b, v16 c, v16 d) {
  v16 ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  v16 cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
/* The sums of the four quarters. */
INLINE v4 quarter_sums(v16 a) {
  a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  a += __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(a, a, 0, 4, 8, 12);
}
#elif LANES == 8
INLINE v8 join(v4 a, v4 b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE v8 halves(v8 a, v8 b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE v8 sums(v8 a, v8 b, v8 c, v8 d) {
  v8 ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
          __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  v8 cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
          __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  return __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
         __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
}
#endif

/* Four indices, as rows are named. */
INLINE void rows(const uint8_t *index, int64_t *r) {
  uint32_t all;
  __builtin_memcpy(&all, index, sizeof all);
  r[0] = (all << 4) & 0xff0;
  r[1] = (all >> 4) & 0xff0;
  r[2] = (all >> 12) & 0xff0;
  r[3] = (all >> 20) & 0xff0;
}
INLINE void rows(const uint16_t *index, int64_t *r) {
  uint64_t all;
  __builtin_memcpy(&all, index, sizeof all);
  r[0] = (all << 4) & 0xffff0;
  r[1] = (all >> 12) & 0xffff0;
  r[2] = (all >> 28) & 0xffff0;
  r[3] = (all >> 44) & 0xffff0;
}

/* Partial sums of the inner products of a row with four others: as many vectors as it takes. */
struct Quad {
  vec part[4 / (LANES / 4)];
};

#if LANES == 16
/* Four places, side by side: inserted from memory, which costs no shuffle. */
INLINE v16 side_by_side(const float *a, const float *b, const float *c, const float *d) {
  __m512 t = _mm512_castps128_ps512(_mm_loadu_ps(a));
  t = _mm512_insertf32x4(t, _mm_loadu_ps(b), 1);
  t = _mm512_insertf32x4(t, _mm_loadu_ps(c), 2);
  return (v16)_mm512_insertf32x4(t, _mm_loadu_ps(d), 3);
}
#endif

template <int S, int E, int F>
INLINE Quad quad(const Row<S, E, F> &row, const Place<const float> &x, const int64_t *r) {
  Quad q;
#if LANES == 16
  v16 ab = v16{}, cd = v16{};
  if (S) {
    ab = halves(row.full(x, r[0]), row.full(x, r[1]));
    cd = halves(row.full(x, r[2]), row.full(x, r[3]));
  }
  if (E) {
    ab += join(row.e.times(x.e(r[0])), row.e.times(x.e(r[1])));
    cd += join(row.e.times(x.e(r[2])), row.e.times(x.e(r[3])));
  }
  q.part[0] = (S || E) ? quarters(ab, cd) : v16{};
  if (F) {
    v8 f = join(row.f.v[0], row.f.v[0]);
    q.part[0] += join(f, f) * side_by_side(x.f(r[0]), x.f(r[1]), x.f(r[2]), x.f(r[3]));
  }
#elif LANES == 8
  for (int i = 0; i < 2; i++, r += 2) {
    q.part[i] = (S || E) ? halves(row.full(x, r[0]), row.full(x, r[1])) : v8{};
    if (F) q.part[i] += join(row.f.v[0], row.f.v[0]) * join(load<v4>(x.f(r[0])), load<v4>(x.f(r[1])));
  }
#else
  for (int i = 0; i < 4; i++) q.part[i] = row.times(x, r[i]);
#endif
  return q;
}

/* The inner products of one quad. */
INLINE v4 totals(const Quad &q) {
#if LANES == 16
  return quarter_sums(q.part[0]);
#elif LANES == 8
  v8 t = sums(q.part[0], q.part[1], q.part[0], q.part[1]);
  return __builtin_shufflevector(t, t, 0, 4, 1, 5);
#else
  return sums(q.part[0], q.part[1], q.part[2], q.part[3]);
#endif
}

/* Those of LANES / 4 quads, in order. */
INLINE vec totals_of_all(const Quad *q) {
#if LANES == 16
  v16 t = sums(q[0].part[0], q[1].part[0], q[2].part[0], q[3].part[0]);
  return __builtin_shufflevector(t, t, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#elif LANES == 8
  v8 t = sums(q[0].part[0], q[0].part[1], q[1].part[0], q[1].part[1]);
  return __builtin_shufflevector(t, t, 0, 4, 1, 5, 2, 6, 3, 7);
#else
  return totals(q[0]);
#endif
}

} // namespace nk
#endif
