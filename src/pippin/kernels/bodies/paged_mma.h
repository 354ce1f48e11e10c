// Decode and extend for 16-bit types where the dialect has mma(): up to 16 queries (rows of one sequence times query heads
// of one KV head) meet 16 tokens, 8 in a matrix product, so that K and V are read once and little arithmetic is left.
// Block (x, y): row or tile of rows, KV head and tile of GT query heads in x; split y of the tokens. A warp takes every
// WARPS-th run of 16 tokens. `line` and `column` are a lane's place in mma's fragments: lane = 4 * line + column.
  using namespace pippin;
  constexpr int QUERIES = ROWS * GT, HALVES = QUERIES > 8 ? 2 : 1;
#if PACKED
  constexpr int EK = numbers_at_once(D, 4), EV = numbers_at_once(DV, 8);
  typedef Piece<KIND, EK> Keys;
  typedef Piece<KIND, EV> Values;
  constexpr bool SUMS = KIND == INT8;  // numbers come as sums of two, which products add up
#else
  constexpr int EK = 8, EV = 8;
  typedef Words Keys;
  typedef Words Values;
  constexpr bool SUMS = false;
#endif
  constexpr int KEY = D / EK, VALUE = DV / EV, NK = (KEY + 3) / 4, NV = (VALUE + 7) / 8;
  constexpr bool WHOLE = PAGE % 16 == 0;  // a run is of one page
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
  const int oldest = smaller(begin, stop);
  begin = WHOLE ? oldest / 16 * 16 : oldest;
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

  unsigned query[HALVES][NK][EK / 2];  // pairs of numbers, in the keys' order
  int seen[HALVES][2];  // lengths of the rows of queries 2 * column and the next, 0 for none
  float acc[HALVES][NV][EV / 2][4], top[HALVES][2], total[HALVES][2];
  UNROLL
  for (int h = 0; h < HALVES; h++) {
    const int i = line + 8 * h, r = i / GT, g = tile * GT + i % GT;
    const bool mine = i < QUERIES && r < rows && g < G;
    const size_t place = (size_t(first_row + r) * HKV + head) * G + g;
    UNROLL
    for (int c = 0; c < 2; c++) {
      const int other = 2 * column + c + 8 * h;
      const bool any = other < QUERIES && other / GT < rows && tile * GT + other % GT < G;
      seen[h][c] = any ? lengths[first_row + other / GT] : 0;
      top[h][c] = NOTHING;
      total[h][c] = 0.0f;
    }
    UNROLL
    for (int n = 0; n < NK; n++) {
      const bool any = mine && n * 4 + column < KEY;
      UNROLL
      for (int e = 0; e < EK / 8; e++) {
        const Words x = any ? load_words(q, (place * KEY + n * 4 + column) * (EK / 8) + e) : no_words();
        UNROLL
        for (int i = 0; i < 4; i++) {
#if PACKED
          query[h][n][e * 4 + i] = pair_of_codes<KIND>(x, i);
#else
          query[h][n][i] = x.w[i];
#endif
        }
      }
    }
    UNROLL
    for (int n = 0; n < NV; n++) {
      UNROLL
      for (int m = 0; m < EV / 2; m++) acc[h][n][m][0] = acc[h][n][m][1] = acc[h][n][m][2] = acc[h][n][m][3] = 0.0f;
    }
  }

  const float scale = SOFTCAP ? params[0] / params[1] : params[0] * LOG2E;
  Keys keys[2][NK];  // of tokens `line` and line + 8
  Values values[4][NV];  // of tokens 2 * column, the next, and both + 8
#if PACKED
  const DEVICE unsigned* key_codes = codes_at<KIND, D, EK>(k_pool, head, column);
  const DEVICE unsigned* value_codes = codes_at<KIND, DV, EV>(v_pool, head, line);
  const DEVICE unsigned* key_words = scales_at<KIND, HKV, D, EK>(k_pool, head, KIND == INT4 ? column : 0);
  const DEVICE unsigned* value_words = scales_at<KIND, HKV, DV, EV>(v_pool, head, KIND == INT4 ? line : 0);
  const Places at_bits = places<KT, KIND>(table_shape[1] < 0);
  float key_scales[2], value_scales[2];  // of tokens `line` and line + 8
