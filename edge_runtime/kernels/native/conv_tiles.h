/* Tiles of a convolution: a few rows and columns of pixels in registers, worked through all kept weights of a row.

   What is read with column step 1 is contiguous in memory whatever the width of the panel, so a row of a tile is a run
   of whole vectors; with other steps a column is one vector of a pixel. */
#ifndef NESTLING_CONV_TILES_H
#define NESTLING_CONV_TILES_H

namespace nk {

/* Vectors that may be held in registers beside what the loops need. */
#if LANES == 16
enum { HELD = 28 };
#elif LANES == 8
enum { HELD = 14 };
#elif ARM64
enum { HELD = 24 };
#else
enum { HELD = 12 };
#endif
enum { ROWS_MAX = 4, COLUMNS_MAX = 7, LISTED_MAX = 256, SKIP = -1, WORTH = 4 };

/* Where a weight comes from: in the order of the codes, through `places`, or so where the code is no SKIP. */
enum Source { STRAIGHT, PLACED, SIFTED };

/* y[row] += sum of weights times x at the offsets of their codes, for rows `from` to `to` of one block. */
struct Product {
  const int32_t *starts;
  const uint16_t *codes;
  const int32_t *table; /* code to floats */
  const float *values;
  const uint16_t *places;
  const int32_t *bases; /* of places: bases[row / bases_rows * bases_step] */
  int32_t bases_rows, bases_step;
  const float *bias;
  bool first, rectify; /* begin with the bias, end with a relu */
  int32_t from, to;
  int64_t x_row, x_step; /* floats from one row or column of pixels to the next */
  int64_t y_plane, y_row, y_step;
};

/* sums[k - first] += lane by lane, x at the offset of code k times dy of its row, for codes `first` to `end` of a
   block. */
struct Sampling {
  const int32_t *starts;
  const uint16_t *codes;
  const int32_t *table;
  int32_t first, end, from, to;
  int64_t x_row, x_step;
  int64_t dy_plane, dy_row, dy_step;
  float *sums; /* [end - first][LANES] */
};

/* Pinned, and where products do not read memory themselves the compiler must not read the next row before this one is
   through: there are no registers for it. */
template <class T> INLINE T *in_turn(T *p) {
#if defined(__x86_64__)
  return pinned(p);
#else
  __asm__ volatile("" : "+r"(p) : : "memory");
  return p;
#endif
}

template <class V, int RT, int CT, bool STEPPED> struct Tile {
  static constexpr int WIDTH = sizeof(V) / sizeof(float);
  V at[RT][CT];

  /* Floats to column c. */
  static MEMBER int64_t beside(int c, int64_t step) { return c * (STEPPED ? step : WIDTH); }
  MEMBER void set(float value) {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++)
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) at[r][c] = value - V{};
  }
  MEMBER void read(const float *p, int64_t row, int64_t step) {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) at[r][c] = load<V>(p + beside(c, step));
      if (r + 1 < RT) p = in_turn(p + row);
    }
  }
  /* Ask for the cache lines of a tile that is needed soon: of a row of weights with enough to do meanwhile. */
  static MEMBER void expect(const float *p, int64_t row, int64_t step) {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++)
        if (WIDTH == 16 || c % (16 / WIDTH) == 0) __builtin_prefetch(p + beside(c, step), 1, 3);
      if (r + 1 < RT) p = in_turn(p + row);
    }
  }
  MEMBER void write(float *p, int64_t row, int64_t step) const {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) store<V>(p + beside(c, step), at[r][c]);
      if (r + 1 < RT) p = in_turn(p + row);
    }
  }
  MEMBER void add(float weight, const float *p, int64_t row, int64_t step) {
    V w = weight - V{};
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) at[r][c] += w * load<V>(p + beside(c, step));
      if (r + 1 < RT) p = in_turn(p + row);
    }
  }
  MEMBER void add(const Tile &other) {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++)
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) at[r][c] += other.at[r][c];
  }
  MEMBER void rectify() {
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++)
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) at[r][c] = V{} > at[r][c] ? V{} : at[r][c]; /* a NaN stays */
  }
  /* sum + products with what lies at p, lane by lane, in two chains. */
  MEMBER V times(V sum, const float *p, int64_t row, int64_t step) const {
    V other = V{};
#pragma GCC unroll 4
    for (int r = 0; r < RT; r++) {
#pragma GCC unroll 8
      for (int c = 0; c < CT; c++) {
        V x = load<V>(p + beside(c, step));
        const int i = r * CT + c;
        if (i % 2)
          other = i == 1 ? at[r][c] * x : other + at[r][c] * x;
        else
          sum += at[r][c] * x;
      }
      if (r + 1 < RT) p = in_turn(p + row);
    }
    return RT * CT > 1 ? sum + other : sum;
  }
};

/* The codes that count, and their weights, close together. */
struct Sieve {
  int32_t offsets[LISTED_MAX];
  float weights[LISTED_MAX];
  MEMBER int32_t fill(const Product &p, const float *values, int32_t k, int32_t end) {
    int32_t n = 0;
    for (; k < end; k++) {
      int32_t offset = p.table[p.codes[k]];
      offsets[n] = offset;
      weights[n] = values[p.places[k]];
      n += offset != SKIP;
    }
    return n;
  }
};

