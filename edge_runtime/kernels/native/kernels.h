/* The C ABI of the sparse kernels. Plain C types, no allocation that outlives a call, no dependency but libc.

   Panels. The batch is rounded up to a multiple of 4 and cut into panels: as many of 16 samples as fit, then one of 8
   and one of 4 if what is left needs them. A buffer of R rows holds its panels one after another, each [R][width of the
   panel]. So a row of a panel of 16 is one cache line, whatever the vector length of the machine. Buffers start at a
   multiple of 64 bytes. Samples that only fill up the last panel are finite, and zero wherever a gradient is.

   Images. The rows of an activation are [channels][height + 2 halo][width + 2 halo]; the halo is a border of zeros. The
   input of a linear layer is an image of height and width 1.

   Gradients are added to what is there; where an nk_update is given instead, the values move at once.

   A NaN stays one through relu and pool, as in torch.

   Any number of threads may call at once, for as many layers: one of them has the threads of nk_threads, the others
   work alone. Every function that can fail gives 0 or one of the NK_ codes. */
#ifndef NESTLING_KERNELS_H
#define NESTLING_KERNELS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default) /* all else is compiled with -fvisibility=hidden */

#define NK_ABI 3

enum { NK_OK = 0, NK_SHAPE = 1, NK_STARTS = 2, NK_INDEX = 3, NK_MEMORY = 4 };

typedef struct {
  int32_t channels, height, width, halo;
} nk_image;

/* g += decay * w + pull * (w - anchor); v = momentum * v + g; w -= rate * v (without momentum: w -= rate * g) */
typedef struct {
  float rate, momentum, decay, pull;
  float *velocity;     /* [kept], needed with momentum */
  const float *anchor; /* [kept], needed with pull */
} nk_update;

/* A sparse matrix [rows][columns], cut into blocks of columns; within a block by row, within a row by column. */
typedef struct {
  int32_t rows, columns;
  int32_t block, blocks; /* columns per block (the last may be shorter), and how many */
  int32_t index_bytes;   /* 1 (block <= 256) or 2 */
  int32_t kept;
  const int32_t *starts; /* [blocks][rows + 1]: absolute positions, ascending from 0 to kept */
  const void *index;     /* [kept]: the column within its block */
} nk_linear;

int32_t nk_abi(void);
int32_t nk_lanes(void); /* floats per vector of this build */
/* Set the number of threads of all later calls (1 to 64); they are started when first needed. Not thread-safe. */
int32_t nk_threads(int32_t count);

/* [batch][channels][height][width] to panels, halo set to zero, and back (the halo is not read). */
int32_t nk_pack(const nk_image *image, int32_t batch, const float *x, float *panels);
int32_t nk_unpack(const nk_image *image, int32_t batch, const float *panels, float *x);

/* Is every start in order and every index within its block? O(kept); to be called once, before anything else. */
int32_t nk_linear_check(const nk_linear *layer);
/* y = relu?(W x + bias); y has rows [layer->rows]. bias may be null. */
int32_t nk_linear_forward(const nk_linear *layer, const float *values, const float *bias, const float *x, int32_t batch,
                          int32_t relu, float *y);
/* dx = W' dy (null: not wanted), dvalues += dy x' at the kept positions (or update, see above), dbias += sum of dy over
   the batch. y: output of the forward pass if it had a relu, null if not; then dy is masked in place. */
int32_t nk_linear_backward(const nk_linear *layer, float *values, const float *x, const float *y, float *dy,
                           int32_t batch, float *dx, float *dvalues, float *dbias, const nk_update *update);

/* Max pool (size = stride = kernel, 16 at most; 1: none) behind an optional relu: from `from` (no halo) to `to` (any
   halo, made zero). places (null: not kept): of each maximum its place in the window, by row, as a byte; as large as a
   panelled buffer of `to` without halo, in bytes. */
int32_t nk_pool_forward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
                        const nk_image *to, float *out, uint8_t *places);
/* Its gradient, written into `dy` as image `into` (same channels and sides as `from`, any halo, made zero). places (not
   read where the kernel is 1) and out are those of the forward pass, out as image `to`, read only if it had a relu; dout
   has no halo. dbias (null: not wanted) += sums of dy by channel. */
int32_t nk_pool_backward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const uint8_t *places,
                         const nk_image *to, const float *out, const float *dout, const nk_image *into, float *dy,
                         float *dbias);

/* A sparse convolution [out_channels][in_channels][kernel][kernel], blocks of input channels for the forward pass and
   the weights' gradient, blocks of output channels for the gradient of the input. starts and starts_t are absolute
   positions. The order of `codes` is (block, out channel, in channel, ky, kx), that of `codes_t` (out block, in
   channel, out channel, ky, kx). */
