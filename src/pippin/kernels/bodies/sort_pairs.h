// Where each pair of a row and its expert goes when pairs are ordered by expert, earlier ones first; and what lies there: the
// expert, and the row, of which EACH pairs follow one another. Block x: THREADS pairs, each compared with all.
  using namespace pippin;
  SHARED(int, all, MOST);
  const int pairs = indices_shape[0];
  for (int i = tid; i < pairs; i += THREADS) all[i] = indices[i];
  BARRIER();
  const int i = block_x * THREADS + tid;
  if (i < pairs) {
    const int mine = all[i];
    int place = 0;
    for (int j = 0; j < pairs; j++) place += all[j] < mine || (all[j] == mine && j < i);
    places[i] = place;
    ordered[place] = mine;
    rows[place] = i / EACH;
  }
