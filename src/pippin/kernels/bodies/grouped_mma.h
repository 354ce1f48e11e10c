// out = x W^T where many rows go to each expert: block (x, y) computes `tiles` [y], up to ROWS pairs of one expert, by 128
// columns. A tile is (expert, first, count) of `order`, which has the pairs by expert: pair i takes row i / PER of x and is
// row i of out. W [experts, N, K], in the type of x or in codes of KIND (codes.h). Both sides go through shared memory, in
// steps of 32 numbers, of which STAGES - 1 are on their way while one is multiplied; codes become numbers there. With GATED,
// w is of the gate and up_w of what it is multiplied with: 64 columns of each, and out is the two together (gates.h).
  using namespace pippin;
  constexpr bool QUANTIZED = KIND != DENSE, FAR = KIND % 10 == 4;
  constexpr int THREADS = 256, STEP = 32, STEPS = K / STEP, STAGES = 4, UNITS = STEP / 8, GROUPS = K / GROUP;
  // Eight warps, two by four: each has half of the rows, and 32 of the weights' rows, which are columns of out.
  constexpr int MT = ROWS / 32, NT = 4, WEIGHTS = 128;
#if GATED
  constexpr int WIDTH = WEIGHTS / 2;
#else
  constexpr int WIDTH = WEIGHTS;
#endif
  constexpr int A_UNITS = ROWS * UNITS / THREADS, B_UNITS = WEIGHTS * UNITS / THREADS;
  const int expert = tiles[block_y * 3], first = tiles[block_y * 3 + 1], count = tiles[block_y * 3 + 2];
  if (count == 0) return;
  // Units of 8 numbers: rows of 64 bytes, of which every other pair has its halves exchanged, so that 8 lanes that read or
  // write 16 bytes each never meet in a bank.
  SHARED(Words, a_units, STAGES * ROWS * UNITS);
  SHARED(Words, b_units, STAGES * WEIGHTS * UNITS);
  const int line = lane / 4, column = lane % 4;
  const int warp_row = warp / 4 * (MT * 16), warp_weight = warp % 4 * 32;

  // What this thread brings: A_UNITS of a row of x, and half a step of a row of W.
  const int a_row = tid * A_UNITS / UNITS, a_unit = tid * A_UNITS % UNITS;
  const bool here = a_row < count;
  const size_t a_from = here ? size_t(order[first + a_row] / PER) * K + a_unit * 8 : 0;
  const int b_row = tid * B_UNITS / UNITS, b_unit = tid * B_UNITS % UNITS;
#if GATED
  // Of a warp's 32 rows of W, 16 are of the gate and 16 of what belongs to the same columns.
  const bool second = b_row % 32 >= 16;
  const auto words = second ? up_w : w;
  const auto scale_words = second ? up_scales : scales;
  const auto bias_words = second ? up_biases : biases;
  const int b_column = block_x * WIDTH + b_row / 32 * 16 + b_row % 16;
#else
  const auto words = w;
  const auto scale_words = scales;
  const auto bias_words = biases;
  const int b_column = block_x * WIDTH + b_row;
