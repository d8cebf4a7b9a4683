//! An answer as output items, and the events that tell how they come about.
//!
//! One item is open at a time. Its events are `output_item.added`, those of its content, and
//! `output_item.done`; sequence numbers count from 0 without a gap.

use serde_json::{Value, json};

use super::items::new_id;
use super::object::{ResponseObject, Status, Tokens};
use crate::error::ApiError;
use crate::generate::answer::End;
use crate::output::Part;

/// An event: its type, its number, and itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `response.…`.
    pub kind: &'static str,
    /// `sequence_number`.
    pub number: u64,
    /// The JSON object, without `type` and `sequence_number`.
    fields: Value,
}

impl Event {
    /// The JSON object.
    pub fn json(&self) -> Value {
        let mut event = json!({"type": self.kind, "sequence_number": self.number});
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, &self.fields) {
            event.extend(fields.clone());
        }
        event
    }
}

/// An item in progress.
enum Open {
    Reasoning { id: String, text: String },
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

/// Whose tokens they are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call,
}

/// Writes a response.
pub struct Writer {
    /// As it is now, save `output`, which comes with the end.
    pub response: ResponseObject,
    output: Vec<Value>,
    open: Option<Open>,
    number: u64,
    /// Whether log-probabilities are wanted.
    logprobs: bool,
    /// Tokens whose text is still held back, and their log-probabilities.
    held: (usize, Vec<Value>),
    reasoning_tokens: usize,
    events: Vec<Event>,
}

impl Writer {
    /// Begins with a response that is queued or in progress.
    pub fn new(response: ResponseObject, logprobs: bool) -> Self {
        Self {
            response,
            output: Vec::new(),
            open: None,
            number: 0,
            logprobs,
            held: (0, Vec::new()),
            reasoning_tokens: 0,
            events: Vec::new(),
        }
    }

    /// The events since the last call.
    pub fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The response is there.
    pub fn created(&mut self) {
        self.tell("response.created");
    }

    /// The response waits for its turn.
    pub fn queued(&mut self) {
        self.tell("response.queued");
    }

    /// The response is generated.
    pub fn in_progress(&mut self) {
        self.response.set_status(Status::InProgress);
        self.tell("response.in_progress");
    }

    /// Adds parts of the answer, and the tokens behind them, or behind parts to come.
    pub fn push(&mut self, parts: Vec<Part>, tokens: usize, logprobs: Vec<Value>) {
        self.held.0 += tokens;
        self.held.1.extend(logprobs);
        for part in parts {
            match part {
                Part::Reasoning(text) => self.reasoning(&text),
                Part::Content(text) => self.content(&text),
                Part::CallStart { id: call_id, name, .. } => {
                    self.close("completed");
                    self.settle(Kind::Call);
                    let id = new_id("fc");
                    let arguments = String::new();
                    self.add(Open::Call { id, call_id, name, arguments });
                }
                Part::CallArguments { text, .. } => self.arguments(&text),
            }
        }
    }

    /// Ends the answer: closes its items and gives the response its last status. The event that
    /// says so is [`Writer::ended`]'s, so that the response can be kept before.
    pub fn end(&mut self, end: &End, mut tokens: Tokens) {
        match &self.open {
            Some(Open::Reasoning { .. }) => drop(self.settle(Kind::Reasoning)),
            Some(_) => {}
            // A model that says nothing has said nothing: an empty message.
            None if self.output.is_empty() && end.reason != "abort" => {
                let (id, text, logprobs) = (new_id("msg"), String::new(), Vec::new());
                self.add(Open::Message { id, text, logprobs });
            }
            None => {}
        }
        self.close(if end.reason == "stop" { "completed" } else { "incomplete" });
        tokens.reasoning = self.reasoning_tokens;
        self.response.set_output(std::mem::take(&mut self.output), tokens);
        match end.reason {
            "stop" => self.response.complete(),
            "length" => self.response.cut(),
            _ => self.response.fail(&ApiError::given_up("The answer was given up by its worker.")),
        }
    }

    /// Fails, with what there is.
    pub fn fail(&mut self, error: &ApiError, mut tokens: Tokens) {
        self.open = None;
        tokens.reasoning = self.reasoning_tokens;
        self.response.set_output(std::mem::take(&mut self.output), tokens);
        self.response.fail(error);
    }

    /// The last event.
    pub fn ended(&mut self) -> Event {
        let fields = json!({"response": self.response.json()});
        let kind = match fields["response"]["status"].as_str() {
            Some("completed") => "response.completed",
            Some("incomplete") => "response.incomplete",
            _ => "response.failed",
        };
        self.event(kind, fields);
        let last = self.events.pop();
        last.unwrap_or(Event { kind, number: self.number, fields: Value::Null })
    }

