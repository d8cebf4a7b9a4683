// What both attention kernels are made of: products of a warp's 16 rows with tiles of keys and values
// in shared memory, and the online softmax over them.
//
// Tiles lie in shared memory with rows of D + 8 elements: then the eight rows that `ldmatrix` reads at
// once are in different banks, for every D that is a multiple of 16.
#pragma once

#include "paged.cuh"

// A score that counts for nothing. Finite, so that the difference of two is not NaN.
constexpr float MASKED = -1e30f;

// Sixteen rows of queries.
template <int D>
struct Fragments {
    static constexpr int STRIDE = D + 8;
    uint32_t a[D / 16][4];

    __device__ __forceinline__ Fragments(const bf16* queries, int lane) {
        const bf16* row = queries + (lane % 16) * STRIDE + (lane / 16) * 8;
#pragma unroll
        for (int i = 0; i < D / 16; i++) load_matrices(a[i], row + i * 16);
    }

    // Scores of N * 8 positions, N even.
    template <int N>
    __device__ __forceinline__ void multiply(float (&scores)[N][4], const bf16* keys, int lane) const {
        const bf16* row = keys + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t b[4];
                load_matrices(b, row + j * 8 * STRIDE + i * 16);
                mma(scores[j], a[i], b[0], b[1]);
                mma(scores[j + 1], a[i], b[2], b[3]);
            }
        }
    }
};

// The softmax of 16 rows so far, times the values.
template <int D>
struct Softmax {
    static constexpr int STRIDE = D + 8;
    float maximum[2] = {MASKED, MASKED};  // of rows g and g + 8
    float total[2] = {0.0f, 0.0f};        // this lane's part
    float values[D / 8][4] = {};

    // Takes scores, in units of log2(e), and the values of N * 8 positions.
    template <int N>
    __device__ __forceinline__ void add(float (&scores)[N][4], const bf16* tile, int lane) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float largest = maximum[side];
#pragma unroll
            for (int j = 0; j < N; j++) largest = fmaxf(largest, fmaxf(scores[j][2 * side], scores[j][2 * side + 1]));
            largest = quad_max(largest);
            float factor = exp2_fast(maximum[side] - largest);
            maximum[side] = largest;
            total[side] *= factor;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                values[i][2 * side] *= factor;
                values[i][2 * side + 1] *= factor;
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                scores[j][2 * side] = exp2_fast(scores[j][2 * side] - largest);
                scores[j][2 * side + 1] = exp2_fast(scores[j][2 * side + 1] - largest);
                total[side] += scores[j][2 * side] + scores[j][2 * side + 1];
            }
        }
        // C's layout of two tiles of scores is A's of one of weights.
        const bf16* row = tile + (lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t a[4] = {pack(scores[j][0], scores[j][1]), pack(scores[j][2], scores[j][3]),
                             pack(scores[j + 1][0], scores[j + 1][1]), pack(scores[j + 1][2], scores[j + 1][3])};
#pragma unroll
            for (int i = 0; i < D / 8; i += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, row + j * 8 * STRIDE + i * 8);
                mma(values[i], a, b[0], b[1]);
                mma(values[i + 1], a, b[2], b[3]);
            }
        }
    }

    // Adds up the lanes' totals.
    __device__ __forceinline__ void finish() {
        total[0] = quad_sum(total[0]);
        total[1] = quad_sum(total[1]);
    }

    // Writes the parts of 16 rows.
    __device__ __forceinline__ void write(float* maxima, float* totals, float* to, int lane) const {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            if (t == 0) {
                maxima[g + 8 * side] = maximum[side];
                totals[g + 8 * side] = total[side];
            }
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                to[(g + 8 * side) * D + i * 8 + 2 * t] = values[i][2 * side];
                to[(g + 8 * side) * D + i * 8 + 2 * t + 1] = values[i][2 * side + 1];
            }
        }
    }
};
