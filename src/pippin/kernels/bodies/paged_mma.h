// Decode and extend for 16-bit types where the dialect has mma(): up to 16 queries (rows of one sequence times query heads
// of one KV head) meet 16 tokens in one matrix product, so that K and V are read once and hardly any arithmetic is left.
// Block (x, y): row or tile of rows, KV head and tile of GT query heads in x; split y of the tokens. A warp takes every
// WARPS-th run of 16 tokens. `line` and `column` are a lane's place in mma's fragments: lane = 4 * line + column.
  using namespace pippin;
  constexpr int KEY = D / 8, VALUE = DV / 8, NK = (KEY + 3) / 4, NV = (VALUE + 7) / 8;
  constexpr int QUERIES = ROWS * GT, HALVES = QUERIES > 8 ? 2 : 1;
  const int tile = block_x % TILES, head = block_x / TILES % HKV, unit = block_x / (TILES * HKV);
  const int line = lane / 4, column = lane % 4;

#if TILED
  const int first_row = tiles[unit * 3], rows = tiles[unit * 3 + 1];
  const size_t pages = size_t(tiles[unit * 3 + 2]) * table_shape[1];
#else
  const int first_row = unit, rows = 1;
  const size_t pages = size_t(unit) * table_shape[1];
#endif
  int begin = 0x7fffffff, stop = 0;  // tokens that some row sees
  for (int r = 0; r < rows; r++) {
    const int length = lengths[first_row + r];
    if (length > 0) begin = smaller(begin, WINDOW > 0 ? larger(0, length - WINDOW) : 0);
    stop = larger(stop, length);
  }
  begin = smaller(begin, stop);
  const int per = (larger((stop - begin + blocks_y - 1) / blocks_y, LEAST) + 15) / 16 * 16;
  const int first = begin + block_y * per, end = smaller(stop, first + per);

#if FUSED
  if (first < stop && end == stop && tile == 0) {
    const int t = stop - 1;
    const size_t place = (size_t(table[pages + t / PAGE]) * PAGE + t % PAGE) * HKV + head;
    const size_t from = size_t(first_row) * HKV + head;
    DEVICE Pack<KT>* new_key = (DEVICE Pack<KT>*)const_cast<DEVICE KT*>(k_pool) + place * KEY;
    DEVICE Pack<KT>* new_value = (DEVICE Pack<KT>*)const_cast<DEVICE KT*>(v_pool) + place * VALUE;
    for (int i = tid; i < KEY; i += WARPS * 32) new_key[i] = ((const DEVICE Pack<KT>*)k)[from * KEY + i];
    for (int i = tid; i < VALUE; i += WARPS * 32) new_value[i] = ((const DEVICE Pack<KT>*)v)[from * VALUE + i];
  }
#endif

  Words query[HALVES][NK];
  int seen[HALVES];  // length of the query's row, 0 for none
  float acc[NV * 8][4], top[HALVES], total[HALVES];
  UNROLL
  for (int h = 0; h < HALVES; h++) {
    const int i = line + 8 * h, r = i / GT, g = tile * GT + i % GT;
    const bool mine = i < QUERIES && r < rows && g < G;
    const size_t place = (size_t(first_row + r) * HKV + head) * G + g;
    seen[h] = mine ? lengths[first_row + r] : 0;
    top[h] = NOTHING;
    total[h] = 0.0f;
    UNROLL
    for (int n = 0; n < NK; n++) {
      query[h][n] = mine && n * 4 + column < KEY ? load_words(q, place * KEY + n * 4 + column) : no_words();
    }
  }
  UNROLL
  for (int n = 0; n < NV * 8; n++) {
    UNROLL
    for (int i = 0; i < 4; i++) acc[n][i] = 0.0f;
  }

  const float scale = SOFTCAP ? params[0] / params[1] : params[0] * LOG2E;
  int key_slots[2], value_slots[4];  // of the tokens that come next: looked up one round ahead
  for (int base = first + warp * 16 - WARPS * 16; base < end; base += WARPS * 16) {
    Words keys[2][NK], values[4][NV];
#if PACKED
    float key_scales[4], value_scales[4];  // of the tokens that the lane has logits and weights of
    if (base >= first) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        key_scales[i] = load_scale<KIND, HKV, D>(k_pool, value_slots[i], head) * scale;
        value_scales[i] = load_scale<KIND, HKV, DV>(v_pool, value_slots[i], head) * Weight<KIND>::LIFT;
      }
    }
