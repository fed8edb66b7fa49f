// Weights of a table on x86-64: few rows of x, in float32, by looking up 16 numbers at a time.
#include "lanes.h"
#include "job.h"
#include "levels.h"

// Rows of x that share what is looked up, as many as there are registers for; row tiles that are read at a time.
constexpr int ROWS = LANES == 16 ? 4 : 2, STREAMS = 4;
// Sums of a row of x: a fused product takes four steps, and two are begun in each.
constexpr int CHAINS = 4;

// y[R] and what a tile adds to it: LANES of its rows from `part` on, `levels` of its first block. x[R] at its columns.
template <int R>
LQ_INLINE void add_tile(const Job& job, const float* const* x, const uint8_t* tile, const Levels& levels, int64_t row_tile,
                        int64_t block_index, int part, Floats* y) {
  Levels here = levels;
  for (int c = 0; c < 4; c += PER) {
    if (job.group_table && c) here = Levels(job, row_tile, block_index + c / PER);
    Floats sums[R][CHAINS];
    for (auto& row : sums)
      for (auto& sum : row) sum = floats(0.0f);
    for (int line = 4 * c; line < 4 * (c + PER); line++) {
      const Ints codes = ints(tile + 64 * line + part * 4 * LANES);
      if (line % PARTS == part) ask(tile + 64 * line);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        // A byte's two codes are four columns apart.
        const Ints moved = shifted(codes, 8 * (i % 4) + 4 * (i / 4));
        const Floats w = here(moved, part);
        for (int r = 0; r < R; r++) sums[r][i % CHAINS] = fma(w, floats(x[r][8 * line + i]), sums[r][i % CHAINS]);
      }
    }
    const Floats scale = numbers(job.scale, job.scale_type, job.group(row_tile, block_index + c / PER) * 16 + part * LANES);
    for (int r = 0; r < R; r++)
      y[r] = fma(add(add(sums[r][0], sums[r][1]), add(sums[r][2], sums[r][3])), scale, y[r]);
  }
}

// The row tiles `first` of each of STREAMS parts of w, for R rows of x from `row` on, of `rows` that are at x in float32
// and begin at `start`.
template <int R> void few(const Job& job, const float* x, int64_t start, int64_t rows, int64_t row, int64_t first) {
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1, part_of = job.part(STREAMS), wide = tiles * 128;
  Floats y[STREAMS][PARTS][R];
  int64_t row_tile[STREAMS];
  Levels levels[STREAMS];
  for (int s = 0; s < STREAMS; s++) {
    row_tile[s] = first + s * part_of < last ? first + s * part_of : last;
    levels[s] = Levels(job, row_tile[s], 0);
    for (auto& part : y[s])
      for (auto& v : part) v = floats(0.0f);
  }
  for (int64_t tile = 0, block = 0; tile < tiles; tile++, block += 4 / PER) {
    const float* at[R];
    for (int r = 0; r < R; r++) at[r] = x + (row + r < rows ? row + r : rows - 1) * wide + tile * 128;
    for (int s = 0; s < STREAMS; s++) {
      job.ask_factors(job.group(row_tile[s], block));
      if (job.group_table) levels[s] = Levels(job, row_tile[s], block);
      for (int part = 0; part < PARTS; part++)
        add_tile<R>(job, at, job.codes + (row_tile[s] * tiles + tile) * TILE, levels[s], row_tile[s], block, part, y[s][part]);
    }
  }
  for (int s = 0; s < STREAMS && first + s * part_of <= last; s++)
    for (int part = 0; part < PARTS; part++)
      for (int r = 0; r < R && row + r < rows; r++)
        write_row(job, start + row + r, (first + s * part_of) * 16 + part * LANES, y[s][part][r]);
}

// Rows of x that are in float32 at a time.
constexpr int64_t CHUNK = 32;

inline int run(const Job& job, int threads) {
  static thread_local Room room;
  const int64_t wide = job.tiles() * 128, most = job.m < CHUNK ? job.m : CHUNK;
  float* x = static_cast<float*>(room.of(most * wide * sizeof(float)));
  if (!x) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < job.m; start += most) {
    const int64_t rows = job.m - start < most ? job.m - start : most;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t from = 0; from < job.k; from += 128) widen(job.x, job.x_type, start + row, job.k, from, x + row * wide + from);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < job.part(STREAMS); first++) {
      if (rows == 1) few<1>(job, x, start, rows, 0, first);
      for (int64_t row = 0; rows > 1 && row < rows; row += ROWS) few<ROWS>(job, x, start, rows, row, first);
    }
  }
  return 0;
}
