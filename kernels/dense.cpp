// The dense weight of affine and table weights: w[n, k] = (code - zero) * scale or table[code] * scale, rounded once.
#include "lanes.h"
#include "codes.h"

constexpr int BITS = LQ_BITS;

// `table` of 2^BITS float32 for each row (stride row_table) and group (stride group_table), else null. `groups` as
// stored of a row tile, each of `group` columns; `low` the zero where there are none.
extern "C" int lq_dense(const uint8_t* codes, const void* scale, const void* zero, const float* table, void* out, int64_t n,
                        int64_t k, int64_t group, int64_t groups, int64_t row_table, int64_t group_table, int out_type,
                        int scale_type, int zero_type, float low, int threads) {
  const int64_t tiles = (k + 127) / 128;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row_tile = 0; row_tile < (n + 15) / 16; row_tile++) {
    for (int64_t column = 0; column < k; column += 32) {
      const uint8_t* tile = codes + (row_tile * tiles + column / 128) * 256 * BITS;
      alignas(64) uint8_t unpacked[8][16][4];
      for (int part = 0; part < PARTS; part++) {
        Ints found[8];
        codes_of<BITS>(tile + part * 4 * LANES, static_cast<int>(column % 128 / 32), found);
        for (int i = 0; i < 8; i++) store(unpacked[i][part * LANES], found[i]);
      }
      for (int row = 0; row < 16 && row_tile * 16 + row < n; row++) {
        alignas(64) uint8_t code[32];
        for (int i = 0; i < 8; i++) std::memcpy(code + 4 * i, unpacked[i][row], 4);
        for (int from = 0; from < 32 && column + from < k;) {
          // As many columns as share a group.
          const int64_t g = (column + from) / group, left = (g + 1) * group - column - from;
          const int end = left < 32 - from ? from + static_cast<int>(left) : 32;
          const int64_t place = (row_tile * groups + g) * 16;
          alignas(64) float scales[16], zeros[16];
          for (int part = 0; part < 16; part += LANES) {
            store(scales + part, numbers(scale, scale_type, place + part));
            if (zero) store(zeros + part, numbers(zero, zero_type, place + part));
          }
          const Floats by = floats(scales[row]), centre = floats(zero ? zeros[row] : low);
          const float* values = table ? table + (row_tile * 16 + row) * row_table + g * group_table : nullptr;
          for (int i = from; i < end; i += LANES) {
            alignas(64) uint8_t some[16] = {};
            std::memcpy(some, code + i, end - i < LANES ? end - i : LANES);
            const Ints wide = widened(some);
            const Floats w = values ? mul(gathered(values, wide), by) : affine(to_floats(wide), centre, by);
            const int64_t in_row = k - column - i, count = end - i < LANES ? end - i : LANES;
            write(out, out_type, (row_tile * 16 + row) * k + column + i, w, count < in_row ? count : in_row);
          }
          from = end;
        }
      }
    }
  }
  return 0;
}
