/* Dense convolutions without columns: every tap of every channel is a shifted run (see windows_flat.h), and a block of output
   channels by some vectors of places is summed up over all of them in registers. The gradient of the input is the same
   with the runs of the output's gradient, part by part; that of the weights is a sum of products of runs. */
#ifndef NESTLING_WINDOWS_DENSE_H
#define NESTLING_WINDOWS_DENSE_H

namespace nk {

#if LANES == 16 || ARM64
enum { ROWS = 8, DOWN = 4, ALONG = 6 };
#else
enum { ROWS = 4, DOWN = 3, ALONG = 4 };
#endif
enum { ROWS_MOST = 8 };

/* Where all lies in the scratch of so many samples. */
struct Room {
  Flat flat;
  int32_t outs;
  int64_t gap, came; /* zeros in front of the run of an output's gradient, and floats of one, them included */
  int64_t planes, runs, longest, terms;

  Room(const nk_window &w, int32_t outs, int32_t samples) : flat(w), outs(outs) {
    longest = rounded((int64_t)flat.lines * flat.pitch) + MARGIN;
    gap = rounded(flat.most + flat.reach_x);
    came = rounded(flat.run) + gap;
    planes = rounded(samples * (w.channels * flat.plane)) + MARGIN;
    runs = gap + samples * (outs * came) + gap + MARGIN;
    terms = flat.taps() * (outs > w.channels ? outs : w.channels);
  }
  int64_t length() const { return planes + runs + ROWS_MOST * longest + (ROWS_MOST + 1) * rounded(terms); }
  float *run_in(float *room) const { return room + planes + gap; }
  float *lines_in(float *room) const { return room + planes + runs; }
  float *panel_in(float *room) const { return lines_in(room) + ROWS_MOST * longest; }
  int32_t *offsets_in(float *room) const { return (int32_t *)(panel_in(room) + ROWS_MOST * rounded(terms)); }
};

/* Sum of panel[term][row] * x[offset of term + place], ROWS rows by V vectors. */
template <int V>
static void sum_terms(const float *x, const int32_t *offsets, const float *panel, int64_t terms, const float *start,
                      float *out, int64_t pitch) {
  vec sum[ROWS][V];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) sum[r][v] = (vec){} + start[r];
  for (int64_t t = 0; t < terms; t++, panel += ROWS) {
    const float *from = x + offsets[t];
    vec some[V];
    for (int v = 0; v < V; v++) some[v] = load<vec>(from + v * LANES);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < V; v++) sum[r][v] += panel[r] * some[v];
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) store<vec>(out + r * pitch + v * LANES, sum[r][v]);
}

static void sum_run(const float *x, const int32_t *offsets, const float *panel, int64_t terms, const float *start,
                    float *out, int64_t pitch, int64_t length) {
  for (int64_t left = (length + LANES - 1) / LANES; left > 0;) {
    int32_t v = left == 4 ? 2 : left > 2 ? 3 : (int32_t)left;
    auto one = v == 3 ? sum_terms<3> : v == 2 ? sum_terms<2> : sum_terms<1>;
    one(x, offsets, panel, terms, start, out, pitch);
    x += v * LANES;
    out += v * LANES;
    left -= v;
  }
}

/* Where each weight of a row finds the first window's value, in a sample's planes. */
static void offset_terms(const Room &room, float *memory) {
  const Flat &flat = room.flat;
  int32_t *offsets = room.offsets_in(memory);
  for (int32_t c = 0, t = 0; c < flat.w.channels; c++)
    for (int32_t ky = 0; ky < flat.w.kernel_y; ky++)
      for (int32_t kx = 0; kx < flat.w.kernel_x; kx++, t++) offsets[t] = (int32_t)(flat.tap(ky, kx) + c * flat.plane);
}

static void dense_forward(const Room &room, int32_t held, int32_t samples, const float *weight, const float *bias,
                          float *memory, float *y) {
  const Flat &flat = room.flat;
  int64_t terms = flat.taps() * flat.w.channels, places = (int64_t)flat.w.out_height * flat.w.out_width;
  const int32_t *offsets = room.offsets_in(memory);
  float *panel = room.panel_in(memory), *lines = room.lines_in(memory);
  for (int32_t o = 0; o < room.outs; o += ROWS) {
    int32_t rows = room.outs - o < ROWS ? room.outs - o : ROWS;
    float start[ROWS] = {};
    for (int32_t r = 0; r < rows; r++) start[r] = bias[o + r];
    for (int32_t r = 0; r < ROWS; r++)
      for (int64_t t = 0; t < terms; t++) panel[t * ROWS + r] = r < rows ? weight[(o + r) * terms + t] : 0;
    for (int32_t s = 0; s < samples; s++) {
      sum_run(memory + s * (flat.w.channels * flat.plane), offsets, panel, terms, start, lines, room.longest, flat.run);
      for (int32_t r = 0; r < rows; r++) flat.gather(lines + r * room.longest, y + ((int64_t)s * held + o + r) * places);
    }
  }
}

