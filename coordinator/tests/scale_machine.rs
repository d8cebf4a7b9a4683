//! The machine of scale operations against a simulated cluster that does its worst.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::InstanceRole;
use proptest::prelude::*;

use baton_coordinator::scale::machine::{
    Effect, Limits, Load, Observed, Process, Row, Seen, Trouble, step,
};
use baton_coordinator::scale::record::{Outcome, Phase, Record};

const LIMITS: Limits = Limits { launch_ms: 5_000, answer_ms: 2_000, end_ms: 3_000, crashes: 3 };
const DRAIN_MS: u64 = 4_000;
/// Steps of 100 ms in which every operation must have ended: the sum of all limits, and some.
const MOST_TICKS: usize = 400;

/// What happens between two steps, drawn at random.
#[derive(Clone, Debug)]
struct Tick {
    /// Effects that are lost, and that are done twice, by position.
    lost: u8,
    twice: u8,
    /// Which worker something happens to, and what.
    who: u8,
    what: What,
    cancel: bool,
    /// The leader dies after it has decided, before anything is written or done.
    dies: bool,
    /// The leader dies between the write and whatever it would do next: nothing is kept but the
    /// record.
    blind: bool,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Nothing,
    /// A starting worker is ready; a busy one ends a request; one that is stopping is gone.
    Progress,
    /// Requests come, unless it drains.
    Requests,
    Crash,
    CrashForGood,
    /// Its supervisor starts it again.
    Restart,
    Silent,
    Speaks,
    LosesLease,
    Registers,
    /// Somebody else makes the row longer or shorter by one.
    Outsider,
}

/// Ticks; with `outsiders`, somebody else changes the row now and then.
fn tick(outsiders: bool) -> impl Strategy<Value = Tick> {
    let what = prop_oneof![
        2 => Just(if outsiders { What::Outsider } else { What::Nothing }),
        2 => Just(What::Nothing),
        12 => Just(What::Progress),
        2 => Just(What::Requests),
        1 => Just(What::Crash),
        1 => Just(What::CrashForGood),
        2 => Just(What::Restart),
        1 => Just(What::Silent),
        2 => Just(What::Speaks),
        1 => Just(What::LosesLease),
        2 => Just(What::Registers),
    ];
    let flag = |p| prop::bool::weighted(p);
    (any::<u8>(), any::<u8>(), any::<u8>(), what, flag(0.01), flag(0.1), flag(0.02)).prop_map(
        |(lost, twice, who, what, cancel, dies, blind)| Tick {
            lost: if lost < 64 { lost } else { u8::MAX },
            twice: if twice < 64 { twice } else { u8::MAX },
            who,
            what,
            cancel,
            dies,
            blind,
        },
    )
}

#[derive(Clone, Debug)]
struct Worker {
    process: Process,
    crashes: u32,
    requests: u32,
    draining: bool,
    registered: bool,
    silent: bool,
    started_ms: u64,
    /// Of the launch that the operation made.
    new: bool,
    /// The pool that it is listed in, and what it really does.
    pool: InstanceRole,
    role: InstanceRole,
}

#[derive(Clone, Debug, Default)]
struct World {
    now_ms: u64,
    workers: BTreeMap<String, Worker>,
    others: u32,
    launches: bool,
    /// Its workers are a row that begins with number 1.
    row: bool,
}

impl World {
    fn new(count: u32, others: u32, requests: &[u32], launches: bool) -> Self {
        let worker = |n: u32| {
            let worker = Worker {
                process: Process::Ready,
                crashes: 0,
                requests: requests[n as usize % requests.len()],
                draining: false,
                registered: true,
                silent: false,
                started_ms: u64::from(n),
                new: false,
                pool: InstanceRole::Decode,
                role: InstanceRole::Decode,
            };
            (format!("decode-{}", n + 1), worker)
        };
        let workers = (0..count).map(worker).collect();
        Self { now_ms: 1_000, workers, others, launches, row: false }
    }

