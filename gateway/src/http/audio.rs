//! `POST /v1/audio/transcriptions` and `POST /v1/audio/translations`.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use actix_web::http::header::CONTENT_TYPE;
use actix_web::web::{Bytes, Payload};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder, web};
use baton_proto::v1::Task;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::frames::Frames;
use super::generation::{LAST_WORDS, streaming, trace, unless_gone, written};
use super::model::{TRANSCRIPTIONS, TRANSLATIONS, model};
use super::multipart::{self, Form};
use super::{Shared, body, connection, request_id};
use crate::api::audio::{AudioFields, Told, Wording};
use crate::api::envelope::Envelope;
use crate::api::requests::AudioRequest;
use crate::api::schema::{StreamEvent, Transcription};
use crate::error::ApiError;
use crate::speech::listen::{Context, Listener, Passage};

/// Writes down what is said in a recording.
#[utoipa::path(
    post, path = "/v1/audio/transcriptions", tag = "audio",
    request_body(content = AudioRequest, content_type = "multipart/form-data"),
    responses(
        (
            status = 200,
            description = "The text, as `response_format` says; a stream of events if `stream` is true.",
            content(
                (Transcription = "application/json"), (String = "text/plain"),
                (StreamEvent = "text/event-stream"),
            ),
        ),
    ),
)]
pub(super) async fn transcribe(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    answer(request, payload, shared, Task::Transcribe).await
}

/// Writes down in English what is said in a recording of any language.
#[utoipa::path(
    post, path = "/v1/audio/translations", tag = "audio",
    request_body(content = AudioRequest, content_type = "multipart/form-data"),
    responses(
        (
            status = 200,
            description = "The text, as `response_format` says; a stream of events if `stream` is true.",
            content(
                (Transcription = "application/json"), (String = "text/plain"),
                (StreamEvent = "text/event-stream"),
            ),
        ),
    ),
)]
pub(super) async fn translate(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
) -> Result<HttpResponse, ApiError> {
    answer(request, payload, shared, Task::Translate).await
}

async fn answer(
    request: HttpRequest,
    payload: Payload,
    shared: web::Data<Shared>,
    task: Task,
) -> Result<HttpResponse, ApiError> {
    let arrived = Instant::now();
    if shared.draining.load(Relaxed) {
        return Err(ApiError::unavailable("This gateway is stopping; ask another one."));
    }
    let place = (shared.load.enter()?, shared.recordings.enter()?);
    let client = connection(&request);
    let Form { mut body, file } = multipart::read(&request, payload, &shared.limits).await?;
    let fields = AudioFields::read(&mut body)?;
    let translate = task == Task::Translate;
    let api = if translate { &TRANSLATIONS } else { &TRANSCRIPTIONS };
    let served = model(&shared, fields.model.as_deref(), api)?;
    let wording = fields.wording(translate)?;
    let known = served.card.speech.as_ref().map(|card| &card.languages);
    let known: Vec<&str> = known.into_iter().flatten().map(|(code, _)| code.as_str()).collect();
    let wish = fields.wish(&wording, &known)?;
    let prefix = if translate { "translate" } else { "transcribe" };
    let id = request_id::settle(&request, None);
    let envelope = Envelope::new(prefix, &id, served.name());
    let context = Context {
        registry: shared.registry.clone(),
        metrics: shared.metrics.clone(),
        served,
        request_id: envelope.id.clone(),
        arrived,
        deadline: arrived + shared.limits.request_timeout,
        trace: trace(&request),
    };
    context.trace.asked(context.served.name(), |_| {});
    let mut response = HttpResponse::Ok();
    body::warn_of_unknown(&body, &mut response);
    let deadline = context.deadline;
    let begin = async {
        let windows = shared.decoders.open(file, deadline).await?;
        let mut listener = Listener::new(context, wish, windows)?;
        // What fails before the first text is an ordinary reply, also when a stream is asked for.
        let first = listener.next().await?;
        Ok::<_, ApiError>((listener, first))
    };
    let (listener, first) = unless_gone(client.as_ref(), begin).await??;
    if wording.stream {
        let stream = Stream { envelope, wording, begun: false };
        let until = Some(deadline + LAST_WORDS);
        let events = written(client, until, async move |sender| {
            let _place = place;
            stream.pump(listener, first, &sender).await;
        });
        return Ok(streaming(response, events));
    }
    let told = unless_gone(client.as_ref(), whole(listener, first)).await??;
    drop(place);
    Ok(worded(&mut response, &told, &wording))
}

/// Listens to the end.
async fn whole(mut listener: Listener, first: Option<Passage>) -> Result<Told, ApiError> {
    let mut told = Told { seconds: listener.seconds(), ..Told::default() };
    let mut next = first;
    while let Some(passage) = next {
        told.segments.extend(passage.segments);
        told.words.extend(passage.words);
        next = listener.next().await?;
    }
    told.language = listener.language();
    Ok(told)
}

fn worded(response: &mut HttpResponseBuilder, told: &Told, wording: &Wording) -> HttpResponse {
    let (media, text) = told.reply(wording);
    response.insert_header((CONTENT_TYPE, media)).body(text)
}

/// How a stream is worded.
struct Stream {
    envelope: Envelope,
    wording: Wording,
    begun: bool,
}

impl Stream {
    /// Sends all events, to the last one.
    async fn pump(
        mut self,
        mut listener: Listener,
        first: Option<Passage>,
        sender: &mpsc::Sender<Bytes>,
    ) {
        let mut frames = Frames::default();
        let mut next: Result<_, ApiError> = Ok(first);
        loop {
            let over = match next {
                Ok(Some(passage)) => {
                    for segment in passage.segments {
                        self.text(&segment.text, &listener, &mut frames);
                    }
                    false
                }
                Ok(None) => {
                    self.close(&listener, &mut frames);
                    true
                }
                Err(error) => {
                    frames.data(&error.body());
                    frames.done();
                    true
                }
            };
            if let Some(text) = frames.take()
                && sender.send(text.into()).await.is_err()
            {
                return;
            }
            if over {
                return;
            }
            next = listener.next().await;
        }
    }

    fn text(&mut self, text: &str, listener: &Listener, frames: &mut Frames) {
        let text = match std::mem::replace(&mut self.begun, true) {
            true => text,
            false => text.trim_start(),
        };
        let mut event = self.event(vec![json!({"delta": {"content": text}})]);
        if self.wording.usage.1 {
            event["usage"] = listener.usage().json(false);
        }
        frames.data(&event);
    }

    fn close(&self, listener: &Listener, frames: &mut Frames) {
        let last = json!({"delta": {"content": ""}, "finish_reason": "stop", "stop_reason": null});
        let mut event = self.event(vec![last]);
        if self.wording.usage.1 {
            event["usage"] = listener.usage().json(false);
        }
        frames.data(&event);
        if self.wording.usage.0 {
            let mut event = self.event(Vec::new());
            event["usage"] = listener.usage().json(false);
            frames.data(&event);
        }
        frames.done();
    }

    fn event(&self, choices: Vec<Value>) -> Value {
        let kind = match self.wording.translate {
            true => "translation.chunk",
            false => "transcription.chunk",
        };
        self.envelope.frame(kind, choices).into()
    }
}
