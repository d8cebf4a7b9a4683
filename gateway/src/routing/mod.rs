//! Which worker takes a request: pure functions over plain numbers.
//!
//! * [`choose`]: the decision.
//! * [`worth_handing_off`]: whether a prefill worker computes its prompt.
//! * [`kv_index`]: what workers say they have cached.
//! * [`prefix_index`]: the guess, for a worker that does not say.
//!
//! A decode worker costs the tokens it would still have to compute, plus the work it already has.
//! Cache hits pull requests with the same prefix together; a bound on the imbalance keeps them
//! from piling up on one worker.

pub mod kv_index;
pub mod prefix_index;

use clap::ValueEnum;

/// By what a worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// By what it has cached of the prompt, its queue and its free KV blocks.
    #[default]
    KvAware,
    /// By its queue alone; those with equal ones take turns, as HAProxy's `leastconn` and nginx's
    /// `least_conn` have it.
    LeastLoaded,
    /// One after the other.
    RoundRobin,
}

/// Tokens that one running request counts for: about what a decode step of it takes from prefill.
const REQUEST_COST: u64 = 64;
/// Requests by which a worker may lead the least loaded one and still be chosen for its cache:
/// this many, or half of the least load if that is more.
const MAX_LEAD: usize = 8;
/// Tokens that may wait at a prefill worker before it counts as swamped, whatever a decode worker
/// has to do: some steps' worth, which are gone in a moment.
const BACKLOG: u64 = 4096;

/// A worker as the router sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Leading prompt tokens that it is believed to have cached.
    pub cached_tokens: usize,
    /// Requests it has: the larger of what it reports and what this gateway has sent.
    pub requests: usize,
    /// Prompt tokens that this gateway has sent it and that are not answered yet.
    pub pending_tokens: u64,
    /// Of these, what prefill workers compute for it.
    pub handed_tokens: u64,
    /// Tokens for which it has KV blocks that no request holds, as it reported last.
    pub free_tokens: usize,
    /// Whether it has just refused a request for want of room.
    pub full: bool,
}

impl Candidate {
    /// The work that it already has, in tokens.
    fn load(&self) -> u64 {
        self.requests as u64 * REQUEST_COST + self.pending_tokens
    }
}

/// The best of `candidates` for a prompt of `prompt_tokens`; `None` when there are none. Those
/// whose queue was full are taken when nobody else is there: it may have room again. `turn` counts
/// the requests: workers that are as good as each other take turns, or the first of an idle pool
/// would fill its cache while the others' stayed empty.
pub fn choose(
    policy: Policy,
    turn: usize,
    prompt_tokens: usize,
    candidates: &[Candidate],
) -> Option<usize> {
    let all_full = candidates.iter().all(|candidate| candidate.full);
    let open = || {
        let eligible = move |candidate: &Candidate| all_full || !candidate.full;
        candidates.iter().enumerate().filter(move |(_, candidate)| eligible(candidate))
    };
    let first = turn % candidates.len().max(1);
    // Places behind the worker whose turn it is.
    let behind = |at: usize| (at + candidates.len() - first) % candidates.len();
    match policy {
        Policy::KvAware => {}
        Policy::LeastLoaded => {
            let load = |candidate: &Candidate| (candidate.requests, candidate.pending_tokens);
            return open().min_by_key(|(at, it)| (load(it), behind(*at))).map(|(at, _)| at);
        }
        Policy::RoundRobin => {
            let count = open().count().max(1);
            return open().nth(turn % count).map(|(at, _)| at);
        }
    }
    let least = open().map(|(_, candidate)| candidate.requests).min()?;
    let bound = least + MAX_LEAD.max(least / 2);
    open()
        .filter(|(_, candidate)| candidate.requests <= bound)
        .min_by_key(|(at, candidate)| {
            let uncached = prompt_tokens.saturating_sub(candidate.cached_tokens) as u64;
            // What finds no room waits until others are done, and takes blocks from the cache.
            let blocked = uncached.saturating_sub(candidate.free_tokens as u64);
            (uncached + candidate.load() + blocked, behind(*at))
        })
        .map(|(at, _)| at)
}