typedef struct {
  int32_t out_channels, in_channels, kernel, stride, padding, dilation;
  int32_t in_block, in_blocks, out_block, out_blocks;
  int32_t kept;
  const int32_t *starts;   /* [in_blocks][out_channels + 1] */
  const uint16_t *codes;   /* [kept]: (in channel - in_block * block) * kernel^2 + ky * kernel + kx */
  const int32_t *starts_t; /* [out_blocks][in_channels + 1] */
  const uint16_t *codes_t; /* [kept]: (out channel - out_block * block) * kernel^2 + ky * kernel + kx */
  const uint16_t *places;  /* [kept]: where the value stands, counted from
                              starts[in block of the in channel][out_block * out block] */
} nk_conv;

int32_t nk_conv_check(const nk_conv *layer);
/* y (no halo, height and width of the output) = relu?(conv(x) + bias). x is image `in`, halo = padding. */
int32_t nk_conv_forward(const nk_conv *layer, const float *values, const float *bias, const nk_image *in,
                        const float *x, int32_t batch, int32_t relu, float *y);
/* dx (no halo, sides of `in`) from dy as image `out` with halo = dilation * (kernel - 1) - padding (0 if less). */
int32_t nk_conv_backward_input(const nk_conv *layer, const float *values, const nk_image *in, const nk_image *out,
                               const float *dy, int32_t batch, float *dx);
/* dvalues += gradient at the kept positions, or update. x is image `in` (halo = padding), dy image `out` (any halo). */
int32_t nk_conv_backward_weight(const nk_conv *layer, float *values, const nk_image *in, const float *x,
                                const nk_image *out, const float *dy, int32_t batch, float *dvalues,
                                const nk_update *update);

/* A convolution with the pool behind it (relu between them), where it reads 4 channels at most and what it makes (`made`,
   no halo) has 1024 pixels at most; what it makes is not kept. As nk_conv_forward and nk_pool_forward; and backward as
   nk_pool_backward and nk_conv_backward_weight. */
int32_t nk_conv_pool_forward(const nk_conv *layer, const float *values, const float *bias, const nk_image *in,
                             const float *x, int32_t batch, const nk_image *made, int32_t kernel, int32_t relu,
                             const nk_image *to, float *out, uint8_t *places);
int32_t nk_conv_pool_backward(const nk_conv *layer, float *values, const nk_image *in, const float *x, int32_t batch,
                              const nk_image *made, int32_t kernel, int32_t relu, const nk_image *to, const float *out,
                              const uint8_t *places, const float *dout, float *dbias, float *dvalues,
                              const nk_update *update);

/* Write a layer's index from its mask's bits (element i in C order is bit i % 8, lowest first, of byte i / 8; `bytes` of
   them): all arrays of the layer, which are the caller's and of their full length. NK_STARTS where not `kept` bits are
   set; NK_INDEX where a pair of a convolution's blocks keeps more than 65536. */
int32_t nk_linear_lay(const nk_linear *layer, const uint8_t *bits, int32_t bytes);
int32_t nk_conv_lay(const nk_conv *layer, const uint8_t *bits, int32_t bytes);
/* Bring values from C order into the order of a layer in blocks with these starts, or back. from and to: [kept]. */
int32_t nk_reorder(const int32_t *starts, int32_t blocks, int32_t rows, int32_t kept, const float *from, float *to,
                   int32_t back);

/* The mean over n samples of log sum exp(logits) - logits[label], and in `gradient` (null: not wanted) `scale` times its
   gradient to the logits. Both are [n][classes]. NK_INDEX where a label is no class. */
int32_t nk_cross_entropy(const float *logits, int32_t n, int32_t classes, const int64_t *labels, float scale,
                         float *gradient, double *loss);

/* Move values along a gradient, which is set to zero. */
int32_t nk_settle(float *values, int32_t count, float *gradient, const nk_update *update);

/* One call of a list, prepared once and run at every step: which function, and its arguments: images are first to third
   and arrays a to g in the function's own order; `size` is a kernel, a count or classes. */
enum {
  NK_PACK = 1, NK_UNPACK, NK_LINEAR_FORWARD, NK_LINEAR_BACKWARD, NK_POOL_FORWARD, NK_POOL_BACKWARD, NK_CONV_FORWARD,
  NK_CONV_BACKWARD_INPUT, NK_CONV_BACKWARD_WEIGHT, NK_CROSS_ENTROPY, NK_SETTLE, NK_CONV_POOL_FORWARD,
  NK_CONV_POOL_BACKWARD
};
typedef struct {
  int32_t what, batch, size, relu;
  float scale;
  const void *layer; /* nk_linear or nk_conv */
  const nk_image *first, *second, *third;
  const nk_update *update;
  void *a, *b, *c, *d, *e, *f, *g;
} nk_call;
/* Run a list until one fails: gives 0, or its code plus 256 times its place. */
int32_t nk_run(const nk_call *calls, int32_t count);

/* Windows over planes of activations that lie as [samples][held][height][width], without panels. The output's sides
   follow from the others. A group of a convolution takes `channels` of the `held` ones, from where its pointer is. */
typedef struct {
  int32_t channels, held, height, width, out_height, out_width;
  int32_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x;
} nk_window;

