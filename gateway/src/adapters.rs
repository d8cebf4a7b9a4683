//! LoRA adapters of the whole cluster: loaded on all workers of a model, or on none.
//!
//! What is loaded is recorded in etcd, so it outlives gateways, and all gateways see it. Each
//! gateway compares the records with what workers say they have, when a worker joins and every few
//! seconds: workers that lack an adapter get it, and adapters that are recorded no more go. Doing
//! that twice changes nothing. Adapters from a worker's own flags are the worker's affair.
//!
//! A load claims the name first: until the claim is given back, or its gateway has died, no other
//! gateway loads under the name, and no comparison touches what workers have under it. A record is
//! put when all workers have the adapter. So a load that ends in the middle is undone by the next
//! comparison.
//!
//! An etcd that lost its data is told what each gateway saw there last, before anything is compared.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_membership::{AdapterRecord, AdapterStore, Adapters, Claim, MembershipError};
use baton_proto::adapter::bad_name;
use baton_proto::v1::{Adapter, AdapterList, LoadAdapterRequest, Task};
use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tonic::{Code, Status};
use tracing::{info, warn};

use crate::error::ApiError;
use crate::workers::{Registry, Served, Worker};

/// How long a worker may take to read an adapter.
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a change waits for the one before it.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two comparisons of records and workers.
const COMPARE_EVERY: Duration = Duration::from_secs(2);
/// How long strays stay after etcd was found empty: other gateways may still be telling it what they
/// saw there.
const SETTLE: Duration = Duration::from_secs(6);
/// How long a worker that could not load an adapter is left alone with it.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What is to be loaded.
#[derive(Clone, Debug)]
pub struct Load {
    /// The name that clients will use.
    pub name: String,
    /// The folder, as workers see it.
    pub path: String,
    /// Whether an adapter of the name is replaced.
    pub in_place: bool,
    /// A name of the model; needed where there are several.
    pub base: Option<String>,
}

/// The adapters of the cluster.
pub struct Catalog {
    registry: Arc<Registry>,
    store: AdapterStore,
    /// Changes run here, to their end, whether or not the client waits.
    runtime: Handle,
    /// One change at a time.
    turn: Mutex<()>,
}

impl Catalog {
    /// Keeps workers as the records say, for as long as the process lives.
    pub fn start(registry: Arc<Registry>, store: AdapterStore) -> Arc<Self> {
        let runtime = Handle::current();
        let catalog = Arc::new(Self { registry, store, runtime, turn: Mutex::default() });
        tokio::spawn(catalog.clone().keep());
        catalog
    }

    /// Loads an adapter on all workers of its model, or on none.
    pub async fn load(self: &Arc<Self>, load: Load) -> Result<(), ApiError> {
        let catalog = self.clone();
        self.to_the_end(async move { catalog.try_load(load).await }).await
    }

    /// Takes an adapter away from new requests; those that run with it finish.
    pub async fn unload(self: &Arc<Self>, name: String) -> Result<(), ApiError> {
        let catalog = self.clone();
        self.to_the_end(async move { catalog.try_unload(&name).await }).await
    }

    async fn to_the_end(
        &self,
        change: impl Future<Output = Result<(), ApiError>> + Send + 'static,
    ) -> Result<(), ApiError> {
        let change = self.runtime.spawn(change);
        change.await.map_err(|_| ApiError::internal("The change of an adapter failed."))?
    }

