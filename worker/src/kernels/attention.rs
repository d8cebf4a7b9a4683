//! Causal softmax attention that walks KV pages where they lie.
//!
//! A task is a few neighbouring tokens of one sequence times the query heads that share one
//! key/value head (grouped-query attention), so that every key and value loaded serves all of
//! them. Each query runs over its positions in ascending order, in segments that begin at fixed
//! positions: its result does not depend on the chunk it came in or on the number of threads.

use std::cell::RefCell;
use std::ops::Range;

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use baton_proto::v1::KvDtype;

use super::page::{Element, Matrix, Shape};
use super::pool::{Disjoint, ThreadPool};
use crate::kv::BlockId;
use crate::kv::pool::KvPool;

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

/// Keys that are weighed together. Results do not depend on how the work is shared out, because a
/// query's segments begin at multiples of this and are folded in ascending order.
const SEGMENT: usize = 256;

/// Queries of one task, about: enough to make good use of each key loaded.
const QUERIES: usize = 24;

/// Buffers that attention keeps from call to call.
#[derive(Default)]
pub struct Scratch {
    tiles: Vec<Tile>,
    /// Of each tile, head and segment, what [`Partial`] describes; used when segments are tasks.
    partials: Vec<f32>,
}

/// A few neighbouring tokens of one sequence.
#[derive(Clone, Copy)]
struct Tile {
    /// The sequence, in the call's `queries`.
    sequence: usize,
    /// The first token, in the sequence's queries.
    first: usize,
    tokens: usize,
    /// The first segment that one of the tokens sees, and the end of those that any sees.
    segments: (usize, usize),
    /// Segments of the tiles before, over one head.
    before: usize,
}

