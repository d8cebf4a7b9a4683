//! What all replies to generation requests have: an id, a time, a model.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::object;

/// What all frames of one answer have.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Unix time in seconds.
    pub created: u64,
    /// The served name.
    pub model: String,
}

impl Envelope {
    /// An envelope whose id is the request's after the route's prefix.
    pub fn new(prefix: &str, request_id: &str, model: &str) -> Self {
        let id = format!("{prefix}-{request_id}");
        Self { id, created: unix_seconds(), model: model.to_owned() }
    }

    /// A frame of this kind with these choices.
    pub fn frame(&self, kind: &str, choices: Vec<Value>) -> Map<String, Value> {
        object(json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }))
    }
}

/// Now.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
