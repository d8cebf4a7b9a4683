//! The scheduler against a simulated worker: memory that remembers what was written, peers that
//! deliver, fail or dawdle, and clients that leave.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use proptest::prelude::*;

use baton_proto::BlockHash;

use super::*;
use crate::kv::BlockId;
use crate::kv::blocks::Usage;

/// What a block's slot holds: a fingerprint of all tokens up to its own.
fn fingerprint(tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    hasher.finish()
}

#[derive(Clone, Copy, Debug)]
struct Request {
    max_new: usize,
    generated: usize,
    /// A peer's pull of which this many blocks were written.
    written: usize,
    aborted: bool,
    /// Positions of the prompt whose logits are wanted, and how many of them came.
    scored: usize,
    scores: usize,
    /// Another position whose logits are wanted, until they came.
    probe: Option<usize>,
}

/// How a request asks for something.
#[derive(Clone, Copy, Debug, Default)]
struct Wish {
    pull: Option<usize>,
    hold: bool,
    priority: i32,
    scored: bool,
}

struct Simulation {
    limits: Limits,
    scheduler: Scheduler,
    memory: Vec<Option<u64>>,
    requests: BTreeMap<SequenceId, Request>,
    finished: HashSet<SequenceId>,
    next: SequenceId,
    plan: Plan,
    /// Steps are given up after they have written.
    interrupted: bool,
}

