  const int block_x = int(threadgroup_position_in_grid.x), block_y = int(threadgroup_position_in_grid.y);
  const int blocks_y = int(threadgroups_per_grid.y);
  const int tid = int(thread_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
  const int warp = int(simdgroup_index_in_threadgroup);
