// The token with the best score in a part of a row without top_k and top_p: part y of the row of block x.
  using namespace pippin;
  constexpr int WARPS = THREADS / 32;
  SHARED(float, found, WARPS);
  SHARED(unsigned, found_ids, WARPS);
  const int n = sizes[0], given = sizes[1], at = block_x * blocks_y;
  const Row<T> row = row_of(logits, allowed, block_x, logits_shape[1], n, (given & MASKED) != 0);
  const Survey whole = survey_of_parts(tops, ids, at, blocks_y);
  const int likeliest = whole.id < unsigned(n) ? int(whole.id) : 0;
  const float heat = temperature[block_x];
  float best = 0.0f;
  unsigned best_id = unsigned(likeliest);
  if (heat > 0.0f && is_finite(whole.raw) && is_finite(whole.top)) {
    const int late = (n + 1) / 2, each = (late + blocks_y - 1) / blocks_y, begin = block_y * each;
    const unsigned a = noise[2 * block_x], b = noise[2 * block_x + 1];
    Keys<true> keys;
    keys.top = whole.top;
    keys.inverse = 1.0f / heat;
    Kept kept;
    kept.farthest = (given & MIN_P) != 0 ? -log_min_p[block_x] : float_of(INFINITE);
    kept.last = INFINITE;
    kept.last_id = n;
    best = noise_of(a, b, likeliest, n);
    noisiest(row, keys, kept, a, b, begin, smaller(late, begin + each), tid, THREADS, best, best_id);
  }
  best_of_block(best, best_id, lane, warp, WARPS, found, found_ids);
  if (tid == 0) {
    scores[at + block_y] = best;
    tokens[at + block_y] = int(best_id);
  }
