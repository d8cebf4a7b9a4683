//! One choice of an answer: tokens become text, stop strings end it.

use std::sync::Arc;
use std::time::Instant;

use baton_proto::v1::{FinishReason, Token};

use super::{Generation, Job, Update};
use crate::error::ApiError;
use crate::lora_requests::LoraRequest;
use crate::metrics::Metrics;
use crate::text::TextModel;
use crate::text::detokenize::Detokenizer;
use crate::text::stop::{StopWatch, Watched};
use crate::workers::Registry;

/// Text settings of an answer.
#[derive(Clone, Debug)]
pub struct TextSettings {
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Whether the stop string stays in the text.
    pub include_stop: bool,
    /// Whether special tokens are left out.
    pub skip_special_tokens: bool,
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
    times: Times,
    lora: Option<LoraRequest>,
    done: bool,
}

/// When things happened.
struct Times {
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
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
        let generation = Generation::start(registry, job).await?;
        Ok(Self {
            generation,
            model,
            metrics,
            detokenizer: Detokenizer::new(text.skip_special_tokens),
            watch: StopWatch::new(text.stop, text.include_stop),
            include_stop: text.include_stop,
            count: 0,
            times: Times { arrived, first: None, last: arrived },
            lora,
            done: false,
        })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.count
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
                    self.finish("error");
                    return Err(error);
                }
            };
            match update {
                Some(Update::Started(started)) => {
                    if let Some(lora) = &mut self.lora {
                        lora.runs();
                    }
                    let job = &self.generation.job;
                    self.metrics.started(&job.served.card.name, job.prompt.len(), &started);
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
            // What comes before `min_tokens` cannot stop anything.
            return Delta { text, tokens, end: None };
        }
        match self.watch.push(&text) {
            Watched::Text(text) => Delta { text, tokens, end: None },
            Watched::Stopped(text, stop) => {
                self.finish("stop");
                let end = End { reason: "stop", stop: stop.into() };
                Delta { text, tokens, end: Some(end) }
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
        Delta { text, tokens: Vec::new(), end: Some(end) }
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
        let decode = self.times.first.map(|first| now - first);
        let model = &self.generation.job.served.card.name;
        self.metrics.finished(model, reason, self.count, now - self.times.arrived, decode);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Not finished yet: the client has left, or another choice failed.
        self.finish("abort");
    }
}
