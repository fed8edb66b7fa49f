// LUT-GEMM's bit planes (arXiv 2206.09557), multiplied by tensor cores instead of looked up: y[m, n] = x[m, k] w[n, k].
//
// A weight is q bits; plane p holds bit p of every weight. In a group w = scale (sum_p 2^p bit_p - zero), or with bits
// as -1 and 1 sum_p alpha_p bit_p + offset, so y needs bit_p . x, and what x alone adds up to: taken off before anything
// is rounded. bit_p . x comes from a tensor core, in one of three ways:
//   BITS    one row: x becomes 24-bit fixed point, one exponent for each 128 inputs; its bit planes are the columns of
//           mma.m16n8k128.b1 (AND, popcount). Nothing is unpacked at all.
//   BYTES   up to 4 rows: the fixed point is cut into four signed limbs; two rows of x are the 8 columns of
//           mma.m16n8k32. A bit masked in place, (word & 0x01010101 << j), is four bytes worth 2^j; 2^(7-j) goes into x.
//   HALVES  up to 8 rows are the columns of mma.m16n8k16. (word & 0x00010001 << j) is two halves worth 2^(j-24),
//           subnormal and exact; 2^-j goes into x, which is scaled to fill the range of a half.
// A table's 4-bit codes need look-ups after all: a byte of two codes reads two halves from a table of 256 pairs in
// shared memory that every lane has to itself in its own bank, so that no look-up conflicts.
//
// Work: a thread block owns `tiles` tiles of 32 rows and, within a cluster, a range of k; about one block an SM. Its warps
// cut the 32 x 128 tiles of that rectangle, row by row, into equal runs, and each streams its run through its own ring
// of cp.async stages, deep enough to keep memory busy while x is prepared. A run may end inside a row tile: what a warp
// found for a row tile goes to a slot, and slots, then thread blocks of the cluster, are added in a fixed order, so
// results are bit-identical from run to run.
//
// LQ_* are integers from kernels/lut.py.

#include "ptx.cuh"

constexpr int FORM = LQ_FORM;
constexpr int Q = LQ_BITS;        // planes; for a table the codes are nibbles whatever their bits
constexpr int ZERO = LQ_ZERO;     // 0 none, 1 int16, 2 float32; binary: 2 for an offset of the scale's type
constexpr int SCALE = LQ_SCALE;   // HALF, BFLOAT16 or FLOAT
constexpr int XTYPE = LQ_X;       // HALF or BFLOAT16
constexpr int ROWS = LQ_ROWS;     // rows of x: 1 for BITS, 2 or 4 for BYTES, 2, 4 or 8 for HALVES
constexpr int SUB = LQ_SUB;       // groups in a block of 128 inputs; 0 where a group spans blocks
constexpr int WARPS = LQ_WARPS, STAGES = LQ_STAGES;
constexpr int BITS = 0, BYTES = 1, HALVES = 2, MODE = LQ_MODE;

constexpr int GROUPS = SUB ? SUB : 1;                // factors that a tile needs
constexpr int SLABS = FORM == TABLE ? 4 : Q;         // 512-byte pieces of a 32 x 128 tile
constexpr int COEFS = FORM == BINARY ? Q : 1;        // factors of a group
constexpr int COEF_SIZE = SCALE == FLOAT ? 4 : 2;
constexpr int ZERO_SIZE = FORM == BINARY ? COEF_SIZE : ZERO == 1 ? 2 : 4;
constexpr int COEF_ROW = COEFS * 32 * COEF_SIZE, ZERO_ROW = ZERO ? 32 * ZERO_SIZE : 0;
constexpr int COEF_AT = SLABS * 512, ZERO_AT = COEF_AT + GROUPS * COEF_ROW, STAGE = ZERO_AT + GROUPS * ZERO_ROW;
constexpr int COLUMNS = MODE == HALVES ? 8 : ROWS;   // rows of x that are kept apart
constexpr int X_BLOCK = ROWS * (MODE == BITS ? 384 : MODE == BYTES ? 512 : 256);  // bytes of a block of 128 inputs
constexpr int SHARES = MODE == BITS ? 4 : MODE == BYTES ? 2 : 1;  // lanes that share a product
// Numbers about a block and row of x: its unit and, for each group and lane's share, the product with nothing but ones.
constexpr int FACTS = 1 + GROUPS * SHARES;
constexpr int SLOT = 32 * COLUMNS;                   // floats of a slot
constexpr int PAIRS_AT = WARPS * STAGES * STAGE, SLOTS_AT = PAIRS_AT + (FORM == TABLE ? 32768 : 0);
// What a sum is worth at the end. Limbs were multiplied by 2^7, units of halves divided by 2^33 (see unit()) and, for
// binary weights, products by 2.
constexpr float FINAL = MODE == BITS ? 1.f : MODE == BYTES ? 1.f / 128 : FORM == BINARY ? 17179869184.f : 8589934592.f;

extern __shared__ __align__(128) unsigned char shared[];

#include "lut_x.cuh"

