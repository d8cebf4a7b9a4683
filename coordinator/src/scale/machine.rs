//! What a scale operation does next: a pure decision over its record and the cluster as observed.
//!
//! [`step`] either moves the record or acts, never both. Whoever runs it writes a moved record
//! before the next step, so nothing is done that is not recorded first, and every effect may be
//! lost, done twice, or done by the next leader.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::InstanceRole;

use super::record::{Failure, Outcome, Phase, Record};

/// What the cluster looks like to an operation.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Unix time in milliseconds.
    pub now_ms: u64,
    /// The workers of the pool and the model that a launcher has, by name.
    pub workers: BTreeMap<String, Seen>,
    /// Workers of the pool and the model that answer, but that no launcher has; and how many of
    /// them take requests.
    pub others: u32,
    /// See `others`.
    pub others_serving: u32,
    /// Whose the workers are that the launcher has: as [`Record::keeper`].
    pub keeper: String,
    /// The workers of the same model that a launcher has in the pool that new ones come from.
    pub donors: BTreeMap<String, Seen>,
    /// Why workers of that pool cannot be given another role, if so.
    pub cannot_convert: Option<String>,
    /// Names that a new worker cannot have.
    pub taken: BTreeSet<String>,
    /// Why no worker of the pool and the model can be launched, if so.
    pub cannot_launch: Option<String>,
    /// Why the last effect failed, if it did.
    pub trouble: Option<Trouble>,
    /// Why the launcher could not tell what it has; then `workers` says nothing.
    pub blind: Option<String>,
    /// How the pool is kept, where its workers cannot be named and ended at will.
    pub row: Option<Row>,
}

/// Why an effect failed.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// What an operator needs to know.
    pub said: String,
    /// Whether the same may succeed later.
    pub passes: bool,
}

/// Workers that are numbered without gaps, of which only the last can be ended and to which only
/// the next can be added: the pods of a StatefulSet. Its length is somebody else's to change too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Workers are called by this name, a hyphen, and their number.
    pub name: String,
    /// The number that the next worker gets. Those that still run from here on are ending.
    pub end: u32,
    /// How long it is and who has made it so, for people.
    pub told: String,
}

impl Row {
    /// The name of a worker.
    pub fn worker(&self, number: u32) -> String {
        format!("{}-{number}", self.name)
    }

    /// The number of a worker; `None` when the name is none of the row's.
    pub fn number(&self, worker: &str) -> Option<u32> {
        worker.strip_prefix(&self.name)?.strip_prefix('-')?.parse().ok()
    }
}

/// A worker that a launcher has.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its process.
    pub process: Process,
    /// What it says of itself; `None` while it does not answer.
    pub load: Option<Load>,
    /// When it was launched, in Unix milliseconds.
    pub started_ms: u64,
    /// The last lines of its log.
    pub said: String,
}

/// The process of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// It runs and has not been ready yet.
    Starting,
    /// It runs and has been ready.
    Ready,
    /// It has ended by itself and will be started again.
    Crashed {
        /// How often in a row.
        times: u32,
        /// Whether it will end like this for ever: a wrong setting, a missing model.
        hopeless: bool,
    },
    /// It has been told to end.
    Stopping,
}

/// How busy a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sequences or texts, running and waiting.
    pub requests: u32,
    /// Whether it refuses new ones.
    pub draining: bool,
    /// Whether it is registered as one of the pool that it is listed in, so that gateways find it.
    pub registered: bool,
}

/// What is to be done. Doing it twice is as good as once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start a worker under this name.
    Launch(String),
    /// Have the worker refuse new requests.
    Drain(String),
    /// Have the worker take new requests again.
    Undrain(String),
    /// End the worker's process.
    Retire(String),
    /// Have the worker do what a pool does, once it has got rid of its requests, and again
    /// whenever it is started.
    Assign(String, InstanceRole),
}

