/* Layouts made of a mask's bits against those that were listed one weight after another, and bits that say otherwise. */
#ifndef NESTLING_LAYOUT_TRIALS_H
#define NESTLING_LAYOUT_TRIALS_H
#include "conv_trials.h"
#include "linear_trials.h"

inline std::vector<uint8_t> bits_of(size_t elements, const std::vector<size_t> &places) {
  std::vector<uint8_t> bits((elements + 7) / 8);
  for (size_t place : places) bits[place / 8] |= (uint8_t)(1 << place % 8);
  return bits;
}

template <class T> void same_table(const char *what, const Table<T> &got, const std::vector<T> &want) {
  checks += (long)want.size();
  for (size_t k = 0; k < want.size(); k++)
    if (got.at[k] != want[k]) wrong("%s: entry %zu is %d, not %d", what, k, (int)got.at[k], (int)want[k]);
}

/* Values go from C order to the layout's and back; `places` says where each of the layout's stands in C order. */
inline void reorder_trial(const std::vector<int32_t> &starts, int blocks, int rows, const std::vector<size_t> &places) {
  size_t kept = places.size();
  std::vector<size_t> sorted(places);
  std::sort(sorted.begin(), sorted.end());
  Table<int32_t> table(starts);
  Buffer flat(kept, chance.coin()), laid(kept, chance.coin()), back(kept, chance.coin());
  flat.fill();
  must(nk_reorder(table.at, blocks, rows, (int32_t)kept, flat.at, laid.at, 0), "nk_reorder");
  for (size_t k = 0; k < kept; k++) {
    size_t rank = (size_t)(std::lower_bound(sorted.begin(), sorted.end(), places[k]) - sorted.begin());
    if (laid.at[k] != flat.at[rank]) wrong("value %zu is not the one of place %zu", k, places[k]);
  }
  checks += (long)kept;
  must(nk_reorder(table.at, blocks, rows, (int32_t)kept, laid.at, back.at, 1), "nk_reorder back");
  if (kept && memcmp(flat.at, back.at, kept * sizeof(float))) wrong("values come back otherwise");
  table.at[chance.in(0, (int)table.size - 1)] += chance.in(-3, 3); /* refused, or within its memory */
  nk_reorder(table.at, blocks, rows, (int32_t)kept, flat.at, laid.at, chance.coin());
}

/* Bits in memory of their own size that say anything else: refused, unless they say as many. */
template <class F> void spoilt_bits(std::vector<uint8_t> bits, int32_t kept, F lay) {
  for (int k = chance.in(1, 3); k > 0 && !bits.empty(); k--) bits[(size_t)chance.in(0, (int)bits.size() - 1)] ^= (uint8_t)chance.bits();
  Table<uint8_t> table(bits);
  int32_t code = lay(table.at, (int32_t)table.size, kept);
  if (code != NK_OK && code != NK_STARTS) wrong("spoilt bits gave %d", (int)code);
  if (lay(table.at, (int32_t)table.size - 1, kept) != NK_SHAPE) wrong("too few bits were taken");
  if (lay(table.at, (int32_t)table.size + 1, kept) != NK_SHAPE) wrong("too many bits were taken");
  if (kept && lay(table.at, (int32_t)table.size, chance.in(0, kept - 1)) == NK_SHAPE) wrong("fewer weights are a shape");
  checks += 4;
}

inline void linear_layout_trial(int) {
  trial = "linear layout";
  SparseMatrix m;
  LinearLayer right(m);
  std::vector<size_t> places;
  for (size_t k = 0; k < m.index.size(); k++) places.push_back((size_t)m.row[k] * (size_t)m.columns + (size_t)m.column[k]);
  std::vector<uint8_t> bits = bits_of((size_t)m.rows * (size_t)m.columns, places);
  Table<uint8_t> from(bits), one(std::vector<uint8_t>(m.index.size(), 0xee));
  Table<int32_t> starts(std::vector<int32_t>(m.starts.size(), -1));
  Table<uint16_t> two(std::vector<uint16_t>(m.index.size(), 0xeeee));
  nk_linear c = right.c;
  c.starts = starts.at, c.index = m.wide ? (const void *)two.at : (const void *)one.at;
  must(nk_linear_lay(&c, from.at, (int32_t)from.size), "nk_linear_lay");
  same_table("starts", starts, m.starts);
  if (m.wide) same_table("index", two, m.index);
  if (!m.wide) same_table("index", one, std::vector<uint8_t>(m.index.begin(), m.index.end()));
  reorder_trial(m.starts, m.blocks, m.rows, places);
  spoilt_bits(bits, c.kept, [&](const uint8_t *at, int32_t bytes, int32_t kept) {
    c.kept = kept;
    return nk_linear_lay(&c, at, bytes);
  });
}

inline void conv_layout_trial(int) {
  trial = "conv layout";
  SparseKernel k;
  ConvLayer right(k);
  std::vector<size_t> places;
  for (const Weight &w : k.kept) places.push_back((size_t)(((w.o * k.in + w.c) * k.kernel + w.y) * k.kernel + w.x));
  std::vector<uint8_t> bits = bits_of((size_t)(k.out * k.in * k.kernel * k.kernel), places);
  Table<uint8_t> from(bits);
  Table<int32_t> starts(std::vector<int32_t>(k.starts.size(), -1)), starts_t(std::vector<int32_t>(k.starts_t.size(), -1));
  std::vector<uint16_t> none(k.kept.size(), 0xeeee);
  Table<uint16_t> codes(none), codes_t(none), stands(none);
  nk_conv c = right.c;
  c.starts = starts.at, c.codes = codes.at, c.starts_t = starts_t.at, c.codes_t = codes_t.at, c.places = stands.at;
  must(nk_conv_lay(&c, from.at, (int32_t)from.size), "nk_conv_lay");
  same_table("starts", starts, k.starts);
  same_table("codes", codes, k.codes);
  same_table("starts_t", starts_t, k.starts_t);
  same_table("codes_t", codes_t, k.codes_t);
  same_table("places", stands, k.places);
  reorder_trial(k.starts, c.in_blocks, k.out, places);
  spoilt_bits(bits, c.kept, [&](const uint8_t *at, int32_t bytes, int32_t kept) {
    c.kept = kept;
    return nk_conv_lay(&c, at, bytes);
  });
}

#endif
