//! `POST /v1/chat/completions`: what is particular to chats.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::schema::ChatMessage;
use crate::error::ApiError;
use crate::text::TextModel;
use crate::text::template::{ChatTemplate, Options};

/// The fields of a conversation, shared with `POST /tokenize`.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Conversation {
    /// The conversation so far.
    #[schema(value_type = Vec<ChatMessage>, min_items = 1)]
    messages: Option<Value>,
    /// Open the assistant's turn behind the last message; on by default.
    add_generation_prompt: Option<bool>,
    /// Leave the last message open and continue it.
    continue_final_message: Option<bool>,
    /// Let the tokenizer add its special tokens; by default the template has put them.
    add_special_tokens: Option<bool>,
    /// Texts that the answer is to draw on, for templates that take them.
    #[schema(value_type = Option<Vec<Object>>)]
    documents: Option<Vec<Map<String, Value>>>,
    /// A variable of the template; "none" sets `enable_thinking` to false too.
    reasoning_effort: Option<String>,
    /// A template in place of the model's, if the gateway takes it.
    #[schema(max_length = 65536)]
    chat_template: Option<String>,
    /// More variables of the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// The fields that only chats have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ChatFields {
    /// Return the log-probability of each token.
    logprobs: Option<bool>,
    /// Alternatives to return with each token; -1 is the whole vocabulary.
    #[schema(minimum = -1)]
    top_logprobs: Option<i64>,
    /// Put the last message before the answer, when both are of one role.
    pub echo: Option<bool>,
    /// Send what the model thinks before it answers.
    pub include_reasoning: Option<bool>,
}

/// The longest chat template that a request may bring, in bytes.
const MAX_TEMPLATE: usize = 64 * 1024;

impl ChatFields {
    /// How many alternatives to return with each token; `None` for no logprobs at all.
    pub fn logprobs(&self) -> Result<Option<i64>, ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        let wanted = self.logprobs.unwrap_or(false);
        if top != 0 && !wanted {
            let message = "`top_logprobs` is only for `logprobs`: set `logprobs` to true.";
            return Err(ApiError::malformed(message).param("top_logprobs"));
        }
        Ok(wanted.then_some(top))
    }
}

impl Conversation {
    /// The prompt's text. `tools` are what the model may call, in OpenAI's form;
    /// `trust_template` says whether a request may bring a template of its own.
    pub fn render(
        &self,
        model: &TextModel,
        tools: Option<&[Value]>,
        trust_template: bool,
    ) -> Result<String, ApiError> {
        let messages = self.messages()?;
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        if continue_final_message && self.add_generation_prompt == Some(true) {
            let message =
                "`add_generation_prompt` and `continue_final_message` exclude each other.";
            return Err(ApiError::malformed(message).param("continue_final_message"));
        }
        let template = model.template.as_ref().ok_or_else(|| {
            let message = "This model has no chat template; use /v1/completions with a `prompt`.";
            ApiError::bad_value("messages", message)
        })?;
        let own = self.own_template(template, trust_template)?;
        let variables = self.variables();
        let documents: Option<Vec<Value>> =
            self.documents.as_ref().map(|list| list.iter().cloned().map(Value::Object).collect());
        let options = Options {
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            tools,
            documents: documents.as_deref(),
            variables: variables.as_ref(),
        };
        own.as_ref().unwrap_or(template).render(&messages, &options).map_err(|error| {
            let message = format!("The chat template refuses these `messages`: {error}.");
            ApiError::bad_value("messages", message)
        })
    }

    fn own_template(
        &self,
        model: &ChatTemplate,
        trusted: bool,
    ) -> Result<Option<ChatTemplate>, ApiError> {
        let Some(source) = &self.chat_template else { return Ok(None) };
        let refused = |message: String| ApiError::bad_value("chat_template", message);
        if !trusted {
            let message = "`chat_template` is not taken from requests: leave it out, or start the \
                           gateway with --trust-request-chat-template.";
            return Err(refused(message.into()));
        }
        if source.len() > MAX_TEMPLATE {
            let length = source.len();
            let message = format!("`chat_template` has {length} bytes, at most {MAX_TEMPLATE}.");
            return Err(refused(message));
        }
        let compiled = model.replaced(source);
        compiled
            .map(Some)
            .map_err(|error| refused(format!("`chat_template` does not compile: {error}.")))
    }

