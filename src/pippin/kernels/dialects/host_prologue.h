  const int block_x = pippin::block_x, block_y = pippin::block_y, blocks_y = pippin::blocks_y;
  const int tid = pippin::self, lane = tid % 32, warp = tid / 32;
