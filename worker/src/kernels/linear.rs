//! `y = x Wᵀ`: a weight matrix and its product with rows of activations.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

use super::activations::{Precision, Rows};
use super::arena::Arena;
use super::cpu::Isa;
use super::elementwise::{self, Activation};
use super::packed::Packed;
use super::panels::Panels;
use super::pool::{Disjoint, ThreadPool, last_of, share};
use super::strassen::{self, Pairing, Quarters};
use super::{float, integer, quant};
use crate::checkpoint::TensorBytes;
use crate::kernels::dot::BLOCK;
use crate::kernels::lanes::LANES;

/// Rows of one task: their activations stay in the second-level cache from panel to panel.
const ROWS: usize = 96;

/// Outputs of one task: a tile of the kernels, or more where there are many.
fn panel(outputs: usize, quantized: bool) -> usize {
    match outputs {
        0..2048 if quantized => 2 * LANES,
        0..2048 => float::TILES * LANES,
        2048..16384 => 4 * LANES,
        _ => 8 * LANES,
    }
}

/// A weight matrix, `outputs × inputs`.
pub struct Linear {
    weight: TensorBytes,
    outputs: usize,
    inputs: usize,
    repacked: Repacked,
    /// For rows that come in pairs.
    quarters: Option<Quarters>,
}

/// What the products read.
enum Repacked {
    /// Blocks of integers.
    Blocks(Packed),
    /// Floats.
    Panels(Panels),
    /// Rows as in the file: the matrix is for lookups.
    No,
}

/// What to do with the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Into {
    /// `y = x Wᵀ`.
    Set,
    /// `y += x Wᵀ`: the residual stream.
    Add,
}

/// One of several products with the same activations.
pub struct Product<'a> {
    weights: &'a Linear,
    /// The result, `rows × outputs`.
    y: &'a mut [f32],
    into: Into,
    finish: Finish<'a>,
}

/// What follows a product.
#[derive(Clone, Copy, Default)]
struct Finish<'a> {
    bias: Option<&'a [f32]>,
    activation: Option<Activation>,
}

impl Linear {
    /// Takes a two-dimensional tensor; `None` when its type or shape is not supported.
    ///
    /// The weights are repacked into the arena, on the pool's threads.
    pub fn new(pool: &mut ThreadPool, arena: &mut Arena, weight: TensorBytes) -> Option<Self> {
        let mut linear = Self::lookup(weight)?;
        let dtype = linear.weight.dtype;
        linear.repack(pool, arena, dtype, None);
        Some(linear)
    }

    /// As [`Linear::new`], for lookups: products decode the weights each time, slowly.
    pub fn lookup(weight: TensorBytes) -> Option<Self> {
        let &[outputs, inputs] = &weight.dims[..] else {
            return None;
        };
        let supported = quant::supported(weight.dtype) && inputs.is_multiple_of(BLOCK);
        supported.then_some(Self {
            weight,
            outputs,
            inputs,
            repacked: Repacked::No,
            quarters: None,
        })
    }

    /// As [`Linear::new`], with the weights rounded to another type, `BF16` or `Q8_0`, for the
    /// products. [`Linear::row`] still gives what the file has. Quantized weights stay as they are.
    pub fn rounded(
        pool: &mut ThreadPool,
        arena: &mut Arena,
        weight: TensorBytes,
        to: GgmlDType,
    ) -> Option<Self> {
        let mut linear = Self::lookup(weight)?;
        let dtype = linear.weight.dtype;
        if Packed::knows(dtype) || dtype == to {
            linear.repack(pool, arena, dtype, None);
            return Some(linear);
        }
        let mut floats = vec![0.0; linear.outputs * linear.inputs];
        pool.for_rows(
            (&mut floats, linear.inputs),
            (&mut vec![0u8; linear.outputs], 1),
            |row, out, _| {
                linear.row(row, out);
            },
        );
        linear.repack(pool, arena, to, Some(&quant::encode(to, &floats)?));
        Some(linear)
    }

    /// Prepares products of rows that come in pairs, where the weights are floats and the shape
    /// allows it: see [`multiply_paired`]. Takes [`Linear::bytes_of_pairs`] more.
    pub fn for_pairs(&mut self, pool: &mut ThreadPool, arena: &mut Arena) {
        if matches!(self.repacked, Repacked::Panels(_)) {
            let shape = (self.outputs, self.inputs);
            self.quarters = Quarters::new(pool, arena, &self.weight.floats(), shape);
        }
    }