    /// The template's variables: `reasoning_effort` is one, and "none" of it stops a template
    /// from opening a reasoning at all. What `chat_template_kwargs` says wins.
    fn variables(&self) -> Option<Map<String, Value>> {
        let Some(effort) = &self.reasoning_effort else {
            return self.chat_template_kwargs.clone();
        };
        let mut variables = Map::new();
        variables.insert("reasoning_effort".into(), effort.as_str().into());
        if effort == "none" {
            variables.insert("enable_thinking".into(), false.into());
        }
        variables.extend(self.chat_template_kwargs.clone().unwrap_or_default());
        Some(variables)
    }

    /// The last message's text, when the answer is given under the same role.
    pub fn echoed(&self) -> Option<String> {
        let last = self.messages.as_ref()?.as_array()?.last()?;
        let text = content(last.get("content"), "messages").ok()?;
        (last["role"].as_str()? == self.answer_role()).then_some(text)
    }

    /// Whether the tokenizer adds its special tokens: by default the template has put them.
    pub fn add_special_tokens(&self) -> bool {
        self.add_special_tokens.unwrap_or(false)
    }

    /// The role under which the answer is given.
    pub fn answer_role(&self) -> String {
        let last = self.messages.as_ref().and_then(|messages| messages.as_array()?.last());
        match (self.add_generation_prompt, last.and_then(|last| last["role"].as_str())) {
            (Some(false), Some(role)) => role.to_owned(),
            _ => "assistant".to_owned(),
        }
    }

    /// Whether there are messages.
    pub fn is_given(&self) -> bool {
        self.messages.is_some()
    }

    /// Refuses messages that are there and could not be read.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.is_given() { self.messages().map(drop) } else { Ok(()) }
    }

    /// The messages, each with its content as one text.
    fn messages(&self) -> Result<Vec<Value>, ApiError> {
        let wrong =
            |path: String, what: &str| ApiError::malformed(format!("`{path}` {what}.")).param(path);
        let list = match &self.messages {
            None => return Err(wrong("messages".into(), "is required")),
            Some(Value::Array(list)) if !list.is_empty() => list,
            Some(Value::Array(_)) => {
                return Err(wrong("messages".into(), "must hold at least one message"));
            }
            Some(_) => return Err(wrong("messages".into(), "must be a list of messages")),
        };
        list.iter()
            .enumerate()
            .map(|(at, message)| {
                let at = format!("messages[{at}]");
                let Value::Object(message) = message else {
                    return Err(wrong(at, "must be an object with `role` and `content`"));
                };
                if !message.get("role").is_some_and(Value::is_string) {
                    return Err(wrong(format!("{at}.role"), "must be a string"));
                }
                let text = content(message.get("content"), &format!("{at}.content"))?;
                let mut message = message.clone();
                message.insert("content".into(), text.into());
                share_reasoning(&mut message);
                open_arguments(&mut message, &at)?;
                Ok(Value::Object(message))
            })
            .collect()
    }
}

/// Templates know what a model thought by one of two names.
fn share_reasoning(message: &mut Map<String, Value>) {
    let names = ["reasoning", "reasoning_content"];
    let thought = names.iter().find_map(|name| message.get(*name).filter(|it| it.is_string()));
    if let Some(thought) = thought.cloned() {
        names.iter().for_each(|name| drop(message.insert((*name).into(), thought.clone())));
    }
}

/// Calls of earlier turns: templates want arguments as an object, clients send them as text, and
/// none at all as null.
fn open_arguments(message: &mut Map<String, Value>, at: &str) -> Result<(), ApiError> {
    let calls = match message.get_mut("tool_calls") {
        None => return Ok(()),
        Some(Value::Array(calls)) if !calls.is_empty() => calls,
        // Replies without calls have an empty list. Some templates ask whether the key is there.
        Some(Value::Null | Value::Array(_)) => {
            message.shift_remove("tool_calls");
            return Ok(());
        }
        Some(_) => {
            let at = format!("{at}.tool_calls");
            return Err(ApiError::malformed(format!("`{at}` must be a list.")).param(at));
        }
    };
    for (i, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            let at = format!("{at}.tool_calls[{i}].function.arguments");
            return Err(ApiError::malformed(format!("`{at}` is required.")).param(at));
        };
        let text = match &*arguments {
            Value::Null => "",
            Value::String(text) => text.as_str(),
            _ => continue,
        };
        // What an earlier answer broke is shown to the model as it was.
        let text = if text.trim().is_empty() { "{}" } else { text };
        if let Ok(value @ Value::Object(_)) = serde_json::from_str(text) {
            *arguments = value;
        }
    }
    Ok(())
}

