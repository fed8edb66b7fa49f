// The product of one 32 x 128 tile with prepared x, on tensor cores, in the three ways of lut.cu, whose constants it uses.

__device__ __forceinline__ u32 bit_pair(u32 word, u32 shifted, int j) {
    return j < 10 ? word & 0x00010001u << j : shifted & 0x00010001u << (j - 6);
}

__device__ __forceinline__ u32 code_pair(u32 pairs, u32 word, int r) {
    return load4(pairs + ((r == 0 ? word << 7 : word >> (8 * r - 7)) & 0x7f80u));
}

// A group's common factor.
__device__ __forceinline__ void load_factor(float (&factor)[4], u32 stage, int s, int g) {
    if constexpr (FORM == BINARY) factor[0] = factor[1] = factor[2] = factor[3] = 1.f;
    else load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + g * 4 * COEF_SIZE);
}

// A plane's factor in a group; bits are 0 or 1 and not -1 or 1, so it also counts against the group's sum of x.
__device__ __forceinline__ void add_plane(float (&rest)[4], float (&factor)[4], u32 stage, int s, int p, int g) {
    load_four<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + p * 32 * COEF_SIZE + g * 4 * COEF_SIZE);
#pragma unroll
    for (int i = 0; i < 4; i++) rest[i] += factor[i];
}

// What is subtracted from a group's product for each unit of sum(x), before the scale for affine weights.
__device__ __forceinline__ void load_rest(float (&rest)[4], u32 stage, int s, int g) {
    if constexpr (FORM == AFFINE && ZERO == 0) {
        rest[0] = rest[1] = rest[2] = rest[3] = 1 << (Q - 1);
    } else if constexpr (ZERO != 0) {
        load_four<FORM == BINARY ? SCALE : ZERO == 1 ? INT16 : FLOAT>(rest, stage + ZERO_AT + s * ZERO_ROW + g * 4 * ZERO_SIZE);
#pragma unroll
        for (int i = 0; i < 4; i++) rest[i] = FORM == BINARY ? -rest[i] : rest[i];
    } else {
        rest[0] = rest[1] = rest[2] = rest[3] = 0.f;
    }
}

// One 32 x 128 tile, one row of x. sum[0][o] is a lane's share of row 8o + g of w: planes 8i + 2t and the next of x;
// minus[0][o] is the whole, known to every lane.
template <int N>
__device__ __forceinline__ void tile_bits(float (&sum)[N][4], float (&minus)[N][4], u32 stage, u32 x, const float* facts, int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[3];
#pragma unroll
    for (int i = 0; i < 3; i++) b[i] = load4(x + i * 128 + lane * 4);
    const int top = t == 3 ? -2 : 2;  // the last plane of the last column block is the sign
    float total[GROUPS][4] = {}, rest[GROUPS][4], factor[4];
#pragma unroll
    for (int s = 0; s < GROUPS; s++) load_rest(rest[s], stage, s, g);
#pragma unroll
    for (int p = 0; p < Q; p++) {
        const uint4 v = load16(stage + p * 512 + lane * 16);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            if constexpr (FORM == BINARY) add_plane(rest[s], factor, stage, s, p, g);
            const u32 mask = GROUPS == 1 ? ~0u : GROUPS == 2 ? 0x00ff00ffu << 8 * s : 0x000f000fu << 4 * s;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int c[3][4];
#pragma unroll
                for (int i = 0; i < 3; i++) mma_bits(c[i], w[2 * half], w[2 * half + 1], b[i] & mask);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int high = c[2][2 * e] + top * c[2][2 * e + 1], middle = c[1][2 * e] + 2 * c[1][2 * e + 1];
                    const int units = (high * 256 + middle) * 256 + c[0][2 * e] + 2 * c[0][2 * e + 1];
                    float& to = total[s][2 * half + e];
                    to = fmaf(FORM == BINARY ? factor[2 * half + e] : (float)(1 << p), (float)units, to);
                }
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        load_factor(factor, stage, s, g);
#pragma unroll
        for (int o = 0; o < 4; o++) {
            sum[0][o] = fmaf(total[s][o] * factor[o], facts[0], sum[0][o]);
            minus[0][o] = fmaf(rest[s][o] * factor[o], facts[1 + s], minus[0][o]);
        }
    }
}

