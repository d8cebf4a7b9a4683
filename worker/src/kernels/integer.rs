//! `y = x Wᵀ` for repacked weights: integer products within a block of 32 inputs, float32 sums
//! over the blocks, in ascending order for every output whatever the number of rows.

use std::ops::Range;

use super::activations::{BLOCK_BYTES, FACTORS, Precision, Rows};
use super::cpu::{Isa, dispatch_dot};
use super::dot::{BLOCK, Dot, STEP};
use super::lanes::{LANES, Lanes};
use super::linear::Into;
use super::packed::{Layout, Packed};

/// Multiplies some rows of `x` by tiles `first..first + count` into `y`.
///
/// # Safety
/// `isa` is available, `x` was filled on it, rows and tiles exist, and `y` points to the first row's
/// element of the first tile in rows of `stride` floats, of which `outputs` from there on are this
/// caller's alone.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Packed,
    (first, count): (usize, usize),
    x: Rows<'_>,
    rows: Range<usize>,
    y: *mut f32,
    stride: usize,
    outputs: usize,
    into: Into,
) {
    let call = Call {
        weights: weights.tile(first),
        tile_bytes: weights.tile_bytes(),
        factors: weights.factors_offset(),
        layout: weights.layout,
        tiles: count,
        blocks: weights.blocks,
        pairs: BLOCK / STEP / 2 / weights.layout.groups,
        x: x.blocks_from(rows.start).as_ptr(),
        row_bytes: x.row_bytes(),
        rows: rows.len(),
        y,
        stride,
        outputs,
        add: into == Into::Add,
    };
    // SAFETY: handed on.
    unsafe {
        let low = x.precision() == Precision::Eight;
        match (call.layout.nibbles, call.layout.groups, low) {
            (true, 1, false) => nibbles(isa, &call),
            (true, _, false) => grouped_nibbles(isa, &call),
            (false, 1, false) => bytes(isa, &call),
            (false, _, false) => grouped_bytes(isa, &call),
            (true, 1, true) => low_nibbles(isa, &call),
            (true, _, true) => low_grouped_nibbles(isa, &call),
            (false, 1, true) => low_bytes(isa, &call),
            (false, _, true) => low_grouped_bytes(isa, &call),
        }
    }
}

struct Call {
    weights: *const u8,
    tile_bytes: usize,
    /// Bytes from a tile's beginning to its factors.
    factors: usize,
    layout: Layout,
    tiles: usize,
    blocks: usize,
    /// Pairs of steps of one scale. Not a constant: an unrolled loop would be one long stretch of
    /// code, in which the compiler loads more than the registers hold.
    pairs: usize,
    x: *const u8,
    row_bytes: usize,
    rows: usize,
    y: *mut f32,
    stride: usize,
    /// Outputs that exist, of the tiles' `16 · tiles`.
    outputs: usize,
    add: bool,
}

/// How quants lie in memory.
trait Quants {
    /// Bytes of two steps.
    const BYTES: usize;
    unsafe fn two_steps<D: Dot>(from: *const u8) -> (D::Weights, D::Weights);
}

struct Nibbles;
struct Bytes;

impl Quants for Nibbles {
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn two_steps<D: Dot>(from: *const u8) -> (D::Weights, D::Weights) {
        // SAFETY: 64 bytes, granted by the caller.
        unsafe { D::nibbles(from) }
    }
}

impl Quants for Bytes {
    const BYTES: usize = 128;
    #[inline(always)]
    unsafe fn two_steps<D: Dot>(from: *const u8) -> (D::Weights, D::Weights) {
        // SAFETY: 128 bytes, granted by the caller.
        unsafe { (D::bytes(from), D::bytes(from.add(64))) }
    }
}

#[inline(always)]
unsafe fn all_rows<D: Dot, Q: Quants, const GROUPS: usize>(call: &Call) {
    let (rows, tiles) = D::TILE;
    let mut tile = 0;
    // SAFETY: the tiles and rows cover the result once.
    unsafe {
        while tile < call.tiles {
            let wide = tiles == 2 && call.tiles - tile >= 2;
            let mut row = 0;
            while row < call.rows {
                // Equal passes: with three rows at most, four are two and two.
                let left = call.rows - row;
                let count = left.div_ceil(left.div_ceil(rows));
                match (wide, count) {
                    (true, 6) => pass::<D, Q, GROUPS, 6, 2>(call, row, tile),
                    (true, 5) => pass::<D, Q, GROUPS, 5, 2>(call, row, tile),
                    (true, 4) => pass::<D, Q, GROUPS, 4, 2>(call, row, tile),
                    (false, 6) => pass::<D, Q, GROUPS, 6, 1>(call, row, tile),
                    (false, 5) => pass::<D, Q, GROUPS, 5, 1>(call, row, tile),
                    (false, 4) => pass::<D, Q, GROUPS, 4, 1>(call, row, tile),
                    (true, 3) => pass::<D, Q, GROUPS, 3, 2>(call, row, tile),
                    (true, 2) => pass::<D, Q, GROUPS, 2, 2>(call, row, tile),
                    (true, _) => pass::<D, Q, GROUPS, 1, 2>(call, row, tile),
                    (false, 3) => pass::<D, Q, GROUPS, 3, 1>(call, row, tile),
                    (false, 2) => pass::<D, Q, GROUPS, 2, 1>(call, row, tile),
                    (false, _) => pass::<D, Q, GROUPS, 1, 1>(call, row, tile),
                }
                row += count;
            }
            tile += if wide { 2 } else { 1 };
        }
    }
}

