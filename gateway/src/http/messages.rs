//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API.

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::web::Payload;
use actix_web::{Error, HttpRequest, HttpResponse, ResponseError as _, web};
use serde_json::{Value, json};

use super::call::Call;
use super::frames::{Frames, Shape};
use super::generation::{Intake, trace};
use super::model::MESSAGES;
use super::{Shared, body};
use crate::api::Body;
use crate::api::envelope::Envelope;
use crate::api::messages::{
    Blocks, IGNORED, MessagesFields, assemble, error, stop_reason, usage as usage_json,
};
use crate::api::requests::{CountTokensRequest, MessagesRequest};
use crate::api::schema::{StreamEvent, anthropic};
use crate::api::usage::{Budget, Usage};
use crate::error::ApiError;
use crate::generate::answer::{Delta, End};
use crate::output::OutputParser;

/// The routes whose errors have Anthropic's shape.
pub(super) const PATHS: [&str; 2] = ["/v1/messages", "/v1/messages/count_tokens"];

/// Answers a chat in Anthropic's form.
#[utoipa::path(
    post, path = "/v1/messages", tag = "generation", request_body = MessagesRequest,
    responses((
        status = 200, description = "The answer; a stream of events if `stream` is true.",
        content((anthropic::Reply = "application/json"), (StreamEvent = "text/event-stream")),
    )),
)]
pub(super) async fn create(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let intake = Intake::read(&request, payload, &shared).await?;
    let Intake { arrived, place, mut body, client, request_id, trace, .. } = intake;
    let fields = read(&mut body)?;
    fields.check_max_tokens()?;
    let call = Call::read(&shared, &mut fields.to_chat()?, &MESSAGES, trace).await?;
    let Envelope { id, model, .. } = Envelope::new("chatcmpl", &request_id, call.served.name());
    let order = call.order(shared.into_inner(), id.clone(), Budget::default(), arrived, place);
    let parser = call.reading.parser();
    let message = Message { id, model, parser, blocks: Blocks::default(), end: None };
    order.respond(message, fields.streams(), &body, client, None).await
}

/// Counts the tokens of a chat's prompt.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "generation", request_body = CountTokensRequest,
    responses((status = 200, description = "How many.", body = anthropic::TokenCount)),
)]
pub(super) async fn count_tokens(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    let mut body = body::read(&request, payload, &shared.limits).await?;
    let fields = read(&mut body)?;
    let call = Call::read(&shared, &mut fields.to_chat()?, &MESSAGES, trace(&request)).await?;
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(&body, &mut response);
    Ok(response.json(json!({"input_tokens": call.prompt.len()})))
}

fn read(body: &mut Body) -> Result<MessagesFields, ApiError> {
    let fields = body.read()?;
    body.refuse_unsupported()?;
    body.ignore(IGNORED);
    Ok(fields)
}

/// How an answer is worded.
struct Message {
    id: String,
    model: String,
    parser: OutputParser,
    blocks: Blocks,
    end: Option<End>,
}

impl Message {
    fn json(&self, content: Vec<Value>, usage: Usage) -> Value {
        let (reason, stop) = match &self.end {
            Some(_) => self.reason(),
            None => (Value::Null, Value::Null),
        };
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage_json(usage),
        })
    }

    fn reason(&self) -> (Value, Value) {
        let (reason, stop) = match &self.end {
            Some(end) => (end.reason, &end.stop),
            None => ("abort", &Value::Null),
        };
        let (reason, stop) = stop_reason(reason, stop, self.blocks.called());
        (reason.into(), stop)
    }

    /// The events of a delta's text.
    fn events(&mut self, delta: Delta) -> Vec<Value> {
        let mut events = Vec::new();
        let mut parts = self.parser.push(&delta.text);
        if delta.end.is_some() {
            parts.extend(self.parser.finish());
        }
        parts.into_iter().for_each(|part| self.blocks.push(part, &mut events));
        if delta.end.is_some() {
            self.blocks.finish(&mut events);
            self.end = delta.end;
        }
        events
    }
}

impl Shape for Message {
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Value {
        let events: Vec<Value> = wholes.into_iter().flat_map(|whole| self.events(whole)).collect();
        self.json(assemble(&events), usage)
    }

    fn opening(&mut self, prompts: &[usize], frames: &mut Frames) {
        let usage = Usage { prompt_tokens: prompts.iter().sum(), ..Usage::default() };
        let message = self.json(Vec::new(), usage);
        send(frames, &json!({"type": "message_start", "message": message}));
    }

    fn delta(&mut self, _index: usize, delta: Delta, _usage: Usage, frames: &mut Frames) {
        self.events(delta).iter().for_each(|event| send(frames, event));
    }

    fn close(&mut self, usage: Usage, frames: &mut Frames) {
        let (reason, stop) = self.reason();
        send(
            frames,
            &json!({
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": stop},
                "usage": usage_json(usage),
            }),
        );
        // No `[DONE]` behind it: vLLM sends one, Anthropic does not.
        send(frames, &json!({"type": "message_stop"}));
    }

    fn failed(&mut self, failure: &ApiError, frames: &mut Frames) {
        send(frames, &error(failure.status_code().as_u16(), &failure.body()));
    }
}

/// An event under its type's name.
fn send(frames: &mut Frames, event: &Value) {
    frames.event(event["type"].as_str().unwrap_or_default(), event);
}

/// Around every request: errors of these routes, whoever found them, have Anthropic's shape.
pub(super) async fn reword_errors(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<EitherBody<impl MessageBody, String>>, Error> {
    let ours = PATHS.contains(&request.path());
    let response = next.call(request).await?;
    let failure = response.response().error().and_then(|error| error.as_error::<ApiError>());
    match failure.filter(|_| ours) {
        None => Ok(response.map_into_left_body()),
        Some(failure) => {
            let body = error(failure.status_code().as_u16(), &failure.body()).to_string();
            Ok(response.map_body(|_, _| body).map_into_right_body())
        }
    }
}
