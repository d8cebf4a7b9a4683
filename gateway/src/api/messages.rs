//! `POST /v1/messages`: a chat in Anthropic's form, turned into that of chat completions, and the
//! answer's parts turned into Anthropic's blocks and events.
//!
//! Source: Anthropic's published API reference, version `2023-06-01`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::Body;
use super::schema::anthropic;
use super::usage::Usage;
use crate::error::ApiError;
use crate::output::Part;

/// The fields as they come. Absent and `null` are the same.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct MessagesFields {
    /// Served model.
    #[schema(value_type = String, min_length = 1)]
    model: Option<String>,
    /// The conversation; a last message of the assistant is continued.
    #[schema(value_type = Vec<anthropic::Message>, min_items = 1)]
    messages: Option<Value>,
    /// The most tokens of the answer.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    max_tokens: Option<i64>,
    /// What the model is told before the conversation.
    #[schema(value_type = Option<anthropic::Text>)]
    system: Option<Value>,
    /// Strings that end the answer, and are no part of it.
    #[schema(max_items = 256)]
    stop_sequences: Option<Vec<String>>,
    /// Send the answer as it comes.
    stream: Option<bool>,
    /// 0 is greedy.
    #[schema(minimum = 0.0, maximum = 2.0)]
    temperature: Option<f64>,
    /// Draw from this many of the most likely tokens; 0 is off.
    #[schema(minimum = -1, maximum = 4294967295i64)]
    top_k: Option<i64>,
    /// Draw from the most likely tokens that have this probability together.
    #[schema(exclusive_minimum = 0.0, maximum = 1.0)]
    top_p: Option<f64>,
    /// Functions that the model may call.
    #[schema(value_type = Option<Vec<anthropic::Tool>>)]
    tools: Option<Vec<Value>>,
    /// Whether it may, must or must not call.
    #[schema(value_type = Option<anthropic::ToolChoice>)]
    tool_choice: Option<Map<String, Value>>,
    /// Whether it thinks before it answers, for templates that can be told.
    #[schema(value_type = Option<anthropic::Thinking>)]
    thinking: Option<Map<String, Value>>,
    /// How hard it thinks, and in which form it answers.
    #[schema(value_type = Option<anthropic::OutputConfig>)]
    output_config: Option<Map<String, Value>>,
}

/// Anthropic's fields that change nothing here, beside those of all routes.
pub const IGNORED: &[&str] = &["cache_control", "inference_geo", "speed"];

/// How Claude Code begins what it says of billing, in a block of `system` or on its first line.
const BILLING: &str = "x-anthropic-billing-header";

/// A field at fault, and why.
fn wrong(path: impl Into<String>, what: &str) -> ApiError {
    let path = path.into();
    ApiError::malformed(format!("`{path}` {what}.")).param(path)
}

impl MessagesFields {
    /// The same chat as a body of chat completions.
    pub fn to_chat(&self) -> Result<Body, ApiError> {
        let model = self.model.as_deref().filter(|model| !model.is_empty());
        let model = model.ok_or_else(|| wrong("model", "is required"))?;
        let mut chat = Map::new();
        let mut set = |field: &str, value: Value| drop(chat.insert(field.to_owned(), value));
        set("model", model.into());
        let turns = self.turns()?;
        if turns.last().is_some_and(|last| last["role"] == "assistant") {
            // The answer goes on from there.
            set("continue_final_message", true.into());
        }
        set("messages", turns.into());
        set("max_tokens", json!(self.max_tokens));
        set("stream", json!(self.stream));
        set("temperature", json!(self.temperature));
        set("top_k", json!(self.top_k));
        set("top_p", json!(self.top_p));
        if let Some(stops) = self.stop_sequences.as_ref().filter(|stops| !stops.is_empty()) {
            if stops.iter().any(String::is_empty) {
                return Err(wrong("stop_sequences", "must not hold an empty string"));
            }
            set("stop", json!(stops));
        }
        if let Some(tools) = self.tools.as_ref().filter(|tools| !tools.is_empty()) {
            let tools: Result<Vec<Value>, _> =
                tools.iter().enumerate().map(|(at, tool)| function(tool, at)).collect();
            set("tools", tools?.into());
        }
        if let Some(choice) = &self.tool_choice {
            set("tool_choice", tool_choice(choice)?);
            if let Some(alone) = flag(choice, "disable_parallel_tool_use", "tool_choice")? {
                set("parallel_tool_calls", (!alone).into());
            }
        }
        if let Some(thinking) = &self.thinking {
            set("chat_template_kwargs", json!({"enable_thinking": thinks(thinking)?}));
        }
        if let Some(config) = &self.output_config {
            set("reasoning_effort", config.get("effort").cloned().unwrap_or_default());
            if let Some(format) = config.get("format").filter(|format| !format.is_null()) {
                set("response_format", response_format(format)?);
            }
        }
        Ok(Body::new(chat))
    }

