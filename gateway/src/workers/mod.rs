//! The workers as this gateway sees them.
//!
//! * [`Registry`]: all workers, by instance; what models they serve.
//! * `adapters`: the LoRA adapters of each worker.
//! * `blocks`: what each holds in its prefix cache.
//! * `connection`: one task per worker that connects, learns what it serves and listens to its
//!   status. The stream of status is the sign of life: when it breaks the worker is out of routing
//!   at once, whatever etcd says; while it flows the worker stays, whatever etcd says.
//! * `departed`: what was served until a while ago.
//! * `faults`: whose steps fail.
//! * [`tasks`]: what each model can be asked for.
//! * [`recent`]: where the last sequences were computed.

mod adapters;
mod blocks;
mod connection;
mod departed;
#[cfg(test)]
pub(crate) mod fake;
mod faults;
pub mod recent;
pub mod tasks;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use baton_membership::tls::connect_lazy;
use baton_membership::{ClusterWatch, InstanceRecord, InstanceRole, Membership};
use baton_proto::v1::worker_client::WorkerClient;
use baton_proto::v1::{Adapter, ModelCard, Task, WorkerDescription, WorkerStatus};
use baton_proto::{BlockHash, MAX_MESSAGE_BYTES};
use parking_lot::{Mutex, RwLock};
use thread_local::ThreadLocal;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use crate::routing::kv_index::{Depths, KvIndex, Slot};
use crate::routing::prefix_index::PrefixIndex;
use crate::routing::{Candidate, Policy, choose, worth_handing_off};
use crate::text::TextModel;
use adapters::Loaded;
use departed::Departed;
use faults::Faults;
use recent::Recent;
pub use tasks::Lack;

/// How long a worker that refused for want of room is passed over.
const FULL_FOR: Duration = Duration::from_millis(250);
/// Addresses of KV blocks that are kept in mind, of all workers together: some 300 MB at most, and
/// 32 bytes for each worker more that has one.
const MAX_INDEXED: usize = 4_000_000;

/// A worker process.
pub struct Worker {
    /// Its record in etcd.
    pub record: InstanceRecord,
    /// How to connect for sequences.
    sequences: Endpoint,
    /// The connections for sequences: each thread that serves has its own, driven by that thread,
    /// so that a request is served without waking another one.
    channels: ThreadLocal<Channel>,
    /// For everything else.
    control: Channel,
    /// What it serves; known once it has answered.
    served: ArcSwapOption<Served>,
    /// What else it serves: the model with each of its adapters.
    adapters: ArcSwap<Loaded>,
    /// The registry's.
    departed: Arc<Departed>,
    /// Its last status.
    status: ArcSwapOption<WorkerStatus>,
    /// Its first status, if it was there before this gateway.
    first_status: OnceLock<Arc<WorkerStatus>>,
    /// Whether it was.
    was_there: bool,
    /// Whether the status stream flows.
    alive: AtomicBool,
    /// Whether etcd still lists it.
    listed: AtomicBool,
    /// Calls of this gateway in progress.
    requests: AtomicUsize,
    /// Prompt tokens of calls that have not brought a token yet.
    pending_tokens: AtomicU64,
    /// Of these, what prefill workers compute.
    handed_tokens: AtomicU64,
    full_until: Mutex<Option<Instant>>,
    faults: Faults,
    prefixes: Mutex<Option<PrefixIndex>>,
    /// Its place in the index of KV blocks.
    slot: Slot,
    /// Whether it says what it holds; otherwise `prefixes` is the guess.
    tells_blocks: AtomicBool,
    /// The blocks of prompts that it is computing, and how many of them each is in: it does not hold
    /// these yet, but will before the next request could be served.
    promised: Mutex<HashMap<BlockHash, usize>>,
    /// Wakes the connection task to look again at once.
    suspect: Notify,
}

/// What a worker serves.
pub struct Served {
    /// Its own words.
    pub description: WorkerDescription,
    /// The model.
    pub card: ModelCard,
    /// The model's tokenizer and template, shared by all workers that have the same.
    pub text: Arc<TextModel>,
    /// The adapter that the model is run with.
    pub adapter: Option<Adapter>,
}

