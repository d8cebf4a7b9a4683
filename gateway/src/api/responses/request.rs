//! A request: its fields, its checks, and the chat request that it becomes.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{items, wrong};
use crate::api::Body;
use crate::error::ApiError;

/// The longest id, a response's or one that a request refers to.
const MAX_ID: usize = 256;
/// Bounds of `metadata`.
const MAX_PAIRS: usize = 16;
const MAX_KEY: usize = 64;
const MAX_VALUE: usize = 512;

/// Fields that mean the same in chats and go there as they came.
pub const SHARED: &[&str] = &[
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "skip_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "cache_salt",
    "priority",
    "parallel_tool_calls",
];

/// Fields that change nothing here.
pub const IGNORED: &[&str] =
    &["mm_processor_kwargs", "prompt_cache_retention", "stream_options", "vllm_xargs"];

/// What `include` may hold; the first is heeded, the others ask for what there is none of.
pub const INCLUDES: &[&str] = &[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];

/// The fields of a request that do not go to the chat as they came.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ResponsesFields {
    /// A text, or items: messages, calls and their outputs, reasoning.
    #[schema(required)]
    input: Option<Value>,
    /// The system's message of this response.
    pub instructions: Option<String>,
    /// Unclipped.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    pub max_output_tokens: Option<i64>,
    /// As it came.
    #[schema(minimum = 1)]
    pub max_tool_calls: Option<i64>,
    /// As it came.
    pub temperature: Option<f64>,
    /// As it came.
    pub top_p: Option<f64>,
    /// Alternatives to each token's log-probability.
    pub top_logprobs: Option<i64>,
    include: Option<Vec<String>>,
    /// `effort` and `summary`.
    pub reasoning: Option<Reasoning>,
    /// `format` and `verbosity`.
    pub text: Option<Map<String, Value>>,
    /// As it came.
    pub metadata: Option<Value>,
    /// As it came.
    pub user: Option<String>,
    /// As it came.
    pub safety_identifier: Option<String>,
    /// As it came.
    pub prompt_cache_key: Option<String>,
    /// As it came.
    pub service_tier: Option<String>,
    prompt: Option<Value>,
    conversation: Option<Value>,
    context_management: Option<Value>,
    /// As it came.
    pub tools: Option<Value>,
    /// As it came.
    pub tool_choice: Option<Value>,
    /// As it came.
    pub parallel_tool_calls: Option<bool>,
    /// Whether a conversation that is too long is cut at its beginning.
    pub truncation: Option<Truncation>,
    store: Option<bool>,
    stream: Option<bool>,
    background: Option<bool>,
    /// The response whose conversation this one continues.
    #[schema(pattern = "^[!\"$&-.0->@-~]{1,256}$")]
    pub previous_response_id: Option<String>,
    previous_input_messages: Option<Value>,
    enable_response_messages: Option<bool>,
    /// Becomes the response's id.
    #[schema(pattern = "^[!\"$&-.0->@-~]{1,256}$")]
    request_id: Option<String>,
}

/// `reasoning`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Reasoning {
    /// How much to think; the chat template's to heed.
    pub effort: Option<String>,
    /// Taken, but no summary is made.
    pub summary: Option<String>,
    /// The older name of `summary`.
    pub generate_summary: Option<String>,
}

/// `truncation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// What is too long is refused.
    #[default]
    Disabled,
    /// What is too long is cut at its beginning.
    Auto,
}

impl ResponsesFields {
    /// Takes the fields out of `body` and checks what needs nobody else.
    pub fn read(body: &mut Body) -> Result<Self, ApiError> {
        let fields: Self = body.read()?;
        body.ignore(SHARED);
        body.ignore(IGNORED);
        body.refuse_unsupported()?;
        fields.check()?;
        Ok(fields)
    }

    fn check(&self) -> Result<(), ApiError> {
        for (field, set) in [
            ("prompt", self.prompt.is_some()),
            ("conversation", self.conversation.is_some()),
            ("context_management", self.context_management.is_some()),
            ("previous_input_messages", self.previous_input_messages.is_some()),
            ("enable_response_messages", self.enable_response_messages == Some(true)),
        ] {
            if set {
                return Err(ApiError::not_supported(field));
            }
        }
        if self.background() && self.store == Some(false) {
            let message = "`background` needs `store`: leave `store` out, or set it to true.";
            return Err(ApiError::bad_value("background", message));
        }
        for (field, id) in
            [("request_id", &self.request_id), ("previous_response_id", &self.previous_response_id)]
        {
            if id.as_deref().is_some_and(|id| !is_id(id)) {
                let what = format!("must be 1 to {MAX_ID} visible ASCII characters but `/?#%`");
                return Err(wrong(field, &what));
            }
        }
        for (field, value) in
            [("max_output_tokens", self.max_output_tokens), ("max_tool_calls", self.max_tool_calls)]
        {
            if value.is_some_and(|value| value < 1) {
                let message = format!("`{field}` must be at least 1.");
                return Err(ApiError::bad_value(field, message));
            }
        }
        for (at, wish) in self.include.iter().flatten().enumerate() {
            if !INCLUDES.contains(&wish.as_str()) {
                let what = format!("must be one of {}", INCLUDES.join(", "));
                return Err(wrong(format!("include[{at}]"), &what));
            }
        }
        self.check_metadata()
    }

