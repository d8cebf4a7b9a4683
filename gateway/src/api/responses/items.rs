//! Items: what goes into a response and what comes out of it, and the chat that they are.
//!
//! Items of one turn of the assistant (reasoning, text, calls) become one message, as chat
//! templates want it.

use serde_json::{Map, Value, json};

use super::wrong;
use crate::error::ApiError;

/// The most items of an input.
const MAX_ITEMS: usize = 4096;

/// A random id with the prefix of its kind.
pub fn new_id(prefix: &str) -> String {
    // From the thread's own generator: the system's would be asked at each request.
    let random = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
    format!("{prefix}_{}", random.simple())
}

/// The items of `input`: a string is one message of the user. Each gets an id.
pub fn read(input: &Value) -> Result<Vec<Value>, ApiError> {
    let list = match input {
        Value::String(text) => {
            let content = json!([{"type": "input_text", "text": text}]);
            return Ok(vec![json!({
                "id": new_id("msg"),
                "type": "message",
                "role": "user",
                "status": "completed",
                "content": content,
            })]);
        }
        Value::Array(list) if list.is_empty() => {
            return Err(wrong("input", "must hold at least one item"));
        }
        Value::Array(list) if list.len() > MAX_ITEMS => {
            let what = format!("holds {} items; the most are {MAX_ITEMS}", list.len());
            return Err(wrong("input", &what));
        }
        Value::Array(list) => list,
        _ => return Err(wrong("input", "must be a string or a list of items")),
    };
    list.iter().enumerate().map(|(at, item)| read_item(item, &format!("input[{at}]"))).collect()
}

fn read_item(item: &Value, at: &str) -> Result<Value, ApiError> {
    let Value::Object(fields) = item else { return Err(wrong(at, "must be an object")) };
    let kind = match fields.get("type") {
        None | Some(Value::Null) if fields.contains_key("role") => "message",
        Some(Value::String(kind)) => kind.as_str(),
        _ => return Err(wrong(format!("{at}.type"), "is required")),
    };
    let text = |key: &str| {
        let text = fields.get(key).and_then(Value::as_str);
        text.ok_or_else(|| wrong(format!("{at}.{key}"), "must be a string"))
    };
    let prefix = match kind {
        "message" => {
            let role = text("role")?;
            if !["user", "assistant", "system", "developer"].contains(&role) {
                let what = "must be \"user\", \"assistant\", \"system\" or \"developer\"";
                return Err(wrong(format!("{at}.role"), what));
            }
            let parts = &["input_text", "output_text", "text", "refusal"];
            content(fields.get("content"), parts, &format!("{at}.content"))?;
            "msg"
        }
        "function_call" => {
            text("call_id")?;
            text("name")?;
            text("arguments")?;
            "fc"
        }
        "function_call_output" => {
            text("call_id")?;
            content(fields.get("output"), &["input_text"], &format!("{at}.output"))?;
            "fco"
        }
        "reasoning" => {
            for (key, part) in [("content", "reasoning_text"), ("summary", "summary_text")] {
                match fields.get(key) {
                    None | Some(Value::Null) => {}
                    Some(list @ Value::Array(_)) => {
                        content(Some(list), &[part], &format!("{at}.{key}"))?;
                    }
                    Some(_) => return Err(wrong(format!("{at}.{key}"), "must be a list of parts")),
                }
            }
            "rs"
        }
        other => {
            let message = format!(
                "`{at}.type` \"{}\" is not supported by this server; it takes message, \
                 function_call, function_call_output and reasoning.",
                other.escape_debug()
            );
            return Err(ApiError::bad_value(format!("{at}.type"), message));
        }
    };
    let mut fields = fields.clone();
    fields.insert("type".into(), kind.into());
    if kind == "message" {
        complete(&mut fields);
    }
    if !fields.get("id").is_some_and(Value::is_string) {
        fields.insert("id".into(), new_id(prefix).into());
    }
    Ok(fields.into())
}

/// Makes of a message what OpenAI's API gives back: content in parts, and a status.
fn complete(message: &mut Map<String, Value>) {
    let answers = message.get("role").is_some_and(|role| role == "assistant");
    let part = |text: Value| match answers {
        true => json!({"type": "output_text", "text": text, "annotations": []}),
        false => json!({"type": "input_text", "text": text}),
    };
    match message.get_mut("content") {
        Some(Value::Array(parts)) => {
            for plain in parts.iter_mut().filter(|it| it["type"] == "text") {
                *plain = part(plain["text"].take());
            }
        }
        Some(text) => *text = vec![part(text.take())].into(),
        None => {}
    }
    if !message.get("status").is_some_and(Value::is_string) {
        message.insert("status".into(), "completed".into());
    }
}

