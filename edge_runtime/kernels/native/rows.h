/* One row of a panelled buffer, held in registers: a chunk of the batch of 0 to 2 panels of 16, perhaps 8, perhaps 4.
   What is no number stays none, as in torch: every comparison is written so that a NaN takes the way that keeps it. */
#ifndef NESTLING_ROWS_H
#define NESTLING_ROWS_H

namespace nk {

/* W floats as as few vectors as can be. */
template <int W> struct Wide {
  typedef typename Vector<W>::type V;
  static constexpr int WIDTH = W < LANES ? W : LANES, COUNT = W / WIDTH;
  V v[COUNT];
  MEMBER void set(float s) {
    for (int i = 0; i < COUNT; i++) v[i] = V{} + s;
  }
  MEMBER void read(const float *p) {
    for (int i = 0; i < COUNT; i++) v[i] = load<V>(p + i * WIDTH);
  }
  MEMBER void write(float *p) const {
    for (int i = 0; i < COUNT; i++) store<V>(p + i * WIDTH, v[i]);
  }
  MEMBER void add(float s, const float *p) {
    for (int i = 0; i < COUNT; i++) v[i] += s * load<V>(p + i * WIDTH);
  }
  MEMBER void add(float s, const Wide &o) {
    for (int i = 0; i < COUNT; i++) v[i] += s * o.v[i];
  }
  MEMBER void add(const Wide &o) {
    for (int i = 0; i < COUNT; i++) v[i] += o.v[i];
  }
  MEMBER void give(float s, float *p) const {
    for (int i = 0; i < COUNT; i++) store<V>(p + i * WIDTH, load<V>(p + i * WIDTH) + s * v[i]);
  }
  MEMBER void rectify() {
    for (int i = 0; i < COUNT; i++) v[i] = V{} > v[i] ? V{} : v[i];
  }
  MEMBER void rectify_by(const float *y) {
    for (int i = 0; i < COUNT; i++) v[i] = load<V>(y + i * WIDTH) <= V{} ? V{} : v[i];
  }
  MEMBER float total() const {
    v4 r = fold(v[0]);
    for (int i = 1; i < COUNT; i++) r += fold(v[i]);
    return sum(r);
  }
  MEMBER V times(const float *p) const {
    V r = v[0] * load<V>(p);
    for (int i = 1; i < COUNT; i++) r += v[i] * load<V>(p + i * WIDTH);
    return r;
  }
};

/* Where a chunk of a buffer begins: its panels of 16, its 8, its 4. Rows are named by their bytes in a panel of 4, 16
   times their number: that is what addresses are made of without another multiplication. */
template <class P> struct Place {
  P *sixteen[2], *eight, *four;
  MEMBER P *s(int i, int64_t r) const { return sixteen[i] + r; }
  MEMBER P *e(int64_t r) const { return eight + (r >> 1); }
  MEMBER P *f(int64_t r) const { return four + (r >> 2); }
  MEMBER Place down(int64_t row) const {
    return {{sixteen[0] + 16 * row, sixteen[1] + 16 * row}, eight + 8 * row, four + 4 * row};
  }
};

template <int S, int E, int F> struct Row {
  static constexpr int REGISTERS = S * Wide<16>::COUNT + E * Wide<8>::COUNT + F;
  Wide<16> s[S ? S : 1];
  Wide<8> e;
  Wide<4> f;
  MEMBER void set(float x) {
    for (int i = 0; i < S; i++) s[i].set(x);
    if (E) e.set(x);
    if (F) f.set(x);
  }
  MEMBER void read(const Place<const float> &p, int64_t r) {
    for (int i = 0; i < S; i++) s[i].read(p.s(i, r));
    if (E) e.read(p.e(r));
    if (F) f.read(p.f(r));
  }
  MEMBER void write(const Place<float> &p, int64_t r) const {
    for (int i = 0; i < S; i++) s[i].write(p.s(i, r));
    if (E) e.write(p.e(r));
    if (F) f.write(p.f(r));
  }
  MEMBER void add(float x, const Place<const float> &p, int64_t r) {
    for (int i = 0; i < S; i++) s[i].add(x, p.s(i, r));
    if (E) e.add(x, p.e(r));
    if (F) f.add(x, p.f(r));
  }
  MEMBER void add(const Row &o) {
    for (int i = 0; i < S; i++) s[i].add(o.s[i]);
    if (E) e.add(o.e);
    if (F) f.add(o.f);
  }
  MEMBER void rectify() {
    for (int i = 0; i < S; i++) s[i].rectify();
    if (E) e.rectify();
    if (F) f.rectify();
  }
  MEMBER void rectify_by(const Place<const float> &y, int64_t r) {
    for (int i = 0; i < S; i++) s[i].rectify_by(y.s(i, r));
    if (E) e.rectify_by(y.e(r));
    if (F) f.rectify_by(y.f(r));
  }
  /* p[r] += x * this. The places are pinned to registers: a store by base and index would take a load's port. */
  MEMBER void give(float x, const Place<float> &p, int64_t r) const {
    for (int i = 0; i < S; i++) s[i].give(x, pinned(p.s(i, r)));
    if (E) e.give(x, pinned(p.e(r)));
    if (F) f.give(x, pinned(p.f(r)));
  }
  MEMBER float total() const {
    v4 t = v4{};
    for (int i = 0; i < S; i++)
      for (int j = 0; j < Wide<16>::COUNT; j++) t += fold(s[i].v[j]);
    if (E)
      for (int j = 0; j < Wide<8>::COUNT; j++) t += fold(e.v[j]);
    if (F) t += f.v[0];
    return sum(t);
  }
  /* The inner product with one row of p, still spread over four lanes. */
  MEMBER v4 times(const Place<const float> &p, int64_t r) const {
    v4 t = v4{};
    if (S || (E && LANES <= 8)) t = fold(full(p, r));
    if (E && LANES > 8) t += fold(e.times(p.e(r)));
    if (F) t += f.times(p.f(r));
    return t;
  }
  /* What of the product fills whole vectors. */
  MEMBER vec full(const Place<const float> &p, int64_t r) const {
    vec t = vec{};
    if constexpr (S > 0) {
      t = s[0].times(p.s(0, r));
      for (int i = 1; i < S; i++) t += s[i].times(p.s(i, r));
    }
#if LANES <= 8
    if (E) t += e.times(p.e(r));
#endif
    return t;
  }
};

} // namespace nk
#endif
