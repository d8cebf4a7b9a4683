//! The decision itself.

use std::collections::{HashMap, VecDeque};

use baton_proto::BlockHash;

use super::limits::{Limits, Load};
use super::sequence::{NewSequence, Rank, Sequence, SequenceId, State};
use crate::kv::BlockId;
use crate::kv::blocks::{BlockManager, Owner, Usage};
use crate::kv::changes::Change;

/// The new tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub id: SequenceId,
    /// Position of the first token to compute.
    pub start: usize,
    /// How many tokens.
    pub len: usize,
    /// Of how many of them, the last ones, the logits are wanted: those of `scored` positions; or
    /// one, where the next token can be sampled, and one more for each drafted token; or none.
    pub logits: usize,
    /// How many of the logits are wanted for themselves, the prompt's own: all or none.
    pub scored: usize,
    /// One of its tokens, counted from `start`, whose logits are wanted too.
    pub probe: Option<usize>,
}

impl Slice {
    /// How many of its tokens, the last ones, are guesses.
    pub fn drafted(&self) -> usize {
        self.logits.saturating_sub(self.scored + 1)
    }

    /// How many are the sequence's own: one where it decodes, more of a prompt.
    pub fn own(&self) -> usize {
        self.len - self.drafted()
    }

    /// Whether the next token can be sampled after it.
    pub fn samples(&self) -> bool {
        self.logits > self.scored
    }
}

/// Logits of prompts computed in one step, in rows: with a vocabulary of 256k, 64 MB of memory.
const SCORED_ROWS: usize = 64;

/// What is left of a step.
struct Budget {
    tokens: usize,
    scored: usize,
}

/// One step. Reused from step to step.
#[derive(Debug, Default)]
pub struct Plan {
    /// What to compute.
    pub slices: Vec<Slice>,
    /// Sequences admitted for the first time.
    pub admitted: Vec<SequenceId>,
    /// Admitted sequences whose blocks are to be filled from their peer.
    pub pulls: Vec<SequenceId>,
    /// Blocks handed out: their old content is void from here on.
    pub allocated: Vec<BlockId>,
    /// All tokens of each slice that has drafted ones, one slice after the other.
    pub drafts: Vec<u32>,
}

impl Plan {
    /// Tokens to compute.
    pub fn tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.len).sum()
    }

    fn clear(&mut self) {
        self.slices.clear();
        self.admitted.clear();
        self.pulls.clear();
        self.allocated.clear();
        self.drafts.clear();
    }
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that gave their blocks back to be computed again.
    pub preemptions: u64,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens found there.
    pub prefix_hits: u64,
    /// Steps of a sequence that were guessed ahead of.
    pub drafts: u64,
    /// Tokens guessed.
    pub draft_tokens: u64,
    /// Those that were right.
    pub accepted_tokens: u64,
    /// Sequences stopped for a peer to go on with.
    pub released: u64,
}

/// What came of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// The peer computed every token, and drew the next one.
    All,
    /// The KV of so many leading positions, or of all if these are fewer: the peer had no more.
    Positions(usize),
    /// So many blocks in order after those that were cached: it was cut short.
    Blocks(usize),
}

