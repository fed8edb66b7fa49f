// y[m, n] = x[m, k] @ w[n, k].T + bias[n] by whole numbers: dots of x's digits with codes, or with each plane of a
// binary weight, scaled block by block in float32. Every way adds the same numbers in the same order, so results are
// the same bits for any number of rows and threads and any instructions.
#include <cstdlib>

// A binary weight is LQ_BITS planes of one bit, w = sum alpha * (2 bit - 1) + offset; else w = (code - zero) * scale.
constexpr int BITS = LQ_BINARY ? 1 : LQ_BITS, PLANES = LQ_BINARY ? LQ_BITS : 1, D = LQ_DIGITS;
constexpr int64_t TILE = 256 * LQ_BITS;
// Row tiles that are read at a time: memory serves several streams better than one.
constexpr int STREAMS = 4;
// Digits of a chunk of rows should stay in the second cache.
constexpr int64_t CHUNK_BYTES = 1 << 20, CHUNK_ROWS = 128;
// From so many rows on the tiles of a CPU that has them are faster.
constexpr int64_t BATCH = 2;

// zero: of a binary weight the offset. `low`: the zero where there are none. `groups` as stored, of a row tile.
struct Job {
  const void* x;
  const uint8_t* codes;
  const void* scale;
  const void* zero;
  const void* bias;
  void* y;
  int64_t m, n, k, block, span, groups;
  int x_type, scale_type, zero_type;
  float low;

  int64_t tiles() const { return (k + 127) / 128; }
  int64_t row_tiles() const { return (n + 15) / 16; }
  // The place of the factors of a row tile and a block.
  int64_t group(int64_t row_tile, int64_t block_index) const { return row_tile * groups + block_index / span; }
};

// What 16 rows of plane p of w are scaled by in one block: LANES of them from `part` on.
struct Factors {
  Floats scale, zero;

  LQ_INLINE Factors(const Job& job, int64_t group, int p, int part) {
    scale = numbers(job.scale, job.scale_type, (group * PLANES + p) * 16 + part * LANES);
    zero = job.zero ? numbers(job.zero, job.zero_type, group * 16 + part * LANES) : floats(job.low);
  }

  // y and what the plane adds to it, from its dots with x's digits in a block of which `fact` are the facts.
  LQ_INLINE Floats scaled(Floats y, const Ints* dots, const float* fact) const {
    Floats sum = floats(0.0f);
    for (int d = D - 1; d >= 0; d--) {
      const Floats dot = to_floats(LQ_BINARY ? left<1>(dots[d]) : dots[d]);
      const Floats centred = less(LQ_BINARY ? floats(1.0f) : zero, floats(fact[1 + d]), dot);
      sum = d == D - 1 ? centred : fma(sum, floats(256.0f), centred);
    }
    return fma(mul(sum, scale), floats(fact[0]), y);
  }

  // y and what a binary weight's offset adds to it.
  LQ_INLINE Floats offset(Floats y, const float* fact) const {
    float sum = fact[D];
    for (int d = D - 1; d > 0; d--) sum = __builtin_fmaf(sum, 256.0f, fact[d]);
    return fma(mul(floats(sum), zero), floats(fact[0]), y);
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

// STREAMS row tiles from `first` on, for R rows of x from `row` on, of the chunk that begins at `start`.
template <int R> void few(const Job& job, const Digits& x, int64_t start, int64_t row, int64_t first) {
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1;
  Floats y[STREAMS][PARTS][R];
  int64_t row_tile[STREAMS], rows[R];
  for (int r = 0; r < R; r++) rows[r] = row + r < x.rows ? row + r : x.rows - 1;
  for (int s = 0; s < STREAMS; s++) {
    row_tile[s] = first + s < last ? first + s : last;
    for (auto& part : y[s])
      for (auto& v : part) v = floats(0.0f);
  }
  for (int64_t tile = 0; tile < tiles; tile++) {
#pragma GCC unroll 1
    for (int s = 0; s < STREAMS; s++) {
      const uint8_t* at = job.codes + (row_tile[s] * tiles + tile) * TILE;
#pragma GCC unroll 1
      for (int p = 0; p < PLANES; p++, at += 256) {
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++) {
          Ints dots[4][R][D];
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++) {
            Ints codes[8];
            if (part == 0)
              for (int line = 0; line < BITS; line++)
                _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD + 64 * (BITS * c + line)), _MM_HINT_T0);
            codes_of<BITS>(at + part * 4 * LANES, c, codes);
            for (int r = 0; r < R; r++)
              for (int d = 0; d < D; d++)
                dots[c][r][d] = dot<BITS>(codes, x.digits + x.place(tile, rows[r], d) + x.chunk(c));
          }
          const int per = static_cast<int>(job.block / 32);
          for (int c = 0; c < 4; c += per) {
            const int64_t block = (tile * 4 + c) / per;
            const Factors factors(job, job.group(row_tile[s], block), p, part);
            for (int r = 0; r < R; r++) {
              const float* fact = x.fact(block, rows[r]);
              Ints sums[D];
              for (int d = 0; d < D; d++) sums[d] = dots[c][r][d];
              for (int more = c + 1; more < c + per; more++)
                for (int d = 0; d < D; d++) sums[d] = add(sums[d], dots[more][r][d]);
              if (LQ_BINARY && p == 0 && job.zero) y[s][part][r] = factors.offset(y[s][part][r], fact);
              y[s][part][r] = factors.scaled(y[s][part][r], sums, fact);
            }
          }
        }
      }
    }
  }
  for (int s = 0; s < STREAMS && first + s <= last; s++)
    for (int part = 0; part < PARTS; part++)
      for (int r = 0; r < R && row + r < x.rows; r++)
        write_row(job, start + row + r, (first + s) * 16 + part * LANES, y[s][part][r]);
}

#include "amx.h"

// Memory that a thread keeps from call to call.
struct Room {
  void* memory = nullptr;
  size_t size = 0;
  ~Room() { std::free(memory); }
  void* of(size_t wanted) {
    if (wanted > size) {
      std::free(memory);
      size = round_up(wanted, 4096);
      memory = std::aligned_alloc(4096, size);
      if (!memory) size = 0;
    }
    return memory;
  }
};

inline int run(const Job& job, int threads) {
  static thread_local Room room;
  const int64_t fit = CHUNK_BYTES / (round_up(job.k, 128) * D) / 16 * 16;
  const int64_t most = fit < 32 ? 32 : fit < CHUNK_ROWS ? fit : CHUNK_ROWS, rows = job.m < most ? job.m : most;
  const int64_t digits = bytes_of_digits(rows, job.k, D), blocks = round_up(job.k, 128) / job.block;
  char* memory = static_cast<char*>(room.of(digits + blocks * rows * (1 + D) * sizeof(float)));
  if (!memory) return 1;
  const int64_t row_tiles = job.row_tiles();
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < job.m; start += most) {
    const int64_t here = job.m - start < most ? job.m - start : most;
    const Digits x{reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + digits), here, here < 16 ? here : 16, D};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < here; row++)
      digits_of_row<D>(x, job.x, job.x_type, start + row, row, job.k, static_cast<int>(job.block));
#if LQ_AMX
    if (here >= BATCH) {
      batch(job, x, start);
      continue;
    }
#endif
#pragma omp for schedule(static)
    for (int64_t first = 0; first < row_tiles; first += STREAMS) {
      int64_t row = 0;
      if (here == 1) few<1>(job, x, start, row++, first);
      for (; row < here; row += 4) few<4>(job, x, start, row, first);
    }
  }
  return 0;
}
