//! `POST /v1/chat/completions`: what is particular to chats.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::sampling::MAX_LOGPROBS;
use crate::error::ApiError;
use crate::text::TextModel;
use crate::text::template::Options;

/// The fields of a conversation, shared with `POST /tokenize`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Conversation {
    messages: Option<Value>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// The fields that only chats have.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ChatFields {
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    echo: Option<bool>,
}

impl ChatFields {
    /// How many alternatives to return with each token; `None` for no logprobs at all.
    pub fn logprobs(&self) -> Result<Option<u32>, ApiError> {
        if self.echo == Some(true) {
            return Err(ApiError::not_supported("echo"));
        }
        let top = self.top_logprobs.unwrap_or(0);
        let wanted = self.logprobs.unwrap_or(false);
        if top != 0 && !wanted {
            let message = "`top_logprobs` is only for `logprobs`: set `logprobs` to true.";
            return Err(ApiError::malformed(message).param("top_logprobs"));
        }
        if !(0..=MAX_LOGPROBS).contains(&top) {
            let message = format!("`top_logprobs` must be from 0 to {MAX_LOGPROBS}, not {top}.");
            return Err(ApiError::bad_value("top_logprobs", message));
        }
        Ok(wanted.then_some(top as u32))
    }
}

impl Conversation {
    /// The prompt's text.
    pub fn render(&self, model: &TextModel) -> Result<String, ApiError> {
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
        let options = Options {
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            variables: self.chat_template_kwargs.as_ref(),
        };
        template.render(&messages, &options).map_err(|error| {
            let message = format!("The chat template refuses these `messages`: {error}.");
            ApiError::bad_value("messages", message)
        })
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
                Ok(Value::Object(message))
            })
            .collect()
    }
}

/// A message's text: a string, or text parts, joined by line feeds as vLLM joins them.
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
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text" | "input_text" | "output_text"), Some(text)) => Ok(text),
                (Some("text" | "input_text" | "output_text"), None) => {
                    Err(wrong(&format!("{at}.text"), "must be a string"))
                }
                _ => {
                    Err(wrong(&format!("{at}.type"), "must be \"text\": this model reads no other"))
                }
            }
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
    fn errors_name_the_place() {
        for (bad, param) in [
            (json!([]), "messages"),
            (json!("x"), "messages"),
            (json!([5]), "messages[0]"),
            (json!([{"role": "user", "content": "x"}, {"content": "x"}]), "messages[1].role"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content"),
            (json!([{"role": "u", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (json!([{"role": "u", "content": [{"type": "x"}]}]), "messages[0].content[0].type"),
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
        assert!(fields(json!({"logprobs": true, "top_logprobs": 21})).is_err());
    }
}
