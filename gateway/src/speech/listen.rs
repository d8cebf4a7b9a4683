//! Listens to a file, one window after the other, with as many calls to workers as that takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::web::Bytes;
use baton_proto::drain::is_draining;
use baton_proto::v1::{AlignRequest, AudioWindow, SamplingParams, SpeechCard, SpeechRules};
use tokio::time::timeout_at;
use tonic::Code;

use super::languages;
use super::transcript::{FRAMES_PER_SECOND, Heard, Rules, Segment, Step, Transcript, WINDOW};
use super::words::{Word, words};
use crate::api::usage::Usage;
use crate::audio::windows::Windows;
use crate::audio::{RATE, is_silent};
use crate::error::ApiError;
use crate::generate::Job;
use crate::generate::answer::{Answer, TextSettings};
use crate::metrics::Metrics;
use crate::trace::Trace;
use crate::workers::{Registry, Served};

/// Samples of a frame.
const FRAME: usize = RATE / FRAMES_PER_SECOND;
/// What is left of a file in fewer frames than this is no speech.
const SHORTEST: usize = 10;
/// The latest that a window's first segment may begin, in steps of 0.02 s: 1 s.
const MAX_INITIAL_TIMESTAMP: u32 = 50;
/// The call, in spans.
const ALIGN: &str = "baton.v1.Worker/Align";
/// Failures after which the times of words are given up.
const MAX_FAILURES: usize = 3;
/// How long the times of a window's words may take.
const ALIGN_WITHIN: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Code of the spoken language; without it the model tells.
    pub language: Option<&'static str>,
    /// Whether English text is wanted, whatever is spoken.
    pub translate: bool,
    /// Text that the recording goes on from.
    pub prompt: String,
    /// Words to expect.
    pub hotwords: String,
    /// How to draw; temperature and seed are those of the first window's first try.
    pub params: SamplingParams,
    /// The most tokens of a window.
    pub max_tokens: Option<u32>,
    /// Whether to tell when each word was said.
    pub words: bool,
}

/// Who does the work, for how long, and for whom.
#[derive(Clone)]
pub struct Context {
    /// The workers.
    pub registry: Arc<Registry>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The model.
    pub served: Arc<Served>,
    /// The reply's id, under which workers log the windows.
    pub request_id: String,
    /// When the request came.
    pub arrived: Instant,
    /// When to give up.
    pub deadline: Instant,
    /// What its spans hang on.
    pub trace: Trace,
}

/// A file that is being written down.
pub struct Listener {
    context: Context,
    card: SpeechCard,
    wish: Wish,
    windows: Windows,
    transcript: Transcript,
    /// Frames of the whole file.
    frames: usize,
    language: Option<&'static str>,
    usage: Usage,
}

/// What was said in a window.
#[derive(Debug, Default)]
pub struct Passage {
    /// Its segments, in order.
    pub segments: Vec<Segment>,
    /// Its words, if they were asked for.
    pub words: Vec<Word>,
}

/// A window of sound.
struct Window {
    samples: Bytes,
    frames: usize,
}

impl Listener {
    /// Begins with a file that has been opened. The model must be one for speech.
    pub fn new(context: Context, wish: Wish, windows: Windows) -> Result<Self, ApiError> {
        let served = &context.served;
        let Some(card) = served.card.speech.clone() else {
            let message = format!("`{}` is no model for speech.", served.name());
            return Err(ApiError::bad_value("model", message));
        };
        let special = served.card.eos_token_ids.iter().min().copied();
        let tokens = |text: &str| match text.trim() {
            "" => Ok(Vec::new()),
            text => served
                .text
                .encode(&format!(" {text}"), false)
                .map_err(|error| ApiError::internal(format!("The tokenizer failed: {error}."))),
        };
        let rules = Rules {
            timestamp_begin: card.timestamp_begin,
            special: special.unwrap_or(card.start_of_transcript).min(card.start_of_transcript),
            temperatures: Rules::temperatures(wish.params.temperature),
            max_previous: (card.max_text_tokens as usize / 2).saturating_sub(1),
            hotwords: tokens(&wish.hotwords)?,
        };
        let transcript = Transcript::new(rules, tokens(&wish.prompt)?);
        let language = match card.multilingual {
            true => wish.language,
            false => Some("en"),
        };
        let frames = windows.length().div_ceil(FRAME);
        let usage = Usage::default();
        Ok(Self { context, card, wish, windows, transcript, frames, language, usage })
    }

    /// Seconds of the whole file.
    pub fn seconds(&self) -> f64 {
        self.windows.seconds()
    }

