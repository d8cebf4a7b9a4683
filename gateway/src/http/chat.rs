//! `POST /v1/chat/completions`.

use actix_web::web::Payload;
use actix_web::{HttpRequest, HttpResponse, web};
use baton_proto::v1::Token;
use serde_json::{Map, Value, json};

use super::Shared;
use super::call::Call;
use super::frames::{Frames, Shape};
use super::generation::Intake;
use super::model::CHAT;
use crate::api::envelope::Envelope;
use crate::api::logprobs::Naming;
use crate::api::requests::ChatRequest;
use crate::api::schema::{ChatCompletion, StreamEvent};
use crate::api::usage::{Budget, Usage};
use crate::error::ApiError;
use crate::generate::answer::{Delta, End};
use crate::output::{OutputParser, Parsed, Part};

/// Answers a chat.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "generation", request_body = ChatRequest,
    params((
        "endpoint-load-metrics-format" = Option<String>, Header,
        description = "JSON or TEXT: a reply that is no stream has a header \
                       `endpoint-load-metrics` then, which says how busy the workers are.",
    )),
    responses((
        status = 200, description = "The answer; a stream of events if `stream` is true.",
        content((ChatCompletion = "application/json"), (StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn create(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    answer(intake, shared).await
}

/// Answers a chat whose body has been read.
pub(super) async fn answer(
    intake: Intake,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let Intake { arrived, place, mut body, client, request_id, trace, load } = intake;
    let call = Call::read(&shared, &mut body, &CHAT, trace).await?;
    let envelope = Envelope::new("chatcmpl", &request_id, call.served.name());
    let id = envelope.id.clone();
    let order = call.order(shared.into_inner(), id, Budget::default(), arrived, place);
    let streams = call.fields.streams();
    order.respond(Chat::new(call, envelope), streams, &body, client, load).await
}

/// How a chat's answers are worded.
struct Chat {
    envelope: Envelope,
    call: Call,
    naming: Naming,
    /// Whether log-probabilities are sent, the answers' token ids, and the prompt's.
    logprobs: bool,
    token_ids: bool,
    prompt_ids: bool,
    usage: (bool, bool),
    answers: Vec<Progress>,
}

/// An answer that streams.
struct Progress {
    parser: OutputParser,
    /// Tokens whose text is still held back.
    tokens: Vec<Token>,
    /// Whether a call has begun.
    called: bool,
}

impl Chat {
    fn new(call: Call, envelope: Envelope) -> Self {
        let fields = &call.fields;
        let answer =
            |_| Progress { parser: call.reading.parser(), tokens: Vec::new(), called: false };
        let shown = !call.reading.hides_reasoning();
        let ids = fields.return_token_ids.unwrap_or(false);
        Self {
            envelope,
            naming: Naming { as_token_ids: fields.return_tokens_as_token_ids.unwrap_or(false) },
            logprobs: call.logprobs && shown,
            token_ids: ids && shown,
            prompt_ids: ids,
            usage: fields.usage_in_stream(),
            answers: (0..call.sampling.n).map(answer).collect(),
            call,
        }
    }

    /// A choice of a whole reply.
    fn choice(&mut self, index: usize, whole: Delta) -> Value {
        let Delta { text, tokens, end, prompt: _ } = whole;
        let parser = &mut self.answers[index].parser;
        let mut parsed = Parsed::default();
        parsed.extend(parser.push(&text));
        parsed.extend(parser.finish());
        let Parsed { reasoning, mut content, calls } = parsed;
        let reading = &self.call.reading;
        let called = !calls.is_empty();
        if called && !reading.forced() && content.trim().is_empty() {
            content.clear();
        }
        if let Some(echo) = &self.call.echo {
            content.insert_str(0, echo);
        }
        let no_content = content.is_empty() && called && !reading.forced();
        let reasoning = (reading.include_reasoning && !reasoning.is_empty()).then_some(reasoning);
        let calls: Vec<Value> = calls
            .into_iter()
            .map(|call| {
                json!({
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                })
            })
            .collect();
        let logprobs = self.logprobs.then(|| self.naming.chat(&self.call.served.text, &tokens));
        let ids: Option<Vec<u32>> =
            self.token_ids.then(|| tokens.iter().map(|token| token.id).collect());
        json!({
            "index": index,
            "message": {
                "role": self.call.role,
                "content": if no_content { Value::Null } else { content.into() },
                "refusal": null,
                "annotations": null,
                "audio": null,
                "function_call": null,
                "tool_calls": calls,
                "reasoning": reasoning,
                "reasoning_content": reasoning,
            },
            "logprobs": logprobs,
            "finish_reason": end.as_ref().map(|end| reading.finish_reason(end.reason, called)),
            "stop_reason": end.map(|end| end.stop),
            "token_ids": ids,
        })
    }

    fn send(&self, choice: Value, usage: Usage, frames: &mut Frames) {
        let mut event = self.envelope.frame("chat.completion.chunk", vec![choice]);
        if self.usage.1 {
            event.insert("usage".into(), self.call.usage(usage));
        }
        frames.data(&event.into());
    }

    /// A choice of an event. Events have only the keys that are set, as vLLM does it.
    fn part(&mut self, index: usize, delta: Value, end: Option<End>) -> Value {
        let answer = &mut self.answers[index];
        let tokens = std::mem::take(&mut answer.tokens);
        let reading = &self.call.reading;
        let reason = end.as_ref().map(|end| reading.finish_reason(end.reason, answer.called));
        let mut choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": null,
            "finish_reason": reason,
        });
        if self.logprobs && !tokens.is_empty() {
            choice["logprobs"] = self.naming.chat(&self.call.served.text, &tokens);
        }
        if let Some(end) = end {
            choice["stop_reason"] = end.stop;
        }
        if self.token_ids {
            choice["token_ids"] = tokens.iter().map(|token| token.id).collect();
        }
        choice
    }

    fn opening_event(&self, index: usize) -> Map<String, Value> {
        let choice = json!({
            "index": index,
            "delta": {"role": self.call.role, "content": ""},
            "logprobs": null,
            "finish_reason": null,
        });
        let mut event = self.envelope.frame("chat.completion.chunk", vec![choice]);
        let prompt_ids = self.prompt_ids.then(|| self.call.prompt.to_vec());
        event.insert("prompt_token_ids".into(), json!(prompt_ids));
        event
    }
}

impl Shape for Chat {
    fn whole(&mut self, mut wholes: Vec<Delta>, usage: Usage) -> Value {
        let prompt = wholes.first_mut().map(|whole| std::mem::take(&mut whole.prompt));
        let choices =
            wholes.into_iter().enumerate().map(|(i, whole)| self.choice(i, whole)).collect();
        let fields = &self.call.fields;
        let prompt_logprobs = prompt
            .filter(|_| self.call.sampling.params.prompt_logprobs.is_some())
            .map(|prompt| self.naming.prompt(&self.call.served.text, &prompt));
        let prompt_ids = self.prompt_ids.then(|| self.call.prompt.to_vec());
        let mut reply = self.envelope.frame("chat.completion", choices);
        reply.insert("service_tier".into(), Value::Null);
        reply.insert("system_fingerprint".into(), Value::Null);
        reply.insert("usage".into(), self.call.usage(usage));
        reply.insert("prompt_logprobs".into(), json!(prompt_logprobs));
        reply.insert("prompt_token_ids".into(), json!(prompt_ids));
        reply.insert("kv_transfer_params".into(), json!(fields.kv_transfer_params));
        reply.into()
    }

    fn opening(&mut self, prompts: &[usize], frames: &mut Frames) {
        let usage = Usage { prompt_tokens: prompts.iter().sum(), ..Usage::default() };
        for index in 0..self.answers.len() {
            let mut event = self.opening_event(index);
            if self.usage.1 {
                event.insert("usage".into(), self.call.usage(usage));
            }
            frames.data(&event.into());
            if let Some(echo) = self.call.echo.clone() {
                let choice = self.part(index, json!({"content": echo}), None);
                self.send(choice, usage, frames);
            }
        }
    }

    fn delta(&mut self, index: usize, delta: Delta, usage: Usage, frames: &mut Frames) {
        let Delta { text, tokens, mut end, prompt: _ } = delta;
        let shown = self.logprobs || self.token_ids;
        let answer = &mut self.answers[index];
        if shown {
            answer.tokens.extend(tokens);
        }
        let mut parts = answer.parser.push(&text);
        if end.is_some() {
            parts.extend(answer.parser.finish());
        }
        let reasoning = self.call.reading.include_reasoning;
        parts.retain(|part| reasoning || !matches!(part, Part::Reasoning(_)));
        answer.called |= parts.iter().any(|part| matches!(part, Part::CallStart { .. }));
        let count = parts.len();
        for (at, part) in parts.into_iter().enumerate() {
            // The last piece and the end share an event.
            let end = if at + 1 == count { end.take() } else { None };
            let choice = self.part(index, chat_delta(part), end);
            self.send(choice, usage, frames);
        }
        // Tokens are not kept back when their text is: logprobs and ids stay with their step.
        if end.is_some() || !self.answers[index].tokens.is_empty() {
            let choice = self.part(index, json!({"content": ""}), end);
            self.send(choice, usage, frames);
        }
    }

    fn close(&mut self, usage: Usage, frames: &mut Frames) {
        if self.usage.0 {
            let mut event = self.envelope.frame("chat.completion.chunk", Vec::new());
            event.insert("usage".into(), self.call.usage(usage));
            frames.data(&event.into());
        }
        frames.done();
    }
}

/// A part as the `delta` of an event.
fn chat_delta(part: Part) -> Value {
    match part {
        Part::Reasoning(text) => json!({"reasoning": text, "reasoning_content": text}),
        Part::Content(text) => json!({"content": text}),
        Part::CallStart { index, id, name } => json!({"tool_calls": [{
            "id": id,
            "type": "function",
            "index": index,
            "function": {"name": name, "arguments": ""},
        }]}),
        Part::CallArguments { index, text } => {
            json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        }
    }
}
