// Products of weights with few rows: a decode step's, which takes as long as its weights take to come.
//
// out[row][n] = sum over k of x[row][k] w[n][k], both in bf16 with k contiguous.
//
// A warp multiplies by tensor cores, with x as A (16 rows) and eight rows of w as B. The sum over k
// may run in any order, so a lane takes 16 consecutive bytes of "its" row of both, for two products
// of k = 16: what a lane gives as columns 2t, 2t+1 and 2t+8, 2t+9 of the first are elements 8t..8t+3,
// and of the second 8t+4..8t+7. So weights go from memory to registers in full 16-byte loads, with
// no shared memory between. The eight warps of a block share a tile of NT times eight rows of w and
// take turns along k; their sums are added at the end. A block goes through several tiles, any grid
// will do.

#include "common.cuh"

struct Narrow {
    const bf16* w;      // [n][k]
    const void* x;      // [rows][k]: bf16, or with a norm float
    const float* norm;  // [k]
    void* out;          // see Out
    uint32_t n;
    uint32_t k;  // a multiple of 32
    uint32_t rows;
    float eps;
};
static_assert(sizeof(Narrow) == 48, "as in src/kernels.rs");

enum Out {
    STORE,   // bf16 [rows][n]
    ADD,     // float [rows][n], added to
    GATED,   // bf16 [rows][n / 2]: silu of even columns times odd ones
    FLOATS,  // float [rows][n]
};

constexpr int WARPS = 8;

// HALF: at most eight rows. Else MT * 16.
template <bool HALF, int MT, int NT, int UNROLL, bool NORM, Out OUT>
struct Product {
    static constexpr int ROWS = HALF ? 8 : MT * 16;
    static constexpr int COLUMNS = NT * 8;
    static constexpr int SIDES = HALF ? 1 : 2;

    // What a lane has of the weights of one turn: UNROLL steps of k = 32 for each tile of eight.
    struct Weights {
        uint4 of[UNROLL][NT];
    };

    const Narrow& p;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t chunks = p.k / 32;
    uint32_t turns = (chunks + WARPS * UNROLL - 1) / (WARPS * UNROLL);
    uint32_t tiles = (p.n + COLUMNS - 1) / COLUMNS;
    const bf16* w = p.w + t * 8;
    float c[MT][NT][4] = {};
    float squares = 0.0f;

    __device__ __forceinline__ explicit Product(const Narrow& p) : p(p) {}

    __device__ __forceinline__ uint32_t chunk(uint32_t turn) const { return (turn * WARPS + warp) * UNROLL; }

