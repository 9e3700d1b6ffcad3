/* Sparse convolutions: each kept weight is one shift of the input, so a row of weights is a sum of shifted views, and
   no column matrix is ever made. Forward and the gradient of the input are the same product, over the list of weights
   and over its transpose; strides cut the gradient of the input into phases. Cost: 2 flops for each kept weight, output
   pixel, sample and pass. Memory: offsets of one block for each panel width, 3 * 256 KiB at most, 12 bytes for every
   chunk of 512 weights, and 40 KiB of stack a thread. */
#ifndef NESTLING_CONV_H
#define NESTLING_CONV_H

#include "settle.h"

#include "conv_tiles.h"

#include "conv_check.h"

#include "conv_tiling.h"

namespace nk {

/* Offsets of the codes of a block in floats, for each panel width of a batch. */
struct Offsets {
  int32_t *tables[3];
  int64_t codes;
  Offsets(const Panels &panels, int64_t codes) : tables(), codes(codes) {
    bool wanted[3] = {panels.sixteens > 0, panels.eight > 0, panels.four > 0};
    int64_t count = wanted[0] + wanted[1] + wanted[2];
    int32_t *memory = (int32_t *)malloc((count ? count : 1) * codes * sizeof(int32_t));
    if (!memory) return;
    for (int32_t w = 0; w < 3; w++)
      if (wanted[w]) tables[w] = memory, memory += codes;
  }
  ~Offsets() { free(tables[0] ? tables[0] : tables[1] ? tables[1] : tables[2]); }
  bool there() const { return tables[0] || tables[1] || tables[2]; }
  const int32_t *of(int32_t width) const { return tables[width == 16 ? 0 : width == 8 ? 1 : 2]; }
  void put(int64_t code, int64_t pixels) {
    for (int32_t w = 0; w < 3; w++)
      if (tables[w]) tables[w][code] = pixels == SKIP ? (int32_t)SKIP : (int32_t)(pixels * (16 >> w));
  }
};

/* A kept weight at (ky, kx) of channel c reads x at c * plane + ky * down + kx * across. */
static void fill_forward(Offsets &offsets, const nk_conv &l, const nk_image &in) {
  int64_t code = 0;
  for (int32_t c = 0; c < l.in_block; c++)
    for (int32_t y = 0; y < l.kernel; y++)
      for (int32_t x = 0; x < l.kernel; x++)
        offsets.put(code++, c * plane(in) + ((int64_t)y * pitch(in) + x) * l.dilation);
}

/* Pixel `a` of each stride of dx got its gradient through tap k from dy `lag` pixels on, if from any. */
INLINE bool phase(const nk_conv &l, const nk_image &out, int32_t a, int32_t k, int32_t &lag) {
  int32_t t = a + l.padding - k * l.dilation;
  if (t % l.stride) return false;
  lag = t / l.stride + out.halo;
  return true;
}
static void fill_transposed(Offsets &offsets, const nk_conv &l, const nk_image &out, int32_t a, int32_t b) {
  int64_t code = 0;
  for (int32_t c = 0; c < l.out_block; c++)
    for (int32_t y = 0; y < l.kernel; y++)
      for (int32_t x = 0; x < l.kernel; x++) {
        int32_t down, across;
        bool there = phase(l, out, a, y, down) && phase(l, out, b, x, across);
        offsets.put(code++, there ? c * plane(out) + (int64_t)down * pitch(out) + across : (int64_t)SKIP);
      }
}

/* How many parts the rows of weights are cut into, for threads to have enough to do. */
INLINE int32_t row_parts(int32_t tiles, int32_t rows) {
  if (crew.wanted < 2 || tiles >= 6 * crew.wanted || tiles < 1) return 1;
  int32_t parts = pieces(6 * crew.wanted, tiles);
  return parts < rows ? parts : rows;
}

enum { STRIP = 384 << 10 }; /* bytes of input that stay in the second cache */

/* How many rows of pixels are worked together: where nothing is cut into blocks the first cache does not hold the input
   of a tile in any case, and output that is written in one piece is written faster. */
INLINE int32_t strip(int32_t blocks, int64_t channels, int32_t row_pixels, int32_t stride, int32_t reach) {
  if (blocks > 1) return 0;
  int64_t rows = (STRIP / (channels * row_pixels * 64) - reach) / stride;
  return rows < 1 ? 1 : rows > SIDE_MAX ? (int32_t)SIDE_MAX : (int32_t)rows;
}

/* The blocks of a product: what moves from one to the next. */
struct Blocks {
  int32_t count;
  const int32_t *starts, *bases;
  int64_t starts_step, bases_step, x_step;
  bool rectify;
};

template <Source SOURCE>
static void work_run(Product &p, const Blocks &blocks, const Run &run, const float *x, float *y) {
  const int32_t first_row = p.from, end = p.to;
  for (int32_t b = 0; b < blocks.count; b++) {
    p.starts = blocks.starts + b * blocks.starts_step, p.bases = blocks.bases + b * blocks.bases_step;
    p.first = b == 0, p.rectify = blocks.rectify && b + 1 == blocks.count;
    const float *from = x + b * blocks.x_step;
    for (int32_t i = first_row; i < end; i += p.to - p.from) {
      p.from = i, p.to = run.count > 1 ? i + 1 : end;
      for (int32_t s = 0; s < run.count; s++) {
        const Spot &spot = run.spots[s];
        product_at<SOURCE>(spot)(p, from + spot.offset(p.x_row, p.x_step), y + spot.offset(p.y_row, p.y_step));
      }
    }
  }
}

static int32_t conv_forward(const nk_conv &l, const float *values, const float *bias, const nk_image &in,
                            const float *x, int32_t batch, bool rectify, float *y) {
  nk_image out = conv_output(l, in);
  const int32_t rows = strip(l.in_blocks, l.in_channels, pitch(in), l.stride, l.dilation * (l.kernel - 1));
  Tiling tiling(batch, {out.height, out.width, rows, l.stride > 1});
  Offsets offsets(tiling.panels, (int64_t)l.in_block * l.kernel * l.kernel);
  if (!offsets.there()) return NK_MEMORY;
  fill_forward(offsets, l, in);
  const int64_t x_rows = in.channels * plane(in), y_rows = out.channels * plane(out), skirt = in.halo - l.padding;
  const int32_t parts = row_parts(tiling.runs, l.out_channels);
  auto work = [&](int32_t task) {
    Run run;
    tiling.run(task / parts, run);
    const int64_t w = run.width, before = tiling.panels.before(run.panel);
    Product p = {};
    p.table = offsets.of(run.width), p.codes = l.codes, p.values = values, p.bias = bias;
    p.x_row = pitch(in) * w * l.stride, p.x_step = w * l.stride;
    p.y_plane = plane(out) * w, p.y_row = out.width * w, p.y_step = w;
    p.from = part(l.out_channels, parts, task % parts), p.to = part(l.out_channels, parts, task % parts + 1);
    Blocks blocks = {l.in_blocks, l.starts, 0, l.out_channels + 1, 0, l.in_block * plane(in) * w, rectify};
    work_run<STRAIGHT>(p, blocks, run, x + x_rows * before + skirt * (pitch(in) + 1) * w, y + y_rows * before);
  };
  parallel(tiling.runs * parts, work);
  return NK_OK;
}

/* What every phase of dx shares. */
struct Transposed {
  const nk_conv &l;
  const float *values;
  const nk_image &in, &out;
  const float *dy;
  int32_t batch;
  float *dx;
};

/* One phase of dx: its pixels (a + i * stride, b + j * stride). */
static void conv_phase(const Transposed &t, const Offsets &offsets, int32_t a, int32_t b) {
  const nk_conv &l = t.l;
  const int32_t rows = strip(l.out_blocks, l.out_channels, pitch(t.out), 1, l.dilation * (l.kernel - 1) / l.stride);
  const Field field = {pieces(t.in.height - a, l.stride), pieces(t.in.width - b, l.stride), rows, l.stride > 1};
  const Tiling tiling(t.batch, field);
  const int64_t dy_plane = plane(t.out), dx_plane = (int64_t)t.in.height * t.in.width;
  const int32_t parts = row_parts(tiling.runs, l.in_channels);
  auto work = [&](int32_t task) {
    Run run;
    tiling.run(task / parts, run);
    const int64_t w = run.width, before = tiling.panels.before(run.panel);
    Product p = {};
    p.table = offsets.of(run.width), p.values = t.values, p.codes = l.codes_t, p.places = l.places;
    p.bases_rows = l.in_block, p.bases_step = l.out_channels + 1;
    p.x_row = pitch(t.out) * w, p.x_step = w;
    p.y_plane = dx_plane * w, p.y_row = t.in.width * w * l.stride, p.y_step = w * l.stride;
    p.from = part(l.in_channels, parts, task % parts), p.to = part(l.in_channels, parts, task % parts + 1);
    const int64_t block_floats = l.out_block * dy_plane * w;
    Blocks blocks = {l.out_blocks, l.starts_t, l.starts, l.in_channels + 1, l.out_block, block_floats, false};
    const float *from = t.dy + t.out.channels * dy_plane * before;
    float *to = t.dx + t.in.channels * dx_plane * before + ((int64_t)a * t.in.width + b) * w;
    if (l.stride > 1)
      work_run<SIFTED>(p, blocks, run, from, to);
    else
      work_run<PLACED>(p, blocks, run, from, to);
  };
  parallel(tiling.runs * parts, work);
}

static int32_t conv_backward_input(const nk_conv &l, const float *values, const nk_image &in, const nk_image &out,
                                   const float *dy, int32_t batch, float *dx) {
  Panels panels(batch);
  Offsets offsets(panels, (int64_t)l.out_block * l.kernel * l.kernel);
  if (!offsets.there()) return NK_MEMORY;
  const Transposed t = {l, values, in, out, dy, batch, dx};
  for (int32_t a = 0; a < l.stride && a < in.height; a++)
    for (int32_t b = 0; b < l.stride && b < in.width; b++) {
      fill_transposed(offsets, l, out, a, b);
      conv_phase(t, offsets, a, b);
    }
  return NK_OK;
}

enum { CHUNK = 512 }; /* codes whose sums are in the first cache at once */

static void settle_sums(const float *sums, int64_t k, int32_t count, const Settle &settle) {
  float g[CHUNK];
  int32_t i = 0;
  const float *p = sums;
  for (; i + 4 <= count; i += 4, p += 4 * LANES) {
    v4 a = fold(load<vec>(p)), b = fold(load<vec>(p + LANES));
    v4 c = fold(load<vec>(p + 2 * LANES)), d = fold(load<vec>(p + 3 * LANES));
    store<v4>(g + i, nk::sums(a, b, c, d));
  }
  for (; i < count; i++, p += LANES) g[i] = sum(fold(load<vec>(p)));
  settle.run(k, count, g);
}

/* The row of code k: the last one that starts at or before it. */
INLINE int32_t row_of(const int32_t *starts, int32_t rows, int32_t k) {
  int32_t low = 0, high = rows;
  while (high - low > 1) {
    int32_t middle = (low + high) / 2;
    (starts[middle] <= k ? low : high) = middle;
  }
  return low;
}

/* A piece of the codes of one block. */
struct Chunk {
  int32_t block, first, end;
};
struct ConvChunks {
  Chunk *at;
  int32_t count;
  ConvChunks(const nk_conv &l, int32_t most) : at(0), count(0) {
    at = (Chunk *)malloc((l.kept / most + l.in_blocks + 1) * sizeof(Chunk));
    for (int32_t b = 0; at && b < l.in_blocks; b++) {
      const int32_t *starts = l.starts + (int64_t)b * (l.out_channels + 1);
      int32_t first = starts[0], kept = starts[l.out_channels] - first, n = pieces(kept, most);
      for (int32_t i = 0; i < n; i++) at[count++] = {b, first + part(kept, n, i), first + part(kept, n, i + 1)};
    }
  }
  ~ConvChunks() { free(at); }
};

static void sample_run(Sampling &p, const Run &run, const float *x, const float *dy) {
  const int32_t first_row = p.from, end = p.to;
  for (int32_t i = first_row; i < end; i += p.to - p.from) {
    p.from = i, p.to = run.count > 1 ? i + 1 : end;
    for (int32_t s = 0; s < run.count; s++) {
      const Spot &spot = run.spots[s];
      sample_at(spot)(p, x + spot.offset(p.x_row, p.x_step), dy + spot.offset(p.dy_row, p.dy_step));
    }
  }
  p.from = first_row, p.to = end;
}

static int32_t conv_backward_weight(const nk_conv &l, const nk_image &in, const float *x, const nk_image &out,
                                    const float *dy, int32_t batch, const Settle &settle) {
  const int32_t rows = strip(l.in_blocks, l.in_channels, pitch(in), l.stride, l.dilation * (l.kernel - 1));
  const Tiling tiling(batch, {out.height, out.width, rows, l.stride > 1});
  Offsets offsets(tiling.panels, (int64_t)l.in_block * l.kernel * l.kernel);
  int32_t share = crew.wanted < 2 ? (int32_t)CHUNK : pieces(l.kept, 4 * crew.wanted);
  ConvChunks chunks(l, share < 32 ? 32 : share < CHUNK ? share : (int32_t)CHUNK);
  if (!offsets.there() || !chunks.at) return NK_MEMORY;
  fill_forward(offsets, l, in);
  const int64_t x_rows = in.channels * plane(in), dy_rows = out.channels * plane(out), skirt = in.halo - l.padding;
  auto work = [&](int32_t task) {
    const Chunk &chunk = chunks.at[task];
    float sums[CHUNK * LANES];
    memset(sums, 0, (size_t)(chunk.end - chunk.first) * LANES * sizeof(float));
    Sampling p = {};
    p.starts = l.starts + (int64_t)chunk.block * (l.out_channels + 1), p.codes = l.codes;
    p.first = chunk.first, p.end = chunk.end, p.sums = sums;
    p.from = row_of(p.starts, l.out_channels, p.first), p.to = row_of(p.starts, l.out_channels, p.end - 1) + 1;
    for (int32_t r = 0; r < tiling.runs; r++) {
      Run run;
      tiling.run(r, run);
      const int64_t w = run.width, before = tiling.panels.before(run.panel);
      p.table = offsets.of(run.width);
      p.x_row = pitch(in) * w * l.stride, p.x_step = w * l.stride;
      p.dy_plane = plane(out) * w, p.dy_row = pitch(out) * w, p.dy_step = w;
      const float *from = x + x_rows * before + (skirt * (pitch(in) + 1) + chunk.block * l.in_block * plane(in)) * w;
      sample_run(p, run, from, dy + dy_rows * before + (int64_t)out.halo * (pitch(out) + 1) * w);
    }
    settle_sums(sums, chunk.first, chunk.end - chunk.first, settle);
  };
  parallel(chunks.count, work);
  return NK_OK;
}

} // namespace nk