/* One part of the input's gradient. */
static void dense_part(const Room &room, int32_t samples, const float *weight, float *memory, int32_t a, int32_t b,
                       float *dx) {
  const Flat &flat = room.flat;
  const nk_window &w = flat.w;
  int64_t first = (int64_t)flat.lines * flat.pitch, last = 0, taps = flat.taps(), pixels = (int64_t)w.height * w.width;
  int64_t begins = (a * flat.parts_x + b) * flat.part;
  flat.part_lines(a, b, [&](int64_t at, int64_t, int32_t from, int32_t to) {
    if (from >= to) return;
    first = at - begins + from < first ? at - begins + from : first;
    last = at - begins + to;
  });
  if (first >= last) return;
  int32_t *offsets = room.offsets_in(memory), terms = 0;
  float *panel = room.panel_in(memory), *lines = room.lines_in(memory);
  const float none[ROWS] = {};
  for (int32_t o = 0; o < room.outs; o++)
    for (int32_t ky = a; ky < w.kernel_y; ky += w.stride_y)
      for (int32_t kx = b; kx < w.kernel_x; kx += w.stride_x)
        offsets[terms++] = (int32_t)(o * room.came - ((int64_t)(ky / w.stride_y) * flat.pitch + kx / w.stride_x));
  for (int32_t c = 0; c < w.channels; c += ROWS) {
    int32_t rows = w.channels - c < ROWS ? w.channels - c : ROWS;
    float *into = panel;
    for (int32_t o = 0; o < room.outs; o++)
      for (int32_t ky = a; ky < w.kernel_y; ky += w.stride_y)
        for (int32_t kx = b; kx < w.kernel_x; kx += w.stride_x, into += ROWS)
          for (int32_t r = 0; r < ROWS; r++)
            into[r] = r < rows ? weight[((int64_t)o * w.channels + c + r) * taps + ky * w.kernel_x + kx] : 0;
    for (int32_t s = 0; s < samples; s++) {
      const float *run = room.run_in(memory) + s * (room.outs * room.came);
      sum_run(run + first, offsets, panel, terms, none, lines, room.longest, last - first);
      for (int32_t r = 0; r < rows; r++) {
        float *plane = dx + ((int64_t)s * w.held + c + r) * pixels;
        const float *line = lines + r * room.longest - first - begins;
        flat.part_lines(a, b, [&](int64_t at, int64_t row, int32_t from, int32_t to) {
          for (int32_t l = from; l < to; l++) plane[row + (int64_t)l * w.stride_x] = line[at + l];
        });
      }
    }
  }
}

/* Sums of products of DOWN runs of gradients and ALONG runs of inputs, over all samples. */
static void dot_runs(const float *const *dy, int64_t dy_pitch, const float *const *x, int64_t x_pitch, int32_t samples,
                     int64_t length, vec (*total)[ALONG]) {
  vec sum[DOWN][ALONG];
  for (int i = 0; i < DOWN; i++)
    for (int j = 0; j < ALONG; j++) sum[i][j] = (vec){};
  for (int32_t s = 0; s < samples; s++)
    for (int64_t p = 0; p < length; p += LANES) {
      vec left[DOWN];
      for (int i = 0; i < DOWN; i++) left[i] = load<vec>(dy[i] + s * dy_pitch + p);
      for (int j = 0; j < ALONG; j++) {
        vec right = load<vec>(x[j] + s * x_pitch + p);
        for (int i = 0; i < DOWN; i++) sum[i][j] += left[i] * right;
      }
    }
  for (int i = 0; i < DOWN; i++)
    for (int j = 0; j < ALONG; j++) total[i][j] = sum[i][j];
}

