// QUICK (arXiv 2402.10076) for batches, on Hopper's warpgroup products: y[m, n] = x[m, k] w[n, k] as w x^T. The weights are
// the operand that wgmma takes from registers, 64 rows a warpgroup: they become numbers there (quick.cuh) and never pass
// through shared memory as numbers. x lies in shared memory, 128-byte rows in the swizzle that wgmma reads.
//
// A thread block takes 32 * ROW_TILES rows of w, up to COLUMNS rows of x and, within a cluster, a range of k, block by block
// of 128 inputs, through a ring of stages that the copy engine fills. A group's products are added in float32 and then
// scaled. The cluster's sums are added from the first rank to the last, so results are bit-identical from run to run.
//
// LQ_* are integers from kernels/quick.py.

#include "ptx.cuh"

#if __CUDA_ARCH__ == 900
#include "quick_tile.cuh"

constexpr int COLUMNS = LQ_ROWS;  // rows of x in a tile: 16, 32, 64 or 128
constexpr int THREADS = WARPS * 32, ROW_TILES = WARPS / 2;
constexpr int X_HALF = COLUMNS * 128, X_BLOCK = 2 * X_HALF;  // bytes of 64 inputs of all rows, and of 128
constexpr int EIGHTS = COLUMNS / 8;
constexpr int TILES_AT = STAGES * X_BLOCK, BARRIERS_AT = TILES_AT + STAGES * ROW_TILES * STAGE;

extern __shared__ __align__(1024) unsigned char shared[];

