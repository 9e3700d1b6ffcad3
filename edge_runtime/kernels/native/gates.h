/* One step of an LSTM or a GRU behind its products: gates, state and output in one pass, and their gradients.

   e^x is 2^k e^r with |r| <= ln 2 / 2 and the series of e^r to the seventh power, whose rest is below 1e-8. A tanh is its own
   series near 0, where the quotient of exponentials would lose digits. What is no number stays none. */
#ifndef NESTLING_GATES_H
#define NESTLING_GATES_H

namespace nk {

template <class V> struct Whole {
  typedef int32_t type __attribute__((vector_size(sizeof(V))));
};
template <> struct Whole<float> {
  typedef int32_t type;
};
template <class To, class From> INLINE To converted(From value) {
  if constexpr (sizeof(From) == sizeof(float))
    return (To)value;
  else
    return __builtin_convertvector(value, To);
}

template <class V> INLINE V exponential(V x) {
  typedef typename Whole<V>::type W;
  const V most = V{} + 87.0f, half = V{} + 0.5f; /* beyond `most` a result counts as 0, or as more than all others */
  V within = x > most ? most : x;
  within = within < -most ? -most : within;
  within = within == within ? within : V{}; /* what is no number has no whole part */
  W whole = converted<W>(within * 1.44269504f + (within < V{} ? -half : half));
  V k = converted<V>(whole);
  V r = (within - k * 0.693145752f) - k * 1.42860677e-6f; /* ln 2 in two parts, the first of few digits */
  V sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  W bits = (whole + 127) << 23;
  V power;
  memcpy(&power, &bits, sizeof power);
  return x == x ? sum * power : x;
}

template <class V> INLINE V sigmoid(V x) { return 1.0f / (exponential(-x) + 1.0f); }

template <class V> INLINE V hyperbolic(V x) {
  V far = 1.0f - 2.0f / (exponential(x + x) + 1.0f), square = x * x;
  V near = square * (-1382.0f / 155925) + 62.0f / 2835;
  near = near * square - 17.0f / 315;
  near = near * square + 2.0f / 15;
  near = near * square - 1.0f / 3;
  near = near * square * x + x;
  return square < V{} + 0.09f ? near : far;
}

} // namespace nk

extern "C" int32_t nk_lstm_forward(int32_t samples, int32_t hidden, const float *given, const float *asked,
                                   const float *bias, const float *before, float *cell, float *gates,
                                   int32_t gates_step, float *y, int32_t y_step) {
  if (samples < 1 || hidden < 1) return NK_SHAPE;
  for (int64_t s = 0; s < samples; s++) {
    const float *from = given + 4 * s * hidden, *also = asked ? asked + 4 * s * hidden : nullptr;
    const float *earlier = before ? before + s * hidden : nullptr;
    float *state = cell + s * hidden, *kept = gates ? gates + s * gates_step : nullptr, *out = y + s * y_step;
    nk::along(0, hidden, [&](auto v, int64_t j) {
      typedef decltype(v) V;
      V z[4];
      for (int64_t gate = 0; gate < 4; gate++) {
        int64_t place = gate * hidden + j;
        z[gate] = nk::load<V>(from + place) + nk::load<V>(bias + place);
        if (also) z[gate] += nk::load<V>(also + place);
        z[gate] = gate == 2 ? nk::hyperbolic(z[gate]) : nk::sigmoid(z[gate]);
        if (kept) nk::store<V>(kept + place, z[gate]);
      }
      V now = z[0] * z[2];
      if (earlier) now += z[1] * nk::load<V>(earlier + j);
      nk::store<V>(state + j, now);
      nk::store<V>(out + j, z[3] * nk::hyperbolic(now));
    });
  }
  return NK_OK;
}

