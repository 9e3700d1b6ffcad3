/* Sparse linear layers: forward, and one pass over the kept weights for both gradients. Cost: 2 and 4 flops for each
   kept weight and sample; memory: none beside the caller's, but one dense row of gradients for batches that do not fit
   the registers (all but 4, 8, 16, 20 and 32, rounded up). */
#ifndef NESTLING_LINEAR_H
#define NESTLING_LINEAR_H

#include "rows.h"

#include "quads.h"

#include "settle.h"

namespace nk {

INLINE Place<float> place(float *p, int64_t rows, const Panels &panels, int32_t first) {
  int32_t e = panels.sixteens, f = e + panels.eight;
  float *sixteen = p + rows * 16 * first;
  return {{sixteen, sixteen + rows * 16}, p + rows * panels.before(e), p + rows * panels.before(f)};
}
INLINE Place<const float> read_only(const Place<float> &p) { return {{p.sixteen[0], p.sixteen[1]}, p.eight, p.four}; }
INLINE Place<const float> place(const float *p, int64_t rows, const Panels &panels, int32_t first) {
  return read_only(place((float *)p, rows, panels, first));
}

template <int S, int E, int F> struct Linear {
  typedef Row<S, E, F> R;
  typedef Place<const float> In;
  typedef Place<float> Out;
  static constexpr bool FOUR = R::REGISTERS <= ((LANES == 16 || ARM64) ? 6 : 3);

  template <class I>
  INLINE void forward_row(const I *index, const float *values, int32_t k, int32_t end, const In &x, R &a) {
    R b, c, d;
    if (k + 4 <= end) {
      b.set(0);
      if (FOUR) c.set(0), d.set(0);
      for (; k + 4 <= end; k += 4) {
        int64_t r[4];
        rows(index + k, r);
        a.add(values[k], x, r[0]);
        b.add(values[k + 1], x, r[1]);
        (FOUR ? c : a).add(values[k + 2], x, r[2]);
        (FOUR ? d : b).add(values[k + 3], x, r[3]);
      }
      if (FOUR) c.add(d), a.add(c);
      a.add(b);
    }
    for (; k < end; k++) a.add(values[k], x, (int64_t)index[k] << 4);
  }

  template <class I>
  static void forward(const nk_linear &l, const float *values, const float *bias, In x, bool relu, Out y, int32_t from,
                      int32_t to) {
    const I *index = (const I *)l.index;
    for (int32_t b = 0; b < l.blocks; b++) {
      const int32_t *starts = l.starts + (int64_t)b * (l.rows + 1);
      In xb = x.down((int64_t)b * l.block);
      bool last = b + 1 == l.blocks;
      for (int32_t i = from; i < to; i++) {
        int32_t k = starts[i], end = starts[i + 1];
        if (k == end && b && !(last && relu)) continue;
        R a;
        if (b)
          a.read(read_only(y), (int64_t)i << 4);
        else
          a.set(bias ? bias[i] : 0);
        forward_row<I>(index, values, k, end, xb, a);
        if (last && relu) a.rectify();
        a.write(y, (int64_t)i << 4);
      }
    }
  }

  /* Mask dy where the forward pass cut off, and sum it over the batch. */
  static void prepare(int32_t rows, const In *y, Out dy, float *dbias) {
    if (!y && !dbias) return;
    for (int32_t i = 0; i < rows; i++) {
      R a;
      a.read(read_only(dy), (int64_t)i << 4);
      if (y) {
        a.rectify_by(*y, (int64_t)i << 4);
        a.write(dy, (int64_t)i << 4);
      }
      if (dbias) dbias[i] += a.total();
    }
  }

  /* The gradients of one row's weights go to `sink(position, vector or number)`, its share of dx to dx. */
  template <class I, bool DX, class Sink>
  INLINE void row(const I *index, const float *values, int32_t k, int32_t end, const In &x, const R &g, const Out &dx,
                  const Sink &sink) {
    auto one = [&](int32_t at) __attribute__((always_inline)) {
      int64_t r[4];
      rows(index + at, r);
      Quad q = quad(g, x, r);
      if (DX)
        for (int j = 0; j < 4; j++) g.give(values[at + j], dx, r[j]);
      return q;
    };
    for (; k + LANES <= end; k += LANES) {
      Quad q[LANES / 4];
      for (int j = 0; j < LANES / 4; j++) q[j] = one(k + 4 * j);
      sink(k, totals_of_all(q));
    }
    if (LANES > 4)
      for (; k + 4 <= end; k += 4) sink(k, totals(one(k)));
    for (; k < end; k++) {
      int64_t r = (int64_t)index[k] << 4;
      float dw = sum(g.times(x, r));
      if (DX) g.give(values[k], dx, r);
      sink(k, dw);
    }
  }

  /* A block, where this chunk is the whole batch. */
  template <class I, bool DX>
  static void block(const nk_linear &l, const int32_t *starts, const float *values, In x, In dy, Out dx,
                    const Settle &settle) {
    for (int32_t i = 0; i < l.rows; i++) {
      if (starts[i] == starts[i + 1]) continue;
      R g;
      g.read(dy, (int64_t)i << 4);
      row<I, DX>((const I *)l.index, values, starts[i], starts[i + 1], x, g, dx,
                 [&](int32_t k, auto dw) __attribute__((always_inline)) { settle.at(k, dw); });
    }
  }

  /* One row of a block, where this chunk is the first or a later part of the batch: gradients gather in `part`. */
  template <class I, bool DX>
  static void share(const nk_linear &l, int32_t i, const int32_t *starts, const float *values, In x, In dy, Out dx,
                    float *part, bool first) {
    R g;
    g.read(dy, (int64_t)i << 4);
    row<I, DX>((const I *)l.index + starts[i], values + starts[i], 0, starts[i + 1] - starts[i], x, g, dx,
               [&](int32_t k, auto dw) __attribute__((always_inline)) {
                 typedef decltype(dw) V;
                 store<V>(part + k, first ? dw : load<V>(part + k) + dw);
               });
  }
};

/* The batch in chunks that fit registers: pairs of panels of 16, the odd one with the panel of 4, then the rest. */
struct Chunks {
  Panels panels;
  int32_t pairs, odd, count;
  explicit Chunks(int32_t batch)
      : panels(batch), pairs(panels.sixteens / 2), odd(panels.sixteens & 1),
        count(pairs + odd + panels.eight + (panels.four && !odd)) {}
  int32_t first(int32_t c) const { return 2 * c; }
  int32_t kind(int32_t c) const {
    if (c < pairs) return 8;
    if (odd && c == pairs) return 4 + panels.four;
    return panels.eight && c == pairs + odd ? 2 : 1;
  }
};

/* Run the statement X for Linear<S, E, F> of a chunk's kind, as L. */
#define NK_KIND(S, E, F, X)                                                                                            \
  case 4 * S + 2 * E + F: {                                                                                            \
    typedef nk::Linear<S, E, F> L;                                                                                     \
    X;                                                                                                                 \
  } break;
#define NK_KINDS(kind, X)                                                                                              \
  switch (kind) { NK_KIND(2, 0, 0, X) NK_KIND(1, 0, 1, X) NK_KIND(1, 0, 0, X) NK_KIND(0, 1, 0, X) NK_KIND(0, 0, 1, X) }

template <class I>
static void linear_forward(const nk_linear &l, const float *values, const float *bias, const float *x, int32_t batch,
                           bool relu, float *y) {
  Chunks chunks(batch);
  int32_t parts = crew.wanted > 1 && (int64_t)l.kept * batch > 1 << 16 ? 4 * crew.wanted : 1;
  auto task = [&](int32_t part) {
    int32_t from = (int64_t)l.rows * part / parts, to = (int64_t)l.rows * (part + 1) / parts;
    for (int32_t c = 0; c < chunks.count; c++) {
      auto in = place(x, l.columns, chunks.panels, chunks.first(c));
      auto out = place(y, l.rows, chunks.panels, chunks.first(c));
      NK_KINDS(chunks.kind(c), L::template forward<I>(l, values, bias, in, relu, out, from, to))
    }
  };
  parallel(parts, task);
}

/* `scratch`: a dense row, of which each block has its own columns; null where one chunk is the whole batch. */
template <class I, bool DX>
static void linear_backward(const nk_linear &l, const Chunks &chunks, const float *values, const float *x,
                            const float *dy, float *dx, const Settle &settle, float *scratch) {
  auto task = [&](int32_t b) {
    const int32_t *starts = l.starts + (int64_t)b * (l.rows + 1);
    int64_t column = (int64_t)b * l.block, width = l.columns - column < l.block ? l.columns - column : l.block;
    if (DX)
      for (int32_t p = 0; p < chunks.panels.count(); p++) {
        int64_t w = chunks.panels.width(p);
        memset(dx + l.columns * chunks.panels.before(p) + column * w, 0, width * w * sizeof(float));
      }
    auto in = [&](int32_t c) { return place(x, l.columns, chunks.panels, chunks.first(c)).down(column); };
    auto out = [&](int32_t c) {
      if constexpr (!DX) return Place<float>{};
      return place(dx, l.columns, chunks.panels, chunks.first(c)).down(column);
    };
    auto give = [&](int32_t c) { return place(dy, l.rows, chunks.panels, chunks.first(c)); };
    if (chunks.count == 1) {
      NK_KINDS(chunks.kind(0), (L::template block<I, DX>(l, starts, values, in(0), give(0), out(0), settle)))
      return;
    }
    float *part = scratch + column;
    for (int32_t i = 0; i < l.rows; i++) {
      if (starts[i] == starts[i + 1]) continue;
      for (int32_t c = 0; c < chunks.count; c++)
        NK_KINDS(chunks.kind(c), (L::template share<I, DX>(l, i, starts, values, in(c), give(c), out(c), part, c == 0)))
      settle.run(starts[i], starts[i + 1] - starts[i], part);
    }
  };
  parallel(l.blocks, task);
}

} // namespace nk

