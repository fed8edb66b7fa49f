// y[m, n] = x[m, k] @ w[n, k].T + bias[n] by whole numbers: dots of x's digits with codes, or with each plane of a
// binary weight, scaled block by block in float32. Every way adds the same numbers in the same order, so results are
// the same bits for any number of rows and threads and any instructions.
#include "job.h"

// Row tiles that are read at a time: memory serves several streams better than one.
constexpr int STREAMS = 4;
// Digits of a chunk of rows should stay in the second cache.
constexpr int64_t CHUNK_BYTES = 1 << 20, CHUNK_ROWS = 128;
// From so many rows on the tiles of a CPU that has them are faster.
constexpr int64_t BATCH = 2;

// What 16 rows of plane p of w are scaled by in one block: LANES of them from `part` on.
struct Factors {
  Floats scale, zero;

  LQ_INLINE Factors(Floats scale, Floats zero) : scale(scale), zero(zero) {}
  LQ_INLINE Factors(const Job& job, int64_t group, int p, int part) {
    scale = numbers(job.scale, job.scale_type, (group * PLANES + p) * 16 + part * LANES);
    zero = job.zero ? numbers(job.zero, job.zero_type, group * 16 + part * LANES) : floats(job.low);
  }

  // y and what the plane adds to it, from its dots with x's digits in a block of which `fact` are the facts.
  LQ_INLINE Floats scaled(Floats y, const Ints* dots, const float* fact) const {
    Floats centred[D];
    for (int d = 0; d < D; d++) {
      const Floats dot = to_floats(LQ_BINARY ? left<1>(dots[d]) : dots[d]);
      centred[d] = less(LQ_BINARY ? floats(1.0f) : zero, floats(fact[1 + d]), dot);
    }
    Floats sum = fma(centred[1], floats(256.0f), centred[0]);
    if (D == 3) sum = fma(centred[D - 1], floats(65536.0f), sum);
    return fma(mul(sum, scale), floats(fact[0]), y);
  }

  // The same bits for dots with what is already centred: they are what `scaled` rounds in its first fma.
  LQ_INLINE Floats scaled_centred(Floats y, const Ints* dots, const float* fact) const {
    Floats sum = to_floats(add(left<8>(dots[1]), dots[0]));
    if (D == 3) sum = fma(to_floats(dots[D - 1]), floats(65536.0f), sum);
    return fma(mul(sum, scale), floats(fact[0]), y);
  }

  // y and what a binary weight's offset adds to it.
  LQ_INLINE Floats offset(Floats y, const float* fact) const {
    float sum = fact[D];
    for (int d = D - 1; d > 0; d--) sum = __builtin_fmaf(sum, 256.0f, fact[d]);
    return fma(mul(floats(sum), zero), floats(fact[0]), y);
  }
};

// y[R] and what a plane of a tile adds to it: LANES of its rows, `codes` at their first byte. `x` are the first digits of
// R rows in the tile's columns, `facts` of its first block, `group` the place of that one's factors.
template <int R>
LQ_INLINE void add_tile(const Job& job, int64_t tall, const int8_t* const* x, const float* const* facts, int64_t next_fact,
                        const uint8_t* plane, int64_t group, int p, int part, Floats* y) {
  for (int c = 0; c < 4; c += PER, group++) {
    Ints sums[R][D][2] = {};
#pragma GCC unroll 4
    for (int i = c; i < c + PER; i++) {
      Ints codes[8];
      for (int line = 0; line < BITS; line++)
        if (line % PARTS == part) ask(plane + 64 * (BITS * i + line));
      codes_of<BITS>(plane + part * 4 * LANES, i, codes);
      for (int r = 0; r < R; r++) {
        for (int d = 0; d < D; d++) {
          const int8_t* digits = x[r] + (128 * d + i / 2 * 64) * tall + i % 2 * 32;
          // Hidden from the compiler, which would read all digits once for all streams, into more registers than
          // there are.
          __asm__("" : "+r"(digits));
          sums[r][d][i % 2] = dot<BITS>(codes, digits, sums[r][d][i % 2]);
        }
      }
    }
    const Factors factors(job, group, p, part);
    for (int r = 0; r < R; r++) {
      const float* fact = facts[r] + c / PER * next_fact;
      Ints dots[D];
      for (int d = 0; d < D; d++) dots[d] = add(sums[r][d][0], sums[r][d][1]);
      if (LQ_BINARY && p == 0 && job.zero) y[r] = factors.offset(y[r], fact);
      y[r] = factors.scaled(y[r], dots, fact);
    }
  }
}

