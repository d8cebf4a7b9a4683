//! What both generation routes do: from a body to answers, whole or as a stream of events.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use actix_web::web::{Bytes, Payload};
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse, HttpResponseBuilder};
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::Instrument as _;

use super::connection::{Connection, closed};
use super::frames::{Frames, Shape};
use super::load::Place;
use super::{Shared, body, connection, orca, request_id};
use crate::api::Body;
use crate::api::sampling::{Bounds, MAX_SEQUENCES, Sampling, SamplingFields, Wish};
use crate::api::usage::{Budget, Usage, check_min_tokens, room};
use crate::error::ApiError;
use crate::generate::Job;
use crate::generate::answer::{Answer, Delta};
use crate::trace::Trace;
use crate::workers::Served;

/// How long a stream may be silent before a comment is sent: proxies and load balancers cut streams
/// that are.
const SILENCE: Duration = Duration::from_secs(15);
/// Frames on their way to a client that reads slowly.
const STREAM_DEPTH: usize = 32;
/// How long after its deadline a stream may still deliver what it has.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(5);

/// A request as it comes in: what both routes do first.
pub(super) struct Intake {
    pub(super) arrived: Instant,
    pub(super) place: Place,
    pub(super) body: Body,
    pub(super) client: Option<Connection>,
    /// The request's id, the client's own if it gave one.
    pub(super) request_id: String,
    pub(super) trace: Trace,
    /// How it wants to be told of the workers' load.
    pub(super) load: Option<orca::Format>,
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
        let body = body::read(request, payload, &shared.limits).await?;
        let own_id = body.get("request_id").and_then(Value::as_str);
        let request_id = request_id::settle(request, own_id);
        let (client, trace) = (connection(request), trace(request));
        let load = orca::Format::of(request.headers());
        Ok(Self { arrived, place, body, client, request_id, trace, load })
    }
}

/// The trace of a request.
pub(super) fn trace(request: &HttpRequest) -> Trace {
    request.extensions().get().cloned().unwrap_or_default()
}

/// A request, read and checked, about to be generated.
#[derive(Clone)]
pub(super) struct Order {
    pub(super) shared: Arc<Shared>,
    pub(super) served: Arc<Served>,
    pub(super) sampling: Sampling,
    pub(super) prompts: Vec<Arc<[u32]>>,
    pub(super) budget: Budget,
    pub(super) arrived: Instant,
    /// The reply's id, under which workers log the sequences.
    pub(super) id: String,
    pub(super) place: Place,
    pub(super) trace: Trace,
}

/// The answers to an order.
pub(super) struct Answers {
    /// By index: prompt by prompt, `n` for each.
    answers: Vec<Answer>,
    prompts: Vec<Arc<[u32]>>,
    /// Sequences for each prompt.
    n: usize,
    deadline: Instant,
    place: Place,
}

