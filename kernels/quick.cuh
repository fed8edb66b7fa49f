// QUICK's weights (arXiv 2402.10076): packed in the order of a tensor core's operand, so that a code becomes a number in
// the register where the product needs it. Layout `quick` of kernels/layout.py says where each code stands.
//
// A pair of codes stands in the two halves of a word, masked in place: bits b to b + width of a half are a number worth
// code 2^(b-24), subnormal and exact (of a bfloat16 code 2^(b-133)). One fused multiply-add by a power of two brings all
// codes to the same worth and takes the zero off: exact for every whole zero. What else there is of a zero, half a code at
// most, comes after.

constexpr int SHIFTS = XTYPE == HALF ? 8 : 12;         // by so much of its place a code is shifted, the rest is in the factor
constexpr bool JOINED = Q == 3;  // both fields of a code are put side by side first, half as many numbers are to be made
constexpr int TOP = Q == 8 || JOINED ? 0 : Q & 1 ? Q - 1 : Q == 6 ? 4 : 0;  // the lowest bit of the last field
// A code is worth code 2^UNIT; fused multipliers of at most 2^15 (2^127) allow no more.
constexpr int UNIT = XTYPE == HALF ? -9 - TOP : -14;
constexpr bool HAS8 = Q == 8, HAS4 = !HAS8 && (Q & 4), HAS2 = Q & 2, HAS1 = Q & 1;
// Where the planes of a tile start, low bits first.
constexpr int AT2 = HAS4 ? 2048 : 0, AT1 = AT2 + (HAS2 ? 1024 : 0);

__device__ __forceinline__ constexpr u32 power_pair(int e) {
    const u32 bits = XTYPE == HALF ? (u32)(e + 15) << 10 : (u32)(e + 127) << 7;
    return bits | bits << 16;
}

// Adds field `low` of a pair of codes, at bit `at` of a word's halves, WIDTH bits wide.
template <int WIDTH> __device__ __forceinline__ u32 add_field(u32 sum, u32 word, int at, int low) {
    const int b = at & ~SHIFTS & 15;
    const u32 mask = ((1u << WIDTH) - 1) * 0x00010001u;
    constexpr int BASE = XTYPE == HALF ? 24 : 133;
    return fma_pair<XTYPE>(word >> (at - b) & mask << b, power_pair(BASE + UNIT - b + low), sum);
}

// A zero: what is whole of it, to be taken off a pair, in units of 2^UNIT, and what is then left to add to codes.
struct Zero {
    u32 whole;
    float rest;

    __device__ __forceinline__ Zero(float zero) {
        const float nearest = ZERO == 2 ? rintf(zero) : zero, worth = nearest * -(1.f / (float)(1 << -UNIT));
        whole = pair<XTYPE>(worth, worth);
        rest = ZERO == 2 ? nearest - zero : 0.f;
    }
};

// The words of 16 rows of a tile that a lane holds, and with them its operands.
struct Codes {
    u32 w8[2][8], w4[2][4], w2[4], w1[2];

    // Rows 16 half to 16 half + 15 of the tile at `stage`.
    __device__ __forceinline__ void load(u32 stage, int half, int lane) {
        if constexpr (HAS8)
#pragma unroll
            for (int i = 0; i < 4; i++) load16(w8[i / 2] + i % 2 * 4, stage + (half * 4 + i) * 512 + lane * 16);
        if constexpr (HAS4)
#pragma unroll
            for (int w = 0; w < 2; w++) load16(w4[w], stage + (half * 2 + w) * 512 + lane * 16);
        if constexpr (HAS2) load16(w2, stage + AT2 + half * 512 + lane * 16);
        if constexpr (HAS1) load8(w1, stage + AT1 + lane * 16 + half * 8);
        if constexpr (JOINED)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int w = i / 4, u = i % 4;
                const u32 top = u < 2 ? w1[w] << (2 - u) : w1[w] >> (u - 2);
                w4[w][u] = w2[2 * w + u / 2] >> 2 * (u % 2) & 0x33333333 | top & 0x44444444;
            }
    }

    // Row 8w + lane / 4 of the sixteen, inputs 32u + 16p + 8q + 2 (lane % 4) and the next, less the whole zero.
    __device__ __forceinline__ u32 operand(int w, int u, int p, int q, const Zero& zero) const {
        u32 v = zero.whole;
        if constexpr (HAS8) {
            const u32 word = w8[w][2 * u + p];
            if constexpr (XTYPE == HALF) v = add_field<8>(v, word, 8 * q, 0);
            else v = add_field<4>(add_field<4>(v, word, 8 * q, 0), word, 8 * q + 4, 4);
        }
        const int at = 8 * p + 4 * q;
        if constexpr (HAS4 || JOINED) v = add_field<JOINED ? 3 : 4>(v, w4[w][u], at, 0);
        if constexpr (HAS2 && !JOINED) v = add_field<2>(v, w2[2 * w + u / 2], at + 2 * (u % 2), HAS4 ? 4 : 0);
        if constexpr (HAS1 && !JOINED) v = add_field<1>(v, w1[w], at + u, TOP);
        return v;
    }
};
