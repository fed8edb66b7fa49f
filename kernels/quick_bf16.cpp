// Many rows of bfloat16 x: weights of any form, rounded to bfloat16, by the tiles of a CPU that multiplies such.
//
// A block of w is dequantized panel by panel of columns and multiplied with a chunk of x while it is near. Each element
// of y is summed in float32 in the order of k, whatever the chunks, blocks and threads are.
#include "lanes.h"
#include "codes.h"
#include "job.h"
#include "levels.h"
#include "tiles.h"

#include <omp.h>

// Columns of a panel: a pair of row tiles in it, of w and of x each, fit the first cache.
constexpr int64_t PANEL = 256, STEPS = PANEL / 32;
// Row tiles of w in a block and rows of x in a chunk: what is summed of both, and a panel of x, fit the second cache.
constexpr int64_t BLOCK = 16, CHUNK = 512;
// Bytes of a tile, of x, w and what is summed alike; of a pair of row tiles of w in a panel.
constexpr int64_t ONE = 1024, PAIR = 2 * STEPS * ONE;

// Even and odd columns of 16 rows, rounded to bfloat16, as neighbours.
LQ_INLINE Ints neighbours(Floats even, Floats odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// A pair of row tiles of w in a panel: of the block of `count` row tiles from `start` on the pair from `t` on, of the
// panel of chunks of 32 columns that begins with `from`. After all pairs comes the next panel, then the next block.
struct Place {
  int64_t start, count, from, t;

  bool there() const { return count > 0; }
  Place after(int64_t chunks, int64_t end) const {
    if (t + 2 < count) return {start, count, from, t + 2};
    if (from + STEPS < chunks) return {start, count, from + STEPS, 0};
    return block(start + count, end);
  }
  // The block at `start` of those that end before `end`.
  static Place block(int64_t start, int64_t end) { return {start, end - start < BLOCK ? end - start : BLOCK, 0, 0}; }
};

// What is dequantized of w, little by little: [row tile][chunk][column / 2][row][column % 2].
class Dequantizer {
 public:
  Dequantizer(const Job& job, const Place& place, char* to) : job_(job), place_(place), to_(to) {
    const int64_t chunks = (job.k + 31) / 32, left = chunks - place.from;
    steps_ = !place.there() ? 0 : left < STEPS ? left : STEPS;
    // The same pair of the next panel, or of the next block: memory is asked for it now.
    const int64_t tile = place.from / 4, more = place.from + STEPS < chunks ? STEPS / 4 : -1;
    ahead_ = more > 0 ? more * TILE : (place.count * job.tiles() - tile) * TILE;
    groups_ahead_ = more > 0 ? job.group(0, (place.from + STEPS) / PER) - job.group(0, place.from / PER)
                             : place.count * job.groups - job.group(0, place.from / PER);
  }
  int64_t steps() const { return steps_; }
  // Four parts of a chunk.
  int64_t size() const { return 8 * steps_; }
  // What falls to one of `slots` steps.
  LQ_INLINE void some(int64_t slots) {
    for (credit_ += size(); credit_ >= slots; credit_ -= slots) one();
  }
  LQ_INLINE void one() {
    if (part_ == 0) open();
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      store(to_ + 128 * (part_ + i), neighbours(weights<0>(part_ + i), weights<1>(part_ + i)));
      store(to_ + 128 * (part_ + i) + 64, neighbours(weights<2>(part_ + i), weights<3>(part_ + i)));
    }
    part_ += 2;
    if (part_ == 8) close();
  }

 private:
  LQ_INLINE void open() {
    const int64_t last = job_.row_tiles() - 1, row_tile = place_.start + place_.t + row_;
    const int64_t within = row_tile < last ? row_tile : last, chunk = place_.from + step_;
    const uint8_t* codes = job_.codes + (within * job_.tiles() + chunk / 4) * TILE;
    const int64_t group = job_.group(within, chunk / PER);
    Floats zero = job_.zero ? numbers(job_.zero, job_.zero_type, group * 16) : floats(LQ_BINARY ? 0.0f : job_.low);
    for (int p = 0; p < PLANES; p++) {
      const Floats scale = numbers(job_.scale, job_.scale_type, (group * PLANES + p) * 16);
      if (LQ_BINARY) zero = sub(zero, scale);
      store(scale_[p], LQ_BINARY ? add(scale, scale) : scale);
    }
    store(zero_, zero);
    if (LQ_LEVELS) levels_ = Levels(job_, within, chunk / PER);
    const int c = static_cast<int>(chunk % 4);
    if (c == 0) {
      ask_for(job_.scale, job_.scale_type, group + groups_ahead_, PLANES);
      if (job_.zero) ask_for(job_.zero, job_.zero_type, group + groups_ahead_, 1);
    }
    for (int p = 0; p < PLANES; p++)
      for (int line = 0; line < BITS; line++)
        _mm_prefetch(reinterpret_cast<const char*>(codes) + ahead_ + 64 * (BITS * (4 * p + c) + line), _MM_HINT_T1);
    Ints found[8];
    if (LQ_BINARY) {
      for (int p = 0; p < PLANES; p++) found[p] = ints(codes + 64 * (4 * p + c));
    } else {
      codes_of<BITS>(codes, c, found);
    }
    for (int i = 0; i < (LQ_BINARY ? PLANES : 8); i++) store(found_[i], found[i]);
  }
  // Those of the column T of four in part i of a chunk, in float32.
  template <int T> LQ_INLINE Floats weights(int i) const {
    Floats w = floats(zero_);
    if (LQ_BINARY) {
      // From all planes' -alpha up, by 2 alpha for each bit that is set.
      const Ints bit = ints(1 << (8 * (i % 4) + 4 * (i / 4) + T));
      for (int p = 0; p < PLANES; p++) {
        const __mmask16 set = _mm512_test_epi32_mask(ints(found_[p]), bit);
        w = _mm512_mask_add_ps(w, set, w, floats(scale_[p]));
      }
      return w;
    }
    const Ints four = ints(found_[i]), code = T == 3 ? _mm512_srli_epi32(four, 24) : both(_mm512_srli_epi32(four, 8 * T), ints(0xff));
    return LQ_LEVELS ? mul(levels_(code, 0), floats(scale_[0])) : affine(to_floats(code), w, floats(scale_[0]));
  }
  static void ask_for(const void* p, int type, int64_t group, int planes) {
    const int64_t row = (type == FLOAT32 ? 64 : 32) * planes;
    for (int64_t i = 0; i < row * (4 / PER); i += 64)
      _mm_prefetch(static_cast<const char*>(p) + group * row + i, _MM_HINT_T0);
  }
  LQ_INLINE void close() {
    // Codes beyond k stand for numbers too.
    for (int64_t column = job_.k - (place_.from + step_) * 32; column < 32; column++)
      for (int64_t row = 0; row < 16; row++) std::memset(to_ + column / 2 * 64 + row * 4 + column % 2 * 2, 0, 2);
    part_ = 0;
    to_ += ONE;
    if (++step_ < steps_) return;
    to_ += (STEPS - steps_) * ONE;
    step_ = 0;
    row_++;
  }

  alignas(64) uint8_t found_[8][64];
  alignas(64) float scale_[PLANES][16], zero_[16];
  Levels levels_;
  const Job& job_;
  const Place place_;
  char* to_;
  int64_t steps_, ahead_, groups_ahead_, credit_ = 0, row_ = 0, step_ = 0;
  int part_ = 0;
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

// sums[2][2] += two row tiles of x times two of w, from `first` anew. Meanwhile the next of w are dequantized.
LQ_INLINE void multiply(const char* x, const char* w, int64_t steps, bool first, char* sums, Dequantizer& next, int64_t slots) {
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
    _tile_loadd(2, sums + 2 * ONE, 64);
    _tile_loadd(3, sums + 3 * ONE, 64);
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
  _tile_stored(2, sums + 2 * ONE, 64);
  _tile_stored(3, sums + 3 * ONE, 64);
}

// The row tiles of w from `begin` to `end` times the `rows` of x from `row` on, which are arranged at x.
// w: [2][2 row tiles][step], sums: [pair of row tiles of w][pair of row tiles of x][2][2].
inline void work(const Job& job, int64_t row, int64_t rows, const char* x, int64_t begin, int64_t end, char* w, char* sums) {
  const int64_t chunks = (job.k + 31) / 32, pairs = round_up(rows, 32) / 32;
  Place now = Place::block(begin, end);
  Dequantizer first(job, now, w);
  for (int64_t i = first.size(); now.there() && i > 0; i--) first.one();
  for (int64_t steps = first.steps(), turn = 1; now.there(); turn ^= 1) {
    const Place after = now.after(chunks, end);
    Dequantizer next(job, after, w + turn * PAIR);
    const bool whole = now.from + STEPS >= chunks;
    for (int64_t pair = 0; pair < pairs; pair++) {
      char* to = sums + (now.t / 2 * pairs + pair) * 4 * ONE;
      multiply(x + now.from / STEPS * pairs * PAIR + pair * PAIR, w + (turn ^ 1) * PAIR, steps, now.from == 0, to, next,
               pairs * steps);
      for (int64_t r = 0; whole && r < 32 && pair * 32 + r < rows; r++)
        for (int64_t t = 0; t < 2 && now.t + t < now.count; t++)
          write_row(job, row + pair * 32 + r, (now.start + now.t + t) * 16,
                    floats(reinterpret_cast<float*>(to + (r / 16 * 2 + t) * ONE + r % 16 * 64)));
    }
    now = after;
    steps = next.steps();
  }
}

inline int run(const Job& job, int threads) {
  const int64_t m = job.m, k = job.k;
  static thread_local Room room;
  const int64_t most = m < CHUNK ? round_up(m, 32) : CHUNK, own = 2 * PAIR + most / 16 * BLOCK * ONE;
  const int64_t of_x = (k + PANEL - 1) / PANEL * (most / 32) * PAIR;
  char* memory = static_cast<char*>(room.of(of_x + threads * own));
  if (!memory) return 1;
#pragma omp parallel num_threads(threads)
  {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    const Tiles tiles(config);
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads(), pairs = (job.row_tiles() + 1) / 2;
    const int64_t begin = pairs * id / team * 2, end = id + 1 == team ? job.row_tiles() : pairs * (id + 1) / team * 2;
    char* w = memory + of_x + id * own;
    for (int64_t row = 0; row < m; row += most) {
      const int64_t rows = m - row < most ? m - row : most, tall = round_up(rows, 32) / 16;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < tall; r++) arrange(job, row + r * 16, tall * STEPS * ONE, memory + r * STEPS * ONE);
      work(job, row, rows, memory, begin, end, w, w + 2 * PAIR);
#pragma omp barrier
    }
  }
  return 0;
}
