//! The engine's loop: commands in, one step, events out.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::v1::{SpeechCard, Token, WorkerStatus};
use baton_proto::{BlockHash, LATENCY_US, STEP_TOKENS};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tracing::{error, warn};

use super::inbox::{Command, Inbox};
use super::{Event, Finish, NewRequest, PullOrder, Purpose, most_new, scored};
use crate::kv::changes::ChangeLog;
use crate::kv::pool::KvPool;
use crate::lora::Adapter;
use crate::model::{Model, ModelError, SequenceSlice};
use crate::recycle::recycle;
use crate::sampler::{Draw, Sampler, Scratch, probability, score};
use crate::scheduler::{Limits, NewSequence, Plan, Pulled, Scheduler, SequenceId, Slice};

/// The longest sleep: deadlines are looked at this often when nothing else happens.
const NAP: Duration = Duration::from_millis(50);

/// A request in progress.
struct Active {
    events: mpsc::Sender<Event>,
    sampler: Sampler,
    purpose: Purpose,
    adapter: Option<Arc<Adapter>>,
    audio: Option<Bytes>,
    /// [`Purpose::Align`]: tokens before the transcript.
    prompt: usize,
    arrived: Instant,
    deadline: Instant,
    /// [`Purpose::Prefill`]: leading blocks announced as complete.
    announced: usize,
    /// When its last token was drawn; before the first, when it came. `None` after an earlier
    /// attempt, until there is a token.
    last: Option<Instant>,
    /// Whether it has a token.
    begun: bool,
}

/// Times by [`LATENCY_US`].
type Latencies = [u64; LATENCY_US.len() + 1];

/// Where the engine tells how it does: its status, what its cache holds, and its step.
type Told<'a> = (&'a Arc<Mutex<WorkerStatus>>, &'a Arc<ChangeLog>, &'a Arc<Mutex<Option<Instant>>>);

pub(super) struct Running {
    model: Box<dyn Model>,
    pool: Arc<KvPool>,
    limits: Limits,
    eos: Vec<u32>,
    speech: Option<Arc<SpeechCard>>,
    inbox: Arc<Inbox>,
    status: Arc<Mutex<WorkerStatus>>,
    changes: Arc<ChangeLog>,
    /// When the step in progress began.
    began: Arc<Mutex<Option<Instant>>>,
    scheduler: Scheduler,
    requests: HashMap<SequenceId, Active>,
    /// Requests to be released as soon as they can be.
    releasing: Vec<SequenceId>,
    /// From when arrivals are counted.
    start: Instant,
    prompt_tokens: u64,
    generation_tokens: u64,
    /// Steps by the tokens that they computed, and the sum of these: see `WorkerStatus`.
    steps: [u64; STEP_TOKENS.len() + 1],
    step_tokens: u64,
    busy: Duration,
    computed_prompt_tokens: u64,
    arrivals: u64,
    finished: u64,
    ttft: Latencies,
    itl: Latencies,
    logits: Vec<f32>,
    scratch: Scratch,
    /// Empty between steps.
    batch: Vec<SequenceSlice<'static>>,
    /// Why nothing can be computed any more.
    lost: Option<String>,
}

impl Running {
    pub(super) fn new(
        mut model: Box<dyn Model>,
        pool: Arc<KvPool>,
        limits: Limits,
        (eos, speech): (Vec<u32>, Option<Arc<SpeechCard>>),
        inbox: &Arc<Inbox>,
        (status, changes, began): Told<'_>,
    ) -> Self {
        model.set_interrupt(inbox.interrupt());
        Self {
            model,
            pool,
            limits,
            eos,
            speech,
            inbox: inbox.clone(),
            status: status.clone(),
            changes: changes.clone(),
            began: began.clone(),
            scheduler: Scheduler::new(limits),
            requests: HashMap::new(),
            releasing: Vec::new(),
            start: Instant::now(),
            prompt_tokens: 0,
            generation_tokens: 0,
            steps: [0; STEP_TOKENS.len() + 1],
            step_tokens: 0,
            busy: Duration::ZERO,
            computed_prompt_tokens: 0,
            arrivals: 0,
            finished: 0,
            ttft: [0; LATENCY_US.len() + 1],
            itl: [0; LATENCY_US.len() + 1],
            logits: Vec::new(),
            scratch: Scratch::default(),
            batch: Vec::new(),
            lost: None,
        }
    }

