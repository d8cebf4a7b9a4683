//! `y += (x Aᵀ) Bᵀ`: low-rank updates (LoRA, Hu et al. 2021), rows of one step with different ones.
//!
//! A row goes through its own adapter's matrices only; rows without one are not touched. As in all
//! kernels, a row gets the same bits whatever else is in the batch: each sum runs over the same
//! lanes, or the same ranks, in the same order.

use std::cell::RefCell;

use super::activations::Rows;
use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::pool::{Disjoint, ThreadPool};

/// Rows of one task.
const ROWS: usize = 8;

thread_local! {
    /// `x Aᵀ` of a task's rows. One per thread for its life: nothing is allocated in a step.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The two matrices of one module.
#[derive(Debug)]
pub struct LowRank {
    rank: usize,
    inputs: usize,
    outputs: usize,
    /// `rank × inputs`.
    a: Vec<f32>,
    /// `rank × outputs`: B transposed, times the adapter's scale.
    b: Vec<f32>,
}

impl LowRank {
    /// `a` is `rank × inputs`, `b` is `rank × outputs`: transposed and scaled. `None` when the
    /// lengths are others, or when inputs or outputs are no multiples of sixteen.
    pub fn new(rank: usize, inputs: usize, a: Vec<f32>, b: Vec<f32>) -> Option<Self> {
        let outputs = b.len().checked_div(rank)?;
        let whole = |len: usize| len > 0 && len.is_multiple_of(LANES);
        let fits = a.len() == rank * inputs && b.len() == rank * outputs;
        (fits && whole(inputs) && whole(outputs)).then_some(Self { rank, inputs, outputs, a, b })
    }

    /// Rows of A, columns of B.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Memory of both.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.a[..]) + size_of_val(&self.b[..])
    }
}

/// Which rows of a step belong to which adapter. Grown to the largest step seen and kept.
#[derive(Default)]
pub struct Groups {
    /// Of each row its adapter's index; [`NOBODY`] without one.
    owners: Vec<u32>,
    /// Rows that have an adapter, those of one after those of another. Each is there once.
    rows: Vec<u32>,
    tasks: Vec<Task>,
}

const NOBODY: u32 = u32::MAX;

/// Some of the rows of one adapter.
struct Task {
    owner: u32,
    start: usize,
    end: usize,
}

impl Groups {
    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.owners.clear();
        self.rows.clear();
        self.tasks.clear();
    }

    /// The next `count` rows belong to this adapter.
    pub fn push(&mut self, owner: Option<usize>, count: usize) {
        let owner = owner.map_or(NOBODY, |owner| owner as u32);
        self.owners.extend(std::iter::repeat_n(owner, count));
    }

    /// Groups the rows of `adapters` adapters, after the last `push`.
    pub fn arrange(&mut self, adapters: usize) {
        for adapter in 0..adapters as u32 {
            let first = self.rows.len();
            let own = (0..).zip(&self.owners).filter(|(_, owner)| **owner == adapter);
            self.rows.extend(own.map(|(row, _)| row));
            let last = self.rows.len();
            self.tasks.extend((first..last).step_by(ROWS).map(|start| Task {
                owner: adapter,
                start,
                end: last.min(start + ROWS),
            }));
        }
    }

    /// Whether no row has an adapter.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Adds to each of the results what its rows' adapters make of `x`, in one parallel region.
///
/// `of(adapter, result)` is an adapter's update of the `result`th result; `None` when it leaves it
/// as it is. A result comes with its width.
///
/// # Panics
/// When `groups` has other rows than `x`, or a result other rows, or an update other sides than
/// `x` and the result.
pub fn add<'a, const N: usize>(
    isa: Isa,
    pool: &mut ThreadPool,
    x: Rows<'_>,
    groups: &Groups,
    of: impl Fn(usize, usize) -> Option<&'a LowRank> + Sync,
    results: [(&mut [f32], usize); N],
) {
    if groups.is_empty() {
        return;
    }
    assert_eq!(groups.owners.len(), x.count(), "rows");
    let results = results.map(|(y, width)| {
        assert_eq!(y.len(), x.count() * width, "y");
        (Disjoint(y.as_mut_ptr()), width)
    });
    let inputs = x.floats();
    pool.run(groups.tasks.len() * N, |task| {
        let (task, result) = (&groups.tasks[task / N], task % N);
        let Some(update) = of(task.owner as usize, result) else { return };
        let (y, width) = &results[result];
        assert_eq!((update.inputs, update.outputs), (x.width(), *width), "an update's sides");
        let rows = &groups.rows[task.start..task.end];
        SCRATCH.with_borrow_mut(|inner| {
            inner.resize(inner.len().max(ROWS * update.rank), 0.0);
            let call = Call { update, rows, x: inputs.as_ptr(), inner: inner.as_mut_ptr() };
            // SAFETY: `isa` is available; rows are below `x.count()`, as `arrange` takes them from
            // the owners; each row is in one task for each result, so nobody else writes it.
            unsafe { apply(isa, &call, y.at(0)) }
        });
    });
}

