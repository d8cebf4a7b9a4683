//! Sixteen float32 lanes.
//!
//! A kernel is written once over [`Lanes`] and compiled once per instruction set. All
//! implementations keep sixteen partial sums, so they differ only in rounding: of the fused
//! multiply-add that the portable one lacks, and of [`Lanes::reciprocal`].

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Number of lanes.
pub const LANES: usize = 16;

/// `2^x` over ±1/2, highest power first: fitted for the least relative error, 8e-8.
const EXP2: [f32; 6] = [1.327_647_1e-3, 9.675_541e-3, 5.550_713e-2, 0.240_221_2, 0.693_146_94, 1.0];

/// The finite half-precision float at `from`, exactly, without a branch.
#[inline(always)]
pub(super) unsafe fn half(from: *const u8) -> f32 {
    // SAFETY: two readable bytes, granted by the caller.
    let bits = u32::from(u16::from_le(unsafe { from.cast::<u16>().read_unaligned() }));
    // Moving the exponent field up leaves a bias of 15 where 127 is meant; 2^112 mends it, also
    // for subnormal halves.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Sixteen float32 values.
///
/// # Safety
/// Methods may be called only where the instruction set of the implementation is available;
/// pointers must be valid for sixteen elements (no alignment is needed).
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Lanes: Copy {
    /// Whether the CPU has 32 registers of sixteen lanes.
    const WIDE: bool = false;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// Sixteen floats from memory.
    unsafe fn load(from: *const f32) -> Self;
    /// Asks for the cache line of an address that will be read soon.
    unsafe fn prefetch<T>(from: *const T) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, without effect on an address that is not mapped.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(from.cast());
        }
    }
    /// Sixteen floats to memory.
    unsafe fn store(self, to: *mut f32);
    /// Sixteen signed integers from memory, the value of each as a float.
    unsafe fn load_i16(from: *const i16) -> Self;
    /// As [`Lanes::load_i16`], of a byte each.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Sixteen finite half-precision floats from memory.
    unsafe fn load_halves(from: *const u8) -> Self;
    /// The lower bfloat16 of sixteen pairs in memory.
    unsafe fn load_lower(from: *const u8) -> Self;
    /// The upper bfloat16 of sixteen pairs in memory.
    unsafe fn load_upper(from: *const u8) -> Self;
    /// `self * b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Lane-wise sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Lane-wise difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Lane-wise product.
    unsafe fn mul(self, b: Self) -> Self;
    /// Lane-wise quotient.
    unsafe fn div(self, b: Self) -> Self;
    /// `1 / self`, to about one unit in the last place, of normal numbers whose reciprocal is one.
    #[inline(always)]
    unsafe fn reciprocal(self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self::splat(1.0).div(self) }
    }
    /// Lane-wise maximum.
    unsafe fn max(self, b: Self) -> Self;
    /// Lane-wise minimum.
    unsafe fn min(self, b: Self) -> Self;
    /// The nearest whole numbers.
    unsafe fn round(self) -> Self;
    /// `2^self` for whole numbers in -126..=127.
    unsafe fn exp2_whole(self) -> Self;

    /// `2^self`, to about two units in the last place of single precision.
    ///
    /// Range reduction to ±1/2 and a polynomial. Below -126 the result is at most `2^-126`, which is
    /// zero for every use here.
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let x = self.max(Self::splat(-126.0));
            let whole = x.round();
            let x = x.sub(whole);
            let mut p = Self::splat(EXP2[0]);
            for c in &EXP2[1..] {
                p = p.mul_add(x, Self::splat(*c));
            }
            p.mul(whole.exp2_whole())
        }
    }

    /// Makes rows of columns.
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; LANES]) {
        let mut lanes = [[0f32; LANES]; LANES];
        for i in 0..LANES {
            // SAFETY: a row has sixteen elements.
            unsafe { square[i].store(lanes[i].as_mut_ptr()) };
        }
        for i in 0..LANES {
            let column = lanes.map(|row| row[i]);
            // SAFETY: as above.
            square[i] = unsafe { Self::load(column.as_ptr()) };
        }
    }

    /// The sum of all lanes, always in the same tree order.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `e^self`, to about one unit in the last place of single precision.
    ///
    /// Range reduction by powers of two and a degree-6 polynomial (Cephes `expf`). Below -87 the
    /// result is `e^-87`, which is zero for every use here.
    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let x = self.max(Self::splat(-87.0));
            let whole = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            // ln 2 in two parts, so that the reduced argument keeps its last bits.
            let x = whole.mul_add(Self::splat(-0.693_359_375), x);
            let x = whole.mul_add(Self::splat(2.121_944_4e-4), x);
            let mut p = Self::splat(1.987_569_2e-4);
            for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = p.mul_add(x, Self::splat(c));
            }
            let e = p.mul_add(x.mul(x), x).add(Self::splat(1.0));
            e.mul(whole.exp2_whole())
        }
    }
}

