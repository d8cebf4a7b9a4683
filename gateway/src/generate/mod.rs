//! One sequence, from its prompt to its end, over as many workers as it takes.
//!
//! A [`Generation`] sends its sequence to a worker and yields what comes back. When the worker
//! fails, it sends prompt and tokens so far to another one and goes on: a draw depends on the seed
//! and the token's index alone, so the client sees the tokens it would have seen. A worker that
//! drains releases the sequence and keeps its KV for the next one to pull. Dropping a `Generation`
//! cancels the work, all the way down.

pub mod answer;
mod failures;

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_membership::traces::Span;
use baton_proto::drain::is_draining;
use baton_proto::v1::generate_event::Event;
use baton_proto::v1::{
    AdapterRef, AudioWindow, FinishReason, GenerateEvent, GenerateRequest, PrefillPeer,
    PromptTokenLogprob, Released, SamplingParams, Started, Token,
};
use baton_proto::{BlockHash, InstanceRole};
use tokio::time::{timeout, timeout_at};
use tonic::{Code, Status, Streaming};
use tracing::{debug, warn};

use crate::error::ApiError;
use crate::metrics::Siblings;
use crate::trace::Trace;
use crate::workers::{Registry, Served, Ticket, Worker};
use failures::Failures;

/// The call, in spans.
const GENERATE: &str = "baton.v1.Worker/Generate";
/// How long a worker may take to say that it has a request.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a worker may take to end its stream after the last message.
const CLOSE_WITHIN: Duration = Duration::from_millis(20);
/// How long a new sequence waits for a worker.
const START_WITHIN: Duration = Duration::from_secs(1);
/// How long a sequence that has begun waits for a worker to go on with.
const RESUME_WITHIN: Duration = Duration::from_secs(15);
/// Between two looks for such a worker.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What is to be generated.
#[derive(Clone)]
pub struct Job {
    /// The model.
    pub served: Arc<Served>,
    /// For logs, here and on the workers.
    pub request_id: String,
    /// The prompt.
    pub prompt: Arc<[u32]>,
    /// The addresses of the prompt's blocks, under the salt.
    pub hashes: Arc<[BlockHash]>,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Requests share cached blocks only when their salts are equal.
    pub salt: String,
    /// Lower is sooner.
    pub priority: i32,
    /// The request's field that asks for `sampling.constraint`.
    pub constraint_field: Option<&'static str>,
    /// When to give up.
    pub deadline: Instant,
    /// Uncached prompt tokens from which a prefill worker is used.
    pub handoff_min_tokens: u32,
    /// What a speech model hears before the prompt.
    pub audio: Option<AudioWindow>,
    /// The other sequences of the prompt, for metrics.
    pub siblings: Arc<Siblings>,
    /// What its spans hang on.
    pub trace: Trace,
}

impl Job {
    /// Whether the `count`th token may stop the sequence: those up to `min_tokens` may not.
    fn may_stop(&self, count: usize) -> bool {
        count > self.sampling.min_tokens as usize
    }

    /// Whether `token`, the `count`th, stops the sequence.
    fn stops(&self, token: u32, count: usize) -> bool {
        let eos = self.served.card.eos_token_ids.contains(&token);
        // A constraint lets it come where the output is complete, and nothing follows.
        if eos && self.sampling.constraint.is_some() {
            return true;
        }
        let stops =
            (eos && !self.sampling.ignore_eos) || self.sampling.stop_token_ids.contains(&token);
        stops && self.may_stop(count)
    }
}

/// What happens to a sequence: `Started` first, then tokens, then one `Finished`. A `Resumed` may
/// come between.
#[derive(Debug)]
pub enum Update {
    /// The prompt has been computed.
    Started(Started),
    /// Another worker has prompt and tokens so far, and goes on.
    Resumed(Started),
    /// Log-probabilities of some prompt tokens, in order.
    PromptLogprobs(Vec<PromptTokenLogprob>),
    /// A token was drawn.
    Token(Token),
    /// The end; for a stop token, which.
    Finished(FinishReason, Option<u32>),
}