    fn check_metadata(&self) -> Result<(), ApiError> {
        let pairs = match &self.metadata {
            None => return Ok(()),
            Some(Value::Object(pairs)) => pairs,
            Some(_) => return Err(wrong("metadata", "must be an object")),
        };
        if pairs.len() > MAX_PAIRS {
            let what = format!("has {} pairs; the most are {MAX_PAIRS}", pairs.len());
            return Err(wrong("metadata", &what));
        }
        if pairs.keys().any(|key| key.chars().count() > MAX_KEY) {
            let what = format!("has a key of more than {MAX_KEY} characters");
            return Err(wrong("metadata", &what));
        }
        let fits = |value: &Value| value.as_str().is_some_and(|v| v.chars().count() <= MAX_VALUE);
        match pairs.iter().find(|(_, value)| !fits(value)) {
            None => Ok(()),
            Some((key, _)) => {
                let what = format!("must be a string of at most {MAX_VALUE} characters");
                Err(wrong(format!("metadata.{key}"), &what))
            }
        }
    }

    /// The response's id: the request's own, or a random one.
    pub fn id(&self) -> String {
        self.request_id.clone().unwrap_or_else(|| items::new_id("resp"))
    }

    /// Whether the client wants the response to be kept.
    pub fn store(&self) -> bool {
        self.store.unwrap_or(true)
    }

    /// Whether the answer is a stream.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether the answer is generated without the client's connection.
    pub fn background(&self) -> bool {
        self.background.unwrap_or(false)
    }

    /// Whether log-probabilities are wanted.
    pub fn logprobs(&self) -> bool {
        self.include.iter().flatten().any(|wish| wish == INCLUDES[0])
    }

    /// The items of `input`.
    pub fn items(&self) -> Result<Vec<Value>, ApiError> {
        let input = self.input.as_ref().ok_or_else(|| wrong("input", "is required"))?;
        items::read(input)
    }

    /// The request as a chat: `body` is what came, `earlier` the items of the conversation before,
    /// `input` the request's own.
    pub fn chat(&self, body: &Body, earlier: &[Value], input: &[Value]) -> Result<Body, ApiError> {
        let mut chat = Map::new();
        let mut set = |field: &str, value: Value| drop(chat.insert(field.to_owned(), value));
        for field in SHARED {
            if let Some(value) = body.get(field) {
                set(field, value.clone());
            }
        }
        set("messages", items::chat(self.instructions.as_deref(), earlier, input)?.into());
        if let Some(most) = self.max_output_tokens {
            set("max_completion_tokens", most.into());
        }
        if self.truncation == Some(Truncation::Auto) {
            set("truncate_prompt_tokens", (-1).into());
        }
        if let Some(effort) = self.reasoning.as_ref().and_then(|it| it.effort.as_ref()) {
            set("reasoning_effort", effort.as_str().into());
        }
        if let Some(format) = self.format()? {
            set("response_format", format);
        }
        if self.logprobs() {
            set("logprobs", true.into());
            set("top_logprobs", self.top_logprobs.unwrap_or(0).into());
        }
        let tools = self.chat_tools()?;
        let choice = self.chat_tool_choice()?;
        if !tools.is_empty() {
            set("tools", tools.into());
            set("tool_choice", choice);
        } else if choice != "auto" && choice != "none" {
            return Err(wrong("tool_choice", "needs `tools`; set them or leave it out"));
        }
        Ok(Body::new(chat))
    }

