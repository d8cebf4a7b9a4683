//! Softmax attention in which every row of a text sees every other: encoders.
//!
//! Texts are packed one after the other, without padding. A task is some queries of one head of one
//! text. Queries lie in the lanes, keys and values are broadcast from where they are: so nothing of
//! them is copied, the softmax needs no sum across lanes, and a query's result depends on its own
//! text alone. Keys are taken in chunks that begin at fixed positions, in ascending order, and the
//! softmax is folded from chunk to chunk (Milakov and Gimelshein 2018; Dao et al. 2022).

use std::cell::RefCell;
use std::f32::consts::LOG2_E;

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::pool::{Disjoint, ThreadPool};

/// The rows of one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub row: usize,
    /// How many.
    pub count: usize,
}

/// Buffers that attention keeps from call to call.
#[derive(Default)]
pub struct Scratch {
    /// Of each task's queries, the text and their first.
    tiles: Vec<(Span, usize)>,
}

/// Queries of one task: a whole number of the widest tiles.
const QUERIES: usize = 192;

/// Keys that are weighed together: their scores stay in the first-level cache.
const CHUNK: usize = 128;

/// The score of a key that a query does not see. Finite, so that a chunk of nothing else has no
/// difference that is not a number: what it adds vanishes beside any key that is seen.
const UNSEEN: f32 = -1e30;

thread_local! {
    /// Buffers of one task. One per thread for the life of the thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Attention within each span: `out = softmax(q kᵀ / √d) v`.
///
/// `q`, `k`, `v` and `out` are `rows × heads × head_dim`. With a `window`, query `i` sees the keys
/// `j` with `|i − j| ≤ window`. Rows outside all spans are left as they are.
///
/// # Panics
/// When the slices differ in length, a span ends outside them, or spans overlap.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    isa: Isa,
    pool: &mut ThreadPool,
    heads: usize,
    head_dim: usize,
    window: Option<usize>,
    spans: &[Span],
    scratch: &mut Scratch,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
) {
    let width = heads * head_dim;
    assert!(q.len() == k.len() && q.len() == v.len() && q.len() == out.len(), "lengths");
    let tiles = &mut scratch.tiles;
    tiles.clear();
    let mut end = 0;
    for &span in spans {
        assert!(span.row >= end, "spans must ascend and not overlap");
        end = span.row + span.count;
        assert!(end * width <= q.len(), "a span outside the rows");
        tiles.extend((0..span.count).step_by(QUERIES).map(|first| (span, first)));
    }
    let (tiles, out) = (&tiles[..], Disjoint(out.as_mut_ptr()));
    let scale = LOG2_E / (head_dim as f32).sqrt();
    pool.run(tiles.len() * heads, |task| {
        let ((span, first), head) = (tiles[task / heads], task % heads);
        let start = span.row * width + head * head_dim;
        let call = Call {
            q: q[start..].as_ptr(),
            k: k[start..].as_ptr(),
            v: v[start..].as_ptr(),
            // SAFETY: inside `out`, checked above.
            out: unsafe { out.at(start) },
            width,
            head_dim,
            rows: span.count,
            window: window.unwrap_or(span.count),
            scale,
        };
        SCRATCH.with_borrow_mut(|scratch| {
            let floats = (2 * head_dim + CHUNK) * WIDEST * LANES;
            scratch.resize(scratch.len().max(floats), 0.0);
            let end = span.count.min(first + QUERIES);
            // SAFETY: `isa` is available; the head's elements of all rows of the span are inside
            // the slices; the scratch holds two vectors of `head_dim` and one of a chunk for the
            // widest tile; tasks write disjoint parts of `out`.
            unsafe { attend_queries(isa, &call, first, end, scratch.as_mut_ptr()) }
        });
    });
}

/// One head of one text.
struct Call {
    /// The first row's head, here and in the others.
    q: *const f32,
    k: *const f32,
    v: *const f32,
    out: *mut f32,
    /// Floats from a row to the next.
    width: usize,
    head_dim: usize,
    rows: usize,
    window: usize,
    /// What scores are multiplied by: their powers are of two.
    scale: f32,
}

/// The most vectors of queries that are computed together.
const WIDEST: usize = 3;

