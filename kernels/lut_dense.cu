// The dense weight [n, k] of layout `lut`'s tiles, each element rounded once: what m > 8 multiplies by.
//
// A warp takes one 32 x 128 tile, eight rows at a time: lane 4g + t finds inputs 4j + t of row g in its registers, so the
// rows pass through shared memory, where each lane picks up eight inputs that stand together.

#include "ptx.cuh"

constexpr int FORM = LQ_FORM;
constexpr int Q = LQ_BITS;
constexpr bool NIBBLES = LQ_NIBBLES;  // codes as nibbles, not as planes
constexpr int ZERO = LQ_ZERO;         // 0 none, 1 int16, 2 float32; binary: 2 for an offset of the scale's type
constexpr int SCALE = LQ_SCALE, OUT = LQ_OUT;
constexpr int WARPS = 8, PITCH = 136;  // 16-bit numbers from row to row: eight lanes' 16 bytes meet all banks

template <bool WIDE> struct Sum { typedef float type; };
template <> struct Sum<true> { typedef double type; };

// grid: the tiles, WARPS to a block of threads.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
lut_dense(Bytes planes, const void* scale, const void* zero, const float* table, u16* out, int n, int k, int group, int groups,
          int stored, int table_row, int table_group) {
    __shared__ u16 rows[WARPS][8 * PITCH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int blocks = (k + 127) / 128;
    const long long unit = (long long)blockIdx.x * WARPS + warp;
    const int tile = (int)(unit / blocks), block = (int)(unit % blocks);
    if (tile >= (n + 31) / 32) return;
    constexpr int SLABS = NIBBLES ? 4 : Q;
    uint4 slab[SLABS];
#pragma unroll
    for (int p = 0; p < SLABS; p++) slab[p] = *(const uint4*)(planes + unit * (SLABS * 512) + p * 512 + lane * 16);
    // Planes of float32 may cancel: their sum keeps more than the product of a weight needs.
    typedef typename Sum<FORM == BINARY && SCALE == FLOAT>::type sum_t;
#pragma unroll 1
    for (int o = 0; o < 4; o++) {
        const int row = min(tile * 32 + 8 * o + g, n - 1);
#pragma unroll 1
        for (int u = 0; u < 4; u++) {
            // Groups are whole multiples of 32 inputs, or all of k.
            const int which = min((block * 128 + 32 * u) / group, groups - 1);
            const u64 at = (u64)tile * stored + which;
            float s = 0.f, z = 0.f;
            const float* levels = table;
            sum_t alpha[FORM == BINARY ? Q : 1];
            if constexpr (FORM == BINARY) {
#pragma unroll
                for (int p = 0; p < Q; p++) alpha[p] = number<SCALE>(scale, (at * Q + p) * 32 + 4 * g + o);
                if constexpr (ZERO != 0) z = number<SCALE>(zero, at * 32 + 4 * g + o);
            } else {
                s = number<SCALE>(scale, at * 32 + 4 * g + o);
                if constexpr (FORM == TABLE) levels = table + (u64)row * table_row + (u64)which * table_group;
                else z = ZERO == 0 ? (float)(1 << (Q - 1)) : number<ZERO == 1 ? INT16 : FLOAT>(zero, at * 32 + 4 * g + o);
            }
            u32 word[SLABS];
#pragma unroll
            for (int p = 0; p < SLABS; p++) {
                const int which_word = NIBBLES ? u : o;
                const uint4 v = NIBBLES ? slab[0] : slab[p];
                word[p] = which_word == 0 ? v.x : which_word == 1 ? v.y : which_word == 2 ? v.z : v.w;
                if constexpr (!NIBBLES) word[p] >>= 4 * u;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int h = i >> 2, r = i & 3, at_bit = 16 * h + r;
                float v;
                if constexpr (FORM == BINARY) {
                    sum_t sum = z;
#pragma unroll
                    for (int p = 0; p < Q; p++) {
                        if constexpr (SCALE == FLOAT) sum += word[p] >> at_bit & 1 ? alpha[p] : -alpha[p];
                        else sum += as_float(__float_as_uint(-alpha[p]) ^ (word[p] << (31 - at_bit) & 0x80000000u));
                    }
                    v = (float)sum;
                } else {
                    u32 code = NIBBLES ? word[0] >> (8 * r + 4 * h) & 15 : 0;
                    if constexpr (!NIBBLES)
#pragma unroll
                        for (int p = 0; p < Q; p++) code |= (at_bit > p ? word[p] >> (at_bit - p) : word[p] << (p - at_bit)) & 1 << p;
                    v = FORM == TABLE ? levels[code] * s : ((float)code - z) * s;
                }
                rows[warp][g * PITCH + 32 * u + 16 * h + 4 * r + t] = rounded<OUT>(v);
            }
        }
        __syncwarp();
        // Four lanes a row: 32 inputs each, in 16-byte steps that lie side by side.
        const int from = tile * 32 + 8 * o + g;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int input = block * 128 + j * 32 + t * 8;
            u32 v[4];
            load16(v, shared_address(&rows[warp][g * PITCH + j * 32 + t * 8]));
            if (from < n) store_eight(out + (u64)from * k, v, input, k);
        }
        __syncwarp();
        // The next eight rows' codes take the place of these.
        if constexpr (NIBBLES) slab[0] = slab[1], slab[1] = slab[2], slab[2] = slab[3];
    }
}
