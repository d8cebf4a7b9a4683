// Kernels that are bound by memory and small: embedding, norm, gated activation, rotation.

#include "paged.cuh"

struct Embed {
    const uint32_t* tokens;  // [rows]
    const bf16* table;       // [vocab][hidden]
    float* x;                // [rows][hidden]
    uint32_t hidden;
};
static_assert(sizeof(Embed) == 32, "as in src/kernels.rs");

// Grid: rows.
extern "C" __global__ void __launch_bounds__(256) embed(Embed p) {
    let_next_start();
    wait_for_previous();
    const bf16* from = p.table + size_t(p.tokens[blockIdx.x]) * p.hidden;
    float* to = p.x + size_t(blockIdx.x) * p.hidden;
    for (uint32_t i = threadIdx.x * 8; i < p.hidden; i += blockDim.x * 8) {
        uint4 v = load_once(from + i);
        *reinterpret_cast<float4*>(to + i) = make_float4(low(v.x), high(v.x), low(v.y), high(v.y));
        *reinterpret_cast<float4*>(to + i + 4) = make_float4(low(v.z), high(v.z), low(v.w), high(v.w));
    }
}
EXPORT(embed)

struct Norm {
    const float* x;          // [row][hidden]
    const float* weight;     // [hidden]
    const uint32_t* gather;  // [block] which row; null: its own
    bf16* out;               // [block][hidden]
    uint32_t hidden;
    float eps;
};
static_assert(sizeof(Norm) == 40, "as in src/kernels.rs");

// RMSNorm (Zhang and Sennrich 2019). Grid: rows of `out`. A thread keeps its part of a row of up to
// 8192 in registers; what is beyond is read twice.
extern "C" __global__ void __launch_bounds__(256) rms_norm(Norm p) {
    constexpr int KEPT = 8, STEP = 256 * 4;
    __shared__ float sums[8];
    let_next_start();
    float4 v[KEPT], w[KEPT];
    uint32_t first = threadIdx.x * 4;
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        uint32_t i = first + j * STEP;
        if (i < p.hidden) w[j] = *reinterpret_cast<const float4*>(p.weight + i);
    }
    wait_for_previous();
    const float* x = p.x + size_t(p.gather ? p.gather[blockIdx.x] : blockIdx.x) * p.hidden;
    bf16* out = p.out + size_t(blockIdx.x) * p.hidden;
    float squares = 0.0f;
    auto add = [&](float4 v) { squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; };
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        uint32_t i = first + j * STEP;
        if (i < p.hidden) v[j] = *reinterpret_cast<const float4*>(x + i);
    }
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        if (first + j * STEP < p.hidden) add(v[j]);
    }
    for (uint32_t i = first + KEPT * STEP; i < p.hidden; i += STEP) add(*reinterpret_cast<const float4*>(x + i));
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int i = 0; i < 8; i++) squares += sums[i];
    float factor = rsqrtf(squares / p.hidden + p.eps);
    auto write = [&](uint32_t i, float4 v, float4 w) {
        *reinterpret_cast<uint2*>(out + i) = make_uint2(pack(v.x * factor * w.x, v.y * factor * w.y),
                                                        pack(v.z * factor * w.z, v.w * factor * w.w));
    };
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        uint32_t i = first + j * STEP;
        if (i < p.hidden) write(i, v[j], w[j]);
    }
    for (uint32_t i = first + KEPT * STEP; i < p.hidden; i += STEP) {
        write(i, *reinterpret_cast<const float4*>(x + i), *reinterpret_cast<const float4*>(p.weight + i));
    }
}
EXPORT(rms_norm)

struct Gated {
    const bf16* pairs;  // [count]: gate, up
    bf16* out;          // [count]
    uint64_t count;     // a multiple of 8
};
static_assert(sizeof(Gated) == 24, "as in src/kernels.rs");

// silu(gate) * up. Grid: enough for a thread per 8 outputs.
extern "C" __global__ void __launch_bounds__(256) gated(Gated p) {
    let_next_start();
    wait_for_previous();
    uint64_t i = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (i >= p.count) return;
    uint4 a = *reinterpret_cast<const uint4*>(p.pairs + 2 * i);
    uint4 b = *reinterpret_cast<const uint4*>(p.pairs + 2 * i + 8);
    uint4 out;
    out.x = pack(silu(low(a.x)) * high(a.x), silu(low(a.y)) * high(a.y));
    out.y = pack(silu(low(a.z)) * high(a.z), silu(low(a.w)) * high(a.w));
    out.z = pack(silu(low(b.x)) * high(b.x), silu(low(b.y)) * high(b.y));
    out.w = pack(silu(low(b.z)) * high(b.z), silu(low(b.w)) * high(b.w));
    *reinterpret_cast<uint4*>(p.out + i) = out;
}
EXPORT(gated)

struct ReadAll {
    const uint4* from;
    float* sums;  // [block]
    uint64_t count;
};
static_assert(sizeof(ReadAll) == 24, "as in src/kernels.rs");

// Reads memory as fast as it comes, to measure that. Any grid.
extern "C" __global__ void __launch_bounds__(256) read_all(ReadAll p) {
    constexpr int UNROLL = 8;
    uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    uint32_t sum = 0;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) v[u] = i + u * step < p.count ? load_once(p.from + i + u * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    // What is not used is not read.
    if (sum == 0x5eed) p.sums[blockIdx.x] = 1.0f;
}
EXPORT(read_all)

// Queries in place; keys and values into their blocks. Grid: rows, heads of all kinds / 8; a warp
// each.
template <int D>
__device__ void rotate(const Paged& p) {
    let_next_start();
    wait_for_previous();
    size_t row = blockIdx.x;
    uint32_t head = blockIdx.y * 8 + threadIdx.x / 32;
    if (head < p.heads) {
        bf16* query = p.qkv + row * qkv_width(p, D) + size_t(head) * D;
        rotate_head<D>(p, query, query, p.bias ? p.bias + head * D : nullptr, p.q_norm, p.positions[row]);
    } else if (head < p.heads + p.kv_heads) {
        uint32_t of = head - p.heads, position = p.positions[row];
        new_key<D>(p, row, of, position, p.kv + size_t(key_row(p, p.tables[row], of, position)) * D);
    } else if (head < p.heads + 2 * p.kv_heads) {
        uint32_t of = head - p.heads - p.kv_heads;
        uint32_t to = key_row(p, p.tables[row], of, p.positions[row]) + value_rows(p);
        new_value<D>(p, row, of, p.kv + size_t(to) * D);
    }
}

#define ROTATE(D) \
    extern "C" __global__ void __launch_bounds__(256) rotate_##D(Paged p) { rotate<D>(p); } \
    EXPORT(rotate_##D)
FOR_HEAD_DIMS(ROTATE)