    /// Runs until it is stopped, or what computes is lost: then it says why.
    pub(super) fn run(mut self) -> Option<String> {
        let mut plan = Plan::default();
        let mut interrupted = false;
        let mut idle = true;
        self.publish();
        loop {
            let batch = self.inbox.take(idle.then(|| Instant::now() + NAP));
            if batch.stopping {
                let all: Vec<SequenceId> = self.requests.keys().copied().collect();
                all.into_iter().for_each(|id| self.end(id, Finish::Stopping));
                for command in batch.commands {
                    if let Command::Add { events, .. } = command {
                        // An error: nobody waits for it.
                        let _ = events.try_send(Event::Finished(Finish::Stopping));
                    }
                }
                self.publish();
                // Sequences that peers fetch, or are being pulled, end with the process.
                let mut status = self.status.lock();
                (status.running, status.waiting, status.held) = (0, 0, 0);
                drop(status);
                return self.lost;
            }
            batch.commands.into_iter().for_each(|command| self.apply(command));
            self.enforce_deadlines();
            self.release();
            self.scheduler.schedule(&mut plan);
            // Before anything is written: what peers may still copy of these blocks is void.
            plan.allocated.iter().for_each(|&block| self.pool.renew(block));
            self.announce_admissions(&plan);
            self.publish();
            idle = plan.slices.is_empty();
            let prompts = plan.slices.iter().filter(|slice| slice.own() > 1 && !interrupted);
            if !self.inbox.open_step(self.scheduler.load(), prompts.map(|slice| slice.id)) {
                // An abort came in that makes a part of this step pointless.
                idle = false;
                interrupted = true;
                continue;
            }
            interrupted = false;
            if !idle {
                *self.began.lock() = Some(Instant::now());
                interrupted = self.step(&plan);
                *self.began.lock() = None;
            }
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Add { id, request, events, arrived } => {
                self.add(id, *request, events, arrived)
            }
            Command::Abort(id) => {
                self.forget(id);
                self.scheduler.remove(id);
            }
            Command::Release(id) => self.releasing.push(id),
            Command::PullEnded { id, mut pulled, mut first } => {
                // A first token that the model does not have would fail the next step, for all in it.
                if let Some(token) = first.take_if(|token| token.id as usize >= self.vocab()) {
                    warn!(id, token = token.id, "a peer's token is outside the vocabulary");
                    pulled = Pulled::Positions(usize::MAX);
                }
                let goes_on = self.scheduler.pull_ended(id, pulled);
                if let (true, Some(token)) = (goes_on, first) {
                    if let Some(active) = self.requests.get_mut(&id) {
                        active.sampler.record(token.id);
                    }
                    self.accept(id, token);
                }
            }
        }
    }

