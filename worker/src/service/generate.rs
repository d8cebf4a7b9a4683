//! `Generate`: one sequence, from its prompt to its end.

use std::sync::Arc;
use std::time::Instant;

use baton_membership::traces::Span;
use baton_proto::InstanceRole;
use baton_proto::v1::generate_event::Event as Out;
use baton_proto::v1::{
    FetchBlocksRequest, FinishReason, Finished, GenerateEvent, GenerateRequest, KvLayout,
    PrefillPeer, PrefillRequest, PromptLogprobs, PromptTokenLogprob, Released, Started, Token,
    Tokens,
};
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::Status;
use tracing::{Instrument as _, debug, info_span};

use super::drain::{Held, MOVED_WITHIN, STAY, given_up};
use super::spans::{self, Spans};
use super::{Owned, Shared, micros, refused, timeout};
use crate::engine::{Event, Finish, NewRequest, PullOrder, Purpose, RequestHandle};
use crate::transfer::pull::Ask;

/// A piece of a prompt's logprobs. With one token more it is still far below what a message may
/// have: the whole vocabulary takes some 3 MiB.
const PIECE_BYTES: usize = 1024 * 1024;

type Sender = mpsc::Sender<Result<GenerateEvent, Status>>;

/// Checks a request, puts it into the engine and drives it.
pub(super) async fn start(
    shared: Arc<Shared>,
    request: GenerateRequest,
    mut call: Span,
) -> Result<Owned<GenerateEvent>, Status> {
    spans::named(&mut call, &request.request_id);
    let trace_id = call.as_parent().trace_id();
    let span = info_span!("generate", request_id = request.request_id, trace_id);
    let tokens = request.prompt_token_ids.len() + request.output_token_ids.len();
    let mut spans = Spans::new(call, shared.engine.limits().leading + tokens);
    let deadline = Instant::now() + timeout(request.timeout_ms);
    let submitted = submit(&shared, &request, deadline).await;
    let (handle, returning) = submitted.inspect_err(|status| spans.fail(status.code()))?;
    let task = move |sender| async move {
        debug!(prompt_tokens = request.prompt_token_ids.len(), "accepted");
        let mut driver = Driver {
            shared,
            request,
            deadline,
            sender,
            started: Started::default(),
            announced: false,
            turn: None,
            admitted: Instant::now(),
            spans,
        };
        let drain = driver.shared.drain.clone();
        tokio::select! {
            () = driver.run(handle, returning) => return,
            () = drain.over() => {}
        }
        driver.fail(given_up()).await;
    };
    Ok(Owned::spawn(move |sender| task(sender).instrument(span)))
}

/// Checks a request and puts it into the engine; and whether it returns from where it was released
/// to.
async fn submit(
    shared: &Shared,
    request: &GenerateRequest,
    deadline: Instant,
) -> Result<(RequestHandle, bool), Status> {
    shared.is_not(InstanceRole::Prefill)?;
    let sampling = request
        .sampling
        .clone()
        .ok_or_else(|| Status::invalid_argument("`sampling` is missing"))?;
    if sampling.max_tokens == 0 || sampling.max_tokens as usize <= request.output_token_ids.len() {
        return Err(Status::invalid_argument("`max_tokens` leaves nothing to generate"));
    }
    let adapter =
        request.adapter.as_ref().map(|wanted| shared.adapters.find(wanted)).transpose()?;
    let constraint = shared.compile(&sampling).await?;
    // It was released here, and nobody else took it.
    let returning = request.prefill.as_ref().is_some_and(|peer| {
        peer.instance_id == shared.roles.current().instance_id
            && shared.drain.held(&peer.held_id).is_some()
    });
    let pull_from = match &request.prefill {
        Some(peer) if !returning => Some(least_to_pull(shared, request, peer)),
        _ => None,
    };
    let handle = shared
        .engine
        .submit(NewRequest {
            prompt: request.prompt_token_ids.clone(),
            audio: request.audio.as_ref().map(|audio| audio.samples.clone()),
            output: request.output_token_ids.clone(),
            sampling,
            constraint,
            priority: request.priority,
            salt: request.cache_salt.clone(),
            adapter,
            purpose: Purpose::Generate { pull_from },
            deadline,
            returning,
        })
        .map_err(refused)?;
    Ok((handle, returning))
}

/// With how many tokens uncached the peer is asked.
fn least_to_pull(shared: &Shared, request: &GenerateRequest, peer: &PrefillPeer) -> usize {
    if peer.held_id.is_empty() {
        return request.handoff_min_tokens.max(1) as usize;
    }
    // What the peer has need not be computed anywhere: a block of it is worth the way. What it
    // does not have is computed here in any case.
    let limits = shared.engine.limits();
    let tokens = request.prompt_token_ids.len() + request.output_token_ids.len();
    let missing = (limits.leading + tokens).saturating_sub(peer.held_positions as usize);
    missing + limits.block_size
}

