//! What happened between two looks at a pool.

use std::collections::HashMap;

use super::capacity::Sample;
use super::observed::{Counters, PoolSeen};

/// Looks for which a worker that is not seen is remembered: it may drain, and be put back.
const REMEMBERED: u64 = 360;

/// The counters of a pool's workers as last seen.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    /// And the number of the look in which each was.
    before: HashMap<String, (u64, Counters)>,
    count: u64,
}

/// A pool between two looks: sums over its workers.
#[derive(Clone, Debug, Default)]
pub struct Interval {
    /// Sequences that came, and that ended.
    pub requests: u64,
    /// See `requests`.
    pub finished: u64,
    /// Tokens generated, and tokens of prompts computed.
    pub output_tokens: u64,
    /// See `output_tokens`.
    pub prompt_tokens: u64,
    /// First tokens, and the tokens after them, by their times.
    pub ttft: Vec<u64>,
    /// See `ttft`.
    pub itl: Vec<u64>,
    /// Seconds spent in steps.
    pub busy: f64,
    /// Sequences that run now, and that wait.
    pub running: u64,
    /// See `running`.
    pub waiting: u64,
    /// KV blocks of a worker, and those in use in all.
    pub kv_blocks: u64,
    /// See `kv_blocks`.
    pub kv_used: u64,
    /// What each worker did.
    pub samples: Vec<Sample>,
}

impl Looks {
    /// The differences to when each worker was seen last. One that was never seen, or that has
    /// started again, has done all of it since the look before, `since` seconds ago, unless it has
    /// computed for longer: then it is not known when.
    pub fn interval(&mut self, seen: &PoolSeen, since: f64) -> Interval {
        let mut sum = Interval::default();
        let none = Counters::default();
        let first = self.count == 0;
        self.count += 1;
        for worker in &seen.workers {
            let counters = &worker.counters;
            sum.running += u64::from(counters.running);
            sum.waiting += u64::from(counters.waiting);
            sum.kv_blocks = sum.kv_blocks.max(counters.kv_blocks);
            sum.kv_used += counters.kv_used;
            let known = self.before.get(&worker.id).map(|(_, before)| before);
            let before = match known.filter(|before| before.busy_us <= counters.busy_us) {
                Some(before) => before,
                None if first || counters.busy_us as f64 / 1e6 > since => counters,
                None => &none,
            };
            add(&mut sum, before, counters);
            self.before.insert(worker.id.clone(), (self.count, counters.clone()));
        }
        let count = self.count;
        self.before.retain(|_, (seen, _)| count - *seen < REMEMBERED);
        sum
    }
}

fn add(sum: &mut Interval, before: &Counters, now: &Counters) {
    let since = |now: u64, before: u64| now.saturating_sub(before);
    sum.requests += since(now.requests, before.requests);
    sum.finished += since(now.finished, before.finished);
    sum.output_tokens += since(now.output_tokens, before.output_tokens);
    let prompt = since(now.prompt_tokens, before.prompt_tokens);
    sum.prompt_tokens += prompt;
    let busy = since(now.busy_us, before.busy_us) as f64 / 1e6;
    sum.busy += busy;
    for (sum, now, before) in
        [(&mut sum.ttft, &now.ttft, &before.ttft), (&mut sum.itl, &now.itl, &before.itl)]
    {
        sum.resize(sum.len().max(now.len()), 0);
        for (i, count) in now.iter().enumerate() {
            sum[i] += since(*count, before.get(i).copied().unwrap_or(0));
        }
    }
    let steps = since(now.steps, before.steps);
    if steps > 0 {
        let rows = since(now.rows, before.rows) as f64;
        let steps = steps as f64;
        sum.samples.push(Sample { steps, rows, prompt: prompt as f64, busy });
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::InstanceRole;

    use super::super::observed::{PoolId, WorkerSeen};
    use super::*;

    #[test]
    fn a_worker_that_was_not_seen_for_a_while_has_not_done_everything_now() {
        let seen = |workers: &[(&str, u64)]| PoolSeen {
            pool: PoolId { role: InstanceRole::Decode, model: "m".into() },
            size: 2,
            workers: workers
                .iter()
                .map(|&(id, requests)| WorkerSeen {
                    id: id.into(),
                    // A second each.
                    counters: Counters {
                        requests,
                        busy_us: requests * 1_000_000,
                        ..Counters::default()
                    },
                })
                .collect(),
            startup: None,
            held: None,
        };
        let mut looks = Looks::default();
        let mut requests = |workers: &[_]| looks.interval(&seen(workers), 10.0).requests;
        assert_eq!(requests(&[("a", 1000), ("b", 2000)]), 0, "nobody knows when");
        assert_eq!(requests(&[("a", 1003)]), 3);
        assert_eq!(requests(&[("a", 1004), ("b", 2009)]), 10, "of two intervals");
        assert_eq!(requests(&[("a", 1004), ("b", 2)]), 2, "it has started again");
        assert_eq!(requests(&[("a", 1004), ("b", 2), ("c", 5)]), 5, "it is new");
        assert_eq!(requests(&[("a", 1004), ("b", 2), ("d", 500)]), 0, "it is not");
    }
}
