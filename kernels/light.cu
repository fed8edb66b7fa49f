// Reads `count` vectors of 16 bytes and does nothing with them: the least time in which the bytes can be read.
// UNROLL independent loads a thread are in flight at once; blocks stride over the grid by tiles of UNROLL * block.

#ifndef UNROLL
#define UNROLL 8
#endif

struct Vector {
    unsigned x, y, z, w;
};

__device__ __forceinline__ Vector read(const char *at) {
    Vector v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

extern "C" __global__ void light(const char *data, unsigned *sink, int count) {
    Vector sum = {0, 0, 0, 0};
    const int tile = UNROLL * blockDim.x;
    for (long long base = (long long)blockIdx.x * tile; base < count; base += (long long)gridDim.x * tile) {
        const char *at = data + 16 * (base + threadIdx.x);
        Vector v[UNROLL];
        // A whole tile has no branch between its loads; only the last one is looked at vector by vector.
        if (base + tile <= count) {
#pragma unroll
            for (int i = 0; i < UNROLL; i++) v[i] = read(at + 16LL * i * blockDim.x);
        } else {
#pragma unroll
            for (int i = 0; i < UNROLL; i++) {
                v[i] = Vector{0, 0, 0, 0};
                if (base + threadIdx.x + (long long)i * blockDim.x < count) v[i] = read(at + 16LL * i * blockDim.x);
            }
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            sum.x ^= v[i].x, sum.y ^= v[i].y, sum.z ^= v[i].z, sum.w ^= v[i].w;
        }
    }
    // Once in 2^64 a thread of random data stores a word that nobody reads: the compiler must keep every load.
    if ((sum.x ^ sum.y) == 0x5bd1e995u && (sum.z ^ sum.w) == 0x9e3779b9u) sink[0] = sum.x;
}
