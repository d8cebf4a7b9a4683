//! The leader's loop: look, decide, ask for an operation.
//!
//! An operation of the planner is one like an operator's: a record in etcd that the leader carries
//! out. It is asked for in a transaction that holds only while this coordinator leads and no other
//! operation runs for the pool.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_membership::{ClusterWatch, MembershipError};
use baton_proto::InstanceRecord;
use clap::ValueEnum;
use futures::stream::{self, StreamExt as _};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Counters, Decision, Planner, PlannerSettings, PoolId, PoolSeen, WorkerSeen};
use crate::election::{Leadership, while_leading};
use crate::launch::{Launched, Launcher};
use crate::scale::machine::Process;
use crate::scale::record::{Phase, Record, unix_ms};
use crate::scale::store::{Operations, ScaleStore};
use crate::workers;

/// Decisions that are kept for operators.
const KEPT: usize = 120;
/// Workers that are asked at a time.
const ASKED: usize = 64;
/// Time that requests of workers get that are to go.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(120);
/// The longest pause after operations that failed.
const LONGEST_PAUSE: f64 = 600.0;

/// What the planner's decisions are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// There are none.
    #[default]
    Off,
    /// To be read.
    DryRun,
    /// To be carried out.
    On,
}

impl Mode {
    /// Its name, as the flag has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::DryRun => "dry-run",
            Self::On => "on",
        }
    }
}

/// The last decisions, for operators.
#[derive(Clone, Debug, Default)]
pub struct Decisions {
    kept: Arc<Mutex<VecDeque<String>>>,
}

impl Decisions {
    fn push(&self, decision: String) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(decision);
    }

    fn clear(&self) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// All, oldest first.
    pub fn list(&self) -> Vec<String> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// What plans while it leads.
pub struct Planning {
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// How it decides.
    pub settings: PlannerSettings,
    /// Between two decisions.
    pub every: Duration,
    /// How long a pool is left alone that an operator has scaled.
    pub hold: Duration,
    /// The operations.
    pub store: ScaleStore,
    /// Who is there.
    pub watch: ClusterWatch,
    /// Who has workers.
    pub launcher: Arc<dyn Launcher>,
    /// Where decisions are kept.
    pub decisions: Decisions,
}

/// What is remembered of operations after their records are gone.
#[derive(Default)]
struct Memory {
    /// When an operator's last operation ended.
    operator: BTreeMap<PoolId, u64>,
    /// The last launch that told how long one takes.
    launched: BTreeMap<PoolId, String>,
    /// Workers that were drained by hand: the planner does not count them, an operation does.
    drained: BTreeMap<PoolId, u32>,
}

impl Planning {
    /// Plans for ever; decides while `own` says that we lead.
    pub async fn run(self, own: watch::Receiver<Option<Leadership>>) {
        let lead = |leader| {
            let this = &self;
            async move { this.lead(&leader).await }
        };
        // Another decides then, from what it has seen itself.
        while_leading(own, lead, || self.decisions.clear()).await;
    }

    /// Leads until it is dropped.
    async fn lead(&self, leader: &Leadership) {
        let mut planner = Planner::new(self.settings.clone());
        let mut memory = Memory::default();
        // A clock that never goes back.
        let (start_ms, start) = (unix_ms(), Instant::now());
        let mut ticks = tokio::time::interval(self.every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let seen = match self.look(&mut memory).await {
                Ok(seen) => seen,
                Err(error) => {
                    warn!(%error, "the planner waits for etcd");
                    continue;
                }
            };
            let now_ms = start_ms + start.elapsed().as_millis() as u64;
            let decision = planner.observe(now_ms, &seen);
            let asked = match self.mode {
                Mode::On => self.ask(leader, &decision, &memory).await,
                Mode::Off | Mode::DryRun => Vec::new(),
            };
            let mode = self.mode.as_str();
            let told = json!({"mode": mode, "decision": decision, "operations": asked}).to_string();
            info!(mode, decision = told, "planned");
            self.decisions.push(told);
        }
    }

    /// Asks for the operations that carry a decision out. Gives their ids.
    async fn ask(&self, leader: &Leadership, decision: &Decision, memory: &Memory) -> Vec<String> {
        let mut asked = Vec::new();
        for pool in decision.pools.iter().filter(|pool| pool.target != pool.size) {
            let (role, model) = (pool.pool.role, pool.pool.model.clone());
            let timeout = DRAIN_TIMEOUT.as_millis() as u64;
            let donor = pool.donor.as_ref().map(|donor| donor.role);
            let drained = memory.drained.get(&pool.pool).copied().unwrap_or_default();
            // One that shrinks loses them first.
            let beside = if pool.target > pool.size { drained } else { 0 };
            let new = Record::new(role, model, pool.target + beside, timeout);
            let request = Record { planned: true, donor, ..new };
            let id = request.id.clone();
            match self.store.propose(leader, request).await {
                Ok(true) => asked.push(id),
                // Somebody else was faster, or leads.
                Ok(false) => {}
                Err(error) => warn!(%error, pool = %pool.pool, "an operation could not be begun"),
            }
        }
        asked
    }

