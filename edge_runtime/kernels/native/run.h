/* Lists of calls: what a step of a model asks of the core, with one crossing from the caller's language. */
#ifndef NESTLING_RUN_H
#define NESTLING_RUN_H

extern "C" int32_t nk_settle(float *values, int32_t count, float *gradient, const nk_update *update) {
  if (count < 0 || !update || !nk::settles(nullptr, update)) return NK_SHAPE;
  nk::Settle(values, nullptr, update).run(0, count, gradient);
  memset(gradient, 0, (size_t)count * sizeof(float));
  return NK_OK;
}

namespace nk {

static int32_t run_one(const nk_call &c) {
  float *const a = (float *)c.a, *const b = (float *)c.b, *const d = (float *)c.d;
  float *const e = (float *)c.e, *const f = (float *)c.f, *const g = (float *)c.g, *const third = (float *)c.c;
  const nk_linear *linear = (const nk_linear *)c.layer;
  const nk_conv *conv = (const nk_conv *)c.layer;
  switch (c.what) {
  case NK_PACK: return nk_pack(c.first, c.batch, a, b);
  case NK_UNPACK: return nk_unpack(c.first, c.batch, a, b);
  case NK_LINEAR_FORWARD: return nk_linear_forward(linear, a, b, third, c.batch, c.relu, d);
  case NK_LINEAR_BACKWARD: return nk_linear_backward(linear, a, b, third, d, c.batch, e, f, g, c.update);
  case NK_POOL_FORWARD:
    return nk_pool_forward(c.first, c.batch, c.size, c.relu, a, c.second, b, (uint8_t *)c.c);
  case NK_POOL_BACKWARD:
    return nk_pool_backward(c.first, c.batch, c.size, c.relu, (uint8_t *)c.a, c.second, b, third, c.third, d, e);
  case NK_CONV_FORWARD: return nk_conv_forward(conv, a, b, c.first, third, c.batch, c.relu, d);
  case NK_CONV_BACKWARD_INPUT: return nk_conv_backward_input(conv, a, c.first, c.second, b, c.batch, third);
  case NK_CONV_BACKWARD_WEIGHT:
    return nk_conv_backward_weight(conv, a, c.first, b, c.second, third, c.batch, d, c.update);
  case NK_CROSS_ENTROPY:
    return nk_cross_entropy(a, c.batch, c.size, (const int64_t *)c.b, c.scale, third, (double *)c.d);
  case NK_SETTLE: return nk_settle(a, c.size, b, c.update);
  case NK_CONV_POOL_FORWARD:
    return nk_conv_pool_forward(conv, a, b, c.first, third, c.batch, c.second, c.size, c.relu, c.third, d,
                                (uint8_t *)c.e);
  case NK_CONV_POOL_BACKWARD:
    return nk_conv_pool_backward(conv, a, c.first, b, c.batch, c.second, c.size, c.relu, c.third, third,
                                 (uint8_t *)c.d, e, f, g, c.update);
  default: return NK_SHAPE;
  }
}

} // namespace nk

extern "C" int32_t nk_run(const nk_call *calls, int32_t count) {
  for (int32_t i = 0; i < count; i++)
    if (int32_t code = nk::run_one(calls[i])) return code + 256 * i;
  return NK_OK;
}
#endif