/// A sequence in progress.
pub struct Generation {
    registry: Arc<Registry>,
    job: Job,
    attempt: Attempt,
    /// What a worker that drains has of the sequence, until another one goes on.
    held: Option<Held>,
    /// The attempt there: the blocks stay for as long as it does.
    leaving: Option<Attempt>,
    /// All tokens so far.
    output: Vec<u32>,
    /// Tokens of the current message that have not been yielded.
    ready: std::vec::IntoIter<Token>,
    /// Whether `Started` has been yielded, by this attempt or an earlier one.
    started: bool,
    /// Log-probabilities of the prompt that have been yielded.
    prompt_logprobs: usize,
    /// Instances that failed this sequence.
    avoid: Vec<String>,
    failures: Failures,
}

/// The sequence on one worker.
struct Attempt {
    ticket: Ticket,
    /// The prefill worker that was offered, until the prompt is computed.
    prefill: Option<Ticket>,
    events: Streaming<GenerateEvent>,
    /// Log-probabilities of the prompt that it has sent.
    prompt_logprobs: usize,
    /// The call.
    span: Span,
}

/// A sequence as a worker released it.
struct Held {
    worker: Arc<Worker>,
    id: String,
    positions: u32,
}

impl Held {
    fn peer(&self) -> PrefillPeer {
        PrefillPeer {
            instance_id: self.worker.record.id.clone(),
            address: self.worker.record.address.clone(),
            held_id: self.id.clone(),
            held_positions: self.positions,
        }
    }
}

impl Attempt {
    /// Notes in the span what the worker says of the prompt.
    fn started(&mut self, started: &Started) {
        let span = &mut self.span;
        span.set("baton.cached_tokens", i64::from(started.cached_tokens));
        span.set("baton.handed_off_tokens", i64::from(started.handed_off_tokens));
        let queued = Duration::from_micros(started.queue_us);
        span.set_time("gen_ai.latency.time_in_queue", queued);
    }

    /// Reads what follows the last message: a stream that is dropped before its end costs a reset.
    async fn close(&mut self) {
        let _ = timeout(CLOSE_WITHIN, self.events.message()).await;
    }
}

/// How an attempt failed.
enum Failure {
    /// The client's fault, or nobody can help.
    Final(ApiError),
    /// No worker is there.
    Absent(ApiError),
    /// No worker has room.
    Full(ApiError),
    /// Another worker may do better.
    Retry(ApiError),
}

