/* Pools over planes, each on its own: the maximum with its place, and the mean. */
#ifndef NESTLING_WINDOWS_POOL_H
#define NESTLING_WINDOWS_POOL_H

namespace nk {

/* One line of maxima. Of equal values the first; no number wins over every number, and the last of them. K and S: kernel
   and stride along both sides where they are known, else 0. */
template <int K, int S, bool PLACES>
static void most_line(const nk_window &w, const float *__restrict x, int32_t top, float *__restrict y,
                      int32_t *__restrict places) {
  const int32_t kernel_y = K ? K : w.kernel_y, kernel_x = K ? K : w.kernel_x, step = S ? S : w.stride_x;
  for (int32_t j = 0; j < w.out_width; j++) {
    int32_t place = top + j * step;
    float most = x[place];
    for (int32_t a = 0; a < kernel_y; a++)
      for (int32_t b = 0; b < kernel_x; b++) {
        int32_t at = top + j * step + a * w.width + b;
        float value = x[at];
        bool wins = (value > most) | (value != value);
        most = wins ? value : most;
        place = wins ? at : place;
      }
    y[j] = most;
    if (PLACES) places[j] = place;
  }
}

template <int K, int S> static void most_plane(const nk_window &w, const float *x, float *y, int32_t *places) {
  for (int32_t i = 0; i < w.out_height; i++) {
    int32_t top = i * w.stride_y * w.width, at = i * w.out_width;
    if (places)
      most_line<K, S, true>(w, x, top, y + at, places + at);
    else
      most_line<K, S, false>(w, x, top, y + at, nullptr);
  }
}

/* The windows of a mean along one side: torch's where they share a length as evenly as they can. */
struct Span {
  int32_t first, last;
  Span(bool even, int32_t i, int32_t length, int32_t out, int32_t stride, int32_t kernel) {
    first = even ? (int32_t)((int64_t)i * length / out) : i * stride;
    last = even ? (int32_t)((((int64_t)i + 1) * length + out - 1) / out) : first + kernel;
  }
};

INLINE float run_sum(const float *x, int32_t length) {
  float total = 0;
  int32_t i = 0;
  if (length >= LANES) {
    vec all = load<vec>(x);
    for (i = LANES; i + LANES <= length; i += LANES) all += load<vec>(x + i);
    total = sum(fold(all));
  }
  for (; i < length; i++) total += x[i];
  return total;
}

template <class Each> static void each_mean(const nk_window &w, bool even, const Each &each) {
  for (int32_t i = 0; i < w.out_height; i++) {
    Span down(even, i, w.height, w.out_height, w.stride_y, w.kernel_y);
    for (int32_t j = 0; j < w.out_width; j++) {
      Span along(even, j, w.width, w.out_width, w.stride_x, w.kernel_x);
      each(i * w.out_width + j, down, along, (float)((int64_t)(down.last - down.first) * (along.last - along.first)));
    }
  }
}

static void mean_plane(const nk_window &w, bool even, const float *x, float *y) {
  each_mean(w, even, [&](int32_t at, Span down, Span along, float count) {
    float total = 0;
    for (int32_t a = down.first; a < down.last; a++)
      total += run_sum(x + (int64_t)a * w.width + along.first, along.last - along.first);
    y[at] = total / count;
  });
}

static void spread_plane(const nk_window &w, bool even, const float *dy, float *dx) {
  clear(dx, (int64_t)w.height * w.width);
  each_mean(w, even, [&](int32_t at, Span down, Span along, float count) {
    float part = dy[at] / count;
    for (int32_t a = down.first; a < down.last; a++) {
      float *row = dx + (int64_t)a * w.width;
      for (int32_t b = along.first; b < along.last; b++) row[b] += part;
    }
  });
}

template <class One> static void each_plane(const nk_window &w, int32_t planes, const One &one) {
  enum { BLOCK = 16 };
  int64_t in = (int64_t)w.height * w.width, out = (int64_t)w.out_height * w.out_width;
  auto task = [&](int32_t block) {
    for (int32_t p = block * BLOCK; p < planes && p - block * BLOCK < BLOCK; p++) one(p * in, p * out);
  };
  int32_t blocks = planes / BLOCK + (planes % BLOCK != 0);
  if (in * planes > FEW)
    parallel(blocks, task);
  else
    for (int32_t block = 0; block < blocks; block++) task(block);
}

INLINE bool pools(const nk_window *w, int32_t planes) {
  return slides(w, planes) && !w->pad_y && !w->pad_x && planes < INT32_MAX - 16;
}

INLINE bool means(const nk_window *w, int32_t planes, int32_t even) {
  return even ? sound(w, planes) && planes < INT32_MAX - 16 : pools(w, planes);
}

} // namespace nk

extern "C" int32_t nk_most_forward(const nk_window *window, int32_t planes, const float *x, float *y, int32_t *places) {
  if (!nk::pools(window, planes) || !x || !y) return NK_SHAPE;
  const nk_window w = *window;
  bool square = w.kernel_y == w.kernel_x && w.stride_y == w.stride_x;
  auto one = square && w.kernel_x == 2 && w.stride_x == 2   ? nk::most_plane<2, 2>
             : square && w.kernel_x == 3 && w.stride_x == 2 ? nk::most_plane<3, 2>
                                                            : nk::most_plane<0, 0>;
  nk::each_plane(w, planes, [&](int64_t in, int64_t out) { one(w, x + in, y + out, places ? places + out : nullptr); });
  return NK_OK;
}

extern "C" int32_t nk_most_backward(const nk_window *window, int32_t planes, const float *dy, const int32_t *places,
                                    float *dx) {
  if (!nk::pools(window, planes) || !dy || !places || !dx) return NK_SHAPE;
  const nk_window w = *window;
  const uint32_t pixels = (uint32_t)w.height * (uint32_t)w.width;
  int32_t lost = 0;
  nk::each_plane(w, planes, [&](int64_t in, int64_t out) {
    nk::clear(dx + in, pixels);
    for (int64_t i = out; i < out + (int64_t)w.out_height * w.out_width; i++) {
      if ((uint32_t)places[i] < pixels)
        dx[in + places[i]] += dy[i];
      else
        __atomic_store_n(&lost, 1, __ATOMIC_RELAXED);
    }
  });
  return lost ? NK_INDEX : NK_OK;
}

extern "C" int32_t nk_mean_forward(const nk_window *window, int32_t planes, int32_t even, const float *x, float *y) {
  if (!nk::means(window, planes, even) || !x || !y) return NK_SHAPE;
  const nk_window w = *window;
  nk::each_plane(w, planes, [&](int64_t in, int64_t out) { nk::mean_plane(w, even, x + in, y + out); });
  return NK_OK;
}

extern "C" int32_t nk_mean_backward(const nk_window *window, int32_t planes, int32_t even, const float *dy, float *dx) {
  if (!nk::means(window, planes, even) || !dy || !dx) return NK_SHAPE;
  const nk_window w = *window;
  nk::each_plane(w, planes, [&](int64_t in, int64_t out) { nk::spread_plane(w, even, dy + out, dx + in); });
  return NK_OK;
}
#endif
