// out = x W^T for few rows, through matrix products: each number of W is read once for 8 * MT rows. W [experts, N, K], in
// the type of x or in codes of KIND (codes.h), of which a lane loads 16 bytes at once, PACKS times for a step; block (x, y):
// columns, expert y. With EXPERTS, row i of out is for `indices[i]` and takes row i / PER of x. A block's warps share its
// columns and take every WARPS-th part of K. With GATED, w is of the gate and up_w of what it is multiplied with: a block has
// half as many columns of each, and out is the two together (gates.h). In mma's words, rows of W are a, 16 of them, and rows
// of x are b.
  using namespace pippin;
  constexpr bool QUANTIZED = KIND != DENSE, FAR = KIND % 10 == 4;
  constexpr int EACH = FAR ? 32 : QUANTIZED ? 16 : 8, UNITS = EACH / 8, STEP = 4 * EACH * PACKS, GROUPS = K / GROUP;
  constexpr int COLUMNS = NT * 8, ACROSS = COLUMNS + 4;
#if GATED
  constexpr int OWN = NT / 2, WIDTH = OWN * 8;
#else
  constexpr int OWN = NT, WIDTH = COLUMNS;
#endif
  constexpr int SCALES = EACH > GROUP ? EACH / GROUP : 1;
  // Blocks are alike, so that what a lane reads is as far apart in all of them: the last one computes columns again.
  const int line = lane / 4, column = lane % 4, start = smaller(block_x * WIDTH, N > WIDTH ? N - WIDTH : 0);
#if EXPERTS
  // With fewer pairs than experts, block y stands for the expert of pair y, if no pair before has the same.
  const int expert = BY_PAIR ? indices[block_y] : block_y;
#else
  const int expert = 0;
#endif
  const size_t w_row = size_t(expert) * N + start + line;
  // What a lane has of the block's columns for a step.
  struct Step {
    Words packs[NT][PACKS];
    unsigned scale[NT][PACKS][SCALES], bias[NT][PACKS];
  };
  const auto load = [&](Step& step, int k) {
    UNROLL
    for (int p = 0; p < PACKS; p++) {
      const int from = k + (p * 4 + column) * EACH;
      const unsigned at = K % STEP == 0 ? from : smaller(from, K - EACH);
      const size_t pack = w_row * (K / EACH) + at / EACH, group = w_row * GROUPS + at / GROUP;
      UNROLL
      for (int t = 0; t < NT; t++) {
        const int n = t % OWN * 8 < N ? t % OWN * 8 : 0;
#if GATED
        const auto words = t < OWN ? w : up_w;
        const auto scale_words = t < OWN ? scales : up_scales;
        const auto bias_words = t < OWN ? biases : up_biases;
#else
        const auto words = w;
        const auto scale_words = scales;
        const auto bias_words = biases;
#endif
        fetch_once((const DEVICE Words*)words + pack + size_t(n) * (K / EACH), step.packs[t][p].w);
        if (!QUANTIZED) continue;
        UNROLL
        for (int s = 0; s < SCALES; s++) {
          step.scale[t][p][s] = kept_scale<true, KIND>(scale_words, group + n * GROUPS + s);
        }
        step.bias[t][p] = KIND < 10 ? kept_scale<true, KIND>(bias_words, group + n * GROUPS) : 0u;
      }
    }
  };
  // The first step is on its way while pairs are counted.
  const int begin = warp * STEP;
  Step now, next;
  load(now, begin);
  int total = x_shape[0];