#endif
    if (base >= first) {
    UNROLL
    for (int j = 0; j < 2; j++) {
      const int t = smaller(base + 8 * j + line, end - 1);
      const size_t place = size_t(key_slots[j]) * HKV + head;
      UNROLL
      for (int n = 0; n < NK; n++) {
        const int pack = n * 4 + column;
#if PACKED
        keys[j][n] = pack < KEY ? load_packed_words<KT, KIND, HKV, D>(k_pool, key_slots[j], head, pack) : no_words();
#else
#if FUSED
        if (t == stop - 1) {
          keys[j][n] = pack < KEY ? load_words(k, (size_t(first_row) * HKV + head) * KEY + pack) : no_words();
          continue;
        }
#endif
        keys[j][n] = pack < KEY ? load_words(k_pool, place * KEY + pack) : no_words();
#endif
      }
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
      const int t = smaller(base + j / 2 * 8 + column * 2 + j % 2, end - 1);
      const size_t place = size_t(value_slots[j]) * HKV + head;
      UNROLL
      for (int n = 0; n < NV; n++) {
        const int pack = n * 8 + line;
#if PACKED
        values[j][n] =
            pack < VALUE ? load_packed_words<KT, KIND, HKV, DV>(v_pool, value_slots[j], head, pack) : no_words();
#else
#if FUSED
        if (t == stop - 1) {
          values[j][n] = pack < VALUE ? load_words(v, (size_t(first_row) * HKV + head) * VALUE + pack) : no_words();
          continue;
        }
#endif
        values[j][n] = pack < VALUE ? load_words(v_pool, place * VALUE + pack) : no_words();
#endif
      }
    }

    }
    if (base + WARPS * 16 < end) {
      UNROLL
      for (int j = 0; j < 2; j++) {
        const int t = smaller(base + WARPS * 16 + 8 * j + line, end - 1);
        key_slots[j] = table[pages + t / PAGE] * PAGE + t % PAGE;
      }
      UNROLL
      for (int j = 0; j < 4; j++) {
        const int t = smaller(base + WARPS * 16 + j / 2 * 8 + column * 2 + j % 2, end - 1);
        value_slots[j] = table[pages + t / PAGE] * PAGE + t % PAGE;
      }
    }
    if (base < first) continue;

    float s[2][4];
    UNROLL
    for (int j = 0; j < 2; j++) {
      UNROLL
      for (int i = 0; i < 4; i++) s[j][i] = 0.0f;
      UNROLL
      for (int n = 0; n < NK; n++) {
        const Words a = query[0][n], b = HALVES > 1 ? query[HALVES - 1][n] : no_words(), key = keys[j][n];
        mma<KT>(s[j], a.w[0], b.w[0], a.w[1], b.w[1], key.w[0], key.w[1]);
        mma<KT>(s[j], a.w[2], b.w[2], a.w[3], b.w[3], key.w[2], key.w[3]);
      }
    }
    UNROLL
    for (int h = 0; h < HALVES; h++) {
      float next = top[h];
      UNROLL
      for (int i = 0; i < 4; i++) {
        const int t = base + i / 2 * 8 + column * 2 + i % 2;
#if PACKED
        float x = s[i / 2][h * 2 + i % 2] * key_scales[i];
#else
        float x = s[i / 2][h * 2 + i % 2] * scale;
#endif
        if (SOFTCAP) x = tanh_of(x) * params[1] * LOG2E;
        if (t >= end || t >= seen[h] || (WINDOW > 0 && t < seen[h] - WINDOW)) x = NOTHING;
        s[i / 2][h * 2 + i % 2] = x;
        next = larger(next, x);
      }
      next = larger(next, shuffle_xor(next, 1));
      next = larger(next, shuffle_xor(next, 2));
      const float keep = exp2_of(top[h] - next);
      top[h] = next;
      total[h] *= keep;
      UNROLL
      for (int i = 0; i < 4; i++) {
        const float x = s[i / 2][h * 2 + i % 2], p = x > NOTHING ? exp2_of(x - next) : 0.0f;
        total[h] += p;
#if PACKED
        s[i / 2][h * 2 + i % 2] = p * value_scales[i];
#else
        s[i / 2][h * 2 + i % 2] = p;
#endif
      }
      if (keep < 1.0f) {
        UNROLL
        for (int n = 0; n < NV * 8; n++) {
          acc[n][h * 2] *= keep;
          acc[n][h * 2 + 1] *= keep;
        }
      }
    }
    if (HALVES == 1) {
      UNROLL
      for (int j = 0; j < 2; j++) s[j][2] = s[j][3] = 0.0f;
    }
    const unsigned p0 = two<KT>(s[0][0], s[0][1]), p1 = two<KT>(s[0][2], s[0][3]);
    const unsigned p2 = two<KT>(s[1][0], s[1][1]), p3 = two<KT>(s[1][2], s[1][3]);
    UNROLL
    for (int n = 0; n < NV; n++) {
      UNROLL
      for (int e = 0; e < 8; e++) {
        const unsigned a = values[0][n].w[e / 2], b = values[1][n].w[e / 2];
        const unsigned c = values[2][n].w[e / 2], d = values[3][n].w[e / 2];
        const unsigned early = e % 2 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16);
        const unsigned late = e % 2 ? (c >> 16) | (d & 0xffff0000u) : (c & 0xffffu) | (d << 16);
        mma<KT>(acc[n * 8 + e], p0, p1, p2, p3, early, late);
      }
    }
  }

  // Join the warps, AT_ONCE queries at a time so that shared memory suffices.
  SHARED(float, tops, WARPS * 16);
  SHARED(float, totals, WARPS * 16);
  SHARED(float, accs, WARPS * AT_ONCE * DV);
  UNROLL
  for (int h = 0; h < HALVES; h++) {
    total[h] += shuffle_xor(total[h], 1);
    total[h] += shuffle_xor(total[h], 2);
    if (column == 0) {
      tops[warp * 16 + line + 8 * h] = top[h];
      totals[warp * 16 + line + 8 * h] = total[h];
    }
  }
  for (int from = 0; from < QUERIES; from += AT_ONCE) {
    if (from > 0) BARRIER();
    UNROLL
    for (int h = 0; h < HALVES; h++) {
      const int i = line + 8 * h - from;
      if (i < 0 || i >= AT_ONCE) continue;
      UNROLL
      for (int n = 0; n < NV * 8; n++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
          const int at = (n / 8 * 8 + column * 2 + e) * 8 + n % 8;
#if PACKED
          acc[n][h * 2 + e] *= 1.0f / Weight<KIND>::LIFT;
#endif
          if (at < DV) accs[(warp * AT_ONCE + i) * DV + at] = acc[n][h * 2 + e];
        }
      }
    }
    BARRIER();
    for (int j = tid; j < AT_ONCE * DV; j += WARPS * 32) {
      const int i = from + j / DV, at = j % DV, r = i / GT, g = tile * GT + i % GT;
      if (i >= QUERIES || r >= rows || g >= G) continue;
      const size_t place = (size_t(first_row + r) * HKV + head) * G + g;
      float best = NOTHING, sum = 0.0f, x = 0.0f;
      for (int w = 0; w < WARPS; w++) best = larger(best, tops[w * 16 + i]);
      for (int w = 0; w < WARPS; w++) {
        const float f = exp2_of(tops[w * 16 + i] - best);
        sum += f * totals[w * 16 + i];
        x += f * accs[(w * AT_ONCE + i - from) * DV + at];
      }
#if SPLIT
      const size_t to = place * blocks_y + block_y;
      if (sum > 0.0f) accumulated[to * DV + at] = x;
      if (at == 0) {
        stats[to * 2] = best;
        stats[to * 2 + 1] = sum;
      }
#else
      if (SINKS) {
        const float sink = float(sinks[head * G + g]) * LOG2E;
        const float next = larger(best, sink);
        sum = sum * exp2_of(best - next) + exp2_of(sink - next);
        x *= exp2_of(best - next);
      }
      out[place * DV + at] = T(sum > 0.0f ? x / sum : 0.0f);
#endif
    }
  }
