/* Panels, pools and linear layers against loops that say what they mean. */
#ifndef NESTLING_LINEAR_TRIALS_H
#define NESTLING_LINEAR_TRIALS_H
#include "trial.h"

inline void pack_trial(int batch) {
  trial = "pack";
  nk_image m = {chance.in(1, 5), chance.in(1, 9), chance.in(1, 9), chance.in(0, 3)};
  size_t size = (size_t)(m.channels * m.height * m.width);
  Buffer x((size_t)batch * size, chance.coin()), back((size_t)batch * size, chance.coin());
  Activation panels(m, batch);
  x.fill();
  must(nk_pack(&m, batch, x.at, panels.panels.at), "nk_pack");
  panels.whole(false);
  size_t k = 0;
  for (int s = 0; s < batch; s++)
    for (int c = 0; c < m.channels; c++)
      for (int i = 0; i < m.height; i++)
        for (int j = 0; j < m.width; j++) near("packed", panels(s, c, i, j), x.at[k++], 0, s, c, i, j);
  must(nk_unpack(&m, batch, panels.panels.at, back.at), "nk_unpack");
  if (memcmp(x.at, back.at, x.size * sizeof(float))) wrong("what was packed comes back otherwise");
}

struct SparseMatrix {
  int rows, columns, block, blocks, wide;
  std::vector<int32_t> starts, row, column;
  std::vector<uint16_t> index;
  SparseMatrix() {
    static const int blocks_of[] = {1, 7, 64, 256, 256, 300, 4096};
    rows = chance.in(1, chance.coin() ? 9 : 150);
    columns = chance.in(1, chance.coin() ? 20 : 700);
    block = blocks_of[chance.in(0, 6)];
    if (block > columns && chance.coin()) block = columns;
    blocks = (columns + block - 1) / block;
    wide = block > 256 || chance.coin();
    double density = chance.density();
    int hole = chance.in(0, rows - 1);
    for (int b = 0; b < blocks; b++) {
      starts.push_back((int32_t)index.size());
      for (int r = 0; r < rows; r++) {
        for (int c = b * block; c < (b + 1) * block && c < columns; c++)
          if (r != hole && chance.bits() < density * 4294967296.0) {
            row.push_back(r);
            column.push_back(c);
            index.push_back((uint16_t)(c - b * block));
          }
        starts.push_back((int32_t)index.size());
      }
    }
  }
};

/* Its C form, in arrays of exactly its size. */
struct LinearLayer {
  Table<int32_t> starts;
  Table<uint16_t> two;
  Table<uint8_t> one;
  nk_linear c;
  explicit LinearLayer(const SparseMatrix &m)
      : starts(m.starts), two(m.index), one(std::vector<uint8_t>(m.index.begin(), m.index.end())),
        c{m.rows, m.columns, m.block, m.blocks, m.wide ? 2 : 1, (int32_t)m.index.size(), starts.at,
          m.wide ? (const void *)two.at : (const void *)one.at} {}
};

