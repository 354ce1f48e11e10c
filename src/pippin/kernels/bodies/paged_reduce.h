// Joins the splits of one row's query head: block x. Splits that had no tokens have a total of 0, and no sums.
  using namespace pippin;
  const int splits = accumulated_shape[1];
  const size_t from = size_t(block_x) * splits;
  const float sink = SINKS ? float(sinks[block_x % HQ]) * LOG2E : NOTHING;
  float best = sink;
  for (int s = 0; s < splits; s++) best = larger(best, stats[(from + s) * 2]);
  float sum = SINKS ? exp2_of(sink - best) : 0.0f;
  for (int s = 0; s < splits; s++) sum += exp2_of(stats[(from + s) * 2] - best) * stats[(from + s) * 2 + 1];
  for (int at = tid; at < DV; at += THREADS) {
    float x = 0.0f;
    for (int s = 0; s < splits; s++) {
      if (stats[(from + s) * 2 + 1] == 0.0f) continue;
      x += exp2_of(stats[(from + s) * 2] - best) * accumulated[(from + s) * DV + at];
    }
    out[size_t(block_x) * DV + at] = T(sum > 0.0f ? x / sum : 0.0f);
  }
