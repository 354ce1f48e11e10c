// For draw.h and top_logprobs.h: rows of logits, noise, what a block finds together, and how far limits reach in a row.
namespace pippin {

CONSTANT constexpr unsigned INFINITE = 0x7f800000u;  // its bits
CONSTANT constexpr float UNLIKELY = -1e30f;  // a logit that is drawn if nothing else may be

// n logits that begin at a whole pack. Those that a mask refuses are -infinity, and none that it allows is.
template <typename T>
struct Row {
  const DEVICE T* logits;
  const DEVICE unsigned* words;
  int n;
  bool masked;
};

// Row `at` of logits [S, width] and of masks.
template <typename T>
INLINE Row<T> row_of(const DEVICE T* logits, const DEVICE unsigned* words, int at, int width, int n, bool masked) {
  Row<T> row;
  row.n = n;
  row.masked = masked;
  row.logits = logits + size_t(at) * width;
  row.words = words + (masked ? size_t(at) * ((n + 31) / 32) : 0);
  return row;
}

// `x`, logit of an id whose bit is the lowest of `word`.
template <typename T>
INLINE float seen(const THREAD Row<T>& row, float x, unsigned word) {
  if (!row.masked) return x;
  return (word & 1u) != 0 ? (x < UNLIKELY ? UNLIKELY : x) : -float_of(INFINITE);
}

template <typename T>
INLINE float logit_of(const THREAD Row<T>& row, int id) {
  const unsigned word = row.masked ? row.words[id / 32] >> (id % 32) : 1u;
  return seen(row, float(row.logits[id]), word);
}

// 16 bytes of a row with the mask's bits for them, loaded together; behind the row's end logits are -infinity.
template <typename T>
struct Logits {
  Pack<T> pack;
  unsigned word;
  int id;
};

template <typename T>
INLINE Logits<T> logits_at(const THREAD Row<T>& row, int pack) {
  constexpr int EACH = 16 / sizeof(T);
  Logits<T> x;
  x.id = pack * EACH;
  x.word = 0;
  if (x.id < row.n) {
    x.pack = ((const DEVICE Pack<T>*)row.logits)[pack];
    if (row.masked) x.word = row.words[x.id / 32] >> (x.id % 32);
  }
  if (x.id + EACH > row.n) {
    UNROLL
    for (int e = 0; e < EACH; e++) {
      if (x.id + e >= row.n) {
        x.pack.v[e] = T(-float_of(INFINITE));
        x.word &= ~(1u << e);
      }
    }
  }
  return x;
}

// Of equals the lower id.
INLINE bool comes_before(float x, unsigned id, float y, unsigned other) { return x > y || (x == y && id < other); }

// The largest x of a block and its id, of equals the lowest, for every thread; `found` and `ids` have a word a warp.
INLINE void best_of_block(
    THREAD float& x, THREAD unsigned& id, int lane, int warp, int warps, OF_BLOCK float* found, OF_BLOCK unsigned* ids) {
  for (int step = 16; step > 0; step /= 2) {
    const float other = shuffle_xor(x, step);
    const unsigned other_id = shuffle_xor(id, step);
    if (comes_before(other, other_id, x, id)) {
      x = other;
      id = other_id;
    }
  }
  if (lane == 0) {
    found[warp] = x;
    ids[warp] = id;
  }
  BARRIER();
  for (int i = 0; i < warps; i++) {
    const float other = found[i];
    const unsigned other_id = ids[i];
    if (comes_before(other, other_id, x, id)) {
      x = other;
      id = other_id;
    }
  }
  BARRIER();
}

// The largest logit, its id (of equals the lowest), and the largest before the mask, infinite if one is no number.
struct Survey {
  float top, raw;
  unsigned id;
};

// Over packs [begin, end), by each of a block's `threads`.
template <typename T, int U>
INLINE Survey survey(const THREAD Row<T>& row, int begin, int end, int tid, int threads) {
  constexpr int EACH = 16 / sizeof(T);
  Survey found;
  found.top = found.raw = -float_of(INFINITE);
  found.id = 0x7fffffffu;
  bool odd = false;
  for (int i = begin + tid; i < end; i += U * threads) {
    Logits<T> x[U];
    UNROLL
    for (int u = 0; u < U; u++) x[u] = logits_at(row, i + u * threads < end ? i + u * threads : row.n);
    UNROLL
    for (int u = 0; u < U; u++) {
      float v[EACH], top = -float_of(INFINITE);
      UNROLL
      for (int e = 0; e < EACH; e++) {
        const float raw = float(x[u].pack.v[e]);
        odd |= raw != raw;
        found.raw = max_of(found.raw, raw);
        v[e] = seen(row, raw, x[u].word >> e);
        top = max_of(top, v[e]);
      }
      if (top > found.top) {  // seldom, but for the first
        found.top = top;
        UNROLL
        for (int e = EACH - 1; e >= 0; e--) {
          if (v[e] == top) found.id = unsigned(x[u].id + e);
        }
      }
    }
  }
  if (odd) found.raw = float_of(INFINITE);
  return found;
}

INLINE Survey joined(
    Survey mine, int lane, int warp, int warps, OF_BLOCK float* found, OF_BLOCK unsigned* ids) {
  unsigned nobody = 0;
  best_of_block(mine.top, mine.id, lane, warp, warps, found, ids);
  best_of_block(mine.raw, nobody, lane, warp, warps, found, ids);
  return mine;
}

// The same of a row whose parts' were written from `at` on.
INLINE Survey survey_of_parts(const DEVICE float* tops, const DEVICE int* ids, int at, int parts) {
  Survey whole;
  whole.top = tops[2 * at];
  whole.raw = tops[2 * at + 1];
  whole.id = unsigned(ids[at]);
  for (int i = at + 1; i < at + parts; i++) {
    if (comes_before(tops[2 * i], unsigned(ids[i]), whole.top, whole.id)) {
      whole.top = tops[2 * i];
      whole.id = unsigned(ids[i]);
    }
    whole.raw = larger(whole.raw, tops[2 * i + 1]);
  }
  return whole;
}

INLINE bool is_finite(float x) { return x < float_of(INFINITE) && x > -float_of(INFINITE); }

// --- noise ---

INLINE unsigned turned(unsigned x, int by) { return (x << by) | (x >> (32 - by)); }

template <int A, int B, int C, int D>
INLINE void four_rounds(THREAD unsigned& x, THREAD unsigned& y) {
  x += y;
  y = turned(y, A) ^ x;
  x += y;
  y = turned(y, B) ^ x;
  x += y;
  y = turned(y, C) ^ x;
  x += y;
  y = turned(y, D) ^ x;
}

// Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): what MLX's random bits are, of counters x and y.
INLINE void threefry(unsigned a, unsigned b, THREAD unsigned& x, THREAD unsigned& y) {
  const unsigned c = a ^ b ^ 0x1bd11bdau;
  x += a;
  y += b;
  four_rounds<13, 15, 26, 6>(x, y);
  x += b;
  y += c + 1;
  four_rounds<17, 29, 16, 24>(x, y);
  x += c;
  y += a + 2;
  four_rounds<13, 15, 26, 6>(x, y);
  x += a;
  y += b + 3;
  four_rounds<17, 29, 16, 24>(x, y);
  x += b;
  y += c + 4;
  four_rounds<13, 15, 26, 6>(x, y);
  x += c;
  y += a + 5;
}

// mx.random.uniform's number of random bits.
INLINE float uniform_of(unsigned bits) {
  const float u = float(bits) * 2.3283064365386963e-10f;
  return u < 0.99999994f ? u : 0.99999994f;
}

// sampler.gumbel's noise of a uniform number.
INLINE float gumbel_of(float u) {
  const float e = u < 0.0009765625f ? fma_of(0.5f * u, u, u) : -log_of(1.0f - u);
  return -log_of(larger(e, 1.1641532182693481e-10f));
}

// Of n numbers, MLX hashes i and LATE + i together, LATE being half of n, rounded up; an odd one's middle is with 0.
INLINE float noise_of(unsigned a, unsigned b, int id, int n) {
  const int late = (n + 1) / 2, i = id < late ? id : id - late;
  unsigned x = unsigned(i), y = i < n / 2 ? unsigned(late + i) : 0u;
  threefry(a, b, x, y);
  return gumbel_of(uniform_of(id < late ? x : y));
}

// --- how far limits reach ---

// How far a logit is from the largest, in units of the temperature.
INLINE float distance_of(float x, float top, float inverse) {
  const float d = (top - x) * inverse;
  return d > 0.0f ? d : 0.0f;  // -0 has bits of its own
}

// Weights are summed as integers, so that no order changes a sum: the likeliest token's is 2**31.
INLINE unsigned mass_of(unsigned distance) {
  return unsigned(fma_of(exp2_of(float_of(distance) * -LOG2E), 2147483648.0f, 0.5f));
}

// Larger logits have lower keys, 0 comes before -0, and infinities have keys too.
INLINE unsigned order_of(float x) {
  const unsigned bits = bits_of(-x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits ^ 0x80000000u;
}

// In which order a search takes tokens: of their distances, or of the logits themselves; in both, then of their ids.
template <bool SCALED>
struct Keys {
  float top, inverse;
};

template <bool SCALED>
INLINE unsigned key_of(Keys<SCALED> keys, float x) {
  return SCALED ? bits_of(distance_of(x, keys.top, keys.inverse)) : order_of(x);
}

// Where a first pass ends its ranges but the last: where boundaries are usual.
template <bool SCALED>
INLINE unsigned first_ends(Keys<SCALED> keys, int i) {
  const float d = i == 0 ? 1.0f : i == 1 ? 2.0f : i == 2 ? 3.0f : i == 3 ? 4.5f : i == 4 ? 6.0f : i == 5 ? 9.0f : 13.0f;
  return SCALED ? bits_of(d) : order_of(keys.top - d);
}

// What limits leave: up to a key and an id, and no farther than min_p says.
struct Kept {
  unsigned last;
  int last_id;
  float farthest;
};

// Draws among pairs [begin, end) of a row: the best of noise less distance takes the place of `best`, which is the
// likeliest token's, and always kept. What can't come before the best so far, whatever its noise, needs no hash: noise
// is at most -log of its uniform number, of which 2**-33 is the least.
template <typename T>
INLINE void noisiest(
    const THREAD Row<T>& row, Keys<true> keys, Kept kept, unsigned a, unsigned b, int begin, int end, int tid,
    int threads, THREAD float& best, THREAD unsigned& best_id) {
  constexpr int PAIRS = 4;
  constexpr float LEAST = 1.1641532182693481e-10f;
  const int n = row.n, late = (n + 1) / 2;
  for (int from = begin + tid; from < end; from += PAIRS * threads) {
    float d[2 * PAIRS];
    UNROLL
    for (int p = 0; p < 2 * PAIRS; p++) {
      const int i = from + p / 2 * threads, id = p % 2 == 0 ? i : late + i;
      d[p] = float_of(INFINITE);
      if (i < end && id < n) {
        const float distance = distance_of(logit_of(row, id), keys.top, keys.inverse);
        const unsigned key = bits_of(distance);
        const bool left = key < kept.last || (key == kept.last && id <= kept.last_id);
        if (left && distance <= kept.farthest) d[p] = distance;
      }
    }
    UNROLL
    for (int p = 0; p < 2 * PAIRS; p += 2) {
      const int i = from + p / 2 * threads;
      const float most_of = exp2_of(fma_of(-(best + d[p]), LOG2E, 0.01f));
      const float most_late = exp2_of(fma_of(-(best + d[p + 1]), LOG2E, 0.01f));
      if (larger(most_of, most_late) >= LEAST) {
        unsigned x = unsigned(i), y = i < n / 2 ? unsigned(late + i) : 0u;
        threefry(a, b, x, y);
        const float u = uniform_of(x), u_late = uniform_of(y);
        if (most_of >= LEAST && u <= most_of) {
          const float score = gumbel_of(u) - d[p];
          if (comes_before(score, unsigned(i), best, best_id)) {
            best = score;
            best_id = unsigned(i);
          }
        }
        if (most_late >= LEAST && u_late <= most_late) {
          const float score = gumbel_of(u_late) - d[p + 1];
          if (comes_before(score, unsigned(late + i), best, best_id)) {
            best = score;
            best_id = unsigned(late + i);
          }
        }
      }
    }
  }
}

INLINE wide shuffle_wide(wide x, int mask) {
  const unsigned low = shuffle_xor(unsigned(x), mask), high = shuffle_xor(unsigned(x >> 32), mask);
  return wide(high) << 32 | low;
}

// The sum over a warp of each of 8 numbers: lane l gets that of number l / 4.
INLINE wide sum_eight(THREAD wide (&x)[8], int lane) {
  int step = 16;
  UNROLL
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & step) != 0;
    UNROLL
    for (int i = 0; i < half; i++) {
      const wide mine = upper ? x[half + i] : x[i], theirs = upper ? x[i] : x[half + i];
      x[i] = mine + shuffle_wide(theirs, step);
    }
    step /= 2;
  }
  x[0] += shuffle_wide(x[0], 2);
  x[0] += shuffle_wide(x[0], 1);
  return x[0];
}