/// Plain arrays: the reference for the others, and what runs on a CPU without vectors.
#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

// SAFETY: plain Rust, available everywhere.
unsafe impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller gives sixteen readable floats.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller gives sixteen writable floats.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        // SAFETY: the caller gives sixteen readable integers.
        Self(unsafe { from.cast::<[i16; LANES]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller gives sixteen readable integers.
        Self(unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> Self {
        // SAFETY: the caller gives 32 readable bytes.
        Self(std::array::from_fn(|i| unsafe { half(from.add(2 * i)) }))
    }
    #[inline(always)]
    unsafe fn load_lower(from: *const u8) -> Self {
        // SAFETY: the caller gives 64 readable bytes.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        Self(pairs.map(|pair| f32::from_bits(pair << 16)))
    }
    #[inline(always)]
    unsafe fn load_upper(from: *const u8) -> Self {
        // SAFETY: the caller gives 64 readable bytes.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        Self(pairs.map(|pair| f32::from_bits(pair & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // Not `f32::mul_add`, which calls into libm where there is no instruction for it.
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, f32::max)
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, f32::min)
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23)))
    }
}

/// AVX2 and FMA: two registers of eight.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx2(pub(super) __m256, pub(super) __m256);

#[cfg(target_arch = "x86_64")]
// SAFETY: callers of the methods have AVX2, FMA and F16C, by the trait's contract; every load and store
// covers the sixteen elements that the contract grants.
unsafe impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let from = from.cast::<__m128i>();
            let halves = [_mm_loadu_si128(from), _mm_loadu_si128(from.add(1))];
            Self(_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1]))
        }
    }
    #[inline(always)]
    unsafe fn load_lower(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let lower = |from| _mm256_slli_epi32::<16>(_mm256_loadu_si256(from));
            let from = from.cast::<__m256i>();
            Self(_mm256_castsi256_ps(lower(from)), _mm256_castsi256_ps(lower(from.add(1))))
        }
    }
    #[inline(always)]
    unsafe fn load_upper(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let upper = |from| _mm256_and_si256(_mm256_loadu_si256(from), mask);
            let from = from.cast::<__m256i>();
            Self(_mm256_castsi256_ps(upper(from)), _mm256_castsi256_ps(upper(from.add(1))))
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn reciprocal(self) -> Self {
        // As with AVX-512, but from some eleven bits, which differ between makers of CPUs: a step of
        // third order leaves nothing of that.
        // SAFETY: see the impl.
        unsafe {
            let one = _mm256_set1_ps(1.0);
            let near = (_mm256_rcp_ps(self.0), _mm256_rcp_ps(self.1));
            let error =
                (_mm256_fnmadd_ps(self.0, near.0, one), _mm256_fnmadd_ps(self.1, near.1, one));
            let error = (
                _mm256_fmadd_ps(error.0, error.0, error.0),
                _mm256_fmadd_ps(error.1, error.1, error.1),
            );
            Self(_mm256_fmadd_ps(near.0, error.0, near.0), _mm256_fmadd_ps(near.1, error.1, near.1))
        }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm256_round_ps::<8>(self.0), _mm256_round_ps::<8>(self.1)) }
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let bits = |x: __m256| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            Self(bits(self.0), bits(self.1))
        }
    }
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; LANES]) {
        // SAFETY: see the impl.
        unsafe {
            let mut quarters = [[_mm256_setzero_ps(); LANES / 2]; 4];
            for i in 0..LANES / 2 {
                let (upper, lower) = (square[i], square[LANES / 2 + i]);
                quarters[0][i] = upper.0;
                quarters[1][i] = upper.1;
                quarters[2][i] = lower.0;
                quarters[3][i] = lower.1;
            }
            for i in 0..4 {
                transpose_eight(&mut quarters[i]);
            }
            for i in 0..LANES / 2 {
                square[i] = Self(quarters[0][i], quarters[2][i]);
                square[LANES / 2 + i] = Self(quarters[1][i], quarters[3][i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // The same tree as the default: halves of 8, 4, 2, 1.
        // SAFETY: see the impl.
        unsafe { sum_eight(_mm256_add_ps(self.0, self.1)) }
    }
}

/// Makes rows of columns.
///
/// # Safety
/// The CPU has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_eight(square: &mut [__m256; LANES / 2]) {
    // Pairs of rows, then fours, within halves; then the halves.
    // SAFETY: granted by the caller.
    unsafe {
        let mut twos = [_mm256_setzero_ps(); LANES / 2];
        for i in (0..LANES / 2).step_by(2) {
            twos[i] = _mm256_unpacklo_ps(square[i], square[i + 1]);
            twos[i + 1] = _mm256_unpackhi_ps(square[i], square[i + 1]);
        }
        let mut fours = [_mm256_setzero_ps(); LANES / 2];
        for i in (0..LANES / 2).step_by(4) {
            for half in 0..2 {
                let a = _mm256_castps_pd(twos[i + half]);
                let b = _mm256_castps_pd(twos[i + half + 2]);
                fours[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                fours[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            }
        }
        for i in 0..4 {
            square[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[4 + i]);
            square[4 + i] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[4 + i]);
        }
    }
}

/// The sum of eight floats, by halves.
///
/// # Safety
/// The CPU has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sum_eight(x: __m256) -> f32 {
    // SAFETY: granted by the caller.
    unsafe {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// AVX-512F: one register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx512(pub(super) __m512);

#[cfg(target_arch = "x86_64")]
// SAFETY: callers of the methods have AVX-512F, by the trait's contract; every load and store
// covers the sixteen elements that the contract grants.
unsafe impl Lanes for Avx512 {
    const WIDE: bool = true;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_halves(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_lower(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn load_upper(from: *const u8) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            Self(_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from.cast()), mask)))
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn reciprocal(self) -> Self {
        // A division takes ten multiplications' time; fourteen bits and a step of Newton's four.
        // SAFETY: see the impl.
        unsafe {
            let near = _mm512_rcp14_ps(self.0);
            let error = _mm512_fnmadd_ps(self.0, near, _mm512_set1_ps(1.0));
            Self(_mm512_fmadd_ps(near, error, near))
        }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: see the impl.
        unsafe { Self(_mm512_roundscale_ps::<8>(self.0)) }
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // As the default, but the last factor takes any exponent.
        // SAFETY: see the impl.
        unsafe {
            let whole = self.round();
            let x = self.sub(whole);
            let mut p = Self::splat(EXP2[0]);
            for c in &EXP2[1..] {
                p = p.mul_add(x, Self::splat(*c));
            }
            Self(_mm512_scalef_ps(p.0, whole.0))
        }
    }
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; LANES]) {
        // Pairs of rows, then fours, within quarters; then the quarters.
        // SAFETY: see the impl.
        unsafe {
            let mut twos = [_mm512_setzero_ps(); LANES];
            for i in (0..LANES).step_by(2) {
                twos[i] = _mm512_unpacklo_ps(square[i].0, square[i + 1].0);
                twos[i + 1] = _mm512_unpackhi_ps(square[i].0, square[i + 1].0);
            }
            let mut fours = [_mm512_setzero_ps(); LANES];
            for i in (0..LANES).step_by(4) {
                for half in 0..2 {
                    let a = _mm512_castps_pd(twos[i + half]);
                    let b = _mm512_castps_pd(twos[i + half + 2]);
                    fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            for i in 0..4 {
                let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
                let even = _mm512_shuffle_f32x4::<0x88>(a, b);
                let odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                let next_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                let next_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                square[i] = Self(_mm512_shuffle_f32x4::<0x88>(even, next_even));
                square[4 + i] = Self(_mm512_shuffle_f32x4::<0x88>(odd, next_odd));
                square[8 + i] = Self(_mm512_shuffle_f32x4::<0xdd>(even, next_even));
                square[12 + i] = Self(_mm512_shuffle_f32x4::<0xdd>(odd, next_odd));
            }
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // The same tree as the default: halves of 8, 4, 2, 1.
        // SAFETY: see the impl.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            sum_eight(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
        }
    }
}
