/* Cross-entropy of a batch, with nothing of the mathematics library: exp in float32, log in double precision. Cost: some
   thirty operations for each logit; no memory. */
#ifndef NESTLING_LOSS_H
#define NESTLING_LOSS_H

namespace nk {

/* exp(x) for x <= 0 to two units in the last place; 0 below -87, a NaN stays one. 2^k exp(r), r within half of log 2. */
INLINE float exp_down(float x) {
  float below = x < -87.0f ? -87.0f : x;
  /* Not by adding and taking away a large number: what 32-bit ARM is compiled with takes that for nothing. */
  int32_t whole = below == below ? (int32_t)(below * 1.44269504f - 0.5f) : 0;
  float k = (float)whole;
  float r = (below - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t power = (whole + 127) << 23;
  float two;
  memcpy(&two, &power, sizeof two);
  p *= two;
  return x < -87.0f ? 0 : p;
}

/* log(x) for x > 0 that is a normal number; a NaN stays one. x = 2^k m, log m = 2 artanh((m - 1) / (m + 1)). */
INLINE double log_of(double x) {
  if (!(x > 0)) return x * 0 / 0.0;
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  int64_t k = (bits >> 52) - 1023;
  if (k > 1023) return x; /* infinity, or no number */
  bits = (bits & 0xfffffffffffffll) | (1023ll << 52);
  double m;
  memcpy(&m, &bits, sizeof m);
  if (m > 1.4142135623730951) m *= 0.5, k++;
  double s = (m - 1) / (m + 1), square = s * s, sum = 0;
  for (int32_t i = 21; i > 0; i -= 2) sum = sum * square + 1.0 / i;
  return (double)k * 0.6931471805599453 + 2 * s * sum;
}

static int32_t cross_entropy(const float *logits, int32_t n, int32_t classes, const int64_t *labels, float scale,
                             float *gradient, double *loss) {
  double total = 0;
  const float share = scale / (float)n;
  for (int32_t i = 0; i < n; i++, logits += classes) {
    const int64_t label = labels[i];
    if (label < 0 || label >= classes) return NK_INDEX;
    float most = logits[0];
    for (int32_t j = 1; j < classes; j++) most = logits[j] > most ? logits[j] : most;
    double sum = 0;
    if (gradient) {
      float *odds = gradient + (int64_t)i * classes;
      for (int32_t j = 0; j < classes; j++) odds[j] = exp_down(logits[j] - most);
      for (int32_t j = 0; j < classes; j++) sum += odds[j];
      const float each = (float)(1 / sum);
      for (int32_t j = 0; j < classes; j++) odds[j] *= each;
      odds[label] -= 1;
      for (int32_t j = 0; j < classes; j++) odds[j] *= share;
    } else {
      for (int32_t j = 0; j < classes; j++) sum += exp_down(logits[j] - most);
    }
    total += log_of(sum) + ((double)most - logits[label]);
  }
  *loss = total / n;
  return NK_OK;
}

} // namespace nk

extern "C" int32_t nk_cross_entropy(const float *logits, int32_t n, int32_t classes, const int64_t *labels, float scale,
                                    float *gradient, double *loss) {
  if (n < 1 || classes < 1) return NK_SHAPE;
  return nk::cross_entropy(logits, n, classes, labels, scale, gradient, loss);
}
#endif
