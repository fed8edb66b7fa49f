// QUICK (arXiv 2402.10076) for batches, on Hopper's warpgroup products: y[m, n] = x[m, k] w[n, k] as w x^T. The weights are
// the operand that wgmma takes from registers, 64 rows a warpgroup: they become numbers there (quick.cuh), times their
// group's scale, and never pass through shared memory as numbers. x lies there, 128-byte rows in the swizzle that wgmma reads.
//
// A thread block takes tiles of 32 * ROW_TILES rows of w and COLUMNS rows of x, block by block of 128 inputs, through a ring
// of stages that the copy engine fills. The tensor core is never waited for: while it takes FLIGHT steps of 16 inputs, the
// next are unpacked. Where tiles are few, k is cut over WAYS warpgroups and over the thread blocks of a cluster; their sums
// are added from the first to the last, so results are bit-identical from run to run. Where they are many, a thread block
// takes one after the other.
//
// LQ_* are integers from kernels/quick_batch.py.

#include "ptx.cuh"

#if __CUDA_ARCH__ == 900
#include "quick_tile.cuh"

constexpr int COLUMNS = LQ_ROWS;  // rows of x in a tile: 16, 32, 64, 128 or 256
constexpr int WAYS = LQ_WAYS;     // warpgroups that take a tile's blocks in turn
constexpr int SPLIT = LQ_SPLIT;   // thread blocks of a cluster, which cut k
constexpr int THREADS = WARPS * 32, HEIGHT = WARPS / 4 / WAYS, ROW_TILES = 2 * HEIGHT;
constexpr int X_HALF = COLUMNS * 128, X_BLOCK = 2 * X_HALF;  // bytes of 64 inputs of all rows, and of 128
constexpr int FLIGHT = COLUMNS < 128 ? 2 : 1;                // steps of 16 inputs that go to the tensor core together
constexpr int SUMS = COLUMNS / 2;                            // of a thread
// Whether each group's sums are scaled, and not its numbers: less work where a group has fewer sums than numbers, if another
// set of sums finds room.
constexpr bool LATE = COLUMNS <= 64;
// The step at which the next block is opened. Early, tiles of 128 rows do not wait for its factors; smaller ones would wait for
// memory, larger ones wait for the tensor core alone.
constexpr bool EARLY = COLUMNS == 128 && GROUPS == 1;
constexpr int OPEN_AT = EARLY ? 4 : 8 - FLIGHT;
// Partial sums of an element, and how many of the sums a thread finds it adds up; rows of y that wait together to be stored.
constexpr int PARTS = WAYS * SPLIT, OWN = (SUMS + 4 * PARTS - 1) / (4 * PARTS) * 4, OUT_ROWS = OWN < 16 ? 2 * OWN : 32;
static_assert(2 * OWN % OUT_ROWS == 0, "a share of whole pieces");
constexpr int WIDTH = EPILOGUE == SILU_MUL ? 1 : 2;  // columns of y for two rows of w
// The codes of a stage's row tiles, then their scales, then their zeros.
constexpr int W_STAGE = ROW_TILES * STAGE, SCALES_AT = ROW_TILES * COEF_AT, ZEROS_AT = ROW_TILES * ZERO_AT;
constexpr int TILES_AT = STAGES * X_BLOCK, OUT_AT = TILES_AT + STAGES * W_STAGE, BARRIERS_AT = OUT_AT + WARPS / 4 * OUT_ROWS * 128;

extern __shared__ __align__(1024) unsigned char shared[];

// The 64 x 16 operand in registers times 16 inputs of COLUMNS rows of x, added to d, or in its place.
__device__ __forceinline__ void wgmma(float (&d)[SUMS], const u32 (&a)[4], u64 x, int add) {
#define LQ_KIND(N, T) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " "
#define LQ_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LQ_F16(i) LQ_F4(i), LQ_F4(i + 4), LQ_F4(i + 8), LQ_F4(i + 12)
#define LQ_F64(i) LQ_F16(i), LQ_F16(i + 16), LQ_F16(i + 32), LQ_F16(i + 48)
#define LQ_D8 "{%0,%1,%2,%3,%4,%5,%6,%7"
#define LQ_D16 LQ_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LQ_D32 LQ_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LQ_D64 LQ_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LQ_D128 LQ_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LQ_WGMMA(N, D, A0, A1, A2, A3, X, ADD, ...)                                                                         \
    if constexpr (XTYPE == HALF)                                                                                            \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; " LQ_KIND(N, f16) D "}, {" A0 "," A1 "," A2 "," A3 "}, "    \
                     X ", p, 1, 1, 0;}" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add));      \
    else                                                                                                                    \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; " LQ_KIND(N, bf16) D "}, {" A0 "," A1 "," A2 "," A3 "}, "   \
                     X ", p, 1, 1, 0;}" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add));
