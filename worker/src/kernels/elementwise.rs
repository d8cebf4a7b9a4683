//! The small operations between the matrix products: norms, activations, sums.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, LOG2_E};

use super::cpu::{Isa, dispatch};
use super::lanes::{LANES, Lanes};

/// `out = x / sqrt(mean(x²) + eps) · weight` (Zhang and Sennrich 2019), one row.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len() && x.len().is_multiple_of(LANES));
    // SAFETY: all three slices have the same length, a multiple of sixteen.
    unsafe { rms_norm_row(isa, x.as_ptr(), weight.as_ptr(), eps, out.as_mut_ptr(), x.len()) }
}

/// [`rms_norm`] of a row that it replaces.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(x.len() == weight.len() && x.len().is_multiple_of(LANES));
    let x = x.as_mut_ptr();
    // SAFETY: both slices have the same length, a multiple of sixteen; an element is read before
    // it is written.
    unsafe { rms_norm_row(isa, x.cast_const(), weight.as_ptr(), eps, x, weight.len()) }
}

/// `out = (x − mean) / sqrt(variance + eps) · weight + bias` (Ba, Kiros and Hinton 2016), one row.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn layer_norm(
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    assert!(x.len() == weight.len() && x.len() == out.len() && x.len().is_multiple_of(LANES));
    assert!(bias.is_none_or(|bias| bias.len() == x.len()));
    let bias = bias.map(<[f32]>::as_ptr);
    // SAFETY: all slices have the same length, a multiple of sixteen.
    unsafe {
        layer_norm_row(isa, x.as_ptr(), weight.as_ptr(), bias, eps, out.as_mut_ptr(), x.len())
    }
}

/// [`layer_norm`] of a row that it replaces.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn layer_norm_in_place(
    isa: Isa,
    x: &mut [f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
) {
    assert!(x.len() == weight.len() && x.len().is_multiple_of(LANES));
    assert!(bias.is_none_or(|bias| bias.len() == x.len()));
    let (x, bias) = (x.as_mut_ptr(), bias.map(<[f32]>::as_ptr));
    // SAFETY: all slices have the same length, a multiple of sixteen; an element is read before it
    // is written.
    unsafe { layer_norm_row(isa, x.cast_const(), weight.as_ptr(), bias, eps, x, weight.len()) }
}

/// `x += y`.
///
/// # Panics
/// When the lengths differ.
pub fn add_to(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
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

#[inline(always)]
unsafe fn layer_norm_kernel<V: Lanes>(
    x: *const f32,
    weight: *const f32,
    bias: Option<*const f32>,
    eps: f32,
    out: *mut f32,
    len: usize,
) {
    // SAFETY: `len` elements each, by the caller.
    unsafe {
        let mut sum = V::splat(0.0);
        for i in (0..len).step_by(LANES) {
            sum = sum.add(V::load(x.add(i)));
        }
        let mean = V::splat(sum.sum() / len as f32);
        let mut squares = V::splat(0.0);
        for i in (0..len).step_by(LANES) {
            let x = V::load(x.add(i)).sub(mean);
            squares = x.mul_add(x, squares);
        }
        let scale = V::splat(1.0 / (squares.sum() / len as f32 + eps).sqrt());
        for i in (0..len).step_by(LANES) {
            let x = V::load(x.add(i)).sub(mean).mul(scale);
            let bias = bias.map_or(V::splat(0.0), |bias| V::load(bias.add(i)));
            x.mul_add(V::load(weight.add(i)), bias).store(out.add(i));
        }
    }
}
dispatch! {
    unsafe fn layer_norm_row(
        x: *const f32, weight: *const f32, bias: Option<*const f32>, eps: f32, out: *mut f32,
        len: usize,
    ) => layer_norm_kernel;
}

/// What an MLP applies to its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The Gaussian error linear unit (Hendrycks and Gimpel 2016), by its tanh approximation.
    GeluTanh,
    /// The same by its definition, with the error function.
    Gelu,
}

impl Activation {
    /// Of sixteen elements.
    #[inline(always)]
    pub(super) unsafe fn apply<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller has the instruction set.
        unsafe {
            match self {
                Self::Silu => silu(x),
                Self::GeluTanh => gelu_tanh(x),
                Self::Gelu => times_normal(x),
            }
        }
    }
}