/// One task's arithmetic.
struct Call<'a> {
    update: &'a LowRank,
    rows: &'a [u32],
    x: *const f32,
    /// `rows × rank`.
    inner: *mut f32,
}

#[inline(always)]
unsafe fn apply_kernel<V: Lanes>(call: &Call<'_>, y: *mut f32) {
    // As many rows at once as the registers allow.
    let tall = if V::WIDE { 4 } else { 1 };
    let mut row = 0;
    while row < call.rows.len() {
        let count = tall.min(call.rows.len() - row);
        // SAFETY: rows `row..row + count` of the task exist.
        unsafe {
            match count {
                4 => tile::<V, 4>(call, row, y),
                3 => tile::<V, 3>(call, row, y),
                2 => tile::<V, 2>(call, row, y),
                _ => tile::<V, 1>(call, row, y),
            }
        }
        row += count;
    }
}
dispatch! { unsafe fn apply(call: &Call<'_>, y: *mut f32) => apply_kernel; }

#[inline(always)]
unsafe fn tile<V: Lanes, const M: usize>(call: &Call<'_>, row: usize, y: *mut f32) {
    let &Call { update, rows, x, inner } = call;
    let &LowRank { rank, inputs, outputs, .. } = update;
    // SAFETY: by the caller: all rows and both matrices are as long as their sides say.
    unsafe {
        let x: [_; M] = std::array::from_fn(|m| x.add(rows[row + m] as usize * inputs));
        let y: [_; M] = std::array::from_fn(|m| y.add(rows[row + m] as usize * outputs));
        let inner: [_; M] = std::array::from_fn(|m| inner.add((row + m) * rank));
        let mut k = 0;
        while k + 4 <= rank {
            shrink::<V, M, 4>(update, x, inner, k);
            k += 4;
        }
        while k < rank {
            shrink::<V, M, 1>(update, x, inner, k);
            k += 1;
        }
        let inner = inner.map(<*mut f32>::cast_const);
        let mut at = 0;
        while at + 4 * LANES <= outputs {
            expand::<V, M, 4>(update, inner, y, at);
            at += 4 * LANES;
        }
        while at < outputs {
            expand::<V, M, 1>(update, inner, y, at);
            at += LANES;
        }
    }
}

/// `N` ranks, from `k` on, of `x Aᵀ`.
#[inline(always)]
unsafe fn shrink<V: Lanes, const M: usize, const N: usize>(
    update: &LowRank,
    x: [*const f32; M],
    inner: [*mut f32; M],
    k: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let a = update.a.as_ptr().add(k * update.inputs);
        let mut sums = [[V::splat(0.0); N]; M];
        for at in (0..update.inputs).step_by(LANES) {
            let a: [V; N] = std::array::from_fn(|n| V::load(a.add(n * update.inputs + at)));
            for m in 0..M {
                let x = V::load(x[m].add(at));
                for n in 0..N {
                    sums[m][n] = a[n].mul_add(x, sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                *inner[m].add(k + n) = sums[m][n].sum();
            }
        }
    }
}

/// `N` vectors of outputs, from `at` on.
#[inline(always)]
unsafe fn expand<V: Lanes, const M: usize, const N: usize>(
    update: &LowRank,
    inner: [*const f32; M],
    y: [*mut f32; M],
    at: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let b = update.b.as_ptr().add(at);
        let mut sums = [[V::splat(0.0); N]; M];
        for k in 0..update.rank {
            let b: [V; N] = std::array::from_fn(|n| V::load(b.add(k * update.outputs + n * LANES)));
            for m in 0..M {
                let inner = V::splat(*inner[m].add(k));
                for n in 0..N {
                    sums[m][n] = b[n].mul_add(inner, sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                let y = y[m].add(at + n * LANES);
                V::load(y).add(sums[m][n]).store(y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::activations::{Activations, Precision};

    fn noise(seed: u64, i: usize) -> f32 {
        let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    }

    fn noises(seed: u64, len: usize) -> Vec<f32> {
        (0..len).map(|i| noise(seed, i)).collect()
    }

    /// Adds two adapters' updates to rows with these owners.
    fn run(
        isa: Isa,
        updates: &[[Option<LowRank>; 2]],
        owners: &[Option<usize>],
        x: &[f32],
        y: [&mut [f32]; 2],
    ) {
        let rows = owners.len();
        let mut pool = ThreadPool::new(2).unwrap();
        let mut input = Activations::new(Precision::Sixteen);
        let width = x.len() / rows;
        let input = input.of(isa, &mut pool, x, width);
        let mut groups = Groups::default();
        owners.iter().for_each(|owner| groups.push(*owner, 1));
        groups.arrange(updates.len());
        let of = |adapter: usize, result: usize| updates[adapter][result].as_ref();
        let results = y.map(|y| {
            let width = y.len() / rows;
            (y, width)
        });
        add(isa, &mut pool, input, &groups, of, results);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn each_row_gets_its_own_update_and_the_same_bits_alone(
            owners in prop::collection::vec(prop::option::of(0usize..2), 1..40),
            rank in 1usize..19, other_rank in 1usize..70,
            inputs in 1usize..5, outputs in 1usize..9, seed in 0u64..1000,
        ) {
            let (inputs, outputs, narrow) = (inputs * 32, outputs * 16, 16);
            let update = |rank: usize, outputs: usize, seed: u64| {
                let (a, b) = (noises(seed, rank * inputs), noises(seed + 1, rank * outputs));
                LowRank::new(rank, inputs, a, b)
            };
            // The second adapter leaves the second result alone.
            let updates = [
                [update(rank, outputs, seed), update(rank, narrow, seed + 10)],
                [update(other_rank, outputs, seed + 20), None],
            ];
            let rows = owners.len();
            let x = noises(seed + 30, rows * inputs);
            let start = [noises(seed + 40, rows * outputs), noises(seed + 50, rows * narrow)];
            for isa in Isa::available() {
                let mut y = start.clone();
                let [first, second] = &mut y;
                run(isa, &updates, &owners, &x, [first, second]);
                for (row, owner) in owners.iter().enumerate() {
                    let own_x = &x[row * inputs..][..inputs];
                    for (result, width) in [outputs, narrow].into_iter().enumerate() {
                        let got = &y[result][row * width..][..width];
                        let before = &start[result][row * width..][..width];
                        let Some(update) = owner.and_then(|owner| updates[owner][result].as_ref())
                        else {
                            prop_assert_eq!(got, before, "an untouched row");
                            continue;
                        };
                        for o in 0..width {
                            let (mut sum, mut scale) = (f64::from(before[o]), 1.0);
                            for k in 0..update.rank {
                                let a = &update.a[k * inputs..][..inputs];
                                let b = f64::from(update.b[k * width + o]);
                                let terms = own_x.iter().zip(a);
                                let terms = terms.map(|(x, a)| f64::from(*x) * f64::from(*a) * b);
                                for term in terms {
                                    sum += term;
                                    scale += term.abs();
                                }
                            }
                            let error = (f64::from(got[o]) - sum).abs();
                            prop_assert!(error <= scale * 2e-6, "{isa:?}: {} {sum}", got[o]);
                        }
                    }
                    let mut alone = [0, 1].map(|result: usize| {
                        let width = [outputs, narrow][result];
                        start[result][row * width..][..width].to_vec()
                    });
                    let [first, second] = &mut alone;
                    run(isa, &updates, &[*owner], own_x, [first, second]);
                    prop_assert_eq!(&alone[0][..], &y[0][row * outputs..][..outputs]);
                    prop_assert_eq!(&alone[1][..], &y[1][row * narrow..][..narrow]);
                }
            }
        }
    }
}
