// Few rows of x by look-ups: for every four columns the 16 sums of +-x that four bits of a plane can ask for, which
// vpermb finds 64 at a time. A sum of four values of 22 bits has 24: three bytes, in three tables.
#if LQ_TABLES

// Bytes of a row's tables for a tile: [8 times 16 columns][3 bytes][4 quads][16 keys].
constexpr int64_t TABLES = 8 * 192;
// Rows of x that are looked up at a time; more are faster by the tiles of a CPU that has them.
constexpr int64_t MOST_ROWS = 4;

// The tables of a tile, from the digits of a row of x.
inline void tables_of(const Digits& x, int64_t tile, int64_t row, uint8_t* tables) {
  const __mmask16 negative[4] = {0x5555, 0x3333, 0x0f0f, 0x00ff};
  for (int sixteen = 0; sixteen < 8; sixteen++, tables += 192) {
    Ints values = ints(0);
    for (int d = D - 1; d >= 0; d--) {
      const int8_t* at = x.digits + x.place(tile, row, d) + sixteen / 4 * 64 * x.tall + sixteen % 4 * 16;
      values = add(left<8>(values), _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
    }
    alignas(64) int32_t value[16];
    store(value, values);
    for (int quad = 0; quad < 4; quad++) {
      Ints sums = ints(0);
      for (int t = 0; t < 4; t++) {
        // Transposed, as digits.h leaves them.
        const Ints v = ints(value[4 * t + quad]);
        sums = _mm512_mask_sub_epi32(add(sums, v), negative[t], sums, v);
      }
      for (int byte = 0; byte < 3; byte++, sums = right<8>(sums))
        store_low(reinterpret_cast<int8_t*>(tables + 64 * byte + 16 * quad), sums);
    }
  }
}

// The row tiles `first` of each of TABLE_STREAMS parts of w, for the R rows of x from `row` on; tables[tile][R].
constexpr int TABLE_STREAMS = 4;
template <int R> void look_up(const Job& job, const Digits& x, int64_t row, int64_t first, const uint8_t* tables) {
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1, part_of = job.part(TABLE_STREAMS);
  const Ints low_nibbles = bytes(15), quads = ints(0x30201000), ones = bytes(1);
  Floats y[TABLE_STREAMS][R];
  const uint8_t* codes[TABLE_STREAMS];
  int64_t factors[TABLE_STREAMS];
  for (int s = 0; s < TABLE_STREAMS; s++) {
    const int64_t row_tile = first + s * part_of < last ? first + s * part_of : last;
    codes[s] = job.codes + row_tile * tiles * TILE;
    factors[s] = row_tile * job.groups;
    for (auto& v : y[s]) v = floats(0.0f);
  }
  for (int64_t tile = 0, group = 0, in_group = 0; tile < tiles; tile++, tables += R * TABLES) {
    for (int s = 0; s < TABLE_STREAMS; s++) {
      job.ask_factors(factors[s] + group);
      for (int p = 0; p < PLANES; p++, codes[s] += 256) {
        for (int c = 0; c < 4; c += PER) {
          Ints sums[R][2][3] = {};
#pragma GCC unroll 4
          for (int line = c; line < c + PER; line++) {
            const Ints keys = ints(codes[s] + 64 * line);
            ask(codes[s] + 64 * line);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
              const Ints at = either(both(half ? right16<4>(keys) : keys, low_nibbles), quads);
#pragma GCC unroll 4
              for (int r = 0; r < R; r++) {
                const uint8_t* table = tables + r * TABLES + (2 * line + half) * 192;
                Ints* sum = sums[r][half];
                sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_permutexvar_epi8(at, ints(table)), ones);
                sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_permutexvar_epi8(at, ints(table + 64)), ones);
                sum[2] = _mm512_dpbusd_epi32(sum[2], ones, _mm512_permutexvar_epi8(at, ints(table + 128)));
              }
            }
          }
          const Factors found(job, factors[s] + group + c / PER, p, 0);
          for (int r = 0; r < R; r++) {
            Ints sum = add(sums[r][0][2], sums[r][1][2]);
            for (int byte = 1; byte >= 0; byte--) sum = add(left<8>(sum), add(sums[r][0][byte], sums[r][1][byte]));
            const float* fact = x.fact(tile * (4 / PER) + c / PER, r);
            if (p == 0 && job.zero) y[s][r] = found.offset(y[s][r], fact);
            y[s][r] = fma(mul(to_floats(sum), found.scale), floats(fact[0]), y[s][r]);
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
  for (int s = 0; s < TABLE_STREAMS && first + s * part_of <= last; s++)
    for (int r = 0; r < R; r++) write_row(job, row + r, (first + s * part_of) * 16, y[s][r]);
}

// All of w for the rows of a chunk of x, shared among the threads of a parallel region.
inline void look_up(const Job& job, const Digits& x, int64_t start, uint8_t* tables) {
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < job.tiles(); tile++)
    for (int64_t r = 0; r < x.rows; r++) tables_of(x, tile, r, tables + (tile * x.rows + r) * TABLES);
#pragma omp for schedule(static)
  for (int64_t first = 0; first < job.part(TABLE_STREAMS); first++) {
    if (x.rows == 1) look_up<1>(job, x, start, first, tables);
    if (x.rows == 2) look_up<2>(job, x, start, first, tables);
    if (x.rows == 3) look_up<3>(job, x, start, first, tables);
    if (x.rows == 4) look_up<4>(job, x, start, first, tables);
  }
}

#endif
