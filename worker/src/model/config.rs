//! A model's shape, whatever kind of file it was read from.
//!
//! All supported models are decoders of the Llama kind (Touvron et al. 2023). Where one differs from
//! another by the presence of a tensor (biases of Qwen2, query and key norms of Qwen3 and Gemma 3,
//! norms after attention and MLP of Gemma 3), the tensor tells; the rest is here.

use crate::checkpoint::{Checkpoint, LoadError};
use crate::kernels::dot::BLOCK;
use crate::kernels::elementwise::Activation;
use crate::kernels::lanes::LANES;
use crate::kernels::rope::Pairs;

/// A model's shape.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Its name in GGUF, such as `llama`.
    pub architecture: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Rows of the output projection.
    pub vocab: usize,
    /// Context length that the model was trained for.
    pub max_context: usize,
    /// RoPE base.
    pub rope_theta: f32,
    /// Which dimensions RoPE rotates together.
    pub pairs: Pairs,
    /// Epsilon of RMSNorm.
    pub rms_eps: f32,
    /// Of the MLP's gate.
    pub activation: Activation,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
    /// Layers that do not see all positions.
    pub window: Option<Window>,
}

/// Sliding-window attention.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Positions that a layer sees, its own among them.
    pub positions: usize,
    /// Every so many layers one sees all.
    pub period: usize,
    /// RoPE base of layers with a window.
    pub rope_theta: f32,
}

impl ModelConfig {
    /// Refuses shapes that the kernels do not compute.
    pub(crate) fn checked(self, of: &dyn Checkpoint) -> Result<Self, LoadError> {
        let Self { hidden, heads, kv_heads, head_dim, .. } = self;
        if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            return Err(
                of.corrupt(format!("{heads} heads and {kv_heads} key/value heads do not divide"))
            );
        }
        let fits = |len: usize, of: usize| len > 0 && len.is_multiple_of(of);
        if fits(head_dim, LANES) && fits(heads * head_dim, BLOCK) && fits(hidden, BLOCK) {
            return Ok(self);
        }
        Err(of.unsupported(format!(
            "{heads} heads of {head_dim} dimensions in {hidden}; supported: heads of multiples of \
             {LANES} dimensions, {BLOCK} in all"
        )))
    }

    /// The window of a layer; `None` when it sees all positions.
    pub fn window_of(&self, layer: usize) -> Option<Window> {
        self.window.filter(|window| !(layer + 1).is_multiple_of(window.period))
    }
}
