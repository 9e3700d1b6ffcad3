/* Windows over planes against loops that say what they mean: columns, dense and depthwise convolutions, pools. */
#ifndef NESTLING_WINDOWS_TRIALS_H
#define NESTLING_WINDOWS_TRIALS_H
#include "trial.h"

inline nk_window some_window(bool pads) {
  nk_window w = {};
  w.channels = chance.in(1, 5);
  w.held = w.channels + chance.in(0, 2);
  w.kernel_y = chance.in(1, 5), w.kernel_x = chance.in(1, 5);
  w.stride_y = chance.in(1, 3), w.stride_x = chance.in(1, 3);
  w.pad_y = pads ? chance.in(0, w.kernel_y - 1) : 0, w.pad_x = pads ? chance.in(0, w.kernel_x - 1) : 0;
  w.height = chance.in(w.kernel_y, w.kernel_y + 8), w.width = chance.in(w.kernel_x, w.kernel_x + 20);
  w.out_height = (w.height + 2 * w.pad_y - w.kernel_y) / w.stride_y + 1;
  w.out_width = (w.width + 2 * w.pad_x - w.kernel_x) / w.stride_x + 1;
  return w;
}
inline size_t pixels_of(const nk_window &w) { return (size_t)w.height * (size_t)w.width; }
inline size_t places_of(const nk_window &w) { return (size_t)w.out_height * (size_t)w.out_width; }
inline size_t taps_of(const nk_window &w) { return (size_t)w.kernel_y * (size_t)w.kernel_x; }

/* Where a tap of a window stands in its plane; -1 outside. */
inline long source(const nk_window &w, size_t place, size_t tap) {
  long y = (long)(place / (size_t)w.out_width) * w.stride_y - w.pad_y + (long)(tap / (size_t)w.kernel_x);
  long x = (long)(place % (size_t)w.out_width) * w.stride_x - w.pad_x + (long)(tap % (size_t)w.kernel_x);
  return y < 0 || x < 0 || y >= w.height || x >= w.width ? -1 : y * w.width + x;
}

/* The planes that a group takes are the first of each sample's; the last sample ends with them. */
inline size_t held_floats(const nk_window &w, int batch) {
  return ((size_t)(batch - 1) * (size_t)w.held + (size_t)w.channels) * pixels_of(w);
}

inline void columns_trial(int batch) {
  trial = "columns";
  nk_window w = some_window(true);
  size_t samples = (size_t)batch, all = (size_t)w.channels * taps_of(w) * samples * places_of(w), at = 0;
  Buffer x(held_floats(w, batch), chance.coin()), columns(all, chance.coin()), dx(x.size, chance.coin());
  x.fill();
  must(nk_window_take(&w, batch, x.at, columns.at), "nk_window_take");
  std::vector<double> sums(x.size), sizes(x.size);
  for (size_t c = 0; c < (size_t)w.channels; c++)
    for (size_t t = 0; t < taps_of(w); t++)
      for (size_t s = 0; s < samples; s++)
        for (size_t p = 0; p < places_of(w); p++, at++) {
          size_t plane = (s * (size_t)w.held + c) * pixels_of(w);
          long from = source(w, p, t);
          near("column", columns.at[at], from < 0 ? 0 : x.at[plane + (size_t)from], 0, (int)c, (int)t, (int)s, (int)p);
          columns.at[at] = chance.number();
          if (from < 0) continue;
          sums[plane + (size_t)from] += columns.at[at];
          sizes[plane + (size_t)from] += fabs(columns.at[at]);
        }
  must(nk_window_give(&w, batch, columns.at, dx.at), "nk_window_give");
  for (size_t s = 0; s < samples; s++)
    for (size_t i = 0; i < (size_t)w.channels * pixels_of(w); i++) {
      size_t k = s * (size_t)w.held * pixels_of(w) + i;
      near("given back", dx.at[k], sums[k], sizes[k], (int)s, (int)i);
    }
}

