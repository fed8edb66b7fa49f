// QUICK on x86-64: affine weights, as one stream of codes that every instruction set reads without a shuffle.
#include "lanes.h"
#include "digits.h"
#include "codes.h"
#include "gemm.h"

extern "C" int lq_gemm(const void* x, const uint8_t* codes, const void* scale, const void* zero, const void* bias, void* y,
                       int64_t m, int64_t n, int64_t k, int64_t span, int64_t groups, int x_type, int scale_type,
                       int zero_type, float low, int threads) {
  const Job job{x, codes, scale, zero, bias, y, m, n, k, span, groups, x_type, scale_type, zero_type, low};
  return run(job, threads);
}