/// The text of a content: a string, or parts of these types, joined by line feeds as in chats.
fn content(value: Option<&Value>, parts: &[&str], at: &str) -> Result<String, ApiError> {
    let list = match value {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(list)) => list,
        _ => return Err(wrong(at, "must be a string or a list of parts")),
    };
    let texts = list.iter().enumerate().map(|(n, part)| {
        let kind = part["type"].as_str().unwrap_or_default();
        if !parts.contains(&kind) {
            let message = format!(
                "`{at}[{n}].type` must be \"{}\": this server reads text only.",
                parts.join("\" or \"")
            );
            return Err(ApiError::bad_value(format!("{at}[{n}].type"), message));
        }
        let key = if kind == "refusal" { "refusal" } else { "text" };
        let text = part[key].as_str();
        text.ok_or_else(|| wrong(format!("{at}[{n}].{key}"), "must be a string"))
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// The chat of a conversation: `instructions`, items of earlier turns, and those of `input`.
pub fn chat(
    instructions: Option<&str>,
    earlier: &[Value],
    input: &[Value],
) -> Result<Vec<Value>, ApiError> {
    let mut chat = Chat::default();
    if let Some(instructions) = instructions {
        chat.messages.push(message("system", instructions.into()));
    }
    earlier.iter().try_for_each(|item| chat.push(item, "previous_response_id"))?;
    for (at, item) in input.iter().enumerate() {
        chat.push(item, &format!("input[{at}]"))?;
    }
    chat.close();
    Ok(chat.messages.into_iter().map(Value::Object).collect())
}

#[derive(Default)]
struct Chat {
    messages: Vec<Map<String, Value>>,
    /// Ids of the calls so far.
    calls: Vec<String>,
    /// Reasoning whose message has not come.
    reasoning: Option<String>,
    /// Whether the last message is an assistant's, to which calls belong.
    open: bool,
}

impl Chat {
    fn push(&mut self, item: &Value, at: &str) -> Result<(), ApiError> {
        let text = |key: &str| item[key].as_str().unwrap_or_default();
        match text("type") {
            "reasoning" => {
                self.close();
                let list = |key: &str| item.get(key).filter(|list| list.is_array());
                let parts = &["reasoning_text", "summary_text"];
                let thought = content(list("content"), parts, at).unwrap_or_default();
                let thought = match thought.is_empty() {
                    true => content(list("summary"), parts, at).unwrap_or_default(),
                    false => thought,
                };
                self.reasoning = (!thought.is_empty()).then_some(thought);
            }
            "function_call" => {
                let call = json!({
                    "id": text("call_id"),
                    "type": "function",
                    "function": {"name": text("name"), "arguments": text("arguments")},
                });
                self.calls.push(text("call_id").to_owned());
                let calls = self.assistant().entry("tool_calls").or_insert_with(|| json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
            }
            "function_call_output" => {
                self.close();
                let id = text("call_id");
                if !self.calls.iter().any(|call| call == id) {
                    let message = format!(
                        "`{at}.call_id` is \"{}\", but no function_call before it has this id.",
                        id.escape_debug()
                    );
                    return Err(ApiError::bad_value(format!("{at}.call_id"), message));
                }
                let output = content(item.get("output"), &["input_text"], at)?;
                let mut answer = message("tool", output);
                answer.insert("tool_call_id".into(), id.into());
                self.messages.push(answer);
            }
            _ => {
                let parts = &["input_text", "output_text", "text", "refusal"];
                let content = content(item.get("content"), parts, at)?;
                match text("role") {
                    "assistant" => {
                        if self.open {
                            self.close();
                        }
                        self.assistant().insert("content".into(), content.into());
                    }
                    role => {
                        self.close();
                        let role = if role == "developer" { "system" } else { role };
                        self.messages.push(message(role, content));
                    }
                }
            }
        }
        Ok(())
    }

    /// The assistant's message in progress.
    fn assistant(&mut self) -> &mut Map<String, Value> {
        if !self.open || self.messages.is_empty() {
            let mut begun = message("assistant", String::new());
            if let Some(thought) = self.reasoning.take() {
                begun.insert("reasoning_content".into(), thought.into());
            }
            self.messages.push(begun);
            self.open = true;
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }

    /// Ends the assistant's turn.
    fn close(&mut self) {
        if self.reasoning.is_some() {
            // A turn that was cut while the model thought.
            self.open = false;
            self.assistant();
        }
        self.open = false;
    }
}

fn message(role: &str, content: String) -> Map<String, Value> {
    let mut message = Map::new();
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(input: Value) -> String {
        let read = read(&input).and_then(|items| chat(None, &[], &items));
        read.unwrap_err().body()["error"]["param"].as_str().unwrap().to_owned()
    }

    fn call(id: &str) -> Value {
        json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"})
    }

    #[test]
    fn a_string_is_a_message_of_the_user() {
        let items = read(&json!("hi")).unwrap();
        assert_eq!(items[0]["content"][0], json!({"type": "input_text", "text": "hi"}));
        assert!(items[0]["id"].as_str().unwrap().starts_with("msg_"));
        let chat = chat(Some("be kind"), &[], &items).unwrap();
        assert_eq!(
            chat,
            [
                json!({"role": "system", "content": "be kind"}),
                json!({"role": "user", "content": "hi"})
            ]
        );
    }

    #[test]
    fn messages_are_given_back_in_parts() {
        let of = |role: &str, content: Value| json!([{"role": role, "content": content}]);
        let answer = json!([{"type": "output_text", "text": "x", "annotations": []}]);
        let refusal = json!([{"type": "refusal", "refusal": "x"}]);
        let text = json!([{"type": "text", "text": "x"}]);
        for (role, sent, parts) in [
            ("user", json!("x"), json!([{"type": "input_text", "text": "x"}])),
            ("developer", text.clone(), json!([{"type": "input_text", "text": "x"}])),
            ("assistant", json!("x"), answer.clone()),
            ("assistant", text, answer.clone()),
            ("assistant", answer.clone(), answer),
            ("assistant", refusal.clone(), refusal),
        ] {
            let items = read(&of(role, sent)).unwrap();
            assert_eq!((&items[0]["content"], &items[0]["type"]), (&parts, &json!("message")));
            assert_eq!(items[0]["status"], "completed");
            // What the model sees is as it came.
            assert_eq!(chat(None, &[], &items).unwrap()[0]["content"], "x");
        }
        let mut cut = of("assistant", json!("x"));
        cut[0]["status"] = "incomplete".into();
        assert_eq!(read(&cut).unwrap()[0]["status"], "incomplete");
    }

    #[test]
    fn a_turn_of_the_assistant_is_one_message() {
        let items = read(&json!([
            {"role": "developer", "content": [{"type": "input_text", "text": "a"},
                                              {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "type": "message", "id": "msg_1",
             "content": [{"type": "output_text", "text": "let me see", "annotations": []}]},
            call("c1"),
            call("c2"),
            {"type": "function_call_output", "call_id": "c2", "output": "two"},
            {"type": "function_call_output", "call_id": "c1", "output":
                [{"type": "input_text", "text": "one"}]},
            call("c3"),
            {"type": "function_call_output", "call_id": "c3", "output": ""},
            {"role": "assistant", "content": "x"},
            {"role": "assistant", "content": "y"},
        ]))
        .unwrap();
        assert_eq!(items[2]["id"], "msg_1");
        let tool_call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let expected = json!([
            {"role": "system", "content": "a\nb"},
            {"role": "assistant", "content": "let me see", "reasoning_content": "hm",
             "tool_calls": [tool_call("c1"), tool_call("c2")]},
            {"role": "tool", "content": "two", "tool_call_id": "c2"},
            {"role": "tool", "content": "one", "tool_call_id": "c1"},
            {"role": "assistant", "content": "", "tool_calls": [tool_call("c3")]},
            {"role": "tool", "content": "", "tool_call_id": "c3"},
            {"role": "assistant", "content": "x"},
            {"role": "assistant", "content": "y"},
        ]);
        assert_eq!(Value::Array(chat(None, &[], &items).unwrap()), expected);
        // Split anywhere between two responses, it is the same chat.
        for at in 0..items.len() {
            let (earlier, input) = items.split_at(at);
            assert_eq!(Value::Array(chat(None, earlier, input).unwrap()), expected, "{at}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_by_its_place() {
        let user = json!({"role": "user", "content": "x"});
        for (input, expected) in [
            (json!(5), "input"),
            (json!([]), "input"),
            (json!([5]), "input[0]"),
            (json!([{}]), "input[0].type"),
            (json!([user, {"type": "item_reference", "id": "x"}]), "input[1].type"),
            (json!([user, {"type": "web_search_call", "id": "x"}]), "input[1].type"),
            (json!([{"role": "robot", "content": "x"}]), "input[0].role"),
            (json!([{"role": "user"}]), "input[0].content"),
            (json!([{"role": "user", "content": [5]}]), "input[0].content[0].type"),
            (
                json!([{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]),
                "input[0].content[0].type",
            ),
            (
                json!([{"role": "user", "content": [{"type": "input_text"}]}]),
                "input[0].content[0].text",
            ),
            (json!([{"type": "function_call", "call_id": "c", "name": "f"}]), "input[0].arguments"),
            (
                json!([user, {"type": "function_call_output", "call_id": "c", "output": "x"}]),
                "input[1].call_id",
            ),
            (
                json!([call("c"), {"type": "function_call_output", "call_id": "c", "output": 5}]),
                "input[1].output",
            ),
            (json!([{"type": "reasoning", "content": "x"}]), "input[0].content"),
        ] {
            assert_eq!(param(input.clone()), expected, "{input}");
        }
    }
}