/* A convolution by loops, one channel of the output from one of the input at a time. */
struct Slow {
  nk_window w;
  std::vector<double> y, y_size, dx, dx_size, dw, dw_size;
  Slow(const nk_window &w, size_t x, size_t y, size_t weights)
      : w(w), y(y), y_size(y), dx(x), dx_size(x), dw(weights), dw_size(weights) {}
  void run(size_t out, size_t plane, size_t weights, const float *x, const float *weight, const float *dy) {
    for (size_t p = 0; p < places_of(w); p++)
      for (size_t t = 0; t < taps_of(w); t++) {
        long from = source(w, p, t);
        if (from < 0) continue;
        size_t i = plane + (size_t)from, k = weights + t;
        add(y, y_size, out + p, (double)x[i] * weight[k]);
        add(dx, dx_size, i, (double)dy[out + p] * weight[k]);
        add(dw, dw_size, k, (double)dy[out + p] * x[i]);
      }
  }
  static void add(std::vector<double> &sum, std::vector<double> &size, size_t at, double term) {
    sum[at] += term;
    size[at] += fabs(term);
  }
};

/* The shortest scratch that a call takes, found by asking. */
template <class Call> size_t shortest(const Call &call) {
  size_t low = 0, high = 1 << 20; /* too short, long enough */
  Buffer room(high);
  while (high - low > 1) (call(room.at, (int32_t)((low + high) / 2)) ? low : high) = (low + high) / 2;
  return high;
}

inline void convolve(int batch, bool deep) {
  nk_window w = some_window(true);
  if (deep) w.held = w.channels;
  size_t outs = deep ? (size_t)w.channels : (size_t)chance.in(1, 11), held = outs + (deep ? 0 : (size_t)chance.in(0, 2));
  size_t samples = (size_t)(batch % 5 + 1), pixels = pixels_of(w), places = places_of(w), each = deep ? 1 : (size_t)w.channels;
  Buffer x(held_floats(w, (int)samples), chance.coin()), dx(x.size, chance.coin());
  Buffer y(((samples - 1) * held + outs) * places, chance.coin()), dy(y.size, chance.coin());
  Buffer weight(outs * each * taps_of(w), chance.coin()), dw(weight.size, chance.coin()), bias(outs), db(outs);
  x.fill(), dy.fill(), weight.fill(), bias.fill(), dw.zero(), db.zero();
  auto forward = [&](float *room, int32_t length) {
    return deep ? nk_depth_forward(&w, (int32_t)samples, x.at, weight.at, bias.at, y.at, room, length)
                : nk_dense_forward(&w, (int32_t)outs, (int32_t)held, (int32_t)samples, x.at, weight.at, bias.at, y.at,
                                   room, length);
  };
  Buffer room(shortest(forward));
  int32_t length = (int32_t)room.size;
  if (forward(room.at, length - 1) != NK_SHAPE) wrong("a scratch that is too short was taken");
  must(forward(room.at, length), "forward");
  must(deep ? nk_depth_backward(&w, (int32_t)samples, x.at, weight.at, dy.at, dx.at, dw.at, db.at, room.at, length)
            : nk_dense_backward(&w, (int32_t)outs, (int32_t)held, (int32_t)samples, x.at, weight.at, dy.at, dx.at, dw.at,
                                db.at, room.at, length),
       "backward");
  Slow slow(w, x.size, y.size, weight.size);
  for (size_t s = 0; s < samples; s++)
    for (size_t o = 0; o < outs; o++) {
      size_t out = (s * held + o) * places;
      for (size_t p = 0; p < places; p++) Slow::add(slow.y, slow.y_size, out + p, bias.at[o]);
      for (size_t c = 0; c < each; c++)
        slow.run(out, (s * (size_t)w.held + (deep ? o : c)) * pixels, (o * each + c) * taps_of(w), x.at, weight.at, dy.at);
    }
  for (size_t s = 0; s < samples; s++) {
    for (size_t k = s * held * places; k < (s * held + outs) * places; k++)
      near("output", y.at[k], slow.y[k], slow.y_size[k], (int)k);
    for (size_t k = s * (size_t)w.held * pixels; k < (s * (size_t)w.held + (size_t)w.channels) * pixels; k++)
      near("gradient of the input", dx.at[k], slow.dx[k], slow.dx_size[k], (int)k);
  }
  for (size_t k = 0; k < dw.size; k++) near("gradient of a weight", dw.at[k], slow.dw[k], slow.dw_size[k], (int)k);
  for (size_t o = 0; o < outs; o++) {
    double sum = 0, size = 0;
    for (size_t s = 0; s < samples; s++)
      for (size_t p = 0; p < places; p++) {
        float term = dy.at[(s * held + o) * places + p];
        sum += term, size += fabs(term);
      }
    near("gradient of a bias", db.at[o], sum, size, (int)o);
  }
}

