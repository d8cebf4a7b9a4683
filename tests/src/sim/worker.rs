//! One worker, as the engine's scheduler has it: a step computes a token of every sequence that
//! decodes, then fills what is left of it with chunks of prompts, in order.
//!
//! Between two changes of its batch all steps are alike, so it is not simulated step by step: a
//! clock that counts tokens runs at the rate of its steps, and a sequence ends when the clock
//! shows what it showed at its start and the tokens of its answer (as processor sharing is
//! simulated by virtual time). A request costs a few events, however long its answer.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use baton_coordinator::planner::capacity::StepTime;
use baton_coordinator::planner::{Counters, observed};
use baton_proto::LATENCY_US;

/// What all workers of a run are like.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The time of a step.
    pub step: StepTime,
    /// Tokens of a step, at most.
    pub chunk: f64,
    /// Sequences that decode at a time, at most.
    pub slots: usize,
    /// Seconds from the launch until it serves.
    pub startup: f64,
    /// Seconds that a hand-off takes, and the move of a sequence.
    pub handoff: f64,
}

/// Index of a request.
pub(super) type Request = u32;

/// A worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Worker {
    /// Prompts, with the tokens left of each; the first is being computed.
    pub(super) prompts: VecDeque<(Request, f64)>,
    /// Tokens of all of them.
    pub(super) backlog: f64,
    /// Sequences by what the clock shows at their end. Times are not below zero: their bits have
    /// their order.
    decoding: BinaryHeap<Reverse<(u64, Request)>>,
    clock: f64,
    now: f64,
    /// Raised when its batch changes: events that were expected before are void.
    pub(super) stamp: u32,
    pub(super) draining: bool,
    /// Whether it goes to the other pool when it is drained.
    pub(super) converts: bool,
    pub(super) launched: f64,
    pub(super) retired: Option<f64>,
    /// What it counts; sums of parts of steps.
    steps: f64,
    rows: f64,
    prompt_tokens: f64,
    output_tokens: f64,
    busy: f64,
    itl: Vec<f64>,
    pub(super) ttft: Vec<u64>,
    pub(super) requests: u64,
    pub(super) finished: u64,
}

/// What a worker is done with.
pub(super) enum Done {
    Prompt(Request),
    Sequence(Request),
}

impl Worker {
    pub(super) fn new(now: f64) -> Self {
        let buckets = LATENCY_US.len() + 1;
        let (itl, ttft) = (vec![0.0; buckets], vec![0; buckets]);
        Self { now, launched: now, itl, ttft, ..Self::default() }
    }

    pub(super) fn decoding(&self) -> usize {
        self.decoding.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.decoding.is_empty() && self.prompts.is_empty()
    }

    /// The time of its steps as they are now, and prompt tokens in each.
    fn step(&self, spec: &Spec) -> (f64, f64) {
        let rows = self.decoding.len() as f64;
        let tokens = match self.prompts.is_empty() {
            true => 0.0,
            false => (spec.chunk - rows).max(1.0),
        };
        let StepTime { fixed, row, token } = spec.step;
        (fixed + row * rows + token * tokens, tokens)
    }

    /// Goes on to `now`.
    pub(super) fn advance(&mut self, now: f64, spec: &Spec) {
        let took = now - self.now;
        self.now = now;
        if took <= 0.0 || self.is_empty() {
            return;
        }
        let (step, tokens) = self.step(spec);
        let steps = took / step;
        let rows = self.decoding.len() as f64;
        self.clock += steps;
        if let Some((_, left)) = self.prompts.front_mut() {
            *left -= steps * tokens;
            self.backlog -= steps * tokens;
        }
        self.steps += steps;
        self.rows += steps * rows;
        self.prompt_tokens += steps * tokens;
        self.output_tokens += steps * rows;
        self.busy += took;
        if rows > 0.0 {
            self.itl[observed::bucket(step)] += steps * rows;
        }
    }

    /// When the next prompt or sequence is done, if nothing changes.
    pub(super) fn due(&self, spec: &Spec) -> Option<f64> {
        let (step, tokens) = self.step(spec);
        let prompt = self.prompts.front().map(|(_, left)| left.max(0.0) / tokens * step);
        let sequence = self
            .decoding
            .peek()
            .map(|Reverse((end, _))| (f64::from_bits(*end) - self.clock).max(0.0) * step);
        let soonest = match (prompt, sequence) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        soonest.map(|after| self.now + after)
    }

    /// Takes out what is done by now.
    pub(super) fn take(&mut self, spec: &Spec) -> Option<Done> {
        // What a nanosecond does is the arithmetic's.
        let (step, tokens) = self.step(spec);
        if self.prompts.front().is_some_and(|(_, left)| left / tokens * step <= 1e-9) {
            self.backlog = if self.prompts.len() == 1 { 0.0 } else { self.backlog };
            return self.prompts.pop_front().map(|(request, _)| Done::Prompt(request));
        }
        let over = |end: u64| (f64::from_bits(end) - self.clock) * step <= 1e-9;
        if self.decoding.peek().is_some_and(|Reverse((end, _))| over(*end)) {
            return self.decoding.pop().map(|Reverse((_, request))| Done::Sequence(request));
        }
        None
    }

    /// Begins to decode.
    pub(super) fn decode(&mut self, request: Request, tokens: f64) {
        self.decoding.push(Reverse(((self.clock + tokens).to_bits(), request)));
    }

    /// Gives up its sequences, each with the tokens that it lacks.
    pub(super) fn give_up(&mut self) -> Vec<(Request, f64)> {
        let clock = self.clock;
        let left = |Reverse((end, request)): Reverse<(u64, Request)>| {
            (request, (f64::from_bits(end) - clock).max(0.0))
        };
        std::mem::take(&mut self.decoding).into_iter().map(left).collect()
    }

    pub(super) fn first_token(&mut self, took: f64) {
        self.ttft[observed::bucket(took)] += 1;
        self.output_tokens += 1.0;
    }

    pub(super) fn counters(&self, spec: &Spec, waiting: u32) -> Counters {
        Counters {
            running: (self.decoding.len() + usize::from(!self.prompts.is_empty())) as u32,
            waiting: self.prompts.len().saturating_sub(1) as u32 + waiting,
            kv_blocks: spec.slots as u64,
            kv_used: self.decoding.len() as u64,
            requests: self.requests,
            finished: self.finished,
            output_tokens: self.output_tokens as u64,
            prompt_tokens: self.prompt_tokens as u64,
            steps: self.steps as u64,
            rows: self.rows as u64,
            busy_us: (self.busy * 1e6) as u64,
            ttft: self.ttft.clone(),
            itl: self.itl.iter().map(|count| *count as u64).collect(),
        }
    }
}
