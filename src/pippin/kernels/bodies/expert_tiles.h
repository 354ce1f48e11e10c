// Pairs of a row and its expert, ordered by expert, earlier ones first, and cut into tiles of up to ROWS of one expert: what
// grouped_mma.h takes. Block x: an expert. Its tiles begin at as many as the pairs before it fill, and one more for each
// expert before it, so no block has to know the others'; a tile that is not needed has a count of 0.
  using namespace pippin;
  SHARED(int, less, THREADS);
  SHARED(int, same, THREADS);
  const int expert = block_x, pairs = indices_shape[0], each = (pairs + THREADS - 1) / THREADS;
  const int from = smaller(tid * each, pairs), to = smaller(from + each, pairs);
  int below = 0, found = 0;
  for (int i = from; i < to; i++) {
    below += indices[i] < expert;
    found += indices[i] == expert;
  }
  less[tid] = below;
  same[tid] = found;
  BARRIER();
  int start = 0, total = 0, before = 0;
  for (int t = 0; t < THREADS; t++) {
    start += less[t];
    total += same[t];
    before += t < tid ? same[t] : 0;
  }
  for (int i = from; i < to; i++) {
    if (indices[i] == expert) order[start + before++] = i;
  }
  const int base = start / ROWS + expert, end = (start + total) / ROWS + expert + 1;
  for (int t = base + tid; t < end; t += THREADS) {
    const int done = (t - base) * ROWS;
    tiles[t * 3] = expert;
    tiles[t * 3 + 1] = start + done;
    tiles[t * 3 + 2] = larger(0, smaller(ROWS, total - done));
  }