/// How long the phases may take, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From a worker's launch until it serves.
    pub launch_ms: u64,
    /// Until all who are to serve answer.
    pub answer_ms: u64,
    /// From the order to end until the process has ended.
    pub end_ms: u64,
    /// Crashes of a new worker after which it is given up.
    pub crashes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { launch_ms: 300_000, answer_ms: 10_000, end_ms: 60_000, crashes: 3 }
    }
}

/// The record as it is to be, or, when it stays as it is, what is to be done.
pub fn step(record: &Record, seen: &Observed, limits: &Limits) -> (Record, Vec<Effect>) {
    let next = Next { record, seen, limits };
    if let Some(blind) = &seen.blind
        && !record.phase.ended()
    {
        // What was done so far stays: better than to undo what cannot be seen.
        let late = next.over(match record.phase {
            Phase::Plan => limits.answer_ms,
            _ => limits.launch_ms.max(record.drain_timeout_ms),
        });
        return if late { next.give_up(blind) } else { next.act(Vec::new()) };
    }
    if record.cancel {
        match record.phase {
            Phase::Plan => return next.to(Phase::Cancelled),
            Phase::Launch | Phase::Join | Phase::Convert | Phase::Rebalance | Phase::Drain => {
                return next.to(Phase::Undo(Outcome::Cancelled));
            }
            _ => {}
        }
    }
    if let Some(reason) = next.disturbed() {
        // What was launched belongs to whoever has said since how many there are to be.
        let (undo, _) = next.fail(reason);
        return (Record { launched: Vec::new(), ..undo }, Vec::new());
    }
    match &record.phase {
        Phase::Plan => next.plan(),
        Phase::Launch => next.launch(),
        Phase::Join => next.join(),
        Phase::Convert => next.convert(),
        Phase::Rebalance => next.rebalance(),
        Phase::Drain => next.drain(),
        Phase::Retire => next.retire(),
        Phase::Undo(outcome) => next.undo(outcome),
        Phase::Done | Phase::Failed(_) | Phase::Cancelled => (record.clone(), Vec::new()),
    }
}

struct Next<'a> {
    record: &'a Record,
    seen: &'a Observed,
    limits: &'a Limits,
}

type Step = (Record, Vec<Effect>);

