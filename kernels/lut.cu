// LUT-GEMM's bit planes (arXiv 2206.09557), multiplied by tensor cores instead of looked up: y[m, n] = x[m, k] w[n, k].
//
// A weight is q bits; plane p holds bit p of every weight. w = sum_p coef_p bit_p - rest, coef and rest constant in a
// group, so y = sum_groups (sum_p coef_p (bit_p . x) - rest sum(x)). bit_p . x comes from a tensor core, in one of two ways:
//   ONE_BIT  x becomes 24-bit fixed point, one exponent for each row and 128 inputs; its bit planes are the columns of
//            mma.m16n8k128.b1 (AND, popcount). Nothing is unpacked: 3 instructions of tensor core for 2,048 weight bits.
//   HALF     up to 8 rows of x are the columns of mma.m16n8k16. A bit masked in place, (word & 0x00010001 << j), is two
//            halves worth 2^(j-24), subnormal and exact; 2^-j goes into x, which is scaled to fill the range of a half.
// A table's 4-bit codes need look-ups after all: a byte of two codes reads two halves from a table of 256 pairs in
// shared memory that every lane has to itself in its own bank, so that no look-up conflicts.
//
// Work: a thread block owns TILES tiles of 32 rows and, within a cluster, a range of k; about one block an SM. Its warps
// cut the 32 x 128 tiles of that rectangle, row by row, into equal runs, and each streams its run through its own ring
// of cp.async stages, deep enough to keep memory busy while x is prepared. A run may end inside a row tile: what a warp
// found for a row tile goes to a slot, and slots, then thread blocks of the cluster, are added in a fixed order, so
// results are bit-identical from run to run.
//
// Compiled by NVRTC with no header. LQ_* are integers from kernels/lut.py.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef const unsigned char* Bytes;

constexpr int AFFINE = 0, BINARY = 1, TABLE = 2;
constexpr int FORM = LQ_FORM;
constexpr int Q = LQ_BITS;        // planes; for a table the codes are nibbles whatever their bits
constexpr int ZERO = LQ_ZERO;     // 0 none, 1 int16, 2 float32; binary: 2 for an offset of the scale's type
constexpr int SCALE = LQ_SCALE;   // 0 half, 1 bfloat16, 2 float
constexpr int XTYPE = LQ_X;       // 0 half, 1 bfloat16
constexpr int ROWS = LQ_ROWS;     // rows of x: 1 or 2 for ONE_BIT, 2, 4 or 8 otherwise
constexpr int SUB = LQ_SUB;       // groups in a block of 128 inputs; 0 where a group spans blocks
constexpr int WARPS = LQ_WARPS, STAGES = LQ_STAGES;
constexpr bool ONE_BIT = LQ_ONE_BIT;