extern "C" int32_t nk_linear_check(const nk_linear *layer) {
  const nk_linear &l = *layer;
  if (l.rows < 1 || l.columns < 1 || l.block < 1 || l.kept < 0) return NK_SHAPE;
  if (l.index_bytes != 1 && l.index_bytes != 2) return NK_SHAPE;
  if (l.block > (l.index_bytes == 1 ? 1 << 8 : 1 << 16) || l.blocks != (l.columns - 1) / l.block + 1) return NK_SHAPE;
  int64_t before = 0;
  for (int32_t b = 0; b < l.blocks; b++) {
    const int32_t *starts = l.starts + (int64_t)b * (l.rows + 1);
    int32_t width = b + 1 == l.blocks ? l.columns - b * l.block : l.block;
    if (starts[0] != before) return NK_STARTS;
    for (int32_t i = 0; i < l.rows; i++) {
      if (starts[i + 1] < starts[i] || starts[i + 1] > l.kept) return NK_STARTS;
      for (int32_t k = starts[i], latest = -1; k < starts[i + 1]; k++) {
        int32_t column = l.index_bytes == 1 ? ((const uint8_t *)l.index)[k] : ((const uint16_t *)l.index)[k];
        if (column <= latest || column >= width) return NK_INDEX;
        latest = column;
      }
    }
    before = starts[l.rows];
  }
  return before == l.kept ? NK_OK : NK_STARTS;
}

