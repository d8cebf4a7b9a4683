//! The engine: one thread that owns model, scheduler and block books, and does no I/O.
//!
//! * [`Engine`]: starts and stops the thread; takes requests.
//! * [`RequestHandle`]: one request's events; dropping it cancels the request.
//! * [`PullOrder`]: blocks that a transfer task fills; dropping it ends the pull.
//!
//! Requests come in through a bounded inbox and go out through one bounded channel each, so the
//! engine never waits for anybody. Aborts, releases and ends of pulls are never refused; there are
//! at most three for each live request.

mod inbox;
mod order;
mod run;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::{PromptTokenLogprob, SamplingParams, SpeechCard, Token, WorkerStatus};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::constraint::Compiled;
use crate::kv::BlockId;
use crate::kv::changes::ChangeLog;
use crate::kv::pool::KvPool;
use crate::lora::Adapter;
use crate::model::{Aligned, Model};
use crate::scheduler::{Limits, Refusal, SequenceId};
use inbox::{Command, Inbox};

pub use order::{FillError, PullOrder};

/// A sequence to compute.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What a speech model hears before the prompt, as in [`baton_proto::v1::AudioWindow`].
    pub audio: Option<Bytes>,
    /// Output of an earlier attempt, to be continued.
    pub output: Vec<u32>,
    /// How to draw tokens.
    pub sampling: SamplingParams,
    /// `sampling.constraint`, compiled.
    pub constraint: Option<Arc<Compiled>>,
    /// Lower is sooner.
    pub priority: i32,
    /// Requests share cached blocks only when their salts are equal.
    pub salt: String,
    /// What to compute with, beside the model's own weights.
    pub adapter: Option<Arc<Adapter>>,
    /// What is wanted.
    pub purpose: Purpose,
    /// When to give up.
    pub deadline: Instant,
    /// It was here before and comes back: it is taken while the engine drains too, and whoever
    /// waits.
    pub returning: bool,
}

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Tokens. With `pull_from`, the prompt is to be pulled when at least this many of its tokens
    /// are not cached here.
    Generate {
        /// The least that is worth a hand-off.
        pull_from: Option<usize>,
    },
    /// KV blocks and the first token, for a peer. The blocks are kept until the request's handle
    /// is dropped.
    Prefill,
    /// When each token was said: the prompt is followed by a transcript, which `output` holds.
    Align,
}

/// What happens to a request, in this order: `Admitted`, `Pull` or `Blocks`, `NoSpeech`,
/// `Prompt`s, `Token`s, `Finished` or `Released`.
#[derive(Debug)]
pub enum Event {
    /// It has its blocks.
    Admitted {
        /// Prompt tokens found in the prefix cache.
        cached: usize,
        /// How long it waited.
        waited: Duration,
    },
    /// Its blocks are to be filled from the peer.
    Pull(PullOrder),
    /// [`Purpose::Prefill`]: these blocks, from position `first` of the sequence, are complete.
    Blocks {
        /// Position of the first, in blocks.
        first: usize,
        /// The blocks, and the generation of each.
        blocks: Vec<(BlockId, u64)>,
    },
    /// The next prompt tokens and how likely they were, from the second on.
    Prompt(Vec<PromptTokenLogprob>),
    /// Speech models: how likely it is that nobody speaks.
    NoSpeech(f32),
    /// [`Purpose::Align`]: what was asked for.
    Aligned(Aligned),
    /// A token was drawn.
    Token(Token),
    /// It is over.
    Finished(Finish),
    /// [`RequestHandle::release`]: it is computed no further, and its blocks are kept until the
    /// handle is dropped.
    Released {
        /// Leading positions whose KV is in the blocks.
        positions: usize,
        /// The blocks, and the generation of each.
        blocks: Vec<(BlockId, u64)>,
    },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At an end-of-sequence token, or at this stop token.
    Stop(Option<u32>),
    /// At `max_tokens` or at the end of the context. For [`Purpose::Prefill`]: its work is done.
    Length,
    /// Its deadline passed.
    Deadline,
    /// The worker stops.
    Stopping,
    /// The request forbids every token: what it asks for contradicts itself.
    Stuck(String),
    /// The step failed.
    Failed(String),
}

