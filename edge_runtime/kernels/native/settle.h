/* What becomes of a gradient of kept values: added to the others, or the values move at once. */
#ifndef NESTLING_SETTLE_H
#define NESTLING_SETTLE_H

namespace nk {

struct Settle {
  float *values, *dvalues; /* dvalues null: update */
  nk_update u;
  MEMBER Settle(float *values, float *dvalues, const nk_update *update) : values(values), dvalues(dvalues), u() {
    if (!dvalues) u = *update;
  }
  template <class V> MEMBER void at(int64_t k, V g) const {
    if (dvalues) {
      store<V>(dvalues + k, load<V>(dvalues + k) + g);
      return;
    }
    V w = load<V>(values + k);
    if (u.decay) g += u.decay * w;
    if (u.pull) g += u.pull * (w - load<V>(u.anchor + k));
    if (u.momentum) {
      g += u.momentum * load<V>(u.velocity + k);
      store<V>(u.velocity + k, g);
    }
    store<V>(values + k, w - u.rate * g);
  }
  MEMBER void at(int64_t k, float g) const {
    if (dvalues) {
      dvalues[k] += g;
      return;
    }
    float w = values[k];
    if (u.decay) g += u.decay * w;
    if (u.pull) g += u.pull * (w - u.anchor[k]);
    if (u.momentum) u.velocity[k] = g += u.momentum * u.velocity[k];
    values[k] = w - u.rate * g;
  }
  /* A run of gradients that were gathered elsewhere. */
  MEMBER void run(int64_t k, int64_t count, const float *g) const {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) at<vec>(k + i, load<vec>(g + i));
    for (; i < count; i++) at(k + i, g[i]);
  }
};

INLINE bool settles(const float *dvalues, const nk_update *u) {
  if (!dvalues == !u) return false;
  return !u || ((!u->momentum || u->velocity) && (!u->pull || u->anchor));
}

} // namespace nk
#endif