    /// Whether it has been.
    #[cfg(test)]
    pub(super) fn is_for_pairs(&self) -> bool {
        self.quarters.is_some()
    }

    /// What a matrix of so many outputs and inputs takes more for pairs.
    pub fn bytes_of_pairs(outputs: usize, inputs: usize) -> usize {
        Quarters::bytes(outputs, inputs)
    }

    /// Repacks other bytes than the file's, where there are some.
    fn repack(
        &mut self,
        pool: &mut ThreadPool,
        arena: &mut Arena,
        dtype: GgmlDType,
        bytes: Option<&[u8]>,
    ) {
        let bytes = bytes.unwrap_or(self.weight.bytes());
        let (outputs, inputs) = (self.outputs, self.inputs);
        self.repacked = match Panels::new(pool, arena, dtype, bytes, outputs, inputs) {
            Some(panels) => Repacked::Panels(panels),
            None => match Packed::new(pool, arena, dtype, bytes, outputs, inputs) {
                Some(packed) => Repacked::Blocks(packed),
                None => Repacked::No,
            },
        };
    }

    /// Whether the file's own blocks are needed for [`Linear::row`] alone.
    pub fn is_repacked(&self) -> bool {
        !matches!(self.repacked, Repacked::No)
    }

    /// Whether its products with such rows are of integers.
    fn is_integer(&self, x: Rows<'_>) -> bool {
        matches!(x.precision(), Precision::Sixteen | Precision::Eight)
            && matches!(self.repacked, Repacked::Blocks(_))
    }

    /// Rows of the matrix.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The product that overwrites `y`.
    pub fn set<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        Product { weights: self, y, into: Into::Set, finish: Finish::default() }
    }

    /// The product that is added to `y`.
    pub fn add_to<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        Product { weights: self, y, into: Into::Add, finish: Finish::default() }
    }

    /// Decodes one row: an embedding lookup.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        quant::decode_row(self.weight.dtype, self.rows(row, 1), out);
    }

    /// The blocks of some rows of the matrix, as in the file.
    fn rows(&self, first: usize, count: usize) -> &[u8] {
        let dtype = self.weight.dtype;
        let bytes = self.inputs / dtype.block_size() * dtype.type_size();
        &self.weight.bytes()[first * bytes..(first + count) * bytes]
    }
}

impl<'a> Product<'a> {
    /// Adds a vector to each row.
    ///
    /// # Panics
    /// When it does not have the weights' outputs.
    #[must_use]
    pub fn bias(mut self, bias: Option<&'a [f32]>) -> Self {
        assert!(bias.is_none_or(|bias| bias.len() == self.weights.outputs), "bias");
        self.finish.bias = bias;
        self
    }

    /// Applies a function to the result, after the bias.
    #[must_use]
    pub fn activation(mut self, activation: Activation) -> Self {
        self.finish.activation = Some(activation);
        self
    }
}

