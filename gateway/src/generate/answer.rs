//! One choice of an answer: tokens become text, stop strings end it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::{FinishReason, PromptTokenLogprob, Started, Token};

use super::{Generation, Job, Update};
use crate::api::usage::Usage;
use crate::error::ApiError;
use crate::metrics::lora::LoraRequest;
use crate::metrics::{Ended, Metrics};
use crate::text::TextModel;
use crate::text::detokenize::Detokenizer;
use crate::text::stop::{StopWatch, Watched};
use crate::trace::Sequence;
use crate::workers::Registry;
use crate::workers::recent::Placement;

/// Text settings of an answer.
#[derive(Clone, Debug)]
pub struct TextSettings {
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Whether the stop string stays in the text.
    pub include_stop: bool,
    /// Whether special tokens are left out.
    pub skip_special_tokens: bool,
    /// Special tokens that are not left out: the answer is read by them.
    pub markers: Vec<u32>,
}

/// What a step added to the answer, or all of them together.
#[derive(Clone, Debug, Default)]
pub struct Delta {
    /// Text that is certain now.
    pub text: String,
    /// The tokens behind it, and those whose text is still held back.
    pub tokens: Vec<Token>,
    /// Whether this is the end, and why.
    pub end: Option<End>,
    /// Log-probabilities of the prompt, from its second token on; before the first token, when
    /// they were asked for.
    pub prompt: Vec<PromptTokenLogprob>,
}

impl Delta {
    /// Adds what follows.
    pub fn append(&mut self, next: Self) {
        self.text.push_str(&next.text);
        self.tokens.extend(next.tokens);
        self.end = next.end.or(self.end.take());
        self.prompt.extend(next.prompt);
    }
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// `stop`, `length` or `abort`.
    pub reason: &'static str,
    /// The stop string or stop token that ended it.
    pub stop: serde_json::Value,
}

/// An answer in progress.
pub struct Answer {
    generation: Generation,
    model: Arc<TextModel>,
    metrics: Arc<Metrics>,
    detokenizer: Detokenizer,
    watch: StopWatch,
    include_stop: bool,
    /// Tokens so far.
    count: usize,
    /// Prompt tokens that were found in a prefix cache.
    cached: usize,
    no_speech: Option<f32>,
    times: Times,
    /// Among the sequences that are remembered.
    number: Option<u64>,
    lora: Option<LoraRequest>,
    done: bool,
}

/// When things happened.
struct Times {
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
    /// From admission to the first token, as the worker says.
    prefill: Duration,
    /// How long it waited at the worker, as that says.
    queued: Option<Duration>,
}