#[inline(always)]
unsafe fn attend_kernel<V: Lanes>(call: &Call, first: usize, end: usize, scratch: *mut f32) {
    let mut query = first;
    while query < end {
        // SAFETY: the caller's promise.
        unsafe {
            query += match (V::WIDE, (end - query).div_ceil(LANES)) {
                (true, 3..) => tile::<V, 8, 3>(call, query, end, scratch),
                (true, 2) => tile::<V, 8, 2>(call, query, end, scratch),
                (true, _) => tile::<V, 8, 1>(call, query, end, scratch),
                (false, _) => tile::<V, 4, 1>(call, query, end, scratch),
            };
        }
    }
}
dispatch! {
    unsafe fn attend_queries(
        call: &Call, first: usize, end: usize, scratch: *mut f32,
    ) => attend_kernel;
}

/// Up to `N` vectors of queries; `M` keys, or dimensions of values, at a time.
#[inline(always)]
unsafe fn tile<V: Lanes, const M: usize, const N: usize>(
    call: &Call,
    first: usize,
    end: usize,
    scratch: *mut f32,
) -> usize {
    let lanes = N * LANES;
    let count = lanes.min(end - first);
    // SAFETY: `count` queries from `first` on are rows of the span; see `attend` for the scratch.
    unsafe {
        let queries = scratch;
        let sums = queries.add(call.head_dim * lanes);
        let weights = sums.add(call.head_dim * lanes);
        for n in 0..N {
            read_queries::<V>(call, first, count, n, queries.add(n * LANES), lanes);
        }
        let mut largest = [V::splat(UNSEEN); N];
        let mut total = [V::splat(0.0); N];
        let from = first.saturating_sub(call.window) / CHUNK * CHUNK;
        let to = call.rows.min((first + count).saturating_add(call.window));
        for chunk in (from..to).step_by(CHUNK) {
            let keys = CHUNK.min(to - chunk);
            score::<V, M, N>(call, chunk, keys, queries, weights);
            if call.window < call.rows {
                mask::<N>(call, first, count, chunk, keys, weights);
            }
            let factor = exponents::<V, N>(keys, weights, &mut largest, &mut total);
            let factor = (chunk > from).then_some(factor);
            weigh::<V, M, N>(call, chunk, keys, weights, factor, sums);
        }
        for n in 0..N {
            let share = V::splat(1.0).div(total[n]);
            write_sums::<V>(call, first, count, n, sums.add(n * LANES), lanes, share);
        }
    }
    count
}

/// Turns the `n`-th sixteen queries, scaled, into a vector for each dimension, `lanes` floats apart.
#[inline(always)]
unsafe fn read_queries<V: Lanes>(
    call: &Call,
    first: usize,
    count: usize,
    n: usize,
    to: *mut f32,
    lanes: usize,
) {
    // SAFETY: the queries up to `count` are rows of the span, those behind repeat the last.
    unsafe {
        let row =
            |lane: usize| call.q.add((first + (n * LANES + lane).min(count - 1)) * call.width);
        let scale = V::splat(call.scale);
        let mut d = 0;
        while d + LANES <= call.head_dim {
            let mut square = [scale; LANES];
            for lane in 0..LANES {
                square[lane] = V::load(row(lane).add(d)).mul(scale);
            }
            V::transpose(&mut square);
            for i in 0..LANES {
                square[i].store(to.add((d + i) * lanes));
            }
            d += LANES;
        }
        for d in d..call.head_dim {
            for lane in 0..LANES {
                *to.add(d * lanes + lane) = *row(lane).add(d) * call.scale;
            }
        }
    }
}

/// The way back, of those that exist: rows of the sums, each multiplied by its share.
#[inline(always)]
unsafe fn write_sums<V: Lanes>(
    call: &Call,
    first: usize,
    count: usize,
    n: usize,
    sums: *const f32,
    lanes: usize,
    share: V,
) {
    // SAFETY: the queries up to `count` are rows of the span, this task's alone.
    unsafe {
        let rows = LANES.min(count.saturating_sub(n * LANES));
        let row = |lane: usize| call.out.add((first + n * LANES + lane) * call.width);
        let mut d = 0;
        while d + LANES <= call.head_dim {
            let mut square = [share; LANES];
            for i in 0..LANES {
                square[i] = V::load(sums.add((d + i) * lanes)).mul(share);
            }
            V::transpose(&mut square);
            for lane in 0..rows {
                square[lane].store(row(lane).add(d));
            }
            d += LANES;
        }
        let mut shares = [0.0; LANES];
        share.store(shares.as_mut_ptr());
        for d in d..call.head_dim {
            for lane in 0..rows {
                *row(lane).add(d) = *sums.add(d * lanes + lane) * shares[lane];
            }
        }
    }
}

