// Absorbed latent attention (DeepSeek-V2, arXiv 2405.04434): every head attends to one latent of D numbers a token, which is
// key and value in one, and to one turned key of DR numbers. Block (x, y): row and tile of WARPS * QUERIES heads in x; split y
// of the row's tokens. The block brings TOKENS tokens to shared memory at a time, so a token comes from memory once for all
// heads of a tile; each warp attends with its QUERIES heads. A latent lies in k_pool, its turned key in v_pool.
  using namespace pippin;
  constexpr int VEC = 16 / int(sizeof(KT)), KEY = D / VEC, TURNED = DR / VEC, ALL = KEY + TURNED;
  constexpr int NK = (KEY + 31) / 32, NR = (TURNED + 31) / 32;
  typedef Pack<KT> Piece;
  const int tile = block_x % TILES, row = block_x / TILES, first_head = (tile * WARPS + warp) * QUERIES;

  const int length = lengths[row];
  const int per = larger((length + blocks_y - 1) / blocks_y, LEAST);
  const int first = block_y * per, end = smaller(length, first + per);
  const size_t line = size_t(row) * table_shape[1];

  float qs[QUERIES][NK * VEC], turned[QUERIES][NR * VEC], acc[QUERIES][NK * VEC], top[QUERIES], total[QUERIES];
  UNROLL
  for (int i = 0; i < QUERIES; i++) {
    const bool mine = first_head + i < HQ;
    const size_t query = size_t(row) * HQ + (mine ? first_head + i : 0);
    top[i] = NOTHING;
    total[i] = 0.0f;
    UNROLL
    for (int n = 0; n < NK; n++) {
      const int pack = lane + n * 32;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        acc[i][n * VEC + e] = 0.0f;
        qs[i][n * VEC + e] = mine && pack < KEY ? float(q[query * D + pack * VEC + e]) * params[0] * LOG2E : 0.0f;
      }
    }
    UNROLL
    for (int n = 0; n < NR; n++) {
      const int pack = lane + n * 32;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        turned[i][n * VEC + e] = mine && pack < TURNED ? float(q_turned[query * DR + pack * VEC + e]) * LOG2E : 0.0f;
      }
    }
  }

  SHARED(Piece, tokens, TOKENS * ALL);
  for (int base = first; base < end; base += TOKENS) {
    if (base > first) BARRIER();
    for (int i = tid; i < TOKENS * ALL; i += WARPS * 32) {
      const int pack = i % ALL, t = smaller(base + i / ALL, end - 1);
      const size_t slot = size_t(table[line + t / PAGE]) * PAGE + t % PAGE;
      if (pack < KEY) {
        tokens[i] = ((const DEVICE Pack<KT>*)k_pool)[slot * KEY + pack];
      } else {
        tokens[i] = ((const DEVICE Pack<KT>*)v_pool)[slot * TURNED + pack - KEY];
      }
    }
    BARRIER();
    for (int from = 0; from < TOKENS && base + from < end; from += U) {
      Piece latents[U][NK], keys[U][NR];
      UNROLL
      for (int u = 0; u < U; u++) {
        UNROLL
        for (int n = 0; n < NK; n++) latents[u][n] = tokens[(from + u) * ALL + smaller(lane + n * 32, KEY - 1)];
        UNROLL
        for (int n = 0; n < NR; n++) keys[u][n] = tokens[(from + u) * ALL + KEY + smaller(lane + n * 32, TURNED - 1)];
      }
      UNROLL
      for (int i = 0; i < QUERIES; i++) {
        float s[U];
        UNROLL
        for (int u = 0; u < U; u++) {
          s[u] = sum_lanes<32>(dot(qs[i], latents[u]) + dot(turned[i], keys[u]));
          if (base + from + u >= end) s[u] = NOTHING;
        }
        absorb(top[i], total[i], acc[i], s, latents);
      }
    }
  }

  UNROLL
  for (int i = 0; i < QUERIES; i++) {
    const bool mine = first_head + i < HQ;
    const size_t query = size_t(row) * HQ + (mine ? first_head + i : 0);
#if SPLIT
    const size_t to = query * blocks_y + block_y;
    if (mine && lane == 0) {
      stats[to * 2] = top[i];
      stats[to * 2 + 1] = total[i];
    }
#endif
    UNROLL
    for (int n = 0; n < NK; n++) {
      const int pack = lane + n * 32;
      UNROLL
      for (int e = 0; e < VEC; e++) {
        if (mine && pack < KEY) {
#if SPLIT
          if (total[i] > 0.0f) accumulated[to * D + pack * VEC + e] = acc[i][n * VEC + e];
#else
          out[query * D + pack * VEC + e] = T(total[i] > 0.0f ? acc[i][n * VEC + e] / total[i] : 0.0f);
#endif
        }
      }
    }
  }
