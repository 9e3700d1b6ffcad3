/* Planes laid out for windows: with their border, and split by what a place leaves when divided by the stride, each part
   line behind line. So a tap of all windows is one shifted run of one part, whatever the size of the plane. Between the
   lines of a run lie places that mean nothing. The border at the end of one line is that at the beginning of the next. */
#ifndef NESTLING_WINDOWS_FLAT_H
#define NESTLING_WINDOWS_FLAT_H

namespace nk {

enum { MARGIN = 64 }; /* what vectors may read, or write, behind the end */

INLINE int64_t rounded(int64_t length) { return (length + 15) / 16 * 16; }

struct Flat {
  nk_window w;
  int32_t parts_y, parts_x, reach_y, reach_x, lines, pitch;
  int64_t part, plane; /* floats of a part, and of all parts of a plane */
  int64_t run, most;   /* places from the first window to the last, and where the last tap stands in the first window */

  explicit Flat(const nk_window &of) : w(of) {
    parts_y = w.kernel_y < w.stride_y ? w.kernel_y : w.stride_y;
    parts_x = w.kernel_x < w.stride_x ? w.kernel_x : w.stride_x;
    reach_y = (w.kernel_y - 1) / w.stride_y;
    reach_x = (w.kernel_x - 1) / w.stride_x;
    lines = w.out_height + reach_y;
    int32_t wide = w.out_width + reach_x;
    pitch = 1;
    for (int32_t b = 0; b < parts_x; b++) {
      Reach along(w.width, wide, w.stride_x, w.pad_x, b);
      int32_t needs = along.last > wide - along.first ? along.last : wide - along.first;
      pitch = needs > pitch ? needs : pitch;
    }
    part = (int64_t)lines * pitch + reach_x;
    plane = part * parts_y * parts_x;
    run = (int64_t)(w.out_height - 1) * pitch + w.out_width;
    most = (int64_t)reach_y * pitch + reach_x;
  }
  /* What the sizes of a whole scratch are counted with stays far below what overflows. */
  bool fits() const { return (double)part * parts_y * parts_x < INT32_MAX; }
  int64_t taps() const { return (int64_t)w.kernel_y * w.kernel_x; }

  /* Where a tap of the first window stands. */
  int64_t tap(int32_t ky, int32_t kx) const {
    int64_t begins = (ky % w.stride_y * parts_x + kx % w.stride_x) * part;
    return begins + (int64_t)(ky / w.stride_y) * pitch + kx / w.stride_x;
  }
  /* Every line of every part: where it begins, the plane's line, and from which to which of its places the plane has one. */
  template <class Each> MEMBER void each_line(const Each &each) const {
    for (int32_t a = 0; a < parts_y; a++)
      for (int32_t b = 0; b < parts_x; b++) part_lines(a, b, each);
  }
  template <class Each> MEMBER void part_lines(int32_t a, int32_t b, const Each &each) const {
    Reach down(w.height, lines, w.stride_y, w.pad_y, a), along(w.width, pitch, w.stride_x, w.pad_x, b);
    for (int32_t r = 0; r < lines; r++) {
      bool inside = r >= down.first && r < down.last;
      int64_t row = ((int64_t)r * w.stride_y + a - w.pad_y) * w.width + b - w.pad_x;
      each((a * parts_x + b) * part + (int64_t)r * pitch, row, inside ? along.first : 0, inside ? along.last : 0);
    }
  }
  void lay(const float *from, float *into) const {
    each_line([&](int64_t at, int64_t row, int32_t first, int32_t last) {
      for (int32_t l = 0; l < first; l++) into[at + l] = 0;
      if (w.stride_x == 1)
        for (int32_t l = first; l < last; l++) into[at + l] = from[row + l];
      else
        for (int32_t l = first; l < last; l++) into[at + l] = from[row + (int64_t)l * w.stride_x];
      for (int32_t l = last; l < pitch; l++) into[at + l] = 0;
    });
    for (int64_t p = 1; p <= (int64_t)parts_y * parts_x; p++) clear(into + p * part - reach_x, reach_x);
  }
  /* The gradient of a plane of the output as a run, with zeros between its lines, and behind it up to `length`. */
  void spread(const float *dy, float *into, int64_t length) const {
    for (int32_t i = 0; i < w.out_height; i++) {
      float *line = into + (int64_t)i * pitch;
      for (int32_t j = 0; j < w.out_width; j++) line[j] = dy[(int64_t)i * w.out_width + j];
      if (i + 1 < w.out_height)
        for (int32_t j = w.out_width; j < pitch; j++) line[j] = 0;
    }
    clear(into + run, length - run);
  }
  void gather(const float *from, float *y) const {
    for (int32_t i = 0; i < w.out_height; i++)
      for (int32_t j = 0; j < w.out_width; j++) y[(int64_t)i * w.out_width + j] = from[(int64_t)i * pitch + j];
  }
};

} // namespace nk
#endif
