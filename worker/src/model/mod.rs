//! Models: weights and the forward pass.
//!
//! [`Model`] is the seam between the engine, which decides what to run, and an architecture,
//! which knows how. The engine thread owns the model and calls it once per step.

mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
mod decoder;
mod weights;
mod whisper;

pub use config::{ModelConfig, Window};
pub(crate) use decoder::Decoder;
pub use decoder::{LoadedModel, kv_layout, load};

pub use crate::kernels::activations::Precision;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use baton_proto::v1::{KvDtype, KvLayout};

use crate::kv::BlockId;
use crate::kv::pool::{DeviceError, KvPool};
use crate::lora::Adapter;

/// The new tokens of one sequence in one step.
#[derive(Clone, Copy, Debug, Default)]
pub struct SequenceSlice<'a> {
    /// Position of `tokens[0]`; KV for all positions before it is in `blocks`.
    pub start: usize,
    /// The tokens to compute: a prompt chunk, or one token of a decoding sequence and those drafted
    /// to follow it.
    pub tokens: &'a [u32],
    /// The sequence's KV blocks in order, covering at least `start + tokens.len()` positions.
    pub blocks: &'a [BlockId],
    /// Of how many of the last tokens the logits are wanted.
    pub logits: usize,
    /// What the sequence is computed with, beside the model's own weights.
    pub adapter: Option<&'a Adapter>,
    /// Speech models: the samples that the sequence's leading positions stand for.
    pub audio: Option<&'a [u8]>,
    /// Speech models: a token of the slice whose logits are wanted too, in a row before the others.
    pub probe: Option<usize>,
    /// Speech models: when each token was said is wanted, of those from this one on, counted after
    /// the sound. The slice ends with the sequence and has all its tokens after the sound.
    pub align: Option<usize>,
}

/// When the tokens of a transcript were said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Aligned {
    /// Of each token and of the end: when it begins, in positions of the sound.
    pub starts: Vec<u32>,
    /// Of the same: how likely it was.
    pub probabilities: Vec<f32>,
}

/// A failed step. The engine fails the step's requests and goes on.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The pass was stopped by [`Model::set_interrupt`]'s flag. Nothing is lost but time: the same
    /// batch, or a part of it, can be computed again.
    #[error("interrupted")]
    Interrupted,
    /// A token id that the embedding table does not have.
    #[error("token id {0} is outside the vocabulary")]
    TokenOutOfRange(u32),
    /// The device failed, and may do better next time.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The device is gone: no pass will ever succeed. The engine gives all requests up and ends.
    #[error("{0}")]
    Lost(String),
}

/// A causal language model over paged KV.
pub trait Model: Send {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// Gives the model a flag that stops a pass: checked between layers, a raised flag makes
    /// [`Model::forward`] return [`ModelError::Interrupted`] at once. So a cancelled prompt gives
    /// its blocks back within a layer's time, not a step's.
    fn set_interrupt(&mut self, _flag: Arc<AtomicBool>) {}

    /// The layout of its KV blocks. `dtype` is what the operator chose, where there is a choice.
    fn kv_layout(&self, block_size: usize, dtype: KvDtype) -> KvLayout {
        kv_layout(self.config(), block_size, dtype)
    }

    /// A pool of such blocks, where the model can use them.
    fn kv_pool(&self, layout: KvLayout, blocks: usize) -> std::io::Result<KvPool> {
        KvPool::new(layout, blocks)
    }

    /// Positions that the sound takes before the text of each sequence; 0 for models of text. Their
    /// tokens mean nothing.
    fn audio_positions(&self) -> usize {
        0
    }

    /// What the last pass found for a slice with [`SequenceSlice::align`], one after the other.
    fn aligned(&mut self) -> Option<Aligned> {
        None
    }

    /// Computes all slices in one pass and writes their keys and values into `kv`.
    ///
    /// `logits` is resized to `n × vocab`, row-major, where `n` is the sum of the slices'
    /// `logits`, and one more for each `probe`, in their order.
    ///
    /// The caller owns the blocks that the pass writes: position `p` of a slice lies in
    /// `blocks[p / block_size]`. No block written is shared; blocks that are only read may be.
    fn forward(
        &mut self,
        batch: &[SequenceSlice<'_>],
        kv: &KvPool,
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError>;
}
