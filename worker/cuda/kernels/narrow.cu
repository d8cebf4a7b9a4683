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

enum Out {
    STORE,   // bf16 [rows][n]
    ADD,     // float [rows][n], added to
    GATED,   // bf16 [rows][n / 2]: silu of even columns times odd ones
    FLOATS,  // float [rows][n]
};

constexpr int WARPS = 8;

// HALF: at most eight rows. Else MT * 16.
template <bool HALF, int MT, int NT, int UNROLL, bool NORM, Out OUT>
__device__ __forceinline__ void multiply(const Narrow& p) {
    constexpr int ROWS = HALF ? 8 : MT * 16;
    constexpr int COLUMNS = NT * 8;
    constexpr int SIDES = HALF ? 1 : 2;
    __shared__ float sums[WARPS][ROWS][COLUMNS];
    __shared__ float squares_of[NORM ? WARPS : 1][8];

    let_next_start();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t chunks = p.k / 32, tiles = (p.n + COLUMNS - 1) / COLUMNS;
    const uint4 zeros = make_uint4(0, 0, 0, 0);

    auto load = [&](uint4(&weights)[UNROLL][NT], uint32_t tile, uint32_t chunk) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            uint32_t column = tile * COLUMNS + j * 8 + g;
            const bf16* w = p.w + size_t(column) * p.k + size_t(chunk) * 32 + t * 8;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                weights[u][j] = column < p.n && chunk + u < chunks ? load_once(w + u * 32) : zeros;
            }
        }
    };

    uint4 weights[UNROLL][NT];
    load(weights, blockIdx.x, warp * UNROLL);
    wait_for_previous();

    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float c[MT][NT][4] = {};
        float squares = 0.0f;
        for (uint32_t chunk = warp * UNROLL; chunk < chunks; chunk += WARPS * UNROLL) {
            // The next turn's weights, in the next tile after the last: something is always on its way.
            uint4 next[UNROLL][NT];
            bool last = chunk + WARPS * UNROLL >= chunks;
            load(next, last ? tile + gridDim.x : tile, last ? warp * UNROLL : chunk + WARPS * UNROLL);
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                if (chunk + u >= chunks) break;
                uint32_t at = (chunk + u) * 32 + t * 8;
                uint4 x[MT][SIDES];
#pragma unroll
                for (int i = 0; i < MT; i++) {
#pragma unroll
                    for (int s = 0; s < SIDES; s++) {
                        uint32_t row = i * 16 + s * 8 + g;
                        x[i][s] = zeros;
                        if (row >= p.rows) continue;
                        if constexpr (NORM) {
                            const float* from = static_cast<const float*>(p.x) + size_t(row) * p.k + at;
                            float4 a = *reinterpret_cast<const float4*>(from);
                            float4 b = *reinterpret_cast<const float4*>(from + 4);
                            float4 na = *reinterpret_cast<const float4*>(p.norm + at);
                            float4 nb = *reinterpret_cast<const float4*>(p.norm + at + 4);
                            squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
                            squares += b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
                            x[i][s] = make_uint4(pack(a.x * na.x, a.y * na.y), pack(a.z * na.z, a.w * na.w),
                                                 pack(b.x * nb.x, b.y * nb.y), pack(b.z * nb.z, b.w * nb.w));
                        } else {
                            const bf16* from = static_cast<const bf16*>(p.x) + size_t(row) * p.k + at;
                            x[i][s] = *reinterpret_cast<const uint4*>(from);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    const uint4& upper = x[i][0];
                    const uint4& lower = HALF ? zeros : x[i][SIDES - 1];
                    uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
                    uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
                    for (int j = 0; j < NT; j++) {
                        mma(c[i][j], first, weights[u][j].x, weights[u][j].y);
                        mma(c[i][j], second, weights[u][j].z, weights[u][j].w);
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                for (int j = 0; j < NT; j++) weights[u][j] = next[u][j];
            }
        }

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
            }
        }
        if constexpr (NORM) {
            // The norm's factor is one number a row: it can follow the product.
            squares = quad_sum(squares);
            if (t == 0) squares_of[warp][g] = squares;
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
            if constexpr (OUT == STORE) static_cast<bf16*>(p.out)[size_t(row) * p.n + column] = narrow(sum[0]);
            if constexpr (OUT == ADD) static_cast<float*>(p.out)[size_t(row) * p.n + column] += sum[0];
            if constexpr (OUT == FLOATS) static_cast<float*>(p.out)[size_t(row) * p.n + column] = sum[0];
            if constexpr (OUT == GATED) {
                static_cast<bf16*>(p.out)[size_t(row) * (p.n / 2) + column / 2] = narrow(silu(sum[0]) * sum[STEP - 1]);
            }
        }
        // The next tile's sums take the place of these.
        __syncthreads();
    }
}

// Eight 16-byte loads of weights a lane are in flight in each, and as many again in the next turn.
// The more rows, the more columns share one reading of x.
#define NARROW(name, half, mt, nt, unroll, norm, out) \
    extern "C" __global__ void __launch_bounds__(256) name(Narrow p) { \
        multiply<half, mt, nt, unroll, norm, out>(p); \
    } \
    EXPORT(name)

NARROW(narrow_2_norm_store, true, 1, 1, 8, true, STORE)
NARROW(narrow_2_norm_gated, true, 1, 1, 8, true, GATED)
NARROW(narrow_2_add, true, 1, 1, 8, false, ADD)
NARROW(narrow_2_floats, true, 1, 1, 8, false, FLOATS)
NARROW(narrow_8_store, true, 1, 2, 4, false, STORE)
NARROW(narrow_8_gated, true, 1, 2, 4, false, GATED)
NARROW(narrow_8_add, true, 1, 2, 4, false, ADD)
NARROW(narrow_8_floats, true, 1, 2, 4, false, FLOATS)
NARROW(narrow_16_store, false, 1, 4, 2, false, STORE)
NARROW(narrow_16_gated, false, 1, 4, 2, false, GATED)
NARROW(narrow_16_add, false, 1, 4, 2, false, ADD)
NARROW(narrow_16_floats, false, 1, 4, 2, false, FLOATS)
NARROW(narrow_32_store, false, 2, 4, 2, false, STORE)
NARROW(narrow_32_gated, false, 2, 4, 2, false, GATED)
NARROW(narrow_32_add, false, 2, 4, 2, false, ADD)
NARROW(narrow_32_floats, false, 2, 4, 2, false, FLOATS)