inline void linear_backward(const SparseMatrix &m, const LinearLayer &layer, Buffer &values, Activation &x,
                            Activation *y, Activation &dy) {
  int batch = x.batch;
  size_t kept = m.index.size();
  Activation dx(x.image, batch);
  Buffer dvalues(kept), dbias((size_t)m.rows);
  dvalues.fill();
  dbias.fill();
  std::vector<float> before = dvalues.copy(), bias_before = dbias.copy(), old = values.copy();
  std::vector<double> want(kept), size(kept), dx_want((size_t)(m.columns * batch)), dx_size(dx_want.size());
  for (size_t k = 0; k < kept; k++)
    for (int s = 0; s < batch; s++) {
      double g = y && (*y)(s, m.row[k]) <= 0 ? 0 : dy(s, m.row[k]), t = g * x(s, m.column[k]), u = g * values.at[k];
      size_t at = (size_t)(m.column[k] * batch + s);
      want[k] += t, size[k] += fabs(t), dx_want[at] += u, dx_size[at] += fabs(u);
    }
  bool moves = chance.coin(), wants_dx = chance.coin(), wants_bias = chance.coin();
  Move move(values);
  must(nk_linear_backward(&layer.c, values.at, x.panels.at, y ? y->panels.at : nullptr, dy.panels.at, batch,
                          wants_dx ? dx.panels.at : nullptr, moves ? nullptr : dvalues.at,
                          wants_bias ? dbias.at : nullptr, moves ? &move.update : nullptr),
       "nk_linear_backward");
  if (moves) move.check(values, want, size);
  for (size_t k = 0; k < kept && !moves; k++) {
    near("dvalues", dvalues.at[k], before[k] + want[k], 1 + size[k], m.row[k], m.column[k]);
    if (values.at[k] != old[k]) wrong("a value moved that should not");
  }
  if (wants_dx) dx.whole(true);
  for (int c = 0; c < m.columns && wants_dx; c++)
    for (int s = 0; s < batch; s++) {
      size_t at = (size_t)(c * batch + s);
      near("dx", dx(s, c), dx_want[at], dx_size[at], s, c);
    }
  for (int r = 0; r < m.rows && wants_bias; r++) {
    double sum = bias_before[(size_t)r], terms = 1;
    for (int s = 0; s < batch; s++) {
      double g = y && (*y)(s, r) <= 0 ? 0 : dy(s, r);
      sum += g, terms += fabs(g);
    }
    near("dbias", dbias.at[r], sum, terms, r);
  }
}

inline void linear_trial(int batch) {
  trial = "linear";
  SparseMatrix m;
  LinearLayer layer(m);
  must(nk_linear_check(&layer.c), "nk_linear_check");
  Activation x({m.columns, 1, 1, 0}, batch), y({m.rows, 1, 1, 0}, batch), dy(y.image, batch);
  Buffer values(m.index.size(), chance.coin()), bias((size_t)m.rows, chance.coin());
  x.fill(false), values.fill(), bias.fill();
  bool relu = chance.coin(), biased = chance.coin();
  must(nk_linear_forward(&layer.c, values.at, biased ? bias.at : nullptr, x.panels.at, batch, relu, y.panels.at),
       "nk_linear_forward");
  y.whole(false);
  std::vector<double> want((size_t)(m.rows * batch)), size(want.size());
  for (size_t k = 0; k < m.index.size(); k++)
    for (int s = 0; s < batch; s++) {
      double t = (double)values.at[k] * x(s, m.column[k]);
      size_t at = (size_t)(m.row[k] * batch + s);
      want[at] += t, size[at] += fabs(t);
    }
  for (int r = 0; r < m.rows; r++)
    for (int s = 0; s < batch; s++) {
      size_t at = (size_t)(r * batch + s);
      double v = want[at] + (biased ? bias.at[r] : 0);
      near("y", y(s, r), relu && v < 0 ? 0 : v, 1 + size[at], s, r);
    }
  dy.fill(true);
  linear_backward(m, layer, values, x, relu ? &y : nullptr, dy);
}

/* The layer's index with one entry spoilt: either it is refused, or it runs within its memory. */
inline void spoilt_linear_trial(int batch) {
  trial = "spoilt linear";
  SparseMatrix m;
  LinearLayer layer(m);
  int32_t odd = chance.in(0, 3) ? chance.in(-3, m.columns + 3) : (int32_t)chance.bits();
  if (chance.coin() || m.index.empty())
    layer.starts.at[chance.in(0, (int)layer.starts.size - 1)] = odd;
  else if (m.wide)
    layer.two.at[chance.in(0, (int)layer.two.size - 1)] = (uint16_t)odd;
  else
    layer.one.at[chance.in(0, (int)layer.one.size - 1)] = (uint8_t)odd;
  checks++;
  if (nk_linear_check(&layer.c)) return;
  Activation x({m.columns, 1, 1, 0}, batch), y({m.rows, 1, 1, 0}, batch);
  Buffer values(m.index.size()), dvalues(m.index.size());
  x.fill(false), values.fill(), dvalues.zero();
  must(nk_linear_forward(&layer.c, values.at, nullptr, x.panels.at, batch, 1, y.panels.at), "nk_linear_forward");
  Activation dy(y.image, batch), dx(x.image, batch);
  dy.fill(true);
  must(nk_linear_backward(&layer.c, values.at, x.panels.at, y.panels.at, dy.panels.at, batch, dx.panels.at, dvalues.at,
                          nullptr, nullptr),
       "nk_linear_backward");
}

