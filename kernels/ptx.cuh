// What the kernels say to the GPU in PTX, under short names. Included as text: it needs no other header.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef const unsigned char* Bytes;

// Forms of weights, as kernels/stream.py numbers them.
constexpr int AFFINE = 0, BINARY = 1, TABLE = 2;
// Types of numbers that are read as bits.
constexpr int HALF = 0, BFLOAT16 = 1, FLOAT = 2, INT16 = 3;
// What is done to a product, as kernels/epilogues.py numbers it.
constexpr int SILU_MUL = 1, ADD = 2;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float half_to_float(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

template <int TYPE> __device__ __forceinline__ float to_float(u16 bits) {
    return TYPE == HALF ? half_to_float(bits) : as_float((u32)bits << 16);
}

// Number i of an array of TYPE.
template <int TYPE> __device__ __forceinline__ float number(const void* at, u64 i) {
    if constexpr (TYPE == FLOAT) return ((const float*)at)[i];
    else if constexpr (TYPE == INT16) return ((const short*)at)[i];
    else return to_float<TYPE>(((const u16*)at)[i]);
}

// A float as the bits of a half or a bfloat16, to nearest even.
template <int TYPE> __device__ __forceinline__ u16 rounded(float f) {
    u16 bits;
    if constexpr (TYPE == HALF) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + expf(-v)); }

// The bits of `a` where `mask` is set, else those of `b`.
__device__ __forceinline__ u32 select(u32 mask, u32 a, u32 b) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
    return out;
}

// Weights are read once: they should leave L2 before anything else does, this kernel's own code included.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// As usual: they will be read again.
__device__ __forceinline__ u64 read_again() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_async(u32 to, Bytes from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}

// Starts the copy of eight 16-bit numbers of which `left` exist; the others are zero. `wide`: `from` is at a multiple of
// 16 bytes. Where nothing is copied, `readable` stands for an address.
__device__ __forceinline__ void copy_eight(u32 to, const u16* from, int left, bool wide, const u16* readable) {
    if (wide && (left >= 8 || left <= 0)) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(left > 0 ? from : readable), "r"(left > 0 ? 16 : 0) : "memory");
    } else {
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const u16 v = i < left ? from[i] : (u16)0;
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + 2 * i), "h"(v) : "memory");
        }
    }
}

// Stores inputs `at` to `at` + 7, those below `k`, of a row of a matrix whose rows are `k` long.
__device__ __forceinline__ void store_eight(u16* row, const u32 (&v)[4], int at, int k) {
    if (at + 8 <= k && !((u64)(row + at) & 15)) *(uint4*)(row + at) = make_uint4(v[0], v[1], v[2], v[3]);
    else
        for (int e = 0; e < 8; e++)
            if (at + e < k) row[at + e] = v[e / 2] >> e % 2 * 16;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load16(u32* out, u32 at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at));
}

__device__ __forceinline__ u32 load4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

__device__ __forceinline__ void load8(u32* out, u32 at) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(at));
}

// The short in the lower half of a word. By a permutation: the instruction that makes a float of a short is slow.
__device__ __forceinline__ int low_short(u32 both) {
    int v;
    asm("prmt.b32 %0, %1, 0, 0x9910;" : "=r"(v) : "r"(both));
    return v;
}

// N numbers, two or four, that stand together in shared memory.
template <int TYPE, int N> __device__ __forceinline__ void load_numbers(float (&out)[N], u32 at) {
    constexpr int WORDS = TYPE == FLOAT ? N : N / 2;
    u32 v[WORDS];
    if constexpr (WORDS == 4) load16(v, at);
    else if constexpr (WORDS == 2) load8(v, at);
    else v[0] = load4(at);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if constexpr (TYPE == FLOAT) {
            out[i] = as_float(v[i]);
        } else {
            const u32 both = v[i / 2];
            if constexpr (TYPE == INT16) out[i] = i % 2 ? (int)both >> 16 : low_short(both);
            else out[i] = to_float<TYPE>(i % 2 ? both >> 16 : both & 0xffff);
        }
    }
}

// Four 8 x 8 matrices of 16-bit numbers, of each the piece that a lane holds as an operand; lane i points to row i % 8 of
// matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
}

// Two of them back, each as its transpose; lane i points to row i % 8 of what becomes of matrix i / 8.
__device__ __forceinline__ void store_matrices(u32 at, const u32 (&v)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(v[0]), "r"(v[1]) : "memory");
}
__device__ __forceinline__ void store_matrices(u32 at, const u32 (&v)[1]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(v[0]) : "memory");
}

// Waits for as many threads of the block as are told to meet at barrier `id`; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// a b + c in pairs of halves or bfloat16s.
template <int TYPE> __device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (TYPE == HALF) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Adds to eight numbers those at `at` to `at` + 7, as far as below `k`, of a row of a matrix.
template <int TYPE> __device__ __forceinline__ void add_eight(u32 (&to)[4], const u16* row, int at, int k) {
    union {
        uint4 all;
        u32 pairs[4];
        u16 each[8];
    } more = {};
    if (at + 8 <= k && !((u64)(row + at) & 15)) more.all = *(const uint4*)(row + at);
    else
        for (int e = 0; e < 8; e++)
            if (at + e < k) more.each[e] = row[at + e];
    for (int i = 0; i < 4; i++) to[i] = fma_pair<TYPE>(to[i], TYPE == HALF ? 0x3c003c00 : 0x3f803f80, more.pairs[i]);
}

template <int TYPE> __device__ __forceinline__ u32 product_pair(u32 a, u32 b) {
    u32 d;
    if constexpr (TYPE == HALF) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

template <int TYPE> __device__ __forceinline__ u32 pair(float low, float high) {
    u32 d;
    if constexpr (TYPE == HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ void mma_bits(int (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

__device__ __forceinline__ void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The product of pairs of halves or bfloat16s.
template <int TYPE> __device__ __forceinline__ void mma_pairs(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (TYPE == HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Registers that a warpgroup gives away, and those that it takes: both in all of its warps.
template <int LEFT> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT)); }
template <int ALL> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ALL)); }

// How a matrix lies in memory, as the driver encodes it.
struct __align__(64) TensorMap {
    u64 words[16];
};

#if __CUDA_ARCH__ >= 900
// The copy engine: one lane asks for a whole piece, and a barrier in shared memory counts the bytes that have come.
__device__ __forceinline__ void barrier_init(u32 at, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

// For the copy engine and the cluster to see what was initialised.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }

__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(at), "r"(parity)
                 : "memory");
}

// A box of an array, as large as the map says, from (column, row[, page]); what lies outside is zero.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map),
                 "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, int page, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(page), "r"(barrier), "l"(policy)
                 : "memory");
}

// Programmatic dependent launch: the next kernel may start, and fetch its weights, while this one still runs.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Where nothing was written that others must see.
__device__ __forceinline__ void cluster_leave() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void load_remote(float (&v)[4], u32 at, u32 rank) {
    asm volatile("{.reg .u32 a;\nmapa.shared::cluster.u32 a, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];}"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at), "r"(rank) : "memory");
}

__device__ __forceinline__ void store_remote(u32 at, u32 rank, float f) {
    asm volatile("{.reg .u32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nst.shared::cluster.f32 [a], %2;}" ::"r"(at), "r"(rank), "f"(f) : "memory");
}
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_start() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void store_remote(u32, u32, float) {}
#endif

