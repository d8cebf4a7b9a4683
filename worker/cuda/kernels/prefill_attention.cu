// Attention of sequences with several new tokens, over paged keys and values: FlashAttention-2 (Dao
// 2023), with the query heads that share a key/value head as rows of one tile.
//
// Rows are counted within a slice: row r is token r / group, head r % group of the group. A block
// takes 64 of them and goes through the positions that they see, 64 at a time, the next tile's copies
// under way.

#include "attention.cuh"

// 64 rows of a slice.
struct Tile {
    uint32_t row;    // the slice's first in the step
    uint32_t start;  // position of the slice's first token
    uint32_t count;  // the slice's tokens
    uint32_t first;  // the first of the 64
};

struct Prefill {
    Paged paged;  // with rotated queries, and the new keys and values in their blocks
    const Tile* tiles;
    bf16* out;  // [row][heads][head_dim]
};
static_assert(sizeof(Prefill) == 128, "as in src/kernels.rs");

constexpr int PREFILL_WARPS = 4;
constexpr int ROWS = PREFILL_WARPS * 16;
constexpr int POSITIONS = 64;

// Grid: tiles, kv_heads. Dynamic shared memory: prefill_shared(D).
template <int D>
__device__ void prefill(const Prefill& f) {
    constexpr int STRIDE = D + 8;
    constexpr int STAGE = 2 * POSITIONS * STRIDE;
    constexpr int PIECES = D / 8;
    DYNAMIC_SHARED(shared);
    __shared__ uint32_t key_rows[2][POSITIONS];
    let_next_start();
    wait_for_previous();

    const Paged& p = f.paged;
    const Tile at = f.tiles[blockIdx.x];
    uint32_t kv_head = blockIdx.y, group = p.heads / p.kv_heads, table = p.tables[at.row];
    uint32_t rows = min(at.count * group - at.first, uint32_t(ROWS));
    // Positions that the first and the last of the rows see end here.
    uint32_t least = at.start + at.first / group + 1;
    uint32_t most = at.start + (at.first + rows - 1) / group + 1;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    bf16* stages = reinterpret_cast<bf16*>(shared);
    auto look_up = [&](uint32_t first, int stage) {
        if (threadIdx.x < POSITIONS) {
            uint32_t position = min(first + threadIdx.x, most - 1);
            key_rows[stage][threadIdx.x] = key_row(p, table, kv_head, position);
        }
    };
    auto load = [&](uint32_t first, int stage) {
        bf16* keys = stages + stage * STAGE;
        for (int i = threadIdx.x; i < POSITIONS * PIECES; i += PREFILL_WARPS * 32) {
            int in = i / PIECES, piece = i % PIECES;
            bool valid = first + in < most;
            const bf16* key = p.kv + size_t(key_rows[stage][in]) * D + piece * 8;
            copy_async(keys + in * STRIDE + piece * 8, key, valid);
            copy_async(keys + (POSITIONS + in) * STRIDE + piece * 8, key + size_t(value_rows(p)) * D, valid);
        }
    };

    // Queries go through the second stage, which is free until the second tile comes.
    bf16* queries = stages + STAGE;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += PREFILL_WARPS * 32) {
        uint32_t in = i / PIECES, piece = i % PIECES, row = at.first + min(in, rows - 1);
        size_t from = (at.row + row / group) * qkv_width(p, D) + size_t(kv_head * group + row % group) * D;
        copy_async(queries + in * STRIDE + piece * 8, p.qkv + from + piece * 8, in < rows);
    }
    copy_commit();
    look_up(0, 0);
    __syncthreads();
    load(0, 0);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    Fragments<D> query(queries + warp * 16 * STRIDE, lane);
    Softmax<D> softmax;
    // Positions that this lane's two rows see.
    uint32_t ends[2];
#pragma unroll
    for (int side = 0; side < 2; side++) ends[side] = at.start + (at.first + warp * 16 + g + 8 * side) / group + 1;

    int stage = 0;
    for (uint32_t first = 0; first < most; first += POSITIONS) {
        if (first + POSITIONS < most) look_up(first + POSITIONS, stage ^ 1);
        // Nobody reads the other stage any more, and its rows are looked up.
        __syncthreads();
        if (first + POSITIONS < most) load(first + POSITIONS, stage ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const bf16* keys = stages + stage * STAGE;
        float scores[POSITIONS / 8][4] = {};
        query.multiply(scores, keys, lane);
        bool masked = first + POSITIONS > least;
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool visible = !masked || first + j * 8 + 2 * t + i % 2 < ends[i / 2];
                scores[j][i] = visible ? scores[j][i] * p.scale : MASKED;
            }
        }
        softmax.add(scores, keys + POSITIONS * STRIDE, lane);
        stage ^= 1;
    }
    copy_wait<0>();
    softmax.finish();
#pragma unroll
    for (int side = 0; side < 2; side++) {
        uint32_t in = warp * 16 + g + 8 * side, row = at.first + in;
        if (in >= rows) continue;
        float factor = 1.0f / softmax.total[side];
        bf16* out = f.out + ((at.row + row / group) * size_t(p.heads) + kv_head * group + row % group) * D;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            *reinterpret_cast<uint32_t*>(out + i * 8 + 2 * t) =
                pack(softmax.values[i][2 * side] * factor, softmax.values[i][2 * side + 1] * factor);
        }
    }
}

#define PREFILL(D) \
    extern "C" __global__ void __launch_bounds__(PREFILL_WARPS * 32, 2) prefill_attention_##D(Prefill f) { \
        prefill<D>(f); \
    } \
    EXPORT(prefill_attention_##D)
FOR_HEAD_DIMS(PREFILL)
