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
  x.w[0] = (p.w[0] & 0xffffu) | (p.w[2] << 16);
  x.w[1] = (p.w[0] >> 16) | (p.w[2] & 0xffff0000u);
  x.w[2] = (p.w[1] & 0xffffu) | (p.w[3] << 16);
  x.w[3] = (p.w[1] >> 16) | (p.w[3] & 0xffff0000u);
  return x;
}

// Two codes of 4 bits, each lowest in a half of a word, as the numbers that they stand for.
template <typename T, int KIND>
INLINE unsigned two_of_nibbles(unsigned x) {
  if (KIND == AFFINE4) return fma_two<T>(x | Nibble<T>::BITS, Nibble<T>::ONE, Nibble<T>::MINUS);
  // e2m1: the bits in T's places, times what T's exponents are less by. Under 1 they are a subnormal number of T.
  const unsigned bits = (x & 0x00080008u) << 12 | (x & 0x00070007u) << (is_bfloat<T>() ? 6 : 9);
  return fma_two<T>(bits, is_bfloat<T>() ? 0x7e807e80u : 0x74007400u, 0u);
}

// The same of 8 bits; without rounding.
template <typename T, int KIND>
INLINE unsigned two_of_codes(unsigned x) {
  if (KIND == MXFP8) return two_of_fp8<T>(x, false, places<T, FP8>(0u));
  if (!is_bfloat<T>()) return fma_two<T>(x | 0x64006400u, Nibble<T>::ONE, 0xe400e400u);  // 1024 + code - 1024
  // 7 bits fit beside 128: from 128 + (code & 127) goes 128, or nothing where the code has its highest bit.
  const unsigned minus = ((x >> 7 & 0x00010001u) ^ 0x00010001u) * 0xc300u;
  return fma_two<T>((x & 0x007f007fu) | 0x43004300u, Nibble<T>::ONE, minus);
}

// Numbers 8 * u … of 16 bytes of codes, scaled: nibbles in far_pairs' order, bytes as they come.
template <typename T, int KIND>
INLINE Words from_codes(Words packed, int u, unsigned scale, unsigned bias) {
  Words x;
  UNROLL
  for (int i = 0; i < 4; i++) {
    const unsigned q = KIND % 10 == 4 ? two_of_nibbles<T, KIND>(packed.w[u] >> (4 * i) & 0x000f000fu)
                                      : two_of_codes<T, KIND>(spread_bytes(packed.w[2 * (u % 2) + i / 2], i % 2));
    x.w[i] = fma_two<T>(q, scale, bias);
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

// The same in both halves of a word.
template <typename T, int KIND>
INLINE unsigned scale_of(unsigned kept) {
  if (KIND == AFFINE4 || KIND == AFFINE8) return kept * 0x10001u;
  const float scale = KIND == NVFP4 ? e4m3(kept) : float_of(kept > 0u ? kept << 23 : 0x00400000u);
  return two<T>(scale, scale);
}

template <typename T, int KIND, typename S>
INLINE unsigned scale_of(const DEVICE S* scales, size_t group) {
  return scale_of<T, KIND>(kept_scale<false, KIND>(scales, group));
}

}  // namespace pippin