    fn reasoning(&mut self, more: &str) {
        if !matches!(self.open, Some(Open::Reasoning { .. })) {
            self.close("completed");
            self.add(Open::Reasoning { id: new_id("rs"), text: String::new() });
        }
        self.settle(Kind::Reasoning);
        let index = self.output.len();
        if let Some(Open::Reasoning { id, text }) = &mut self.open {
            text.push_str(more);
            let fields = json!({
                "item_id": id, "output_index": index, "content_index": 0, "delta": more,
            });
            self.event("response.reasoning_text.delta", fields);
        }
    }

    fn content(&mut self, more: &str) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close("completed");
            self.add(Open::Message {
                id: new_id("msg"),
                text: String::new(),
                logprobs: Vec::new(),
            });
        }
        let new = self.settle(Kind::Message);
        let index = self.output.len();
        if let Some(Open::Message { id, text, logprobs }) = &mut self.open {
            text.push_str(more);
            logprobs.extend(new.iter().cloned());
            let fields = json!({
                "item_id": id, "output_index": index, "content_index": 0, "delta": more,
                "logprobs": new,
            });
            self.event("response.output_text.delta", fields);
        }
    }

    fn arguments(&mut self, more: &str) {
        self.settle(Kind::Call);
        let index = self.output.len();
        if let Some(Open::Call { id, arguments, .. }) = &mut self.open {
            arguments.push_str(more);
            let fields = json!({"item_id": id, "output_index": index, "delta": more});
            self.event("response.function_call_arguments.delta", fields);
        }
    }

    /// Gives the tokens that were held back to an item; their log-probabilities if it is text.
    fn settle(&mut self, kind: Kind) -> Vec<Value> {
        let (count, logprobs) = std::mem::take(&mut self.held);
        if kind == Kind::Reasoning {
            self.reasoning_tokens += count;
        }
        if kind == Kind::Message { logprobs } else { Vec::new() }
    }

    /// Opens an item.
    fn add(&mut self, open: Open) {
        let index = self.output.len();
        let item = self.item(&open, "in_progress", false);
        self.event("response.output_item.added", json!({"output_index": index, "item": item}));
        let part = match &open {
            Open::Reasoning { id, .. } => Some(("response.reasoning_part.added", id)),
            Open::Message { id, .. } => Some(("response.content_part.added", id)),
            Open::Call { .. } => None,
        };
        if let Some((kind, id)) = part {
            let part = self.part(&open);
            let fields = json!({
                "item_id": id, "output_index": index, "content_index": 0, "part": part,
            });
            self.event(kind, fields);
        }
        self.open = Some(open);
    }

    /// Closes the item that is open.
    fn close(&mut self, status: &str) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        match &open {
            Open::Reasoning { id, text } => {
                let at = json!({"item_id": id, "output_index": index, "content_index": 0});
                self.event("response.reasoning_text.done", with(&at, "text", text.as_str().into()));
                let part = self.part(&open);
                self.event("response.reasoning_part.done", with(&at, "part", part));
            }
            Open::Message { id, text, logprobs } => {
                let at = json!({"item_id": id, "output_index": index, "content_index": 0});
                let done = with(&at, "text", text.as_str().into());
                let done = with(&done, "logprobs", logprobs.clone().into());
                self.event("response.output_text.done", done);
                let part = self.part(&open);
                self.event("response.content_part.done", with(&at, "part", part));
            }
            Open::Call { id, name, arguments, .. } => {
                let fields = json!({
                    "item_id": id, "output_index": index, "name": name, "arguments": arguments,
                });
                self.event("response.function_call_arguments.done", fields);
            }
        }
        let item = self.item(&open, status, true);
        self.event("response.output_item.done", json!({"output_index": index, "item": item}));
        self.output.push(item);
    }

    /// An item as it is shown; `filled` with its content.
    fn item(&self, open: &Open, status: &str, filled: bool) -> Value {
        let content = || if filled { json!([self.part(open)]) } else { json!([]) };
        match open {
            Open::Reasoning { id, .. } => json!({
                "id": id, "type": "reasoning", "summary": [], "content": content(), "status": null,
            }),
            Open::Message { id, .. } => json!({
                "id": id, "type": "message", "role": "assistant", "status": status,
                "content": content(),
            }),
            Open::Call { id, call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id,
                "name": name, "arguments": arguments,
            }),
        }
    }

    /// An item's content so far.
    fn part(&self, open: &Open) -> Value {
        match open {
            Open::Reasoning { text, .. } => json!({"type": "reasoning_text", "text": text}),
            Open::Message { text, logprobs, .. } => json!({
                "type": "output_text", "text": text, "annotations": [],
                "logprobs": self.logprobs.then_some(logprobs),
            }),
            Open::Call { .. } => Value::Null,
        }
    }

    fn tell(&mut self, kind: &'static str) {
        let response = self.response.json();
        self.event(kind, json!({"response": response}));
    }

    fn event(&mut self, kind: &'static str, fields: Value) {
        self.events.push(Event { kind, number: self.number, fields });
        self.number += 1;
    }
}