    async fn turn(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, ApiError> {
        let turn = tokio::time::timeout(TURN_TIMEOUT, self.turn.lock()).await;
        turn.map_err(|_| ApiError::unavailable("Another adapter is being loaded; try again."))
    }

    async fn try_load(&self, load: Load) -> Result<(), ApiError> {
        let Load { name, path, in_place, base } = load;
        if let Some(reason) = bad_name(&name) {
            let message = format!("The 'lora_name' {reason}.");
            return Err(ApiError::adapter_refused(message).param("lora_name"));
        }
        let _turn = self.turn().await?;
        let base = self.base(base)?;
        if self.registry.served(&name).is_some_and(|served| served.adapter.is_none()) {
            let message = format!("'{name}' is the name of a model.");
            return Err(ApiError::adapter_refused(message).param("lora_name"));
        }
        let Some(claim) = self.store.claim(&name).await.map_err(no_etcd)? else {
            let message =
                format!("Another gateway is loading the lora adapter '{name}'; try again.");
            return Err(ApiError::unavailable(message));
        };
        let request = LoadAdapterRequest { name, path, in_place, digest: String::new() };
        let loaded = self.load_claimed(request, &base, &claim).await;
        claim.release().await;
        if loaded.is_ok() {
            // Workers that joined meanwhile.
            self.registry.adapters_changed.notify_one();
        }
        loaded
    }

    async fn load_claimed(
        &self,
        request: LoadAdapterRequest,
        base: &Arc<Served>,
        claim: &Claim,
    ) -> Result<(), ApiError> {
        let name = &request.name;
        let known = self.registry.served(name);
        let before = self.store.list().await.map_err(no_etcd)?.records;
        let before = before.into_iter().find(|record| record.name == *name);
        if !request.in_place && (known.is_some() || before.is_some()) {
            return Err(exists(name));
        }
        let owner = before.map(|record| record.base);
        let owner = owner.or_else(|| known.map(|served| served.card.name.clone()));
        if let Some(other) = owner.filter(|owner| *owner != base.card.name) {
            let message = format!("The lora adapter '{name}' belongs to the model '{other}'.");
            return Err(ApiError::adapter_refused(message).param("base_model_name"));
        }
        let workers = self.registry.of_model(base);
        if workers.is_empty() {
            let message = format!("No worker that serves `{}` is running.", base.card.name);
            return Err(ApiError::unavailable(message));
        }
        let had: Vec<Option<Adapter>> = workers.iter().map(|worker| find(worker, name)).collect();
        let error = match load_on(&workers, &request).await {
            Ok(digest) => {
                let (name, path) = (name.clone(), request.path.clone());
                let record = AdapterRecord { name, path, base: base.card.name.clone(), digest };
                match claim.complete(&record).await {
                    Ok(()) => {
                        info!(record.name, workers = workers.len(), "adapter loaded");
                        return Ok(());
                    }
                    Err(error) => no_etcd(error),
                }
            }
            Err(error) => error,
        };
        // Back to what was. Should a part of this fail, the comparison does it later.
        let undo = workers.iter().zip(had).map(|(worker, had)| restore(worker, name, had));
        join_all(undo).await;
        Err(error)
    }

    async fn try_unload(&self, name: &str) -> Result<(), ApiError> {
        let _turn = self.turn().await?;
        // First, so that no comparison brings it back.
        let recorded = self.store.remove(name).await.map_err(no_etcd)?;
        self.registry.unloaded(name);
        let workers = self.registry.workers();
        let holders = workers.iter().filter(|worker| find(worker, name).is_some());
        let unloaded: Vec<bool> = join_all(holders.map(|worker| unload_from(worker, name))).await;
        if !recorded && unloaded.is_empty() {
            let message = format!("The lora adapter '{name}' cannot be found.");
            return Err(ApiError::unknown_adapter(message).param("lora_name"));
        }
        info!(name, workers = unloaded.len(), "adapter unloaded");
        Ok(())
    }

    /// The model that an adapter is for.
    fn base(&self, name: Option<String>) -> Result<Arc<Served>, ApiError> {
        let mut models = self.registry.models();
        models.retain(|served| served.does(&[Task::Generate]));
        match (name, &models[..]) {
            (_, []) => Err(ApiError::unavailable("No worker is running that serves a model.")),
            (Some(name), _) => {
                let served = self.registry.served(&name).filter(|served| served.adapter.is_none());
                served.ok_or_else(|| ApiError::unknown_model(&name).param("base_model_name"))
            }
            (None, [only]) => Ok(only.clone()),
            (None, several) => {
                let names: Vec<&str> = several.iter().map(|served| served.name()).collect();
                let message = format!(
                    "This cluster serves several models; say with 'base_model_name' which one the \
                     adapter is for: {}.",
                    names.join(", ")
                );
                Err(ApiError::adapter_refused(message).param("base_model_name"))
            }
        }
    }

    /// Compares records with workers, over and over.
    async fn keep(self: Arc<Self>) {
        let mut failed: HashMap<(String, String, String), Instant> = HashMap::new();
        // What was recorded last, and in which epoch.
        let mut known: Option<(String, Vec<AdapterRecord>)> = None;
        let mut settled = Instant::now() + SETTLE;
        loop {
            tokio::select! {
                () = self.registry.adapters_changed.notified() => {}
                () = tokio::time::sleep(COMPARE_EVERY) => {}
            }
            // Before the records: what a worker has by now was recorded before it had it.
            let workers: Vec<_> = self
                .registry
                .workers()
                .into_iter()
                .filter(|worker| worker.alive())
                .filter_map(|worker| Some((worker.served()?, worker.adapters()?, worker)))
                .collect();
            // Without etcd everything stays as it is.
            let Ok(Adapters { records, claimed, epoch }) = self.store.list().await else {
                continue;
            };
            // An etcd that was restored from nothing says nothing about what workers have.
            let Some(epoch) = epoch.filter(|epoch| known.iter().all(|(of, _)| of == epoch)) else {
                let lost = known.as_ref().map_or(&[][..], |(_, records)| records);
                match self.store.begin(lost).await {
                    Ok(()) => {
                        if !lost.is_empty() {
                            warn!(adapters = lost.len(), "etcd lost its data: recorded again");
                        }
                        known = None;
                        settled = Instant::now() + SETTLE;
                    }
                    Err(error) => warn!(%error, "cannot record the cluster's adapters"),
                }
                continue;
            };
            let before = known.iter().flat_map(|(_, before)| before);
            let unloaded = before.filter(|it| records.iter().all(|now| now.name != it.name));
            unloaded.for_each(|it| self.registry.unloaded(&it.name));
            known = Some((epoch, records.clone()));
            failed.retain(|_, at| at.elapsed() < RETRY_AFTER);
            let wanted = workers.iter().flat_map(|(served, adapters, worker)| {
                let own = records.iter().filter(|record| {
                    record.base == served.card.name && !claimed.contains(&record.name)
                });
                missing(own, adapters).map(move |record| (worker, record))
            });
            let wanted: Vec<_> = wanted
                .map(|(worker, record)| {
                    let AdapterRecord { name, digest, .. } = record.clone();
                    ((worker.record.id.clone(), name, digest), worker, record)
                })
                .filter(|(key, ..)| !failed.contains_key(key))
                .collect();
            let loads = wanted.into_iter().map(|(key, worker, record)| async move {
                let request = LoadAdapterRequest {
                    name: record.name.clone(),
                    path: record.path.clone(),
                    in_place: true,
                    digest: record.digest.clone(),
                };
                (key, load_one(worker, &request).await)
            });
            for ((id, name, digest), loaded) in join_all(loads).await {
                match loaded {
                    Ok(_) => info!(id, name, "a worker got an adapter that it lacked"),
                    Err(error) => {
                        warn!(id, name, %error, "a worker cannot load an adapter of the cluster");
                        failed.insert((id, name, digest), Instant::now());
                    }
                }
            }
            if Instant::now() < settled {
                continue;
            }
            let recorded = records.iter().map(|record| &record.name);
            let recorded: HashSet<&str> = recorded.chain(&claimed).map(String::as_str).collect();
            let stray = workers.iter().flat_map(|(_, adapters, worker)| {
                let stray = adapters.iter().filter(|it| !it.from_flags);
                stray
                    .filter(|adapter| !recorded.contains(adapter.name.as_str()))
                    .map(move |adapter| unload_from(worker, &adapter.name))
            });
            join_all(stray).await;
        }
    }
}

/// The records whose adapters a worker lacks.
fn missing<'a>(
    records: impl Iterator<Item = &'a AdapterRecord>,
    adapters: &[Adapter],
) -> impl Iterator<Item = &'a AdapterRecord> {
    records.filter(|record| {
        let has = |it: &Adapter| it.name == record.name && it.digest == record.digest;
        !adapters.iter().any(has)
    })
}