    __device__ __forceinline__ void load(Weights& weights, uint32_t tile, uint32_t turn) const {
        uint32_t first = chunk(turn);
        const bf16* from[NT];
#pragma unroll
        for (int j = 0; j < NT; j++) {
            // Columns beyond the last come to nothing; a row of weights that is there stands in.
            uint32_t column = min(tile * COLUMNS + j * 8 + g, p.n - 1);
            from[j] = w + size_t(column) * p.k + first * 32;
        }
        if (first + UNROLL <= chunks) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                for (int j = 0; j < NT; j++) weights.of[u][j] = load_once(from[j] + u * 32);
            }
        } else {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                if (first + u >= chunks) break;
#pragma unroll
                for (int j = 0; j < NT; j++) weights.of[u][j] = load_once(from[j] + u * 32);
            }
        }
    }

    // One step of k = 32.
    __device__ __forceinline__ void step(const uint4 (&weights)[NT], uint32_t chunk) {
        const uint4 zeros = make_uint4(0, 0, 0, 0);
        uint32_t at = chunk * 32 + t * 8;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            uint4 x[SIDES];
#pragma unroll
            for (int s = 0; s < SIDES; s++) {
                uint32_t row = i * 16 + s * 8 + g;
                x[s] = zeros;
                if (row >= p.rows) continue;
                if constexpr (NORM) {
                    const float* from = static_cast<const float*>(p.x) + size_t(row) * p.k + at;
                    float4 a = *reinterpret_cast<const float4*>(from);
                    float4 b = *reinterpret_cast<const float4*>(from + 4);
                    float4 na = *reinterpret_cast<const float4*>(p.norm + at);
                    float4 nb = *reinterpret_cast<const float4*>(p.norm + at + 4);
                    squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
                    squares += b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
                    x[s] = make_uint4(pack(a.x * na.x, a.y * na.y), pack(a.z * na.z, a.w * na.w),
                                      pack(b.x * nb.x, b.y * nb.y), pack(b.z * nb.z, b.w * nb.w));
                } else {
                    const bf16* from = static_cast<const bf16*>(p.x) + size_t(row) * p.k + at;
                    x[s] = *reinterpret_cast<const uint4*>(from);
                }
            }
            const uint4& upper = x[0];
            const uint4& lower = HALF ? zeros : x[SIDES - 1];
            uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
            uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int j = 0; j < NT; j++) {
                mma(c[i][j], first, weights[j].x, weights[j].y);
                mma(c[i][j], second, weights[j].z, weights[j].w);
            }
        }
    }

    // The warps' sums of a tile, added up.
    __device__ __forceinline__ void finish(uint32_t tile) {
        __shared__ float sums[WARPS][ROWS][COLUMNS];
        __shared__ float squares_of[NORM ? WARPS : 1][8];
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < NT; j++) {
                sums[warp][i * 16 + g][j * 8 + 2 * t] = c[i][j][0];
                sums[warp][i * 16 + g][j * 8 + 2 * t + 1] = c[i][j][1];
                if constexpr (!HALF) {
                    sums[warp][i * 16 + 8 + g][j * 8 + 2 * t] = c[i][j][2];
                    sums[warp][i * 16 + 8 + g][j * 8 + 2 * t + 1] = c[i][j][3];
                }
#pragma unroll
                for (int e = 0; e < 4; e++) c[i][j][e] = 0.0f;
            }
        }
        if constexpr (NORM) {
            // The norm's factor is one number a row: it can follow the product.
            squares = quad_sum(squares);
            if (t == 0) squares_of[warp][g] = squares;
            squares = 0.0f;
        }
        __syncthreads();

        constexpr int STEP = OUT == GATED ? 2 : 1;
        for (int i = threadIdx.x * STEP; i < ROWS * COLUMNS; i += WARPS * 32 * STEP) {
            uint32_t row = i / COLUMNS, in = i % COLUMNS, column = tile * COLUMNS + in;
            if (row >= p.rows || column >= p.n) continue;
            float sum[STEP] = {};
#pragma unroll
            for (int from = 0; from < WARPS; from++) {
#pragma unroll
                for (int s = 0; s < STEP; s++) sum[s] += sums[from][row][in + s];
            }
            if constexpr (NORM) {
                float all = 0.0f;
#pragma unroll
                for (int from = 0; from < WARPS; from++) all += squares_of[from][row];
                float factor = rsqrtf(all / p.k + p.eps);
#pragma unroll
                for (int s = 0; s < STEP; s++) sum[s] *= factor;
            }
            size_t at = size_t(row) * p.n + column;
            if constexpr (OUT == STORE) static_cast<bf16*>(p.out)[at] = narrow(sum[0]);
            if constexpr (OUT == ADD) static_cast<float*>(p.out)[at] += sum[0];
            if constexpr (OUT == FLOATS) static_cast<float*>(p.out)[at] = sum[0];
            if constexpr (OUT == GATED) static_cast<bf16*>(p.out)[at / 2] = narrow(silu(sum[0]) * sum[STEP - 1]);
        }
        // The next tile's sums take the place of these.
        __syncthreads();
    }

    // One turn of a tile, with the next one's weights under way, in the next tile after the last:
    // something always is. False when there is none.
    __device__ __forceinline__ bool go(const Weights& weights, Weights& next, uint32_t& tile, uint32_t& turn) {
        uint32_t now = chunk(turn), of = tile;
        bool last = ++turn == turns;
        if (last) {
            turn = 0;
            tile += gridDim.x;
        }
        if (tile < tiles) load(next, tile, turn);
        if (now + UNROLL <= chunks) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) step(weights.of[u], now + u);
        } else {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                if (now + u < chunks) step(weights.of[u], now + u);
            }
        }
        if (last) finish(of);
        return tile < tiles;
    }

    __device__ __forceinline__ void run() {
        let_next_start();
        uint32_t tile = blockIdx.x, turn = 0;
        Weights a, b;
        load(a, tile, turn);
        wait_for_previous();
        while (go(a, b, tile, turn) && go(b, a, tile, turn)) {}
    }
};

// Eight 16-byte loads of weights a lane are in flight in each, and as many again in the next turn. The
// more rows, the more columns share one reading of x, which comes from a cache each time: with 32
// rows that is as much as the weights. `blocks`: so many fit on a multiprocessor; src/kernels.rs
// counts on it.
#define NARROW(name, half, mt, nt, unroll, norm, out, blocks) \
    extern "C" __global__ void __launch_bounds__(256, blocks) name(Narrow p) { \
        Product<half, mt, nt, unroll, norm, out>(p).run(); \
    } \
    EXPORT(name)

NARROW(narrow_2_norm_store, true, 1, 1, 8, true, STORE, 2)
NARROW(narrow_2_norm_gated, true, 1, 1, 8, true, GATED, 2)
NARROW(narrow_2_add, true, 1, 1, 8, false, ADD, 2)
NARROW(narrow_2_floats, true, 1, 1, 8, false, FLOATS, 2)
NARROW(narrow_8_store, true, 1, 2, 4, false, STORE, 2)
NARROW(narrow_8_gated, true, 1, 2, 4, false, GATED, 2)
NARROW(narrow_8_add, true, 1, 2, 4, false, ADD, 2)
NARROW(narrow_8_floats, true, 1, 2, 4, false, FLOATS, 2)
NARROW(narrow_16_store, false, 1, 4, 2, false, STORE, 2)
NARROW(narrow_16_gated, false, 1, 4, 2, false, GATED, 2)
NARROW(narrow_16_add, false, 1, 4, 2, false, ADD, 2)
NARROW(narrow_16_floats, false, 1, 4, 2, false, FLOATS, 2)
NARROW(narrow_32_store, false, 2, 4, 2, false, STORE, 1)
NARROW(narrow_32_gated, false, 2, 4, 2, false, GATED, 1)
NARROW(narrow_32_add, false, 2, 4, 2, false, ADD, 1)
NARROW(narrow_32_floats, false, 2, 4, 2, false, FLOATS, 1)
