// The CHOSEN best of a row's COUNT keys, and the share that each of them gets. A warp takes a row, each lane every 32nd key.
  using namespace pippin;
  constexpr int HELD = (COUNT + 31) / 32;
  constexpr float GONE = -2e38f, WORST = -1e38f;  // what was taken or is not there, and what is no number
  const int row = block_x * WARPS + warp;
  if (row < keys_shape[0]) {
    float key[HELD];
    UNROLL
    for (int n = 0; n < HELD; n++) {
      const int i = n * 32 + lane;
      const float x = i < COUNT ? float(keys[size_t(row) * COUNT + i]) : 0.0f;
      const float better = SMALLEST ? -x : x;
      key[n] = i >= COUNT ? GONE : better > WORST ? better : WORST;
    }
    float top = GONE, all = 0.0f;
    if (BEFORE) {
      UNROLL
      for (int n = 0; n < HELD; n++) top = larger(top, key[n]);
      UNROLL
      for (int step = 16; step > 0; step /= 2) top = larger(top, shuffle_xor(top, step));
      UNROLL
      for (int n = 0; n < HELD; n++) all += key[n] > GONE ? exp2_of((key[n] - top) * LOG2E) : 0.0f;
      all = sum_lanes<32>(all);
    }
    unsigned mine = 0;
    for (int taken = 0; taken < CHOSEN; taken++) {
      float best = -3e38f;
      unsigned at = 0;
      UNROLL
      for (int n = 0; n < HELD; n++) {
        if (LATER ? key[n] >= best : key[n] > best) {
          best = key[n];
          at = unsigned(n * 32 + lane);
        }
      }
      UNROLL
      for (int step = 16; step > 0; step /= 2) {
        const float theirs = shuffle_xor(best, step);
        const unsigned where = shuffle_xor(at, step);
        if (theirs > best || (theirs == best && (LATER ? where > at : where < at))) {
          best = theirs;
          at = where;
        }
      }
      UNROLL
      for (int n = 0; n < HELD; n++) {
        if (unsigned(n * 32 + lane) == at) key[n] = GONE;
      }
      if (lane == taken) mine = at;
    }
    const bool here = lane < CHOSEN;
    float share = here ? float(values[size_t(row) * COUNT + mine]) : 0.0f;
    if (BEFORE) share = here ? exp2_of((share - top) * LOG2E) / all : 0.0f;
    if (SOFT) {
      float most = here ? share : GONE;
      UNROLL
      for (int step = 16; step > 0; step /= 2) most = larger(most, shuffle_xor(most, step));
      share = here ? exp2_of((share - most) * LOG2E) : 0.0f;
    }
    if (SOFT || DIVIDED) share /= sum_lanes<32>(share);
    if (here) {
      indices[size_t(row) * CHOSEN + lane] = int(mine);
      shares[size_t(row) * CHOSEN + lane] = T(share * params[0]);
    }
  }