impl Order {
    /// Generates, and replies as the request asks: with a stream or as a whole, which tells of the
    /// workers' load if it is to.
    pub(super) async fn respond<S: Shape + 'static>(
        self,
        mut shape: S,
        streams: bool,
        body: &Body,
        client: Option<Connection>,
        load: Option<orca::Format>,
    ) -> Result<HttpResponse, ApiError> {
        let (shared, served) = (self.shared.clone(), self.served.clone());
        let answers = self.start(client.as_ref()).await?;
        let mut response = HttpResponse::Ok();
        body::warn_of_unknown(body, &mut response);
        if streams {
            return Ok(streaming(response, answers.stream(shape, client)));
        }
        let (wholes, usage) = answers.whole(client.as_ref()).await?;
        if let Some(format) = load {
            orca::tell(&mut response, format, &shared.registry, &served);
        }
        Ok(response.json(shape.whole(wholes, usage)))
    }

    /// Sends all sequences on their way. An error here is an ordinary reply with its own status,
    /// also when a stream was asked for.
    pub(super) async fn start(self, client: Option<&Connection>) -> Result<Answers, ApiError> {
        let Self { shared, served, sampling, prompts, budget, trace, .. } = self;
        let sequences = prompts.len() * sampling.n;
        if sequences > MAX_SEQUENCES {
            let message = format!(
                "`n` times the number of prompts is {sequences}; at most {MAX_SEQUENCES} are \
                 served in one request."
            );
            return Err(ApiError::bad_value("n", message));
        }
        trace.asked(served.name(), |span| {
            span.set("gen_ai.request.n", sampling.n as i64);
            span.set("gen_ai.request.temperature", f64::from(sampling.params.temperature));
            span.set("gen_ai.request.top_p", f64::from(sampling.params.top_p));
            if let Some(max_tokens) = sampling.max_tokens {
                span.set("gen_ai.request.max_tokens", i64::from(max_tokens));
            }
        });
        let deadline = self.arrived + shared.limits.request_timeout;
        let mut jobs = Vec::with_capacity(sequences);
        for (nth, prompt) in prompts.iter().enumerate() {
            trace.prompt(prompt.len());
            let limit = served.card.max_model_len;
            let budget = budget.or(sampling.default_max_tokens);
            let max_tokens = room(prompt.len(), limit, sampling.max_tokens, budget)?;
            check_min_tokens(sampling.params.min_tokens, max_tokens, budget)?;
            let siblings = shared.metrics.siblings(&served.card, sampling.n);
            let hashes: Arc<[_]> =
                served.root(&sampling.salt).chain(prompt, served.block_size()).into();
            for choice in 0..sampling.n {
                jobs.push(Job {
                    served: served.clone(),
                    request_id: self.id.clone(),
                    prompt: prompt.clone(),
                    hashes: hashes.clone(),
                    sampling: sampling.params_for(nth, choice, max_tokens),
                    salt: sampling.salt.clone(),
                    priority: sampling.priority,
                    constraint_field: sampling.constraint_field,
                    deadline,
                    handoff_min_tokens: shared.limits.handoff_min_tokens,
                    audio: None,
                    siblings: siblings.clone(),
                    trace: trace.clone(),
                });
            }
        }
        let starts = jobs.into_iter().map(|job| {
            let (registry, metrics) = (shared.registry.clone(), shared.metrics.clone());
            Answer::start(registry, metrics, job, sampling.text.clone(), self.arrived)
        });
        let all = futures::future::try_join_all(starts);
        let answers = unless_gone(client, all).await??;
        Ok(Answers { answers, prompts, n: sampling.n, deadline, place: self.place })
    }
}

/// The answer to an order of one sequence, for a route that reads it itself.
pub(super) struct Single {
    answer: Answer,
    pub(super) deadline: Instant,
    _place: Place,
}

impl Single {
    /// What comes next; `None` after the end.
    pub(super) async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        self.answer.next().await
    }

    /// Tokens so far.
    pub(super) fn usage(&self) -> Usage {
        self.answer.usage()
    }
}

impl Answers {
    /// The only answer.
    pub(super) fn single(mut self) -> Result<Single, ApiError> {
        let answer = self.answers.pop();
        let answer = answer.ok_or_else(|| ApiError::internal("Nothing was generated."))?;
        Ok(Single { answer, deadline: self.deadline, _place: self.place })
    }

    /// Waits for all answers to end.
    async fn whole(self, client: Option<&Connection>) -> Result<(Vec<Delta>, Usage), ApiError> {
        let each = self.answers.into_iter().map(|mut answer| async move {
            let mut whole = Delta::default();
            while let Some(delta) = answer.next().await? {
                whole.append(delta);
            }
            Ok::<_, ApiError>((whole, answer.usage()))
        });
        let all = unless_gone(client, futures::future::try_join_all(each)).await??;
        let (wholes, usages): (_, Vec<Usage>) = all.into_iter().unzip();
        drop(self.place);
        Ok((wholes, Usage::total(&usages, self.n)))
    }