// Tokens from `low` to `high` are looked at, by their keys, or, of those whose key is `tie`, by their ids. Before them
// are `count` tokens of so much `mass`, `before` of which are this thread's; of those `found` in it, `mine` are.
struct Range {
  unsigned low, high, tie, count, before, mine;
  int found;
  wide mass;
  bool by_id;
};

// Where a token lies in what the range is one of; behind all where that is ids, and its key is another.
INLINE unsigned place_of(const THREAD Range& range, unsigned key, int id) {
  return !range.by_id ? key : key == range.tie ? unsigned(id) : 0xffffffffu;
}

INLINE bool inside(const THREAD Range& range, unsigned place) { return place - range.low <= range.high - range.low; }

// What may lie before a kept token: fewer than `tokens` tokens, and less than `mass`, a share of all.
struct Most {
  int tokens;
  float share, mass;
  bool by_mass;
};

INLINE bool fits(const THREAD Most& most, unsigned count, wide mass) {
  return int(count) < most.tokens && (!most.by_mass || float(mass) < most.mass);
}

CONSTANT constexpr wide ONE_TOKEN = wide(1) << 48;

// The range in which a row's limits end, of at most `threads` tokens. `sums` has 8 numbers a warp, `totals` 8.
template <typename T, int U, int THREADS, bool SCALED>
INLINE Range search(
    const THREAD Row<T>& row, Keys<SCALED> keys, THREAD Most& most, int tid, int lane, int warp, OF_BLOCK wide* sums,
    OF_BLOCK wide* totals, OF_BLOCK unsigned* counts) {
  constexpr int ENDS = 8, EACH = 16 / sizeof(T), WARPS = THREADS / 32, MOST_PASSES = 24;
  constexpr wide MASS = ONE_TOKEN - 1;
  Range range;
  range.low = range.tie = range.count = range.before = range.mine = 0;
  range.high = SCALED ? 0x7fffffffu : 0xffffffffu;
  range.found = 2 * THREADS;
  range.mass = 0;
  range.by_id = false;
  const int packs = (row.n + EACH - 1) / EACH;
  for (int pass = 0; range.found > THREADS && pass < MOST_PASSES; pass++) {
    if (range.low == range.high && !range.by_id) {  // equals: the lower ids come first
      range.by_id = true;
      range.tie = range.low;
      range.low = 0;
      range.high = unsigned(row.n - 1);
    }
    unsigned ends[ENDS], sum[ENDS], sum_high[ENDS], own[ENDS];
    wide sums_of_all[ENDS];
    const unsigned width = range.high - range.low, step = width / ENDS + 1;
    UNROLL
    for (int j = 0; j < ENDS; j++) {
      const unsigned past = step * unsigned(j + 1) - 1;
      ends[j] = j == ENDS - 1 || past >= width ? range.high : range.low + past;
      if (pass == 0 && j < ENDS - 1) ends[j] = first_ends(keys, j);
      sum[j] = sum_high[j] = 0;
    }
    for (int i = tid; i < packs; i += U * THREADS) {
      Logits<T> x[U];
      UNROLL
      for (int u = 0; u < U; u++) x[u] = logits_at(row, i + u * THREADS);
      UNROLL
      for (int u = 0; u < U; u++) {
        UNROLL
        for (int e = 0; e < EACH; e++) {
          const unsigned key = key_of(keys, seen(row, float(x[u].pack.v[e]), x[u].word >> e));
          const unsigned place = place_of(range, key, x[u].id + e);
          const bool counts_here = inside(range, place);
          // In two words of 32 bits: one of counts and the lowest 12 bits of masses, one of the others.
          const unsigned mass = most.by_mass && counts_here ? mass_of(key) : 0u;
          const unsigned one = counts_here ? (mass & 0xfffu) | 1u << 22 : 0u, high = mass >> 12;
          sum[ENDS - 1] += one;
          sum_high[ENDS - 1] += high;
          if (counts_here && place <= ends[ENDS - 2]) {  // often no lane's
            UNROLL
            for (int j = 0; j < ENDS - 1; j++) {
              if (place <= ends[j]) {
                sum[j] += one;
                sum_high[j] += high;
              }
            }
          }
        }
      }
    }
    UNROLL
    for (int j = 0; j < ENDS; j++) {
      own[j] = sum[j] >> 22;
      sums_of_all[j] = (wide(own[j]) << 48) + (wide(sum_high[j]) << 12) + (sum[j] & 0x3fffffu);
    }
    const wide of_warp = sum_eight(sums_of_all, lane);
    if (lane % 4 == 0) sums[warp * ENDS + lane / 4] = of_warp;
    BARRIER();
    if (tid < ENDS) {
      wide mass = 0;
      unsigned count = 0;
      for (int i = 0; i < WARPS; i++) {
        const wide part = sums[i * ENDS + tid];
        mass += part & MASS;
        count += unsigned(part >> 48);
      }
      totals[tid] = mass;
      counts[tid] = count;
    }
    BARRIER();
    if (pass == 0) most.mass = most.share * float(totals[ENDS - 1]);
    // The last of the eight with room for a token in front of it.
    unsigned from = range.low, to = ends[0], before = 0, before_mine = 0;
    wide before_mass = 0;
    range.mine = own[0];
    range.found = int(counts[0]);
    UNROLL
    for (int j = 1; j < ENDS; j++) {
      const unsigned nearer = counts[j - 1];
      if (ends[j - 1] < range.high && fits(most, range.count + nearer, range.mass + totals[j - 1])) {
        range.mine = own[j] - own[j - 1];
        range.found = int(counts[j] - nearer);
        from = ends[j - 1] + 1;
        to = ends[j];
        before = nearer;
        before_mine = own[j - 1];
        before_mass = totals[j - 1];
      }
    }
    range.low = from;
    range.high = to;
    range.count += before;
    range.before += before_mine;
    range.mass += before_mass;
  }
  BARRIER();
  return range;
}