extern "C" int32_t nk_conv_check(const nk_conv *layer) { return nk::conv_check(*layer); }

extern "C" int32_t nk_conv_forward(const nk_conv *layer, const float *values, const float *bias, const nk_image *in,
                                   const float *x, int32_t batch, int32_t relu, float *y) {
  if (!nk::conv_input_fits(*layer, *in) || batch < 1) return NK_SHAPE;
  return nk::conv_forward(*layer, values, bias, *in, x, batch, relu != 0, y);
}

extern "C" int32_t nk_conv_backward_input(const nk_conv *layer, const float *values, const nk_image *in,
                                          const nk_image *out, const float *dy, int32_t batch, float *dx) {
  const int32_t halo = layer->dilation * (layer->kernel - 1) - layer->padding;
  if (!nk::conv_input_fits(*layer, *in) || !nk::conv_output_fits(*layer, *in, *out) || batch < 1) return NK_SHAPE;
  if (out->halo < halo) return NK_SHAPE;
  return nk::conv_backward_input(*layer, values, *in, *out, dy, batch, dx);
}

extern "C" int32_t nk_conv_backward_weight(const nk_conv *layer, float *values, const nk_image *in, const float *x,
                                           const nk_image *out, const float *dy, int32_t batch, float *dvalues,
                                           const nk_update *update) {
  if (!nk::conv_input_fits(*layer, *in) || !nk::conv_output_fits(*layer, *in, *out) || batch < 1) return NK_SHAPE;
  if (!nk::settles(dvalues, update)) return NK_SHAPE;
  return nk::conv_backward_weight(*layer, *in, x, *out, dy, batch, nk::Settle(values, dvalues, update));
}
#endif