    /// Refuses a request that does not say how long its answer may be.
    pub fn check_max_tokens(&self) -> Result<(), ApiError> {
        match self.max_tokens {
            Some(1..) => Ok(()),
            Some(_) => Err(wrong("max_tokens", "must be at least 1")),
            None => Err(wrong("max_tokens", "is required")),
        }
    }

    /// Whether the answer is a stream.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// The messages as chat completions have them. What the system says before all others is one
    /// message. Most templates take none later: what it says then stays in its place, so that the
    /// prompt goes on to begin like the one before, as a part of what the user says.
    fn turns(&self) -> Result<Vec<Value>, ApiError> {
        let messages = match &self.messages {
            None => return Err(wrong("messages", "is required")),
            Some(Value::Array(list)) if !list.is_empty() => list,
            Some(_) => return Err(wrong("messages", "must be a list of at least one message")),
        };
        let mut turns = Vec::with_capacity(messages.len() + 1);
        let mut told = Vec::new();
        if let Some(system) = &self.system {
            told.push(told_text(system, "system")?);
        }
        // Templates want to know whose result it is.
        let mut names = HashMap::new();
        for (at, message) in messages.iter().enumerate() {
            let at = format!("messages[{at}]");
            let content = message.get("content").unwrap_or(&Value::Null);
            match message["role"].as_str() {
                // vLLM's other words for it.
                Some("user" | "ctx" | "msg") => {
                    user(content, &format!("{at}.content"), &names, &mut turns)?;
                }
                Some("assistant") => {
                    turns.push(assistant(content, &format!("{at}.content"), &mut names)?);
                }
                Some("system") => {
                    let text = told_text(content, &format!("{at}.content"))?;
                    match turns.is_empty() {
                        true => told.push(text),
                        false if text.is_empty() => {}
                        // The words that Claude Code has for it.
                        false => {
                            say(
                                &format!("<system-reminder>\n{text}\n</system-reminder>"),
                                &mut turns,
                            );
                        }
                    }
                }
                _ => {
                    let what = "must be \"user\", \"assistant\" or \"system\"";
                    return Err(wrong(format!("{at}.role"), what));
                }
            }
        }
        let Some(last) = turns.last() else {
            let what = "must be a list of at least one message that is not the system's";
            return Err(wrong("messages", what));
        };
        if last["role"] == "assistant" {
            let at = format!("messages[{}].content", messages.len() - 1);
            if last.get("tool_calls").is_some() {
                let what = "ends with a `tool_use`; its `tool_result` must follow";
                return Err(wrong(at, what));
            }
            if last["content"].as_str().is_none_or(|text| text.trim().is_empty()) {
                return Err(wrong(at, "is the beginning of the answer; it must hold text"));
            }
        }
        told.retain(|text| !text.is_empty());
        if !told.is_empty() {
            turns.insert(0, json!({"role": "system", "content": told.join("\n")}));
        }
        Ok(turns)
    }
}

/// A content's blocks, each with its place and its type.
fn blocks<'a>(
    content: &'a [Value],
    at: &str,
) -> impl Iterator<Item = Result<(String, &'a str, &'a Value), ApiError>> {
    content.iter().enumerate().map(move |(i, block)| {
        let at = format!("{at}[{i}]");
        match block["type"].as_str() {
            Some(kind) => Ok((at, kind, block)),
            None => Err(wrong(format!("{at}.type"), "must be a string")),
        }
    })
}

fn not_read(at: &str, kind: &str, known: &str) -> ApiError {
    // What a client makes up is not repeated at length.
    let kind: String = kind.chars().take(40).collect();
    let what = format!("is {kind:?}, which this model does not read here; it reads {known}");
    wrong(format!("{at}.type"), &what)
}

