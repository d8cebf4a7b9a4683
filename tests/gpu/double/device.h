// CUDA C++ as far as the kernels use it, on a host.
//
// A kernel is compiled as plain C++; each of its threads is a fiber (fibers.cpp). What a warp does
// together (products, shuffles, matrix loads) happens when its last lane arrives, with the fragment
// layouts of the PTX ISA. Copies in the background happen as late as they may: when they are waited
// for. Shared memory is a host thread's own, since a host thread runs a block at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(n) alignas(n)
#define DYNAMIC_SHARED(name) unsigned char* name = gpu_double::dynamic_shared()
#define EXPORT(name) static gpu_double::Register register_##name(#name, name);

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace gpu_double {

struct Places {
    uint3 thread, block, block_dim, grid_dim;
};
// Of the running fiber and its block.
extern __thread Places places;

unsigned char* dynamic_shared();
void sync_block();

// What a warp does together. All 32 lanes must come to it.
enum Op { SYNC, SHUFFLE, PRODUCT, MATRICES, MATRICES_TRANSPOSED };
struct Shuffle { uint32_t value, from, result; };
struct Product { float* c; const uint32_t* a; uint32_t b0, b1; };
struct Matrices { uint32_t* r; const void* row; };
void together(Op op, void* arguments);

void copy_later(void* to, const void* from);
void end_group();
void finish_groups(int but);
[[noreturn]] void fail(const char* what);

inline void aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16) fail("an access of 16 bytes is not aligned");
}

struct Register {
    template <class Arguments>
    Register(const char* name, void (*kernel)(Arguments)) {
        add(name, reinterpret_cast<void*>(kernel), sizeof(Arguments), [](void* kernel, const void* arguments) {
            reinterpret_cast<void (*)(Arguments)>(kernel)(*static_cast<const Arguments*>(arguments));
        });
    }
    static void add(const char* name, void* kernel, size_t bytes, void (*call)(void*, const void*));
};

}  // namespace gpu_double

#define threadIdx (gpu_double::places.thread)
#define blockIdx (gpu_double::places.block)
#define blockDim (gpu_double::places.block_dim)
#define gridDim (gpu_double::places.grid_dim)

inline void __syncthreads() { gpu_double::sync_block(); }
inline void __syncwarp() { gpu_double::together(gpu_double::SYNC, nullptr); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t by) { return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST); }

inline uint32_t __float_as_uint(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline uint32_t shuffle_bits(uint32_t value, uint32_t from) {
    gpu_double::Shuffle shuffle{value, from, 0};
    gpu_double::together(gpu_double::SHUFFLE, &shuffle);
    return shuffle.result;
}
inline uint32_t __shfl_sync(unsigned, uint32_t value, int from) { return shuffle_bits(value, from % 32); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return __uint_as_float(shuffle_bits(__float_as_uint(value), (threadIdx.x % 32) ^ mask));
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu_double::Product product{c, a, b0, b1};
    gpu_double::together(gpu_double::PRODUCT, &product);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
    gpu_double::aligned(row);
    gpu_double::Matrices matrices{r, row};
    gpu_double::together(gpu_double::MATRICES, &matrices);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    gpu_double::aligned(row);
    gpu_double::Matrices matrices{r, row};
    gpu_double::together(gpu_double::MATRICES_TRANSPOSED, &matrices);
}

inline void copy_async(void* shared, const void* global, bool valid) {
    gpu_double::aligned(shared);
    gpu_double::aligned(global);
    gpu_double::copy_later(shared, valid ? global : nullptr);
}
inline void copy_commit() { gpu_double::end_group(); }
template <int N>
inline void copy_wait() { gpu_double::finish_groups(N); }

inline uint4 load_once(const void* global) {
    gpu_double::aligned(global);
    uint4 v;
    std::memcpy(&v, global, 16);
    return v;
}

inline uint32_t round_to_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline void wait_for_previous() {}
inline void let_next_start() {}
