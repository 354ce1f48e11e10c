// Quantized numbers in matrix products of 16-bit ones; only for dialects that have mma(), fma_two() and Nibble.
namespace pippin {

// Codes of 8 bits become numbers of T as they are: the scale of a token's head meets its logit and its weight instead.
// Weights are lifted, since times a scale they may be too small for float16; LIFT is a power of 2 near the largest code's.
template <int KIND>
struct Weight {
  static constexpr float LIFT = KIND == INT8 ? 128.0f : KIND == FP8 ? 512.0f : 1.0f;
};

// The bits of a word's halves that codes have their places in, and of those the highest. `zero` is 0: if a compiler can't
// know that, it keeps them in registers, where it makes constants anew for each use.
struct Places {
  unsigned codes, highest;
};

template <typename T, int KIND>
INLINE Places places(unsigned zero) {
  constexpr bool BFLOAT = Nibble<T>::ONE == 0x3f803f80u;
  Places x;
  x.codes = zero + (KIND == INT4  ? 0x000f000fu
                    : KIND == FP8 ? (BFLOAT ? 0x07f007f0u : 0x3f803f80u)
                                  : (BFLOAT ? 0x007f007fu : 0x00ff00ffu));
  x.highest = zero + (KIND == FP8 ? 0x80008000u : 0x00800080u);
  return x;
}

// Two codes of e4m3, the lower byte of each half of x or the `upper` one: their bits in T's places, which are numbers less by
// what T's exponents are more by.
template <typename T>
INLINE unsigned bits_of_fp8(unsigned x, bool upper, Places at) {
  constexpr bool BFLOAT = Nibble<T>::ONE == 0x3f803f80u;
  const unsigned high = upper ? x : x << 8;
  return (high & at.highest) | (high >> (BFLOAT ? 4 : 1) & at.codes);
}

// The same as numbers of T; without rounding.
template <typename T>
INLINE unsigned two_of_fp8(unsigned x, bool upper, Places at) {
  constexpr bool BFLOAT = Nibble<T>::ONE == 0x3f803f80u;
  return fma_two<T>(bits_of_fp8<T>(x, upper, at), BFLOAT ? 0x7b807b80u : 0x5c005c00u, 0u);
}

// The same of int8: two numbers of T to be added to the words of `rest`. 10 bits fit beside 1024, of which 1152 go.
// 7 bits fit beside 128: from 128 + (code & 127) goes 128, or 256 for codes under 128.
template <typename T>
INLINE unsigned two_of_int8(unsigned x, bool upper, Places at, THREAD unsigned& rest) {
  constexpr bool BFLOAT = Nibble<T>::ONE == 0x3f803f80u;
  const unsigned low = upper ? x >> 8 : x;
  rest = BFLOAT ? (low & at.highest) ^ 0xc380c380u : 0xe480e480u;
  return (low & at.codes) | (BFLOAT ? 0x43004300u : 0x64006400u);
}

// The same of 4 bits, lowest in the halves of x, with their scales and least numbers.
template <typename T>
INLINE unsigned two_of_int4(unsigned x, Places at, unsigned scales, unsigned least) {
  const unsigned bits = (x & at.codes) | Nibble<T>::BITS;
  return fma_two<T>(fma_two<T>(bits, Nibble<T>::ONE, Nibble<T>::MINUS), scales, least);
}

// How many numbers of a head a lane loads at once, where LANES lanes share it: 16 if that leaves none of them idle.
INLINE constexpr int numbers_at_once(int dim, int lanes) { return dim % (16 * lanes) == 0 ? 16 : 8; }

// E numbers of a head, in codes; int4's with the word of their group.
template <int KIND, int E>
struct Piece {
  struct alignas(KIND == INT4 ? E / 2 : E) Codes {
    unsigned w[KIND == INT4 ? E / 8 : E / 4];
  } codes;
  unsigned scales;
};

// Where pack `pack` of E numbers of a head in slot 0 lies; to another slot's it is one multiplication from there.
template <int KIND, int DIM, int E>
INLINE const DEVICE unsigned* codes_at(const DEVICE unsigned* pool, int head, int pack) {
  return pool + (head * (DIM / E) + pack) * int(sizeof(typename Piece<KIND, E>::Codes) / 4);
}

// The word that has its scale.
template <int KIND, int HEADS, int DIM, int E>
INLINE const DEVICE unsigned* scales_at(const DEVICE unsigned* pool, int head, int pack) {
  typedef Slot<KIND, HEADS, DIM> S;
  return pool + S::NUMBERS + head * (DIM / S::GROUP) + pack * E / S::GROUP;
}

// The pack that is `further` packs beyond those, whole groups of numbers.
template <int KIND, int HEADS, int DIM, int E>
INLINE Piece<KIND, E> load_piece(
    const DEVICE unsigned* codes, const DEVICE unsigned* scales, size_t slot, int further) {
  typedef Slot<KIND, HEADS, DIM> S;
  typedef typename Piece<KIND, E>::Codes Codes;
  Piece<KIND, E> x;
  x.codes = ((const DEVICE Codes*)(codes + slot * S::WORDS))[further];
  x.scales = KIND == INT4 ? scales[slot * S::WORDS + further * E / S::GROUP] : 0u;
  return x;
}

// The scale of a head in a slot of 8-bit codes.
template <int KIND, int HEADS, int DIM>
INLINE float load_scale(const DEVICE unsigned* scales, size_t slot) {
  return float_of(scales[slot * Slot<KIND, HEADS, DIM>::WORDS]);
}

// Numbers that key_pair() takes together are so far from each other: shifts and masks bring them out, no shuffling.
template <int KIND>
INLINE constexpr int apart() {
  return KIND == INT4 ? 4 : 2;
}

// Pair i of 8 numbers, in key_pair's order.
template <int KIND>
INLINE unsigned pair_of_codes(Words x, int i) {
  constexpr int FAR = apart<KIND>();
  const int first = i / FAR * 2 * FAR + i % FAR;
  return halves(x.w[first / 2], x.w[(first + FAR) / 2], first % 2);
}

// Scales (or with `least` the least numbers) of two groups of 4-bit codes, as the halves of a word.
template <typename T>
INLINE unsigned two_scales(unsigned a, unsigned b, bool least) {
  if (Nibble<T>::ONE == 0x3f803f80u) return halves(a, b, !least);
  return least ? two<T>(float_of(a << 16), float_of(b << 16))
               : two<T>(float_of(a & 0xffff0000u), float_of(b & 0xffff0000u));
}

// Pair i of a piece's numbers, which of 8-bit codes still want their scale, and of int8's the words of `rest`.
template <typename T, int KIND, int E>
INLINE unsigned key_pair(const THREAD Piece<KIND, E>& x, int i, Places at, THREAD unsigned& rest) {
  if (KIND == INT8) return two_of_int8<T>(x.codes.w[i / 2], i % 2, at, rest);
  if (KIND == FP8) return two_of_fp8<T>(x.codes.w[i / 2], i % 2, at);
  const unsigned scales = two_scales<T>(x.scales, x.scales, false), least = two_scales<T>(x.scales, x.scales, true);
  return two_of_int4<T>(x.codes.w[i / 4] >> (4 * (i % 4)), at, scales, least);
}

// Number i of two tokens, as key_pair.
template <typename T, int KIND, int E>
INLINE unsigned value_pair(
    const THREAD Piece<KIND, E>& a, const THREAD Piece<KIND, E>& b, int i, Places at, THREAD unsigned& rest) {
  constexpr int EACH = KIND == INT4 ? 4 : 2;  // codes in half a word
  const unsigned both = halves(a.codes.w[i / EACH / 2], b.codes.w[i / EACH / 2], i / EACH % 2);
  if (KIND == INT8) return two_of_int8<T>(both, i % 2, at, rest);
  if (KIND == FP8) return two_of_fp8<T>(both, i % 2, at);
  const unsigned scales = two_scales<T>(a.scales, b.scales, false), least = two_scales<T>(a.scales, b.scales, true);
  return two_of_int4<T>(both >> (4 * (i % 4)), at, scales, least);
}

}  // namespace pippin
