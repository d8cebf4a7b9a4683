//! The spans of one sequence at one worker: the call, and within it the hand-off, the prompt's
//! computation and the decoding. A token costs an addition.

use std::time::{Duration, Instant};

use baton_membership::traces::{Parent, Span};
use tonic::{Code, Request};

/// Takes a call apart: what it says, and a span for it.
pub(super) fn taken<T>(method: &'static str, request: Request<T>) -> (Span, T) {
    let (metadata, _, message) = request.into_parts();
    (Parent::of_metadata(&metadata).rpc_server(method), message)
}

/// Notes under which id the call is known in the logs.
pub(super) fn named(span: &mut Span, request_id: &str) {
    if span.exports() {
        span.set("gen_ai.request.id", request_id.to_owned());
    }
}

/// The spans of a sequence.
pub(super) struct Spans {
    call: Span,
    decode: Option<Span>,
    /// Since when the prompt is computed.
    since: Instant,
    /// Positions of the prompt, and how many of them need not be computed.
    positions: usize,
    known: usize,
    tokens: usize,
}

impl Spans {
    /// Those of a call of which so many positions are wanted.
    pub(super) fn new(call: Span, positions: usize) -> Self {
        let since = Instant::now();
        Self { call, decode: None, since, positions, known: 0, tokens: 0 }
    }

    /// Notes that the sequence has its blocks.
    pub(super) fn admitted(&mut self, cached: usize, waited: Duration) {
        self.since = Instant::now();
        self.known = cached;
        self.call.set_time("gen_ai.latency.time_in_queue", waited);
        self.call.set("baton.cached_tokens", cached as i64);
    }

    /// Begins a hand-off.
    pub(super) fn pulling(&self, peer: &str) -> Span {
        let mut span = self.call.as_parent().span("handoff");
        if span.exports() {
            span.set("baton.peer.id", peer.to_owned());
        }
        span
    }

    /// Notes that a hand-off has ended; so many positions came by it.
    pub(super) fn pulled(&mut self, positions: usize) {
        self.since = Instant::now();
        self.known += positions;
    }

    /// Notes a token.
    pub(super) fn token(&mut self) {
        if self.tokens == 0 {
            self.computed();
            self.decode = Some(self.call.as_parent().span("decode"));
        }
        self.tokens += 1;
    }

    /// Notes that the prompt has been computed.
    pub(super) fn computed(&mut self) {
        let computed = self.positions.saturating_sub(self.known);
        self.call.set("baton.computed_tokens", computed as i64);
        if computed > 0 {
            let mut span = self.call.as_parent().span_since("prefill", self.since);
            span.set("baton.computed_tokens", computed as i64);
        }
    }

    /// Notes that the sequence is released to another worker.
    pub(super) fn released(&mut self, positions: usize) {
        self.end_decode();
        self.call.set("baton.released_positions", positions as i64);
    }

    /// Notes that the call failed.
    pub(super) fn fail(&mut self, code: Code) {
        self.call.fail_rpc(code);
    }

    fn end_decode(&mut self) {
        if let Some(mut decode) = self.decode.take() {
            decode.set("baton.output_tokens", self.tokens as i64);
        }
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        self.end_decode();
    }
}
