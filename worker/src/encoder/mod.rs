//! Text encoders: what computes a vector for each token of whole texts.
//!
//! * [`Bidirectional`]: models of the BERT kind, where every token sees every other.
//! * [`Causal`]: decoders, where a token sees those before it.
//!
//! Texts of a batch lie one after the other, without padding. A text's vectors have the same bits
//! whatever else is in the batch.

mod bidirectional;
mod causal;
mod config;
mod weights;

pub use bidirectional::Bidirectional;
pub use causal::Causal;
pub use config::{EncoderConfig, Positions};
pub(crate) use weights::{How, Reader, Weights, projection};

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::kernels::pool::ThreadPool;
use crate::model::ModelError;

/// A text to encode.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// Its tokens, special ones too.
    pub tokens: &'a [u32],
    /// Of each token, the segment it belongs to; empty: the first.
    pub types: &'a [u32],
}

/// Computes the last hidden states of texts.
pub trait Encoder: Send {
    /// Width of a hidden state.
    fn hidden(&self) -> usize;

    /// Gives the encoder a flag that stops a pass, as [`crate::model::Model::set_interrupt`] does.
    fn set_interrupt(&mut self, flag: Arc<AtomicBool>);

    /// Encodes all texts in one pass. Gives the hidden states, `tokens × hidden` in the order of the
    /// texts, and the threads for what comes after them.
    fn encode(&mut self, texts: &[Text<'_>]) -> Result<(&[f32], &mut ThreadPool), ModelError>;

    /// The threads that compute.
    fn threads(&mut self) -> &mut ThreadPool;

    /// Another encoder of the same weights, which computes the same bits on the thread that calls
    /// it and on no other. `None` where that would take much memory.
    fn alone(&self) -> Option<Box<dyn Encoder>>;
}
