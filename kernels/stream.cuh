// The way of kernels for a few rows of x: y[m, n] = x[m, k] w[n, k], each warp streaming tiles of weights through a ring.
//
// Work: a thread block owns `tiles` tiles of 32 rows and, within a cluster, a range of k; about one block an SM. Its warps
// cut the 32 x 128 tiles of that rectangle, row by row, into equal runs, and each streams its run through its own ring
// of cp.async stages, deep enough to keep memory busy while x is prepared. A run may end inside a row tile: what a warp
// found for a row tile goes to a slot, and slots, then thread blocks of the cluster, are added in a fixed order, so
// results are bit-identical from run to run.
//
// A file that includes this has said before what a tile is:
//   WARPS, STAGES of a ring; STAGE bytes of a tile with its factors: SLABS of 512 bytes, at COEF_AT and ZERO_AT the
//   factors of its GROUPS, COEF_ROW and ZERO_ROW bytes each; SUB 0 where a group spans tiles
//   X_BLOCK bytes and FACTS numbers for each of COLUMNS rows of a block of 128 inputs; SLOT floats of a row tile's sums,
//   PARTS fours of them that a lane keeps; EXTRA bytes of shared memory
//   fetch_x, prepare a block of x; set_up EXTRA; add_tile to a lane's sums; flush them to a slot, [row of x][row of w]

constexpr int EXTRA_AT = WARPS * STAGES * STAGE, SLOTS_AT = EXTRA_AT + EXTRA;

// a / b in a few instructions, right where 2^-22 a / b, the error of the quotient, is below 1 / 2b: stream.py sees to it.
__device__ __forceinline__ int divide(int a, int b) { return __float2int_rd(__fdividef((float)a + 0.5f, (float)b)); }

// A warp's place in its run: where the next tile and its factors are.
struct Run {
    Bytes planes, coef, zero;
    int block, blocks, skip;  // which block of the range is next, how many it has, how many of k it leaves out
    int first, groups;        // the range's first block; groups of k
    u32 span;                 // where groups span blocks, ceil(2^32 / blocks in a group)

    // Starts the copy of one tile and of its groups' factors into a stage of the ring, and steps on.
    __device__ __forceinline__ void fetch(u32 to, u64 policy, int lane) {
#pragma unroll
        for (int p = 0; p < SLABS; p++) copy_async(to + p * 512 + lane * 16, planes + p * 512 + lane * 16, policy);
        const u32 group = SUB ? 0 : __umulhi(first + block, span);
        constexpr int COEF_UNITS = GROUPS * COEF_ROW / 16, ZERO_UNITS = GROUPS * ZERO_ROW / 16;
#pragma unroll
        for (int i = 0; i < COEF_UNITS; i += 32)
            if (i + lane < COEF_UNITS) copy_async(to + COEF_AT + (i + lane) * 16, coef + group * COEF_ROW + (i + lane) * 16, policy);
#pragma unroll
        for (int i = 0; i < ZERO_UNITS; i += 32)
            if (i + lane < ZERO_UNITS) copy_async(to + ZERO_AT + (i + lane) * 16, zero + group * ZERO_ROW + (i + lane) * 16, policy);
        const bool end = ++block == blocks;
        const int steps = end ? 1 + skip : 1, more = SUB ? steps * GROUPS : end ? groups : 0;
        planes += (u64)steps * (SLABS * 512);
        coef += (u64)more * COEF_ROW;
        zero += (u64)more * ZERO_ROW;
        if (end) block = 0;
    }
};

// The row tiles of share number share() of w, each of `tiles`, by the cluster whose blocks cut k: asked for where it is
// needed, since a register that holds it from the start is one too many. 32 * WARPS threads; shared memory as
// kernels/stream.py counts it. May be called again for others, by all of the cluster.
template <class Share>
__device__ __forceinline__ void stream_gemm(const u16* __restrict__ x, Bytes planes, Bytes coef, Bytes zero, const float* __restrict__ table,
                                            const u16* __restrict__ bias, const u16* __restrict__ other, u16* __restrict__ y, int m, int n, int k,
                                            int tiles, Share share, int range, int groups, u32 span, int wide) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int split = gridDim.x, rank = blockIdx.x, blocks = (k + 127) / 128;
    const int first = rank * range, count = min(range, blocks - first);
    float* slots = (float*)(shared + SLOTS_AT);
    unsigned char* prepared = (unsigned char*)(slots + (tiles + WARPS - 1) * SLOT);
    u16* biases = (u16*)(prepared + range * X_BLOCK);
    float* wholes = (float*)(biases + tiles * 32);
    float* facts = wholes + split * tiles * SLOT;
    if (split > 1) cluster_arrive();
    const int top = share() * tiles, height = min(tiles, (n + 31) / 32 - top), units = height * count;
    // x and the bias first: behind the weights they would wait for all of them.
    wait_for_previous();
    for (int i = warp; i < count; i += WARPS) fetch_x(shared_address(prepared) + i * X_BLOCK, x, m, k, first + i, wide, lane);
    for (int i = threadIdx.x * 8; i < height * 32; i += WARPS * 256)
        copy_eight(shared_address(biases + i), bias + top * 32 + i, bias ? n - top * 32 - i : 0, wide, x);
    commit();
    const int begin = units * warp / WARPS, mine = units * (warp + 1) / WARPS - begin;
    int row = divide(begin, count), block = begin - row * count;
    const u32 ring = shared_address(shared) + warp * STAGES * STAGE;
    const u64 policy = read_once();
    Run run = {planes, coef, zero, block, count, blocks - count, first, groups, span};
    const u64 place = (u64)(top + row) * blocks + first + block;
    run.planes += place * (SLABS * 512);
    run.coef += (SUB ? place * GROUPS : (u64)(top + row) * groups) * COEF_ROW;
    run.zero += (SUB ? place * GROUPS : (u64)(top + row) * groups) * ZERO_ROW;
    // Two stages keep memory busy while x is prepared; more would only make every warp's first tile wait for them.
    constexpr int EARLY = STAGES > 3 ? 2 : STAGES - 1;
