//! The forward pass of a decoder.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_proto::TokenizerBundle;
use baton_proto::v1::{KvDtype, KvLayout, SpeechCard};

use super::config::ModelConfig;
use super::weights::{Projection, Weights};
use super::whisper::Whisper;
use super::{Model, ModelError, SequenceSlice};
use crate::checkpoint::{self, Checkpoint, LoadError, WhisperFolder};
use crate::kernels::activations::{Activations, Precision};
use crate::kernels::attention::{self, Queries};
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::{add_to, gated, rms_norm, rms_norm_in_place};
use crate::kernels::linear::multiply;
use crate::kernels::low_rank::{self, Groups};
use crate::kernels::page::{self, Shape};
use crate::kernels::pool::ThreadPool;
use crate::kernels::rope::Rope;
use crate::kv::pool::KvPool;
use crate::lora::{Adapter, Module};
use crate::recycle::recycle;

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
    /// For the clients of a speech model.
    pub speech: Option<SpeechCard>,
}

/// Loads a checkpoint to run on `threads` threads.
pub fn load(path: &Path, threads: usize, activations: Precision) -> Result<LoadedModel, LoadError> {
    if let Some(folder) = WhisperFolder::open(path)? {
        return Ok(LoadedModel {
            model: Box::new(Whisper::new(&folder, threads)?),
            eos_token_ids: folder.eos_token_ids()?,
            tokenizer: folder.tokenizer()?,
            weights_digest: folder.digest(),
            speech: Some(folder.card()?),
        });
    }
    let checkpoint = checkpoint::open(path)?;
    Ok(LoadedModel {
        model: Box::new(Decoder::new(&*checkpoint, threads, activations)?),
        eos_token_ids: checkpoint.eos_token_ids()?,
        tokenizer: checkpoint.tokenizer()?,
        weights_digest: checkpoint.digest() + activations.suffix(),
        speech: None,
    })
}

/// The layout of a model's KV blocks.
pub fn kv_layout(config: &ModelConfig, block_size: usize, dtype: KvDtype) -> KvLayout {
    let layer_bytes = match dtype {
        // A GPU's: keys and values of each position, without scales.
        KvDtype::Bf16 => {
            2 * config.kv_heads * config.head_dim * block_size * size_of::<half::bf16>()
        }
        _ => shape(config, block_size, dtype).layer_bytes(),
    };
    KvLayout {
        block_size: block_size as u32,
        layers: config.layers as u32,
        kv_heads: config.kv_heads as u32,
        head_dim: config.head_dim as u32,
        dtype: dtype.into(),
        block_bytes: (config.layers * layer_bytes) as u64,
    }
}

fn shape(config: &ModelConfig, block_size: usize, dtype: KvDtype) -> Shape {
    let &ModelConfig { heads, kv_heads, head_dim, .. } = config;
    Shape { heads, kv_heads, head_dim, block_size, dtype }
}

/// A causal language model.
pub(crate) struct Decoder {
    config: ModelConfig,
    isa: Isa,
    threads: ThreadPool,
    weights: Weights,
    rope: Rope,
    /// Of layers with a window.
    window_rope: Option<Rope>,
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
    /// What attention or MLP add to the residual stream, where that is normed first.
    branch: Vec<f32>,
    /// What the next product multiplies.
    input: Activations,
    /// Empty between steps.
    queries: Vec<Queries<'static>>,
    /// Of each row, its sequence in the batch and its position in the sequence.
    places: Vec<(u32, u32)>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
    /// The step's adapters, each once; empty between steps.
    adapters: Vec<&'static Adapter>,
    /// Which rows they are for.
    groups: Groups,
    attention: attention::Scratch,
}

impl Decoder {
    pub(crate) fn new(
        checkpoint: &dyn Checkpoint,
        threads: usize,
        activations: Precision,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config()?;
        let mut threads = ThreadPool::new(threads)
            .map_err(|error| checkpoint.unsupported(format!("cannot start threads: {error}")))?;
        let weights = Weights::read(checkpoint, &config, &mut threads)?;
        let rope = |theta| {
            Rope::new(config.pairs, config.head_dim, theta, weights.rope_factors.as_deref())
        };
        Ok(Self {
            isa: Isa::best(),
            threads,
            rope: rope(config.rope_theta),
            window_rope: config.window.map(|window| rope(window.rope_theta)),
            weights,
            scratch: Scratch { input: Activations::new(activations), ..Scratch::default() },
            interrupt: Arc::default(),
            config,
        })
    }
}