impl Worker {
    /// A client for sequences, for the calling thread, which must belong to a runtime.
    pub fn client(&self) -> WorkerClient<Channel> {
        client(self.channels.get_or(|| connect_lazy(&self.sequences)))
    }

    /// A client for everything else.
    fn control(&self) -> WorkerClient<Channel> {
        client(&self.control)
    }

    /// What it serves, if it has answered.
    pub fn served(&self) -> Option<Arc<Served>> {
        self.served.load_full()
    }

    /// The names that clients may ask it for.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.adapters.load().names().cloned().collect();
        if let Some(served) = self.served() {
            names.push(served.card.name.clone());
            names.extend(served.card.aliases.iter().cloned());
        }
        names
    }

    /// Its last status.
    pub fn status(&self) -> Option<Arc<WorkerStatus>> {
        self.status.load_full()
    }

    /// What it had counted when this gateway began to watch it: what a worker did before this gateway
    /// was there is no growth of now, and all that one did which came later is.
    pub fn counted_before(&self) -> Arc<WorkerStatus> {
        self.first_status.get().cloned().unwrap_or_default()
    }

    /// Takes over what it says of itself.
    fn heard(&self, status: WorkerStatus) {
        let status = Arc::new(status);
        if self.was_there {
            // Only the first is kept.
            let _ = self.first_status.set(status.clone());
        }
        self.status.store(Some(status));
    }

    /// Whether it may be sent requests.
    pub fn alive(&self) -> bool {
        self.alive.load(Relaxed) && !self.status.load().as_ref().is_some_and(|s| s.draining)
    }

    /// Whether it lives, draining or not.
    pub fn answers(&self) -> bool {
        self.alive.load(Relaxed)
    }

    /// Whether it takes sequences of so many tokens: workers of a model may have been given
    /// different lengths.
    fn takes(&self, tokens: usize) -> bool {
        self.served().is_some_and(|served| served.card.max_model_len as usize >= tokens)
    }

    /// Takes the worker out of routing until it answers again.
    pub fn mark_down(&self) {
        self.alive.store(false, Relaxed);
        self.suspect.notify_one();
    }

    /// Takes a worker out of routing that said so before its status did.
    pub fn mark_draining(&self) {
        if let Some(status) = self.status().filter(|status| !status.draining) {
            let status = WorkerStatus { draining: true, ..(*status).clone() };
            self.status.store(Some(Arc::new(status)));
        }
    }

    /// Passes the worker over for a moment.
    pub fn mark_full(&self) {
        *self.full_until.lock() = Some(Instant::now() + FULL_FOR);
    }

    /// Whether its steps fail, one after the other.
    fn fails(&self) -> bool {
        self.faults.too_many(self.requests.load(Relaxed) > 0, Instant::now())
    }

    fn candidate(&self, hashes: &[BlockHash], depths: &Depths, block_size: usize) -> Candidate {
        let status = self.status.load();
        let reported = status.as_ref().map_or(0, |s| (s.running + s.waiting) as usize);
        let free = status.as_ref().map_or(0, |s| {
            s.kv_blocks_total.saturating_sub(s.kv_blocks_requests + s.kv_blocks_handoff)
        });
        let matching = if self.tells_blocks.load(Relaxed) {
            let held = depths.iter().find(|(slot, _)| *slot == self.slot).map_or(0, |(_, n)| *n);
            let promised = self.promised.lock();
            held + hashes[held..].iter().take_while(|hash| promised.contains_key(hash)).count()
        } else {
            self.prefixes.lock().as_ref().map_or(0, |index| index.matching(hashes))
        };
        Candidate {
            free_tokens: (free as usize).saturating_mul(block_size),
            cached_tokens: matching * block_size,
            requests: self.requests.load(Relaxed).max(reported),
            pending_tokens: self.pending_tokens.load(Relaxed),
            handed_tokens: self.handed_tokens.load(Relaxed),
            full: self.full_until.lock().is_some_and(|until| Instant::now() < until),
        }
    }
}

