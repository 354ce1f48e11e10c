// total = x + r, out = total normed: a row of H numbers a block, PACKS packs of 16 bytes a thread. With EXPERTS, r has EACH
// rows for each of x, which are summed by their shares, with their experts' biases if BIASED; with PLACED they lie where `places` says.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), ROW = H / VEC;
  const size_t first = size_t(block_x) * ROW;
  float values[PACKS * VEC];
  float sum = 0.0f;
  UNROLL
  for (int n = 0; n < PACKS; n++) {
    const int i = tid + n * WARPS * 32;
    if (i >= ROW) continue;
    const Pack<T> a = ((const DEVICE Pack<T>*)x)[first + i];
    Pack<T> c;
    float more[VEC];
#if EXPERTS
    UNROLL
    for (int e = 0; e < VEC; e++) more[e] = 0.0f;
    UNROLL
    for (int m = 0; m < EACH; m++) {
      const size_t pair = size_t(block_x) * EACH + m;
      const float share = float(shares[pair]);
      const Pack<T> b = ((const DEVICE Pack<T>*)r)[size_t(PLACED ? places[pair] : int(pair)) * ROW + i];
      if (BIASED) c = ((const DEVICE Pack<T>*)bias)[size_t(indices[pair]) * ROW + i];
      UNROLL
      for (int e = 0; e < VEC; e++) more[e] += share * (float(b.v[e]) + (BIASED ? float(c.v[e]) : 0.0f));
    }
#else
    const Pack<T> b = ((const DEVICE Pack<T>*)r)[first + i];
    UNROLL
    for (int e = 0; e < VEC; e++) more[e] = float(b.v[e]);
#endif
    UNROLL
    for (int e = 0; e < VEC; e++) {
      c.v[e] = T(float(a.v[e]) + more[e]);
      values[n * VEC + e] = float(c.v[e]);
      sum += values[n * VEC + e] * values[n * VEC + e];
    }
    ((DEVICE Pack<T>*)total)[first + i] = c;
  }
  SHARED(float, sums, WARPS);
  sum = sum_lanes<32>(sum);
  if (lane == 0) sums[warp] = sum;
  BARRIER();
  sum = 0.0f;
  UNROLL
  for (int w = 0; w < WARPS; w++) sum += sums[w];
  const float factor = rsqrt_of(sum / float(H) + params[0]);
  UNROLL
  for (int n = 0; n < PACKS; n++) {
    const int i = tid + n * WARPS * 32;
    if (i >= ROW) continue;
    const Pack<T> w = ((const DEVICE Pack<T>*)weight)[i];
    Pack<T> c;
    UNROLL
    for (int e = 0; e < VEC; e++) c.v[e] = T(float(T(values[n * VEC + e] * factor)) * float(w.v[e]));
    ((DEVICE Pack<T>*)out)[first + i] = c;
  }