extern "C" int32_t nk_lstm_backward(int32_t samples, int32_t hidden, const float *dy, int32_t dy_step,
                                    const float *asked, const float *cell, const float *before, float *gates,
                                    int32_t gates_step, float *dcell) {
  if (samples < 1 || hidden < 1) return NK_SHAPE;
  for (int64_t s = 0; s < samples; s++) {
    const float *came = dy + s * dy_step, *also = asked ? asked + s * hidden : nullptr;
    const float *earlier = before ? before + s * hidden : nullptr, *state = cell + s * hidden;
    float *kept = gates + s * gates_step, *carried = dcell + s * hidden;
    nk::along(0, hidden, [&](auto v, int64_t j) {
      typedef decltype(v) V;
      float *at[4] = {kept + j, kept + hidden + j, kept + 2 * (int64_t)hidden + j, kept + 3 * (int64_t)hidden + j};
      V i = nk::load<V>(at[0]), f = nk::load<V>(at[1]), g = nk::load<V>(at[2]), o = nk::load<V>(at[3]);
      V dh = nk::load<V>(came + j), out = nk::hyperbolic(nk::load<V>(state + j));
      if (also) dh += nk::load<V>(also + j);
      V dc = nk::load<V>(carried + j) + dh * o * (1.0f - out * out);
      V last = earlier ? nk::load<V>(earlier + j) : V{};
      nk::store<V>(at[0], dc * g * i * (1.0f - i));
      nk::store<V>(at[1], dc * last * f * (1.0f - f));
      nk::store<V>(at[2], dc * i * (1.0f - g * g));
      nk::store<V>(at[3], dh * out * o * (1.0f - o));
      nk::store<V>(carried + j, dc * f);
    });
  }
  return NK_OK;
}

extern "C" int32_t nk_gru_forward(int32_t samples, int32_t hidden, const float *given, const float *asked,
                                  const float *bias_ih, const float *bias_hh, const float *before, float *gates,
                                  int32_t gates_step, float *inner, int32_t inner_step, float *y, int32_t y_step) {
  if (samples < 1 || hidden < 1) return NK_SHAPE;
  for (int64_t s = 0; s < samples; s++) {
    const float *from = given + 3 * s * hidden, *also = asked ? asked + 3 * s * hidden : nullptr;
    const float *earlier = before ? before + s * y_step : nullptr;
    float *kept = gates ? gates + s * gates_step : nullptr, *within = inner ? inner + s * inner_step : nullptr;
    float *out = y + s * y_step;
    nk::along(0, hidden, [&](auto v, int64_t j) {
      typedef decltype(v) V;
      V z[3], weighed = V{};
      for (int64_t gate = 0; gate < 3; gate++) {
        int64_t place = gate * hidden + j;
        V hand = nk::load<V>(bias_hh + place);
        if (also) hand += nk::load<V>(also + place);
        z[gate] = nk::load<V>(from + place) + nk::load<V>(bias_ih + place);
        if (gate == 2) weighed = hand;
        z[gate] = gate == 2 ? nk::hyperbolic(z[2] + z[0] * hand) : nk::sigmoid(z[gate] + hand);
        if (kept) nk::store<V>(kept + place, z[gate]);
      }
      if (within) nk::store<V>(within + j, weighed);
      V last = earlier ? nk::load<V>(earlier + j) : V{};
      nk::store<V>(out + j, z[2] + z[1] * (last - z[2]));
    });
  }
  return NK_OK;
}

extern "C" int32_t nk_gru_backward(int32_t samples, int32_t hidden, const float *dy, int32_t dy_step,
                                   const float *asked, const float *before, int32_t y_step, float *gates,
                                   int32_t gates_step, float *inner, int32_t inner_step, float *dz, float *carry) {
  if (samples < 1 || hidden < 1) return NK_SHAPE;
  for (int64_t s = 0; s < samples; s++) {
    const float *came = dy + s * dy_step, *also = asked ? asked + s * hidden : nullptr;
    const float *earlier = before ? before + s * y_step : nullptr;
    float *kept = gates + s * gates_step, *within = inner + s * inner_step, *into = dz + 3 * s * hidden;
    float *carried = carry + s * hidden;
    nk::along(0, hidden, [&](auto v, int64_t j) {
      typedef decltype(v) V;
      const int64_t second = hidden + j, third = 2 * (int64_t)hidden + j;
      V r = nk::load<V>(kept + j), u = nk::load<V>(kept + second), n = nk::load<V>(kept + third);
      V dh = nk::load<V>(came + j), last = earlier ? nk::load<V>(earlier + j) : V{};
      if (also) dh += nk::load<V>(also + j) + nk::load<V>(carried + j);
      V dn = dh * (1.0f - u) * (1.0f - n * n);
      V dr = dn * nk::load<V>(within + j) * r * (1.0f - r), du = dh * (last - n) * u * (1.0f - u);
      nk::store<V>(carried + j, dh * u);
      nk::store<V>(within + j, dn * r);
      nk::store<V>(kept + j, dr);
      nk::store<V>(kept + second, du);
      nk::store<V>(kept + third, dn);
      nk::store<V>(into + j, dr);
      nk::store<V>(into + second, du);
      nk::store<V>(into + third, dn * r);
    });
  }
  return NK_OK;
}
#endif
