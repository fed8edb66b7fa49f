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
// How tiles come and sums go is told in stream.cuh. LQ_* are integers from kernels/lut.py.

#include "ptx.cuh"

constexpr int FORM = LQ_FORM;
constexpr int Q = LQ_BITS;        // planes; for a table the codes are nibbles whatever their bits
constexpr int ZERO = LQ_ZERO;     // 0 none, 1 int16, 2 float32; binary: 2 for an offset of the scale's type
constexpr int SCALE = LQ_SCALE;   // HALF, BFLOAT16 or FLOAT
constexpr int XTYPE = LQ_X;       // HALF or BFLOAT16
constexpr int EPILOGUE = LQ_EPILOGUE;
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
constexpr int EXTRA = FORM == TABLE ? 32768 : 0;      // bytes of shared memory that the table takes
constexpr int PARTS = MODE == BITS ? 1 : MODE == BYTES ? ROWS / 2 : 2;  // pairs of rows of x, or halves of a row tile
// What a sum is worth at the end. Limbs were multiplied by 2^7, units of halves divided by 2^33 (see unit()) and, for
// binary weights, products by 2.
constexpr float FINAL = MODE == BITS ? 1.f : MODE == BYTES ? 1.f / 128 : FORM == BINARY ? 17179869184.f : 8589934592.f;

extern __shared__ __align__(128) unsigned char shared[];

#include "lut_x.cuh"

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
        pairs[i] = pair<HALF>(low < LEVELS ? table[low] * up : 0.f, high < LEVELS ? table[high] * up : 0.f);
    }
    return power(e - 15 + 9);  // a unit of prepared x is 2^9 of its facts
}

// What stands beside the rings in shared memory, and the worth of a sum.
__device__ __forceinline__ float set_up(unsigned char* extra, const float* table) {
    if constexpr (FORM == TABLE) return prepare_table((u32*)extra, table);
    return FINAL;
}

#include "stream.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
lut_gemm(const u16* __restrict__ x, Bytes planes, Bytes coef, Bytes zero, const float* __restrict__ table, const u16* __restrict__ bias, const u16* __restrict__ other,
         u16* __restrict__ y, int m, int n, int k, int tiles, int range, int groups, u32 span, int wide) {
    stream_gemm(x, planes, coef, zero, table, bias, other, y, m, n, k, tiles, [] { return blockIdx.y; }, range, groups, span, wide);
}
