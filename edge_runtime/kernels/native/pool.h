/* ReLU and max pool in one pass. Where a gradient will follow, the place of each maximum is kept as a byte, so that what was
   pooled is not read again. Ties go to the first, as in torch. Cost: one pass over the larger image. */
#ifndef NESTLING_POOL_H
#define NESTLING_POOL_H

namespace nk {

enum { POOLED_MAX = 16 }; /* a place within a window is a byte */

struct PoolCall {
  const nk_image *from, *to, *into;
  int32_t kernel, relu, batch;
  const float *y, *out, *dout;
  float *result, *dbias;
  uint8_t *places; /* [channels][pixels of `to`][width of the panel] in panels; null: none are kept */
};

/* Floats of one channel and of one line of an image, for a panel of width W. */
template <int W> struct Grid {
  int64_t line, channel, start;
  explicit Grid(const nk_image *i)
      : line((int64_t)(i->width + 2 * i->halo) * W), channel(plane(*i) * W), start(inside(i, W)) {}
};

/* Whole numbers and bytes, lane for lane. */
template <class V> struct Lanes;
#define NK_LANES(V, COUNT)                                                                                             \
  template <> struct Lanes<V> {                                                                                        \
    typedef int32_t Ints __attribute__((vector_size(4 * COUNT)));                                                      \
    typedef uint8_t Bytes __attribute__((vector_size(COUNT)));                                                         \
  };
NK_LANES(v4, 4)
NK_LANES(v8, 8)
NK_LANES(v16, 16)
#undef NK_LANES

/* Of each lane the place of the largest value of a window so far. */
template <int W> struct Places {
  typedef Wide<W> Values;
  typedef typename Values::V V;
  typedef typename Lanes<V>::Ints I;
  typedef typename Lanes<V>::Bytes B;
  static constexpr int WIDTH = Values::WIDTH, COUNT = Values::COUNT;
  I at[COUNT];
  MEMBER void clear() {
    for (int i = 0; i < COUNT; i++) at[i] = I{};
  }
  MEMBER void raise(Values &most, const float *p, int32_t place) {
    for (int i = 0; i < COUNT; i++) {
      V other = load<V>(p + i * WIDTH);
      I wins = (I)(other > most.v[i]) | (I)(other != other);
      at[i] = wins ? I{} + place : at[i];
      most.v[i] = wins ? other : most.v[i];
    }
  }
  MEMBER void write(uint8_t *p) const {
    for (int i = 0; i < COUNT; i++) {
      B bytes = __builtin_convertvector(at[i], B);
      memcpy(p + i * WIDTH, &bytes, sizeof bytes);
    }
  }
  MEMBER void read(const uint8_t *p) {
    for (int i = 0; i < COUNT; i++) {
      B bytes;
      memcpy(&bytes, p + i * WIDTH, sizeof bytes);
      at[i] = __builtin_convertvector(bytes, I);
    }
  }
  MEMBER void give(const Values &left, int32_t place, float *p) const {
    for (int i = 0; i < COUNT; i++) {
      I here = (I)(at[i] == I{} + place);
      store<V>(p + i * WIDTH, here ? left.v[i] : V{});
    }
  }
};

/* K: the kernel where it is known, else 0. */
template <int W, int K> static void pool_channel(const PoolCall &call, int64_t before, int32_t c, const float *y) {
  const int32_t k = K ? K : call.kernel;
  Grid<W> from(call.from), to(call.to);
  float *out = call.result + before * call.to->channels * plane(*call.to) + c * to.channel;
  uint8_t *places = call.places;
  if (places) places += (before * call.to->channels + (int64_t)c * W) * call.to->height * call.to->width;
  clear_halo(call.to, out, W);
  out += to.start;
  for (int32_t i = 0; i < call.to->height; i++)
    for (int32_t j = 0; j < call.to->width; j++) {
      const float *corner = y + i * k * from.line + (int64_t)j * k * W;
      Wide<W> most;
      most.read(corner);
      if (K == 1) {
        if (call.relu) most.rectify();
        most.write(out + i * to.line + j * W);
        continue;
      }
      Places<W> at;
      at.clear();
      for (int32_t a = 0; a < k; a++)
        for (int32_t b = 0; b < k; b++) at.raise(most, corner + a * from.line + b * W, a * k + b);
      if (call.relu) most.rectify();
      most.write(out + i * to.line + j * W);
      if (places) at.write(places), places += W;
    }
}

/* The gradient of a window goes to the value that was its maximum, zero to the others. */
template <int W, int K> static void unpool_channel(const PoolCall &call, int64_t before, int32_t c, float *dy) {
  Grid<W> to(call.to), into(call.into);
  int64_t pixels = (int64_t)call.to->height * call.to->width;
  const float *out = call.out + before * call.to->channels * plane(*call.to) + c * to.channel + to.start;
  const float *dout = call.dout + (before * call.to->channels + (int64_t)c * W) * pixels;
  const uint8_t *places = call.places;
  if (K != 1) places += (before * call.to->channels + (int64_t)c * W) * pixels;
  const int32_t k = K ? K : call.kernel, rest = call.from->width - k * call.to->width;
  clear_halo(call.into, dy, W);
  dy += into.start;
  Wide<W> total;
  total.set(0);
  for (int32_t i = 0; i < call.to->height; i++) {
    for (int32_t j = 0; j < call.to->width; j++, dout += W) {
      Wide<W> left;
      left.read(dout);
      if (call.relu) left.rectify_by(out + i * to.line + j * W);
      total.add(left);
      float *corner = dy + i * k * into.line + (int64_t)j * k * W;
      if (K == 1) {
        left.write(corner);
        continue;
      }
      Places<W> at;
      at.read(places), places += W;
      for (int32_t a = 0; a < k; a++)
        for (int32_t b = 0; b < k; b++) at.give(left, a * k + b, corner + a * into.line + b * W);
    }
    for (int32_t a = 0; a < k && rest; a++) /* what no window covers */
      memset(dy + (i * k + a) * into.line + (int64_t)k * call.to->width * W, 0, sizeof(float) * rest * W);
  }
  for (int32_t i = k * call.to->height; i < call.from->height; i++)
    memset(dy + i * into.line, 0, sizeof(float) * call.from->width * W);
  if (call.dbias) call.dbias[c] += total.total();
}

/* One channel of a panel: from `values` to the result, or of its gradient from what came back to `values`. */
template <int W, bool BACK, class P> static void pool_one(const PoolCall &call, int64_t before, int32_t c, P *values) {
  if constexpr (BACK)
    (call.kernel == 1 ? unpool_channel<W, 1> : call.kernel == 2 ? unpool_channel<W, 2> : unpool_channel<W, 0>)(
        call, before, c, values);
  else
    (call.kernel == 1 ? pool_channel<W, 1> : call.kernel == 2 ? pool_channel<W, 2> : pool_channel<W, 0>)(
        call, before, c, values);
}
template <bool BACK, class P>
INLINE void pool_panel(const PoolCall &call, int32_t width, int64_t before, int32_t c, P *values) {
  (width == 16  ? pool_one<16, BACK, P>
   : width == 8 ? pool_one<8, BACK, P>
                : pool_one<4, BACK, P>)(call, before, c, values);
}

template <bool BACK> static void pool_all(const PoolCall &call) {
  Panels panels(call.batch);
  auto task = [&](int32_t c) {
    for (int32_t p = 0; p < panels.count(); p++) {
      const int64_t width = panels.width(p), before = panels.before(p);
      const nk_image &whole = BACK ? *call.into : *call.from;
      const int64_t at = (before * whole.channels + c * width) * plane(whole);
      if constexpr (BACK)
        pool_panel<true>(call, (int32_t)width, before, c, call.result + at);
      else
        pool_panel<false>(call, (int32_t)width, before, c, call.y + at);
    }
  };
  if (plane(*call.from) * call.from->channels * call.batch > 1 << 15)
    parallel(call.from->channels, task);
  else
    for (int32_t c = 0; c < call.from->channels; c++) task(c);
}

INLINE bool pools(const nk_image *from, const nk_image *to, int32_t batch, int32_t kernel) {
  return sound(from, batch) && sound(to, batch) && kernel > 0 && kernel <= POOLED_MAX && !from->halo &&
         from->channels == to->channels && from->height / kernel == to->height && from->width / kernel == to->width;
}

} // namespace nk

extern "C" int32_t nk_pool_forward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
                                   const nk_image *to, float *out, uint8_t *places) {
  if (!nk::pools(from, to, batch, kernel)) return NK_SHAPE;
  nk::pool_all<false>({from, to, nullptr, kernel, relu, batch, y, nullptr, nullptr, out, nullptr, places});
  return NK_OK;
}

extern "C" int32_t nk_pool_backward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu,
                                    const uint8_t *places, const nk_image *to, const float *out, const float *dout,
                                    const nk_image *into, float *dy, float *dbias) {
  if (!nk::pools(from, to, batch, kernel) || !nk::sound(into, batch) || into->channels != from->channels ||
      into->height != from->height || into->width != from->width || (kernel > 1 && !places))
    return NK_SHAPE;
  nk::pool_all<true>({from, to, into, kernel, relu, batch, nullptr, out, dout, dy, dbias, (uint8_t *)places});
  return NK_OK;
}
#endif