impl Answer {
    /// Sends the sequence on its way.
    pub async fn start(
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
        job: Job,
        text: TextSettings,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let model = job.served.text.clone();
        let adapter = job.served.adapter.as_ref();
        let lora = adapter.map(|adapter| metrics.lora.begin(&adapter.name));
        let detokenizer =
            Detokenizer::after(&model, &job.prompt, text.skip_special_tokens).keeping(text.markers);
        let generation = Generation::start(registry, job).await?;
        Ok(Self {
            generation,
            model,
            metrics,
            detokenizer,
            watch: StopWatch::new(text.stop, text.include_stop),
            include_stop: text.include_stop,
            count: 0,
            cached: 0,
            no_speech: None,
            times: Times {
                arrived,
                first: None,
                last: arrived,
                prefill: Duration::ZERO,
                queued: None,
            },
            number: None,
            lora,
            done: false,
        })
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.generation.job.prompt.len(),
            completion_tokens: self.count,
            cached_tokens: self.cached,
        }
    }

    /// How likely it is that nobody speaks, once something has come; speech models alone say it.
    pub fn no_speech(&self) -> Option<f32> {
        self.no_speech
    }

    /// What comes next; `None` after the end.
    pub async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        if self.done {
            return Ok(None);
        }
        loop {
            let update = match self.generation.next().await {
                Ok(update) => update,
                Err(error) => {
                    self.generation.job.trace.fail(&error);
                    self.finish("error");
                    return Err(error);
                }
            };
            match update {
                Some(Update::Started(started)) => {
                    self.cached = started.cached_tokens as usize;
                    self.no_speech = started.no_speech_probability;
                    if let Some(lora) = &mut self.lora {
                        lora.runs();
                    }
                    let job = &self.generation.job;
                    self.metrics.started(&job.served.card, job.prompt.len(), &started);
                    self.times.prefill = Duration::from_micros(started.prefill_us);
                    self.times.queued = Some(Duration::from_micros(started.queue_us));
                    let placement = self.placement(&started);
                    self.number = Some(self.generation.registry.recent.started(placement));
                }
                Some(Update::Resumed(started)) => {
                    let card = &self.generation.job.served.card;
                    self.metrics.migrated(card, &started);
                    if let Some(number) = self.number {
                        self.generation.registry.recent.moved(number, self.placement(&started));
                    }
                }
                Some(Update::PromptLogprobs(prompt)) => {
                    return Ok(Some(Delta { prompt, ..Delta::default() }));
                }
                Some(Update::Token(token)) => return Ok(Some(self.token(token))),
                Some(Update::Finished(reason, stop)) => {
                    let reason = match reason {
                        FinishReason::Stop => "stop",
                        FinishReason::Length => "length",
                        _ => "abort",
                    };
                    let stop = stop.map_or(serde_json::Value::Null, Into::into);
                    return Ok(Some(self.end(reason, stop)));
                }
                None => return Ok(Some(self.end("abort", serde_json::Value::Null))),
            }
        }
    }

    /// Where the sequence is computed, by what the worker says.
    fn placement(&self, started: &Started) -> Placement {
        let Generation { job, attempt, .. } = &self.generation;
        let (worker, ttft) = (&attempt.ticket.worker, self.times.arrived.elapsed());
        Placement::new(&job.request_id, &job.served, job.prompt.len(), worker, started, ttft)
    }

    fn token(&mut self, token: Token) -> Delta {
        self.count += 1;
        self.note_time();
        let job = &self.generation.job;
        let may_stop = job.may_stop(self.count);
        // The token that ends the sequence counts, but is no text.
        if job.stops(token.id, self.count) && !self.include_stop {
            return Delta { tokens: vec![token], ..Delta::default() };
        }
        let text = self.detokenizer.push(&self.model, token.id);
        let tokens = vec![token];
        if !may_stop {
            // What comes before `min_tokens` cannot end a stop string.
            return Delta { text: self.watch.pass(&text), tokens, ..Delta::default() };
        }
        match self.watch.push(&text) {
            Watched::Text(text) => Delta { text, tokens, ..Delta::default() },
            Watched::Stopped(text, stop) => {
                self.finish("stop");
                let end = End { reason: "stop", stop: stop.into() };
                Delta { text, tokens, end: Some(end), ..Delta::default() }
            }
        }
    }

    fn end(&mut self, reason: &'static str, stop: serde_json::Value) -> Delta {
        let rest = self.detokenizer.finish(&self.model);
        let (text, end) = match self.watch.push(&rest) {
            Watched::Text(text) => (text + &self.watch.finish(), End { reason, stop }),
            Watched::Stopped(text, stop) => (text, End { reason: "stop", stop: stop.into() }),
        };
        self.finish(end.reason);
        Delta { text, end: Some(end), ..Delta::default() }
    }

    fn note_time(&mut self) {
        let now = Instant::now();
        let model = &self.generation.job.served.card.name;
        if self.times.first.is_some() {
            self.metrics.next_token(model, now - self.times.last);
        } else {
            self.times.first = Some(now);
            self.metrics.first_token(model, now - self.times.arrived);
        }
        self.times.last = now;
    }

    fn finish(&mut self, reason: &str) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        self.lora = None;
        let now = Instant::now();
        let job = &self.generation.job;
        let ended = Ended {
            reason,
            tokens: self.count,
            max_tokens: job.sampling.max_tokens,
            took: now - self.times.arrived,
            prefill: self.times.prefill,
            decode: self.times.first.map(|first| now - first),
        };
        self.metrics.finished(&job.served.card, &ended);
        job.siblings.ended(self.count);
        job.trace.ended(Sequence {
            tokens: self.count,
            first_token: self.times.first.map(|first| first - self.times.arrived),
            queued: self.times.queued,
        });
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Not finished yet: the client has left, or another choice failed.
        self.finish("abort");
    }
}
