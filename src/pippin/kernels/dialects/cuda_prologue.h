  const int block_x = int(blockIdx.x), block_y = int(blockIdx.y), blocks_y = int(gridDim.y);
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