    /// The code of the spoken language, once something was heard.
    pub fn language(&self) -> &'static str {
        self.language.unwrap_or("en")
    }

    /// Tokens of all windows so far, each drawn as often as it was.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What was said in the next window; `None` at the end of the file.
    pub async fn next(&mut self) -> Result<Option<Passage>, ApiError> {
        let seek = self.transcript.seek();
        if seek + SHORTEST > self.frames {
            self.note(self.frames.saturating_sub(seek));
            return Ok(None);
        }
        let samples = self.windows.read(seek * FRAME, WINDOW * FRAME).await?;
        let frames = samples.len().div_ceil(FRAME);
        if frames == 0 {
            return Ok(None);
        }
        if is_silent(samples) {
            self.transcript.skip(frames);
            self.note(frames);
            return Ok(Some(Passage::default()));
        }
        let samples = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect::<Vec<u8>>();
        let window = Window { samples: samples.into(), frames };
        if self.language.is_none() {
            self.language = Some(self.detect(&window).await?);
        }
        let segments = loop {
            let heard = self.hear(&window).await?;
            let text = &self.context.served.text;
            match self.transcript.heard(frames, heard, |tokens| text.decode(tokens, true)) {
                Step::Again => {}
                Step::Done(segments) => break segments,
            }
        };
        self.note(self.transcript.seek() - seek);
        let words = match self.wish.words {
            true => self.words(&window, &segments).await?,
            false => Vec::new(),
        };
        Ok(Some(Passage { segments, words }))
    }

    fn note(&self, frames: usize) {
        let seconds = frames as f64 / FRAMES_PER_SECOND as f64;
        self.context.metrics.heard(&self.context.served.card.name, seconds);
    }

    /// Draws a window's text once.
    async fn hear(&mut self, window: &Window) -> Result<Heard, ApiError> {
        let mut prompt = Vec::new();
        let previous = self.transcript.previous();
        if !previous.is_empty() {
            prompt.push(self.card.start_of_previous);
            prompt.extend(previous);
        }
        prompt.extend(self.task());
        let room = self.card.max_text_tokens.saturating_sub(prompt.len() as u32);
        let most = self.wish.max_tokens.unwrap_or(u32::MAX).min(self.card.max_text_tokens / 2);
        let (seek, attempt) = (self.transcript.seek() as u64, self.transcript.attempt() as u64);
        let params = SamplingParams {
            temperature: self.transcript.temperature(),
            // Each window and each try is drawn anew, and the same every time.
            seed: self.wish.params.seed.wrapping_add((seek << 8) | attempt),
            max_tokens: most.min(room).max(1),
            logprobs: Some(0),
            speech: Some(SpeechRules {
                timestamps: true,
                max_initial_timestamp: Some(MAX_INITIAL_TIMESTAMP),
                suppress_blank: true,
                ..SpeechRules::default()
            }),
            ..self.wish.params.clone()
        };
        let mut answer = self.ask(window, prompt, params).await?;
        let (mut tokens, mut sum_logprob) = (Vec::new(), 0.0);
        while let Some(delta) = answer.next().await? {
            for token in delta.tokens {
                sum_logprob += f64::from(token.logprob.unwrap_or(0.0));
                if !self.context.served.card.eos_token_ids.contains(&token.id) {
                    tokens.push(token.id);
                }
            }
        }
        self.count(answer.usage());
        Ok(Heard { tokens, sum_logprob, no_speech: answer.no_speech().unwrap_or(0.0) })
    }

    /// The tokens that say what is to be done.
    fn task(&self) -> Vec<u32> {
        let card = &self.card;
        let mut task = vec![card.start_of_transcript];
        if card.multilingual {
            task.extend(card.languages.get(self.language()));
            task.push(if self.wish.translate { card.translate } else { card.transcribe });
        }
        task
    }

    /// The language of a window: the likeliest token of a language.
    async fn detect(&mut self, window: &Window) -> Result<&'static str, ApiError> {
        let params = SamplingParams {
            top_p: 1.0,
            max_tokens: 1,
            repetition_penalty: 1.0,
            allowed_token_ids: self.card.languages.values().copied().collect(),
            speech: Some(SpeechRules { override_suppressed: true, ..SpeechRules::default() }),
            ..SamplingParams::default()
        };
        let mut answer = self.ask(window, vec![self.card.start_of_transcript], params).await?;
        let mut token = None;
        while let Some(delta) = answer.next().await? {
            token = token.or(delta.tokens.first().map(|token| token.id));
        }
        self.count(answer.usage());
        let code = self.card.languages.iter().find(|(_, id)| Some(**id) == token);
        let code = code.and_then(|(code, _)| languages::code(code));
        code.ok_or_else(|| ApiError::internal("The model names a language that is not known."))
    }

    fn count(&mut self, usage: Usage) {
        self.usage.prompt_tokens += usage.prompt_tokens;
        self.usage.completion_tokens += usage.completion_tokens;
        self.usage.cached_tokens += usage.cached_tokens;
    }

    async fn ask(
        &self,
        window: &Window,
        prompt: Vec<u32>,
        sampling: SamplingParams,
    ) -> Result<Answer, ApiError> {
        let Context { registry, metrics, served, request_id, arrived, deadline, trace } =
            &self.context;
        trace.prompt(prompt.len());
        let root = served.root("").with_audio(&window.samples);
        let job = Job {
            served: served.clone(),
            request_id: request_id.clone(),
            hashes: root.chain(&prompt, served.block_size()).into(),
            prompt: prompt.into(),
            sampling,
            salt: String::new(),
            priority: 0,
            constraint_field: None,
            deadline: *deadline,
            // It is the sound that a prefill worker computes, however short the prompt is.
            handoff_min_tokens: 1,
            audio: Some(AudioWindow { samples: window.samples.clone() }),
            siblings: metrics.siblings(&served.card, 1),
            trace: trace.clone(),
        };
        let text = TextSettings {
            stop: Vec::new(),
            include_stop: false,
            skip_special_tokens: true,
            markers: Vec::new(),
        };
        Answer::start(registry.clone(), metrics.clone(), job, text, *arrived).await
    }

    /// The words of a window, with their times.
    async fn words(&self, window: &Window, segments: &[Segment]) -> Result<Vec<Word>, ApiError> {
        let served = &self.context.served;
        let special = self.card.start_of_transcript.min(self.card.timestamp_begin);
        let eos = &served.card.eos_token_ids;
        let tokens: Vec<u32> = segments
            .iter()
            .flat_map(|segment| segment.tokens.iter().copied())
            .filter(|token| *token < special && !eos.contains(token))
            .collect();
        let Some(first) = segments.first().filter(|_| !tokens.is_empty()) else {
            return Ok(Vec::new());
        };
        let starts = self.align(window, &tokens).await?;
        let per_second = FRAMES_PER_SECOND as f64;
        let offset = first.seek as f64 / per_second;
        let place = (offset, window.frames as f64 / per_second);
        let decode = |tokens: &[u32]| served.text.decode(tokens, true);
        let language = if self.wish.translate { "en" } else { self.language() };
        Ok(words(&tokens, &starts, place, language, decode))
    }

    /// Asks when each token was said, and another worker when one fails.
    async fn align(&self, window: &Window, tokens: &[u32]) -> Result<Vec<u32>, ApiError> {
        let Context { registry, served, request_id, deadline, trace, .. } = &self.context;
        let mut avoid = Vec::new();
        let mut failure = None;
        for _ in 0..MAX_FAILURES {
            let Some(ticket) =
                registry.choose_decode(served, (tokens.len(), tokens.len()), &[], &avoid)
            else {
                break;
            };
            let until = (*deadline).min(Instant::now() + ALIGN_WITHIN);
            let request = AlignRequest {
                request_id: request_id.clone(),
                audio: Some(AudioWindow { samples: window.samples.clone() }),
                prompt_token_ids: self.task(),
                text_token_ids: tokens.to_vec(),
                timeout_ms: until.saturating_duration_since(Instant::now()).as_millis().max(1)
                    as u64,
            };
            let mut client = ticket.worker.client();
            let record = &ticket.worker.record;
            let mut span = trace.parent().rpc_client(ALIGN, &record.address);
            let request = span.as_parent().request(request);
            let status = match timeout_at(until.into(), client.align(request)).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner().starts),
                Err(_) => {
                    span.fail_rpc(Code::DeadlineExceeded);
                    return Err(ApiError::timed_out());
                }
                Ok(Err(status)) => status,
            };
            span.fail_rpc(status.code());
            match status.code() {
                Code::DeadlineExceeded => return Err(ApiError::timed_out()),
                Code::ResourceExhausted => ticket.worker.mark_full(),
                Code::Unavailable if is_draining(&status) => ticket.worker.mark_draining(),
                Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
                    let message = format!("Words could not be timed: {}.", status.message());
                    return Err(ApiError::internal(message));
                }
                _ => ticket.worker.mark_down(),
            }
            avoid.push(ticket.worker.record.id.clone());
            failure = Some(status);
        }
        Err(match failure {
            Some(status) if status.code() == Code::ResourceExhausted => {
                ApiError::overloaded("All workers' queues are full; try again soon.")
            }
            _ => ApiError::given_up("No worker that times words is running; try again soon."),
        })
    }
}