// a / b in a few instructions, right where 2^-22 a / b, the error of the quotient, is below 1 / 2b: lut.py sees to it.
__device__ __forceinline__ int divide(int a, int b) { return __float2int_rd(__fdividef((float)a + 0.5f, (float)b)); }

// Four numbers that stand together in shared memory: those of rows g, g + 8, g + 16, g + 24.
template <int TYPE> __device__ __forceinline__ void load_four(float (&out)[4], u32 at) {
    if constexpr (TYPE == FLOAT) {
        u32 v[4];
        load16(v, at);
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = as_float(v[i]);
    } else {
        u32 low, high;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(at));
        if constexpr (TYPE == INT16) {
            out[0] = (short)low, out[1] = (int)low >> 16, out[2] = (short)high, out[3] = (int)high >> 16;
        } else {
            out[0] = to_float<TYPE>(low & 0xffff), out[1] = to_float<TYPE>(low >> 16);
            out[2] = to_float<TYPE>(high & 0xffff), out[3] = to_float<TYPE>(high >> 16);
        }
    }
}

// A warp's place in its run: where the next tile and its factors are.
struct Run {
    Bytes planes, coef, zero;
    int block, blocks, skip;  // which block of the range is next, how many it has, how many of k it leaves out
    int first, groups;        // the range's first block; groups of k
    u32 span;                 // where groups span blocks, ceil(2^32 / blocks in a group)

    // Starts the copy of one tile and of its groups' factors into a stage of the ring, and steps on.
    __device__ __forceinline__ void fetch(u32 to, u64 policy, int lane) {
#pragma unroll
        for (int p = 0; p < SLABS; p++) copy_async(to + p * 512 + lane * 16, planes + p * 512 + lane * 16, policy);
        const u32 group = SUB ? 0 : __umulhi(first + block, span);
        constexpr int COEF_UNITS = GROUPS * COEF_ROW / 16, ZERO_UNITS = GROUPS * ZERO_ROW / 16;
#pragma unroll
        for (int i = 0; i < COEF_UNITS; i += 32)
            if (i + lane < COEF_UNITS) copy_async(to + COEF_AT + (i + lane) * 16, coef + group * COEF_ROW + (i + lane) * 16, policy);
#pragma unroll
        for (int i = 0; i < ZERO_UNITS; i += 32)
            if (i + lane < ZERO_UNITS) copy_async(to + ZERO_AT + (i + lane) * 16, zero + group * ZERO_ROW + (i + lane) * 16, policy);
        const bool end = ++block == blocks;
        const int steps = end ? 1 + skip : 1, more = SUB ? steps * GROUPS : end ? groups : 0;
        planes += (u64)steps * (SLABS * 512);
        coef += (u64)more * COEF_ROW;
        zero += (u64)more * ZERO_ROW;
        if (end) block = 0;
    }
};

#include "lut_tiles.cuh"

// What a warp found for a row tile, to its slot: [row of x][row of w].
template <int N> __device__ __forceinline__ void flush(float* slot, float (&sum)[N][4], float final, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float v = sum[i][e];
            if constexpr (MODE == BITS) {
                v *= (float)(1 << 2 * t);
                v += __shfl_xor_sync(~0u, v, 1);
                v += __shfl_xor_sync(~0u, v, 2);
                if (t == e) slot[g + 8 * e] = v * final;
            } else if constexpr (MODE == BYTES) {
                v *= t & 1 ? 65536.f : 1.f;
                v += __shfl_xor_sync(~0u, v, 1);
                if ((t & 1) == e >> 1) slot[(2 * i + (t >> 1)) * 32 + g + 8 * e] = v * final;
            } else {
                slot[(2 * t + e % 2) * 32 + 16 * i + g + 8 * (e / 2)] = v * final;
            }
            sum[i][e] = 0.f;
        }
}

// The table as 256 pairs of halves, scaled to fill their range, once for each lane; returns the scale's inverse.
__device__ __forceinline__ float prepare_table(u32* pairs, const float* table) {
    constexpr int LEVELS = 1 << (FORM == TABLE ? Q : 0);
    float greatest = 0;
#pragma unroll
    for (int i = 0; i < LEVELS; i++) greatest = fmaxf(greatest, fabsf(table[i]));
    const int e = greatest > 0 ? max(exponent(__float_as_uint(greatest)), -80) : 0;
    const float up = power(15 - e);
    for (int i = threadIdx.x; i < 256 * 32; i += WARPS * 32) {
        const int low = i >> 5 & 15, high = i >> 9;
        pairs[i] = two_halves(low < LEVELS ? table[low] * up : 0.f, high < LEVELS ? table[high] * up : 0.f);
    }
    return power(e - 15 + 9);  // a unit of prepared x is 2^9 of its facts
}

