// Norm and rotation of a row's heads, and its K and V into its slot. A lane has 8 neighbouring numbers of a head, so a warp
// has TOGETHER heads at once, and EACH times so many in turn: HQ of q, then HKV of k, then HKV of v, which begin at QAT, KAT
// and VAT in the row, N wide. Block (x, y): row, part y of its heads.
  using namespace pippin;
  constexpr int HEADS = HQ + 2 * HKV, WIDEST = D > DV ? D : DV, HALF = DIMS / 2;
  constexpr int LANES = PACKED ? 32 : lanes_for(WIDEST / 8), TOGETHER = 32 / LANES;
  constexpr int STEP = HALF % 8 == 0 ? HALF / 8 : 0;  // how many lanes on a number's partner is, if it is at the same place
  constexpr bool SHUFFLED = !TRADITIONAL && STEP > 0 && (STEP & (STEP - 1)) == 0 && STEP < LANES;
  constexpr bool SHARES = !TRADITIONAL && !SHUFFLED;
  SHARED(float, heads, SHARES ? WARPS * TOGETHER * WIDEST : 1);
  const int row = block_x, first = 8 * (lane % LANES);
  const int share = (warp * TOGETHER + lane / LANES) * WIDEST;
  const size_t slot = size_t(slots[row]);
  const float position = float(positions[row]);
  float sines[8], cosines[8];
  UNROLL
  for (int i = 0; i < 8; i++) {
    const int e = first + i;
    sines[i] = e < DIMS ? frequencies[TRADITIONAL ? e / 2 : e % (HALF > 0 ? HALF : 1)] : 0.0f;
  }

  for (int n = 0; n < EACH; n++) {
    const int at = ((block_y * EACH + n) * WARPS + warp) * TOGETHER + lane / LANES, head = at < HEADS ? at : HEADS - 1;
    const bool is_q = head < HQ, is_k = !is_q && head < HQ + HKV, is_v = !is_q && !is_k;
    const int h = is_q ? head : is_k ? head - HQ : head - HQ - HKV, width = is_v ? DV : D;
    const bool mine = first < width, normed = (is_q && QNORM) || (is_k && KNORM);
    float x[8], weights[8], sum = 0.0f;
    load_eight(y + size_t(row) * N + (is_q ? QAT : is_k ? KAT : VAT) + h * width + first, mine, x);
    if (QNORM || KNORM) load_eight((is_q ? q_weight : k_weight) + first, normed && mine, weights);
    if (n == 0) {  // behind the first loads, which this need not wait for
      UNROLL
      for (int i = 0; i < 8; i++) {
        const float angle = within_a_turn(position * sines[i]);
        sines[i] = params[2] * sin_of(angle);
        cosines[i] = params[2] * cos_of(angle);
      }
    }
    if (QNORM || KNORM) {
      UNROLL
      for (int i = 0; i < 8; i++) sum += x[i] * x[i];
      sum = sum_lanes<LANES>(sum);
      const float factor = rsqrt_of(sum / float(D) + params[is_q ? 0 : 1]);
      UNROLL
      for (int i = 0; i < 8; i++) {
        if (normed) x[i] = float(T(float(T(x[i] * factor)) * weights[i]));
      }
    }
    if (SHARES) {
      UNROLL
      for (int i = 0; i < 8; i++) {
        if (mine) heads[share + first + i] = x[i];
      }
      BARRIER();
    }
    float turned[8];
    UNROLL
    for (int i = 0; i < 8; i++) {
      const int e = first + i;
      const bool second = TRADITIONAL ? i % 2 == 1 : e >= HALF;
      float other = TRADITIONAL ? x[i ^ 1] : 0.0f;
      if (SHUFFLED) other = shuffle_xor(x[i], STEP > 0 ? STEP : 1);
      if (SHARES && e < DIMS) other = heads[share + (second ? e - HALF : e + HALF)];
      const float whole = second ? other * sines[i] + x[i] * cosines[i] : x[i] * cosines[i] - other * sines[i];
      turned[i] = mine ? (is_v || e >= DIMS ? x[i] : whole) : 0.0f;
    }
    if (SHARES) BARRIER();  // the next heads take their place
    const bool kept = at < HEADS && mine;
    if (is_q) {
      if (kept) store_eight(q + (size_t(row) * HQ + h) * D + first, turned);
#if PACKED
    } else if (at < HEADS) {
      UNROLL
      for (int i = 0; i < 8; i++) turned[i] = float(T(turned[i]));
      if (is_k) {
        store_coded<KIND, HKV, D>(const_cast<DEVICE unsigned*>(k_pool), slot, h, lane, turned);
      } else {
        store_coded<KIND, HKV, DV>(const_cast<DEVICE unsigned*>(v_pool), slot, h, lane, turned);
      }
    }
#else
    } else if (kept) {
      UNROLL
      for (int i = 0; i < 8; i++) turned[i] = float(T(turned[i]));
      if (is_k) {
        store_eight(const_cast<DEVICE KT*>(k_pool) + (slot * HKV + h) * D + first, turned);
      } else {
        store_eight(const_cast<DEVICE KT*>(v_pool) + (slot * HKV + h) * DV + first, turned);
      }
    }
#endif
  }
  if (block_x == 0 && block_y == 0 && tid < 8) token[tid] = 0;
