// One query per row. Block (x, y): row, KV head and tile of GT query heads in x; split y of the row's tokens.
// LANES lanes share a token, so a warp reads 32 / LANES tokens at once, U times before it computes.
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
  constexpr int NK = (KEY + LANES - 1) / LANES, NV = (VALUE + LANES - 1) / LANES;
  const int tile = block_x % TILES, head = block_x / TILES % HKV, row = block_x / (TILES * HKV);
  const int sub = lane / LANES, part = lane % LANES;

  const int length = lengths[row];
  const int begin = WINDOW > 0 ? larger(0, length - WINDOW) : 0;
  const int per = larger((length - begin + blocks_y - 1) / blocks_y, LEAST);
  const int first = begin + block_y * per, end = smaller(length, first + per);
  const size_t line = size_t(row) * table_shape[1];
  const size_t first_head = (size_t(row) * HKV + head) * G + tile * GT;  // of this tile, among all rows' query heads

  float qs[GT][NK * VEC], acc[GT][NV * VEC], top[GT], total[GT];
  const float scale = SOFTCAP ? params[0] / params[1] : params[0] * LOG2E;
  UNROLL
  for (int g = 0; g < GT; g++) {
    top[g] = NOTHING;
    total[g] = 0.0f;
    UNROLL
    for (int e = 0; e < NV * VEC; e++) acc[g][e] = 0.0f;
    UNROLL
    for (int n = 0; n < NK; n++) {
      const int pack = part + n * LANES;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        const bool here = pack < KEY && tile * GT + g < G;
        qs[g][n * VEC + e] = here ? float(q[(first_head + g) * D + pack * VEC + e]) * scale : 0.0f;
      }
    }
  }

#if FUSED
  const int old = smaller(end, length - 1);  // the newest token is not in the pool yet
#else
  const int old = end;
#endif
  for (int base = first + warp * SUB * U; base < old; base += WARPS * SUB * U) {
    Piece keys[U][NK], values[U][NV];
    UNROLL
    for (int u = 0; u < U; u++) {
      const int t = smaller(base + u * SUB + sub, old - 1);
      const size_t slot = size_t(table[line + t / PAGE]) * PAGE + t % PAGE;
#if PACKED
      UNROLL
      for (int n = 0; n < NK; n++) {
        keys[u][n] = load_coded<KIND, HKV, D>(k_pool, slot, head, smaller(part + n * LANES, KEY - 1));
      }
      UNROLL
      for (int n = 0; n < NV; n++) {
        values[u][n] = load_coded<KIND, HKV, DV>(v_pool, slot, head, smaller(part + n * LANES, VALUE - 1));
      }
#else
      const DEVICE Pack<KT>* key = (const DEVICE Pack<KT>*)(k_pool) + (slot * HKV + head) * KEY;
      const DEVICE Pack<KT>* value = (const DEVICE Pack<KT>*)(v_pool) + (slot * HKV + head) * VALUE;
      UNROLL
      for (int n = 0; n < NK; n++) keys[u][n] = key[smaller(part + n * LANES, KEY - 1)];
      UNROLL
      for (int n = 0; n < NV; n++) values[u][n] = value[smaller(part + n * LANES, VALUE - 1)];
#endif
    }
    UNROLL
    for (int g = 0; g < GT; g++) {
      float s[U];
      UNROLL
      for (int u = 0; u < U; u++) {
        s[u] = sum_lanes<LANES>(dot(qs[g], keys[u]));
        if (SOFTCAP) s[u] = tanh_of(s[u]) * params[1] * LOG2E;
        if (base + u * SUB + sub >= old) s[u] = NOTHING;
      }
      absorb(top[g], total[g], acc[g], s, values);
    }
  }

