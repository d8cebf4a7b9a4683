//! The leader's loop: observe, step, write or act.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use baton_membership::traces::Parent;
use baton_membership::{ClusterWatch, InstanceRecord, Membership, MembershipError};
use baton_proto::InstanceRole;
use futures::future::join_all;
use tokio::sync::watch;
use tracing::{info, warn};

use super::machine::{Effect, Limits, Load, Observed, Process, Seen, Trouble, step};
use super::record::{Phase, Record, unix_ms};
use super::store::{Advanced, ScaleStore, Stored};
use crate::election::{Leadership, while_leading};
use crate::launch::{LaunchError, Launched, Launcher, Survey, WorkerSpec};
use crate::workers;

/// Between two looks at the cluster while an operation runs.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Between two looks at the records and at the launcher when nothing tells of changes.
const IDLE: Duration = Duration::from_secs(2);
/// Wait after a failure of etcd.
const RETRY: Duration = Duration::from_secs(1);
/// How often a new leader tries to have the launcher refuse the orders of earlier ones, before it
/// goes on without: it may be that nobody can give any.
const TAKE_OVERS: usize = 3;
/// A drained worker gives up by itself what it has left so long after the operation should have
/// ended the drain: only when no coordinator does.
const BEYOND: Duration = Duration::from_secs(60);

/// What carries out operations while it leads.
pub struct Runner {
    /// The records.
    pub store: ScaleStore,
    /// Who is there.
    pub watch: ClusterWatch,
    /// Who starts and ends workers, if this coordinator can.
    pub launcher: Option<Arc<dyn Launcher>>,
    /// How long phases may take.
    pub limits: Limits,
}

/// What is known of operations beside their records; lost with the leader, at no loss.
#[derive(Default)]
struct Memory {
    /// Why the last effect failed, by operation.
    trouble: HashMap<String, Trouble>,
    /// Since when an operation is seen in the phase that it came to at that time, by operation.
    phases: HashMap<String, (u64, Instant)>,
    /// When it was last looked for supervisors that were killed.
    mended: Option<Instant>,
}

impl Memory {
    /// The record as if its phase had begun when this leader first saw it: clocks of leaders differ,
    /// and jump. `now_ms` is the time of the look.
    fn timed(&mut self, record: &Record, now_ms: u64) -> Record {
        let new = (record.phase_ms, Instant::now());
        let seen = self.phases.entry(record.id.clone()).or_insert(new);
        if seen.0 != record.phase_ms {
            *seen = new;
        }
        let waited = seen.1.elapsed().as_millis() as u64;
        Record { phase_ms: now_ms.saturating_sub(waited), ..record.clone() }
    }
}

impl Runner {
    /// Runs for ever; does something while `own` says that we lead.
    pub async fn run(self, own: watch::Receiver<Option<Leadership>>) {
        let lead = |leader| {
            let this = &self;
            async move { this.lead(&leader).await }
        };
        while_leading(own, lead, || ()).await;
    }