struct Driver {
    shared: Arc<Shared>,
    request: GenerateRequest,
    deadline: Instant,
    sender: Sender,
    started: Started,
    /// Whether `started` has been sent.
    announced: bool,
    /// To move, while the worker drains.
    turn: Option<OwnedSemaphorePermit>,
    admitted: Instant,
    spans: Spans,
}

impl Driver {
    async fn run(&mut self, mut handle: RequestHandle, returning: bool) {
        let drain = self.shared.drain.clone();
        let from = returning.then(|| Instant::now() + STAY);
        let mut asked = false;
        // What cannot be released yet takes no turn: others can go meanwhile.
        let (mut waits, mut unscored) = (true, self.scored());
        loop {
            let may_go = self.request.movable && !asked && (waits || unscored == 0);
            let event = tokio::select! {
                biased;
                event = handle.next() => event,
                // Anew each time, so that nobody has a turn who waits for something else.
                permit = drain.turn(from), if may_go => {
                    (self.turn, asked) = (Some(permit), true);
                    handle.release();
                    continue;
                }
            };
            let Some(event) = event else { return };
            let sent = match event {
                Event::Released { positions, blocks } => {
                    return self.released(Held { positions, blocks, _handle: handle }).await;
                }
                Event::Admitted { cached, waited } => {
                    waits = false;
                    if unscored > 0 {
                        self.turn = None;
                    }
                    self.admitted = Instant::now();
                    self.spans.admitted(cached, waited);
                    self.started.cached_tokens = cached as u32;
                    self.started.queue_us = micros(waited);
                    true
                }
                Event::Pull(order) => {
                    self.turn = None;
                    // A deadline ends the request while it is pulled: then the pull is dropped,
                    // and the order with it.
                    let end = {
                        let pull = self.pull(order);
                        tokio::pin!(pull);
                        tokio::select! {
                            started = &mut pull => Ok(started),
                            event = handle.next() => Err(event),
                        }
                    };
                    match end {
                        Ok(started) => {
                            self.spans.pulled(started.handed_off_tokens as usize);
                            self.started = started;
                            true
                        }
                        Err(Some(Event::Finished(finish))) => return self.finish(finish).await,
                        // Tokens come only after the pull has ended.
                        Err(_) => return,
                    }
                }
                Event::Prompt(scores) => {
                    unscored = unscored.saturating_sub(scores.len());
                    self.prompt(scores).await
                }
                Event::Token(token) => self.token(token).await,
                Event::Finished(finish) => return self.finish(finish).await,
                Event::NoSpeech(probability) => {
                    self.started.no_speech_probability = Some(probability);
                    true
                }
                Event::Blocks { .. } | Event::Aligned(_) => true,
            };
            if !sent {
                return;
            }
        }
    }

    /// The prompt's tokens whose logprobs are wanted.
    fn scored(&self) -> usize {
        let wanted = self.request.sampling.as_ref().and_then(|sampling| sampling.prompt_logprobs);
        wanted.map_or(0, |_| self.request.prompt_token_ids.len().saturating_sub(1))
    }

    /// Hands the sequence over: its blocks stay until the caller has let go, or the lease ends.
    async fn released(&mut self, held: Held) {
        self.spans.released(held.positions);
        let held_positions = held.positions as u32;
        let lease = self.shared.hold_lease;
        let key = self.shared.drain.hold(held);
        let released = Out::Released(Released { held_id: key.id.clone(), held_positions });
        let moved = async {
            if self.send(released).await {
                while tokio::time::timeout(MOVED_WITHIN, self.sender.closed()).await.is_err()
                    && self.shared.drain.fetched(&key.id)
                {}
                self.turn = None;
                self.sender.closed().await;
            }
        };
        let moved = tokio::time::timeout(lease, moved).await;
        // Before the caller is told, who may read nothing.
        drop((key, self.turn.take()));
        if moved.is_err() {
            self.fail(Status::aborted("nobody went on with the sequence in time")).await;
        }
    }

    async fn token(&mut self, token: Token) -> bool {
        self.spans.token();
        if !self.announced {
            self.announced = true;
            self.started.prefill_us = micros(self.admitted.elapsed());
            let started = std::mem::take(&mut self.started);
            if !self.send(Out::Started(started)).await {
                return false;
            }
        }
        self.send(Out::Tokens(Tokens { tokens: vec![token] })).await
    }

