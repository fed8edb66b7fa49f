// Batches by tiles of the CPU: 16 rows of x times 16 rows of w, four columns for each int32 that is added to.
#if LQ_AMX

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// This thread's tiles, as another library may have set them up, are put back at the end.
class Tiles {
 public:
  // `tall` rows of x; `columns` of x and w in a step.
  Tiles(int tall, int columns) {
    _tile_storeconfig(&before_);
    TileConfig config;
    for (int i = 0; i < 8; i++) {
      const bool of_x = D == 2 ? i == 4 || i == 5 : i == 6, of_w = D == 2 ? i > 5 : i == 7;
      config.row_bytes[i] = of_x ? columns : 64;
      config.rows[i] = of_w ? columns / 4 : tall;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// dots[2 row tiles of w][D][16 rows of x][16] over `steps` halves of a tile of columns; `x` at the first digit.
LQ_INLINE void products(const int8_t* x, int64_t tall, const uint8_t* w, int steps, int32_t* dots) {
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
  _tile_stored(4, dots + 1024, 64);
  _tile_stored(5, dots + 1280, 64);
#endif
  _tile_stored(0, dots, 64);
  _tile_stored(1, dots + 256, 64);
  _tile_stored(2, dots + 512, 64);
  _tile_stored(3, dots + 768, 64);
}

// The row tile `first` of both halves of w, for all rows of the chunk of x that begins at `start`.
inline void pair(const Job& job, const Digits& x, int64_t start, int64_t first) {
  alignas(64) float y[2][CHUNK_ROWS][16];
  alignas(64) uint8_t w[2][2048];
  alignas(64) int32_t dots[2 * D * 256];
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1;
  const int64_t second = first + job.part(2), row_tile[2] = {first, second < last ? second : last};
  for (int half = 0; half < 2; half++) std::memset(y[half], 0, x.rows * 64);
  for (int64_t tile = 0; tile < tiles; tile++) {
    for (int p = 0; p < PLANES; p++) {
      for (int half = 0; half < 2; half++) {
        const uint8_t* at = job.codes + (row_tile[half] * tiles + tile) * TILE + 256 * p;
        for (int c = 0; c < 4; c++) {
          Ints codes[8];
          for (int line = 0; line < BITS; line++)
            _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD + 64 * (BITS * c + line)), _MM_HINT_T0);
          codes_of<BITS>(at, c, codes);
          for (int i = 0; i < 8; i++) store(w[half] + 512 * c + 64 * i, codes[i]);
        }
      }
      for (int c = 0; c < 4; c += PER) {
        const int64_t block = (tile * 4 + c) / PER;
        const Factors factors[2] = {Factors(job, job.group(row_tile[0], block), p, 0),
                                    Factors(job, job.group(row_tile[1], block), p, 0)};
        for (int64_t row = 0; row < x.rows; row += 16) {
          products(x.digits + x.place(tile, row, 0) + x.chunk(c), x.tall, w[0] + 512 * c, PER == 4 ? 2 : 1, dots);
          const int rows = static_cast<int>(x.rows - row < 16 ? x.rows - row : 16);
          for (int r = 0; r < rows; r++) {
            const float* fact = x.fact(block, row + r);
            for (int half = 0; half < 2; half++) {
              Ints sums[D];
              for (int d = 0; d < D; d++) sums[d] = ints(dots + (half * D + d) * 256 + r * 16);
              Floats to = floats(y[half][row + r]);
              if (LQ_BINARY && p == 0 && job.zero) to = factors[half].offset(to, fact);
              store(y[half][row + r], factors[half].scaled(to, sums, fact));
            }
          }
        }
      }
    }
  }
  for (int64_t row = 0; row < x.rows; row++)
    for (int half = 0; half < (second <= last ? 2 : 1); half++)
      write_row(job, start + row, row_tile[half] * 16, floats(y[half][row]));
}

// All of w for one chunk of x, shared among the threads of a parallel region.
inline void batch(const Job& job, const Digits& x, int64_t start) {
  const Tiles tiles(static_cast<int>(x.tall), PER == 1 ? 32 : 64);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < job.part(2); first++) pair(job, x, start, first);
}

#endif