constexpr int GROUPS = SUB ? SUB : 1;                // factors that a tile needs
constexpr int SLABS = FORM == TABLE ? 4 : Q;         // 512-byte pieces of a 32 x 128 tile
constexpr int COEFS = FORM == BINARY ? Q : 1;        // factors of a group
constexpr int COEF_SIZE = SCALE == 2 ? 4 : 2;
constexpr int ZERO_SIZE = FORM == BINARY ? COEF_SIZE : ZERO == 1 ? 2 : 4;
constexpr int COEF_ROW = COEFS * 32 * COEF_SIZE, ZERO_ROW = ZERO ? 32 * ZERO_SIZE : 0;
constexpr int COEF_AT = SLABS * 512, ZERO_AT = COEF_AT + GROUPS * COEF_ROW, STAGE = ZERO_AT + GROUPS * ZERO_ROW;
constexpr int COLUMNS = ONE_BIT ? ROWS : 8;          // rows of x that are kept apart
constexpr int X_BLOCK = ROWS * (ONE_BIT ? 384 : 256);  // bytes of a block of 128 inputs
constexpr int FACTS = 1 + GROUPS;                    // floats a block and row of x: its unit, its sum in each group
constexpr int SLOT = 32 * COLUMNS;                   // floats of a slot
constexpr int PAIRS_AT = WARPS * STAGES * STAGE, SLOTS_AT = PAIRS_AT + (FORM == TABLE ? 32768 : 0);
constexpr float FINAL = (ONE_BIT ? 1.f : 8589934592.f) * (FORM == BINARY ? 2.f : 1.f);  // 2^33: see unit()

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float half_to_float(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

template <int TYPE> __device__ __forceinline__ float to_float(u16 bits) {
    return TYPE == 0 ? half_to_float(bits) : as_float((u32)bits << 16);
}

__device__ __forceinline__ u32 two_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void copy_async(u32 to, const unsigned char* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ u32 load4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

// Four numbers that stand together in shared memory: those of rows g, g + 8, g + 16, g + 24.
template <int TYPE> __device__ __forceinline__ void load_four(float (&out)[4], u32 at) {
    if constexpr (TYPE == 2) {
        const uint4 v = load16(at);
        out[0] = as_float(v.x), out[1] = as_float(v.y), out[2] = as_float(v.z), out[3] = as_float(v.w);
    } else {
        u32 low, high;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(at));
        if constexpr (TYPE == 3) {  // int16
            out[0] = (short)low, out[1] = (int)low >> 16, out[2] = (short)high, out[3] = (int)high >> 16;
        } else {
            out[0] = to_float<TYPE>(low & 0xffff), out[1] = to_float<TYPE>(low >> 16);
            out[2] = to_float<TYPE>(high & 0xffff), out[3] = to_float<TYPE>(high >> 16);
        }
    }
}

__device__ __forceinline__ void mma_bits(int (&c)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                 "{%7, %7, %7, %7};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A warp's place in its run: where the next tile and its factors are.
struct Run {
    Bytes planes, coef, zero;
    int block, blocks, skip;  // which block of the range is next, how many it has, how many of k it leaves out
    int first, groups;        // the range's first block; groups of k
    u32 span;                 // where groups span blocks, ceil(2^32 / blocks in a group)

    // Starts the copy of one tile and of its groups' factors into a stage of the ring, and steps on.
    __device__ __forceinline__ void fetch(u32 to, int lane) {
#pragma unroll
        for (int p = 0; p < SLABS; p++) copy_async(to + p * 512 + lane * 16, planes + p * 512 + lane * 16);
        const u32 group = SUB ? 0 : __umulhi(first + block, span);
        constexpr int COEF_UNITS = GROUPS * COEF_ROW / 16, ZERO_UNITS = GROUPS * ZERO_ROW / 16;
#pragma unroll
        for (int i = 0; i < COEF_UNITS; i += 32)
            if (i + lane < COEF_UNITS) copy_async(to + COEF_AT + (i + lane) * 16, coef + group * COEF_ROW + (i + lane) * 16);
#pragma unroll
        for (int i = 0; i < ZERO_UNITS; i += 32)
            if (i + lane < ZERO_UNITS) copy_async(to + ZERO_AT + (i + lane) * 16, zero + group * ZERO_ROW + (i + lane) * 16);
        const bool end = ++block == blocks;
        const int steps = end ? 1 + skip : 1, more = SUB ? steps * GROUPS : end ? groups : 0;
        planes += (u64)steps * (SLABS * 512);
        coef += (u64)more * COEF_ROW;
        zero += (u64)more * ZERO_ROW;
        if (end) block = 0;
    }
};

#if __CUDA_ARCH__ >= 900
// Programmatic dependent launch: the next kernel may start, and fetch its weights, while this one still runs.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ float load_remote(u32 at, u32 rank) {
    float f;
    asm volatile("{.reg .u32 a;\nmapa.shared::cluster.u32 a, %1, %2;\nld.shared::cluster.f32 %0, [a];}" : "=f"(f) : "r"(at), "r"(rank));
    return f;
}
#else
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_start() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ float load_remote(u32 at, u32) { return as_float(load4(at)); }
#endif

// The exponent e with |x| < 2^e for every x of a block, from the greatest |x| as bits. Tiny blocks keep e at -100.
__device__ __forceinline__ int exponent(u32 greatest) { return max((int)(greatest >> 23) - 126, -100); }
__device__ __forceinline__ float power(int e) { return as_float((u32)(e + 127) << 23); }

// What one unit of a prepared x is worth, times FINAL's 2^-33 so that it stays in range; NaN if any x is not finite.
__device__ __forceinline__ float unit(u32 greatest) {
    if (greatest >= 0x7f800000u) return as_float(0x7fc00000u);
    return power(exponent(greatest) - (ONE_BIT ? 23 : 24));
}

// Starts the copy of one block of x, all rows, to where it will be prepared: [row][128]. What is outside x is zero.
__device__ __forceinline__ void fetch_x(u32 to, const u16* x, int m, int k, int block, bool wide, int lane) {
    if (wide) {
#pragma unroll
        for (int i = lane; i < ROWS * 16; i += 32) {
            const int row = i >> 4, at = block * 128 + (i & 15) * 8, valid = row < m ? 2 * min(max(k - at, 0), 8) : 0;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + i * 16), "l"(valid ? x + (u64)row * k + at : x), "r"(valid) : "memory");
        }
    } else {
        for (int i = lane; i < ROWS * 128; i += 32) {
            const int row = i >> 7, at = block * 128 + (i & 127);
            const u16 v = row < m && at < k ? x[(u64)row * k + at] : (u16)0;
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + i * 2), "h"(v) : "memory");
        }
    }
}