// The row tiles `first` of each of STREAMS parts of w, for R rows of x from `row` on, of the chunk that begins at
// `start`. Whoever goes on with the next row tile finds it asked for already.
template <int R> void few(const Job& job, const Digits& x, int64_t start, int64_t row, int64_t first) {
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1, part_of = job.part(STREAMS);
  const int64_t next_fact = x.rows * (1 + D);
  Floats y[STREAMS][PARTS][R];
  const uint8_t* codes[STREAMS];
  int64_t factors[STREAMS], rows[R];
  for (int r = 0; r < R; r++) rows[r] = row + r < x.rows ? row + r : x.rows - 1;
  for (int s = 0; s < STREAMS; s++) {
    const int64_t row_tile = first + s * part_of < last ? first + s * part_of : last;
    codes[s] = job.codes + row_tile * tiles * TILE;
    factors[s] = row_tile * job.groups;
    for (auto& part : y[s])
      for (auto& v : part) v = floats(0.0f);
  }
  for (int64_t tile = 0, group = 0, in_group = 0; tile < tiles; tile++) {
    const int8_t* digits[R];
    const float* facts[R];
    for (int r = 0; r < R; r++) {
      digits[r] = x.digits + x.place(tile, rows[r], 0);
      facts[r] = x.fact(tile * (4 / PER), rows[r]);
    }
    for (int s = 0; s < STREAMS; s++) {
      job.ask_factors(factors[s] + group);
      for (int p = 0; p < PLANES; p++)
        for (int part = 0; part < PARTS; part++)
          add_tile<R>(job, x.tall, digits, facts, next_fact, codes[s] + p * 256, factors[s] + group, p, part,
                           y[s][part]);
      codes[s] += TILE;
    }
    if (PER < 4) {
      group += 4 / PER;
    } else if (++in_group == job.span) {
      group++;
      in_group = 0;
    }
  }
  for (int s = 0; s < STREAMS && first + s * part_of <= last; s++)
    for (int part = 0; part < PARTS; part++)
      for (int r = 0; r < R && row + r < x.rows; r++)
        write_row(job, start + row + r, (first + s * part_of) * 16 + part * LANES, y[s][part][r]);
}

#include "amx.h"
#include "tables.h"

inline int run(const Job& job, int threads) {
  static thread_local Room room;
  const int64_t fit = CHUNK_BYTES / (round_up(job.k, 128) * D) / 16 * 16;
  const int64_t most = fit < 32 ? 32 : fit < CHUNK_ROWS ? fit : CHUNK_ROWS, rows = job.m < most ? job.m : most;
  const int64_t digits = bytes_of_digits(rows, job.k, D), blocks = round_up(job.k, 128) / LQ_BLOCK;
  const int64_t facts = round_up(blocks * rows * (1 + D) * sizeof(float), 64);
#if LQ_TABLES
  const int64_t tables = MOST_ROWS * job.tiles() * TABLES;
#else
  const int64_t tables = 0;
#endif
  char* memory = static_cast<char*>(room.of(digits + facts + tables));
  if (!memory) return 1;
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < job.m; start += most) {
    const int64_t here = job.m - start < most ? job.m - start : most;
    const int64_t tall = here < 16 ? here : 16;
    const Digits x{reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + digits), here, tall, D};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < here; row++)
      digits_of_row<D>(x, job.x, job.x_type, start + row, row, job.k, LQ_BLOCK);
#if LQ_TABLES
    if (here <= MOST_ROWS) {
      look_up(job, x, start, reinterpret_cast<uint8_t*>(memory + digits + facts));
      continue;
    }
#endif
#if LQ_AMX
    if (here >= BATCH) {
      batch(job, x, start);
      continue;
    }
#endif
#pragma omp for schedule(static)
    for (int64_t first = 0; first < job.part(STREAMS); first++) {
      if (here == 1) few<1>(job, x, start, 0, first);
      for (int64_t row = 0; here > 1 && row < here; row += 4) few<4>(job, x, start, row, first);
    }
  }
  return 0;
}
