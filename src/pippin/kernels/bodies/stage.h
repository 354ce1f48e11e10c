// Two arrays of words into others that stay where they are: what a recorded step reads. A thread takes one word of each.
  using namespace pippin;
  const int at = block_x * THREADS + tid;
  if (at < sizes[0]) const_cast<DEVICE int*>(table_place)[at] = table[at];
  if (at < sizes[1]) const_cast<DEVICE int*>(packed_place)[at] = packed[at];
  if (block_x == 0 && tid < 8) token[tid] = 0;
