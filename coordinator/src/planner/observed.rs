//! What the planner sees.

use std::fmt;

use baton_proto::v1::WorkerStatus;
use baton_proto::{InstanceRole, LATENCY_US};
use serde::{Serialize, Serializer};

/// A pool: workers that do the same with the same model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolId {
    /// What they do.
    pub role: InstanceRole,
    /// The served name of the model.
    pub model: String,
}

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.model)
    }
}

impl Serialize for PoolId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A pool now.
#[derive(Clone, Debug)]
pub struct PoolSeen {
    /// Which.
    pub pool: PoolId,
    /// Workers that it has or will have in a moment: all but those that were drained by hand.
    pub size: u32,
    /// Workers that answer.
    pub workers: Vec<WorkerSeen>,
    /// How long the last launch took, in seconds.
    pub startup: Option<f64>,
    /// Why its size must not be changed now, if so.
    pub held: Option<String>,
}

/// A worker now.
#[derive(Clone, Debug)]
pub struct WorkerSeen {
    /// Another after each start.
    pub id: String,
    /// What it counted.
    pub counters: Counters,
}

/// Gauges as of now; counters since the worker started. See `WorkerStatus`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// KV blocks.
    pub kv_blocks: u64,
    /// Those of requests and hand-offs.
    pub kv_used: u64,
    /// Sequences that came.
    pub requests: u64,
    /// Sequences that ended.
    pub finished: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Tokens of prompts computed.
    pub prompt_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Tokens of steps that were none of prompts: one for each sequence that decoded.
    pub rows: u64,
    /// Time spent in steps.
    pub busy_us: u64,
    /// First tokens by their time, as [`LATENCY_US`] divides it.
    pub ttft: Vec<u64>,
    /// The tokens after them by theirs.
    pub itl: Vec<u64>,
}

impl From<&WorkerStatus> for Counters {
    fn from(status: &WorkerStatus) -> Self {
        Self {
            running: status.running,
            waiting: status.waiting,
            kv_blocks: status.kv_blocks_total,
            kv_used: status.kv_blocks_requests + status.kv_blocks_handoff,
            requests: status.requests,
            finished: status.finished,
            output_tokens: status.generation_tokens,
            prompt_tokens: status.computed_prompt_tokens,
            steps: status.steps_by_tokens.iter().sum(),
            rows: status.step_tokens.saturating_sub(status.computed_prompt_tokens),
            busy_us: status.busy_us,
            ttft: status.ttft_by_us.clone(),
            itl: status.itl_by_us.clone(),
        }
    }
}

/// The share of times that are within `limit` seconds; those of the bucket in which it lies count
/// by the part below it. `None` when there are none.
pub fn share_within(times: &[u64], limit: f64) -> Option<f64> {
    let total: u64 = times.iter().sum();
    if total == 0 {
        return None;
    }
    let limit = limit * 1e6;
    let within: f64 = times
        .iter()
        .enumerate()
        .map(|(i, &count)| {
            let from = if i == 0 { 0.0 } else { LATENCY_US[i - 1] as f64 };
            let to = LATENCY_US.get(i).map_or(f64::INFINITY, |&to| to as f64);
            count as f64 * ((limit - from) / (to - from)).clamp(0.0, 1.0)
        })
        .sum();
    Some(within / total as f64)
}

/// The bucket of a time in seconds.
pub fn bucket(seconds: f64) -> usize {
    LATENCY_US.partition_point(|&most| (most as f64) < seconds * 1e6)
}