    async fn look(&self, memory: &mut Memory) -> Result<Vec<PoolSeen>, MembershipError> {
        let membership = Arc::clone(&self.watch.subscribe().borrow());
        let operations = self.store.list().await?;
        let (launched, blind) = match self.launcher.list().await {
            Ok(launched) => (launched, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let mut pools = Vec::new();
        for pool in self.settings.pools.keys() {
            let ours = |it: &&InstanceRecord| (it.role, &it.model) == (pool.role, &pool.model);
            let registered: Vec<&InstanceRecord> =
                membership.instances.values().filter(ours).collect();
            pools.push(self.pool(pool, &registered, &launched, &operations, &blind, memory).await);
        }
        Ok(pools)
    }

    async fn pool(
        &self,
        pool: &PoolId,
        registered: &[&InstanceRecord],
        launched: &[Launched],
        operations: &Operations,
        blind: &Option<String>,
        memory: &mut Memory,
    ) -> PoolSeen {
        let addresses: Vec<(String, String)> =
            registered.iter().map(|it| (it.id.clone(), it.address.clone())).collect();
        let asks = addresses.into_iter().map(|(id, address)| async move {
            workers::status(&address).await.ok().map(|status| (id, status))
        });
        let statuses: BTreeMap<_, _> =
            stream::iter(asks).buffer_unordered(ASKED).filter_map(async |it| it).collect().await;
        let draining = statuses.values().filter(|status| status.draining).count();
        let ours = |it: &&Launched| {
            (it.spec.pool, &it.spec.model) == (pool.role, &pool.model)
                && it.process != Process::Stopping
        };
        // Who does not answer may be gone: a record outlives its worker by its lease.
        let others = registered.iter().filter(|it| {
            statuses.contains_key(&it.id) && !launched.iter().any(|one| one.address == it.address)
        });
        let size = launched.iter().filter(ours).count() + others.count();
        let workers = statuses.iter().filter(|(_, status)| !status.draining);
        let workers = workers
            .map(|(id, status)| WorkerSeen { id: id.clone(), counters: Counters::from(status) });
        let of_pool =
            |it: &&Record| it.model == pool.model && it.pools().any(|role| role == pool.role);
        let ended: Vec<&Record> = operations.ended.iter().filter(of_pool).collect();
        let launch =
            ended.iter().rev().find(|it| !it.launched.is_empty() && it.phase == Phase::Done);
        let startup = launch.and_then(|it| {
            let known = memory.launched.insert(pool.clone(), it.id.clone());
            let took = it.ended_ms.saturating_sub(it.started_ms) as f64 / 1e3;
            (known.as_ref() != Some(&it.id)).then_some(took)
        });
        let held = self.held(pool, operations, &ended, memory).or_else(|| blind.clone());
        memory.drained.insert(pool.clone(), draining as u32);
        PoolSeen {
            pool: pool.clone(),
            size: size.saturating_sub(draining) as u32,
            workers: workers.collect(),
            startup,
            held,
        }
    }

    /// Why the size of a pool must not be changed now.
    fn held(
        &self,
        pool: &PoolId,
        operations: &Operations,
        ended: &[&Record],
        memory: &mut Memory,
    ) -> Option<String> {
        // One at a time for all models of a pool.
        let touches = |record: &Record| record.pools().any(|role| role == pool.role);
        let running = operations.running.iter().find(|it| touches(&it.record));
        if let Some(stored) = running {
            return Some(format!("operation {} runs", stored.record.describe()));
        }
        if let Some(last) = ended.iter().rev().find(|it| !it.planned) {
            let at = memory.operator.entry(pool.clone()).or_default();
            *at = last.ended_ms.max(*at);
        }
        let now = unix_ms();
        let left = |at: u64, pause: Duration| {
            let until = at.saturating_add(pause.as_millis() as u64);
            until.checked_sub(now).filter(|left| *left > 0).map(|left| left.div_ceil(1000))
        };
        let operator = memory.operator.get(pool).and_then(|at| left(*at, self.hold));
        if let Some(left) = operator {
            return Some(format!("an operator has set the size; left alone for {left} s more"));
        }
        let failed = ended.iter().rev().take_while(|it| matches!(it.phase, Phase::Failed(_)));
        let last = ended.last().filter(|it| matches!(it.phase, Phase::Failed(_)))?;
        let pause = self.settings.cooldown * f64::from(1 << failed.count().min(8));
        let pause = Duration::from_secs_f64(pause.min(LONGEST_PAUSE));
        let left = left(last.ended_ms, pause)?;
        Some(format!("operation {} failed; trying again in {left} s", last.id))
    }
}