impl Decoder {
    /// The threads that compute.
    pub(crate) fn threads(&mut self) -> &mut ThreadPool {
        &mut self.threads
    }

    /// As [`Model::forward`], with the last hidden states, after the final norm, in place of the
    /// logits: `n × hidden`.
    pub(crate) fn forward_hidden(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
    ) -> Result<(&[f32], &mut ThreadPool), ModelError> {
        self.layers(batch, kv)?;
        Ok((self.scratch.input.view().floats(), &mut self.threads))
    }
}

impl Projection {
    /// What follows the product: the bias, and the norm of each head.
    fn refine(&self, isa: Isa, config: &ModelConfig, row: &mut [f32]) {
        if let Some(bias) = &self.bias {
            add_to(row, bias);
        }
        if let Some(norm) = &self.norm {
            let heads = row.chunks_exact_mut(config.head_dim);
            heads.for_each(|head| rms_norm_in_place(isa, head, norm, config.rms_eps));
        }
    }
}

impl Model for Decoder {
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
        self.layers(batch, kv)?;
        let Self { config, isa, threads, weights, scratch, .. } = self;
        logits.resize(scratch.wanted.len() * config.vocab, 0.0);
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        multiply(*isa, threads, scratch.input.view(), [head.set(logits)]);
        Ok(())
    }
}