    /// `text.format` as `response_format`.
    fn format(&self) -> Result<Option<Value>, ApiError> {
        let Some(format) = self.text.as_ref().and_then(|text| text.get("format")) else {
            return Ok(None);
        };
        match format["type"].as_str() {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(json!({"type": "json_object"}))),
            Some("json_schema") => {
                if !format["name"].is_string() {
                    return Err(wrong("text.format.name", "must be a string"));
                }
                let mut schema = format.as_object().cloned().unwrap_or_default();
                schema.shift_remove("type");
                if schema.get("schema").is_none_or(Value::is_null) {
                    return Err(wrong("text.format.schema", "is required"));
                }
                Ok(Some(json!({"type": "json_schema", "json_schema": schema})))
            }
            _ if format.is_null() => Ok(None),
            _ => Err(wrong(
                "text.format.type",
                "must be \"text\", \"json_object\" or \"json_schema\"",
            )),
        }
    }

    /// The tools, each with its function in an object of its own.
    fn chat_tools(&self) -> Result<Vec<Value>, ApiError> {
        let tools = match &self.tools {
            None => return Ok(Vec::new()),
            Some(Value::Array(tools)) => tools,
            Some(_) => return Err(wrong("tools", "must be a list of tools")),
        };
        let tool = |(at, tool): (usize, &Value)| {
            let Value::Object(fields) = tool else {
                return Err(wrong(format!("tools[{at}]"), "must be an object"));
            };
            match fields.get("type").and_then(Value::as_str) {
                Some("function") => {}
                Some(kind) => {
                    let message = format!(
                        "`tools[{at}].type` \"{}\" is not supported by this server, which has no \
                         tools of its own; use \"function\".",
                        kind.escape_debug()
                    );
                    return Err(ApiError::bad_value(format!("tools[{at}].type"), message));
                }
                None => return Err(wrong(format!("tools[{at}].type"), "must be \"function\"")),
            }
            let mut function = fields.clone();
            function.shift_remove("type");
            Ok(json!({"type": "function", "function": function}))
        };
        tools.iter().enumerate().map(tool).collect()
    }

    fn chat_tool_choice(&self) -> Result<Value, ApiError> {
        let choice = match &self.tool_choice {
            None | Some(Value::Null) => return Ok("auto".into()),
            Some(choice) => choice,
        };
        if let Some("auto" | "none" | "required") = choice.as_str() {
            return Ok(choice.clone());
        }
        match (choice["type"].as_str(), choice["name"].as_str()) {
            (Some("function"), Some(name)) => {
                Ok(json!({"type": "function", "function": {"name": name}}))
            }
            (Some("function"), None) => Err(wrong("tool_choice.name", "must be a string")),
            (Some(kind), _) => {
                let message = format!(
                    "`tool_choice.type` \"{}\" is not supported by this server; use \"function\".",
                    kind.escape_debug()
                );
                Err(ApiError::bad_value("tool_choice.type", message))
            }
            (None, _) => Err(wrong(
                "tool_choice",
                "must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"name\": …}",
            )),
        }
    }
}

/// Whether a text can be a response's id: it is part of a path.
pub fn is_id(id: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_graphic() && !b"/?#%".contains(&byte);
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(fine)
}