template <class V, int RT, int CT, bool STEPPED, Source SOURCE>
static void product_tile(const Product &p, const float *x, float *y) {
  typedef Tile<V, RT, CT, STEPPED> T;
  constexpr bool TWO = RT * CT <= 4; /* a second set of sums, or each waits for the one before */
  const int32_t *starts = p.starts, *table = p.table;
  const uint16_t *codes = p.codes, *places = p.places;
  const int64_t row = p.x_row, step = p.x_step;
  const float *values = p.values;
  int32_t rebase = p.from;
  for (int32_t i = p.from; i < p.to; i++) {
    if (SOURCE != STRAIGHT && i == rebase) {
      values = p.values + p.bases[(int64_t)(i / p.bases_rows) * p.bases_step];
      rebase = (i / p.bases_rows + 1) * p.bases_rows;
    }
    int32_t k = starts[i], end = starts[i + 1];
    if (k == end && !p.first && !p.rectify) continue;
    float *to = y + i * p.y_plane;
    T a;
    if (p.first)
      a.set(p.bias ? p.bias[i] : 0);
    else
      a.read(to, p.y_row, p.y_step);
    if (!STEPPED) T::expect(to + p.y_plane, p.y_row, p.y_step);
    if (SOURCE == SIFTED) {
      Sieve sieve;
      while (k < end) {
        int32_t stop = end - k > LISTED_MAX ? k + LISTED_MAX : end, n = sieve.fill(p, values, k, stop);
        for (int32_t j = 0; j < n; j++) a.add(sieve.weights[j], in_turn(x + sieve.offsets[j]), row, step);
        k = stop;
      }
    } else {
      if (TWO && end - k > 1) {
        T b;
        b.set(0);
        for (; k + 2 <= end; k += 2) {
          a.add(values[SOURCE == PLACED ? places[k] : k], in_turn(x + table[codes[k]]), row, step);
          b.add(values[SOURCE == PLACED ? places[k + 1] : k + 1], in_turn(x + table[codes[k + 1]]), row, step);
        }
        a.add(b);
      }
      for (; k < end; k++) a.add(values[SOURCE == PLACED ? places[k] : k], in_turn(x + table[codes[k]]), row, step);
    }
    if (p.rectify) a.rectify();
    a.write(to, p.y_row, p.y_step);
  }
}

template <class V, int RT, int CT, bool STEPPED>
static void sample_tile(const Sampling &p, const float *x, const float *dy) {
  typedef Tile<V, RT, CT, STEPPED> T;
  const int32_t *starts = p.starts, *table = p.table;
  const uint16_t *codes = p.codes;
  const int64_t row = p.x_row, step = p.x_step;
  for (int32_t i = p.from; i < p.to; i++) {
    int32_t k = starts[i] > p.first ? starts[i] : p.first, end = starts[i + 1] < p.end ? starts[i + 1] : p.end;
    if (k >= end) continue;
    T d;
    d.read(dy + i * p.dy_plane, p.dy_row, p.dy_step);
    if (!STEPPED && end - k >= WORTH) T::expect(dy + (i + 1) * p.dy_plane, p.dy_row, p.dy_step);
    float *sum = p.sums + (int64_t)(k - p.first) * LANES;
    for (; k < end; k++, sum += LANES) store<V>(sum, d.times(load<V>(sum), in_turn(x + table[codes[k]]), row, step));
  }
}

typedef void (*ProductTile)(const Product &, const float *, float *);
typedef void (*SampleTile)(const Sampling &, const float *, const float *);

template <class V, int RT, int CT, bool STEPPED> constexpr bool fits() {
  return RT * CT <= HELD && (CT <= 4 || !STEPPED) && (CT == 1 || STEPPED || sizeof(V) == sizeof(vec));
}
/* The tile of so many rows and columns; null where there is none. */
template <class V, bool STEPPED, Source SOURCE, int RT, int CT> constexpr ProductTile product_of() {
  if constexpr (fits<V, RT, CT, STEPPED>()) return product_tile<V, RT, CT, STEPPED, SOURCE>;
  return 0;
}
template <class V, bool STEPPED, int RT, int CT> constexpr SampleTile sample_of() {
  if constexpr (fits<V, RT, CT, STEPPED>()) return sample_tile<V, RT, CT, STEPPED>;
  return 0;
}
#define NK_ROW(MAKE, ...)                                                                                              \
  {MAKE<__VA_ARGS__, 1>(), MAKE<__VA_ARGS__, 2>(), MAKE<__VA_ARGS__, 3>(), MAKE<__VA_ARGS__, 4>(),                     \
   MAKE<__VA_ARGS__, 7>()}
#define NK_TILES(MAKE, ...)                                                                                            \
  {NK_ROW(MAKE, __VA_ARGS__, 1), NK_ROW(MAKE, __VA_ARGS__, 2), NK_ROW(MAKE, __VA_ARGS__, 3),                           \
   NK_ROW(MAKE, __VA_ARGS__, 4)}
INLINE int32_t column_slot(int32_t columns) { return columns == 7 ? 4 : columns - 1; }
template <class V, bool STEPPED, Source SOURCE> static ProductTile product(int32_t rows, int32_t columns) {
  static constexpr ProductTile tiles[4][5] = NK_TILES(product_of, V, STEPPED, SOURCE);
  return tiles[rows - 1][column_slot(columns)];
}
template <class V, bool STEPPED> static SampleTile sample(int32_t rows, int32_t columns) {
  static constexpr SampleTile tiles[4][5] = NK_TILES(sample_of, V, STEPPED);
  return tiles[rows - 1][column_slot(columns)];
}
#undef NK_ROW
#undef NK_TILES

} // namespace nk
#endif