#if LQ_ROWS == 16
    LQ_WGMMA(16, LQ_D8, "%8", "%9", "%10", "%11", "%12", "%13", LQ_F4(0), LQ_F4(4))
#elif LQ_ROWS == 32
    LQ_WGMMA(32, LQ_D16, "%16", "%17", "%18", "%19", "%20", "%21", LQ_F16(0))
#elif LQ_ROWS == 64
    LQ_WGMMA(64, LQ_D32, "%32", "%33", "%34", "%35", "%36", "%37", LQ_F16(0), LQ_F16(16))
#elif LQ_ROWS == 128
    LQ_WGMMA(128, LQ_D64, "%64", "%65", "%66", "%67", "%68", "%69", LQ_F64(0))
#else
    LQ_WGMMA(256, LQ_D128, "%128", "%129", "%130", "%131", "%132", "%133", LQ_F64(0), LQ_F64(64))
#endif
}

// The operands are complete: nothing of them may be computed behind this.
template <int N> __device__ __forceinline__ void wgmma_fence(u32 (&a)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Nothing that `first` and `second` make may be computed before this.
template <int PENDING> __device__ __forceinline__ void wgmma_wait(u32& first, u32& second) {
    asm volatile("wgmma.wait_group.sync.aligned %2;" : "+r"(first), "+r"(second) : "n"(PENDING) : "memory");
}

// What wgmma is told of x: rows of 128 bytes, swizzled, eights of rows 1024 bytes apart.
__device__ __forceinline__ u64 describe(u32 at) { return (u64)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// Of two rows' groups, what is taken off codes, the scale, and what is left of a zero. Codes less a zero are worth 2^UNIT
// each. LATE scales sums in float32. Else numbers are scaled as they are made, what is left of a zero is too, and a bfloat16 has room to leave 2^UNIT for the end; a half has not, and where a scale over 2^UNIT is none, 2^15 of
// it is left for a second product.
struct Factors {
    Zero zero[2];
    float late[2];
    u32 scale[2], second[2], rest[2];
    bool large;

    __device__ __forceinline__ Factors() : zero{0.f, 0.f} {}
    __device__ __forceinline__ Factors(u32 scales, u32 zeros, int s, int half, int lane) : zero{0.f, 0.f} {
        constexpr bool WHOLE = XTYPE == HALF;
        constexpr float UP = (float)(1 << -UNIT);
        float z[2];
        load_zeros(z, zeros, s, half, lane);
        for (int w = 0; w < 2; w++) zero[w] = Zero(z[w]);
        if constexpr (LATE) {
            load_scales(late, scales, s, half, lane);
            for (int w = 0; w < 2; w++) late[w] *= UP, rest[w] = pair<XTYPE>(zero[w].rest / UP, zero[w].rest / UP);
            return;
        }
        float f[2];
        if constexpr (SCALE == XTYPE) {
            u32 both = load4(scales + s * COEF_ROW + (lane / 4 * 4 + half * 2) * SCALE_SIZE);
            for (int w = 0; w < 2; w++) f[w] = to_float<XTYPE>(both >> 16 * w & 0xffff);
            if constexpr (WHOLE) both = product_pair<XTYPE>(both, power_pair(-UNIT));
            for (int w = 0; w < 2; w++) scale[w] = __byte_perm(both, 0, w ? 0x3232 : 0x1010);
            // Infinite: the exponent's bits and one more are a sign.
            large = WHOLE && ((both & 0x7c007c00) + 0x04000400 & 0x80008000);
        } else {
            load_scales(f, scales, s, half, lane);
            for (int w = 0; w < 2; w++) {
                const float times = WHOLE ? f[w] * UP : f[w];
                scale[w] = pair<XTYPE>(times, times);
            }
            large = WHOLE && fmaxf(fabsf(f[0]), fabsf(f[1])) * UP > 65504.f;
        }
        auto leave = [&](int w, float times) { rest[w] = pair<XTYPE>(zero[w].rest * times, zero[w].rest * times); };
        if constexpr (ZERO == 2)
            for (int w = 0; w < 2; w++) leave(w, WHOLE ? f[w] : f[w] / UP);
        if (large)
            for (int w = 0; w < 2; w++) {
                const bool over = fabsf(f[w] * UP) > 65504.f;
                // A number stays one: a weight of zero must stay zero.
                float first = over ? f[w] * UP * (1.f / 32768.f) : f[w] * UP;
                if (fabsf(first) < as_float(0x7f800000)) first = fminf(fmaxf(first, -65504.f), 65504.f);
                scale[w] = pair<XTYPE>(first, first), second[w] = power_pair(over ? 15 : 0);
                if constexpr (ZERO == 2) leave(w, over ? f[w] * (1.f / 32768.f) : f[w]);
            }
    }
};
constexpr float FINAL = LATE || XTYPE == HALF ? 1.f : (float)(1 << -UNIT);

// The first row of x of a tile: the last tile repeats rows of the one before, since what lies beyond x is slow to fetch.
__device__ __forceinline__ int row_of_x(int tile, int m) { return max(min(tile * COLUMNS, m - COLUMNS), 0); }

// grid (size of a cluster, clusters): each cluster takes tiles of the first `units`, rows of w first. y's rows are `pitch` long;
// boxes of x may have fewer than COLUMNS rows, `x_bytes` in two.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
quick_batch(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap planes, const __grid_constant__ TensorMap coef,
            const __grid_constant__ TensorMap zero, const u16* __restrict__ bias, const u16* __restrict__ other, u16* __restrict__ y, int m, int n,
            int k, int range, u32 span, int units, int pitch, int x_bytes) {
    // By a shuffle the compiler sees that a warp is of one mind.
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    const int rank = SPLIT > 1 ? blockIdx.x : 0, blocks = (k + 127) / 128, tiles = (n + 31) / 32;
    const int first = rank * range, count = min(range, blocks - first);
    const int heights = (tiles + ROW_TILES - 1) / ROW_TILES;
    const u32 x_ring = shared_address(shared), w_ring = x_ring + TILES_AT, barriers = x_ring + BARRIERS_AT;
    // Of each stage a barrier that it is filled, and one that all who read it have done so.
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(barriers + i * 16, 3), barrier_init(barriers + i * 16 + 8, 4 * HEIGHT);
        barriers_ready();
    }
    __syncthreads();
    wait_for_previous();
    int stage = 0, turn = 0;
    if (warp >= WARPS) {
        // The warpgroup that fetches: a warp for x, one for codes, one for scales and zeros, each by one lane: an instruction
        // that asks for a copy takes some hundred clocks.
        fewer_registers<WARPS == 16 ? 40 : 56>();
        const int what = warp - WARPS;
        const u64 policy = m <= COLUMNS ? read_once() : read_again();
        let_next_start();
        if (what < 3 && lane == 0)
#pragma unroll 1
            for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
                const int top = unit % heights * ROW_TILES, column = row_of_x(unit / heights, m);
#pragma unroll 1
                for (int block = first; block < first + count; block++) {
                    const u32 filled = barriers + stage * 16, xs = x_ring + stage * X_BLOCK, ws = w_ring + stage * W_STAGE;
                    const int group = SUB ? block * GROUPS : __umulhi(block, span);
                    if (turn > 0) barrier_wait(filled + 8, turn - 1 & 1);
                    if (what == 0) {
                        barrier_expect(filled, x_bytes);
#pragma unroll
                        for (int h = 0; h < 2; h++) copy_box(xs + h * X_HALF, x, block * 128 + 64 * h, column, filled);
                    } else if (what == 1) {
                        barrier_expect(filled, SCALES_AT);
                        copy_box(ws, planes, 0, block * Q, top, filled, policy);
                    } else {
                        barrier_expect(filled, W_STAGE - SCALES_AT);
                        copy_box(ws + SCALES_AT, coef, 0, group, top, filled, policy);
                        if constexpr (ZERO != 0) copy_box(ws + ZEROS_AT, zero, 0, group, top, filled, policy);
                    }
                    if (++stage == STAGES) stage = 0, turn++;
                }
            }
        __syncwarp();
        if (SPLIT > 1) cluster_arrive(), cluster_wait(), cluster_leave(), cluster_wait();
        return;
    }
    // Of 64 Ki registers, or of the 60 Ki that 640 threads start with, what the warps that fetch leave.
    if constexpr (WARPS == 8) more_registers<224>();
    else if constexpr (WARPS == 16) more_registers<104>();
    const int way = warp / 4 / HEIGHT, tall = warp / 4 % HEIGHT, tile = 2 * tall + warp % 4 / 2, half = warp & 1;
    const int mine = (count - way + WAYS - 1) / WAYS;
    stage = way;
    float sum[SUMS], part[SUMS], due[2];  // `part` of the group at hand, whose scales are `due`
    u32 a[2][FLIGHT][4];
    Codes codes;
    Factors factors;
    // The factors of group s of the block that was opened last.
    auto take = [&](int s) {
        const u32 at = w_ring + stage * W_STAGE;
        return Factors(at + SCALES_AT + tile * GROUPS * COEF_ROW, at + ZEROS_AT + tile * GROUPS * ZERO_ROW, s, half, lane);
    };
    // What every number is made with.
    auto anchor = [&](int w) -> u32& { return LATE ? factors.zero[w].whole : factors.scale[w]; };
    // FLIGHT steps of 16 inputs of the block at hand, all of one group, as numbers.
    auto unpack = [&](u32 (&a)[FLIGHT][4], int first) {
        if (GROUPS > 1 && first * GROUPS % 8 == 0) factors = take(first * GROUPS / 8);
#pragma unroll
        for (int i = 0; i < FLIGHT * 4; i++) {
            const int step = first + i / 4, w = i % 2;
            const u32 v = codes.operand(w, step / 2, step % 2, i % 4 / 2, factors.zero[w]);
            if constexpr (LATE) a[i / 4][i % 4] = ZERO == 2 ? fma_pair<XTYPE>(v, power_pair(0), factors.rest[w]) : v;
            else a[i / 4][i % 4] = ZERO == 2 ? fma_pair<XTYPE>(v, factors.scale[w], factors.rest[w]) : product_pair<XTYPE>(v, factors.scale[w]);
        }
        if (!LATE && factors.large)
#pragma unroll
            for (int i = 0; i < FLIGHT * 4; i++) a[i / 4][i % 4] = product_pair<XTYPE>(a[i / 4][i % 4], factors.second[i % 2]);
    };
    // The next block, when it has come.
    auto open = [&](Codes& codes, Factors& factors) {
        barrier_wait(barriers + stage * 16, turn & 1);
        codes.load(w_ring + stage * W_STAGE + tile * COEF_AT, half, lane);
        if (GROUPS == 1) factors = take(0);
    };
    // Nothing more is read of a stage.
    auto release = [&](int stage) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers + stage * 16 + 8);
    };