/// Attention of all queries of one layer: `out = softmax(q kᵀ / √d) v`.
///
/// `q` and `out` are `rows × heads × head_dim`. The keys and values of every position up to each
/// query's own are in the sequences' blocks. With a `window`, a query sees that many positions, the
/// last of them its own.
///
/// The softmax is taken segment by segment and folded (Milakov and Gimelshein 2018; Dao et al.
/// 2022). With fewer tiles than would keep the threads busy, segments are tasks of their own.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    isa: Isa,
    pool: &mut ThreadPool,
    kv: &KvPool,
    shape: &Shape,
    layer: usize,
    window: Option<usize>,
    queries: &[Queries<'_>],
    scratch: &mut Scratch,
    q: &[f32],
    out: &mut [f32],
) {
    assert_eq!(q.len(), out.len());
    let width = shape.heads * shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    let window = window.unwrap_or(usize::MAX);
    let Scratch { tiles, partials } = scratch;
    tiles.clear();
    let mut before = 0;
    for (sequence, queries) in queries.iter().enumerate() {
        assert!((queries.row + queries.count) * width <= q.len(), "queries outside q");
        assert!(queries.start + queries.count <= queries.blocks.len() * shape.block_size);
        let step = (QUERIES / group).max(1);
        for first in (0..queries.count).step_by(step) {
            let tokens = step.min(queries.count - first);
            let position = queries.start + first;
            let from = (position + 1).saturating_sub(window) / SEGMENT;
            let segments = (from, (position + tokens).div_ceil(SEGMENT));
            tiles.push(Tile { sequence, first, tokens, segments, before });
            before += segments.1 - segments.0;
        }
    }
    let (tiles, segments) = (&tiles[..], before);
    let out = Disjoint(out.as_mut_ptr());
    let call = |tile: &Tile, head: usize| {
        let queries = &queries[tile.sequence];
        let offset = (queries.row + tile.first) * width + head * group * shape.head_dim;
        Call {
            kv,
            shape,
            layer,
            head,
            blocks: queries.blocks,
            queries: tile.tokens * group,
            group,
            position: queries.start + tile.first,
            window,
            q: q[offset..].as_ptr(),
            // SAFETY: inside `out`, checked above.
            out: unsafe { out.at(offset) },
            width,
        }
    };
    let row = partial_row(shape);
    // Longest first: the last tiles of a prompt see the most keys.
    let tile_of =
        |task: usize| (&tiles[tiles.len() - 1 - task / shape.kv_heads], task % shape.kv_heads);
    let tasks = tiles.len() * shape.kv_heads;
    if tasks >= 4 * pool.threads() || segments == tiles.len() {
        pool.run(tasks, |task| {
            let (tile, head) = tile_of(task);
            let call = call(tile, head);
            SCRATCH.with_borrow_mut(|scratch| {
                let floats = call.queries * (SEGMENT + 2 * row) + packed_queries(shape);
                scratch.resize(scratch.len().max(floats), 0.0);
                let (scores, rows) = scratch.split_at_mut(call.queries * SEGMENT);
                let (packed, rows) = rows.split_at_mut(packed_queries(shape));
                let (whole, part) = rows.split_at_mut(call.queries * row);
                // SAFETY: `isa` is available; the blocks hold every position read; the scratch
                // holds scores and two rows for each query; tasks write disjoint parts of `out`.
                unsafe {
                    begin(&call, whole);
                    for segment in tile.segments.0..tile.segments.1 {
                        let packed = packed.as_mut_ptr();
                        weigh(isa, &call, segment, packed, scores.as_mut_ptr(), part.as_mut_ptr());
                        fold(isa, &call, segment, whole.as_mut_ptr(), part.as_ptr());
                    }
                    finish(isa, &call, whole.as_ptr());
                }
            });
        });
        return;
    }
    // Where the partials of a tile and head begin, and how many floats a segment takes.
    let most = tiles.iter().map(|tile| tile.tokens).max().unwrap_or(0) * group * row;
    partials.resize(partials.len().max(segments * shape.kv_heads * most), 0.0);
    let partials = Disjoint(partials.as_mut_ptr());
    let partial = |tile: &Tile, head: usize, segment: usize| {
        // SAFETY: a place for each segment of each tile and head.
        unsafe {
            let index = tile.before + segment - tile.segments.0;
            partials.at((index * shape.kv_heads + head) * most)
        }
    };
    pool.run(segments * shape.kv_heads, |task| {
        let (at, head) = (task / shape.kv_heads, task % shape.kv_heads);
        let tile = &tiles[tiles.partition_point(|tile| tile.before <= at) - 1];
        let (call, segment) = (call(tile, head), tile.segments.0 + at - tile.before);
        SCRATCH.with_borrow_mut(|scores| {
            let floats = call.queries * SEGMENT + packed_queries(shape);
            scores.resize(scores.len().max(floats), 0.0);
            let (packed, scores) = scores.split_at_mut(packed_queries(shape));
            // SAFETY: as above; each task has a partial of its own.
            unsafe {
                let (packed, scores) = (packed.as_mut_ptr(), scores.as_mut_ptr());
                weigh(isa, &call, segment, packed, scores, partial(tile, head, segment));
            }
        });
    });
    pool.run(tasks, |task| {
        let (tile, head) = tile_of(task);
        let call = call(tile, head);
        SCRATCH.with_borrow_mut(|whole| {
            whole.resize(whole.len().max(call.queries * row), 0.0);
            begin(&call, whole);
            // SAFETY: as above; a tile and head belong to one task.
            unsafe {
                for segment in tile.segments.0..tile.segments.1 {
                    let part = partial(tile, head, segment);
                    fold(isa, &call, segment, whole.as_mut_ptr(), part);
                }
                finish(isa, &call, whole.as_ptr());
            }
        });
    });
}

thread_local! {
    /// Scores and partials of one task. One per thread for the life of the thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Floats of one query's partial result: the weighted sum of the values, the largest score, and
/// the sum of the weights, padded to whole vectors.
fn partial_row(shape: &Shape) -> usize {
    shape.head_dim + LANES
}

/// The most queries that are scored together.
const TALLEST: usize = 12;

/// Floats of the queries that are scored together.
fn packed_queries(shape: &Shape) -> usize {
    TALLEST * shape.head_dim
}

struct Call<'a> {
    kv: &'a KvPool,
    shape: &'a Shape,
    layer: usize,
    head: usize,
    blocks: &'a [BlockId],
    /// Queries, token by token, and how many belong to a token.
    queries: usize,
    group: usize,
    /// Position of the first token.
    position: usize,
    window: usize,
    q: *const f32,
    out: *mut f32,
    /// Floats from a token to the next in `q` and `out`.
    width: usize,
}

