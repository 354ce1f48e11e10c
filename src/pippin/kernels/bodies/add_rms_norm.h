// total = x + r, out = total normed: a row of H numbers a block, PACKS packs of 16 bytes a thread.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), ROW = H / VEC;
  const size_t first = size_t(block_x) * ROW;
  float values[PACKS * VEC];
  float sum = 0.0f;
  UNROLL
  for (int n = 0; n < PACKS; n++) {
    const int i = tid + n * WARPS * 32;
    if (i >= ROW) continue;
    const Pack<T> a = ((const DEVICE Pack<T>*)x)[first + i], b = ((const DEVICE Pack<T>*)r)[first + i];
    Pack<T> c;
    UNROLL
    for (int e = 0; e < VEC; e++) {
      c.v[e] = T(float(a.v[e]) + float(b.v[e]));
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
