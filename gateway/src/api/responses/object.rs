//! The response object, from its first state to its last.

use serde_json::{Map, Value, json};

use super::request::{ResponsesFields, Truncation};
use crate::api::envelope::unix_seconds;
use crate::api::object;
use crate::error::ApiError;

/// A response's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Waits for its turn, in the background.
    Queued,
    /// Is generated.
    InProgress,
    /// Has come to its end.
    Completed,
    /// Was cut.
    Incomplete,
    /// Cannot be had.
    Failed,
    /// Was cancelled by its client.
    Cancelled,
}

impl Status {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether a response of this status still changes.
    pub fn is_live(status: &str) -> bool {
        status == Self::Queued.as_str() || status == Self::InProgress.as_str()
    }
}

/// What the gateway fills in where the request says nothing.
#[derive(Clone, Debug)]
pub struct Resolved<'a> {
    /// The response's id.
    pub id: &'a str,
    /// The served name.
    pub model: &'a str,
    /// Tokens that may be generated.
    pub max_output_tokens: u32,
    /// As it is drawn with.
    pub temperature: f32,
    /// As it is drawn with.
    pub top_p: f32,
    /// Whether the response is kept.
    pub store: bool,
}

/// Tokens of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Of the prompt.
    pub input: usize,
    /// Of the prompt, found in a prefix cache.
    pub cached: usize,
    /// Of the answer.
    pub output: usize,
    /// Of the answer, thought before it.
    pub reasoning: usize,
}

impl Tokens {
    /// The `usage` object.
    pub fn json(self) -> Value {
        json!({
            "input_tokens": self.input,
            "input_tokens_details": {
                "cached_tokens": self.cached,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": self.output,
            "output_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": self.input + self.output,
        })
    }
}

/// A response object that changes its status.
#[derive(Clone, Debug)]
pub struct ResponseObject(Map<String, Value>);

impl ResponseObject {
    /// A response that begins now.
    pub fn new(fields: &ResponsesFields, resolved: &Resolved<'_>, status: Status) -> Self {
        let text = fields.text.clone().map_or_else(|| json!({}), Value::Object);
        let mut text = object(text);
        if text.get("format").is_none_or(Value::is_null) {
            text.insert("format".into(), json!({"type": "text"}));
        }
        let reasoning = fields.reasoning.clone().unwrap_or_default();
        let summary = reasoning.summary.or(reasoning.generate_summary);
        let truncation = match fields.truncation.unwrap_or_default() {
            Truncation::Disabled => "disabled",
            Truncation::Auto => "auto",
        };
        let metadata = fields.metadata.clone().unwrap_or_else(|| json!({}));
        Self(object(json!({
            "id": resolved.id,
            "object": "response",
            "created_at": unix_seconds(),
            "status": status.as_str(),
            "background": fields.background(),
            "completed_at": null,
            "error": null,
            "incomplete_details": null,
            "instructions": fields.instructions,
            "max_output_tokens": resolved.max_output_tokens,
            "max_tool_calls": fields.max_tool_calls,
            "model": resolved.model,
            "output": [],
            "parallel_tool_calls": fields.parallel_tool_calls.unwrap_or(true),
            "previous_response_id": fields.previous_response_id,
            "prompt": null,
            "prompt_cache_key": fields.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": summary},
            "safety_identifier": fields.safety_identifier,
            "service_tier": fields.service_tier.as_deref().unwrap_or("auto"),
            "store": resolved.store,
            "temperature": fields.temperature.unwrap_or_else(|| shortest(resolved.temperature)),
            "text": text,
            "tool_choice": fields.tool_choice.clone().unwrap_or_else(|| "auto".into()),
            "tools": fields.tools.clone().unwrap_or_else(|| json!([])),
            "top_logprobs": fields.top_logprobs.unwrap_or(0),
            "top_p": fields.top_p.unwrap_or_else(|| shortest(resolved.top_p)),
            "truncation": truncation,
            "usage": null,
            "user": fields.user,
            "metadata": metadata,
            "input_messages": null,
            "output_messages": null,
        })))
    }

    /// A response object that was written before.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            _ => Err(ApiError::internal("A response was kept that cannot be read.")),
        }
    }

    /// The object.
    pub fn json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// The object's text.
    pub fn text(&self) -> String {
        self.json().to_string()
    }

    /// The output items.
    pub fn output(&self) -> &[Value] {
        self.0.get("output").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// Unix time in seconds.
    pub fn created(&self) -> u64 {
        self.0.get("created_at").and_then(Value::as_u64).unwrap_or_default()
    }

    /// The status.
    pub fn status(&self) -> Status {
        let status = self.0.get("status").and_then(Value::as_str).unwrap_or_default();
        let all = [
            Status::Queued,
            Status::InProgress,
            Status::Completed,
            Status::Incomplete,
            Status::Cancelled,
        ];
        all.into_iter().find(|one| one.as_str() == status).unwrap_or(Status::Failed)
    }

    /// Changes the status.
    pub fn set_status(&mut self, status: Status) {
        self.0.insert("status".into(), status.as_str().into());
    }

    /// Adds what was generated.
    pub fn set_output(&mut self, output: Vec<Value>, tokens: Tokens) {
        self.0.insert("output".into(), output.into());
        self.0.insert("usage".into(), tokens.json());
    }

    /// Comes to its end.
    pub fn complete(&mut self) {
        self.set_status(Status::Completed);
        self.0.insert("completed_at".into(), unix_seconds().into());
    }

    /// Was cut because it may not be longer.
    pub fn cut(&mut self) {
        self.set_status(Status::Incomplete);
        self.0.insert("incomplete_details".into(), json!({"reason": "max_output_tokens"}));
    }

    /// Could not be kept.
    pub fn not_kept(&mut self) {
        self.0.insert("store".into(), false.into());
    }

    /// Fails.
    pub fn fail(&mut self, error: &ApiError) {
        self.set_status(Status::Failed);
        let message = &error.body()["error"]["message"];
        self.0.insert("error".into(), json!({"code": code(error), "message": message}));
    }
}

/// OpenAI's word for an error.
fn code(error: &ApiError) -> &'static str {
    use actix_web::ResponseError as _;
    match error.status_code().as_u16() {
        429 => "rate_limit_exceeded",
        400..=499 => "invalid_prompt",
        _ => "server_error",
    }
}

/// The number that is meant, not its neighbour in 32 bits: 0.7 in place of 0.699999988.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}
