//! What this worker takes on, and what it refuses at the door.

use std::time::Duration;

use super::speculation::Speculation;

/// Fixed sizes of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// KV blocks of the pool.
    pub blocks: usize,
    /// Tokens computed in one step.
    pub max_batch_tokens: usize,
    /// Sequences admitted at a time.
    pub max_running: usize,
    /// Requests that may wait for admission.
    pub max_waiting: usize,
    /// Positions of one sequence: prompt and output, and the leading ones before them.
    pub max_model_len: usize,
    /// Positions that every sequence begins with and that are computed together, whole blocks: the
    /// window of sound of a speech model. 0 for text.
    pub leading: usize,
    /// How much is guessed ahead.
    pub speculation: Speculation,
    /// A sequence goes before those of the next lower priority that arrived at most this long
    /// before it.
    pub priority_aging: Duration,
}

/// How busy a scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests not yet admitted, and preempted ones.
    pub waiting: usize,
    /// Sequences running or being pulled.
    pub running: usize,
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to continue.
    #[error("the prompt is empty; send at least one token")]
    Empty,
    /// The prompt fills the context.
    #[error(
        "This model's maximum context length is {max} tokens. However, your request has {tokens} \
         input tokens. Please reduce the length of the input messages."
    )]
    ContextLength {
        /// The limit.
        max: usize,
        /// Tokens sent.
        tokens: usize,
    },
    /// The sequence would outgrow the KV cache even if it ran alone.
    #[error(
        "the request may need {needs} KV blocks, this worker has {has}; send a shorter prompt or a \
         smaller max_tokens, or start the worker with a larger --kv-memory"
    )]
    KvMemory {
        /// Blocks at its greatest length.
        needs: usize,
        /// Blocks of the pool.
        has: usize,
    },
    /// Too many requests wait already.
    #[error("the queue is full: {waiting} requests wait; try again later")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// The engine is stopping.
    #[error("the worker is shutting down")]
    Stopping,
}

impl Limits {
    /// Refuses a sequence of `tokens` positions, the leading ones included, to be continued by at
    /// most `max_new`, that could never be finished here.
    pub fn check_fits(&self, tokens: usize, max_new: usize) -> Result<(), Refusal> {
        let text = tokens.saturating_sub(self.leading);
        if text == 0 {
            return Err(Refusal::Empty);
        }
        if tokens >= self.max_model_len {
            let max = self.max_model_len.saturating_sub(self.leading);
            return Err(Refusal::ContextLength { max, tokens: text });
        }
        let longest = tokens.saturating_add(max_new).min(self.max_model_len);
        // The last token is sampled and never computed.
        let needs = (longest - 1).div_ceil(self.block_size);
        if needs > self.blocks {
            return Err(Refusal::KvMemory { needs, has: self.blocks });
        }
        Ok(())
    }

    /// Refuses a request when `arrived` more than `load` knows of have been taken and the queue
    /// is full with them. Free places among the running count only while nobody waits: whoever
    /// waits beside a free place waits for blocks.
    pub fn check_queue(&self, load: Load, arrived: usize) -> Result<(), Refusal> {
        let places = match load.waiting {
            0 => self.max_running.saturating_sub(load.running),
            _ => 0,
        };
        let waiting = load.waiting + arrived;
        if waiting >= self.max_waiting + places {
            return Err(Refusal::QueueFull { waiting });
        }
        Ok(())
    }
}
