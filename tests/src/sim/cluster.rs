//! Pools of workers; what happens, in the order of time.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use baton_coordinator::planner::{PoolId, PoolSeen, Slo, WorkerSeen};
use baton_proto::InstanceRole;

use super::policy::{Policy, Size};
use super::worker::{Done, Request, Spec, Worker};
use super::workload::Arrival;

/// Seconds that a drained worker takes to serve in another role: it withdraws its record and
/// registers again.
const CONVERT: f64 = 1.0;

/// What became of a request. Times are in seconds since the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// When it came.
    pub arrived: f64,
    /// When it had its first token, and its last.
    pub first: f64,
    /// See `first`.
    pub last: f64,
    output: u32,
}

impl Outcome {
    /// Time to its first token, and mean time between the others.
    pub fn times(&self) -> (f64, f64) {
        let gaps = f64::from(self.output.saturating_sub(1).max(1));
        (self.first - self.arrived, (self.last - self.first) / gaps)
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcomes {
    /// Each request, in the order of arrival.
    pub requests: Vec<Outcome>,
    /// Seconds of workers, from launch to end, until the last request came.
    pub worker_seconds: f64,
    /// Changes of a pool's size.
    pub changes: u32,
    /// Workers that went from one pool to the other.
    pub converted: u32,
    /// Sizes of all pools, once a minute.
    pub sizes: Vec<Vec<u32>>,
    /// Sequences decoding, in the mean over time.
    pub decoding: f64,
}

impl Outcomes {
    /// The share of requests that kept both promises; and of each alone.
    pub fn attainment(&self, slo: &Slo) -> (f64, f64, f64) {
        let share = |good: &dyn Fn(&Outcome) -> bool| {
            self.requests.iter().filter(|it| good(it)).count() as f64
                / self.requests.len().max(1) as f64
        };
        let ttft = |it: &Outcome| it.times().0 <= slo.ttft;
        let itl = |it: &Outcome| it.times().1 <= slo.itl;
        (share(&|it| ttft(it) && itl(it)), share(&ttft), share(&itl))
    }
}

/// What can happen. In the order in which things of one moment do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Launched workers of a pool serve.
    Ready {
        pool: usize,
        worker: u32,
    },
    /// A worker is done with something, if its batch is still the one of this stamp.
    Due {
        pool: usize,
        worker: u32,
        stamp: u32,
    },
    /// A sequence reaches the pool where it decodes.
    Decode {
        request: Request,
    },
    Look,
    Minute,
}

struct Pool {
    id: PoolId,
    workers: Vec<Worker>,
    /// Those that take requests, by load.
    open: BTreeSet<(u64, u32)>,
    loads: Vec<u64>,
    starting: u32,
    draining: u32,
    waiting: VecDeque<Request>,
    startup: Option<f64>,
}

/// A simulated cluster.
pub struct Cluster<'a> {
    spec: Spec,
    arrivals: &'a [Arrival],
    /// One unified pool, or prefill and decode.
    pools: Vec<Pool>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    order: u64,
    now: f64,
    outcomes: Vec<Outcome>,
    left: Vec<f32>,
    unfinished: usize,
    changes: u32,
    converted: u32,
    decoding: (f64, f64, usize),
}

impl<'a> Cluster<'a> {
    /// Pools of these roles and sizes: one unified, or prefill and decode.
    pub fn new(spec: Spec, sizes: &[(InstanceRole, u32)], arrivals: &'a [Arrival]) -> Self {
        let mut cluster = Self {
            spec,
            arrivals,
            pools: Vec::new(),
            events: BinaryHeap::new(),
            order: 0,
            now: 0.0,
            outcomes: arrivals
                .iter()
                .map(|it| Outcome { arrived: it.at, output: it.output, ..Outcome::default() })
                .collect(),
            left: arrivals.iter().map(|it| it.output.saturating_sub(1) as f32).collect(),
            unfinished: arrivals.len(),
            changes: 0,
            converted: 0,
            decoding: (0.0, 0.0, 0),
        };
        for (role, size) in sizes {
            cluster.pools.push(Pool {
                id: PoolId { role: *role, model: "m".into() },
                workers: Vec::new(),
                open: BTreeSet::new(),
                loads: Vec::new(),
                starting: 0,
                draining: 0,
                waiting: VecDeque::new(),
                startup: None,
            });
            let pool = cluster.pools.len() - 1;
            for _ in 0..*size {
                let worker = cluster.launch(pool);
                cluster.open(pool, worker);
            }
        }
        cluster
    }

    /// The pools' names.
    pub fn pools(&self) -> Vec<PoolId> {
        self.pools.iter().map(|pool| pool.id.clone()).collect()
    }

