/* Norms: values minus their mean, over the root of their variance, times a weight, plus a bias; and the gradients.

   Float sums run over at most NORM_RUN values at a time and go on in double. The variance is that of the differences from the
   rounded mean, which are exact where the mean is large beside them, and what rounding took from the mean is put back.
   Cost: a channel (or a sample's group) is read twice, then written; all but the first reading find it in the cache. */
#ifndef NESTLING_NORMS_H
#define NESTLING_NORMS_H

namespace nk {

static constexpr int64_t NORM_RUN = 4096;

/* Call f with vectors as wide as fit, then with four, then with one float at a time; it is given one for its type. */
template <class F> INLINE void along(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) f(vec{}, i);
  if constexpr (LANES > 4)
    for (; i + 4 <= end; i += 4) f(v4{}, i);
  for (; i < end; i++) f(0.0f, i);
}

/* A running sum of vectors of every width that `along` has. */
struct Running {
  vec wide = vec{};
  v4 four = v4{};
  float one = 0;
  template <class V> MEMBER void add(V v) {
    if constexpr (sizeof(V) == sizeof(vec))
      wide += v;
    else if constexpr (sizeof(V) == sizeof(v4))
      four += v;
    else
      one += v;
  }
  MEMBER double total() const { return (double)(sum(fold(wide) + four) + one); }
};

/* Where the values of one statistic stand: `count` pieces of `length`. */
struct Pieces {
  int64_t first, step, length;
  int32_t count;
  /* Call f(begin, end) for runs of at most NORM_RUN. */
  template <class F> MEMBER void chunks(F f) const {
    for (int32_t piece = 0; piece < count; piece++)
      for (int64_t from = 0; from < length; from += NORM_RUN) {
        int64_t begin = first + piece * step + from, rest = length - from;
        f(begin, begin + (rest < NORM_RUN ? rest : NORM_RUN));
      }
  }
};

struct Normed {
  int32_t samples, groups, each;
  int64_t inner;
  bool pooled;
  explicit Normed(const nk_norm &n)
      : samples(n.samples), groups(n.groups ? n.groups : n.channels), each(n.groups ? n.channels / n.groups : 1),
        inner(n.inner), pooled(!n.groups) {}
  int64_t size() const { return (int64_t)samples * groups * each * inner; }
  int32_t sets() const { return pooled ? groups : samples * groups; }
  int64_t count() const { return (pooled ? (int64_t)samples : 1) * each * inner; }
  int32_t channel(int32_t set) const { return pooled ? set : set % groups * each; }
  Pieces pieces(int32_t set) const {
    if (pooled) return {set * inner, groups * inner, inner, samples};
    return {set * each * inner, 0, each * inner, 1};
  }
};

struct Moments {
  float mean, rest; /* the mean is the sum of both */
  double variance;
};

static Moments moments(const Pieces &pieces, const float *x, int64_t count) {
  double total = 0, rest = 0, square = 0;
  pieces.chunks([&](int64_t begin, int64_t end) {
    Running sum;
    along(begin, end, [&](auto v, int64_t i) { sum.add(load<decltype(v)>(x + i)); });
    total += sum.total();
  });
  const float mean = (float)(total / count);
  pieces.chunks([&](int64_t begin, int64_t end) {
    Running sum, squares;
    along(begin, end, [&](auto v, int64_t i) {
      v = load<decltype(v)>(x + i) - mean;
      sum.add(v);
      squares.add(v * v);
    });
    rest += sum.total();
    square += squares.total();
  });
  rest /= count;
  double variance = square / count - rest * rest;
  return {mean, (float)rest, variance < 0 ? 0 : variance};
}

