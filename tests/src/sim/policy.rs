//! Who says how large pools are.

use std::collections::VecDeque;

use baton_coordinator::planner::{Planner, PlannerSettings, PoolDecision, PoolSeen, Slo};
use baton_proto::InstanceRole;

use super::worker::Spec;

/// Decides how large pools are.
pub trait Policy {
    /// Seconds between two decisions.
    fn every(&self) -> f64;
    /// Whether a pool's size stays while workers of it start or drain.
    fn waits(&self) -> bool;
    /// What is to be of all pools, in their order.
    fn decide(&mut self, now: f64, pools: &[PoolSeen]) -> Vec<Size>;
}

/// What is to be of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Its size.
    pub target: u32,
    /// Whether new workers are the other pool's, with another role.
    pub converts: bool,
}

impl From<u32> for Size {
    fn from(target: u32) -> Self {
        Self { target, converts: false }
    }
}

/// Sizes never change.
pub struct Static;

impl Policy for Static {
    fn every(&self) -> f64 {
        60.0
    }

    fn waits(&self) -> bool {
        true
    }

    fn decide(&mut self, _: f64, pools: &[PoolSeen]) -> Vec<Size> {
        pools.iter().map(|pool| pool.size.into()).collect()
    }
}

/// The planner, the very code that a coordinator runs, every ten seconds. Like there, a pool has
/// one operation at a time.
pub struct Planned(pub Planner);

impl Planned {
    /// With these settings.
    pub fn new(settings: PlannerSettings) -> Self {
        Self(Planner::new(settings))
    }
}

impl Policy for Planned {
    fn every(&self) -> f64 {
        10.0
    }

    fn waits(&self) -> bool {
        true
    }

    fn decide(&mut self, now: f64, pools: &[PoolSeen]) -> Vec<Size> {
        let decision = self.0.observe((now * 1e3) as u64, pools);
        let size =
            |pool: &PoolDecision| Size { target: pool.target, converts: pool.donor.is_some() };
        decision.pools.iter().map(size).collect()
    }
}

/// Utilization scaling, as the horizontal autoscaler of Kubernetes does it with its defaults: every
/// 15 s, ⌈size × utilization / target⌉ if that is off by more than a tenth; up by as many again or
/// by four, down to the largest of the last five minutes. It may start workers while others start.
///
/// The utilization of prefill workers is the part of the time in which they compute. Decode workers
/// always compute; theirs is the number of sequences, of those that a worker can decode within the
/// promise. That number is measured beforehand, exactly: the operator has done the homework.
pub struct Utilization {
    target: f64,
    slots: f64,
    pools: Vec<(f64, Scaled)>,
    last: f64,
}

#[derive(Clone, Default)]
struct Scaled {
    wanted: VecDeque<(f64, u32)>,
}

impl Utilization {
    /// With this target, for such workers.
    pub fn new(target: f64, spec: &Spec, slo: &Slo) -> Self {
        let slots = ((slo.itl - spec.step.fixed) / spec.step.row.max(1e-12)).min(spec.slots as f64);
        Self { target, slots: slots.max(1.0), pools: Vec::new(), last: 0.0 }
    }
}

impl Policy for Utilization {
    fn every(&self) -> f64 {
        15.0
    }

    fn waits(&self) -> bool {
        false
    }

    fn decide(&mut self, now: f64, pools: &[PoolSeen]) -> Vec<Size> {
        let seconds = now - self.last;
        self.last = now;
        self.pools.resize(pools.len(), (0.0, Scaled::default()));
        let all = pools.iter().zip(&mut self.pools);
        all.map(|(seen, (busy_before, scaled))| {
            let workers = seen.workers.len() as f64;
            let busy: f64 = seen.workers.iter().map(|it| it.counters.busy_us as f64 / 1e6).sum();
            // A retired worker takes what it counted with it.
            let spent = (busy - *busy_before).clamp(0.0, workers * seconds);
            *busy_before = busy;
            let running: u32 = seen.workers.iter().map(|it| it.counters.running).sum();
            let waiting: u32 = seen.workers.iter().map(|it| it.counters.waiting).sum();
            let used = match seen.pool.role {
                InstanceRole::Prefill if seconds > 0.0 => spent / seconds / workers.max(1.0),
                InstanceRole::Prefill => self.target,
                _ => f64::from(running + waiting) / self.slots / workers.max(1.0),
            };
            let ratio = used / self.target;
            let wanted = match (0.9..=1.1).contains(&ratio) {
                true => seen.size,
                false => (workers * ratio).ceil().max(1.0) as u32,
            };
            if scaled.wanted.is_empty() {
                // Before anything was measured, what is there is what was wanted.
                scaled.wanted.push_back((now, seen.size));
            }
            scaled.wanted.push_back((now, wanted));
            scaled.wanted.retain(|(at, _)| *at + 300.0 >= now);
            let highest = scaled.wanted.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted);
            let target = match wanted > seen.size {
                true => wanted.min((2 * seen.size).max(seen.size + 4)),
                false => highest.min(seen.size),
            };
            target.into()
        })
        .collect()
    }
}
