/* Between torch's layout and panels. */
#ifndef NESTLING_PANELS_H
#define NESTLING_PANELS_H

namespace nk {

INLINE bool sound(const nk_image *i, int32_t batch) {
  return batch > 0 && i->channels > 0 && i->height > 0 && i->width > 0 && i->halo >= 0;
}
INLINE int64_t plane(const nk_image &i) { return (int64_t)(i.height + 2 * i.halo) * (i.width + 2 * i.halo); }

/* A block of 4 by 4, turned. */
INLINE void turn(const float *from, int64_t pitch, float *to, int64_t step) {
  v4 a = load<v4>(from), b = load<v4>(from + pitch), c = load<v4>(from + 2 * pitch), d = load<v4>(from + 3 * pitch);
  v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  v4 ba = __builtin_shufflevector(a, b, 2, 6, 3, 7), dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<v4>(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store<v4>(to + step, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store<v4>(to + 2 * step, __builtin_shufflevector(ba, dc, 0, 1, 4, 5));
  store<v4>(to + 3 * step, __builtin_shufflevector(ba, dc, 2, 3, 6, 7));
}

/* `length` consecutive values of `samples` samples (pitch apart) to `length` rows of a panel, and back: 16 rows at a
   time, so that each is in the cache until it is whole. */
INLINE void pack_run(const float *x, int64_t pitch, int32_t samples, int64_t length, float *panel, int32_t width) {
  for (int64_t from = 0; from < length; from += 16) {
    int64_t to = from + 16 < length ? from + 16 : length;
    int32_t b = 0;
    for (; b + 4 <= samples; b += 4) {
      int64_t i = from;
      for (; i + 4 <= to; i += 4) turn(x + b * pitch + i, pitch, panel + i * width + b, width);
      for (; i < to; i++)
        for (int32_t j = b; j < b + 4; j++) panel[i * width + j] = x[j * pitch + i];
    }
    for (; b < width; b++)
      for (int64_t i = from; i < to; i++) panel[i * width + b] = b < samples ? x[b * pitch + i] : 0;
  }
}

INLINE void unpack_run(const float *panel, int32_t width, int64_t length, float *x, int64_t pitch, int32_t samples) {
  for (int64_t from = 0; from < length; from += 16) {
    int64_t to = from + 16 < length ? from + 16 : length;
    int32_t b = 0;
    for (; b + 4 <= samples; b += 4) {
      int64_t i = from;
      for (; i + 4 <= to; i += 4) turn(panel + i * width + b, width, x + b * pitch + i, pitch);
      for (; i < to; i++)
        for (int32_t j = b; j < b + 4; j++) x[j * pitch + i] = panel[i * width + j];
    }
    for (; b < samples; b++)
      for (int64_t i = from; i < to; i++) x[b * pitch + i] = panel[i * width + b];
  }
}

/* Set the border of one channel of a panel to zero. */
INLINE void clear_halo(const nk_image *i, float *channel, int32_t width) {
  int64_t line = (int64_t)(i->width + 2 * i->halo) * width, side = (int64_t)i->halo * width;
  if (!i->halo) return;
  memset(channel, 0, line * i->halo * sizeof(float));
  memset(channel + line * (i->height + i->halo), 0, line * i->halo * sizeof(float));
  for (int32_t y = 0; y < i->height; y++) {
    float *row = channel + line * (y + i->halo);
    memset(row, 0, side * sizeof(float));
    memset(row + line - side, 0, side * sizeof(float));
  }
}

/* Where the inside of a channel begins, in floats. */
INLINE int64_t inside(const nk_image *i, int32_t width) {
  return (int64_t)i->halo * (i->width + 2 * i->halo + 1) * width;
}

template <class Run> static void each_run(const nk_image *image, int32_t batch, const Run &run) {
  const nk_image &i = *image;
  Panels panels(batch);
  int64_t pixels = (int64_t)i.height * i.width, line = i.width + 2 * i.halo;
  for (int32_t p = 0; p < panels.count(); p++) {
    int32_t width = panels.width(p);
    int64_t before = panels.before(p), rows = i.channels * plane(i);
    int32_t samples = batch - before < width ? batch - before : width;
    if (!i.halo) { /* everything is one run */
      run(before, samples, 0, pixels * i.channels, before * rows, width);
      continue;
    }
    for (int32_t c = 0; c < i.channels; c++)
      for (int32_t y = 0; y < i.height; y++)
        run(before, samples, pixels * c + y * i.width, i.width,
            before * rows + c * plane(i) * width + inside(image, width) + y * line * width, width);
  }
}

} // namespace nk

extern "C" int32_t nk_pack(const nk_image *image, int32_t batch, const float *x, float *panels) {
  if (!nk::sound(image, batch)) return NK_SHAPE;
  int64_t pitch = (int64_t)image->channels * image->height * image->width;
  nk::Panels all(batch);
  if (image->halo)
    for (int32_t p = 0; p < all.count(); p++)
      for (int32_t c = 0; c < image->channels; c++) {
        int64_t rows = nk::plane(*image);
        nk::clear_halo(image, panels + all.before(p) * rows * image->channels + c * rows * all.width(p), all.width(p));
      }
  auto run = [&](int64_t first, int32_t samples, int64_t at, int64_t length, int64_t to, int32_t width) {
    nk::pack_run(x + first * pitch + at, pitch, samples, length, panels + to, width);
  };
  nk::each_run(image, batch, run);
  return NK_OK;
}

extern "C" int32_t nk_unpack(const nk_image *image, int32_t batch, const float *panels, float *x) {
  if (!nk::sound(image, batch)) return NK_SHAPE;
  int64_t pitch = (int64_t)image->channels * image->height * image->width;
  auto run = [&](int64_t first, int32_t samples, int64_t at, int64_t length, int64_t to, int32_t width) {
    nk::unpack_run(panels + to, width, length, x + first * pitch + at, pitch, samples);
  };
  nk::each_run(image, batch, run);
  return NK_OK;
}
#endif
