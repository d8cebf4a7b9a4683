//! What both generation routes do: from a body to answers, whole or as a stream of events.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use actix_web::web::{Bytes, Payload};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::connection::{Connection, closed};
use super::load::Place;
use super::{Shared, body, connection};
use crate::api::Body;
use crate::api::sampling::{MAX_SEQUENCES, Sampling, SamplingFields};
use crate::api::usage::{Usage, room};
use crate::error::ApiError;
use crate::generate::Job;
use crate::generate::answer::{Answer, Delta, TextSettings};
use crate::workers::Served;

/// How long a stream of events may wait to notice that nothing was sent for a while: proxies and
/// load balancers cut streams that are silent, so a comment is sent.
const SILENCE: Duration = Duration::from_secs(15);
/// Frames on their way to a client that reads slowly.
const STREAM_DEPTH: usize = 32;
/// How long after its deadline a stream may still deliver what it has.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A request as it comes in: what both routes do first.
pub(super) struct Intake {
    pub(super) arrived: Instant,
    pub(super) place: Place,
    pub(super) body: Body,
    pub(super) fields: SamplingFields,
    pub(super) client: Option<Connection>,
    /// The id that the client gave the request.
    pub(super) own_id: Option<String>,
}

impl Intake {
    /// Takes a place and reads the body.
    pub(super) async fn read(
        request: &HttpRequest,
        payload: Payload,
        shared: &Shared,
    ) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        if shared.draining.load(Relaxed) {
            return Err(ApiError::unavailable("This gateway is stopping; ask another one."));
        }
        let place = shared.load.enter()?;
        let mut body = body::read(request, payload, shared.limits.max_body_bytes).await?;
        let fields: SamplingFields = body.read()?;
        let header = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
        let own_id = header.map(str::to_owned).or_else(|| fields.request_id.clone());
        Ok(Self { arrived, place, body, fields, client: connection(request), own_id })
    }
}

/// A request, read and checked, about to be generated.
pub(super) struct Order {
    pub(super) shared: Arc<Shared>,
    pub(super) served: Arc<Served>,
    pub(super) fields: SamplingFields,
    pub(super) sampling: Sampling,
    pub(super) prompts: Vec<Arc<[u32]>>,
    /// Tokens when the request does not say; the rest of the context without it.
    pub(super) default_max_tokens: Option<u32>,
    pub(super) arrived: Instant,
    /// The reply's id, under which workers log the sequences.
    pub(super) id: String,
    pub(super) place: Place,
}

/// The answers to an order.
struct Answers {
    /// By index: prompt by prompt, `n` for each.
    answers: Vec<Answer>,
    prompts: Vec<Arc<[u32]>>,
    /// Sequences for each prompt.
    n: usize,
    deadline: Instant,
    place: Place,
}

impl Order {
    /// Generates, and replies as the request asks: with a stream or as a whole.
    pub(super) async fn respond<S: Shape + 'static>(
        self,
        mut shape: S,
        body: &Body,
        client: Option<Connection>,
    ) -> Result<HttpResponse, ApiError> {
        let streams = self.fields.streams();
        let answers = self.start(client.as_ref()).await?;
        let mut response = HttpResponse::Ok();
        body::warn_of_unknown(body, &mut response);
        if streams {
            return Ok(streaming(response, answers.stream(shape, client)));
        }
        let (wholes, usage) = answers.whole(client.as_ref()).await?;
        Ok(response.json(shape.whole(wholes, usage)))
    }

    /// Sends all sequences on their way. An error here is an ordinary reply with its own status,
    /// also when a stream was asked for.
    async fn start(self, client: Option<&Connection>) -> Result<Answers, ApiError> {
        let Self { shared, served, fields, sampling, prompts, default_max_tokens, .. } = self;
        let sequences = prompts.len() * sampling.n;
        if sequences > MAX_SEQUENCES {
            let message = format!(
                "`n` times the number of prompts is {sequences}; at most {MAX_SEQUENCES} are \
                 served in one request."
            );
            return Err(ApiError::bad_value("n", message));
        }
        let deadline = self.arrived + shared.limits.request_timeout;
        let text = TextSettings {
            stop: sampling.stop.clone(),
            include_stop: fields.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
        };
        let salt = fields.cache_salt.unwrap_or_default();
        let mut jobs = Vec::with_capacity(sequences);
        for prompt in &prompts {
            let limit = served.card.max_model_len;
            let max_tokens = room(prompt.len(), limit, sampling.max_tokens, default_max_tokens)?;
            let hashes: Arc<[_]> = served.root(&salt).chain(prompt, served.block_size()).into();
            for index in 0..sampling.n {
                jobs.push(Job {
                    served: served.clone(),
                    request_id: self.id.clone(),
                    prompt: prompt.clone(),
                    hashes: hashes.clone(),
                    sampling: sampling.params_for(index, max_tokens),
                    salt: salt.clone(),
                    deadline,
                    handoff_min_tokens: shared.limits.handoff_min_tokens,
                });
            }
        }
        let starts = jobs.into_iter().map(|job| {
            let (registry, metrics) = (shared.registry.clone(), shared.metrics.clone());
            Answer::start(registry, metrics, job, text.clone(), self.arrived)
        });
        let all = futures::future::try_join_all(starts);
        let answers = unless_gone(client, all).await??;
        Ok(Answers { answers, prompts, n: sampling.n, deadline, place: self.place })
    }
}