__device__ __forceinline__ void four_floats(float (&f)[4], uint2 v) {
    f[0] = to_float<XTYPE>(v.x & 0xffff), f[1] = to_float<XTYPE>(v.x >> 16);
    f[2] = to_float<XTYPE>(v.y & 0xffff), f[3] = to_float<XTYPE>(v.y >> 16);
}

// A block of x as 24 bit planes: word [plane * 4 + t] holds, at bit 16h + 4u + r, input 32u + 16h + 4r + t.
__device__ __forceinline__ void prepare_bits(unsigned char* planes, float* facts, uint2 inputs, int lane) {
    float f[4];
    four_floats(f, inputs);
    u32 greatest = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) greatest = max(greatest, __float_as_uint(f[t]) & 0x7fffffffu);
    greatest = __reduce_max_sync(~0u, greatest);
    const float up = power(23 - exponent(greatest));
    int sum = 0;
    u32 v[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const int fixed = __float2int_rn(f[t] * up);
        sum += fixed;
        v[t] = fixed;
    }
    if constexpr (GROUPS == 1) {
        sum = __reduce_add_sync(~0u, sum);
    } else {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if constexpr (GROUPS == 2) sum += __shfl_xor_sync(~0u, sum, 4);
    }
    // Transposes four 32 x 32 matrices of bits: lane and bit change places, halves of halves at a time.
#pragma unroll
    for (int j = 16; j; j >>= 1) {
        const u32 low = j == 16 ? 0xffffu : j == 8 ? 0xff00ffu : j == 4 ? 0xf0f0f0fu : j == 2 ? 0x33333333u : 0x55555555u;
        const u32 keep = lane & j ? ~low : low;
        const int turn = lane & j ? 32 - j : j;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const u32 other = __shfl_xor_sync(~0u, v[t], j);
            v[t] = (v[t] & keep) | (__funnelshift_l(other, other, turn) & ~keep);
        }
    }
    if (lane < 24) ((uint4*)planes)[lane] = make_uint4(v[0], v[1], v[2], v[3]);
    const float worth = unit(greatest);
    if (lane == 31) facts[0] = worth;
    if ((lane & (GROUPS == 1 ? 31 : GROUPS == 2 ? ~8 & 31 : ~12 & 31)) == 0)
        facts[(1 + (lane >> 2) / (4 / GROUPS)) * COLUMNS] = (float)sum * worth;
}