impl Call<'_> {
    /// The block of a key, and the key's slot in it.
    #[inline(always)]
    fn place(&self, key: usize) -> (*mut u8, usize) {
        let size = self.shape.block_size;
        (self.kv.block_ptr(self.blocks[key / size]), key % size)
    }

    /// Sixteen keys from `key` on, a multiple of sixteen: `block_size` elements from a dimension
    /// to the next, and a scale for each.
    #[inline(always)]
    unsafe fn keys<E: Element>(&self, key: usize) -> (*const E, *const f32) {
        let (block, slot) = self.place(key);
        // SAFETY: inside the block.
        unsafe {
            let page = self.shape.page::<E>(block, self.layer, Matrix::Keys, self.head);
            (page.elements.add(slot), page.scales.add(slot))
        }
    }

    /// Sixteen values from that of `key` on: `head_dim` elements, and a scale, for each.
    #[inline(always)]
    unsafe fn values<E: Element>(&self, key: usize) -> (*const E, *const f32) {
        let (block, slot) = self.place(key);
        // SAFETY: inside the block.
        unsafe {
            let page = self.shape.page::<E>(block, self.layer, Matrix::Values, self.head);
            (page.elements.add(slot * self.shape.head_dim), page.scales.add(slot))
        }
    }

    /// Offset of a query in `q` and `out`.
    #[inline(always)]
    fn offset(&self, query: usize) -> usize {
        query / self.group * self.width + query % self.group * self.shape.head_dim
    }

    /// Which keys of a segment a query sees.
    #[inline(always)]
    fn seen(&self, query: usize, segment: usize) -> Range<usize> {
        let end = self.position + query / self.group + 1;
        let within = |key: usize| key.saturating_sub(segment * SEGMENT).min(SEGMENT);
        within(end.saturating_sub(self.window))..within(end)
    }
}

/// The partial results of no segment at all.
fn begin(call: &Call<'_>, whole: &mut [f32]) {
    let rows = whole.chunks_exact_mut(partial_row(call.shape)).take(call.queries);
    rows.for_each(|row| {
        row.fill(0.0);
        row[call.shape.head_dim] = f32::NEG_INFINITY;
    });
}

/// One segment's partial results of all queries that see some of it.
#[inline(always)]
unsafe fn weigh_kernel<V: Lanes>(
    call: &Call<'_>,
    segment: usize,
    packed: *mut f32,
    scores: *mut f32,
    partial: *mut f32,
) {
    // SAFETY: handed on, with the type of the pages' elements.
    unsafe {
        match call.shape.dtype {
            KvDtype::I8 => weigh_elements::<V, i8>(call, segment, packed, scores, partial),
            _ => weigh_elements::<V, i16>(call, segment, packed, scores, partial),
        }
    }
}
dispatch! {
    unsafe fn weigh(
        call: &Call<'_>, segment: usize, packed: *mut f32, scores: *mut f32, partial: *mut f32,
    ) => weigh_kernel;
}

