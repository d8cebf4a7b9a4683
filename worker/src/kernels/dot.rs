//! Integer dot products of unsigned weights with 16-bit activations, exact.
//!
//! A kernel is written once over [`Dot`], as it is over [`Lanes`] for floats. Sums are integers, so
//! every instruction set gives the same ones. Activations have sixteen bits, not the eight that
//! integer instructions multiply: with eight, an answer would depend on the rounding of
//! activations, with sixteen it agrees with float32 arithmetic to about five digits. Where the
//! CPU multiplies bytes (VNNI), an activation is split into two signed bytes, `256 · high + low`.
//! Activations that were rounded to eight bits ([`Precision::Eight`](super::activations::Precision))
//! are all low byte, and [`VnniLowDot`] leaves the other product out.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::lanes::{LANES, Lanes, Portable};

/// Inputs that share one scale of the activations.
pub(crate) const BLOCK: usize = 32;
/// Inputs of one step: four of each of sixteen outputs fill 64 bytes of weights.
pub(super) const STEP: usize = 4;

/// Sixteen integer sums, one for each output.
///
/// # Safety
/// Methods may be called only where the instruction set of the implementation is available.
#[allow(clippy::missing_safety_doc)]
pub(super) unsafe trait Dot: Copy {
    /// The float lanes of the same instruction set.
    type Lanes: Lanes;
    /// Weights of sixteen outputs and four inputs.
    type Weights: Copy;
    /// Rows of activations (at most six) and tiles of sixteen outputs (at most two) of one pass:
    /// as many as the registers hold.
    const TILE: (usize, usize);

    /// All sums zero.
    unsafe fn zero() -> Self;
    /// 64 bytes: the low four bits are one step's weights, the high four the next one's.
    unsafe fn nibbles(from: *const u8) -> (Self::Weights, Self::Weights);
    /// 64 bytes: byte `4 · output + input`.
    unsafe fn bytes(from: *const u8) -> Self::Weights;
    /// Adds the products with the four activations of step `step` (0 to 7) of a block that
    /// [`Dot::split`] wrote.
    unsafe fn accumulate(self, weights: Self::Weights, block: *const u8, step: usize) -> Self;
    /// The sums as floats.
    unsafe fn finish(self) -> Self::Lanes;
    /// Writes `x[i] · scale`, rounded, as the 64 bytes that [`Dot::accumulate`] reads; gives the
    /// sums of both halves. All products must be within ±32512 (127 · 256), so that the high byte
    /// fits.
    unsafe fn split(x: *const f32, scale: f32, to: *mut u8) -> [i32; 2];
    /// The largest magnitude of [`BLOCK`] floats; infinite or NaN when one of them is.
    unsafe fn magnitude(x: *const f32) -> f32 {
        // SAFETY: the caller gives 32 readable floats.
        let x = unsafe { x.cast::<[u32; BLOCK]>().read_unaligned() };
        // As integers the magnitudes have the same order, with infinity and NaN above all.
        f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x & 0x7fff_ffff)))
    }
}

/// Plain integers: the reference for the others, and what runs on a CPU without vectors.
#[derive(Clone, Copy)]
pub(super) struct PortableDot([i32; LANES]);

