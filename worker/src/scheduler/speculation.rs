//! Drafts: which sequences get some, and how many.
//!
//! A step that computes few rows is bound by reading the weights, so further rows are nearly free:
//! a decoding sequence's token is computed together with a draft of those that may follow, and as
//! many are kept as the sampler draws again (Leviathan et al. 2023, Chen et al. 2023). The rules:
//!
//! * Drafts come last. They take budget that is left after every sequence and prompt has its part,
//!   and blocks that are free, which are given back before the next step is planned. So no sequence
//!   waits or is preempted for a draft.
//! * A step is filled up to [`ROWS`] rows in all, shared out evenly: beyond that rows cost what
//!   they cost.
//! * A sequence whose drafts fail gets shorter ones, and then none for ever more steps ([`Pace`]).

use super::core::{Plan, Scheduler};
use super::drafter::Drafter;
use super::sequence::{Sequence, SequenceId, State};
use crate::kv::blocks::Owner;

/// Rows of a step, drafts among them, beyond which no draft is added.
const ROWS: usize = 16;

/// The most steps without a draft between two that failed.
const LONGEST_WAIT: u32 = 32;

/// How drafts are made.
#[derive(Clone, Copy, Debug)]
pub struct Speculation {
    /// The most drafted tokens of a sequence in a step; 0 is off.
    pub tokens: usize,
    /// The shortest match that a draft is made from.
    pub ngram_min: usize,
    /// The longest match looked for.
    pub ngram_max: usize,
}

impl Speculation {
    /// No drafts.
    pub const OFF: Self = Self { tokens: 0, ngram_min: 2, ngram_max: 4 };
}

/// One sequence's drafts.
#[derive(Debug)]
pub(super) struct Drafts {
    drafter: Drafter,
    pace: Pace,
}

impl Drafts {
    pub(super) fn new(speculation: Speculation) -> Option<Self> {
        (speculation.tokens > 0).then(|| Self {
            drafter: Drafter::new(speculation.ngram_min, speculation.ngram_max),
            pace: Pace::new(speculation.tokens),
        })
    }
}

/// How much to draft, from how the last drafts went.
#[derive(Clone, Copy, Debug)]
struct Pace {
    most: usize,
    length: usize,
    /// Drafts in a row of which nothing was right.
    failed: u32,
    /// Steps without a draft that are left.
    wait: u32,
}

impl Pace {
    fn new(most: usize) -> Self {
        Self { most, length: most, failed: 0, wait: 0 }
    }

    /// Tokens to draft in this step.
    fn next(&mut self) -> usize {
        if self.wait > 0 {
            self.wait -= 1;
            return 0;
        }
        self.length
    }

    fn learn(&mut self, drafted: usize, accepted: usize) {
        if accepted == 0 {
            self.failed += 1;
            self.wait = 1u32.checked_shl(self.failed).map_or(LONGEST_WAIT, |n| n.min(LONGEST_WAIT));
            self.length = (self.length / 2).max(1);
            return;
        }
        self.failed = 0;
        self.length = match accepted == drafted {
            true => (2 * self.length).min(self.most),
            false => accepted,
        };
    }
}

impl Scheduler {
    /// Takes back the blocks that only drafts needed.
    pub(super) fn drop_draft_blocks(&mut self) {
        if self.limits.speculation.tokens == 0 {
            return;
        }
        for id in &self.running {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let needed = sequence.tokens.len().div_ceil(self.limits.block_size);
            if sequence.blocks.len() > needed {
                self.blocks.release(&sequence.blocks[needed..], Owner::Request);
                sequence.blocks.truncate(needed);
            }
        }
    }

    /// Extends the slices of decoding sequences by drafts.
    pub(super) fn plan_drafts(&mut self, plan: &mut Plan, budget: usize) {
        if self.limits.speculation.tokens == 0 {
            return;
        }
        let mut room = budget.min(ROWS.saturating_sub(plan.tokens()));
        let mut rest = plan.slices.len();
        for slice in &mut plan.slices {
            let share = room.div_ceil(rest);
            rest -= 1;
            let Some(sequence) = self.sequences.get_mut(&slice.id) else { continue };
            if slice.len != 1 || !slice.samples() {
                continue;
            }
            let first = plan.drafts.len();
            plan.drafts.push(sequence.tokens[slice.start]);
            sequence.draft(share, &mut plan.drafts);
            let mut len = plan.drafts.len() - first;
            while sequence.blocks.len() * self.limits.block_size < slice.start + len {
                let Some(block) = self.blocks.allocate(Owner::Request) else {
                    len = sequence.blocks.len() * self.limits.block_size - slice.start;
                    break;
                };
                sequence.blocks.push(block);
                plan.allocated.push(block);
            }
            // The token itself is among the sequence's own when no draft follows it.
            plan.drafts.truncate(first + if len > 1 { len } else { 0 });
            (slice.len, slice.logits) = (len, len);
            room -= len - 1;
        }
    }

    /// Notes that the token pushed last had been drafted: its keys and values are there.
    pub fn keep_draft(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.computed += 1;
            self.commit(id);
        }
    }

    /// Notes how a draft went.
    pub fn draft_verified(&mut self, id: SequenceId, drafted: usize, accepted: usize) {
        self.stats.drafts += 1;
        self.stats.draft_tokens += drafted as u64;
        self.stats.accepted_tokens += accepted as u64;
        if let Some(drafts) = self.sequences.get_mut(&id).and_then(|it| it.drafts.as_mut()) {
            drafts.pace.learn(drafted, accepted);
        }
    }
}

impl Sequence {
    /// Appends at most `most` tokens that may come next.
    fn draft(&mut self, most: usize, out: &mut Vec<u32>) {
        // The last token of all is never computed, so never drafted.
        let left = self.longest.saturating_sub(self.tokens.len() + 1);
        let Some(drafts) = &mut self.drafts else { return };
        if self.state != State::Running || self.hold || most.min(left) == 0 {
            return;
        }
        let length = drafts.pace.next().min(most).min(left);
        if length > 0 {
            drafts.drafter.draft(&self.tokens, length, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_ever_less_and_what_succeeds_ever_more() {
        let mut pace = Pace::new(8);
        let mut rows = 0;
        let mut steps = 0;
        for _ in 0..1000 {
            steps += 1;
            let length = pace.next();
            if length > 0 {
                rows += length;
                pace.learn(length, 0);
            }
        }
        assert!(rows * 20 < steps, "{rows} rows in {steps} steps");
        while pace.next() == 0 {}
        for length in [1, 2, 4, 8, 8] {
            assert_eq!(pace.next(), length.min(pace.length));
            pace.learn(pace.length, pace.length);
        }
        assert_eq!(pace.next(), 8);
        pace.learn(8, 3);
        assert_eq!(pace.next(), 3);
    }
}
