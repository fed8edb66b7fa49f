// x, prepared in shared memory for lut.cu, whose constants it uses: as bit planes or bytes of fixed point, or as halves.

// Where a word of the planes holds the inputs of group s of a block.
__device__ __forceinline__ u32 bits_of_group(int s) {
    return GROUPS == 1 ? ~0u : GROUPS == 2 ? 0x00ff00ffu << 8 * s : 0x000f000fu << 4 * s;
}

// The exponent e with |x| < 2^e for every x of a block, from the greatest |x| as bits. Tiny blocks keep e at -100.
__device__ __forceinline__ int exponent(u32 greatest) { return max((int)(greatest >> 23) - 126, -100); }
__device__ __forceinline__ float power(int e) { return as_float((u32)(e + 127) << 23); }

// What one unit of a prepared x is worth, times FINAL's 2^-33 so that it stays in range; NaN if any x is not finite.
__device__ __forceinline__ float unit(u32 greatest) {
    if (greatest >= 0x7f800000u) return as_float(0x7fc00000u);
    return power(exponent(greatest) - (MODE == HALVES ? 24 : 23));
}

// Starts the copy of one block of x, all rows, to where it will be prepared: [row][128].
__device__ __forceinline__ void fetch_x(u32 to, const u16* x, int m, int k, int block, bool wide, int lane) {
#pragma unroll
    for (int i = lane; i < ROWS * 16; i += 32) {
        const int row = i >> 4, at = block * 128 + (i & 15) * 8;
        copy_eight(to + i * 16, x + (u64)row * k + at, row < m ? k - at : 0, wide, x);
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
    u32 v[4];
#pragma unroll
    for (int t = 0; t < 4; t++) v[t] = __float2int_rn(f[t] * up);
    // Transposes four 32 x 32 matrices of bits: lane and bit change places, halves of halves at a time.
#pragma unroll
    for (int step = 4; step >= 0; step--) {
        constexpr u32 LOW[5] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
        const bool upper = lane >> step & 1;
        const u32 keep = upper ? ~LOW[step] : LOW[step], turn = upper ? 32 - (1 << step) : 1 << step;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const u32 other = __shfl_xor_sync(~0u, v[t], 1 << step);
            v[t] = select(keep, v[t], __funnelshift_l(other, other, turn));
        }
    }
    if (lane < 24) ((uint4*)planes)[lane] = make_uint4(v[0], v[1], v[2], v[3]);
    if (lane == 31) facts[0] = unit(greatest);
#pragma unroll
    for (int s = 0; s < GROUPS; s++) {
        const u32 mask = bits_of_group(s);
        const int set = __popc(v[0] & mask) + __popc(v[1] & mask) + __popc(v[2] & mask) + __popc(v[3] & mask);
        // Planes 2t, 2t + 1, 8 + 2t, ... are lane t's of the product: twice 256^i for the odd ones, the last negative.
        int share = lane < 24 ? set << (lane >> 3) * 8 + (lane & 1) : 0;
        if (lane == 23) share = -share;
        share += __shfl_xor_sync(~0u, share, 1);
        share += __shfl_xor_sync(~0u, share, 8);
        share += __shfl_xor_sync(~0u, share, 16);
        if ((lane & 25) == 0) facts[(1 + s * SHARES + (lane >> 1)) * COLUMNS] = __int_as_float(share);
    }
}

// A block of one row of x as 24-bit fixed point, times 2^(7 - j) for the bit j of a byte that an input meets, cut into
// four signed bytes. Lane 16jh + 4r + t has inputs 32(2uh + jh) + 16h + 4r + t; word [jh][row, limb, t][r] is limb
// `limb` of the four with (h, uh) = 00, 01, 10, 11: what lane 4g + t of mma.m16n8k32 reads for column g = (row, limb).
__device__ __forceinline__ void prepare_bytes(unsigned char* to, float* facts, const u16 (&inputs)[4], int lane) {
    const int jh = lane >> 4, r = lane >> 2 & 3, t = lane & 3;
    float f[4];
    u32 greatest = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f[i] = to_float<XTYPE>(inputs[i]);
        greatest = max(greatest, __float_as_uint(f[i]) & 0x7fffffffu);
    }
    greatest = __reduce_max_sync(~0u, greatest);
    const float up = power(23 - exponent(greatest));
    const int j = 4 * jh + r;
    u32 limbs[4];
    // Bytes of v + 128 (1 + 256 + ...), less 128 each, are signed digits of v.
