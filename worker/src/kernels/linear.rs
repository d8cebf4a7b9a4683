//! `y = x Wᵀ` for weights in GGUF blocks.
//!
//! Each output is a dot product kept in sixteen lanes and summed in one fixed order, whatever the
//! number of rows. Few rows (decode) decode the weights in registers as they stream by; many rows
//! (prefill) decode a panel of weights once into cache and multiply it with tiles of rows.

use std::cell::RefCell;

use candle_core::quantized::GgmlDType;

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::pool::ThreadPool;
use super::quant::{self, Format, GROUP, Q4_0, Q4_1, Q8_0};
use crate::gguf::TensorBytes;

/// Weight rows of one task. A panel of them, decoded, fits the second-level cache.
const PANEL: usize = 32;
/// Up to this many rows of `x` the weights are decoded in registers; with 32 registers, and with
/// fewer.
const STREAM_ROWS: (usize, usize) = (16, 4);

/// A weight matrix, `outputs × inputs`, in its file's blocks.
pub struct Linear {
    weight: TensorBytes,
    outputs: usize,
    inputs: usize,
}

/// What to do with the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// `y = x Wᵀ`.
    Set,
    /// `y += x Wᵀ`: the residual stream.
    Add,
}

thread_local! {
    /// A decoded panel. One per thread for the life of the thread: nothing is allocated in a step.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Linear {
    /// Takes a two-dimensional tensor; `None` when its type or shape is not supported.
    pub fn new(weight: TensorBytes) -> Option<Self> {
        let &[outputs, inputs] = &weight.dims[..] else {
            return None;
        };
        let fits = quant::supported(weight.dtype) && inputs % GROUP == 0;
        fits.then_some(Self { weight, outputs, inputs })
    }

    /// Rows of the matrix.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Decodes one row: an embedding lookup.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_bytes();
        quant::decode_row(self.weight.dtype, &self.weight.bytes()[row * bytes..][..bytes], out);
    }

    fn row_bytes(&self) -> usize {
        self.inputs / self.weight.dtype.block_size() * self.weight.dtype.type_size()
    }

    /// Multiplies `rows` rows of `x` (`rows × inputs`) into `y` (`rows × outputs`).
    ///
    /// # Panics
    /// When the slices have other lengths.
    pub fn forward(
        &self,
        isa: Isa,
        pool: &mut ThreadPool,
        rows: usize,
        x: &[f32],
        y: &mut [f32],
        into: Into,
    ) {
        assert_eq!(x.len(), rows * self.inputs, "x");
        assert_eq!(y.len(), rows * self.outputs, "y");
        // The kernels take whole tiles of rows: there must be one.
        if rows == 0 {
            return;
        }
        let y = SharedOutput(y.as_mut_ptr());
        let weights = self.weight.bytes();
        let row_bytes = self.row_bytes();
        pool.run(self.outputs.div_ceil(PANEL), |task| {
            let first = task * PANEL;
            let count = PANEL.min(self.outputs - first);
            let panel = &weights[first * row_bytes..(first + count) * row_bytes];
            let call = Call {
                outputs: count,
                inputs: self.inputs,
                rows,
                x: x.as_ptr(),
                // SAFETY: `first` is below `outputs`, so this is inside the first row of `y`.
                y: unsafe { y.at(first) },
                stride: self.outputs,
                add: into == Into::Add,
            };
            // SAFETY: `isa` is available; the panel holds `count` rows; tasks write disjoint
            // columns of `y`, which outlives the region.
            unsafe { self.panel(isa, panel, &call) }
        });
    }

    unsafe fn panel(&self, isa: Isa, panel: &[u8], call: &Call) {
        let few = match isa {
            Isa::Avx512 => call.rows <= STREAM_ROWS.0,
            _ => call.rows <= STREAM_ROWS.1,
        };
        match self.weight.dtype {
            // SAFETY: handed on from the caller.
            GgmlDType::Q4_0 if few => unsafe { stream_q4_0(isa, panel.as_ptr(), call) },
            // SAFETY: handed on from the caller.
            GgmlDType::Q4_1 if few => unsafe { stream_q4_1(isa, panel.as_ptr(), call) },
            // SAFETY: handed on from the caller.
            GgmlDType::Q8_0 if few => unsafe { stream_q8_0(isa, panel.as_ptr(), call) },
            dtype => SCRATCH.with_borrow_mut(|decoded| {
                decoded.resize((PANEL * self.inputs).max(decoded.len()), 0.0);
                let (from, to) = (panel.as_ptr(), decoded.as_mut_ptr());
                match dtype {
                    // SAFETY: `decoded` holds the panel; the rest is handed on.
                    GgmlDType::Q4_0 => unsafe { decode_q4_0(isa, from, to, call) },
                    // SAFETY: `decoded` holds the panel; the rest is handed on.
                    GgmlDType::Q4_1 => unsafe { decode_q4_1(isa, from, to, call) },
                    // SAFETY: `decoded` holds the panel; the rest is handed on.
                    GgmlDType::Q8_0 => unsafe { decode_q8_0(isa, from, to, call) },
                    _ => {
                        let rows = panel.chunks_exact(self.row_bytes());
                        for (bytes, out) in rows.zip(decoded.chunks_exact_mut(self.inputs)) {
                            quant::decode_row(dtype, bytes, out);
                        }
                    }
                }
                // SAFETY: `decoded` holds `outputs × inputs` floats; the rest is handed on.
                unsafe { multiply(isa, decoded.as_ptr(), call) }
            }),
        }
    }
}

