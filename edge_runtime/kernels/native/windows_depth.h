/* Depthwise convolutions: every channel by its own kernel, straight from the plane as windows_flat.h lays it out. */
#ifndef NESTLING_WINDOWS_DEPTH_H
#define NESTLING_WINDOWS_DEPTH_H

namespace nk {

enum { LUMP = 4 };

/* How a plane lies in the scratch: its parts, then zeros and the output's places as a run with zeros behind it, then where
   each tap of the first window stands. */
struct Depth {
  Flat flat;
  int64_t front, behind, run_floats;

  explicit Depth(const nk_window &w) : flat(w) {
    front = rounded(flat.most);
    behind = flat.plane + MARGIN;
    run_floats = rounded((int64_t)flat.lines * flat.pitch) + MARGIN;
  }
  int64_t length() const { return behind + front + run_floats + flat.taps(); }
  float *run_in(float *scratch) const { return scratch + behind + front; }
  int32_t *taps_in(float *scratch) const {
    int32_t *found = (int32_t *)(scratch + behind + front + run_floats);
    for (int32_t ky = 0, t = 0; ky < flat.w.kernel_y; ky++)
      for (int32_t kx = 0; kx < flat.w.kernel_x; kx++, t++) found[t] = (int32_t)flat.tap(ky, kx);
    return found;
  }
};

/* N vectors of places at a time. */
template <int N> struct Lump {
  vec of[N];
  MEMBER explicit Lump(float all) {
    for (int i = 0; i < N; i++) of[i] = (vec){} + all;
  }
  MEMBER void add(float weight, const float *from) {
    for (int i = 0; i < N; i++) of[i] += weight * load<vec>(from + i * LANES);
  }
  MEMBER void write(float *to) const {
    for (int i = 0; i < N; i++) store<vec>(to + i * LANES, of[i]);
  }
};

/* A run in lumps, and what is left in single vectors. */
template <class Four, class One> INLINE void lumps(int64_t length, const Four &four, const One &one) {
  int64_t p = 0;
  for (; p + LUMP * LANES <= length; p += LUMP * LANES) four(p);
  for (; p < length; p += LANES) one(p);
}

template <int N>
INLINE void depth_places(int64_t count, const float *weight, float bias, const int32_t *taps, const float *parts,
                         float *run) {
  Lump<N> lump(bias);
  for (int64_t t = 0; t < count; t++) lump.add(weight[t], parts + taps[t]);
  lump.write(run);
}

static void depth_forward(const Depth &d, const float *weight, float bias, const int32_t *taps, float *scratch,
                          float *y) {
  float *run = d.run_in(scratch);
  int64_t count = d.flat.taps();
  lumps(
      d.flat.run, [&](int64_t p) { depth_places<LUMP>(count, weight, bias, taps, scratch + p, run + p); },
      [&](int64_t p) { depth_places<1>(count, weight, bias, taps, scratch + p, run + p); });
  d.flat.gather(run, y);
}

template <int N>
INLINE void depth_sources(const Flat &flat, const float *weight, int32_t a, int32_t b, const float *run, float *part) {
  const nk_window &w = flat.w;
  Lump<N> lump(0);
  for (int32_t ky = a; ky < w.kernel_y; ky += w.stride_y, run -= flat.pitch) {
    const float *from = run;
    for (int32_t kx = b; kx < w.kernel_x; kx += w.stride_x) lump.add(weight[ky * w.kernel_x + kx], from--);
  }
  lump.write(part);
}

/* run: the gradient's, with zeros before and behind. parts: written, to be laid anew. */
static void depth_input(const Depth &d, const float *weight, const float *run, float *parts, float *dx) {
  const Flat &flat = d.flat;
  const nk_window &w = flat.w;
  int64_t length = (int64_t)flat.lines * flat.pitch;
  for (int32_t a = 0; a < flat.parts_y; a++)
    for (int32_t b = 0; b < flat.parts_x; b++) {
      float *part = parts + (a * flat.parts_x + b) * flat.part;
      lumps(
          length, [&](int64_t q) { depth_sources<LUMP>(flat, weight, a, b, run + q, part + q); },
          [&](int64_t q) { depth_sources<1>(flat, weight, a, b, run + q, part + q); });
    }
  clear(parts + flat.plane, MARGIN); /* of weights that are no numbers something may have come there */
  if (w.stride_y > 1 || w.stride_x > 1) clear(dx, (int64_t)w.height * w.width);
  flat.each_line([&](int64_t at, int64_t row, int32_t first, int32_t last) {
    for (int32_t l = first; l < last; l++) dx[row + (int64_t)l * w.stride_x] = parts[at + l];
  });
}

INLINE vec dots(const float *run, const float *part, int64_t length) {
  vec all = load<vec>(run) * load<vec>(part);
  for (int64_t p = LANES; p < length; p += LANES) all += load<vec>(run + p) * load<vec>(part + p);
  return all;
}

static void depth_weight(const Flat &flat, const float *run, const int32_t *taps, const float *parts, float *dweight) {
  auto dot = [&](int64_t t) { return fold(dots(run, parts + taps[t], flat.run)); };
  int64_t t = 0;
  for (; t + 4 <= flat.taps(); t += 4) {
    v4 four = sums(dot(t), dot(t + 1), dot(t + 2), dot(t + 3));
    store<v4>(dweight + t, load<v4>(dweight + t) + four);
  }
  for (; t < flat.taps(); t++) dweight[t] += sum(dot(t));
}

INLINE bool deep(const nk_window *w, int32_t samples, int32_t length) {
  return slides(w, samples) && Flat(*w).fits() && Depth(*w).length() <= length;
}

} // namespace nk

