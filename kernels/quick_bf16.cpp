// QUICK for many rows of bfloat16 x: affine weights, rounded to bfloat16, by the tiles of a CPU that multiplies such.
//
// A block of w is dequantized panel by panel of columns and multiplied with a chunk of x while it is near. Each element
// of y is summed in float32 in the order of k, whatever the chunks, blocks and threads are.
#include "lanes.h"
#include "codes.h"
#include "job.h"
#include "tiles.h"

#include <omp.h>

// Columns of a panel: 32 rows of w in it fit the first cache.
#ifndef LQ_PANEL
#define LQ_PANEL 256
#define LQ_BLOCK_TILES 16
#define LQ_CHUNK 512
#endif
constexpr int64_t PANEL = LQ_PANEL, STEPS = PANEL / 32;
// Row tiles of w in a block and rows of x in a chunk: what is summed of both, and a panel of each, fit the second cache.
constexpr int64_t BLOCK = LQ_BLOCK_TILES, CHUNK = LQ_CHUNK;
// Bytes, of x, w and what is summed alike.
constexpr int64_t ONE = 1024;

// Even and odd columns of 16 rows, rounded to bfloat16, as neighbours.
LQ_INLINE Ints neighbours(Floats even, Floats odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The `chunk`-th 32 columns of a row tile of w as a tile: [column / 2][row][column % 2].
LQ_INLINE void dequantize(const Job& job, int64_t row_tile, int64_t chunk, char* to) {
  const uint8_t* codes = job.codes + (row_tile * job.tiles() + chunk / 4) * TILE;
  const int c = static_cast<int>(chunk % 4);
  const int64_t group = job.group(row_tile, chunk / PER), left = job.k - chunk * 32;
  const Floats scale = numbers(job.scale, job.scale_type, group * 16);
  const Floats zero = job.zero ? numbers(job.zero, job.zero_type, group * 16) : floats(job.low);
  if (c == 0) job.ask_factors(group);
  for (int line = 0; line < BITS; line++) ask(codes + 64 * (BITS * c + line));
  Ints found[8];
  codes_of<BITS>(codes, c, found);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const Ints byte = ints(0xff);
    const Floats w0 = affine(to_floats(both(found[i], byte)), zero, scale);
    const Floats w1 = affine(to_floats(both(_mm512_srli_epi32(found[i], 8), byte)), zero, scale);
    const Floats w2 = affine(to_floats(both(_mm512_srli_epi32(found[i], 16), byte)), zero, scale);
    const Floats w3 = affine(to_floats(_mm512_srli_epi32(found[i], 24)), zero, scale);
    store(to + 128 * i, neighbours(w0, w1));
    store(to + 128 * i + 64, neighbours(w2, w3));
  }
  // Codes beyond k stand for numbers too.
  for (int64_t column = left; column < 32; column++)
    for (int64_t row = 0; row < 16; row++) std::memset(to + column / 2 * 64 + row * 4 + column % 2 * 2, 0, 2);
}

// A panel of a block of w, dequantized little by little: [row tile][chunk].
struct Panel {
  const Job& job;
  int64_t start, count, from, steps;
  char* to;
  // Chunks that are due, in parts of `slots`.
  int64_t credit = 0, t = 0, step = 0;

  int64_t size() const { return count * steps; }
  void one() {
    const int64_t last = job.row_tiles() - 1, row_tile = start + t < last ? start + t : last;
    dequantize(job, row_tile, from + step, to + (t * STEPS + step) * ONE);
    if (++step == steps) {
      step = 0;
      t++;
    }
  }
  // What falls to one of `slots` steps.
  LQ_INLINE void some(int64_t slots) {
    for (credit += size(); credit >= slots; credit -= slots) one();
  }
};

// 16 rows of x from `row` on as tiles, panel by panel, each of 32 columns; zeros beyond m and k.
LQ_INLINE void arrange(const Job& job, int64_t row, int64_t panel_bytes, char* to) {
  const int64_t steps = (job.k + 31) / 32;
  for (int64_t r = 0; r < 16; r++) {
    const char* from = static_cast<const char*>(job.x) + (row + r) * job.k * 2;
    for (int64_t step = 0; step < steps; step++) {
      char* at = to + step / STEPS * panel_bytes + step % STEPS * ONE + r * 64;
      const int64_t left = row + r < job.m ? job.k - step * 32 : 0;
      if (left >= 32) {
        store(at, ints(from + step * 64));
      } else {
        store(at, ints(0));
        if (left > 0) std::memcpy(at, from + step * 64, left * 2);
      }
    }
  }
}

