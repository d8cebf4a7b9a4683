//! The architectures that GGUF files name, and their metadata.

use super::gguf::Gguf;
use super::sentencepiece::flag;
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
    refuse_unread(gguf, name)?;
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

/// Refuses what would change the computation and is not read.
fn refuse_unread(gguf: &Gguf, name: &str) -> Result<(), LoadError> {
    let key = |rest: &str| format!("{name}.{rest}");
    let scaling = gguf.optional_str(&key("rope.scaling.type"))?;
    if let Some(scaling) = scaling.filter(|scaling| *scaling != "none") {
        return Err(gguf.unsupported(format!("RoPE scaling `{scaling}` is not supported")));
    }
    let causal = key("attention.causal");
    if flag(gguf, &causal) == Some(false) {
        return Err(gguf.unsupported(format!(
            "`{causal}` is false: it asks for attention to later tokens, which decoders are not \
             run with"
        )));
    }
    let mut neutral = vec![("attn_logit_softcapping", 0.0), ("final_logit_softcapping", 0.0)];
    // A factor without a type is of linear scaling, and with `none` is of nothing: llama-model.cpp
    // of llama.cpp.
    if scaling.is_none() {
        neutral.extend([("rope.scaling.factor", 1.0), ("rope.scale_linear", 1.0)]);
    }
    for (rest, neutral) in neutral {
        let key = key(rest);
        let value = gguf.optional_f32(&key)?.unwrap_or(neutral);
        if value != 0.0 && value != neutral {
            return Err(gguf.unsupported(format!("`{key}` is {value}, which is not supported")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::checkpoint::gguf::tests::of;

    #[test]
    fn what_would_be_computed_otherwise_is_refused_by_name() {
        let check = |metadata: &[(&str, Value)]| {
            refuse_unread(&of(metadata), "gemma3").map_err(|error| error.to_string())
        };
        let kind = |name: &str| ("gemma3.rope.scaling.type", Value::String(name.to_owned()));
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[("llama.rope.scaling.factor", Value::F32(8.0))]), Ok(()));
        for (key, value, refused) in [
            ("gemma3.attention.causal", Value::Bool(true), false),
            ("gemma3.attention.causal", Value::Bool(false), true),
            ("gemma3.attn_logit_softcapping", Value::F32(50.0), true),
            ("gemma3.final_logit_softcapping", Value::F32(0.0), false),
            ("gemma3.final_logit_softcapping", Value::F32(30.0), true),
            ("gemma3.rope.scaling.factor", Value::F32(0.0), false),
            ("gemma3.rope.scaling.factor", Value::F32(1.0), false),
            ("gemma3.rope.scaling.factor", Value::F32(8.0), true),
            ("gemma3.rope.scale_linear", Value::F32(1.0), false),
            ("gemma3.rope.scale_linear", Value::F32(2.0), true),
        ] {
            match check(&[(key, value.clone())]) {
                Ok(()) => assert!(!refused, "{key} {value:?}"),
                Err(said) => assert!(refused && said.contains(key), "{key} {value:?}: {said}"),
            }
        }
        let factor = ("gemma3.rope.scaling.factor", Value::F32(8.0));
        assert_eq!(check(&[kind("none"), factor.clone()]), Ok(()));
        assert!(check(&[kind("linear"), factor]).is_err_and(|said| said.contains("`linear`")));
    }
}