/// The scores of a chunk's keys, a key after the other.
#[inline(always)]
unsafe fn score<V: Lanes, const M: usize, const N: usize>(
    call: &Call,
    chunk: usize,
    keys: usize,
    queries: *const f32,
    scores: *mut f32,
) {
    // SAFETY: the chunk's keys are rows of the span.
    unsafe {
        let k = call.k.add(chunk * call.width);
        let mut key = 0;
        while key + M <= keys {
            score_tile::<V, M, N>(call, k, key, queries, scores);
            key += M;
        }
        while key < keys {
            score_tile::<V, 1, N>(call, k, key, queries, scores);
            key += 1;
        }
    }
}

#[inline(always)]
unsafe fn score_tile<V: Lanes, const M: usize, const N: usize>(
    call: &Call,
    k: *const f32,
    key: usize,
    queries: *const f32,
    scores: *mut f32,
) {
    // SAFETY: `M` keys from `key` on exist, with a place for each one's scores.
    unsafe {
        let k = k.add(key * call.width);
        let mut sums = [[V::splat(0.0); N]; M];
        for d in 0..call.head_dim {
            let q: [V; N] = std::array::from_fn(|n| V::load(queries.add((d * N + n) * LANES)));
            for m in 0..M {
                let k = V::splat(*k.add(m * call.width + d));
                for n in 0..N {
                    sums[m][n] = q[n].mul_add(k, sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                sums[m][n].store(scores.add(((key + m) * N + n) * LANES));
            }
        }
    }
}

/// Hides the keys outside each query's window.
#[inline(always)]
unsafe fn mask<const N: usize>(
    call: &Call,
    first: usize,
    count: usize,
    chunk: usize,
    keys: usize,
    scores: *mut f32,
) {
    let lanes = N * LANES;
    for key in 0..keys {
        for lane in 0..lanes {
            let query = first + lane.min(count - 1);
            if query.abs_diff(chunk + key) > call.window {
                // SAFETY: each key of a chunk has a score for each lane.
                unsafe { *scores.add(key * lanes + lane) = UNSEEN };
            }
        }
    }
}

/// Makes weights of scores; gives the factor by which what came before is multiplied.
#[inline(always)]
unsafe fn exponents<V: Lanes, const N: usize>(
    keys: usize,
    scores: *mut f32,
    largest: &mut [V; N],
    total: &mut [V; N],
) -> [V; N] {
    // SAFETY: each key of a chunk has a score for each lane.
    unsafe {
        let before = *largest;
        for key in 0..keys {
            for n in 0..N {
                largest[n] = largest[n].max(V::load(scores.add((key * N + n) * LANES)));
            }
        }
        let mut factor = before;
        for n in 0..N {
            factor[n] = before[n].sub(largest[n]).exp2();
        }
        let mut sums = [V::splat(0.0); N];
        for key in 0..keys {
            for n in 0..N {
                let at = scores.add((key * N + n) * LANES);
                let weight = V::load(at).sub(largest[n]).exp2();
                weight.store(at);
                sums[n] = sums[n].add(weight);
            }
        }
        for n in 0..N {
            total[n] = total[n].mul_add(factor[n], sums[n]);
        }
        factor
    }
}

/// Adds a chunk's weighted values to the sums, which are multiplied by a factor first; those of the
/// first chunk begin with nothing.
#[inline(always)]
unsafe fn weigh<V: Lanes, const M: usize, const N: usize>(
    call: &Call,
    chunk: usize,
    keys: usize,
    weights: *const f32,
    factor: Option<[V; N]>,
    sums: *mut f32,
) {
    // SAFETY: the chunk's keys are rows of the span.
    unsafe {
        let v = call.v.add(chunk * call.width);
        let mut d = 0;
        while d + M <= call.head_dim {
            weigh_tile::<V, M, N>(call, v.add(d), keys, weights, factor, sums.add(d * N * LANES));
            d += M;
        }
        while d < call.head_dim {
            weigh_tile::<V, 1, N>(call, v.add(d), keys, weights, factor, sums.add(d * N * LANES));
            d += 1;
        }
    }
}

#[inline(always)]
unsafe fn weigh_tile<V: Lanes, const M: usize, const N: usize>(
    call: &Call,
    v: *const f32,
    keys: usize,
    weights: *const f32,
    factor: Option<[V; N]>,
    sums: *mut f32,
) {
    // SAFETY: `M` dimensions from `v` on exist in each of the keys' rows, with sums for each.
    unsafe {
        let mut tile = [[V::splat(0.0); N]; M];
        if let Some(factor) = factor {
            for m in 0..M {
                for n in 0..N {
                    tile[m][n] = V::load(sums.add((m * N + n) * LANES)).mul(factor[n]);
                }
            }
        }
        for key in 0..keys {
            let weight: [V; N] =
                std::array::from_fn(|n| V::load(weights.add((key * N + n) * LANES)));
            for m in 0..M {
                let v = V::splat(*v.add(key * call.width + m));
                for n in 0..N {
                    tile[m][n] = weight[n].mul_add(v, tile[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                tile[m][n].store(sums.add((m * N + n) * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64, i: usize) -> f32 {
        let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1u64 << 24) as f32 * 8.0 - 4.0
    }

    struct Case {
        heads: usize,
        head_dim: usize,
        window: Option<usize>,
        counts: Vec<usize>,
        seed: u64,
    }

    fn check(case: &Case) {
        let Case { heads, head_dim, window, ref counts, seed } = *case;
        let width = heads * head_dim;
        // A row between two spans belongs to none.
        let mut rows = 0;
        let spans: Vec<Span> = counts
            .iter()
            .map(|&count| {
                rows += count + 1;
                Span { row: rows - count - 1, count }
            })
            .collect();
        let noises =
            |of: u64| (0..rows * width).map(|i| noise(seed * 4 + of, i)).collect::<Vec<_>>();
        let (q, k, v) = (noises(0), noises(1), noises(2));
        let mut pool = ThreadPool::new(2).unwrap();
        for isa in Isa::available() {
            let mut scratch = Scratch::default();
            let mut out = vec![7.0; rows * width];
            attend(
                isa,
                &mut pool,
                heads,
                head_dim,
                window,
                &spans,
                &mut scratch,
                &q,
                &k,
                &v,
                &mut out,
            );
            for span in &spans {
                let of = |x: &[f32], row: usize, head: usize, d: usize| {
                    f64::from(x[(span.row + row) * width + head * head_dim + d])
                };
                for (i, head) in (0..span.count).flat_map(|i| (0..heads).map(move |head| (i, head)))
                {
                    let sees = |j: &usize| window.is_none_or(|window| i.abs_diff(*j) <= window);
                    let scores: Vec<(usize, f64)> = (0..span.count)
                        .filter(sees)
                        .map(|j| {
                            let dot: f64 = (0..head_dim)
                                .map(|d| of(&q, i, head, d) * of(&k, j, head, d))
                                .sum();
                            (j, dot / (head_dim as f64).sqrt())
                        })
                        .collect();
                    let most =
                        scores.iter().fold(f64::NEG_INFINITY, |most, score| most.max(score.1));
                    let total: f64 = scores.iter().map(|score| (score.1 - most).exp()).sum();
                    for d in 0..head_dim {
                        let sum: f64 = scores
                            .iter()
                            .map(|score| (score.1 - most).exp() * of(&v, score.0, head, d))
                            .sum();
                        let got = of(&out, i, head, d);
                        assert!((got - sum / total).abs() < 4e-5, "{isa:?} {got} {}", sum / total);
                    }
                }
                let after = &out[(span.row + span.count) * width..][..width];
                assert!(after.iter().all(|&x| x == 7.0), "{isa:?}: written beyond");
                // The text alone gives the same bits as in the batch.
                let alone = |x: &[f32]| x[span.row * width..][..span.count * width].to_vec();
                let mut own = vec![0.0; span.count * width];
                let (q, k, v) = (alone(&q), alone(&k), alone(&v));
                let spans = [Span { row: 0, count: span.count }];
                attend(
                    isa,
                    &mut pool,
                    heads,
                    head_dim,
                    window,
                    &spans,
                    &mut scratch,
                    &q,
                    &k,
                    &v,
                    &mut own,
                );
                assert_eq!(own, alone(&out), "{isa:?}: a text of {} of {counts:?}", span.count);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_float64_and_does_not_depend_on_the_batch(
            heads in 1usize..4, head_dim in prop::sample::select(vec![16, 20, 32, 64]),
            window in prop::option::of(0usize..40),
            counts in prop::collection::vec(0usize..70, 1..5), seed in 0u64..1000,
        ) {
            check(&Case { heads, head_dim, window, counts, seed });
        }
    }

    #[test]
    fn long_texts_agree_with_float64_too() {
        for (window, seed) in [(None, 1), (Some(100), 2), (Some(3), 3)] {
            check(&Case { heads: 1, head_dim: 64, window, counts: vec![3, 700, 1], seed });
        }
    }
}
