//! Vectors, classes and scores of texts.
//!
//! * [`load`]: reads a model and what is to be done with its hidden states.
//! * [`Pooler`]: a model and its thread; takes calls of many texts.
//! * [`CallHandle`]: a call's answer; dropping it takes the call's texts out of the queue.
//!
//! While a batch is computed the next ones gather in a bounded [`queue`](Limits); an idle thread
//! takes what comes at once. A batch holds texts of several calls and tasks.

mod head;
mod load;
mod methods;
mod queue;
mod run;

pub use head::Head;
pub use load::{Dtype, Loaded, Model, Options, load};
pub use methods::Pooling;
pub use queue::Limits;
pub use run::{CallHandle, Pooler, Settings};

use std::time::Duration;

use baton_proto::v1::Task;

/// A text, as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Input {
    /// Its tokens, special ones too.
    pub tokens: Vec<u32>,
    /// Of each token, which of two texts it belongs to; empty: the first.
    pub types: Vec<u32>,
}

/// What is wanted of each text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Vector, classes or score.
    pub task: Task,
    /// Embeddings to length one, classes and scores to probabilities.
    pub activate: bool,
    /// Cut embeddings to so many dimensions; 0: all.
    pub dimensions: usize,
}

/// Texts to compute.
#[derive(Clone, Debug, Default)]
pub struct NewCall {
    /// The texts.
    pub inputs: Vec<Input>,
    /// What is wanted of them.
    pub wanted: Wanted,
    /// Lower is sooner.
    pub priority: i32,
}

/// A matrix, row after row: one row for a text, or one for each of its tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// The elements.
    pub values: Vec<f32>,
    /// Elements of a row.
    pub width: usize,
}

/// A call's answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// In the order of the inputs.
    pub outputs: Vec<Output>,
    /// From arrival to the first batch with one of the inputs.
    pub queued: Duration,
    /// From there to the end.
    pub computed: Duration,
}

/// Why a call was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many texts wait already.
    #[error("the queue is full: {texts} texts wait; try again later")]
    Full {
        /// How many wait.
        texts: usize,
    },
    /// The worker is stopping.
    #[error("the worker is shutting down")]
    Stopping,
    /// The call itself is wrong.
    #[error("{0}")]
    Invalid(String),
}

/// Why a call that was taken has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The worker stops.
    #[error("the worker is shutting down")]
    Stopping,
    /// The batch failed.
    #[error("{0}")]
    Failed(String),
}
