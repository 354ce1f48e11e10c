// Norm and rotation of a row's heads, and its K and V into its slot. A warp a head; block (x, y): row, part y of its heads,
// which are HQ of q, then HKV of k, then HKV of v. They begin at QAT, KAT and VAT in the row, which is N wide.
  using namespace pippin;
  constexpr int HEADS = HQ + 2 * HKV, WIDEST = D > DV ? D : DV, HALF = DIMS / 2, EACH = (WIDEST + 31) / 32;
  const int row = block_x, at = block_y * WARPS + warp, head = at < HEADS ? at : HEADS - 1;
  const bool is_q = head < HQ, is_k = !is_q && head < HQ + HKV, is_v = !is_q && !is_k;
  const int h = is_q ? head : is_k ? head - HQ : head - HQ - HKV, width = is_v ? DV : D;
  const size_t from = size_t(row) * N + (is_q ? QAT : is_k ? KAT : VAT) + h * width;
  const bool normed = (is_q && QNORM) || (is_k && KNORM);

  // All that is read from memory is asked for before anything is computed.
  SHARED(float, heads, WARPS * WIDEST);
#if PACKED
  SHARED(float, turned, WARPS * WIDEST);
#endif
  float values[EACH], weights[EACH], turns[EACH], sum = 0.0f;
  const size_t slot = size_t(slots[row]);
  const float position = float(positions[row]);
  UNROLL
  for (int n = 0; n < EACH; n++) {
    const int e = lane + n * 32;
    values[n] = e < width ? float(y[from + e]) : 0.0f;
    weights[n] = normed && e < width ? (is_q ? float(q_weight[e]) : float(k_weight[e])) : 0.0f;
    turns[n] = !is_v && e < DIMS ? frequencies[TRADITIONAL ? e / 2 : e % HALF] : 0.0f;
    sum += values[n] * values[n];
  }
  if (QNORM || KNORM) {
    sum = sum_lanes<32>(sum);
    const float factor = rsqrt_of(sum / float(D) + params[is_q ? 0 : 1]);
    UNROLL
    for (int n = 0; n < EACH; n++) {
      if (normed) values[n] = float(T(float(T(values[n] * factor)) * weights[n]));
    }
  }
  UNROLL
  for (int n = 0; n < EACH; n++) {
    if (lane + n * 32 < width) heads[warp * WIDEST + lane + n * 32] = values[n];
  }
  BARRIER();
  UNROLL
  for (int n = 0; n < EACH; n++) {
    const int e = lane + n * 32;
    if (e >= width || at >= HEADS) continue;
    float x = values[n];
    if (!is_v && e < DIMS) {
      const bool second = TRADITIONAL ? e % 2 == 1 : e >= HALF;
      const float other = heads[warp * WIDEST + (TRADITIONAL ? e ^ 1 : second ? e - HALF : e + HALF)];
      const float angle = within_a_turn(position * turns[n]);
      const float sine = params[2] * sin_of(angle), cosine = params[2] * cos_of(angle);
      x = second ? other * sine + x * cosine : x * cosine - other * sine;
    }
    if (is_q) {
      q[(size_t(row) * HQ + h) * D + e] = T(x);
#if PACKED
    } else {
      turned[warp * WIDEST + e] = float(T(x));
    }
  }
  BARRIER();
  if (at < HEADS && !is_q) {
    float x[8];
    UNROLL
    for (int e = 0; e < 8; e++) x[e] = lane * 8 < width ? turned[warp * WIDEST + lane * 8 + e] : 0.0f;
    if (is_k) {
      store_coded<KIND, HKV, D>(const_cast<DEVICE unsigned*>(k_pool), slot, h, lane, x);
    } else {
      store_coded<KIND, HKV, DV>(const_cast<DEVICE unsigned*>(v_pool), slot, h, lane, x);
    }
  }
#else
    } else if (is_k) {
      const_cast<DEVICE KT*>(k_pool)[(slot * HKV + h) * D + e] = KT(float(T(x)));
    } else {
      const_cast<DEVICE KT*>(v_pool)[(slot * HKV + h) * DV + e] = KT(x);
    }
  }
#endif
  if (block_x == 0 && block_y == 0 && tid < 8) token[tid] = 0;