impl Next<'_> {
    fn to(&self, phase: Phase) -> Step {
        (self.moved(phase), Vec::new())
    }

    fn moved(&self, phase: Phase) -> Record {
        let now = self.seen.now_ms;
        let ended_ms = if phase.ended() { now } else { 0 };
        Record { phase, phase_ms: now, ended_ms, ..self.record.clone() }
    }

    fn act(&self, effects: Vec<Effect>) -> Step {
        (self.record.clone(), effects)
    }

    /// Fails once everything is undone.
    fn fail(&self, reason: impl Into<String>) -> Step {
        let failure = Failure { reason: reason.into(), drain_timed_out: false };
        self.to(Phase::Undo(Outcome::Failed(failure)))
    }

    /// Ends it although nothing can be seen. What was begun stays: better than to undo what cannot
    /// be seen. But drained workers are put back as soon as they are seen again.
    fn give_up(&self, blind: &str) -> Step {
        let mut failure = Failure { reason: blind.to_owned(), drain_timed_out: false };
        match &self.record.phase {
            Phase::Drain => self.to(Phase::Undo(Outcome::Failed(failure))),
            Phase::Undo(_) if !self.record.retired.is_empty() => {
                failure.reason += &may_drain(&self.record.retired.join(", "));
                self.to(Phase::Failed(failure))
            }
            _ => self.to(Phase::Failed(failure)),
        }
    }

    /// Whether the phase has taken longer.
    fn over(&self, limit_ms: u64) -> bool {
        self.seen.now_ms >= self.record.phase_ms.saturating_add(limit_ms)
    }

    fn trouble<'s>(&'s self, otherwise: &'s str) -> &'s str {
        self.seen.trouble.as_ref().map_or(otherwise, |trouble| &trouble.said)
    }

    /// Workers that a launcher has and is to keep.
    fn kept(&self) -> impl Iterator<Item = (&String, &Seen)> {
        self.seen.workers.iter().filter(|(_, worker)| worker.process != Process::Stopping)
    }

    fn plan(&self) -> Step {
        let size = self.record.size;
        let ours = self.kept().count() as u32;
        let from = ours + self.seen.others;
        let keeper = self.seen.keeper.clone();
        let mut record = Record { from, keeper, ..self.moved(Phase::Done) };
        let failed = |reason: String| {
            let failure = Failure { reason, drain_timed_out: false };
            (Record { from, ..self.moved(Phase::Failed(failure)) }, Vec::new())
        };
        if let Some(donor) = self.record.donor.filter(|_| size != from) {
            let told = match size > from {
                true => self.choose_donors(donor, size - from),
                false => Err(format!(
                    "pool `{}` has {from} workers: it is made smaller without `from_pool`",
                    self.record.pool
                )),
            };
            match told {
                Err(why) => return failed(why),
                Ok(converted) => {
                    record = Record { converted, phase: Phase::Convert, ended_ms: 0, ..record };
                }
            }
        } else if size > from {
            if let Some(why) = &self.seen.cannot_launch {
                return failed(why.clone());
            }
            record = Record { phase: Phase::Launch, ended_ms: 0, ..record };
            record.launched = self.new_names(size - from);
        } else if size < from {
            let surplus = from - size;
            if surplus > ours {
                return failed(format!(
                    "{surplus} of {from} workers would have to go, but only {ours} were started \
                     by a coordinator: stop others where they were started"
                ));
            }
            record = Record { phase: Phase::Rebalance, ended_ms: 0, ..record };
            record.retired = self.choose(surplus as usize);
            let draining = |name: &&String| self.seen.workers[*name].draining();
            record.held = record.retired.iter().filter(draining).cloned().collect();
        }
        (record, Vec::new())
    }

    /// Why the row is not as this operation has left it: somebody else has changed its length.
    /// Theirs is the later wish, so it stands.
    fn disturbed(&self) -> Option<String> {
        let row = self.seen.row.as_ref()?;
        let Record { phase, launched, retired, .. } = self.record;
        let numbers = launched.iter().chain(retired).filter_map(|name| row.number(name));
        let (first, last) = numbers.fold((u32::MAX, 0), |(low, high), n| (low.min(n), high.max(n)));
        if first > last {
            return None;
        }
        let allowed = match phase {
            Phase::Launch | Phase::Retire => first..=last + 1,
            Phase::Join | Phase::Rebalance | Phase::Drain => last + 1..=last + 1,
            _ => return None,
        };
        let told = || format!("somebody else has changed the pool meanwhile: {}", row.told);
        (!allowed.contains(&row.end)).then(told)
    }

    fn new_names(&self, count: u32) -> Vec<String> {
        if let Some(row) = &self.seen.row {
            return (row.end..).take(count as usize).map(|number| row.worker(number)).collect();
        }
        let names = (1..).map(|n| format!("{}-{n}", self.record.pool));
        names.filter(|name| !self.seen.taken.contains(name)).take(count as usize).collect()
    }

    /// Those who are missed least: drained or not serving, then with the least to do, then new.
    /// Of a row, the last.
    fn choose(&self, count: usize) -> Vec<String> {
        let mut all: Vec<_> = self.kept().collect();
        let place = |name: &str| self.seen.row.as_ref().and_then(|row| row.number(name));
        all.sort_by_key(|(name, worker)| {
            let place = std::cmp::Reverse(place(name));
            let requests = worker.load.map_or(0, |load| load.requests);
            let age = std::cmp::Reverse(worker.started_ms);
            (place, worker.serves(), requests, age, (*name).clone())
        });
        all.into_iter().take(count).map(|(name, _)| name.clone()).collect()
    }

    /// Which workers of the other pool are missed least there; one must stay that serves.
    fn choose_donors(&self, donor: InstanceRole, count: u32) -> Result<Vec<String>, String> {
        if let Some(why) = &self.seen.cannot_convert {
            return Err(why.clone());
        }
        let mut serving: Vec<_> = self
            .seen
            .donors
            .iter()
            .filter_map(|(name, worker)| Some((name, worker, worker.load?)))
            .filter(|(_, worker, _)| worker.serves())
            .collect();
        if serving.len() as u32 <= count {
            return Err(format!(
                "{count} of the {} workers that serve in pool `{donor}` would change their role, \
                 but one must stay: scale it up first, or ask for less",
                serving.len()
            ));
        }
        serving.sort_by_key(|(name, worker, load)| {
            (load.requests, std::cmp::Reverse(worker.started_ms), (*name).clone())
        });
        Ok(serving.into_iter().take(count as usize).map(|(name, ..)| name.clone()).collect())
    }

    fn launch(&self) -> Step {
        // One that is ending had the name before.
        let there = |name: &String| self.kept().any(|(kept, _)| kept == name);
        let missing: Vec<&String> =
            self.record.launched.iter().filter(|name| !there(name)).collect();
        if missing.is_empty() {
            return self.to(Phase::Join);
        }
        let trouble = self.seen.trouble.as_ref();
        if let Some(trouble) = trouble.filter(|trouble| !trouble.passes) {
            return self.fail(trouble.said.clone());
        }
        if self.over(self.limits.launch_ms) {
            let why = trouble.map(|trouble| format!(": {}", trouble.said)).unwrap_or_default();
            return self.fail(format!("{} could not be launched in time{why}", missing[0]));
        }
        self.act(missing.into_iter().cloned().map(Effect::Launch).collect())
    }

    fn join(&self) -> Step {
        let mut late = None;
        for name in &self.record.launched {
            let Some(worker) = self.seen.workers.get(name) else {
                return self.fail(format!("{name} was taken away while it started"));
            };
            match worker.process {
                Process::Crashed { times, hopeless }
                    if hopeless || times >= self.limits.crashes =>
                {
                    return self.fail(format!("{name} does not start: {}", worker.said));
                }
                _ if worker.serves() => {}
                _ => late = Some((name, worker)),
            }
        }
        match late {
            None => self.to(Phase::Rebalance),
            Some((name, worker)) if self.over(self.limits.launch_ms) => self.fail(format!(
                "{name} does not serve after {} s: {}",
                self.limits.launch_ms / 1000,
                self.lacks(worker)
            )),
            Some(_) => self.act(Vec::new()),
        }
    }

    /// What a launched worker lacks to serve. One whose process is ready has said nothing wrong.
    fn lacks(&self, worker: &Seen) -> String {
        let Record { pool, model, .. } = self.record;
        match (worker.process, worker.load) {
            (Process::Ready, None) => format!(
                "it runs, but no `{pool}` worker of model `{model}` is registered at its address, \
                 or it does not answer there: compare --role, --served-model-name, --cluster and \
                 --advertise with the pool's (`baton status` lists what is registered)"
            ),
            (Process::Ready, Some(Load { draining: true, .. })) => "it drains".into(),
            (Process::Ready, Some(_)) => format!(
                "it answers, but is not registered in etcd as a `{pool}` worker: compare --role, \
                 --cluster and --etcd with the pool's"
            ),
            _ => worker.said.clone(),
        }
    }

    /// Workers of the other pool get rid of their requests and register in this one.
    fn convert(&self) -> Step {
        let mut late = Vec::new();
        let mut requests = 0;
        for name in &self.record.converted {
            let ours = self.seen.workers.get(name);
            let Some(worker) = ours.or_else(|| self.seen.donors.get(name)) else {
                return self.fail(format!("{name} was taken away while it changed its role"));
            };
            match worker.process {
                Process::Crashed { times, hopeless }
                    if hopeless || times >= self.limits.crashes =>
                {
                    return self.fail(format!("{name} does not start: {}", worker.said));
                }
                _ if ours.is_some_and(Seen::serves) => {}
                _ => {
                    late.push(name);
                    requests += worker.load.map_or(0, |load| load.requests);
                }
            }
        }
        let Some(first) = late.first() else { return self.to(Phase::Done) };
        let drain_ms = self.record.drain_timeout_ms;
        if requests > 0 && self.over(drain_ms) {
            let reason = format!("{first} still had {requests} requests");
            let failure = Failure { reason, drain_timed_out: true };
            return self.to(Phase::Undo(Outcome::Failed(failure)));
        }
        if self.over(drain_ms.saturating_add(self.limits.launch_ms)) {
            let pool = self.record.pool;
            let trouble = self.trouble("it has not registered");
            return self.fail(format!("{first} does not serve as {pool}: {trouble}"));
        }
        let assign = |name: &&String| Effect::Assign((*name).clone(), self.record.pool);
        self.act(late.iter().map(assign).collect())
    }

    /// Nobody is drained before those who stay have shown that they serve.
    fn rebalance(&self) -> Step {
        if self.record.retired.is_empty() {
            return self.to(Phase::Done);
        }
        let stays = |name: &String| !self.record.retired.contains(name);
        let staying = || self.kept().filter(|(name, _)| stays(name));
        let serving = staying().filter(|(_, worker)| worker.serves()).count() as u32;
        if serving + self.seen.others_serving >= self.record.size {
            return self.to(Phase::Drain);
        }
        if self.over(self.limits.answer_ms) {
            let silent = staying().find(|(_, worker)| !worker.serves());
            let silent = silent.map_or("a worker", |(name, _)| name);
            return self.fail(format!("{silent} is to stay, but does not serve"));
        }
        self.act(Vec::new())
    }

    fn drain(&self) -> Step {
        let busy =
            |name: &&String| self.seen.workers.get(*name).is_some_and(|worker| !worker.drained());
        let busy: Vec<&String> = self.record.retired.iter().filter(busy).collect();
        if busy.is_empty() {
            return self.to(Phase::Retire);
        }
        if self.over(self.record.drain_timeout_ms) {
            let requests: u32 = busy
                .iter()
                .filter_map(|name| self.seen.workers.get(*name)?.load)
                .map(|load| load.requests)
                .sum();
            let silent = |name: &&&String| self.seen.workers[**name].load.is_none();
            let names: Vec<&str> = busy.iter().map(|name| name.as_str()).collect();
            let reason = match busy.iter().find(silent) {
                Some(silent) => format!("{silent} does not answer"),
                None => format!("{} still had {requests} requests", names.join(", ")),
            };
            let failure = Failure { reason, drain_timed_out: true };
            return self.to(Phase::Undo(Outcome::Failed(failure)));
        }
        self.act(self.drains(busy))
    }

    /// What drains those of `names` that can be told.
    fn drains<'n>(&self, names: impl IntoIterator<Item = &'n String>) -> Vec<Effect> {
        let told = |name: &&String| {
            let load = self.seen.workers.get(*name).and_then(|worker| worker.load);
            load.is_some_and(|load| !load.draining)
        };
        names.into_iter().filter(told).cloned().map(Effect::Drain).collect()
    }

    /// What ends `names`: each is drained first, unless there was time enough for that.
    fn ends(&self, names: &[String]) -> Vec<Effect> {
        let late = self.over(self.record.drain_timeout_ms);
        let mut effects = Vec::new();
        for name in names {
            match self.seen.workers.get(name) {
                None | Some(Seen { process: Process::Stopping, .. }) => {}
                Some(worker) if late || worker.drained() => {
                    effects.push(Effect::Retire(name.clone()));
                }
                Some(_) => effects.extend(self.drains([name])),
            }
        }
        effects
    }

    fn retire(&self) -> Step {
        let left = |name: &&String| self.seen.workers.contains_key(*name);
        let Some(left) = self.record.retired.iter().find(left) else {
            return self.to(Phase::Done);
        };
        // A worker that crashed since it was drained is another process now: hence not at once.
        if self.over(self.record.drain_timeout_ms.saturating_add(self.limits.end_ms)) {
            let trouble = self.trouble("its process goes on");
            let reason = format!("{left} was drained but does not end: {trouble}");
            return self.to(Phase::Failed(Failure { reason, drain_timed_out: false }));
        }
        self.act(self.ends(&self.record.retired))
    }

    fn undo(&self, outcome: &Outcome) -> Step {
        let there = |name: &&String| self.seen.workers.contains_key(*name);
        let launched = self.record.launched.iter().find(there);
        let told = |is: fn(&Seen) -> bool| -> Vec<&String> {
            let retired = self.record.retired.iter();
            let told = retired.filter(|name| !self.record.held.contains(name));
            told.filter(|name| self.seen.workers.get(*name).is_some_and(is)).collect()
        };
        let draining = told(Seen::draining);
        // They may have been told to drain before they fell silent.
        let silent = told(|worker| worker.process == Process::Ready && worker.load.is_none());
        // Those that have not been told, or have not done it, to be again what they were.
        let changed: Vec<&String> = self
            .record
            .converted
            .iter()
            .filter(|name| {
                let back = self.seen.donors.get(*name);
                let waits = |it: &Seen| it.process == Process::Ready && !it.serves();
                self.seen.workers.contains_key(*name) || back.is_some_and(waits)
            })
            .collect();
        let failed = |why: String| {
            let mut failure = match outcome.clone() {
                Outcome::Failed(failure) => failure,
                Outcome::Cancelled => {
                    Failure { reason: "cancelled".into(), drain_timed_out: false }
                }
            };
            failure.reason += &why;
            self.to(Phase::Failed(failure))
        };
        if launched.is_none() && draining.is_empty() && changed.is_empty() {
            return match (silent.first(), outcome.clone()) {
                (None, Outcome::Failed(failure)) => self.to(Phase::Failed(failure)),
                (None, Outcome::Cancelled) => self.to(Phase::Cancelled),
                (Some(name), _) if self.over(self.limits.answer_ms) => failed(may_drain(name)),
                (Some(_), _) => self.act(Vec::new()),
            };
        }
        if self.over(self.record.drain_timeout_ms.saturating_add(self.limits.end_ms)) {
            let first = draining.first().or(changed.first()).copied();
            let left = launched.or(first).map_or("", String::as_str);
            let trouble = self.trouble("no answer");
            return failed(format!("; {left} could not be put back: {trouble}"));
        }
        let mut effects: Vec<Effect> = draining.into_iter().cloned().map(Effect::Undrain).collect();
        // The last first: of a row, no other can be ended.
        let newest_first: Vec<String> = self.record.launched.iter().rev().cloned().collect();
        effects.extend(self.ends(&newest_first));
        if let Some(donor) = self.record.donor {
            effects.extend(changed.into_iter().map(|name| Effect::Assign(name.clone(), donor)));
        }
        self.act(effects)
    }
}

/// What an operator is told of workers that could not be asked.
fn may_drain(names: &str) -> String {
    format!("; {names} may still drain: put back what does with `baton drain --undo`")
}

impl Seen {
    /// Whether it takes requests.
    pub fn serves(&self) -> bool {
        let ready = |load: Load| load.registered && !load.draining;
        self.process == Process::Ready && self.load.is_some_and(ready)
    }

    fn draining(&self) -> bool {
        self.load.is_some_and(|load| load.draining)
    }

    /// Whether it has no requests and gets none. A process that has been ready and is silent may
    /// still serve: a lease that ran out proves nothing.
    pub fn drained(&self) -> bool {
        match (self.process, self.load) {
            (Process::Crashed { .. } | Process::Stopping, _) => true,
            (_, Some(load)) => load.draining && load.requests == 0,
            (Process::Starting, None) => true,
            (Process::Ready, None) => false,
        }
    }
}