/// Whether `prefill` should compute a prompt for `decode`, both as they were before it came;
/// `missing` tokens of it are not cached at `decode`.
///
/// A decode worker is there for its streams, which stutter while it computes a prompt: it does so
/// only when the prompt would wait at the prefill worker for much longer than it takes here.
pub fn worth_handing_off(prefill: &Candidate, decode: &Candidate, missing: u64) -> bool {
    let here = decode.load().saturating_sub(decode.handed_tokens);
    prefill.load() <= BACKLOG.max(here + 2 * missing)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDLE: Candidate = Candidate {
        cached_tokens: 0,
        requests: 0,
        pending_tokens: 0,
        handed_tokens: 0,
        free_tokens: 100_000,
        full: false,
    };

    fn choose(prompt_tokens: usize, candidates: &[Candidate]) -> Option<usize> {
        super::choose(Policy::KvAware, 0, prompt_tokens, candidates)
    }

    #[test]
    fn a_cached_prefix_attracts_and_load_repels() {
        let cached = Candidate { cached_tokens: 1000, ..IDLE };
        assert_eq!(choose(1200, &[IDLE, cached]), Some(1));
        let busy = Candidate { cached_tokens: 100, requests: 6, ..IDLE };
        assert_eq!(choose(120, &[busy, IDLE]), Some(1));
        let full = Candidate { full: true, ..cached };
        assert_eq!(choose(1200, &[full, IDLE]), Some(1));
        assert_eq!(choose(1200, &[Candidate { full: true, ..IDLE }, full]), Some(1));
        assert_eq!(choose(10, &[]), None);
        let crowded = Candidate { free_tokens: 100, ..IDLE };
        assert_eq!(choose(1200, &[crowded, Candidate { requests: 3, ..IDLE }]), Some(1));
    }

    #[test]
    fn the_other_policies_do_not_look_at_caches() {
        let cached = Candidate { cached_tokens: 1000, requests: 1, ..IDLE };
        let full = Candidate { full: true, ..IDLE };
        let all = [cached, full, IDLE];
        assert_eq!(super::choose(Policy::LeastLoaded, 0, 1200, &all), Some(2));
        assert_eq!(super::choose(Policy::LeastLoaded, 1, 1200, &all), Some(2));
        let turns = (0..4).map(|turn| super::choose(Policy::RoundRobin, turn, 1200, &all));
        assert_eq!(turns.collect::<Vec<_>>(), [Some(0), Some(2), Some(0), Some(2)]);
    }

    #[test]
    fn equals_take_turns() {
        let busy = Candidate { requests: 1, ..IDLE };
        for policy in [Policy::KvAware, Policy::LeastLoaded] {
            let turns = (0..6).map(|turn| super::choose(policy, turn, 1200, &[IDLE; 3]).unwrap());
            assert_eq!(turns.collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
            let turns = (0..6).map(|turn| super::choose(policy, turn, 9, &[IDLE, busy, IDLE]));
            assert!(turns.into_iter().all(|at| at != Some(1)));
        }
    }

    #[test]
    fn a_swamped_prefill_worker_is_not_offered() {
        let swamped = Candidate { requests: 12, pending_tokens: 12_000, ..IDLE };
        assert!(!worth_handing_off(&swamped, &IDLE, 1500));
        assert!(!worth_handing_off(&swamped, &Candidate { requests: 20, ..IDLE }, 1500));
        // What others compute for the decode worker does not keep it from computing.
        let handed =
            Candidate { requests: 12, pending_tokens: 12_000, handed_tokens: 12_000, ..IDLE };
        assert!(!worth_handing_off(&swamped, &handed, 1500));
        // A prompt that takes as long by itself is better computed where nobody is in its way.
        assert!(worth_handing_off(&swamped, &IDLE, 8000));
        // Nor is one gained where others wait as well.
        let busy = Candidate { requests: 9, pending_tokens: 9500, ..IDLE };
        assert!(worth_handing_off(&swamped, &busy, 1500));
    }

    #[test]
    fn ordinary_load_is_handed_off() {
        assert!(worth_handing_off(&IDLE, &IDLE, 0));
        assert!(worth_handing_off(&IDLE, &IDLE, 64));
        // Some prompts before ours, and nobody at the decode worker.
        let some = Candidate { requests: 2, pending_tokens: 3000, ..IDLE };
        assert!(worth_handing_off(&some, &IDLE, 64));
        let many_short = Candidate { requests: 16, pending_tokens: 16 * 150, ..IDLE };
        assert!(worth_handing_off(&many_short, &IDLE, 150));
        // Streams at the decode worker are what the hand-off is for.
        let streams = Candidate { requests: 64, ..IDLE };
        let queue = Candidate { requests: 4, pending_tokens: 5000, ..IDLE };
        assert!(worth_handing_off(&queue, &streams, 600));
    }

    proptest! {
        /// One hot prefix, all requests for it, nobody ever done: still nobody is buried.
        #[test]
        fn the_imbalance_is_bounded(workers in 2usize..8, requests in 1usize..300, prompt in 1usize..4000) {
            let mut all = vec![IDLE; workers];
            all[0].cached_tokens = prompt;
            for _ in 0..requests {
                let at = choose(prompt, &all).unwrap();
                all[at].requests += 1;
                all[at].cached_tokens = prompt;
            }
            let (least, most) = (
                all.iter().map(|c| c.requests).min().unwrap(),
                all.iter().map(|c| c.requests).max().unwrap(),
            );
            prop_assert!(most <= least + MAX_LEAD.max(least / 2) + 1, "{least} {most}");
        }
    }
}
