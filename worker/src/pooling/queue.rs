//! Texts that wait to be computed: a pure decision over plain data.
//!
//! Calls come in order of priority, then of arrival. A call of many texts does not hold up those
//! that come after it: every text is stamped with the count of tokens before it in its call, from
//! where the clock stood when the call came, and the least stamp goes first. The clock is the
//! latest stamp that was served (self-clocked fair queueing, Golestani 1994), so it moves on with
//! every text: neither many small calls nor few large ones starve the others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use super::{Input, NewCall, Refusal};

/// Names a call.
pub(super) type CallId = u64;

/// Bounds of the queue.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Texts that may wait.
    pub texts: usize,
    /// Tokens of them.
    pub tokens: usize,
    /// A call that has waited this long goes before those of the next lower priority.
    pub priority_aging: Duration,
}

/// What waits.
pub(super) struct Queue {
    limits: Limits,
    waiting: BTreeMap<CallId, Waiting>,
    next_id: CallId,
    texts: usize,
    tokens: usize,
    clock: u64,
}

/// The texts of a call that were not taken yet.
struct Waiting {
    priority: i32,
    arrived: Instant,
    /// The stamp of the next text.
    stamp: u64,
    inputs: Vec<Input>,
    /// How many of them were taken.
    taken: usize,
}

/// A text that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) call: CallId,
    /// Which of the call's texts.
    pub(super) index: usize,
    pub(super) input: Input,
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, waiting: BTreeMap::new(), next_id: 0, texts: 0, tokens: 0, clock: 0 }
    }

    /// How many texts wait.
    pub(super) fn texts(&self) -> usize {
        self.texts
    }

    /// How many tokens they have.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes a call's texts. A call that alone is more than the queue holds is taken when nothing
    /// else waits.
    pub(super) fn push(&mut self, call: &mut NewCall, now: Instant) -> Result<CallId, Refusal> {
        let texts = self.texts + call.inputs.len();
        let tokens = self.tokens + tokens_of(&call.inputs);
        if self.texts > 0 && (texts > self.limits.texts || tokens > self.limits.tokens) {
            return Err(Refusal::Full { texts: self.texts });
        }
        (self.texts, self.tokens) = (texts, tokens);
        self.next_id += 1;
        let waiting = Waiting {
            priority: call.priority,
            arrived: now,
            stamp: self.clock,
            inputs: std::mem::take(&mut call.inputs),
            taken: 0,
        };
        self.waiting.insert(self.next_id, waiting);
        Ok(self.next_id)
    }

    /// Removes what is left of a call.
    pub(super) fn remove(&mut self, call: CallId) {
        if let Some(gone) = self.waiting.remove(&call) {
            let left = &gone.inputs[gone.taken..];
            self.texts -= left.len();
            self.tokens -= tokens_of(left);
        }
    }

    /// Takes texts of at most `budget` tokens together, or one longer text.
    pub(super) fn take(&mut self, budget: usize, now: Instant) -> Vec<Taken> {
        self.take_while(now, |tokens, len| tokens == 0 || tokens + len <= budget)
    }

    /// Takes texts of at most `budget` tokens together; none when the next one is longer.
    pub(super) fn take_within(&mut self, budget: usize, now: Instant) -> Vec<Taken> {
        self.take_while(now, |tokens, len| tokens + len <= budget)
    }

    /// Takes texts as long as `fits` says so, of the tokens taken and those of the next text.
    fn take_while(&mut self, now: Instant, fits: impl Fn(usize, usize) -> bool) -> Vec<Taken> {
        let aging = self.limits.priority_aging.as_nanos().max(1);
        let level = |waiting: &Waiting| {
            let steps = now.saturating_duration_since(waiting.arrived).as_nanos() / aging;
            i64::from(waiting.priority) - i64::try_from(steps).unwrap_or(i64::MAX / 2)
        };
        let mut order: BinaryHeap<_> = self
            .waiting
            .iter()
            .map(|(&id, waiting)| Reverse((level(waiting), waiting.stamp, id)))
            .collect();
        let (mut batch, mut tokens) = (Vec::new(), 0);
        while let Some(Reverse((level, stamp, call))) = order.pop() {
            let Some(waiting) = self.waiting.get_mut(&call) else { break };
            let index = waiting.taken;
            let len = waiting.inputs[index].tokens.len();
            if !fits(tokens, len) {
                break;
            }
            batch.push(Taken { call, index, input: std::mem::take(&mut waiting.inputs[index]) });
            tokens += len;
            self.texts -= 1;
            self.tokens -= len;
            waiting.taken += 1;
            waiting.stamp = stamp + len as u64;
            self.clock = self.clock.max(waiting.stamp);
            match waiting.taken == waiting.inputs.len() {
                true => drop(self.waiting.remove(&call)),
                false => order.push(Reverse((level, waiting.stamp, call))),
            }
        }
        batch
    }
}

