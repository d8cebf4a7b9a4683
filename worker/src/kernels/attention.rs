//! Causal softmax attention that walks KV pages where they lie.
//!
//! A task is a few neighbouring tokens of one sequence times the query heads that share one
//! key/value head (grouped-query attention), so that every key and value loaded serves all of
//! them. Scores, softmax and the weighted sum run over positions in ascending order for each query
//! alone: a query's result does not depend on the chunk it came in.

use std::cell::RefCell;

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::pool::{Disjoint, ThreadPool};
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

/// Query tokens of one task.
const TOKENS: usize = 4;

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, a multiple of sixteen.
    pub head_dim: usize,
    /// Tokens in a KV block, a multiple of sixteen.
    pub block_size: usize,
}

impl Shape {
    /// Floats of one key or value matrix in a block.
    fn matrix(&self) -> usize {
        self.head_dim * self.block_size
    }

    /// Floats of one layer in a block.
    fn layer(&self) -> usize {
        2 * self.kv_heads * self.matrix()
    }
}

/// One sequence's queries.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The first query's row in `q` and `out`.
    pub row: usize,
    /// How many.
    pub count: usize,
    /// Position of the first.
    pub start: usize,
    /// The sequence's blocks.
    pub blocks: &'a [BlockId],
}

/// Writes one token's keys and values of a layer into its block.
///
/// # Safety
/// The caller owns the block alone.
pub unsafe fn store(
    kv: &KvPool,
    shape: &Shape,
    layer: usize,
    blocks: &[BlockId],
    position: usize,
    key: &[f32],
    value: &[f32],
) {
    let (block, slot) = (blocks[position / shape.block_size], position % shape.block_size);
    assert!(key.len() == shape.kv_heads * shape.head_dim && key.len() == value.len());
    assert!((layer + 1) * shape.layer() * size_of::<f32>() <= kv.block_bytes());
    // SAFETY: the asserts keep every offset inside the block, which is the caller's alone.
    unsafe {
        let keys = kv.block_ptr(block).cast::<f32>().add(layer * shape.layer());
        let values = keys.add(shape.kv_heads * shape.matrix());
        for head in 0..shape.kv_heads {
            let at = head * shape.head_dim;
            let column = keys.add(head * shape.matrix() + slot);
            for d in 0..shape.head_dim {
                *column.add(d * shape.block_size) = key[at + d];
            }
            let row = values.add(head * shape.matrix() + slot * shape.head_dim);
            std::ptr::copy_nonoverlapping(value[at..].as_ptr(), row, shape.head_dim);
        }
    }
}

/// Attention of all queries of one layer: `out = softmax(q kᵀ / √d) v`.
///
/// `q` and `out` are `rows × heads × head_dim`. The keys and values of every position up to each
/// query's own are in the sequences' blocks.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    isa: Isa,
    pool: &mut ThreadPool,
    kv: &KvPool,
    shape: &Shape,
    layer: usize,
    queries: &[Queries<'_>],
    tasks: &mut Vec<(u32, u32)>,
    q: &[f32],
    out: &mut [f32],
) {
    assert_eq!(q.len(), out.len());
    let width = shape.heads * shape.head_dim;
    tasks.clear();
    for (i, queries) in queries.iter().enumerate() {
        assert!((queries.row + queries.count) * width <= q.len(), "queries outside q");
        assert!(queries.start + queries.count <= queries.blocks.len() * shape.block_size);
        tasks.extend((0..queries.count).step_by(TOKENS).map(|first| (i as u32, first as u32)));
    }
    let out = Disjoint(out.as_mut_ptr());
    let group = shape.heads / shape.kv_heads;
    let tasks = &tasks[..];
    pool.run(tasks.len() * shape.kv_heads, |task| {
        // Longest first: the last chunks of a prompt see the most keys.
        let (i, first) = tasks[tasks.len() - 1 - task / shape.kv_heads];
        let (queries, first) = (&queries[i as usize], first as usize);
        let head = task % shape.kv_heads;
        let row = queries.row + first;
        let offset = row * width + head * group * shape.head_dim;
        SCRATCH.with_borrow_mut(|scratch| {
            let tokens = TOKENS.min(queries.count - first);
            let stride = (queries.start + first + tokens).next_multiple_of(shape.block_size);
            let rows = tokens * group;
            scratch.resize(scratch.len().max(rows * stride), 0.0);
            let call = Call {
                kv,
                shape,
                layer,
                head,
                blocks: queries.blocks,
                tokens,
                group,
                position: queries.start + first,
                q: q[offset..].as_ptr(),
                // SAFETY: inside `out`, checked above.
                out: unsafe { out.at(offset) },
                width,
                scores: scratch.as_mut_ptr(),
                stride,
            };
            // SAFETY: `isa` is available; the blocks hold every position read; tasks write
            // disjoint rows or heads of `out`.
            unsafe { attend_group(isa, &call) }
        });
    });
}