    /// With workers of another pool, `prefill-1` and on, with so many requests each.
    fn with_donors(mut self, requests: &[u32]) -> Self {
        for (n, &requests) in requests.iter().enumerate() {
            let (pool, role) = (InstanceRole::Prefill, InstanceRole::Prefill);
            let ready = (Process::Ready, true, false, n as u64);
            let (process, registered, new, started_ms) = ready;
            let starting = self.starting();
            let worker =
                Worker { process, registered, new, started_ms, requests, pool, role, ..starting };
            self.workers.insert(format!("prefill-{}", n + 1), worker);
        }
        self
    }

    /// The number of a row's last worker that is not ending.
    fn last(&self) -> u32 {
        let kept = self.workers.iter().filter(|(_, it)| it.process != Process::Stopping);
        kept.filter_map(|(name, _)| name.strip_prefix("decode-")?.parse().ok()).max().unwrap_or(0)
    }

    fn starting(&self) -> Worker {
        Worker {
            process: Process::Starting,
            crashes: 0,
            requests: 0,
            draining: false,
            registered: false,
            silent: false,
            started_ms: self.now_ms,
            new: true,
            pool: InstanceRole::Decode,
            role: InstanceRole::Decode,
        }
    }

    fn observe(&self, blind: bool) -> Observed {
        let seen = |worker: &Worker| {
            let answers = worker.process == Process::Ready && !worker.silent;
            let load = Load {
                requests: worker.requests,
                draining: worker.draining,
                registered: worker.registered && worker.role == worker.pool,
            };
            Seen {
                process: worker.process,
                load: answers.then_some(load),
                started_ms: worker.started_ms,
                said: "said".into(),
            }
        };
        let of = |pool: InstanceRole| -> BTreeMap<String, Seen> {
            let all = self.workers.iter().filter(|(_, worker)| worker.pool == pool && !blind);
            all.map(|(name, worker)| (name.clone(), seen(worker))).collect()
        };
        Observed {
            now_ms: self.now_ms,
            workers: of(InstanceRole::Decode),
            donors: of(InstanceRole::Prefill),
            cannot_convert: (!self.launches).then(|| "no template".to_owned()),
            others: self.others,
            others_serving: self.others,
            keeper: String::new(),
            taken: self.workers.keys().cloned().collect(),
            cannot_launch: (!self.launches).then(|| "no template".to_owned()),
            trouble: None,
            blind: blind.then(|| "the folder cannot be read".to_owned()),
            row: self.row.then(|| {
                let end = self.last() + 1;
                Row { name: "decode".into(), end, told: format!("{} replicas", end - 1) }
            }),
        }
    }

    /// Does an effect, and holds it against what is allowed.
    fn apply(&mut self, effect: &Effect, record: &Record, seen: &Observed) {
        match effect {
            Effect::Launch(name) => {
                assert!(record.launched.contains(name), "recorded before it is done");
                let worker = self.starting();
                self.workers.entry(name.clone()).or_insert(worker);
            }
            Effect::Drain(name) => {
                if let Some(worker) = self.workers.get_mut(name)
                    && worker.process == Process::Ready
                    && !worker.silent
                {
                    worker.draining = true;
                }
            }
            Effect::Undrain(name) => {
                let worker = self.workers.get_mut(name).expect("it was seen");
                if worker.process == Process::Ready && !worker.silent {
                    worker.draining = false;
                }
            }
            Effect::Assign(name, pool) => {
                assert!(record.converted.contains(name), "recorded before it is done");
                let worker = self.workers.get_mut(name).expect("it was seen");
                worker.pool = *pool;
                if worker.process == Process::Ready && !worker.silent {
                    // It changes when its requests are gone; see `What::Progress`.
                    worker.draining = worker.role != *pool;
                }
            }
            Effect::Retire(name) => {
                let old = record.retired.contains(name);
                assert!(old || record.launched.contains(name), "{name} is none of its affair");
                assert!(!old || record.phase == Phase::Retire, "{name}: before its time");
                let late = seen.now_ms >= record.phase_ms + record.drain_timeout_ms;
                if self.row && *name != format!("decode-{}", self.last()) {
                    // Refused: it is not the last.
                    return;
                }
                let Some(worker) = self.workers.get_mut(name) else { return };
                let told = seen.workers[name].drained();
                assert!(told || late, "{name} is ended undrained: {worker:?}");
                if told && worker.draining && !late {
                    assert_eq!(worker.requests, 0, "{name} is ended with requests");
                }
                worker.process = Process::Stopping;
            }
        }
    }

