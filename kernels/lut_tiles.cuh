// The product of one 32 x 128 tile with prepared x, on tensor cores, in the three ways of lut.cu, whose constants it uses.

__device__ __forceinline__ u32 bit_pair(u32 word, u32 shifted, int j) {
    return j < 10 ? word & 0x00010001u << j : shifted & 0x00010001u << (j - 6);
}

__device__ __forceinline__ u32 code_pair(u32 pairs, u32 word, int r) {
    return load4(pairs + ((r == 0 ? word << 7 : word >> (8 * r - 7)) & 0x7f80u));
}

// The factors of plane p of a binary weight in group s.
__device__ __forceinline__ void load_alpha(float (&alpha)[4], u32 stage, int s, int p, int g) {
    load_numbers<SCALE>(alpha, stage + COEF_AT + s * COEF_ROW + p * 32 * COEF_SIZE + g * 4 * COEF_SIZE);
}

// One group's products made sums: `total` less the zero (or more the offset) times `ones`, the product of x with nothing
// but ones, times the scale and the unit of x.
template <int N, int R>
__device__ __forceinline__ void add_group(float (&sum)[N][4], const float (&total)[N][4], const float (&ones)[N][R], const float (&units)[N][R],
                                          u32 stage, int s, int g) {
    float factor[4] = {1.f, 1.f, 1.f, 1.f}, rest[4] = {};
    if constexpr (FORM != BINARY) load_numbers<SCALE>(factor, stage + COEF_AT + s * COEF_ROW + g * 4 * COEF_SIZE);
    if constexpr (FORM == AFFINE && ZERO == 0) {
        rest[0] = rest[1] = rest[2] = rest[3] = 1 << (Q - 1);
    } else if constexpr (ZERO != 0) {
        load_numbers<FORM == BINARY ? SCALE : ZERO == 1 ? INT16 : FLOAT>(rest, stage + ZERO_AT + s * ZERO_ROW + g * 4 * ZERO_SIZE);
    }
    constexpr float SIGN = FORM != BINARY ? -1.f : MODE == HALVES ? 0.5f : 1.f;
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            // Of the halves of a row tile, e counts rows of w by two; else it counts octets of them.
            const int o = MODE == HALVES ? 2 * i + e / 2 : e;
            float v = total[i][e];
            if constexpr (FORM != TABLE && (FORM == AFFINE || ZERO != 0)) v = fmaf(SIGN * rest[o], ones[i][e % R], v);
            sum[i][e] = fmaf(v * factor[o], units[i][e % R], sum[i][e]);
        }
}

// One 32 x 128 tile, one row of x. sum[0][o] is a lane's share of row 8o + g of w: planes 8i + 2t and the next of x.
template <int N>
__device__ __forceinline__ void tile_bits(float (&sum)[N][4], u32 stage, u32 x, const float* facts, int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[3];
#pragma unroll
    for (int i = 0; i < 3; i++) b[i] = load4(x + i * 128 + lane * 4);
    const int top = t == 3 ? -2 : 2;  // the last plane of the last column block is the sign
    float total[GROUPS][1][4] = {};
    int ones[GROUPS];
#pragma unroll
    for (int s = 0; s < GROUPS; s++) ones[s] = __float_as_int(facts[1 + s * SHARES + t]);
#pragma unroll
    for (int p = 0; p < Q; p++) {
        u32 w[4];
        load16(w, stage + p * 512 + lane * 16);
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            float alpha[4];
            if constexpr (FORM == BINARY) load_alpha(alpha, stage, s, p, g);
            const u32 mask = bits_of_group(s);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int c[3][4];
#pragma unroll
                for (int i = 0; i < 3; i++) mma_bits(c[i], w[2 * half], w[2 * half + 1], b[i] & mask);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int high = c[2][2 * e] + top * c[2][2 * e + 1], middle = c[1][2 * e] + 2 * c[1][2 * e + 1];
                    const int units = (high * 256 + middle) * 256 + c[0][2 * e] + 2 * c[0][2 * e + 1];
                    float& to = total[s][0][2 * half + e];
                    to = FORM == BINARY ? fmaf(alpha[2 * half + e], (float)(2 * units - ones[s]), to) : fmaf(1 << p, (float)units, to);
                }
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        const float whole[1][1] = {{(float)ones[s]}}, units[1][1] = {{facts[0]}};
        add_group(sum, total[s], whole, units, stage, s, g);
    }
}

