/* What every trial of the compiled core needs: chance, guarded memory, and the panels said once more, naively. */
#ifndef NESTLING_TRIAL_H
#define NESTLING_TRIAL_H
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { GUARD = 0 }; /* the sanitizer guards both ends */
#else
enum { GUARD = 64 }; /* floats of NaN before and behind: what reads them shows, and what writes them too */
#endif

struct Chance {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t x = (uint32_t)((state >> 18 ^ state) >> 27), turn = (uint32_t)(state >> 59);
    return x >> turn | x << (-turn & 31);
  }
  int in(int low, int high) { return low + (int)(bits() % (uint32_t)(high - low + 1)); }
  bool coin() { return bits() >> 31; }
  float number() { return (float)((int32_t)bits() * (1.0 / 2147483648.0)); }
  /* How full a layer is: empty and full ones come up often. */
  double density() {
    static const double some[] = {0, 1, 0.01, 0.05, 0.1, 0.3, 0.6};
    return some[in(0, 6)];
  }
};

extern Chance chance;
extern long checks;
extern double worst;
extern const char *trial;
extern int round_now, batch_now;

inline void wrong(const char *format, ...) {
  va_list words;
  va_start(words, format);
  fprintf(stderr, "%s, round %d, batch %d: ", trial, round_now, batch_now);
  vfprintf(stderr, format, words);
  fprintf(stderr, "\n");
  va_end(words);
  exit(1);
}

inline void must(int32_t code, const char *what) {
  if (code) wrong("%s gave %d", what, (int)code);
}

/* Floats on a multiple of 64 bytes, or (loose) one float behind such a place. */
struct Buffer {
  float *whole, *at;
  size_t size;
  explicit Buffer(size_t n, bool loose = false) : size(n) {
    size_t shift = loose ? 1 : 0, bytes = (n + 2 * GUARD + shift) * sizeof(float);
    void *memory = nullptr;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) wrong("no memory");
    whole = (float *)memory;
    at = whole + GUARD + shift;
    memset(whole, 0xff, bytes);
  }
  Buffer(const Buffer &) = delete;
  ~Buffer() {
    const unsigned char *low = (const unsigned char *)(at - GUARD), *high = (const unsigned char *)(at + size);
    for (size_t i = 0; i < GUARD * sizeof(float); i++)
      if (low[i] != 0xff || high[i] != 0xff) wrong("written outside a buffer of %zu floats", size);
    free(whole);
  }
  void fill() {
    for (size_t i = 0; i < size; i++) at[i] = chance.number();
  }
  void zero() {
    for (size_t i = 0; i < size; i++) at[i] = 0;
  }
  std::vector<float> copy() const { return std::vector<float>(at, at + size); }
};

/* An integer array in memory of its own size, so that a sanitizer sees every step outside. */
template <class T> struct Table {
  T *at;
  size_t size;
  explicit Table(const std::vector<T> &from) : at((T *)malloc(from.size() * sizeof(T) + !from.size())), size(from.size()) {
    if (size) memcpy(at, from.data(), size * sizeof(T));
  }
  Table(const Table &) = delete;
  ~Table() { free(at); }
};

inline int filled(int batch) { return (batch + 3) / 4 * 4; }

/* Where sample s of a row stands. */
inline size_t place(int batch, size_t rows, size_t row, int s) {
  int sixteens = filled(batch) / 16 * 16, rest = filled(batch) - sixteens;
  if (s < sixteens) return rows * (size_t)(s / 16 * 16) + row * 16 + (size_t)(s % 16);
  if (rest >= 8 && s < sixteens + 8) return rows * (size_t)sixteens + row * 8 + (size_t)(s - sixteens);
  int before = sixteens + (rest >= 8 ? 8 : 0);
  return rows * (size_t)before + row * 4 + (size_t)(s - before);
}

inline size_t rows_of(const nk_image &m) {
  return (size_t)m.channels * (size_t)(m.height + 2 * m.halo) * (size_t)(m.width + 2 * m.halo);
}

/* Row of one place of an image; i and j may lie in the halo, from -halo on. */
inline size_t row_of(const nk_image &m, int c, int i, int j) {
  return ((size_t)c * (size_t)(m.height + 2 * m.halo) + (size_t)(i + m.halo)) * (size_t)(m.width + 2 * m.halo) +
         (size_t)(j + m.halo);
}

/* An activation in panels, read and written by sample and place. */
struct Activation {
  nk_image image;
  int batch;
  size_t rows;
  Buffer panels;
  Activation(const nk_image &m, int n) : image(m), batch(n), rows(rows_of(m)), panels(rows * (size_t)filled(n)) {}
  float &operator()(int s, int c, int i = 0, int j = 0) {
    return panels.at[place(batch, rows, row_of(image, c, i, j), s)];
  }
  /* Random inside, zero in the halo; samples that fill up are random too, or zero for a gradient. */
  void fill(bool gradient) {
    panels.zero();
    for (int s = 0; s < (gradient ? batch : filled(batch)); s++)
      for (int c = 0; c < image.channels; c++)
        for (int i = 0; i < image.height; i++)
          for (int j = 0; j < image.width; j++) (*this)(s, c, i, j) = chance.number();
  }
  /* Halo zero, and nothing that fills up is infinite (or, in a gradient, other than zero). */
  void whole(bool gradient) {
    for (int s = 0; s < filled(batch); s++)
      for (int c = 0; c < image.channels; c++)
        for (int i = -image.halo; i < image.height + image.halo; i++)
          for (int j = -image.halo; j < image.width + image.halo; j++) {
            bool inside = i >= 0 && j >= 0 && i < image.height && j < image.width;
            float v = (*this)(s, c, i, j);
            if (!isfinite(v)) wrong("not finite at sample %d of %d, (%d, %d, %d)", s, batch, c, i, j);
            if ((!inside || (gradient && s >= batch)) && v != 0) wrong("not zero at sample %d, (%d, %d, %d)", s, c, i, j);
          }
  }
};

/* A value beside what it should be, whose terms add up to `size` without their signs. */
inline void near(const char *what, float got, double want, double size, int a = 0, int b = 0, int c = 0, int d = 0) {
  double error = fabs(got - want) / (size + 1e-6);
  checks++;
  if (!(error <= 2e-5)) wrong("%s (%d, %d, %d, %d): %.9g, not %.9g (terms of %.3g)", what, a, b, c, d, got, want, size);
  if (error > worst && size > 1e-3) worst = error;
}

/* An update with some of its parts, and what it should do. */
struct Move {
  nk_update update;
  std::vector<float> values, velocity, anchor;
  Buffer v, a;
  explicit Move(const Buffer &weights) : update(), values(weights.copy()), v(weights.size), a(weights.size) {
    v.fill();
    a.fill();
    update.rate = 0.125f;
    if (chance.coin()) update.momentum = 0.75f, update.velocity = v.at;
    if (chance.coin()) update.decay = 0.0625f;
    if (chance.coin()) update.pull = 0.5f, update.anchor = a.at;
    velocity = v.copy();
    anchor = a.copy();
  }
  void check(const Buffer &weights, const std::vector<double> &gradient, const std::vector<double> &size) {
    for (size_t k = 0; k < weights.size; k++) {
      double w = values[k], g = gradient[k] + update.decay * w, s = size[k] + 4;
      if (update.anchor) g += update.pull * (w - anchor[k]);
      if (update.velocity) {
        g += update.momentum * velocity[k];
        near("velocity", v.at[k], g, s, (int)k);
      }
      near("moved value", weights.at[k], w - update.rate * g, s, (int)k);
    }
  }
};

#endif
