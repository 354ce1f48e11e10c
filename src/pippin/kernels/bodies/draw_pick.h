// The best of a row's parts: thread x.
  using namespace pippin;
  const int r = block_x * THREADS + tid, parts = sizes[2];
  if (r < sizes[3]) {
    float best = scores[r * parts];
    int id = part_tokens[r * parts];
    for (int i = 1; i < parts; i++) {
      const float score = scores[r * parts + i];
      const int other = part_tokens[r * parts + i];
      if (comes_before(score, unsigned(other), best, unsigned(id))) {
        best = score;
        id = other;
      }
    }
    tokens[r] = id;
    finite[r] = is_finite(survey_of_parts(tops, ids, r * parts, parts).raw) ? 1 : 0;
  }