#[inline(always)]
unsafe fn weigh_elements<V: Lanes, E: Element>(
    call: &Call<'_>,
    segment: usize,
    packed: *mut f32,
    scores: *mut f32,
    partial: *mut f32,
) {
    let row = partial_row(call.shape);
    // The first queries of a tile may see nothing of its last segment, and with a window the last
    // ones nothing of its first.
    let sees = |query: &usize| !call.seen(*query, segment).is_empty();
    let Some(first) = (0..call.queries).find(sees) else { return };
    let end = (first..call.queries).rfind(sees).map_or(first, |last| last + 1);
    // SAFETY: handed on. Query tiles are as tall as the registers allow.
    unsafe {
        let mut query = first;
        while query < end {
            query += match (V::WIDE, end - query) {
                (true, TALLEST..) => {
                    score::<V, E, TALLEST, 2>(call, segment, query, packed, scores)
                }
                (true, 6..) => score::<V, E, 6, 2>(call, segment, query, packed, scores),
                (true, 3..) => score::<V, E, 3, 4>(call, segment, query, packed, scores),
                (true, _) => score::<V, E, 1, 4>(call, segment, query, packed, scores),
                (false, 6..) => score::<V, E, 6, 1>(call, segment, query, packed, scores),
                (false, 3..) => score::<V, E, 3, 1>(call, segment, query, packed, scores),
                (false, _) => score::<V, E, 1, 2>(call, segment, query, packed, scores),
            };
        }
        for query in first..end {
            let (seen, partial) = (call.seen(query, segment), partial.add(query * row));
            let summary = partial.add(call.shape.head_dim);
            exponents::<V, E>(call, segment, seen, scores.add(query * SEGMENT), summary);
        }
        let mut query = first;
        while query < end {
            query += match (V::WIDE, end - query) {
                (true, 12..) => weighted_sum::<V, E, 12, 2>(call, segment, query, scores, partial),
                (true, 6..) => weighted_sum::<V, E, 6, 4>(call, segment, query, scores, partial),
                (true, 3..) => weighted_sum::<V, E, 3, 4>(call, segment, query, scores, partial),
                (false, 6..) => weighted_sum::<V, E, 6, 1>(call, segment, query, scores, partial),
                (false, 3..) => weighted_sum::<V, E, 3, 2>(call, segment, query, scores, partial),
                _ => weighted_sum::<V, E, 1, 4>(call, segment, query, scores, partial),
            };
        }
    }
}

/// Scores of `N` queries against the keys of a segment that the last of them sees, `C` times
/// sixteen keys at once.
#[inline(always)]
unsafe fn score<V: Lanes, E: Element, const N: usize, const C: usize>(
    call: &Call<'_>,
    segment: usize,
    query: usize,
    packed: *mut f32,
    scores: *mut f32,
) -> usize {
    let columns = call.seen(query + N - 1, segment).end.div_ceil(LANES);
    // SAFETY: keys up to the last query's position are in the blocks; a query has `SEGMENT`
    // scores; there is room for `TALLEST` queries, and N is not above it.
    unsafe {
        let first = call.q.add(call.offset(query));
        // One dimension of all queries after the other: N pointers would not fit the registers.
        let q = if N == 1 { first } else { packed.cast_const() };
        if N > 1 {
            for n in 0..N {
                let from = call.q.add(call.offset(query + n));
                for d in 0..call.shape.head_dim {
                    *packed.add(d * N + n) = *from.add(d);
                }
            }
        }
        let mut column = call.seen(query, segment).start / LANES;
        while column + C <= columns {
            score_columns::<V, E, N, C>(call, segment, query, column, q, scores);
            column += C;
        }
        while column < columns {
            score_columns::<V, E, N, 1>(call, segment, query, column, q, scores);
            column += 1;
        }
    }
    N
}

