// out = x W^T for few rows, through matrix products: each number of W is read once for 8 * MT rows. W [experts, N, K], in
// the type of x or in codes of KIND (codes.h), of which a lane loads 16 bytes at once, PACKS times for a step; block (x, y):
// columns, expert y. With EXPERTS, row i of out is for `indices[i]` and takes row i / PER of x. SHARE warps share columns and
// take every SHARE-th part of K; WARPS / SHARE such teams have columns of their own. With GATED, w is of the gate and up_w of
// what it is multiplied with: a team has half as many columns of each, and out is the two together (gates.h). In mma's words,
// rows of W are a, 16 of them, and rows of x are b.
  using namespace pippin;
  constexpr bool QUANTIZED = KIND != DENSE, FAR = KIND % 10 == 4;
  constexpr int EACH = FAR ? 32 : QUANTIZED ? 16 : 8, UNITS = EACH / 8, STEP = 4 * EACH * PACKS, GROUPS = K / GROUP;
  constexpr int COLUMNS = NT * 8, ACROSS = COLUMNS + 4, TEAMS = WARPS / SHARE;
#if GATED
  constexpr int OWN = NT / 2, WIDTH = OWN * 8;
#else
  constexpr int OWN = NT, WIDTH = COLUMNS;
#endif
  constexpr int SCALES = EACH > GROUP ? EACH / GROUP : 1;
  const int line = lane / 4, column = lane % 4, start = block_x * TEAMS * WIDTH;
#if EXPERTS
  // With fewer pairs than experts, block y stands for the expert of pair y, if no pair before has the same.
  const int expert = BY_PAIR ? indices[block_y] : block_y;
#else
  const int expert = 0;
#endif
  // What a lane has of a team's columns for a step.
  struct Step {
    Words packs[NT][PACKS];
    unsigned scale[NT][PACKS][SCALES], bias[NT][PACKS];
  };
  const auto load = [&](Step& step, int k) {
    UNROLL
    for (int t = 0; t < NT; t++) {
      const int n = smaller(start + warp / SHARE * WIDTH + t % OWN * 8 + line, N - 1);
      const size_t row = size_t(expert) * N + n;
#if GATED
      const auto words = t < OWN ? w : up_w;
      const auto scale_words = t < OWN ? scales : up_scales;
      const auto bias_words = t < OWN ? biases : up_biases;
#else
      const auto words = w;
      const auto scale_words = scales;
      const auto bias_words = biases;
#endif
      UNROLL
      for (int p = 0; p < PACKS; p++) {
        const int at = smaller(k + (p * 4 + column) * EACH, K - EACH);
        if (ORDERED) {
          fetch_once((const DEVICE Words*)words + (row * K + at) / EACH, step.packs[t][p].w);
        } else {
          step.packs[t][p] = load_words(words, (row * K + at) / EACH);
        }
        if (QUANTIZED) {
          const size_t group = row * GROUPS + at / GROUP;
          UNROLL
          for (int s = 0; s < SCALES; s++) step.scale[t][p][s] = kept_scale<ORDERED, KIND>(scale_words, group + s);
          step.bias[t][p] = KIND < 10 ? kept_scale<ORDERED, KIND>(bias_words, group) : 0u;
        }
      }
    }
  };
  const int begin = warp % SHARE * STEP;
  Step now, next;
  if (EARLY) load(now, begin);
  int total = x_shape[0];
#if EXPERTS
  SHARED(int, mine, MOST);
  const int pairs = indices_shape[0];
  if (BALLOTS) {
    constexpr int AT_ONCE = MOST < 256 ? MOST / 32 : 8;
    bool taken = false;
    total = 0;
    for (int from = lane; from < MOST; from += 32 * AT_ONCE) {
      int chosen[AT_ONCE];
      UNROLL
      for (int j = 0; j < AT_ONCE; j++) chosen[j] = from + j * 32 < pairs ? indices[from + j * 32] : -1;
      UNROLL
      for (int j = 0; j < AT_ONCE; j++) {
        const bool is_mine = chosen[j] == expert;
        const unsigned all = lanes_where(is_mine);
        if (is_mine && j % WARPS == warp) mine[total + bits_in(all & ((1u << lane) - 1u))] = from + j * 32;
        taken = taken || (is_mine && from + j * 32 < block_y);
        total += bits_in(all);
      }
    }
    if (total == 0 || (BY_PAIR && lanes_where(taken) != 0u)) return;
    BARRIER();
  } else {
    SHARED(int, counts, WARPS * 32);
    const int each = (pairs + WARPS * 32 - 1) / (WARPS * 32);
    const int from = smaller(tid * each, pairs), to = smaller(from + each, pairs);
    int found = 0, before = 0;
    for (int i = from; i < to; i++) found += indices[i] == expert;
    counts[tid] = found;
    BARRIER();
    total = 0;
    for (int t = 0; t < WARPS * 32; t++) {
      before += t < tid ? counts[t] : 0;
      total += counts[t];
    }
    for (int i = from; i < to; i++) {
      if (indices[i] == expert) mine[before++] = i;
    }
    BARRIER();
    if (BY_PAIR && mine[0] != block_y) total = 0;
  }
