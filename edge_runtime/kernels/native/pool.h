/* ReLU and max pool in one pass, and their gradient without an index: the place of the maximum is found again from the
   values that the convolution left. Ties go to the first, as in torch. Cost: one pass over the larger image. */
#ifndef NESTLING_POOL_H
#define NESTLING_POOL_H

namespace nk {

struct PoolCall {
  const nk_image *from, *to, *into;
  int32_t kernel, relu, batch;
  const float *y, *out, *dout;
  float *result, *dbias;
};

/* Floats of one channel and of one line of an image, for a panel of width W. */
template <int W> struct Grid {
  int64_t line, channel, start;
  explicit Grid(const nk_image *i)
      : line((int64_t)(i->width + 2 * i->halo) * W), channel(plane(*i) * W), start(inside(i, W)) {}
};

/* K: the kernel where it is known, else 0. */
template <int W, int K> static void pool_channel(const PoolCall &call, int64_t before, int32_t c) {
  const int32_t k = K ? K : call.kernel;
  Grid<W> from(call.from), to(call.to);
  const float *y = call.y + before * call.from->channels * plane(*call.from) + c * from.channel;
  float *out = call.result + before * call.to->channels * plane(*call.to) + c * to.channel;
  clear_halo(call.to, out, W);
  out += to.start;
  for (int32_t i = 0; i < call.to->height; i++)
    for (int32_t j = 0; j < call.to->width; j++) {
      const float *corner = y + i * k * from.line + (int64_t)j * k * W;
      Wide<W> most;
      most.read(corner);
      for (int32_t a = 0; a < k; a++)
        for (int32_t b = 0; b < k; b++) most.raise(corner + a * from.line + b * W);
      if (call.relu) most.rectify();
      most.write(out + i * to.line + j * W);
    }
}

/* The gradient of a window goes to the first value that is the maximum (the last where that is no number), zero to the
   others. y and dy may be the same. */
template <int W, int K> static void unpool_channel(const PoolCall &call, int64_t before, int32_t c) {
  Grid<W> from(call.from), to(call.to), into(call.into);
  int64_t pixels = (int64_t)call.to->height * call.to->width;
  const float *y = call.y + before * call.from->channels * plane(*call.from) + c * from.channel;
  const float *out = call.out + before * call.to->channels * plane(*call.to) + c * to.channel + to.start;
  const float *dout = call.dout + (before * call.to->channels + c * W) * pixels;
  float *dy = call.result + before * call.into->channels * plane(*call.into) + c * into.channel;
  const int32_t k = K ? K : call.kernel, rest = call.from->width - k * call.to->width;
  clear_halo(call.into, dy, W);
  dy += into.start;
  Wide<W> total;
  total.set(0);
  for (int32_t i = 0; i < call.to->height; i++) {
    for (int32_t j = 0; j < call.to->width; j++) {
      Wide<W> most, left;
      most.read(out + i * to.line + j * W);
      left.read(dout + ((int64_t)i * call.to->width + j) * W);
      if (call.relu) left.rectify_by(out + i * to.line + j * W);
      total.add(left);
      float *corner = dy + i * k * into.line + (int64_t)j * k * W;
      const float *seen = y + i * k * from.line + (int64_t)j * k * W;
      for (int32_t a = 0; a < k; a++)
        for (int32_t b = 0; b < k; b++) {
          bool last = a + 1 == k && b + 1 == k;
          Wide<W> part = last ? left : left.where(most, seen + a * from.line + b * W);
          part.write(corner + a * into.line + b * W);
        }
    }
    for (int32_t a = 0; a < k && rest; a++) /* what no window covers */
      memset(dy + (i * k + a) * into.line + (int64_t)k * call.to->width * W, 0, sizeof(float) * rest * W);
  }
  for (int32_t i = k * call.to->height; i < call.from->height; i++)
    memset(dy + i * into.line, 0, sizeof(float) * call.from->width * W);
  if (call.dbias) call.dbias[c] += total.total();
}

template <int W, bool BACK> static void pool_one(const PoolCall &call, int64_t before, int32_t c) {
  if (call.kernel == 1)
    BACK ? unpool_channel<W, 1>(call, before, c) : pool_channel<W, 1>(call, before, c);
  else if (call.kernel == 2)
    BACK ? unpool_channel<W, 2>(call, before, c) : pool_channel<W, 2>(call, before, c);
  else
    BACK ? unpool_channel<W, 0>(call, before, c) : pool_channel<W, 0>(call, before, c);
}

template <bool BACK> static void pool_all(const PoolCall &call) {
  Panels panels(call.batch);
  auto task = [&](int32_t c) {
    for (int32_t p = 0; p < panels.count(); p++) {
      int32_t width = panels.width(p);
      auto one = width == 16 ? pool_one<16, BACK> : width == 8 ? pool_one<8, BACK> : pool_one<4, BACK>;
      one(call, panels.before(p), c);
    }
  };
  if (plane(*call.from) * call.from->channels * call.batch > 1 << 15)
    parallel(call.from->channels, task);
  else
    for (int32_t c = 0; c < call.from->channels; c++) task(c);
}

INLINE bool pools(const nk_image *from, const nk_image *to, int32_t batch, int32_t kernel) {
  return sound(from, batch) && sound(to, batch) && kernel > 0 && !from->halo && from->channels == to->channels &&
         from->height / kernel == to->height && from->width / kernel == to->width;
}

} // namespace nk

extern "C" int32_t nk_pool_forward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
                                   const nk_image *to, float *out) {
  if (!nk::pools(from, to, batch, kernel)) return NK_SHAPE;
  nk::pool_all<false>({from, to, nullptr, kernel, relu, batch, y, nullptr, nullptr, out, nullptr});
  return NK_OK;
}

extern "C" int32_t nk_pool_backward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
                                    const nk_image *to, const float *out, const float *dout, const nk_image *into,
                                    float *dy, float *dbias) {
  if (!nk::pools(from, to, batch, kernel) || !nk::sound(into, batch) || into->channels != from->channels ||
      into->height != from->height || into->width != from->width)
    return NK_SHAPE;
  nk::pool_all<true>({from, to, into, kernel, relu, batch, y, out, dout, dy, dbias});
  return NK_OK;
}
#endif
