//! Reads an answer into a response, and gives it to a client that waits: whole, or as events.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::web::Bytes;
use futures::Stream;
use serde_json::Value;
use tokio::sync::mpsc;

use super::super::call::Call;
use super::super::connection::Connection;
use super::super::frames::Frames;
use super::super::generation::{LAST_WORDS, Order, Single, streaming, unless_gone, written};
use super::super::{Shared, body};
use super::{Ready, failed};
use crate::api::Body;
use crate::api::logprobs::Naming;
use crate::api::responses::events::{Event, Writer};
use crate::api::responses::object::{ResponseObject, Tokens};
use crate::api::responses::request::reworded;
use crate::api::usage::Usage;
use crate::error::ApiError;
use crate::generate::answer::{Delta, End};
use crate::output::OutputParser;
use crate::text::TextModel;

/// Makes a response of an answer's text.
pub(super) struct Reader {
    pub(super) writer: Writer,
    parser: OutputParser,
    model: Arc<TextModel>,
    naming: Naming,
    logprobs: bool,
    /// Tokens so far.
    pub(super) tokens: Tokens,
}

/// Where events go.
pub(super) trait Sink {
    /// Takes the next events.
    async fn send(&mut self, events: Vec<Event>) -> Result<(), ApiError>;
    /// How long it is content without any.
    fn patience(&self) -> Duration {
        Duration::MAX
    }
    /// Its patience is over.
    async fn idle(&mut self) -> Result<(), ApiError> {
        pending().await
    }
}

impl Reader {
    pub(super) fn new(call: &Call, response: ResponseObject) -> Self {
        Self {
            writer: Writer::new(response, call.logprobs),
            parser: call.reading.parser(),
            model: call.served.text.clone(),
            naming: Naming::default(),
            logprobs: call.logprobs,
            tokens: Tokens { input: call.prompt.len(), ..Tokens::default() },
        }
    }

    /// Reads an answer to its end, and closes the response with it, save for the last event.
    pub(super) async fn read(
        &mut self,
        answer: &mut Single,
        sink: &mut impl Sink,
    ) -> Result<(), ApiError> {
        loop {
            let delta = {
                let mut next = pin!(answer.next());
                loop {
                    match tokio::time::timeout(sink.patience(), &mut next).await {
                        Ok(delta) => break delta?,
                        Err(_) => sink.idle().await?,
                    }
                }
            };
            let Some(delta) = delta else {
                return Err(ApiError::internal("The answer has no end."));
            };
            self.tokens = tokens(answer.usage());
            let end = self.delta(delta);
            if let Some(end) = &end {
                self.writer.end(end, self.tokens);
            }
            let events = self.writer.take();
            if !events.is_empty() {
                sink.send(events).await?;
            }
            if end.is_some() {
                return Ok(());
            }
        }
    }

    /// The response fails with what there is.
    pub(super) fn fail(&mut self, error: &ApiError) {
        self.writer.fail(error, self.tokens);
    }

    fn delta(&mut self, delta: Delta) -> Option<End> {
        let Delta { text, tokens, end, prompt: _ } = delta;
        let mut parts = self.parser.push(&text);
        if end.is_some() {
            parts.extend(self.parser.finish());
        }
        let logprobs = match self.logprobs && !tokens.is_empty() {
            true => self.naming.chat(&self.model, &tokens)["content"].take(),
            false => Value::Null,
        };
        let logprobs = logprobs.as_array().cloned().unwrap_or_default();
        self.writer.push(parts, tokens.len(), logprobs);
        end
    }
}

fn tokens(usage: Usage) -> Tokens {
    Tokens {
        input: usage.prompt_tokens,
        cached: usage.cached_tokens,
        output: usage.completion_tokens,
        reasoning: 0,
    }
}

/// Generates, and replies as the request asks.
pub(super) async fn respond(
    shared: Arc<Shared>,
    mut ready: Ready,
    order: Order,
    body: &Body,
    client: Option<Connection>,
) -> Result<HttpResponse, ApiError> {
    let answers = order.start(client.as_ref()).await.map_err(reworded)?;
    let mut answer = answers.single()?;
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(body, &mut response);
    if ready.streams {
        return Ok(streaming(response, stream(shared, ready, answer, client)));
    }
    unless_gone(client.as_ref(), ready.reader.read(&mut answer, &mut Nowhere)).await??;
    keep(&shared, &mut ready).await;
    Ok(response.json(ready.reader.writer.response.json()))
}

/// Keeps a response that has ended. Its client has waited for the answer, not for the store: after
/// a failure it gets the answer, which says that it is not kept.
async fn keep(shared: &Shared, ready: &mut Ready) {
    let Some(store) = shared.responses.store.as_ref().filter(|_| ready.stores) else { return };
    let status = ready.reader.writer.response.status();
    let record = ready.record(status, None);
    let kept = failed(shared, store, "insert", store.insert(&record).await).unwrap_or_default();
    if !kept {
        tracing::error!(id = ready.id, "a response is not kept");
        ready.reader.writer.response.not_kept();
    }
}

/// The events of an answer.
fn stream(
    shared: Arc<Shared>,
    mut ready: Ready,
    mut answer: Single,
    client: Option<Connection>,
) -> impl Stream<Item = Result<Bytes, actix_web::Error>> {
    let until = Some(answer.deadline + LAST_WORDS);
    written(client, until, async move |sender| {
        let mut wire = Wire(sender);
        let work = async {
            ready.reader.writer.created();
            ready.reader.writer.in_progress();
            wire.send(ready.reader.writer.take()).await?;
            if let Err(error) = ready.reader.read(&mut answer, &mut wire).await {
                if wire.0.is_closed() {
                    return Err(error);
                }
                ready.reader.fail(&error);
            }
            // Its place and its worker's are free now.
            drop(answer);
            keep(&shared, &mut ready).await;
            let last = ready.reader.writer.ended();
            wire.send(vec![last]).await
        };
        // A client that has left is the only thing that goes wrong.
        let _ = work.await;
    })
}

/// A client's stream.
struct Wire(mpsc::Sender<Bytes>);

impl Sink for Wire {
    async fn send(&mut self, events: Vec<Event>) -> Result<(), ApiError> {
        let mut frames = Frames::default();
        for event in events {
            // Under its type's name.
            frames.event(event.kind, &event.json());
        }
        let Some(text) = frames.take() else { return Ok(()) };
        let sent = self.0.send(text.into()).await;
        sent.map_err(|_| ApiError::client_gone())
    }
}

/// For an answer that is given as a whole.
struct Nowhere;

impl Sink for Nowhere {
    async fn send(&mut self, _events: Vec<Event>) -> Result<(), ApiError> {
        Ok(())
    }
}