// One 32 x 128 tile. sum[i][o] is a lane's share of row 8o + g of w and row 2i + t / 2 of x: limbs 2(t % 2) and the
// next of x.
template <int N>
__device__ __forceinline__ void tile_bytes(float (&sum)[N][4], u32 stage, u32 x, const float* facts, int lane) {
    const int g = lane >> 2, t = lane & 3;
    u32 b[N][8];
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int jh = 0; jh < 2; jh++) load16(b[i] + 4 * jh, x + i * 1024 + jh * 512 + lane * 16);
    float total[GROUPS][N][4] = {};
    int ones[GROUPS][N];
    facts += t >> 1;
#pragma unroll
    for (int s = 0; s < GROUPS; s++)
#pragma unroll
        for (int i = 0; i < N; i++) ones[s][i] = __float_as_int(facts[(1 + s * SHARES + (t & 1)) * COLUMNS + 2 * i]);
#pragma unroll
    for (int p = 0; p < Q; p++) {
        u32 w[4];
        load16(w, stage + p * 512 + lane * 16);
#pragma unroll
        for (int s = 0; s < GROUPS; s++) {
            float alpha[4];
            if constexpr (FORM == BINARY) load_alpha(alpha, stage, s, p, g);
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
                        const int units = c[i][2 * e] + 256 * c[i][2 * e + 1];
                        to = FORM == BINARY ? fmaf(alpha[2 * half + e], (float)(2 * units - ones[s][i]), to) : fmaf(1 << p, (float)units, to);
                    }
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        float whole[N][1], units[N][1];
#pragma unroll
        for (int i = 0; i < N; i++) whole[i][0] = ones[s][i], units[i][0] = facts[2 * i];
        add_group(sum, total[s], whole, units, stage, s, g);
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
        if (g < ROWS) load16(b + 4 * u, x + u * ROWS * 64 + lane * 16);
        else b[4 * u] = b[4 * u + 1] = b[4 * u + 2] = b[4 * u + 3] = 0;
    }
    facts += 2 * t;
    float total[GROUPS][2][4] = {};
    if constexpr (FORM == TABLE) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 w[4], w8[4];
            load16(w, stage + 1024 * half + lane * 16);
            load16(w8, stage + 1024 * half + 512 + lane * 16);
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int r = 0; r < 4; r += 2)
                    mma_pairs<HALF>(total[u / (4 / GROUPS)][half], code_pair(pairs, w[u], r), code_pair(pairs, w8[u], r),
                                    code_pair(pairs, w[u], r + 1), code_pair(pairs, w8[u], r + 1), b[4 * u + r], b[4 * u + r + 1]);
        }
    } else {
#pragma unroll
        for (int p = 0; p < Q; p++) {
            u32 w[4];
            load16(w, stage + p * 512 + lane * 16);
            const u32 w6[4] = {w[0] >> 6, w[1] >> 6, w[2] >> 6, w[3] >> 6};
#pragma unroll
            for (int s = 0; s < GROUPS; s++) {
                float alpha[4], start[2] = {};
                if constexpr (FORM == BINARY) {
                    load_alpha(alpha, stage, s, p, g);
                    // Half of what bits as -1 and 1 come to.
                    start[0] = -0.5f * facts[(1 + s) * COLUMNS], start[1] = -0.5f * facts[(1 + s) * COLUMNS + 1];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float c[4] = {start[0], start[1], start[0], start[1]};
#pragma unroll
                    for (int j = s * 16 / GROUPS; j < (s + 1) * 16 / GROUPS; j += 2)
                        mma_pairs<HALF>(c, bit_pair(w[2 * half], w6[2 * half], j), bit_pair(w[2 * half + 1], w6[2 * half + 1], j),
                                        bit_pair(w[2 * half], w6[2 * half], j + 1),
                                        bit_pair(w[2 * half + 1], w6[2 * half + 1], j + 1), b[j], b[j + 1]);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float f = FORM == BINARY ? alpha[2 * half + e / 2] : (float)(1 << p);
                        total[s][half][e] = fmaf(f, c[e], total[s][half][e]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        float ones[2][2], units[2][2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            ones[0][e] = ones[1][e] = facts[(1 + s) * COLUMNS + e];
            units[0][e] = units[1][e] = facts[e];
        }
        add_group(sum, total[s], ones, units, stage, s, g);
    }
}

template <int N>
__device__ __forceinline__ void add_tile(float (&sum)[N][4], u32 stage, u32 x, const float* facts, u32 extra, int lane) {
    if constexpr (MODE == BITS) tile_bits(sum, stage, x, facts, lane);
    else if constexpr (MODE == BYTES) tile_bytes(sum, stage, x, facts, lane);
    else tile_halves(sum, stage, x, facts, extra + lane * 4, lane);
}
