// What every CPU kernel of a packed matmul is told, and how it writes y: of gemm.h, table.cpp and quick_bf16.cpp.
#include <sys/mman.h>

#include <cstdlib>

// A binary weight is LQ_BITS planes of one bit, w = sum alpha * (2 bit - 1) + offset; of LQ_LEVELS w = table[code] * scale,
// codes of four bits; else w = (code - zero) * scale.
constexpr int BITS = LQ_BINARY ? 1 : LQ_BITS, PLANES = LQ_BINARY ? LQ_BITS : 1, D = LQ_DIGITS;
// Of the four chunks of 32 columns of a tile how many a block has.
constexpr int PER = LQ_BLOCK / 32;
constexpr int64_t TILE = 256 * LQ_BITS;

// zero: of a binary weight the offset. `low`: the zero where there are none. `groups` as stored, of a row tile.
// table: `levels` float32 for each row (stride row_table, 0 for one table) and group (stride group_table).
struct Job {
  const void* x;
  const uint8_t* codes;
  const void* scale;
  const void* zero;
  const void* bias;
  void* y;
  int64_t m, n, k, span, groups;
  int x_type, scale_type, zero_type;
  float low;
  const float* table;
  int64_t levels, row_table, group_table;

  int64_t tiles() const { return (k + 127) / 128; }
  int64_t row_tiles() const { return (n + 15) / 16; }
  // Row tiles of one of `parts` parts of w.
  int64_t part(int parts) const { return (row_tiles() + parts - 1) / parts; }
  // The place of the factors of a row tile and a block.
  int64_t group(int64_t row_tile, int64_t block_index) const { return row_tile * groups + block_index / span; }
  // Asks for the factors of a tile, some tiles ahead of the one whose first group is `group`.
  void ask_factors(int64_t group) const {
    ask_some(scale, group * PLANES, scale_type, PLANES);
    if (zero) ask_some(zero, group, zero_type, 1);
  }
  static void ask_some(const void* p, int64_t place, int type, int planes) {
    const int64_t row = type == FLOAT32 ? 64 : 32;
    const char* at = static_cast<const char*>(p) + place * row + 256;
    for (int64_t i = 0; i < row * planes * (4 / PER); i += 64) _mm_prefetch(at + i, _MM_HINT_T0);
  }
};

LQ_INLINE void write_row(const Job& job, int64_t row, int64_t column, Floats y) {
  const int64_t count = job.n - column < LANES ? job.n - column : LANES;
  if (count <= 0) return;
  if (job.bias) {
    alignas(64) char some[4 * LANES] = {};
    const int size = job.x_type == FLOAT32 ? 4 : 2;
    std::memcpy(some, static_cast<const char*>(job.bias) + column * size, count * size);
    y = add(y, numbers(some, job.x_type, 0));
  }
  write(job.y, job.x_type, row * job.n + column, y, count);
}

// Asks for a line that will be read soon; of whole bytes later.
LQ_INLINE void ask(const void* p) {
  _mm_prefetch(static_cast<const char*>(p) + (LQ_BITS < 8 ? AHEAD : 2560), _MM_HINT_T0);
}

// Memory that a thread keeps from call to call, in huge pages where it is as large.
struct Room {
  void* memory = nullptr;
  size_t size = 0;
  ~Room() { std::free(memory); }
  void* of(size_t wanted) {
    if (wanted > size) {
      std::free(memory);
      const size_t page = wanted < HUGE_PAGE ? 4096 : HUGE_PAGE;
      size = round_up(wanted, page);
      memory = std::aligned_alloc(page, size);
      if (!memory) size = 0;
      if (page == HUGE_PAGE && memory) madvise(memory, size, MADV_HUGEPAGE);
    }
    return memory;
  }
  static constexpr size_t HUGE_PAGE = 2 << 20;
};

// What the library's one function does, by the file that includes this. Nonzero where there is no memory.
inline int run(const Job& job, int threads);

extern "C" int lq_gemm(const void* x, const uint8_t* codes, const void* scale, const void* zero, const float* table,
                       const void* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t span, int64_t groups, int x_type,
                       int scale_type, int zero_type, float low, int64_t levels, int64_t row_table, int64_t group_table,
                       int threads) {
  const Job job{x, codes, scale, zero, bias, y, m, n, k, span, groups, x_type, scale_type, zero_type, low, table, levels,
                row_table, group_table};
  return run(job, threads);
}