// sum (+)= the 64 x 16 operand in registers times 16 inputs of COLUMNS rows of x.
__device__ __forceinline__ void wgmma(float (&d)[COLUMNS / 2], const u32 (&a)[4], u64 x, int add) {
#define LQ_KIND(N, T) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " "
#define LQ_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LQ_F16(i) LQ_F4(i), LQ_F4(i + 4), LQ_F4(i + 8), LQ_F4(i + 12)
#define LQ_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add)
#define LQ_D8 "{%0,%1,%2,%3,%4,%5,%6,%7"
#define LQ_D16 LQ_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LQ_D32 LQ_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LQ_D64 LQ_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LQ_WGMMA(N, D, A0, A1, A2, A3, X, P, ...)                                                                           \
    if constexpr (XTYPE == HALF)                                                                                            \
        asm volatile("{.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n" LQ_KIND(N, f16) D "}, {" A0 "," A1 "," A2 "," A3 "}, " X ", p, 1, 1, 0;}" \
                     : __VA_ARGS__ : LQ_IN);                                                                                \
    else                                                                                                                    \
        asm volatile("{.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n" LQ_KIND(N, bf16) D "}, {" A0 "," A1 "," A2 "," A3 "}, " X ", p, 1, 1, 0;}" \
                     : __VA_ARGS__ : LQ_IN);
#if LQ_ROWS == 16
    LQ_WGMMA(16, LQ_D8, "%8", "%9", "%10", "%11", "%12", "%13", LQ_F4(0), LQ_F4(4))
#elif LQ_ROWS == 32
    LQ_WGMMA(32, LQ_D16, "%16", "%17", "%18", "%19", "%20", "%21", LQ_F16(0))
#elif LQ_ROWS == 64
    LQ_WGMMA(64, LQ_D32, "%32", "%33", "%34", "%35", "%36", "%37", LQ_F16(0), LQ_F16(16))
#else
    LQ_WGMMA(128, LQ_D64, "%64", "%65", "%66", "%67", "%68", "%69", LQ_F16(0), LQ_F16(16), LQ_F16(32), LQ_F16(48))
#endif
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// What wgmma is told of x: rows of 128 bytes, swizzled, eights of rows 1024 bytes apart.
__device__ __forceinline__ u64 describe(u32 at) { return (u64)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// grid (size of a cluster, ceil(row tiles / ROW_TILES), ceil(m / COLUMNS)).
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
quick_batch(const __grid_constant__ TensorMap x, Bytes planes, Bytes coef, Bytes zero, const u16* __restrict__ bias, u16* __restrict__ y, int m,
            int n, int k, int range, int groups, u32 span) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int split = gridDim.x, rank = blockIdx.x, blocks = (k + 127) / 128, tiles = (n + 31) / 32;
    const int first = rank * range, count = min(range, blocks - first), top = blockIdx.y * ROW_TILES;
    const int column = blockIdx.z * COLUMNS, columns = min(m - column, COLUMNS);
    const u32 x_ring = shared_address(shared), w_ring = x_ring + TILES_AT, barriers = x_ring + BARRIERS_AT;
    const u64 policy = gridDim.z == 1 ? read_once() : read_again();
    // Of each stage a barrier that it is filled, and one that all warps have done with it.
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) barrier_init(barriers + i * 16, 1), barrier_init(barriers + i * 16 + 8, WARPS);
    __syncthreads();
    if (split > 1) cluster_arrive();
    wait_for_previous();
    if (warp >= WARPS) {
        // The warpgroup that fetches, with one warp: of each block a lane asks for a row tile, two others for x.
        fewer_registers<40>();
        const int here = min(ROW_TILES, tiles - top);
        let_next_start();
#pragma unroll 1
        for (int i = 0; i < count && warp == WARPS; i++) {
            const int stage = i % STAGES, block = first + i;
            const u32 filled = barriers + stage * 16;
            if (i >= STAGES) barrier_wait(filled + 8, i / STAGES - 1 & 1);
            if (lane == 0) barrier_expect(filled, X_BLOCK + here * STAGE);
            __syncwarp();
            if (lane < here) {
                const u32 to = w_ring + (stage * ROW_TILES + lane) * STAGE, group = SUB ? block * GROUPS : __umulhi(block, span);
                const u64 place = (u64)(top + lane) * blocks + block, factors = (u64)(top + lane) * groups + group;
                copy_bulk(to, planes + place * COEF_AT, COEF_AT, filled, policy);
                copy_bulk(to + COEF_AT, coef + factors * COEF_ROW, GROUPS * COEF_ROW, filled, policy);
                if constexpr (ZERO != 0) copy_bulk(to + ZERO_AT, zero + factors * ZERO_ROW, GROUPS * ZERO_ROW, filled, policy);
            } else if (lane >= 30) {
                const int h = lane - 30;
                copy_box(x_ring + stage * X_BLOCK + h * X_HALF, x, block * 128 + 64 * h, column, filled);
            }
        }
        if (split > 1) {
            cluster_wait(), cluster_arrive(), cluster_wait();
            cluster_arrive(), cluster_wait();
        }
        return;
    }
    // Of 64 Ki registers, for eight warps of sums and four that fetch.
    more_registers<232>();
    float sum[COLUMNS / 2] = {};
    const int half = warp & 1;
    // Makes block i's weights numbers, when it has come.
    auto unpack = [&](u32 (&a)[8][4], int i) {
        barrier_wait(barriers + i % STAGES * 16, i / STAGES & 1);
        const u32 stage = w_ring + (i % STAGES * ROW_TILES + warp / 2) * STAGE;
        Codes codes;
        codes.load(stage, half, lane);
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            float zero[2];
            load_zeros(zero, stage, s, half, lane);
            const Zero less[2] = {zero[0], zero[1]};
#pragma unroll
            for (int step = s * 8 / GROUPS; step < (s + 1) * 8 / GROUPS; step++)
#pragma unroll
                for (int e = 0; e < 4; e++) a[step][e] = codes.operand(e % 2, step / 2, step % 2, e / 2, less[e % 2]);
        }
    };
    // Adds block i to the sums and, while tensor cores are at it, unpacks the next into `ahead`.
    auto add = [&](u32 (&a)[8][4], u32 (&ahead)[8][4], int i) {
        const u32 stage = w_ring + (i % STAGES * ROW_TILES + warp / 2) * STAGE, xs = x_ring + i % STAGES * X_BLOCK;
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            float total[COLUMNS / 2], factor[2];
            constexpr int STEPS = 8 / GROUPS;
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                const int step = s * STEPS + j;
                wgmma(total, a[step], describe(xs + step / 4 * X_HALF) + step % 4 * 2, j > 0);
            }
            wgmma_commit();
            load_scales(factor, stage, s, half, lane);
            if (s == GROUPS - 1 && i + 1 < count) unpack(ahead, i + 1);
            wgmma_wait<0>();
            if (s == GROUPS - 1) {
                // Nothing more is read of the stage.
                __syncwarp();
                if (lane == 0) barrier_arrive(barriers + i % STAGES * 16 + 8);
            }
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; e++) sum[e] = fmaf(factor[e / 2 % 2], total[e], sum[e]);
        }
    };
    u32 even[8][4], odd[8][4];
    unpack(even, 0);
#pragma unroll 1
    for (int i = 0; i < count; i += 2) {
        add(even, odd, i);
        if (i + 1 < count) add(odd, even, i + 1);
    }
    const float final = ZERO == 2 ? 1.f : (float)(1 << -UNIT);
    // Each eight of rows of x goes to one rank, which keeps a place for every other's; the rings are free by now.
    float* places = (float*)shared;
    if (split > 1) {
        cluster_wait(), cluster_arrive(), cluster_wait();
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (j % split != rank) store_remote(shared_address(places + ((rank * EIGHTS + j) * 4 + e) * THREADS + threadIdx.x), j % split, sum[4 * j + e]);
        cluster_arrive(), cluster_wait();
    }
    const int from = (top + warp / 2) * 32 + 16 * half + g;
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
        if (j % split != rank) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float v = 0.f;
            for (int r = 0; r < split; r++) v += r == rank ? sum[4 * j + e] : places[((r * EIGHTS + j) * 4 + e) * THREADS + threadIdx.x];
            const int row = from + 8 * (e / 2), to = 8 * j + 2 * t + e % 2;
            if (row < n && to < columns) y[(u64)(column + to) * n + row] = rounded<XTYPE>(v * final + (bias ? to_float<XTYPE>(bias[row]) : 0.f));
        }
    }
}
#endif
