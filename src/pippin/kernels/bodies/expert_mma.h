// out = x W^T for few rows, through matrix products: each number of W is read once for 16 * MT rows. W [experts, N, K], in
// the type of x or in codes of KIND (codes.h), of which a lane loads 16 bytes at once; block (x, y): COLUMNS columns, expert y. With EXPERTS, row i of out is for `indices[i]` and
// takes row i / PER of x. A block's warps share its columns and take every WARPS-th part of K. With GATED, w is of the gate and
// up_w of what it is multiplied with: a block has half as many columns of each, and out is the two together (gates.h).
  using namespace pippin;
  constexpr bool QUANTIZED = KIND != DENSE, FAR = KIND % 10 == 4;
  constexpr int EACH = FAR ? 32 : 16, UNITS = EACH / 8, STEP = 4 * EACH, COLUMNS = NT * 8, GROUPS = K / GROUP;
#if GATED
  constexpr int OWN = NT / 2, WIDTH = OWN * 8;
#else
  constexpr int OWN = NT, WIDTH = COLUMNS;
#endif
  constexpr int SCALES = EACH > GROUP ? EACH / GROUP : 1;
  const int line = lane / 4, column = lane % 4;
  int total = x_shape[0];
#if EXPERTS
  // With fewer pairs than experts, block y stands for the expert of pair y, if no pair before has the same.
  const int expert = BY_PAIR ? indices[block_y] : block_y;
  SHARED(int, mine, MOST);
  SHARED(int, counts, WARPS * 32);
  const int pairs = indices_shape[0], each = (pairs + WARPS * 32 - 1) / (WARPS * 32);
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
#else
  const int expert = 0;
#endif
  SHARED(float, sums, WARPS * 16 * COLUMNS);
  for (int first = 0; first < total; first += 16 * MT) {
    size_t rows[MT][2];
    bool here[MT][2];
    float c[MT][NT][4];
    UNROLL
    for (int m = 0; m < MT; m++) {
      UNROLL
      for (int h = 0; h < 2; h++) {
        const int i = first + m * 16 + h * 8 + line;
        here[m][h] = i < total;
#if EXPERTS
        rows[m][h] = here[m][h] ? size_t(mine[i] / PER) * K : 0;
#else
        rows[m][h] = here[m][h] ? size_t(i) * K : 0;
#endif
      }
      UNROLL
      for (int t = 0; t < NT; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) c[m][t][i] = 0.0f;
      }
    }
    for (int k = warp * STEP; k < K; k += WARPS * STEP) {
      Words w_dense[NT][UNITS], packed[NT];
      unsigned scale[NT][SCALES], bias[NT];
      UNROLL
      for (int t = 0; t < NT; t++) {
        const int n = smaller(block_x * WIDTH + t % OWN * 8 + line, N - 1);
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
        if (QUANTIZED) {
          const int at = smaller(k + column * EACH, K - EACH);
          packed[t] = load_words(words, (row * K + at) / EACH);
          const size_t group = row * GROUPS + at / GROUP;
          UNROLL
          for (int s = 0; s < SCALES; s++) scale[t][s] = scale_of<T, KIND>(scale_words, group + s);
          bias[t] = KIND < 10 ? scale_of<T, KIND>(bias_words, group) : 0u;
        } else {
          UNROLL
          for (int u = 0; u < UNITS; u++) {
            w_dense[t][u] = load_words(words, (row * K + smaller(k + u * 32 + column * 8, K - 8)) / 8);
          }
        }
      }
      UNROLL
      for (int u = 0; u < UNITS; u++) {
        const int at = QUANTIZED ? k + column * EACH + u * 8 : k + u * 32 + column * 8;
        Words a[MT][2];
        UNROLL
        for (int m = 0; m < MT; m++) {
          UNROLL
          for (int h = 0; h < 2; h++) {
            const Words p = here[m][h] && at < K ? load_words(x, (rows[m][h] + at) / 8) : no_words();
            a[m][h] = FAR ? far_pairs(p) : p;
          }
        }
        UNROLL
        for (int t = 0; t < NT; t++) {
          const Words b =
              QUANTIZED ? from_codes<T, KIND>(packed[t], u, scale[t][u * 8 / GROUP % SCALES], bias[t]) : w_dense[t][u];
          UNROLL
          for (int m = 0; m < MT; m++) {
            mma<T>(c[m][t], a[m][0].w[0], a[m][1].w[0], a[m][0].w[1], a[m][1].w[1], b.w[0], b.w[1]);
            mma<T>(c[m][t], a[m][0].w[2], a[m][1].w[2], a[m][0].w[3], a[m][1].w[3], b.w[2], b.w[3]);
          }
        }
      }
    }
    // Join the warps, 16 rows at a time.
    UNROLL
    for (int m = 0; m < MT; m++) {
      if (first + m * 16 >= total) continue;
      BARRIER();
      UNROLL
      for (int t = 0; t < NT; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
          sums[(warp * 16 + line + i / 2 * 8) * COLUMNS + t * 8 + column * 2 + i % 2] = c[m][t][i];
        }
      }
      BARRIER();
      for (int j = tid; j < 16 * WIDTH; j += WARPS * 32) {
        const int i = first + m * 16 + j / WIDTH, n = block_x * WIDTH + j % WIDTH, at = j / WIDTH * COLUMNS + j % WIDTH;
        if (i >= total || n >= N) continue;
        float sum = 0.0f;
        UNROLL
        for (int v = 0; v < WARPS; v++) sum += sums[v * 16 * COLUMNS + at];
#if GATED
        float up = 0.0f;
        UNROLL
        for (int v = 0; v < WARPS; v++) up += sums[v * 16 * COLUMNS + at + WIDTH];
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
