/* Windows that slide over planes, laid out as columns of a matrix and added back, so that a dense convolution is a matrix
   product. Activations lie as [samples][channels][height][width] here; there are no panels. */
#ifndef NESTLING_WINDOWS_H
#define NESTLING_WINDOWS_H

namespace nk {

enum { LENGTH_MAX = 1 << 24, FEW = 1 << 15 };
const double ALL_MAX = 1e15;

/* Where sizes are what they are said to be, no product of them overflows below. */
INLINE bool sound(const nk_window *w, int32_t samples) {
  if (!w || samples < 1 || w->channels < 1 || w->held < w->channels) return false;
  const int32_t sides[] = {w->height, w->width, w->out_height, w->out_width, w->kernel_y, w->kernel_x};
  for (int32_t side : sides)
    if (side < 1 || side > LENGTH_MAX) return false;
  if ((int64_t)w->height * w->width > INT32_MAX || (int64_t)w->out_height * w->out_width > INT32_MAX ||
      (int64_t)w->kernel_y * w->kernel_x > INT32_MAX)
    return false;
  double all = (double)w->kernel_y * w->kernel_x * w->out_height * w->out_width; /* exact enough for a bound */
  if (all * w->channels * samples > ALL_MAX || (double)w->height * w->width * w->held * samples > ALL_MAX) return false;
  return w->stride_y > 0 && w->stride_x > 0 && w->pad_y >= 0 && w->pad_y < w->kernel_y && w->pad_x >= 0 &&
         w->pad_x < w->kernel_x;
}

/* Do the windows fit, and are there as many as there is room for? */
INLINE bool slides(const nk_window *w, int32_t samples) {
  if (!sound(w, samples)) return false;
  int64_t down = (int64_t)w->height + 2 * (int64_t)w->pad_y - w->kernel_y;
  int64_t along = (int64_t)w->width + 2 * (int64_t)w->pad_x - w->kernel_x;
  return down >= 0 && along >= 0 && down / w->stride_y + 1 == w->out_height && along / w->stride_x + 1 == w->out_width;
}

/* Those places of an output's side whose window has something at `tap`: from `first` up to `last`. */
struct Reach {
  int32_t first, last;
  Reach(int32_t length, int32_t out, int32_t stride, int32_t pad, int32_t tap) {
    int32_t before = pad - tap; /* the first of these places lies so far outside */
    first = before > 0 ? (before + stride - 1) / stride : 0;
    int64_t behind = ((int64_t)length + before + stride - 1) / stride;
    last = behind < 0 ? 0 : behind < out ? (int32_t)behind : out;
    if (first > last) first = last;
  }
};

INLINE void clear(float *p, int64_t length) {
  for (int64_t i = 0; i < length; i++) p[i] = 0;
}

/* One tap of all windows over one plane. */
struct Tap {
  const nk_window &w;
  Reach down, along;
  int64_t pixels, shift; /* from a place of the output to what it reads, where strides are 1 and sides the same */
  int32_t y, x;          /* of what the output's first place would read */
  bool same;

  Tap(const nk_window &w, int32_t ky, int32_t kx)
      : w(w), down(w.height, w.out_height, w.stride_y, w.pad_y, ky), along(w.width, w.out_width, w.stride_x, w.pad_x, kx),
        pixels((int64_t)w.out_height * w.out_width), y(ky - w.pad_y), x(kx - w.pad_x),
        same(w.stride_y == 1 && w.stride_x == 1 && w.out_width == w.width && w.out_height == w.height) {
    shift = (int64_t)y * w.width + x;
  }
  const float *line(const float *plane, int32_t i) const {
    return plane + ((int64_t)i * w.stride_y + y) * w.width + x;
  }
  /* Zero where a window hangs over an edge. */
  void edges(float *column) const {
    clear(column, (int64_t)down.first * w.out_width);
    clear(column + (int64_t)down.last * w.out_width, pixels - (int64_t)down.last * w.out_width);
    for (int32_t i = down.first; i < down.last; i++) {
      float *row = column + (int64_t)i * w.out_width;
      for (int32_t j = 0; j < along.first; j++) row[j] = 0;
      for (int32_t j = along.last; j < w.out_width; j++) row[j] = 0;
    }
  }
  /* Where strides are 1 and sides the same, a tap is one shifted run; what it wraps around is zero in the column. */
  int64_t from() const { return (int64_t)down.first * w.width + along.first; }
  int64_t to() const { return (int64_t)(down.last - 1) * w.width + along.last; }
  bool empty() const { return down.first >= down.last || along.first >= along.last; }

