// A 32 x 128 tile of layout `quick` with its groups' factors, as both kernels that multiply find it in shared memory.
// LQ_* are integers from kernels/quick.py.

constexpr int Q = LQ_BITS;
constexpr int ZERO = LQ_ZERO;    // 0 none, 1 int16, 2 float32
constexpr int SCALE = LQ_SCALE;  // HALF, BFLOAT16 or FLOAT
constexpr int XTYPE = LQ_X;      // HALF or BFLOAT16
constexpr int EPILOGUE = LQ_EPILOGUE;
constexpr int SUB = LQ_SUB;      // groups in a block of 128 inputs; 0 where a group spans blocks
constexpr int WARPS = LQ_WARPS, STAGES = LQ_STAGES;

constexpr int GROUPS = SUB ? SUB : 1;
constexpr int SCALE_SIZE = SCALE == FLOAT ? 4 : 2, ZERO_SIZE = ZERO == 0 ? 0 : ZERO == 1 ? 2 : 4;
constexpr int COEF_ROW = 32 * SCALE_SIZE, ZERO_ROW = 32 * ZERO_SIZE;
constexpr int COEF_AT = Q * 512, ZERO_AT = COEF_AT + GROUPS * COEF_ROW, STAGE = ZERO_AT + GROUPS * ZERO_ROW;

#include "quick.cuh"

// The scales of group s of rows 16 half + lane / 4 and 8 further, from where a tile's scales stand.
__device__ __forceinline__ void load_scales(float (&scale)[2], u32 scales, int s, int half, int lane) {
    load_numbers<SCALE>(scale, scales + s * COEF_ROW + (lane / 4 * 4 + half * 2) * SCALE_SIZE);
}

// Their zeros; those of a signed code where none is stored.
__device__ __forceinline__ void load_zeros(float (&zero)[2], u32 zeros, int s, int half, int lane) {
    if constexpr (ZERO == 0) zero[0] = zero[1] = 1 << (Q - 1);
    else load_numbers<ZERO == 1 ? INT16 : FLOAT>(zero, zeros + s * ZERO_ROW + (lane / 4 * 4 + half * 2) * ZERO_SIZE);
}