/// Sequences, their blocks, and the order in which they are computed.
pub struct Scheduler {
    pub(super) limits: Limits,
    pub(super) blocks: BlockManager,
    pub(super) sequences: HashMap<SequenceId, Sequence>,
    /// In order of rank.
    waiting: VecDeque<SequenceId>,
    /// In order of rank.
    pub(super) running: Vec<SequenceId>,
    pulling: usize,
    held: usize,
    /// Who computes, or pulls, a block that is not yet known by its address.
    in_flight: HashMap<BlockHash, Rank>,
    pub(super) stats: Stats,
    /// Scratch for prefix matches.
    found: Vec<BlockId>,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: BlockManager::new(limits.blocks),
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            pulling: 0,
            held: 0,
            in_flight: HashMap::new(),
            stats: Stats::default(),
            found: Vec::new(),
        }
    }

    /// Puts a sequence that [`Limits::check_fits`] let pass into the queue.
    pub fn add(&mut self, new: NewSequence) {
        let (id, sequence) = Sequence::new(new, &self.limits);
        debug_assert!(self.sequences.keys().all(|earlier| *earlier < id));
        self.sequences.insert(id, sequence);
        self.enqueue(id);
    }

    /// A sequence that is not gone.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// How many wait and how many run.
    pub fn load(&self) -> Load {
        Load { waiting: self.waiting.len(), running: self.running.len() + self.pulling }
    }

    /// How many are held for a peer.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether nothing is left, held blocks included.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Blocks by owner.
    pub fn usage(&self) -> Usage {
        self.blocks.usage()
    }

    /// Blocks that became known by their address, or unknown: see [`BlockManager::changes`].
    pub fn changes(&mut self) -> &mut Vec<Change> {
        self.blocks.changes()
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Decides the next step.
    pub fn schedule(&mut self, plan: &mut Plan) {
        plan.clear();
        self.drop_draft_blocks();
        let preemptions = self.stats.preemptions;
        let mut budget = Budget { tokens: self.limits.max_batch_tokens, scored: SCORED_ROWS };
        self.plan_decodes(plan, &mut budget);
        self.plan_prompts(plan, &mut budget);
        // Whoever just gave blocks up must not take them back at once.
        if self.stats.preemptions == preemptions {
            self.admit(plan, &mut budget);
            self.plan_drafts(plan, budget.tokens);
        }
    }

    /// Notes that a plan was computed. What was drafted counts when it has proved right, see
    /// [`Self::keep_draft`].
    pub fn advance(&mut self, plan: &Plan) {
        for slice in &plan.slices {
            if let Some(sequence) = self.sequences.get_mut(&slice.id) {
                if slice.probe.is_some() {
                    sequence.probe = None;
                }
                sequence.computed = slice.start + slice.own();
                sequence.scores = sequence.scores.max(sequence.computed.min(sequence.scored));
                self.commit(slice.id);
            }
        }
    }

    /// Appends a sampled token to a running sequence.
    pub fn push_token(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// Ends a running sequence: it is held if it came to be fetched, and gone otherwise.
    pub fn finish(&mut self, id: SequenceId) {
        match self.sequences.get_mut(&id) {
            Some(sequence) if sequence.hold && sequence.state == State::Running => {
                for &block in &sequence.blocks {
                    self.blocks.hand_over(block, Owner::Request, Owner::Handoff);
                }
                sequence.state = State::Held;
                self.held += 1;
                self.running.retain(|other| *other != id);
                self.forget_in_flight(id);
            }
            _ => self.remove(id),
        }
    }

    /// Ends a sequence early that came to be fetched: what there is of it is held.
    pub fn hold(&mut self, id: SequenceId) {
        if self.sequences.get(&id).is_some_and(|sequence| sequence.state != State::Held) {
            self.finish(id);
        }
    }

    /// Takes a sequence out, whatever its state. One that is being pulled goes when its pull ends.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        match &mut sequence.state {
            State::Pulling { aborted } => {
                *aborted = true;
                return;
            }
            State::Waiting => self.waiting.retain(|other| *other != id),
            State::Running => self.running.retain(|other| *other != id),
            State::Held => self.held -= 1,
        }
        self.forget(id);
    }

    /// Stops computing a sequence and holds what it has for a peer. Gives the leading positions
    /// whose KV that is; `None` when it cannot be stopped now: it is being pulled, its prompt's own
    /// logits are wanted, or it is held already.
    pub fn release(&mut self, id: SequenceId) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id)?;
        match sequence.state {
            State::Waiting => self.waiting.retain(|other| *other != id),
            State::Running if !sequence.scoring() => {
                for &block in &sequence.blocks {
                    self.blocks.hand_over(block, Owner::Request, Owner::Handoff);
                }
                self.running.retain(|other| *other != id);
            }
            _ => return None,
        }
        let sequence = self.sequences.get_mut(&id)?;
        sequence.state = State::Held;
        let computed = sequence.computed;
        self.held += 1;
        self.stats.released += 1;
        self.forget_in_flight(id);
        Some(computed)
    }

    /// Notes that nobody writes a pulled sequence's blocks any more. Returns whether the sequence
    /// goes on.
    pub fn pull_ended(&mut self, id: SequenceId, pulled: Pulled) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let State::Pulling { aborted } = sequence.state else {
            return false;
        };
        self.pulling -= 1;
        if aborted {
            self.forget(id);
            return false;
        }
        for &block in &sequence.blocks {
            self.blocks.hand_over(block, Owner::Handoff, Owner::Request);
        }
        sequence.state = State::Running;
        let len = sequence.tokens.len();
        // Unless the peer drew the next token, the last one must be computed here, for the logits,
        // and a part of the leading positions is none.
        let part = |came: usize| {
            let came = came.min(sequence.probe.unwrap_or(usize::MAX)).min(len - 1);
            if came < self.limits.leading { 0 } else { came }
        };
        sequence.computed = match pulled {
            Pulled::All => len,
            // What was found here stays, whatever the peer had.
            Pulled::Positions(came) => part(came.max(sequence.committed * self.limits.block_size)),
            Pulled::Blocks(arrived) => {
                part((sequence.committed + arrived) * self.limits.block_size)
            }
        };
        if pulled == Pulled::All {
            // The peer told.
            sequence.probe = None;
        }
        self.join(id);
        self.commit(id);
        true
    }

    /// Puts a sequence among those that wait.
    fn enqueue(&mut self, id: SequenceId) {
        let rank = self.sequences[&id].rank;
        let at = self.waiting.partition_point(|other| self.sequences[other].rank < rank);
        self.waiting.insert(at, id);
    }

    /// Puts a sequence among those that run.
    fn join(&mut self, id: SequenceId) {
        let rank = self.sequences[&id].rank;
        let at = self.running.partition_point(|other| self.sequences[other].rank < rank);
        self.running.insert(at, id);
    }

    /// The next slice of a sequence's tokens that fits, if any.
    fn slice(&self, id: SequenceId, budget: &mut Budget) -> Option<Slice> {
        let sequence = self.sequences.get(&id)?;
        let (start, todo) = (sequence.computed, sequence.todo());
        // What goes together goes with what is left of a step, however little that is.
        let together = match sequence.undivided {
            true => todo,
            false => self.limits.leading.saturating_sub(start),
        };
        let len = match budget.tokens {
            0 => 0,
            tokens => todo.min(tokens.max(together)),
        };
        let mut slice = Slice { id, start, len, logits: 0, scored: 0, probe: None };
        if sequence.scoring() {
            // Logits that were computed before a preemption are not wanted again.
            let known = sequence.scores.saturating_sub(start);
            let wanted = sequence.scored - start - known;
            slice.len = slice.len.min(known + wanted.min(budget.scored));
            slice.scored = slice.len.saturating_sub(known);
            slice.logits = slice.scored;
        } else if slice.len == todo {
            slice.logits = 1;
        }
        slice.probe = sequence.probe.and_then(|at| at.checked_sub(start));
        slice.probe = slice.probe.filter(|at| *at < slice.len);
        budget.tokens = budget.tokens.saturating_sub(slice.len);
        budget.scored -= slice.scored;
        (slice.len > 0).then_some(slice)
    }

    /// One token for each sequence that has its prompt behind it.
    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut Budget) {
        let mut at = 0;
        while let Some(&id) = self.running.get(at)
            && budget.tokens > 0
        {
            let Some(sequence) = self.sequences.get(&id) else {
                break;
            };
            if sequence.todo() != 1 {
                at += 1;
            } else if self.grow(id, plan) {
                plan.slices.extend(self.slice(id, budget));
                at += 1;
            }
        }
    }

    /// The next chunk of each prompt that is being computed.
    fn plan_prompts(&mut self, plan: &mut Plan, budget: &mut Budget) {
        for &id in &self.running {
            if self.sequences.get(&id).is_some_and(|sequence| sequence.todo() > 1) {
                plan.slices.extend(self.slice(id, budget));
            }
        }
    }

    /// Makes room for the next token of a decoding sequence, preempting those that rank after it.
    /// Returns false when it had to give way itself.
    fn grow(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return false;
            };
            if sequence.computed < sequence.blocks.len() * self.limits.block_size {
                return true;
            }
            if let Some(block) = self.blocks.allocate(Owner::Request) {
                sequence.blocks.push(block);
                plan.allocated.push(block);
                continue;
            }
            // Never one whose blocks a peer may be reading. The search ends at `id` itself.
            let victim =
                self.running.iter().rev().find(|other| !self.sequences[*other].hold).copied();
            let victim = victim.unwrap_or(id);
            self.preempt(victim);
            if victim == id {
                return false;
            }
        }
    }

    /// Gives a running sequence's blocks back and queues it by its rank.
    fn preempt(&mut self, id: SequenceId) {
        self.stats.preemptions += 1;
        self.forget_in_flight(id);
        self.running.retain(|other| *other != id);
        self.enqueue(id);
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        self.blocks.release(&sequence.blocks, Owner::Request);
        sequence.blocks.clear();
        (sequence.computed, sequence.committed) = (0, 0);
        sequence.state = State::Waiting;
        sequence.pull_from = None;
    }

    /// Admits waiting sequences in order, until one does not fit.
    fn admit(&mut self, plan: &mut Plan, budget: &mut Budget) {
        let mut at = 0;
        while let Some(&id) = self.waiting.get(at)
            && budget.tokens > 0
            && self.running.len() + self.pulling < self.limits.max_running
        {
            match self.try_admit(id, plan, budget) {
                Admission::Admitted => {
                    self.waiting.remove(at);
                }
                Admission::Later => at += 1,
                Admission::NoRoom => break,
            }
        }
    }

    fn try_admit(&mut self, id: SequenceId, plan: &mut Plan, budget: &mut Budget) -> Admission {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Admission::Admitted;
        };
        // To wait for one that ranks behind would be to wait for all that is before it, too.
        let rank = sequence.rank;
        let owned_before = |owner: &Rank| *owner < rank;
        let waits_for = sequence.waits_for.and_then(|hash| self.in_flight.get(&hash));
        if waits_for.is_some_and(owned_before) {
            return Admission::Later;
        }
        let (len, block_size) = (sequence.tokens.len(), self.limits.block_size);
        let scoring = sequence.scoring();
        if scoring && budget.scored == 0 {
            return Admission::Later;
        }
        let shared = sequence.sharable(&self.limits) / block_size;
        let hashes = sequence.hashes(shared, block_size);
        self.blocks.match_prefix(hashes, &mut self.found);
        if self.found.len() * block_size < self.limits.leading {
            self.found.clear();
        }
        let found = self.found.len();
        let next = hashes.get(found).copied();
        if next.and_then(|hash| self.in_flight.get(&hash)).is_some_and(owned_before) {
            sequence.waits_for = next;
            return Admission::Later;
        }
        let needs = len.div_ceil(block_size) - found;
        let revived = self.found.iter().filter(|block| !self.blocks.in_use(**block)).count();
        // One block of headroom for each that runs, or it would be preempted at its first growth.
        if needs + revived + self.running.len() > self.blocks.available() {
            return Admission::NoRoom;
        }
        let cached = found * block_size;
        let pull = sequence.pull_from.is_some_and(|least| len - cached >= least);
        sequence.state = if pull { State::Pulling { aborted: false } } else { State::Running };
        let owner = sequence.owner();
        self.found.iter().for_each(|block| self.blocks.share(*block, owner));
        sequence.blocks.extend_from_slice(&self.found);
        let fresh = std::iter::from_fn(|| self.blocks.allocate(owner)).take(needs);
        sequence.blocks.extend(fresh);
        plan.allocated.extend_from_slice(&sequence.blocks[found..]);
        (sequence.computed, sequence.committed) = (cached, found);
        sequence.waits_for = None;
        for hash in &sequence.hashes((len - 1) / block_size, block_size)[found..] {
            // Those that rank behind wait for this one from here on.
            let owner = self.in_flight.entry(*hash).or_insert(rank);
            *owner = rank.min(*owner);
        }
        if sequence.cached.is_none() {
            sequence.cached = Some(cached);
            self.stats.prefix_queries += if scoring { 0 } else { len as u64 };
            self.stats.prefix_hits += cached as u64;
            plan.admitted.push(id);
        }
        if pull {
            self.pulling += 1;
            plan.pulls.push(id);
        } else {
            plan.slices.extend(self.slice(id, budget));
            self.join(id);
        }
        Admission::Admitted
    }

    /// Makes the full blocks that have been computed known by their addresses.
    pub(super) fn commit(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let full = sequence.computed / self.limits.block_size;
        for i in sequence.committed..full {
            let hash = sequence.hashes(i + 1, self.limits.block_size)[i];
            self.blocks.commit(sequence.blocks[i], hash);
            if self.in_flight.get(&hash) == Some(&sequence.rank) {
                self.in_flight.remove(&hash);
            }
        }
        sequence.committed = sequence.committed.max(full);
    }

    /// Nobody else need wait for this sequence's blocks.
    fn forget_in_flight(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let blocks = sequence.tokens.len().saturating_sub(1) / self.limits.block_size;
        let (rank, committed) = (sequence.rank, sequence.committed.min(blocks));
        for hash in &sequence.hashes(blocks, self.limits.block_size)[committed..] {
            if self.in_flight.get(hash) == Some(&rank) {
                self.in_flight.remove(hash);
            }
        }
    }

    /// Frees all that a sequence owns.
    fn forget(&mut self, id: SequenceId) {
        self.forget_in_flight(id);
        if let Some(sequence) = self.sequences.remove(&id) {
            self.blocks.release(&sequence.blocks, sequence.owner());
        }
    }
}

enum Admission {
    Admitted,
    /// Another sequence computes its next block right now, or this step's logits of prompts.
    Later,
    NoRoom,
}

#[cfg(test)]
impl Scheduler {
    /// Blocks that are being computed for others to wait for.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}