static void dense_weight(const Room &room, int32_t samples, float *memory, float *dweight) {
  const Flat &flat = room.flat;
  int64_t terms = flat.taps() * flat.w.channels;
  const int32_t *offsets = room.offsets_in(memory);
  const float *runs = room.run_in(memory);
  for (int64_t t = 0; t < terms; t += ALONG)
    for (int32_t o = 0; o < room.outs; o += DOWN) {
      const float *dy[DOWN], *x[ALONG];
      for (int32_t i = 0; i < DOWN; i++) dy[i] = runs + (o + i < room.outs ? o + i : o) * room.came;
      for (int32_t j = 0; j < ALONG; j++) x[j] = memory + offsets[t + j < terms ? t + j : t];
      vec total[DOWN][ALONG];
      dot_runs(dy, room.outs * room.came, x, flat.w.channels * flat.plane, samples, flat.run, total);
      for (int32_t j = 0; j < ALONG && t + j < terms; j++)
        for (int32_t i = 0; i < DOWN && o + i < room.outs; i++) dweight[(o + i) * terms + t + j] += sum(fold(total[i][j]));
    }
}

INLINE bool dense(const nk_window *w, int32_t outs, int32_t held, int32_t samples, int32_t length) {
  if (!slides(w, samples) || outs < 1 || held < outs || outs > LENGTH_MAX || w->channels > LENGTH_MAX) return false;
  Flat flat(*w);
  double all = (double)flat.taps() * ((double)outs + w->channels) * 16 +
               (double)samples * ((double)flat.plane * w->channels + 4.0 * outs * ((double)flat.lines * flat.pitch + 64));
  return flat.fits() && all < INT32_MAX && Room(*w, outs, samples).length() <= length;
}

static void lay_inputs(const Room &room, int32_t samples, const float *x, float *memory) {
  const Flat &flat = room.flat;
  int64_t used = samples * (flat.w.channels * flat.plane), pixels = (int64_t)flat.w.height * flat.w.width;
  for (int32_t s = 0; s < samples; s++)
    for (int32_t c = 0; c < flat.w.channels; c++)
      flat.lay(x + ((int64_t)s * flat.w.held + c) * pixels, memory + ((int64_t)s * flat.w.channels + c) * flat.plane);
  clear(memory + used, room.planes - used);
}

static void lay_gradients(const Room &room, int32_t held, int32_t samples, const float *dy, float *dbias, float *memory) {
  float *runs = room.run_in(memory);
  int64_t places = (int64_t)room.flat.w.out_height * room.flat.w.out_width;
  clear(runs - room.gap, room.gap);
  for (int32_t s = 0; s < samples; s++)
    for (int32_t o = 0; o < room.outs; o++) {
      const float *from = dy + ((int64_t)s * held + o) * places;
      room.flat.spread(from, runs + ((int64_t)s * room.outs + o) * room.came, room.came);
      dbias[o] += run_sum(from, (int32_t)places);
    }
}

} // namespace nk

extern "C" int32_t nk_dense_forward(const nk_window *window, int32_t outs, int32_t held, int32_t samples, const float *x,
                                    const float *weight, const float *bias, float *y, float *scratch, int32_t length) {
  if (!nk::dense(window, outs, held, samples, length) || !x || !weight || !bias || !y || !scratch) return NK_SHAPE;
  nk::Room room(*window, outs, samples);
  nk::lay_inputs(room, samples, x, scratch);
  nk::offset_terms(room, scratch);
  nk::dense_forward(room, held, samples, weight, bias, scratch, y);
  return NK_OK;
}

extern "C" int32_t nk_dense_backward(const nk_window *window, int32_t outs, int32_t held, int32_t samples, const float *x,
                                     const float *weight, const float *dy, float *dx, float *dweight, float *dbias,
                                     float *scratch, int32_t length) {
  if (!nk::dense(window, outs, held, samples, length) || !x || !weight || !dy || !dweight || !dbias || !scratch)
    return NK_SHAPE;
  nk::Room room(*window, outs, samples);
  const nk_window &w = room.flat.w;
  nk::lay_inputs(room, samples, x, scratch);
  nk::lay_gradients(room, held, samples, dy, dbias, scratch);
  nk::offset_terms(room, scratch);
  nk::dense_weight(room, samples, scratch, dweight);
  if (!dx) return NK_OK;
  if (w.stride_y > 1 || w.stride_x > 1)
    for (int32_t s = 0; s < samples; s++)
      nk::clear(dx + (int64_t)s * w.held * w.height * w.width, (int64_t)w.channels * w.height * w.width);
  for (int32_t a = 0; a < room.flat.parts_y; a++)
    for (int32_t b = 0; b < room.flat.parts_x; b++) nk::dense_part(room, samples, weight, scratch, a, b, dx);
  return NK_OK;
}
#endif
