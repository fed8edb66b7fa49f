// How fast memory can be read by one kernel, for `lq bench`: the ors of all 64-byte lines of `size` bytes.
#include <cstdint>

#include "lanes.h"

// Four streams for each thread, as the kernels read weights.
extern "C" int64_t lq_light(const uint8_t* p, int64_t size, int threads) {
  const int64_t each = size / 64 / 4 / threads * 64;
  int64_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : all)
  for (int64_t thread = 0; thread < threads; thread++) {
    const uint8_t* from = p + 4 * each * thread;
    Ints found[4] = {ints(0), ints(0), ints(0), ints(0)};
    for (int64_t i = 0; i < each; i += 64) {
      for (int s = 0; s < 4; s++) {
        _mm_prefetch(reinterpret_cast<const char*>(from + s * each + i + AHEAD), _MM_HINT_T0);
        for (int part = 0; part < PARTS; part++)
          found[s] = either(found[s], ints(from + s * each + i + part * 4 * LANES));
      }
    }
    alignas(64) int32_t lanes[LANES];
    store(lanes, either(either(found[0], found[1]), either(found[2], found[3])));
    for (int32_t lane : lanes) all |= lane;
  }
  return all;
}
