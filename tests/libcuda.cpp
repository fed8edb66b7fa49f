// A libcuda without a GPU: remembers, for each thread, what it was asked to launch. Structures as in cuda.h of CUDA 13.
#include <cstdint>
#include <cstring>

struct Attribute { int id; char pad[4]; union { char bytes[64]; unsigned dims[3]; int flag; } value; };
struct Config { unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count; };
struct Record { unsigned grid[3], block[3], shared; void *stream; unsigned count; Attribute attributes[2];
                char parameters[256]; void *context; };

static size_t offsets[32], sizes[32], parameters = 0;
static int next_error = 0, largest_shared = 0, modules = 0;
static thread_local void *stack[8];
static thread_local int depth = 0, mode = 0;
static thread_local Record last;

extern "C" {
void lq_parameters(int n, const size_t *at, const size_t *size) {
    parameters = n;
    memcpy(offsets, at, n * sizeof(size_t));
    memcpy(sizes, size, n * sizeof(size_t));
}
void lq_fail_next(int code) { next_error = code; }
int lq_largest_shared() { return largest_shared; }
int lq_modules() { return modules; }
int lq_depth() { return depth; }
int lq_mode() { return mode; }
const Record *lq_last() { return &last; }
size_t lq_record_size() { return sizeof(Record); }

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(0x100000000 + device); return 0; }
int cuCtxGetCurrent(void **context) { *context = depth ? stack[depth - 1] : nullptr; return 0; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = stack[--depth]; return 0; }
int cuThreadExchangeStreamCaptureMode(int *other) { int old = mode; mode = *other; *other = old; return 0; }
int cuModuleLoadData(void **module, const void *) {
    if (mode != 2) return 900;
    modules++;
    *module = (void *)0x200000001;
    return 0;
}
int cuModuleGetFunction(void **function, void *, const char *name) {
    *function = (void *)0x300000001;
    return strcmp(name, "absent") ? 0 : 500;
}
int cuFuncGetAttribute(int *value, int which, void *) { *value = 100 + which; return 0; }
int cuFuncSetAttribute(void *, int which, int value) { largest_shared = which == 8 ? value : -1; return 0; }
int cuFuncGetParamInfo(void *, size_t i, size_t *offset, size_t *size) {
    if (i >= parameters) return 1;
    *offset = offsets[i];
    *size = sizes[i];
    return 0;
}
// A map here is its arguments, one after the other.
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *at, const size_t *sizes, const size_t *strides, const unsigned *box,
                           const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
    if ((size_t)map % 64) return 1;
    const size_t words[16] = {(size_t)type, rank, (size_t)at, sizes[0], sizes[1], strides[0], box[0], box[1],
                              steps[0], steps[1], (size_t)interleave, (size_t)swizzle, (size_t)promotion, (size_t)fill, 0, 0};
    memcpy(map, words, sizeof words);
    return 0;
}
int cuGetErrorName(int code, const char **text) {
    *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : nullptr;
    return *text ? 0 : 1;
}
int cuGetErrorString(int code, const char **text) { *text = code == 1 ? "invalid argument" : nullptr; return 0; }
int cuLaunchKernelEx(const Config *config, void *function, void **values, void **extra) {
    int code = next_error;
    next_error = 0;
    if (code || function != (void *)0x300000001 || extra) return code ? code : 400;
    memcpy(last.grid, config->grid, 12);
    memcpy(last.block, config->block, 12);
    last.shared = config->shared;
    last.stream = config->stream;
    last.count = config->count;
    memcpy(last.attributes, config->attributes, config->count * sizeof(Attribute));
    for (size_t i = 0; i < parameters; i++) memcpy(last.parameters + offsets[i], values[i], sizes[i]);
    cuCtxGetCurrent(&last.context);
    return 0;
}
}