    fn add(
        &mut self,
        id: SequenceId,
        request: NewRequest,
        events: mpsc::Sender<Event>,
        arrived: Instant,
    ) {
        let scored = scored(&request);
        let NewRequest {
            prompt,
            audio,
            output,
            mut sampling,
            salt,
            adapter,
            purpose,
            deadline,
            constraint,
            priority,
            returning: _,
        } = request;
        let root = BlockHash::root(&salt);
        let root = adapter.as_ref().map_or(root, |adapter| root.with_adapter(adapter.digest()));
        let root = audio.as_ref().map_or(root, |samples| root.with_audio(samples));
        let new = most_new(&sampling, output.len(), purpose);
        let rules = sampling.speech.take().zip(self.speech.clone());
        let mut sampler = Sampler::new(sampling, &self.eos, &prompt, &output);
        if let Some((rules, card)) = rules {
            sampler.follow(&rules, card, &output);
        }
        let leading = self.limits.leading;
        let undivided = purpose == Purpose::Align;
        // Where it is told whether anybody speaks: once, before the first token.
        let probing = !undivided && output.is_empty();
        let probe = self.speech.as_ref().filter(|_| probing).and_then(|card| {
            let start = prompt.iter().rposition(|token| *token == card.start_of_transcript);
            start.map(|at| leading + at)
        });
        let before = prompt.len();
        // Every next token of a constrained sequence would have to be waited for: nothing is
        // guessed ahead of it.
        let drafts = constraint.is_none() && !undivided;
        if let Some(constraint) = constraint {
            sampler.constrain(constraint.session(&output));
        }
        // The positions of the sound have no tokens; the chain's root tells what they hold.
        let mut tokens = vec![0; leading];
        tokens.extend(prompt);
        tokens.extend(&output);
        let (pull_from, hold) = match purpose {
            Purpose::Generate { pull_from } => (pull_from.filter(|_| scored == 0), false),
            Purpose::Prefill => (None, true),
            Purpose::Align => (None, false),
        };
        let longest = tokens.len().saturating_add(new).min(self.limits.max_model_len);
        let arrived_at = arrived.saturating_duration_since(self.start);
        self.scheduler.add(NewSequence {
            id,
            tokens,
            root,
            pull_from,
            hold,
            longest,
            priority,
            arrived: arrived_at,
            scored,
            drafts,
            probe,
            undivided,
        });
        let active = Active {
            events,
            sampler,
            purpose,
            adapter,
            audio,
            prompt: before,
            arrived,
            deadline,
            announced: 0,
            last: output.is_empty().then_some(arrived),
            begun: false,
        };
        self.arrivals += u64::from(output.is_empty());
        self.requests.insert(id, active);
    }

