// Quantized numbers in matrix products of 16-bit ones; only for dialects that have mma(), fma_two() and Nibble.
namespace pippin {

// Codes of 8 bits become numbers of T as they are: the scale of a token's head meets its logit and its weight instead.
// Weights are lifted, since times a scale they may be too small for float16; LIFT is a power of 2 near the largest code's.
template <int KIND>
struct Weight {
  static constexpr float LIFT = KIND == INT8 ? 128.0f : KIND == FP8 ? 512.0f : 1.0f;
};

// Two codes of 8 bits, each the lower byte of a half of x, as numbers of T; without rounding.
template <typename T, int KIND>
INLINE unsigned two_of_bytes(unsigned x) {
  constexpr bool BFLOAT = Nibble<T>::ONE == 0x3f803f80u;
  if (KIND == FP8) {  // the bits in T's places, times what T's exponents are less by
    const unsigned bits = (x & 0x00800080u) << 8 | (x & 0x007f007fu) << (BFLOAT ? 4 : 7);
    return fma_two<T>(bits, BFLOAT ? 0x7b807b80u : 0x5c005c00u, 0u);
  }
  if (!BFLOAT) return fma_two<T>(x | 0x64006400u, Nibble<T>::ONE, 0xe480e480u);  // 1024 + code - 1152
  // 7 bits fit beside 128: from 128 + (code & 127) goes 128, or 256 for codes under 128.
  return fma_two<T>((x & 0x007f007fu) | 0x43004300u, Nibble<T>::ONE, (x & 0x00800080u) ^ 0xc380c380u);
}

// Pack `pack` of a head in a slot as numbers of T, which of 8-bit codes still want their scale.
template <typename T, int KIND, int HEADS, int DIM>
INLINE Words load_packed_words(const DEVICE unsigned* pool, size_t slot, int head, int pack) {
  const Coded<KIND> c = load_coded<KIND, HEADS, DIM>(pool, slot, head, pack);
  Words x;
  if (KIND != INT4) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      x.w[i] = two_of_bytes<T, KIND>(spread_bytes(c.codes.w[KIND == INT4 ? 0 : i / 2], i % 2));
    }
    return x;
  }
  const unsigned scale = two<T>(c.scale, c.scale), least = two<T>(c.least, c.least);
  UNROLL
  for (int i = 0; i < 4; i++) {
    const unsigned pair = c.codes.w[0] >> (8 * i), q = (pair & 0xfu) | (pair << 12 & 0xf0000u) | Nibble<T>::BITS;
    x.w[i] = fma_two<T>(fma_two<T>(q, Nibble<T>::ONE, Nibble<T>::MINUS), scale, least);
  }
  return x;
}

// The scale of a head in a slot of 8-bit codes, 1 where numbers have theirs already.
template <int KIND, int HEADS, int DIM>
INLINE float load_scale(const DEVICE unsigned* pool, size_t slot, int head) {
  typedef Slot<KIND, HEADS, DIM> S;
  return KIND == INT4 ? 1.0f : float_of(pool[slot * S::WORDS + S::NUMBERS + head]);
}

}  // namespace pippin