fn string<'a>(block: &'a Value, field: &str, at: &str) -> Result<&'a str, ApiError> {
    block[field].as_str().ok_or_else(|| wrong(format!("{at}.{field}"), "must be a string"))
}

fn flag(of: &Map<String, Value>, field: &str, at: &str) -> Result<Option<bool>, ApiError> {
    match of.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => Err(wrong(format!("{at}.{field}"), "must be true or false")),
    }
}

/// A string, or blocks that are all text.
fn texts<'a>(content: &'a Value, at: &str) -> Result<Vec<&'a str>, ApiError> {
    let list = match content {
        Value::String(text) => return Ok(vec![text.as_str()]),
        Value::Array(list) => list,
        _ => return Err(wrong(at, "must be a string or a list of blocks")),
    };
    let mut texts = Vec::with_capacity(list.len());
    for block in blocks(list, at) {
        match block? {
            (at, "text", block) => texts.push(string(block, "text", &at)?),
            (at, kind, _) => return Err(not_read(&at, kind, "\"text\"")),
        }
    }
    Ok(texts)
}

/// The same as one text.
fn text(content: &Value, at: &str) -> Result<String, ApiError> {
    Ok(texts(content, at)?.join("\n"))
}

/// What the system says, without Claude Code's line on billing: it changes with each request, and
/// no prompt would begin like the one before.
fn told_text(content: &Value, at: &str) -> Result<String, ApiError> {
    let told = texts(content, at)?.into_iter().filter_map(|text| match text.starts_with(BILLING) {
        true => text.split_once('\n').map(|(_, rest)| rest),
        false => Some(text),
    });
    Ok(told.collect::<Vec<_>>().join("\n"))
}

/// Turns of the user that follow each other are one, as Anthropic has it: some templates refuse two.
fn say(text: &str, turns: &mut Vec<Value>) {
    let last = turns.last_mut().filter(|turn| turn["role"] == "user");
    match last.map(|turn| &mut turn["content"]) {
        Some(Value::String(before)) => {
            before.push('\n');
            before.push_str(text);
        }
        _ => turns.push(json!({"role": "user", "content": text})),
    }
}

/// A user's message: results become messages of their own, in the order of the blocks.
fn user(
    content: &Value,
    at: &str,
    names: &HashMap<String, String>,
    turns: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let Value::Array(list) = content else {
        say(&text(content, at)?, turns);
        return Ok(());
    };
    if list.is_empty() {
        return Err(wrong(at, "must hold at least one block"));
    }
    let mut texts: Vec<&str> = Vec::new();
    let said = |texts: &mut Vec<&str>, turns: &mut Vec<Value>| {
        if !texts.is_empty() {
            say(&texts.join("\n"), turns);
            texts.clear();
        }
    };
    for block in blocks(list, at) {
        match block? {
            (at, "text", block) => texts.push(string(block, "text", &at)?),
            (at, "tool_result", block) => {
                said(&mut texts, turns);
                let id = string(block, "tool_use_id", &at)?;
                let result = match &block["content"] {
                    Value::Null => String::new(),
                    content => text(content, &format!("{at}.content"))?,
                };
                let mut turn = json!({"role": "tool", "tool_call_id": id, "content": result});
                if let Some(name) = names.get(id) {
                    turn["name"] = name.as_str().into();
                }
                turns.push(turn);
            }
            (at, kind, _) => return Err(not_read(&at, kind, "\"text\" and \"tool_result\"")),
        }
    }
    said(&mut texts, turns);
    Ok(())
}

