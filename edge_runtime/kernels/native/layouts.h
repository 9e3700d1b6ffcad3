/* Where kept weights stand, from a mask's bits: element i in C order is bit i % 8, lowest first, of byte i / 8. One pass
   over the bits to count, one to fill; memory: none beside the caller's. What is written follows from the bits alone, and
   never goes beyond `kept`, whatever they are. */
#ifndef NESTLING_LAYOUTS_H
#define NESTLING_LAYOUTS_H

#include <string.h>

namespace nk {

struct Bits {
  const uint8_t *at;
  int64_t bytes;
};

/* The elements from `from` to before `to`, up to 64 at a time: f(first, word), whose bit k is element first + k. */
template <class F> INLINE void words(const Bits &bits, int64_t from, int64_t to, F f) {
  const int32_t shift = (int32_t)(from & 7), step = shift ? 56 : 64; /* whole bytes: the shift stays */
  const uint64_t all = ~(uint64_t)0 >> (64 - step);
  for (int64_t byte = from >> 3; to - from >= step && byte + 8 <= bits.bytes; from += step, byte += step / 8) {
    uint64_t word;
    memcpy(&word, bits.at + byte, 8);
    f(from, word >> shift & all);
  }
  while (from < to) {
    const int64_t count = to - from < 8 - (from & 7) ? to - from : 8 - (from & 7);
    f(from, (uint64_t)(bits.at[from >> 3] >> (from & 7)) & (((uint64_t)1 << count) - 1));
    from += count;
  }
}

/* Write the places of a word's ones; gives how many. Four are written whether they are there or not, where there is room:
   what is too much is written over by what comes next. */
template <class I> INLINE int32_t spell(uint64_t word, uint32_t first, I *to, int64_t room) {
  const int32_t ones = __builtin_popcountll(word);
  int32_t k = 0;
  if (room >= 4)
    for (; k < 4; k++, word &= word - 1) to[k] = (I)(first + (uint32_t)__builtin_ctzll(word | (uint64_t)1 << 63));
  for (; k < ones; k++, word &= word - 1) to[k] = (I)(first + (uint32_t)__builtin_ctzll(word));
  return ones;
}

/* A matrix in blocks of columns: starts [blocks][rows + 1], and of each kept weight the column within its block. */
template <class I>
static int32_t lay(const Bits &bits, int32_t rows, int64_t columns, int64_t block, int32_t blocks, int32_t kept,
                   int32_t *starts, I *index) {
  int64_t sum = 0;
  for (int32_t b = 0; b < blocks; b++) {
    int32_t *row = starts + b * (int64_t)(rows + 1);
    const int64_t width = b + 1 == blocks ? columns - b * block : block;
    row[0] = (int32_t)sum;
    for (int32_t r = 0; r < rows; r++) {
      const int64_t from = r * columns + b * block;
      words(bits, from, from + width, [&](int64_t, uint64_t word) { sum += __builtin_popcountll(word); });
      if (sum > kept) return NK_STARTS;
      row[r + 1] = (int32_t)sum;
    }
  }
  if (sum != kept) return NK_STARTS;
  int64_t done = 0; /* ascends throughout */
  for (int32_t b = 0; b < blocks; b++) {
    const int64_t width = b + 1 == blocks ? columns - b * block : block;
    for (int32_t r = 0; r < rows; r++) {
      const int64_t from = r * columns + b * block;
      words(bits, from, from + width, [&](int64_t first, uint64_t word) {
        done += spell(word, (uint32_t)(first - from), index + done, kept - done);
      });
    }
  }
  return NK_OK;
}

/* The transposed list of a convolution: each row of starts_t counts first, then says where the next entry goes, and ends
   as what it should be: where the next channel's begin. */
static int32_t lay_across(const nk_conv &l, int32_t *starts_t, uint16_t *codes_t, uint16_t *places) {
  const int32_t taps = l.kernel * l.kernel, ins = l.in_channels;
  int32_t sum = 0;
  for (int32_t o = 0; o < l.out_blocks; o++) {
    int32_t *row = starts_t + (int64_t)o * (ins + 1), first = o * l.out_block;
    const int32_t end = o + 1 == l.out_blocks ? l.out_channels : first + l.out_block;
    memset(row, 0, (size_t)(ins + 1) * sizeof *row);
    for (int32_t b = 0; b < l.in_blocks; b++) {
      const int32_t *starts = l.starts + (int64_t)b * (l.out_channels + 1);
      if (starts[end] - starts[first] > 65536) return NK_INDEX; /* a place would not fit its 16 bits */
      for (int32_t k = starts[first]; k < starts[end]; k++) row[b * l.in_block + l.codes[k] / taps + 1]++;
    }
    row[0] = sum;
    for (int32_t c = 1; c <= ins; c++) {
      const int32_t ones = row[c];
      row[c] = sum, sum += ones;
    }
    for (int32_t b = 0; b < l.in_blocks; b++) {
      const int32_t *starts = l.starts + (int64_t)b * (l.out_channels + 1), base = starts[first];
      for (int32_t i = first; i < end; i++)
        for (int32_t k = starts[i]; k < starts[i + 1]; k++) {
          const int32_t at = row[b * l.in_block + l.codes[k] / taps + 1]++;
          codes_t[at] = (uint16_t)((i - first) * taps + l.codes[k] % taps);
          places[at] = (uint16_t)(k - base);
        }
    }
  }
  return NK_OK;
}

INLINE bool bits_fit(int64_t elements, int32_t kept, int32_t bytes) {
  return elements <= INT32_MAX && kept >= 0 && kept <= elements && bytes == (elements + 7) / 8;
}

} // namespace nk