/// One panel's multiplication.
struct Call {
    outputs: usize,
    inputs: usize,
    rows: usize,
    x: *const f32,
    /// The panel's first column in the first row.
    y: *mut f32,
    /// Floats from one row of `y` to the next.
    stride: usize,
    add: bool,
}

impl Call {
    #[inline(always)]
    unsafe fn put(&self, row: usize, output: usize, value: f32) {
        // SAFETY: inside the panel's columns of `y`, which are this task's alone.
        unsafe {
            let y = self.y.add(row * self.stride + output);
            *y = if self.add { *y + value } else { value };
        }
    }
}

/// A pointer that tasks may share because they write disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct SharedOutput(pub(super) *mut f32);
// SAFETY: see the type; every user states why its parts are disjoint.
unsafe impl Sync for SharedOutput {}
// SAFETY: as above.
unsafe impl Send for SharedOutput {}

impl SharedOutput {
    /// # Safety
    /// `offset` is inside the allocation.
    #[inline(always)]
    pub(super) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// Decodes the weights once for each eight rows of `x`.
#[inline(always)]
unsafe fn stream<V: Lanes, F: Format>(panel: *const u8, call: &Call) {
    let most = if V::WIDE { 8 } else { 4 };
    // Equal passes: nine rows are five and four.
    let rows = call.rows.div_ceil(call.rows.div_ceil(most));
    let mut row = 0;
    while row < call.rows {
        // SAFETY: rows `row..row + rows`, as far as they exist.
        unsafe {
            let part = Call {
                rows: rows.min(call.rows - row),
                x: call.x.add(row * call.inputs),
                y: call.y.add(row * call.stride),
                ..*call
            };
            stream_pass::<V, F>(panel, &part);
        }
        row += rows;
    }
}

#[inline(always)]
unsafe fn stream_pass<V: Lanes, F: Format>(panel: *const u8, call: &Call) {
    // SAFETY: handed on.
    unsafe {
        match call.rows {
            1 => stream_rows::<V, F, 1, 4>(panel, call),
            2 => stream_rows::<V, F, 2, 4>(panel, call),
            3 => stream_rows::<V, F, 3, 4>(panel, call),
            4 => stream_rows::<V, F, 4, 4>(panel, call),
            5 if V::WIDE => stream_rows::<V, F, 5, 4>(panel, call),
            6 if V::WIDE => stream_rows::<V, F, 6, 4>(panel, call),
            7 if V::WIDE => stream_rows::<V, F, 7, 2>(panel, call),
            8 if V::WIDE => stream_rows::<V, F, 8, 2>(panel, call),
            rows => unreachable!("{rows} rows are not streamed"),
        }
    }
}

#[inline(always)]
unsafe fn stream_rows<V: Lanes, F: Format, const M: usize, const N: usize>(
    panel: *const u8,
    call: &Call,
) {
    let row_bytes = call.inputs / GROUP * F::BYTES;
    let mut output = 0;
    // SAFETY: blocks and inputs are inside the panel and `x`.
    unsafe {
        while output + N <= call.outputs {
            stream_tile::<V, F, M, N>(panel.add(output * row_bytes), row_bytes, call, output);
            output += N;
        }
        while output < call.outputs {
            stream_tile::<V, F, M, 1>(panel.add(output * row_bytes), row_bytes, call, output);
            output += 1;
        }
    }
}

#[inline(always)]
unsafe fn stream_tile<V: Lanes, F: Format, const M: usize, const N: usize>(
    rows: *const u8,
    row_bytes: usize,
    call: &Call,
    output: usize,
) {
    // SAFETY: `N` rows of blocks and `M` rows of inputs are readable.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        for group in 0..call.inputs / GROUP {
            let x: [(V, V); M] = std::array::from_fn(|m| {
                let x = call.x.add(m * call.inputs + group * GROUP);
                (V::load(x), V::load(x.add(LANES)))
            });
            for n in 0..N {
                let (low, high) = F::decode::<V>(rows.add(n * row_bytes + group * F::BYTES));
                for m in 0..M {
                    sums[m][n] = high.mul_add(x[m].1, low.mul_add(x[m].0, sums[m][n]));
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                call.put(m, output + n, sum.sum());
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_panel<V: Lanes, F: Format>(panel: *const u8, to: *mut f32, call: &Call) {
    for group in 0..call.outputs * call.inputs / GROUP {
        // SAFETY: inside the panel and its decoded copy.
        unsafe {
            let (low, high) = F::decode::<V>(panel.add(group * F::BYTES));
            low.store(to.add(group * GROUP));
            high.store(to.add(group * GROUP + LANES));
        }
    }
}

#[inline(always)]
unsafe fn multiply_panel<V: Lanes>(panel: *const f32, call: &Call) {
    // Tiles as large as the registers allow: 24 sums of 32 registers with AVX-512, 4 of 8 pairs
    // with AVX2.
    let tall = if V::WIDE { 6 } else { 2 };
    let mut row = 0;
    while row < call.rows {
        let count = tall.min(call.rows - row);
        // SAFETY: rows `row..row + count` exist.
        unsafe {
            match (V::WIDE, count) {
                (true, 6) => multiply_rows::<V, 6, 4>(panel, call, row),
                (true, 5) => multiply_rows::<V, 5, 4>(panel, call, row),
                (true, 4) => multiply_rows::<V, 4, 4>(panel, call, row),
                (true, 3) => multiply_rows::<V, 3, 4>(panel, call, row),
                (true, 2) => multiply_rows::<V, 2, 4>(panel, call, row),
                (false, 2) => multiply_rows::<V, 2, 2>(panel, call, row),
                _ => multiply_rows::<V, 1, 4>(panel, call, row),
            }
        }
        row += count;
    }
}

#[inline(always)]
unsafe fn multiply_rows<V: Lanes, const M: usize, const N: usize>(
    panel: *const f32,
    call: &Call,
    row: usize,
) {
    let mut output = 0;
    // SAFETY: the tiles cover the panel's rows once.
    unsafe {
        while output + N <= call.outputs {
            multiply_tile::<V, M, N>(panel, call, row, output);
            output += N;
        }
        while output < call.outputs {
            multiply_tile::<V, M, 1>(panel, call, row, output);
            output += 1;
        }
    }
}

#[inline(always)]
unsafe fn multiply_tile<V: Lanes, const M: usize, const N: usize>(
    panel: *const f32,
    call: &Call,
    row: usize,
    output: usize,
) {
    // SAFETY: `M` rows of inputs and `N` decoded weight rows are readable.
    unsafe {
        let k = call.inputs;
        let (x, w) = (call.x.add(row * k), panel.add(output * k));
        let mut sums = [[V::splat(0.0); N]; M];
        let mut at = 0;
        while at < k {
            let w: [V; N] = std::array::from_fn(|n| V::load(w.add(n * k + at)));
            for m in 0..M {
                let x = V::load(x.add(m * k + at));
                for n in 0..N {
                    sums[m][n] = w[n].mul_add(x, sums[m][n]);
                }
            }
            at += LANES;
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                call.put(row + m, output + n, sum.sum());
            }
        }
    }
}

macro_rules! formats {
    ($($format:ident: $stream:ident, $stream_kernel:ident, $decode:ident, $decode_kernel:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $stream_kernel<V: Lanes>(panel: *const u8, call: &Call) {
            // SAFETY: handed on.
            unsafe { stream::<V, $format>(panel, call) }
        }
        #[inline(always)]
        unsafe fn $decode_kernel<V: Lanes>(panel: *const u8, to: *mut f32, call: &Call) {
            // SAFETY: handed on.
            unsafe { decode_panel::<V, $format>(panel, to, call) }
        }
        dispatch! { unsafe fn $stream(panel: *const u8, call: &Call) => $stream_kernel; }
        dispatch! { unsafe fn $decode(panel: *const u8, to: *mut f32, call: &Call) => $decode_kernel; }
    )*};
}
formats! {
    Q4_0: stream_q4_0, stream_q4_0_kernel, decode_q4_0, decode_q4_0_kernel;
    Q4_1: stream_q4_1, stream_q4_1_kernel, decode_q4_1, decode_q4_1_kernel;
    Q8_0: stream_q8_0, stream_q8_0_kernel, decode_q8_0, decode_q8_0_kernel;
}
dispatch! { unsafe fn multiply(panel: *const f32, call: &Call) => multiply_panel; }

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ8_0, GgmlType};
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

    fn check(tensor: TensorBytes, rows: usize, seed: u64) {
        let linear = Linear::new(tensor).unwrap();
        let (n, k) = (linear.outputs(), linear.inputs());
        let x: Vec<f32> = (0..rows * k).map(|i| noise(seed + 1, i)).collect();
        let mut decoded = vec![0.0; n * k];
        for (row, out) in decoded.chunks_exact_mut(k).enumerate() {
            linear.row(row, out);
        }
        let mut pool = ThreadPool::new(2).unwrap();
        for isa in Isa::available() {
            // What lies behind the output must stay as it is.
            let start: Vec<f32> = (0..(rows + 4) * n).map(|i| noise(seed + 2, i)).collect();
            for into in [Into::Set, Into::Add] {
                let mut y = start.clone();
                linear.forward(isa, &mut pool, rows, &x, &mut y[..rows * n], into);
                assert_eq!(y[rows * n..], start[rows * n..], "{isa:?} {into:?}: written beyond");
                y.truncate(rows * n);
                for (i, &got) in y.iter().enumerate() {
                    let (row, output) = (i / n, i % n);
                    let products = (0..k)
                        .map(|j| f64::from(x[row * k + j]) * f64::from(decoded[output * k + j]));
                    let (mut sum, mut scale) = (0.0, 1e-6);
                    for product in products {
                        sum += product;
                        scale += product.abs();
                    }
                    if into == Into::Add {
                        sum += f64::from(start[i]);
                    }
                    assert!((f64::from(got) - sum).abs() <= scale * 1e-6, "{isa:?} {got} {sum}");
                }
                // One row alone gives the same bits as in the batch.
                for row in 0..rows {
                    let mut alone = start[row * n..(row + 1) * n].to_vec();
                    linear.forward(isa, &mut pool, 1, &x[row * k..(row + 1) * k], &mut alone, into);
                    assert_eq!(alone, y[row * n..(row + 1) * n], "{isa:?} row {row} of {rows}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_float64_and_does_not_depend_on_the_batch(
            outputs in 1usize..80, groups in 1usize..20, rows in 0usize..20, seed in 0u64..1000,
        ) {
            check(tensor::<BlockQ4_0>(GgmlDType::Q4_0, outputs, groups * 32, seed), rows, seed);
            check(tensor::<BlockQ4_1>(GgmlDType::Q4_1, outputs, groups * 32, seed), rows, seed);
            check(tensor::<BlockQ8_0>(GgmlDType::Q8_0, outputs, groups * 32, seed), rows, seed);
            check(tensor::<f32>(GgmlDType::F32, outputs, groups * 32, seed), rows, seed);
        }
    }

    #[test]
    fn a_type_without_its_own_kernel_works_too() {
        check(tensor::<BlockQ4K>(GgmlDType::Q4K, 37, 512, 3), 9, 3);
    }
}