extern "C" int32_t nk_linear_forward(const nk_linear *layer, const float *values, const float *bias, const float *x,
                                     int32_t batch, int32_t relu, float *y) {
  if (batch < 1) return NK_SHAPE;
  if (layer->index_bytes == 1)
    nk::linear_forward<uint8_t>(*layer, values, bias, x, batch, relu, y);
  else
    nk::linear_forward<uint16_t>(*layer, values, bias, x, batch, relu, y);
  return NK_OK;
}

extern "C" int32_t nk_linear_backward(const nk_linear *layer, float *values, const float *x, const float *y, float *dy,
                                      int32_t batch, float *dx, float *dvalues, float *dbias, const nk_update *update) {
  if (batch < 1 || !nk::settles(dvalues, update)) return NK_SHAPE;
  nk::Chunks chunks(batch);
  nk::Settle settle(values, dvalues, update);
  float *scratch = nullptr; /* before anything changes */
  if (chunks.count > 1 && !(scratch = (float *)malloc(layer->columns * sizeof(float)))) return NK_MEMORY;
  for (int32_t c = 0; c < chunks.count; c++) {
    auto out = nk::place(dy, layer->rows, chunks.panels, chunks.first(c));
    nk::Place<const float> cut = {};
    if (y) cut = nk::place(y, layer->rows, chunks.panels, chunks.first(c));
    NK_KINDS(chunks.kind(c), L::prepare(layer->rows, y ? &cut : nullptr, out, dbias))
  }
  auto one = dx ? nk::linear_backward<uint8_t, true> : nk::linear_backward<uint8_t, false>;
  auto two = dx ? nk::linear_backward<uint16_t, true> : nk::linear_backward<uint16_t, false>;
  (layer->index_bytes == 1 ? one : two)(*layer, chunks, values, x, dy, dx, settle, scratch);
  free(scratch);
  return NK_OK;
}
#endif