#if FUSED
  if (first < length && end == length && warp == 0) {
    const int t = length - 1;
    const size_t slot = size_t(table[line + t / PAGE]) * PAGE + t % PAGE;
    const DEVICE Pack<KT>* key = (const DEVICE Pack<KT>*)(k) + (size_t(row) * HKV + head) * KEY;
    const DEVICE Pack<KT>* value = (const DEVICE Pack<KT>*)(v) + (size_t(row) * HKV + head) * VALUE;
    DEVICE Pack<KT>* new_key = (DEVICE Pack<KT>*)const_cast<DEVICE KT*>(k_pool) + (slot * HKV + head) * KEY;
    DEVICE Pack<KT>* new_value = (DEVICE Pack<KT>*)const_cast<DEVICE KT*>(v_pool) + (slot * HKV + head) * VALUE;
    Pack<KT> keys[NK], values[1][NV];
    const bool writes = sub == 0 && tile == 0;
    UNROLL
    for (int n = 0; n < NK; n++) {
      keys[n] = key[smaller(part + n * LANES, KEY - 1)];
      if (writes && part + n * LANES < KEY) new_key[part + n * LANES] = keys[n];
    }
    UNROLL
    for (int n = 0; n < NV; n++) {
      values[0][n] = value[smaller(part + n * LANES, VALUE - 1)];
      if (writes && part + n * LANES < VALUE) new_value[part + n * LANES] = values[0][n];
    }
    UNROLL
    for (int g = 0; g < GT; g++) {
      float s[1];
      s[0] = sum_lanes<LANES>(dot(qs[g], keys));
      if (SOFTCAP) s[0] = tanh_of(s[0]) * params[1] * LOG2E;
      if (sub != 0) s[0] = NOTHING;
      absorb(top[g], total[g], acc[g], s, values);
    }
  }
#endif

  // Join the warps, HEADS_AT_ONCE query heads at a time so that shared memory suffices.
  SHARED(float, tops, WARPS * GT);
  SHARED(float, totals, WARPS * GT);
  SHARED(float, accs, WARPS * HEADS_AT_ONCE * DV);
  UNROLL
  for (int g = 0; g < GT; g++) {
    merge_lanes<LANES>(top[g], total[g], acc[g]);
    if (lane == 0) {
      tops[warp * GT + g] = top[g];
      totals[warp * GT + g] = total[g];
    }
  }
  UNROLL
  for (int from = 0; from < GT; from += HEADS_AT_ONCE) {
    if (from > 0) BARRIER();
    UNROLL
    for (int g = from; g < from + HEADS_AT_ONCE && g < GT; g++) {
      UNROLL
      for (int n = 0; n < NV; n++) {
        const int pack = part + n * LANES;
        UNROLL
        for (int e = 0; e < VEC; e++) {
          if (sub == 0 && pack < VALUE) {
            accs[(warp * HEADS_AT_ONCE + g - from) * DV + pack * VEC + e] = acc[g][n * VEC + e];
          }
        }
      }
    }
    BARRIER();
    for (int i = tid; i < HEADS_AT_ONCE * DV; i += WARPS * 32) {
      const int g = from + i / DV, at = i % DV;
      if (g >= GT || tile * GT + g >= G) continue;
      float best = NOTHING;
      for (int w = 0; w < WARPS; w++) best = larger(best, tops[w * GT + g]);
      float sum = 0.0f, x = 0.0f;
      for (int w = 0; w < WARPS; w++) {
        const float f = exp2_of(tops[w * GT + g] - best);
        sum += f * totals[w * GT + g];
        x += f * accs[(w * HEADS_AT_ONCE + g - from) * DV + at];
      }
#if SPLIT
      const size_t to = (first_head + g) * blocks_y + block_y;
      if (sum > 0.0f) accumulated[to * DV + at] = x;
      if (at == 0) {
        stats[to * 2] = best;
        stats[to * 2 + 1] = sum;
      }
#else
      if (SINKS) {
        const float sink = float(sinks[head * G + tile * GT + g]) * LOG2E;
        const float next = larger(best, sink);
        sum = sum * exp2_of(best - next) + exp2_of(sink - next);
        x *= exp2_of(best - next);
      }
      out[(first_head + g) * DV + at] = T(sum > 0.0f ? x / sum : 0.0f);
#endif
    }
  }
