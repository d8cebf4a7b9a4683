//! `/v1/responses`: OpenAI's Responses API as pure data.
//!
//! * [`request`]: the fields of a request, and what is asked of the model.
//! * [`items`]: items of input and output, and the chat that they are.
//! * [`object`]: the response object.
//! * [`events`]: an answer as items and as events.
//!
//! vLLM's contract says what fields there are. Where it lacks what OpenAI's clients expect, OpenAI's
//! published API is followed:
//!
//! * A stream ends with `response.completed`, `response.incomplete` or `response.failed`.
//! * The object has `error`, `store` and `completed_at`.
//! * Streams of background responses have `response.queued`.
//! * A function's output must answer a call that the conversation has.
//! * `instructions` hold for one response and are not inherited.
//! * Reasoning has vLLM's events (`response.reasoning_part.*`, `response.reasoning_text.*`); the
//!   `status` of its items is null as there.
//! * The role `developer` is the template's `system`.
//! * The stream of a response that is cancelled ends without an event of its own, as there is none.

pub mod events;
pub mod items;
pub mod object;
pub mod request;

use crate::error::ApiError;

/// A value of the wrong form, by its place.
fn wrong(path: impl Into<String>, what: &str) -> ApiError {
    let path = path.into();
    ApiError::malformed(format!("`{path}` {what}.")).param(path)
}
