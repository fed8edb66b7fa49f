// The first tensor whose address or version counter is not as it was noted, or -1: the loop of lqcompile/freshness.py.
// A tensor is an at::Tensor*, which is what libtorch's C interface calls an AtenTensorHandle.
#include <cstdint>

extern "C" int64_t lq_first_changed(int64_t n, void** tensors, void** pointers, int64_t* versions,
                                    int64_t (*version_of)(const void* tensor), int32_t (*address_of)(void* tensor, void** pointer)) {
  for (int64_t i = 0; i < n; i++) {
    void* pointer = nullptr;
    if (address_of(tensors[i], &pointer) != 0 || pointer != pointers[i]) return i;
    if (version_of(tensors[i]) != versions[i]) return i;
  }
  return -1;
}