    fn enforce_deadlines(&mut self) {
        let now = Instant::now();
        let late: Vec<SequenceId> = self
            .requests
            .iter()
            .filter(|(_, active)| active.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        late.into_iter().for_each(|id| self.end(id, Finish::Deadline));
    }

    /// Stops the requests that are to be released, and tells where their blocks are. From then on
    /// they are their handles' alone, whatever their deadline: a peer may be reading.
    fn release(&mut self) {
        let mut releasing = std::mem::take(&mut self.releasing);
        releasing.retain(|&id| {
            if !self.requests.contains_key(&id) {
                return false;
            }
            let Some(positions) = self.scheduler.release(id) else { return true };
            let blocks = self.scheduler.get(id).map_or(&[][..], |sequence| sequence.blocks());
            let filled = &blocks[..positions.div_ceil(self.limits.block_size)];
            let blocks = filled.iter().map(|&block| (block, self.pool.generation(block))).collect();
            self.send(id, Event::Released { positions, blocks });
            self.forget(id);
            false
        });
        self.releasing = releasing;
    }

    fn announce_admissions(&mut self, plan: &Plan) {
        for &id in &plan.admitted {
            let Some(active) = self.requests.get(&id) else { continue };
            let Some(sequence) = self.scheduler.get(id) else { continue };
            self.prompt_tokens += (sequence.tokens().len() - self.limits.leading) as u64;
            let (cached, waited) = (sequence.cached(), active.arrived.elapsed());
            self.send(id, Event::Admitted { cached, waited });
            // Cached blocks are complete already.
            self.announce_blocks(id, false);
        }
        for &id in &plan.pulls {
            let Some(sequence) = self.scheduler.get(id) else { continue };
            let order = PullOrder {
                id,
                blocks: sequence.blocks().to_vec(),
                cached: sequence.computed() / self.limits.block_size,
                arrived: 0,
                first: None,
                positions: None,
                in_part: false,
                pool: self.pool.clone(),
                inbox: self.inbox.clone(),
            };
            // If nobody listens, dropping the order ends the pull.
            self.send(id, Event::Pull(order));
        }
    }

    /// Tells a peer which blocks are complete: the full ones, and with `all` the last one too.
    fn announce_blocks(&mut self, id: SequenceId, all: bool) {
        let Some(active) = self.requests.get_mut(&id) else { return };
        let Some(sequence) = self.scheduler.get(id) else { return };
        if active.purpose != Purpose::Prefill {
            return;
        }
        let complete = match all {
            true => sequence.blocks().len(),
            false => sequence.computed() / self.limits.block_size,
        };
        let first = active.announced;
        if complete > first {
            active.announced = complete;
            let blocks = sequence.blocks()[first..complete]
                .iter()
                .map(|&block| (block, self.pool.generation(block)))
                .collect();
            self.send(id, Event::Blocks { first, blocks });
        }
    }

    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    /// Computes a plan. True when it was interrupted: then nothing has changed.
    fn step(&mut self, plan: &Plan) -> bool {
        let (scheduler, requests) = (&self.scheduler, &self.requests);
        let mut drafts = &plan.drafts[..];
        let mut batch: Vec<SequenceSlice<'_>> = recycle(std::mem::take(&mut self.batch));
        batch.extend(plan.slices.iter().filter_map(|slice| {
            let drafted = take_drafts(&mut drafts, slice);
            let sequence = scheduler.get(slice.id)?;
            let active = requests.get(&slice.id);
            let adapter = active.and_then(|active| active.adapter.as_deref());
            let audio = active.and_then(|active| active.audio.as_deref());
            let align = active.filter(|active| active.purpose == Purpose::Align);
            let own = || &sequence.tokens()[slice.start..slice.start + slice.len];
            Some(SequenceSlice {
                start: slice.start,
                tokens: drafted.unwrap_or_else(own),
                blocks: sequence.blocks(),
                logits: slice.logits,
                adapter,
                audio,
                probe: slice.probe,
                align: align.map(|active| active.prompt),
            })
        }));
        let (model, logits) = (&mut self.model, &mut self.logits);
        let since = Instant::now();
        let pass = catch_unwind(AssertUnwindSafe(|| model.forward(&batch, &self.pool, logits)));
        self.batch = recycle(batch);
        self.busy += since.elapsed();
        let failure = match pass {
            Ok(Ok(())) => None,
            Ok(Err(ModelError::Interrupted)) => return true,
            Ok(Err(ModelError::Lost(reason))) => {
                error!(reason, "nothing can be computed any more");
                self.lost = Some(reason);
                // Requests are given up, and computed elsewhere.
                self.inbox.stop();
                return false;
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the forward pass panicked".to_owned()),
        };
        if let Some(failure) = failure {
            error!(failure, requests = plan.slices.len(), "a step failed");
            for slice in &plan.slices {
                self.end(slice.id, Finish::Failed(failure.clone()));
            }
            return false;
        }
        self.scheduler.advance(plan);
        let tokens = plan.tokens();
        self.steps[STEP_TOKENS.partition_point(|&most| (most as usize) < tokens)] += 1;
        self.step_tokens += tokens as u64;
        let own = plan.slices.iter().map(Slice::own);
        self.computed_prompt_tokens += own.filter(|own| *own > 1).sum::<usize>() as u64;
        let vocab = self.vocab();
        let mut logits = std::mem::take(&mut self.logits);
        let (mut rows, mut drafts) = (&mut logits[..], &plan.drafts[..]);
        for slice in &plan.slices {
            if slice.probe.is_some() {
                let row = rows.split_off_mut(..vocab).unwrap_or_default();
                self.probe(slice.id, row);
            }
            let own = rows.split_off_mut(..slice.logits * vocab).unwrap_or_default();
            match take_drafts(&mut drafts, slice) {
                None if slice.scored > 0 => self.score(slice, own.chunks_exact(vocab)),
                None if slice.logits == 0 => self.announce_blocks(slice.id, false),
                None => self.after(slice, own),
                Some(tokens) => self.verify(slice.id, own.chunks_exact_mut(vocab), &tokens[1..]),
            }
        }
        self.logits = logits;
        false
    }

    /// Goes on with one sequence after the last of its tokens was computed.
    fn after(&mut self, slice: &Slice, logits: &mut [f32]) {
        let Some(active) = self.requests.get_mut(&slice.id) else { return };
        let purpose = active.purpose;
        if purpose == Purpose::Align {
            let aligned = self.model.aligned();
            if let Some(aligned) = aligned {
                self.send(slice.id, Event::Aligned(aligned));
            }
            return self.end(slice.id, Finish::Length);
        }
        let Some(token) = self.draw(slice.id, logits) else { return };
        match purpose {
            Purpose::Generate { .. } => {
                self.accept(slice.id, token);
            }
            Purpose::Prefill => {
                self.announce_blocks(slice.id, true);
                self.time(slice.id);
                self.send(slice.id, Event::Token(token));
                self.send(slice.id, Event::Finished(Finish::Length));
                // Its blocks are kept until the handle is dropped.
                self.scheduler.finish(slice.id);
            }
            Purpose::Align => {}
        }
    }

    /// Tells how likely it is that nobody speaks, by the logits after the start of the transcript.
    fn probe(&mut self, id: SequenceId, logits: &[f32]) {
        if let Some(card) = &self.speech {
            self.send(id, Event::NoSpeech(probability(logits, card.no_speech)));
        }
    }

    /// Draws a sequence's next token, or ends it where there is none.
    fn draw(&mut self, id: SequenceId, logits: &mut [f32]) -> Option<Token> {
        let active = self.requests.get_mut(&id)?;
        match active.sampler.draw(logits, &mut self.scratch) {
            Draw::Token(token) => return Some(token),
            Draw::Over => self.end(id, Finish::Stop(None)),
            Draw::Stuck(reason) => self.end(id, Finish::Stuck(reason)),
            Draw::NotANumber => {
                let reason = "the model computed what is no number".to_owned();
                self.end(id, Finish::Failed(reason));
            }
        }
        None
    }

    /// Gives out how likely the prompt's tokens after these positions were.
    fn score<'a>(&mut self, slice: &Slice, rows: impl Iterator<Item = &'a [f32]>) {
        let Some(active) = self.requests.get(&slice.id) else { return };
        let Some(sequence) = self.scheduler.get(slice.id) else { return };
        let count = active.sampler.params().prompt_logprobs.unwrap_or(0) as usize;
        let end = slice.start + slice.len;
        let tokens = &sequence.tokens()[end - slice.scored + 1..=end];
        let scratch = &mut self.scratch;
        let scores = rows.zip(tokens).map(|(row, &token)| score(row, token, count, scratch));
        let scores = scores.collect();
        self.send(slice.id, Event::Prompt(scores));
    }

    /// Draws tokens for as long as they are those that were drafted, so that they are the same as
    /// without drafts: each is drawn from the logits after all tokens before it.
    fn verify<'a>(
        &mut self,
        id: SequenceId,
        rows: impl Iterator<Item = &'a mut [f32]>,
        drafts: &[u32],
    ) {
        let mut accepted = 0;
        for (i, row) in rows.enumerate() {
            let Some(token) = self.draw(id, row) else { break };
            let right = drafts.get(i) == Some(&token.id);
            accepted += usize::from(right);
            if !self.accept(id, token) || !right {
                break;
            }
            self.scheduler.keep_draft(id);
        }
        self.scheduler.draft_verified(id, drafts.len(), accepted);
    }