// SAFETY: plain Rust, available everywhere.
unsafe impl Dot for PortableDot {
    type Lanes = Portable;
    type Weights = [[u8; STEP]; LANES];
    const TILE: (usize, usize) = (1, 1);

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; LANES])
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> (Self::Weights, Self::Weights) {
        // SAFETY: the caller gives 64 readable bytes.
        let bytes = unsafe { from.cast::<Self::Weights>().read_unaligned() };
        (bytes.map(|quad| quad.map(|b| b & 15)), bytes.map(|quad| quad.map(|b| b >> 4)))
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> Self::Weights {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { from.cast::<Self::Weights>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn accumulate(self, weights: Self::Weights, block: *const u8, step: usize) -> Self {
        // SAFETY: a block has 32 activations of two bytes.
        let x = unsafe { block.cast::<[i16; STEP]>().add(step).read_unaligned() };
        Self(std::array::from_fn(|lane| {
            let products = weights[lane].iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x));
            self.0[lane] + products.sum::<i32>()
        }))
    }
    #[inline(always)]
    unsafe fn finish(self) -> Portable {
        let floats = self.0.map(|sum| sum as f32);
        // SAFETY: sixteen floats.
        unsafe { Portable::load(floats.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn split(x: *const f32, scale: f32, to: *mut u8) -> [i32; 2] {
        // SAFETY: the caller gives 32 readable floats and 64 writable bytes.
        unsafe {
            let x = x.cast::<[f32; BLOCK]>().read_unaligned();
            let q = x.map(|x| (x * scale).round_ties_even() as i16);
            to.cast::<[i16; BLOCK]>().write_unaligned(q);
            let sum = |half: &[i16]| half.iter().map(|&q| i32::from(q)).sum();
            [sum(&q[..BLOCK / 2]), sum(&q[BLOCK / 2..])]
        }
    }
}

/// AVX2: 16-bit products of the even and of the odd inputs, eight outputs a register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2Dot([__m256i; 2]);

/// Even and odd inputs of eight outputs each, widened to sixteen bits.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Widened([(__m256i, __m256i); 2]);

#[cfg(target_arch = "x86_64")]
impl Widened {
    #[inline(always)]
    unsafe fn new(bytes: [__m256i; 2]) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            let even = _mm256_set1_epi16(0xff);
            let [a, b] = bytes;
            Self([
                (_mm256_and_si256(a, even), _mm256_srli_epi16::<8>(a)),
                (_mm256_and_si256(b, even), _mm256_srli_epi16::<8>(b)),
            ])
        }
    }
}

#[cfg(target_arch = "x86_64")]
// SAFETY: callers of the methods have AVX2, by the trait's contract; loads and stores cover the
// bytes that the contract grants.
unsafe impl Dot for Avx2Dot {
    type Lanes = super::lanes::Avx2;
    type Weights = Widened;
    const TILE: (usize, usize) = (4, 1);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        unsafe { Self([_mm256_setzero_si256(); 2]) }
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> (Widened, Widened) {
        // SAFETY: see the impl.
        unsafe {
            let from = from.cast::<__m256i>();
            let (a, b) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
            let mask = _mm256_set1_epi8(15);
            let low = [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)];
            let high = [
                _mm256_and_si256(_mm256_srli_epi16::<4>(a), mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(b), mask),
            ];
            (Widened::new(low), Widened::new(high))
        }
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> Widened {
        // SAFETY: see the impl.
        unsafe {
            let from = from.cast::<__m256i>();
            Widened::new([_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))])
        }
    }
    #[inline(always)]
    unsafe fn accumulate(self, weights: Widened, block: *const u8, step: usize) -> Self {
        // SAFETY: see the impl. A product is below 2^23, so pairs and blocks of them fit.
        unsafe {
            let pairs = block.cast::<i32>().add(2 * step);
            let even = _mm256_set1_epi32(pairs.read_unaligned());
            let odd = _mm256_set1_epi32(pairs.add(1).read_unaligned());
            let mut sums = self.0;
            for half in 0..2 {
                let (w_even, w_odd) = weights.0[half];
                let products = _mm256_add_epi32(
                    _mm256_madd_epi16(w_even, even),
                    _mm256_madd_epi16(w_odd, odd),
                );
                sums[half] = _mm256_add_epi32(sums[half], products);
            }
            Self(sums)
        }
    }
    #[inline(always)]
    unsafe fn finish(self) -> Self::Lanes {
        // SAFETY: see the impl.
        unsafe { super::lanes::Avx2(_mm256_cvtepi32_ps(self.0[0]), _mm256_cvtepi32_ps(self.0[1])) }
    }
    #[inline(always)]
    unsafe fn split(x: *const f32, scale: f32, to: *mut u8) -> [i32; 2] {
        // SAFETY: see the impl; rounds to nearest, ties to even, as the others do.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            // Inputs 0 2 1 3 of each four, the order in which weights are widened.
            let order = _mm256_setr_epi8(
                0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9,
                12, 13, 10, 11, 14, 15,
            );
            let mut sums = [0; 2];
            for half in 0..2 {
                let x = x.add(half * LANES);
                let q = (
                    _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale)),
                    _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.add(8)), scale)),
                );
                // Packing works within 128-bit halves; the permutation restores the order.
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(q.0, q.1));
                let words = _mm256_shuffle_epi8(words, order);
                _mm256_storeu_si256(to.cast::<__m256i>().add(half), words);
                let pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
                let mut lanes = [0i32; 8];
                _mm256_storeu_si256(lanes.as_mut_ptr().cast(), pairs);
                sums[half] = lanes.iter().sum();
            }
            sums
        }
    }
}

/// AVX-512 VNNI: byte products, the two bytes of an activation summed apart.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct VnniDot {
    high: __m512i,
    low: __m512i,
}