    fn happen(&mut self, tick: &Tick) {
        self.now_ms += 100;
        // Those that stop are gone sooner or later, whatever else happens.
        let gone =
            |worker: &Worker| worker.process == Process::Stopping && tick.who.is_multiple_of(3);
        self.workers.retain(|_, worker| !gone(worker));
        if let (true, What::Outsider) = (self.row, tick.what) {
            let (last, worker) = (self.last(), self.starting());
            if tick.who.is_multiple_of(2) {
                self.workers.entry(format!("decode-{}", last + 1)).or_insert(worker);
            } else if let Some(worker) = self.workers.get_mut(&format!("decode-{last}")) {
                worker.process = Process::Stopping;
            }
            return;
        }
        let count = self.workers.len().max(1);
        let Some(worker) = self.workers.values_mut().nth(usize::from(tick.who) % count) else {
            return;
        };
        match (tick.what, worker.process) {
            (What::Progress, Process::Starting) => {
                (worker.process, worker.registered) = (Process::Ready, true);
                (worker.draining, worker.silent, worker.requests) = (false, false, 0);
                worker.role = worker.pool;
            }
            (What::Progress, Process::Ready) => {
                worker.requests = worker.requests.saturating_sub(1);
                if worker.requests == 0 && worker.role != worker.pool {
                    (worker.role, worker.draining, worker.registered) = (worker.pool, false, true);
                }
            }
            (What::Requests, Process::Ready) if !worker.draining => worker.requests += 2,
            (What::Crash | What::CrashForGood, Process::Starting | Process::Ready) => {
                worker.crashes += 1;
                let hopeless = matches!(tick.what, What::CrashForGood) && worker.new;
                worker.process = Process::Crashed { times: worker.crashes, hopeless };
                (worker.requests, worker.registered) = (0, false);
            }
            (What::Restart, Process::Crashed { hopeless: false, .. }) => {
                (worker.process, worker.draining) = (Process::Starting, false);
            }
            (What::Silent, _) => worker.silent = true,
            (What::Speaks, _) => worker.silent = false,
            (What::LosesLease, _) => worker.registered = false,
            (What::Registers, Process::Ready) => worker.registered = true,
            _ => {}
        }
    }
}

/// Runs an operation through the ticks, and then through calm ones, to its end.
fn run(world: World, size: u32, ticks: &[Tick]) -> (World, Record) {
    run_record(world, Record::new(InstanceRole::Decode, "m".into(), size, DRAIN_MS), ticks)
}

/// One that takes new workers from the other pool.
fn run_converting(world: World, size: u32, ticks: &[Tick]) -> (World, Record) {
    let record = Record::new(InstanceRole::Decode, "m".into(), size, DRAIN_MS);
    run_record(world, Record { donor: Some(InstanceRole::Prefill), ..record }, ticks)
}

