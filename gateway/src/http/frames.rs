//! What a route must say to turn answers into a reply or into events.

use serde_json::Value;

pub(super) use crate::api::sse::Frames;
use crate::api::usage::Usage;
use crate::error::ApiError;
use crate::generate::answer::Delta;

/// How a route words its answers, whole and as a stream. It sees the deltas of each answer in
/// order, those of several answers mixed; nothing comes after [`Shape::close`] or
/// [`Shape::failed`].
pub(super) trait Shape {
    /// The reply with all answers, each a whole one, by index.
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Value;
    /// The events before the first delta. `prompts` are the prompts' lengths in tokens.
    fn opening(&mut self, prompts: &[usize], frames: &mut Frames);
    /// The events of a delta of answer `index`; `usage` is that answer's so far.
    fn delta(&mut self, index: usize, delta: Delta, usage: Usage, frames: &mut Frames);
    /// The events after the last delta.
    fn close(&mut self, usage: Usage, frames: &mut Frames);
    /// The events of a failure, which ends the stream.
    fn failed(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.data(&error.body());
        frames.done();
    }
}