#[cfg(target_arch = "x86_64")]
// SAFETY: callers of the methods have AVX-512 with VNNI, by the trait's contract; loads and stores
// cover the bytes that the contract grants.
unsafe impl Dot for VnniDot {
    type Lanes = super::lanes::Avx512;
    type Weights = __m512i;
    const TILE: (usize, usize) = (3, 2);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        unsafe { Self { high: _mm512_setzero_si512(), low: _mm512_setzero_si512() } }
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> (__m512i, __m512i) {
        // SAFETY: see the impl.
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi8(15);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
            (_mm512_and_si512(bytes, mask), high)
        }
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m512i {
        // SAFETY: see the impl.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn accumulate(self, weights: __m512i, block: *const u8, step: usize) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let quad = block.cast::<i32>().add(step);
            let high = _mm512_set1_epi32(quad.read_unaligned());
            let low = _mm512_set1_epi32(quad.add(BLOCK / STEP).read_unaligned());
            Self {
                high: _mm512_dpbusd_epi32(self.high, weights, high),
                low: _mm512_dpbusd_epi32(self.low, weights, low),
            }
        }
    }
    #[inline(always)]
    unsafe fn finish(self) -> Self::Lanes {
        // SAFETY: see the impl. At most 32 · 255 · 32512 = 2.7e8: no overflow.
        unsafe {
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(self.high), self.low);
            super::lanes::Avx512(_mm512_cvtepi32_ps(sum))
        }
    }
    #[inline(always)]
    unsafe fn split(x: *const f32, scale: f32, to: *mut u8) -> [i32; 2] {
        // SAFETY: see the impl; rounds to nearest, ties to even, as the others do.
        unsafe {
            let scale = _mm512_set1_ps(scale);
            let mut sums = [0; 2];
            for half in 0..2 {
                let x = _mm512_loadu_ps(x.add(half * LANES));
                let q = _mm512_cvtps_epi32(_mm512_mul_ps(x, scale));
                // The low byte is signed, so the high one is of the value rounded, not cut.
                let rounded = _mm512_add_epi32(q, _mm512_set1_epi32(128));
                let high = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(rounded));
                let to = to.add(half * LANES);
                _mm_storeu_si128(to.cast(), high);
                _mm_storeu_si128(to.add(BLOCK).cast(), _mm512_cvtepi32_epi8(q));
                sums[half] = _mm512_reduce_add_epi32(q);
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn magnitude(x: *const f32) -> f32 {
        // SAFETY: see the impl.
        unsafe {
            let mask = _mm512_set1_epi32(0x7fff_ffff);
            let first = _mm512_castps_si512(_mm512_loadu_ps(x));
            let second = _mm512_castps_si512(_mm512_loadu_ps(x.add(LANES)));
            let largest =
                _mm512_max_epu32(_mm512_and_si512(first, mask), _mm512_and_si512(second, mask));
            f32::from_bits(_mm512_reduce_max_epu32(largest))
        }
    }
}

/// AVX-512 VNNI for activations of which only the low byte is not zero.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct VnniLowDot(__m512i);

#[cfg(target_arch = "x86_64")]
// SAFETY: as for `VnniDot`.
unsafe impl Dot for VnniLowDot {
    type Lanes = super::lanes::Avx512;
    type Weights = __m512i;
    const TILE: (usize, usize) = (6, 2);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_setzero_si512()) }
    }
    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> (__m512i, __m512i) {
        // SAFETY: handed on.
        unsafe { VnniDot::nibbles(from) }
    }
    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m512i {
        // SAFETY: handed on.
        unsafe { VnniDot::bytes(from) }
    }
    #[inline(always)]
    unsafe fn accumulate(self, weights: __m512i, block: *const u8, step: usize) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let low = block.cast::<i32>().add(BLOCK / STEP + step).read_unaligned();
            Self(_mm512_dpbusd_epi32(self.0, weights, _mm512_set1_epi32(low)))
        }
    }
    #[inline(always)]
    unsafe fn finish(self) -> Self::Lanes {
        // SAFETY: see the impl.
        unsafe { super::lanes::Avx512(_mm512_cvtepi32_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn split(x: *const f32, scale: f32, to: *mut u8) -> [i32; 2] {
        // SAFETY: handed on.
        unsafe { VnniDot::split(x, scale, to) }
    }
    #[inline(always)]
    unsafe fn magnitude(x: *const f32) -> f32 {
        // SAFETY: handed on.
        unsafe { VnniDot::magnitude(x) }
    }
}