impl Answers {
    /// Waits for all answers to end.
    async fn whole(self, client: Option<&Connection>) -> Result<(Vec<Delta>, Usage), ApiError> {
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.len()).sum();
        let each = self.answers.into_iter().map(|mut answer| async move {
            let mut whole = Delta::default();
            while let Some(Delta { text, tokens, end }) = answer.next().await? {
                whole.text.push_str(&text);
                whole.tokens.extend(tokens);
                whole.end = end.or(whole.end);
            }
            Ok::<_, ApiError>((whole, answer.tokens()))
        });
        let all = unless_gone(client, futures::future::try_join_all(each)).await??;
        let completion_tokens = all.iter().map(|(_, tokens)| tokens).sum();
        let whole = all.into_iter().map(|(whole, _)| whole).collect();
        drop(self.place);
        Ok((whole, Usage { prompt_tokens, completion_tokens }))
    }

    /// Streams all answers as events, mixed as they come. `shape` makes the frames.
    ///
    /// A task of its own reads the answers, so that a client that stops reading holds nothing
    /// beyond its deadline: the server polls a response only when there is room to write.
    fn stream<S: Shape + 'static>(
        self,
        shape: S,
        client: Option<Connection>,
    ) -> impl Stream<Item = Result<Bytes, actix_web::Error>> + use<S> {
        let (sender, frames) = mpsc::channel(STREAM_DEPTH);
        let until = self.deadline + LAST_WORDS;
        actix_web::rt::spawn(async move {
            tokio::select! {
                biased;
                () = closed(client.as_ref()) => {}
                () = sender.closed() => {}
                () = tokio::time::sleep_until(until.into()) => {}
                () = self.pump(shape, &sender) => {}
            }
        });
        ReceiverStream::new(frames).map(Ok)
    }

    /// Sends all frames, to the last one.
    async fn pump<S: Shape>(self, shape: S, sender: &mpsc::Sender<Bytes>) {
        let mut run = Run {
            shape,
            prompts: self.prompts.iter().map(|prompt| prompt.len()).collect(),
            n: self.n,
            tokens: vec![0; self.answers.len()],
        };
        let mut frame = String::new();
        for index in 0..self.answers.len() {
            run.opening(index, &mut frame);
        }
        let next = |index: usize, mut answer: Answer| async move {
            let delta = answer.next().await;
            (index, answer, delta)
        };
        let mut waiting: FuturesUnordered<_> = self
            .answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| next(index, answer))
            .collect();
        let mut over = false;
        loop {
            // An empty chunk would end the response.
            if !frame.is_empty()
                && sender.send(Bytes::from(std::mem::take(&mut frame))).await.is_err()
            {
                return;
            }
            if over {
                return;
            }
            match tokio::time::timeout(SILENCE, waiting.next()).await {
                Err(_) => frame.push_str(": still working\n\n"),
                Ok(Some((index, answer, Ok(delta)))) => {
                    if let Some(delta) = delta {
                        run.tokens[index] = answer.tokens();
                        run.delta(index, delta, &mut frame);
                        waiting.push(next(index, answer));
                    }
                }
                Ok(Some((_, _, Err(error)))) => {
                    push_frame(&error.body(), &mut frame);
                    frame.push_str("data: [DONE]\n\n");
                    over = true;
                }
                Ok(None) => {
                    run.close(&mut frame);
                    over = true;
                }
            }
        }
    }
}