    /// Gives out a token and ends the sequence or continues it. True when it goes on.
    fn accept(&mut self, id: SequenceId, token: Token) -> bool {
        let token_id = token.id;
        let Some(active) = self.requests.get(&id) else { return false };
        let sampler = &active.sampler;
        let positions = self.scheduler.get(id).map_or(0, |sequence| sequence.tokens().len()) + 1;
        let finish = if sampler.ends_with(token_id) {
            let stops = &sampler.params().stop_token_ids;
            Some(Finish::Stop(stops.contains(&token_id).then_some(token_id)))
        } else if sampler.drawn() >= sampler.params().max_tokens
            || positions >= self.limits.max_model_len
        {
            Some(Finish::Length)
        } else {
            None
        };
        self.generation_tokens += 1;
        self.time(id);
        self.send(id, Event::Token(token));
        let goes_on = finish.is_none();
        match finish {
            Some(finish) => self.end(id, finish),
            None => self.scheduler.push_token(id, token_id),
        }
        goes_on
    }

    fn send(&self, id: SequenceId, event: Event) {
        // The channel holds every event there can be; a closed one means an abort is on its way.
        if let Some(active) = self.requests.get(&id)
            && let Err(mpsc::error::TrySendError::Full(event)) = active.events.try_send(event)
        {
            warn!(id, ?event, "an event did not fit");
        }
    }

