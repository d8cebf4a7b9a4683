//! `y = x Wᵀ` of two rows at a time, with seven products of quarters where there are eight.
//!
//! Two rows, each in two halves, are a matrix of two by two; so are the quarters of `W`. Their
//! product takes seven multiplications (Strassen 1969; here in Winograd's form: Higham, *Accuracy
//! and Stability of Numerical Algorithms*, 2002, § 23.1). The sums of weights are made at load, those
//! of activations for each block of pairs. It is float32 throughout. Of the two rows together the error
//! is at most three times that of plain sums; but it is shared: a small row beside a large one has the
//! large one's error. The tests hold both to float64.
//!
//! A row's bits depend on the row that it is paired with, and on nothing else: a [`Pairing`] pairs
//! rows of one text.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::quantized::GgmlDType;

use super::arena::Arena;
use super::cpu::{Isa, dispatch};
use super::elementwise::Activation;
use super::float;
use super::floats::Floats;
use super::lanes::{LANES, Lanes, Portable};
use super::panels::Panels;
use super::pool::ThreadPool;

/// The most pairs of a task, and of their halves the most floats: so many share what it takes to fetch
/// a product's weights, which stay in the second-level cache meanwhile, or almost.
const PAIRS: usize = 64;
const FLOATS: usize = PAIRS * 768;

/// Outputs, of each half, of one task.
pub(super) const PANEL: usize = float::TILES * LANES;

/// Rows of the shortest text that is paired: the weights of fewer are read for longer than they are
/// multiplied with, and here there are seven quarters of them where there were four.
const SHORTEST: usize = 48;

/// Products of quarters.
const PRODUCTS: usize = 7;

/// What products multiply that is not as it stands in the rows, at most.
const SUMS: usize = 5;

/// Which rows are computed together. Rows are a text's own, so that no text depends on another.
#[derive(Debug, Default)]
pub struct Pairing {
    /// How many rows are in.
    pub(super) rows: usize,
    runs: Vec<Run>,
    /// Rows that are computed as ever.
    pub(super) rest: Vec<Range<usize>>,
}

/// Pairs of rows: `count` from the first on, and as many from the second on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    first: usize,
    second: usize,
    count: usize,
    /// Of the first rows the last has no other.
    odd: bool,
    /// How many pairs of the [`Pairing`] are before these.
    before: usize,
}

impl Run {
    /// The second of a pair.
    fn second(&self, pair: usize) -> Option<usize> {
        (!self.odd || pair + 1 < self.count).then_some(self.second + pair)
    }

    /// How many pairs of the [`Pairing`] there are up to its end.
    fn end(&self) -> usize {
        self.before + self.count
    }

    /// What is left of it behind so many pairs, which it is cut to.
    fn cut(&mut self, count: usize) -> Self {
        let rest = Self {
            first: self.first + count,
            second: self.second + count,
            count: self.count - count,
            before: self.before + count,
            ..*self
        };
        (self.count, self.odd) = (count, self.odd && rest.count == 0);
        rest
    }
}

impl Pairing {
    /// No rows.
    pub fn clear(&mut self) {
        self.rows = 0;
        self.runs.clear();
        self.rest.clear();
    }

    /// Whether any rows are paired.
    pub fn pairs_rows(&self) -> bool {
        !self.runs.is_empty()
    }

    /// Adds a text of so many rows, which follow those that are in.
    pub fn push(&mut self, rows: usize) {
        let rows = self.rows..self.rows + rows;
        self.rows = rows.end;
        if rows.len() < SHORTEST {
            match self.rest.last_mut() {
                Some(last) if last.end == rows.start => last.end = rows.end,
                _ => self.rest.push(rows),
            }
            return;
        }
        let (count, odd) = (rows.len().div_ceil(2), !rows.len().is_multiple_of(2));
        let before = self.pairs();
        self.runs.push(Run { first: rows.start, second: rows.start + count, count, odd, before });
    }

    /// How many pairs there are.
    fn pairs(&self) -> usize {
        self.runs.last().map_or(0, Run::end)
    }

