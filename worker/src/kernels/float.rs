//! `y = x Wᵀ` in float arithmetic: each output is one sum over the inputs in ascending order,
//! whatever the number of rows.
//!
//! A tile of sums, some rows by some vectors of outputs, stays in registers over all inputs: for
//! each input its rows' activations are broadcast and multiplied with vectors of weights (the outer
//! product of Goto and van de Geijn 2008, without blocking of the inputs: the tiles' weights are
//! read in runs, which the prefetchers keep up with).

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use candle_core::quantized::GgmlDType;

use super::activations::{Precision, Rows};
use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};
use super::linear::Into;
use super::panels::{Element, Panels};
use super::quant;

/// Vectors of outputs that are read together, at most.
pub(super) const TILES: usize = 4;

/// Rows of a pass, at most. With AVX-512 it has 24 sums of 32 registers: six rows by four vectors, or
/// twelve by two. With AVX2, where sixteen lanes take two registers, 12 of 16: six rows by one.
pub(super) const LOW: usize = 6;
const TALL: usize = 12;

/// With so many rows weights of sixteen bits are converted beforehand rather than in each pass.
const MANY: usize = 13;

thread_local! {
    /// Weights of one task as floats. One per thread for the life of the thread: nothing is
    /// allocated in a step.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Some rows of a matrix.
pub(super) enum Weights<'a> {
    /// Tiles from this one on.
    Panels(&'a Panels, usize),
    /// Rows as in the file.
    Rows(GgmlDType, &'a [u8]),
}

/// Where the result goes.
pub(super) struct Output {
    /// The first row's element of the first output.
    pub(super) y: *mut f32,
    /// Floats from a row to the next.
    pub(super) stride: usize,
    pub(super) outputs: usize,
    pub(super) into: Into,
    /// A value for each output, added to each row.
    pub(super) bias: Option<*const f32>,
}

/// Multiplies some rows of `x` by some weights. Those that are read next begin at `next`, if not behind
/// these.
///
/// # Safety
/// `isa` is available and `x` was filled on it, the rows exist, the weights are `outputs` rows of
/// `x.width()`, and the output's elements are this caller's alone.
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Weights<'_>,
    x: Rows<'_>,
    rows: Range<usize>,
    output: &Output,
    next: Option<*const u8>,
) {
    let inputs = x.width();
    let mut call = Call {
        weights: std::ptr::null(),
        tile_bytes: inputs * LANES * size_of::<f32>(),
        tiles: output.outputs.div_ceil(LANES),
        inputs,
        rows: rows.len(),
        x: x.floats()[rows.start * inputs..].as_ptr(),
        x_stride: inputs,
        y: output.y,
        stride: output.stride,
        outputs: output.outputs,
        add: output.into == Into::Add,
        bias: output.bias,
        next,
    };
    SCRATCH.with_borrow_mut(|decoded| {
        let mut grown = |tiles: usize| {
            decoded.resize(decoded.len().max(tiles * LANES * inputs), 0.0);
            decoded.as_mut_ptr()
        };
        // SAFETY: the scratch holds all tiles as floats; the rest is the caller's promise.
        unsafe {
            match *weights {
                Weights::Rows(dtype, bytes) => {
                    let to = grown(call.tiles + 1);
                    transpose(dtype, bytes, inputs, &call, to);
                    call.weights = to.cast_const().cast();
                    multiply_singles(isa, &call);
                }
                Weights::Panels(panels, first) => {
                    call.weights = panels.tile(first);
                    call.tile_bytes = panels.tile_bytes();
                    let widen = match panels.element {
                        Element::Single => return multiply_singles(isa, &call),
                        #[cfg(target_arch = "x86_64")]
                        Element::Pairs
                            if x.precision() == Precision::BFloat16 && isa == Isa::Bf16 =>
                        {
                            call.x = x.blocks_from(rows.start).as_ptr().cast();
                            return bfloat::multiply_rows(&call);
                        }
                        Element::Half if call.rows < MANY => return multiply_halves(isa, &call),
                        Element::Pairs if call.rows < MANY => return multiply_pairs(isa, &call),
                        Element::Half => widen_halves,
                        Element::Pairs => widen_pairs,
                    };
                    let to = grown(call.tiles);
                    widen(isa, call.weights, call.tiles * inputs, to);
                    call.weights = to.cast_const().cast();
                    call.tile_bytes = inputs * LANES * size_of::<f32>();
                    multiply_singles(isa, &call);
                }
            }
        }
    });
}

/// `y = x Wᵀ` of single floats: `count` rows, and `outputs` from a tile on, row after row.
///
/// # Safety
/// `isa` is available, the weights are single floats, whole tiles of these outputs are there, the rows
/// have their inputs, and `y` is this caller's alone.
pub(super) unsafe fn multiply_panels(
    isa: Isa,
    weights: &Panels,
    tile: usize,
    (x, x_stride): (*const f32, usize),
    count: usize,
    y: *mut f32,
    outputs: usize,
) {
    let call = Call {
        weights: weights.tile(tile),
        tile_bytes: weights.tile_bytes(),
        tiles: outputs / LANES,
        inputs: weights.tile_bytes() / (LANES * size_of::<f32>()),
        rows: count,
        x,
        x_stride,
        y,
        stride: outputs,
        outputs,
        add: false,
        bias: None,
        next: None,
    };
    // SAFETY: the caller's promise.
    unsafe { multiply_singles(isa, &call) }
}

/// Decodes rows of a file into tiles; what is left of the last tile holds old weights.
unsafe fn transpose(dtype: GgmlDType, bytes: &[u8], inputs: usize, call: &Call, to: *mut f32) {
    let row_bytes = inputs / dtype.block_size() * dtype.type_size();
    let tiles = call.tiles * LANES * inputs;
    for (output, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        // SAFETY: the caller grants the tiles, and a row behind them.
        unsafe {
            let row = std::slice::from_raw_parts_mut(to.add(tiles), inputs);
            quant::decode_row(dtype, bytes, row);
            let to = to.add(output / LANES * LANES * inputs + output % LANES);
            for (i, value) in row.iter().enumerate() {
                *to.add(i * LANES) = *value;
            }
        }
    }
}

/// One task's multiplication.
struct Call {
    weights: *const u8,
    tile_bytes: usize,
    tiles: usize,
    inputs: usize,
    rows: usize,
    x: *const f32,
    /// Floats from a row of `x` to the next.
    x_stride: usize,
    y: *mut f32,
    stride: usize,
    /// Outputs that exist, of the tiles' `16 · tiles`.
    outputs: usize,
    add: bool,
    bias: Option<*const f32>,
    /// The weights that are read after these, if not those behind them.
    next: Option<*const u8>,
}

impl Call {
    /// Writes a row's sums of `N` tiles.
    #[inline(always)]
    unsafe fn put<V: Lanes, const N: usize>(&self, row: usize, tile: usize, mut sums: [V; N]) {
        let first = tile * LANES;
        // SAFETY: only outputs that exist are written, and they are this task's alone; each has a
        // bias where there is one.
        unsafe {
            let y = self.y.add(row * self.stride + first);
            if first + N * LANES > self.outputs {
                let mut lanes = [[0.0; LANES]; N];
                for n in 0..N {
                    sums[n].store(lanes[n].as_mut_ptr());
                }
                return self.put_some(row, first, lanes.as_flattened());
            }
            if let Some(bias) = self.bias {
                for n in 0..N {
                    sums[n] = sums[n].add(V::load(bias.add(first + n * LANES)));
                }
            }
            if self.add {
                for n in 0..N {
                    sums[n] = V::load(y.add(n * LANES)).add(sums[n]);
                }
            }
            for n in 0..N {
                sums[n].store(y.add(n * LANES));
            }
        }
    }

    /// As [`Self::put`], of outputs that do not all exist.
    #[cold]
    unsafe fn put_some(&self, row: usize, first: usize, sums: &[f32]) {
        for (output, sum) in (first..self.outputs).zip(sums) {
            // SAFETY: the output exists and is this task's alone; it has a bias if any has.
            unsafe {
                let y = self.y.add(row * self.stride + output);
                let sum = self.bias.map_or(*sum, |bias| sum + *bias.add(output));
                *y = if self.add { *y + sum } else { sum };
            }
        }
    }
}

/// How the weights of a tile are read.
trait Read {
    /// Inputs of a step.
    const STEP: usize;
    /// Bytes of a step.
    const BYTES: usize;
    /// The sixteen weights of the step's input `i`.
    unsafe fn read<V: Lanes>(from: *const u8, i: usize) -> V;
}

struct Singles;
struct Halves;
struct Pairs;

impl Read for Singles {
    const STEP: usize = 1;
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn read<V: Lanes>(from: *const u8, _: usize) -> V {
        // SAFETY: 64 bytes, granted by the caller.
        unsafe { V::load(from.cast()) }
    }
}

impl Read for Halves {
    const STEP: usize = 1;
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn read<V: Lanes>(from: *const u8, _: usize) -> V {
        // SAFETY: 32 bytes, granted by the caller.
        unsafe { V::load_halves(from) }
    }
}

impl Read for Pairs {
    const STEP: usize = 2;
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn read<V: Lanes>(from: *const u8, i: usize) -> V {
        // SAFETY: 64 bytes, granted by the caller.
        unsafe { if i == 0 { V::load_lower(from) } else { V::load_upper(from) } }
    }
}

/// Some rows by some tiles.
#[derive(Clone, Copy)]
struct Pass {
    row: usize,
    tile: usize,
    /// Which of the passes over these tiles.
    number: usize,
    passes: usize,
}

impl Call {
    /// Whether passes are tall, with AVX-512: those over few rows, which wait for weights and read them
    /// half as often so. Of more rows the others took 1 % less time. Where rows are whole pages apart,
    /// the elements that a pass reads together share a set of the first-level cache, and more than six
    /// of them and its weights do not fit into eight ways.
    fn is_tall(&self, row_bytes: usize) -> bool {
        (LOW + 1..=2 * TALL).contains(&self.rows) && !row_bytes.is_multiple_of(4096)
    }

    /// Where a pass by so many tiles begins to ask for the weights that are read next, and the bytes to go
    /// on at each step of so many: each pass over the same tiles asks for a share, so that memory is at
    /// work all the time.
    #[inline(always)]
    fn ahead(&self, pass: Pass, tiles: usize, step: usize) -> (*const u8, usize) {
        let begin = match self.next {
            Some(next) if pass.tile + tiles >= self.tiles => next,
            _ => self.weights.wrapping_add((pass.tile + tiles) * self.tile_bytes),
        };
        let pace = step.div_ceil(pass.passes);
        (begin.wrapping_add(pass.number * pace * (self.tile_bytes / step)), pace)
    }
}

/// Calls `$pass::<.., N>(call, pass)` for all rows and tiles, `$most` rows at once.
macro_rules! cover {
    ($call:ident, $most:expr, $wide:expr, |$pass:ident| $table:tt) => {{
        let mut tile = 0;
        while tile < $call.tiles {
            let n = if $call.tiles - tile >= $wide { $wide } else { 1 };
            let passes = $call.rows.div_ceil($most);
            let mut row = 0;
            for number in 0..passes {
                // Equal passes: 26 rows are six and four times five.
                let count = ($call.rows - row).div_ceil(passes - number);
                let $pass = Pass { row, tile, number, passes };
                cover!(@call $table, count, n);
                row += count;
            }
            tile += n;
        }
    }};
    (@call { $($m:literal: $($n:literal => $call:expr),*;)* }, $count:ident, $width:ident) => {
        match ($count, $width) {
            $($(($m, $n) => $call,)*)*
            _ => unreachable!("a pass of {} rows", $count),
        }
    };
}

#[inline(always)]
unsafe fn multiply_kernel<V: Lanes, R: Read>(call: &Call) {
    // SAFETY: the passes cover the result once.
    unsafe {
        if V::WIDE && R::STEP == 1 && call.is_tall(call.x_stride * size_of::<f32>()) {
            cover!(call, TALL, 2, |pass| {
                6: 2 => pass_6::<V, R, 2>(call, pass), 1 => pass_6::<V, R, 1>(call, pass);
                7: 2 => pass_7::<V, R, 2>(call, pass), 1 => pass_7::<V, R, 1>(call, pass);
                8: 2 => pass_8::<V, R, 2>(call, pass), 1 => pass_8::<V, R, 1>(call, pass);
                9: 2 => pass_9::<V, R, 2>(call, pass), 1 => pass_9::<V, R, 1>(call, pass);
                10: 2 => pass_10::<V, R, 2>(call, pass), 1 => pass_10::<V, R, 1>(call, pass);
                11: 2 => pass_11::<V, R, 2>(call, pass), 1 => pass_11::<V, R, 1>(call, pass);
                12: 2 => pass_12::<V, R, 2>(call, pass), 1 => pass_12::<V, R, 1>(call, pass);
            });
        } else {
            // With two inputs a step the compiler keeps no more than five rows' sums in registers.
            let most = if V::WIDE && R::STEP > 1 { LOW - 1 } else { LOW };
            let wide = if V::WIDE { TILES } else { 1 };
            cover!(call, most, wide, |pass| {
                1: 4 => pass_1::<V, R, 4>(call, pass), 1 => pass_1::<V, R, 1>(call, pass);
                2: 4 => pass_2::<V, R, 4>(call, pass), 1 => pass_2::<V, R, 1>(call, pass);
                3: 4 => pass_3::<V, R, 4>(call, pass), 1 => pass_3::<V, R, 1>(call, pass);
                4: 4 => pass_4::<V, R, 4>(call, pass), 1 => pass_4::<V, R, 1>(call, pass);
                5: 4 => pass_5::<V, R, 4>(call, pass), 1 => pass_5::<V, R, 1>(call, pass);
                6: 4 => pass_6::<V, R, 4>(call, pass), 1 => pass_6::<V, R, 1>(call, pass);
            });
        }
    }
}

/// Defines `$name`, so many rows times `N` tiles over all inputs. Each row's sums have a name: an
/// array of them all is more than the compiler keeps in registers.
macro_rules! passes {
    ($($name:ident, $ahead:literal: $($m:literal $sums:ident),*;)*) => {$(
        #[inline(always)]
        unsafe fn $name<V: Lanes, R: Read, const N: usize>(call: &Call, pass: Pass) {
            // SAFETY: the rows and tiles exist.
            unsafe {
                let weights = call.weights.add(pass.tile * call.tile_bytes);
                let x = call.x.add(pass.row * call.x_stride);
                let (mut fetched, pace) = call.ahead(pass, N, R::BYTES);
                $(let mut $sums = [V::splat(0.0); N];)*
                for step in 0..call.inputs / R::STEP {
                    for i in 0..R::STEP {
                        if i > 0 {
                            // One input after the other: the compiler takes all that a step reads at
                            // once, which is more than there are registers.
                            compiler_fence(Ordering::SeqCst);
                        }
                        // Not `from_fn`: what is called in its closure is compiled without the
                        // vectors.
                        let mut vectors = [V::splat(0.0); N];
                        for n in 0..N {
                            let from = weights.add(n * call.tile_bytes + step * R::BYTES);
                            vectors[n] = R::read(from, i);
                            if $ahead && i == 0 {
                                V::prefetch(fetched.wrapping_add(n * call.tile_bytes));
                            }
                        }
                        $(
                            let x_m = *x.add($m * call.x_stride + step * R::STEP + i);
                            let x_m = V::splat(x_m);
                            for n in 0..N {
                                $sums[n] = vectors[n].mul_add(x_m, $sums[n]);
                            }
                        )*
                    }
                    fetched = fetched.wrapping_add(pace);
                }
                $(call.put(pass.row + $m, pass.tile, $sums);)*
            }
        }
    )*};
}
passes! {
    // One row waits for memory whatever it does.
    pass_1, false: 0 a;
    pass_2, true: 0 a, 1 b;
    pass_3, true: 0 a, 1 b, 2 c;
    pass_4, true: 0 a, 1 b, 2 c, 3 d;
    pass_5, true: 0 a, 1 b, 2 c, 3 d, 4 e;
    pass_6, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f;
    pass_7, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g;
    pass_8, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h;
    pass_9, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h, 8 i;
    pass_10, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h, 8 i, 9 j;
    pass_11, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h, 8 i, 9 j, 10 k;
    pass_12, true: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h, 8 i, 9 j, 10 k, 11 l;
}

/// `count` vectors of weights as floats.
#[inline(always)]
unsafe fn widen_kernel<V: Lanes, R: Read>(from: *const u8, count: usize, to: *mut f32) {
    // SAFETY: so many vectors are there and fit, by the caller.
    unsafe {
        for step in 0..count / R::STEP {
            for i in 0..R::STEP {
                let to = to.add((step * R::STEP + i) * LANES);
                R::read::<V>(from.add(step * R::BYTES), i).store(to);
            }
        }
    }
}

macro_rules! kernels {
    ($($reader:ty: $multiply:ident, $kernel:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $kernel<V: Lanes>(call: &Call) {
            // SAFETY: handed on.
            unsafe { multiply_kernel::<V, $reader>(call) }
        }
        dispatch! { unsafe fn $multiply(call: &Call) => $kernel; }
    )*};
}
kernels! {
    Singles: multiply_singles, singles_kernel;
    Halves: multiply_halves, halves_kernel;
    Pairs: multiply_pairs, pairs_kernel;
}

#[inline(always)]
unsafe fn widen_halves_kernel<V: Lanes>(from: *const u8, count: usize, to: *mut f32) {
    // SAFETY: handed on.
    unsafe { widen_kernel::<V, Halves>(from, count, to) }
}
dispatch! {
    unsafe fn widen_halves(from: *const u8, count: usize, to: *mut f32) => widen_halves_kernel;
}

#[inline(always)]
unsafe fn widen_pairs_kernel<V: Lanes>(from: *const u8, count: usize, to: *mut f32) {
    // SAFETY: handed on.
    unsafe { widen_kernel::<V, Pairs>(from, count, to) }
}
dispatch! {
    unsafe fn widen_pairs(from: *const u8, count: usize, to: *mut f32) => widen_pairs_kernel;
}

/// Products of bfloat16: two inputs an instruction, summed in float32.
#[cfg(target_arch = "x86_64")]
mod bfloat {
    use std::arch::x86_64::*;

    use super::*;
    use crate::kernels::lanes::Avx512;

    /// # Safety
    /// The CPU has AVX512-BF16; `call.x` points to rows of bfloat16, `call.weights` to pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    pub(super) unsafe fn multiply_rows(call: &Call) {
        // SAFETY: the passes cover the result once.
        unsafe {
            if call.is_tall(call.inputs * 2) {
                cover!(call, TALL, 2, |pass| {
                    6: 2 => multiply_pass::<6, 2>(call, pass), 1 => multiply_pass::<6, 1>(call, pass);
                    7: 2 => multiply_pass::<7, 2>(call, pass), 1 => multiply_pass::<7, 1>(call, pass);
                    8: 2 => multiply_pass::<8, 2>(call, pass), 1 => multiply_pass::<8, 1>(call, pass);
                    9: 2 => multiply_pass::<9, 2>(call, pass), 1 => multiply_pass::<9, 1>(call, pass);
                    10: 2 => multiply_pass::<10, 2>(call, pass), 1 => multiply_pass::<10, 1>(call, pass);
                    11: 2 => multiply_pass::<11, 2>(call, pass), 1 => multiply_pass::<11, 1>(call, pass);
                    12: 2 => multiply_pass::<12, 2>(call, pass), 1 => multiply_pass::<12, 1>(call, pass);
                });
            } else {
                cover!(call, LOW, TILES, |pass| {
                    1: 4 => multiply_pass::<1, 4>(call, pass), 1 => multiply_pass::<1, 1>(call, pass);
                    2: 4 => multiply_pass::<2, 4>(call, pass), 1 => multiply_pass::<2, 1>(call, pass);
                    3: 4 => multiply_pass::<3, 4>(call, pass), 1 => multiply_pass::<3, 1>(call, pass);
                    4: 4 => multiply_pass::<4, 4>(call, pass), 1 => multiply_pass::<4, 1>(call, pass);
                    5: 4 => multiply_pass::<5, 4>(call, pass), 1 => multiply_pass::<5, 1>(call, pass);
                    6: 4 => multiply_pass::<6, 4>(call, pass), 1 => multiply_pass::<6, 1>(call, pass);
                });
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    #[inline]
    unsafe fn multiply_pass<const M: usize, const N: usize>(call: &Call, pass: Pass) {
        // SAFETY: the rows and tiles exist; a pair of inputs has 64 bytes in a tile and 4 in a row,
        // and any bits are vectors of bfloat16.
        unsafe {
            let weights = call.weights.add(pass.tile * call.tile_bytes);
            let x = call.x.cast::<i32>().add(pass.row * call.inputs / 2);
            let (mut fetched, pace) = call.ahead(pass, N, 64);
            let pairs = |bits: __m512i| std::mem::transmute::<__m512i, __m512bh>(bits);
            let mut sums = [[_mm512_setzero_ps(); N]; M];
            for step in 0..call.inputs / 2 {
                let weights: [__m512bh; N] = std::array::from_fn(|n| {
                    let from = weights.add(n * call.tile_bytes + step * 64);
                    if M > 1 {
                        Avx512::prefetch(fetched.wrapping_add(n * call.tile_bytes));
                    }
                    pairs(_mm512_loadu_si512(from.cast()))
                });
                for m in 0..M {
                    let x = x.add(m * call.inputs / 2 + step).read_unaligned();
                    let x = pairs(_mm512_set1_epi32(x));
                    for n in 0..N {
                        sums[m][n] = _mm512_dpbf16_ps(sums[m][n], weights[n], x);
                    }
                }
                fetched = fetched.wrapping_add(pace);
            }
            for m in 0..M {
                call.put(pass.row + m, pass.tile, sums[m].map(Avx512));
            }
        }
    }
}
