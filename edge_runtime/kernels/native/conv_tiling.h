/* How the pixels of an output are cut into tiles, and which tiles are worked together. */
#ifndef NESTLING_CONV_TILING_H
#define NESTLING_CONV_TILING_H

namespace nk {

INLINE int32_t pitch(const nk_image &image) { return image.width + 2 * image.halo; }
INLINE int32_t pieces(int32_t n, int32_t most) { return (n + most - 1) / most; }
INLINE int32_t part(int32_t n, int32_t count, int32_t i) { return (int32_t)((int64_t)n * i / count); }

/* The columns of a panel that are worked in vectors of one length, cut into tiles. */
struct Group {
  int32_t lanes, first, columns; /* first: floats (contiguous) or sub-vector of a pixel (stepped) */
  int32_t across, down;          /* tiles */
  int32_t deep;                  /* tile rows that are worked together; 0: tiles are worked one by one */
  MEMBER int32_t runs() const { return deep ? pieces(down, deep) : across * down; }
  void cut(int32_t height, bool stepped) {
    static const int32_t most[] = {7, 4, 3, 2, 1};
    int64_t best = INT64_MAX;
    for (int32_t m : most) {
      bool single = !stepped && lanes != LANES;
      if ((single && m > 1) || (stepped && m > 4) || (m == 7 && columns % 7)) continue;
      int32_t a = pieces(columns, m), wide = pieces(columns, a), deep = HELD / wide;
      int32_t d = pieces(height, deep < ROWS_MAX ? deep : (int32_t)ROWS_MAX);
      int64_t cost = (int64_t)columns * height + (int64_t)a * d * 5; /* what a tile costs beside its products */
      if (cost < best) best = cost, across = a, down = d;
    }
  }
};

/* What is to be cut: pixels of an output, of which `strip` rows may be worked together (0: each tile by itself). */
struct Field {
  int32_t height, width, strip;
  bool stepped;
};

enum { RUN_MAX = 32 };

/* All tiles of a panel of one width. */
struct Cut {
  Group groups[4];
  int32_t count, runs;
  Cut() : groups(), count(0), runs(0) {}
  void add(int32_t lanes, int32_t first, int32_t columns, const Field &field) {
    if (columns < 1 || field.height < 1) return;
    Group &g = groups[count++];
    g.lanes = lanes, g.first = first, g.columns = columns;
    g.cut(field.height, field.stepped);
    if (field.strip && g.across <= RUN_MAX) {
      int32_t most = RUN_MAX / g.across, deep = field.strip / pieces(field.height, g.down);
      g.deep = deep < 1 ? 1 : deep < most ? deep : most;
    }
    runs += g.runs();
  }
  Cut(int32_t panel, const Field &field) : Cut() {
    int32_t lanes = panel < LANES ? panel : LANES;
    if (field.stepped) {
      for (int32_t f = 0; f < panel; f += lanes) add(lanes, f, field.width, field);
      return;
    }
    int32_t floats = field.width * panel, rest = floats % LANES;
    add(LANES, 0, floats / LANES, field);
    if (rest & 8) add(8, floats - rest, 1, field);
    if (rest & 4) add(4, floats - (rest & 4), 1, field);
  }
};

/* Where one tile is. */
struct Spot {
  int32_t lanes, first, row, rows, column, columns;
  bool stepped;
  /* Floats from the first pixel to the tile's, where pixels are `step` and rows `row_floats` apart. */
  MEMBER int64_t offset(int64_t row_floats, int64_t step) const {
    return row * row_floats + (stepped ? column * step + first : (int64_t)column * lanes + first);
  }
};

/* Tiles that are worked together, row of weights by row of weights: all of one panel. */
struct Run {
  int32_t panel, width, count;
  Spot spots[RUN_MAX];
};

/* The tiles of all panels of a batch, in runs that are counted through. */
struct Tiling {
  Panels panels;
  Field field;
  Cut cuts[3]; /* of width 16, 8, 4 */
  int32_t runs;
  Tiling(int32_t batch, const Field &field)
      : panels(batch), field(field), cuts{Cut(16, field), Cut(8, field), Cut(4, field)} {
    runs = panels.sixteens * cuts[0].runs + panels.eight * cuts[1].runs + panels.four * cuts[2].runs;
  }
  void run(int32_t task, Run &r) const {
    r.panel = 0;
    while (task >= cut(r.panel).runs) task -= cut(r.panel++).runs;
    r.width = panels.width(r.panel);
    const Group *g = cut(r.panel).groups;
    for (; task >= g->runs(); g++) task -= g->runs();
    int32_t tile = g->deep ? task * g->deep * g->across : task, end = g->deep ? tile + g->deep * g->across : tile + 1;
    r.count = 0;
    for (; tile < end && tile < g->across * g->down; tile++) {
      Spot &s = r.spots[r.count++];
      int32_t a = tile % g->across, d = tile / g->across;
      s.stepped = field.stepped, s.lanes = g->lanes, s.first = g->first;
      s.row = part(field.height, g->down, d), s.rows = part(field.height, g->down, d + 1) - s.row;
      s.column = part(g->columns, g->across, a), s.columns = part(g->columns, g->across, a + 1) - s.column;
    }
  }
  const Cut &cut(int32_t panel) const {
    int32_t width = panels.width(panel);
    return cuts[width == 16 ? 0 : width == 8 ? 1 : 2];
  }
};

/* Only what is read with steps is sifted, and the other way about where the weights are transposed. */
template <class V, Source SOURCE> INLINE ProductTile product_with(const Spot &s) {
  if constexpr (SOURCE == SIFTED) return product<V, true, SOURCE>(s.rows, s.columns);
  if constexpr (SOURCE == PLACED) return product<V, false, SOURCE>(s.rows, s.columns);
  return s.stepped ? product<V, true, SOURCE>(s.rows, s.columns) : product<V, false, SOURCE>(s.rows, s.columns);
}
template <Source SOURCE> static ProductTile product_at(const Spot &s) {
#if LANES == 16
  if (s.lanes == 16) return product_with<v16, SOURCE>(s);
#endif
#if LANES >= 8
  if (s.lanes == 8) return product_with<v8, SOURCE>(s);
#endif
  return product_with<v4, SOURCE>(s);
}
template <class V> INLINE SampleTile sample_with(const Spot &s) {
  return s.stepped ? sample<V, true>(s.rows, s.columns) : sample<V, false>(s.rows, s.columns);
}
static SampleTile sample_at(const Spot &s) {
#if LANES == 16
  if (s.lanes == 16) return sample_with<v16>(s);
#endif
#if LANES >= 8
  if (s.lanes == 8) return sample_with<v8>(s);
#endif
  return sample_with<v4>(s);
}

} // namespace nk
#endif
