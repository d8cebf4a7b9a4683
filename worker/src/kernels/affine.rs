//! Parameters that go together: a product and its bias, a layer norm and its scale.

use super::cpu::Isa;
use super::elementwise::{layer_norm, layer_norm_in_place};
use super::linear::{Linear, Product};

/// `y = x Wᵀ + b`.
pub struct Affine {
    /// `W`.
    pub weight: Linear,
    /// `b`.
    pub bias: Option<Vec<f32>>,
}

impl Affine {
    /// The product that overwrites `y`.
    pub fn set<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        self.weight.set(y).bias(self.bias.as_deref())
    }

    /// The product that is added to `y`.
    pub fn add_to<'a>(&'a self, y: &'a mut [f32]) -> Product<'a> {
        self.weight.add_to(y).bias(self.bias.as_deref())
    }
}

/// Layer normalization (Ba et al. 2016).
pub struct LayerNorm {
    /// What each element is multiplied with.
    pub weight: Vec<f32>,
    /// What is added to it then.
    pub bias: Option<Vec<f32>>,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// Of one row.
    pub fn apply(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        layer_norm(isa, x, &self.weight, self.bias.as_deref(), self.eps, out);
    }

    /// Of a row that it replaces.
    pub fn in_place(&self, isa: Isa, x: &mut [f32]) {
        layer_norm_in_place(isa, x, &self.weight, self.bias.as_deref(), self.eps);
    }
}