// sums[2][2] += two row tiles of x times two of w, from `first` anew. Meanwhile the next panel is dequantized.
LQ_INLINE void multiply(const char* x, const char* w, int64_t steps, bool first, char* sums, int64_t stride, Panel& next,
                        int64_t slots) {
  // What was stored is loaded by instructions of which the compiler does not know that they read memory.
  __asm__ volatile("" ::: "memory");
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + ONE, 64);
    _tile_loadd(2, sums + stride, 64);
    _tile_loadd(3, sums + stride + ONE, 64);
  }
  for (int64_t step = 0; step < steps; step++, x += ONE, w += ONE) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + STEPS * ONE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + STEPS * ONE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    next.some(slots);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + ONE, 64);
  _tile_stored(2, sums + stride, 64);
  _tile_stored(3, sums + stride + ONE, 64);
}

// `count` row tiles of w from `start` on times the `rows` of x from `row` on, which are arranged at x.
// w: [2][row tile][step], sums: [row tile of x][row tile of w].
inline void block(const Job& job, int64_t row, int64_t rows, const char* x, int64_t start, int64_t count, char* w, char* sums) {
  const int64_t steps = (job.k + 31) / 32, tall = round_up(rows, 32) / 16, wide = round_up(count, 2), stride = BLOCK * ONE;
  const auto panel = [&](int64_t from) {
    const int64_t left = from < steps ? steps - from : 0;
    return Panel{job, start, wide, from, left < STEPS ? left : STEPS, w + from / STEPS % 2 * BLOCK * STEPS * ONE};
  };
  for (Panel first = panel(0); first.t < wide;) first.one();
  for (int64_t from = 0; from < steps; from += STEPS, x += tall * STEPS * ONE) {
    const Panel now = panel(from);
    Panel next = panel(from + STEPS);
    const int64_t slots = wide / 2 * (tall / 2) * now.steps;
    for (int64_t t = 0; t < wide; t += 2)
      for (int64_t r = 0; r < tall; r += 2)
        multiply(x + r * STEPS * ONE, now.to + t * STEPS * ONE, now.steps, from == 0, sums + r * stride + t * ONE, stride, next,
                 slots);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t t = 0; t < count; t++)
      write_row(job, row + r, (start + t) * 16, floats(reinterpret_cast<float*>(sums + r / 16 * stride + t * ONE + r % 16 * 64)));
}

extern "C" int lq_gemm(const void* x, const uint8_t* codes, const void* scale, const void* zero, const void* bias, void* y,
                       int64_t m, int64_t n, int64_t k, int64_t span, int64_t groups, int x_type, int scale_type,
                       int zero_type, float low, int threads) {
  const Job job{x, codes, scale, zero, bias, y, m, n, k, span, groups, x_type, scale_type, zero_type, low};
  static thread_local Room room;
  const int64_t most = m < CHUNK ? round_up(m, 32) : CHUNK, own = (2 * BLOCK * STEPS + most / 16 * BLOCK) * ONE;
  const int64_t panels = (k + PANEL - 1) / PANEL, of_x = panels * most / 16 * STEPS * ONE;
  char* memory = static_cast<char*>(room.of(of_x + threads * own));
  if (!memory) return 1;
  // Blocks of a size that leaves no thread without one.
  const int64_t each = round_up((job.row_tiles() + threads - 1) / threads, 2), size = each < BLOCK ? each : BLOCK;
#pragma omp parallel num_threads(threads)
  {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    const Tiles tiles(config);
    char* w = memory + of_x + omp_get_thread_num() * own;
    for (int64_t row = 0; row < m; row += most) {
      const int64_t rows = m - row < most ? m - row : most, tall = round_up(rows, 32) / 16;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < tall; r++) arrange(job, row + r * 16, tall * STEPS * ONE, memory + r * STEPS * ONE);
#pragma omp for schedule(static)
      for (int64_t start = 0; start < job.row_tiles(); start += size) {
        const int64_t left = job.row_tiles() - start;
        block(job, row, rows, memory, start, left < size ? left : size, w, w + 2 * BLOCK * STEPS * ONE);
      }
    }
  }
  return 0;
}
