// Quantized numbers in matrix products of 16-bit ones; only for dialects that have mma().
namespace pippin {

template <typename T, int KIND>
INLINE Words words_of(const THREAD Coded<KIND>& c) {
  Words x;
  UNROLL
  for (int i = 0; i < 4; i++) x.w[i] = two<T>(number(c, 2 * i), number(c, 2 * i + 1));
  return x;
}

}  // namespace pippin
