//! The span of a request, which all who work on the request share.
//!
//! It ends when the last of them lets go, and has then what vLLM puts into its spans, by the same
//! names. Where there are no traces it holds nothing, or the client's own trace to pass on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::ResponseError as _;
use baton_membership::traces::{self, Parent, Span};
use parking_lot::Mutex;

use crate::error::ApiError;

/// What a request's work hangs on. Clones are the same request.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Request>>);

struct Request {
    parent: Parent,
    state: Mutex<State>,
}

struct State {
    span: Span,
    arrived: Instant,
    prompt_tokens: usize,
    completion_tokens: usize,
    sequences: usize,
    first_token: Option<Duration>,
    queued: Option<Duration>,
    failed: bool,
}

/// How one of a request's sequences went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequence {
    /// Tokens drawn.
    pub tokens: usize,
    /// From the request's arrival to its first token.
    pub first_token: Option<Duration>,
    /// How long it waited at its worker.
    pub queued: Option<Duration>,
}

impl Trace {
    /// Begins a request's span under the client's own, if that is known.
    pub fn begin(client: Parent, method: &str, route: &str) -> Self {
        let name = match traces::exporting() {
            true => format!("{method} {route}"),
            false => String::new(),
        };
        let mut span = client.server(name);
        if span.as_parent().trace_id().is_none() {
            return Self(None);
        }
        if span.exports() {
            span.set("http.request.method", method.to_owned());
            span.set("http.route", route.to_owned());
        }
        let parent = span.as_parent().clone();
        let state = State {
            span,
            arrived: Instant::now(),
            prompt_tokens: 0,
            completion_tokens: 0,
            sequences: 0,
            first_token: None,
            queued: None,
            failed: false,
        };
        Self(Some(Arc::new(Request { parent, state: Mutex::new(state) })))
    }

    /// Whether the request is part of a trace.
    pub fn exists(&self) -> bool {
        self.0.is_some()
    }

    /// What spans of the request's work hang on.
    pub fn parent(&self) -> Parent {
        self.0.as_ref().map(|request| request.parent.clone()).unwrap_or_default()
    }

    /// The id of the trace, in hexadecimal.
    pub fn trace_id(&self) -> Option<String> {
        self.0.as_ref()?.parent.trace_id()
    }

    /// Begins a part of the request's work.
    pub fn span(&self, name: &'static str) -> Span {
        self.0.as_ref().map(|request| request.parent.span(name)).unwrap_or_default()
    }

    /// Notes what is asked for.
    pub fn asked(&self, model: &str, fields: impl FnOnce(&mut Span)) {
        self.with(|state| {
            if state.span.exports() {
                state.span.set("gen_ai.request.model", model.to_owned());
                fields(&mut state.span);
            }
        });
    }

    /// Notes that so many tokens of a prompt are to be computed.
    pub fn prompt(&self, tokens: usize) {
        self.with(|state| state.prompt_tokens += tokens);
    }

    /// Notes how a sequence went.
    pub fn ended(&self, sequence: Sequence) {
        self.with(|state| {
            state.sequences += 1;
            state.completion_tokens += sequence.tokens;
            let earliest = [state.first_token, sequence.first_token].into_iter().flatten().min();
            state.first_token = earliest;
            state.queued = state.queued.max(sequence.queued);
        });
    }

    /// Notes that the request failed while it was answered.
    pub fn fail(&self, error: &ApiError) {
        self.with(|state| state.fail(error.status_code().as_u16()));
    }

    /// Notes how the request is answered, by the time that the reply begins.
    pub fn answered(&self, id: &str, status: u16) {
        self.with(|state| {
            if state.span.exports() {
                state.span.set("gen_ai.request.id", id.to_owned());
                state.span.set("http.response.status_code", i64::from(status));
                state.fail(status);
            }
        });
    }

    fn with(&self, note: impl FnOnce(&mut State)) {
        if let Some(request) = &self.0 {
            note(&mut request.state.lock());
        }
    }
}

impl State {
    /// A client's own mistake is no failure of the server.
    fn fail(&mut self, status: u16) {
        if status >= 500 && !std::mem::replace(&mut self.failed, true) {
            self.span.fail(match status {
                502 | 503 => "unavailable",
                504 => "timeout",
                _ => "internal",
            });
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let Self { span, .. } = self;
        if !span.exports() {
            return;
        }
        if self.sequences > 0 || self.prompt_tokens > 0 {
            span.set("gen_ai.usage.prompt_tokens", self.prompt_tokens as i64);
            span.set("gen_ai.usage.completion_tokens", self.completion_tokens as i64);
            span.set("gen_ai.usage.num_sequences", self.sequences as i64);
        }
        if let Some(first) = self.first_token {
            span.set_time("gen_ai.latency.time_to_first_token", first);
        }
        if let Some(queued) = self.queued {
            span.set_time("gen_ai.latency.time_in_queue", queued);
        }
        span.set_time("gen_ai.latency.e2e", self.arrived.elapsed());
    }
}
