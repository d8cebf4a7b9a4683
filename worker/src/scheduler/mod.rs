//! What to compute next.
//!
//! A pure decision over plain data: sequences, blocks and limits in, a [`Plan`] out. No clock, no
//! memory, no model.
//!
//! * Continuous batching: each step computes one token of every decoding sequence first, then
//!   fills the rest of the token budget with chunks of prompts, in order.
//! * The order is that of priorities, lower ones first, and equal ones as they arrive. Every
//!   [`Limits::priority_aging`] that a sequence has waited counts as one step of priority, running
//!   or not, so that none starves: it is passed only by those that arrive before
//!   `(own priority - theirs) * priority_aging` after it.
//! * A sequence reserves the blocks of its tokens when it is admitted; only decoding grows. When
//!   blocks run out, the last in order gives its own back and is computed again later (preemption
//!   by recompute).
//! * A waiting sequence whose next unknown block is being computed by another waits for it, so
//!   that requests that share a prompt compute it once.
//! * A prompt whose own logits are wanted is computed without the prefix cache, in chunks that
//!   keep the logits small.
//! * What is left of a step's budget is used to guess ahead, where that is on.
//!
//! The states: waiting → (pulling, while a peer computes the prompt →) running → (held, while a
//! peer fetches the blocks →) gone. A sequence that is released goes to held from where it is.

mod core;
pub mod drafter;
mod limits;
mod sequence;
mod speculation;
#[cfg(test)]
mod tests;

pub use self::core::{Plan, Pulled, Scheduler, Slice, Stats};
pub use limits::{Limits, Load, Refusal};
pub use sequence::{NewSequence, Sequence, SequenceId, State};
pub use speculation::Speculation;