/// An error of the chat in the words of the request.
pub fn reworded(error: ApiError) -> ApiError {
    let Some(param) = error.field().map(str::to_owned) else { return error };
    // The one message that also names another field.
    if param == "min_tokens" {
        return error.rename("max_completion_tokens", "max_output_tokens");
    }
    let fixed: HashMap<&str, &str> = HashMap::from([
        ("max_completion_tokens", "max_output_tokens"),
        ("max_tokens", "max_output_tokens"),
        ("reasoning_effort", "reasoning.effort"),
        ("truncate_prompt_tokens", "truncation"),
        ("logprobs", "top_logprobs"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("input_text", "input"),
        ("input_tokens", "input"),
    ]);
    let tail = |prefix: &str| param.strip_prefix(prefix).map(str::to_owned);
    let name = if let Some(name) = fixed.get(param.as_str()) {
        (*name).to_owned()
    } else if tail("messages").is_some() {
        "input".to_owned()
    } else if let Some(tail) = tail("response_format") {
        format!("text.format{}", tail.strip_prefix(".json_schema").unwrap_or(&tail))
    } else if param.starts_with("tools[") {
        param.replacen(".function", "", 1)
    } else {
        return error;
    };
    error.rename(&param, &name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &Value) -> Result<(ResponsesFields, Body), ApiError> {
        let mut body = Body::parse(value.to_string().as_bytes()).unwrap();
        let fields = ResponsesFields::read(&mut body)?;
        Ok((fields, body))
    }

    fn chat(value: &Value) -> Result<Body, ApiError> {
        let (fields, body) = read(value)?;
        fields.chat(&body, &[], &fields.items()?)
    }

    fn param(value: Value) -> String {
        let error = chat(&value).unwrap_err().body();
        assert_eq!(error["error"]["code"], 400);
        error["error"]["param"].as_str().unwrap_or_default().to_owned()
    }

    fn with(field: &str, value: Value) -> Value {
        let mut body = json!({"input": "x"});
        body[field] = value;
        body
    }

    #[test]
    fn a_request_becomes_a_chat() {
        let schema = json!({"type": "object"});
        let value = json!({
            "model": "m", "input": "x", "instructions": "i", "max_output_tokens": 5, "top_k": 3,
            "temperature": 0.5, "truncation": "auto", "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": true}},
            "include": ["message.output_text.logprobs"], "top_logprobs": 2,
            "tools": [{"type": "function", "name": "f", "parameters": schema, "strict": true}],
            "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": false,
            "metadata": {"a": "b"}, "user": "u", "store": false, "stream": true, "typo": 1,
        });
        let (fields, body) = read(&value).unwrap();
        assert_eq!(body.unknown().iter().collect::<Vec<_>>(), ["typo"]);
        assert!(fields.streams() && !fields.store() && !fields.background());
        let chat = chat(&value).unwrap();
        for (field, expected) in [
            ("model", json!("m")),
            ("max_completion_tokens", json!(5)),
            ("top_k", json!(3)),
            ("temperature", json!(0.5)),
            ("truncate_prompt_tokens", json!(-1)),
            ("reasoning_effort", json!("low")),
            ("logprobs", json!(true)),
            ("top_logprobs", json!(2)),
            ("parallel_tool_calls", json!(false)),
            (
                "response_format",
                json!({"type": "json_schema",
                       "json_schema": {"name": "n", "schema": schema, "strict": true}}),
            ),
            (
                "tools",
                json!([{"type": "function",
                        "function": {"name": "f", "parameters": schema, "strict": true}}]),
            ),
            ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ] {
            assert_eq!(chat.get(field), Some(&expected), "{field}");
        }
        assert_eq!(chat.get("messages").unwrap()[0]["role"], "system");
        assert!(chat.get("stream").is_none() && chat.get("store").is_none());
    }

    #[test]
    fn what_asks_for_nothing_is_left_out() {
        let value = json!({"input": "x", "tools": [], "tool_choice": "auto", "top_logprobs": 5,
                           "text": {"format": {"type": "text"}}, "prompt": null});
        let chat = chat(&value).unwrap();
        for field in ["tools", "tool_choice", "response_format", "logprobs", "top_logprobs"] {
            assert!(chat.get(field).is_none(), "{field}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        let many: Map<String, Value> = (0..17).map(|n| (n.to_string(), "x".into())).collect();
        for (field, value, expected) in [
            ("input", json!(null), "input"),
            ("prompt", json!({"id": "p"}), "prompt"),
            ("conversation", json!("c"), "conversation"),
            ("max_output_tokens", json!(0), "max_output_tokens"),
            ("max_output_tokens", json!("x"), "max_output_tokens"),
            ("include", json!(["x"]), "include[0]"),
            ("metadata", json!(5), "metadata"),
            ("metadata", json!(many), "metadata"),
            ("metadata", json!({"a": 5}), "metadata.a"),
            ("metadata", json!({"a": "x".repeat(513)}), "metadata.a"),
            ("truncation", json!("some"), "truncation"),
            ("text", json!({"format": {"type": "xml"}}), "text.format.type"),
            ("text", json!({"format": {"type": "json_schema", "name": "n"}}), "text.format.schema"),
            ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
            ("tools", json!([{"name": "f"}]), "tools[0].type"),
            ("tools", json!(5), "tools"),
            ("tool_choice", json!("required"), "tool_choice"),
            ("tool_choice", json!({"type": "web_search"}), "tool_choice.type"),
            ("tool_choice", json!({"type": "function"}), "tool_choice.name"),
            ("request_id", json!("a/b"), "request_id"),
            ("previous_response_id", json!(""), "previous_response_id"),
            ("reasoning", json!("high"), "reasoning"),
        ] {
            assert_eq!(param(with(field, value.clone())), expected, "{field} {value}");
        }
        assert_eq!(param(json!({"input": "x", "background": true, "store": false})), "background");
    }

    #[test]
    fn errors_of_the_chat_name_the_field_that_came() {
        for (chat, expected) in [
            ("messages[0].content", "input"),
            ("max_completion_tokens", "max_output_tokens"),
            ("response_format", "text.format"),
            ("response_format.json_schema.schema", "text.format.schema"),
            ("tools[3].function.name", "tools[3].name"),
            ("tool_choice.function.name", "tool_choice.name"),
            ("temperature", "temperature"),
        ] {
            let error = ApiError::bad_value(chat, format!("`{chat}` is wrong."));
            let body = reworded(error).body();
            assert_eq!(body["error"]["param"], expected);
            assert_eq!(body["error"]["message"], format!("`{expected}` is wrong."));
        }
        let more = "`min_tokens` must be at most `max_completion_tokens`.";
        let body = reworded(ApiError::bad_value("min_tokens", more)).body();
        assert_eq!(body["error"]["param"], "min_tokens");
        let expected = "`min_tokens` must be at most `max_output_tokens`.";
        assert_eq!(body["error"]["message"], expected);
    }
}