/// `M` rows times `N` tiles, over all blocks.
#[inline(always)]
unsafe fn pass<D: Dot, Q: Quants, const GROUPS: usize, const M: usize, const N: usize>(
    call: &Call,
    row: usize,
    tile: usize,
) {
    // SAFETY: the rows and tiles exist.
    unsafe {
        let weights = call.weights.add(tile * call.tile_bytes);
        let x = call.x.add(row * call.row_bytes);
        let mut sums = [[D::Lanes::splat(0.0); N]; M];
        let pairs = call.pairs;
        for block in 0..call.blocks {
            for group in 0..GROUPS {
                let mut products = [[D::zero(); N]; M];
                for pair in 0..pairs {
                    let at = (block * GROUPS + group) * pairs + pair;
                    let step = 2 * (group * pairs + pair);
                    for n in 0..N {
                        let weights = weights.add(n * call.tile_bytes + at * Q::BYTES);
                        // Few rows are as fast as memory. The tiles after these, which the thread
                        // takes next, are asked for now; behind the last ones it does no harm.
                        for line in 0..Q::BYTES / 64 {
                            let next = N * call.tile_bytes + 64 * line;
                            D::Lanes::prefetch(weights.wrapping_add(next));
                        }
                        let (first, second) = Q::two_steps::<D>(weights);
                        for m in 0..M {
                            let x = x.add(m * call.row_bytes + block * BLOCK_BYTES);
                            products[m][n] = products[m][n].accumulate(first, x, step).accumulate(
                                second,
                                x,
                                step + 1,
                            );
                        }
                    }
                }
                for n in 0..N {
                    let weights = weights.add(n * call.tile_bytes);
                    let (weight, minimum) = call.factors::<D>(weights, block * GROUPS + group);
                    for m in 0..M {
                        let x = x.add(m * call.row_bytes + block * BLOCK_BYTES + FACTORS);
                        let scale = D::Lanes::splat(x.cast::<f32>().read_unaligned());
                        let sum = if GROUPS == 1 { 1 } else { 2 + group };
                        let sum = D::Lanes::splat(x.cast::<f32>().add(sum).read_unaligned());
                        let value = products[m][n].finish().mul_add(weight.mul(scale), sums[m][n]);
                        sums[m][n] = minimum.mul_add(sum, value);
                    }
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                call.put(row + m, (tile + n) * LANES, sums[m][n]);
            }
        }
    }
}

impl Call {
    /// Scales and minima of a tile's sixteen outputs.
    #[inline(always)]
    unsafe fn factors<D: Dot>(&self, tile: *const u8, group: usize) -> (D::Lanes, D::Lanes) {
        // SAFETY: the tile has factors for every group of its blocks.
        unsafe {
            let factors = tile.add(self.factors);
            match (self.layout.half, self.layout.offset) {
                (true, None) => {
                    let at = factors.add(group * 64);
                    (D::Lanes::load_halves(at), D::Lanes::load_halves(at.add(32)))
                }
                (true, Some(offset)) => {
                    let scale = D::Lanes::load_halves(factors.add(group * 32));
                    (scale, scale.mul(D::Lanes::splat(offset)))
                }
                (false, None) => {
                    let at = factors.add(group * 128).cast();
                    (D::Lanes::load(at), D::Lanes::load(at.add(LANES)))
                }
                (false, Some(offset)) => {
                    let scale = D::Lanes::load(factors.add(group * 64).cast());
                    (scale, scale.mul(D::Lanes::splat(offset)))
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn put<V: Lanes>(&self, row: usize, output: usize, values: V) {
        // SAFETY: only outputs that exist are written, and they are this task's alone.
        unsafe {
            let y = self.y.add(row * self.stride + output);
            if output + LANES <= self.outputs {
                let values = if self.add { V::load(y).add(values) } else { values };
                values.store(y);
                return;
            }
            let mut lanes = [0.0; LANES];
            values.store(lanes.as_mut_ptr());
            for (i, value) in lanes[..self.outputs - output].iter().enumerate() {
                *y.add(i) = if self.add { *y.add(i) + value } else { *value };
            }
        }
    }
}

macro_rules! kernels {
    ($($name:ident, $low:ident, $kernel:ident: $quants:ty, $groups:literal;)*) => {$(
        #[inline(always)]
        unsafe fn $kernel<D: Dot>(call: &Call) {
            // SAFETY: handed on.
            unsafe { all_rows::<D, $quants, $groups>(call) }
        }
        dispatch_dot! { unsafe fn $name(call: &Call) => $kernel, VnniDot; }
        dispatch_dot! { unsafe fn $low(call: &Call) => $kernel, VnniLowDot; }
    )*};
}
kernels! {
    nibbles, low_nibbles, nibbles_kernel: Nibbles, 1;
    grouped_nibbles, low_grouped_nibbles, grouped_nibbles_kernel: Nibbles, 2;
    bytes, low_bytes, bytes_kernel: Bytes, 1;
    grouped_bytes, low_grouped_bytes, grouped_bytes_kernel: Bytes, 2;
}
