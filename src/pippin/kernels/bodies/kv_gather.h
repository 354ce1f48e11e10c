// A thread copies one pack of a token's K and one of its V out of the pools, heads first. Block (x, y): a token of the
// table's lines, part y of its packs.
  using namespace pippin;
#if PACKED
  constexpr int VEC = 8;
#else
  constexpr int VEC = 16 / int(sizeof(T));
#endif
  constexpr int KEY = D / VEC, VALUE = DV / VEC;
  const int context = table_shape[1] * PAGE, i = block_y * THREADS + tid;
  const int row = block_x / context, t = block_x % context;
  const size_t slot = size_t(table[size_t(row) * table_shape[1] + t / PAGE]) * PAGE + t % PAGE;
  if (i < HKV * KEY) {
    const size_t to = (size_t(row) * HKV + i / KEY) * context + t;
#if PACKED
    const Coded<KIND> from = load_coded<KIND, HKV, D>(k_pool, slot, i / KEY, i % KEY);
    Eight<T> x;
    UNROLL
    for (int e = 0; e < 8; e++) x.v[e] = T(number(from, e));
    ((DEVICE Eight<T>*)k)[to * KEY + i % KEY] = x;
#else
    ((DEVICE Pack<T>*)k)[to * KEY + i % KEY] = ((const DEVICE Pack<T>*)k_pool)[slot * HKV * KEY + i];
#endif
  }
  if (i < HKV * VALUE) {
    const size_t to = (size_t(row) * HKV + i / VALUE) * context + t;
#if PACKED
    const Coded<KIND> from = load_coded<KIND, HKV, DV>(v_pool, slot, i / VALUE, i % VALUE);
    Eight<T> x;
    UNROLL
    for (int e = 0; e < 8; e++) x.v[e] = T(number(from, e));
    ((DEVICE Eight<T>*)v)[to * VALUE + i % VALUE] = x;
#else
    ((DEVICE Pack<T>*)v)[to * VALUE + i % VALUE] = ((const DEVICE Pack<T>*)v_pool)[slot * HKV * VALUE + i];
#endif
  }
