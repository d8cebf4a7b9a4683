//! Whisper (Radford et al. 2022): an encoder of sound and a decoder of text.
//!
//! A sequence is positions of sound and then positions of text. The KV blocks of the former hold,
//! for each layer of the decoder, the keys and values that its cross-attention takes from the
//! encoder's output; those of the latter its own. So sound is shared, moved and kept as text is.
//! The sound's positions fill whole blocks: what its last block has beyond them is never read.

mod align;
mod decoder;
mod encoder;
mod mel;
mod weights;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::mel::Mel;
use self::weights::{Mlp, Weights};
use super::{Aligned, Model, ModelConfig, ModelError, SequenceSlice};
use crate::checkpoint::{Checkpoint as _, LoadError, WhisperFolder, WhisperShape};
use crate::kernels::activations::{Activations, Precision};
use crate::kernels::affine::{Affine, LayerNorm};
use crate::kernels::cpu::Isa;
use crate::kernels::elementwise::Activation;
use crate::kernels::linear::multiply;
use crate::kernels::page;
use crate::kernels::pool::ThreadPool;
use crate::kv::pool::KvPool;

/// A loaded model.
pub(super) struct Whisper {
    config: ModelConfig,
    shape: WhisperShape,
    isa: Isa,
    threads: ThreadPool,
    mel: Mel,
    weights: Weights,
    /// Layers and heads that look at the sound of the token that they compute.
    alignment_heads: Vec<(usize, usize)>,
    input: Activations,
    encoder: encoder::Scratch,
    decoder: decoder::Scratch,
    /// Of the last pass.
    aligned: VecDeque<Aligned>,
    interrupt: Arc<AtomicBool>,
}

impl Whisper {
    pub(super) fn new(folder: &WhisperFolder, threads: usize) -> Result<Self, LoadError> {
        let (config, shape) = (folder.config()?, folder.shape());
        let mut threads = ThreadPool::new(threads)
            .map_err(|error| folder.unsupported(format!("cannot start threads: {error}")))?;
        Ok(Self {
            weights: Weights::read(folder, &mut threads)?,
            alignment_heads: folder.alignment_heads()?,
            mel: Mel::new(shape.mels),
            isa: Isa::best(),
            threads,
            input: Activations::new(Precision::Float),
            encoder: encoder::Scratch::default(),
            decoder: decoder::Scratch::default(),
            aligned: VecDeque::new(),
            interrupt: Arc::default(),
            config,
            shape,
        })
    }
}

impl Model for Whisper {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn set_interrupt(&mut self, flag: Arc<AtomicBool>) {
        self.interrupt = flag;
    }

    fn audio_positions(&self) -> usize {
        self.shape.audio_positions
    }

    fn aligned(&mut self) -> Option<Aligned> {
        self.aligned.pop_front()
    }

    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Self { shape, isa, threads, weights, input, interrupt, .. } = self;
        let layout = kv.layout();
        let block_size = layout.block_size as usize;
        let mut context = Context {
            isa: *isa,
            threads,
            input,
            interrupt,
            shape: *shape,
            pages: page::Shape {
                heads: shape.heads,
                kv_heads: shape.heads,
                head_dim: shape.hidden / shape.heads,
                block_size,
                dtype: layout.dtype(),
            },
            sound_blocks: shape.audio_positions.div_ceil(block_size),
        };
        self.aligned.clear();
        for slice in batch.iter().filter(|slice| slice.start == 0) {
            let samples = slice.audio.unwrap_or_default();
            let (blocks, decoder) = (&slice.blocks[..context.sound_blocks], &weights.layers);
            let (mel, scratch) = (&self.mel, &mut self.encoder);
            encoder::encode(
                &mut context,
                mel,
                &weights.encoder,
                decoder,
                scratch,
                kv,
                blocks,
                samples,
            )?;
        }
        let aligned = decoder::Aligning { heads: &self.alignment_heads, found: &mut self.aligned };
        decoder::decode(&mut context, weights, &mut self.decoder, batch, kv, aligned, logits)?;
        self.encoder.forget();
        Ok(())
    }
}

/// What the operations of a pass share.
struct Context<'a> {
    isa: Isa,
    threads: &'a mut ThreadPool,
    /// What the next product multiplies.
    input: &'a mut Activations,
    interrupt: &'a AtomicBool,
    shape: WhisperShape,
    pages: page::Shape,
    /// Leading blocks of each sequence.
    sound_blocks: usize,
}

impl Context<'_> {
    /// Whether the pass is still wanted. Asked before each of the larger operations.
    fn go_on(&self) -> Result<(), ModelError> {
        match self.interrupt.load(Ordering::Relaxed) {
            true => Err(ModelError::Interrupted),
            false => Ok(()),
        }
    }

    /// Norms rows of the residual stream, for the next product.
    fn normed(&mut self, norm: &LayerNorm, x: &[f32], rows: usize) {
        let (isa, hidden) = (self.isa, self.shape.hidden);
        self.input.fill(isa, self.threads, rows, hidden, |row, out| {
            let x = &x[row * hidden..][..hidden];
            norm.apply(isa, x, out);
        });
    }

    /// Products that overwrite.
    fn set<const N: usize>(&mut self, products: [(&Affine, &mut [f32]); N]) {
        let products = products.map(|(affine, y)| affine.set(y));
        multiply(self.isa, self.threads, self.input.view(), products);
    }

    /// As [`Self::set`], through a GELU.
    fn set_active(&mut self, affine: &Affine, y: &mut [f32]) {
        let product = affine.set(y).activation(Activation::Gelu);
        multiply(self.isa, self.threads, self.input.view(), [product]);
    }

    /// A product of some rows that is added to the residual stream.
    fn add(&mut self, affine: &Affine, rows: &[f32], x: &mut [f32]) {
        let rows = self.input.of(self.isa, self.threads, rows, affine.weight.inputs());
        multiply(self.isa, self.threads, rows, [affine.add_to(x)]);
    }

    /// `x += down(gelu(up(norm(x))))`.
    fn mlp(&mut self, mlp: &Mlp, x: &mut [f32], up: &mut [f32], rows: usize) {
        self.normed(&mlp.norm, x, rows);
        self.set_active(&mlp.up, up);
        self.add(&mlp.down, up, x);
    }

    /// Changes each row of a matrix.
    fn each_row(&mut self, x: &mut [f32], width: usize, job: impl Fn(usize, &mut [f32]) + Sync) {
        // Nothing takes no memory, however often.
        let mut nothing = vec![(); x.len() / width];
        self.threads.for_rows((x, width), (&mut nothing, 1), |row, x, _| job(row, x));
    }
}
