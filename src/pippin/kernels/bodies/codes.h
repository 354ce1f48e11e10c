// Quantized weights in matrix products; only for dialects that have mma() and fma_two(). KIND is the mode and its bits: affine
// of 4 and 8, and of floating point numbers that share a power of two (mxfp4, mxfp8) or an e4m3 scale (nvfp4).
namespace pippin {

CONSTANT constexpr int AFFINE4 = 4, AFFINE8 = 8, NVFP4 = 14, DENSE = 16, MXFP4 = 24, MXFP8 = 28;

template <typename T>
INLINE constexpr bool is_bfloat() {
  return Nibble<T>::ONE == 0x3f803f80u;
}

// Pairs of a pack's numbers that are 4 apart: (0, 4), (1, 5), (2, 6), (3, 7), the order in which nibbles come out.
INLINE Words far_pairs(Words p) {
  Words x;
  UNROLL
  for (int i = 0; i < 4; i++) x.w[i] = halves(p.w[i / 2], p.w[i / 2 + 2], i % 2);
  return x;
}

// Codes of floating point numbers have their bits in T's places first, and are less by what T's exponents are more by;
// affine codes are subnormal numbers of T. Whoever takes them LOW has them times their scale by one multiplication instead
// of two or three, and less by a power of 2 that leaves bfloat16 room for both: as exact where weights are at least 2^-94,
// and scales at most 2^26.
template <typename T, int KIND>
INLINE constexpr bool can_be_low() {
  return is_bfloat<T>() && KIND != DENSE;
}

// What LOW numbers are to be multiplied with.
template <typename T, int KIND>
INLINE constexpr float low() {
  return can_be_low<T, KIND>() ? 4294967296.0f : 1.0f;
}

// Pair i of a word of e2m1 codes: their bits in T's places. Under 1 they are a subnormal number of T. A multiplication puts
// sign and rest where they belong at once; it keeps units busy that have less to do than those for bits.
template <typename T>
INLINE unsigned bits_of_e2m1(unsigned w, int i) {
  if (is_bfloat<T>()) {
    const unsigned x = i < 2 ? w : w >> 8;
    return (i % 2 ? (x & 0x00f000f0u) * 0x104u : (x & 0x000f000fu) * 0x1040u) & 0x81c081c0u;
  }
  const unsigned x = w >> (4 * i);
  return (x & 0x00080008u) << 12 | (x & 0x00070007u) << 9;
}

// Pair i of a word of affine codes of 4 bits, as the numbers that they are. For `zero` see Places (packed_words.h).
template <typename T>
INLINE unsigned two_of_nibbles(unsigned w, int i, unsigned zero) {
  return fma_two<T>((w >> (4 * i) & (zero + 0x000f000fu)) | Nibble<T>::BITS, Nibble<T>::ONE, Nibble<T>::MINUS);
}

// Two affine codes of 8 bits, each the lower byte of a half; without rounding.
template <typename T>
INLINE unsigned two_of_bytes(unsigned x, unsigned zero) {
  if (!is_bfloat<T>()) return fma_two<T>(x | 0x64006400u, Nibble<T>::ONE, 0xe400e400u);  // 1024 + code - 1024
  // 7 bits fit beside 128, from which 128 go where the highest bit is not set: 256 - 256, or 128 - 256.
  const unsigned highest = fma_two<T>((x & (zero + 0x00800080u)) | 0x43004300u, Nibble<T>::ONE, 0xc380c380u);
  return fma_two<T>((x & (zero + 0x007f007fu)) | 0x43004300u, Nibble<T>::ONE, highest);
}

// Numbers 8 * u … of 16 bytes of codes, scaled: nibbles in far_pairs' order, bytes as they come.
template <typename T, int KIND, bool LOW = false>
INLINE Words from_codes(Words packed, int u, unsigned scale, unsigned bias, unsigned zero = 0u) {
  constexpr bool NIBBLES = KIND % 10 == 4, IS_LOW = LOW && can_be_low<T, KIND>();
  Words x;
  UNROLL
  for (int i = 0; i < 4; i++) {
    const unsigned w = NIBBLES ? packed.w[u] : spread_bytes(packed.w[2 * (u % 2) + i / 2], i % 2);
    if (IS_LOW && KIND == AFFINE8) {
      x.w[i] = fma_two<T>(w, scale, bias);
      continue;
    }
    if (IS_LOW && KIND == AFFINE4) {
      // A nibble 4 bits further up is a subnormal number 16 times as large: a smaller scale spares a shift.
      const unsigned smaller = fma_two<T>(scale, 0x3d803d80u, 0u), shifted = i < 2 ? w : w >> 8;
      x.w[i] = fma_two<T>(shifted & (i % 2 ? 0x00f000f0u : 0x000f000fu), i % 2 ? smaller : scale, bias);
      continue;
    }
    if (KIND == AFFINE4 || KIND == AFFINE8) {
      x.w[i] = fma_two<T>(NIBBLES ? two_of_nibbles<T>(w, i, zero) : two_of_bytes<T>(w, zero), scale, bias);
      continue;
    }
    const unsigned bits = NIBBLES ? bits_of_e2m1<T>(w, i) : bits_of_fp8<T>(w, false, places<T, FP8>(zero));
    constexpr unsigned LIFT = NIBBLES ? (is_bfloat<T>() ? 0x7e807e80u : 0x74007400u)
                                      : (is_bfloat<T>() ? 0x7b807b80u : 0x5c005c00u);
    x.w[i] = fma_two<T>(IS_LOW ? bits : fma_two<T>(bits, LIFT, 0u), scale, 0u);
  }
  return x;
}

// A group's scale, or bias, as it is kept. ORDERED: loaded where it is asked for.
template <bool ORDERED, int KIND, typename S>
INLINE unsigned kept_scale(const DEVICE S* scales, size_t group) {
  const DEVICE unsigned short* pairs = (const DEVICE unsigned short*)scales + group;
  const DEVICE unsigned char* codes = (const DEVICE unsigned char*)scales + group;
  if (KIND == AFFINE4 || KIND == AFFINE8) return ORDERED ? fetch(pairs) : *pairs;
  return ORDERED ? fetch(codes) : *codes;
}

// A scale in both halves of a word; for LOW numbers times what lifts their bits.
template <typename T, int KIND, bool LOW = false>
INLINE unsigned scale_of(unsigned kept) {
  constexpr bool IS_LOW = LOW && can_be_low<T, KIND>();
  // Bits stand for numbers less by 2^133, which is over low() 2^101.
  if (KIND == AFFINE4 || KIND == AFFINE8) return IS_LOW ? fma_two<T>(kept * 0x10001u, 0x72007200u, 0u) : kept * 0x10001u;
  // Exponents of bfloat16: 2^126 for e2m1, and 2^120 for e4m3, over low().
  if (IS_LOW && KIND != NVFP4) return kept * 0x00800080u + (KIND == MXFP4 ? 94u : 88u) * 0x00800080u;
  const float scale = KIND == NVFP4 ? e4m3(kept) : float_of(kept > 0u ? kept << 23 : 0x00400000u);
  const float times = IS_LOW ? scale * 1.98070406285660844e28f : scale;  // 2^94
  return two<T>(times, times);
}

// The same of a bias; nothing where there is none.
template <typename T, int KIND, bool LOW = false>
INLINE unsigned bias_of(unsigned kept) {
  if (KIND != AFFINE4 && KIND != AFFINE8) return 0u;
  return LOW && can_be_low<T, KIND>() ? fma_two<T>(kept * 0x10001u, 0x2f802f80u, 0u) : kept * 0x10001u;  // over low()
}

template <typename T, int KIND, typename S>
INLINE unsigned scale_of(const DEVICE S* scales, size_t group) {
  return scale_of<T, KIND>(kept_scale<false, KIND>(scales, group));
}

}  // namespace pippin