fn run_record(mut world: World, mut record: Record, ticks: &[Tick]) -> (World, Record) {
    record.phase_ms = world.now_ms;
    let calm = Tick {
        lost: u8::MAX,
        twice: u8::MAX,
        who: 0,
        what: What::Nothing,
        cancel: false,
        dies: false,
        blind: false,
    };
    for i in 0..MOST_TICKS {
        let tick = ticks.get(i).cloned().unwrap_or(Tick { who: i as u8, ..calm.clone() });
        world.happen(&tick);
        if tick.cancel && record.phase.cancellable() {
            record.cancel = true;
        }
        let seen = world.observe(tick.blind);
        let (next, effects) = step(&record, &seen, &LIMITS);
        assert!(next == record || effects.is_empty(), "a step moves or acts, never both");
        if tick.dies {
            continue;
        }
        for (at, effect) in effects.iter().enumerate() {
            if usize::from(tick.lost) == at {
                continue;
            }
            world.apply(effect, &record, &seen);
            if usize::from(tick.twice) == at {
                world.apply(effect, &record, &seen);
            }
        }
        record = next;
        if record.phase.ended() {
            return (world, record);
        }
    }
    panic!("it does not end: {record:?}\n{world:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn whatever_happens_it_ends_with_the_size_or_as_it_was(
        (count, others, size) in (0u32..6, 0u32..3, 0u32..8),
        requests in prop::collection::vec(0u32..6, 1..6),
        launches in prop::bool::weighted(0.9),
        row in any::<bool>(),
        ticks in prop::collection::vec(tick(false), 0..150),
    ) {
        let before = World { row, ..World::new(count, others, &requests, launches) };
        let names: BTreeSet<String> = before.workers.keys().cloned().collect();
        let (world, record) = run(before, size, &ticks);
        // Nobody but those that were named is touched.
        for name in names.iter().filter(|name| !record.retired.contains(name)) {
            prop_assert!(world.workers.contains_key(name), "{} is gone", name);
            prop_assert!(!world.workers[name].draining, "{} drains", name);
        }
        let there = world.workers.len() as u32 + others;
        let told = match &record.phase {
            Phase::Failed(failure) => ["put back", "does not end", "may still drain", "be read"]
                .iter()
                .any(|words| failure.reason.contains(words)),
            _ => false,
        };
        if record.phase != Phase::Done && !told {
            let drains = |it: &Worker| it.process == Process::Ready && it.draining;
            prop_assert!(!world.workers.values().any(drains), "{:?}\n{:?}", record, world);
        }
        match &record.phase {
            Phase::Done => prop_assert_eq!(there, size),
            Phase::Cancelled => {
                prop_assert_eq!(there, count + others);
                prop_assert!(world.workers.values().all(|worker| !worker.new));
            }
            Phase::Failed(failure) => {
                prop_assert!(!failure.reason.is_empty());
                // Where undoing fails too, the reason says so; and nobody undoes a retirement.
                if !told {
                    prop_assert!(world.workers.values().all(|worker| !worker.new), "{:?}", failure);
                    prop_assert_eq!(there, count + others);
                }
            }
            phase => prop_assert!(false, "{:?}", phase),
        }
        prop_assert!(record.ended_ms > 0);
    }

    /// Workers that change their role do so all or, where undoing works, none; nobody is lost.
    #[test]
    fn whatever_happens_workers_are_of_one_pool_or_the_other(
        (count, size) in (0u32..4, 0u32..6),
        requests in prop::collection::vec(0u32..6, 1..4),
        donors in prop::collection::vec(0u32..6, 0..5),
        launches in prop::bool::weighted(0.9),
        ticks in prop::collection::vec(tick(false), 0..150),
    ) {
        let before = World::new(count, 0, &requests, launches).with_donors(&donors);
        let names: BTreeSet<String> = before.workers.keys().cloned().collect();
        let (world, record) = run_converting(before, size, &ticks);
        let after: BTreeSet<String> = world.workers.keys().cloned().collect();
        prop_assert_eq!(names, after, "nobody is launched or ended");
        let of = |pool| world.workers.values().filter(|it| it.pool == pool).count() as u32;
        prop_assert!(record.converted.is_empty() || of(InstanceRole::Prefill) > 0, "one stays");
        for (name, worker) in &world.workers {
            let named = record.converted.contains(name);
            prop_assert!(named || !worker.draining, "{} drains", name);
            prop_assert!(named || worker.role == worker.pool, "{} has changed", name);
        }
        match &record.phase {
            Phase::Done => prop_assert_eq!(of(InstanceRole::Decode), size),
            Phase::Cancelled | Phase::Failed(_) => {
                let told = match &record.phase {
                    Phase::Failed(failure) => {
                        prop_assert!(!failure.reason.is_empty());
                        failure.reason.contains("could not be put back")
                            || failure.reason.contains("cannot be read")
                    }
                    _ => false,
                };
                prop_assert!(told || of(InstanceRole::Decode) == count, "{:?}", record);
            }
            phase => prop_assert!(false, "{:?}", phase),
        }
    }

    /// Somebody else changes a row meanwhile: it ends all the same, and still ends nobody who has
    /// requests ([`World::apply`] looks).
    #[test]
    fn a_row_that_others_change_ends_too(
        (count, size) in (0u32..6, 0u32..8),
        requests in prop::collection::vec(0u32..6, 1..6),
        ticks in prop::collection::vec(tick(true), 0..150),
    ) {
        let before = World { row: true, ..World::new(count, 0, &requests, true) };
        let (_, record) = run(before, size, &ticks);
        if let Phase::Failed(failure) = &record.phase {
            prop_assert!(!failure.reason.is_empty());
        }
        prop_assert!(record.ended_ms > 0);
    }

    /// In a cluster where everything works, every size is reached that can be.
    #[test]
    fn in_peace_the_size_is_reached(
        (count, others, size) in (0u32..6, 0u32..3, 0u32..8),
        requests in prop::collection::vec(0u32..3, 1..6),
        row in any::<bool>(),
    ) {
        let world = World { row, ..World::new(count, others, &requests, true) };
        let progress = |i: usize| Tick {
            lost: u8::MAX, twice: u8::MAX, who: i as u8, what: What::Progress,
            cancel: false, dies: false, blind: false,
        };
        let ticks: Vec<Tick> = (0..200).map(progress).collect();
        let (world, record) = run(world, size, &ticks);
        if size < others {
            prop_assert!(matches!(record.phase, Phase::Failed(_)), "{:?}", record);
        } else {
            prop_assert_eq!(record.phase, Phase::Done);
            prop_assert_eq!(world.workers.len() as u32 + others, size);
            prop_assert_eq!(record.from, count + others);
        }
    }
}

