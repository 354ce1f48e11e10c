// A row's K and V into its slot. Block (x, y): row, part y. A thread copies one pack of each; if the slots are quantized, a
// warp takes a head, of K's and then of V's.
  using namespace pippin;
  const size_t row = size_t(block_x), slot = size_t(slots[block_x]);
#if PACKED
  const int at = block_y * (THREADS / 32) + warp;
  const bool is_k = at < HKV;
  const int head = is_k ? at : smaller(at - HKV, HKV - 1), width = is_k ? D : DV;
  const size_t from = (row * HKV + head) * width + lane * 8;
  float x[8];
  UNROLL
  for (int e = 0; e < 8; e++) x[e] = lane * 8 < width ? (is_k ? float(k[from + e]) : float(v[from + e])) : 0.0f;
  if (is_k) {
    store_coded<KIND, HKV, D>(const_cast<DEVICE unsigned*>(k_pool), slot, head, lane, x);
  } else if (at < 2 * HKV) {
    store_coded<KIND, HKV, DV>(const_cast<DEVICE unsigned*>(v_pool), slot, head, lane, x);
  }
#else
  constexpr int VEC = 16 / int(sizeof(T)), KEY = HKV * D / VEC, VALUE = HKV * DV / VEC;
  const int i = block_y * THREADS + tid;
  DEVICE Pack<T>* keys = (DEVICE Pack<T>*)const_cast<DEVICE T*>(k_pool);
  DEVICE Pack<T>* values = (DEVICE Pack<T>*)const_cast<DEVICE T*>(v_pool);
  if (i < KEY) keys[slot * KEY + i] = ((const DEVICE Pack<T>*)k)[row * KEY + i];
  if (i < VALUE) values[slot * VALUE + i] = ((const DEVICE Pack<T>*)v)[row * VALUE + i];
#endif
  if (block_x == 0 && block_y == 0 && tid < 8) token[tid] = 0;
