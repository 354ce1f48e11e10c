// Norm and rotation of a row's heads, and its K and V into its slot. A warp a head; block (x, y): row, part y of its heads,
// which are HQ of q, then HKV of k, then HKV of v. They begin at QAT, KAT and VAT in the row, which is N wide.
  using namespace pippin;
  constexpr int HEADS = HQ + 2 * HKV, WIDEST = D > DV ? D : DV, HALF = DIMS / 2;
  const int row = block_x, at = block_y * WARPS + warp, head = at < HEADS ? at : HEADS - 1;
  const bool is_q = head < HQ, is_k = !is_q && head < HQ + HKV, is_v = !is_q && !is_k;
  const int h = is_q ? head : is_k ? head - HQ : head - HQ - HKV, width = is_v ? DV : D;
  const size_t from = size_t(row) * N + (is_q ? QAT : is_k ? KAT : VAT) + h * width;
  const size_t slot = size_t(slots[row]);

  SHARED(float, heads, WARPS * WIDEST);
  float sum = 0.0f;
  for (int e = lane; e < width; e += 32) {
    const float x = float(y[from + e]);
    heads[warp * WIDEST + e] = x;
    sum += x * x;
  }
  sum = sum_lanes<32>(sum);
  if ((is_q && QNORM) || (is_k && KNORM)) {
    const float factor = rsqrt_of(sum / float(D) + params[is_q ? 0 : 1]);
    for (int e = lane; e < width; e += 32) {
      const float weight = is_q ? float(q_weight[e]) : float(k_weight[e]);
      heads[warp * WIDEST + e] = float(T(float(T(heads[warp * WIDEST + e] * factor)) * weight));
    }
  }
  BARRIER();
  const float position = float(positions[row]);
  for (int e = lane; e < width && at < HEADS; e += 32) {
    float x = heads[warp * WIDEST + e];
    if (!is_v && e < DIMS) {
      const int i = TRADITIONAL ? e / 2 : e % HALF;
      const bool second = TRADITIONAL ? e % 2 == 1 : e >= HALF;
      const float x1 = heads[warp * WIDEST + (TRADITIONAL ? 2 * i : i)];
      const float x2 = heads[warp * WIDEST + (TRADITIONAL ? 2 * i + 1 : i + HALF)];
      const float angle = position * frequencies[i];
      x = second ? x1 * sin_of(angle) + x2 * cos_of(angle) : x1 * cos_of(angle) - x2 * sin_of(angle);
    }
    if (is_q) {
      q[(size_t(row) * HQ + h) * D + e] = T(x);
    } else if (is_k) {
      const_cast<DEVICE KT*>(k_pool)[(slot * HKV + h) * D + e] = KT(float(T(x)));
    } else {
      const_cast<DEVICE KT*>(v_pool)[(slot * HKV + h) * DV + e] = KT(x);
    }
  }
  if (block_x == 0 && block_y == 0 && tid < 8) token[tid] = 0;