    /// The pairs of each task of a product with so many inputs, whose outputs are in so many panels:
    /// enough for all threads, but no fewer than a pass takes. How they are parted does not change what comes out.
    pub(super) fn blocks(&self, inputs: usize, panels: usize, threads: usize) -> Blocks {
        let pairs = self.pairs();
        let wanted = (4 * threads).div_ceil(panels);
        let most = PAIRS.min(FLOATS / (inputs / 2)).min(pairs.div_ceil(wanted)).max(float::LOW);
        let count = pairs.div_ceil(most);
        let mut blocks = Blocks::default();
        for run in &self.runs {
            let mut rest = *run;
            while rest.count > 0 {
                let end = pairs * (blocks.len() + 1) / count;
                let mut run = rest;
                rest = run.cut(run.count.min(end - run.before));
                blocks.runs.push(run);
                if run.end() == end {
                    blocks.ends.push(blocks.runs.len());
                }
            }
        }
        blocks
    }
}

/// Parts of about the same size of all pairs.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    runs: Vec<Run>,
    /// The end of each block's runs.
    ends: Vec<usize>,
}

impl Blocks {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// A block's pairs.
    pub(super) fn runs(&self, block: usize) -> &[Run] {
        let start = block.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.runs[start..self.ends[block]]
    }
}

/// Sums of a matrix's quarters: for each panel of outputs those of all products, one product's after
/// the other's, as they are read.
pub(super) struct Quarters(Panels);

impl Quarters {
    /// Whether a matrix's halves are whole panels, and of whole vectors and lines.
    fn fit(outputs: usize, inputs: usize) -> bool {
        outputs.is_multiple_of(2 * PANEL) && inputs.is_multiple_of(4 * LANES)
    }

    /// Of a matrix, `outputs × inputs`; `None` where they do not fit.
    pub(super) fn new(
        pool: &mut ThreadPool,
        arena: &mut Arena,
        weights: &[f32],
        (outputs, inputs): (usize, usize),
    ) -> Option<Self> {
        if !Self::fit(outputs, inputs) {
            return None;
        }
        let (half, width) = (outputs / 2, inputs / 2);
        let rows = PRODUCTS * half;
        let mut bytes = vec![0; rows * width * size_of::<f32>()];
        let row_bytes = width * size_of::<f32>();
        pool.for_rows((&mut bytes, row_bytes), (&mut vec![0u8; rows], 1), |row, out, _| {
            let (panel, product) = (row / (PRODUCTS * PANEL), row / PANEL % PRODUCTS);
            let output = panel * PANEL + row % PANEL;
            // The quarter of an output's half and an input's.
            let quarter = |o: usize, i: usize| {
                let row = &weights[(o * half + output) * inputs..][..inputs];
                move |at: usize| f64::from(row[i * width + at])
            };
            let (b11, b12) = (quarter(0, 0), quarter(1, 0));
            let (b21, b22) = (quarter(0, 1), quarter(1, 1));
            for (at, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let sum = match product {
                    0 => b11(at),
                    1 => b21(at),
                    2 => b22(at) - b12(at) + b11(at),
                    3 => b22(at) - b12(at),
                    4 => b12(at) - b11(at),
                    5 => b22(at),
                    _ => b22(at) - b12(at) + b11(at) - b21(at),
                };
                *out = (sum as f32).to_le_bytes();
            }
        });
        Panels::new(pool, arena, GgmlDType::F32, &bytes, rows, width).map(Self)
    }

    /// Bytes of a matrix's; none where they do not fit.
    pub(super) fn bytes(outputs: usize, inputs: usize) -> usize {
        let floats =
            if Self::fit(outputs, inputs) { outputs.saturating_mul(inputs) / 4 } else { 0 };
        floats.saturating_mul(PRODUCTS * size_of::<f32>())
    }
}

/// The number of a product, which tells whose sums a thread still has.
pub(super) fn next_call() -> u64 {
    static CALLS: AtomicU64 = AtomicU64::new(1);
    CALLS.fetch_add(1, Ordering::Relaxed)
}