    /// Leads until it is dropped.
    async fn lead(&self, leader: &Leadership) {
        let mut memory = Memory::default();
        if let Some(launcher) = &self.launcher {
            for _ in 0..TAKE_OVERS {
                match launcher.lead(leader.revision).await {
                    Ok(()) => break,
                    // Each order will say so again.
                    Err(error) => warn!(%error, "the launcher is not taken over"),
                }
                tokio::time::sleep(RETRY).await;
            }
        }
        loop {
            match self.follow(leader, &mut memory).await {
                // Deposed: the election will say so in a moment.
                Ok(()) => {}
                Err(error) => warn!(%error, "scale operations wait for etcd"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Works on the operations until this leader is deposed or etcd fails.
    async fn follow(
        &self,
        leader: &Leadership,
        memory: &mut Memory,
    ) -> Result<(), MembershipError> {
        let mut changes = self.store.watch().await?;
        loop {
            let operations = self.store.list().await?;
            self.store.forget(leader, &operations.ended).await?;
            if memory.mended.is_none_or(|last| last.elapsed() >= IDLE) {
                self.mend(leader, &operations.running).await;
                memory.mended = Some(Instant::now());
            }
            if operations.running.is_empty() {
                memory.trouble.clear();
                memory.phases.clear();
                tokio::select! {
                    change = changes.message() => {
                        change?;
                    }
                    () = tokio::time::sleep(IDLE) => {}
                }
                continue;
            }
            let mut moved = false;
            for stored in operations.running {
                match self.advance(leader, stored, memory).await? {
                    Progress::Moved => moved = true,
                    Progress::Acted => {}
                    Progress::Deposed => {
                        warn!("another coordinator leads: a step of ours was refused");
                        return Ok(());
                    }
                }
            }
            if !moved {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// One step of one operation.
    async fn advance(
        &self,
        leader: &Leadership,
        stored: Stored,
        memory: &mut Memory,
    ) -> Result<Progress, MembershipError> {
        let observation = self.observe(&stored.record, memory).await;
        let record = &memory.timed(&stored.record, observation.seen.now_ms);
        let (next, effects) = step(record, &observation.seen, &self.limits);
        if next != *record {
            return Ok(match self.store.advance(leader, &stored, &next).await? {
                Advanced::Written(_) => {
                    memory.trouble.remove(&record.id);
                    log(&next);
                    trace(record, &next);
                    Progress::Moved
                }
                // Taken back meanwhile: look again.
                Advanced::Changed => Progress::Moved,
                Advanced::Deposed => Progress::Deposed,
            });
        }
        if effects.is_empty() {
            return Ok(Progress::Acted);
        }
        // Workers know of no leaders: those that are told something are told by who leads now.
        if !self.store.leads(leader).await? {
            return Ok(Progress::Deposed);
        }
        let acts = effects.iter().map(|effect| self.act(leader, record, effect, &observation));
        let failed = join_all(acts).await.into_iter().find_map(Result::err);
        match failed {
            Some(trouble) => {
                let said = trouble.said.clone();
                let before = memory.trouble.insert(record.id.clone(), trouble);
                // It is tried again ten times a second.
                if before.is_none_or(|before| before.said != said) {
                    warn!(id = record.id, trouble = said, "a scale operation meets trouble");
                }
            }
            None => {
                memory.trouble.remove(&record.id);
            }
        }
        Ok(Progress::Acted)
    }

    async fn act(
        &self,
        leader: &Leadership,
        record: &Record,
        effect: &Effect,
        observation: &Observation,
    ) -> Result<(), Trouble> {
        let lasts = |said: String| Trouble { said, passes: false };
        let told = |error: LaunchError| Trouble { passes: error.passes(), said: error.to_string() };
        let launcher = self.launcher.as_ref().ok_or_else(|| lasts(no_launcher()))?;
        let address = |name: &String| {
            let address = observation.addresses.get(name).filter(|it| !it.is_empty());
            address.cloned().ok_or_else(|| lasts(format!("{name} has no address yet")))
        };
        match effect {
            Effect::Launch(name) => {
                let (pool, model) = (record.pool, record.model.clone());
                let spec = WorkerSpec { name: name.clone(), pool, model };
                launcher.launch(leader.revision, &spec).await.map_err(told)
            }
            Effect::Retire(name) => launcher.retire(leader.revision, name).await.map_err(told),
            Effect::Drain(name) => {
                let limit = Duration::from_millis(record.drain_timeout_ms) + BEYOND;
                let drained = workers::drain(&address(name)?, limit).await;
                drained.map_err(|status| lasts(format!("{name}: {}", status.message())))
            }
            Effect::Assign(name, pool) => {
                launcher.assign(leader.revision, name, *pool).await.map_err(told)?;
                let limit = Duration::from_millis(record.drain_timeout_ms) + BEYOND;
                let assigned = workers::set_role(&address(name)?, *pool, limit).await;
                assigned.map_err(|status| lasts(format!("{name}: {}", status.message())))
            }
            Effect::Undrain(name) => {
                let undrained = workers::undrain(&address(name)?).await;
                undrained.map_err(|status| lasts(format!("{name}: {}", status.message())))
            }
        }
    }

    async fn observe(&self, record: &Record, memory: &Memory) -> Observation {
        let membership = Arc::clone(&self.watch.subscribe().borrow());
        let (Survey { workers: all, rows }, blind) = match &self.launcher {
            None => (Survey::default(), None),
            Some(launcher) => match launcher.survey().await {
                Ok(survey) => (survey, None),
                Err(error) => (Survey::default(), Some(error.to_string())),
            },
        };
        let of_pool = |pool: InstanceRole| {
            move |it: &&Launched| (it.spec.pool, &it.spec.model) == (pool, &record.model)
        };
        let ours = of_pool(record.pool);
        let workers = look_at(all.iter().filter(ours), &membership).await;
        let donors = match record.donor {
            Some(donor) => look_at(all.iter().filter(of_pool(donor)), &membership).await,
            None => BTreeMap::new(),
        };
        let launched = |address: &String| all.iter().any(|it| it.address == *address);
        // The other phases are about launched workers alone.
        let counts = matches!(record.phase, Phase::Plan | Phase::Rebalance);
        let outside = membership.instances.values().filter(|it| {
            let ours = (it.role, &it.model) == (record.pool, &record.model);
            counts && ours && !launched(&it.address)
        });
        let starts =
            |it: &&Launched| ours(it) && it.process == Process::Starting && it.address.is_empty();
        let starting: Vec<u64> = all.iter().filter(starts).map(|it| it.started_ms).collect();
        let (others, others_serving) = look_outside(outside, &starting).await;
        let keeper = self.launcher.as_ref().map(|it| it.keeper()).unwrap_or_default();
        let blind = blind.or_else(|| {
            let anothers = !record.keeper.is_empty() && record.keeper != keeper;
            anothers.then(|| {
                format!(
                    "its workers are kept by {}, and the coordinator that leads has none of them",
                    record.keeper
                )
            })
        });
        let cannot_launch = match &self.launcher {
            None => Some(no_launcher()),
            Some(launcher) if !launcher.models(record.pool).contains(&record.model) => {
                Some(launcher.unknown(record.pool, &record.model).to_string())
            }
            Some(_) => None,
        };
        let keeps_roles = self.launcher.as_ref().and_then(|launcher| launcher.keeps_roles());
        let cannot_convert = keeps_roles.map(str::to_owned).or_else(|| cannot_launch.clone());
        let row = rows.into_iter().find(|(pool, model, _)| {
            (*pool, model.as_str()) == (record.pool, record.model.as_str())
        });
        Observation {
            seen: Observed {
                now_ms: unix_ms(),
                others,
                others_serving,
                keeper,
                workers,
                donors,
                cannot_convert,
                taken: all.iter().map(|it| it.spec.name.clone()).collect(),
                cannot_launch,
                trouble: memory.trouble.get(&record.id).cloned(),
                blind,
                row: row.map(|(_, _, row)| row),
            },
            addresses: all.into_iter().map(|it| (it.spec.name, it.address)).collect(),
        }
    }

    /// Starts again what supervised workers and was killed, and has workers do what their pool
    /// does: a change of role may have been given up half-way.
    async fn mend(&self, leader: &Leadership, running: &[Stored]) {
        let Some(launcher) = &self.launcher else { return };
        let Ok(all) = launcher.list().await else { return };
        let membership = Arc::clone(&self.watch.subscribe().borrow());
        let changes = |it: &&Launched| {
            running.iter().any(|stored| stored.record.converted.contains(&it.spec.name))
        };
        for one in all.iter().filter(|it| it.process == Process::Ready && !changes(it)) {
            let mut here = membership.instances.values().filter(|it| it.address == one.address);
            if here.next().is_some_and(|it| it.role != one.spec.pool) {
                let (name, pool) = (&one.spec.name, one.spec.pool);
                if let Err(error) = workers::set_role(&one.address, pool, BEYOND).await {
                    warn!(name, %pool, %error, "a worker does not do what its pool does");
                }
            }
        }
        for one in all.iter().filter(|it| matches!(it.process, Process::Crashed { .. })) {
            if let Err(error) = launcher.launch(leader.revision, &one.spec).await {
                warn!(name = one.spec.name, %error, "a worker cannot be kept running");
            }
        }
    }
}

enum Progress {
    Moved,
    Acted,
    Deposed,
}

struct Observation {
    seen: Observed,
    /// Where launched workers serve, by name.
    addresses: HashMap<String, String>,
}

/// What is seen of launched workers, by name.
async fn look_at<'a>(
    launched: impl Iterator<Item = &'a Launched>,
    membership: &Membership,
) -> BTreeMap<String, Seen> {
    let looks = launched.map(|launched| async {
        let load = load(launched, membership).await;
        let Launched { process, started_ms, said, .. } = launched.clone();
        (launched.spec.name.clone(), Seen { process, load, started_ms, said })
    });
    join_all(looks).await.into_iter().collect()
}

/// Workers that are registered and that no launcher has: how many there are, and how many of them
/// take requests. Who does not answer is none: a record outlives its worker by its lease. Nor are
/// those that a launcher is `starting`, since so many Unix milliseconds, and that have registered
/// before it knows their addresses.
async fn look_outside(
    records: impl Iterator<Item = &InstanceRecord>,
    starting: &[u64],
) -> (u32, u32) {
    let looks = records.map(|record| async {
        let status = workers::status(&record.address).await.ok()?;
        Some((record.started_ms, status.draining))
    });
    let there: Vec<(u64, bool)> = join_all(looks).await.into_iter().flatten().collect();
    let new = |(registered, _): &&(u64, bool)| starting.iter().any(|since| since <= registered);
    let joining = there.iter().filter(new).count().min(starting.len());
    let serving = there.iter().filter(|(_, draining)| !draining).count();
    (there.len().saturating_sub(joining) as u32, serving.saturating_sub(joining) as u32)
}

/// What a launched worker says of itself.
async fn load(launched: &Launched, membership: &Membership) -> Option<Load> {
    let address = &launched.address;
    if address.is_empty() || launched.process != Process::Ready {
        return None;
    }
    let status = workers::status(address).await.ok()?;
    Some(Load {
        requests: status.running + status.waiting,
        draining: status.draining,
        registered: membership
            .instances
            .values()
            .any(|it| it.address == *address && it.role == launched.spec.pool),
    })
}

fn no_launcher() -> String {
    "this coordinator cannot launch workers: start it with --workers FILE, or with --launcher \
     kubernetes"
        .into()
}

/// A span for an operation that has just ended. It is in no request's trace.
fn trace(before: &Record, record: &Record) {
    if before.phase.ended() || !record.phase.ended() {
        return;
    }
    let began = UNIX_EPOCH + Duration::from_millis(record.started_ms);
    let mut span = Parent::default().span_from("scale", began);
    if span.exports() {
        span.set("baton.scale.id", record.id.clone());
        span.set("baton.scale.pool", record.pool.as_str());
        span.set("baton.scale.from", i64::from(record.from));
        span.set("baton.scale.size", i64::from(record.size));
        span.set("baton.scale.phase", record.phase.as_str());
    }
    if let Phase::Failed(_) = record.phase {
        span.fail("scale_failed");
    }
}

fn log(record: &Record) {
    let Record { id, pool, model, size, from, .. } = record;
    let (phase, launched, retired) = (record.phase.as_str(), &record.launched, &record.retired);
    let converted = &record.converted;
    match &record.phase {
        Phase::Failed(failure) => {
            warn!(id, %pool, model, from, size, reason = failure.reason, "a scale operation failed");
        }
        _ => info!(id, %pool, model, from, size, phase, ?launched, ?retired, ?converted, "scaling"),
    }
}