#endif
  const size_t b_from = size_t(expert) * N + smaller(b_column, N - 1);

  // What comes as it is.
  const auto bring = [&](int step) {
    const int k = step * STEP, slot = step % STAGES;
    if (step < STEPS) {
      UNROLL
      for (int u = 0; u < A_UNITS; u++) {
        const int at = (slot * ROWS + a_row) * UNITS + ((a_unit + u) ^ (a_row / 2 % 2));
        copy_later(&a_units[at], (const DEVICE Words*)x + (a_from + k) / 8 + u, here);
      }
      UNROLL
      for (int u = 0; !QUANTIZED && u < B_UNITS; u++) {
        const int at = (slot * WEIGHTS + b_row) * UNITS + ((b_unit + u) ^ (b_row / 2 % 2));
        copy_later(&b_units[at], (const DEVICE Words*)words + (b_from * K + k) / 8 + b_unit + u, true);
      }
    }
    copies_end();
  };
  // What comes in codes, two steps before it is stored and three before it is multiplied.
  struct Codes {
    Words packed;
    unsigned scale, bias;
  };
  const auto load = [&](Codes& codes, int step) {
    if (!QUANTIZED || step >= STEPS) return;
    const int at = step * STEP + b_unit * 8;
    const size_t code = (b_from * K + at) / 16, group = b_from * GROUPS + at / GROUP;
    if (FAR) {
      const wide both = ((const DEVICE wide*)words)[code];
      codes.packed.w[0] = unsigned(both);
      codes.packed.w[1] = unsigned(both >> 32);
    } else {
      codes.packed = load_words(words, code);
    }
    codes.scale = scale_of<T, KIND>(scale_words, group);
    codes.bias = KIND < 10 ? scale_of<T, KIND>(bias_words, group) : 0u;
  };
  const auto store = [&](const Codes& codes, int step) {
    if (!QUANTIZED || step >= STEPS) return;
    UNROLL
    for (int u = 0; u < B_UNITS; u++) {
      const int at = (step % STAGES * WEIGHTS + b_row) * UNITS + ((b_unit + u) ^ (b_row / 2 % 2));
      b_units[at] = from_codes<T, KIND>(codes.packed, u, codes.scale, codes.bias);
    }
  };
  float c[MT][NT][4];
  UNROLL
  for (int m = 0; m < MT; m++) {
    UNROLL
    for (int t = 0; t < NT; t++) {
      UNROLL
      for (int i = 0; i < 4; i++) c[m][t][i] = 0.0f;
    }
  }
  const auto multiply = [&](int slot) {
    Words b[NT];
    UNROLL
    for (int t = 0; t < NT; t++) {
      const int r = warp_weight + t * 8 + line;
      b[t] = b_units[(slot * WEIGHTS + r) * UNITS + (column ^ (r / 2 % 2))];
    }
    UNROLL
    for (int m = 0; m < MT; m++) {
      Words a[2];
      UNROLL
      for (int h = 0; h < 2; h++) {
        const int r = warp_row + m * 16 + h * 8 + line;
        const Words row = a_units[(slot * ROWS + r) * UNITS + (column ^ (r / 2 % 2))];
        a[h] = FAR ? far_pairs(row) : row;
      }
      UNROLL
      for (int t = 0; t < NT; t++) {
        mma<T>(c[m][t], a[0].w[0], a[1].w[0], a[0].w[1], a[1].w[1], b[t].w[0], b[t].w[1]);
        mma<T>(c[m][t], a[0].w[2], a[1].w[2], a[0].w[3], a[1].w[3], b[t].w[2], b[t].w[3]);
      }
    }
  };
  const auto advance = [&](Codes& codes, int step) {
    copies_wait<STAGES - 2>();
    BARRIER();
    bring(step + STAGES - 1);
    store(codes, step + 1);
    load(codes, step + 3);
    multiply(step % STAGES);
  };
  Codes even, odd;
  for (int step = 0; step < STAGES - 1; step++) bring(step);
  load(even, 0);
  load(odd, 1);
  store(even, 0);
  load(even, 2);
  for (int step = 0; step < STEPS; step += 2) {
    advance(odd, step);
    if (step + 1 < STEPS) advance(even, step + 1);
  }
  UNROLL
  for (int m = 0; m < MT; m++) {
    UNROLL
    for (int h = 0; h < 2; h++) {
      const int r = warp_row + m * 16 + h * 8 + line;
      if (r >= count) continue;
      const size_t pair = order[first + r];
      UNROLL
      for (int t = 0; t < WIDTH / 32; t++) {
        float y[2];
#if GATED
        const int n = block_x * WIDTH + warp % 4 * 16 + t * 8 + column * 2;
        if (n >= N) continue;
        UNROLL
        for (int i = 0; i < 2; i++) {
          float gate = c[m][t][h * 2 + i], up = c[m][t + NT / 2][h * 2 + i];
          if (BIASED) {
            gate += float(gate_bias[size_t(expert) * N + n + i]);
            up += float(up_bias[size_t(expert) * N + n + i]);
          }
          y[i] = gated<CLIPPED>(gate, up, params[0], params[1]);
        }
#else
        const int n = block_x * WIDTH + warp_weight + t * 8 + column * 2;
        if (n >= N) continue;
        y[0] = c[m][t][h * 2];
        y[1] = c[m][t][h * 2 + 1];
#endif
        ((DEVICE unsigned*)out)[(pair * N + n) / 2] = two<T>(y[0], y[1]);
      }
    }
  }
