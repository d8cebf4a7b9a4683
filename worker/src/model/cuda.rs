//! Decoders on an NVIDIA GPU: their weights on the way there, and the seam to the engine.
//!
//! Weights are rounded to bf16 as they are loaded, whatever the file has; KV is bf16 too.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use baton_cuda::{
    Device, Error, LayerWeights, Limits, Loader, Projections, Shape, Slice, bf16, present,
};
use baton_proto::v1::{KvDtype, KvLayout};
use candle_core::quantized::GgmlDType;

use super::config::ModelConfig;
use super::weights::refuse_biases;
use super::{LoadedModel, Model, ModelError, SequenceSlice, kv_layout};
use crate::checkpoint::{self, Checkpoint, LoadError, TensorBytes, WhisperFolder};
use crate::kernels::elementwise::Activation;
use crate::kernels::quant;
use crate::kernels::rope::Pairs;
use crate::kv::cuda::{CudaBlocks, failed};
use crate::kv::pool::KvPool;
use crate::recycle::recycle;

/// What a GPU is to be prepared for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which of the GPUs that the process sees.
    pub ordinal: usize,
    /// Threads that convert weights.
    pub threads: usize,
    /// Positions of a KV block.
    pub block_size: usize,
    /// Tokens of one step.
    pub rows: usize,
    /// Sequences of one step.
    pub sequences: usize,
    /// Positions of a sequence; the model's own bound holds too.
    pub context: usize,
}

/// Loads a checkpoint onto a GPU.
pub fn load(path: &Path, options: &Options) -> Result<LoadedModel, LoadError> {
    if !present() {
        let reason = "no NVIDIA driver and GPU was found (libcuda.so.1 with at least one device)";
        return Err(LoadError::Device(reason.into()));
    }
    let device = Device::open(options.ordinal).map_err(device_error)?;
    if WhisperFolder::open(path)?.is_some() {
        let reason = "speech models are not supported on a GPU; start the worker with --device cpu";
        return Err(LoadError::Unsupported { path: path.to_owned(), reason: reason.into() });
    }
    let checkpoint = checkpoint::open(path)?;
    Ok(LoadedModel {
        model: Box::new(CudaDecoder::new(&*checkpoint, device, options)?),
        eos_token_ids: checkpoint.eos_token_ids()?,
        tokenizer: checkpoint.tokenizer()?,
        // Workers of one digest must compute the same.
        weights_digest: checkpoint.digest() + "-cuda",
        speech: None,
    })
}

fn device_error(error: Error) -> LoadError {
    let said = error.to_string();
    match error {
        Error::Absent(_) | Error::Library(_) | Error::Unsupported(_) => LoadError::Device(said),
        _ => LoadError::DeviceFailed(said),
    }
}

/// A causal language model on a GPU.
struct CudaDecoder {
    config: ModelConfig,
    device: Arc<Device>,
    decoder: baton_cuda::Decoder,
    interrupt: Arc<AtomicBool>,
    /// Empty between steps.
    slices: Vec<Slice<'static>>,
}

impl CudaDecoder {
    fn new(
        checkpoint: &dyn Checkpoint,
        device: Arc<Device>,
        options: &Options,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config()?;
        let shape = shape(checkpoint, &config, options.block_size)?;
        let unsupported = |error: Error| match error {
            Error::Unsupported(reason) => {
                checkpoint.unsupported(format!("not supported on a GPU: {reason}"))
            }
            other => device_error(other),
        };
        let mut loader = Loader::new(&device, shape).map_err(unsupported)?;
        let weights = Weights { checkpoint, threads: options.threads };
        weights.upload(&config, &mut loader)?;
        let context = options.context.min(config.max_context);
        let limits = Limits {
            narrow_rows: narrow_rows().unwrap_or(Limits::new(0, 0, 0).narrow_rows),
            ..Limits::new(options.rows, options.sequences, context)
        };
        let decoder = loader.finish(limits).map_err(unsupported)?;
        Ok(Self { config, device, decoder, interrupt: Arc::default(), slices: Vec::new() })
    }
}