// One 32 x 128 tile. sum[i][o] is a lane's share of row 8o + g of w and row 2i + t / 2 of x: limbs 2(t % 2) and the
// next of x; minus[i][o] is the whole, known to both lanes.
template <int N>
__device__ __forceinline__ void tile_bytes(float (&sum)[N][4], float (&minus)[N][4], u32 stage, u32 x, const float* facts,
                                           int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[N][8];
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int jh = 0; jh < 2; jh++) {
            const uint4 v = load16(x + i * 1024 + jh * 512 + lane * 16);
            b[i][4 * jh] = v.x, b[i][4 * jh + 1] = v.y, b[i][4 * jh + 2] = v.z, b[i][4 * jh + 3] = v.w;
        }
    float total[GROUPS][N][4] = {}, rest[GROUPS][4], factor[4];
#pragma unroll
    for (int s = 0; s < GROUPS; s++) load_rest(rest[s], stage, s, g);
#pragma unroll
    for (int p = 0; p < Q; p++) {
        const uint4 v = load16(stage + p * 512 + lane * 16);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            if constexpr (FORM == BINARY) add_plane(rest[s], factor, stage, s, p, g);
            // Bits of a byte, and bytes, that belong to the group.
            constexpr int STEP = GROUPS == 4 ? 4 : 8;
            const int low = GROUPS == 4 ? s % 2 * 4 : 0;
            const u32 mask = GROUPS == 1 ? 0x01010101u : 0x00010001u << 8 * (GROUPS == 4 ? s / 2 : s);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int c[N][4] = {};
#pragma unroll
                for (int j = low; j < low + STEP; j += 2) {
                    const u32 a0 = w[2 * half] & mask << j, a1 = w[2 * half + 1] & mask << j;
                    const u32 a2 = w[2 * half] & mask << (j + 1), a3 = w[2 * half + 1] & mask << (j + 1);
#pragma unroll
                    for (int i = 0; i < N; i++) mma_bytes(c[i], a0, a1, a2, a3, b[i][j], b[i][j + 1]);
                }
#pragma unroll
                for (int i = 0; i < N; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& to = total[s][i][2 * half + e];
                        const float units = (float)(c[i][2 * e] + 256 * c[i][2 * e + 1]);
                        to = fmaf(FORM == BINARY ? factor[2 * half + e] : (float)(1 << p), units, to);
                    }
            }
        }
    }
    facts += t >> 1;
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        load_factor(factor, stage, s, g);
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int o = 0; o < 4; o++) {
                sum[i][o] = fmaf(total[s][i][o] * factor[o], facts[2 * i], sum[i][o]);
                minus[i][o] = fmaf(rest[s][o] * factor[o], facts[(1 + s) * COLUMNS + 2 * i], minus[i][o]);
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
    for (int s = 0; s < GROUPS; s++) load_rest(rest[s], stage, s, g);
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
                if constexpr (FORM == BINARY) add_plane(rest[s], factor, stage, s, p, g);
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
        load_factor(factor, stage, s, g);
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

template <int WHICH, int N>
__device__ __forceinline__ void add_tile(float (&sum)[N][4], float (&minus)[N][4], u32 stage, u32 x, const float* facts, u32 pairs,
                                         int lane) {
    if constexpr (WHICH == BITS) tile_bits(sum, minus, stage, x, facts, lane);
    else if constexpr (WHICH == BYTES) tile_bytes(sum, minus, stage, x, facts, lane);
    else tile_halves(sum, stage, x, facts, pairs, lane);
}
