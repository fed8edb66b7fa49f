// QUICK (arXiv 2402.10076) for a few rows: y[m, n] = x[m, k] w[n, k] with w as the first operand of mma.m16n8k16 and
// eights of rows of x as the columns of the second. Weights go from memory to registers as they are packed, become numbers
// there (quick.cuh) and nowhere else; x is read as it is. A group's products are added in float32 and then scaled; of a
// zero that is no whole number the rest is multiplied by the sum of x.
//
// How tiles come and sums go is told in stream.cuh. LQ_* are integers from kernels/quick.py.

#include "ptx.cuh"

#include "quick_tile.cuh"

constexpr int ROWS = LQ_ROWS;  // rows of x: 1, 2, 4, or a multiple of 8
constexpr int SLABS = Q;       // 512-byte pieces of a 32 x 128 tile
constexpr int X_BLOCK = ROWS * 256, FACTS = ZERO == 2 ? GROUPS : 0, COLUMNS = ROWS, SLOT = 32 * ROWS, EXTRA = 0;
constexpr int BATCHES = (ROWS + 7) / 8;  // eights of rows of x
constexpr int PARTS = 2 * BATCHES;       // and halves of a row tile

extern __shared__ __align__(128) unsigned char shared[];

// Starts the copy of one block of x, all rows: 16 bytes of inputs 8i stand at i ^ row, where lanes meet all banks.
__device__ __forceinline__ void fetch_x(u32 to, const u16* x, int m, int k, int block, bool wide, int lane) {
#pragma unroll
    for (int i = lane; i < ROWS * 16; i += 32) {
        const int row = i >> 4, at = block * 128 + (i & 15) * 8;
        copy_eight(to + row * 256 + ((i ^ row) & 15) * 16, x + (u64)row * k + at, row < m ? k - at : 0, wide, x);
    }
}

// The sums of each group's inputs, [group][row]: four inputs a lane.
__device__ __forceinline__ void prepare(unsigned char* x, float* facts, int lane) {
    if constexpr (FACTS > 0)
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            u32 v[2];
            load8(v, shared_address(x) + row * 256 + ((lane / 2 ^ row) & 15) * 16 + lane % 2 * 8);
            float f = 0.f;
            for (int i = 0; i < 4; i++) f += to_float<XTYPE>(v[i / 2] >> i % 2 * 16 & 0xffff);
#pragma unroll
            for (int step = 1; step < 32 / GROUPS; step *= 2) f += __shfl_xor_sync(~0u, f, step);
            if (lane % (32 / GROUPS) == 0) facts[lane / (32 / GROUPS) * COLUMNS + row] = f;
        }
}
__device__ __forceinline__ float set_up(unsigned char*, const float*) { return (float)(1 << -UNIT); }

// One 32 x 128 tile; sum[BATCHES half + i][e] belongs to row 16 half + g + 8 (e / 2) of w and row 8i + 2t + e % 2 of x.
template <int N>
__device__ __forceinline__ void add_tile(float (&sum)[N][4], u32 stage, u32 x, const float* facts, u32, int lane) {
    u32 b[BATCHES][4][4];
#pragma unroll
    for (int i = 0; i < BATCHES; i++) {
        // Columns without a row of x repeat the last: nobody reads what they give.
        const int row = min(8 * i + (lane & 7), ROWS - 1);
#pragma unroll
        for (int u = 0; u < 4; u++) load_matrices(b[i][u], x + row * 256 + ((4 * u + (lane >> 3) ^ row) & 15) * 16);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Codes codes;
        codes.load(stage, half, lane);
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            float factor[2], zero[2];
            load_scales(factor, stage + COEF_AT, s, half, lane);
            load_zeros(zero, stage + ZERO_AT, s, half, lane);
            const Zero less[2] = {zero[0], zero[1]};
            const float unit = 1.f / (float)(1 << -UNIT);
            float total[BATCHES][4] = {};
#pragma unroll
            for (int u = s * 4 / GROUPS; u < (s + 1) * 4 / GROUPS; u++)
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    u32 a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] = codes.operand(i % 2, u, p, i / 2, less[i % 2]);
#pragma unroll
                    for (int i = 0; i < BATCHES; i++) mma_pairs<XTYPE>(total[i], a[0], a[1], a[2], a[3], b[i][u][2 * p], b[i][u][2 * p + 1]);
                }
#pragma unroll
            for (int i = 0; i < BATCHES; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float v = total[i][e];
                    if constexpr (ZERO == 2) v = fmaf(less[e / 2].rest * unit, facts[s * COLUMNS + min(8 * i + 2 * (lane & 3) + e % 2, ROWS - 1)], v);
                    sum[BATCHES * half + i][e] = fmaf(factor[e / 2], v, sum[BATCHES * half + i][e]);
                }
        }
    }
}

// What a warp found for a row tile, to its slot: [row of x][row of w].
template <int N> __device__ __forceinline__ void flush(float* slot, float (&sum)[N][4], float final, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = i % BATCHES * 8 + 2 * t + e % 2;
            if (column < ROWS) slot[column * 32 + i / BATCHES * 16 + g + 8 * (e / 2)] = sum[i][e] * final;
            sum[i][e] = 0.f;
        }
}

#include "stream.cuh"

#if LQ_GROUPED
#include "experts.cuh"

// As many blocks as run at once share the passes of all experts that have rows. `ends` [experts]: where each one's rows end.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
quick_grouped(const u16* __restrict__ x, Bytes planes, Bytes coef, Bytes zero, const int* ends, u16* __restrict__ y, int experts, int m,
              int n, int k, int tiles, int range, int groups, u32 span, int wide) {
    const int lane = threadIdx.x & 31, height = n / 32, outputs = EPILOGUE == SILU_MUL ? n / 2 : n;
    const u64 blocks = (u64)height * ((k + 127) / 128), rows = (u64)height * groups;
    wait_for_previous();
    Pass pass;
    const Shares shares = shared_out(find_pass(pass, ends, experts, m, -1, lane), height, gridDim.y, tiles);
#pragma unroll 1
    for (int i = blockIdx.y; i < shares.count; i += gridDim.y) {
        find_pass(pass, ends, experts, m, i / shares.each, lane);
        const u64 e = pass.expert;
        stream_gemm(x + (u64)pass.first * k, planes + e * blocks * (SLABS * 512), coef + e * rows * COEF_ROW, zero + e * rows * ZERO_ROW, nullptr, nullptr,
                    nullptr, y + (u64)pass.first * outputs, pass.rows, n, k, shares.tiles, [&] { return u32(i % shares.each); }, range, groups, span, wide);
    }
}
#else
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
quick_gemm(const u16* __restrict__ x, Bytes planes, Bytes coef, Bytes zero, const float* __restrict__ table, const u16* __restrict__ bias, const u16* __restrict__ other,
           u16* __restrict__ y, int m, int n, int k, int tiles, int range, int groups, u32 span, int wide) {
    stream_gemm(x, planes, coef, zero, table, bias, other, y, m, n, k, tiles, [] { return blockIdx.y; }, range, groups, span, wide);
}
#endif
