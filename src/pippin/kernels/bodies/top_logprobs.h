// Log probabilities of a row of logits: that of one token, and the largest `sizes[1]` with their ids, in order. Block x.
  using namespace pippin;
  constexpr int WARPS = THREADS / 32, EACH = 16 / sizeof(T), U = 4, ROOM = 2 * THREADS;
  SHARED(wide, sums, WARPS * 8);
  SHARED(wide, totals, 8);
  SHARED(unsigned, counts, 8);
  SHARED(float, found, WARPS);
  SHARED(unsigned, found_ids, WARPS);
  SHARED(unsigned, near_keys, ROOM);
  SHARED(int, near_ids, ROOM);
  const int n = sizes[0], count = sizes[1], packs = (n + EACH - 1) / EACH;
  const Row<T> row = row_of(logits, nobody, block_x, logits_shape[1], n, false);
  const Survey top = joined(survey<T, U>(row, 0, packs, tid, THREADS), lane, warp, WARPS, found, found_ids);
  const float shift = is_finite(top.top) ? top.top : 0.0f;
  float total = 0.0f;
  for (int i = tid; i < packs; i += U * THREADS) {
    Logits<T> x[U];
    UNROLL
    for (int u = 0; u < U; u++) x[u] = logits_at(row, i + u * THREADS);
    UNROLL
    for (int u = 0; u < U; u++) {
      UNROLL
      for (int e = 0; e < EACH; e++) {
        total += exp2_of((float(x[u].pack.v[e]) - shift) * LOG2E);
      }
    }
  }
  total = sum_lanes<32>(total);
  if (lane == 0) found[warp] = total;
  BARRIER();
  total = 0.0f;
  for (int i = 0; i < WARPS; i++) total += found[i];
  BARRIER();
  const float norm = shift + log_of(total);
  if (tid == 0) logprob[block_x] = float(row.logits[tokens[block_x]]) - norm;
  const size_t begin = size_t(block_x) * count;
  if (!is_finite(top.raw)) {  // no numbers to order: any ids
    for (int i = tid; i < count; i += THREADS) {
      ids[begin + i] = i;
      logprobs[begin + i] = float(row.logits[i]) - norm;
    }
    return;
  }
  if (count == 0) return;
  Keys<false> keys;
  keys.top = top.top;
  keys.inverse = 1.0f;
  Most most;
  most.tokens = count;
  most.by_mass = false;
  most.share = most.mass = 0.0f;
  const Range range = search<T, 2, THREADS, false>(row, keys, most, tid, lane, warp, sums, totals, counts);
  const int at = int(sum_before(range.before + range.mine, lane, warp, found_ids));
  collect<T, 2, THREADS, false>(row, keys, range, true, at, ROOM, tid, near_keys, near_ids);
  const int all = smaller(int(range.count) + range.found, ROOM);
  for (int i = tid; i < all; i += THREADS) {
    const unsigned own = near_keys[i];
    const int id = near_ids[i];
    int rank = 0;
    for (int j = 0; j < all; j++) rank += near_keys[j] < own || (near_keys[j] == own && near_ids[j] < id) ? 1 : 0;
    if (rank < count) {
      ids[begin + rank] = id;
      logprobs[begin + rank] = float(row.logits[id]) - norm;
    }
  }
