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

#define NK_ABI 1

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

/* Max pool (size = stride = kernel; 1: none) behind an optional relu: from `from` (no halo) to `to` (any halo, made
   zero). */
int32_t nk_pool_forward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
                        const nk_image *to, float *out);
/* Its gradient, written into `dy` as image `into` (same channels and sides as `from`, any halo, made zero). y and out
   are those of the forward pass, out as image `to`; dout has no halo. dy may take the place of y if it has no halo.
   dbias (null: not wanted) += sums of dy by channel. */
int32_t nk_pool_backward(const nk_image *from, int32_t batch, int32_t kernel, int32_t relu, const float *y,
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

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