#if EXPERTS
  SHARED(int, mine, MOST);
  const int pairs = indices_shape[0];
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
#endif
  const unsigned zero = unsigned(total) >> 31;
  SHARED(float, sums, WARPS * 8 * ACROSS);
  for (int first = 0; first < total; first += 8 * MT) {
    size_t rows[MT];
    float c[MT][NT / 2][4];
    UNROLL
    for (int m = 0; m < MT; m++) {
      const int i = smaller(first + m * 8 + line, total - 1);
#if EXPERTS
      rows[m] = size_t(mine[i] / PER) * (K / 8);
#else
      rows[m] = size_t(i) * (K / 8);
#endif
      UNROLL
      for (int t = 0; t < NT * 2; t++) c[m][t / 4][t % 4] = 0.0f;
    }
    if (AHEAD && first > 0) load(now, begin);
    for (int k = begin; k < K; k += WARPS * STEP) {
      // Unit j of what the lane multiplies: 8 numbers of its row; none beyond K.
      const auto fetch_unit = [&](Words& unit, int j, int m) {
        const int at = k + (j / UNITS * 4 + column) * EACH + j % UNITS * 8;
        fetch((const DEVICE Words*)x + rows[m] + unsigned(at) / 8, K % STEP == 0 || at < K, unit.w);
      };
      // Rows come from a cache, and before weights: they must not wait behind those. Many are fetched when they are wanted.
      constexpr bool ALL = PACKS * UNITS * MT <= 8;
      Words b[ALL ? PACKS * UNITS : 1][MT];
      UNROLL
      for (int j = 0; ALL && j < PACKS * UNITS; j++) {
        UNROLL
        for (int m = 0; m < MT; m++) fetch_unit(b[j][m], j, m);
      }
      if (!AHEAD && (first > 0 || k > begin)) load(now, k);
      if (AHEAD && k + WARPS * STEP < K) load(next, k + WARPS * STEP);
      UNROLL
      for (int j = 0; j < PACKS * UNITS; j++) {
        const int own = ALL ? j : 0, p = j / UNITS, u = j % UNITS;
        UNROLL
        for (int m = 0; m < MT; m++) {
          if (!ALL) fetch_unit(b[own][m], j, m);
          if (FAR) b[own][m] = far_pairs(b[own][m]);
        }
        UNROLL
        for (int t = 0; t < NT; t += 2) {
          Words a[2];
          UNROLL
          for (int h = 0; h < 2; h++) {
            a[h] = now.packs[t + h][p];
            if (QUANTIZED) {
              const unsigned scale = scale_of<T, KIND, true>(now.scale[t + h][p][u * 8 / GROUP % SCALES]);
              const unsigned bias = bias_of<T, KIND, true>(now.bias[t + h][p]);
              a[h] = from_codes<T, KIND, true>(a[h], u, scale, bias, zero);
            }
          }
          UNROLL
          for (int m = 0; m < MT; m++) {
            const Words row = b[own][m];
            mma<T>(c[m][t / 2], a[0].w[0], a[1].w[0], a[0].w[1], a[1].w[1], row.w[0], row.w[1]);
            mma<T>(c[m][t / 2], a[0].w[2], a[1].w[2], a[0].w[3], a[1].w[3], row.w[2], row.w[3]);
          }
        }
      }
      if (AHEAD) now = next;
    }
    // Join the warps, 8 rows at a time.
    UNROLL
    for (int m = 0; m < MT; m++) {
      if (first + m * 8 >= total) continue;
      BARRIER();
      UNROLL
      for (int t = 0; t < NT; t++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
          sums[(warp * 8 + column * 2 + i) * ACROSS + t * 8 + line] = c[m][t / 2][t % 2 * 2 + i];
        }
      }
      BARRIER();
      for (int j = tid; j < 8 * WIDTH; j += WARPS * 32) {
        const int i = first + m * 8 + j / WIDTH, n = start + j % WIDTH;
        if (i >= total || n >= N) continue;
        float sum = 0.0f;
        UNROLL
        for (int v = 0; v < WARPS; v++) sum += sums[(v * 8 + j / WIDTH) * ACROSS + j % WIDTH];
        sum *= low<T, KIND>();
#if GATED
        float up = 0.0f;
        UNROLL
        for (int v = 0; v < WARPS; v++) up += sums[(v * 8 + j / WIDTH) * ACROSS + j % WIDTH + WIDTH];
        up *= low<T, KIND>();
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
      }
    }
  }