fn with(fields: &Value, key: &str, value: Value) -> Value {
    let mut fields = fields.clone();
    fields[key] = value;
    fields
}

#[cfg(test)]
mod tests {
    use super::super::object::Resolved;
    use super::super::request::ResponsesFields;
    use super::*;
    use crate::api::Body;

    fn writer(logprobs: bool) -> Writer {
        let mut body = Body::parse(br#"{"input": "x"}"#).unwrap();
        let fields = ResponsesFields::read(&mut body).unwrap();
        let resolved = Resolved {
            id: "resp_1",
            model: "m",
            max_output_tokens: 9,
            temperature: 0.7,
            top_p: 1.0,
            store: true,
        };
        Writer::new(ResponseObject::new(&fields, &resolved, Status::InProgress), logprobs)
    }

    fn end(reason: &'static str) -> End {
        End { reason, stop: Value::Null }
    }

    /// All events to the end; their numbers must count from 0.
    fn finish(mut writer: Writer, reason: &'static str) -> Vec<Value> {
        writer.end(&end(reason), Tokens { input: 3, cached: 1, output: 7, reasoning: 0 });
        let last = writer.ended();
        let events: Vec<Event> = writer.take().into_iter().chain([last]).collect();
        for (at, event) in events.iter().enumerate() {
            assert_eq!(event.number, at as u64);
        }
        events.iter().map(Event::json).collect()
    }

    fn kinds(events: &[Value]) -> Vec<&str> {
        fn kind(event: &Value) -> &str {
            event["type"].as_str().unwrap().strip_prefix("response.").unwrap()
        }
        events.iter().map(kind).collect()
    }

    fn start(name: &str, index: usize) -> Part {
        Part::CallStart { index, id: format!("call_{index}"), name: name.into() }
    }

    #[test]
    fn reasoning_text_and_calls_are_items_in_their_order() {
        let mut writer = writer(true);
        writer.created();
        writer.in_progress();
        let logprob = |n: u32| vec![json!({"token": n})];
        writer.push(vec![], 1, logprob(0));
        writer.push(vec![Part::Reasoning("hm".into())], 1, logprob(1));
        writer.push(vec![Part::Content("he".into())], 1, logprob(2));
        writer.push(vec![], 1, logprob(3));
        writer.push(vec![Part::Content("llo".into())], 1, logprob(4));
        writer.push(vec![start("f", 0)], 1, logprob(5));
        writer.push(
            vec![Part::CallArguments { index: 0, text: "{}".into() }, start("g", 1)],
            1,
            vec![],
        );
        let events = finish(writer, "stop");
        let expected = [
            "created",
            "in_progress",
            "output_item.added",
            "reasoning_part.added",
            "reasoning_text.delta",
            "reasoning_text.done",
            "reasoning_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ];
        assert_eq!(kinds(&events), expected);
        let response = &events.last().unwrap()["response"];
        let output = response["output"].as_array().unwrap();
        // What is done is what the response has.
        let done: Vec<&Value> = events
            .iter()
            .filter(|event| event["type"] == "response.output_item.done")
            .map(|event| &event["item"])
            .collect();
        assert_eq!(done, output.iter().collect::<Vec<_>>());
        assert_eq!(output[0]["content"][0]["text"], "hm");
        assert_eq!(output[1]["content"][0]["text"], "hello");
        assert_eq!(
            output[1]["content"][0]["logprobs"],
            json!([{"token": 2}, {"token": 3}, {"token": 4}])
        );
        assert_eq!((&output[2]["name"], &output[3]["name"]), (&json!("f"), &json!("g")));
        assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 2);
        assert_eq!(response["usage"]["total_tokens"], 10);
        assert_eq!(response["status"], "completed");
        assert_eq!(response["temperature"], 0.7);
    }

    #[test]
    fn an_answer_that_is_cut_is_incomplete() {
        let mut writer = writer(false);
        writer.push(vec![Part::Content("he".into())], 1, vec![]);
        let events = finish(writer, "length");
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.incomplete");
        assert_eq!(last["response"]["incomplete_details"]["reason"], "max_output_tokens");
        let item = &last["response"]["output"][0];
        assert_eq!(
            (&item["status"], &item["content"][0]["logprobs"]),
            (&json!("incomplete"), &Value::Null)
        );
    }

    #[test]
    fn an_empty_answer_is_an_empty_message() {
        let events = finish(writer(false), "stop");
        assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], "");
    }

    #[test]
    fn a_failure_says_why() {
        let mut writer = writer(false);
        writer.created();
        writer.push(vec![Part::Content("he".into())], 1, vec![]);
        writer.fail(&ApiError::overloaded("Full."), Tokens::default());
        let last = writer.ended().json();
        assert_eq!(last["type"], "response.failed");
        assert_eq!(last["response"]["status"], "failed");
        let error = json!({"code": "rate_limit_exceeded", "message": "Full."});
        assert_eq!(last["response"]["error"], error);
    }
}
