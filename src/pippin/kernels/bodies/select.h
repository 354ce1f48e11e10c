// For boundary.h: rows of words of any length, which begin anywhere; sums over a warp; limits.
namespace pippin {

// Whether pack `at`, counted from the pack in which a row of n words begins with its word `lead`, lies in it as a whole.
INLINE bool whole_pack(int at, int lead, int n) { return at * 4 >= lead && at * 4 + 4 <= lead + n; }

// Pack `at` of such a row, whose first pack is `first` of p; words outside of the row are not read, and 0.
INLINE Words words_of_row(const DEVICE unsigned* p, size_t first, int at, int lead, int n) {
  if (whole_pack(at, lead, n)) return load_words(p, first + at);
  Words x = no_words();
  UNROLL
  for (int e = 0; e < 4; e++) {
    if (at * 4 + e >= lead && at * 4 + e < lead + n) x.w[e] = p[(first + at) * 4 + e];
  }
  return x;
}

// The sum over a warp of each of N words (a power of 2, up to 32): lane l gets that of word l / (32 / N).
template <int N>
INLINE unsigned sum_spread(THREAD unsigned (&x)[N], int lane) {
  int step = 16;
  UNROLL
  for (int half = N / 2; half > 0; half /= 2) {
    const bool upper = (lane & step) != 0;
    UNROLL
    for (int i = 0; i < half; i++) {
      const unsigned mine = upper ? x[half + i] : x[i], theirs = upper ? x[i] : x[half + i];
      x[i] = mine + shuffle_xor(theirs, step);
    }
    step /= 2;
  }
  UNROLL
  for (int rest = 16 / N; rest > 0; rest /= 2) x[0] += shuffle_xor(x[0], rest);
  return x[0];
}

// The sum of x over the lanes before this one; `total` becomes that over all.
INLINE unsigned sum_before(unsigned x, int lane, THREAD unsigned& total) {
  unsigned before = 0;
  total = x;
  UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = shuffle_xor(total, step);
    if (lane & step) before += other;
    total += other;
  }
  return before;
}

// Whether a token is kept that has so many tokens, and so much mass, before it.
template <bool COUNT, bool MASS>
INLINE bool within(unsigned count, unsigned mass, int most, float target) {
  return (!COUNT || int(count) < most) && (!MASS || float(mass) < target);
}

// Where the first pass splits all bits: distances at 2, 4, 6, 8, 10, 12 and 16, where boundaries are found; and signed
// numbers, largest first, at 32, 24, 20, 16, 12, 8 and 2, where a vocabulary's likeliest logits are.
INLINE unsigned first_end(bool is_signed, int i) {
  if (is_signed) {
    return i == 0 ? 0x3dffffffu : i == 1 ? 0x3e3fffffu : i == 2 ? 0x3e5fffffu : i == 3 ? 0x3e7fffffu
         : i == 4 ? 0x3ebfffffu : i == 5 ? 0x3effffffu : i == 6 ? 0x3fffffffu : 0xffffffffu;
  }
  return i == 0 ? 0x3fffffffu : i == 1 ? 0x407fffffu : i == 2 ? 0x40bfffffu : i == 3 ? 0x40ffffffu
       : i == 4 ? 0x411fffffu : i == 5 ? 0x413fffffu : i == 6 ? 0x417fffffu : 0x7fffffffu;
}

}  // namespace pippin
