// The likeliest token of a part of a row, and its largest logit: part y of the row of block x.
  using namespace pippin;
  constexpr int WARPS = THREADS / 32, EACH = 16 / sizeof(T);
  SHARED(float, found, WARPS);
  SHARED(unsigned, found_ids, WARPS);
  const int n = sizes[0], packs = (n + EACH - 1) / EACH, each = (packs + blocks_y - 1) / blocks_y;
  const Row<T> row = row_of(logits, allowed, block_x, logits_shape[1], n, (sizes[1] & MASKED) != 0);
  const Survey part = joined(
      survey<T, 4>(row, block_y * each, smaller(packs, block_y * each + each), tid, THREADS), lane, warp, WARPS, found,
      found_ids);
  if (tid == 0) {
    const int at = block_x * blocks_y + block_y;
    tops[2 * at] = part.top;
    tops[2 * at + 1] = part.raw;
    ids[at] = int(part.id);
  }
