/* What the kernels of a convolution rely on, checked: shapes, and every index. */
#ifndef NESTLING_CONV_CHECK_H
#define NESTLING_CONV_CHECK_H

namespace nk {

enum { SIDE_MAX = 1 << 15 };

INLINE nk_image conv_output(const nk_conv &l, const nk_image &in) {
  const int32_t reach = l.dilation * (l.kernel - 1) + 1 - 2 * l.padding;
  return {l.out_channels, (in.height - reach) / l.stride + 1, (in.width - reach) / l.stride + 1, 0};
}
INLINE bool image_fits(const nk_image &i) {
  if (i.channels < 1 || i.height < 1 || i.width < 1 || i.halo < 0) return false;
  if (i.height > SIDE_MAX || i.width > SIDE_MAX || i.halo > SIDE_MAX) return false;
  /* Offsets within a panel of 16 are 32-bit floats' counts. */
  return (int64_t)i.channels * (i.height + 2 * i.halo) * (i.width + 2 * i.halo) <= INT32_MAX / 16;
}
INLINE bool conv_input_fits(const nk_conv &l, const nk_image &in) {
  const int32_t reach = l.dilation * (l.kernel - 1) + 1 - 2 * l.padding;
  if (!image_fits(in) || in.channels != l.in_channels || in.halo < l.padding) return false;
  return in.height >= reach && in.width >= reach;
}
INLINE bool conv_output_fits(const nk_conv &l, const nk_image &in, const nk_image &out) {
  const nk_image right = conv_output(l, in);
  return image_fits(out) && out.channels == right.channels && out.height == right.height && out.width == right.width;
}

INLINE bool conv_shape_fits(const nk_conv &l) {
  const int32_t sides[] = {l.out_channels, l.in_channels, l.kernel, l.stride, l.dilation, l.in_block, l.out_block};
  for (int32_t side : sides)
    if (side < 1 || side > SIDE_MAX) return false;
  const int64_t taps = (int64_t)l.kernel * l.kernel;
  return l.padding >= 0 && l.padding <= SIDE_MAX && l.kept >= 0 && (int64_t)l.dilation * l.kernel <= SIDE_MAX &&
         l.in_block * taps <= 65536 && l.out_block * taps <= 65536 &&
         (l.in_channels + l.in_block - 1) / l.in_block == l.in_blocks &&
         (l.out_channels + l.out_block - 1) / l.out_block == l.out_blocks;
}

/* Ascending from 0 to kept over all blocks, each of which begins where the one before ended. */
INLINE bool starts_fit(const int32_t *starts, int32_t blocks, int32_t rows, int32_t kept) {
  int32_t at = 0;
  for (int64_t i = 0; i < (int64_t)blocks * (rows + 1); i++) {
    if (starts[i] < at || (i % (rows + 1) == 0 && starts[i] != at)) return false;
    at = starts[i];
  }
  return at == kept;
}

/* The codes of a row ascend and are codes of their block. */
INLINE bool codes_fit(const int32_t *starts, const uint16_t *codes, int32_t rows, int64_t limit) {
  for (int32_t i = 0; i < rows; i++) {
    int32_t last = -1;
    for (int32_t k = starts[i]; k < starts[i + 1]; k++) {
      if (codes[k] <= last || codes[k] >= limit) return false;
      last = codes[k];
    }
  }
  return true;
}

/* Every entry of the transposed list is one of the list: the same weight, by both indices. */
static bool places_fit(const nk_conv &l) {
  const int32_t taps = l.kernel * l.kernel;
  for (int32_t o = 0; o < l.out_blocks; o++)
    for (int32_t c = 0; c < l.in_channels; c++) {
      const int32_t *starts_t = l.starts_t + (int64_t)o * (l.in_channels + 1) + c;
      const int32_t *starts = l.starts + (int64_t)(c / l.in_block) * (l.out_channels + 1);
      const int32_t base = starts[o * l.out_block];
      for (int32_t k = starts_t[0]; k < starts_t[1]; k++) {
        const int32_t row = o * l.out_block + l.codes_t[k] / taps;
        const int64_t at = (int64_t)base + l.places[k];
        if (at < starts[row] || at >= starts[row + 1]) return false;
        if (l.codes[at] != c % l.in_block * taps + l.codes_t[k] % taps) return false;
      }
    }
  return true;
}

static int32_t conv_check(const nk_conv &l) {
  if (!conv_shape_fits(l)) return NK_SHAPE;
  if (!starts_fit(l.starts, l.in_blocks, l.out_channels, l.kept)) return NK_STARTS;
  if (!starts_fit(l.starts_t, l.out_blocks, l.in_channels, l.kept)) return NK_STARTS;
  const int64_t taps = (int64_t)l.kernel * l.kernel;
  for (int32_t b = 0; b < l.in_blocks; b++) {
    const int32_t left = l.in_channels - b * l.in_block, channels = left < l.in_block ? left : l.in_block;
    const int32_t *starts = l.starts + (int64_t)b * (l.out_channels + 1);
    if (!codes_fit(starts, l.codes, l.out_channels, channels * taps)) return NK_INDEX;
  }
  for (int32_t b = 0; b < l.out_blocks; b++) {
    const int32_t left = l.out_channels - b * l.out_block, channels = left < l.out_block ? left : l.out_block;
    const int32_t *starts = l.starts_t + (int64_t)b * (l.in_channels + 1);
    if (!codes_fit(starts, l.codes_t, l.in_channels, channels * taps)) return NK_INDEX;
  }
  return places_fit(l) ? NK_OK : NK_INDEX;
}

} // namespace nk
#endif
