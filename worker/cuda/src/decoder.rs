//! The forward pass.

use std::sync::atomic::AtomicBool;

use crate::{Error, KvMemory, Shape};

/// The new tokens of one sequence in one step.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    /// Position of `tokens[0]`; KV for all positions before it is in `blocks`.
    pub start: usize,
    /// At least one.
    pub tokens: &'a [u32],
    /// The sequence's KV blocks in order, covering at least `start + tokens.len()` positions.
    pub blocks: &'a [u32],
    /// Of how many of the last tokens the logits are wanted.
    pub logits: usize,
}

/// The largest step there will be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of one step.
    pub rows: usize,
    /// Sequences of one step.
    pub sequences: usize,
    /// Rows of logits of one step.
    pub logits: usize,
    /// Positions of one sequence.
    pub context: usize,
    /// Whether decode steps run as CUDA graphs.
    pub graphs: bool,
    /// Products of up to so many rows are our own kernel's, larger ones cuBLAS's: 32 unless there is
    /// a reason.
    pub narrow_rows: usize,
}

/// A model on a device, with all that a step needs.
pub struct Decoder {}

impl Decoder {
    /// The model's shape.
    pub fn shape(&self) -> &Shape {
        unreachable!()
    }

    /// Computes all slices in one pass, writes their keys and values into `kv`, and returns when all
    /// of it is complete.
    ///
    /// `logits` is resized to `n × vocab`, row-major, where `n` is the sum of the slices' `logits`.
    /// A raised `interrupt` ends a long pass after about two layers.
    pub fn forward(
        &mut self,
        _batch: &[Slice<'_>],
        _kv: &KvMemory,
        _logits: &mut Vec<f32>,
        _interrupt: &AtomicBool,
    ) -> Result<(), Error> {
        Ok(())
    }
}
