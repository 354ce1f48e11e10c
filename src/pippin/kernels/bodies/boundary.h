// The last token that limits leave in a row of bits, in order of (bits, id): block x. Each pass over the row splits the
// range in which it lies in eight by what lies before; once few tokens are in it, they are ranked in shared memory.
  using namespace pippin;
  constexpr int ENDS = 8, SUMS = MASS ? 2 * ENDS : ENDS, WARPS = THREADS / 32, U = 4;
  constexpr int MOST_PASSES = 24;  // 8**11 is all bits, 8**8 all ids
  constexpr unsigned TOP = SIGNED ? 0xffffffffu : 0x7fffffffu;
  SHARED(unsigned, parts, WARPS * SUMS);
  SHARED(unsigned, totals, SUMS);
  SHARED(unsigned, near_bits, THREADS);
  SHARED(unsigned, near_mass, THREADS);
  SHARED(int, near_ids, THREADS);
  const int n = bits_shape[1];
  const size_t begin = size_t(block_x) * n, pack = begin / 4;
  const int lead = int(begin % 4), packs = (lead + n + 3) / 4;
  const int most_tokens = COUNT ? most[block_x] : n;
  const float most_mass = MASS ? target[block_x] : 0.0f;
  const bool all = (!COUNT || most_tokens >= n) && (!MASS || most_mass > 4.3e9f);  // more than any sum of words
  const bool none = !(most_tokens > 0) || (MASS && !(0.0f < most_mass));
  if (all || none) {
    if (tid == 0) {
      boundary[block_x] = none ? 0u : TOP;
      last[block_x] = none ? -1 : n;
    }
    return;
  }
  // Tokens from `low` to `high` are looked at, by their bits, or, of those whose bits are `tie`, by their ids.
  unsigned low = 0, high = TOP, tie = 0, count = 0, mass_before = 0;
  bool by_id = false;
  int found = 2 * THREADS;
  unsigned mine = 0;  // how many of those found are this thread's
  for (int pass = 0; found > THREADS && pass < MOST_PASSES; pass++) {
    if (low == high && !by_id) {  // equals: the lower ids come first
      by_id = true;
      tie = low;
      low = 0;
      high = unsigned(n - 1);
    }
    unsigned ends[ENDS], counts[ENDS], sums[SUMS];
    const unsigned width = high - low, step = width / ENDS + 1;
    UNROLL
    for (int j = 0; j < ENDS; j++) {
      const unsigned past = step * unsigned(j + 1) - 1;
      ends[j] = j == ENDS - 1 || past >= width ? high : low + past;
      if (pass == 0) ends[j] = first_end(SIGNED, j);
    }
    UNROLL
    for (int j = 0; j < SUMS; j++) sums[j] = 0;
    for (int i = tid; i < packs; i += U * THREADS) {
      Words x[U], w[U];
      UNROLL
      for (int u = 0; u < U; u++) {
        x[u] = words_of_row(bits, pack, i + u * THREADS, lead, n);
        if (MASS) w[u] = words_of_row(mass, pack, i + u * THREADS, lead, n);
      }
      UNROLL
      for (int u = 0; u < U; u++) {
        UNROLL
        for (int e = 0; e < 4; e++) {
          const int id = (i + u * THREADS) * 4 + e - lead;
          const unsigned key = by_id ? unsigned(id) : x[u].w[e];
          const bool inside = unsigned(id) < unsigned(n) && (!by_id || x[u].w[e] == tie) && key >= low;
          UNROLL
          for (int j = 0; j < ENDS; j++) {
            if (inside && key <= ends[j]) {
              sums[j] += 1;
              if (MASS) sums[ENDS + j] += w[u].w[e];
            }
          }
        }
      }
    }
    UNROLL
    for (int j = 0; j < ENDS; j++) counts[j] = sums[j];
    const unsigned sum = sum_spread<SUMS>(sums, lane);
    if (lane % (32 / SUMS) == 0) parts[warp * SUMS + lane / (32 / SUMS)] = sum;
    BARRIER();
    if (tid < SUMS) {
      unsigned total = 0;
      for (int i = 0; i < WARPS; i++) total += parts[i * SUMS + tid];
      totals[tid] = total;
    }
    BARRIER();
    // The last of the eight with room for a token in front of it.
    unsigned from = low, to = ends[0], before = 0, before_mass = 0;
    mine = counts[0];
    found = int(totals[0]);
    UNROLL
    for (int j = 1; j < ENDS; j++) {
      const unsigned nearer = totals[j - 1], nearer_mass = MASS ? totals[ENDS + j - 1] : 0u;
      if (ends[j - 1] < high && within<COUNT, MASS>(count + nearer, mass_before + nearer_mass, most_tokens, most_mass)) {
        mine = counts[j] - counts[j - 1];
        found = int(totals[j] - nearer);
        from = ends[j - 1] + 1;
        to = ends[j];
        before = nearer;
        before_mass = nearer_mass;
      }
    }
    low = from;
    high = to;
    count += before;
    mass_before += before_mass;
  }
  unsigned in_warp;
  int at = int(sum_before(mine, lane, in_warp));
  if (lane == 0) parts[warp] = in_warp;
  BARRIER();
  for (int i = 0; i < warp; i++) at += int(parts[i]);
  for (int i = tid; i < packs; i += U * THREADS) {
    Words x[U];
    UNROLL
    for (int u = 0; u < U; u++) x[u] = words_of_row(bits, pack, i + u * THREADS, lead, n);
    UNROLL
    for (int u = 0; u < U; u++) {
      UNROLL
      for (int e = 0; e < 4; e++) {
        const int id = (i + u * THREADS) * 4 + e - lead;
        const unsigned key = by_id ? unsigned(id) : x[u].w[e];
        const bool inside = unsigned(id) < unsigned(n) && (!by_id || x[u].w[e] == tie) && key >= low;
        if (inside && key <= high && at < THREADS) {
          near_bits[at] = x[u].w[e];
          near_ids[at] = id;
          if (MASS) near_mass[at] = mass[begin + id];
          at++;
        }
      }
    }
  }
  BARRIER();
  if (found == 0 && tid == 0) {  // what is left is all before `low`
    boundary[block_x] = by_id ? tie : low;
    last[block_x] = by_id ? int(low) - 1 : -1;
  }
  if (tid < found) {
    const unsigned own = near_bits[tid];
    const int id = near_ids[tid];
    unsigned rank = count;
    for (int i = 0; i < found; i++) {
      if (near_bits[i] < own || (near_bits[i] == own && near_ids[i] < id)) {
        rank++;
        if (MASS) mass_before += near_mass[i];
      }
    }
    const unsigned mass_after = MASS ? mass_before + near_mass[tid] : 0u;
    const bool kept = within<COUNT, MASS>(rank, mass_before, most_tokens, most_mass);
    const bool next = within<COUNT, MASS>(rank + 1, mass_after, most_tokens, most_mass);
    if (kept && (!next || rank + 1 == count + unsigned(found))) {
      boundary[block_x] = own;
      last[block_x] = id;
    }
  }
