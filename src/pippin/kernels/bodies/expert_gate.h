// out = up, gated: rows of experts, and with BIASED their experts' biases first. Block (x, y): row, part y of its packs.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), ROW = WIDTH / VEC;
  const int i = block_y * THREADS + tid;
  if (i < ROW) {
    const size_t at = size_t(block_x) * ROW + i;
    const Pack<T> g = ((const DEVICE Pack<T>*)gate)[at], u = ((const DEVICE Pack<T>*)up)[at];
    Pack<T> b, d, c;
    if (BIASED) {
      const size_t of = size_t(indices[block_x]) * ROW + i;
      b = ((const DEVICE Pack<T>*)gate_bias)[of];
      d = ((const DEVICE Pack<T>*)up_bias)[of];
    }
    UNROLL
    for (int e = 0; e < VEC; e++) {
      const float x = float(g.v[e]) + (BIASED ? float(b.v[e]) : 0.0f);
      c.v[e] = T(gated<CLIPPED>(x, float(u.v[e]) + (BIASED ? float(d.v[e]) : 0.0f), params[0], params[1]));
    }
    ((DEVICE Pack<T>*)out)[at] = c;
  }