#[test]
fn workers_with_the_least_to_do_change_their_role_and_one_stays() {
    let progress = |i: usize| Tick {
        lost: u8::MAX,
        twice: u8::MAX,
        who: i as u8,
        what: What::Progress,
        cancel: false,
        dies: false,
        blind: false,
    };
    let ticks: Vec<Tick> = (0..200).map(progress).collect();
    let world = World::new(1, 0, &[0], true).with_donors(&[2, 0, 1]);
    let (world, record) = run_converting(world, 3, &ticks);
    assert_eq!(record.phase, Phase::Done);
    assert_eq!(record.converted, ["prefill-2", "prefill-3"]);
    let decodes = |name: &str| {
        let worker = &world.workers[name];
        worker.role == InstanceRole::Decode && !worker.draining
    };
    assert!(decodes("prefill-2") && decodes("prefill-3") && !decodes("prefill-1"));

    let world = World::new(1, 0, &[0], true).with_donors(&[0]);
    let (_, record) = run_converting(world, 2, &ticks);
    let Phase::Failed(failure) = record.phase else { panic!("{record:?}") };
    assert!(failure.reason.contains("one must stay"), "{}", failure.reason);
    let world = World::new(3, 0, &[0], true).with_donors(&[0, 0]);
    let (_, record) = run_converting(world, 2, &ticks);
    let Phase::Failed(failure) = record.phase else { panic!("{record:?}") };
    assert!(failure.reason.contains("without `from_pool`"), "{}", failure.reason);
}

fn observed(world: &World) -> Observed {
    world.observe(false)
}

#[test]
fn the_idle_and_the_new_go_first() {
    let mut world = World::new(4, 0, &[3, 0, 0, 5], true);
    world.workers.get_mut("decode-4").expect("it is there").draining = true;
    let record = Record::new(InstanceRole::Decode, "m".into(), 1, DRAIN_MS);
    let (next, _) = step(&record, &observed(&world), &LIMITS);
    assert_eq!(next.retired, ["decode-4", "decode-3", "decode-2"]);
    assert_eq!(next.held, ["decode-4"], "it was drained before, and is left so on failure");
    assert_eq!(next.phase, Phase::Rebalance);
}

