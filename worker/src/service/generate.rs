//! `Generate`: one sequence, from its prompt to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::generate_event::Event as Out;
use baton_proto::v1::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, PrefillRequest, PromptLogprobs,
    PromptTokenLogprob, Role, Started, Token, Tokens,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{Instrument as _, debug, info_span};

use super::{Owned, Shared, refused, timeout};
use crate::engine::{Event, Finish, NewRequest, PullOrder, Purpose, RequestHandle};

/// A piece of a prompt's logprobs. With one token more it is still far below what a message may
/// have: the whole vocabulary takes some 3 MiB.
const PIECE_BYTES: usize = 1024 * 1024;

type Sender = mpsc::Sender<Result<GenerateEvent, Status>>;

/// Checks a request, puts it into the engine and drives it.
pub(super) async fn start(
    shared: Arc<Shared>,
    request: GenerateRequest,
) -> Result<Owned<GenerateEvent>, Status> {
    if shared.role == Role::Prefill {
        return Err(Status::failed_precondition("a prefill worker does not generate"));
    }
    let sampling = request
        .sampling
        .clone()
        .ok_or_else(|| Status::invalid_argument("`sampling` is missing"))?;
    if sampling.max_tokens == 0 || sampling.max_tokens as usize <= request.output_token_ids.len() {
        return Err(Status::invalid_argument("`max_tokens` leaves nothing to generate"));
    }
    let adapter =
        request.adapter.as_ref().map(|wanted| shared.adapters.find(wanted)).transpose()?;
    let deadline = Instant::now() + timeout(request.timeout_ms);
    let constraint = shared.compile(&sampling).await?;
    let pull_from = request.prefill.is_some().then_some(request.handoff_min_tokens.max(1) as usize);
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
        })
        .map_err(refused)?;
    let span = info_span!("generate", request_id = request.request_id);
    let task = move |sender| async move {
        debug!(prompt_tokens = request.prompt_token_ids.len(), "accepted");
        let mut driver = Driver {
            shared,
            request,
            deadline,
            sender,
            started: Started::default(),
            announced: false,
            admitted: Instant::now(),
        };
        driver.run(handle).await;
    };
    Ok(Owned::spawn(move |sender| task(sender).instrument(span)))
}

struct Driver {
    shared: Arc<Shared>,
    request: GenerateRequest,
    deadline: Instant,
    sender: Sender,
    started: Started,
    /// Whether `started` has been sent.
    announced: bool,
    admitted: Instant,
}

impl Driver {
    async fn run(&mut self, mut handle: RequestHandle) {
        while let Some(event) = handle.next().await {
            let sent = match event {
                Event::Admitted { cached, waited } => {
                    self.admitted = Instant::now();
                    self.started.cached_tokens = cached as u32;
                    self.started.queue_us = micros(waited);
                    true
                }
                Event::Pull(order) => {
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
                            self.started = started;
                            true
                        }
                        Err(Some(Event::Finished(finish))) => return self.finish(finish).await,
                        // Tokens come only after the pull has ended.
                        Err(_) => return,
                    }
                }
                Event::Prompt(scores) => self.prompt(scores).await,
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

    async fn token(&mut self, token: Token) -> bool {
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
    async fn prompt(&self, scores: Vec<PromptTokenLogprob>) -> bool {
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
                return self.fail(Status::unavailable("the worker is shutting down")).await;
            }
            Finish::Stuck(reason) => {
                return self.fail(Status::invalid_argument(reason)).await;
            }
            Finish::Failed(reason) => return self.fail(Status::internal(reason)).await,
        };
        self.send(Out::Finished(Finished { reason: reason.into(), stop_token_id })).await;
    }

    async fn fail(&self, status: Status) {
        let _ = self.sender.send(Err(status)).await;
    }

    async fn send(&self, event: Out) -> bool {
        self.sender.send(Ok(GenerateEvent { event: Some(event) })).await.is_ok()
    }

    /// Has the peer compute the prompt. Whatever comes of it, the engine goes on afterwards.
    async fn pull(&self, order: PullOrder) -> Started {
        let mut started = self.started.clone();
        let Some(peer) = &self.request.prefill else { return started };
        let shared = &self.shared;
        let layout = *shared.engine.pool().layout();
        let have = order.cached_blocks() * layout.block_size as usize;
        let mut token_ids = self.request.prompt_token_ids.clone();
        token_ids.extend(&self.request.output_token_ids);
        let tokens = shared.engine.limits().leading + token_ids.len();
        let request = PrefillRequest {
            request_id: self.request.request_id.clone(),
            token_ids,
            sampling: self.request.sampling.clone(),
            cache_salt: self.request.cache_salt.clone(),
            have_tokens: have as u32,
            output_tokens: self.request.output_token_ids.len() as u32,
            kv_layout: Some(layout),
            weights_digest: shared.model.weights_digest.clone(),
            transports: Vec::new(),
            timeout_ms: 0,
            priority: self.request.priority,
            adapter: self.request.adapter.clone(),
            audio: self.request.audio.clone(),
        };
        // A failure is logged and counted where it happened; the engine computes the rest.
        if let Ok((transport, no_speech)) =
            shared.puller.pull(&peer.address, request, order, self.deadline).await
        {
            started.no_speech_probability = no_speech;
            started.handed_off_tokens = (tokens - have) as u32;
            started.prefill_instance_id = peer.instance_id.clone();
            started.set_transport(transport);
        }
        started
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
