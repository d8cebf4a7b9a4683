//! The architectures that GGUF files name, and their metadata.

use super::gguf::Gguf;
use super::{Checkpoint, LoadError};
use crate::kernels::elementwise::Activation;
use crate::kernels::rope::Pairs;
use crate::model::{ModelConfig, Window};

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

/// Reads and checks the metadata of a file.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig, LoadError> {
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
    let head_dim = head_dim.unwrap_or(hidden / heads.max(1));
    let values = gguf.optional_usize(&key("attention.value_length"))?.unwrap_or(head_dim);
    let rotated = gguf.optional_usize(&key("rope.dimension_count"))?.unwrap_or(head_dim);
    if rotated != head_dim || values != head_dim {
        return Err(gguf.unsupported(format!(
            "heads of {head_dim} dimensions, {rotated} of them rotated, and values of {values}; \
             supported: equal ones, all rotated"
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
    let config = ModelConfig {
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
    };
    config.checked(gguf)
}
