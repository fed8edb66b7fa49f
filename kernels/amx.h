// Batches by tiles of the CPU: 16 rows of x times 16 rows of w, four columns for each int32 that is added to.
#if LQ_AMX

#include <type_traits>

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

LQ_INLINE void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#if LQ_DIGITS == 3
  _tile_zero(4);
  _tile_zero(5);
#endif
}

template <int I> using Slot = std::integral_constant<int, I>;

// Leaves in tiles the dots of 16 rows of x with both row tiles of w over a half of a tile of columns; `x` at its first
// digit. After each product, 2 D in all, comes something else to do meanwhile: other(i, FIRST + ...).
template <int FIRST, class Else> LQ_INLINE void multiply(const int8_t* x, int64_t tall, const uint8_t* w, Else&& other) {
#if LQ_DIGITS == 2
  _tile_loadd(6, w, 64);
  _tile_loadd(4, x, 64);
  _tile_dpbssd(0, 4, 6);
  other(Slot<FIRST>());
  _tile_loadd(5, x + 128 * tall, 64);
  _tile_dpbssd(1, 5, 6);
  other(Slot<FIRST + 1>());
  _tile_loadd(7, w + 2048, 64);
  _tile_dpbssd(2, 4, 7);
  other(Slot<FIRST + 2>());
  _tile_dpbssd(3, 5, 7);
  other(Slot<FIRST + 3>());
#else
  _tile_loadd(7, w, 64);
  _tile_loadd(6, x, 64);
  _tile_dpbssd(0, 6, 7);
  other(Slot<FIRST>());
  _tile_loadd(6, x + 128 * tall, 64);
  _tile_dpbssd(1, 6, 7);
  other(Slot<FIRST + 1>());
  _tile_loadd(6, x + 256 * tall, 64);
  _tile_dpbssd(2, 6, 7);
  other(Slot<FIRST + 2>());
  _tile_loadd(7, w + 2048, 64);
  _tile_dpbssd(5, 6, 7);
  other(Slot<FIRST + 3>());
  _tile_loadd(6, x, 64);
  _tile_dpbssd(3, 6, 7);
  other(Slot<FIRST + 4>());
  _tile_loadd(6, x + 128 * tall, 64);
  _tile_dpbssd(4, 6, 7);
  other(Slot<FIRST + 5>());
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
// Halves of a tile of columns that a block has.
constexpr int STEPS = PER == 4 ? 2 : 1, SLOTS = 2 * D * STEPS;

// Row tiles' sums of y: [row of a chunk of x][row tile][16].
using Sums = float[CHUNK_ROWS][ABREAST][16];

// What is multiplied but not yet scaled and added to y: dots of 16 rows of x from `row` on with a pair of row tiles in a
// block, of which `centred` have no zero to take off any more.
class Pending {
 public:
  Pending(const Job& job, const Digits& x, Sums& y, const int32_t* dots) : job_(job), x_(x), y_(y), dots_(dots) {}
  // `groups` are where the factors of the pair stand.
  void set(int64_t row, int64_t block, const int64_t (&groups)[2], int plane, int pair, const bool (&centred)[2]) {
    rows_ = static_cast<int>(x_.rows - row < 16 ? x_.rows - row : 16);
    facts_ = x_.fact(block, row);
    plane_ = plane;
    for (int half = 0; half < 2; half++) {
      groups_[half] = groups[half];
      centred_[half] = LQ_BINARY || centred[half];
      to_[half] = y_[row][2 * pair + half];
    }
    whole_ = rows_ == 16 && centred_[0] && centred_[1] && !offset();
    for (int half = 0; whole_ && half < 2; half++)
      store(scale_[half], numbers(job_.scale, job_.scale_type, (groups[half] * PLANES + plane) * 16));
  }
  // What falls to slot I of some: of whole tiles that are centred a few rows in each, of others all in the last one.
  template <int I> LQ_INLINE void some(Slot<I>) {
    constexpr int EACH = (32 + SLOTS - 1) / SLOTS;
    if (whole_) {
#pragma GCC unroll 8
      for (int i = I * EACH; i < (I + 1) * EACH && i < 32; i++)
        one<true>(i / 16, i % 16, Factors(floats(scale_[i / 16]), floats(0.0f)));
    } else if (I == SLOTS - 1) {
      all();
    }
  }
  void all() {
    for (int half = 0; half < 2; half++) {
      const Factors by(job_, groups_[half], plane_, 0);
      if (!centred_[half]) {
        for (int r = 0; r < rows_; r++) one<false>(half, r, by);
        continue;
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows_; r++) {
        if (offset()) store(place(half, r), by.offset(floats(place(half, r)), fact(r)));
        one<true>(half, r, by);
      }
    }
  }

 private:
  bool offset() const { return LQ_BINARY && plane_ == 0 && job_.zero; }
  LQ_INLINE float* place(int half, int r) const { return to_[half] + r * 16 * ABREAST; }
  LQ_INLINE const float* fact(int r) const { return facts_ + r * (1 + D); }
  template <bool CENTRED> LQ_INLINE void one(int half, int r, const Factors& by) {
    float* to = place(half, r);
    Ints sums[D];
    for (int d = 0; d < D; d++) sums[d] = ints(dots_ + (half * D + d) * 256 + r * 16);
    if (CENTRED) {
      store(to, by.scaled_centred(floats(to), sums, fact(r)));
      return;
    }
    // Bytes of eight bits were counted from 128.
    for (int d = 0; BITS == 8 && d < D; d++) sums[d] = add(sums[d], ints(128 * static_cast<int>(fact(r)[1 + d])));
    store(to, by.scaled(floats(to), sums, fact(r)));
  }

  const Job& job_;
  const Digits& x_;
  Sums& y_;
  const int32_t* dots_;
  const float* facts_ = nullptr;
  float* to_[2] = {};
  int64_t groups_[2] = {};
  bool centred_[2] = {}, whole_ = false;
  int rows_ = 0, plane_ = 0;
  alignas(64) float scale_[2][16] = {};
};

// What the codes of 16 rows are counted from in a block, a byte for each column of four. Signed bytes hold no more.
struct Centre {
  Ints each;
  bool whole = true;

  Centre(const Job& job, int64_t group) : each(bytes(LQ_BINARY ? 1 : static_cast<int>(job.low))) {
    if (LQ_BINARY || !job.zero) return;
    const Floats zero = numbers(job.zero, job.zero_type, group * 16);
    const Ints near = nearest(zero);
    const __mmask16 same = _mm512_cmp_ps_mask(to_floats(near), zero, _CMP_EQ_OQ);
    whole = same == 0xffff && (BITS < 8 ? _mm512_cmp_epu32_mask(near, ints(1 << BITS), _MM_CMPINT_LT) == 0xffff
                                        : _mm512_cmpeq_epi32_mask(near, ints(128)) == 0xffff);
    each = whole ? _mm512_shuffle_epi8(near, spread()) : bytes(BITS < 8 ? 0 : 128);
  }
  // The low byte of each number, four times.
  static Ints spread() { return _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)); }
};

