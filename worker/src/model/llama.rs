//! Llama (Touvron et al. 2023) from GGUF: the architecture `llama`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_proto::TokenizerBundle;
use baton_proto::v1::{KvDtype, KvLayout};

use super::{Model, ModelConfig, ModelError, SequenceSlice};
use crate::gguf::{Gguf, LoadError};
use crate::kernels::activations::Activations;
use crate::kernels::attention::{self, Queries};
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::{Rope, rms_norm, swiglu};
use crate::kernels::linear::{Linear, multiply};
use crate::kernels::page::{self, Shape};
use crate::kernels::pool::ThreadPool;
use crate::kernels::quant;
use crate::kv::pool::KvPool;
use crate::tokenizer;

/// A model and what else its file tells.
pub struct LoadedModel {
    /// The weights and the forward pass.
    pub model: Box<dyn Model>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// For the gateways.
    pub tokenizer: TokenizerBundle,
    /// Equal for equal files.
    pub weights_digest: String,
}

/// Loads a GGUF file to run on `threads` threads.
///
/// `max_positions` bounds the context; `None` takes the model's own.
pub fn load(
    path: &Path,
    threads: usize,
    max_positions: Option<usize>,
) -> Result<LoadedModel, LoadError> {
    let gguf = Gguf::open(path)?;
    let model = Llama::new(&gguf, threads, max_positions)?;
    Ok(LoadedModel {
        model: Box::new(model),
        eos_token_ids: tokenizer::eos_token_ids(&gguf)?,
        tokenizer: tokenizer::bundle(&gguf)?,
        weights_digest: gguf.digest(),
    })
}

/// The layout of a model's KV blocks.
pub fn kv_layout(config: &ModelConfig, block_size: usize) -> KvLayout {
    KvLayout {
        block_size: block_size as u32,
        layers: config.layers as u32,
        kv_heads: config.kv_heads as u32,
        head_dim: config.head_dim as u32,
        dtype: KvDtype::I16.into(),
        block_bytes: (config.layers * shape(config, block_size).layer_bytes()) as u64,
    }
}

fn shape(config: &ModelConfig, block_size: usize) -> Shape {
    let &ModelConfig { heads, kv_heads, head_dim, .. } = config;
    Shape { heads, kv_heads, head_dim, block_size }
}

