//! An encoder's shape.
//!
//! All are encoders of the kind of BERT (Devlin et al. 2018). RoBERTa (Liu et al. 2019) counts
//! positions from another start; ModernBERT (Warner et al. 2024) norms what goes into attention and
//! MLP instead of what comes out, rotates positions, and sees a window only in most layers.

use crate::kernels::dot::BLOCK;
use crate::kernels::lanes::LANES;

/// An encoder's shape.
#[derive(Clone, Debug)]
pub struct EncoderConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Tokens of the longest text.
    pub max_tokens: usize,
    /// Segments that a token can belong to; 0 when the model knows none.
    pub types: usize,
    /// How the model knows where a token stands.
    pub positions: Positions,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Of each layer, how far a token sees to both sides; `None`: everything.
    pub windows: Vec<Option<usize>>,
}

/// How a model knows where a token stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    /// A learned vector for each position; the first token has this one.
    Learned {
        /// Row of the first token.
        first: usize,
    },
    /// RoPE (Su et al. 2021).
    Rotary {
        /// Base of layers that see everything.
        theta: f32,
        /// Base of layers with a window.
        window_theta: f32,
    },
}

impl EncoderConfig {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// What the kernels do not compute, if anything.
    pub(crate) fn check(&self) -> Result<(), String> {
        let &Self { hidden, heads, ffn, max_tokens, .. } = self;
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            return Err(format!("{heads} heads do not divide {hidden} dimensions"));
        }
        if max_tokens == 0 {
            return Err("the model has no positions".into());
        }
        let fits = |len: usize, of: usize| len > 0 && len.is_multiple_of(of);
        if fits(self.head_dim(), LANES) && fits(hidden, BLOCK) && fits(ffn, BLOCK) {
            return Ok(());
        }
        Err(format!(
            "{heads} heads and an MLP of {ffn} in {hidden} dimensions; supported: heads of multiples \
             of {LANES} dimensions, the others of {BLOCK}"
        ))
    }
}