/// Buffers of a thread, for the life of the thread.
#[derive(Default)]
struct Scratch {
    /// Whose operands these are: the call and its block of pairs.
    of: (u64, usize),
    /// Sums of activations, pairs after pairs.
    operands: Floats,
    /// What comes out, pairs after pairs.
    products: Floats,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a task multiplies and where its result goes.
pub(super) struct Task<'a> {
    pub(super) weights: &'a Quarters,
    /// All rows.
    pub(super) x: &'a [f32],
    pub(super) inputs: usize,
    /// The call and the number of its block of pairs.
    pub(super) of: (u64, usize),
    pub(super) runs: &'a [Run],
    /// The first output, of the first half.
    pub(super) first: usize,
    /// The result of all rows.
    pub(super) y: *mut f32,
    pub(super) outputs: usize,
    pub(super) add: bool,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) activation: Option<Activation>,
}

impl Task<'_> {
    /// How many pairs it has.
    fn pairs(&self) -> usize {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Asks for the lines of a pair's results.
    fn fetch(&self, run: &Run, pair: usize) {
        for row in [Some(run.first + pair), run.second(pair)].into_iter().flatten() {
            for output in [self.first, self.outputs / 2 + self.first] {
                let y = self.y.wrapping_add(row * self.outputs + output);
                for at in (0..PANEL).step_by(LANES) {
                    // SAFETY: a hint, of any address.
                    unsafe { Portable::prefetch(y.wrapping_add(at).cast_const()) }
                }
            }
        }
    }
}

/// Multiplies some pairs by the weights of [`PANEL`] outputs in each half.
///
/// # Safety
/// `isa` is available, the pairs are rows of `x` and `y`, of `inputs` and `outputs`; the weights are
/// `outputs × inputs`; the rows' elements of these outputs are this caller's alone.
pub(super) unsafe fn multiply(isa: Isa, task: &Task<'_>) {
    let (pairs, inputs, width) = (task.pairs(), task.inputs, task.inputs / 2);
    SCRATCH.with_borrow_mut(|Scratch { of, operands, products }| {
        operands.resize(SUMS * pairs * width);
        products.resize(PRODUCTS * pairs * PANEL);
        if *of != task.of {
            // SAFETY: there is room for all sums; the rest is the caller's promise.
            unsafe { sum_rows(isa, task, operands) }
            *of = task.of;
        }
        let mut y = products.as_mut_ptr();
        let first = task.first / PANEL * PRODUCTS * float::TILES;
        for product in 0..PRODUCTS {
            for run in task.runs {
                // The result's lines come while the products are computed.
                let some = run.count * product / PRODUCTS..run.count * (product + 1) / PRODUCTS;
                some.for_each(|pair| task.fetch(run, pair));
                let rows = |row: usize, at: usize| (task.x[row * inputs + at..].as_ptr(), inputs);
                let x = match product {
                    0 => rows(run.first, 0),
                    1 => rows(run.first, width),
                    6 if !run.odd => rows(run.second, width),
                    _ => {
                        let pair = (product - 2) * pairs + run.before - task.runs[0].before;
                        (operands[pair * width..].as_ptr(), width)
                    }
                };
                let tile = first + product * float::TILES;
                // SAFETY: the buffer holds all products of the pairs; the rest is the caller's promise.
                unsafe {
                    float::multiply_panels(isa, &task.weights.0, tile, x, run.count, y, PANEL);
                    y = y.add(run.count * PANEL);
                }
            }
        }
        // SAFETY: they hold them now; the rest is the caller's promise.
        unsafe { combine(isa, task, products) }
    });
}