thread_local! {
    /// Scores of one task. One per thread for the life of the thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Call<'a> {
    kv: &'a KvPool,
    shape: &'a Shape,
    layer: usize,
    head: usize,
    blocks: &'a [BlockId],
    /// Query tokens, and query heads of each.
    tokens: usize,
    group: usize,
    /// Position of the first token.
    position: usize,
    q: *const f32,
    out: *mut f32,
    /// Floats from a token to the next in `q` and `out`.
    width: usize,
    scores: *mut f32,
    /// Floats from a query's scores to the next one's.
    stride: usize,
}

impl Call<'_> {
    /// The key matrix of a block; the value matrix with `values`.
    #[inline(always)]
    unsafe fn page(&self, block: usize, values: bool) -> *const f32 {
        let shape = self.shape;
        let matrix = self.head + if values { shape.kv_heads } else { 0 };
        // SAFETY: inside the block, by the layout.
        unsafe {
            self.kv
                .block_ptr(self.blocks[block])
                .cast::<f32>()
                .add(self.layer * shape.layer() + matrix * shape.matrix())
        }
    }

    /// Offset of a query (token-major) in `q` and `out`.
    #[inline(always)]
    fn offset(&self, query: usize) -> usize {
        query / self.group * self.width + query % self.group * self.shape.head_dim
    }

    /// How many keys a query sees.
    #[inline(always)]
    fn keys(&self, query: usize) -> usize {
        self.position + query / self.group + 1
    }
}

