/* Convolutions against loops over every sample, place and kept weight. */
#ifndef NESTLING_CONV_TRIALS_H
#define NESTLING_CONV_TRIALS_H
#include <algorithm>

#include "trial.h"

struct Weight {
  int o, c, y, x;
};

struct SparseKernel {
  int out, in, kernel, stride, padding, dilation, in_block, out_block;
  nk_image from, to;
  std::vector<Weight> kept;
  std::vector<int32_t> starts, starts_t;
  std::vector<uint16_t> codes, codes_t, places;

  SparseKernel() {
    out = chance.in(1, chance.coin() ? 3 : 20), in = chance.in(1, chance.coin() ? 3 : 20);
    kernel = chance.in(1, 5), stride = chance.in(1, 3), dilation = chance.in(1, 3);
    int reach = dilation * (kernel - 1);
    padding = chance.in(0, chance.coin() ? reach : reach / 2);
    in_block = chance.in(1, in), out_block = chance.in(1, out);
    int least = reach + 1 - 2 * padding;
    if (least < 1) least = 1;
    from = {in, least + chance.in(0, 9), least + chance.in(0, 9), padding};
    to = {out, (from.height + 2 * padding - reach - 1) / stride + 1, (from.width + 2 * padding - reach - 1) / stride + 1, 0};
    list();
  }

  void list() {
    double density = chance.density();
    int k2 = kernel * kernel, in_blocks = (in + in_block - 1) / in_block, out_blocks = (out + out_block - 1) / out_block;
    std::vector<bool> there((size_t)(out * in * k2));
    for (size_t i = 0; i < there.size(); i++) there[i] = chance.bits() < density * 4294967296.0;
    std::vector<int32_t> stands(there.size());
    for (int b = 0; b < in_blocks; b++) {
      starts.push_back((int32_t)kept.size());
      for (int o = 0; o < out; o++) {
        for (int c = b * in_block; c < (b + 1) * in_block && c < in; c++)
          for (int t = 0; t < k2; t++) {
            size_t flat = (size_t)((o * in + c) * k2 + t);
            if (!there[flat]) continue;
            stands[flat] = (int32_t)kept.size();
            kept.push_back({o, c, t / kernel, t % kernel});
            codes.push_back((uint16_t)((c - b * in_block) * k2 + t));
          }
        starts.push_back((int32_t)kept.size());
      }
    }
    for (int b = 0; b < out_blocks; b++) {
      starts_t.push_back((int32_t)codes_t.size());
      for (int c = 0; c < in; c++) {
        int32_t base = starts[(size_t)(c / in_block * (out + 1) + b * out_block)];
        for (int o = b * out_block; o < (b + 1) * out_block && o < out; o++)
          for (int t = 0; t < k2; t++) {
            size_t flat = (size_t)((o * in + c) * k2 + t);
            if (!there[flat]) continue;
            codes_t.push_back((uint16_t)((o - b * out_block) * k2 + t));
            places.push_back((uint16_t)(stands[flat] - base));
          }
        starts_t.push_back((int32_t)codes_t.size());
      }
    }
  }
};

struct ConvLayer {
  Table<int32_t> starts, starts_t;
  Table<uint16_t> codes, codes_t, places;
  nk_conv c;
  explicit ConvLayer(const SparseKernel &k)
      : starts(k.starts), starts_t(k.starts_t), codes(k.codes), codes_t(k.codes_t), places(k.places),
        c{k.out, k.in, k.kernel, k.stride, k.padding, k.dilation, k.in_block, (k.in + k.in_block - 1) / k.in_block,
          k.out_block, (k.out + k.out_block - 1) / k.out_block, (int32_t)k.kept.size(), starts.at, codes.at, starts_t.at,
          codes_t.at, places.at} {}
};

/* Calls f(sample, output row, output column, input row, input column) for all that one weight joins. */
template <class F> void joined(const SparseKernel &k, const Weight &w, int batch, F f) {
  for (int s = 0; s < batch; s++)
    for (int i = 0; i < k.to.height; i++)
      for (int j = 0; j < k.to.width; j++) {
        int p = i * k.stride - k.padding + w.y * k.dilation, q = j * k.stride - k.padding + w.x * k.dilation;
        if (p >= 0 && q >= 0 && p < k.from.height && q < k.from.width) f(s, i, j, p, q);
      }
}

inline size_t flat(const nk_image &m, int s, int c, int i, int j) {
  return (size_t)(((s * m.channels + c) * m.height + i) * m.width + j);
}

inline size_t floats(const nk_image &m, int batch) { return (size_t)(batch * m.channels * m.height * m.width); }

inline void same(const char *what, Activation &got, const std::vector<double> &want, const std::vector<double> &size) {
  const nk_image &m = got.image;
  for (int s = 0; s < got.batch; s++)
    for (int c = 0; c < m.channels; c++)
      for (int i = 0; i < m.height; i++)
        for (int j = 0; j < m.width; j++) {
          size_t at = flat(m, s, c, i, j);
          near(what, got(s, c, i, j), want[at], size[at], s, c, i, j);
        }
}

