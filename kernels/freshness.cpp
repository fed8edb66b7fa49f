// The first tensor whose address or version counter is not as it was noted, or -1: the loop of lqcompile/freshness.py.
// A tensor is an at::Tensor*, which is what libtorch's C interface calls an AtenTensorHandle.
#include <cstdint>

extern "C" {

// at::TensorBase::_version() const, by its mangled name: its header would take 20 seconds to compile.
int64_t _ZNK2at10TensorBase8_versionEv(const void* tensor);
int32_t aoti_torch_get_data_ptr(void* tensor, void** pointer);

int64_t lq_first_changed(int64_t n, void** tensors, void** pointers, int64_t* versions) {
  for (int64_t i = 0; i < n; i++) {
    void* pointer = nullptr;
    if (aoti_torch_get_data_ptr(tensors[i], &pointer) != 0 || pointer != pointers[i]) return i;
    if (_ZNK2at10TensorBase8_versionEv(tensors[i]) != versions[i]) return i;
  }
  return -1;
}
}