// A block of two rows of x as pairs of halves, scaled to fill their range and, for bit planes, by 2^-position of the
// bit that a pair meets. Lane 16 row + 4u + r has inputs 32u + 16h + 4r + t; the pair of h = 0, 1 is word
// [u][4 row + t][r], as lanes 4 row + t read it.
__device__ __forceinline__ void prepare_halves(unsigned char* to, float* facts, const uint2 (&inputs)[2], int lane) {
    float f[2][4];
    four_floats(f[0], inputs[0]);
    four_floats(f[1], inputs[1]);
    const int u = lane >> 2 & 3, r = lane & 3;
    u32 greatest = 0;
    float sum = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        greatest = max(greatest, max(__float_as_uint(f[0][t]) & 0x7fffffffu, __float_as_uint(f[1][t]) & 0x7fffffffu));
        sum += f[0][t] + f[1][t];
    }
#pragma unroll
    for (int j = 8; j; j >>= 1) greatest = max(greatest, __shfl_xor_sync(~0u, greatest, j));
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if constexpr (GROUPS <= 2) sum += __shfl_xor_sync(~0u, sum, 4);
    if constexpr (GROUPS == 1) sum += __shfl_xor_sync(~0u, sum, 8);
    const int position = FORM == TABLE ? 0 : (u == 3 ? 6 : u == 2 && r >= 2 ? 2 : 4 * u) + r;
    // Two factors: their product may leave the range of a float where x is tiny.
    const float fill = power(min(15 - exponent(greatest), 127)), up = power(-position);
#pragma unroll
    for (int t = 0; t < 4; t++)
        *(u32*)(to + u * ROWS * 64 + t * 16 + r * 4) = two_halves(f[0][t] * fill * up, f[1][t] * fill * up);
    if ((lane & 15) == 15) facts[0] = unit(greatest);
    if ((lane & (GROUPS == 1 ? 15 : GROUPS == 2 ? 7 : 3)) == 0) facts[(1 + u / (4 / GROUPS)) * COLUMNS] = sum * (1.f / FINAL);
}

// One block of x, prepared by one warp where fetch_x put it.
__device__ __forceinline__ void prepare(unsigned char* at, float* facts, int lane) {
    constexpr int PARTS = ONE_BIT ? ROWS : ROWS / 2;
    uint2 inputs[PARTS][2];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int row = ONE_BIT ? i : 2 * i + (lane >> 4), first = (lane >> 2 & 3) * 32 + (lane & 3) * 4;
        const uint2* from = (const uint2*)(at + row * 256 + first * 2);
        inputs[i][0] = ONE_BIT ? from[4 * (lane >> 4)] : from[0];
        if constexpr (!ONE_BIT) inputs[i][1] = from[4];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int row = ONE_BIT ? i : 2 * i + (lane >> 4);
        if constexpr (ONE_BIT) prepare_bits(at + row * 384, facts + row, inputs[i][0], lane);
        else prepare_halves(at + row * 64, facts + row, inputs[i], lane);
    }
}

__device__ __forceinline__ u32 bit_pair(u32 word, u32 shifted, int j) {
    return j < 10 ? word & 0x00010001u << j : shifted & 0x00010001u << (j - 6);
}

__device__ __forceinline__ u32 code_pair(u32 pairs, u32 word, int r) {
    return load4(pairs + ((r == 0 ? word << 7 : word >> (8 * r - 7)) & 0x7f80u));
}

// What is subtracted from a group's product for each unit of sum(x), before the scale for affine weights.
__device__ __forceinline__ void load_rest(float (&rest)[4], u32 stage, int s, int g) {
    if constexpr (FORM == AFFINE && ZERO == 0) {
        rest[0] = rest[1] = rest[2] = rest[3] = 1 << (Q - 1);
    } else if constexpr (ZERO != 0) {
        load_four<FORM == BINARY ? SCALE : ZERO == 1 ? 3 : 2>(rest, stage + ZERO_AT + s * ZERO_ROW + g * 4 * ZERO_SIZE);
    } else {
        rest[0] = rest[1] = rest[2] = rest[3] = 0.f;
    }
}

