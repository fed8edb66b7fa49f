// x as fixed point: by blocks of `block` inputs x is scale * (... digit[1] * 256 + digit[0]), digits of 8 signed bits.
//
// A scale is a power of two, as small as its block's largest |x| allows: what x has few bits of stays exact, and dots
// of digits with codes are whole numbers, the same whatever instructions and threads make them.

// Digits of a chunk of rows, and the facts of their blocks.
//   digits  [k / 128][rows / 16][D][2][row % 16][64], rows of a last tile that are not there left out
//   facts   [k / block][rows][1 + D]: the scale, and the sum of each digit
struct Digits {
  int8_t* digits;
  float* facts;
  int64_t rows, tall;
  int count;

  int64_t place(int64_t tile, int64_t row, int digit) const {
    return ((tile * ((rows + 15) / 16) + row / 16) * count + digit) * 128 * tall + row % 16 * 64;
  }
  // Columns 32 c on of a tile stand so far from its first.
  int64_t chunk(int c) const { return c / 2 * 64 * tall + c % 2 * 32; }
  const float* fact(int64_t block, int64_t row) const { return facts + (block * rows + row) * (1 + count); }
};

LQ_INLINE int64_t bytes_of_digits(int64_t rows, int64_t k, int count) {
  return round_up(k, 128) * round_up(rows, rows < 16 ? 1 : 16) * count;
}

// 128 inputs of a row from `k0` on, zeros beyond k, as float32.
LQ_INLINE void widen(const void* x, int type, int64_t row, int64_t k, int64_t k0, float* out) {
  const int size = type == FLOAT32 ? 4 : 2;
  const char* from = static_cast<const char*>(x) + (row * k + k0) * size;
  alignas(64) char tail[512];
  if (k - k0 < 128) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, (k - k0) * size);
    from = tail;
  }
  for (int i = 0; i < 128; i += LANES) store(out + i, numbers(from, type, i));
}

LQ_INLINE float power_of_two(int e) {
  uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// e with largest * 2^e the greatest that D digits hold; `largest` by its bits, NaN and infinity above all others.
template <int D> LQ_INLINE int exponent_of(uint32_t largest) {
  // Four values of a look-up table's sum must fit 24 bits.
  constexpr float MOST = D == 2 ? 32639.0f : LQ_QUADS ? 2097151.0f : 8355711.0f;
  const int e = (D == 2 ? 14 : LQ_QUADS ? 20 : 22) - (static_cast<int>(largest >> 23) - 127);
  if (e > 120) return 120;
  float v;
  std::memcpy(&v, &largest, 4);
  return v * power_of_two(e) > MOST ? e - 1 : e;
}

template <int D>
LQ_INLINE void digits_of_row(const Digits& to, const void* x, int type, int64_t from, int64_t row, int64_t k, int block) {
  alignas(64) float wide[128];
  alignas(64) uint32_t lanes[LANES];
  for (int64_t tile = 0, b = 0; tile * 128 < k; tile++) {
    widen(x, type, from, k, tile * 128, wide);
    for (int start = 0; start < 128; start += block, b++) {
      Ints largest = ints(0);
      for (int i = 0; i < block; i += LANES)
        largest = most(largest, both(as_ints(floats(wide + start + i)), ints(0x7fffffff)));
      store(lanes, largest);
      uint32_t top = 0;
      for (uint32_t lane : lanes) top = lane > top ? lane : top;
      const bool finite = top < 0x7f800000;
      const int e = finite ? exponent_of<D>(top) : 0;
      const Floats scale = floats(finite ? power_of_two(e) : 0.0f);
      Ints sums[D];
      for (int d = 0; d < D; d++) sums[d] = ints(0);
      for (int i = start; i < start + block; i += LANES) {
        Ints rest = nearest(mul(floats(wide + i), scale));
        for (int d = 0; d < D; d++) {
          const Ints next = right<8>(add(rest, ints(128)));
          const Ints digit = d == D - 1 ? rest : sub(rest, left<8>(next));
          int8_t* digits = to.digits + to.place(tile, row, d) + i / 64 * 64 * to.tall;
          store_low(digits + i % 64, digit);
          sums[d] = add(sums[d], digit);
          rest = next;
        }
      }
      float* fact = to.facts + (b * to.rows + row) * (1 + D);
      const uint32_t nan = 0x7fc00000;
      fact[0] = power_of_two(-e);
      if (!finite) std::memcpy(fact, &nan, 4);
      for (int d = 0; d < D; d++) {
        int32_t sum = 0, each[LANES];
        store(each, sums[d]);
        for (int32_t v : each) sum += v;
        fact[1 + d] = static_cast<float>(sum);
      }
    }
    if (LQ_QUADS) {
      // Each 16 columns of 4 b + t as 4 t + b.
      const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      for (int d = 0; d < D; d++) {
        for (int i = 0; i < 128; i += 16) {
          __m128i* at = reinterpret_cast<__m128i*>(to.digits + to.place(tile, row, d) + i / 64 * 64 * to.tall + i % 64);
          _mm_storeu_si128(at, _mm_shuffle_epi8(_mm_loadu_si128(at), order));
        }
      }
    }
  }
}
