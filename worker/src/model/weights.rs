//! A decoder's weights.

use super::config::ModelConfig;
use crate::checkpoint::{Checkpoint, LoadError};
use crate::kernels::arena::Arena;
use crate::kernels::linear::Linear;
use crate::kernels::pool::ThreadPool;

/// All weights.
pub(super) struct Weights {
    pub(super) embedding: Linear,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// Absent when the embedding is also the output projection.
    pub(super) head: Option<Linear>,
    /// Divide the frequencies of RoPE.
    pub(super) rope_factors: Option<Vec<f32>>,
}

/// A layer's weights. What is optional depends on the architecture.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) output: Linear,
    /// Of the attention's output, before it is added to the residual stream.
    pub(super) post_attention_norm: Option<Vec<f32>>,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
    /// Of the MLP's output, before it is added to the residual stream.
    pub(super) post_ffn_norm: Option<Vec<f32>>,
}

/// Makes queries, keys or values of the residual stream.
pub(super) struct Projection {
    pub(super) weight: Linear,
    pub(super) bias: Option<Vec<f32>>,
    /// RMSNorm of each head.
    pub(super) norm: Option<Vec<f32>>,
}

/// Biases that nothing adds: of Llama with `attention_bias` or `mlp_bias`.
const UNREAD: [&str; 4] = ["attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"];

/// Refuses a layer that has one of them.
pub(super) fn refuse_biases(checkpoint: &dyn Checkpoint, layer: usize) -> Result<(), LoadError> {
    let mut names = UNREAD.iter().map(|rest| format!("blk.{layer}.{rest}"));
    match names.find(|name| checkpoint.has_tensor(name)) {
        Some(name) => Err(checkpoint.unsupported(format!(
            "tensor {name}: biases of the attention's output and of the MLP are not supported"
        ))),
        None => Ok(()),
    }
}

impl Weights {
    /// Reads and repacks all tensors, on the pool's threads.
    pub(super) fn read(
        checkpoint: &dyn Checkpoint,
        config: &ModelConfig,
        threads: &mut ThreadPool,
    ) -> Result<Self, LoadError> {
        let mut reader = Reader { checkpoint, threads, arena: Arena::default() };
        let &ModelConfig { hidden, ffn, head_dim, vocab, .. } = config;
        let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
        let layers = (0..config.layers)
            .map(|i| {
                refuse_biases(checkpoint, i)?;
                let name = |rest: &str| format!("blk.{i}.{rest}");
                let mut projection = |which: &str, outputs: usize| {
                    Ok::<_, LoadError>(Projection {
                        weight: reader.linear(
                            &name(&format!("{which}.weight")),
                            outputs,
                            hidden,
                        )?,
                        bias: checkpoint
                            .optional_vector(&name(&format!("{which}.bias")), outputs)?,
                        norm: checkpoint
                            .optional_norm(&name(&format!("{which}_norm.weight")), head_dim)?,
                    })
                };
                Ok(Layer {
                    query: projection("attn_q", q)?,
                    key: projection("attn_k", kv)?,
                    value: projection("attn_v", kv)?,
                    attention_norm: checkpoint.norm(&name("attn_norm.weight"), hidden)?,
                    output: reader.linear(&name("attn_output.weight"), hidden, q)?,
                    post_attention_norm: checkpoint
                        .optional_norm(&name("post_attention_norm.weight"), hidden)?,
                    ffn_norm: checkpoint.norm(&name("ffn_norm.weight"), hidden)?,
                    gate: reader.linear(&name("ffn_gate.weight"), ffn, hidden)?,
                    up: reader.linear(&name("ffn_up.weight"), ffn, hidden)?,
                    down: reader.linear(&name("ffn_down.weight"), hidden, ffn)?,
                    post_ffn_norm: checkpoint
                        .optional_norm(&name("post_ffw_norm.weight"), hidden)?,
                })
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        Ok(Self {
            embedding: reader.linear("token_embd.weight", vocab, hidden)?,
            layers,
            norm: checkpoint.norm("output_norm.weight", hidden)?,
            head: match checkpoint.has_tensor("output.weight") {
                true => Some(reader.linear("output.weight", vocab, hidden)?),
                false => None,
            },
            rope_factors: checkpoint.optional_vector("rope_freqs.weight", head_dim / 2)?,
        })
    }
}

pub(super) struct Reader<'a> {
    pub(super) checkpoint: &'a dyn Checkpoint,
    pub(super) threads: &'a mut ThreadPool,
    pub(super) arena: Arena,
}

impl Reader<'_> {
    pub(super) fn linear(
        &mut self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Linear, LoadError> {
        let tensor = self.checkpoint.matrix(name, outputs, inputs)?;
        let linear =
            Linear::new(self.threads, &mut self.arena, tensor.clone()).ok_or_else(|| {
                let dtype = tensor.dtype;
                self.checkpoint
                    .unsupported(format!("tensor {name}: {dtype:?} rows of {inputs} elements"))
            })?;
        if linear.is_repacked() {
            tensor.forget();
        }
        Ok(linear)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use baton_proto::TokenizerBundle;

    use super::*;
    use crate::checkpoint::TensorBytes;

    /// Has a tensor of one name.
    struct Named(&'static str);

    impl Named {
        fn nothing<T>(&self) -> Result<T, LoadError> {
            Err(self.corrupt("there is nothing to read".into()))
        }
    }

    impl Checkpoint for Named {
        fn path(&self) -> &Path {
            Path::new("named")
        }

        fn config(&self) -> Result<ModelConfig, LoadError> {
            self.nothing()
        }

        fn has_tensor(&self, name: &str) -> bool {
            name == self.0
        }

        fn tensor(&self, _name: &str) -> Result<TensorBytes, LoadError> {
            self.nothing()
        }

        fn tokenizer(&self) -> Result<TokenizerBundle, LoadError> {
            self.nothing()
        }

        fn eos_token_ids(&self) -> Result<Vec<u32>, LoadError> {
            self.nothing()
        }

        fn digest(&self) -> String {
            String::new()
        }
    }

    #[test]
    fn biases_that_nothing_adds_are_refused_by_name() {
        for name in ["blk.3.attn_output.bias", "blk.3.ffn_gate.bias", "blk.3.ffn_down.bias"] {
            let error = refuse_biases(&Named(name), 3).unwrap_err();
            assert!(
                matches!(&error, LoadError::Unsupported { reason, .. } if reason.contains(name))
            );
            assert!(refuse_biases(&Named(name), 2).is_ok());
        }
        // Those of Qwen2 are added.
        assert!(refuse_biases(&Named("blk.3.attn_q.bias"), 3).is_ok());
    }
}
