//! The JSON schema that a forced tool call is held to.

use serde_json::{Value, json};

use crate::api::tools::ToolSchema;

/// `tool_choice` required: a list of calls.
pub fn required(tools: &[ToolSchema], parallel: bool) -> Value {
    let calls: Vec<Value> = tools
        .iter()
        .map(|tool| {
            json!({
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": parameters(tool)},
                "required": ["name", "parameters"],
                "additionalProperties": false,
            })
        })
        .collect();
    let mut list = json!({"type": "array", "items": {"anyOf": calls}, "minItems": 1});
    if !parallel {
        list["maxItems"] = 1.into();
    }
    list
}

/// A named `tool_choice`: the arguments of that function.
pub fn named(tools: &[ToolSchema], name: &str) -> Value {
    tools
        .iter()
        .find(|tool| tool.name == name)
        .map_or_else(|| json!({"type": "object"}), parameters)
}

fn parameters(tool: &ToolSchema) -> Value {
    tool.parameters.clone().unwrap_or_else(|| json!({"type": "object"}))
}