    /// Runs until every request is answered.
    pub fn run(mut self, policy: &mut dyn Policy) -> Outcomes {
        let mut next = 0;
        let mut sizes = Vec::new();
        let over = self.arrivals.last().map_or(0.0, |it| it.at);
        self.at(0.0, Event::Look);
        self.at(0.0, Event::Minute);
        while self.unfinished > 0 {
            let due = self.events.peek().map(|Reverse((at, ..))| f64::from_bits(*at));
            let arrival = self.arrivals.get(next).map(|it| it.at);
            if let Some(at) = arrival.filter(|at| due.is_none_or(|due| *at <= due)) {
                self.now = at;
                self.arrive(next as Request);
                next += 1;
                continue;
            }
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            self.now = f64::from_bits(at);
            match event {
                Event::Ready { pool, worker } => {
                    self.pools[pool].starting -= 1;
                    self.open(pool, worker);
                }
                Event::Due { pool, worker, stamp } => {
                    if self.pools[pool].workers[worker as usize].stamp == stamp {
                        self.work(pool, worker);
                    }
                }
                Event::Decode { request } => self.decode(request),
                Event::Look => {
                    self.look(policy);
                    self.at(self.now + policy.every(), Event::Look);
                }
                Event::Minute => {
                    if self.now <= over {
                        sizes.push(self.pools.iter().map(Pool::size).collect());
                    }
                    self.at(self.now + 60.0, Event::Minute);
                }
            }
        }
        let workers = self.pools.iter().flat_map(|pool| &pool.workers);
        let seconds = workers
            .map(|it| (it.retired.unwrap_or(over).min(over) - it.launched.max(0.0)).max(0.0))
            .sum();
        self.count_decoding(0);
        Outcomes {
            requests: self.outcomes,
            worker_seconds: seconds,
            changes: self.changes,
            converted: self.converted,
            sizes,
            decoding: self.decoding.0 / self.now.max(1e-9),
        }
    }

