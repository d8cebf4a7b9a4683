//! `y = x Wᵀ` for weights that are floats in the file: float32, float16, bfloat16.
//!
//! A panel of weights is decoded once into cache and multiplied with tiles of rows. Each output is
//! a dot product kept in sixteen lanes and summed in one fixed order, whatever the number of rows.

use std::cell::RefCell;

use candle_core::quantized::GgmlDType;

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::linear::Into;
use super::quant;

thread_local! {
    /// A decoded panel. One per thread for the life of the thread: nothing is allocated in a step.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Multiplies `rows` rows of `x` by the weight rows in `panel` into `y`.
///
/// # Safety
/// `isa` is available, `panel` is whole rows of `inputs` weights, `x` points to `rows × inputs`
/// floats, and `y` to the first row's element of the panel's first output in rows of `stride`
/// floats, of which the panel's are this caller's alone.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn multiply(
    isa: Isa,
    dtype: GgmlDType,
    panel: &[u8],
    inputs: usize,
    rows: usize,
    x: *const f32,
    y: *mut f32,
    stride: usize,
    into: Into,
) {
    let row_bytes = inputs / dtype.block_size() * dtype.type_size();
    let outputs = panel.len() / row_bytes;
    SCRATCH.with_borrow_mut(|decoded| {
        decoded.resize((outputs * inputs).max(decoded.len()), 0.0);
        let weights = panel.chunks_exact(row_bytes);
        for (bytes, out) in weights.zip(decoded.chunks_exact_mut(inputs)) {
            quant::decode_row(dtype, bytes, out);
        }
        let call = Call { outputs, inputs, rows, x, y, stride, add: into == Into::Add };
        // SAFETY: `decoded` holds `outputs × inputs` floats; the rest is handed on.
        unsafe { multiply_panel(isa, decoded.as_ptr(), &call) }
    });
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

#[inline(always)]
unsafe fn multiply_kernel<V: Lanes>(panel: *const f32, call: &Call) {
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

dispatch! { unsafe fn multiply_panel(panel: *const f32, call: &Call) => multiply_kernel; }