impl Generation {
    /// Sends the sequence to a worker. An error here comes before anything was generated.
    pub async fn start(registry: Arc<Registry>, job: Job) -> Result<Self, ApiError> {
        let mut avoid = Vec::new();
        let mut failures = Failures::default();
        let patience = Instant::now() + START_WITHIN;
        loop {
            match open(&registry, &job, &[], &mut avoid, None).await {
                Ok(attempt) => {
                    return Ok(Self {
                        registry,
                        job,
                        attempt,
                        held: None,
                        leaving: None,
                        output: Vec::new(),
                        ready: Vec::new().into_iter(),
                        started: false,
                        prompt_logprobs: 0,
                        avoid,
                        failures,
                    });
                }
                // The connection to the only worker may just be coming back.
                Err(Failure::Absent(_)) if Instant::now() < patience => {
                    avoid.clear();
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(Failure::Absent(_)) if failures.any() => return Err(gone()),
                Err(Failure::Final(error) | Failure::Absent(error) | Failure::Full(error)) => {
                    return Err(error);
                }
                Err(Failure::Retry(error)) => failures.add(error)?,
            }
        }
    }

    /// What happens next; `None` after `Finished`.
    pub async fn next(&mut self) -> Result<Option<Update>, ApiError> {
        if let Some(token) = self.ready.next() {
            self.output.push(token.id);
            return Ok(Some(Update::Token(token)));
        }
        loop {
            let message = self.attempt.events.message();
            let status = match timeout_at(self.job.deadline.into(), message).await {
                Err(_) => {
                    self.attempt.span.fail_rpc(Code::DeadlineExceeded);
                    return Err(ApiError::timed_out());
                }
                Ok(Ok(Some(message))) => match message.event {
                    Some(Event::Started(started)) => {
                        self.attempt.ticket.answered();
                        self.attempt.prefill = None;
                        self.attempt.started(&started);
                        (self.held, self.leaving) = (None, None);
                        return Ok(Some(match std::mem::replace(&mut self.started, true) {
                            false => Update::Started(started),
                            true => Update::Resumed(started),
                        }));
                    }
                    Some(Event::PromptLogprobs(prompt)) => {
                        // After a failure another worker begins again.
                        let known = self.prompt_logprobs - self.attempt.prompt_logprobs;
                        self.attempt.prompt_logprobs += prompt.tokens.len();
                        self.prompt_logprobs =
                            self.prompt_logprobs.max(self.attempt.prompt_logprobs);
                        let new: Vec<_> = prompt.tokens.into_iter().skip(known).collect();
                        if !new.is_empty() {
                            return Ok(Some(Update::PromptLogprobs(new)));
                        }
                        continue;
                    }
                    Some(Event::Tokens(tokens)) => {
                        self.attempt.ticket.step_done();
                        self.failures.passed(tokens.tokens.len());
                        self.ready = tokens.tokens.into_iter();
                        let Some(token) = self.ready.next() else { continue };
                        self.output.push(token.id);
                        return Ok(Some(Update::Token(token)));
                    }
                    Some(Event::Finished(finished)) => {
                        self.attempt.close().await;
                        let (reason, stop) = (finished.reason(), finished.stop_token_id);
                        return Ok(Some(Update::Finished(reason, stop)));
                    }
                    Some(Event::Released(released)) => {
                        self.released(released);
                        self.resume().await?;
                        continue;
                    }
                    None => continue,
                },
                Ok(Ok(None)) => Status::unavailable("the worker ended the stream early"),
                Ok(Err(status)) => status,
            };
            self.attempt.span.fail_rpc(status.code());
            let failure = match is_draining(&status) {
                // It gives up what is left, and has not failed.
                true => {
                    self.attempt.ticket.worker.mark_draining();
                    None
                }
                false => Some(judge(&self.job, &self.attempt.ticket, status, &mut self.avoid)),
            };
            if let Some(end) = self.ended_unsaid() {
                return Ok(Some(end));
            }
            match failure {
                Some(Failure::Final(error)) => return Err(error),
                Some(Failure::Retry(error) | Failure::Absent(error) | Failure::Full(error)) => {
                    self.failures.add(error)?;
                }
                None => {}
            }
            self.resume().await?;
        }
    }

    /// The end, when the worker died between the last token and the word that it was the last.
    fn ended_unsaid(&self) -> Option<Update> {
        let (params, card) = (&self.job.sampling, &self.job.served.card);
        let last = *self.output.last()?;
        if self.job.stops(last, self.output.len()) {
            let stop = params.stop_token_ids.contains(&last).then_some(last);
            return Some(Update::Finished(FinishReason::Stop, stop));
        }
        let full = self.job.prompt.len() + self.output.len() >= card.max_model_len as usize;
        let done = self.output.len() >= params.max_tokens as usize;
        (full || done).then_some(Update::Finished(FinishReason::Length, None))
    }

    /// Notes that the worker computes the sequence no further, and what it keeps.
    fn released(&mut self, released: Released) {
        let worker = &self.attempt.ticket.worker;
        worker.mark_draining();
        self.attempt.span.set("baton.released_positions", i64::from(released.held_positions));
        // Released before it had pulled: what it was to pull may be more.
        let more = self.held.as_ref().is_none_or(|held| held.positions <= released.held_positions);
        if more {
            self.held = Some(Held {
                worker: worker.clone(),
                id: released.held_id,
                positions: released.held_positions,
            });
            self.leaving = None;
        }
    }

    /// Goes on elsewhere, and waits a little for somewhere to go on.
    async fn resume(&mut self) -> Result<(), ApiError> {
        let until = self.job.deadline.min(Instant::now() + RESUME_WITHIN);
        debug!(
            request_id = self.job.request_id,
            tokens = self.output.len(),
            held = self.held.as_ref().map(|held| held.positions),
            "going on with another worker"
        );
        loop {
            let (output, avoid, held) = (&self.output, &mut self.avoid, self.held.as_ref());
            match open(&self.registry, &self.job, output, avoid, held).await {
                Ok(attempt) => {
                    let before = std::mem::replace(&mut self.attempt, attempt);
                    if self.held.is_some() && self.leaving.is_none() {
                        self.leaving = Some(before);
                    }
                    return Ok(());
                }
                Err(Failure::Retry(error)) => self.failures.add(error)?,
                // Nobody is there, or nobody has room: that may pass.
                Err(Failure::Absent(_) | Failure::Full(_)) if Instant::now() < until => {
                    // A worker that failed may be back as good as new.
                    self.avoid.clear();
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                Err(Failure::Absent(_)) => return Err(gone()),
                Err(Failure::Final(error) | Failure::Full(error)) => return Err(error),
            }
        }
    }
}

/// Chooses a worker and sends it the sequence.
async fn open(
    registry: &Registry,
    job: &Job,
    output: &[u32],
    avoid: &mut Vec<String>,
    held: Option<&Held>,
) -> Result<Attempt, Failure> {
    let tokens = job.prompt.len() + output.len();
    let missing = tokens.saturating_sub(held.map_or(0, |held| held.positions as usize));
    // Each worker is asked once, so this ends.
    let mut asked = avoid.clone();
    let mut no_room = false;
    loop {
        let began = Instant::now();
        let others = registry.choose_decode(&job.served, (tokens, missing), &job.hashes, &asked);
        // Where it was, although that worker drains, when nobody else takes it.
        let back = || {
            let held = held.filter(|held| !asked.contains(&held.worker.record.id))?;
            registry.back_to(&held.worker, missing)
        };
        let Some(mut ticket) = others.or_else(back) else {
            return Err(match no_room {
                true => Failure::Full(full()),
                false => Failure::Absent(absent(registry, job.served.name())),
            });
        };
        let source = held
            .filter(|held| held.positions > 0 || held.worker.record.id == ticket.worker.record.id);
        // The decode worker knows what it has cached; here it is only guessed. So the peer is
        // named whenever the hand-off could pay.
        let peer = if source.is_none()
            && ticket.worker.record.role == InstanceRole::Decode
            && tokens >= job.handoff_min_tokens as usize
        {
            registry.choose_prefill(&job.served, tokens, &job.hashes, &mut ticket)
        } else {
            None
        };
        let parent = job.trace.parent();
        let record = &ticket.worker.record;
        let mut routing = parent.span_since("route", began);
        if routing.exports() {
            routing.set("baton.worker.id", record.id.clone());
            routing.set("baton.cached_tokens", ticket.cached_tokens as i64);
            if let Some(peer) = &peer {
                routing.set("baton.prefill.worker.id", peer.worker.record.id.clone());
                routing.set("baton.prefill.cached_tokens", peer.cached_tokens as i64);
            }
        }
        drop(routing);
        let mut sampling = job.sampling.clone();
        if !output.is_empty() {
            // They came before the first token.
            sampling.prompt_logprobs = None;
        }
        let request = GenerateRequest {
            request_id: job.request_id.clone(),
            prompt_token_ids: job.prompt.to_vec(),
            output_token_ids: output.to_vec(),
            sampling: Some(sampling),
            prefill: source.map(Held::peer).or_else(|| {
                peer.as_ref().map(|peer| PrefillPeer {
                    instance_id: peer.worker.record.id.clone(),
                    address: peer.worker.record.address.clone(),
                    ..PrefillPeer::default()
                })
            }),
            handoff_min_tokens: job.handoff_min_tokens,
            timeout_ms: job.deadline.saturating_duration_since(Instant::now()).as_millis().max(1)
                as u64,
            cache_salt: job.salt.clone(),
            priority: job.priority,
            adapter: job.served.adapter.as_ref().map(|adapter| AdapterRef {
                name: adapter.name.clone(),
                digest: adapter.digest.clone(),
            }),
            audio: job.audio.clone(),
            movable: true,
        };
        let until = job.deadline.min(Instant::now() + ACCEPT_TIMEOUT);
        let mut span = parent.rpc_client(GENERATE, &record.address);
        span.set("baton.resumed_tokens", output.len() as i64);
        let request = span.as_parent().request(request);
        let mut client = ticket.worker.client();
        let status = match timeout_at(until.into(), client.generate(request)).await {
            Ok(Ok(reply)) => {
                return Ok(Attempt {
                    ticket,
                    prefill: peer,
                    events: reply.into_inner(),
                    prompt_logprobs: 0,
                    span,
                });
            }
            Ok(Err(status)) => status,
            Err(_) if Instant::now() >= job.deadline => {
                span.fail_rpc(Code::DeadlineExceeded);
                return Err(Failure::Final(ApiError::timed_out()));
            }
            Err(_) => Status::unavailable("the worker did not accept the request in time"),
        };
        span.fail_rpc(status.code());
        drop(span);
        if status.code() == Code::ResourceExhausted {
            // Not a failure: look for one with room.
            ticket.worker.mark_full();
            no_room = true;
            asked.push(ticket.worker.record.id.clone());
            continue;
        }
        if is_draining(&status) {
            ticket.worker.mark_draining();
            asked.push(ticket.worker.record.id.clone());
            continue;
        }
        if status.code() == Code::NotFound
            && let Some(adapter) = &job.served.adapter
        {
            // It was unloaded a moment ago.
            ticket.worker.forget_adapter(&adapter.name);
            asked.push(ticket.worker.record.id.clone());
            avoid.push(ticket.worker.record.id.clone());
            continue;
        }
        return Err(judge(job, &ticket, status, avoid));
    }
}

/// What a worker's error means for the request, and for the worker.
fn judge(job: &Job, ticket: &Ticket, status: Status, avoid: &mut Vec<String>) -> Failure {
    let worker = &ticket.worker;
    match status.code() {
        Code::InvalidArgument => {
            // Lengths and tokens were checked here: what is left for a worker to refuse is a
            // constraint, mostly, or more log-probabilities than it keeps.
            let named = |field: &&str| status.message().starts_with(&format!("`{field}`"));
            let field = ["logprobs", "prompt_logprobs"].into_iter().find(named);
            let field = field.or(job.constraint_field).unwrap_or("prompt");
            Failure::Final(ApiError::bad_value(field, capitalized(status.message())))
        }
        Code::DeadlineExceeded => Failure::Final(ApiError::timed_out()),
        // The worker lives, and says that the step failed: for all of its batch, because of one of
        // them or of the worker.
        Code::Internal if std::error::Error::source(&status).is_none() => {
            warn!(id = worker.record.id, %status, "a worker failed a request");
            ticket.step_failed();
            avoid.push(worker.record.id.clone());
            Failure::Retry(ApiError::internal(capitalized(status.message())))
        }
        _ => {
            warn!(id = worker.record.id, %status, "a worker does not answer a request");
            worker.mark_down();
            avoid.push(worker.record.id.clone());
            Failure::Retry(ApiError::given_up(
                "The worker that served the request is gone, and others failed too; try again.",
            ))
        }
    }
}

/// Nobody serves what was there a moment ago.
fn absent(registry: &Registry, model: &str) -> ApiError {
    // Unloaded, and not on its way to another worker.
    if registry.served(model).is_none() && !registry.awaits(model) {
        return ApiError::unknown_model(model);
    }
    ApiError::no_worker(model)
}

/// Like [`absent`], of a request that has begun.
fn gone() -> ApiError {
    ApiError::given_up(
        "The worker that served the request is gone, and there is no other; try again.",
    )
}

fn full() -> ApiError {
    ApiError::overloaded("All workers' queues are full; try again soon.")
}

fn capitalized(message: &str) -> String {
    let mut letters = message.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).chain(['.']).collect(),
        None => "The worker gave no reason.".to_owned(),
    }
}