#pragma unroll
    for (int i = 0; i < 4; i++) limbs[i] = ((u32)(__float2int_rn(f[i] * up) << (7 - j)) + 0x80808080u) ^ 0x80808080u;
    const u32 low0 = __byte_perm(limbs[0], limbs[1], 0x5140), low1 = __byte_perm(limbs[2], limbs[3], 0x5140);
    const u32 high0 = __byte_perm(limbs[0], limbs[1], 0x7362), high1 = __byte_perm(limbs[2], limbs[3], 0x7362);
    const u32 limb[4] = {__byte_perm(low0, low1, 0x5410), __byte_perm(low0, low1, 0x7632), __byte_perm(high0, high1, 0x5410),
                         __byte_perm(high0, high1, 0x7632)};
    u32* words = (u32*)(to + jh * 512 + t * 16 + r * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) words[16 * i] = limb[i];
    if (lane == 31) facts[0] = unit(greatest);
    // Bytes with uh = 0 or 1 make group uh of 64 inputs, or with jh group 2uh + jh of 32.
#pragma unroll
    for (int uh = 0; uh < (GROUPS == 1 ? 1 : 2); uh++) {
        const int ones = GROUPS == 1 ? 0x01010101 : 0x00010001 << 8 * uh, group = GROUPS == 4 ? 2 * uh + jh : uh;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int share = (__dp4a((int)limb[2 * pair], ones, 0) + 256 * __dp4a((int)limb[2 * pair + 1], ones, 0)) << j;
            const int whole = __reduce_add_sync(GROUPS == 4 ? (jh ? 0xffff0000u : 0xffffu) : ~0u, share);
            if ((lane & (GROUPS == 4 ? 15 : 31)) == 0) facts[(1 + group * SHARES + pair) * COLUMNS] = __int_as_float(whole);
        }
    }
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
        *(u32*)(to + u * ROWS * 64 + t * 16 + r * 4) = pair<HALF>(f[0][t] * fill * up, f[1][t] * fill * up);
    if ((lane & 15) == 15) facts[0] = unit(greatest);
    // The sum in units of the product; in two factors, for the same reason.
    const int less = -9 - exponent(greatest);
    if ((lane & (GROUPS == 1 ? 15 : GROUPS == 2 ? 7 : 3)) == 0)
        facts[(1 + u / (4 / GROUPS)) * COLUMNS] = sum * power(less / 2) * power(less - less / 2);
}

// One block of x, prepared by one warp where fetch_x put it.
__device__ __forceinline__ void prepare(unsigned char* at, float* facts, int lane) {
    if constexpr (MODE == BITS) {
        const uint2 inputs = ((const uint2*)at)[(lane >> 2 & 3) * 8 + (lane >> 4) * 4 + (lane & 3)];
        __syncwarp();
        prepare_bits(at, facts, inputs, lane);
    } else if constexpr (MODE == BYTES) {
        u16 inputs[ROWS][4];
#pragma unroll
        for (int row = 0; row < ROWS; row++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                inputs[row][i] = ((const u16*)at)[row * 128 + (i & 1) * 64 + (lane >> 4) * 32 + (i >> 1) * 16 + (lane & 15)];
        __syncwarp();
#pragma unroll
        for (int row = 0; row < ROWS; row++)
            prepare_bytes(at + row / 2 * 1024 + row % 2 * 256, facts + row, inputs[row], lane);
    } else {
        uint2 inputs[(ROWS + 1) / 2][2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) {
            const uint2* from = (const uint2*)(at + (2 * i + (lane >> 4)) * 256 + (lane >> 2 & 3) * 64 + (lane & 3) * 8);
            inputs[i][0] = from[0], inputs[i][1] = from[4];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) {
            const int row = 2 * i + (lane >> 4);
            prepare_halves(at + row * 64, facts + row, inputs[i], lane);
        }
    }
}