// grid (size of a cluster, ceil(row tiles / tiles)); 32 * WARPS threads; shared memory as kernels/lut.py counts it.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
lut_gemm(const u16* __restrict__ x, Bytes planes, Bytes coef, Bytes zero, const float* __restrict__ table,
         const u16* __restrict__ bias, u16* __restrict__ y, int m, int n, int k, int tiles, int range, int groups, u32 span,
         int wide) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int split = gridDim.x, rank = blockIdx.x, blocks = (k + 127) / 128;
    const int first = rank * range, count = min(range, blocks - first);
    float* slots = (float*)(shared + SLOTS_AT);
    unsigned char* prepared = (unsigned char*)(slots + (tiles + WARPS - 1) * SLOT);
    u16* biases = (u16*)(prepared + range * X_BLOCK);
    float* wholes = (float*)(biases + tiles * 32);
    float* facts = wholes + split * tiles * SLOT;
    if (split > 1) cluster_arrive();
    const int top = blockIdx.y * tiles, height = min(tiles, (n + 31) / 32 - top), units = height * count;
    // x and the bias first: behind the weights they would wait for all of them.
    wait_for_previous();
    for (int i = warp; i < count; i += WARPS) fetch_x(shared_address(prepared) + i * X_BLOCK, x, m, k, first + i, wide, lane);
    for (int i = threadIdx.x * 8; i < height * 32; i += WARPS * 256)
        copy_eight(shared_address(biases + i), bias + top * 32 + i, bias ? n - top * 32 - i : 0, wide, x);
    commit();
    const int begin = units * warp / WARPS, mine = units * (warp + 1) / WARPS - begin;
    int row = divide(begin, count), block = begin - row * count;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE;
    const u64 policy = read_once();
    Run run = {planes, coef, zero, block, count, blocks - count, first, groups, span};
    const u64 place = (u64)(top + row) * blocks + first + block;
    run.planes += place * (SLABS * 512);
    run.coef += (SUB ? place * GROUPS : (u64)(top + row) * groups) * COEF_ROW;
    run.zero += (SUB ? place * GROUPS : (u64)(top + row) * groups) * ZERO_ROW;
    // Two stages keep memory busy while x is prepared; more would only make every warp's first tile wait for them.
    constexpr int EARLY = STAGES > 3 ? 2 : STAGES - 1;
#pragma unroll 1
    for (int i = 0; i < EARLY; i++) {
        if (i < mine) run.fetch(ring + i * STAGE, policy, lane);
        commit();
    }
    float final = FINAL;
    u32 pairs = 0;
    if constexpr (FORM == TABLE) {
        final = prepare_table((u32*)(shared + PAIRS_AT), table);
        pairs = shared_address(shared + PAIRS_AT) + lane * 4;
    }
    wait<EARLY>();
    __syncwarp();
    for (int i = warp; i < count; i += WARPS) prepare(prepared + i * X_BLOCK, facts + i * FACTS * COLUMNS, lane);
#pragma unroll 1
    for (int i = EARLY; i < STAGES - 1; i++) {
        if (i < mine) run.fetch(ring + i * STAGE, policy, lane);
        commit();
    }
    __syncthreads();
    let_next_start();
    constexpr int PARTS = MODE == BITS ? 1 : MODE == BYTES ? ROWS / 2 : 2;  // pairs of rows of x, or halves of a row tile
    float sum[PARTS][4] = {};
    u32 stage = ring, ahead = ring + (STAGES - 1) * STAGE;
    for (int i = 0; i < mine; i++) {
        wait<STAGES - 2>();
        __syncwarp();
        if (i + STAGES - 1 < mine) run.fetch(ahead, policy, lane);
        commit();
        add_tile<MODE>(sum, stage, shared_address(prepared) + block * X_BLOCK, facts + block * FACTS * COLUMNS, pairs, lane);
        ahead = stage;
        stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
        if (++block == count || i + 1 == mine) {
            // Along the runs, row + warp grows with each change of either: no two share a slot.
            flush(slots + (row + warp) * SLOT, sum, final, lane);
            block = 0;
            row++;
        }
    }
    if (mine == 0)
        for (int i = lane; i < SLOT; i += 32) slots[(row + warp) * SLOT + i] = 0.f;
    __syncthreads();
    // Over the warps that met a row tile, then over the cluster, each time from the first to the last. Each sum goes to
    // the thread block that will write it, which keeps a place for every other's.
    if (split > 1) cluster_wait();  // all have started: they have shared memory
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const int r = e / SLOT, from = divide((r * count + 1) * WARPS - 1, units), to = divide((r + 1) * count * WARPS - 1, units);
        const float* slot = slots + (r + from) * SLOT + e % SLOT;
        float v = 0.f;
#pragma unroll 8
        for (int w = from; w <= to; w++, slot += SLOT) v += *slot;
        const int owner = e / 32 % split;
        float* place = wholes + rank * tiles * SLOT + e;
        if (owner == rank) *place = v;
        else store_remote(shared_address(place), owner, v);
    }
    if (split > 1) cluster_arrive(), cluster_wait();
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const int column = e % SLOT / 32, at = (top + e / SLOT) * 32 + e % 32;
        if (column >= m || at >= n || e / 32 % split != rank) continue;
        float v = 0.f;
        for (int i = 0; i < split; i++) v += wholes[i * tiles * SLOT + e];
        y[(u64)column * n + at] = rounded<XTYPE>(v + to_float<XTYPE>(biases[e / SLOT * 32 + e % 32]));
    }
}
