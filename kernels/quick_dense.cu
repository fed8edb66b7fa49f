// The dense weight [n, k] of layout `quick`'s tiles, each element rounded once.
//
// A warp takes a 32 x 128 tile, 16 rows at a time: lane 4g + t finds pairs of inputs of rows g and g + 8 in its registers, as a
// product would, so the rows pass through shared memory, where each lane picks up eight inputs that stand together.

#include "ptx.cuh"

constexpr bool TABLED = LQ_FORM == TABLE;
constexpr int Q = TABLED && LQ_BITS < 4 ? 4 : LQ_BITS;  // codes of a small table are stored as nibbles
constexpr int ZERO = 0;                                // codes keep theirs until they are float32
constexpr int ZEROS = LQ_ZERO;                         // 0 none, 1 int16, 2 float32
constexpr int SCALE = LQ_SCALE, XTYPE = LQ_OUT;
constexpr int WARPS = 4, PITCH = 136;  // 16-bit numbers from row to row: a warp's words meet all banks

#include "quick.cuh"

// grid: the tiles, WARPS to a block of threads.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
quick_dense(Bytes planes, const void* scale, const void* zero, const float* table, u16* out, int n, int k, int group, int groups,
            int stored, int table_row, int table_group) {
    __shared__ __align__(16) u16 rows[WARPS][16 * PITCH];
    __shared__ __align__(16) unsigned char tiles[WARPS][Q * 512];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int blocks = (k + 127) / 128;
    const long long unit = (long long)blockIdx.x * WARPS + warp;
    const int tile = (int)(unit / blocks), block = (int)(unit % blocks);
    if (tile >= (n + 31) / 32) return;
    const u32 at = shared_address(tiles[warp]);
    const u64 policy = read_once();
#pragma unroll
    for (int i = 0; i < Q; i++) copy_async(at + i * 512 + lane * 16, planes + unit * (Q * 512) + i * 512 + lane * 16, policy);
    commit();
    wait<0>();
    __syncwarp();
    const float worth = 1 << -UNIT;
    const Zero nothing = 0.f;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        Codes codes;
        codes.load(at, half, lane);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            // Groups are whole multiples of 32 inputs, or all of k.
            const int which = min((block * 128 + 32 * u) / group, groups - 1);
#pragma unroll
            for (int w = 0; w < 2; w++) {
                const int row = min(tile * 32 + 16 * half + 8 * w + g, n - 1);
                const u64 place = ((u64)tile * stored + which) * 32 + 4 * g + 2 * half + w;
                const float s = number<SCALE>(scale, place);
                float z = 0.f;
                if constexpr (!TABLED) z = ZEROS == 0 ? (float)(1 << (Q - 1)) : number<ZEROS == 1 ? INT16 : FLOAT>(zero, place);
                const float* levels = table + (u64)row * table_row + (u64)which * table_group;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 v = codes.operand(w, u, i / 2, i % 2, nothing);
                    float f[2] = {to_float<XTYPE>(v & 0xffff) * worth, to_float<XTYPE>(v >> 16) * worth};
#pragma unroll
                    for (int h = 0; h < 2; h++) f[h] = TABLED ? levels[(int)f[h]] * s : (f[h] - z) * s;
                    *(u32*)&rows[warp][(8 * w + g) * PITCH + 32 * u + 8 * i + 2 * t] = pair<XTYPE>(f[0], f[1]);
                }
            }
        }
        __syncwarp();
        // Sixteen lanes a row.
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = 2 * i + (lane >> 4), from = tile * 32 + 16 * half + r, input = block * 128 + lane % 16 * 8;
            u32 v[4];
            load16(v, shared_address(&rows[warp][r * PITCH + lane % 16 * 8]));
            if (from < n) store_eight(out + (u64)from * k, v, input, k);
        }
        __syncwarp();
    }
}