inline void conv_forward(const SparseKernel &k, const ConvLayer &layer, const Buffer &values, Activation &x) {
  int batch = x.batch, relu = chance.coin();
  bool biased = chance.coin();
  Buffer bias((size_t)k.out, chance.coin());
  bias.fill();
  Activation y(k.to, batch);
  must(nk_conv_forward(&layer.c, values.at, biased ? bias.at : nullptr, &x.image, x.panels.at, batch, relu, y.panels.at),
       "nk_conv_forward");
  y.whole(false);
  std::vector<double> want(floats(k.to, batch)), size(want.size(), 1);
  for (int s = 0; s < batch; s++)
    for (int o = 0; o < k.out; o++)
      for (int p = 0; p < k.to.height * k.to.width; p++)
        want[flat(k.to, s, o, 0, p)] = biased ? bias.at[o] : 0;
  for (size_t v = 0; v < k.kept.size(); v++)
    joined(k, k.kept[v], batch, [&](int s, int i, int j, int p, int q) {
      double t = (double)values.at[v] * x(s, k.kept[v].c, p, q);
      size_t at = flat(k.to, s, k.kept[v].o, i, j);
      want[at] += t, size[at] += fabs(t);
    });
  for (double &v : want) v = relu && v < 0 ? 0 : v;
  same("y", y, want, size);
}

inline void conv_input(const SparseKernel &k, const ConvLayer &layer, const Buffer &values, Activation &dy) {
  int batch = dy.batch;
  nk_image bare = k.from;
  bare.halo = 0;
  Activation dx(bare, batch);
  must(nk_conv_backward_input(&layer.c, values.at, &k.from, &dy.image, dy.panels.at, batch, dx.panels.at),
       "nk_conv_backward_input");
  dx.whole(true);
  std::vector<double> want(floats(bare, batch)), size(want.size());
  for (size_t v = 0; v < k.kept.size(); v++)
    joined(k, k.kept[v], batch, [&](int s, int i, int j, int p, int q) {
      double t = (double)values.at[v] * dy(s, k.kept[v].o, i, j);
      size_t at = flat(bare, s, k.kept[v].c, p, q);
      want[at] += t, size[at] += fabs(t);
    });
  same("dx", dx, want, size);
}

inline void conv_weight(const SparseKernel &k, const ConvLayer &layer, Buffer &values, Activation &x, Activation &dy) {
  int batch = x.batch;
  size_t kept = k.kept.size();
  std::vector<double> want(kept), size(kept);
  for (size_t v = 0; v < kept; v++)
    joined(k, k.kept[v], batch, [&](int s, int i, int j, int p, int q) {
      double t = (double)dy(s, k.kept[v].o, i, j) * x(s, k.kept[v].c, p, q);
      want[v] += t, size[v] += fabs(t);
    });
  Buffer dvalues(kept, chance.coin());
  dvalues.fill();
  std::vector<float> before = dvalues.copy(), old = values.copy();
  bool moves = chance.coin();
  Move move(values);
  must(nk_conv_backward_weight(&layer.c, values.at, &x.image, x.panels.at, &dy.image, dy.panels.at, batch,
                               moves ? nullptr : dvalues.at, moves ? &move.update : nullptr),
       "nk_conv_backward_weight");
  if (moves) move.check(values, want, size);
  for (size_t v = 0; v < kept && !moves; v++) {
    near("dvalues", dvalues.at[v], before[v] + want[v], 1 + size[v], (int)v);
    if (values.at[v] != old[v]) wrong("a value moved that should not");
  }
}

inline int halo_back(const SparseKernel &k) {
  int halo = k.dilation * (k.kernel - 1) - k.padding;
  return halo > 0 ? halo : 0;
}

inline void conv_trial(int batch) {
  trial = "conv";
  SparseKernel k;
  ConvLayer layer(k);
  must(nk_conv_check(&layer.c), "nk_conv_check");
  Buffer values(k.kept.size(), chance.coin());
  Activation x(k.from, batch);
  x.fill(false), values.fill();
  nk_image out = k.to;
  out.halo = halo_back(k);
  Activation dy(out, batch);
  dy.fill(true);
  conv_forward(k, layer, values, x);
  conv_input(k, layer, values, dy);
  if (chance.coin()) {
    conv_weight(k, layer, values, x, dy);
  } else {
    out.halo = chance.in(0, 3);
    Activation other(out, batch);
    other.fill(true);
    conv_weight(k, layer, values, x, other);
  }
}

/* The layer's index with one entry spoilt: either it is refused, or it runs within its memory. */
inline void spoilt_conv_trial(int batch) {
  trial = "spoilt conv";
  SparseKernel k;
  ConvLayer layer(k);
  int32_t odd = chance.in(0, 3) ? chance.in(-3, 40) : (int32_t)chance.bits();
  Table<int32_t> &starts = chance.coin() ? layer.starts : layer.starts_t;
  Table<uint16_t> *some[] = {&layer.codes, &layer.codes_t, &layer.places};
  Table<uint16_t> &codes = *some[chance.in(0, 2)];
  if (chance.coin() || !codes.size)
    starts.at[chance.in(0, (int)starts.size - 1)] = odd;
  else
    codes.at[chance.in(0, (int)codes.size - 1)] = (uint16_t)odd;
  checks++;
  if (nk_conv_check(&layer.c)) return;
  nk_image out = k.to, bare = k.from;
  out.halo = halo_back(k), bare.halo = 0;
  Activation x(k.from, batch), y(k.to, batch), dy(out, batch), dx(bare, batch);
  Buffer values(k.kept.size()), dvalues(k.kept.size());
  x.fill(false), dy.fill(true), values.fill(), dvalues.zero();
  must(nk_conv_forward(&layer.c, values.at, nullptr, &k.from, x.panels.at, batch, 1, y.panels.at), "nk_conv_forward");
  must(nk_conv_backward_input(&layer.c, values.at, &k.from, &out, dy.panels.at, batch, dx.panels.at),
       "nk_conv_backward_input");
  must(nk_conv_backward_weight(&layer.c, values.at, &k.from, x.panels.at, &out, dy.panels.at, batch, dvalues.at, nullptr),
       "nk_conv_backward_weight");
}

#endif