/// A message's text: a string, or parts that are text by whatever name, joined by line feeds; all
/// as in vLLM.
fn content(value: Option<&Value>, at: &str) -> Result<String, ApiError> {
    let wrong =
        |path: &str, what: &str| ApiError::malformed(format!("`{path}` {what}.")).param(path);
    let parts = match value {
        // An assistant's turn may have no text.
        None | Some(Value::Null) => return Ok(String::new()),
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(wrong(at, "must be a string or a list of parts")),
    };
    let texts: Vec<&str> = parts
        .iter()
        .enumerate()
        .map(|(i, part)| {
            let at = format!("{at}[{i}]");
            let field = match (part, part["type"].as_str()) {
                (Value::String(text), _) => return Ok(text.as_str()),
                (_, Some("text" | "input_text" | "output_text")) => "text",
                (_, Some(kind @ ("refusal" | "thinking"))) => kind,
                _ => {
                    let what = "must be \"text\": this model reads no other";
                    return Err(wrong(&format!("{at}.type"), what));
                }
            };
            let text = part[field].as_str();
            text.ok_or_else(|| wrong(&format!("{at}.{field}"), "must be a string"))
        })
        .collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn messages(value: Value) -> Result<Vec<Value>, String> {
        let conversation: Conversation =
            serde_json::from_value(json!({"messages": value})).unwrap();
        conversation.messages().map_err(|error| error.body()["error"]["param"].to_string())
    }

    #[test]
    fn parts_become_one_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let got = messages(json!([{"role": "user", "content": parts, "name": "n"}])).unwrap();
        assert_eq!(got, [json!({"role": "user", "content": "a\nb", "name": "n"})]);
    }

    #[test]
    fn what_is_text_by_another_name_is_text() {
        let parts = json!([
            "a",
            {"type": "input_text", "text": "b"},
            {"type": "output_text", "text": "c"},
            {"type": "thinking", "thinking": "d", "closed": true},
            {"type": "refusal", "refusal": "e"},
        ]);
        let got = messages(json!([{"role": "assistant", "content": parts}])).unwrap();
        assert_eq!(got[0]["content"], "a\nb\nc\nd\ne");
    }

    #[test]
    fn calls_of_earlier_turns_are_as_templates_want_them() {
        let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
        let turn = |calls: Value| {
            let turn = json!([{"role": "assistant", "content": null, "tool_calls": calls}]);
            messages(turn).unwrap().remove(0)
        };
        let without_calls = json!({"role": "assistant", "content": ""});
        for none in [json!([]), json!(null)] {
            assert_eq!(turn(none), without_calls);
        }
        for (sent, opened) in [
            (json!("{\"a\": 1}"), json!({"a": 1})),
            (json!({"a": 1}), json!({"a": 1})),
            (json!(" "), json!({})),
            (json!(null), json!({})),
            (json!("{\"a\": "), json!("{\"a\": ")),
        ] {
            assert_eq!(turn(json!([call(sent)]))["tool_calls"], json!([call(opened)]));
        }
    }

    #[test]
    fn errors_name_the_place() {
        for (bad, param) in [
            (json!([]), "messages"),
            (json!("x"), "messages"),
            (json!([5]), "messages[0]"),
            (json!([{"role": "user", "content": "x"}, {"content": "x"}]), "messages[1].role"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content"),
            (json!([{"role": "u", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (json!([{"role": "u", "content": [{"type": "x"}]}]), "messages[0].content[0].type"),
            (json!([{"role": "u", "content": ["x", 5]}]), "messages[0].content[1].type"),
            (
                json!([{"role": "u", "content": [{"type": "refusal", "text": "x"}]}]),
                "messages[0].content[0].refusal",
            ),
        ] {
            assert_eq!(messages(bad).unwrap_err(), format!("{param:?}"));
        }
    }

    #[test]
    fn alternatives_need_logprobs() {
        let fields = |value: Value| serde_json::from_value::<ChatFields>(value).unwrap().logprobs();
        assert_eq!(fields(json!({})).unwrap(), None);
        assert_eq!(fields(json!({"logprobs": true})).unwrap(), Some(0));
        assert_eq!(fields(json!({"logprobs": true, "top_logprobs": 3})).unwrap(), Some(3));
        assert!(fields(json!({"top_logprobs": 3})).is_err());
    }
}
