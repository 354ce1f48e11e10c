// Several rows of one sequence. Block (x, y): tile of up to ROWS rows, KV head and tile of GT query heads in x; split y
// of the tokens. The block brings TOKENS tokens to shared memory at a time; each warp attends with its QUERIES of the
// ROWS * GT queries, so K and V are read once for all of them.
  using namespace pippin;
#if PACKED
  constexpr int VEC = 8;
  typedef Coded<KIND> Piece;
#else
  constexpr int VEC = 16 / int(sizeof(KT));
  typedef Pack<KT> Piece;
#endif
  constexpr int KEY = D / VEC, VALUE = DV / VEC;
  constexpr int LANES = lanes_for(KEY > VALUE ? KEY : VALUE), SUB = 32 / LANES;
  constexpr int NK = (KEY + LANES - 1) / LANES, NV = (VALUE + LANES - 1) / LANES, QUERIES = ROWS * GT / WARPS;
  const int tile = block_x % TILES, head = block_x / TILES % HKV, group = block_x / (TILES * HKV);
  const int sub = lane / LANES, part = lane % LANES;
  const int first_row = tiles[group * 3], rows = tiles[group * 3 + 1];
  const size_t line = size_t(tiles[group * 3 + 2]) * table_shape[1];

  int begin = 0x7fffffff, stop = 0;  // tokens that some row of the tile sees
  for (int r = 0; r < rows; r++) {
    const int length = lengths[first_row + r];
    if (length > 0) begin = smaller(begin, WINDOW > 0 ? larger(0, length - WINDOW) : 0);
    stop = larger(stop, length);
  }
  begin = smaller(begin, stop);
  const int per = larger((stop - begin + blocks_y - 1) / blocks_y, LEAST);
  const int first = begin + block_y * per, end = smaller(stop, first + per);

  float qs[QUERIES][NK * VEC], acc[QUERIES][NV * VEC], top[QUERIES], total[QUERIES];
  int seen[QUERIES];  // the length of the query's row, 0 for none
  const float scale = SOFTCAP ? params[0] / params[1] : params[0] * LOG2E;
  UNROLL
  for (int i = 0; i < QUERIES; i++) {
    const int r = (warp * QUERIES + i) / GT, g = tile * GT + (warp * QUERIES + i) % GT;
    const bool mine = r < rows && g < G;
    const size_t query = (size_t(first_row + r) * HKV + head) * G + g;
    seen[i] = mine ? lengths[first_row + r] : 0;
    top[i] = NOTHING;
    total[i] = 0.0f;
    UNROLL
    for (int e = 0; e < NV * VEC; e++) acc[i][e] = 0.0f;
    UNROLL
    for (int n = 0; n < NK; n++) {
      const int pack = part + n * LANES;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        qs[i][n * VEC + e] = mine && pack < KEY ? float(q[query * D + pack * VEC + e]) * scale : 0.0f;
      }
    }
  }

  SHARED(Piece, all_keys, TOKENS * KEY);
  SHARED(Piece, all_values, TOKENS * VALUE);
  for (int base = first; base < end; base += TOKENS) {
    if (base > first) BARRIER();
    for (int i = tid; i < TOKENS * (KEY + VALUE); i += WARPS * 32) {
      const int j = i / (KEY + VALUE), pack = i % (KEY + VALUE), t = smaller(base + j, end - 1);
      const size_t slot = size_t(table[line + t / PAGE]) * PAGE + t % PAGE;
#if PACKED
      if (pack < KEY) {
        all_keys[j * KEY + pack] = load_coded<KIND, HKV, D>(k_pool, slot, head, pack);
      } else {
        all_values[j * VALUE + pack - KEY] = load_coded<KIND, HKV, DV>(v_pool, slot, head, pack - KEY);
      }
#else
      const size_t place = slot * HKV + head;
      if (pack < KEY) {
        all_keys[j * KEY + pack] = ((const DEVICE Pack<KT>*)k_pool)[place * KEY + pack];
      } else {
        all_values[j * VALUE + pack - KEY] = ((const DEVICE Pack<KT>*)v_pool)[place * VALUE + pack - KEY];
      }
#endif
    }
    BARRIER();
    for (int from = 0; from < TOKENS && base + from < end; from += SUB * U) {
      Piece keys[U][NK], values[U][NV];
      UNROLL
      for (int u = 0; u < U; u++) {
        const int j = from + u * SUB + sub;
        UNROLL
        for (int n = 0; n < NK; n++) keys[u][n] = all_keys[j * KEY + smaller(part + n * LANES, KEY - 1)];
        UNROLL
        for (int n = 0; n < NV; n++) values[u][n] = all_values[j * VALUE + smaller(part + n * LANES, VALUE - 1)];
      }
      UNROLL
      for (int i = 0; i < QUERIES; i++) {
        float s[U];
        UNROLL
        for (int u = 0; u < U; u++) {
          const int t = base + from + u * SUB + sub;
          s[u] = sum_lanes<LANES>(dot(qs[i], keys[u]));
          if (SOFTCAP) s[u] = tanh_of(s[u]) * params[1] * LOG2E;
          if (t >= end || t >= seen[i] || (WINDOW > 0 && t < seen[i] - WINDOW)) s[u] = NOTHING;
        }
        absorb(top[i], total[i], acc[i], s, values);
      }
    }
  }

  UNROLL
  for (int i = 0; i < QUERIES; i++) {
    merge_lanes<LANES>(top[i], total[i], acc[i]);
    const int r = (warp * QUERIES + i) / GT, g = tile * GT + (warp * QUERIES + i) % GT;
    const size_t query = (size_t(first_row + r) * HKV + head) * G + g;
    const bool mine = r < rows && g < G && sub == 0;
#if SPLIT
    const size_t to = query * blocks_y + block_y;
    if (mine && part == 0) {
      stats[to * 2] = top[i];
      stats[to * 2 + 1] = total[i];
    }
    const float f = 1.0f;
#else
    const float sink = SINKS && mine ? float(sinks[head * G + g]) * LOG2E : NOTHING;
    const float next = larger(top[i], sink);
    const float sum = total[i] * exp2_of(top[i] - next) + (SINKS ? exp2_of(sink - next) : 0.0f);
    const float f = sum > 0.0f ? exp2_of(top[i] - next) / sum : 0.0f;
#endif
    UNROLL
    for (int n = 0; n < NV; n++) {
      const int pack = part + n * LANES;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        if (mine && pack < VALUE) {
#if SPLIT
          if (total[i] > 0.0f) accumulated[to * DV + pack * VEC + e] = acc[i][n * VEC + e] * f;
#else
          out[query * DV + pack * VEC + e] = T(acc[i][n * VEC + e] * f);
#endif
        }
      }
    }
  }