/* The largest of a window behind an optional relu, and how often it is there. */
struct Peak {
  double value;
  int times;
};
inline Peak peak(Activation &y, int s, int c, int i, int j, int kernel) {
  Peak best = {-INFINITY, 0};
  for (int p = i * kernel; p < (i + 1) * kernel; p++)
    for (int q = j * kernel; q < (j + 1) * kernel; q++) {
      double v = y(s, c, p, q);
      best.times = v > best.value ? 1 : best.times + (v == best.value);
      best.value = v > best.value ? v : best.value;
    }
  return best;
}

inline void pool_backward(Activation &y, Activation &out, const uint8_t *places, int kernel, int relu) {
  int batch = y.batch;
  nk_image bare = out.image, into = y.image;
  bare.halo = 0;
  into.halo = chance.in(0, 3);
  Activation dout(bare, batch), dy(into, batch);
  Buffer dbias((size_t)y.image.channels);
  dout.fill(true), dbias.fill();
  std::vector<float> before = dbias.copy();
  bool wants_bias = chance.coin();
  must(nk_pool_backward(&y.image, batch, kernel, relu, places, &out.image, out.panels.at, dout.panels.at, &into,
                        dy.panels.at, wants_bias ? dbias.at : nullptr),
       "nk_pool_backward");
  dy.whole(true);
  for (int c = 0; c < into.channels; c++) {
    double sum = before[(size_t)c], terms = 1;
    for (int s = 0; s < batch; s++)
      for (int p = 0; p < into.height; p++)
        for (int q = 0; q < into.width; q++) {
          int i = p / kernel, j = q / kernel;
          bool inside = i < bare.height && j < bare.width;
          Peak top = inside ? peak(y, s, c, i, j, kernel) : Peak{0, 0};
          bool passes = inside && y(s, c, p, q) == top.value && (!relu || top.value > 0);
          if (passes && top.times > 1) continue; /* shared below */
          double want = passes ? dout(s, c, i, j) : 0;
          near("dy", dy(s, c, p, q), want, 0, s, c, p, q);
        }
    for (int s = 0; s < batch; s++)
      for (int i = 0; i < bare.height; i++)
        for (int j = 0; j < bare.width; j++) {
          double got = 0, want = relu && peak(y, s, c, i, j, kernel).value <= 0 ? 0 : dout(s, c, i, j);
          for (int k = 0; k < kernel * kernel; k++) got += dy(s, c, i * kernel + k / kernel, j * kernel + k % kernel);
          near("dy of a window", (float)got, want, 1, s, c, i, j);
          sum += want, terms += fabs(want);
        }
    if (wants_bias) near("dbias", dbias.at[c], sum, terms, c);
  }
}

inline void pool_trial(int batch) {
  trial = "pool";
  int kernel = chance.in(1, 3), relu = chance.coin();
  nk_image from = {chance.in(1, 4), chance.in(kernel, 9), chance.in(kernel, 9), 0};
  nk_image to = {from.channels, from.height / kernel, from.width / kernel, chance.in(0, 3)};
  Activation y(from, batch), out(to, batch);
  y.fill(false);
  if (chance.coin()) /* some that are the same */
    for (size_t i = 0; i < y.panels.size; i++) y.panels.at[i] = roundf(y.panels.at[i] * 2);
  Table<uint8_t> places(std::vector<uint8_t>((size_t)(to.channels * to.height * to.width * ((batch + 3) / 4 * 4)), 255));
  must(nk_pool_forward(&from, batch, kernel, relu, y.panels.at, &to, out.panels.at, places.at), "nk_pool_forward");
  out.whole(false);
  for (int s = 0; s < batch; s++)
    for (int c = 0; c < to.channels; c++)
      for (int i = 0; i < to.height; i++)
        for (int j = 0; j < to.width; j++) {
          double want = peak(y, s, c, i, j, kernel).value;
          near("pooled", out(s, c, i, j), relu && want < 0 ? 0 : want, 0, s, c, i, j);
        }
  pool_backward(y, out, places.at, kernel, relu);
}

#endif