/// Up to how many rows products are our own kernel's. The variable is for tests on a GPU that is
/// imitated, where it costs more than it brings.
fn narrow_rows() -> Option<usize> {
    std::env::var("BATON_CUDA_NARROW_ROWS").ok()?.parse().ok()
}

/// The model's shape, or what about it the kernels do not compute.
fn shape(
    checkpoint: &dyn Checkpoint,
    config: &ModelConfig,
    block_size: usize,
) -> Result<Shape, LoadError> {
    let layers = 0..config.layers;
    let post_norms = ["post_attention_norm", "post_ffw_norm"].into_iter().any(|norm| {
        layers.clone().any(|i| checkpoint.has_tensor(&format!("blk.{i}.{norm}.weight")))
    });
    let what = match () {
        () if config.window.is_some() => Some("sliding-window attention"),
        () if config.embedding_scale != 1.0 => Some("scaled embeddings"),
        () if config.activation != Activation::Silu => Some("an MLP without SiLU"),
        () if post_norms => Some("norms after attention and MLP"),
        () => None,
    };
    if let Some(what) = what {
        let architecture = &config.architecture;
        return Err(checkpoint.unsupported(format!(
            "{what} (architecture {architecture}) is not supported on a GPU; start the worker with \
             --device cpu"
        )));
    }
    let &ModelConfig { layers, hidden, heads, kv_heads, head_dim, ffn, vocab, .. } = config;
    Ok(Shape {
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        rope_theta: config.rope_theta,
        interleaved: config.pairs == Pairs::Neighbours,
        rms_eps: config.rms_eps,
        block_size,
    })
}

/// Reads weights as a GPU has them.
struct Weights<'a> {
    checkpoint: &'a dyn Checkpoint,
    threads: usize,
}

impl Weights<'_> {
    /// Takes all tensors to the device; the host's memory holds those of one layer at a time.
    fn upload(&self, config: &ModelConfig, loader: &mut Loader) -> Result<(), LoadError> {
        let &ModelConfig { hidden, ffn, head_dim, vocab, .. } = config;
        let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
        loader
            .embedding(&self.matrix("token_embd.weight", vocab, hidden)?)
            .map_err(device_error)?;
        for i in 0..config.layers {
            refuse_biases(self.checkpoint, i)?;
            let name = |rest: &str| format!("blk.{i}.{rest}");
            let matrix = |rest: &str, outputs, inputs| self.matrix(&name(rest), outputs, inputs);
            let [query, key, value] = [
                matrix("attn_q.weight", q, hidden)?,
                matrix("attn_k.weight", kv, hidden)?,
                matrix("attn_v.weight", kv, hidden)?,
            ];
            let [query_bias, key_bias, value_bias] = [
                self.checkpoint.optional_vector(&name("attn_q.bias"), q)?,
                self.checkpoint.optional_vector(&name("attn_k.bias"), kv)?,
                self.checkpoint.optional_vector(&name("attn_v.bias"), kv)?,
            ];
            // Where only some have a bias, the others' are zeros.
            let any = query_bias.is_some() || key_bias.is_some() || value_bias.is_some();
            let filled = |bias: Option<Vec<f32>>, width| bias.unwrap_or_else(|| vec![0.0; width]);
            let (query_bias, key_bias, value_bias) =
                (filled(query_bias, q), filled(key_bias, kv), filled(value_bias, kv));
            let biases = Projections { query: &query_bias[..], key: &key_bias, value: &value_bias };
            let query_norm =
                self.checkpoint.optional_norm(&name("attn_q_norm.weight"), head_dim)?;
            let key_norm = self.checkpoint.optional_norm(&name("attn_k_norm.weight"), head_dim)?;
            let layer = LayerWeights {
                attention_norm: &self.checkpoint.norm(&name("attn_norm.weight"), hidden)?,
                projections: Projections { query: &query[..], key: &key, value: &value },
                biases: any.then_some(biases),
                query_norm: query_norm.as_deref(),
                key_norm: key_norm.as_deref(),
                output: &matrix("attn_output.weight", hidden, q)?,
                ffn_norm: &self.checkpoint.norm(&name("ffn_norm.weight"), hidden)?,
                gate: &matrix("ffn_gate.weight", ffn, hidden)?,
                up: &matrix("ffn_up.weight", ffn, hidden)?,
                down: &matrix("ffn_down.weight", hidden, ffn)?,
            };
            loader.layer(i, &layer).map_err(device_error)?;
        }
        loader.norm(&self.checkpoint.norm("output_norm.weight", hidden)?).map_err(device_error)?;
        if self.checkpoint.has_tensor("output.weight") {
            let head = self.matrix("output.weight", vocab, hidden)?;
            loader.head(&head).map_err(device_error)?;
        }
        if let Some(factors) = self.checkpoint.optional_vector("rope_freqs.weight", head_dim / 2)? {
            loader.rope_factors(&factors).map_err(device_error)?;
        }
        Ok(())
    }

    fn matrix(&self, name: &str, outputs: usize, inputs: usize) -> Result<Vec<bf16>, LoadError> {
        let tensor = self.checkpoint.matrix(name, outputs, inputs)?;
        if !quant::supported(tensor.dtype) || !inputs.is_multiple_of(tensor.dtype.block_size()) {
            let dtype = tensor.dtype;
            return Err(self
                .checkpoint
                .unsupported(format!("tensor {name}: {dtype:?} rows of {inputs} elements")));
        }
        let values = rounded(&tensor, inputs, self.threads);
        tensor.forget();
        Ok(values)
    }
}

