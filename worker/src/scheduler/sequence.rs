//! One sequence: its tokens, how far their KV is computed, and the blocks that hold it.

use std::time::Duration;

use baton_proto::BlockHash;

use super::limits::Limits;
use super::speculation::Drafts;
use crate::kv::BlockId;
use crate::kv::blocks::Owner;

/// Names a sequence within its engine. Later arrivals have greater ids.
pub type SequenceId = u64;

/// A sequence's place among the others: what is less is served first, and preempted last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// When it arrived, in microseconds, and later by [`Limits::priority_aging`] for each step of
    /// its priority. All age alike, so that this need not change while they wait.
    due: i128,
    id: SequenceId,
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Owns nothing but its place in the queue.
    Waiting,
    /// Its blocks are being filled from a peer. Aborted, it keeps them until the writer is done.
    Pulling {
        /// Nobody wants it any more.
        aborted: bool,
    },
    /// In the batch.
    Running,
    /// Computed, its blocks held for a peer to fetch.
    Held,
}

/// A sequence as it arrives.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its name; greater than that of any sequence before it.
    pub id: SequenceId,
    /// The prompt, and output of an earlier attempt.
    pub tokens: Vec<u32>,
    /// Where its blocks' addresses start: sequences share blocks only when this is equal.
    pub root: BlockHash,
    /// Have a peer compute the prompt when at least this many tokens are not cached here.
    pub pull_from: Option<usize>,
    /// Keep the blocks when it has finished, for a peer.
    pub hold: bool,
    /// Its length, prompt and output, at which it ends at the latest.
    pub longest: usize,
    /// Lower is sooner.
    pub priority: i32,
    /// When it arrived, from any moment on; not before the sequence before it.
    pub arrived: Duration,
    /// Leading positions of which each one's logits are wanted, fewer than `tokens`.
    pub scored: usize,
    /// Whether tokens may be guessed ahead of it.
    pub drafts: bool,
    /// A position whose logits are wanted too, once. It is computed even where its block is known.
    pub probe: Option<usize>,
    /// Everything after the leading positions is computed, and in one step.
    pub undivided: bool,
}

/// A sequence under a scheduler's care.
#[derive(Debug)]
pub struct Sequence {
    pub(super) tokens: Vec<u32>,
    pub(super) computed: usize,
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks whose content is known by its address, or was found by it.
    pub(super) committed: usize,
    pub(super) state: State,
    pub(super) pull_from: Option<usize>,
    pub(super) hold: bool,
    pub(super) longest: usize,
    pub(super) rank: Rank,
    /// Leading positions whose logits are wanted, and how many of them were computed.
    pub(super) scored: usize,
    pub(super) scores: usize,
    /// A position whose logits are wanted too, until they were computed.
    pub(super) probe: Option<usize>,
    /// Whether everything after the leading positions is computed, and in one step.
    pub(super) undivided: bool,
    /// `None` when nothing is guessed ahead.
    pub(super) drafts: Option<Drafts>,
    /// Tokens found in the prefix cache at the first admission.
    pub(super) cached: Option<usize>,
    /// The block of another sequence that this one waits for.
    pub(super) waits_for: Option<BlockHash>,
    root: BlockHash,
    /// Addresses of the leading full blocks; extended as they are needed.
    hashes: Vec<BlockHash>,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, limits: &Limits) -> (SequenceId, Self) {
        let mut tokens = new.tokens;
        // At once: a step allocates nothing. Memory that is not written to is not resident.
        tokens.reserve_exact(new.longest.saturating_sub(tokens.len()));
        let blocks = new.longest.div_ceil(limits.block_size);
        let sequence = Self {
            tokens,
            computed: 0,
            blocks: Vec::with_capacity(blocks),
            committed: 0,
            state: State::Waiting,
            pull_from: new.pull_from,
            hold: new.hold,
            longest: new.longest,
            rank: Rank {
                due: i128::from(new.priority) * limits.priority_aging.as_micros() as i128
                    + new.arrived.as_micros() as i128,
                id: new.id,
            },
            scored: new.scored,
            scores: 0,
            probe: new.probe,
            undivided: new.undivided,
            drafts: Drafts::new(limits.speculation).filter(|_| new.drafts && !new.hold),
            cached: None,
            waits_for: None,
            root: new.root,
            hashes: Vec::with_capacity(blocks),
        };
        (new.id, sequence)
    }

    /// Prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Leading positions whose KV is in the blocks.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Tokens found in the prefix cache when it was admitted.
    pub fn cached(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    /// Tokens whose KV is yet to be computed.
    pub(super) fn todo(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether logits of its prompt are wanted that were not computed yet.
    pub(super) fn scoring(&self) -> bool {
        self.scores < self.scored
    }

    /// Leading positions that may be taken from the prefix cache: the last one is always computed,
    /// because its logits are wanted. So may be others.
    pub(super) fn sharable(&self, limits: &Limits) -> usize {
        match (self.scoring(), self.undivided) {
            (true, _) => 0,
            (false, true) => limits.leading,
            (false, false) => self.probe.unwrap_or(usize::MAX).min(self.tokens.len() - 1),
        }
    }

    /// In whose name its blocks are referenced.
    pub(super) fn owner(&self) -> Owner {
        match self.state {
            State::Pulling { .. } | State::Held => Owner::Handoff,
            State::Waiting | State::Running => Owner::Request,
        }
    }

    /// The addresses of the first `count` blocks, all of them full.
    pub(super) fn hashes(&mut self, count: usize, block_size: usize) -> &[BlockHash] {
        for i in self.hashes.len()..count {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(parent.child(&self.tokens[i * block_size..][..block_size]));
        }
        &self.hashes[..count]
    }
}
