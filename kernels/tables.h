// One row of x by look-ups: for every four columns the 16 sums of +-x that four bits of a plane can ask for, which
// vpermb finds 64 at a time. A sum of four values of 22 bits has 24: three bytes, in three tables.
#if LQ_TABLES

// tables[tile][8 times 16 columns][3 bytes][4 quads][16 keys], from the digits of row 0 of x.
inline void tables_of(const Digits& x, int64_t tile, uint8_t* tables) {
  const __mmask16 negative[4] = {0x5555, 0x3333, 0x0f0f, 0x00ff};
  for (int sixteen = 0; sixteen < 8; sixteen++, tables += 192) {
    Ints values = ints(0);
    for (int d = D - 1; d >= 0; d--) {
      const int8_t* at = x.digits + x.place(tile, 0, d) + sixteen / 4 * 64 * x.tall + sixteen % 4 * 16;
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

// The row tiles `first` of each of TABLE_STREAMS parts of w, for a single row of x.
constexpr int TABLE_STREAMS = 4;
inline void look_up(const Job& job, const Digits& x, int64_t row, int64_t first, const uint8_t* tables) {
  const int64_t tiles = job.tiles(), last = job.row_tiles() - 1, part_of = job.part(TABLE_STREAMS);
  const Ints low_nibbles = bytes(15), quads = ints(0x30201000), ones = bytes(1);
  Floats y[TABLE_STREAMS];
  const uint8_t* codes[TABLE_STREAMS];
  int64_t factors[TABLE_STREAMS];
  for (int s = 0; s < TABLE_STREAMS; s++) {
    const int64_t row_tile = first + s * part_of < last ? first + s * part_of : last;
    codes[s] = job.codes + row_tile * tiles * TILE;
    factors[s] = row_tile * job.groups;
    y[s] = floats(0.0f);
  }
  for (int64_t tile = 0, group = 0, in_group = 0; tile < tiles; tile++, tables += 8 * 192) {
    const float* facts = x.fact(tile * (4 / PER), 0);
    for (int s = 0; s < TABLE_STREAMS; s++) {
      job.ask_factors(factors[s] + group);
      for (int p = 0; p < PLANES; p++, codes[s] += 256) {
        for (int c = 0; c < 4; c += PER) {
          Ints sums[2][3] = {};
#pragma GCC unroll 4
          for (int line = c; line < c + PER; line++) {
            const Ints keys = ints(codes[s] + 64 * line);
            ask(codes[s] + 64 * line);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
              const Ints at = either(both(half ? right16<4>(keys) : keys, low_nibbles), quads);
              const uint8_t* table = tables + (2 * line + half) * 192;
              sums[half][0] = _mm512_dpbusd_epi32(sums[half][0], _mm512_permutexvar_epi8(at, ints(table)), ones);
              sums[half][1] = _mm512_dpbusd_epi32(sums[half][1], _mm512_permutexvar_epi8(at, ints(table + 64)), ones);
              sums[half][2] = _mm512_dpbusd_epi32(sums[half][2], ones, _mm512_permutexvar_epi8(at, ints(table + 128)));
            }
          }
          Ints sum = add(sums[0][2], sums[1][2]);
          for (int byte = 1; byte >= 0; byte--) sum = add(left<8>(sum), add(sums[0][byte], sums[1][byte]));
          const Factors found(job, factors[s] + group + c / PER, p, 0);
          const float* fact = facts + c / PER * x.rows * (1 + D);
          if (p == 0 && job.zero) y[s] = found.offset(y[s], fact);
          y[s] = fma(mul(to_floats(sum), found.scale), floats(fact[0]), y[s]);
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
    write_row(job, row, (first + s * part_of) * 16, y[s]);
}

#endif
