//! Rows of activations, as floats and as what the integer products read.

use half::bf16;

use super::cpu::{Isa, dispatch, dispatch_dot};
use super::dot::{BLOCK, Dot};
use super::floats::Floats;
use super::lanes::Lanes;
use super::pool::ThreadPool;

/// Bytes of a block: 64 of activations, then as floats the scale, the scaled sum of all, and the
/// scaled sums of both halves.
pub(super) const BLOCK_BYTES: usize = 80;
/// Where the scale and the sums of a block are.
pub(super) const FACTORS: usize = 64;

/// How finely activations are rounded before their products with quantized weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// To sixteen bits: products agree with float32 arithmetic to about five digits.
    #[default]
    Sixteen,
    /// To eight bits, as llama.cpp does: half the multiplications where the CPU multiplies bytes.
    Eight,
    /// Not at all: for weights that are floats. Quantized ones are decoded for each product, slowly.
    Float,
    /// To bfloat16, for weights of that type: two multiplications in the time of one where the CPU
    /// has them. Others are treated as with `Float`.
    BFloat16,
}

impl Precision {
    /// What tells the results of weights from those with another rounding, behind their digest:
    /// workers of one digest must compute the same.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Sixteen => "",
            Self::Eight => "-a8",
            Self::Float => "-float",
            Self::BFloat16 => "-bf16",
        }
    }

    /// The largest magnitude after scaling; `None` when nothing is rounded.
    fn largest(self) -> Option<f32> {
        match self {
            Self::Sixteen => Some(127.0 * 256.0),
            Self::Eight => Some(127.0),
            Self::Float | Self::BFloat16 => None,
        }
    }

    /// Bytes of a rounded row.
    fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Float => 0,
            Self::BFloat16 => width * size_of::<bf16>(),
            _ => width / BLOCK * BLOCK_BYTES,
        }
    }
}

/// What a product multiplies: rows of equal width, a multiple of 32.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    precision: Precision,
    count: usize,
    width: usize,
    floats: &'a [f32],
    blocks: &'a [u8],
}

impl<'a> Rows<'a> {
    /// How the rows are rounded.
    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// How many rows there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Floats of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The rows as floats.
    pub fn floats(&self) -> &'a [f32] {
        self.floats
    }

    /// Bytes of a row's blocks: [`BLOCK_BYTES`] for each 32 floats; or of its elements as bfloat16.
    pub(super) fn row_bytes(&self) -> usize {
        self.precision.row_bytes(self.width)
    }

    /// The blocks of all rows from this one on.
    pub(super) fn blocks_from(&self, row: usize) -> &'a [u8] {
        &self.blocks[row * self.row_bytes()..]
    }
}

/// Rows and what their rounding takes. Grown to the most rows seen and kept.
#[derive(Default)]
pub struct Activations {
    precision: Precision,
    rows: usize,
    width: usize,
    floats: Floats,
    blocks: Vec<u8>,
}

impl Activations {
    /// No rows yet.
    pub fn new(precision: Precision) -> Self {
        Self { precision, ..Self::default() }
    }

    /// How rows are rounded.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The rows, for products.
    pub fn view(&self) -> Rows<'_> {
        let (precision, count, width) = (self.precision, self.rows, self.width);
        let floats = &self.floats[..count * width];
        Rows { precision, count, width, floats, blocks: &self.blocks }
    }

    /// Takes all rows from a slice: as they are where nothing is rounded, so without a copy.
    ///
    /// # Panics
    /// When the width is no multiple of 32.
    pub fn of<'a>(
        &'a mut self,
        isa: Isa,
        pool: &mut ThreadPool,
        floats: &'a [f32],
        width: usize,
    ) -> Rows<'a> {
        let count = floats.len() / width;
        if self.precision == Precision::Float {
            assert!(width.is_multiple_of(BLOCK), "rows of {width}");
            return Rows { precision: self.precision, count, width, floats, blocks: &[] };
        }
        self.fill(isa, pool, count, width, |row, out| {
            out.copy_from_slice(&floats[row * width..][..width]);
        });
        self.view()
    }

    /// Makes `rows` rows of `width` floats; `write(row, out)` writes all of each, on any thread.
    ///
    /// # Panics
    /// When the width is no multiple of 32.
    pub fn fill(
        &mut self,
        isa: Isa,
        pool: &mut ThreadPool,
        rows: usize,
        width: usize,
        write: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        assert!(width.is_multiple_of(BLOCK), "rows of {width}");
        (self.rows, self.width) = (rows, width);
        self.floats.resize(rows * width);
        let bytes = self.precision.row_bytes(width);
        self.blocks.resize(self.blocks.len().max(rows * bytes), 0);
        let (precision, largest) = (self.precision, self.precision.largest());
        let floats = &mut self.floats[..rows * width];
        let blocks = &mut self.blocks[..rows * bytes];
        pool.for_rows((floats, width), (blocks, bytes), |row, out, blocks| {
            write(row, out);
            if precision == Precision::BFloat16 {
                // SAFETY: `isa` is available; a row has two bytes for each float.
                unsafe { to_bfloats(isa, out.as_mut_ptr(), width, blocks.as_mut_ptr()) }
            }
            let Some(largest) = largest else { return };
            // SAFETY: `isa` is available; a row has `width / BLOCK` blocks.
            unsafe { quantize(isa, out.as_ptr(), width / BLOCK, largest, blocks.as_mut_ptr()) }
        });
    }
}

#[inline(always)]
unsafe fn quantize_kernel<D: Dot>(x: *const f32, blocks: usize, largest: f32, to: *mut u8) {
    for block in 0..blocks {
        // SAFETY: the caller grants `blocks` blocks of floats and of bytes.
        unsafe {
            let (x, to) = (x.add(block * BLOCK), to.add(block * BLOCK_BYTES));
            let magnitude = D::magnitude(x);
            // What is not finite must not be hidden; what vanishes beside everything else may be.
            let (scale, inverse) = match magnitude {
                _ if !magnitude.is_finite() => (f32::NAN, 0.0),
                _ if magnitude < 1e-30 => (0.0, 0.0),
                _ => (magnitude / largest, largest / magnitude),
            };
            let [first, second] = D::split(x, inverse, to);
            let sums = [first.wrapping_add(second), first, second].map(|sum| scale * sum as f32);
            let factors = [scale, sums[0], sums[1], sums[2]];
            to.add(FACTORS).cast::<[f32; 4]>().write_unaligned(factors);
        }
    }
}
dispatch_dot! {
    unsafe fn quantize(
        x: *const f32, blocks: usize, largest: f32, to: *mut u8,
    ) => quantize_kernel, VnniDot;
}

/// Rounds floats to the nearest bfloat16, ties to even, in place and as such. Plain code: it is
/// compiled for each instruction set.
#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)]
unsafe fn to_bfloats_kernel<V: Lanes>(x: *mut f32, len: usize, to: *mut u8) {
    for i in 0..len {
        // SAFETY: the caller grants `len` floats and twice as many bytes.
        unsafe {
            let bits = (*x.add(i)).to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            // What is not a number stays so.
            let bits = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x0040_0000 } else { rounded };
            *x.add(i) = f32::from_bits(bits & 0xffff_0000);
            to.cast::<u16>().add(i).write_unaligned((bits >> 16) as u16);
        }
    }
}
dispatch! { unsafe fn to_bfloats(x: *mut f32, len: usize, to: *mut u8) => to_bfloats_kernel; }