/* y = (x - mean - rest) * inverse * weight + bias; one weight for each run of `inner`. */
static void scale(const Normed &norm, int32_t set, const float *x, const Moments &at, float inverse, const float *weight,
                  const float *bias, float *y) {
  Pieces pieces = norm.pieces(set);
  const int32_t channel = norm.channel(set);
  const float mean = at.mean, rest = at.rest;
  if (norm.inner == 1 && !norm.pooled) {
    const float *w = weight + channel - pieces.first, *b = bias + channel - pieces.first;
    along(pieces.first, pieces.first + pieces.length, [&](auto v, int64_t i) {
      typedef decltype(v) V;
      store<V>(y + i, (load<V>(x + i) - mean - rest) * (load<V>(w + i) * inverse) + load<V>(b + i));
    });
    return;
  }
  for (int32_t piece = 0; piece < pieces.count; piece++)
    for (int32_t c = 0; c < norm.each; c++) {
      const int64_t begin = pieces.first + piece * pieces.step + c * norm.inner;
      const float w = weight[channel + c] * inverse, b = bias[channel + c];
      along(begin, begin + norm.inner, [&](auto v, int64_t i) {
        typedef decltype(v) V;
        store<V>(y + i, (load<V>(x + i) - mean - rest) * w + b);
      });
    }
}

struct NormCall {
  Normed norm;
  const float *x, *dy, *weight, *mean, *rest, *inverse;
  int32_t fixed;
  float *dx;
  double *sums; /* by channel: of dy, then of dy (x - mean) inverse */
};

/* The gradient of a statistic's own channel; where it is over the batch. */
static void back_channel(const NormCall &call, int32_t set) {
  const Normed &norm = call.norm;
  const float *x = call.x, *dy = call.dy, mean = call.mean[set], rest = call.rest[set];
  const double inverse = call.inverse[set];
  Pieces pieces = norm.pieces(set);
  double plain = 0, leaning = 0;
  pieces.chunks([&](int64_t begin, int64_t end) {
    Running sum, times;
    along(begin, end, [&](auto v, int64_t i) {
      v = load<decltype(v)>(dy + i);
      sum.add(v);
      times.add(v * (load<decltype(v)>(x + i) - mean - rest));
    });
    plain += sum.total();
    leaning += times.total();
  });
  call.sums[set] = plain;
  call.sums[norm.groups + set] = leaning * inverse;
  if (!call.dx) return;
  const double by = call.weight[set] * inverse, each = call.fixed ? 0 : by / (double)norm.count();
  const float a = (float)by, b = (float)(-each * inverse * inverse * leaning), c = (float)(-each * plain);
  float *dx = call.dx;
  pieces.chunks([&](int64_t begin, int64_t end) {
    along(begin, end, [&](auto v, int64_t i) {
      typedef decltype(v) V;
      store<V>(dx + i, a * load<V>(dy + i) + (b * (load<V>(x + i) - mean - rest) + c));
    });
  });
}

/* The gradient of a group of a sample. Its channels' sums are added to those of other samples. */
static void back_group(const NormCall &call, int32_t set) {
  const Normed &norm = call.norm;
  const float *x = call.x, *dy = call.dy, mean = call.mean[set], rest = call.rest[set], inverse = call.inverse[set];
  const int32_t channel = norm.channel(set);
  const int64_t first = norm.pieces(set).first, inner = norm.inner;
  double *plain = call.sums + channel, *leaning = plain + norm.groups * norm.each;
  double all = 0, tilted = 0;
  for (int32_t c = 0; c < norm.each; c++) {
    double sum_c = 0, times_c = 0;
    Pieces{first + c * inner, 0, inner, 1}.chunks([&](int64_t begin, int64_t end) {
      Running sum, times;
      along(begin, end, [&](auto v, int64_t i) {
        v = load<decltype(v)>(dy + i);
        sum.add(v);
        times.add(v * (load<decltype(v)>(x + i) - mean - rest));
      });
      sum_c += sum.total();
      times_c += times.total();
    });
    plain[c] += sum_c;
    leaning[c] += times_c * inverse;
    all += call.weight[channel + c] * sum_c;
    tilted += call.weight[channel + c] * times_c;
  }
  if (!call.dx) return;
  const double by = inverse / (double)norm.count();
  const float b = (float)(-by * inverse * inverse * tilted), e = (float)(-by * all);
  float *dx = call.dx;
  for (int32_t c = 0; c < norm.each; c++) {
    const float a = call.weight[channel + c] * inverse;
    along(first + c * inner, first + (c + 1) * inner, [&](auto v, int64_t i) {
      typedef decltype(v) V;
      store<V>(dx + i, a * load<V>(dy + i) + (b * (load<V>(x + i) - mean - rest) + e));
    });
  }
}