extern "C" int32_t nk_depth_forward(const nk_window *window, int32_t samples, const float *x, const float *weight,
                                    const float *bias, float *y, float *scratch, int32_t length) {
  if (!nk::deep(window, samples, length) || !x || !weight || !bias || !y || !scratch) return NK_SHAPE;
  const nk::Depth d(*window);
  const nk_window &w = d.flat.w;
  int64_t in = (int64_t)w.height * w.width, out = (int64_t)w.out_height * w.out_width;
  nk::clear(scratch, d.length());
  const int32_t *taps = d.taps_in(scratch);
  for (int32_t c = 0; c < w.channels; c++)
    for (int32_t s = 0; s < samples; s++) {
      int64_t plane = (int64_t)s * w.held + c;
      d.flat.lay(x + plane * in, scratch);
      nk::depth_forward(d, weight + c * d.flat.taps(), bias[c], taps, scratch, y + plane * out);
    }
  return NK_OK;
}

extern "C" int32_t nk_depth_backward(const nk_window *window, int32_t samples, const float *x, const float *weight,
                                     const float *dy, float *dx, float *dweight, float *dbias, float *scratch,
                                     int32_t length) {
  if (!nk::deep(window, samples, length) || !x || !weight || !dy || !dweight || !dbias || !scratch) return NK_SHAPE;
  const nk::Depth d(*window);
  const nk_window &w = d.flat.w;
  int64_t in = (int64_t)w.height * w.width, out = (int64_t)w.out_height * w.out_width, count = d.flat.taps();
  float *run = d.run_in(scratch);
  nk::clear(scratch, d.length());
  nk::clear(dweight, count * w.channels);
  const int32_t *taps = d.taps_in(scratch);
  for (int32_t c = 0; c < w.channels; c++) {
    dbias[c] = 0;
    for (int32_t s = 0; s < samples; s++) {
      int64_t plane = (int64_t)s * w.held + c;
      d.flat.spread(dy + plane * out, run, d.flat.run);
      d.flat.lay(x + plane * in, scratch);
      nk::depth_weight(d.flat, run, taps, scratch, dweight + c * count);
      dbias[c] += nk::run_sum(dy + plane * out, (int32_t)out);
      if (dx) nk::depth_input(d, weight + c * count, run, scratch, dx + plane * in);
    }
  }
  return NK_OK;
}
#endif