#[test]
fn new_names_are_the_free_ones() {
    let mut world = World::new(3, 0, &[0], true);
    world.workers.remove("decode-2");
    let record = Record::new(InstanceRole::Decode, "m".into(), 4, DRAIN_MS);
    let (next, effects) = step(&record, &observed(&world), &LIMITS);
    assert_eq!(next.launched, ["decode-2", "decode-4"]);
    assert!(effects.is_empty());
    let (same, effects) = step(&next, &observed(&world), &LIMITS);
    assert_eq!(same, next);
    assert_eq!(effects, ["decode-2", "decode-4"].map(|name| Effect::Launch(name.into())));
}

#[test]
fn a_drain_that_takes_too_long_puts_the_workers_back() {
    let world = World::new(2, 0, &[7], true);
    let (world, record) = run(world, 1, &[]);
    let Phase::Failed(failure) = &record.phase else { panic!("{record:?}") };
    assert!(failure.drain_timed_out, "{failure:?}");
    assert!(failure.reason.contains("decode-2 still had 7 requests"), "{failure:?}");
    assert!(world.workers.values().all(|worker| !worker.draining));
    assert_eq!(world.workers.len(), 2);
}

#[test]
fn nobody_is_drained_while_those_who_stay_are_silent() {
    let mut world = World::new(2, 0, &[0], true);
    let record = Record::new(InstanceRole::Decode, "m".into(), 1, DRAIN_MS);
    let (record, _) = step(&record, &observed(&world), &LIMITS);
    assert_eq!(record.retired, ["decode-2"]);
    world.workers.get_mut("decode-1").expect("it is there").silent = true;
    let (same, effects) = step(&record, &observed(&world), &LIMITS);
    assert_eq!((same.phase, effects), (Phase::Rebalance, Vec::new()));
    world.now_ms = record.phase_ms + LIMITS.answer_ms;
    let (next, _) = step(&record, &observed(&world), &LIMITS);
    assert_eq!(next.phase.as_str(), "undo");
}

/// A row of workers `decode-0` and on, with so many requests each.
fn row(requests: &[u32]) -> Observed {
    let mut world = World::new(requests.len() as u32, 0, requests, true);
    let rename = |(name, worker): (String, Worker)| {
        let number: u32 =
            name.strip_prefix("decode-").and_then(|n| n.parse().ok()).expect("a number");
        (format!("decode-{}", number - 1), worker)
    };
    world.workers = world.workers.into_iter().map(rename).collect();
    let end = requests.len() as u32;
    let row = Row { name: "decode".into(), end, told: format!("{end} replicas") };
    Observed { row: Some(row), ..world.observe(false) }
}

fn planned(size: u32, seen: &Observed) -> Record {
    let record = Record::new(InstanceRole::Decode, "m".into(), size, DRAIN_MS);
    let (record, effects) = step(&record, seen, &LIMITS);
    assert!(effects.is_empty());
    record
}

#[test]
fn of_a_row_the_last_go_whatever_they_have_to_do() {
    let record = planned(1, &row(&[0, 0, 9]));
    assert_eq!(record.retired, ["decode-2", "decode-1"]);
}

#[test]
fn a_row_goes_on_with_the_next_number_although_a_worker_of_that_name_is_ending() {
    let mut seen = row(&[0, 0, 0]);
    seen.row.as_mut().expect("a row").end = 2;
    seen.workers.get_mut("decode-2").expect("it is there").process = Process::Stopping;
    let record = planned(3, &seen);
    assert_eq!((record.from, record.launched.as_slice()), (2, ["decode-2".to_owned()].as_slice()));
    let (same, effects) = step(&record, &seen, &LIMITS);
    assert_eq!(same.phase, Phase::Launch);
    assert_eq!(effects, [Effect::Launch("decode-2".into())]);
}