/* The same where every channel has one entry: a row of values, each with a weight of its own. */
static void back_row(const NormCall &call, int32_t set) {
  const Normed &norm = call.norm;
  const int64_t first = norm.pieces(set).first;
  const float *x = call.x + first, *dy = call.dy + first, *weight = call.weight + norm.channel(set);
  const float mean = call.mean[set], rest = call.rest[set], inverse = call.inverse[set];
  double *plain = call.sums + norm.channel(set), *leaning = plain + norm.groups * norm.each;
  double all = 0, tilted = 0;
  Pieces{0, 0, norm.each, 1}.chunks([&](int64_t begin, int64_t end) {
    Running sum, times;
    along(begin, end, [&](auto v, int64_t i) {
      v = load<decltype(v)>(dy + i) * load<decltype(v)>(weight + i);
      sum.add(v);
      times.add(v * (load<decltype(v)>(x + i) - mean - rest));
    });
    all += sum.total();
    tilted += times.total();
  });
  for (int32_t i = 0; i < norm.each; i++) {
    plain[i] += dy[i];
    leaning[i] += dy[i] * ((x[i] - mean - rest) * inverse);
  }
  if (!call.dx) return;
  const double by = inverse / (double)norm.count();
  const float b = (float)(-by * inverse * inverse * tilted), c = (float)(-by * all);
  float *dx = call.dx + first;
  along(0, norm.each, [&](auto v, int64_t i) {
    typedef decltype(v) V;
    store<V>(dx + i, load<V>(weight + i) * inverse * load<V>(dy + i) + (b * (load<V>(x + i) - mean - rest) + c));
  });
}

INLINE bool sound(const nk_norm *n) {
  if (n->samples < 1 || n->channels < 1 || n->inner < 1 || n->groups < 0) return false;
  if (n->groups && n->channels % n->groups) return false;
  return (int64_t)n->samples * n->channels <= (1LL << 31) - 1; /* sets are counted in 32 bits */
}

template <class F> static void over_sets(const Normed &norm, F task) {
  if (norm.size() > 1 << 15)
    parallel(norm.sets(), task);
  else
    for (int32_t set = 0; set < norm.sets(); set++) task(set);
}

} // namespace nk

extern "C" int32_t nk_norm_forward(const nk_norm *norm, const float *x, const float *weight, const float *bias,
                                   float epsilon, float *y, float *mean, float *rest, float *inverse,
                                   double *variance) {
  if (!nk::sound(norm)) return NK_SHAPE;
  nk::Normed normed(*norm);
  nk::over_sets(normed, [&](int32_t set) {
    nk::Moments found = nk::moments(normed.pieces(set), x, normed.count());
    float by = (float)(1 / __builtin_sqrt(found.variance + epsilon));
    nk::scale(normed, set, x, found, by, weight, bias, y);
    if (mean) mean[set] = found.mean;
    if (rest) rest[set] = found.rest;
    if (inverse) inverse[set] = by;
    if (variance) variance[set] = found.variance;
  });
  return NK_OK;
}

extern "C" int32_t nk_norm_fixed(const nk_norm *norm, const float *x, const float *weight, const float *bias,
                                 const float *mean, const float *inverse, float *y) {
  if (!nk::sound(norm) || norm->groups) return NK_SHAPE;
  nk::Normed normed(*norm);
  nk::over_sets(normed, [&](int32_t set) {
    nk::scale(normed, set, x, {mean[set], 0, 0}, inverse[set], weight, bias, y);
  });
  return NK_OK;
}

extern "C" int32_t nk_norm_backward(const nk_norm *norm, const float *x, const float *dy, const float *weight,
                                    const float *mean, const float *rest, const float *inverse, int32_t fixed,
                                    float *dx, double *sums) {
  if (!nk::sound(norm) || (fixed && norm->groups)) return NK_SHAPE;
  nk::NormCall call = {nk::Normed(*norm), x, dy, weight, mean, rest, inverse, fixed, dx, sums};
  if (call.norm.pooled)
    nk::over_sets(call.norm, [&](int32_t set) { nk::back_channel(call, set); });
  else
    for (int32_t set = 0; set < call.norm.sets(); set++)
      norm->inner == 1 ? nk::back_row(call, set) : nk::back_group(call, set);
  return NK_OK;
}
#endif