/// What follows a product, for some of a row: `x = activation(x + bias)`, where there are such.
pub(super) fn finish(
    isa: Isa,
    bias: Option<&[f32]>,
    activation: Option<Activation>,
    x: &mut [f32],
) {
    if let Some(bias) = bias {
        add_to(x, bias);
    }
    let Some(activation) = activation else { return };
    let (whole, rest) = x.split_at_mut(x.len() / LANES * LANES);
    activate(isa, activation, whole);
    if !rest.is_empty() {
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        activate(isa, activation, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// `x = activation(x)`.
fn activate(isa: Isa, activation: Activation, x: &mut [f32]) {
    assert!(x.len().is_multiple_of(LANES));
    // SAFETY: a multiple of sixteen elements.
    unsafe {
        match activation {
            Activation::Silu => silu_all(isa, x.as_mut_ptr(), x.len()),
            Activation::GeluTanh => gelu_tanh_all(isa, x.as_mut_ptr(), x.len()),
            Activation::Gelu => gelu_all(isa, x.as_mut_ptr(), x.len()),
        }
    }
}

/// `out = activation(gate) · up` (Shazeer 2020), any number of elements.
///
/// # Panics
/// When the lengths differ or are no multiple of sixteen.
pub fn gated(isa: Isa, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len() && gate.len().is_multiple_of(LANES));
    let (gate, up, out, len) = (gate.as_ptr(), up.as_ptr(), out.as_mut_ptr(), out.len());
    // SAFETY: all three slices have the same length, a multiple of sixteen.
    unsafe {
        match activation {
            Activation::Silu => silu_gated(isa, gate, up, out, len),
            Activation::GeluTanh => gelu_tanh_gated(isa, gate, up, out, len),
            Activation::Gelu => gelu_gated(isa, gate, up, out, len),
        }
    }
}

/// `x · sigmoid(y)`.
#[inline(always)]
unsafe fn times_sigmoid<V: Lanes>(x: V, y: V) -> V {
    // SAFETY: the caller has the instruction set.
    unsafe {
        // The bounds keep e^-y finite; beyond them the sigmoid is zero or one anyway.
        let e = V::splat(0.0).sub(y).max(V::splat(-87.0)).min(V::splat(87.0)).exp();
        x.div(V::splat(1.0).add(e))
    }
}

/// `x = x · Φ(x)`, the Gaussian error linear unit by its definition, any number of elements.
///
/// # Panics
/// When the length is no multiple of sixteen.
pub fn gelu(isa: Isa, x: &mut [f32]) {
    activate(isa, Activation::Gelu, x);
}

/// `x · sigmoid(x)`.
#[inline(always)]
unsafe fn silu<V: Lanes>(x: V) -> V {
    // SAFETY: the caller has the instruction set.
    unsafe { times_sigmoid(x, x) }
}

/// `x · (1 + tanh(u)) / 2`, which is `x · sigmoid(2 u)`, with `u = √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
unsafe fn gelu_tanh<V: Lanes>(x: V) -> V {
    const LINEAR: f32 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
    // SAFETY: the caller has the instruction set.
    unsafe {
        let (linear, cubic) = (V::splat(LINEAR), V::splat(LINEAR * 0.044_715));
        times_sigmoid(x, x.mul(x).mul_add(cubic, linear).mul(x))
    }
}

/// `x · Φ(x)` with `Φ(x) = (1 + erf(x / √2)) / 2`.
///
/// It is `max(x, 0) − |x| Q(|x|)` with the tail `Q(a) = e^(−a²/2) (c₁ t + … + c₈ t⁸)`, `t = 1 / (1 +
/// p a)`: the form of Hastings (1955; Abramowitz and Stegun 7.1.26), with more terms and with `p`
/// and the coefficients fitted to `erfc` in double precision for the least relative error over
/// 0..12, 8e-8. So small results keep their digits too; rounding of the exponent adds `a²` times 6e-8.
#[inline(always)]
#[allow(clippy::excessive_precision)]
unsafe fn times_normal<V: Lanes>(x: V) -> V {
    const P: f32 = 0.3;
    const C: [f32; 8] = [
        0.119_616_27,
        0.120_949_075,
        0.098_719_217,
        0.132_440_19,
        -0.060_919_918,
        0.214_132_74,
        -0.161_679_104,
        0.036_741_495,
    ];
    // SAFETY: the caller has the instruction set.
    unsafe {
        let zero = V::splat(0.0);
        let magnitude = x.max(zero.sub(x));
        let one = V::splat(1.0);
        let t = magnitude.mul_add(V::splat(P), one).reciprocal();
        let mut tail = V::splat(C[7]);
        for c in C[..7].iter().rev() {
            tail = tail.mul_add(t, V::splat(*c));
        }
        // The bound keeps the exponent finite; the tail is nothing before it.
        let e = x.mul(x).mul(V::splat(-0.5 * LOG2_E)).max(V::splat(-126.0)).exp2();
        x.max(zero).sub(magnitude.mul(tail.mul(t)).mul(e))
    }
}

/// An activation of all elements, and its product with others.
macro_rules! activations {
    ($($of:ident: $all:ident, $all_kernel:ident, $gated:ident, $gated_kernel:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $all_kernel<V: Lanes>(x: *mut f32, len: usize) {
            // SAFETY: `len` elements, by the caller.
            unsafe {
                for i in (0..len).step_by(LANES) {
                    $of(V::load(x.add(i))).store(x.add(i));
                }
            }
        }
        dispatch! { unsafe fn $all(x: *mut f32, len: usize) => $all_kernel; }
        #[inline(always)]
        unsafe fn $gated_kernel<V: Lanes>(
            gate: *const f32, up: *const f32, out: *mut f32, len: usize,
        ) {
            // SAFETY: `len` elements each, by the caller.
            unsafe {
                for i in (0..len).step_by(LANES) {
                    $of(V::load(gate.add(i))).mul(V::load(up.add(i))).store(out.add(i));
                }
            }
        }
        dispatch! {
            unsafe fn $gated(
                gate: *const f32, up: *const f32, out: *mut f32, len: usize,
            ) => $gated_kernel;
        }
    )*};
}
activations! {
    silu: silu_all, silu_all_kernel, silu_gated, silu_gated_kernel;
    gelu_tanh: gelu_tanh_all, gelu_tanh_all_kernel, gelu_tanh_gated, gelu_tanh_gated_kernel;
    times_normal: gelu_all, gelu_all_kernel, gelu_gated, gelu_gated_kernel;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Isa;
    use super::*;

    /// The normal distribution's integral, by the series of positive terms (Abramowitz and Stegun
    /// 26.2.11).
    fn normal(x: f64) -> f64 {
        if x.abs() > 12.0 {
            return if x > 0.0 { 1.0 } else { 0.0 };
        }
        let (mut term, mut sum, mut odd) = (x, x, 1.0);
        while term.abs() > sum.abs() * 1e-18 {
            odd += 2.0;
            term *= x * x / odd;
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
    }

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
        fn layer_norm_is_its_formula(
            x in prop::collection::vec(-8f32..8.0, 1usize..40).prop_map(|x| x.repeat(16)),
            offset in -9f32..9.0, eps in 1e-12f32..1e-3,
        ) {
            let x: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + offset + (i % 3) as f32).collect();
            let weight: Vec<f32> = (0..x.len()).map(|i| 0.5 + (i % 7) as f32 * 0.1).collect();
            let bias: Vec<f32> = (0..x.len()).map(|i| (i % 5) as f32 - 2.0).collect();
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
            let variance =
                x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / x.len() as f64;
            for (isa, biased) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
                let bias = biased.then_some(&bias[..]);
                let mut out = vec![0.0; x.len()];
                layer_norm(isa, &x, &weight, bias, eps, &mut out);
                for i in 0..x.len() {
                    let expected = (f64::from(x[i]) - mean) / (variance + f64::from(eps)).sqrt()
                        * f64::from(weight[i]) + bias.map_or(0.0, |bias| f64::from(bias[i]));
                    prop_assert!((f64::from(out[i]) - expected).abs() < 1e-5, "{isa:?}: {} {expected}", out[i]);
                }
                let mut replaced = x.clone();
                layer_norm_in_place(isa, &mut replaced, &weight, bias, eps);
                prop_assert_eq!(&replaced, &out);
            }
        }

        #[test]
        fn gelu_is_its_definition(x in prop::collection::vec(-9f32..9.0, 48)) {
            for isa in Isa::available() {
                let mut out = x.clone();
                gelu(isa, &mut out);
                for (&x, &out) in x.iter().zip(&out) {
                    let (x, out) = (f64::from(x), f64::from(out));
                    let expected = x * normal(x);
                    let error = (out - expected).abs();
                    prop_assert!(error <= 5e-7 * expected.abs() + 1e-8, "{isa:?} {x}: {out} {expected}");
                }
            }
        }

        #[test]
        fn gated_activations_are_their_formulas(
            gate in prop::collection::vec(-120f32..120.0, 48), scale in -3f32..3.0,
        ) {
            let up: Vec<f32> = gate.iter().rev().map(|x| x * scale).collect();
            for (isa, i) in Isa::available().into_iter().flat_map(|isa| (0..48).map(move |i| (isa, i))) {
                let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                let mut out = vec![0.0; gate.len()];
                gated(isa, Activation::Silu, &gate, &up, &mut out);
                prop_assert!(close(out[i], g / (1.0 + (-g).exp()) * u), "{isa:?}: {}", out[i]);
                gated(isa, Activation::GeluTanh, &gate, &up, &mut out);
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                let expected = 0.5 * g * (1.0 + inner.tanh()) * u;
                prop_assert!(close(out[i], expected), "{isa:?}: {} {expected}", out[i]);
                gated(isa, Activation::Gelu, &gate, &up, &mut out);
                let expected = g * normal(g) * u;
                prop_assert!(close(out[i], expected), "{isa:?}: {} {expected}", out[i]);
            }
        }
    }

    #[test]
    fn gelu_passes_on_what_is_not_a_number_and_keeps_large_values() {
        for isa in Isa::available() {
            let mut x = [1.0; 16];
            (x[0], x[1], x[2], x[3]) = (f32::NAN, 1e30, -1e30, 0.0);
            gelu(isa, &mut x);
            assert!(x[0].is_nan(), "{isa:?}");
            assert!(x[1] == 1e30 && x[2].abs() < 1e-30 && x[3] == 0.0, "{isa:?}: {x:?}");
        }
    }
}