/// A matrix of `inputs` columns, rounded to bf16 on so many threads.
fn rounded(tensor: &TensorBytes, inputs: usize, threads: usize) -> Vec<bf16> {
    let bytes = tensor.bytes();
    if tensor.dtype == GgmlDType::BF16 {
        return bytes.as_chunks::<2>().0.iter().map(|pair| bf16::from_le_bytes(*pair)).collect();
    }
    let rows = tensor.dims[0];
    let row_bytes = bytes.len() / rows.max(1);
    let each = rows.div_ceil(threads.max(1)).max(1);
    let mut values = vec![bf16::ZERO; rows * inputs];
    std::thread::scope(|scope| {
        let parts = values.chunks_mut(each * inputs).zip(bytes.chunks(each * row_bytes));
        for (values, bytes) in parts {
            scope.spawn(move || {
                let mut row = vec![0.0; inputs];
                let rows = values.chunks_exact_mut(inputs).zip(bytes.chunks_exact(row_bytes));
                for (values, bytes) in rows {
                    quant::decode_row(tensor.dtype, bytes, &mut row);
                    let pairs = values.iter_mut().zip(&row);
                    pairs.for_each(|(value, x)| *value = bf16::from_f32(*x));
                }
            });
        }
    });
    values
}

impl Model for CudaDecoder {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    fn kv_layout(&self, block_size: usize, _dtype: KvDtype) -> KvLayout {
        kv_layout(&self.config, block_size, KvDtype::Bf16)
    }

    fn kv_pool(&self, layout: KvLayout, blocks: usize) -> std::io::Result<KvPool> {
        let shape = self.decoder.shape().clone();
        let memory = CudaBlocks::new(self.device.clone(), shape, blocks);
        let memory = memory.map_err(|error| std::io::Error::other(error.to_string()))?;
        KvPool::on_device(layout, blocks, Arc::new(memory))
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let blocks: Option<&CudaBlocks> = kv.device();
        let blocks =
            blocks.ok_or_else(|| ModelError::Lost("the KV cache is not a GPU's".into()))?;
        let mut slices: Vec<Slice<'_>> = recycle(std::mem::take(&mut self.slices));
        slices.extend(batch.iter().map(|slice| Slice {
            start: slice.start,
            tokens: slice.tokens,
            blocks: slice.blocks,
            logits: slice.logits,
        }));
        let passed = self.decoder.forward(&slices, blocks.memory(), logits, &self.interrupt);
        self.slices = recycle(slices);
        passed.map_err(|error| match error {
            Error::Interrupted => ModelError::Interrupted,
            Error::TokenOutOfRange(token) => ModelError::TokenOutOfRange(token),
            error if error.is_lost() => ModelError::Lost(format!("the GPU is lost: {error}")),
            error => ModelError::Device(failed(error)),
        })
    }
}
