// Batches by tiles of the CPU: 16 rows of x times 16 rows of w, four columns for each int32 that is added to.
#if LQ_AMX

#include "tiles.h"

// `tall` rows of x; `columns` of x and w in a step.
inline TileConfig config_of(int tall, int columns) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    const bool of_x = D == 2 ? i == 4 || i == 5 : i == 6, of_w = D == 2 ? i > 5 : i == 7;
    config.row_bytes[i] = of_x ? columns : 64;
    config.rows[i] = of_w ? columns / 4 : tall;
  }
  return config;
}

// Leaves in tiles the dots of 16 rows of x with both row tiles of w over `steps` halves of a tile of columns; `x` at its
// first digit.
LQ_INLINE void multiply(const int8_t* x, int64_t tall, const uint8_t* w, int steps) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#if LQ_DIGITS == 2
  for (int step = 0; step < steps; step++, x += 64 * tall, w += 1024) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, x + 128 * tall, 64);
    _tile_dpbsud(1, 5, 6);
    _tile_loadd(7, w + 2048, 64);
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(3, 5, 7);
  }
#else
  _tile_zero(4);
  _tile_zero(5);
  for (int step = 0; step < steps; step++, x += 64 * tall, w += 1024) {
    _tile_loadd(7, w, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbsud(0, 6, 7);
    _tile_loadd(6, x + 128 * tall, 64);
    _tile_dpbsud(1, 6, 7);
    _tile_loadd(6, x + 256 * tall, 64);
    _tile_dpbsud(2, 6, 7);
    _tile_loadd(7, w + 2048, 64);
    _tile_dpbsud(5, 6, 7);
    _tile_loadd(6, x, 64);
    _tile_dpbsud(3, 6, 7);
    _tile_loadd(6, x + 128 * tall, 64);
    _tile_dpbsud(4, 6, 7);
  }
#endif
}

// dots[2 row tiles of w][D][16 rows of x][16], from the tiles.
LQ_INLINE void put(int32_t* dots) {
  _tile_stored(0, dots, 64);
  _tile_stored(1, dots + 256, 64);
  _tile_stored(2, dots + 512, 64);
  _tile_stored(3, dots + 768, 64);
#if LQ_DIGITS == 3
  _tile_stored(4, dots + 1024, 64);
  _tile_stored(5, dots + 1280, 64);
#endif
}

// Row tiles of w for which x is read at a time, pair by pair: the second pair finds x in the first cache.
constexpr int ABREAST = 4;

// What is multiplied but not yet scaled and added: dots of 16 rows of x from `row` on with a pair of row tiles in a block.
struct Pending {
  int64_t row, block, group;
  int p, pair;
};

// The codes of plane p of a tile, a byte each, as `multiply` wants them.
LQ_INLINE void unpack(const uint8_t* plane, uint8_t* w) {
#pragma GCC unroll 1
  for (int c = 0; c < 4; c++) {
    Ints codes[8];
    for (int line = 0; line < BITS; line++) ask(plane + 64 * (BITS * c + line));
    codes_of<BITS>(plane, c, codes);
    for (int i = 0; i < 8; i++) store(w + 512 * c + 64 * i, codes[i]);
  }
}

// The row tiles `first` of each of ABREAST parts of w, for all rows of the chunk of x that begins at `start`. While tiles
// multiply, the next codes are unpacked and the last dots scaled.
inline void abreast(const Job& job, const Digits& x, int64_t start, int64_t first) {
  alignas(64) float y[CHUNK_ROWS][ABREAST][16];
  alignas(64) uint8_t w[2][ABREAST][2048];
  alignas(64) int32_t dots[2 * D * 256];
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1, part_of = job.part(ABREAST);
  const uint8_t* planes[ABREAST];
  int64_t factors[ABREAST];
  std::memset(y, 0, x.rows * sizeof y[0]);
  for (int s = 0; s < ABREAST; s++) {
    const int64_t row_tile = first + s * part_of < last ? first + s * part_of : last;
    planes[s] = job.codes + row_tile * tiles * TILE;
    factors[s] = row_tile * job.groups;
    unpack(planes[s], w[0][s]);
  }
  auto finish = [&](const Pending& found) {
    const int s = 2 * found.pair;
    const Factors by[2] = {Factors(job, factors[s] + found.group, found.p, 0),
                           Factors(job, factors[s + 1] + found.group, found.p, 0)};
    const int rows = static_cast<int>(x.rows - found.row < 16 ? x.rows - found.row : 16);
    for (int r = 0; r < rows; r++) {
      const float* fact = x.fact(found.block, found.row + r);
      for (int half = 0; half < 2; half++) {
        Ints sums[D];
        for (int d = 0; d < D; d++) sums[d] = ints(dots + (half * D + d) * 256 + r * 16);
        Floats to = floats(y[found.row + r][s + half]);
        if (LQ_BINARY && found.p == 0 && job.zero) to = by[half].offset(to, fact);
        store(y[found.row + r][s + half], by[half].scaled(to, sums, fact));
      }
    }
  };
  Pending pending{-1, 0, 0, 0, 0};
  int now = 0;
  for (int64_t tile = 0, group = 0, in_group = 0; tile < tiles; tile++) {
    for (int64_t at : factors) job.ask_factors(at + group);
    for (int p = 0; p < PLANES; p++, now ^= 1) {
      const bool more = p + 1 < PLANES || tile + 1 < tiles;
      for (int c = 0; c < 4; c += PER) {
        for (int64_t row = 0; row < x.rows; row += 16) {
          const int8_t* digits = x.digits + x.place(tile, row, 0) + x.chunk(c);
          for (int pair = 0; pair < ABREAST / 2; pair++) {
            multiply(digits, x.tall, w[now][2 * pair] + 512 * c, PER == 4 ? 2 : 1);
            if (more && c + row == 0)
              for (int s = 2 * pair; s < 2 * pair + 2; s++)
                unpack(planes[s] + (tile * PLANES + p + 1) * 256 * BITS, w[now ^ 1][s]);
            // Before these tiles are stored: no load of `dots` waits for their end.
            if (pending.row >= 0) finish(pending);
            put(dots);
            pending = {row, tile * (4 / PER) + c / PER, group + c / PER, p, pair};
          }
        }
      }
    }
    if (PER < 4) {
      group += 4 / PER;
    } else if (++in_group == job.span) {
      group++;
      in_group = 0;
    }
  }
  finish(pending);
  for (int64_t row = 0; row < x.rows; row++)
    for (int s = 0; s < ABREAST && first + s * part_of <= last; s++)
      write_row(job, start + row, (first + s * part_of) * 16, floats(y[row][s]));
}

// All of w for one chunk of x, shared among the threads of a parallel region.
inline void batch(const Job& job, const Digits& x, int64_t start) {
  const Tiles tiles(config_of(static_cast<int>(x.tall), PER == 1 ? 32 : 64));
#pragma omp for schedule(static)
  for (int64_t first = 0; first < job.part(ABREAST); first++) abreast(job, x, start, first);
}

#endif
