//! `y = x Wᵀ`: a weight matrix and its product with rows of activations.

use super::activations::{Activations, Precision};
use super::arena::Arena;
use super::cpu::Isa;
use super::packed::Packed;
use super::pool::{Disjoint, ThreadPool};
use super::{float, integer, quant};
use crate::checkpoint::TensorBytes;
use crate::kernels::dot::BLOCK;
use crate::kernels::lanes::LANES;

/// Rows of one task: their activations stay in the second-level cache from panel to panel.
const ROWS: usize = 96;

/// Outputs of one task: two tiles, or more where there are many.
fn panel(outputs: usize) -> usize {
    match outputs {
        0..2048 => 2 * LANES,
        2048..16384 => 4 * LANES,
        _ => 8 * LANES,
    }
}

/// A weight matrix, `outputs × inputs`.
pub struct Linear {
    weight: TensorBytes,
    outputs: usize,
    inputs: usize,
    /// Present when the weights are quantized.
    packed: Option<Packed>,
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
}

impl Linear {
    /// Takes a two-dimensional tensor; `None` when its type or shape is not supported.
    ///
    /// Quantized weights are repacked into the arena, on the pool's threads.
    pub fn new(pool: &mut ThreadPool, arena: &mut Arena, weight: TensorBytes) -> Option<Self> {
        let &[outputs, inputs] = &weight.dims[..] else {
            return None;
        };
        if !quant::supported(weight.dtype) || !inputs.is_multiple_of(BLOCK) {
            return None;
        }
        let packed = Packed::new(pool, arena, &weight, outputs, inputs);
        Some(Self { weight, outputs, inputs, packed })
    }

    /// Whether the file's own blocks are needed for [`Linear::row`] alone.
    pub fn is_repacked(&self) -> bool {
        self.packed.is_some()
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
        Product { weights: self, y, into: Into::Set }
    }

    /// The product that is added to `y`.
    pub fn add_to<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        Product { weights: self, y, into: Into::Add }
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

/// Multiplies all rows of `x` by each of the weights, in one parallel region.
///
/// # Panics
/// When a result has another length than `rows × outputs`, or weights have other inputs than `x`.
pub fn multiply<const N: usize>(
    isa: Isa,
    pool: &mut ThreadPool,
    x: &Activations,
    products: [Product<'_>; N],
) {
    for product in &products {
        assert_eq!(product.weights.inputs, x.width(), "inputs");
        assert_eq!(product.y.len(), x.rows() * product.weights.outputs, "y");
    }
    // The kernels take whole tiles of rows: there must be one.
    if x.rows() == 0 {
        return;
    }
    let panel = panel(products.iter().map(|product| product.weights.outputs).sum());
    let panels_of = |weights: &Linear| weights.outputs.div_ceil(panel);
    let panels: usize = products.iter().map(|product| panels_of(product.weights)).sum();
    let products =
        products.map(|Product { weights, y, into }| (weights, Disjoint(y.as_mut_ptr()), into));
    // The rows of one task after the other's, so that a thread's next task has the same rows.
    pool.run(panels * x.rows().div_ceil(ROWS), |task| {
        let (rows, mut at) = (task / panels * ROWS, task % panels);
        let rows = rows..x.rows().min(rows + ROWS);
        for (weights, y, into) in &products {
            if at >= panels_of(weights) {
                at -= panels_of(weights);
                continue;
            }
            let first = at * panel;
            let outputs = panel.min(weights.outputs - first);
            let stride = weights.outputs;
            // SAFETY: `isa` is available and was that of `x`; rows and panel are inside the
            // matrices; tasks write disjoint parts of `y`, which outlives the region.
            unsafe {
                let y = y.at(rows.start * stride + first);
                match &weights.packed {
                    Some(packed) if x.precision() != Precision::Float => {
                        let tiles = (first / LANES, outputs.div_ceil(LANES));
                        integer::multiply(isa, packed, tiles, x, rows, y, stride, outputs, *into);
                    }
                    _ => {
                        let (dtype, panel) = (weights.weight.dtype, weights.rows(first, outputs));
                        let inputs = weights.inputs;
                        let (count, x) = (rows.len(), x.floats()[rows.start * inputs..].as_ptr());
                        float::multiply(isa, dtype, panel, inputs, count, x, y, stride, *into);
                    }
                }
            }
            return;
        }
    });
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::quantized::k_quants::{
        BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
        BlockQ6K, BlockQ8_0, GgmlType,
    };
    use proptest::prelude::*;

    use super::*;

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

    fn check(tensor: TensorBytes, rows: usize, seed: u64) {
        check_at(Precision::Sixteen, 32512.0, tensor.clone(), rows, seed);
        check_at(Precision::Eight, 127.0, tensor.clone(), rows, seed);
        check_at(Precision::Float, f32::NAN, tensor, rows, seed);
    }

    fn check_at(precision: Precision, largest: f32, tensor: TensorBytes, rows: usize, seed: u64) {
        let quantized = precision != Precision::Float
            && !matches!(tensor.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        let linear =
            Linear::new(&mut ThreadPool::new(3).unwrap(), &mut Arena::default(), tensor).unwrap();
        let (n, k) = (linear.outputs(), linear.inputs());
        let x: Vec<f32> = (0..rows * k).map(|i| noise(seed + 1, i)).collect();
        let seen = if quantized { rounded(&x, largest) } else { x.clone() };
        let mut decoded = vec![0.0; n * k];
        for (row, out) in decoded.chunks_exact_mut(k).enumerate() {
            linear.row(row, out);
        }
        let mut pool = ThreadPool::new(2).unwrap();
        let mut product = |isa, x: &[f32], y: &mut [f32], into| {
            let mut activations = Activations::new(precision);
            let write = |row: usize, out: &mut [f32]| out.copy_from_slice(&x[row * k..][..k]);
            activations.fill(isa, &mut pool, x.len() / k, k, write);
            multiply(isa, &mut pool, &activations, [Product { weights: &linear, y, into }]);
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
                    assert!((f64::from(got) - sum).abs() <= scale * 2e-6, "{isa:?} {got} {sum}");
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
    }
}