#[inline(always)]
unsafe fn attend_kernel<V: Lanes>(call: &Call<'_>) {
    let queries = call.tokens * call.group;
    // SAFETY: handed on. Query tiles are as tall as the registers allow.
    unsafe {
        let mut query = 0;
        while query < queries {
            query += match (V::WIDE, queries - query) {
                (true, 12..) => scores::<V, 12>(call, query),
                (true, 6..) => scores::<V, 6>(call, query),
                (_, 3..) => scores::<V, 3>(call, query),
                _ => scores::<V, 1>(call, query),
            };
        }
        for query in 0..queries {
            softmax::<V>(call, query);
        }
        let mut query = 0;
        while query < queries {
            query += match (V::WIDE, queries - query) {
                (true, 6..) => weighted_sum::<V, 6>(call, query),
                (true, 3..) => weighted_sum::<V, 3>(call, query),
                _ => weighted_sum::<V, 1>(call, query),
            };
        }
    }
}
dispatch! { unsafe fn attend_group(call: &Call<'_>) => attend_kernel; }

/// Scores of `N` queries against all keys that the last of them sees.
#[inline(always)]
unsafe fn scores<V: Lanes, const N: usize>(call: &Call<'_>, query: usize) -> usize {
    let shape = call.shape;
    // SAFETY: keys up to the last query's position are in the blocks; the scores have `stride`
    // floats for each query.
    unsafe {
        let scale = V::splat(1.0 / (shape.head_dim as f32).sqrt());
        let q: [*const f32; N] = std::array::from_fn(|n| call.q.add(call.offset(query + n)));
        let keys = call.keys(query + N - 1);
        for block in 0..keys.div_ceil(shape.block_size) {
            let page = call.page(block, false);
            for column in (0..shape.block_size).step_by(LANES) {
                let mut sums = [V::splat(0.0); N];
                for d in 0..shape.head_dim {
                    let key = V::load(page.add(d * shape.block_size + column));
                    for n in 0..N {
                        sums[n] = V::splat(*q[n].add(d)).mul_add(key, sums[n]);
                    }
                }
                for (n, sum) in sums.into_iter().enumerate() {
                    let at = (query + n) * call.stride + block * shape.block_size + column;
                    sum.mul(scale).store(call.scores.add(at));
                }
            }
        }
    }
    N
}

/// Turns a query's scores into weights that sum to one.
#[inline(always)]
unsafe fn softmax<V: Lanes>(call: &Call<'_>, query: usize) {
    let keys = call.keys(query);
    let padded = keys.next_multiple_of(LANES);
    // SAFETY: `padded` is at most `stride`.
    unsafe {
        let scores = call.scores.add(query * call.stride);
        for i in keys..padded {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut largest = V::splat(f32::NEG_INFINITY);
        for i in (0..padded).step_by(LANES) {
            largest = largest.max(V::load(scores.add(i)));
        }
        let largest = V::splat(largest.largest());
        let mut sum = V::splat(0.0);
        for i in (0..padded).step_by(LANES) {
            let weight = V::load(scores.add(i)).sub(largest).exp();
            weight.store(scores.add(i));
            sum = sum.add(weight);
        }
        let scale = V::splat(1.0 / sum.sum());
        for i in (0..padded).step_by(LANES) {
            V::load(scores.add(i)).mul(scale).store(scores.add(i));
        }
    }
}

/// `out = weights · values` for `N` queries.
#[inline(always)]
unsafe fn weighted_sum<V: Lanes, const N: usize>(call: &Call<'_>, query: usize) -> usize {
    /// Vectors of a head that are summed in one walk over the pages.
    const WIDTH: usize = 4;
    let shape = call.shape;
    // SAFETY: no key past a query's own is read, so every value read has been written.
    unsafe {
        let shared = call.keys(query);
        let weights: [*const f32; N] =
            std::array::from_fn(|n| call.scores.add((query + n) * call.stride).cast_const());
        for dim in (0..shape.head_dim).step_by(WIDTH * LANES) {
            let width = WIDTH.min((shape.head_dim - dim) / LANES);
            let mut sums = [[V::splat(0.0); WIDTH]; N];
            // Keys that all N queries see, then those that only the later ones see.
            for block in 0..shared.div_ceil(shape.block_size) {
                let page = call.page(block, true).add(dim);
                let base = block * shape.block_size;
                for slot in 0..shape.block_size.min(shared - base) {
                    let row = page.add(slot * shape.head_dim);
                    for w in 0..WIDTH {
                        if w < width {
                            let value = V::load(row.add(w * LANES));
                            for n in 0..N {
                                let weight = V::splat(*weights[n].add(base + slot));
                                sums[n][w] = weight.mul_add(value, sums[n][w]);
                            }
                        }
                    }
                }
            }
            for n in 0..N {
                for key in shared..call.keys(query + n) {
                    let page = call.page(key / shape.block_size, true).add(dim);
                    let row = page.add(key % shape.block_size * shape.head_dim);
                    let weight = V::splat(*weights[n].add(key));
                    for w in 0..width {
                        sums[n][w] = weight.mul_add(V::load(row.add(w * LANES)), sums[n][w]);
                    }
                }
                for w in 0..width {
                    let out = call.out.add(call.offset(query + n) + dim + w * LANES);
                    sums[n][w].store(out);
                }
            }
        }
    }
    N
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{KvDtype, KvLayout};
    use proptest::prelude::*;

    use super::*;

    fn value(seed: usize, i: usize) -> f32 {
        ((seed * 7919 + i * 104_729) % 10_007) as f32 / 5003.5 - 1.0
    }

    /// The formula, in float64, over plain arrays.
    fn reference(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f64> {
        let dot = |key: &[f32]| -> f64 {
            q.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (q.len() as f64).sqrt()).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..q.len())
            .map(|d| {
                weights.iter().zip(values).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / sum
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn agrees_with_float64_and_does_not_depend_on_the_chunk(
            kv_heads in 1usize..4, group in 1usize..5, dims in 1usize..9, pages in 1usize..3,
            length in 1usize..90, chunk in 1usize..20, seed in 0usize..1000,
        ) {
            let shape = Shape { heads: kv_heads * group, kv_heads, head_dim: dims * 16, block_size: pages * 16 };
            let layers = 2;
            let layout = KvLayout {
                block_size: shape.block_size as u32, layers, kv_heads: kv_heads as u32,
                head_dim: shape.head_dim as u32, dtype: KvDtype::F32.into(),
                block_bytes: (layers as usize * shape.layer() * 4) as u64,
            };
            let count = length.div_ceil(shape.block_size);
            let kv = KvPool::new(layout, count + 1).unwrap();
            // Unwritten memory must not matter, whatever it holds.
            for block in 0..=count {
                // SAFETY: the pool is this test's alone.
                unsafe { kv.write_block(block as u32, &vec![0xff; kv.block_bytes()]) };
            }
            let blocks: Vec<u32> = (0..count as u32).rev().collect();
            let width = shape.heads * shape.head_dim;
            let row = kv_heads * shape.head_dim;
            let key = |p: usize| -> Vec<f32> { (0..row).map(|i| value(seed + p, i)).collect() };
            let val = |p: usize| -> Vec<f32> { (0..row).map(|i| value(seed + 500 + p, i)).collect() };
            let q: Vec<f32> = (0..length * width).map(|i| value(seed + 77, i) * 3.0).collect();
            let mut threads = ThreadPool::new(2).unwrap();
            for isa in Isa::available() {
                let mut whole = vec![0.0; q.len()];
                let mut start = 0;
                while start < length {
                    let count = chunk.min(length - start);
                    for p in start..start + count {
                        // SAFETY: the pool is this test's alone.
                        unsafe { store(&kv, &shape, 1, &blocks, p, &key(p), &val(p)) };
                    }
                    let range = start * width..(start + count) * width;
                    let queries = [Queries { row: 0, count, start, blocks: &blocks }];
                    attend(isa, &mut threads, &kv, &shape, 1, &queries, &mut Vec::new(), &q[range.clone()], &mut whole[range]);
                    start += count;
                }
                let mut at_once = vec![0.0; q.len()];
                let queries = [Queries { row: 0, count: length, start: 0, blocks: &blocks }];
                attend(isa, &mut threads, &kv, &shape, 1, &queries, &mut Vec::new(), &q, &mut at_once);
                prop_assert_eq!(&whole, &at_once, "{:?}: chunks of {}", isa, chunk);
                for p in [0, length / 2, length - 1] {
                    for head in 0..shape.heads {
                        let at = p * width + head * shape.head_dim;
                        let kv_at = head / group * shape.head_dim;
                        let part = |rows: Vec<f32>| rows[kv_at..kv_at + shape.head_dim].to_vec();
                        let keys: Vec<_> = (0..=p).map(|p| part(key(p))).collect();
                        let values: Vec<_> = (0..=p).map(|p| part(val(p))).collect();
                        let expected = reference(&q[at..at + shape.head_dim], &keys, &values);
                        for (d, expected) in expected.iter().enumerate() {
                            let got = f64::from(at_once[at + d]);
                            prop_assert!((got - expected).abs() < 2e-5, "{isa:?} {got} {expected}");
                        }
                    }
                }
            }
        }
    }
}
