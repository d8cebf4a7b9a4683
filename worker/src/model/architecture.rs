//! What the supported architectures are, and how they differ: read from a GGUF's metadata.
//!
//! All are decoders of the Llama kind (Touvron et al. 2023). Where one differs from another by the
//! presence of a tensor (biases of Qwen2, query and key norms of Qwen3 and Gemma 3, norms after
//! attention and MLP of Gemma 3), the tensor tells; the rest is here.

use crate::gguf::{Gguf, LoadError};
use crate::kernels::dot::BLOCK;
use crate::kernels::elementwise::Activation;
use crate::kernels::lanes::LANES;
use crate::kernels::rope::Pairs;

/// What does not follow from a file's metadata or tensors.
struct Architecture {
    /// `general.architecture`.
    name: &'static str,
    pairs: Pairs,
    activation: Activation,
    /// Embeddings are multiplied by the root of their width.
    scaled_embedding: bool,
    /// Of so many layers the last sees all positions, the others a window.
    window_period: Option<usize>,
    /// RoPE base of the layers with a window.
    window_rope_theta: f32,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    pairs: Pairs::Neighbours,
    activation: Activation::Silu,
    scaled_embedding: false,
    window_period: None,
    window_rope_theta: 0.0,
};

/// Mistral models are `llama` in GGUF.
const ARCHITECTURES: [Architecture; 4] = [
    LLAMA,
    Architecture { name: "qwen2", pairs: Pairs::Halves, ..LLAMA },
    Architecture { name: "qwen3", pairs: Pairs::Halves, ..LLAMA },
    Architecture {
        name: "gemma3",
        pairs: Pairs::Halves,
        activation: Activation::GeluTanh,
        scaled_embedding: true,
        window_period: Some(6),
        window_rope_theta: 10_000.0,
    },
];

/// A model's shape.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// `general.architecture` of the GGUF, such as `llama`.
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
    /// Reads and checks the metadata of a file.
    pub fn read(gguf: &Gguf) -> Result<Self, LoadError> {
        let name = gguf.optional_str("general.architecture")?.unwrap_or_default();
        let Some(architecture) = ARCHITECTURES.iter().find(|known| known.name == name) else {
            let known: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
            return Err(gguf.unsupported(format!(
                "architecture `{name}` is not supported; supported: {}",
                known.join(", ")
            )));
        };
        let key = |rest: &str| format!("{name}.{rest}");
        let hidden = gguf.usize(&key("embedding_length"))?;
        let heads = gguf.usize(&key("attention.head_count"))?;
        let kv_heads = gguf.optional_usize(&key("attention.head_count_kv"))?.unwrap_or(heads);
        let head_dim = gguf.optional_usize(&key("attention.key_length"))?;
        if heads == 0
            || kv_heads == 0
            || heads % kv_heads != 0
            || head_dim.is_none() && hidden % heads != 0
        {
            return Err(gguf.corrupt(format!(
                "{hidden} dimensions, {heads} heads and {kv_heads} key/value heads do not divide"
            )));
        }
        let head_dim = head_dim.unwrap_or(hidden / heads);
        let values = gguf.optional_usize(&key("attention.value_length"))?.unwrap_or(head_dim);
        let rotated = gguf.optional_usize(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        if head_dim % LANES != 0
            || heads * head_dim % BLOCK != 0
            || hidden % BLOCK != 0
            || rotated != head_dim
            || values != head_dim
        {
            return Err(gguf.unsupported(format!(
                "heads of {head_dim} dimensions, {rotated} of them rotated, and values of {values}, \
                 in {hidden}; supported: equal multiples of 16, all rotated"
            )));
        }
        if let Some(scaling) = gguf.optional_str(&key("rope.scaling.type"))?
            && scaling != "none"
        {
            return Err(gguf.unsupported(format!("RoPE scaling `{scaling}` is not supported")));
        }
        let positions = gguf.optional_usize(&key("attention.sliding_window"))?;
        let window = architecture.window_period.zip(positions).map(|(period, positions)| Window {
            positions,
            period,
            rope_theta: architecture.window_rope_theta,
        });
        let epsilon = gguf.optional_f32(&key("attention.layer_norm_rms_epsilon"))?;
        Ok(Self {
            architecture: name.to_owned(),
            layers: gguf.usize(&key("block_count"))?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn: gguf.usize(&key("feed_forward_length"))?,
            vocab: gguf.tensor("token_embd.weight")?.dims.first().copied().unwrap_or(0),
            max_context: gguf.usize(&key("context_length"))?,
            rope_theta: gguf.optional_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            pairs: architecture.pairs,
            rms_eps: epsilon.unwrap_or(1e-5),
            activation: architecture.activation,
            embedding_scale: match architecture.scaled_embedding {
                true => (hidden as f32).sqrt(),
                false => 1.0,
            },
            window,
        })
    }

    /// The window of a layer; `None` when it sees all positions.
    pub fn window_of(&self, layer: usize) -> Option<Window> {
        self.window.filter(|window| !(layer + 1).is_multiple_of(window.period))
    }
}
