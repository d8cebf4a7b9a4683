// Attention of sequences with one new token each, over paged keys and values.
//
// The positions of a sequence are split over blocks, and within a block over its warps, each of which
// runs the online softmax (Milakov and Gimelshein 2018) over tiles of 16 positions; the parts are then
// merged ("Flash-Decoding", Dao et al. 2023). Query heads that share a key/value head are the rows of
// one product, so keys and values are read once. The block that is last to finish merges what the
// blocks of its sequence have left.

#include "attention.cuh"

struct Decode {
    Paged paged;
    const uint32_t* rows;  // [entry] its row; null: its own number
    bf16* out;             // [row][heads][head_dim]
    float* parts;          // [entry][kv_head][split]: maxima, sums, values of each head of the group
    uint32_t* counters;    // [entry][kv_head], zero between kernels
    uint32_t splits;
    uint32_t fused;  // whether bias, norm, rotation and the writing of the new key and value are done here
};
static_assert(sizeof(Decode) == 152, "as in src/kernels.rs");

constexpr int DECODE_WARPS = 4;
constexpr int TILE = 16;
// Fewer are not worth a block: a warp has two tiles' copies under way.
constexpr uint32_t LEAST_TILES = 2 * DECODE_WARPS;

// Grid: kv_heads, entries, splits. Dynamic shared memory: decode_shared(D).
template <int D>
__device__ void decode(const Decode& d) {
    constexpr int STRIDE = D + 8;
    constexpr int STAGE = 2 * TILE * STRIDE;
    DYNAMIC_SHARED(shared);
    __shared__ float maxima[DECODE_WARPS][16], totals[DECODE_WARPS][16];
    __shared__ bool merges;
    bf16* queries = reinterpret_cast<bf16*>(shared);
    let_next_start();
    // Before the kernel waits it reads only what no kernel of this step writes: the step's inputs, and
    // where it writes the new key and value itself, those of earlier positions.
    if (!d.fused) wait_for_previous();

    const Paged& p = d.paged;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    uint32_t kv_head = blockIdx.x, entry = blockIdx.y, group = p.heads / p.kv_heads;
    size_t row = d.rows ? d.rows[entry] : entry;
    uint32_t position = p.positions[row], table = p.tables[row];
    uint32_t tiles = position / TILE + 1;
    uint32_t share = max((tiles + d.splits - 1) / d.splits, LEAST_TILES);
    uint32_t active = (tiles + share - 1) / share;
    if (blockIdx.z >= active) {
        // Every thread of every kernel waits: then that a kernel is complete says that all before it are.
        if (d.fused) wait_for_previous();
        return;
    }
    uint32_t begin = blockIdx.z * share, end = min(begin + share, tiles);

    bf16* stages = queries + 16 * STRIDE + warp * 2 * STAGE;
    // Of positions that are in their blocks already.
    uint32_t known = d.fused ? position : position + 1;
    auto load = [&](uint32_t tile, int stage) {
        bf16* keys = stages + stage * STAGE;
        // Each of 16 lanes looks one position up for all.
        uint32_t at = tile * TILE + lane % TILE;
        uint32_t mine = at < known ? key_row(p, table, kv_head, at) : 0;
#pragma unroll
        for (int i = 0; i < TILE * D / 8 / 32; i++) {
            int in = (lane + i * 32) / (D / 8), piece = (lane + i * 32) % (D / 8);
            uint32_t from = __shfl_sync(ALL, mine, in);
            bool valid = tile * TILE + in < known;
            const bf16* key = p.kv + size_t(from) * D + piece * 8;
            copy_async(keys + in * STRIDE + piece * 8, key, valid);
            copy_async(keys + (TILE + in) * STRIDE + piece * 8, key + (valid ? size_t(value_rows(p)) * D : 0), valid);
        }
    };
    int stage = 0;
    if (begin + warp < end) load(begin + warp, stage);
    copy_commit();
    if (d.fused) wait_for_previous();

    // Queries, padded to 16 heads.
    for (int head = warp; head < 16; head += DECODE_WARPS) {
        bf16* to = queries + head * STRIDE;
        if (uint32_t(head) >= group) {
            for (int i = lane; i < D; i += 32) to[i] = 0;
            continue;
        }
        uint32_t q = kv_head * group + head;
        const bf16* from = p.qkv + row * qkv_width(p, D) + size_t(q) * D;
        if (d.fused) {
            rotate_head<D>(p, from, to, p.bias ? p.bias + q * D : nullptr, p.q_norm, position);
        } else {
            for (int i = lane; i < D; i += 32) to[i] = from[i];
        }
    }
    __syncthreads();

    Fragments<D> query(queries, lane);
    Softmax<D> softmax;
    for (uint32_t tile = begin + warp; tile < end; tile += DECODE_WARPS) {
        if (tile + DECODE_WARPS < end) load(tile + DECODE_WARPS, stage ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncwarp();
        bf16* keys = stages + stage * STAGE;
        if (d.fused && tile == tiles - 1) {
            // The new key and value take their place in the tile, and go to their block.
            bf16* key = keys + position % TILE * STRIDE;
            bf16* value = key + TILE * STRIDE;
            new_key<D>(p, row, kv_head, position, key);
            new_value<D>(p, row, kv_head, value);
            __syncwarp();
            size_t to = size_t(key_row(p, table, kv_head, position)) * D;
            for (int i = lane; i < D; i += 32) {
                p.kv[to + i] = key[i];
                p.kv[to + size_t(value_rows(p)) * D + i] = value[i];
            }
        }
        float scores[2][4] = {};
        query.multiply(scores, keys, lane);
        uint32_t first = tile * TILE;
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool visible = first + j * 8 + 2 * t + i % 2 <= position;
                scores[j][i] = visible ? scores[j][i] * p.scale : MASKED;
            }
        }
        softmax.add(scores, keys + TILE * STRIDE, lane);
        __syncwarp();
        stage ^= 1;
    }
    copy_wait<0>();
    softmax.finish();

    // The warps' parts, in the place of their keys and values.
    __syncthreads();
    float* values = reinterpret_cast<float*>(queries + 16 * STRIDE);
    softmax.write(maxima[warp], totals[warp], values + warp * 16 * D, lane);
    __syncthreads();
    size_t slot = size_t(entry) * p.kv_heads + kv_head;
    size_t part = size_t(group) * (D + 2);
    float* parts = d.parts + slot * d.splits * part;
    bf16* out = d.out + (row * p.heads + size_t(kv_head) * group) * D;
    for (uint32_t i = threadIdx.x; i < group * D; i += blockDim.x) {
        uint32_t head = i / D, dim = i % D;
        float maximum = MASKED;
        for (int w = 0; w < DECODE_WARPS; w++) maximum = fmaxf(maximum, maxima[w][head]);
        float total = 0.0f, value = 0.0f;
        for (int w = 0; w < DECODE_WARPS; w++) {
            float factor = exp2_fast(maxima[w][head] - maximum);
            total += factor * totals[w][head];
            value += factor * values[(w * 16 + head) * D + dim];
        }
        if (active == 1) {
            out[i] = narrow(value / total);
        } else {
            float* own = parts + blockIdx.z * part;
            own[2 * group + i] = value;
            if (dim == 0) {
                own[head] = maximum;
                own[group + head] = total;
            }
        }
    }
    if (active == 1) return;

    // What was written is visible to the block that sees the last count.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) merges = atomicAdd(d.counters + slot, 1u) == active - 1;
    __syncthreads();
    if (!merges) return;
    __threadfence();
    // Other blocks' writes: volatile, past this multiprocessor's own cache.
    const volatile float* all = parts;
    float* factors = values;  // [split][head]
    for (uint32_t i = threadIdx.x; i < active * group; i += blockDim.x) {
        factors[i] = all[i / group * part + i % group];
        factors[active * group + i] = all[i / group * part + group + i % group];
    }
    __syncthreads();
    for (uint32_t head = threadIdx.x; head < group; head += blockDim.x) {
        float maximum = MASKED, total = 0.0f;
        for (uint32_t s = 0; s < active; s++) maximum = fmaxf(maximum, factors[s * group + head]);
        for (uint32_t s = 0; s < active; s++) {
            float factor = exp2_fast(factors[s * group + head] - maximum);
            total += factor * factors[(active + s) * group + head];
            factors[s * group + head] = factor;
        }
        for (uint32_t s = 0; s < active; s++) factors[s * group + head] /= total;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < group * D; i += blockDim.x) {
        float value = 0.0f;
#pragma unroll 8
        for (uint32_t s = 0; s < active; s++) value += factors[s * group + i / D] * all[s * part + 2 * group + i];
        out[i] = narrow(value);
    }
    if (threadIdx.x == 0) d.counters[slot] = 0;
}

// So many blocks fit on a multiprocessor; src/kernels.rs counts on it.
constexpr int resident(int dim) { return dim <= 64 ? 4 : 3; }

#define DECODE(D) \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS * 32, resident(D)) decode_attention_##D(Decode d) { \
        decode<D>(d); \
    } \
    EXPORT(decode_attention_##D)
FOR_HEAD_DIMS(DECODE)