/// Loads on all; the digest that all of them found.
async fn load_on(
    workers: &[Arc<Worker>],
    request: &LoadAdapterRequest,
) -> Result<String, ApiError> {
    let all = join_all(workers.iter().map(|worker| load_one(worker, request))).await;
    let mut digests = HashSet::new();
    for (worker, loaded) in workers.iter().zip(all) {
        let list = loaded.map_err(|status| refused(worker, &status))?;
        let found = list.adapters.into_iter().find(|adapter| adapter.name == request.name);
        digests.extend(found.map(|adapter| adapter.digest));
    }
    let mut digests = digests.into_iter();
    match (digests.next(), digests.next()) {
        (Some(digest), None) => Ok(digest),
        _ => {
            let message = format!(
                "The workers hold different adapters at '{}'; put the same files on all of them.",
                request.path
            );
            Err(ApiError::bad_value("lora_path", message))
        }
    }
}

async fn load_one(worker: &Worker, request: &LoadAdapterRequest) -> Result<AdapterList, Status> {
    let call = worker.load_adapter(request.clone());
    let done = tokio::time::timeout(LOAD_TIMEOUT, call).await;
    done.unwrap_or_else(|_| Err(Status::deadline_exceeded("it took too long")))
}

/// Gives a worker back what it had under a name.
async fn restore(worker: &Worker, name: &str, had: Option<Adapter>) {
    let Some(had) = had else {
        unload_from(worker, name).await;
        return;
    };
    let request =
        LoadAdapterRequest { name: had.name, path: had.path, in_place: true, digest: had.digest };
    if let Err(error) = load_one(worker, &request).await {
        warn!(id = worker.record.id, name, %error, "a worker did not get its adapter back");
    }
}

