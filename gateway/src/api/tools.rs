//! `tools` and `tool_choice`: which functions the model may call, and whether it must.

use serde_json::Value;

use super::Body;
use crate::error::ApiError;

/// The most tools of a request.
pub const MAX_TOOLS: usize = 128;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSchema {
    /// 1 to 64 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON schema of its arguments, an object; `None` if it takes any or none.
    pub parameters: Option<Value>,
    /// Whether the arguments must follow the schema.
    pub strict: bool,
}

/// Whether the model may, must or must not call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// It does not call.
    None,
    /// It decides.
    Auto,
    /// It calls at least one function.
    Required,
    /// It calls this function.
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// The functions, at least one.
    pub list: Vec<ToolSchema>,
    /// Whether one is called.
    pub choice: ToolChoice,
    /// Whether the answer may hold more than one call.
    pub parallel: bool,
    /// As they came, for the chat template.
    pub raw: Vec<Value>,
}

impl Tools {
    /// The fields `tools`, `tool_choice` and `parallel_tool_calls` in the form of chats; `None`
    /// without tools.
    pub fn read(body: &mut Body) -> Result<Option<Self>, ApiError> {
        let _ = body;
        Ok(None)
    }

    /// The same from values, for routes that convert their own form to that of chats.
    pub fn from_chat(
        tools: Option<&Value>,
        choice: Option<&Value>,
        parallel: Option<bool>,
    ) -> Result<Option<Self>, ApiError> {
        let _ = (tools, choice, parallel);
        Ok(None)
    }
}