fn client(channel: &Channel) -> WorkerClient<Channel> {
    WorkerClient::new(channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// A worker chosen for a request. Dropping it takes the request off its account.
pub struct Ticket {
    /// The worker.
    pub worker: Arc<Worker>,
    /// Leading prompt tokens that it is believed to have cached.
    pub cached_tokens: usize,
    /// Prompt tokens that it has not, until they have been computed.
    pending: u64,
    /// Those of them that a prefill worker computes.
    handed: u64,
    /// The prompt's blocks, until it has been computed.
    promised: Vec<BlockHash>,
    /// The worker as it was before.
    before: Candidate,
    /// When it was chosen.
    since: Instant,
}

impl Ticket {
    fn new(
        worker: Arc<Worker>,
        before: Candidate,
        prompt_tokens: usize,
        hashes: &[BlockHash],
    ) -> Self {
        let cached_tokens = before.cached_tokens.min(prompt_tokens);
        let pending = (prompt_tokens - cached_tokens) as u64;
        {
            let mut promised = worker.promised.lock();
            hashes.iter().for_each(|hash| *promised.entry(*hash).or_default() += 1);
        }
        worker.requests.fetch_add(1, Relaxed);
        worker.pending_tokens.fetch_add(pending, Relaxed);
        Self {
            worker,
            cached_tokens,
            pending,
            handed: 0,
            promised: hashes.to_vec(),
            before,
            since: Instant::now(),
        }
    }

    /// Notes that a prefill worker computes the prompt.
    fn hand_off(&mut self) {
        self.handed = self.pending;
        self.worker.handed_tokens.fetch_add(self.handed, Relaxed);
    }

    /// Notes that a step with the request has failed.
    pub fn step_failed(&self) {
        if self.worker.faults.failed(self.since, Instant::now()) {
            let id = &self.worker.record.id;
            warn!(id, "a worker fails every step: it is passed over while there are others");
        }
    }

    /// Notes that a step with the request has brought a token.
    pub fn step_done(&self) {
        self.worker.faults.good();
    }

    /// Notes that the prompt has been computed.
    pub fn answered(&mut self) {
        self.worker.pending_tokens.fetch_sub(std::mem::take(&mut self.pending), Relaxed);
        self.worker.handed_tokens.fetch_sub(std::mem::take(&mut self.handed), Relaxed);
        let mut promised = self.worker.promised.lock();
        for hash in std::mem::take(&mut self.promised) {
            if let Entry::Occupied(mut count) = promised.entry(hash) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.answered();
        self.worker.requests.fetch_sub(1, Relaxed);
    }
}

/// All workers.
pub struct Registry {
    workers: RwLock<BTreeMap<String, Arc<Worker>>>,
    tasks: Mutex<HashMap<String, AbortHandle>>,
    /// By the digest of the tokenizer; locked while one is fetched.
    texts: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Weak<TextModel>>>>>,
    etcd_connected: AtomicBool,
    /// Whether the workers are known that were there before this gateway.
    begun: AtomicBool,
    /// Which of them hold which KV blocks.
    pub kv: Arc<RwLock<KvIndex>>,
    policy: Policy,
    /// What was routed: sequences to workers that generate, prompts to prefill workers, texts.
    turns: [AtomicUsize; 3],
    coordinators: RwLock<Vec<String>>,
    /// The names that workers served which have left.
    departed: Arc<Departed>,
    /// Where the last sequences were computed.
    pub recent: Recent,
    /// Woken when a worker joins or its adapters change.
    pub adapters_changed: Notify,
}

impl Registry {
    fn new(policy: Policy) -> Self {
        Self {
            workers: RwLock::default(),
            tasks: Mutex::default(),
            texts: Mutex::default(),
            etcd_connected: AtomicBool::new(true),
            begun: AtomicBool::new(false),
            kv: Arc::new(RwLock::new(KvIndex::new(MAX_INDEXED))),
            policy,
            turns: Default::default(),
            coordinators: RwLock::default(),
            departed: Arc::default(),
            recent: Recent::default(),
            adapters_changed: Notify::new(),
        }
    }

    /// Follows the cluster's membership for as long as the process lives.
    pub fn start(watch: ClusterWatch, policy: Policy) -> Arc<Self> {
        let registry = Arc::new(Self::new(policy));
        let follower = registry.clone();
        let mut view = watch.subscribe();
        registry.apply(&view.borrow_and_update().clone());
        tokio::spawn(async move {
            // Owns the watch: it lives as long as the task.
            let _watch = watch;
            loop {
                let membership = view.borrow_and_update().clone();
                follower.apply(&membership);
                if view.changed().await.is_err() {
                    return;
                }
            }
        });
        registry
    }

    /// Whether etcd answers.
    pub fn etcd_connected(&self) -> bool {
        self.etcd_connected.load(Relaxed)
    }

    /// Addresses of the coordinators, as etcd lists them.
    pub fn coordinators(&self) -> Vec<String> {
        self.coordinators.read().clone()
    }

    /// All workers, by instance id.
    pub fn workers(&self) -> Vec<Arc<Worker>> {
        self.workers.read().values().cloned().collect()
    }

    /// What serves `model`, whatever it does; `model` is a name of a model or of an adapter. With an
    /// empty name, whatever was there first, and what generates before anything else.
    pub fn served(&self, model: &str) -> Option<Arc<Served>> {
        let generating = || self.named(model, |served| served.does(&[Task::Generate]));
        generating().or_else(|| self.named(model, |_| true))
    }

    /// Whether a worker that served `model` has left within the last hour: there may be one again.
    pub fn awaits(&self, model: &str) -> bool {
        self.departed.awaits(model, Instant::now())
    }

    /// An adapter was taken away: nobody waits for a worker that had it.
    pub fn unloaded(&self, adapter: &str) {
        self.departed.strike(adapter);
        let workers = self.workers();
        workers.iter().filter(|it| !it.answers()).for_each(|it| it.forget_adapter(adapter));
    }

    /// What a worker that answers clients has to offer: of one that is up, if there is one, and of
    /// the one that was there first.
    fn find(&self, offer: impl Fn(&Worker) -> Option<Arc<Served>>) -> Option<Arc<Served>> {
        let workers = self.workers();
        let answering = workers.iter().filter(|worker| worker.record.role.answers());
        answering
            .filter_map(|worker| Some((!worker.alive(), worker.record.started_ms, offer(worker)?)))
            .min_by_key(|(down, started, _)| (*down, *started))
            .map(|(_, _, served)| served)
    }

    /// One of each model that can be asked, by name.
    pub fn models(&self) -> Vec<Arc<Served>> {
        let mut models = BTreeMap::new();
        let workers = self.workers();
        let answering = workers.iter().filter(|worker| worker.record.role.answers());
        for served in answering.filter_map(|worker| worker.served()) {
            models.entry(served.card.name.clone()).or_insert(served);
        }
        models.into_values().collect()
    }

    /// Whether something could be served now.
    pub fn ready(&self) -> bool {
        self.workers.read().values().any(|worker| {
            worker.record.role.answers() && worker.alive() && worker.served.load().is_some()
        })
    }

    /// Waits, for so long at most, until all workers that are registered have told what they serve:
    /// a gateway that has just started must not refuse what it could serve in a moment.
    pub async fn found(&self, within: Duration) {
        let found = async {
            let unknown = |worker: &Arc<Worker>| {
                worker.record.role.answers() && !(worker.alive() && worker.served().is_some())
            };
            while self.workers().iter().any(unknown) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(within, found).await;
    }

    /// Chooses the worker that generates after `tokens` tokens, of which it has to compute
    /// `missing`; `None` when nobody answers that has room for them but instances in `avoid`.
    pub fn choose_decode(
        &self,
        served: &Served,
        (tokens, missing): (usize, usize),
        hashes: &[BlockHash],
        avoid: &[String],
    ) -> Option<Ticket> {
        let ticket = self.choose(served, missing, hashes, &self.turns[0], avoid, |worker| {
            worker.record.role.generates() && worker.takes(tokens)
        })?;
        let worker = &ticket.worker;
        if !worker.tells_blocks.load(Relaxed)
            && let Some(prefixes) = &mut *worker.prefixes.lock()
        {
            prefixes.insert(hashes);
        }
        Some(ticket)
    }

    /// A worker that had a sequence, if it answers, draining or not.
    pub fn back_to(&self, worker: &Arc<Worker>, prompt_tokens: usize) -> Option<Ticket> {
        let before = worker.candidate(&[], &Depths::new(), 1);
        worker.answers().then(|| Ticket::new(worker.clone(), before, prompt_tokens, &[]))
    }

    /// The workers of a model that answer, of every role.
    pub fn of_model(&self, served: &Served) -> Vec<Arc<Worker>> {
        let mut workers = self.workers();
        workers.retain(|worker| worker.alive() && worker.serves(served));
        workers
    }

    /// Chooses the worker that computes a prompt for the one of `decode`; `None` when nobody does, or
    /// none is worth waiting for.
    pub fn choose_prefill(
        &self,
        served: &Served,
        prompt_tokens: usize,
        hashes: &[BlockHash],
        decode: &mut Ticket,
    ) -> Option<Ticket> {
        let (worker, before) =
            self.pick(served, prompt_tokens, hashes, &self.turns[1], &[], |worker| {
                worker.record.role == InstanceRole::Prefill
            })?;
        if !worth_handing_off(&before, &decode.before, decode.pending) {
            return None;
        }
        decode.hand_off();
        Some(Ticket::new(worker, before, prompt_tokens, hashes))
    }

    fn choose(
        &self,
        served: &Served,
        prompt_tokens: usize,
        hashes: &[BlockHash],
        turn: &AtomicUsize,
        avoid: &[String],
        eligible: impl Fn(&Worker) -> bool,
    ) -> Option<Ticket> {
        let (worker, before) = self.pick(served, prompt_tokens, hashes, turn, avoid, eligible)?;
        Some(Ticket::new(worker, before, prompt_tokens, hashes))
    }

    /// The best of the eligible workers of a model but those in `avoid`, and how it was seen.
    fn pick(
        &self,
        served: &Served,
        prompt_tokens: usize,
        hashes: &[BlockHash],
        turn: &AtomicUsize,
        avoid: &[String],
        eligible: impl Fn(&Worker) -> bool,
    ) -> Option<(Arc<Worker>, Candidate)> {
        let (failing, sound): (Vec<_>, Vec<_>) = self
            .workers()
            .into_iter()
            .filter(|worker| worker.alive() && eligible(worker))
            .filter(|worker| worker.serves(served))
            .partition(|worker| worker.fails());
        // Better those that have no room, or have failed this request, than who fails them all.
        let mut workers = if sound.is_empty() { failing } else { sound };
        workers.retain(|worker| !avoid.contains(&worker.record.id));
        let block_size = served.block_size();
        let depths = self.kv.read().depths(hashes);
        let candidates: Vec<Candidate> =
            workers.iter().map(|worker| worker.candidate(hashes, &depths, block_size)).collect();
        let turn = turn.fetch_add(1, Relaxed);
        let at = choose(self.policy, turn, prompt_tokens, &candidates)?;
        Some((workers[at].clone(), candidates[at]))
    }

    fn apply(self: &Arc<Self>, membership: &Membership) {
        self.etcd_connected.store(membership.etcd_connected, Relaxed);
        let instances = membership.instances.values();
        let coordinators = instances.filter(|it| it.role == InstanceRole::Coordinator);
        *self.coordinators.write() = coordinators.map(|it| it.address.clone()).collect();
        let mut workers = self.workers.write();
        for (id, worker) in &*workers {
            worker.listed.store(membership.instances.contains_key(id), Relaxed);
        }
        // A worker that is not listed but still answers stays: a lease that ran out is a hint.
        let gone: Vec<String> = workers
            .iter()
            .filter(|(_, worker)| !worker.listed.load(Relaxed) && !worker.alive.load(Relaxed))
            .map(|(id, _)| id.clone())
            .collect();
        gone.iter().for_each(|id| self.forget(&mut workers, id));
        for record in membership.instances.values() {
            if record.role.is_worker()
                && !workers.contains_key(&record.id)
                && let Some((worker, task)) = connection::start(self, record.clone())
            {
                let (id, address) = (&record.id, &record.address);
                info!(id, role = %record.role, address, "worker found");
                self.tasks.lock().insert(id.clone(), task);
                workers.insert(id.clone(), worker);
            }
        }
        self.begun.store(true, Relaxed);
    }

    fn forget(&self, workers: &mut BTreeMap<String, Arc<Worker>>, id: &str) {
        if let Some(worker) = workers.remove(id)
            && worker.record.role.answers()
        {
            let now = Instant::now();
            worker.names().into_iter().for_each(|name| self.departed.add(name, now));
        }
        if let Some(task) = self.tasks.lock().remove(id) {
            task.abort();
        }
        info!(id, "worker gone");
    }

    /// Called by a connection that broke: etcd no longer lists the worker, and now it is silent.
    fn forget_unlisted(&self, worker: &Worker) {
        let mut workers = self.workers.write();
        // Under the lock: etcd may be listing it again at this moment.
        if !worker.listed.load(Relaxed) {
            self.forget(&mut workers, &worker.record.id);
        }
    }
}

impl Served {
    /// The name in replies: the adapter's, or the model's first.
    pub fn name(&self) -> &str {
        self.adapter.as_ref().map_or(&self.card.name, |adapter| &adapter.name)
    }

    /// Whether the model has this name.
    fn answers_to(&self, name: &str) -> bool {
        self.card.name == name || self.card.aliases.iter().any(|alias| alias == name)
    }

    /// Where the addresses of its KV blocks start, under a salt.
    pub fn root(&self, salt: &str) -> BlockHash {
        let root = BlockHash::root(salt);
        self.adapter.as_ref().map_or(root, |adapter| root.with_adapter(&adapter.digest))
    }

    /// Whether an answer may go on there: the same name, weights and tokenizer.
    fn equals(&self, other: &Self) -> bool {
        let (one, two) = (&self.card, &other.card);
        one.name == two.name
            && one.weights_digest == two.weights_digest
            && one.tokenizer_digest == two.tokenizer_digest
    }

    /// Tokens in a KV block.
    pub fn block_size(&self) -> usize {
        self.description.kv_layout.as_ref().map_or(16, |layout| layout.block_size.max(1) as usize)
    }

    /// Size of the KV blocks that hold this many tokens, in bytes.
    pub fn kv_bytes(&self, tokens: u32) -> u64 {
        let blocks = (tokens as usize).div_ceil(self.block_size()) as u64;
        blocks * self.block_bytes()
    }

    /// Size of a KV block over all layers, in bytes; 0 when the worker does not say.
    pub fn block_bytes(&self) -> u64 {
        self.description.kv_layout.as_ref().map_or(0, |layout| layout.block_bytes)
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::AdapterList;

    use super::*;

    #[tokio::test]
    async fn prompts_that_are_handed_off_do_not_keep_a_decode_worker_from_computing() {
        let registry = fake::registry();
        let served = fake::served("m");
        fake::list(&registry, &[("d", InstanceRole::Decode), ("p", InstanceRole::Prefill)]);
        let [decode, prefill] = ["d", "p"].map(|id| fake::serves(&registry, id, &served));
        let send = || {
            let mut ticket = registry.choose_decode(&served, (1000, 1000), &[], &[]).unwrap();
            let peer = registry.choose_prefill(&served, 1000, &[], &mut ticket);
            (ticket, peer)
        };
        let sent: Vec<_> = (0..10).map(|_| send()).collect();
        // What BACKLOG holds, and then in turns.
        let handed: Vec<bool> = sent.iter().map(|(_, peer)| peer.is_some()).collect();
        assert_eq!(handed[..4], [true; 4]);
        assert_eq!(handed[4..].iter().filter(|handed| **handed).count(), 2, "{handed:?}");
        drop(sent);
        for worker in [decode, prefill] {
            let left = [&worker.pending_tokens, &worker.handed_tokens].map(|it| it.load(Relaxed));
            assert_eq!((left, worker.requests.load(Relaxed)), ([0, 0], 0));
        }
    }

    #[tokio::test]
    async fn a_worker_whose_steps_fail_is_passed_over_unless_it_is_the_last() {
        let registry = fake::registry();
        let served = fake::served("m");
        fake::list(&registry, &[("a", InstanceRole::Unified), ("b", InstanceRole::Unified)]);
        let [a, b] = ["a", "b"].map(|id| fake::serves(&registry, id, &served));
        let choose = |avoid: &[&str]| {
            let avoid: Vec<String> = avoid.iter().map(|id| (*id).to_owned()).collect();
            registry.choose_decode(&served, (10, 10), &[], &avoid)
        };
        let chosen = |avoid: &[&str]| choose(avoid).map(|ticket| ticket.worker.record.id.clone());
        for _ in 0..3 {
            assert_eq!(chosen(&["b"]).as_deref(), Some("a"));
            // Two requests of one step.
            let tickets = [choose(&["b"]), choose(&["b"])];
            tickets.iter().flatten().for_each(Ticket::step_failed);
        }
        assert!((0..4).all(|_| chosen(&[]).as_deref() == Some("b")));
        // Who was refused by the others waits for them.
        assert_eq!(chosen(&["b"]), None);
        b.mark_down();
        assert_eq!(chosen(&[]).as_deref(), Some("a"));
        b.alive.store(true, Relaxed);
        a.faults.good();
        assert_eq!(chosen(&["b"]).as_deref(), Some("a"));
    }

    #[tokio::test]
    async fn a_model_whose_workers_left_is_awaited_and_one_that_never_was_is_not() {
        let registry = fake::registry();
        let (left, right) = (("l", InstanceRole::Unified), ("r", InstanceRole::Unified));
        fake::list(&registry, &[left, right]);
        let model = fake::served("left");
        let worker = fake::serves(&registry, "l", &model);
        fake::serves(&registry, "r", &fake::served("right"));
        let loaded = |names: &[&str], version: u64| {
            let adapters =
                names.iter().map(|name| Adapter { name: (*name).to_owned(), ..Adapter::default() });
            let adapters = adapters.collect();
            worker.set_adapters(&model, AdapterList { adapters, version });
        };
        loaded(&["kept", "unloaded"], 1);
        let able = |name: &str| registry.able(name, &[Task::Generate]);
        assert!(["left", "right", "kept", "unloaded"].iter().all(|name| able(name).is_ok()));
        loaded(&["kept"], 2);
        assert!(matches!(able("unloaded"), Err(Lack::Unknown)));
        // It is silent, and its lease is over.
        worker.alive.store(false, Relaxed);
        fake::list(&registry, &[right]);
        for name in ["left", "kept"] {
            assert!(registry.awaits(name) && matches!(able(name), Err(Lack::Nobody)), "{name}");
        }
        for name in ["unloaded", "never"] {
            assert!(!registry.awaits(name) && matches!(able(name), Err(Lack::Unknown)), "{name}");
        }
        assert!(able("right").is_ok());
        // A worker that comes back without an adapter that others had when they left.
        fake::list(&registry, &[left, right]);
        let back = fake::serves(&registry, "l", &model);
        assert!(able("left").is_ok() && matches!(able("kept"), Err(Lack::Nobody)));
        back.forget_adapter("kept");
        assert!(matches!(able("kept"), Err(Lack::Unknown)));
    }
}