/// Unloads from one worker; true when it had it.
async fn unload_from(worker: &Worker, name: &str) -> bool {
    let done = tokio::time::timeout(LOAD_TIMEOUT, worker.unload_adapter(name)).await;
    let done = done.unwrap_or_else(|_| Err(Status::deadline_exceeded("it took too long")));
    match done {
        Ok(_) => true,
        Err(status) if status.code() == Code::NotFound => {
            worker.forget_adapter(name);
            false
        }
        Err(error) => {
            // Until the next comparison.
            warn!(id = worker.record.id, name, %error, "a worker did not unload an adapter");
            worker.forget_adapter(name);
            true
        }
    }
}

fn find(worker: &Worker, name: &str) -> Option<Adapter> {
    worker.adapters()?.into_iter().find(|adapter| adapter.name == name)
}

/// Why a worker did not load an adapter, for the client.
fn refused(worker: &Worker, status: &Status) -> ApiError {
    let message = format!("Worker {}: {}.", worker.record.id, status.message());
    match status.code() {
        Code::NotFound => ApiError::unknown_adapter(message).param("lora_path"),
        Code::InvalidArgument | Code::FailedPrecondition => {
            ApiError::bad_value("lora_path", message)
        }
        Code::AlreadyExists | Code::ResourceExhausted => {
            ApiError::adapter_refused(message).param("lora_name")
        }
        _ => ApiError::unavailable(message),
    }
}

fn exists(name: &str) -> ApiError {
    let message = format!(
        "The lora adapter '{name}' has already been loaded. If you want to load the adapter in \
         place, set 'load_inplace' to true."
    );
    ApiError::adapter_refused(message).param("lora_name")
}

fn no_etcd(error: MembershipError) -> ApiError {
    ApiError::unavailable(format!("Adapters cannot be changed while etcd is away: {error}."))
}