    /// Sends the prompt's logprobs in pieces of about [`PIECE_BYTES`].
    async fn prompt(&mut self, scores: Vec<PromptTokenLogprob>) -> bool {
        let mut tokens = Vec::new();
        let mut bytes = 0;
        let mut scores = scores.into_iter().peekable();
        while let Some(score) = scores.next() {
            bytes += score.encoded_len();
            tokens.push(score);
            if bytes >= PIECE_BYTES || scores.peek().is_none() {
                let tokens = std::mem::take(&mut tokens);
                if !self.send(Out::PromptLogprobs(PromptLogprobs { tokens })).await {
                    return false;
                }
                bytes = 0;
            }
        }
        true
    }

    async fn finish(&mut self, finish: Finish) {
        let (reason, stop_token_id) = match finish {
            Finish::Stop(token) => (FinishReason::Stop, token),
            Finish::Length => (FinishReason::Length, None),
            Finish::Deadline => return self.fail(Status::deadline_exceeded("out of time")).await,
            Finish::Stopping => {
                return self.fail(given_up()).await;
            }
            Finish::Stuck(reason) => {
                return self.fail(Status::invalid_argument(reason)).await;
            }
            Finish::Failed(reason) => return self.fail(Status::internal(reason)).await,
        };
        self.send(Out::Finished(Finished { reason: reason.into(), stop_token_id })).await;
    }

    async fn fail(&mut self, status: Status) {
        // It moves no more, and the caller may read nothing.
        self.turn = None;
        self.spans.fail(status.code());
        let _ = self.sender.send(Err(status)).await;
    }

    async fn send(&mut self, event: Out) -> bool {
        let sent = self.sender.send(Ok(GenerateEvent { event: Some(event) }));
        if self.turn.is_none() {
            return sent.await.is_ok();
        }
        tokio::pin!(sent);
        match tokio::time::timeout(MOVED_WITHIN, &mut sent).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                self.turn = None;
                sent.await.is_ok()
            }
        }
    }

    /// Has the peer compute the prompt, or give what it has. Whatever comes of it, the engine goes
    /// on afterwards.
    async fn pull(&self, order: PullOrder) -> Started {
        let mut started = self.started.clone();
        let Some(peer) = self.request.prefill.clone() else { return started };
        let shared = &self.shared;
        let layout = *shared.engine.pool().layout();
        let have = order.cached_blocks() * layout.block_size as usize;
        let (ask, positions) = match peer.held_id.is_empty() {
            true => self.ask_to_compute(layout, have),
            false => self.ask_for_held(&peer, layout, have),
        };
        let mut span = self.spans.pulling(&peer.instance_id);
        // A failure is logged and counted where it happened; the engine computes the rest.
        let pulled = shared.puller.pull(&peer, ask, order, self.deadline, &mut span).await;
        if let Ok((transport, no_speech)) = pulled {
            started.no_speech_probability = no_speech;
            started.handed_off_tokens = positions.saturating_sub(have) as u32;
            span.set("baton.handed_off_tokens", i64::from(started.handed_off_tokens));
            started.prefill_instance_id = peer.instance_id;
            started.set_transport(transport);
        }
        started
    }

    /// What another worker released; and how many positions that is.
    fn ask_for_held(&self, peer: &PrefillPeer, layout: KvLayout, have: usize) -> (Ask, usize) {
        let request = FetchBlocksRequest {
            request_id: self.request.request_id.clone(),
            held_id: peer.held_id.clone(),
            have_tokens: have as u32,
            kv_layout: Some(layout),
            weights_digest: self.shared.model.weights_digest.clone(),
            transports: Vec::new(),
            nccl_link: 0,
        };
        (Ask::Held(request), peer.held_positions as usize)
    }

    /// The prompt and what was generated, for a prefill worker; and how many positions that is.
    fn ask_to_compute(&self, layout: KvLayout, have: usize) -> (Ask, usize) {
        let mut token_ids = self.request.prompt_token_ids.clone();
        token_ids.extend(&self.request.output_token_ids);
        let positions = self.shared.engine.limits().leading + token_ids.len();
        let request = PrefillRequest {
            request_id: self.request.request_id.clone(),
            token_ids,
            sampling: self.request.sampling.clone(),
            cache_salt: self.request.cache_salt.clone(),
            have_tokens: have as u32,
            output_tokens: self.request.output_token_ids.len() as u32,
            kv_layout: Some(layout),
            weights_digest: self.shared.model.weights_digest.clone(),
            transports: Vec::new(),
            nccl_link: 0,
            timeout_ms: 0,
            priority: self.request.priority,
            adapter: self.request.adapter.clone(),
            audio: self.request.audio.clone(),
        };
        (Ask::Compute(Box::new(request)), positions)
    }
}