  void take(const float *plane, float *column) const {
    if (same && !empty()) {
      memcpy(column + from(), plane + from() + shift, (to() - from()) * sizeof(float));
    } else {
      for (int32_t i = down.first; i < down.last; i++) {
        const float *row = line(plane, i);
        float *into = column + (int64_t)i * w.out_width;
        if (w.stride_x == 1)
          for (int32_t j = along.first; j < along.last; j++) into[j] = row[j];
        else
          for (int32_t j = along.first; j < along.last; j++) into[j] = row[(int64_t)j * w.stride_x];
      }
    }
    edges(column);
  }

  void give(float *column, float *plane) const {
    if (empty()) return;
    if (same) {
      edges(column);
      const float *__restrict from_column = column + from();
      float *__restrict into = plane + from() + shift;
      int64_t length = to() - from();
      for (int64_t i = 0; i < length; i++) into[i] += from_column[i];
      return;
    }
    for (int32_t i = down.first; i < down.last; i++) {
      float *__restrict row = (float *)line(plane, i);
      const float *__restrict read = column + (int64_t)i * w.out_width;
      if (w.stride_x == 1)
        for (int32_t j = along.first; j < along.last; j++) row[j] += read[j];
      else
        for (int32_t j = along.first; j < along.last; j++) row[(int64_t)j * w.stride_x] += read[j];
    }
  }
};

/* Every tap of every channel, and of every sample where its plane and its column begin. */
template <class Each> static void each_column(const nk_window &w, int32_t samples, const Each &each) {
  int64_t pixels = (int64_t)w.out_height * w.out_width, plane = (int64_t)w.height * w.width;
  auto task = [&](int32_t c) {
    int64_t column = (int64_t)c * w.kernel_y * w.kernel_x * samples * pixels;
    for (int32_t ky = 0; ky < w.kernel_y; ky++)
      for (int32_t kx = 0; kx < w.kernel_x; kx++) {
        Tap tap(w, ky, kx);
        for (int32_t s = 0; s < samples; s++, column += pixels) each(tap, ((int64_t)s * w.held + c) * plane, column);
      }
  };
  if (pixels * w.kernel_y * w.kernel_x * samples * w.channels > FEW)
    parallel(w.channels, task);
  else
    for (int32_t c = 0; c < w.channels; c++) task(c);
}

} // namespace nk

extern "C" int32_t nk_window_take(const nk_window *window, int32_t samples, const float *x, float *columns) {
  if (!nk::slides(window, samples) || !x || !columns) return NK_SHAPE;
  const nk_window w = *window;
  nk::each_column(w, samples, [&](const nk::Tap &tap, int64_t plane, int64_t column) {
    tap.take(x + plane, columns + column);
  });
  return NK_OK;
}

extern "C" int32_t nk_window_give(const nk_window *window, int32_t samples, float *columns, float *dx) {
  if (!nk::slides(window, samples) || !dx || !columns) return NK_SHAPE;
  const nk_window w = *window;
  for (int32_t s = 0; s < samples; s++)
    nk::clear(dx + (int64_t)s * w.held * w.height * w.width, (int64_t)w.channels * w.height * w.width);
  nk::each_column(w, samples, [&](const nk::Tap &tap, int64_t plane, int64_t column) {
    tap.give(columns + column, dx + plane);
  });
  return NK_OK;
}
#endif