extern "C" int32_t nk_linear_lay(const nk_linear *layer, const uint8_t *bits, int32_t bytes) {
  const nk_linear &l = *layer;
  if (l.rows < 1 || l.columns < 1 || l.block < 1) return NK_SHAPE;
  if (l.blocks != (l.columns - 1) / l.block + 1 || l.block > (l.index_bytes == 1 ? 256 : 65536)) return NK_SHAPE;
  if ((l.index_bytes != 1 && l.index_bytes != 2) || !nk::bits_fit((int64_t)l.rows * l.columns, l.kept, bytes)) return NK_SHAPE;
  const nk::Bits from = {bits, bytes};
  int32_t *starts = (int32_t *)l.starts;
  if (l.index_bytes == 1)
    return nk::lay(from, l.rows, l.columns, l.block, l.blocks, l.kept, starts, (uint8_t *)l.index);
  return nk::lay(from, l.rows, l.columns, l.block, l.blocks, l.kept, starts, (uint16_t *)l.index);
}

extern "C" int32_t nk_conv_lay(const nk_conv *layer, const uint8_t *bits, int32_t bytes) {
  const nk_conv &l = *layer;
  if (!nk::conv_shape_fits(l)) return NK_SHAPE;
  const int64_t taps = (int64_t)l.kernel * l.kernel, row = l.in_channels * taps;
  if (row > INT32_MAX || !nk::bits_fit(l.out_channels * row, l.kept, bytes)) return NK_SHAPE;
  const int32_t code = nk::lay(nk::Bits{bits, bytes}, l.out_channels, row, l.in_block * taps, l.in_blocks, l.kept,
                               (int32_t *)l.starts, (uint16_t *)l.codes);
  return code ? code : nk::lay_across(l, (int32_t *)l.starts_t, (uint16_t *)l.codes_t, (uint16_t *)l.places);
}

extern "C" int32_t nk_reorder(const int32_t *starts, int32_t blocks, int32_t rows, int32_t kept, const float *from,
                              float *to, int32_t back) {
  if (blocks < 1 || rows < 1 || kept < 0) return NK_SHAPE;
  if (!nk::starts_fit(starts, blocks, rows, kept)) return NK_STARTS;
  int64_t done = 0;
  for (int32_t r = 0; r < rows; r++)
    for (int32_t b = 0; b < blocks; b++) {
      const int32_t *row = starts + (int64_t)b * (rows + 1) + r;
      const int64_t length = row[1] - row[0];
      const float *source = from + (back ? row[0] : done);
      float *goal = to + (back ? done : row[0]);
      for (int64_t k = 0; k < length; k++) goal[k] = source[k]; /* mostly a dozen: too few for memcpy */
      done += length;
    }
  return NK_OK;
}
#endif
