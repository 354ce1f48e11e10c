// Slots of quantized numbers, as packing.py describes them: KIND is 8 for int8, 4 for int4, 43 for fp8 (e4m3).
namespace pippin {

CONSTANT constexpr int INT8 = 8, INT4 = 4, FP8 = 43;

// A slot's line of words, for HEADS heads of DIM numbers.
template <int KIND, int HEADS, int DIM>
struct Slot {
  static constexpr int BITS = KIND == INT4 ? 4 : 8;
  static constexpr int GROUP = KIND != INT4 ? DIM : DIM % 32 == 0 ? 32 : DIM % 16 == 0 ? 16 : 8;
  static constexpr int NUMBERS = HEADS * DIM * BITS / 32, SCALES = HEADS * DIM / GROUP;
  static constexpr int WORDS = (NUMBERS + SCALES + 3) / 4 * 4;
};

// 8 numbers of a head, in codes; they are loaded at once.
template <int KIND>
struct alignas(KIND == INT4 ? 4 : 8) Codes {
  unsigned w[KIND == INT4 ? 1 : 2];
};

// The same with what makes numbers of them.
template <int KIND>
struct Coded {
  Codes<KIND> codes;
  float scale, least;
};

// 8 numbers in memory.
template <typename T>
struct PACK_ALIGN Eight {
  T v[8];
};

INLINE float e4m3(unsigned code) {
  const unsigned size = code & 0x7fu;
  const float small = float(size) * 0.001953125f;  // under 8 it has no leading one
  const float x = size < 8u ? small : size == 0x7fu ? float_of(0x7fc00000u) : float_of((size << 20) + 0x3c000000u);
  return code & 0x80u ? -x : x;
}

// The nearest code, ties to even, of a number that is not beyond 448.
INLINE unsigned code_of_e4m3(float x) {
  const unsigned bits = bits_of(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7fu;
  if (size < 0x3c800000u) return sign | (bits_of(float_of(size) * 512.0f + 8388608.0f) & 15u);
  const unsigned code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - 0x3c0u;
  return sign | (code > 0x7eu ? 0x7eu : code);
}

// Number e of the 8. A code under 2^23 becomes a float by its place in one's mantissa, which is faster than a conversion.
template <int KIND>
INLINE float number(const THREAD Coded<KIND>& c, int e) {
  if (KIND == INT4) return fma_of(float_of((c.codes.w[0] >> (4 * e) & 15u) | 0x4b000000u) - 8388608.0f, c.scale, c.least);
  const unsigned code = c.codes.w[KIND == INT4 ? 0 : e / 4] >> (8 * (e % 4)) & 255u;
  if (KIND == FP8) return e4m3(code) * c.scale;
  return (float_of(code | 0x4b000000u) - 8388736.0f) * c.scale;
}

// Numbers 8 * pack … 8 * pack + 7 of a head in a slot.
template <int KIND, int HEADS, int DIM>
INLINE Coded<KIND> load_coded(const DEVICE unsigned* pool, size_t slot, int head, int pack) {
  typedef Slot<KIND, HEADS, DIM> S;
  const DEVICE unsigned* words = pool + slot * S::WORDS;
  Coded<KIND> c;
  c.codes = ((const DEVICE Codes<KIND>*)words)[head * (DIM / 8) + pack];
  const unsigned w = words[S::NUMBERS + head * (DIM / S::GROUP) + pack / (S::GROUP / 8)];
  c.scale = float_of(KIND == INT4 ? w & 0xffff0000u : w);
  c.least = float_of(KIND == INT4 ? w << 16 : 0u);
  return c;
}

// Stores a head of a slot. All lanes of a warp call it; lane l has numbers 8 * l … 8 * l + 7, or zeros beyond the head.
template <int KIND, int HEADS, int DIM>
INLINE void store_coded(DEVICE unsigned* pool, size_t slot, int head, int lane, const THREAD float (&x)[8]) {
  typedef Slot<KIND, HEADS, DIM> S;
  constexpr int LANES = KIND == INT4 ? S::GROUP / 8 : 32;
  float most = KIND == INT4 ? x[0] : 0.0f, least = x[0];
  UNROLL
  for (int e = 0; e < 8; e++) {
    const float size = KIND == INT4 || x[e] >= 0.0f ? x[e] : -x[e];
    // What is not a number must get through, so that its whole group becomes that.
    most = size > most || size != size ? size : most;
    least = x[e] < least || x[e] != x[e] ? x[e] : least;
  }
  UNROLL
  for (int step = LANES / 2; step > 0; step /= 2) {
    const float other = shuffle_xor(most, step), lower = shuffle_xor(least, step);
    most = other > most || other != other ? other : most;
    least = lower < least || lower != lower ? lower : least;
  }
  unsigned scales;
  float scale;
  if (KIND == INT4) {
    const unsigned bits = bits_of(least), down = (least < 0.0f ? bits + 0xffffu : bits) & 0xffff0000u;
    least = float_of(down);
    const unsigned up = (bits_of((most - least) * (1.0f / 15.0f)) + 0xffffu) & 0xffff0000u;
    scale = float_of(up);
    scales = up | down >> 16;
  } else {
    scale = most * (KIND == FP8 ? 1.0f / 448.0f : 1.0f / 127.0f);
    scales = bits_of(scale);
  }
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  Codes<KIND> codes;
  for (int i = 0; i < (KIND == INT4 ? 1 : 2); i++) codes.w[i] = 0;
  UNROLL
  for (int e = 0; e < 8; e++) {
    if (KIND == INT4) {
      const float near = (x[e] - least) * inverse;
      codes.w[0] |= (bits_of((near > 15.0f ? 15.0f : near) + 8388608.0f) & 15u) << (4 * e);
    } else {
      const float near = x[e] * inverse;
      const unsigned code = KIND == FP8 ? code_of_e4m3(near) : bits_of(near + 8388736.0f) & 255u;
      codes.w[KIND == INT4 ? 0 : e / 4] |= code << (8 * (e % 4));
    }
  }
  DEVICE unsigned* words = pool + slot * S::WORDS;
  if (lane < DIM / 8) {
    ((DEVICE Codes<KIND>*)words)[head * (DIM / 8) + lane] = codes;
    if (lane % (S::GROUP / 8) == 0) words[S::NUMBERS + head * (DIM / S::GROUP) + lane / (S::GROUP / 8)] = scales;
  }
}

}  // namespace pippin
