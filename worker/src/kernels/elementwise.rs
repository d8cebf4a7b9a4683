//! The small operations between the matrix products: RMSNorm, RoPE, SwiGLU.

use super::cpu::dispatch;
use super::lanes::{LANES, Lanes};

/// `out = x / sqrt(mean(x²) + eps) · weight` (Zhang and Sennrich 2019), one row.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn rms_norm(isa: super::cpu::Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len() && x.len().is_multiple_of(LANES));
    // SAFETY: all three slices have the same length, a multiple of sixteen.
    unsafe { rms_norm_row(isa, x.as_ptr(), weight.as_ptr(), eps, out.as_mut_ptr(), x.len()) }
}

#[inline(always)]
unsafe fn rms_norm_kernel<V: Lanes>(
    x: *const f32,
    weight: *const f32,
    eps: f32,
    out: *mut f32,
    len: usize,
) {
    // SAFETY: `len` elements each, by the caller.
    unsafe {
        let mut squares = V::splat(0.0);
        for i in (0..len).step_by(LANES) {
            let x = V::load(x.add(i));
            squares = x.mul_add(x, squares);
        }
        let scale = V::splat(1.0 / (squares.sum() / len as f32 + eps).sqrt());
        for i in (0..len).step_by(LANES) {
            V::load(x.add(i)).mul(scale).mul(V::load(weight.add(i))).store(out.add(i));
        }
    }
}
dispatch! {
    unsafe fn rms_norm_row(
        x: *const f32, weight: *const f32, eps: f32, out: *mut f32, len: usize,
    ) => rms_norm_kernel;
}

/// `out = silu(gate) · up` (Shazeer 2020), any number of elements.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn swiglu(isa: super::cpu::Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len() && gate.len().is_multiple_of(LANES));
    // SAFETY: all three slices have the same length, a multiple of sixteen.
    unsafe { swiglu_row(isa, gate.as_ptr(), up.as_ptr(), out.as_mut_ptr(), gate.len()) }
}

#[inline(always)]
unsafe fn swiglu_kernel<V: Lanes>(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
    // SAFETY: `len` elements each, by the caller.
    unsafe {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        for i in (0..len).step_by(LANES) {
            let g = V::load(gate.add(i));
            // The upper bound keeps e^-g finite; there silu(g) is zero anyway.
            let e = zero.sub(g).max(V::splat(-87.0)).min(V::splat(87.0)).exp();
            g.div(one.add(e)).mul(V::load(up.add(i))).store(out.add(i));
        }
    }
}
dispatch! {
    unsafe fn swiglu_row(
        gate: *const f32, up: *const f32, out: *mut f32, len: usize,
    ) => swiglu_kernel;
}

/// Rotary position embedding (Su et al. 2021) over pairs of neighbours, the order in which GGUF
/// keeps the query and key weights of Llama models.
pub struct Rope {
    half: usize,
    /// `(cos, sin)` of each pair, position by position.
    table: Vec<(f32, f32)>,
}

impl Rope {
    /// Angles for `positions` positions and heads of `dims` rotated dimensions.
    ///
    /// `factors`, when given, divides the frequency of each pair (`rope_freqs.weight`).
    pub fn new(positions: usize, dims: usize, theta: f32, factors: Option<&[f32]>) -> Self {
        let half = dims / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let frequency = f64::from(theta).powf(-2.0 * i as f64 / dims as f64) as f32;
                frequency / factors.map_or(1.0, |factors| factors[i])
            })
            .collect();
        let table = (0..positions)
            .flat_map(|position| {
                frequencies.iter().map(move |frequency| {
                    // The angle in single precision, as every other implementation has it.
                    let angle = f64::from(position as f32 * frequency);
                    (angle.cos() as f32, angle.sin() as f32)
                })
            })
            .collect();
        Self { half, table }
    }

    /// Rotates one head at a position. Dimensions past the rotated ones stay.
    pub fn rotate(&self, position: usize, head: &mut [f32]) {
        let angles = &self.table[position * self.half..(position + 1) * self.half];
        for ([a, b], (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cpu::Isa;
    use super::*;

    fn close(got: f32, expected: f64) -> bool {
        (f64::from(got) - expected).abs() <= 2e-6 * expected.abs() + 1e-6
    }

    proptest! {
        #[test]
        fn rms_norm_is_its_formula(
            x in prop::collection::vec(-8f32..8.0, 1usize..40).prop_map(|x| x.repeat(16)),
            eps in 1e-6f32..1e-3,
        ) {
            let weight: Vec<f32> = (0..x.len()).map(|i| 0.5 + (i % 7) as f32 * 0.1).collect();
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
            for isa in Isa::available() {
                let mut out = vec![0.0; x.len()];
                rms_norm(isa, &x, &weight, eps, &mut out);
                for i in 0..x.len() {
                    let expected = f64::from(x[i]) / (mean + f64::from(eps)).sqrt() * f64::from(weight[i]);
                    prop_assert!(close(out[i], expected), "{isa:?}: {} {expected}", out[i]);
                }
            }
        }

        #[test]
        fn swiglu_is_its_formula(gate in prop::collection::vec(-120f32..120.0, 48), scale in -3f32..3.0) {
            let up: Vec<f32> = gate.iter().rev().map(|x| x * scale).collect();
            for isa in Isa::available() {
                let mut out = vec![0.0; gate.len()];
                swiglu(isa, &gate, &up, &mut out);
                for i in 0..out.len() {
                    let g = f64::from(gate[i]);
                    let expected = g / (1.0 + (-g).exp()) * f64::from(up[i]);
                    prop_assert!(close(out[i], expected), "{isa:?}: {} {expected}", out[i]);
                }
            }
        }

        #[test]
        fn rope_rotates_each_pair_by_its_angle(position in 0usize..4096, x in -3f32..3.0, y in -3f32..3.0) {
            let rope = Rope::new(4096, 64, 10_000.0, None);
            let mut head = [x, y].repeat(32);
            rope.rotate(position, &mut head);
            for (i, pair) in head.as_chunks::<2>().0.iter().enumerate() {
                let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / 64.0);
                let expected = f64::from(x) * angle.cos() - f64::from(y) * angle.sin();
                // Single-precision angles: the error grows with the position.
                prop_assert!((f64::from(pair[0]) - expected).abs() < 2e-3, "{} {expected}", pair[0]);
            }
        }
    }
}
