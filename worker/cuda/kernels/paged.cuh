// Where things lie: rows of a step, and keys and values in their blocks.
//
// Keys and values are counted in rows of head_dim elements. A block is
// [layer][keys, values][kv_head][slot], and blocks follow each other.
#pragma once

#include "common.cuh"

// What all kernels that touch keys and values are given. Mirrored in src/kernels.rs.
struct Paged {
    bf16* qkv;              // [row][queries, keys, values]
    bf16* kv;               // all blocks
    const uint32_t* positions;  // [row]
    const uint32_t* tables;     // [row] where its sequence's blocks begin in `blocks`
    const uint32_t* blocks;
    const float* bias;      // [queries, keys, values], or null
    const float* q_norm;    // [head_dim], or null
    const float* k_norm;    // [head_dim], or null
    const float2* angles;   // [position][head_dim / 2]: cosine, sine
    uint64_t magic;         // ceil(2^32 / block_size)
    uint32_t block_size;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t layers;
    uint32_t layer;
    uint32_t interleaved;
    float eps;
    float scale;            // of scores, times log2(e)
};
static_assert(sizeof(Paged) == 112, "as in src/kernels.rs");

// Elements of one row of `qkv`.
__device__ __forceinline__ size_t qkv_width(const Paged& p, uint32_t dim) {
    return size_t(p.heads + 2 * p.kv_heads) * dim;
}

// The row of a position's key in `kv`. Its value's is `value_rows` further on.
__device__ __forceinline__ uint32_t key_row(const Paged& p, uint32_t table, uint32_t head, uint32_t position) {
    // Exact: positions and block sizes are far below 2^16 times each other.
    uint32_t index = uint32_t((uint64_t(position) * p.magic) >> 32);
    uint32_t slot = position - index * p.block_size;
    uint32_t block = p.blocks[table + index];
    return ((block * p.layers + p.layer) * 2 * p.kv_heads + head) * p.block_size + slot;
}

__device__ __forceinline__ uint32_t value_rows(const Paged& p) { return p.kv_heads * p.block_size; }

// Bias, norm and rotation of one head, by one warp.
template <int D>
__device__ __forceinline__ void rotate_head(const Paged& p, const bf16* from, bf16* to, const float* bias,
                                            const float* norm, uint32_t position) {
    constexpr int PAIRS = (D / 2 + 31) / 32;
    int lane = threadIdx.x % 32;
    float a[PAIRS] = {}, b[PAIRS] = {}, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int pair = lane + i * 32;
        if (pair >= D / 2) break;
        int ia = p.interleaved ? 2 * pair : pair, ib = p.interleaved ? 2 * pair + 1 : pair + D / 2;
        a[i] = widen(from[ia]) + (bias ? bias[ia] : 0.0f);
        b[i] = widen(from[ib]) + (bias ? bias[ib] : 0.0f);
        squares += a[i] * a[i] + b[i] * b[i];
    }
    float factor = norm ? rsqrtf(warp_sum(squares) / D + p.eps) : 1.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        int pair = lane + i * 32;
        if (pair >= D / 2) break;
        int ia = p.interleaved ? 2 * pair : pair, ib = p.interleaved ? 2 * pair + 1 : pair + D / 2;
        if (norm) {
            a[i] *= factor * norm[ia];
            b[i] *= factor * norm[ib];
        }
        float2 angle = p.angles[size_t(position) * (D / 2) + pair];
        to[ia] = narrow(a[i] * angle.x - b[i] * angle.y);
        to[ib] = narrow(a[i] * angle.y + b[i] * angle.x);
    }
}

// Bias of one head of values, by one warp.
template <int D>
__device__ __forceinline__ void copy_value(const bf16* from, bf16* to, const float* bias) {
    for (int i = threadIdx.x % 32; i < D; i += 32) {
        to[i] = bias ? narrow(widen(from[i]) + bias[i]) : from[i];
    }
}

// A row's key and value of one head, as they go into their block; by one warp each.
template <int D>
__device__ __forceinline__ void new_key(const Paged& p, size_t row, uint32_t head, uint32_t position, bf16* to) {
    size_t at = (p.heads + head) * size_t(D);
    const float* bias = p.bias ? p.bias + at : nullptr;
    rotate_head<D>(p, p.qkv + row * qkv_width(p, D) + at, to, bias, p.k_norm, position);
}

template <int D>
__device__ __forceinline__ void new_value(const Paged& p, size_t row, uint32_t head, bf16* to) {
    size_t at = (p.heads + p.kv_heads + head) * size_t(D);
    copy_value<D>(p.qkv + row * qkv_width(p, D) + at, to, p.bias ? p.bias + at : nullptr);
}

// Instances for every supported width of a head; HEAD_DIMS in src/shape.rs.
#define FOR_HEAD_DIMS(MACRO) MACRO(32) MACRO(48) MACRO(64) MACRO(80) MACRO(96) MACRO(128)
