// A token of a row of logits: block x. The likeliest, or Gumbel-max over those that limits leave.
  using namespace pippin;
  constexpr int WARPS = THREADS / 32, EACH = 16 / sizeof(T), U = 4;
  SHARED(wide, sums, WARPS * 8);
  SHARED(wide, totals, 8);
  SHARED(unsigned, counts, 8);
  SHARED(float, found, WARPS);
  SHARED(unsigned, found_ids, WARPS);
  SHARED(unsigned, near_keys, THREADS);
  SHARED(unsigned, near_mass, THREADS);
  SHARED(int, near_ids, THREADS);
  SHARED(unsigned, boundary, 1);
  SHARED(int, last, 1);
  const int n = sizes[0], given = sizes[1];
  const Row<T> row = row_of(logits, allowed, block_x, logits_shape[1], n, (given & MASKED) != 0);
  const Survey top = joined(
      survey<T, U>(row, 0, (n + EACH - 1) / EACH, tid, THREADS), lane, warp, WARPS, found, found_ids);
  const float heat = (given & RANDOM) != 0 ? temperature[block_x] : 0.0f;
  const int likeliest = top.id < unsigned(n) ? int(top.id) : 0;
  if (tid == 0) finite[block_x] = is_finite(top.raw) ? 1 : 0;
  if (!(heat > 0.0f) || !is_finite(top.raw) || !is_finite(top.top)) {
    if (tid == 0) tokens[block_x] = likeliest;
    return;
  }
  Keys<true> keys;
  keys.top = top.top;
  keys.inverse = 1.0f / heat;
  Most most;
  most.tokens = (given & TOP_K) != 0 ? top_k[block_x] : n;
  most.share = (given & TOP_P) != 0 ? top_p[block_x] : float_of(INFINITE);
  most.by_mass = is_finite(most.share);
  most.mass = 0.0f;
  Kept kept;
  kept.farthest = (given & MIN_P) != 0 ? -log_min_p[block_x] : float_of(INFINITE);
  kept.last = INFINITE;
  kept.last_id = n;
  if (most.tokens < n || most.by_mass) {
    const Range range = search<T, 2, THREADS, true>(row, keys, most, tid, lane, warp, sums, totals, counts);
    const int at = int(sum_before(range.mine, lane, warp, found_ids));
    if (tid == 0) {  // if none of the range is left, all before `low` is
      boundary[0] = range.by_id ? range.tie : range.low;
      last[0] = range.by_id ? int(range.low) - 1 : -1;
    }
    collect<T, 2, THREADS, true>(row, keys, range, false, at, THREADS, tid, near_keys, near_ids);
    if (tid < range.found) near_mass[tid] = most.by_mass ? mass_of(near_keys[tid]) : 0u;
    BARRIER();
    if (tid < range.found) {
      const unsigned own = near_keys[tid];
      const int id = near_ids[tid];
      unsigned rank = range.count;
      wide mass = range.mass;
      for (int i = 0; i < range.found; i++) {
        if (near_keys[i] < own || (near_keys[i] == own && near_ids[i] < id)) {
          rank++;
          mass += near_mass[i];
        }
      }
      const bool next = fits(most, rank + 1, mass + near_mass[tid]) && rank + 1 != range.count + unsigned(range.found);
      if (fits(most, rank, mass) && !next) {
        boundary[0] = own;
        last[0] = id;
      }
    }
    BARRIER();
    kept.last = boundary[0];
    kept.last_id = last[0];
  }
  const unsigned a = noise[2 * block_x], b = noise[2 * block_x + 1];
  float best = noise_of(a, b, likeliest, n);
  unsigned best_id = unsigned(likeliest);
  noisiest(row, keys, kept, a, b, 0, (n + 1) / 2, tid, THREADS, best, best_id);
  best_of_block(best, best_id, lane, warp, WARPS, found, found_ids);
  if (tid == 0) tokens[block_x] = int(best_id);