// The sum over the threads before this one; `of_warps` has a word a warp.
INLINE unsigned sum_before(unsigned x, int lane, int warp, OF_BLOCK unsigned* of_warps) {
  unsigned before = 0, total = x;
  UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = shuffle_xor(total, step);
    if ((lane & step) != 0) before += other;
    total += other;
  }
  if (lane == 0) of_warps[warp] = total;
  BARRIER();
  for (int i = 0; i < warp; i++) before += of_warps[i];
  BARRIER();
  return before;
}

// A row's tokens in the range, and those before it too if `all`: keys and ids in order of (thread, id), at most `room`.
template <typename T, int U, int THREADS, bool SCALED>
INLINE void collect(
    const THREAD Row<T>& row, Keys<SCALED> keys, const THREAD Range& range, bool all, int at, int room, int tid,
    OF_BLOCK unsigned* near_keys, OF_BLOCK int* near_ids) {
  constexpr int EACH = 16 / sizeof(T);
  const int packs = (row.n + EACH - 1) / EACH;
  const unsigned first = range.by_id ? range.tie : range.low;
  for (int i = tid; i < packs; i += U * THREADS) {
    Logits<T> x[U];
    UNROLL
    for (int u = 0; u < U; u++) x[u] = logits_at(row, i + u * THREADS);
    UNROLL
    for (int u = 0; u < U; u++) {
      UNROLL
      for (int e = 0; e < EACH; e++) {
        const int id = x[u].id + e;
        const unsigned key = key_of(keys, seen(row, float(x[u].pack.v[e]), x[u].word >> e));
        const bool earlier = key < first || (range.by_id && key == range.tie && unsigned(id) < range.low);
        if ((inside(range, place_of(range, key, id)) || (all && earlier)) && at < room) {
          near_keys[at] = key;
          near_ids[at] = id;
          at++;
        }
      }
    }
  }
  BARRIER();
}

}  // namespace pippin
