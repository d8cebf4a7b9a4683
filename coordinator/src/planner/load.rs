//! What happened between two looks at a pool.

use std::collections::HashMap;

use super::capacity::Sample;
use super::observed::{Counters, PoolSeen};

/// The counters of a pool's workers as last seen.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    before: HashMap<String, Counters>,
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
    /// The differences to the look before. A worker that was not seen then, or that has started
    /// again, has done all of it since.
    pub fn interval(&mut self, seen: &PoolSeen) -> Interval {
        let mut sum = Interval::default();
        let mut now = HashMap::with_capacity(seen.workers.len());
        let none = Counters::default();
        let first = self.before.is_empty();
        for worker in &seen.workers {
            let counters = &worker.counters;
            sum.running += u64::from(counters.running);
            sum.waiting += u64::from(counters.waiting);
            sum.kv_blocks = sum.kv_blocks.max(counters.kv_blocks);
            sum.kv_used += counters.kv_used;
            let before = match self.before.get(&worker.id) {
                Some(before) if before.busy_us <= counters.busy_us => before,
                // The first look does not tell when things were done.
                _ if first => counters,
                _ => &none,
            };
            add(&mut sum, before, counters);
            now.insert(worker.id.clone(), counters.clone());
        }
        self.before = now;
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