/// Multiplies all rows of `x` by each of the weights, in one parallel region.
///
/// # Panics
/// When a result has another length than `rows × outputs`, or weights have other inputs than `x`.
pub fn multiply<const N: usize>(
    isa: Isa,
    pool: &mut ThreadPool,
    x: Rows<'_>,
    products: [Product<'_>; N],
) {
    multiply_before(isa, pool, x, products, &[]);
}

/// As [`multiply`]; `next` are the weights that the pool multiplies with after these.
fn multiply_before<const N: usize>(
    isa: Isa,
    pool: &mut ThreadPool,
    x: Rows<'_>,
    products: [Product<'_>; N],
    next: &[&Linear],
) {
    let (plan, targets) = plan(x, products);
    // The kernels take whole tiles of rows: there must be one.
    if x.count() == 0 {
        return;
    }
    let tasks = plan.panels * x.count().div_ceil(ROWS);
    let threads = pool.threads();
    // The rows of one task after the other's, so that a thread's next task has the same rows.
    pool.run(tasks, |task| {
        let first = task / plan.panels * ROWS;
        let rows = first..x.count().min(first + ROWS);
        // With more rows weights are read too seldom for this to matter.
        let next = match tasks == plan.panels && !next.is_empty() {
            true => last_of(task, tasks, threads),
            false => None,
        }
        .and_then(|thread| first_of(next, thread, threads));
        // SAFETY: `isa` is available and was that of `x`; tasks have rows or panels of their own.
        unsafe { plan.compute(isa, &targets, x, rows, task % plan.panels, next) }
    });
}

/// Where a thread begins to read the weights of some products, by [`ThreadPool::run`]'s shares.
fn first_of(next: &[&Linear], thread: usize, threads: usize) -> Option<*const u8> {
    let outputs = next.iter().map(|weights| weights.outputs);
    let panel = panel(outputs.clone().sum(), false);
    let panels = outputs.map(|outputs| outputs.div_ceil(panel));
    let first = share(thread, panels.clone().sum(), threads).start;
    let (product, at) = find(first, panels);
    match &next[product].repacked {
        Repacked::Panels(panels) => Some(panels.tile(at * panel / LANES)),
        _ => None,
    }
}

/// As [`multiply`], with seven multiplications where there are eight for rows that are paired: for
/// activations that are not rounded and weights that [`Linear::for_pairs`] has prepared, all of them.
///
/// `next` are the weights that the pool multiplies with after these, if known. Few rows are done as
/// fast as their weights come from memory, so a thread asks for the next ones before it gets there.
///
/// # Panics
/// As [`multiply`], or when the pairing is of other rows.
pub fn multiply_paired<const N: usize>(
    isa: Isa,
    pool: &mut ThreadPool,
    x: Rows<'_>,
    pairing: &Pairing,
    products: [Product<'_>; N],
    next: &[&Linear],
) {
    let quarters = products.each_ref().map(|product| product.weights.quarters.as_ref());
    let prepared: Vec<_> = quarters.into_iter().flatten().collect();
    if prepared.len() < N || x.precision() != Precision::Float || !pairing.pairs_rows() {
        return multiply_before(isa, pool, x, products, next);
    }
    assert_eq!(pairing.rows, x.count(), "rows of the pairing");
    let (plan, targets) = plan(x, products);
    let panels_of = |target: &Target<'_>| target.weights.outputs / (2 * strassen::PANEL);
    let panels: usize = targets.iter().map(panels_of).sum();
    let blocks = pairing.blocks(x.width(), panels, pool.threads());
    let paired = blocks.len() * panels;
    let rest: Vec<_> = pairing
        .rest
        .iter()
        .flat_map(|rows| rows.clone().step_by(ROWS).map(|first| first..rows.end.min(first + ROWS)))
        .collect();
    let call = strassen::next_call();
    pool.run(paired + rest.len() * plan.panels, |task| {
        if let Some(task) = task.checked_sub(paired) {
            let rows = rest[task / plan.panels].clone();
            // SAFETY: as in `multiply`; no row is in the pairing twice.
            return unsafe { plan.compute(isa, &targets, x, rows, task % plan.panels, None) };
        }
        let (product, at) = find(task % panels, targets.iter().map(panels_of));
        let (target, block) = (&targets[product], task / panels);
        let task = strassen::Task {
            weights: prepared[product],
            x: x.floats(),
            inputs: x.width(),
            of: (call, block),
            runs: blocks.runs(block),
            first: at * strassen::PANEL,
            // SAFETY: the start of the result.
            y: unsafe { target.y.at(0) },
            outputs: target.weights.outputs,
            add: target.into == Into::Add,
            bias: target.finish.bias,
            activation: target.finish.activation,
        };
        // SAFETY: `isa` is available and was that of `x`; the pairs' rows are those of `x` and of the
        // result, which outlives the region; tasks have pairs or outputs of their own.
        unsafe { strassen::multiply(isa, &task) }
    });
}

/// Which product a panel is of, and which of that product's it is.
fn find(mut panel: usize, panels: impl Iterator<Item = usize>) -> (usize, usize) {
    for (product, count) in panels.enumerate() {
        if panel < count {
            return (product, panel);
        }
        panel -= count;
    }
    unreachable!("a panel behind the last")
}

/// A product whose result several tasks write.
struct Target<'a> {
    weights: &'a Linear,
    y: Disjoint<f32>,
    into: Into,
    finish: Finish<'a>,
}

/// How the outputs of several products are parted.
struct Plan {
    /// Outputs of one task.
    panel: usize,
    /// Panels of all products together.
    panels: usize,
}

fn plan<'a, const N: usize>(x: Rows<'_>, products: [Product<'a>; N]) -> (Plan, [Target<'a>; N]) {
    for product in &products {
        assert_eq!(product.weights.inputs, x.width(), "inputs");
        assert_eq!(product.y.len(), x.count() * product.weights.outputs, "y");
    }
    let panel = panel(
        products.iter().map(|product| product.weights.outputs).sum(),
        products.iter().all(|product| product.weights.is_integer(x)),
    );
    let panels = products.iter().map(|product| product.weights.outputs.div_ceil(panel)).sum();
    let targets = products.map(|Product { weights, y, into, finish }| Target {
        weights,
        y: Disjoint(y.as_mut_ptr()),
        into,
        finish,
    });
    (Plan { panel, panels }, targets)
}

impl Plan {
    /// Computes some rows of a panel: one of the first product, or of the next. The weights that this
    /// thread reads then begin at `next`, if not behind these.
    ///
    /// # Safety
    /// `isa` is available and was that of `x`; the rows are there; nobody else writes this panel of
    /// them meanwhile, and the results are alive.
    unsafe fn compute(
        &self,
        isa: Isa,
        targets: &[Target<'_>],
        x: Rows<'_>,
        rows: Range<usize>,
        panel: usize,
        next: Option<*const u8>,
    ) {
        let panels = targets.iter().map(|target| target.weights.outputs.div_ceil(self.panel));
        let (product, at) = find(panel, panels);
        let Target { weights, y, into, finish } = &targets[product];
        let first = at * self.panel;
        let outputs = self.panel.min(weights.outputs - first);
        let stride = weights.outputs;
        let count = rows.len();
        // SAFETY: rows and panel are inside the matrices; the rest is the caller's promise.
        unsafe {
            let y = y.at(rows.start * stride + first);
            let bias = finish.bias.map(|bias| &bias[first..first + outputs]);
            let output =
                float::Output { y, stride, outputs, into: *into, bias: bias.map(<[f32]>::as_ptr) };
            let late_bias = match &weights.repacked {
                Repacked::Blocks(packed) if weights.is_integer(x) => {
                    let tiles = (first / LANES, outputs.div_ceil(LANES));
                    integer::multiply(isa, packed, tiles, x, rows, y, stride, outputs, *into);
                    bias
                }
                Repacked::Panels(panels) => {
                    let weights = float::Weights::Panels(panels, first / LANES);
                    float::multiply(isa, &weights, x, rows, &output, next);
                    None
                }
                _ => {
                    let bytes = weights.rows(first, outputs);
                    let weights = float::Weights::Rows(weights.weight.dtype, bytes);
                    float::multiply(isa, &weights, x, rows, &output, None);
                    None
                }
            };
            for row in 0..count {
                let y = std::slice::from_raw_parts_mut(y.add(row * stride), outputs);
                elementwise::finish(isa, late_bias, finish.activation, y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{
        BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
        BlockQ6K, BlockQ8_0, GgmlType,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::activations::Activations;

    fn tensor<B: GgmlType>(
        dtype: GgmlDType,
        outputs: usize,
        inputs: usize,
        seed: u64,
    ) -> TensorBytes {
        let values: Vec<f32> = (0..outputs * inputs).map(|i| noise(seed, i)).collect();
        let mut blocks = vec![B::zeros(); values.len() / B::BLCK_SIZE];
        B::from_float(&values, &mut blocks);
        // SAFETY: plain data of known size.
        let bytes = unsafe {
            std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), size_of_val(&blocks[..]))
        };
        TensorBytes::anonymous(bytes, dtype, vec![outputs, inputs])
    }

    fn noise(seed: u64, i: usize) -> f32 {
        let mut x = (seed << 32 | i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    }

    /// What is left of activations that are rounded to `largest` steps: see `dot`.
    fn rounded(x: &[f32], largest: f32) -> Vec<f32> {
        let round = |block: &[f32]| {
            let magnitude = block.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            let (scale, inverse) = (magnitude / largest, largest / magnitude);
            block.iter().map(|x| (x * inverse).round_ties_even() * scale).collect::<Vec<_>>()
        };
        x.chunks(BLOCK).flat_map(round).collect()
    }

    /// As the activations are rounded.
    fn seen(precision: Precision, quantized: bool, x: &[f32]) -> Vec<f32> {
        match precision {
            Precision::Sixteen if quantized => rounded(x, 32512.0),
            Precision::Eight if quantized => rounded(x, 127.0),
            Precision::BFloat16 => x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
            _ => x.to_vec(),
        }
    }

    fn decoded(linear: &Linear) -> Vec<f32> {
        let mut decoded = vec![0.0; linear.outputs() * linear.inputs()];
        for (row, out) in decoded.chunks_exact_mut(linear.inputs()).enumerate() {
            linear.row(row, out);
        }
        decoded
    }

    fn check(tensor: TensorBytes, rows: usize, seed: u64) {
        let (mut pool, mut arena) = (ThreadPool::new(3).unwrap(), Arena::default());
        let linear = Linear::new(&mut pool, &mut arena, tensor.clone()).unwrap();
        let weights = decoded(&linear);
        // Without blocks there is nothing to round to so many bits.
        let precisions = match linear.repacked {
            Repacked::Blocks(_) => [Precision::Sixteen, Precision::Eight],
            _ => [Precision::Float, Precision::BFloat16],
        };
        for precision in precisions {
            check_at(precision, &linear, &weights, rows, seed);
        }
        let lookup = Linear::lookup(tensor).unwrap();
        check_at(Precision::Float, &lookup, &weights, rows, seed);
    }

    fn check_at(precision: Precision, linear: &Linear, decoded: &[f32], rows: usize, seed: u64) {
        let (n, k) = (linear.outputs(), linear.inputs());
        let x: Vec<f32> = (0..rows * k).map(|i| noise(seed + 1, i)).collect();
        let seen = seen(precision, matches!(linear.repacked, Repacked::Blocks(_)), &x);
        let mut pool = ThreadPool::new(2).unwrap();
        let mut product = |isa, x: &[f32], y: &mut [f32], into| {
            let mut activations = Activations::new(precision);
            let write = |row: usize, out: &mut [f32]| out.copy_from_slice(&x[row * k..][..k]);
            activations.fill(isa, &mut pool, x.len() / k, k, write);
            let product = match into {
                Into::Set => linear.set(y),
                Into::Add => linear.add_to(y),
            };
            multiply(isa, &mut pool, activations.view(), [product]);
        };
        for isa in Isa::available() {
            // What lies behind the output must stay as it is.
            let start: Vec<f32> = (0..(rows + 4) * n).map(|i| noise(seed + 2, i)).collect();
            for into in [Into::Set, Into::Add] {
                let mut y = start.clone();
                product(isa, &x, &mut y[..rows * n], into);
                assert_eq!(y[rows * n..], start[rows * n..], "{isa:?} {into:?}: written beyond");
                y.truncate(rows * n);
                for (i, &got) in y.iter().enumerate() {
                    let (row, output) = (i / n, i % n);
                    let products = (0..k)
                        .map(|j| f64::from(seen[row * k + j]) * f64::from(decoded[output * k + j]));
                    let (mut sum, mut scale) = (0.0, 1e-6);
                    for product in products {
                        sum += product;
                        scale += product.abs();
                    }
                    if into == Into::Add {
                        sum += f64::from(start[i]);
                    }
                    let error = (f64::from(got) - sum).abs();
                    assert!(error <= scale * 2e-6, "{isa:?} {precision:?} {got} {sum}");
                }
                // One row alone gives the same bits as in the batch.
                for row in 0..rows {
                    let mut alone = start[row * n..(row + 1) * n].to_vec();
                    product(isa, &x[row * k..(row + 1) * k], &mut alone, into);
                    assert_eq!(alone, y[row * n..(row + 1) * n], "{isa:?} row {row} of {rows}");
                }
            }
        }
    }

    #[test]
    fn floats_agree_with_float64_for_any_number_of_rows_and_tiles() {
        // Rows of the last are pages apart.
        for (tiles, inputs) in [(1, 64), (2, 64), (3, 64), (4, 64), (9, 32), (3, 2048)] {
            let outputs = tiles * LANES - tiles % 2 * 3;
            for rows in 1..=30 {
                check(tensor::<f32>(GgmlDType::F32, outputs, inputs, 5), rows, 6);
                check(tensor::<half::f16>(GgmlDType::F16, outputs, inputs, 5), rows, 6);
                check(tensor::<half::bf16>(GgmlDType::BF16, outputs, inputs, 5), rows, 6);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_float64_and_does_not_depend_on_the_batch(
            outputs in 1usize..80, blocks in 1usize..20, rows in 0usize..20, seed in 0u64..1000,
        ) {
            let inputs = blocks * 32;
            check(tensor::<BlockQ4_0>(GgmlDType::Q4_0, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ4_1>(GgmlDType::Q4_1, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ5_0>(GgmlDType::Q5_0, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ5_1>(GgmlDType::Q5_1, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ8_0>(GgmlDType::Q8_0, outputs, inputs, seed), rows, seed);
            check(tensor::<f32>(GgmlDType::F32, outputs, inputs, seed), rows, seed);
            check(tensor::<half::f16>(GgmlDType::F16, outputs, inputs, seed), rows, seed);
            check(tensor::<half::bf16>(GgmlDType::BF16, outputs, inputs, seed), rows, seed);
        }

        #[test]
        fn nested_blocks_agree_with_float64_too(
            outputs in 1usize..40, pieces in 1usize..4, rows in 1usize..10, seed in 0u64..1000,
        ) {
            let inputs = pieces * 256;
            check(tensor::<BlockQ2K>(GgmlDType::Q2K, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ3K>(GgmlDType::Q3K, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ4K>(GgmlDType::Q4K, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ5K>(GgmlDType::Q5K, outputs, inputs, seed), rows, seed);
            check(tensor::<BlockQ6K>(GgmlDType::Q6K, outputs, inputs, seed), rows, seed);
        }

        #[test]
        fn weights_may_be_rounded_to_another_type(
            outputs in 1usize..80, blocks in 1usize..6, rows in 1usize..20, seed in 0u64..1000,
        ) {
            let tensor = tensor::<f32>(GgmlDType::F32, outputs, blocks * 32, seed);
            let (mut pool, mut arena) = (ThreadPool::new(2).unwrap(), Arena::default());
            for (dtype, precisions) in [
                (GgmlDType::BF16, [Precision::Float, Precision::BFloat16]),
                (GgmlDType::Q8_0, [Precision::Sixteen, Precision::Eight]),
            ] {
                let linear = Linear::rounded(&mut pool, &mut arena, tensor.clone(), dtype).unwrap();
                let exact = decoded(&linear);
                let mut weights = vec![0.0; exact.len()];
                quant::decode_row(dtype, &quant::encode(dtype, &exact).unwrap(), &mut weights);
                prop_assert_ne!(&exact, &weights);
                for precision in precisions {
                    check_at(precision, &linear, &weights, rows, seed);
                }
            }
        }

        #[test]
        fn bias_and_activation_follow_the_product(
            outputs in 1usize..150, rows in 1usize..8, quantized: bool, seed in 0u64..1000,
        ) {
            let tensor = match quantized {
                true => tensor::<BlockQ8_0>(GgmlDType::Q8_0, outputs, 64, seed),
                false => tensor::<f32>(GgmlDType::F32, outputs, 64, seed),
            };
            let (mut pool, mut arena) = (ThreadPool::new(2).unwrap(), Arena::default());
            let linear = Linear::new(&mut pool, &mut arena, tensor).unwrap();
            let bias: Vec<f32> = (0..outputs).map(|i| noise(seed + 3, i)).collect();
            for isa in Isa::available() {
                let mut x = Activations::new(Precision::Sixteen);
                x.fill(isa, &mut pool, rows, 64, |row, out| {
                    out.iter_mut().enumerate().for_each(|(i, x)| *x = noise(seed + 4, row * 64 + i));
                });
                let mut plain = vec![0.0; rows * outputs];
                multiply(isa, &mut pool, x.view(), [linear.set(&mut plain)]);
                plain.chunks_exact_mut(outputs).for_each(|row| elementwise::add_to(row, &bias));
                let mut biased = vec![0.0; rows * outputs];
                multiply(isa, &mut pool, x.view(), [linear.set(&mut biased).bias(Some(&bias))]);
                prop_assert_eq!(&biased, &plain);
                let mut active = vec![0.0; rows * outputs];
                let product = linear.set(&mut active).bias(Some(&bias));
                multiply(isa, &mut pool, x.view(), [product.activation(Activation::Gelu)]);
                plain.resize(plain.len().next_multiple_of(LANES), 0.0);
                elementwise::gelu(isa, &mut plain);
                prop_assert_eq!(&active, &plain[..active.len()]);
            }
        }
    }
}