/* columns[channel][ky][kx][sample][place of the output] = what the window there has at (ky, kx), 0 outside; and their
   sums by where they came from, written to dx. The latter spoils the columns. */
int32_t nk_window_take(const nk_window *window, int32_t samples, const float *x, float *columns);
int32_t nk_window_give(const nk_window *window, int32_t samples, float *columns, float *dx);
/* Each of `channels` by a kernel of its own. dx (null: not wanted), dweight and dbias are written. scratch: of `length`
   floats, see windows_depth.h. */
int32_t nk_depth_forward(const nk_window *window, int32_t samples, const float *x, const float *weight,
                         const float *bias, float *y, float *scratch, int32_t length);
int32_t nk_depth_backward(const nk_window *window, int32_t samples, const float *x, const float *weight,
                          const float *dy, float *dx, float *dweight, float *dbias, float *scratch, int32_t length);
/* Every one of `outs` (of `held` in memory) channels of the output from every one of `channels`: weight[outs][channels]
   [kernel_y][kernel_x]. dx (null: not wanted) is written, dweight and dbias are added to. scratch: of `length` floats, see
   windows_dense.h. */
int32_t nk_dense_forward(const nk_window *window, int32_t outs, int32_t held, int32_t samples, const float *x,
                         const float *weight, const float *bias, float *y, float *scratch, int32_t length);
int32_t nk_dense_backward(const nk_window *window, int32_t outs, int32_t held, int32_t samples, const float *x,
                          const float *weight, const float *dy, float *dx, float *dweight, float *dbias, float *scratch,
                          int32_t length);
/* Pools over `planes` planes, no padding. places (null: not wanted): where in its plane each maximum stands. even: the
   windows of a mean share the sides as evenly as they can, whatever kernel and stride are. */
int32_t nk_most_forward(const nk_window *window, int32_t planes, const float *x, float *y, int32_t *places);
int32_t nk_most_backward(const nk_window *window, int32_t planes, const float *dy, const int32_t *places, float *dx);
int32_t nk_mean_forward(const nk_window *window, int32_t planes, int32_t even, const float *x, float *y);
int32_t nk_mean_backward(const nk_window *window, int32_t planes, int32_t even, const float *dy, float *dx);

/* Norms of [samples][channels][inner]. A statistic is taken over each of `groups` runs of channels of each sample, or where
   `groups` is 0 over each channel of all samples: so many `sets`. Layer norm: one group, inner 1. */
typedef struct {
  int32_t samples, channels, inner, groups;
} nk_norm;

/* y = (x - mean) / sqrt(variance + epsilon) * weight + bias, with what x itself has. Of each set (null: not wanted): mean
   and rest, whose sum is the mean, inverse of the root, variance over n. x and y may be the same. */
int32_t nk_norm_forward(const nk_norm *norm, const float *x, const float *weight, const float *bias, float epsilon,
                        float *y, float *mean, float *rest, float *inverse, double *variance);
/* The same by given statistics of each channel; groups is 0. */
int32_t nk_norm_fixed(const nk_norm *norm, const float *x, const float *weight, const float *bias, const float *mean,
                      const float *inverse, float *y);
/* dx (null: not wanted; may be dy) is written. sums: [2][channels], of dy and of dy (x - mean) inverse: written where groups
   is 0, else added to. fixed: the statistics were given, no gradient goes through them. */
int32_t nk_norm_backward(const nk_norm *norm, const float *x, const float *dy, const float *weight, const float *mean,
                         const float *rest, const float *inverse, int32_t fixed, float *dx, double *sums);

/* One step over all samples, behind its products: `given` of the input, `asked` of the hidden state (null: there was none),
   both [samples][gates]. `before` is the state, or of a GRU the output, of the step before (null: 0). A sample's entries in
   gates, inner, y and dy are so many floats (`_step`) from the next one's. */
int32_t nk_lstm_forward(int32_t samples, int32_t hidden, const float *given, const float *asked, const float *bias,
                        const float *before, float *cell, float *gates, int32_t gates_step, float *y, int32_t y_step);
int32_t nk_gru_forward(int32_t samples, int32_t hidden, const float *given, const float *asked, const float *bias_ih,
                       const float *bias_hh, const float *before, float *gates, int32_t gates_step, float *inner,
                       int32_t inner_step, float *y, int32_t y_step);
/* gates (null in a forward pass: not wanted), and of a GRU inner, turn into their gradients. `asked`: what the next step
   hands back to the output (null: there is none). dcell and carry take what came from the next step, and give. dz: [samples]
   [gates], what goes back to the hidden state. */
int32_t nk_lstm_backward(int32_t samples, int32_t hidden, const float *dy, int32_t dy_step, const float *asked,
                         const float *cell, const float *before, float *gates, int32_t gates_step, float *dcell);
int32_t nk_gru_backward(int32_t samples, int32_t hidden, const float *dy, int32_t dy_step, const float *asked,
                        const float *before, int32_t y_step, float *gates, int32_t gates_step, float *inner,
                        int32_t inner_step, float *dz, float *carry);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