#pragma unroll 1
    for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
        const int top = unit % heights * ROW_TILES, column = row_of_x(unit / heights, m);
#pragma unroll
        for (int e = 0; e < SUMS; e++) sum[e] = 0.f;
        int before = stage;
        if (mine > 0) open(codes, factors), unpack(a[0], 0);
#pragma unroll 1
        for (int i = 0; i < mine; i++) {
            const u64 xs = describe(x_ring + stage * X_BLOCK);
            Codes next_codes;
            Factors next_factors;
#pragma unroll
            for (int step = 0; step < 8; step += FLIGHT) {
                u32 (&now)[FLIGHT][4] = a[step / FLIGHT % 2], (&ahead)[FLIGHT][4] = a[1 - step / FLIGHT % 2];
                wgmma_fence(now);
#pragma unroll
                for (int j = step; j < step + FLIGHT; j++) {
                    const u64 at = xs + (j / 4 * X_HALF + j % 4 * 32) / 16;
                    if constexpr (LATE) wgmma(part, now[j - step], at, j * GROUPS % 8 > 0);
                    else wgmma(sum, now[j - step], at, true);
                }
                wgmma_commit();
                if (LATE && step * GROUPS % 8 == 0) due[0] = factors.late[0], due[1] = factors.late[1];
                const bool last = step + FLIGHT == 8;
                if (step == OPEN_AT) {
                    before = stage;
                    stage += WAYS;
                    if (stage >= STAGES) stage -= STAGES, turn++;
                    if (i + 1 < mine) EARLY ? open(next_codes, next_factors) : open(codes, factors);
                }
                if (EARLY && last) codes = next_codes, factors = next_factors;
                // What was in flight before this is done, and with the first the block before.
                wgmma_wait<1>(anchor(0), anchor(1));
                if (step == 0 && i > 0) release(before);
                if (!last || i + 1 < mine) unpack(ahead, (step + FLIGHT) % 8);
                if (LATE && (step + FLIGHT) * GROUPS % 8 == 0) {
                    wgmma_wait<0>(anchor(0), anchor(1));
#pragma unroll
                    for (int e = 0; e < SUMS; e++) sum[e] = fmaf(part[e], due[e / 2 % 2], sum[e]);
                }
            }
        }
        wgmma_wait<0>(anchor(0), anchor(1));
        if (mine > 0) release(before);
        int from_column = column;
        if constexpr (PARTS > 1) {
            // Then there is but one tile. What all found stands in what was the ring, fours of sums of a thread together; each
            // warpgroup, of each rank, adds its share of the rows of x, from the first way of the first rank to the last.
            const int seat = (way * (SUMS / 4) * HEIGHT + tall) * 128 + threadIdx.x % 128, share = rank * WAYS + way;
            named_barrier(1, THREADS);
#pragma unroll
            for (int e = 0; e < SUMS; e += 4) *(float4*)(shared + (seat + e / 4 * HEIGHT * 128) * 16) = make_float4(sum[e], sum[e + 1], sum[e + 2], sum[e + 3]);
            if constexpr (SPLIT > 1) cluster_arrive(), cluster_wait();
            else named_barrier(1, THREADS);
            const u32 from = x_ring + (share * (OWN / 4) * HEIGHT * 128 + tall * 128 + threadIdx.x % 128) * 16;
            if (share * OWN < SUMS) {
#pragma unroll
                for (int e = 0; e < OWN; e++) sum[e] = 0.f;
#pragma unroll
                for (int part = 0; part < PARTS; part++)
#pragma unroll
                    for (int e = 0; e < OWN; e += 4) {
                        float v[4];
                        load_remote(v, from + (part % WAYS * (SUMS / 4) + e / 4) * HEIGHT * 2048, part / WAYS);
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[e + i] += v[i];
                    }
            }
            from_column += share * OWN * 2;
            if (share * OWN >= SUMS) from_column = m;
        }
        // Through shared memory, where rows of x become rows of y: 64 rows of w are 128 bytes of one.
        const int from = top * 32 + tall * 64, row = from + warp % 4 * 16 + lane / 4;
        float biases[2] = {};
