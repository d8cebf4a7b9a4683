//! What all replies to generation requests have: an id, a time, a model.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::object;

/// The longest id that a client may give its request.
const MAX_ID: usize = 256;

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
    /// An envelope whose id is `own`, the client's, or a random one, after the route's prefix.
    pub fn new(prefix: &str, own: Option<&str>, model: &str) -> Self {
        let id = match own.filter(|id| !id.is_empty() && id.len() <= MAX_ID) {
            Some(id) => format!("{prefix}-{id}"),
            None => {
                // From the thread's own generator: the system's would be asked at each request.
                let random = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
                format!("{prefix}-{}", random.simple())
            }
        };
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
