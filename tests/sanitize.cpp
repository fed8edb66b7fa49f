// A main program for the sanitizers, after the text of a kernel: one call on buffers of exactly their sizes.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

namespace {
uint32_t state = 12345;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

char* filled(int64_t size, int item) {
  char* at = static_cast<char*>(std::malloc(size ? size : 1));
  for (int64_t i = 0; i < size; i++) at[i] = static_cast<char>(next() >> 24);
  // Small positive numbers of any floating type: the top byte is that of 1.x or less.
  for (int64_t i = item - 1; item && i < size; i += item) at[i] = 0x3c;
  return at;
}
}  // namespace

// m, n, k, span, groups, types of x and scale and zero, low, bytes of an x, of codes, scales and zeros; of the table
// numbers, levels and strides.
int main(int count, char** text) {
  if (count != 18) return 2;
  // Linux saves the tiles only of processes that have asked.
  if (LQ_AMX && syscall(SYS_arch_prctl, 0x1023, 18)) return 4;
  int64_t v[17];
  for (int i = 0; i < 17; i++) v[i] = static_cast<int64_t>(std::atof(text[i + 1]));
  const int64_t m = v[0], n = v[1], k = v[2], item = v[9];
  char *x = filled(m * k * item, item), *codes = filled(v[10], 0), *bias = filled(n * item, item);
  char* scale = filled(v[11], v[6] == FLOAT32 ? 4 : 2);
  char* zero = v[12] ? filled(v[12], v[7] == INT16 ? 0 : v[7] == FLOAT32 ? 4 : 2) : nullptr;
  char* table = v[13] ? filled(v[13] * 4, 4) : nullptr;
  char* y = static_cast<char*>(std::malloc(m * n * item));
  for (int threads = 1; threads < 3; threads++) {
    if (lq_gemm(x, reinterpret_cast<uint8_t*>(codes), scale, zero, reinterpret_cast<float*>(table), bias, y, m,
                n, k, v[3], v[4], v[5], v[6], v[7],
                static_cast<float>(v[8]), v[14], v[15], v[16], threads))
      return 3;
  }
  std::puts("done");
  char* all[] = {x, codes, bias, scale, zero, table, y};
  for (char* p : all) std::free(p);
}