#endif
  // A number of out, of the pair or row `i` among the expert's.
  const auto store = [&](int i, int n, float sum, float up) {
    if (i >= total || n >= N) return;
#if GATED
    const size_t of = size_t(expert) * N + n;
    if (BIASED) {
      sum += float(gate_bias[of]);
      up += float(up_bias[of]);
    }
    sum = gated<CLIPPED>(sum, up, params[0], params[1]);
#endif
#if EXPERTS
    out[size_t(mine[i]) * N + n] = T(sum);
#else
    out[size_t(i) * N + n] = T(sum);
#endif
  };
  SHARED(float, sums, SHARE > 1 ? WARPS * 8 * ACROSS : 1);
  for (int first = 0; first < total; first += 8 * MT) {
    size_t rows[MT];
    bool here[MT];
    float c[MT][NT / 2][4];
    UNROLL
    for (int m = 0; m < MT; m++) {
      const int i = first + m * 8 + line;
      here[m] = i < total;
#if EXPERTS
      rows[m] = here[m] ? size_t(mine[i] / PER) * K : 0;
#else
      rows[m] = here[m] ? size_t(i) * K : 0;
#endif
      UNROLL
      for (int t = 0; t < NT * 2; t++) c[m][t / 4][t % 4] = 0.0f;
    }
    if (AHEAD && (!EARLY || first > 0)) load(now, begin);
    for (int k = begin; k < K; k += SHARE * STEP) {
      // Unit j of what the lane multiplies: 8 numbers of its row.
      const auto numbers = [&](int j, int m) {
        const int at = k + (j / UNITS * 4 + column) * EACH + j % UNITS * 8;
        const bool any = here[m] && at < K;
        Words row;
        if (!ORDERED) return any ? load_words(x, (rows[m] + at) / 8) : no_words();
        fetch((const DEVICE Words*)x + (rows[m] + at) / 8, any, row.w);
        return row;
      };
      // Rows come from a cache, and before weights: they must not wait behind those.
      Words b[PACKS * UNITS][MT];
      UNROLL
      for (int j = 0; ORDERED && j < PACKS * UNITS; j++) {
        UNROLL
        for (int m = 0; m < MT; m++) b[j][m] = numbers(j, m);
      }
      if (!AHEAD && (!EARLY || first > 0 || k > begin)) load(now, k);
      if (AHEAD && k + SHARE * STEP < K) load(next, k + SHARE * STEP);
      UNROLL
      for (int j = 0; j < PACKS * UNITS; j++) {
        UNROLL
        for (int m = 0; m < MT; m++) {
          if (!ORDERED) b[j][m] = numbers(j, m);
          if (FAR) b[j][m] = far_pairs(b[j][m]);
        }
        const int p = j / UNITS, u = j % UNITS;
        UNROLL
        for (int t = 0; t < NT; t += 2) {
          Words a[2];
          UNROLL
          for (int h = 0; h < 2; h++) {
            a[h] = now.packs[t + h][p];
            if (QUANTIZED) {
              const unsigned scale = scale_of<T, KIND>(now.scale[t + h][p][u * 8 / GROUP % SCALES]);
              const unsigned bias = KIND < 10 ? scale_of<T, KIND>(now.bias[t + h][p]) : 0u;
              a[h] = from_codes<T, KIND>(a[h], u, scale, bias);
            }
          }
          UNROLL
          for (int m = 0; m < MT; m++) {
            mma<T>(c[m][t / 2], a[0].w[0], a[1].w[0], a[0].w[1], a[1].w[1], b[j][m].w[0], b[j][m].w[1]);
            mma<T>(c[m][t / 2], a[0].w[2], a[1].w[2], a[0].w[3], a[1].w[3], b[j][m].w[2], b[j][m].w[3]);
          }
        }
      }
      if (AHEAD) now = next;
    }
    UNROLL
    for (int m = 0; m < MT; m++) {
      if (first + m * 8 >= total) continue;
      if (SHARE == 1) {
        UNROLL
        for (int t = 0; t < OWN; t++) {
          UNROLL
          for (int i = 0; i < 2; i++) {
            const int up = NT - OWN + t;
            store(
                first + m * 8 + column * 2 + i, start + warp * WIDTH + t * 8 + line, c[m][t / 2][t % 2 * 2 + i],
                c[m][up / 2][up % 2 * 2 + i]);
          }
        }
        continue;
      }
      // Join the warps, 8 rows at a time.
      BARRIER();
      UNROLL
      for (int t = 0; t < NT; t++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
          sums[(warp * 8 + column * 2 + i) * ACROSS + t * 8 + line] = c[m][t / 2][t % 2 * 2 + i];
        }
      }
      BARRIER();
      for (int j = tid; j < TEAMS * 8 * WIDTH; j += WARPS * 32) {
        const int team = j / (8 * WIDTH), row = j / WIDTH % 8, n = j % WIDTH;
        if (first + m * 8 + row >= total) continue;
        float sum = 0.0f, up = 0.0f;
        UNROLL
        for (int v = 0; v < SHARE; v++) {
          const int at = ((team * SHARE + v) * 8 + row) * ACROSS + n;
          sum += sums[at];
#if GATED
          up += sums[at + WIDTH];
#endif
        }
        store(first + m * 8 + row, start + team * WIDTH + n, sum, up);
      }
    }
  }