/// How a route frames its answers.
pub(super) trait Shape {
    /// The reply with all answers, each a whole one.
    fn whole(&mut self, wholes: Vec<Delta>, usage: Usage) -> Map<String, Value>;
    /// The first event of a choice, if it has one of its own.
    fn opening(&mut self, index: usize) -> Option<Map<String, Value>>;
    /// The event of a delta.
    fn delta(&mut self, index: usize, delta: Delta) -> Map<String, Value>;
    /// The event with the usage, before the end.
    fn usage(&self) -> Map<String, Value>;
    /// Whether to send usage at the end, and in all events.
    fn usage_wanted(&self) -> (bool, bool);
}

/// A stream in progress.
struct Run<S> {
    shape: S,
    /// Lengths of the prompts.
    prompts: Vec<usize>,
    n: usize,
    /// Tokens of each answer so far.
    tokens: Vec<usize>,
}

impl<S: Shape> Run<S> {
    fn opening(&mut self, index: usize, out: &mut String) {
        if let Some(event) = self.shape.opening(index) {
            self.push(index, event, out);
        }
    }

    fn delta(&mut self, index: usize, delta: Delta, out: &mut String) {
        let event = self.shape.delta(index, delta);
        self.push(index, event, out);
    }

    fn push(&self, index: usize, mut event: Map<String, Value>, out: &mut String) {
        if self.shape.usage_wanted().1 {
            let usage = Usage {
                prompt_tokens: self.prompts[index / self.n],
                completion_tokens: self.tokens[index],
            };
            event.insert("usage".into(), usage.json());
        }
        push_frame(&Value::Object(event), out);
    }

    fn close(&self, out: &mut String) {
        if self.shape.usage_wanted().0 {
            let usage = Usage {
                prompt_tokens: self.prompts.iter().sum(),
                completion_tokens: self.tokens.iter().sum(),
            };
            let mut event = self.shape.usage();
            event.insert("usage".into(), usage.json());
            push_frame(&Value::Object(event), out);
        }
        out.push_str("data: [DONE]\n\n");
    }
}

fn push_frame(event: &Value, out: &mut String) {
    out.push_str("data: ");
    out.push_str(&event.to_string());
    out.push_str("\n\n");
}

/// A reply that streams.
fn streaming(
    mut response: HttpResponseBuilder,
    events: impl Stream<Item = Result<Bytes, actix_web::Error>> + 'static,
) -> HttpResponse {
    let media = HeaderValue::from_static("text/event-stream; charset=utf-8");
    response.insert_header((CONTENT_TYPE, media));
    response.insert_header((CACHE_CONTROL, HeaderValue::from_static("no-cache")));
    // nginx buffers streams unless told not to.
    response.insert_header(("X-Accel-Buffering", "no"));
    response.streaming(events)
}

/// Runs something unless the client leaves before its end. What comes then reaches nobody.
async fn unless_gone<T>(
    client: Option<&Connection>,
    work: impl Future<Output = T>,
) -> Result<T, ApiError> {
    tokio::select! {
        done = work => Ok(done),
        () = closed(client) => Err(ApiError::client_gone()),
    }
}

/// Refuses a text that cannot fit, before it is tokenized.
pub(super) fn check_length(served: &Served, text: &str) -> Result<(), ApiError> {
    let longest = served.text.longest_token.saturating_mul(served.card.max_model_len as usize);
    if text.len() <= longest {
        return Ok(());
    }
    let message = format!(
        "The prompt has {} bytes, but this model takes {} tokens, which is less than {longest} \
         bytes of any text; shorten the prompt.",
        text.len(),
        served.card.max_model_len
    );
    Err(ApiError::bad_value("input_text", message))
}
