// Rows of x that stand expert by expert, each to be multiplied by the weight of its own: how they are found, and how the
// thread blocks share the work. Only experts that have rows are read.

// What one reading of an expert's weight serves: `rows` rows of x, ROWS at most, from row `first` on.
struct Pass {
    int expert, first, rows;
};

// Read where it stands: what the kernel before wrote, not what the compiler would fetch ahead of it.
__device__ __forceinline__ int read_now(const int* at) {
    int v;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

// How many passes there are in all; `pass` becomes number `wanted` of them, where there is one. `ends` [experts]: where the
// rows of each expert end. Ends that do not ascend, or lie beyond m, make no row that x does not have. By whole warps.
__device__ __forceinline__ int find_pass(Pass& pass, const int* ends, int experts, int m, int wanted, int lane) {
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < experts; base += 32) {
        const int e = base + lane, begin = e > 0 && e < experts ? min(max(read_now(ends + e - 1), 0), m) : 0;
        const int end = e < experts ? min(max(read_now(ends + e), begin), m) : begin, own = (end - begin + ROWS - 1) / ROWS;
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int v = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += v;
        }
        const int at = before + sum - own, first = begin + (wanted - at) * ROWS;
        const u32 here = __ballot_sync(~0u, wanted >= at && wanted < at + own);
        const int lucky = __ffs(here) - 1 & 31, f = __shfl_sync(~0u, first, lucky), last = __shfl_sync(~0u, end, lucky);
        if (here) pass = {base + lucky, f, min(ROWS, last - f)};
        before += __shfl_sync(~0u, sum, 31);
    }
    return before;
}

// `count` shares of the work, `each` of them of one pass, of at most `tiles` row tiles.
struct Shares {
    int count, each, tiles;
};

// Shares of `passes` over weights of `height` row tiles: as even as can be over `clusters`, in rounds of shares of at most
// `most` tiles. A share takes the time of about one tile more than it has.
__device__ __forceinline__ Shares shared_out(int passes, int height, int clusters, int most) {
    Shares best = {0, 1, most};
    if (passes == 0) return best;
    // The fewest rounds in which shares fit, and some more.
    int rounds = (passes * ((height + most - 1) / most) + clusters - 1) / clusters, least = 0x7fffffff;
#pragma unroll 1
    for (int more = 0; more < 4; more++, rounds++) {
        const int parts = min(rounds * clusters / passes, height), tiles = (height + parts - 1) / parts;
        const int each = (height + tiles - 1) / tiles, time = (passes * each + clusters - 1) / clusters * (tiles + 1);
        if (time < least) least = time, best = {passes * each, each, tiles};
    }
    return best;
}