// One 32 x 128 tile. sum[row of x][octet of rows of w] is a lane's share and rest the whole, known to every lane.
template <int N>
__device__ __forceinline__ void tile_bits(float (&sum)[N][4], float (&minus)[COLUMNS][4], u32 stage, u32 x, const float* facts,
                                          int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[COLUMNS][3];
#pragma unroll
    for (int m = 0; m < COLUMNS; m++)
#pragma unroll
        for (int i = 0; i < 3; i++) b[m][i] = load4(x + m * 384 + i * 128 + lane * 4);
    const int top = t == 3 ? -2 : 2;  // the last plane of the last column block is the sign
    float total[GROUPS][COLUMNS][4] = {}, rest[GROUPS][4], factor[4];
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        load_rest(rest[s], stage, s, g);
        if constexpr (FORM == BINARY)
#pragma unroll
            for (int i = 0; i < 4; i++) rest[s][i] = -rest[s][i];
    }
#pragma unroll
    for (int p = 0; p < Q; p++) {
        const uint4 v = load16(stage + p * 512 + lane * 16);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            if constexpr (FORM == BINARY) {
                load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + p * 32 * COEF_SIZE + g * 4 * COEF_SIZE);
#pragma unroll
                for (int i = 0; i < 4; i++) rest[s][i] += factor[i];
            }
            const u32 mask = GROUPS == 1 ? ~0u : GROUPS == 2 ? 0x00ff00ffu << 8 * s : 0x000f000fu << 4 * s;
#pragma unroll
            for (int m = 0; m < COLUMNS; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int c[3][4];
#pragma unroll
                    for (int i = 0; i < 3; i++) mma_bits(c[i], w[2 * half], w[2 * half + 1], b[m][i] & mask);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int high = c[2][2 * j] + top * c[2][2 * j + 1], middle = c[1][2 * j] + 2 * c[1][2 * j + 1];
                        const int units = (high * 256 + middle) * 256 + c[0][2 * j] + 2 * c[0][2 * j + 1];
                        float& to = total[s][m][2 * half + j];
                        to = fmaf(FORM == BINARY ? factor[2 * half + j] : (float)(1 << p), (float)units, to);
                    }
                }
        }
    }
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        if constexpr (FORM == AFFINE) {
            load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + g * 4 * COEF_SIZE);
        } else {
            factor[0] = factor[1] = factor[2] = factor[3] = 1.f;
        }
#pragma unroll
        for (int m = 0; m < COLUMNS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum[m][i] = fmaf(total[s][m][i] * factor[i], facts[m], sum[m][i]);
                minus[m][i] = fmaf(rest[s][i] * factor[i], facts[(1 + s) * COLUMNS + m], minus[m][i]);
            }
    }
}