#pragma unroll
        for (int w = 0; w < 2; w++)
            if (bias && row + 8 * w < n) biases[w] = to_float<XTYPE>(bias[row + 8 * w]);
        unsigned char* out = shared + OUT_AT + warp / 4 * OUT_ROWS * 128;
#pragma unroll
        for (int at = 0; at < OWN * 2; at += OUT_ROWS) {
#pragma unroll
            for (int i = 0; i < OUT_ROWS; i += 8) {
                const int e = (at + i) / 2;
                float f[2][2];
                for (int w = 0; w < 2; w++)
                    for (int j = 0; j < 2; j++) f[w][j] = fmaf(sum[e + 2 * w + j], FINAL, biases[w]);
                u32 v[WIDTH];
                // The gate stands eight rows before what it opens.
                if constexpr (EPILOGUE == SILU_MUL) v[0] = pair<XTYPE>(silu(f[0][0]) * f[1][0], silu(f[0][1]) * f[1][1]);
                else
                    for (int w = 0; w < 2; w++) v[w] = pair<XTYPE>(f[w][0], f[w][1]);
                store_matrices(shared_address(out) + (i + lane % 8) * 128 + ((warp % 4 * WIDTH + lane / 8 % WIDTH) ^ lane % 8) * 16, v);
            }
            named_barrier(2 + warp / 4, 128);
#pragma unroll
            for (int c = threadIdx.x % 128; c < OUT_ROWS * 4 * WIDTH; c += 128) {
                const int r = c / (4 * WIDTH), eight = c % (4 * WIDTH), to = from_column + at + r, place = from * WIDTH / 2 + eight * 8;
                if (to >= m) continue;
                u32 v[4];
                load16(v, shared_address(out) + r * 128 + (eight ^ r % 8) * 16);
                if constexpr (EPILOGUE == ADD) add_eight<XTYPE>(v, other + (u64)to * pitch, place, n);
                store_eight(y + (u64)to * pitch, v, place, n * WIDTH / 2);
            }
            named_barrier(2 + warp / 4, 128);
        }
    }
    // No rank may go while another reads what it found.
    if (SPLIT > 1) cluster_leave(), cluster_wait();
}
#endif
