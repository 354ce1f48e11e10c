// Numbers of 4 bits in matrix products; only for dialects that have mma() and fma_two().
namespace pippin {

// Pairs of a pack's numbers that are 4 apart: (0, 4), (1, 5), (2, 6), (3, 7), the order in which nibbles come out.
INLINE Words far_pairs(Words p) {
  Words x;
  x.w[0] = (p.w[0] & 0xffffu) | (p.w[2] << 16);
  x.w[1] = (p.w[0] >> 16) | (p.w[2] & 0xffff0000u);
  x.w[2] = (p.w[1] & 0xffffu) | (p.w[3] << 16);
  x.w[3] = (p.w[1] >> 16) | (p.w[3] & 0xffff0000u);
  return x;
}

// The 8 numbers scale * q + bias of a word, in far_pairs' order.
template <typename T>
INLINE Words from_nibbles(unsigned word, unsigned scale, unsigned bias) {
  Words x;
  UNROLL
  for (int i = 0; i < 4; i++) {
    const unsigned q = ((word >> (4 * i)) & 0x000f000fu) | Nibble<T>::BITS;
    x.w[i] = fma_two<T>(fma_two<T>(q, Nibble<T>::ONE, Nibble<T>::MINUS), scale, bias);
  }
  return x;
}

}  // namespace pippin