#[test]
fn what_somebody_else_makes_of_a_row_stands_and_is_told() {
    // Larger, while the new ones start: they stay.
    let record = planned(3, &row(&[0, 0]));
    assert_eq!(record.launched, ["decode-2"]);
    let (undo, effects) = step(&record, &row(&[0, 0, 0, 0]), &LIMITS);
    assert!(effects.is_empty() && undo.phase.as_str() == "undo", "{undo:?}");
    let (failed, effects) = step(&undo, &row(&[0, 0, 0, 0]), &LIMITS);
    let Phase::Failed(failure) = failed.phase else { panic!("{failed:?}") };
    assert!(effects.is_empty() && failure.reason.contains("4 replicas"), "{failure:?}");

    // Smaller, while some drain: those that are left are put back, even when it was too late.
    let mut record = planned(2, &row(&[0, 0, 0, 0]));
    for phase in [Phase::Drain, Phase::Retire] {
        record.phase = phase;
        let mut seen = row(&[0, 0, 0, 0, 0]);
        for name in &record.retired {
            let worker = seen.workers.get_mut(name).expect("it is there");
            worker.load.as_mut().expect("it answers").draining = true;
        }
        let (undo, _) = step(&record, &seen, &LIMITS);
        let (_, effects) = step(&undo, &seen, &LIMITS);
        assert_eq!(effects, ["decode-3", "decode-2"].map(|name| Effect::Undrain(name.into())));
    }
    // What it has done itself is no news, half done neither.
    record.phase = Phase::Retire;
    for left in [4, 3, 2] {
        let (same, _) = step(&record, &row(&vec![0; left]), &LIMITS);
        assert_ne!(same.phase.as_str(), "undo", "{left}");
    }
}

#[test]
fn trouble_that_passes_is_waited_for() {
    let mut seen = row(&[0]);
    let record = planned(2, &seen);
    let trouble = |passes| Some(Trouble { said: "no answer".into(), passes });
    seen.trouble = trouble(true);
    let (same, effects) = step(&record, &seen, &LIMITS);
    assert_eq!((same, effects.len()), (record.clone(), 1));
    seen.now_ms = record.phase_ms + LIMITS.launch_ms;
    let (undo, _) = step(&record, &seen, &LIMITS);
    assert!(format!("{undo:?}").contains("in time: no answer"), "{undo:?}");
    seen.now_ms = record.phase_ms;
    seen.trouble = trouble(false);
    assert_eq!(step(&record, &seen, &LIMITS).0.phase.as_str(), "undo");
}

/// A process that is ready has said nothing that could be the reason.
#[test]
fn why_a_new_worker_does_not_serve_is_told() {
    let record = planned(2, &observed(&World::new(1, 0, &[0], true)));
    assert_eq!(record.launched, ["decode-2"]);
    let record = Record { phase: Phase::Join, ..record };
    type Change = fn(&mut Worker);
    let cases: [(Change, &str); 4] = [
        (|it| it.silent = true, "it runs, but no `decode` worker of model `m` is registered"),
        (|it| it.draining = true, "it drains"),
        (|it| it.registered = false, "it answers, but is not registered in etcd as a `decode`"),
        (|it| it.process = Process::Starting, "said"),
    ];
    for (change, told) in cases {
        let mut world = World::new(2, 0, &[0], true);
        change(world.workers.get_mut("decode-2").expect("it is there"));
        let (same, effects) = step(&record, &observed(&world), &LIMITS);
        assert_eq!((same, effects), (record.clone(), Vec::new()), "there is time");
        world.now_ms = record.phase_ms + LIMITS.launch_ms;
        let (undo, _) = step(&record, &observed(&world), &LIMITS);
        let Phase::Undo(Outcome::Failed(failure)) = undo.phase else { panic!("{undo:?}") };
        let expected = format!("decode-2 does not serve after 5 s: {told}");
        assert!(failure.reason.starts_with(&expected), "{failure:?}");
    }
}