#[inline(always)]
unsafe fn score_columns<V: Lanes, E: Element, const N: usize, const C: usize>(
    call: &Call<'_>,
    segment: usize,
    query: usize,
    column: usize,
    q: *const f32,
    scores: *mut f32,
) {
    // SAFETY: as in `score`.
    unsafe {
        let factor = V::splat(1.0 / (call.shape.head_dim as f32).sqrt());
        let mut keys = [(std::ptr::null::<E>(), std::ptr::null::<f32>()); C];
        for c in 0..C {
            keys[c] = call.keys(segment * SEGMENT + (column + c) * LANES);
        }
        // The values of these keys are read next: asked for now, they are in the second-level cache by
        // then. Pages are too small, and too far apart, for the CPU to foresee it.
        let mut values = [std::ptr::null::<E>(); C];
        for c in 0..C {
            values[c] = call.values(segment * SEGMENT + (column + c) * LANES).0;
        }
        let mut sums = [[V::splat(0.0); C]; N];
        for d in 0..call.shape.head_dim {
            let mut key = [V::splat(0.0); C];
            for c in 0..C {
                if d % 2 == 0 {
                    V::prefetch(values[c].add(d * LANES));
                }
                key[c] = E::load::<V>(keys[c].0.add(d * call.shape.block_size));
            }
            for n in 0..N {
                let q = V::splat(*q.add(d * N + n));
                for c in 0..C {
                    sums[n][c] = q.mul_add(key[c], sums[n][c]);
                }
            }
        }
        for c in 0..C {
            let scale = V::load(keys[c].1).mul(factor);
            for n in 0..N {
                let at = (query + n) * SEGMENT + (column + c) * LANES;
                sums[n][c].mul(scale).store(scores.add(at));
            }
        }
    }
}

