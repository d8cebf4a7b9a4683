//! A model's shape, and what follows from it.

use crate::Error;

/// Widths of a head that attention is compiled for.
pub const HEAD_DIMS: [usize; 6] = [32, 48, 64, 80, 96, 128];

/// Query heads that share a key/value head, at most.
pub(crate) const MAX_GROUP: usize = 16;

/// The shape of a decoder of the Llama kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head, one of [`HEAD_DIMS`].
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Rows of the embedding and of the output projection.
    pub vocab: usize,
    /// RoPE base.
    pub rope_theta: f32,
    /// Whether RoPE rotates the dimensions `2i` and `2i + 1` together; else `i` and `i + d / 2`.
    pub interleaved: bool,
    /// Epsilon of RMSNorm.
    pub rms_eps: f32,
    /// Positions of one KV block.
    pub block_size: usize,
}

impl Shape {
    /// Refuses shapes that the kernels do not compute.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Unsupported(why));
        let Self { layers, hidden, heads, kv_heads, head_dim, ffn, vocab, block_size, .. } = *self;
        if layers == 0 || vocab == 0 || block_size == 0 {
            return refuse("a model without layers, tokens or block size".into());
        }
        if !HEAD_DIMS.contains(&head_dim) {
            return refuse(format!("heads of {head_dim} dimensions (supported: {HEAD_DIMS:?})"));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads / kv_heads > MAX_GROUP {
            return refuse(format!(
                "{heads} heads and {kv_heads} key/value heads (up to {MAX_GROUP} share one)"
            ));
        }
        // Rows of weights are read 16 bytes at a time, 32 elements by a quarter of a warp.
        for (what, width) in [("hidden", hidden), ("attention", heads * head_dim), ("MLP", ffn)] {
            if width == 0 || !width.is_multiple_of(32) {
                return refuse(format!("{what} width {width} (supported: multiples of 32)"));
            }
        }
        Ok(())
    }

    /// Width of all queries of a position.
    pub(crate) fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all keys of a position.
    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of queries, keys and values of a position.
    pub(crate) fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Bytes of one KV block over all layers: `[layer][keys, values][kv_head][slot][head_dim]` in
    /// bf16.
    pub fn block_bytes(&self) -> usize {
        self.layers * 2 * self.kv_width() * self.block_size * 2
    }

    /// Weights of all layers and the head, in elements: what a decode step reads of them.
    pub fn streamed_weights(&self) -> usize {
        let layer = (self.qkv_width() + self.q_width() + 3 * self.ffn) * self.hidden;
        self.layers * layer + self.vocab * self.hidden
    }
}