/// What products multiply that is not as it stands in the rows; where a pair has no second row, the
/// second rows' part too.
#[inline(always)]
unsafe fn sum_rows_kernel<V: Lanes>(task: &Task<'_>, to: &mut [f32]) {
    let width = task.inputs / 2;
    let from = task.pairs() * width;
    let mut to = to.as_mut_ptr();
    for run in task.runs {
        for pair in 0..run.count {
            // SAFETY: the pair's rows exist, and there is a row for it in each of the sums.
            unsafe {
                let first = task.x.as_ptr().add((run.first + pair) * task.inputs);
                let second = run.second(pair).map(|row| task.x.as_ptr().add(row * task.inputs));
                for at in (0..width).step_by(LANES) {
                    let (a11, a12) = (V::load(first.add(at)), V::load(first.add(width + at)));
                    let (a21, a22) = match second {
                        Some(second) => (V::load(second.add(at)), V::load(second.add(width + at))),
                        None => (V::splat(0.0), V::splat(0.0)),
                    };
                    let s1 = a21.add(a22);
                    let s2 = s1.sub(a11);
                    s2.store(to);
                    a11.sub(a21).store(to.add(from));
                    s1.store(to.add(2 * from));
                    a12.sub(s2).store(to.add(3 * from));
                    if run.odd {
                        a22.store(to.add(4 * from));
                    }
                    to = to.add(LANES);
                }
            }
        }
    }
}
dispatch! { unsafe fn sum_rows(task: &Task<'_>, to: &mut [f32]) => sum_rows_kernel; }

/// The results of a task's pairs, from their products.
#[inline(always)]
unsafe fn combine_kernel<V: Lanes>(task: &Task<'_>, products: &[f32]) {
    let half = task.outputs / 2;
    let from = task.pairs() * PANEL;
    let mut at = products.as_ptr();
    for run in task.runs {
        for pair in 0..run.count {
            let (first, second) = (run.first + pair, run.second(pair));
            for output in (task.first..task.first + PANEL).step_by(LANES) {
                // SAFETY: each product has this panel of the pair; the rest is handed on.
                unsafe {
                    let mut p = [V::splat(0.0); PRODUCTS];
                    for n in 0..PRODUCTS {
                        p[n] = V::load(at.add(n * from));
                    }
                    at = at.add(LANES);
                    let u2 = p[0].add(p[2]);
                    let u3 = u2.add(p[3]);
                    put(task, first, output, p[0].add(p[1]));
                    put(task, first, half + output, u2.add(p[4]).add(p[5]));
                    if let Some(row) = second {
                        put(task, row, output, u3.sub(p[6]));
                        put(task, row, half + output, u3.add(p[4]));
                    }
                }
            }
        }
    }
}
dispatch! { unsafe fn combine(task: &Task<'_>, products: &[f32]) => combine_kernel; }

/// Sets a row's outputs from this one on, or adds to them.
#[inline(always)]
unsafe fn put<V: Lanes>(task: &Task<'_>, row: usize, output: usize, mut sum: V) {
    // SAFETY: the outputs exist and are this task's alone; each has a bias if one has.
    unsafe {
        let y = task.y.add(row * task.outputs + output);
        if let Some(bias) = task.bias {
            sum = sum.add(V::load(bias.as_ptr().add(output)));
        }
        if task.add {
            sum = V::load(y).add(sum);
        }
        if let Some(activation) = task.activation {
            sum = activation.apply(sum);
        }
        sum.store(y);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::checkpoint::TensorBytes;
    use crate::kernels::activations::{Activations, Precision};
    use crate::kernels::linear::{Linear, multiply, multiply_paired};

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    /// A layer's weights, its bias, and texts of so many rows.
    struct Case {
        pool: ThreadPool,
        linear: Linear,
        weights: Vec<f32>,
        bias: Vec<f32>,
        x: Vec<f32>,
    }

    impl Case {
        fn new(outputs: usize, inputs: usize, rows: usize, seed: u64) -> Self {
            let (mut pool, mut arena) = (ThreadPool::new(2).unwrap(), Arena::default());
            let weights = noise(seed, outputs * inputs);
            let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let tensor = TensorBytes::anonymous(&bytes, GgmlDType::F32, vec![outputs, inputs]);
            let mut linear = Linear::new(&mut pool, &mut arena, tensor).unwrap();
            linear.for_pairs(&mut pool, &mut arena);
            let (bias, x) = (noise(seed + 1, outputs), noise(seed + 2, rows * inputs));
            Self { pool, linear, weights, bias, x }
        }

        /// The same in float64.
        fn exact(&self) -> Vec<f64> {
            let (outputs, inputs) = (self.linear.outputs(), self.linear.inputs());
            let rows = self.x.chunks_exact(inputs);
            rows.flat_map(|row| {
                (0..outputs).map(move |output| {
                    let products = row
                        .iter()
                        .zip(&self.weights[output * inputs..])
                        .map(|(x, weight)| f64::from(*x) * f64::from(*weight));
                    products.sum::<f64>() + 1.0 + f64::from(self.bias[output])
                })
            })
            .collect()
        }

        /// What is added to 1, by pairs or not.
        fn product(&mut self, isa: Isa, x: &[f32], texts: Option<&[usize]>) -> Vec<f32> {
            let (outputs, inputs) = (self.linear.outputs(), self.linear.inputs());
            let mut y = vec![1.0; x.len() / inputs * outputs];
            let product = self.linear.add_to(&mut y).bias(Some(&self.bias));
            let mut activations = Activations::new(Precision::Float);
            let rows = activations.of(isa, &mut self.pool, x, inputs);
            match texts {
                Some(texts) => {
                    multiply_paired(isa, &mut self.pool, rows, &pairing(texts), [product], &[]);
                }
                None => multiply(isa, &mut self.pool, rows, [product]),
            }
            y
        }
    }

    fn pairing(texts: &[usize]) -> Pairing {
        let mut pairing = Pairing::default();
        texts.iter().for_each(|rows| pairing.push(*rows));
        pairing
    }

    #[test]
    fn each_row_is_in_the_pairing_once() {
        let texts = [3, 5, SHORTEST, SHORTEST + 1, 1, SHORTEST - 1, 301];
        let pairing = pairing(&texts);
        for (inputs, panels, threads) in [(384, 3, 2), (384, 1, 64), (4096, 9, 2)] {
            let blocks = pairing.blocks(inputs, panels, threads);
            let most = PAIRS.min(FLOATS / (inputs / 2));
            for block in 0..blocks.len() {
                let pairs: usize = blocks.runs(block).iter().map(|run| run.count).sum();
                assert!((1..=most).contains(&pairs), "{blocks:?}");
            }
            assert!(blocks.len() * panels >= 2 * threads.min(16), "{blocks:?}");
            let runs = (0..blocks.len()).flat_map(|block| blocks.runs(block));
            let paired = runs.flat_map(|run| {
                (0..run.count).flat_map(|pair| [Some(run.first + pair), run.second(pair)])
            });
            let rest = pairing.rest.iter().cloned().flatten();
            let mut rows: Vec<_> = paired.flatten().chain(rest).collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..texts.iter().sum()).collect::<Vec<_>>());
            assert_eq!(pairing.rows, rows.len());
        }
        assert_eq!(pairing.rest.len(), 2, "{:?}", pairing.rest);
    }

    #[test]
    fn blocks_have_pairs_of_several_texts_and_may_end_with_one() {
        let runs = |texts: &[usize]| {
            let blocks = pairing(texts).blocks(384, 9, 2);
            (0..blocks.len()).map(|block| blocks.runs(block).len()).collect::<Vec<_>>()
        };
        assert_eq!(runs(&[2 * PAIRS]), [1]);
        assert_eq!(runs(&[2 * PAIRS, 2 * PAIRS]), [1, 1]);
        assert_eq!(runs(&[PAIRS, PAIRS - 1, 2 * PAIRS]), [2, 1]);
        assert_eq!(runs(&[PAIRS, PAIRS, PAIRS]), [2, 2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn agrees_with_float64_and_does_not_depend_on_the_batch(
            panels in 1usize..3, blocks in 1usize..8,
            texts in prop::collection::vec(1usize..150, 1..5), seed in 0u64..1000,
        ) {
            let (outputs, inputs) = (panels * 2 * PANEL, blocks * 4 * LANES);
            let mut case = Case::new(outputs, inputs, texts.iter().sum(), seed);
            prop_assert!(case.linear.is_for_pairs());
            let (x, exact) = (case.x.clone(), case.exact());
            for isa in Isa::available() {
                let got = case.product(isa, &x, Some(&texts));
                for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
                    let error = (f64::from(*got) - exact).abs() / (inputs as f64).sqrt();
                    prop_assert!(error < 3e-6, "{isa:?} {i}: {got} {exact}");
                }
                let mut at = 0;
                for rows in &texts {
                    let alone = case.product(isa, &x[at * inputs..][..rows * inputs], Some(&[*rows]));
                    prop_assert_eq!(&alone, &got[at * outputs..][..rows * outputs]);
                    at += rows;
                }
            }
        }
    }

    #[test]
    fn a_pair_has_at_most_three_times_the_error_of_plain_sums() {
        let (rows, inputs, outputs) = (2 * SHORTEST, 512, 2 * PANEL);
        let mut case = Case::new(outputs, inputs, rows, 7);
        for scale in [1.0, 100.0] {
            case.x[rows / 2 * inputs..].iter_mut().for_each(|x| *x *= scale);
            let (x, exact) = (case.x.clone(), case.exact());
            // Of the first rows, and of the second.
            let mut errors = |texts: Option<&[usize]>| {
                let got = case.product(Isa::best(), &x, texts);
                let errors: Vec<_> =
                    got.iter().zip(&exact).map(|(got, exact)| f64::from(*got) - exact).collect();
                [&errors[..rows / 2 * outputs], &errors[rows / 2 * outputs..]]
                    .map(|errors| errors.iter().map(|error| error * error).sum::<f64>().sqrt())
            };
            let (paired, plain) = (errors(Some(&[rows])), errors(None));
            assert_ne!(paired, plain);
            let bound = 3.0 * plain[0].max(plain[1]);
            assert!(paired[0] < bound && paired[1] < bound, "{scale}: {paired:?} {plain:?}");
        }
    }

    #[test]
    fn several_products_are_the_same_on_any_number_of_threads() {
        let (inputs, rows) = (128, 198);
        let (isa, pairing) = (Isa::best(), pairing(&[7, 61, 95, 35]));
        let x = noise(11, rows * inputs);
        let mut seen: Option<[Vec<f32>; 2]> = None;
        for threads in 1..4 {
            let [mut wide, narrow] =
                [6 * PANEL, 2 * PANEL].map(|outputs| Case::new(outputs, inputs, 0, 12));
            wide.pool = ThreadPool::new(threads).unwrap();
            let mut activations = Activations::new(Precision::Float);
            let mut product = |paired: bool| {
                let mut y = [6 * PANEL, 2 * PANEL].map(|outputs| vec![0.0; rows * outputs]);
                let [first, second] = &mut y;
                let products =
                    [wide.linear.set(first).bias(Some(&wide.bias)), narrow.linear.set(second)];
                let x = activations.of(isa, &mut wide.pool, &x, inputs);
                match paired {
                    true => multiply_paired(isa, &mut wide.pool, x, &pairing, products, &[]),
                    false => multiply(isa, &mut wide.pool, x, products),
                }
                y
            };
            let (paired, plain) = (product(true), product(false));
            for (paired, plain) in paired.iter().flatten().zip(plain.iter().flatten()) {
                assert!((paired - plain).abs() < 3e-5, "{paired} {plain}");
            }
            assert_eq!(seen.get_or_insert_with(|| paired.clone()), &paired, "{threads} threads");
        }
    }

    #[test]
    fn an_activation_follows_and_other_shapes_are_multiplied_as_ever() {
        use crate::kernels::elementwise::{Activation, gelu};
        let isa = Isa::best();
        let mut case = Case::new(2 * PANEL, 64, 77, 5);
        let mut plain = vec![0.0; 77 * 2 * PANEL];
        let mut active = plain.clone();
        let mut activations = Activations::new(Precision::Float);
        let rows = activations.of(isa, &mut case.pool, &case.x, 64);
        let pairing = pairing(&[77]);
        multiply_paired(isa, &mut case.pool, rows, &pairing, [case.linear.set(&mut plain)], &[]);
        let product = case.linear.set(&mut active).activation(Activation::Gelu);
        multiply_paired(isa, &mut case.pool, rows, &pairing, [product], &[]);
        gelu(isa, &mut plain);
        assert_eq!(active, plain);

        for (outputs, inputs) in [(PANEL, 64), (2 * PANEL, 96), (2 * PANEL + 16, 64)] {
            let mut case = Case::new(outputs, inputs, 70, 6);
            assert!(!case.linear.is_for_pairs(), "{outputs} × {inputs}");
            let x = case.x.clone();
            assert_eq!(case.product(isa, &x, Some(&[70])), case.product(isa, &x, None));
        }
    }
}