/// Turns a query's scores into `e^(score - largest)`, times the scale of each value; writes the
/// largest score, and the sum without the scales.
#[inline(always)]
unsafe fn exponents<V: Lanes, E: Element>(
    call: &Call<'_>,
    segment: usize,
    seen: Range<usize>,
    scores: *mut f32,
    summary: *mut f32,
) {
    let from = seen.start / LANES * LANES;
    let padded = seen.end.next_multiple_of(LANES);
    // SAFETY: `padded` is at most `SEGMENT`; the summary has two floats.
    unsafe {
        for i in (from..seen.start).chain(seen.end..padded) {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        let mut largest = V::splat(f32::NEG_INFINITY);
        for i in (from..padded).step_by(LANES) {
            largest = largest.max(V::load(scores.add(i)));
        }
        let largest = largest.largest();
        let mut sum = V::splat(0.0);
        for i in (from..padded).step_by(LANES) {
            let weight = V::load(scores.add(i)).sub(V::splat(largest)).exp();
            let (_, scales) = call.values::<E>(segment * SEGMENT + i);
            weight.mul(V::load(scales)).store(scores.add(i));
            sum = sum.add(weight);
        }
        *summary = largest;
        *summary.add(1) = sum.sum();
    }
}

/// The sum of a segment's values by weight, for `N` queries, `WIDTH` vectors of a head in one walk
/// over the pages.
#[inline(always)]
unsafe fn weighted_sum<V: Lanes, E: Element, const N: usize, const WIDTH: usize>(
    call: &Call<'_>,
    segment: usize,
    query: usize,
    scores: *const f32,
    partial: *mut f32,
) -> usize {
    let (mut dim, head_dim) = (0, call.shape.head_dim);
    // SAFETY: handed on; the vectors of the head are walked once.
    unsafe {
        while dim + WIDTH * LANES <= head_dim {
            sum_columns::<V, E, N, WIDTH>(call, segment, query, dim, scores, partial);
            dim += WIDTH * LANES;
        }
        while dim < head_dim {
            sum_columns::<V, E, N, 1>(call, segment, query, dim, scores, partial);
            dim += LANES;
        }
    }
    N
}

#[inline(always)]
unsafe fn sum_columns<V: Lanes, E: Element, const N: usize, const WIDTH: usize>(
    call: &Call<'_>,
    segment: usize,
    query: usize,
    dim: usize,
    scores: *const f32,
    partial: *mut f32,
) {
    let (head_dim, row) = (call.shape.head_dim, partial_row(call.shape));
    // SAFETY: no key past a query's own is read, so every value read has been written.
    unsafe {
        let weights = scores.add(query * SEGMENT);
        let mut sums = [[V::splat(0.0); WIDTH]; N];
        // Keys in ascending order for each query: those that only the earlier queries see, those
        // that all N see, those that only the later ones see.
        let shared = call.seen(query + N - 1, segment).start..call.seen(query, segment).end;
        let shared = if shared.is_empty() { SEGMENT..SEGMENT } else { shared };
        for n in 0..N {
            let seen = call.seen(query + n, segment);
            let own = seen.start..seen.end.min(shared.start);
            let weights = weights.add(n * SEGMENT);
            add_alone::<V, E, WIDTH>(call, segment, own, dim, weights, &mut sums[n]);
        }
        let mut key = shared.start;
        while key < shared.end {
            // Within sixteen keys the values follow each other.
            let value = call.values::<E>(segment * SEGMENT + key).0.add(dim);
            // The keys of the next segment are read next.
            let ahead = ((segment + 1) * SEGMENT + key).min(call.position / LANES * LANES);
            let ahead = call.keys::<E>(ahead / LANES * LANES).0;
            let run = (LANES - key % LANES).min(shared.end - key);
            for i in 0..run {
                for w in (0..WIDTH).step_by(2) {
                    V::prefetch(ahead.add((dim + i * head_dim) + w * LANES));
                }
                let value = value.add(i * head_dim);
                let mut values = [V::splat(0.0); WIDTH];
                for w in 0..WIDTH {
                    values[w] = E::load::<V>(value.add(w * LANES));
                }
                for n in 0..N {
                    let weight = V::splat(*weights.add(n * SEGMENT + key + i));
                    for w in 0..WIDTH {
                        sums[n][w] = weight.mul_add(values[w], sums[n][w]);
                    }
                }
            }
            key += run;
        }
        for n in 0..N {
            let seen = call.seen(query + n, segment);
            let own = shared.end.max(seen.start)..seen.end;
            let weights = weights.add(n * SEGMENT);
            add_alone::<V, E, WIDTH>(call, segment, own, dim, weights, &mut sums[n]);
            for w in 0..WIDTH {
                sums[n][w].store(partial.add((query + n) * row + dim + w * LANES));
            }
        }
    }
}

/// Adds values by weight for one query.
#[inline(always)]
unsafe fn add_alone<V: Lanes, E: Element, const WIDTH: usize>(
    call: &Call<'_>,
    segment: usize,
    keys: Range<usize>,
    dim: usize,
    weights: *const f32,
    sums: &mut [V; WIDTH],
) {
    for key in keys {
        // SAFETY: the query sees these keys, so their values have been written.
        unsafe {
            let value = call.values::<E>(segment * SEGMENT + key).0.add(dim);
            let weight = V::splat(*weights.add(key));
            for w in 0..WIDTH {
                sums[w] = weight.mul_add(E::load::<V>(value.add(w * LANES)), sums[w]);
            }
        }
    }
}

/// Adds a segment's partial results to those of the segments before it.
#[inline(always)]
unsafe fn fold_kernel<V: Lanes>(
    call: &Call<'_>,
    segment: usize,
    whole: *mut f32,
    part: *const f32,
) {
    let (head_dim, row) = (call.shape.head_dim, partial_row(call.shape));
    // SAFETY: both hold a row for each query.
    unsafe {
        for query in 0..call.queries {
            if call.seen(query, segment).is_empty() {
                continue;
            }
            let (whole, part) = (whole.add(query * row), part.add(query * row));
            let (largest, other) = (*whole.add(head_dim), *part.add(head_dim));
            let both = V::splat(largest.max(other));
            let keep = V::splat(largest).sub(both).exp();
            let take = V::splat(other).sub(both).exp();
            for i in (0..head_dim).step_by(LANES) {
                let taken = V::load(part.add(i)).mul(take);
                V::load(whole.add(i)).mul_add(keep, taken).store(whole.add(i));
            }
            let taken = V::splat(*part.add(head_dim + 1)).mul(take);
            let sum = V::splat(*whole.add(head_dim + 1)).mul_add(keep, taken);
            *whole.add(head_dim) = largest.max(other);
            *whole.add(head_dim + 1) = sum.largest();
        }
    }
}
dispatch! {
    unsafe fn fold(
        call: &Call<'_>, segment: usize, whole: *mut f32, part: *const f32,
    ) => fold_kernel;
}

/// Divides by the sums of the weights.
#[inline(always)]
unsafe fn finish_kernel<V: Lanes>(call: &Call<'_>, whole: *const f32) {
    let (head_dim, row) = (call.shape.head_dim, partial_row(call.shape));
    // SAFETY: a row for each query, and its place in `out`.
    unsafe {
        for query in 0..call.queries {
            let (whole, out) = (whole.add(query * row), call.out.add(call.offset(query)));
            let scale = V::splat(1.0 / *whole.add(head_dim + 1));
            for i in (0..head_dim).step_by(LANES) {
                V::load(whole.add(i)).mul(scale).store(out.add(i));
            }
        }
    }
}
dispatch! { unsafe fn finish(call: &Call<'_>, whole: *const f32) => finish_kernel; }

#[cfg(test)]
mod tests {
    use baton_proto::v1::KvLayout;
    use proptest::prelude::*;

    use super::super::page::store;
    use super::*;

    fn value(seed: usize, i: usize) -> f32 {
        ((seed * 7919 + i * 104_729) % 10_007) as f32 / 5003.5 - 1.0
    }

    /// What a page keeps of a head's vector.
    fn kept(dtype: KvDtype, x: &[f32]) -> Vec<f32> {
        let largest = if dtype == KvDtype::I8 { 127.0 } else { 32767.0 };
        let magnitude = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        x.iter().map(|x| (x * largest / magnitude).round() * magnitude / largest).collect()
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
            length in prop_oneof![1usize..90, 240usize..600], chunk in 1usize..70,
            dtype in prop_oneof![Just(KvDtype::I16), Just(KvDtype::I8)],
            window in prop_oneof![Just(None), (1usize..300).prop_map(Some)], seed in 0usize..1000,
        ) {
            let shape = Shape { heads: kv_heads * group, kv_heads, head_dim: dims * 16, block_size: pages * 16, dtype };
            let layers = 2;
            let layout = KvLayout {
                block_size: shape.block_size as u32, layers, kv_heads: kv_heads as u32,
                head_dim: shape.head_dim as u32, dtype: dtype.into(),
                block_bytes: (layers as usize * shape.layer_bytes()) as u64,
            };
            let count = length.div_ceil(shape.block_size);
            let kv = KvPool::new(layout, count + 1).unwrap();
            // Unwritten memory must not matter, whatever it holds.
            for block in 0..=count {
                // SAFETY: the pool is this test's alone.
                unsafe { kv.write_block(block as u32, &vec![0xff; kv.block_bytes()]) }.unwrap();
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
                    attend(isa, &mut threads, &kv, &shape, 1, window, &queries, &mut Scratch::default(), &q[range.clone()], &mut whole[range]);
                    start += count;
                }
                let mut at_once = vec![0.0; q.len()];
                let queries = [Queries { row: 0, count: length, start: 0, blocks: &blocks }];
                attend(isa, &mut threads, &kv, &shape, 1, window, &queries, &mut Scratch::default(), &q, &mut at_once);
                prop_assert_eq!(&whole, &at_once, "{:?}: chunks of {}", isa, chunk);
                for p in [0, length / 2, length - 1] {
                    for head in 0..shape.heads {
                        let at = p * width + head * shape.head_dim;
                        let kv_at = head / group * shape.head_dim;
                        let part = |rows: Vec<f32>| kept(dtype, &rows[kv_at..kv_at + shape.head_dim]);
                        let first = (p + 1).saturating_sub(window.unwrap_or(usize::MAX));
                        let keys: Vec<_> = (first..=p).map(|p| part(key(p))).collect();
                        let values: Vec<_> = (first..=p).map(|p| part(val(p))).collect();
                        let expected = reference(&q[at..at + shape.head_dim], &keys, &values);
                        for (d, expected) in expected.iter().enumerate() {
                            let got = f64::from(at_once[at + d]);
                            prop_assert!((got - expected).abs() < 1e-4, "{isa:?} {got} {expected}");
                        }
                    }
                }
            }
        }
    }
}