// One 32 x 128 tile; sum[half][e] belongs to row 16 half + g + 8 (e / 2) of w and row 2t + e % 2 of x.
template <int N>
__device__ __forceinline__ void tile_halves(float (&sum)[N][4], u32 stage, u32 x, const float* facts, u32 pairs, int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[16];
#pragma unroll
    for (int u = 0; u < 4; u++) {
        // Columns without a row of x are zero.
        const uint4 v = g < ROWS ? load16(x + u * ROWS * 64 + lane * 16) : make_uint4(0, 0, 0, 0);
        b[4 * u] = v.x, b[4 * u + 1] = v.y, b[4 * u + 2] = v.z, b[4 * u + 3] = v.w;
    }
    float total[GROUPS][2][4] = {}, rest[GROUPS][4], factor[4];
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        load_rest(rest[s], stage, s, g);
        if constexpr (FORM == BINARY)
#pragma unroll
            for (int i = 0; i < 4; i++) rest[s][i] = -rest[s][i];
    }
    if constexpr (FORM == TABLE) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 v = load16(stage + 1024 * half + lane * 16), v8 = load16(stage + 1024 * half + 512 + lane * 16);
            const u32 w[4] = {v.x, v.y, v.z, v.w}, w8[4] = {v8.x, v8.y, v8.z, v8.w};
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int r = 0; r < 4; r += 2)
                    mma_half(total[u / (4 / GROUPS)][half], code_pair(pairs, w[u], r), code_pair(pairs, w8[u], r),
                             code_pair(pairs, w[u], r + 1), code_pair(pairs, w8[u], r + 1), b[4 * u + r], b[4 * u + r + 1]);
        }
    } else {
#pragma unroll
        for (int p = 0; p < Q; p++) {
            const uint4 v = load16(stage + p * 512 + lane * 16);
            const u32 w[4] = {v.x, v.y, v.z, v.w}, w6[4] = {v.x >> 6, v.y >> 6, v.z >> 6, v.w >> 6};
#pragma unroll
            for (int s = 0; s < GROUPS; s++) {
                if constexpr (FORM == BINARY) {
                    load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + p * 32 * COEF_SIZE + g * 4 * COEF_SIZE);
#pragma unroll
                    for (int i = 0; i < 4; i++) rest[s][i] += factor[i];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float c[4] = {};
#pragma unroll
                    for (int j = s * 16 / GROUPS; j < (s + 1) * 16 / GROUPS; j += 2)
                        mma_half(c, bit_pair(w[2 * half], w6[2 * half], j), bit_pair(w[2 * half + 1], w6[2 * half + 1], j),
                                 bit_pair(w[2 * half], w6[2 * half], j + 1),
                                 bit_pair(w[2 * half + 1], w6[2 * half + 1], j + 1), b[j], b[j + 1]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float f = FORM == BINARY ? factor[2 * half + e / 2] : (float)(1 << p);
                        total[s][half][e] = fmaf(f, c[e], total[s][half][e]);
                    }
                }
            }
        }
    }
    facts += 2 * t;
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        if constexpr (FORM != BINARY) {
            load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + g * 4 * COEF_SIZE);
        } else {
            factor[0] = factor[1] = factor[2] = factor[3] = 1.f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float f = factor[2 * half + e / 2];
                sum[half][e] = fmaf(total[s][half][e] * f, facts[e % 2], sum[half][e]);
                if constexpr (FORM != TABLE)
                    sum[half][e] = fmaf(-rest[s][2 * half + e / 2] * f, facts[(1 + s) * COLUMNS + e % 2], sum[half][e]);
            }
    }
}

template <bool BITS, int N>
__device__ __forceinline__ void tile(float (&sum)[N][4], float (&minus)[COLUMNS][4], u32 stage, u32 x, const float* facts,
                                     u32 pairs, int lane) {
    if constexpr (BITS) tile_bits(sum, minus, stage, x, facts, lane);
    else tile_halves(sum, stage, x, facts, pairs, lane);
}

__device__ __forceinline__ void store(u16* y, float value) {
    if constexpr (XTYPE == 0) {
        asm("{.reg .f16 h;\ncvt.rn.f16.f32 h, %1;\nst.global.b16 [%0], h;}" ::"l"(y), "f"(value) : "memory");
    } else {
        asm("{.reg .b16 h;\ncvt.rn.bf16.f32 h, %1;\nst.global.b16 [%0], h;}" ::"l"(y), "f"(value) : "memory");
    }
}

