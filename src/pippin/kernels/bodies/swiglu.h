// out = silu(gate) * up, or with GELU its tanh form in silu's place (of 2 u, since tanh is a sigmoid): where a row of y is WIDTH numbers of gate, then of up. Block (x, y): row, part y of its packs.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(T)), ROW = WIDTH / VEC;
  const int i = block_y * THREADS + tid;
  if (i < ROW) {
    const size_t row = size_t(block_x);
    const Pack<T> gate = ((const DEVICE Pack<T>*)y)[row * 2 * ROW + i], up = ((const DEVICE Pack<T>*)y)[(row * 2 + 1) * ROW + i];
    Pack<T> c;
    UNROLL
    for (int e = 0; e < VEC; e++) {
      const float g = float(gate.v[e]);
      const float at = GELU ? 1.5957691216f * (g + 0.044715f * g * g * g) : g;
      c.v[e] = T(g / (1.0f + exp2_of(-LOG2E * at)) * float(up.v[e]));
    }
    ((DEVICE Pack<T>*)out)[row * ROW + i] = c;
  }