inline void dense_trial(int batch) {
  trial = "dense";
  convolve(batch, false);
}

inline void depth_trial(int batch) {
  trial = "depth";
  convolve(batch, true);
}

/* From where to where an even share of a side goes. */
inline void share(int i, int length, int out, int &first, int &last) {
  first = (int)floor((double)i * length / out + 1e-9), last = (int)ceil((double)(i + 1) * length / out - 1e-9);
}

inline void window_pool_trial(int batch) {
  trial = "windows-pool";
  nk_window w = some_window(false);
  bool even = chance.coin();
  Buffer x((size_t)batch * pixels_of(w), chance.coin()), dx(x.size);
  nk_window of = w;
  if (even) of.out_height = chance.in(1, 12), of.out_width = chance.in(1, 12);
  Buffer y((size_t)batch * places_of(w)), mean((size_t)batch * places_of(of)), dy(mean.size > y.size ? mean.size : y.size);
  x.fill(), dy.fill();
  if (chance.coin()) /* some that are the same */
    for (size_t i = 0; i < x.size; i++) x.at[i] = roundf(x.at[i] * 2);
  Table<int32_t> places(std::vector<int32_t>(y.size, -1));
  must(nk_most_forward(&w, batch, x.at, y.at, places.at), "nk_most_forward");
  must(nk_most_backward(&w, batch, dy.at, places.at, dx.at), "nk_most_backward");
  std::vector<double> back(x.size), size(x.size);
  for (size_t k = 0; k < y.size; k++) {
    size_t plane = k / places_of(w) * pixels_of(w), best = (size_t)source(w, k % places_of(w), 0);
    for (size_t t = 1; t < taps_of(w); t++) {
      size_t at = (size_t)source(w, k % places_of(w), t);
      if (x.at[plane + at] > x.at[plane + best]) best = at;
    }
    near("most", y.at[k], x.at[plane + best], 0, (int)k);
    if (places.at[k] != (int32_t)best) wrong("the most of window %zu is said to be at %d", k, (int)places.at[k]);
    Slow::add(back, size, plane + best, dy.at[k]);
  }
  for (size_t k = 0; k < x.size; k++) near("back from the most", dx.at[k], back[k], size[k], (int)k);
  must(nk_mean_forward(&of, batch, even, x.at, mean.at), "nk_mean_forward");
  must(nk_mean_backward(&of, batch, even, dy.at, dx.at), "nk_mean_backward");
  back.assign(x.size, 0), size.assign(x.size, 0);
  for (size_t k = 0; k < mean.size; k++) {
    int i = (int)(k % places_of(of)) / of.out_width, j = (int)(k % places_of(of)) % of.out_width;
    int top = i * w.stride_y, bottom = top + w.kernel_y, left = j * w.stride_x, right = left + w.kernel_x;
    if (even) share(i, w.height, of.out_height, top, bottom), share(j, w.width, of.out_width, left, right);
    double total = 0, terms = 0, count = (double)(bottom - top) * (right - left);
    for (int a = top; a < bottom; a++)
      for (int b = left; b < right; b++) {
        size_t at = k / places_of(of) * pixels_of(w) + (size_t)(a * w.width + b);
        total += x.at[at] / count, terms += fabs(x.at[at] / count);
        Slow::add(back, size, at, dy.at[k] / count);
      }
    near("mean", mean.at[k], total, terms, (int)k);
  }
  for (size_t k = 0; k < x.size; k++) near("back from means", dx.at[k], back[k], size[k], (int)k);
}
#endif