    fn at(&mut self, at: f64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((at.to_bits(), self.order, event)));
    }

    /// Counts sequences that decode, over time.
    fn count_decoding(&mut self, change: isize) {
        let (sum, since, count) = &mut self.decoding;
        *sum += *count as f64 * (self.now - *since);
        *since = self.now;
        *count = count.saturating_add_signed(change);
    }

    fn launch(&mut self, pool: usize) -> u32 {
        let pool = &mut self.pools[pool];
        pool.workers.push(Worker::new(self.now));
        pool.loads.push(0);
        (pool.workers.len() - 1) as u32
    }

    fn open(&mut self, pool: usize, worker: u32) {
        self.pools[pool].open.insert((0, worker));
        while let Some(request) = self.pools[pool].waiting.pop_front() {
            match self.place(pool, request) {
                true => {}
                false => {
                    self.pools[pool].waiting.push_front(request);
                    break;
                }
            }
        }
    }

    fn arrive(&mut self, request: Request) {
        if !self.place(0, request) {
            self.pools[0].waiting.push_back(request);
        }
    }

    fn decode(&mut self, request: Request) {
        let last = self.pools.len() - 1;
        if !self.place(last, request) {
            self.pools[last].waiting.push_back(request);
        }
    }

    /// Gives a request to the worker with the least to do: its prompt, or what it has yet to
    /// decode. False when none can take it.
    fn place(&mut self, pool: usize, request: Request) -> bool {
        let Some(&(_, worker)) = self.pools[pool].open.first() else { return false };
        let spec = self.spec;
        let begun = self.outcomes[request as usize].first > 0.0;
        let (tokens, moved) = (self.left[request as usize], self.pools.len() == 1 && begun);
        let now = self.now;
        let it = &mut self.pools[pool].workers[worker as usize];
        if begun && it.decoding() >= spec.slots {
            return false;
        }
        it.advance(now, &spec);
        if begun {
            it.requests += u64::from(!moved);
            it.decode(request, f64::from(tokens));
            self.count_decoding(1);
        } else {
            it.requests += 1;
            let prompt = f64::from(self.arrivals[request as usize].prompt).max(1.0);
            it.prompts.push_back((request, prompt));
            it.backlog += prompt;
        }
        self.changed(pool, worker);
        true
    }

    /// Takes what a worker is done with.
    fn work(&mut self, pool: usize, worker: u32) {
        let (spec, now) = (self.spec, self.now);
        self.pools[pool].workers[worker as usize].advance(now, &spec);
        let unified = self.pools.len() == 1;
        while let Some(done) = self.pools[pool].workers[worker as usize].take(&spec) {
            let it = &mut self.pools[pool].workers[worker as usize];
            match done {
                Done::Prompt(request) => {
                    let outcome = &mut self.outcomes[request as usize];
                    let handoff = if unified { 0.0 } else { spec.handoff };
                    outcome.first = now + handoff;
                    outcome.last = outcome.first;
                    it.first_token(now - outcome.arrived);
                    let left = self.left[request as usize];
                    if left <= 0.0 {
                        it.finished += 1;
                        self.unfinished -= 1;
                    } else if !unified || it.draining {
                        it.finished += 1;
                        self.at(now + spec.handoff, Event::Decode { request });
                    } else {
                        it.decode(request, f64::from(left));
                        self.count_decoding(1);
                    }
                }
                Done::Sequence(request) => {
                    it.finished += 1;
                    self.outcomes[request as usize].last = now;
                    self.unfinished -= 1;
                    self.count_decoding(-1);
                }
            }
        }
        self.changed(pool, worker);
        while let Some(request) = self.pools[pool].waiting.pop_front() {
            if !self.place(pool, request) {
                self.pools[pool].waiting.push_front(request);
                break;
            }
        }
    }

    /// A worker has another batch now.
    fn changed(&mut self, pool: usize, worker: u32) {
        let (spec, now, pools) = (self.spec, self.now, self.pools.len());
        let it = &mut self.pools[pool].workers[worker as usize];
        it.stamp += 1;
        let (stamp, due, draining, empty) = (it.stamp, it.due(&spec), it.draining, it.is_empty());
        // What it has to do, in seconds; when it will be free, where it is a queue.
        let tokens = it.backlog.max(0.0);
        let step = spec.step;
        let load = match pools {
            1 => tokens * step.token + it.decoding() as f64 * step.row,
            _ if pool == 0 => now + tokens * (step.token + step.fixed / spec.chunk),
            _ => it.decoding() as f64,
        };
        if draining && empty && it.retired.is_none() {
            it.retired = Some(now);
            let converts = it.converts;
            self.pools[pool].draining -= 1;
            if converts {
                self.converted(pool, worker);
            }
        }
        if !draining {
            let pool = &mut self.pools[pool];
            let slot = &mut pool.loads[worker as usize];
            let before = std::mem::replace(slot, load.max(0.0).to_bits());
            pool.open.remove(&(before, worker));
            pool.open.insert((*slot, worker));
        }
        if let Some(due) = due {
            self.at(due, Event::Due { pool, worker, stamp });
        }
    }

    fn look(&mut self, policy: &mut dyn Policy) {
        let (spec, now) = (self.spec, self.now);
        let seen: Vec<PoolSeen> = self
            .pools
            .iter_mut()
            .map(|pool| {
                let serving: Vec<u32> = pool.open.iter().map(|(_, worker)| *worker).collect();
                let waiting = pool.waiting.len() as u32;
                let workers = serving.iter().enumerate().map(|(i, &worker)| {
                    let it = &mut pool.workers[worker as usize];
                    it.advance(now, &spec);
                    // What waits for the pool is told by its first worker.
                    let counters = it.counters(&spec, if i == 0 { waiting } else { 0 });
                    WorkerSeen { id: worker.to_string(), counters }
                });
                PoolSeen {
                    workers: workers.collect(),
                    pool: pool.id.clone(),
                    size: pool.size(),
                    startup: pool.startup.take(),
                    held: pool.busy().then(|| "an operation runs".to_owned()),
                }
            })
            .collect();
        for (i, Size { target, converts }) in policy.decide(now, &seen).into_iter().enumerate() {
            // As it was decided on: a donor has fewer by now.
            let size = seen[i].size;
            if policy.waits() && self.pools[i].busy() {
                continue;
            }
            self.changes += u32::from(target != size);
            if converts {
                // Of prefill and decode there are two.
                (size..target).for_each(|_| self.convert(1 - i));
                continue;
            }
            for _ in size..target {
                let worker = self.launch(i);
                self.pools[i].starting += 1;
                self.pools[i].startup = Some(spec.startup);
                self.at(now + spec.startup, Event::Ready { pool: i, worker });
            }
            for _ in target..size {
                self.retire(i);
            }
        }
    }

    /// Has the worker with the least to do go to the other pool once it is drained.
    fn convert(&mut self, pool: usize) {
        if let Some(worker) = self.retire(pool) {
            self.converted += 1;
            self.pools[1 - pool].starting += 1;
            let it = &mut self.pools[pool].workers[worker as usize];
            it.converts = true;
            if it.is_empty() {
                self.converted(pool, worker);
            }
        }
    }

    /// A worker that goes to the other pool is drained.
    fn converted(&mut self, pool: usize, worker: u32) {
        self.pools[pool].workers[worker as usize].converts = false;
        let (other, at) = (1 - pool, self.now + CONVERT);
        let worker = self.launch(other);
        self.at(at, Event::Ready { pool: other, worker });
    }

    /// Drains the worker with the least to do, and says which it is; the last one stays.
    fn retire(&mut self, pool: usize) -> Option<u32> {
        let (spec, now) = (self.spec, self.now);
        if self.pools[pool].open.len() < 2 {
            return None;
        }
        let (_, worker) = self.pools[pool].open.pop_first()?;
        let it = &mut self.pools[pool].workers[worker as usize];
        it.advance(now, &spec);
        it.draining = true;
        let moved = it.give_up();
        self.pools[pool].draining += 1;
        self.count_decoding(-(moved.len() as isize));
        for (request, left) in moved {
            self.left[request as usize] = left as f32;
            self.at(now + spec.handoff, Event::Decode { request });
        }
        self.changed(pool, worker);
        Some(worker)
    }
}

impl Pool {
    /// Workers that it has, or will have in a moment.
    fn size(&self) -> u32 {
        self.open.len() as u32 + self.starting
    }

    fn busy(&self) -> bool {
        self.starting + self.draining > 0
    }
}
