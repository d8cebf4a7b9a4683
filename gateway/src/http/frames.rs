//! Server-sent events, and what a route must say to turn answers into them.

use actix_web::web::Bytes;
use serde_json::Value;

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

/// Events that are to be sent, in the framing of server-sent events (WHATWG HTML, 9.2).
#[derive(Debug, Default)]
pub(super) struct Frames(String);

impl Frames {
    /// An event without a name.
    pub(super) fn data(&mut self, event: &Value) {
        self.0.push_str("data: ");
        self.0.push_str(&event.to_string());
        self.0.push_str("\n\n");
    }

    /// An event with a name, which must not contain a line feed.
    pub(super) fn event(&mut self, name: &str, event: &Value) {
        self.0.push_str("event: ");
        self.0.push_str(name);
        self.0.push('\n');
        self.data(event);
    }

    /// What readers skip.
    pub(super) fn comment(&mut self, text: &str) {
        self.0.push_str(": ");
        self.0.push_str(text);
        self.0.push_str("\n\n");
    }

    /// OpenAI's last event.
    pub(super) fn done(&mut self) {
        self.0.push_str("data: [DONE]\n\n");
    }

    /// The bytes so far; `None` when there are none, since an empty chunk would end a response.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0).into())
    }
}
