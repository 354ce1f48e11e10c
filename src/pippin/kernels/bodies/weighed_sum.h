// out = the sum of EACH rows of y by their shares, with their experts' biases if BIASED, and plus another row with PLUS. With
// PLACED, a row lies where `places` says.
// Block (x, y): row of out, part y of its packs.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), ROW = WIDTH / VEC;
  const int i = block_y * THREADS + tid;
  if (i < ROW) {
    float sum[VEC];
    Pack<T> a;
    if (PLUS) a = ((const DEVICE Pack<T>*)plus)[size_t(block_x) * ROW + i];
    UNROLL
    for (int e = 0; e < VEC; e++) sum[e] = PLUS ? float(a.v[e]) : 0.0f;
    UNROLL
    for (int n = 0; n < EACH; n++) {
      const size_t pair = size_t(block_x) * EACH + n;
      const float share = float(shares[pair]);
      a = ((const DEVICE Pack<T>*)y)[size_t(PLACED ? places[pair] : int(pair)) * ROW + i];
      Pack<T> b;
      if (BIASED) b = ((const DEVICE Pack<T>*)bias)[size_t(indices[pair]) * ROW + i];
      UNROLL
      for (int e = 0; e < VEC; e++) sum[e] += share * (float(a.v[e]) + (BIASED ? float(b.v[e]) : 0.0f));
    }
    UNROLL
    for (int e = 0; e < VEC; e++) a.v[e] = T(sum[e]);
    ((DEVICE Pack<T>*)out)[size_t(block_x) * ROW + i] = a;
  }