impl Simulation {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            scheduler: Scheduler::new(limits),
            memory: vec![None; limits.blocks * limits.block_size],
            requests: BTreeMap::new(),
            finished: HashSet::new(),
            next: 0,
            plan: Plan::default(),
            interrupted: false,
        }
    }

    fn arrive(&mut self, tokens: Vec<u32>, max_new: usize, wish: Wish) {
        let Wish { pull, hold, priority, scored } = wish;
        let max_new = if hold { 1 } else { max_new };
        let leading = self.limits.leading;
        // A sound of its own for each first token.
        let text = tokens.len();
        let tokens = [vec![7 + tokens[0]; leading], tokens].concat();
        let probe = (scored && leading > 0).then_some(leading + text / 2);
        let scored = scored && leading == 0;
        if self.limits.check_fits(tokens.len(), max_new).is_err() {
            return;
        }
        let max_new = max_new.min(self.limits.max_model_len - tokens.len());
        let (id, root) = (self.next, BlockHash::root(""));
        let longest = tokens.len() + max_new;
        self.next += 1;
        let scored = if scored && !hold { tokens.len() - 1 } else { 0 };
        let pull_from = pull.filter(|_| !hold && scored == 0);
        self.scheduler.add(NewSequence {
            id,
            tokens,
            root,
            pull_from,
            hold,
            longest,
            priority,
            arrived: Duration::from_micros(id),
            scored,
            drafts: true,
            probe,
            undivided: priority > 1,
        });
        let request =
            Request { max_new, generated: 0, written: 0, aborted: false, scored, scores: 0, probe };
        self.requests.insert(id, request);
    }

    fn nth(&self, at: usize, state: impl Fn(State) -> bool) -> Option<SequenceId> {
        let ids: Vec<SequenceId> = self
            .requests
            .keys()
            .copied()
            .filter(|id| self.scheduler.get(*id).is_some_and(|seq| state(seq.state())))
            .collect();
        (!ids.is_empty()).then(|| ids[at % ids.len()])
    }

    /// Writes the KV of a position, `drafts` being those that follow the sequence's own tokens.
    fn write(&mut self, id: SequenceId, position: usize, drafts: &[u32]) {
        let seq = self.scheduler.get(id).unwrap();
        let block = seq.blocks()[position / self.limits.block_size];
        for other in self.requests.keys().filter(|other| **other != id) {
            let shared = self.scheduler.get(*other).is_some_and(|o| o.blocks().contains(&block));
            assert!(!shared, "{id} writes block {block} that {other} holds too");
        }
        let slot = block as usize * self.limits.block_size + position % self.limits.block_size;
        let text = [seq.tokens(), drafts].concat();
        self.memory[slot] = Some(fingerprint(&text[..=position]));
    }

    fn unwrite(&mut self, id: SequenceId, position: usize) {
        let block = self.scheduler.get(id).unwrap().blocks()[position / self.limits.block_size];
        let slot = block as usize * self.limits.block_size + position % self.limits.block_size;
        self.memory[slot] = None;
    }

    /// A sequence is to go on elsewhere.
    fn release(&mut self, id: SequenceId) {
        if let Some(positions) = self.scheduler.release(id) {
            assert!(positions < self.scheduler.get(id).unwrap().tokens().len());
            self.check_read(id, positions);
            self.finished.insert(id);
        }
    }

    /// All KV before `end` is that of this very sequence.
    fn check_read(&self, id: SequenceId, end: usize) {
        let seq = self.scheduler.get(id).unwrap();
        for position in 0..end {
            let block = seq.blocks()[position / self.limits.block_size] as usize;
            let slot = block * self.limits.block_size + position % self.limits.block_size;
            let expected = fingerprint(&seq.tokens()[..=position]);
            assert_eq!(self.memory[slot], Some(expected), "sequence {id}, position {position}");
        }
    }

    fn step(&mut self) {
        let mut plan = std::mem::take(&mut self.plan);
        let mut owned: HashSet<BlockId> = HashSet::new();
        for id in self.requests.keys() {
            // Blocks that somebody owns before the step and after it.
            if let Some(seq) = self.scheduler.get(*id)
                && seq.state() != State::Running
            {
                owned.extend(seq.blocks());
            }
        }
        self.scheduler.schedule(&mut plan);
        let leading = self.limits.leading;
        // What goes together may go beyond what a step has left.
        let most = plan.slices.iter().filter(|slice| slice.len > 1).map(|slice| slice.len).max();
        let together = plan.slices.iter().any(|slice| {
            slice.start < leading || self.scheduler.get(slice.id).is_some_and(|it| it.undivided)
        });
        let beyond = if together { most.unwrap_or(0) } else { 0 };
        assert!(plan.tokens() <= self.limits.max_batch_tokens + beyond);
        for slice in &plan.slices {
            assert!(slice.start >= leading || (slice.start == 0 && slice.len >= leading));
        }
        assert!(self.scheduler.load().running <= self.limits.max_running);
        assert!(plan.allocated.iter().all(|block| !owned.contains(block)), "pulled or held");
        assert!(plan.slices.iter().map(|slice| slice.scored).sum::<usize>() <= 64);
        let ids: HashSet<SequenceId> = plan.slices.iter().map(|slice| slice.id).collect();
        assert_eq!(ids.len(), plan.slices.len(), "one slice a sequence");
        for block in &plan.allocated {
            let start = *block as usize * self.limits.block_size;
            self.memory[start..start + self.limits.block_size].fill(None);
        }
        let mut drafts = &plan.drafts[..];
        let mut drafted = BTreeMap::new();
        for slice in plan.slices.iter().filter(|slice| slice.drafted() > 0) {
            let tokens = drafts.split_off(..slice.len).unwrap();
            let seq = self.scheduler.get(slice.id).unwrap();
            assert_eq!((slice.logits, seq.tokens().last()), (slice.len, tokens.first()));
            let Request { max_new, generated, .. } = self.requests[&slice.id];
            assert!(slice.len <= max_new - generated, "more than may come");
            drafted.insert(slice.id, &tokens[1..]);
        }
        assert!(drafts.is_empty());
        for slice in &plan.slices {
            self.check_read(slice.id, slice.start);
            let drafts = drafted.get(&slice.id).copied().unwrap_or_default();
            for position in slice.start..slice.start + slice.len {
                self.write(slice.id, position, drafts);
            }
        }
        if self.interrupted {
            self.plan = plan;
            return;
        }
        self.scheduler.advance(&plan);
        for slice in &plan.slices {
            let seq = self.scheduler.get(slice.id).unwrap();
            assert_eq!(slice.samples(), seq.computed() == seq.tokens().len());
            let request = self.requests.get_mut(&slice.id).unwrap();
            if let Some(at) = slice.probe {
                assert_eq!(request.probe.take(), Some(slice.start + at), "once");
            }
            assert!(!slice.samples() || request.probe.is_none(), "before the output");
            if slice.scored > 0 {
                assert_eq!((slice.logits, seq.cached()), (slice.scored, 0));
                assert_eq!(slice.start + slice.len - slice.scored, request.scores, "in order");
                request.scores += slice.scored;
                continue;
            }
            assert!(!slice.samples() || request.scores == request.scored, "before the output");
            let drafts = drafted.get(&slice.id).copied().unwrap_or_default();
            let mut accepted = 0;
            for row in 0..slice.logits {
                let token = self.sample(slice.id);
                if drafts.get(row) != Some(&token) || self.finished.contains(&slice.id) {
                    break;
                }
                accepted += 1;
                self.scheduler.keep_draft(slice.id);
            }
            if slice.drafted() > 0 {
                self.scheduler.draft_verified(slice.id, drafts.len(), accepted);
            }
        }
        self.plan = plan;
    }

    fn sample(&mut self, id: SequenceId) -> u32 {
        let token = (fingerprint(self.scheduler.get(id).unwrap().tokens()) % 2) as u32;
        self.scheduler.push_token(id, token);
        let request = self.requests.get_mut(&id).unwrap();
        request.generated += 1;
        if request.generated == request.max_new {
            self.scheduler.finish(id);
            self.finished.insert(id);
        }
        token
    }

    /// The peer of a pulled sequence delivers some more blocks, or ends.
    fn pull(&mut self, id: SequenceId, blocks: usize, ends: bool) {
        let seq = self.scheduler.get(id).unwrap();
        let (have, total) = (seq.computed() / self.limits.block_size, seq.blocks().len());
        let len = seq.tokens().len();
        let written = self.requests[&id].written;
        let more = blocks.min(total - have - written);
        for block in have + written..have + written + more {
            let end = ((block + 1) * self.limits.block_size).min(len);
            (block * self.limits.block_size..end)
                .for_each(|position| self.write(id, position, &[]));
        }
        let request = self.requests.get_mut(&id).unwrap();
        request.written += more;
        if !ends {
            return;
        }
        let arrived = request.written;
        let came = (have + arrived) * self.limits.block_size;
        let pulled = match id % 3 {
            // A peer that had a part, and not all of the last block of it.
            0 if arrived > 0 => {
                let part = came.min(len) - 1 - (id as usize / 3) % self.limits.block_size;
                let kept = have * self.limits.block_size;
                (part.max(kept)..came).for_each(|position| self.unwrite(id, position));
                Pulled::Positions(part)
            }
            _ if arrived == total - have => Pulled::All,
            _ => Pulled::Blocks(arrived),
        };
        if self.scheduler.pull_ended(id, pulled) {
            assert!(!self.requests[&id].aborted);
            if pulled == Pulled::All {
                self.requests.get_mut(&id).unwrap().probe = None;
                self.sample(id);
            }
        } else {
            assert!(self.requests[&id].aborted);
        }
    }

    fn abort(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.requests.get_mut(&id).unwrap().aborted = true;
    }

    /// Everything that was asked for is finished, in bounded time, and nothing is kept.
    fn drain(mut self) {
        for _ in 0..20_000 {
            if self.scheduler.is_empty() {
                break;
            }
            self.step();
            if let Some(id) = self.nth(0, |state| matches!(state, State::Pulling { .. })) {
                self.pull(id, 1, id % 3 == 0);
                if id % 3 != 0 {
                    self.pull_to_end(id);
                }
            }
            if let Some(id) = self.nth(0, |state| state == State::Held) {
                self.scheduler.remove(id);
            }
        }
        for (id, request) in &self.requests {
            assert!(request.aborted || self.finished.contains(id), "{id} starved: {request:?}");
        }
        assert!(self.scheduler.is_empty());
        assert_eq!(self.scheduler.load(), Load::default());
        assert_eq!(self.scheduler.in_flight(), 0);
        let Usage { requests, handoff, cached, free } = self.scheduler.usage();
        assert_eq!((requests, handoff, cached + free), (0, 0, self.limits.blocks));
    }

    fn pull_to_end(&mut self, id: SequenceId) {
        if self.scheduler.get(id).is_some() {
            self.pull(id, usize::MAX, true);
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Arrive { prompt: Vec<u32>, max_new: usize, wish: Wish },
    Step,
    Interrupt,
    Abort(usize),
    Pull(usize, usize, bool),
    Release(usize),
    Fetched(usize),
}

fn op() -> impl Strategy<Value = Op> {
    // Few different tokens, so that prompts share prefixes.
    let prompt = prop_oneof![
        prop::collection::vec(0u32..2, 1..24),
        (1usize..40).prop_map(|len| vec![1; len]),
    ];
    let wish = (
        prop::option::of(0usize..8),
        prop::bool::weighted(0.2),
        prop_oneof![Just(0), -2i32..3, any::<i32>()],
        prop::bool::weighted(0.2),
    );
    let wish =
        wish.prop_map(|(pull, hold, priority, scored)| Wish { pull, hold, priority, scored });
    let arrive = (prompt, 1usize..12, wish);
    prop_oneof![
        3 => arrive.prop_map(|(prompt, max_new, wish)| Op::Arrive { prompt, max_new, wish }),
        6 => Just(Op::Step),
        1 => Just(Op::Interrupt),
        1 => any::<usize>().prop_map(Op::Abort),
        2 => (any::<usize>(), 0usize..4, any::<bool>())
            .prop_map(|(at, blocks, ends)| Op::Pull(at, blocks, ends)),
        1 => any::<usize>().prop_map(Op::Release),
        1 => any::<usize>().prop_map(Op::Fetched),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_request_finishes_reads_its_own_kv_and_leaves_nothing(
        block_size in 1usize..6,
        blocks in 4usize..24,
        max_batch_tokens in 1usize..20,
        max_running in 1usize..6,
        speculative in 0usize..6,
        leading in 0usize..4,
        ops in prop::collection::vec(op(), 0..120),
    ) {
        let max_model_len = (block_size * blocks + 1).min(60);
        let mut simulation = Simulation::new(Limits {
            block_size, blocks, max_batch_tokens, max_running, max_waiting: 256, max_model_len, leading: leading * block_size,
            speculation: Speculation { tokens: speculative, ngram_min: 1, ngram_max: 3 },
            priority_aging: Duration::from_micros(5),
        });
        for op in ops {
            match op {
                Op::Arrive { prompt, max_new, wish } => simulation.arrive(prompt, max_new, wish),
                Op::Step => simulation.step(),
                Op::Interrupt => {
                    simulation.interrupted = true;
                    simulation.step();
                    simulation.interrupted = false;
                }
                Op::Abort(at) => {
                    let alive = |state| state != State::Pulling { aborted: true };
                    if let Some(id) = simulation.nth(at, alive) {
                        simulation.abort(id);
                    }
                }
                Op::Pull(at, blocks, ends) => {
                    let pulling = |state| matches!(state, State::Pulling { .. });
                    if let Some(id) = simulation.nth(at, pulling) {
                        simulation.pull(id, blocks, ends);
                    }
                }
                Op::Release(at) => {
                    if let Some(id) = simulation.nth(at, |_| true) {
                        simulation.release(id);
                    }
                }
                Op::Fetched(at) => {
                    if let Some(id) = simulation.nth(at, |state| state == State::Held) {
                        simulation.scheduler.remove(id);
                    }
                }
            }
        }
        simulation.drain();
    }
}

const ROOMY: Limits = Limits {
    block_size: 4,
    blocks: 64,
    max_batch_tokens: 16,
    max_running: 8,
    max_waiting: 4,
    max_model_len: 200,
    leading: 0,
    speculation: Speculation::OFF,
    priority_aging: Duration::from_secs(10),
};

fn new(id: SequenceId, tokens: Vec<u32>) -> NewSequence {
    NewSequence {
        id,
        tokens,
        root: BlockHash::root(""),
        pull_from: None,
        hold: false,
        longest: 200,
        priority: 0,
        arrived: Duration::from_secs(id),
        scored: 0,
        drafts: true,
        probe: None,
        undivided: false,
    }
}

/// One place: each is admitted, gives a token and goes. `arrivals` come at their seconds, one of
/// which passes with each. Gives the ids in the order of admission, with the second of each.
fn served(arrivals: &[(u64, i32)]) -> Vec<(SequenceId, u64)> {
    let mut scheduler = Scheduler::new(Limits { max_running: 1, ..ROOMY });
    let mut plan = Plan::default();
    let mut order = Vec::new();
    let mut coming = (0..).zip(arrivals).peekable();
    for now in 0.. {
        while let Some((id, &(at, priority))) = coming.next_if(|(_, (at, _))| *at <= now) {
            let (arrived, tokens) = (Duration::from_secs(at), vec![id as u32; 3]);
            scheduler.add(NewSequence { priority, arrived, ..new(id, tokens) });
        }
        if scheduler.is_empty() && coming.peek().is_none() {
            break;
        }
        scheduler.schedule(&mut plan);
        scheduler.advance(&plan);
        order.extend(plan.admitted.iter().map(|id| (*id, now)));
        plan.slices.iter().for_each(|slice| scheduler.finish(slice.id));
    }
    order
}

proptest! {
    #[test]
    fn whoever_waits_is_served_by_priority_and_age(
        mut arrivals in prop::collection::vec((0u64..60, -4i32..4), 1..80),
    ) {
        arrivals.sort_by_key(|(at, _)| *at);
        let order = served(&arrivals);
        prop_assert_eq!(order.len(), arrivals.len());
        let due = |id: SequenceId| {
            let (at, priority) = arrivals[id as usize];
            (i64::from(priority) * 10 + at as i64, id)
        };
        for (i, (id, now)) in order.iter().enumerate() {
            for (other, _) in &order[i + 1..] {
                let waited = arrivals[*other as usize].0 <= *now;
                prop_assert!(!waited || due(*id) < due(*other), "{id} before {other} at {now}");
            }
        }
    }

    #[test]
    fn equal_priorities_are_served_as_they_arrive(
        mut seconds in prop::collection::vec(0u64..60, 1..80), priority: i32,
    ) {
        seconds.sort_unstable();
        let arrivals: Vec<_> = seconds.into_iter().map(|at| (at, priority)).collect();
        let order: Vec<SequenceId> = served(&arrivals).into_iter().map(|(id, _)| id).collect();
        prop_assert_eq!(order, (0..arrivals.len() as SequenceId).collect::<Vec<_>>());
    }
}

#[test]
fn a_low_priority_does_not_starve_behind_a_stream_of_high_ones() {
    // Five steps of ten seconds: those that arrive in the first fifty pass it.
    let mut arrivals = vec![(0, 5)];
    arrivals.extend((0..200).map(|at| (at, 0)));
    let order = served(&arrivals);
    let (_, at) = order.iter().find(|(id, _)| *id == 0).unwrap();
    assert_eq!(*at, 50);
}

#[test]
fn nobody_waits_for_blocks_of_one_that_ranks_after() {
    let mut scheduler = Scheduler::new(ROOMY);
    let mut plan = Plan::default();
    let prompt: Vec<u32> = (0..64).collect();
    let pulled = NewSequence { priority: 10, pull_from: Some(1), ..new(0, prompt.clone()) };
    scheduler.add(pulled);
    scheduler.schedule(&mut plan);
    // Its equal waits for what comes; one that is urgent computes it.
    scheduler.add(NewSequence { priority: 10, ..new(1, prompt.clone()) });
    scheduler.add(NewSequence { priority: -5, ..new(2, prompt) });
    scheduler.schedule(&mut plan);
    let states = [0, 1, 2].map(|id| scheduler.get(id).map(Sequence::state));
    let expected = [State::Pulling { aborted: false }, State::Waiting, State::Running];
    assert_eq!(states, expected.map(Some));
}

#[test]
fn what_a_peer_reads_is_held_until_it_is_removed() {
    let mut scheduler = Scheduler::new(ROOMY);
    let mut plan = Plan::default();
    scheduler.add(NewSequence { hold: true, ..new(0, (0..40).collect()) });
    scheduler.schedule(&mut plan);
    scheduler.advance(&plan);
    for _ in 0..2 {
        scheduler.hold(0);
        assert_eq!(scheduler.get(0).map(Sequence::state), Some(State::Held));
        assert!(scheduler.usage().handoff > 0);
    }
    scheduler.remove(0);
    assert!(scheduler.is_empty() && scheduler.usage().handoff == 0);
}

#[test]
fn the_lowest_priority_gives_way_and_of_equal_ones_the_latest() {
    let limits = Limits { blocks: 8, max_model_len: 32, ..ROOMY };
    for (priorities, victim) in [([0, 0, 0], 2), ([0, 1, 0], 1), ([9, 9, -9], 1), ([1, 0, 0], 0)] {
        let mut scheduler = Scheduler::new(limits);
        let mut plan = Plan::default();
        for (id, priority) in (0..).zip(priorities) {
            let tokens = vec![id as u32; 5];
            scheduler.add(NewSequence { priority, longest: 32, ..new(id, tokens) });
        }
        while scheduler.stats().preemptions == 0 {
            scheduler.schedule(&mut plan);
            scheduler.advance(&plan);
            for slice in plan.slices.iter().filter(|slice| slice.samples()) {
                scheduler.push_token(slice.id, 100 + slice.id as u32);
            }
        }
        for id in 0..3 {
            let expected = if id == victim { State::Waiting } else { State::Running };
            assert_eq!(scheduler.get(id).map(Sequence::state), Some(expected), "{priorities:?}");
        }
    }
}

#[test]
fn prompts_that_are_scored_share_the_rows_of_a_step_and_read_no_cache() {
    let mut scheduler =
        Scheduler::new(Limits { max_batch_tokens: 500, max_model_len: 256, ..ROOMY });
    let mut plan = Plan::default();
    scheduler.add(new(0, (0..100).collect()));
    scheduler.schedule(&mut plan);
    scheduler.advance(&plan);
    scheduler.finish(0);
    for id in 1..3 {
        let scored = NewSequence { scored: 99, ..new(id, (0..100).collect()) };
        scheduler.add(scored);
    }
    let rows = |plan: &Plan| -> Vec<_> {
        plan.slices.iter().map(|it| (it.id, it.start, it.len, it.logits, it.scored)).collect()
    };
    let mut seen = Vec::new();
    for _ in 0..5 {
        scheduler.schedule(&mut plan);
        seen.push(rows(&plan));
        scheduler.advance(&plan);
        for slice in plan.slices.iter().filter(|slice| slice.samples()) {
            scheduler.finish(slice.id);
        }
    }
    assert_eq!(seen[0], [(1, 0, 64, 64, 64)]);
    assert_eq!(seen[1], [(1, 64, 35, 35, 35), (2, 0, 29, 29, 29)]);
    assert_eq!(seen[2], [(1, 99, 1, 1, 0), (2, 29, 64, 64, 64)]);
    assert_eq!(seen[3], [(2, 93, 6, 6, 6)]);
    assert_eq!(seen[4], [(2, 99, 1, 1, 0)]);
    assert_eq!(scheduler.stats().prefix_hits, 0);
}

fn slices(plan: &Plan) -> Vec<(SequenceId, usize, usize)> {
    plan.slices.iter().map(|slice| (slice.id, slice.start, slice.len)).collect()
}

#[test]
fn requests_with_one_prompt_compute_it_once() {
    let mut scheduler = Scheduler::new(ROOMY);
    for id in 0..4 {
        scheduler.add(new(id, vec![7; 41]));
    }
    scheduler.add(new(4, vec![8; 2]));
    let mut plan = Plan::default();
    let mut seen = Vec::new();
    for _ in 0..4 {
        scheduler.schedule(&mut plan);
        seen.push(slices(&plan));
        scheduler.advance(&plan);
        for slice in plan.slices.iter().filter(|slice| slice.logits > 0) {
            scheduler.push_token(slice.id, 1);
        }
    }
    // The second to fourth wait for the first; the fifth, which shares nothing, does not.
    assert_eq!(seen[0], [(0, 0, 16)]);
    assert_eq!(seen[1], [(0, 16, 16)]);
    assert_eq!(seen[2], [(0, 32, 9), (4, 0, 2)]);
    // Then each computes the token that is not in a full block.
    assert_eq!(seen[3], [(0, 41, 1), (4, 2, 1), (1, 40, 1), (2, 40, 1), (3, 40, 1)]);
    assert_eq!(scheduler.stats().prefix_hits, 120);
}

#[test]
fn a_decoding_sequence_is_served_before_a_long_prompt_and_the_budget_holds() {
    let mut scheduler = Scheduler::new(ROOMY);
    scheduler.add(new(0, vec![1; 3]));
    let mut plan = Plan::default();
    scheduler.schedule(&mut plan);
    scheduler.advance(&plan);
    scheduler.push_token(0, 5);
    scheduler.add(new(1, (0..40).collect()));
    for start in [0, 15] {
        scheduler.schedule(&mut plan);
        assert_eq!(slices(&plan), [(0, 3 + start / 15, 1), (1, start, 15)]);
        scheduler.advance(&plan);
        scheduler.push_token(0, 5);
    }
}

#[test]
fn the_last_to_arrive_gives_way_when_blocks_run_out() {
    let limits = Limits { blocks: 5, max_model_len: 20, ..ROOMY };
    let mut scheduler = Scheduler::new(limits);
    let mut plan = Plan::default();
    scheduler.add(new(0, vec![1; 8]));
    scheduler.add(new(1, (10..17).collect()));
    while scheduler.stats().preemptions == 0 {
        scheduler.schedule(&mut plan);
        scheduler.advance(&plan);
        for slice in plan.slices.iter().filter(|slice| slice.logits > 0) {
            scheduler.push_token(slice.id, 5);
        }
    }
    assert_eq!(scheduler.get(0).map(Sequence::state), Some(State::Running));
    assert_eq!(scheduler.get(1).map(Sequence::state), Some(State::Waiting));
}

/// Starts sequences whose text repeats, and computes their prompts.
fn repeating(limits: Limits, lengths: &[usize]) -> Scheduler {
    let speculation = Speculation { tokens: 8, ..Speculation::OFF };
    let mut scheduler = Scheduler::new(Limits { speculation, ..limits });
    let mut plan = Plan::default();
    for (id, &len) in (0..).zip(lengths) {
        scheduler.add(new(id, vec![id as u32; len]));
        scheduler.schedule(&mut plan);
        scheduler.advance(&plan);
        plan.slices.iter().for_each(|slice| scheduler.push_token(slice.id, slice.id as u32));
    }
    scheduler
}

#[test]
fn drafts_share_what_a_step_has_left() {
    let mut scheduler = repeating(Limits { max_batch_tokens: 12, ..ROOMY }, &[6, 6, 6]);
    let mut plan = Plan::default();
    scheduler.schedule(&mut plan);
    let lengths: Vec<usize> = plan.slices.iter().map(|slice| slice.len).collect();
    assert_eq!(lengths, [4, 4, 4]);
    assert_eq!(plan.drafts, [[0; 4], [1; 4], [2; 4]].concat());
    // A prompt comes first; what it leaves is guessed with.
    scheduler.add(new(3, (50..57).collect()));
    scheduler.schedule(&mut plan);
    let lengths: Vec<usize> = plan.slices.iter().map(|slice| slice.len).collect();
    assert_eq!(lengths, [2, 2, 1, 7]);
}

#[test]
fn blocks_of_drafts_go_to_whoever_needs_them() {
    // Five blocks of four: each sequence has two, and one is left.
    let limits = Limits { blocks: 5, max_model_len: 20, ..ROOMY };
    let mut scheduler = repeating(limits, &[5, 7]);
    let mut plan = Plan::default();
    scheduler.schedule(&mut plan);
    assert_eq!(slices(&plan), [(0, 6, 6), (1, 7, 1)], "to the ends of their blocks");
    assert_eq!(scheduler.get(0).map(|first| first.blocks().len()), Some(3), "for a draft");
    // Nothing of it is right, and the second sequence grows into a third block.
    scheduler.advance(&plan);
    scheduler.draft_verified(0, 5, 0);
    (0..2).for_each(|id| scheduler.push_token(id, 9));
    scheduler.schedule(&mut plan);
    assert_eq!(slices(&plan), [(0, 7, 1), (1, 8, 1)]);
    assert_eq!(scheduler.get(0).map(|first| first.blocks().len()), Some(2));
    assert_eq!(scheduler.stats().preemptions, 0);
}

#[test]
fn what_can_never_fit_is_refused_and_a_full_queue_says_so() {
    let limits = Limits { blocks: 4, max_model_len: 200, max_running: 2, ..ROOMY };
    assert_eq!(limits.check_fits(0, 1), Err(Refusal::Empty));
    assert!(matches!(limits.check_fits(200, 1), Err(Refusal::ContextLength { .. })));
    // 17 tokens: the last is never computed, so four blocks of four are enough.
    assert_eq!(limits.check_fits(16, 1), Ok(()));
    assert_eq!(limits.check_fits(16, 2), Err(Refusal::KvMemory { needs: 5, has: 4 }));
    let load = |waiting, running| Load { waiting, running };
    assert_eq!(limits.check_queue(load(0, 0), 5), Ok(()), "two places, four may wait");
    assert!(limits.check_queue(load(0, 0), 6).is_err());
    assert_eq!(limits.check_queue(load(0, 2), 3), Ok(()));
    assert!(limits.check_queue(load(0, 2), 4).is_err());
    assert_eq!(limits.check_queue(load(3, 1), 0), Ok(()));
    assert!(limits.check_queue(load(4, 1), 0).is_err(), "the free place needs blocks");
}