// What a warp found for a row tile, to its slot: [row of x][row of w].
template <int N> __device__ __forceinline__ void flush(float* slot, float (&sum)[N][4], float (&minus)[COLUMNS][4], float final, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if constexpr (ONE_BIT) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int o = 0; o < 4; o++) {
                float v = sum[c][o] * (float)(1 << 2 * t);  // lane t has planes 8i + 2t and 8i + 2t + 1
                v += __shfl_xor_sync(~0u, v, 1);
                v += __shfl_xor_sync(~0u, v, 2);
                if (t == o) slot[c * 32 + g + 8 * o] = v * final - minus[c][o];
                sum[c][o] = minus[c][o] = 0.f;
            }
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                slot[(2 * t + e % 2) * 32 + 16 * half + g + 8 * (e / 2)] = sum[half][e] * final;
                sum[half][e] = 0.f;
            }
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
         const u16* __restrict__ bias, u16* __restrict__ y, int m, int n, int k, int tiles, int groups, u32 span, int wide) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 split = gridDim.x, rank = blockIdx.x, blocks = (k + 127u) / 128;
    const u32 first = blocks * rank / split, count = blocks * (rank + 1) / split - first;
    float* slots = (float*)(shared + SLOTS_AT);
    unsigned char* prepared = (unsigned char*)(slots + (tiles + WARPS - 1) * SLOT);
    float* facts = (float*)(prepared + (blocks / split + 1) * X_BLOCK);
    // x first: behind the weights it would wait for all of them.
    wait_for_previous();
    for (u32 i = warp; i < count; i += WARPS) fetch_x(shared_address(prepared) + i * X_BLOCK, x, m, k, first + i, wide, lane);
    commit();
    const int top = blockIdx.y * tiles, height = min(tiles, (n + 31) / 32 - top);
    const u32 units = height * count, begin = units * warp / WARPS;
    const int mine = units * (warp + 1) / WARPS - begin;
    int row = begin / count, block = begin - row * count;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE;
    Run run = {planes, coef, zero, block, (int)count, (int)(blocks - count), (int)first, groups, span};
    const u64 place = (u64)(top + row) * blocks + first + block;
    run.planes += place * (SLABS * 512);
    run.coef += (SUB ? place * GROUPS : (u64)(top + row) * groups) * COEF_ROW;
    run.zero += (SUB ? place * GROUPS : (u64)(top + row) * groups) * ZERO_ROW;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < mine) run.fetch(ring + i * STAGE, lane);
        commit();
    }
    float final = FINAL;
    u32 pairs = 0;
    if constexpr (FORM == TABLE) {
        final = prepare_table((u32*)(shared + PAIRS_AT), table);
        pairs = shared_address(shared + PAIRS_AT) + lane * 4;
    }
    wait<STAGES - 1>();
    __syncwarp();
    for (u32 i = warp; i < count; i += WARPS) prepare(prepared + i * X_BLOCK, facts + i * FACTS * COLUMNS, lane);
    __syncthreads();
    let_next_start();
    float sum[ONE_BIT ? COLUMNS : 2][4] = {}, minus[COLUMNS][4] = {};
    u32 stage = ring, ahead = ring + (STAGES - 1) * STAGE;
    for (int i = 0; i < mine; i++) {
        wait<STAGES - 2>();
        __syncwarp();
        if (i + STAGES - 1 < mine) run.fetch(ahead, lane);
        commit();
        tile<ONE_BIT>(sum, minus, stage, shared_address(prepared) + block * X_BLOCK, facts + block * FACTS * COLUMNS, pairs, lane);
        ahead = stage;
        stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
        if (++block == count || i + 1 == mine) {
            // Along the runs, row + warp grows with each change of either: no two share a slot.
            flush(slots + (row + warp) * SLOT, sum, minus, final, lane);
            block = 0;
            row++;
        }
    }
    if (mine == 0)
        for (int i = lane; i < SLOT; i += 32) slots[(row + warp) * SLOT + i] = 0.f;
    __syncthreads();
    // Over the warps that met a row tile, then over the cluster, each time from the first to the last.
    float* whole = (float*)shared;
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const u32 r = e / SLOT, from = ((r * count + 1) * WARPS - 1) / units, to = ((r + 1) * count * WARPS - 1) / units;
        const float* slot = slots + (r + from) * SLOT + e % SLOT;
        float v = 0.f;
#pragma unroll 4
        for (u32 w = from; w <= to; w++, slot += SLOT) v += *slot;
        whole[e] = v;
    }
    if (split > 1) cluster_arrive(), cluster_wait();
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const int column = e % SLOT / 32, at = (top + e / SLOT) * 32 + e % 32;
        if (column >= m || at >= n || e / 32 % split != rank) continue;
        float v = whole[e];
        if (split > 1) {
            v = 0.f;
            for (u32 i = 0; i < split; i++) v += load_remote(shared_address(whole + e), i);
        }
        if (bias) v += to_float<XTYPE>(bias[at]);
        store(y + (u64)column * n + at, v);
    }
    if (split > 1) cluster_arrive(), cluster_wait();  // nobody leaves while another still reads its sums
}