// The codes of plane p of a tile whose first block has factors at `group`, a signed byte each, as `multiply` wants them.
// The bits of what is returned say which of the tile's blocks are centred.
LQ_INLINE int unpack(const Job& job, const uint8_t* plane, int64_t group, uint8_t* w) {
  int centred = 0;
#pragma GCC unroll 1
  for (int from = 0; from < 4; from += PER) {
    const Centre centre(job, group + from / PER);
    centred |= centre.whole << from;
#pragma GCC unroll 1
    for (int c = from; c < from + PER; c++) {
      Ints codes[8];
      for (int line = 0; line < BITS; line++) ask(plane + 64 * (BITS * c + line));
      codes_of<BITS>(plane, c, codes);
      for (int i = 0; i < 8; i++)
        store(w + 512 * c + 64 * i, _mm512_sub_epi8(LQ_BINARY ? add(codes[i], codes[i]) : codes[i], centre.each));
    }
  }
  return centred;
}

// ABREAST row tiles of w, `step` apart from `first` on, for all rows of the chunk of x that begins at `start`. While tiles
// multiply, the next codes are unpacked and the last dots scaled.
inline void abreast(const Job& job, const Digits& x, int64_t start, int64_t first, int64_t step) {
  alignas(64) Sums y;
  alignas(64) uint8_t w[2][ABREAST][2048];
  alignas(64) int32_t dots[2 * D * 256];
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1;
  const uint8_t* planes[ABREAST];
  int64_t factors[ABREAST];
  int centred[2][ABREAST];
  std::memset(y, 0, x.rows * sizeof y[0]);
  for (int s = 0; s < ABREAST; s++) {
    const int64_t row_tile = first + s * step < last ? first + s * step : last;
    planes[s] = job.codes + row_tile * tiles * TILE;
    factors[s] = row_tile * job.groups;
    centred[0][s] = unpack(job, planes[s], factors[s], w[0][s]);
  }
  Pending pending(job, x, y, dots);
  int now = 0;
  for (int64_t tile = 0, group = 0, in_group = 0; tile < tiles; tile++) {
    for (int64_t at : factors) job.ask_factors(at + group);
    // Where the factors of the next tile stand.
    const int64_t after = PER < 4 ? group + 4 / PER : group + (in_group + 1 == job.span);
    for (int p = 0; p < PLANES; p++, now ^= 1) {
      const bool more = p + 1 < PLANES || tile + 1 < tiles;
      for (int c = 0; c < 4; c += PER) {
        for (int64_t row = 0; row < x.rows; row += 16) {
          const int8_t* digits = x.digits + x.place(tile, row, 0) + x.chunk(c);
          for (int pair = 0; pair < ABREAST / 2; pair++) {
            // Before these tiles are stored: no load of `dots` waits for their end.
            const uint8_t* codes = w[now][2 * pair] + 512 * c;
            zero();
            multiply<0>(digits, x.tall, codes, [&](auto slot) { pending.some(slot); });
            if constexpr (STEPS == 2)
              multiply<2 * D>(digits + 64 * x.tall, x.tall, codes + 1024, [&](auto slot) { pending.some(slot); });
            if (more && c + row == 0) {
              for (int s = 2 * pair; s < 2 * pair + 2; s++)
                centred[now ^ 1][s] = unpack(job, planes[s] + (tile * PLANES + p + 1) * 256 * BITS,
                                             factors[s] + (p + 1 < PLANES ? group : after), w[now ^ 1][s]);
            }
            put(dots);
            const int s = 2 * pair;
            const int64_t groups[2] = {factors[s] + group + c / PER, factors[s + 1] + group + c / PER};
            const bool whole[2] = {(centred[now][s] >> c & 1) != 0, (centred[now][s + 1] >> c & 1) != 0};
            pending.set(row, tile * (4 / PER) + c / PER, groups, p, pair, whole);
          }
        }
      }
    }
    in_group = PER < 4 || in_group + 1 == job.span ? 0 : in_group + 1;
    group = after;
  }
  pending.all();
  for (int64_t row = 0; row < x.rows; row++)
    for (int s = 0; s < ABREAST && first + s * step <= last; s++)
      write_row(job, start + row, (first + s * step) * 16, floats(y[row][s]));
}

// From so many rows on reading w takes no longer than the rest, and neighbours in y are better written together.
constexpr int64_t TALL = 64;

// All of w for one chunk of x, shared among the threads of a parallel region.
inline void batch(const Job& job, const Digits& x, int64_t start) {
  const Tiles tiles(config_of(static_cast<int>(x.tall), PER == 1 ? 32 : 64));
#pragma omp for schedule(static)
  for (int64_t first = 0; first < job.part(ABREAST); first++)
    x.rows < TALL ? abreast(job, x, start, first, job.part(ABREAST)) : abreast(job, x, start, first * ABREAST, 1);
}

#endif