struct Layer {
    attention_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    ffn_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Llama {
    config: ModelConfig,
    isa: Isa,
    threads: ThreadPool,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// Absent when the embedding is also the output projection.
    head: Option<Linear>,
    rope: Rope,
    scratch: Scratch,
    interrupt: Arc<AtomicBool>,
}

/// Activations of one step. Grown to the largest step seen and kept.
#[derive(Default)]
struct Scratch {
    /// The residual stream, `rows × hidden`.
    x: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What the next product multiplies.
    input: Activations,
    /// Of each row, its sequence in the batch and its position in the sequence.
    places: Vec<(u32, u32)>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
    attention: attention::Scratch,
}

impl Llama {
    fn new(gguf: &Gguf, threads: usize, max_positions: Option<usize>) -> Result<Self, LoadError> {
        let architecture = gguf.optional_str("general.architecture")?.unwrap_or_default();
        if architecture != "llama" {
            return Err(gguf.unsupported(format!(
                "architecture `{architecture}` is not supported; supported: llama"
            )));
        }
        let config = config(gguf)?;
        let linear = |name: &str, outputs: usize, inputs: usize| {
            let tensor = gguf.tensor(name)?;
            if tensor.dims != [outputs, inputs] {
                return Err(gguf.corrupt(format!(
                    "tensor {name} is {:?}, expected [{outputs}, {inputs}]",
                    tensor.dims
                )));
            }
            let dtype = tensor.dtype;
            Linear::new(tensor).ok_or_else(|| {
                gguf.unsupported(format!("tensor {name}: {dtype:?} rows of {inputs} elements"))
            })
        };
        let vector = |name: &str, len: usize| {
            let tensor = gguf.tensor(name)?;
            if tensor.dims != [len] || !quant::supported(tensor.dtype) {
                return Err(gguf.corrupt(format!(
                    "tensor {name} is {:?} {:?}, expected [{len}]",
                    tensor.dtype, tensor.dims
                )));
            }
            let mut values = vec![0.0; len];
            quant::decode_row(tensor.dtype, tensor.bytes(), &mut values);
            Ok(values)
        };
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layers = (0..config.layers)
            .map(|i| {
                Ok(Layer {
                    attention_norm: vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                    query: linear(&format!("blk.{i}.attn_q.weight"), q, hidden)?,
                    key: linear(&format!("blk.{i}.attn_k.weight"), kv, hidden)?,
                    value: linear(&format!("blk.{i}.attn_v.weight"), kv, hidden)?,
                    output: linear(&format!("blk.{i}.attn_output.weight"), hidden, q)?,
                    ffn_norm: vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                    gate: linear(&format!("blk.{i}.ffn_gate.weight"), ffn, hidden)?,
                    up: linear(&format!("blk.{i}.ffn_up.weight"), ffn, hidden)?,
                    down: linear(&format!("blk.{i}.ffn_down.weight"), hidden, ffn)?,
                })
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        let factors = if gguf.has_tensor("rope_freqs.weight") {
            Some(vector("rope_freqs.weight", config.head_dim / 2)?)
        } else {
            None
        };
        let positions = max_positions.map_or(config.max_context, |max| max.min(config.max_context));
        Ok(Self {
            isa: Isa::best(),
            threads: ThreadPool::new(threads)
                .map_err(|error| gguf.unsupported(format!("cannot start threads: {error}")))?,
            embedding: linear("token_embd.weight", config.vocab, hidden)?,
            layers,
            norm: vector("output_norm.weight", hidden)?,
            head: if gguf.has_tensor("output.weight") {
                Some(linear("output.weight", config.vocab, hidden)?)
            } else {
                None
            },
            rope: Rope::new(positions, config.head_dim, config.rope_theta, factors.as_deref()),
            scratch: Scratch::default(),
            interrupt: Arc::default(),
            config,
        })
    }
}

fn config(gguf: &Gguf) -> Result<ModelConfig, LoadError> {
    let hidden = gguf.usize("llama.embedding_length")?;
    let heads = gguf.usize("llama.attention.head_count")?;
    let kv_heads = gguf.optional_usize("llama.attention.head_count_kv")?.unwrap_or(heads);
    if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 || hidden % heads != 0 {
        return Err(gguf.corrupt(format!(
            "{hidden} dimensions, {heads} heads and {kv_heads} key/value heads do not divide"
        )));
    }
    let head_dim = gguf.optional_usize("llama.attention.key_length")?.unwrap_or(hidden / heads);
    let rotated = gguf.optional_usize("llama.rope.dimension_count")?.unwrap_or(head_dim);
    if head_dim % 16 != 0 || hidden % 32 != 0 || rotated != head_dim {
        return Err(gguf.unsupported(format!(
            "heads of {head_dim} dimensions, {rotated} of them rotated, in {hidden}; supported: \
             multiples of 16, all rotated"
        )));
    }
    if let Some(scaling) = gguf.optional_str("llama.rope.scaling.type")?
        && scaling != "none"
    {
        return Err(gguf.unsupported(format!("RoPE scaling `{scaling}` is not supported")));
    }
    let embedding = gguf.tensor("token_embd.weight")?;
    Ok(ModelConfig {
        architecture: "llama".into(),
        layers: gguf.usize("llama.block_count")?,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: gguf.usize("llama.feed_forward_length")?,
        vocab: embedding.dims.first().copied().unwrap_or(0),
        max_context: gguf.usize("llama.context_length")?,
        rope_theta: gguf.optional_f32("llama.rope.freq_base")?.unwrap_or(10_000.0),
        rms_eps: gguf.optional_f32("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
    })
}

impl Model for Llama {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Self { config, isa, threads, embedding, layers, norm, head, rope, scratch, interrupt } =
            self;
        let isa = *isa;
        let rows: usize = batch.iter().map(|slice| slice.tokens.len()).sum();
        let (hidden, head_dim) = (config.hidden, config.head_dim);
        let (q_width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        let shape = shape(config, kv.layout().block_size as usize);
        let Scratch {
            x,
            query,
            key,
            value,
            attended,
            gate,
            up,
            input,
            places,
            wanted,
            attention: buffers,
        } = scratch;
        x.resize(rows * hidden, 0.0);
        query.resize(rows * q_width, 0.0);
        key.resize(rows * kv_width, 0.0);
        value.resize(rows * kv_width, 0.0);
        attended.resize(rows * q_width, 0.0);
        gate.resize(rows * config.ffn, 0.0);
        up.resize(rows * config.ffn, 0.0);

        let tokens = batch.iter().flat_map(|slice| slice.tokens);
        for (&token, x) in tokens.zip(x.chunks_exact_mut(hidden)) {
            if token as usize >= config.vocab {
                return Err(ModelError::TokenOutOfRange(token));
            }
            embedding.row(token as usize, x);
        }
        let mut row = 0;
        let queries: Vec<Queries<'_>> = batch
            .iter()
            .map(|slice| {
                let count = slice.tokens.len();
                row += count;
                Queries { row: row - count, count, start: slice.start, blocks: slice.blocks }
            })
            .collect();

        places.clear();
        for (i, q) in queries.iter().enumerate() {
            places.extend((q.start..q.start + q.count).map(|at| (i as u32, at as u32)));
        }

        // Looked at before each of the larger operations: with many rows and busy cores a layer
        // takes tens of milliseconds.
        let go_on = || match interrupt.load(Ordering::Relaxed) {
            true => Err(ModelError::Interrupted),
            false => Ok(()),
        };
        for (i, layer) in layers.iter().enumerate() {
            go_on()?;
            input.fill(isa, threads, rows, hidden, |row, out| {
                let x = &x[row * hidden..][..hidden];
                rms_norm(isa, x, &layer.attention_norm, config.rms_eps, out);
            });
            let products = [layer.query.set(query), layer.key.set(key), layer.value.set(value)];
            multiply(isa, threads, input, products);
            threads.for_rows((query, q_width), (key, kv_width), |row, query, key| {
                let (sequence, position) = places[row];
                let (blocks, position) = (queries[sequence as usize].blocks, position as usize);
                query.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                key.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                let value = &value[row * kv_width..][..kv_width];
                // SAFETY: the caller of `forward` owns the blocks that it writes, and rows have
                // places of their own in them.
                unsafe { page::store(kv, &shape, i, blocks, position, key, value) };
            });
            go_on()?;
            attention::attend(
                isa, threads, kv, &shape, i, None, &queries, buffers, query, attended,
            );
            input.fill(isa, threads, rows, q_width, |row, out| {
                out.copy_from_slice(&attended[row * q_width..][..q_width]);
            });
            multiply(isa, threads, input, [layer.output.add_to(x)]);
            input.fill(isa, threads, rows, hidden, |row, out| {
                let x = &x[row * hidden..][..hidden];
                rms_norm(isa, x, &layer.ffn_norm, config.rms_eps, out);
            });
            go_on()?;
            multiply(isa, threads, input, [layer.gate.set(gate), layer.up.set(up)]);
            go_on()?;
            let ffn = config.ffn;
            input.fill(isa, threads, rows, ffn, |row, out| {
                swiglu(isa, &gate[row * ffn..][..ffn], &up[row * ffn..][..ffn], out);
            });
            multiply(isa, threads, input, [layer.down.add_to(x)]);
        }

        // Only the rows whose logits are wanted go through the output projection.
        wanted.clear();
        let last = batch.iter().zip(&queries).filter(|(slice, _)| slice.logits);
        wanted.extend(last.map(|(_, q)| q.row + q.count - 1));
        input.fill(isa, threads, wanted.len(), hidden, |row, out| {
            rms_norm(isa, &x[wanted[row] * hidden..][..hidden], norm, config.rms_eps, out);
        });
        logits.resize(wanted.len() * config.vocab, 0.0);
        let head = head.as_ref().unwrap_or(embedding);
        multiply(isa, threads, input, [head.set(logits)]);
        Ok(())
    }
}