fn tokens_of(inputs: &[Input]) -> usize {
    inputs.iter().map(|input| input.tokens.len()).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits =
        Limits { texts: 1000, tokens: 100_000, priority_aging: Duration::from_secs(30) };

    fn call(priority: i32, lengths: &[usize]) -> NewCall {
        let input = |&len: &usize| Input { tokens: vec![7; len], types: Vec::new() };
        NewCall { inputs: lengths.iter().map(input).collect(), priority, ..NewCall::default() }
    }

    fn ids(batch: &[Taken]) -> Vec<(CallId, usize)> {
        batch.iter().map(|taken| (taken.call, taken.index)).collect()
    }

    #[test]
    fn single_texts_come_by_priority_then_arrival() {
        let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
        for priority in [0, 0, -1, 5, 0] {
            queue.push(&mut call(priority, &[10]), now).unwrap();
        }
        let order = ids(&queue.take(1000, now));
        assert_eq!(order, [(3, 0), (1, 0), (2, 0), (5, 0), (4, 0)]);
    }

    #[test]
    fn waiting_counts_as_priority() {
        let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
        queue.push(&mut call(2, &[10]), now).unwrap();
        let later = now + Duration::from_secs(61);
        queue.push(&mut call(1, &[10]), later).unwrap();
        assert_eq!(ids(&queue.take(10, later)), [(1, 0)]);
    }

    #[test]
    fn a_long_call_does_not_hold_up_a_short_one_nor_the_other_way_round() {
        let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
        let long = queue.push(&mut call(0, &[100; 50]), now).unwrap();
        assert_eq!(queue.take(200, now).len(), 2);
        let short = queue.push(&mut call(0, &[10]), now).unwrap();
        let next = ids(&queue.take(200, now));
        assert!(next.contains(&(short, 0)), "{next:?}");
        // Half more short calls than can be served, without end: the long one still goes on.
        let mut served = 0;
        for _ in 0..100 {
            for _ in 0..3 {
                queue.push(&mut call(0, &[50]), now).unwrap();
            }
            served += queue.take(100, now).iter().filter(|taken| taken.call == long).count();
        }
        assert!(served >= 5, "{served} texts of the long call");
    }

    #[test]
    fn a_share_takes_no_text_that_is_longer() {
        let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
        let call = queue.push(&mut call(0, &[40, 60, 101, 10]), now).unwrap();
        assert_eq!(ids(&queue.take_within(100, now)), [(call, 0), (call, 1)]);
        assert_eq!((queue.take_within(100, now).len(), queue.texts(), queue.tokens()), (0, 2, 111));
        assert_eq!(ids(&queue.take(100, now)), [(call, 2)]);
        assert_eq!(ids(&queue.take_within(100, now)), [(call, 3)]);
    }

    #[test]
    fn a_full_queue_refuses_but_takes_any_call_alone() {
        let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
        let large = queue.push(&mut call(0, &[1; 1500]), now).unwrap();
        let refused = queue.push(&mut call(0, &[1]), now).unwrap_err();
        assert_eq!(refused, Refusal::Full { texts: 1500 });
        queue.remove(large);
        assert_eq!((queue.texts(), queue.tokens), (0, 0));
        queue.push(&mut call(0, &[99_990]), now).unwrap();
        assert!(queue.push(&mut call(0, &[20]), now).is_err());
        queue.push(&mut call(0, &[10]), now).unwrap();
    }

    proptest! {
        #[test]
        fn every_text_is_taken_once_in_batches_within_the_budget(
            calls in prop::collection::vec(
                (-2i32..3, prop::collection::vec(1usize..200, 1..20)), 1..20),
            budget in 1usize..400, gone in 1u64..40,
        ) {
            let (mut queue, now) = (Queue::new(LIMITS), Instant::now());
            let mut expected = Vec::new();
            for (priority, lengths) in &calls {
                let id = queue.push(&mut call(*priority, lengths), now).unwrap();
                expected.extend((0..lengths.len()).map(|i| (id, i)));
            }
            queue.remove(gone);
            expected.retain(|(id, _)| *id != gone);
            let mut seen = Vec::new();
            while queue.texts() > 0 {
                let batch = queue.take(budget, now);
                let tokens: usize = batch.iter().map(|taken| taken.input.tokens.len()).sum();
                prop_assert!(!batch.is_empty() && (tokens <= budget || batch.len() == 1));
                seen.extend(ids(&batch));
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, expected);
            prop_assert_eq!((queue.texts, queue.tokens, queue.waiting.len()), (0, 0, 0));
        }
    }
}
