//! How many workers pools should have, from their load and the latencies that are promised.
//!
//! * [`observed`]: what the planner sees: counters that workers keep since their start.
//! * [`load`]: what happened between two looks.
//! * [`forecast`]: how many requests will come when a worker started now is ready.
//! * [`capacity`]: what a worker does, learned from what workers did.
//! * [`sizing`]: the smallest pool that keeps the promise.
//! * [`steady`]: up fast, down slowly.
//! * [`run`]: the leader's loop: look, decide, ask for an operation.
//!
//! All but `run` is a pure decision: [`Planner::observe`] has no clock and does no I/O, so that a
//! simulator (`tests/src/sim`) drives the very same code.

pub mod capacity;
pub mod forecast;
pub mod load;
pub mod observed;
mod pool;
pub mod run;
pub mod settings;
pub mod sizing;
pub mod steady;

use std::collections::BTreeMap;

use baton_proto::InstanceRole;
use serde::Serialize;

pub use observed::{Counters, PoolId, PoolSeen, WorkerSeen};
pub use pool::PoolDecision;
pub use settings::{Limits, PlannerSettings, Slo};

use pool::PoolPlanner;

/// Decides how large pools should be.
#[derive(Clone, Debug)]
pub struct Planner {
    settings: PlannerSettings,
    pools: BTreeMap<PoolId, PoolPlanner>,
}

/// What the planner wants of all pools, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// When, in milliseconds of the clock that `observe` was given.
    pub at_ms: u64,
    /// One for each pool seen that has limits.
    pub pools: Vec<PoolDecision>,
}

impl Planner {
    /// A planner that knows nothing yet.
    pub fn new(settings: PlannerSettings) -> Self {
        Self { settings, pools: BTreeMap::new() }
    }

    /// Decides, from what is seen now and what was seen before. `now_ms` must not go back; pools
    /// without limits are left alone.
    pub fn observe(&mut self, now_ms: u64, pools: &[PoolSeen]) -> Decision {
        let settings = &self.settings;
        let limited = pools.iter().filter_map(|seen| Some((seen, settings.limits(&seen.pool)?)));
        let wishes: Vec<_> = limited
            .map(|(seen, limits)| {
                let planner = self.pools.entry(seen.pool.clone()).or_default();
                (seen, limits, planner.wish(now_ms, seen, limits, settings))
            })
            .collect();
        let sizes: Vec<(u32, u32)> =
            wishes.iter().map(|(_, limits, wish)| (limits.min, wish.size)).collect();
        let sizes = within_budget(&sizes, self.settings.budget);
        let decided = wishes.into_iter().zip(sizes).map(|((seen, limits, wish), size)| {
            let planner = self.pools.entry(seen.pool.clone()).or_default();
            planner.decide(now_ms, seen, limits, wish, size, &self.settings)
        });
        let mut pools: Vec<PoolDecision> = decided.collect();
        if self.settings.convert {
            convert(&mut pools);
        }
        if let Some(budget) = self.settings.budget {
            hold_back(&mut pools, budget);
        }
        Decision { at_ms: now_ms, pools }
    }
}

/// Has a pool that is to grow take what the other of prefill and decode has to spare. They serve in
/// seconds, where new workers have to start; the rest is launched when they do, if still needed.
fn convert(pools: &mut [PoolDecision]) {
    for i in 0..pools.len() {
        let other = match pools[i].pool.role {
            InstanceRole::Prefill => InstanceRole::Decode,
            InstanceRole::Decode => InstanceRole::Prefill,
            _ => continue,
        };
        let from = PoolId { role: other, model: pools[i].pool.model.clone() };
        let Some(donor) = pools.iter().position(|it| it.pool == from) else { continue };
        let count = pools[i].target.saturating_sub(pools[i].size).min(pools[donor].spare);
        if count == 0 {
            continue;
        }
        let pool = &mut pools[i];
        pool.target = pool.size + count;
        pool.reason += &format!("; {count} of them from {from}, which can spare them");
        pool.donor = Some(from);
        let (to, donor) = (pool.pool.clone(), &mut pools[donor]);
        donor.target = donor.size;
        donor.spare -= count;
        donor.reason = format!("{count} go to {to}");
    }
}

/// Lets pools grow only by what is left of the budget now: others may shrink later than they grow.
fn hold_back(pools: &mut [PoolDecision], budget: u32) {
    let used: u32 = pools.iter().map(|pool| pool.size).sum();
    let mut left = budget.saturating_sub(used);
    let grows = |pool: &&mut PoolDecision| pool.target > pool.size && pool.donor.is_none();
    for pool in pools.iter_mut().filter(grows) {
        let more = (pool.target - pool.size).min(left);
        if more < pool.target - pool.size {
            pool.target = pool.size + more;
            pool.reason += "; other pools have the rest of the budget";
        }
        left -= more;
    }
}

/// What pools get of a budget: what each needs at least, and the rest in proportion to what they
/// wish beyond that. Pairs are of least and wish.
fn within_budget(wishes: &[(u32, u32)], budget: Option<u32>) -> Vec<u32> {
    let total: u64 = wishes.iter().map(|(_, wish)| u64::from(*wish)).sum();
    let Some(budget) = budget.filter(|budget| total > u64::from(*budget)) else {
        return wishes.iter().map(|(_, wish)| *wish).collect();
    };
    let least: u64 = wishes.iter().map(|(least, _)| u64::from(*least)).sum();
    let spare = u64::from(budget).saturating_sub(least);
    let beyond = total.saturating_sub(least).max(1);
    let mut left = spare;
    let mut given: Vec<u32> = wishes
        .iter()
        .map(|(least, wish)| {
            let share = u64::from(wish.saturating_sub(*least)) * spare / beyond;
            left -= share;
            least + share as u32
        })
        .collect();
    // What rounding has left goes to those that are furthest from their wish.
    while left > 0 {
        let short = (0..given.len()).max_by_key(|&i| wishes[i].1.saturating_sub(given[i]));
        let Some(i) = short.filter(|&i| given[i] < wishes[i].1) else { break };
        given[i] += 1;
        left -= 1;
    }
    given
}

#[cfg(test)]
mod tests;
