// What four bits look up: a table of at most 16 numbers that all weights share, or one for each row, or row and group.
struct Levels {
  alignas(64) float shared[16] = {};
  const float* own = nullptr;
  alignas(64) int32_t rows[16] = {};

  Levels() = default;
  // Of the 16 rows of a tile in a block. Rows beyond n take the last one's.
  LQ_INLINE Levels(const Job& job, int64_t row_tile, int64_t block_index) {
    if (!job.row_table) {
      for (int64_t i = 0; i < job.levels; i++) shared[i] = job.table[i];
      return;
    }
    // Nor are there tables of the blocks that fill up a tile beyond k.
    const int64_t end = (job.k - 1) / LQ_BLOCK, group = (block_index < end ? block_index : end) / job.span;
    own = job.table + row_tile * 16 * job.row_table + group * job.group_table;
    for (int64_t r = 0; r < 16; r++) {
      const int64_t row = row_tile * 16 + r < job.n ? r : job.n - 1 - row_tile * 16;
      rows[r] = static_cast<int32_t>(row * job.row_table);
    }
  }
  // The numbers of LANES codes, of rows from `part` on. Only their low four bits count.
  LQ_INLINE Floats operator()(Ints codes, int part) const {
    return own ? gathered(own, add(both(codes, ints(15)), ints(rows + part * LANES))) : looked_up(shared, codes);
  }
};
