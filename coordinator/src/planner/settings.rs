//! What an operator sets.

use std::collections::BTreeMap;

use super::observed::PoolId;

/// Latencies that are promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Time to the first token, in seconds.
    pub ttft: f64,
    /// Time between two tokens, in seconds.
    pub itl: f64,
    /// The share of first tokens, and of the tokens after them, that must keep it; below 1.
    pub attainment: f64,
}

/// How large a pool may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Never fewer workers.
    pub min: u32,
    /// Never more.
    pub max: u32,
}

/// How the planner decides.
#[derive(Clone, Debug)]
pub struct PlannerSettings {
    /// What is promised.
    pub slo: Slo,
    /// The pools that it sizes.
    pub pools: BTreeMap<PoolId, Limits>,
    /// Workers of all these pools together.
    pub budget: Option<u32>,
    /// Until the first launch tells how long one takes, in seconds.
    pub startup: f64,
    /// A pool shrinks to the largest size that was wanted in so many seconds.
    pub down_window: f64,
    /// Seconds between two steps down.
    pub cooldown: f64,
    /// Whether workers can go from prefill to decode and back.
    pub convert: bool,
}

impl PlannerSettings {
    /// Settings with these promises and pools, and the rest as the flags have it by default.
    pub fn new(slo: Slo, pools: impl IntoIterator<Item = (PoolId, Limits)>) -> Self {
        Self {
            slo,
            pools: pools.into_iter().collect(),
            budget: None,
            startup: 30.0,
            down_window: 300.0,
            cooldown: 30.0,
            convert: true,
        }
    }

    pub(super) fn limits(&self, pool: &PoolId) -> Option<Limits> {
        self.pools.get(pool).copied()
    }
}
