// A thread copies one pack of a row's K and one of its V into the row's slot. Block (x, y): row, part y of its packs.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), KEY = HKV * D / VEC, VALUE = HKV * DV / VEC;
  const int i = block_y * THREADS + tid;
  const size_t row = size_t(block_x), slot = size_t(slots[block_x]);
  DEVICE Pack<T>* keys = (DEVICE Pack<T>*)const_cast<DEVICE T*>(k_pool);
  DEVICE Pack<T>* values = (DEVICE Pack<T>*)const_cast<DEVICE T*>(v_pool);
  if (i < KEY) keys[slot * KEY + i] = ((const DEVICE Pack<T>*)k)[row * KEY + i];
  if (i < VALUE) values[slot * VALUE + i] = ((const DEVICE Pack<T>*)v)[row * VALUE + i];
  if (block_x == 0 && block_y == 0 && tid < 8) token[tid] = 0;
