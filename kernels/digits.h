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
  constexpr int BIAS = D == 2 ? 0x8080 : 0x808080;
  for (int64_t tile = 0, b = 0; tile * 128 < k; tile++) {
    widen(x, type, from, k, tile * 128, wide);
    for (int start = 0; start < 128; start += block, b++) {
      Ints largest = ints(0);
      for (int i = 0; i < block; i += LANES)
        largest = most(largest, both(as_ints(floats(wide + start + i)), ints(0x7fffffff)));
      const uint32_t top = most_of(largest);
      const bool finite = top < 0x7f800000;
      const int e = finite ? exponent_of<D>(top) : 0;
      const Floats scale = floats(finite ? power_of_two(e) : 0.0f);
      // Sums of even and of odd digits, two to a number.
      Ints even = ints(0), odd = ints(0);
      for (int i = start; i < start + block; i += LANES) {
        // With 128 added to each digit none borrows from the next; to flip that bit takes it off again.
        const Ints biased = add(nearest(mul(floats(wide + i), scale)), ints(BIAS)), value = differ(biased, ints(BIAS));
        even = add(even, both(biased, ints(0xff00ff)));
        odd = add(odd, both(right<8>(biased), ints(0xff00ff)));
        int8_t* digits = to.digits + to.place(tile, row, 0) + i / 64 * 64 * to.tall + i % 64;
        store_low(digits, value);
        store_low(digits + 128 * to.tall, right<8>(value));
        if constexpr (D == 3) store_low(digits + 256 * to.tall, right<16>(value));
      }
      const uint32_t sums[2] = {static_cast<uint32_t>(sum_of(even)), static_cast<uint32_t>(sum_of(odd))};
      float* fact = to.facts + (b * to.rows + row) * (1 + D);
      const uint32_t nan = 0x7fc00000;
      fact[0] = power_of_two(-e);
      if (!finite) std::memcpy(fact, &nan, 4);
      for (int d = 0; d < D; d++)
        fact[1 + d] = static_cast<float>(static_cast<int>(sums[d % 2] >> d / 2 * 16 & 0xffff) - 128 * block);
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