/// What the engine must know.
pub struct Settings {
    /// Bounds of the scheduler. `max_model_len` is lowered to what the pool holds.
    pub limits: Limits,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// The special tokens of a speech model.
    pub speech: Option<SpeechCard>,
    /// With a step that takes longer the engine is lost; `None`: never.
    pub step_timeout: Option<Duration>,
}

/// The running engine.
pub struct Engine {
    inbox: Arc<Inbox>,
    status: Arc<Mutex<WorkerStatus>>,
    limits: Limits,
    vocab: usize,
    speech: Option<Arc<SpeechCard>>,
    pool: Arc<KvPool>,
    changes: Arc<ChangeLog>,
    /// Why the engine has ended by itself, once it has.
    lost: watch::Receiver<Option<String>>,
    /// When the step in progress began.
    began: Arc<Mutex<Option<Instant>>>,
    step_timeout: Option<Duration>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Engine {
    /// Starts the engine's thread.
    pub fn start(model: Box<dyn Model>, pool: KvPool, settings: Settings) -> std::io::Result<Self> {
        let mut limits = settings.limits;
        limits.blocks = pool.blocks();
        limits.max_model_len = limits.max_model_len.min(limits.blocks * limits.block_size);
        let pool = Arc::new(pool);
        let inbox = Arc::new(Inbox::new(limits));
        let status = Arc::new(Mutex::new(WorkerStatus::default()));
        let changes = Arc::new(ChangeLog::new(limits.blocks));
        let vocab = model.config().vocab;
        let speech = settings.speech.map(Arc::new);
        let special = (settings.eos_token_ids, speech.clone());
        let (tell_lost, lost) = watch::channel(None);
        let began = Arc::default();
        let told = (&status, &changes, &began);
        let engine = run::Running::new(model, pool.clone(), limits, special, &inbox, told);
        let inbox_of_thread = inbox.clone();
        let run = move || {
            let ended = catch_unwind(AssertUnwindSafe(|| engine.run()));
            let reason = ended.unwrap_or_else(|_| Some("the engine panicked".into()));
            if let Some(reason) = reason {
                // Nothing is computed any more: who comes is refused, and the worker ends.
                inbox_of_thread.stop();
                tell_lost.send_replace(Some(reason));
            }
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(run)?;
        let thread = Mutex::new(Some(thread));
        let step_timeout = settings.step_timeout;
        Ok(Self {
            inbox,
            status,
            limits,
            vocab,
            speech,
            pool,
            changes,
            lost,
            began,
            step_timeout,
            thread,
        })
    }

    /// The KV pool.
    pub fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    /// What its prefix cache holds.
    pub fn changes(&self) -> &Arc<ChangeLog> {
        &self.changes
    }

    /// The bounds in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The special tokens of a speech model.
    pub fn speech(&self) -> Option<&SpeechCard> {
        self.speech.as_deref()
    }

    /// Gauges and counters as of the last step.
    pub fn status(&self) -> WorkerStatus {
        // First: what is counted there no more is counted in the status.
        let (draining, unseen) = self.inbox.draining();
        let mut status = self.status.lock().clone();
        status.draining = draining;
        if draining {
            // Whoever waits for the end must not miss any.
            status.waiting += unseen as u32;
            status.running += status.held;
        }
        status
    }

    /// Takes a request, or says why not.
    pub fn submit(&self, request: NewRequest) -> Result<RequestHandle, SubmitError> {
        let tokens = request.prompt.iter().chain(&request.output);
        let stops = &request.sampling.stop_token_ids;
        let biased = request.sampling.logit_bias.keys();
        let allowed = &request.sampling.allowed_token_ids;
        let bad = request.sampling.bad_words.iter().flat_map(|word| &word.token_ids);
        let rules = request.sampling.speech.as_ref();
        let suppressed = rules.iter().flat_map(|rules| &rules.suppress_token_ids);
        let mut named =
            tokens.chain(stops).chain(biased).chain(allowed).chain(bad).chain(suppressed);
        if let Some(&id) = named.find(|id| **id as usize >= self.vocab) {
            return Err(SubmitError::TokenOutOfRange { id, vocab: self.vocab });
        }
        if request.sampling.bad_words.iter().any(|word| word.token_ids.is_empty()) {
            return Err(SubmitError::EmptyBadWord);
        }
        self.check_speech(&request)?;
        let scored = scored(&request);
        let too_many = |count: u32, tokens: usize| {
            let each = count.min(self.vocab as u32) as usize + 1;
            tokens.saturating_mul(each) > MAX_LOGPROBS
        };
        if let Some(count) = request.sampling.prompt_logprobs
            && too_many(count, scored)
        {
            return Err(SubmitError::PromptLogprobs { tokens: scored, count });
        }
        let done = request.output.len();
        let new = most_new(&request.sampling, done, request.purpose);
        let len = self.limits.leading + request.prompt.len() + done;
        self.limits.check_fits(len, new)?;
        let new = new.min(self.limits.max_model_len - len);
        if let Some(count) = request.sampling.logprobs
            && too_many(count, new)
        {
            return Err(SubmitError::Logprobs { tokens: new, count });
        }
        // Room for every event there can be: one for each token, and a few more.
        let most = new + len / self.limits.block_size + scored + 8;
        let (sender, events) = mpsc::channel(most);
        let id = self.inbox.add(request, sender)?;
        Ok(RequestHandle { id, events, inbox: self.inbox.clone() })
    }

    /// Sound, and what is said of it, must be there where the model hears and only there.
    fn check_speech(&self, request: &NewRequest) -> Result<(), SubmitError> {
        let rules = request.sampling.speech.is_some();
        match (&self.speech, &request.audio) {
            (None, Some(_)) => Err(SubmitError::NotSpeech("audio")),
            (None, None) if rules => Err(SubmitError::NotSpeech("sampling.speech")),
            (None, None) => Ok(()),
            (Some(_), None) => Err(SubmitError::NoAudio),
            (Some(_), Some(audio)) => {
                let bytes = audio.len();
                if bytes == 0 || bytes > MAX_AUDIO_BYTES || !bytes.is_multiple_of(2) {
                    return Err(SubmitError::AudioLength { bytes });
                }
                if request.sampling.prompt_logprobs.is_some() {
                    return Err(SubmitError::PromptLogprobsOfSpeech);
                }
                Ok(())
            }
        }
    }

    /// Refuses new requests from here on; those that are in go on.
    pub fn drain(&self) {
        self.inbox.drain();
    }

    /// Takes new requests again.
    pub fn undrain(&self) {
        self.inbox.undrain();
    }

    /// Waits until the engine has ended by itself, or stands still: what computes is gone. Says why.
    pub async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        let ended = async {
            let found = lost.wait_for(Option::is_some).await.ok().and_then(|it| it.clone());
            match found {
                Some(reason) => reason,
                // It was stopped.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = ended => reason,
            reason = self.stands_still() => reason,
        }
    }

    /// Waits until a step takes longer than it may. From then on nothing is taken.
    async fn stands_still(&self) -> String {
        let Some(limit) = self.step_timeout else { return std::future::pending().await };
        let (mut seen, mut looks) = (None, 0);
        // Not by the clock alone: a process that was stopped for long and goes on is well.
        while looks < LOOKS {
            tokio::time::sleep(limit / LOOKS).await;
            let began = *self.began.lock();
            looks = if began.is_some() && began == seen { looks + 1 } else { 0 };
            seen = began;
        }
        self.inbox.stop();
        let seconds = limit.as_secs_f32();
        format!("a step has not ended within {seconds} s (--step-timeout): what computes hangs")
    }

    fn step_takes(&self) -> Option<Duration> {
        self.began.lock().map(|began| began.elapsed())
    }

    /// Ends all requests and the thread. One that a step holds up for longer than it may is left to
    /// the end of the process.
    pub fn stop(&self) {
        self.inbox.stop();
        let Some(thread) = self.thread.lock().take() else { return };
        if let Some(limit) = self.step_timeout {
            while !thread.is_finished() {
                if self.step_takes().is_some_and(|takes| takes >= limit) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let _ = thread.join();
    }
}

/// How often a step is looked at before it is taken for one that does not end.
const LOOKS: u32 = 20;

/// Half a minute of sound: 16 kHz, two bytes a sample.
const MAX_AUDIO_BYTES: usize = 30 * 16_000 * 2;

/// Alternatives of its prompt's tokens that one request may ask for, in all, and of its output's:
/// some 200 MB as they wait for a slow reader.
const MAX_LOGPROBS: usize = 1 << 24;

/// The positions of a request's prompt whose logits are wanted.
fn scored(request: &NewRequest) -> usize {
    match (request.purpose, request.sampling.prompt_logprobs) {
        (Purpose::Generate { .. }, Some(_)) => request.prompt.len().saturating_sub(1),
        _ => 0,
    }
}

/// The most tokens that a request with `done` output tokens may still draw.
fn most_new(sampling: &SamplingParams, done: usize, purpose: Purpose) -> usize {
    match purpose {
        Purpose::Prefill | Purpose::Align => 1,
        Purpose::Generate { .. } => (sampling.max_tokens as usize).saturating_sub(done).max(1),
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// It does not fit, or not now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A token that the model does not have.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// How many there are.
        vocab: usize,
    },
    /// A field for speech models.
    #[error("`{0}` is for speech models; this model is none")]
    NotSpeech(&'static str),
    /// A speech model hears nothing.
    #[error("`audio` is missing: this is a speech model")]
    NoAudio,
    /// A window that is empty, too long or no sequence of samples.
    #[error(
        "`audio.samples` has {bytes} bytes; send 16 kHz samples of two bytes each, at most \
         {MAX_AUDIO_BYTES} bytes and at least one sample"
    )]
    AudioLength {
        /// Bytes sent.
        bytes: usize,
    },
    /// What is not computed for speech models.
    #[error("`prompt_logprobs` is not supported by speech models")]
    PromptLogprobsOfSpeech,
    /// A bad word that would forbid nothing.
    #[error("an entry of `bad_words` has no tokens")]
    EmptyBadWord,
    /// More of `prompt_logprobs` than is kept in memory.
    #[error(
        "`prompt_logprobs` of {count} for {tokens} tokens are more than {MAX_LOGPROBS} in all; ask \
         for fewer or send a shorter prompt"
    )]
    PromptLogprobs {
        /// Tokens of the prompt.
        tokens: usize,
        /// What is asked for each.
        count: u32,
    },
    /// More of `logprobs` than is kept in memory.
    #[error(
        "`logprobs` of {count} for up to {tokens} tokens are more than {MAX_LOGPROBS} in all; ask \
         for fewer or a smaller `max_tokens`"
    )]
    Logprobs {
        /// Tokens that may be drawn.
        tokens: usize,
        /// What is asked for each.
        count: u32,
    },
}

/// A request in the engine. Dropping it cancels the request and frees its blocks.
pub struct RequestHandle {
    id: SequenceId,
    events: mpsc::Receiver<Event>,
    inbox: Arc<Inbox>,
}

impl RequestHandle {
    /// What happens next; `None` after the end.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Asks for the request to be stopped, so that a peer can go on with it: see
    /// [`Event::Released`]. It may finish before.
    pub fn release(&self) {
        self.inbox.push(Command::Release(self.id));
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        self.inbox.push(Command::Abort(self.id));
    }
}