impl Decoder {
    /// Everything but the output projection. Of the rows that are wanted, what it would multiply is
    /// left in `scratch.input`.
    fn layers(&mut self, batch: &[SequenceSlice<'_>], kv: &KvPool) -> Result<(), ModelError> {
        let Self { config, isa, threads, weights, rope, window_rope, scratch, interrupt } = self;
        let isa = *isa;
        let rows: usize = batch.iter().map(|slice| slice.tokens.len()).sum();
        let (hidden, head_dim, ffn, eps) =
            (config.hidden, config.head_dim, config.ffn, config.rms_eps);
        let (q_width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        let shape = shape(config, kv.layout().block_size as usize, kv.layout().dtype());
        let Scratch {
            x,
            query,
            key,
            value,
            attended,
            gate,
            up,
            branch,
            input,
            queries: spare,
            places,
            wanted,
            adapters: spare_adapters,
            groups,
            attention: buffers,
        } = scratch;
        x.resize(rows * hidden, 0.0);
        query.resize(rows * q_width, 0.0);
        key.resize(rows * kv_width, 0.0);
        value.resize(rows * kv_width, 0.0);
        attended.resize(rows * q_width, 0.0);
        gate.resize(rows * ffn, 0.0);
        up.resize(rows * ffn, 0.0);
        branch.resize(rows * hidden, 0.0);

        let tokens = batch.iter().flat_map(|slice| slice.tokens);
        for (&token, x) in tokens.zip(x.chunks_exact_mut(hidden)) {
            if token as usize >= config.vocab {
                return Err(ModelError::TokenOutOfRange(token));
            }
            weights.embedding.row(token as usize, x);
            if config.embedding_scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= config.embedding_scale);
            }
        }
        let mut row = 0;
        let mut queries: Vec<Queries<'_>> = recycle(std::mem::take(spare));
        queries.extend(batch.iter().map(|slice| {
            let count = slice.tokens.len();
            row += count;
            Queries { row: row - count, count, start: slice.start, blocks: slice.blocks }
        }));
        places.clear();
        for (i, q) in queries.iter().enumerate() {
            places.extend((q.start..q.start + q.count).map(|at| (i as u32, at as u32)));
        }
        let mut adapters: Vec<&Adapter> = recycle(std::mem::take(spare_adapters));
        groups.clear();
        for slice in batch {
            let owner = slice.adapter.map(|adapter| {
                let known = adapters.iter().position(|known| std::ptr::eq(*known, adapter));
                known.unwrap_or_else(|| {
                    adapters.push(adapter);
                    adapters.len() - 1
                })
            });
            groups.push(owner, slice.tokens.len());
        }
        groups.arrange(adapters.len());
        let positions = queries.iter().map(|q| q.start + q.count).max().unwrap_or(0);
        rope.reach(positions);
        if let Some(rope) = window_rope {
            rope.reach(positions);
        }

        // Looked at before each of the larger operations: with many rows and busy cores a layer
        // takes tens of milliseconds.
        let go_on = || match interrupt.load(Ordering::Relaxed) {
            true => Err(ModelError::Interrupted),
            false => Ok(()),
        };
        for (i, layer) in weights.layers.iter().enumerate() {
            let window = config.window_of(i);
            let rope = window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(rope);
            // What the rows' adapters add to the products of some modules.
            let of = |modules: &'static [Module]| {
                let adapters = &adapters;
                move |adapter: usize, at: usize| adapters[adapter].update(i, modules[at])
            };
            go_on()?;
            input.fill(isa, threads, rows, hidden, |row, out| {
                rms_norm(isa, &x[row * hidden..][..hidden], &layer.attention_norm, eps, out);
            });
            let products = [
                layer.query.weight.set(query),
                layer.key.weight.set(key),
                layer.value.weight.set(value),
            ];
            multiply(isa, threads, input.view(), products);
            let results = [(&mut query[..], q_width), (key, kv_width), (value, kv_width)];
            let modules = of(&[Module::Query, Module::Key, Module::Value]);
            low_rank::add(isa, threads, input.view(), groups, modules, results);
            if let Some(bias) = &layer.value.bias {
                value.chunks_exact_mut(kv_width).for_each(|value| add_to(value, bias));
            }
            threads.for_rows((query, q_width), (key, kv_width), |row, query, key| {
                let (sequence, position) = places[row];
                let (blocks, position) = (queries[sequence as usize].blocks, position as usize);
                layer.query.refine(isa, config, query);
                layer.key.refine(isa, config, key);
                query.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                key.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(position, head));
                let value = &value[row * kv_width..][..kv_width];
                // SAFETY: the caller of `forward` owns the blocks that it writes, and rows have
                // places of their own in them.
                unsafe { page::store(kv, &shape, i, blocks, position, key, value) };
            });
            go_on()?;
            let window = window.map(|window| window.positions);
            attention::attend(
                isa, threads, kv, &shape, i, window, &queries, buffers, query, attended,
            );
            input.fill(isa, threads, rows, q_width, |row, out| {
                out.copy_from_slice(&attended[row * q_width..][..q_width]);
            });
            // The residual stream, with or without a norm of what is added.
            let join =
                |threads: &mut ThreadPool, x: &mut [f32], branch: &mut [f32], norm: &[f32]| {
                    threads.for_rows((x, hidden), (branch, hidden), |_, x, branch| {
                        rms_norm_in_place(isa, branch, norm, eps);
                        add_to(x, branch);
                    });
                };
            let modules = of(&[Module::Output]);
            match &layer.post_attention_norm {
                None => {
                    multiply(isa, threads, input.view(), [layer.output.add_to(x)]);
                    low_rank::add(isa, threads, input.view(), groups, modules, [(x, hidden)]);
                }
                Some(norm) => {
                    multiply(isa, threads, input.view(), [layer.output.set(branch)]);
                    low_rank::add(isa, threads, input.view(), groups, modules, [(branch, hidden)]);
                    join(threads, x, branch, norm);
                }
            }
            input.fill(isa, threads, rows, hidden, |row, out| {
                rms_norm(isa, &x[row * hidden..][..hidden], &layer.ffn_norm, eps, out);
            });
            go_on()?;
            multiply(isa, threads, input.view(), [layer.gate.set(gate), layer.up.set(up)]);
            let (modules, results) =
                (of(&[Module::Gate, Module::Up]), [(&mut gate[..], ffn), (up, ffn)]);
            low_rank::add(isa, threads, input.view(), groups, modules, results);
            go_on()?;
            input.fill(isa, threads, rows, ffn, |row, out| {
                let (gate, up) = (&gate[row * ffn..][..ffn], &up[row * ffn..][..ffn]);
                gated(isa, config.activation, gate, up, out);
            });
            let modules = of(&[Module::Down]);
            match &layer.post_ffn_norm {
                None => {
                    multiply(isa, threads, input.view(), [layer.down.add_to(x)]);
                    low_rank::add(isa, threads, input.view(), groups, modules, [(x, hidden)]);
                }
                Some(norm) => {
                    multiply(isa, threads, input.view(), [layer.down.set(branch)]);
                    low_rank::add(isa, threads, input.view(), groups, modules, [(branch, hidden)]);
                    join(threads, x, branch, norm);
                }
            }
        }

        // Only the rows whose logits are wanted go through the output projection.
        wanted.clear();
        for (slice, q) in batch.iter().zip(&queries) {
            let end = q.row + q.count;
            wanted.extend(end - slice.logits..end);
        }
        *spare = recycle(queries);
        *spare_adapters = recycle(adapters);
        input.fill(isa, threads, wanted.len(), hidden, |row, out| {
            let x = &x[wanted[row] * hidden..][..hidden];
            rms_norm(isa, x, &weights.norm, eps, out);
        });
        Ok(())
    }
}