    /// Streams all answers as events, mixed as they come. `shape` makes the frames.
    pub(super) fn stream<S: Shape + 'static>(
        self,
        shape: S,
        client: Option<Connection>,
    ) -> impl Stream<Item = Result<Bytes, actix_web::Error>> + use<S> {
        let until = Some(self.deadline + LAST_WORDS);
        written(client, until, async move |sender| self.pump(shape, &sender).await)
    }

    /// Sends all frames, to the last one.
    async fn pump<S: Shape>(self, mut shape: S, sender: &mpsc::Sender<Bytes>) {
        let prompts: Vec<usize> = self.prompts.iter().map(|prompt| prompt.len()).collect();
        let mut usages: Vec<Usage> = self.answers.iter().map(Answer::usage).collect();
        let mut frames = Frames::default();
        shape.opening(&prompts, &mut frames);
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
            if let Some(text) = frames.take()
                && sender.send(text.into()).await.is_err()
            {
                return;
            }
            if over {
                return;
            }
            match waiting.next().await {
                Some((index, answer, Ok(delta))) => {
                    if let Some(delta) = delta {
                        usages[index] = answer.usage();
                        shape.delta(index, delta, usages[index], &mut frames);
                        waiting.push(next(index, answer));
                    }
                }
                Some((_, _, Err(error))) => {
                    shape.failed(&error, &mut frames);
                    over = true;
                }
                None => {
                    shape.close(Usage::total(&usages, self.n), &mut frames);
                    over = true;
                }
            }
        }
    }
}

/// What `work` writes, whole frames each time, as a stream: until it is done, the client has left,
/// or `until`.
///
/// It is a task of its own, so that a client that stops reading holds nothing beyond that time: the
/// server polls a response only when there is room to write.
pub(super) fn written(
    client: Option<Connection>,
    until: Option<Instant>,
    work: impl AsyncFnOnce(mpsc::Sender<Bytes>) + 'static,
) -> impl Stream<Item = Result<Bytes, actix_web::Error>> {
    let (sender, frames) = mpsc::channel(STREAM_DEPTH);
    let task = async move {
        let gone = sender.clone();
        let over = async {
            match until {
                Some(until) => tokio::time::sleep_until(until.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = closed(client.as_ref()) => {}
            () = gone.closed() => {}
            () = over => {}
            () = work(sender) => {}
        }
    };
    actix_web::rt::spawn(task.in_current_span());
    kept_alive(frames, SILENCE).map(Ok)
}

/// All frames, and a comment whenever none was there to be sent for as long as `silence`, whatever
/// was computed meanwhile.
fn kept_alive(frames: mpsc::Receiver<Bytes>, silence: Duration) -> impl Stream<Item = Bytes> {
    futures::stream::unfold(frames, move |mut frames| async move {
        let next = match tokio::time::timeout(silence, frames.recv()).await {
            Ok(next) => next?,
            Err(_) => {
                let mut comment = Frames::default();
                comment.comment("still working");
                comment.take().unwrap_or_default().into()
            }
        };
        Some((next, frames))
    })
}

/// A reply that streams.
pub(super) fn streaming(
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
pub(super) async fn unless_gone<T>(
    client: Option<&Connection>,
    work: impl Future<Output = T>,
) -> Result<T, ApiError> {
    tokio::select! {
        done = work => Ok(done),
        () = closed(client) => Err(ApiError::client_gone()),
    }
}

/// Checks a request's sampling fields against the model and this gateway's settings.
pub(super) fn check(
    shared: &Shared,
    served: &Served,
    fields: &SamplingFields,
    wish: Wish,
) -> Result<Sampling, ApiError> {
    let bounds = Bounds {
        vocab_size: served.card.vocab_size,
        max_logprobs: shared.limits.max_logprobs,
        defaults: &served.text.defaults,
        encode: &|text| served.text.encode(text, false),
    };
    fields.check(&bounds, wish)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn comments_break_silence_between_frames_and_end_with_them() {
        let (sender, frames) = mpsc::channel(STREAM_DEPTH);
        let work = async move {
            for frame in ["data: 1\n\n", "data: 2\n\n"] {
                sender.send(Bytes::from(frame)).await.unwrap();
                // Tokens that make no frame.
                for _ in 0..30 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            sender.send(Bytes::from("data: [DONE]\n\n")).await.unwrap();
        };
        let sent = kept_alive(frames, Duration::from_millis(50)).collect::<Vec<_>>();
        let (sent, ()) = futures::join!(sent, work);
        let comment = |frame: &&Bytes| frame.starts_with(b": ");
        assert!(sent.iter().filter(comment).all(|frame| frame == ": still working\n\n"));
        let data: Vec<&Bytes> = sent.iter().filter(|frame| !comment(frame)).collect();
        assert_eq!(data, ["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"]);
        let silent = sent.split(|frame| !comment(&frame)).map(<[Bytes]>::len);
        let silent: Vec<bool> = silent.map(|comments| comments == 0).collect();
        assert_eq!(silent, [true, false, false, true]);
    }
}