#pragma unroll 1
    for (int i = 0; i < EARLY; i++) {
        if (i < mine) run.fetch(ring + i * STAGE, policy, lane);
        commit();
    }
    const float final = set_up(shared + EXTRA_AT, table);
    const u32 extra = shared_address(shared + EXTRA_AT);
    wait<EARLY>();
    __syncwarp();
    for (int i = warp; i < count; i += WARPS) prepare(prepared + i * X_BLOCK, facts + i * FACTS * COLUMNS, lane);
#pragma unroll 1
    for (int i = EARLY; i < STAGES - 1; i++) {
        if (i < mine) run.fetch(ring + i * STAGE, policy, lane);
        commit();
    }
    __syncthreads();
    let_next_start();
    float sum[PARTS][4] = {};
    u32 stage = ring, ahead = ring + (STAGES - 1) * STAGE;
    for (int i = 0; i < mine; i++) {
        wait<STAGES - 2>();
        __syncwarp();
        if (i + STAGES - 1 < mine) run.fetch(ahead, policy, lane);
        commit();
        add_tile(sum, stage, shared_address(prepared) + block * X_BLOCK, facts + block * FACTS * COLUMNS, extra, lane);
        ahead = stage;
        stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
        if (++block == count || i + 1 == mine) {
            // Along the runs, row + warp grows with each change of either: no two share a slot.
            flush(slots + (row + warp) * SLOT, sum, final, lane);
            block = 0;
            row++;
        }
    }
    if (mine == 0)
        for (int i = lane; i < SLOT; i += 32) slots[(row + warp) * SLOT + i] = 0.f;
    __syncthreads();
    // Over the warps that met a row tile, then over the cluster, each time from the first to the last. Each sum goes to
    // the thread block that will write it, which keeps a place for every other's.
    if (split > 1) cluster_wait();  // all have started: they have shared memory
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const int r = e / SLOT, from = divide((r * count + 1) * WARPS - 1, units), to = divide((r + 1) * count * WARPS - 1, units);
        const float* slot = slots + (r + from) * SLOT + e % SLOT;
        float v = 0.f;
#pragma unroll 8
        for (int w = from; w <= to; w++, slot += SLOT) v += *slot;
        const int owner = e / 32 % split;
        float* place = wholes + rank * tiles * SLOT + e;
        if (owner == rank) *place = v;
        else store_remote(shared_address(place), owner, v);
    }
    if (split > 1) cluster_arrive(), cluster_wait();
    for (int e = threadIdx.x; e < height * SLOT; e += WARPS * 32) {
        const int column = e % SLOT / 32, at = (top + e / SLOT) * 32 + e % 32;
        if (column >= m || at >= n || e / 32 % split != rank) continue;
        auto whole = [&](int e) {
            float v = 0.f;
            for (int i = 0; i < split; i++) v += wholes[i * tiles * SLOT + e];
            return v + to_float<XTYPE>(biases[e / SLOT * 32 + e % 32]);
        };
        if constexpr (EPILOGUE == SILU_MUL) {
            // The gate stands eight rows before what it opens.
            if (e % 16 < 8) y[(u64)column * (n / 2) + at / 16 * 8 + at % 8] = rounded<XTYPE>(silu(whole(e)) * whole(e + 8));
        } else {
            u16 v = rounded<XTYPE>(whole(e));
            if constexpr (EPILOGUE == ADD) v = rounded<XTYPE>(to_float<XTYPE>(v) + to_float<XTYPE>(other[(u64)column * n + at]));
            y[(u64)column * n + at] = v;
        }
    }
}