/// An assistant's message. `names` learns which call is of which function.
fn assistant(
    content: &Value,
    at: &str,
    names: &mut HashMap<String, String>,
) -> Result<Value, ApiError> {
    let Value::Array(list) = content else {
        return Ok(json!({"role": "assistant", "content": text(content, at)?}));
    };
    let (mut texts, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for block in blocks(list, at) {
        match block? {
            (at, "text", block) => texts.push(string(block, "text", &at)?),
            (at, "thinking", block) => thoughts.push(string(block, "thinking", &at)?),
            // Only Anthropic can read it.
            (_, "redacted_thinking", _) => {}
            (at, "tool_use", block) => {
                let (id, name) = (string(block, "id", &at)?, string(block, "name", &at)?);
                let input = block.get("input").filter(|input| input.is_object());
                let input =
                    input.ok_or_else(|| wrong(format!("{at}.input"), "must be an object"))?;
                names.insert(id.to_owned(), name.to_owned());
                calls.push(json!({
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": input.to_string()},
                }));
            }
            (at, kind, _) => {
                return Err(not_read(&at, kind, "\"text\", \"thinking\" and \"tool_use\""));
            }
        }
    }
    let mut turn = json!({"role": "assistant", "content": texts.join("\n")});
    if !thoughts.is_empty() {
        turn["reasoning"] = thoughts.join("\n").into();
    }
    if !calls.is_empty() {
        turn["tool_calls"] = calls.into();
    }
    Ok(turn)
}

/// A tool in the form of chat completions.
fn function(tool: &Value, at: usize) -> Result<Value, ApiError> {
    let at = format!("tools[{at}]");
    if !tool.is_object() {
        return Err(wrong(at, "must be an object with `name` and `input_schema`"));
    }
    match &tool["type"] {
        Value::Null => {}
        kind if kind == "custom" => {}
        _ => {
            let what = "must be \"custom\": this server runs no tools of its own";
            return Err(wrong(format!("{at}.type"), what));
        }
    }
    let name = string(tool, "name", &at)?;
    if !tool["input_schema"].is_object() {
        return Err(wrong(format!("{at}.input_schema"), "must be an object, a JSON schema"));
    }
    let mut function = json!({"name": name, "parameters": tool["input_schema"]});
    for field in ["description", "strict"] {
        if let Some(value) = tool.get(field).filter(|value| !value.is_null()) {
            function[field] = value.clone();
        }
    }
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: &Map<String, Value>) -> Result<Value, ApiError> {
    match choice.get("type").and_then(Value::as_str) {
        Some("auto") => Ok("auto".into()),
        Some("any") => Ok("required".into()),
        Some("none") => Ok("none".into()),
        Some("tool") => match choice.get("name").and_then(Value::as_str) {
            Some(name) => Ok(json!({"type": "function", "function": {"name": name}})),
            None => Err(wrong("tool_choice.name", "must be the name of a tool")),
        },
        _ => Err(wrong("tool_choice.type", "must be \"auto\", \"any\", \"tool\" or \"none\"")),
    }
}

fn thinks(thinking: &Map<String, Value>) -> Result<bool, ApiError> {
    let thinks = match thinking.get("type").and_then(Value::as_str) {
        Some("enabled" | "adaptive") => true,
        Some("disabled") => false,
        _ => {
            let what = "must be \"enabled\", \"adaptive\" or \"disabled\"";
            return Err(wrong("thinking.type", what));
        }
    };
    match thinking.get("budget_tokens") {
        None | Some(Value::Null) => Ok(thinks),
        Some(budget) if budget.as_i64().is_some_and(|budget| budget >= 0) => Ok(thinks),
        Some(_) => Err(wrong("thinking.budget_tokens", "must be a whole number")),
    }
}

fn response_format(format: &Value) -> Result<Value, ApiError> {
    if format["type"] != "json_schema" {
        return Err(wrong("output_config.format.type", "must be \"json_schema\""));
    }
    if !format["schema"].is_object() {
        return Err(wrong("output_config.format.schema", "must be an object, a JSON schema"));
    }
    let schema = json!({"name": "answer", "schema": format["schema"]});
    Ok(json!({"type": "json_schema", "json_schema": schema}))
}

/// Turns an answer's parts into the events of its blocks.
#[derive(Debug, Default)]
pub struct Blocks {
    /// The type of the block that is open.
    open: Option<&'static str>,
    /// Blocks that have begun.
    count: usize,
    /// White space that is sent when text follows it: alone it makes no block.
    held: String,
    held_for: &'static str,
    called: bool,
}

impl Blocks {
    /// Whether the answer has a call.
    pub fn called(&self) -> bool {
        self.called
    }

    /// The events of a part.
    pub fn push(&mut self, part: Part, events: &mut Vec<Value>) {
        match part {
            Part::Reasoning(text) => self.text("thinking", text, events),
            Part::Content(text) => self.text("text", text, events),
            Part::CallStart { id, name, .. } => {
                self.called = true;
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                self.start("tool_use", block, events);
            }
            Part::CallArguments { text, .. } => {
                let delta = json!({"type": "input_json_delta", "partial_json": text});
                self.delta(delta, events);
            }
        }
    }

    /// The events after the last part.
    pub fn finish(&mut self, events: &mut Vec<Value>) {
        if self.open.take().is_some() {
            events.push(json!({"type": "content_block_stop", "index": self.count - 1}));
        }
    }

    fn text(&mut self, kind: &'static str, text: String, events: &mut Vec<Value>) {
        let mut text = text;
        if self.open != Some(kind) {
            if self.held_for != kind {
                self.held.clear();
                self.held_for = kind;
            }
            self.held.push_str(&text);
            if self.held.trim().is_empty() {
                return;
            }
            text = std::mem::take(&mut self.held);
            let block = match kind {
                "thinking" => json!({"type": "thinking", "thinking": "", "signature": ""}),
                _ => json!({"type": "text", "text": ""}),
            };
            self.start(kind, block, events);
        }
        let delta = match kind {
            "thinking" => json!({"type": "thinking_delta", "thinking": text}),
            _ => json!({"type": "text_delta", "text": text}),
        };
        self.delta(delta, events);
    }

    fn start(&mut self, kind: &'static str, block: Value, events: &mut Vec<Value>) {
        self.finish(events);
        self.held.clear();
        self.open = Some(kind);
        let index = self.count;
        self.count += 1;
        let event = json!({"type": "content_block_start", "index": index, "content_block": block});
        events.push(event);
    }

    fn delta(&mut self, delta: Value, events: &mut Vec<Value>) {
        if self.open.is_some() {
            let index = self.count - 1;
            events.push(json!({"type": "content_block_delta", "index": index, "delta": delta}));
        }
    }
}

/// The blocks that events make: a whole answer is the sum of its stream.
pub fn assemble(events: &[Value]) -> Vec<Value> {
    let mut blocks: Vec<Value> = Vec::new();
    let mut input = String::new();
    for event in events {
        match event["type"].as_str() {
            Some("content_block_start") => blocks.push(event["content_block"].clone()),
            Some("content_block_delta") => {
                let Some(block) = blocks.last_mut() else { continue };
                for field in ["text", "thinking"] {
                    if let (Some(more), Some(Value::String(text))) =
                        (event["delta"][field].as_str(), block.get_mut(field))
                    {
                        text.push_str(more);
                    }
                }
                input.push_str(event["delta"]["partial_json"].as_str().unwrap_or_default());
            }
            Some("content_block_stop") => {
                let input = std::mem::take(&mut input);
                let Some(block) = blocks.last_mut().filter(|it| it["type"] == "tool_use") else {
                    continue;
                };
                // A call that was cut has no input: `stop_reason` tells.
                if let Ok(value @ Value::Object(_)) = serde_json::from_str(&input) {
                    block["input"] = value;
                }
            }
            _ => {}
        }
    }
    blocks
}

/// Why an answer ended, and the stop sequence that did it. `reason` and `stop` are the engine's.
pub fn stop_reason(reason: &str, stop: &Value, called: bool) -> (&'static str, Value) {
    match (reason, stop) {
        // `abort` too: the answer is cut.
        ("length" | "abort", _) => ("max_tokens", Value::Null),
        (_, Value::String(_)) => ("stop_sequence", stop.clone()),
        _ if called => ("tool_use", Value::Null),
        _ => ("end_turn", Value::Null),
    }
}

/// The `usage` object.
pub fn usage(usage: Usage) -> Value {
    json!({"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens})
}

/// An error's body; `error` is that of the other routes.
pub fn error(status: u16, error: &Value) -> Value {
    let kind = match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error["error"]["message"]}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(mut extra: Value) -> Result<Value, String> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
        let Value::Object(extra) = extra.take() else { panic!() };
        body.as_object_mut().unwrap().extend(extra);
        let fields: MessagesFields =
            Body::parse(body.to_string().as_bytes()).unwrap().read().map_err(param)?;
        let chat = fields.to_chat().map_err(param)?;
        Ok(chat.fields.clone())
    }

    fn param(error: ApiError) -> String {
        assert_eq!(error.body()["error"]["code"], 400);
        error.body()["error"]["param"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_conversation_with_tools_becomes_one_of_chat_completions() {
        let got = chat(json!({
            "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Wait."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1",
                     "content": [{"type": "text", "text": "one"}]},
                    {"type": "tool_result", "tool_use_id": "t2"},
                    {"type": "text", "text": "Go on."},
                ]},
            ],
        }));
        let expected = json!([
            {"role": "system", "content": "a\nb"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "Wait.", "reasoning": "hm", "tool_calls": [
                {"id": "t1", "type": "function",
                 "function": {"name": "f", "arguments": "{\"x\":1}"}},
            ]},
            {"role": "tool", "tool_call_id": "t1", "content": "one", "name": "f"},
            {"role": "tool", "tool_call_id": "t2", "content": ""},
            {"role": "user", "content": "Go on."},
        ]);
        let got = got.unwrap();
        assert_eq!(got["messages"], expected);
        assert_eq!(got.get("continue_final_message"), None);
    }

    #[test]
    fn what_the_system_says_is_one_message_or_stays_in_its_place() {
        let messages = json!([
            {"role": "system", "content": [{"type": "text", "text": "b"}]},
            {"role": "ctx", "content": "Q"},
            {"role": "system", "content": "c"},
            {"role": "assistant", "content": "A"},
            {"role": "msg", "content": [{"type": "text", "text": "Why?"}]},
            {"role": "system", "content": ""},
            {"role": "user", "content": "Tell."},
        ]);
        let said = json!([
            {"role": "user", "content": "Q\n<system-reminder>\nc\n</system-reminder>"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "Why?\nTell."},
        ]);
        for (system, told) in [(json!("a"), "a\nb"), (json!(null), "b"), (json!(""), "b")] {
            let got = chat(json!({"system": system, "messages": messages})).unwrap();
            let mut expected = vec![json!({"role": "system", "content": told})];
            expected.extend(said.as_array().unwrap().iter().cloned());
            assert_eq!(got["messages"], Value::from(expected));
        }
        // Nothing said is no message.
        let got = chat(json!({"system": "", "messages": [{"role": "user", "content": "Q"}]}));
        assert_eq!(got.unwrap()["messages"], json!([{"role": "user", "content": "Q"}]));
    }

    #[test]
    fn what_is_said_of_billing_is_not_told() {
        let billing = "x-anthropic-billing-header: cc_version=2.1; cch=1f2e;";
        let block = |text: &str| json!({"type": "text", "text": text});
        for system in [
            json!([block(billing), block("Be brief."), block("Be kind.")]),
            json!([block("Be brief."), block(billing), block("Be kind.")]),
            json!(format!("{billing}\nBe brief.\nBe kind.")),
        ] {
            let among = json!([
                {"role": "system", "content": system}, {"role": "user", "content": "Q"},
            ]);
            for got in [chat(json!({"system": system})), chat(json!({"messages": among}))] {
                assert_eq!(
                    got.unwrap()["messages"][0]["content"],
                    "Be brief.\nBe kind.",
                    "{system}"
                );
            }
        }
        for system in [json!(billing), json!([block(billing)])] {
            let got = chat(json!({"system": system})).unwrap();
            assert_eq!(got["messages"][0]["role"], "user");
        }
        // It is the user's to say.
        let got = chat(json!({"messages": [{"role": "user", "content": billing}]})).unwrap();
        assert_eq!(got["messages"][0]["content"], billing);
    }

    #[test]
    fn an_answer_that_has_begun_goes_on() {
        let messages = json!([
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "So"},
        ]);
        assert_eq!(chat(json!({"messages": messages})).unwrap()["continue_final_message"], true);
    }

    #[test]
    fn settings_have_other_names() {
        let schema = json!({"type": "object"});
        let got = chat(json!({
            "max_tokens": 5,
            "stop_sequences": ["x"],
            "tools": [{"name": "f", "description": "d", "input_schema": schema, "type": "custom"}],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": true},
            "thinking": {"type": "disabled"},
            "output_config": {
                "effort": "low", "format": {"type": "json_schema", "schema": schema},
            },
        }));
        let got = got.unwrap();
        let function = json!({"name": "f", "parameters": schema, "description": "d"});
        assert_eq!(got["tools"], json!([{"type": "function", "function": function}]));
        let choice = json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(got["tool_choice"], choice);
        assert_eq!(got["parallel_tool_calls"], false);
        assert_eq!(got["stop"], json!(["x"]));
        assert_eq!(got["chat_template_kwargs"], json!({"enable_thinking": false}));
        assert_eq!(got["reasoning_effort"], "low");
        assert_eq!(got["response_format"]["json_schema"]["schema"], schema);
        assert_eq!(
            chat(json!({"tool_choice": {"type": "any"}})).unwrap()["tool_choice"],
            "required"
        );
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        let of =
            |role: &str, content: Value| json!({"messages": [{"role": role, "content": content}]});
        let image = json!([{"type": "image", "source": {}}]);
        let call = json!([{"type": "tool_use", "id": "t", "name": "f", "input": {}}]);
        for (extra, place) in [
            (json!({"model": ""}), "model"),
            (json!({"model": null}), "model"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [5]}), "messages[0].role"),
            (of("system", json!("x")), "messages"),
            (of("system", json!(5)), "messages[0].content"),
            (of("tool", json!("x")), "messages[0].role"),
            (of("user", json!(5)), "messages[0].content"),
            (of("user", json!([])), "messages[0].content"),
            (of("user", json!([{}])), "messages[0].content[0].type"),
            (of("user", image.clone()), "messages[0].content[0].type"),
            (of("user", json!([{"type": "text"}])), "messages[0].content[0].text"),
            (
                of("user", json!([{"type": "tool_result", "tool_use_id": "t", "content": image}])),
                "messages[0].content[0].content[0].type",
            ),
            (of("user", call.clone()), "messages[0].content[0].type"),
            (of("assistant", call), "messages[0].content"),
            (of("assistant", json!(" ")), "messages[0].content"),
            (
                of("assistant", json!([{"type": "tool_use", "id": "t", "name": "f"}])),
                "messages[0].content[0].input",
            ),
            (json!({"system": 5}), "system"),
            (json!({"system": [{"type": "image"}]}), "system[0].type"),
            (json!({"stop_sequences": [""]}), "stop_sequences"),
            (json!({"tools": [5]}), "tools[0]"),
            (json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}), "tools[0].type"),
            (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
            (json!({"tool_choice": {"type": "all"}}), "tool_choice.type"),
            (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name"),
            (json!({"thinking": {"type": "on"}}), "thinking.type"),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": "x"}}),
                "thinking.budget_tokens",
            ),
            (json!({"output_config": {"format": {"type": "xml"}}}), "output_config.format.type"),
        ] {
            assert_eq!(chat(extra.clone()).unwrap_err(), place, "{extra}");
        }
    }

    #[test]
    fn parts_become_blocks_in_order() {
        let mut blocks = Blocks::default();
        let mut events = Vec::new();
        let (start, args) = (
            |index, id: &str| Part::CallStart { index, id: id.into(), name: "f".into() },
            |index, text: &str| Part::CallArguments { index, text: text.into() },
        );
        for part in [
            Part::Reasoning("\n".into()),
            Part::Reasoning("hm".into()),
            Part::Content("\n".into()),
            Part::Content("a".into()),
            Part::Content("b".into()),
            start(0, "t1"),
            args(0, "{\"x\""),
            args(0, ":1}"),
            Part::Content("\n".into()),
            start(1, "t2"),
            args(1, "{\"y"),
        ] {
            blocks.push(part, &mut events);
        }
        blocks.finish(&mut events);
        let seen: Vec<String> = events
            .iter()
            .map(|event| format!("{} {}", event["type"].as_str().unwrap(), event["index"]))
            .collect();
        let block = |index: usize, deltas: usize| {
            let mut lines = vec![format!("content_block_start {index}")];
            lines.extend(vec![format!("content_block_delta {index}"); deltas]);
            lines.push(format!("content_block_stop {index}"));
            lines
        };
        let expected = [block(0, 1), block(1, 2), block(2, 2), block(3, 1)].concat();
        assert_eq!(seen, expected);
        assert!(blocks.called());
        let whole = json!([
            {"type": "thinking", "thinking": "\nhm", "signature": ""},
            {"type": "text", "text": "\nab"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
        ]);
        assert_eq!(Value::Array(assemble(&events)), whole);
    }

    #[test]
    fn ends_have_anthropics_names() {
        let none = Value::Null;
        assert_eq!(stop_reason("stop", &none, false), ("end_turn", none.clone()));
        assert_eq!(stop_reason("stop", &none, true), ("tool_use", none.clone()));
        assert_eq!(stop_reason("length", &none, true), ("max_tokens", none.clone()));
        assert_eq!(stop_reason("stop", &json!("x"), false), ("stop_sequence", json!("x")));
        assert_eq!(stop_reason("stop", &json!(7), false), ("end_turn", none));
    }
}