#endif
  int run = 0, key_slots[2], value_slots[4];  // of the tokens to load next: looked up a round before
  for (int base = first + warp * 16 - WARPS * 16; base < end; base += WARPS * 16) {
    if (base >= first) {
      const int youngest = end - 1 - base, since = oldest - base;  // slots of other tokens may hold anything
      UNROLL
      for (int j = 0; j < 2; j++) {
        const int token = 8 * j + line;
        const int slot = WHOLE ? run + smaller(WINDOW > 0 ? larger(token, since) : token, youngest) : key_slots[j];
#if PACKED
        if (KIND != INT4) {
          key_scales[j] = load_scale<KIND, HKV, D>(key_words, slot);
          value_scales[j] = load_scale<KIND, HKV, DV>(value_words, slot);
        }
#endif
        UNROLL
        for (int n = 0; n < NK; n++) {
          const int pack = n * 4 + column;
          if (KEY % 4 != 0 && pack >= KEY) {
            keys[j][n] = Keys{};
            continue;
          }
#if PACKED
          keys[j][n] = load_piece<KIND, HKV, D, EK>(key_codes, key_words, slot, n * 4);
#else
#if FUSED
          if (smaller(base + token, end - 1) == stop - 1) {
            keys[j][n] = load_words(k, (size_t(first_row) * HKV + head) * KEY + pack);
            continue;
          }
#endif
          keys[j][n] = load_words(k_pool, (size_t(slot) * HKV + head) * KEY + pack);
#endif
        }
      }
      UNROLL
      for (int j = 0; j < 4; j++) {
        const int token = j / 2 * 8 + column * 2 + j % 2;
        const int slot = WHOLE ? run + smaller(WINDOW > 0 ? larger(token, since) : token, youngest) : value_slots[j];
        UNROLL
        for (int n = 0; n < NV; n++) {
          const int pack = n * 8 + line;
          if (VALUE % 8 != 0 && pack >= VALUE) {
            values[j][n] = Values{};
            continue;
          }
#if PACKED
          values[j][n] = load_piece<KIND, HKV, DV, EV>(value_codes, value_words, slot, n * 8);
#else
#if FUSED
          if (smaller(base + token, end - 1) == stop - 1) {
            values[j][n] = load_words(v, (size_t(first_row) * HKV + head) * VALUE + pack);
            continue;
          }
#endif
          values[j][n] = load_words(v_pool, (size_t(slot) * HKV + head) * VALUE + pack);
#endif
        }
      }
    }
    const int next_run = base + WARPS * 16;
    if (next_run < end) {
      if (WHOLE) {
        run = table[pages + unsigned(next_run) / PAGE] * PAGE + unsigned(next_run) % PAGE;
      } else {
        UNROLL
        for (int j = 0; j < 2; j++) {
          const int t = smaller(next_run + 8 * j + line, end - 1);
          key_slots[j] = table[pages + t / PAGE] * PAGE + t % PAGE;
        }
        UNROLL
        for (int j = 0; j < 4; j++) {
          const int t = smaller(next_run + j / 2 * 8 + column * 2 + j % 2, end - 1);
          value_slots[j] = table[pages + t / PAGE] * PAGE + t % PAGE;
        }
      }
    }
    if (base < first) continue;

    // Tokens are the rows and queries the columns: 8 of these, so that up to 8 queries fill a product.
    float s[HALVES][4], more[HALVES][4];
    UNROLL
    for (int h = 0; h < HALVES; h++) {
      UNROLL
      for (int i = 0; i < 4; i++) s[h][i] = more[h][i] = 0.0f;
    }
    UNROLL
    for (int n = 0; n < NK; n++) {
      UNROLL
      for (int m = 0; m < EK / 2; m += 2) {
        unsigned key[2][2], rest[2][2] = {{0, 0}, {0, 0}};
        UNROLL
        for (int i = 0; i < 4; i++) {
          const int j = i / 2, e = m + i % 2;
#if PACKED
          key[j][i % 2] = key_pair<KT>(keys[j][n], e, at_bits, rest[j][i % 2]);
#else
          key[j][i % 2] = keys[j][n].w[e];
#endif
        }
        UNROLL
        for (int h = 0; h < HALVES; h++) {
          const unsigned q0 = query[h][n][m], q1 = query[h][n][m + 1];
          mma<KT>(s[h], key[0][0], key[1][0], key[0][1], key[1][1], q0, q1);
          if (SUMS) mma<KT>(more[h], rest[0][0], rest[1][0], rest[0][1], rest[1][1], q0, q1);
        }
      }
    }
    float by[2] = {scale, scale}, weigh[2] = {1.0f, 1.0f};
#if PACKED
    if (KIND != INT4) {
      UNROLL
      for (int j = 0; j < 2; j++) {
        by[j] = key_scales[j] * scale;
        weigh[j] = value_scales[j] * Weight<KIND>::LIFT;
      }
    }
#endif
    unsigned weights[HALVES][2];
    UNROLL
    for (int h = 0; h < HALVES; h++) {
      float keep[2], p[4];
      UNROLL
      for (int c = 0; c < 2; c++) {
        float next = top[h][c], x[2];
        UNROLL
        for (int j = 0; j < 2; j++) {
          const int t = base + 8 * j + line;
          x[j] = (SUMS ? s[h][2 * j + c] + more[h][2 * j + c] : s[h][2 * j + c]) * by[j];
          if (SOFTCAP) x[j] = tanh_of(x[j]) * params[1] * LOG2E;
          // Alone in a block, a row sees all up to `end`, and what queries that are none see doesn't matter.
          if (t >= end || (ROWS > 1 && t >= seen[h][c]) || (WINDOW > 0 && t < seen[h][c] - WINDOW)) x[j] = NOTHING;
          next = max_of(next, x[j]);
        }
        UNROLL
        for (int step = 4; step < 32; step *= 2) next = max_of(next, shuffle_xor(next, step));
        keep[c] = exp2_of(top[h][c] - next);
        top[h][c] = next;
        total[h][c] *= keep[c];
        UNROLL
        for (int j = 0; j < 2; j++) {
          float weight = exp2_of(x[j] - next);
          if ((ROWS > 1 || WINDOW > 0) && x[j] <= NOTHING) weight = 0.0f;  // it may have seen nothing yet
          total[h][c] += weight;
          p[2 * j + c] = weight * weigh[j];
        }
      }
      UNROLL
      for (int j = 0; j < 2; j++) weights[h][j] = transpose(two<KT>(p[2 * j], p[2 * j + 1]));
      if (keep[0] < 1.0f || keep[1] < 1.0f) {
        UNROLL
        for (int n = 0; n < NV; n++) {
          UNROLL
          for (int m = 0; m < EV / 2; m++) {
            UNROLL
            for (int i = 0; i < 4; i++) acc[h][n][m][i] *= keep[i % 2];
          }
        }
      }
    }
    // Here numbers are the rows.
    UNROLL
    for (int n = 0; n < NV; n++) {
      UNROLL
      for (int m = 0; m < EV / 2; m++) {
        unsigned value[2][2], rest[2][2] = {{0, 0}, {0, 0}};
        UNROLL
        for (int i = 0; i < 4; i++) {
          const int j = i / 2, e = i % 2;
#if PACKED
          value[j][e] = value_pair<KT>(values[2 * j][n], values[2 * j + 1][n], 2 * m + e, at_bits, rest[j][e]);
#else
          value[j][e] = halves(values[2 * j][n].w[m], values[2 * j + 1][n].w[m], e);
#endif
        }
        UNROLL
        for (int h = 0; h < HALVES; h++) {
          const unsigned w0 = weights[h][0], w1 = weights[h][1];
          mma<KT>(acc[h][n][m], value[0][0], value[0][1], value[1][0], value[1][1], w0, w1);
          if (SUMS) mma<KT>(acc[h][n][m], rest[0][0], rest[0][1], rest[1][0], rest[1][1], w0, w1);
        }
      }
    }
  }

  // Join the warps, AT_ONCE queries at a time so that shared memory suffices.
  SHARED(float, tops, WARPS * 16);
  SHARED(float, totals, WARPS * 16);
  SHARED(float, accs, WARPS * AT_ONCE * DV);
  UNROLL
  for (int h = 0; h < HALVES; h++) {
    UNROLL
    for (int c = 0; c < 2; c++) {
      UNROLL
      for (int step = 4; step < 32; step *= 2) total[h][c] += shuffle_xor(total[h][c], step);
      if (line == 0) {
        tops[warp * 16 + 8 * h + 2 * column + c] = top[h][c];
        totals[warp * 16 + 8 * h + 2 * column + c] = total[h][c];
      }
    }
  }
  for (int from = 0; from < QUERIES; from += AT_ONCE) {
    if (from > 0) BARRIER();
    UNROLL
    for (int h = 0; h < HALVES; h++) {
      UNROLL
      for (int c = 0; c < 2; c++) {
        const int i = 2 * column + c + 8 * h - from;
        if (i < 0 || i >= AT_ONCE) continue;
        UNROLL
        for (int n = 0; n < NV; n++) {
          UNROLL
          for (int e = 0; e < EV; e++) {
            const int at = (n * 8 + line) * EV + e;
            float x = acc[h][n][e / 2][e % 2 * 2 + c];
#if PACKED
            x *= 1.0f / Weight<KIND>::LIFT;
#endif
            if (at < DV) accs[(warp * AT_ONCE + i) * DV + at] = x;
          }
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