    fn end(&mut self, id: SequenceId, finish: Finish) {
        // A peer may be reading what was announced: that is freed when the handle is dropped.
        let announced = self.requests.get(&id).is_some_and(|active| active.announced > 0);
        self.send(id, Event::Finished(finish));
        self.forget(id);
        match announced {
            true => self.scheduler.hold(id),
            false => self.scheduler.remove(id),
        }
    }

    fn forget(&mut self, id: SequenceId) {
        self.finished += u64::from(self.requests.remove(&id).is_some());
    }

    /// Counts how long a sequence's next token took.
    fn time(&mut self, id: SequenceId) {
        let Some(active) = self.requests.get_mut(&id) else { return };
        let now = Instant::now();
        let begun = std::mem::replace(&mut active.begun, true);
        if let Some(last) = active.last.replace(now) {
            let took = now.saturating_duration_since(last).as_micros() as u64;
            let times = if begun { &mut self.itl } else { &mut self.ttft };
            times[LATENCY_US.partition_point(|&most| most < took)] += 1;
        }
    }

    fn publish(&mut self) {
        self.changes.append(self.scheduler.changes());
        let (load, usage, stats) =
            (self.scheduler.load(), self.scheduler.usage(), self.scheduler.stats());
        let mut status = self.status.lock();
        status.running = load.running as u32;
        status.waiting = load.waiting as u32;
        status.max_waiting = self.limits.max_waiting as u32;
        status.kv_blocks_total = self.pool.blocks() as u64;
        status.kv_blocks_requests = usage.requests as u64;
        status.kv_blocks_handoff = usage.handoff as u64;
        status.kv_blocks_cached = usage.cached as u64;
        status.held = self.scheduler.held() as u32;
        status.released = stats.released;
        status.preemptions = stats.preemptions;
        status.prompt_tokens = self.prompt_tokens;
        status.generation_tokens = self.generation_tokens;
        status.prefix_cache_queries = stats.prefix_queries;
        status.prefix_cache_hits = stats.prefix_hits;
        status.spec_decode_drafts = stats.drafts;
        status.spec_decode_draft_tokens = stats.draft_tokens;
        status.spec_decode_accepted_tokens = stats.accepted_tokens;
        // In place: a step allocates nothing.
        status.steps_by_tokens.resize(self.steps.len(), 0);
        status.steps_by_tokens.copy_from_slice(&self.steps);
        status.step_tokens = self.step_tokens;
        status.busy_us = self.busy.as_micros() as u64;
        status.computed_prompt_tokens = self.computed_prompt_tokens;
        status.requests = self.arrivals;
        status.finished = self.finished;
        status.ttft_by_us.resize(self.ttft.len(), 0);
        status.ttft_by_us.copy_from_slice(&self.ttft);
        status.itl_by_us.resize(self.itl.len(), 0);
        status.itl_by_us.copy_from_slice(&self.itl);
        status.constrained_tokens = self.scratch.constrained;
        status.constraint_wait_us = self.scratch.waited.as_micros() as u64;
    }
}

/// The tokens of a slice some of which are drafted; `None` when they are the sequence's own.
fn take_drafts<'a>(drafts: &mut &'a [u32], slice: &Slice) -> Option<&'a [u32]> {
    if slice.drafted() > 0 { drafts.split_off(..slice.len) } else { None }
}
