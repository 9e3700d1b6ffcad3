/* A convolution of few channels with the pool behind it, channel by channel, so that what the pool is of never leaves the
   near caches: forward, and the gradient of its weights where none of its input is wanted. Cost: as both apart without the
   passes over memory between them. Memory: 64 KiB of stack a thread, and as much for sums. */
#ifndef NESTLING_CONV_POOL_H
#define NESTLING_CONV_POOL_H

namespace nk {

enum { READ_MAX = 4, PLANE_MAX = 1024 }; /* channels that are read, and pixels that are pooled */

struct alignas(64) Plane {
  float at[PLANE_MAX * 16];
};

INLINE bool pools_at_once(const nk_conv &l, const nk_image &in, const nk_image &made, int32_t batch, int32_t kernel,
                          const nk_image &to) {
  const nk_image out = conv_output(l, in);
  return l.in_channels <= READ_MAX && plane(out) <= PLANE_MAX && l.kernel * l.kernel * l.in_channels <= CHUNK &&
         conv_output_fits(l, in, made) && pools(&made, &to, batch, kernel);
}

static int32_t conv_pool_forward(const nk_conv &l, const float *values, const float *bias, const nk_image &in,
                                 const float *x, const PoolCall &pool) {
  const nk_image out = conv_output(l, in);
  const Tiling tiling(pool.batch, {out.height, out.width, SIDE_MAX, l.stride > 1});
  Offsets offsets(tiling.panels, (int64_t)l.in_block * l.kernel * l.kernel);
  if (!offsets.there()) return NK_MEMORY;
  fill_forward(offsets, l, in);
  const int64_t x_rows = in.channels * plane(in), skirt = in.halo - l.padding;
  auto work = [&](int32_t channel) {
    Plane made;
    int32_t task = 0;
    for (int32_t panel = 0; panel < tiling.panels.count(); panel++) {
      const int64_t w = tiling.panels.width(panel), before = tiling.panels.before(panel);
      const float *from = x + x_rows * before + skirt * (pitch(in) + 1) * w;
      for (int32_t end = task + tiling.cut(panel).runs; task < end; task++) {
        Run run;
        tiling.run(task, run);
        Product p = {};
        p.table = offsets.of(run.width), p.codes = l.codes, p.values = values, p.bias = bias;
        p.x_row = pitch(in) * w * l.stride, p.x_step = w * l.stride;
        p.y_plane = 0, p.y_row = out.width * w, p.y_step = w;
        p.from = channel, p.to = channel + 1;
        const Blocks blocks = {l.in_blocks, l.starts, 0, l.out_channels + 1, 0, l.in_block * plane(in) * w, false};
        work_run<STRAIGHT>(p, blocks, run, from, made.at);
      }
      pool_panel<false>(pool, (int32_t)w, before, channel, (const float *)made.at);
    }
  };
  parallel(l.out_channels, work);
  return NK_OK;
}

static int32_t conv_pool_backward(const nk_conv &l, const nk_image &in, const float *x, const PoolCall &pool,
                                  const Settle &settle) {
  const nk_image out = conv_output(l, in);
  const Tiling tiling(pool.batch, {out.height, out.width, SIDE_MAX, l.stride > 1});
  Offsets offsets(tiling.panels, (int64_t)l.in_block * l.kernel * l.kernel);
  if (!offsets.there()) return NK_MEMORY;
  fill_forward(offsets, l, in);
  const int64_t x_rows = in.channels * plane(in), skirt = in.halo - l.padding;
  auto work = [&](int32_t channel) {
    Plane dy;
    alignas(64) float sums[CHUNK * LANES];
    int32_t task = 0, kept = 0;
    const int32_t *starts = l.starts + channel;
    for (int32_t b = 0; b < l.in_blocks; b++, starts += l.out_channels + 1) kept += starts[1] - starts[0];
    memset(sums, 0, (size_t)kept * LANES * sizeof(float));
    for (int32_t panel = 0; panel < tiling.panels.count(); panel++) {
      const int64_t w = tiling.panels.width(panel), before = tiling.panels.before(panel);
      pool_panel<true>(pool, (int32_t)w, before, channel, dy.at);
      for (int32_t end = task + tiling.cut(panel).runs; task < end; task++) {
        Run run;
        tiling.run(task, run);
        float *sum = sums;
        for (int32_t b = 0; b < l.in_blocks; b++) {
          Sampling p = {};
          p.starts = l.starts + (int64_t)b * (l.out_channels + 1), p.codes = l.codes, p.table = offsets.of(run.width);
          p.first = p.starts[channel], p.end = p.starts[channel + 1], p.from = channel, p.to = channel + 1;
          p.x_row = pitch(in) * w * l.stride, p.x_step = w * l.stride;
          p.dy_plane = 0, p.dy_row = out.width * w, p.dy_step = w, p.sums = sum;
          const float *from = x + x_rows * before + (skirt * (pitch(in) + 1) + b * l.in_block * plane(in)) * w;
          sample_run(p, run, from, dy.at);
          sum += (int64_t)(p.end - p.first) * LANES;
        }
      }
    }
    const float *sum = sums;
    starts = l.starts + channel;
    for (int32_t b = 0; b < l.in_blocks; b++, starts += l.out_channels + 1) {
      settle_sums(sum, starts[0], starts[1] - starts[0], settle);
      sum += (int64_t)(starts[1] - starts[0]) * LANES;
    }
  };
  parallel(l.out_channels, work);
  return NK_OK;
}

} // namespace nk

extern "C" int32_t nk_conv_pool_forward(const nk_conv *layer, const float *values, const float *bias,
                                        const nk_image *in, const float *x, int32_t batch, const nk_image *made,
                                        int32_t kernel, int32_t relu, const nk_image *to, float *out, uint8_t *places) {
  if (!nk::conv_input_fits(*layer, *in) || !nk::pools_at_once(*layer, *in, *made, batch, kernel, *to)) return NK_SHAPE;
  const nk::PoolCall pool = {made, to, made, kernel, relu, batch, nullptr, nullptr, nullptr, out, nullptr, places};
  return nk::conv_pool_forward(*layer, values, bias, *in, x, pool);
}

extern "C" int32_t nk_conv_pool_backward(const nk_conv *layer, float *values, const nk_image *in, const float *x,
                                         int32_t batch, const nk_image *made, int32_t kernel, int32_t relu,
                                         const nk_image *to, const float *out, const uint8_t *places,
                                         const float *dout, float *dbias, float *dvalues, const nk_update *update) {
  if (!nk::conv_input_fits(*layer, *in) || !nk::pools_at_once(*layer, *in, *made, batch, kernel, *to)) return NK_SHAPE;
  if (!nk::settles(dvalues, update) || (kernel > 1 && !places)) return NK_SHAPE;
  const nk::PoolCall pool = {made, to, made, kernel, relu, batch, nullptr, out, dout, nullptr, dbias, (uint8_t *)places};
  return nk::conv_pool_backward(*layer, *in, x, pool, nk::Settle(values, dvalues, update));
}
#endif
